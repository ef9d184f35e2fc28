package rotation

import (
	"slices"
	"time"

	"keyturn/internal/wire"
)

// lead is what the client does on its own: repair where the ends differ (R1),
// otherwise the next commit (C2). The server never acts on its own.
func (s *KeyRotationScheduler) lead() {
	t := s.tunnel
	if s.stopping {
		return
	}
	if t.config.Role != Client || !t.linked || s.session == (wire.SessionID{}) || s.peer == nil ||
		s.op != nil || !s.ready || s.absent > 1 || s.peer.Missing {
		return
	}
	next := s.next()
	if !s.notBefore.IsZero() && !s.due(s.notBefore) {
		return
	}
	opening := s.blocked || s.peer.Blocked
	if !opening && s.differs() {
		if r := s.common(); r != nil {
			s.note(NoteRepairing, r.name(), "the ends have different keys installed")
			s.begin(&operation{kind: opCommit, record: r, mode: wire.ModeRepair})
		}
		return
	}
	if in := s.installed; !t.accepted || next == nil || !opening && in != nil && !in.found() && !in.agreed {
		return
	}
	if !opening && !s.nextNotBefore.IsZero() && !s.due(s.nextNotBefore) {
		return
	}
	if mode, ok := s.mode(opening); ok {
		s.begin(&operation{kind: opCommit, record: next, mode: mode})
	}
}

// mode says by which rule, if any, the next key may be committed now.
func (s *KeyRotationScheduler) mode(opening bool) (wire.Mode, bool) {
	in := s.installed
	if opening || s.degraded() {
		return wire.ModeIdle, true
	}
	if s.idle() {
		// C6: the PSK found is replaced at once, so that a new tunnel's first
		// session is protected already; a key of ours is renewed at half of
		// its greatest age. More would only burn keys: each commit's probe
		// makes a session that is lost again.
		return wire.ModeIdle, s.rotate || in == nil || in.found() || s.foundByPeer() || s.due(in.since.Add(s.tunnel.config.MaxKeyAge/2))
	}
	// C2: the key before must be confirmed, and the handshake unused.
	if s.used || in != nil && !in.found() && !in.confirmed && !s.foundByPeer() {
		return 0, false
	}
	if !s.due(s.handshakeAt.Add(MinAge)) {
		return 0, false
	}
	return wire.ModeWindow, s.inWindow()
}

// inWindow says whether the newest dump shows a handshake in the window.
func (s *KeyRotationScheduler) inWindow() bool {
	return s.alive && s.now.Sub(s.handshakeAt) <= s.tunnel.config.Parameters.Window
}

// foundByPeer says that the server lost its journal while the key stayed in its
// WireGuard: to it the key is the PSK found, which never becomes confirmed.
func (s *KeyRotationScheduler) foundByPeer() bool {
	return s.installed != nil && s.peer != nil && s.peer.Installed == wire.Named{Fingerprint: s.installed.print}
}

// degraded says that the ends have met on the PSK found at the first start
// although verified keys were in use (S3): go on to one at once.
func (s *KeyRotationScheduler) degraded() bool {
	return s.installed != nil && s.installed.found() && (s.verifiedOnce || s.peer != nil && s.peer.Confirmed > 0)
}

// next is C1: the lowest key above the installed one: a committed one that is
// not installed, else the pulled one, else the buffer's lowest.
func (s *KeyRotationScheduler) next() *record {
	t := s.tunnel
	floor := uint64(0)
	switch {
	case s.installed != nil:
		floor = s.installed.serial
	case s.peer.Installed.Serial > 0: // blocked: what the peer has opens the tunnel as well
		floor = s.peer.Installed.Serial - 1
	}
	for _, r := range t.records {
		if r.serial > floor && !r.confirmed && s.shared(r) {
			if r.failed {
				return nil // it is tried again; a fresh key would fare no better
			}
			return r
		}
	}
	if t.pulled == nil {
		if t.pulled = t.buffer.pull(); t.pulled != nil {
			t.pulled.session = s.session
			t.changed = true
		}
	}
	return t.pulled
}

// shared says whether both ends hold a record and may set it.
func (s *KeyRotationScheduler) shared(r *record) bool {
	return s.usable(r) && r.listed(s.tunnel.config.Fallback) &&
		(r.session == s.session || contains(s.peer.Held, r.name()))
}

// common is R1: the newest key that both ends hold. A key that was committed
// before comes first: it is a hunt's candidate already, and each fresh one
// would be another; the PSK found at the first start comes last.
func (s *KeyRotationScheduler) common() *record {
	t := s.tunnel
	failed := false
	for _, r := range slices.Backward(t.records) {
		if !r.found() && s.shared(r) {
			if !r.failed {
				return r
			}
			failed = true
		}
	}
	if failed {
		return nil // it is tried again
	}
	if r := s.next(); r != nil {
		return r
	}
	if found := t.foundRecord(); found != nil && s.shared(found) {
		return found
	}
	return nil
}

// begin starts an operation with its first step.
func (s *KeyRotationScheduler) begin(op *operation) {
	s.op = op
	op.since = s.now
	t := s.tunnel
	r := op.record
	if r != nil && r == t.pulled {
		t.pulled = nil
		t.changed = true
	}
	if r != nil && t.record(r.name()) == nil && !r.found() {
		t.insert(r)
	}
	switch op.kind {
	case opCommit, opObey:
		// J1: in the journal before commit is sent, and before the server sets it.
		op.stage = saving
		op.token = s.save()
	case opRenew:
		s.token++
		op.stage, op.token = setting, s.token
		s.out = append(s.out, Renew{op.token})
	default:
		s.setPSK()
	}
}

// journaledOp goes on once the key is in the journal, or gives up.
func (s *KeyRotationScheduler) journaledOp(err error) {
	op := s.op
	switch {
	case err != nil && op.kind == opObey:
		s.op = nil
		s.answer(op, wire.ReasonFailed)
	case err != nil:
		s.op = nil
		s.notBefore = s.now.Add(setRetry)
	case op.kind == opObey:
		s.setPSK()
	case !s.tunnel.linked || s.session == (wire.SessionID{}) || s.peer == nil:
		s.op = nil // the link went meanwhile
	default:
		s.ask()
	}
}

// ask is C2: commit(n) goes to the server.
func (s *KeyRotationScheduler) ask() {
	op := s.op
	s.attempt++
	op.stage, op.attempt, op.since = asking, s.attempt, s.now
	m := &wire.Commit{Session: s.session, Attempt: op.attempt, Key: op.record.name(), Confirmed: s.journaled, Mode: op.mode}
	if s.installed != nil {
		m.Installed = s.installed.name()
	}
	s.send(m)
}

// retry asks again where no answer came: the server may have set the key.
func (s *KeyRotationScheduler) retry() {
	if op := s.op; op != nil && op.stage == asking && s.due(op.since.Add(commitRetry)) {
		s.ask()
		s.at(op.since.Add(commitRetry))
	}
}

// setPSK is C3 and C4: the key goes into WireGuard.
func (s *KeyRotationScheduler) setPSK() {
	op := s.op
	s.token++
	op.stage, op.token = setting, s.token
	e := SetPSK{Token: op.token}
	switch {
	case op.kind == opBlock:
		e.Key = s.block.Clone()
	case !op.record.key.IsZero():
		e.Key = op.record.key.Clone()
	}
	s.out = append(s.out, e)
}

// set ends an operation.
func (s *KeyRotationScheduler) set(e Set) {
	op := s.op
	if op == nil || op.stage != setting || e.Token != op.token {
		return
	}
	s.op = nil
	if op.kind == opRenew {
		s.renewed(op.why, e.Err)
		return
	}
	s.reportNow = true
	if e.Err != nil {
		s.failedTo("set the PSK: " + e.Err.Error())
		switch op.kind {
		case opObey:
			s.markFailed(op.record)
			s.answer(op, wire.ReasonFailed)
		case opCommit:
			s.markFailed(op.record)
			s.nextNotBefore = s.now.Add(min(setRetry<<min(s.setFailures, 8), restoreMax))
			s.setFailures++
		case opStep:
			s.stepAt = s.now.Add(setRetry)
		default:
			s.restoreAt = s.now.Add(setRetry)
		}
		return
	}
	s.setAt = s.now
	if op.kind == opBlock {
		s.closed()
		return
	}
	s.install(op.record)
	s.finish(op)
}

// closed says that the random PSK is in WireGuard.
func (s *KeyRotationScheduler) closed() { s.blocked, s.installed = true, nil }

// markFailed is R1: a key that WireGuard refused is not listed for a moment,
// so that a repair goes to one that needs no set here, if there is one.
func (s *KeyRotationScheduler) markFailed(r *record) {
	r.failed, r.doubtful = true, true
	s.forgive = s.now.Add(setRetry)
	s.at(s.forgive)
}

func (s *KeyRotationScheduler) forgiveFailed() {
	s.forgive = time.Time{}
	for _, r := range s.tunnel.records {
		if r.failed {
			r.failed = false
			s.reportNow = true
		}
	}
}

// finish ends an operation whose key is in WireGuard.
func (s *KeyRotationScheduler) finish(op *operation) {
	s.op = nil
	s.reportNow = true
	switch op.kind {
	case opCommit:
		s.agree(op.record) // the server has set it, or it would not have answered
		if op.mode != wire.ModeRepair {
			s.setFailures, s.nextNotBefore = 0, time.Time{}
		}
		s.succeeded(op)
		if op.mode == wire.ModeRepair {
			s.probeAt = s.now // R2: the client probes at once
		}
	case opObey:
		s.succeeded(op)
		s.answer(op, 0)
	case opRestore:
		if s.idle() {
			s.probeAt = s.now
		}
	case opStep:
		s.note(NoteHunting, op.record.name(), "trying it at this end")
		s.huntProbe = s.now
		if s.knocks.homeward {
			s.endHunt("at where the walk began")
		}
	}
}

// install is C4: r is in WireGuard, and every lower uncommitted key goes.
func (s *KeyRotationScheduler) install(r *record) {
	t := s.tunnel
	if in := s.installed; in != nil && in.found() && in != r && s.verifiedOnce {
		s.underFound = true // the session at hand, until a handshake that counts
	}
	s.installed, s.blocked = r, false
	s.block.Wipe()
	s.block = nil
	s.restoreAt = time.Time{}
	if r.since.IsZero() {
		r.since, r.wall = s.now, s.wall()
	}
	s.forgiveFailed()
	for _, x := range t.records {
		x.doubtful = false
	}
	if !r.found() {
		s.verifiedOnce = true
	}
	if t.pulled != nil && t.pulled.serial < r.serial {
		s.dropPulled("a newer key was installed")
	}
	if t.buffer.retain(func(n wire.Named) bool { return n.Serial > r.serial }) > 0 {
		t.changed = true
	}
	s.lastError = ""
	s.prune()
}

// succeeded books a commit that both ends, as far as this one knows, carried out.
func (s *KeyRotationScheduler) succeeded(op *operation) {
	s.used, s.rotate = true, false
	s.notBefore = time.Time{}
	if op.mode == wire.ModeIdle {
		s.probeAt = s.now.Add(s.probeAfter()) // C6
	}
	s.rotations++
	s.lastRotation = s.wall()
	s.note(NoteInstalled, op.record.name(), op.mode.String())
	s.save()
}

// probeAfter is C6: not before 2.5 s, or message 1 overtakes the other end's set,
// and an earlier handshake would not count as seen. The server waits longer, for
// two probes at once would collide, and its own is dropped if a handshake comes.
func (s *KeyRotationScheduler) probeAfter() time.Duration {
	if s.tunnel.config.Role == Server {
		return LateProbe
	}
	return ProbeAfter
}

// committed is C4 at the client: the server has set the key, now this end does.
func (s *KeyRotationScheduler) committed(m *wire.Committed) {
	op := s.op
	if op == nil || op.kind != opCommit || op.stage != asking || op.record.name() != m.Key {
		return
	}
	s.peerSeq, s.peerHigh = max(s.peerSeq, m.Seq), max(s.peerHigh, m.Seq)
	if s.peer != nil {
		p := *s.peer
		p.Installed, p.Seen, p.Blocked = m.Key, p.Seen && p.Installed == m.Key, false
		s.peer = &p
	}
	if op.record == s.installed && s.lastPrint == op.record.print && s.restoreAt.IsZero() {
		s.finish(op) // a repair to what is installed here
		return
	}
	s.setPSK()
}

// refused is C3 at the client.
func (s *KeyRotationScheduler) refused(m *wire.Refused) {
	op := s.op
	if op == nil || op.kind != opCommit || op.stage != asking || op.attempt != m.Attempt || op.record.name() != m.Key {
		return
	}
	s.op = nil
	wait := repairRetry
	switch m.Reason {
	case wire.ReasonNotYet:
		wait = notYetRetry
	case wire.ReasonUnknown, wire.ReasonStale:
		op.record.session = wire.SessionID{} // what the peer lists decides from here on
		if (op.mode != wire.ModeRepair || m.Reason == wire.ReasonUnknown) && op.record != s.installed && !op.record.agreed && !op.record.found() {
			s.note(NoteDropped, op.record.name(), "the peer says "+m.Reason.String())
			s.tunnel.erase(op.record)
			s.save()
		}
	case wire.ReasonFailed:
		wait = setRetry
		s.failedTo("the peer could not set the key")
	}
	s.notBefore = s.now.Add(wait)
}

// commit is C3 at the server: it checks, journals, sets, and answers.
func (s *KeyRotationScheduler) commit(m *wire.Commit) {
	t := s.tunnel
	asked := &operation{kind: opObey, mode: m.Mode, attempt: m.Attempt, record: &record{serial: m.Key.Serial, print: m.Key.Fingerprint}}
	in := s.installed
	if op := s.op; op != nil {
		if op.kind == opObey && op.record.name() == m.Key {
			op.attempt = m.Attempt // repeated; the answer is on its way
			return
		}
		s.answer(asked, wire.ReasonBusy)
		return
	}
	if !s.ready || s.absent > 1 {
		s.answer(asked, wire.ReasonFailed)
		return
	}
	if in != nil && in.name() == m.Key {
		asked.record = in
		s.answer(asked, 0)
		return
	}
	r := t.record(m.Key)
	if r == nil && !t.buffer.has(m.Key) || r != nil && !r.listed(t.config.Fallback) {
		s.answer(asked, wire.ReasonUnknown)
		return
	}
	if r != nil && !s.usable(r) {
		s.answer(asked, wire.ReasonStale)
		return
	}
	if m.Mode != wire.ModeRepair {
		if reason := s.judge(m); reason != 0 {
			if reason == wire.ReasonNotYet {
				s.out = append(s.out, Poll{})
			}
			s.answer(asked, reason)
			return
		}
		if in != nil && !in.found() {
			s.agree(in)
			if in.seen && m.Confirmed >= in.serial && !in.confirmed {
				s.confirm(in)
			}
		}
	}
	if r == nil && len(t.records) >= maxRecords {
		s.answer(asked, wire.ReasonFailed) // no honest client has so many in doubt
		return
	}
	if r == nil {
		r = t.buffer.take(m.Key)
		t.changed = true
	}
	asked.record = r
	s.begin(asked)
}

// judge says why a commit that is no repair cannot be carried out now.
func (s *KeyRotationScheduler) judge(m *wire.Commit) wire.Reason {
	in := s.installed
	opening := s.blocked || s.peer != nil && s.peer.Blocked
	switch {
	case in != nil && m.Key.Serial <= in.serial:
		return wire.ReasonStale
	case in != nil && !opening && m.Installed.Fingerprint != in.print:
		return wire.ReasonDiffers
	case !s.inWindow() && !s.idle() && !opening && !s.degraded():
		return wire.ReasonNotYet
	}
	return 0
}

// answer is C3: committed, or refused with a reason.
func (s *KeyRotationScheduler) answer(op *operation, reason wire.Reason) {
	key := op.record.name()
	if reason != 0 {
		s.send(&wire.Refused{Session: s.session, Attempt: op.attempt, Key: key, Reason: reason})
		return
	}
	s.seq++
	s.send(&wire.Committed{Session: s.session, Attempt: op.attempt, Seq: s.seq, Key: key})
}
