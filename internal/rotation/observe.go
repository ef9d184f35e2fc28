package rotation

import (
	"time"

	"keyturn/internal/psk"
)

// observe takes in a dump.
func (s *KeyRotationScheduler) observe(o Observed) {
	if o.Jumped {
		s.alive = false // ages are unknown until the next change: probe
		s.probeAt = s.now
	}
	if o.Wall.After(s.highest) {
		s.highest = o.Wall
	}
	if !o.Present {
		// A dump during which peers are removed can be short: one absence
		// says nothing.
		if s.absent++; s.absent == 2 {
			s.note(NoteMissing, none, "WireGuard does not know the peer")
		}
		return
	}
	if s.absent > 1 {
		s.note(NotePresent, none, "WireGuard knows the peer again")
		s.forgiveFailed()
	}
	s.absent = 0
	print := o.PSK.Fingerprint()
	previous := s.last
	first := !s.ready
	key := o.PSK
	o.PSK = nil
	s.last, s.lastPrint = o, print
	if first {
		s.ready, s.born, s.received = true, o.Began, o.Began
		s.judgeOnce(o)
		s.start(key, print)
		return
	}
	s.handshake(previous, o)
	s.watch(previous, o)
	s.readBack(key, print, o)
}

// judgeOnce is C1: before any change was seen, the handshake's stamp is
// judged by the local clock, once.
func (s *KeyRotationScheduler) judgeOnce(o Observed) {
	age := o.Wall.Sub(o.Handshake)
	if o.Handshake.IsZero() || age < 0 {
		return
	}
	s.born = o.Began.Add(-min(age, SessionLife))
	if age < SessionLife {
		s.alive, s.handshakeAt = true, s.born
	}
}

// handshake is C1 and C5: a handshake is a change of the stamp's value.
func (s *KeyRotationScheduler) handshake(previous, o Observed) {
	if o.Handshake.Equal(previous.Handshake) {
		return
	}
	if o.Handshake.IsZero() {
		s.alive = false // the peer or the interface was made anew
		return
	}
	s.alive, s.handshakeAt, s.born = true, s.now, s.now
	s.used, s.peerBack = false, false
	s.helpAt, s.received = time.Time{}, s.now
	// The dump before must have begun after the install, and the handshake be
	// shown at least 2 s after it: the responder's stamp can be later than
	// its use of the PSK.
	counts := !previous.Began.Before(s.setAt) && !o.Began.Before(s.setAt.Add(SeenAfter))
	switch {
	case s.installed != nil && s.installed.found():
		s.underFound = true
	case counts:
		s.underFound = false
	}
	s.trying, s.unheard = [2]time.Time{}, [2]time.Time{}
	if s.probeAt.After(s.now) {
		s.probeAt = time.Time{} // the other end's was faster
	}
	if s.hunting {
		s.endHunt("a handshake came")
	}
	in := s.installed
	if in == nil || in.found() || in.seen || s.setInProgress() || s.lastPrint != in.print {
		return
	}
	if counts {
		in.seen = true
		s.reportNow = true
		s.save()
		if s.peer != nil && s.peer.Installed == in.name() && s.peer.Seen {
			s.confirm(in)
		}
	}
}

func (s *KeyRotationScheduler) setInProgress() bool { return s.op != nil && s.op.stage == setting }

// watch collects the signs of handshakes that are tried without success (H1):
// bytes move although the session is older than its rekeying.
func (s *KeyRotationScheduler) watch(previous, o Observed) {
	// A session can be dead while it is young: the other end was made anew.
	// It then sends initiations, of 148 bytes each, and nothing else; a living
	// one answers data within 10 s, with a keepalive at the least.
	const initiation, retry = 148, 5 * time.Second
	if o.Rx < previous.Rx || o.Tx < previous.Tx {
		previous.Rx, previous.Tx = 0, 0 // they count from zero again
	}
	received := o.Rx - previous.Rx
	if received != 0 {
		s.received = s.now
	}
	echo := received == 0 && s.knocking() // of a knock, which nobody wanted but this end
	if o.Tx != previous.Tx && !echo {
		s.sent = s.now
	}
	most := uint64(initiation * (1 + o.Began.Sub(previous.Began)/retry))
	switch {
	case received%initiation != 0 || received > most:
		s.unheard = [2]time.Time{}
		if !s.alive {
			s.trying = [2]time.Time{} // of unknown age, but alive
		}
	case o.Tx != previous.Tx && !echo:
		s.mark(&s.unheard)
	}
	if s.alive && s.now.Sub(s.handshakeAt) < RekeyAfter && !s.gone() {
		return
	}
	if received != 0 || o.Tx != previous.Tx && !echo {
		s.mark(&s.trying)
	}
}

// mark notes the first and the last sign of something.
func (s *KeyRotationScheduler) mark(signs *[2]time.Time) {
	if signs[0].IsZero() {
		signs[0] = s.now
	}
	signs[1] = s.now
}

// idle says that there is no live session: none ever, or none for 180 s.
func (s *KeyRotationScheduler) idle() bool {
	if !s.alive {
		return true
	}
	return s.due(s.handshakeAt.Add(SessionLife))
}

// start is S1: the installed PSK is matched with the journal.
func (s *KeyRotationScheduler) start(key *psk.Key, print psk.Fingerprint) {
	t := s.tunnel
	defer func() { t.changed, s.reportNow = true, true }()
	var match, newest *record
	for _, r := range t.records {
		if !r.found() && s.usable(r) {
			newest = r
		}
		if r.print == print && (match == nil || match.found()) {
			match = r
		}
	}
	found := t.foundRecord()
	if newest == nil && found != nil && found.recovery && s.usable(found) {
		newest = found
	}
	switch {
	case match != nil && (!match.found() || match.recovery && s.usable(match)):
		s.installed, s.setAt = match, s.now
		if match.since.IsZero() {
			match.since, match.wall = s.now, s.wall()
		}
		s.verifiedOnce = true
	case newest != nil: // a reboot: WireGuard has come up with its original PSK
		s.installed = newest // if setting it fails, readBack sees that
		if !t.config.BlockStart || newest.confirmed {
			s.begin(&operation{kind: opRestore, record: newest})
		}
	case found == nil:
		found = &record{key: key.Clone(), print: print}
		t.insert(found)
		s.installed = found
		s.save()
	case match == found, found.recovery: // which nothing replaces, and which may not be set
		s.installed = match
	default: // changed before keyturn ever set a key
		s.adopt(key, print)
	}
	if found != nil && t.config.Fallback {
		t.initial = found.print
	}
	t.judged = true
	if t.config.BlockStart && (s.installed == nil || !s.installed.confirmed) || t.config.BlockStale && newest == nil && s.verifiedOnce {
		s.blockNow("no fresh confirmed key at the start")
	}
}

// adopt takes a PSK that somebody set before the first rotation for the one found.
func (s *KeyRotationScheduler) adopt(key *psk.Key, print psk.Fingerprint) {
	found := s.tunnel.foundRecord()
	if s.tunnel.config.Fallback {
		// The recorded one stays what the ends agreed on.
		found = &record{key: key.Clone(), print: print}
		s.installed = found
		return
	}
	found.key.Wipe()
	found.key, found.print = key.Clone(), print
	s.installed = found
	s.reportNow = true
	s.save()
}

// readBack is C4 and F1: a dump that began after the last set shows whether
// it took, and whether somebody else has changed the PSK since.
func (s *KeyRotationScheduler) readBack(key *psk.Key, print psk.Fingerprint, o Observed) {
	if s.op != nil && s.op.stage != asking || !o.Began.After(s.setAt) {
		return
	}
	if s.block != nil && !s.blocked && s.matches(print) {
		s.closed() // though WireGuard seemed to refuse
		s.reportNow = true
	}
	if s.matches(print) {
		if s.restores > 0 && s.now.Sub(s.restoredAt) > restoreReset {
			s.restores = 0
		}
		s.restoreAt = time.Time{}
		return
	}
	if !s.restoreAt.IsZero() {
		return // known, and waiting
	}
	// A set that was reported as failed may have taken all the same.
	for _, r := range s.tunnel.records {
		if r.doubtful && r.print == print {
			s.setAt = s.now
			s.install(r)
			s.note(NoteInstalled, r.name(), NotRefused)
			s.reportNow = true
			s.save()
			return
		}
	}
	if s.installed != nil && s.installed.found() && !s.installed.recovery && !s.verifiedOnce && s.block == nil {
		s.note(NoteForeign, none, "another PSK was set before the first rotation; taking it as found")
		s.adopt(key, print)
		return
	}
	what := "another PSK (" + print.String() + ") was set"
	if print.IsZero() {
		what = "the PSK was removed"
	}
	wait := time.Duration(0)
	if s.restores > 0 {
		wait = min(time.Second<<min(s.restores, 10), restoreMax)
		what += " again: another tool is at work on this tunnel"
	}
	s.note(NoteForeign, none, what)
	s.restoreAt = s.now.Add(wait)
	s.restores++
	s.restoredAt = s.restoreAt
}

// matches says whether a PSK is the one that should be there.
func (s *KeyRotationScheduler) matches(print psk.Fingerprint) bool {
	if s.block != nil {
		return s.block.Fingerprint() == print
	}
	return s.installed == nil || s.installed.print == print
}

// restore is F2: what should be there is set again, with a backoff where the
// foreign change recurs.
func (s *KeyRotationScheduler) restore() {
	if s.op != nil || s.absent > 1 || !s.due(s.restoreAt) {
		return
	}
	s.restoreAt = time.Time{}
	if s.block != nil {
		s.begin(&operation{kind: opBlock})
		return
	}
	s.begin(&operation{kind: opRestore, record: s.installed})
}

// expire is F3: no fresh key for max_key_age.
func (s *KeyRotationScheduler) expire() {
	c := &s.tunnel.config
	if s.installed == nil || s.installed.found() || s.installed.since.IsZero() {
		return
	}
	if !s.due(s.installed.since.Add(AgingAt(c.MaxKeyAge))) {
		s.aging, s.stale = false, false
		return
	}
	if !s.due(s.installed.since.Add(c.MaxKeyAge)) {
		s.stale = false
		if !s.aging {
			s.aging = true
			s.note(NoteAging, s.installed.name(), "no fresh key for "+AgingAt(c.MaxKeyAge).String())
		}
		return
	}
	if !s.stale {
		s.stale = true
		s.note(NoteStale, s.installed.name(), "no fresh key for "+c.MaxKeyAge.String())
	}
	if c.BlockStale && s.block == nil && s.op == nil && s.ready && s.absent < 2 {
		s.blockNow("the key is older than " + c.MaxKeyAge.String())
	}
}

func (s *KeyRotationScheduler) blockNow(why string) {
	k, err := psk.Random(s.tunnel.config.Random)
	if err != nil {
		s.failedTo(err.Error())
		return
	}
	s.block.Wipe()
	s.block = k
	s.note(NoteBlocked, none, why)
	s.begin(&operation{kind: opBlock})
}
