package rotation

import "time"

// gone says that no session can be alive at this end, whatever is known of
// when the last one began.
func (s *KeyRotationScheduler) gone() bool {
	return s.last.Handshake.IsZero() || s.due(s.born.Add(SessionLife)) || s.unheard[1].Sub(s.unheard[0]) >= DeadAfter
}

// tries returns since when WireGuard has been trying to make a handshake, as
// its counters tell, while no session is alive; zero if it does not.
func (s *KeyRotationScheduler) tries() time.Time {
	if !s.gone() || s.now.Sub(s.trying[1]) > tryingRecent {
		return time.Time{}
	}
	since := s.trying[0]
	if death := s.born.Add(SessionLife); !s.last.Handshake.IsZero() && !death.After(s.now) && since.Before(death) {
		since = death
	}
	if s.trying[1].Before(since) {
		return time.Time{}
	}
	return since
}

// tried is W1: the first retry had no success either, or none can have: the
// peer is told.
func (s *KeyRotationScheduler) tried() bool {
	since := s.tries()
	return !since.IsZero() && (s.unheeded() || s.due(since.Add(TryingAfter)))
}

// unheeded says that no session can be alive at this end, and that its clock has
// gone back: the other end may refuse what begins here.
func (s *KeyRotationScheduler) unheeded() bool {
	wall := s.wall().Add(clockBack)
	// A handshake that began before the clock went back can be stamped after.
	return (s.last.Handshake.After(wall) || s.highest.After(wall)) && s.gone()
}

// agreeing says that the ends talk and have the same key installed: whatever
// keeps handshakes from succeeding is not that.
func (s *KeyRotationScheduler) agreeing() bool {
	return s.tunnel.linked && s.peer != nil && s.ready && s.absent == 0 && s.installed != nil && !s.differs() && !s.peer.Missing && !s.peer.Blocked
}

// peerTrying says that the peer, which has the same key installed, tries to
// make a handshake and has no live session.
func (s *KeyRotationScheduler) peerTrying() bool { return s.agreeing() && s.peer.Trying }

// help is W2: the peer tries and is not heard. WireGuard refuses an initiation
// that is older by its sender's clock than the one before, so for hours where
// that clock has gone back; one that begins at this end is heard.
func (s *KeyRotationScheduler) help() {
	if !s.peerTrying() || !s.gone() || s.stopping {
		return
	}
	if s.helpAt.IsZero() || s.due(s.helpAt) {
		s.helpAt = s.now.Add(helpEvery)
		s.at(s.helpAt)
		s.out = append(s.out, Probe{})
	}
}

// renew is W3: WireGuard is made to forget when the other end's last handshake
// began, unless one that begins there and is heard comes first. The server does
// so before the client: two that begin at once would collide.
func (s *KeyRotationScheduler) renew() {
	deaf, lost := s.deaf(), s.peerBlank() || s.peerPutBack()
	if s.stopping || s.op != nil || !s.ready || s.absent > 0 || !deaf && !lost {
		s.renewAt = time.Time{}
		return
	}
	if s.renewAt.IsZero() {
		s.renewAt = s.now
		if !lost { // otherwise nothing that begins at the other end is heard
			s.renewAt = s.now.Add(RenewAfter)
			if s.tunnel.config.Role == Client {
				s.renewAt = s.renewAt.Add(time.Second)
			}
		}
	}
	if !s.due(s.renewAt) || !s.notRenewed.IsZero() && !s.due(s.notRenewed) {
		return
	}
	if !lost && s.last.Began.Before(s.renewAt) { // it may have come meanwhile
		s.pollFor(s.renewAt)
		return
	}
	why := "no handshake succeeds, for a clock has gone back"
	switch {
	case lost && s.peerBack:
		why = "the other end went back to an earlier state"
	case lost:
		why = "the other end has lost the session"
	}
	s.begin(&operation{kind: opRenew, why: why})
}

// deaf says that handshakes are wanted while the other end refuses those that
// begin here. Where its clock has gone back too, both refuse.
func (s *KeyRotationScheduler) deaf() bool {
	return s.unheeded() && (!s.tries().IsZero() || s.hunting || s.peerTrying())
}

// compareSessions keeps the time since when the peer's WireGuard cannot have the
// session that this end's may have, for it has had no handshake.
func (s *KeyRotationScheduler) compareSessions() {
	switch {
	case !s.agreeing() || !s.peer.NoHandshake || !s.hasSession():
		s.blankSince = time.Time{}
	case s.blankSince.IsZero():
		s.blankSince = s.now
	}
}

// peerBlank says that WireGuard was made anew at the other end, and nothing is
// heard from there: it has nothing to send, or its clock has gone back as well,
// for what WireGuard refuses for its time it does not count. This end would
// begin no handshake for as long as it takes its session for alive.
func (s *KeyRotationScheduler) peerBlank() bool {
	if s.blankSince.IsZero() {
		return false
	}
	since := later(s.blankSince, s.received)
	// The report tells of a dump there, which may be of before the last handshake.
	if s.reportedAt.Sub(since) < blankLate || !s.due(since.Add(BlankAfter)) {
		return false
	}
	by := later(since.Add(BlankAfter), s.reportedAt)
	s.pollFor(by)
	return !s.last.Began.Before(by)
}

// pollFor asks for a dump that begins no earlier than by, once.
func (s *KeyRotationScheduler) pollFor(by time.Time) {
	if s.last.Began.Before(by) && s.polledFor.Before(by) {
		s.polledFor = s.now
		s.out = append(s.out, Poll{})
	}
}

// peerPutBack says that the peer, the same process as before, is behind what it
// said before: its machine was put back to a snapshot of it running, and knows
// the session no more that this end may have. WireGuard would find that out when
// it has heard nothing for 15 s.
func (s *KeyRotationScheduler) peerPutBack() bool {
	return s.peerBack && s.agreeing() && s.hasSession()
}

// hasSession says that WireGuard may take a session for alive at this end.
func (s *KeyRotationScheduler) hasSession() bool {
	return !s.last.Handshake.IsZero() && s.now.Sub(s.born) < SessionLife
}

// renewed ends an operation of W3.
func (s *KeyRotationScheduler) renewed(why string, err error) {
	s.renewAt, s.notRenewed = time.Time{}, s.now.Add(renewAgain)
	if err != nil {
		s.notRenewed = s.now.Add(renewRetry)
		s.failedTo("remove the peer from WireGuard and add it again: " + err.Error())
		return
	}
	s.alive, s.peerBack, s.blankSince = false, false, time.Time{}
	s.highest = s.wall()
	s.probeAt, s.helpAt = s.now, s.now.Add(helpEvery)
	s.note(NoteRenewed, none, why+": the peer was removed from WireGuard and added again")
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}
