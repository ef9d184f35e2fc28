package rotation

import (
	"fmt"
	"slices"
	"time"

	"keyturn/internal/psk"
	"keyturn/internal/wire"
)

// KeyRotationScheduler is the consumer of a peer: it takes keys from the
// buffer and sets them as the tunnel's PSK, in step with the other end, and
// brings the ends together again when they are not.
//
// Step never fails: what cannot be done is named in a Note, shown in View,
// and tried again.
type KeyRotationScheduler struct {
	tunnel *Tunnel
	now    time.Time
	out    []Effect
	wake   time.Time // earliest moment at which a rule may change its mind

	// What WireGuard shows.
	last        Observed // newest dump that showed the peer; its PSK is not kept
	lastPrint   psk.Fingerprint
	ready       bool // there was such a dump
	absent      int  // dumps in a row without the peer
	handshakeAt time.Time
	alive       bool         // handshakeAt is known
	used        bool         // a key was committed on this handshake
	trying      [2]time.Time // first and last sign of handshake attempts since the session grew old
	unheard     [2]time.Time // first and last sign of sending while nothing but handshakes is heard
	received    time.Time    // the last sign of receiving anything
	sent        time.Time    // the last sign of sending anything that no knock began
	highest     time.Time    // reading of the wall clock
	born        time.Time    // no session is younger: the last handshake, or the first dump

	// What is set.
	installed  *record // nil: nothing of ours, or blocked
	setAt      time.Time
	blocked    bool
	block      *psk.Key // the random PSK that closes the tunnel, from the wish to block on
	underFound bool     // the last handshake was made under the PSK found
	probeAt    time.Time
	op         *operation

	// The journal.
	token        uint64
	confirmedIn  uint64 // token of the first Save that holds confirmed
	confirmed    uint64 // newest confirmed serial
	journaled    uint64 // the same, known to be in the journal
	saveAt       time.Time
	verifiedOnce bool   // a verified key was installed at some time
	keptFor      uint64 // newest confirmed serial for which the recovery key was looked at

	// The peer.
	session    wire.SessionID
	peerBoot   wire.BootID
	peer       *wire.Report // its newest, of this session
	early      *wire.Report // of a session that the KeyGenerator has not adopted yet
	peerSeq    uint64
	reportedAt time.Time // when the newest report came
	peerHigh   uint64    // the highest of its boot, of any session
	peerBack   bool      // it went below that since the last handshake
	seq        uint64
	heard      time.Time
	late       bool // a second connection is wanted (L5)
	attempt    uint32
	reportAt   time.Time
	reportNow  bool
	goodbye    bool
	stopping   bool // nothing is begun any more
	stopped    bool // Bye was sent

	// Rules that wait.
	notBefore     time.Time // client: no commit before
	nextNotBefore time.Time // client: no commit of a further key before
	setFailures   int       // of the client's own sets, in a row
	forgive       time.Time // a key that WireGuard refused may be tried again
	differsSince  time.Time
	hunting       bool
	stepAt        time.Time
	pollBefore    time.Time // a step waits for a dump that began after this
	huntProbe     time.Time
	failing       bool      // handshakes are tried without success (W1)
	told          bool      // the peer was told so
	toldBlank     bool      // the peer was told that WireGuard has had no handshake
	helpAt        time.Time // no further probe for the peer's sake before
	blankSince    time.Time // the peer's WireGuard has had no handshake, and this end's has
	toldDump      time.Time // when the dump began that the last report told of
	polledFor     time.Time // when W3 asked for a dump
	renewAt       time.Time // zero: no renewal is due
	inside        bool      // the last link ran inside the tunnel, or the first one will
	knocks        knocks
	notRenewed    time.Time // no renewal before
	rotate        bool
	restores      int
	restoredAt    time.Time
	restoreAt     time.Time
	aging, stale  bool
	rotations     uint64
	lastRotation  time.Time
	lastError     string
}

type opKind uint8

const (
	opCommit  opKind = iota + 1 // client: journal, ask, set
	opObey                      // server: journal, set, answer
	opRestore                   // set again what should be there
	opStep                      // of a hunt
	opBlock
	opRenew // no record
)

type stage uint8

const (
	saving stage = iota + 1
	asking
	setting
)

// operation is the one change under way.
type operation struct {
	kind    opKind
	stage   stage
	record  *record
	mode    wire.Mode
	attempt uint32 // server: of the commit to answer
	token   uint64
	since   time.Time // of the last question or retry
	why     string    // renew
}

// NewKeyRotationScheduler returns the scheduler of a tunnel, waiting for the
// first dump.
func NewKeyRotationScheduler(t *Tunnel) *KeyRotationScheduler {
	s := &KeyRotationScheduler{tunnel: t, inside: t.config.Inside}
	if r := t.lastConfirmed(); r != nil {
		s.confirmed, s.journaled = r.serial, r.serial
	}
	for _, r := range t.records {
		if !r.found() && !r.since.IsZero() || r.recovery {
			s.verifiedOnce = true
		}
	}
	return s
}

// Step takes one event and returns what is to be done, in order.
func (s *KeyRotationScheduler) Step(now time.Time, e Event) []Effect {
	s.now, s.out, s.wake = now, nil, time.Time{}
	s.tunnel.changed = false
	if s.tunnel.session != s.session {
		s.newSession()
	}
	switch e := e.(type) {
	case LinkUp:
		s.linkDown()
		s.inside = e.Inside
		s.goodbye = false
		s.heard = now
	case LinkDown:
		s.linkDown()
	case Observed:
		s.observe(e)
	case Saved:
		s.saved(e)
	case Set:
		s.set(e)
	case Rotate:
		s.rotate, s.notBefore = true, time.Time{}
	case Stop:
		if s.stopping {
			s.bye() // waited long enough
		}
		if !s.stopping && s.knocks.walking {
			s.knocks.leaving = now
			s.out = append(s.out, Poll{})
		}
		s.stopping = true
	case Received:
		s.receive(e.Message)
	}
	s.advance()
	if s.stopping && s.op == nil && s.knocks.leaving.IsZero() {
		s.bye()
	}
	if s.tunnel.changed {
		s.out = append(s.out, Wake{})
	}
	return s.out
}

// bye says goodbye, once.
func (s *KeyRotationScheduler) bye() {
	if !s.stopped {
		s.stopped = true
		s.send(&wire.Bye{Session: s.session, Reason: "the rotator stops"})
	}
}

// Stopped says that the scheduler has done what it had begun before Stop, and
// said goodbye.
func (s *KeyRotationScheduler) Stopped() bool { return s.stopped }

// Deadline returns when Step wants a Tick; false if only an event helps.
func (s *KeyRotationScheduler) Deadline() (time.Time, bool) { return s.wake, !s.wake.IsZero() }

// at asks for a Tick at t.
func (s *KeyRotationScheduler) at(t time.Time) {
	if t.After(s.now) && (s.wake.IsZero() || t.Before(s.wake)) {
		s.wake = t
	}
}

// due reports whether t has come, and asks for a Tick if not. The zero time
// never comes.
func (s *KeyRotationScheduler) due(t time.Time) bool {
	if t.IsZero() {
		return false
	}
	if s.now.Before(t) {
		s.at(t)
		return false
	}
	return true
}

// advance applies every rule that depends on state and time.
func (s *KeyRotationScheduler) advance() {
	if s.tunnel.session != s.session {
		s.newSession()
	}
	s.leave()
	s.listen()
	if s.due(s.saveAt) {
		s.save()
	}
	s.retry()
	if s.due(s.forgive) {
		s.forgiveFailed()
	}
	s.expire() // before restore, lest a stale key goes in again
	s.restore()
	s.compare()
	s.lead()
	s.knock()
	s.hunt()
	s.help()
	s.compareSessions()
	s.renew()
	if s.due(s.probeAt) {
		s.probeAt = time.Time{}
		s.out = append(s.out, Probe{})
	}
	s.failing = s.tried()
	s.report()
}

// newSession is B4 for the scheduler: the pulled key stays only if the peer
// named it as well. What is installed or journaled is not touched.
func (s *KeyRotationScheduler) newSession() {
	t := s.tunnel
	s.session = t.session
	if t.peerBoot != s.peerBoot {
		s.peerBoot, s.peerHigh, s.peerBack = t.peerBoot, 0, false
	}
	s.peer, s.peerSeq, s.differsSince = nil, 0, time.Time{}
	s.reportNow = true
	if s.op != nil && s.op.stage == asking {
		s.op = nil // repair or the next window will decide
	}
	if t.session != (wire.SessionID{}) && t.pulled != nil && !contains(t.peerHeld, t.pulled.name()) {
		s.dropPulled("the peer does not hold it")
	}
	if m := s.early; m != nil && m.Session == s.session && s.session != (wire.SessionID{}) {
		s.early, s.heard = nil, s.now
		s.reported(m)
	}
}

func (s *KeyRotationScheduler) linkDown() {
	s.peer, s.peerSeq, s.differsSince, s.session = nil, 0, time.Time{}, wire.SessionID{}
	s.notBefore = time.Time{}
	if s.op != nil && s.op.stage == asking {
		s.op = nil
	}
}

// listen is L5: a peer that sends nothing for four intervals is taken to be
// gone; after two, where the link has carried something before, the client
// dials a second connection.
func (s *KeyRotationScheduler) listen() {
	if !s.tunnel.linked || s.heard.IsZero() {
		return
	}
	interval := max(s.tunnel.config.Heartbeat, 2*time.Second)
	if s.peer != nil {
		interval = max(s.peer.Interval, time.Second)
	}
	if s.due(s.heard.Add(silentBeats * interval)) {
		s.heard, s.late = s.now, false
		s.at(s.heard.Add(silentBeats * interval))
		s.note(NoteSilent, none, fmt.Sprintf("no report for %v", silentBeats*interval))
		s.out = append(s.out, CloseLink{})
	}
	late := s.tunnel.config.Role == Client && s.peer != nil && s.due(s.heard.Add(lateBeats*interval))
	if late != s.late && s.session != (wire.SessionID{}) { // otherwise the link has just gone
		s.late = late
		s.out = append(s.out, Redial{Wanted: late})
	}
}

// report is C4: an end says what it has, at once if that changed.
func (s *KeyRotationScheduler) report() {
	t := s.tunnel
	if !t.linked || s.session == (wire.SessionID{}) {
		return
	}
	blank := s.ready && s.last.Handshake.IsZero() && s.now.Sub(s.last.Began) <= blankLate
	// Of a hub's dumps a report that goes when it is due seldom tells in time.
	again := blank && s.last.Began.Sub(s.toldDump) >= blankLate
	handshake := s.toldBlank && !s.last.Handshake.IsZero()
	if !s.reportNow && s.failing == s.told && !again && !handshake && !s.reportAt.IsZero() && !s.due(s.reportAt) {
		return
	}
	s.told, s.toldBlank, s.toldDump = s.failing, blank, s.last.Began
	s.seq++
	m := &wire.Report{
		Session: s.session, Seq: s.seq, Interval: t.config.Heartbeat,
		Blocked: s.blocked, Missing: !s.ready || s.absent > 1, Trying: s.failing, NoHandshake: blank,
		Confirmed: s.journaled, Held: limit(s.held()),
	}
	if s.installed != nil {
		m.Installed, m.Seen = s.installed.name(), s.installed.seen
	}
	s.send(m)
	s.reportNow = false
	s.reportAt = s.now.Add(t.config.Heartbeat)
	s.at(s.reportAt)
}

// held names every key that this end could set now: not one that has grown too
// old at this end, which the other cannot know.
func (s *KeyRotationScheduler) held() []wire.Named {
	return slices.DeleteFunc(s.tunnel.held(), func(n wire.Named) bool {
		r := s.tunnel.record(n)
		return r != nil && !s.usable(r)
	})
}

func (s *KeyRotationScheduler) receive(m wire.Message) {
	switch m := m.(type) {
	case *wire.Report:
		if m.Session != s.session {
			s.early = m
			break
		}
		s.heard = s.now
		s.reported(m)
	case *wire.Commit:
		if m.Session == s.tunnel.session && s.tunnel.config.Role == Server {
			s.heard = s.now
			s.commit(m)
		}
	case *wire.Committed:
		if m.Session == s.session {
			s.heard = s.now
			s.committed(m)
		}
	case *wire.Refused:
		if m.Session == s.session {
			s.heard = s.now
			s.refused(m)
		}
	case *wire.Bye:
		if m.Session == s.session && !s.goodbye {
			s.goodbye = true
			s.note(NoteGoodbye, none, m.Reason)
		}
	}
}

// reported takes in what the peer says of its keys.
func (s *KeyRotationScheduler) reported(m *wire.Report) {
	if m.Seq <= s.peerSeq {
		return // overtaken
	}
	t := s.tunnel
	if m.Seq <= s.peerHigh {
		// A handshake since the last report may be one of after that.
		s.peerBack, s.peerHigh = s.handshakeAt.Before(s.reportedAt), 0
	}
	s.peer, s.peerSeq, s.peerHigh, s.reportedAt = m, m.Seq, max(s.peerHigh, m.Seq), s.now
	in := s.installed
	if in != nil && s.op == nil && !m.Blocked && m.Installed.Fingerprint == in.print && !m.Missing {
		s.agree(in)
	}
	// C5: confirmed when both have seen it.
	for _, r := range t.records {
		if r.seen && !r.confirmed && !r.found() && (m.Installed == r.name() && m.Seen || m.Confirmed == r.serial) {
			s.confirm(r)
		}
	}
	s.recognise(m)
	// A committed key that the peer neither has installed nor holds can never
	// be accepted in this session. One that the client took from its buffer in
	// this session is only unlisted because the server could not set it (R1).
	if s.op == nil {
		base := t.base()
		for _, r := range slices.Clone(t.records) {
			if base != nil && r.serial > base.serial && r != s.installed && !r.lost && (r.session != s.session || t.config.Role == Server) && m.Installed != r.name() && !contains(m.Held, r.name()) {
				s.note(NoteDropped, r.name(), "the peer does not hold it")
				t.erase(r)
				s.save()
			}
		}
	}
	s.prune()
}

// agree is C2: both ends have r installed. A newer key that they agreed on
// before is one that the other end has lost, with its journal or by going back
// to a snapshot: it counts as committed only, until the next key is agreed on.
func (s *KeyRotationScheduler) agree(r *record) {
	if r.found() {
		return // it is a candidate as long as it can be one
	}
	changed := !r.agreed
	r.agreed = true
	for _, x := range s.tunnel.records {
		if x.serial > r.serial && (x.agreed || x.confirmed) {
			x.agreed, x.confirmed, x.lost = false, false, true
			changed = true
		}
	}
	if changed {
		s.save()
		s.prune()
	}
}

// confirm is C5.
func (s *KeyRotationScheduler) confirm(r *record) {
	r.confirmed, r.agreed = true, true
	s.note(NoteConfirmed, r.name(), "both ends saw a handshake under it")
	s.confirmed = max(s.confirmed, r.serial)
	s.confirmedIn = s.save()
	s.tunnel.changed = true
}

// prune is C7: a key is erased when no end can need it any more: a newer one
// is confirmed in both journals, or was reported installed by both ends.
func (s *KeyRotationScheduler) prune() {
	t := s.tunnel
	base, confirmed := t.base(), t.lastConfirmed()
	both := confirmed != nil && s.journaled >= confirmed.serial && s.peer != nil && s.peer.Confirmed >= confirmed.serial
	if both && s.keptFor != confirmed.serial {
		s.keptFor = confirmed.serial
		s.keep(confirmed)
	}
	erased := false
	for _, r := range slices.Clone(t.records) {
		switch {
		case r == s.installed || r == base || r == confirmed || s.op != nil && s.op.record == r:
		case base != nil && r.serial > base.serial:
		case r.found() && (confirmed == nil || t.config.Fallback || r.recovery):
		case !both && (r.confirmed || r.found() || confirmed != nil && r.serial < confirmed.serial):
		default:
			t.erase(r)
			erased = true
		}
	}
	if erased {
		s.save()
	}
}

// differs says whether the ends have different keys installed, as far as both
// are known.
func (s *KeyRotationScheduler) differs() bool {
	return s.peer != nil && s.installed != nil && !s.peer.Blocked && !s.peer.Missing && s.peer.Installed.Fingerprint != s.installed.print
}

// compare keeps the time since when repair has been due.
func (s *KeyRotationScheduler) compare() {
	switch {
	case s.op != nil && s.op.stage != asking:
	case !s.tunnel.linked || !s.differs():
		s.differsSince = time.Time{}
	case s.differsSince.IsZero():
		s.differsSince = s.now
	}
}

// usable says whether a key may still be set: under on_stale: block, none that
// has grown older than max_key_age.
func (s *KeyRotationScheduler) usable(r *record) bool {
	c := &s.tunnel.config
	if r.recovery {
		return !c.BlockStart && !c.BlockStale // it never grows old
	}
	if r.found() {
		return !c.BlockStart && !(c.BlockStale && s.blocked)
	}
	return !c.BlockStale || r.age(s.now) < c.MaxKeyAge
}

// wall returns the wall clock now, as far as the last dump told.
func (s *KeyRotationScheduler) wall() time.Time {
	return s.last.Wall.Add(s.now.Sub(s.last.Began))
}

func (s *KeyRotationScheduler) dropPulled(why string) {
	if p := s.tunnel.pulled; p != nil {
		s.note(NoteDropped, p.name(), why)
		p.key.Wipe()
		s.tunnel.pulled = nil
		s.tunnel.changed = true
	}
}

// save asks for the journal to be written and returns the token.
func (s *KeyRotationScheduler) save() uint64 {
	s.token++
	s.saveAt = time.Time{}
	for _, r := range s.tunnel.records {
		if r.saveToken == 0 {
			r.saveToken = s.token
		}
	}
	s.out = append(s.out, Save{Token: s.token, Journal: s.tunnel.journal()})
	return s.token
}

func (s *KeyRotationScheduler) saved(e Saved) {
	if e.Err != nil {
		s.failedTo("write the journal: " + e.Err.Error())
		s.saveAt = s.now.Add(setRetry)
	} else {
		for _, r := range s.tunnel.records {
			r.journaled = r.journaled || r.saveToken <= e.Token
		}
	}
	if e.Err == nil && s.confirmedIn != 0 && e.Token >= s.confirmedIn && s.journaled != s.confirmed {
		s.journaled = s.confirmed
		s.reportNow = true
		s.prune()
	}
	if op := s.op; op != nil && op.stage == saving && e.Token == op.token {
		s.journaledOp(e.Err)
	}
}

func (s *KeyRotationScheduler) failedTo(text string) {
	s.lastError = text
	s.note(NoteFailed, none, text)
}

func (s *KeyRotationScheduler) send(m wire.Message) { s.out = append(s.out, Send{m}) }

func (s *KeyRotationScheduler) note(k NoteKind, key wire.Named, text string) {
	s.out = append(s.out, Note{k, key, text})
}
