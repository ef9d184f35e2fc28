package rotation

import "time"

// tries returns since when WireGuard has been trying to make a handshake, as
// its counters tell, while this end has no live session; zero if it does not.
func (s *KeyRotationScheduler) tries() time.Time {
	since := s.trying[0]
	if !s.idle() || s.now.Sub(s.trying[1]) > tryingRecent {
		return time.Time{}
	}
	if death := s.handshakeAt.Add(SessionLife); s.alive && since.Before(death) {
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
	wall := s.wall()
	// A handshake that began before the clock went back can be stamped after.
	return (s.last.Handshake.After(wall) || s.highest.After(wall)) &&
		(s.due(s.born.Add(SessionLife)) || s.unheard[1].Sub(s.unheard[0]) >= DeadAfter)
}

// help is W2: the peer tries and is not heard. WireGuard refuses an initiation
// that is older by its sender's clock than the one before, so for hours where
// that clock has gone back; one that begins at this end is heard.
func (s *KeyRotationScheduler) help() {
	if !s.peerTrying() || !s.idle() || s.stopping {
		return
	}
	if s.helpAt.IsZero() || s.due(s.helpAt) {
		s.helpAt = s.now.Add(helpEvery)
		s.at(s.helpAt)
		s.out = append(s.out, Probe{})
	}
}

// peerTrying says that the peer, which has the same key installed, tries to
// make a handshake and has no live session.
func (s *KeyRotationScheduler) peerTrying() bool {
	return s.tunnel.linked && s.peer != nil && s.peer.Trying && s.ready && s.absent == 0 && s.installed != nil && !s.differs()
}

// knock is W4: without a link, and where that would run inside the tunnel, this
// end may have nothing to send, and the other end's attempts be refused for
// their time. The client dials, which is something to send.
func (s *KeyRotationScheduler) knock() {
	switch {
	case s.tunnel.config.Role != Server || !s.inside || s.tunnel.linked || s.hunting || s.stopping || !s.ready || s.absent > 0:
		s.knockAt = time.Time{}
	case s.knockAt.IsZero():
		s.knockAt = s.now.Add(knockFirst)
		s.at(s.knockAt)
	case s.due(s.knockAt):
		s.knockAt = s.now.Add(knockEvery)
		s.at(s.knockAt)
		s.out = append(s.out, Probe{})
	}
}

// renew is W3: WireGuard is made to forget when the other end's last handshake
// began, unless one that begins there and is heard comes first. The server does
// so before the client: two that begin at once would collide.
func (s *KeyRotationScheduler) renew() {
	alone := s.peerDeaf() // and nothing begins at the other end that is heard
	if s.stopping || s.op != nil || !s.ready || s.absent > 0 || !s.deaf() && !alone {
		return
	}
	if s.renewAt.IsZero() {
		s.renewAt = s.now
		if !alone {
			s.renewAt = s.now.Add(RenewAfter)
		}
		if !alone && s.tunnel.config.Role == Client {
			s.renewAt = s.renewAt.Add(time.Second)
		}
	}
	if s.due(s.renewAt) {
		s.begin(&operation{kind: opRenew})
	}
}

// deaf says that handshakes are wanted while the other end refuses those that
// begin here. Where its clock has gone back too, both refuse.
func (s *KeyRotationScheduler) deaf() bool {
	return s.unheeded() && (!s.tries().IsZero() || s.hunting || s.peerTrying())
}

// peerDeaf says that the peer, which was started anew since the last handshake,
// has no session and tries in vain, while this end takes its own for alive, and
// so begins no handshake; yet it hears nothing, not even the peer's attempts:
// WireGuard does not count those that it refuses for their time. The peer's
// clock went back as its host was started anew.
func (s *KeyRotationScheduler) peerDeaf() bool {
	return s.peerTrying() && !s.idle() && s.peerBooted.After(s.handshakeAt) && s.now.Sub(s.handshakeAt) < SessionLife-nearlyDead &&
		s.now.Sub(s.received) >= TryingAfter
}

// renewed ends an operation of W3.
func (s *KeyRotationScheduler) renewed(err error) {
	s.renewAt = s.now.Add(renewRetry)
	if err != nil {
		s.failedTo("remove the peer from WireGuard and add it again: " + err.Error())
		return
	}
	s.alive = false
	s.highest = s.wall()
	s.probeAt, s.helpAt = s.now, s.now.Add(helpEvery)
	s.note(NoteRenewed, none, "no handshake succeeds, for a clock has gone back: the peer was removed from WireGuard and added again")
}
