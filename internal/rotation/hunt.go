package rotation

import (
	"fmt"
	"slices"
	"time"
)

// hunt is H1 to H6: with the link silent and handshakes failing, each end walks
// through the keys that may be installed at the other end. The client stays
// 12 s on each, the server 40 s, longer than the client's whole walk: equal
// times can miss for ever.
func (s *KeyRotationScheduler) hunt() {
	if s.stopping {
		return
	}
	if !s.huntDue() {
		if s.hunting && !s.stepping() {
			if s.knocks.walking {
				s.goHome() // it was cut short
			}
			s.endHunt("no longer needed")
		}
		return
	}
	if s.op != nil {
		return
	}
	candidates := s.tunnel.candidates(func(r *record) bool { return r.journaled && s.usable(r) })
	if len(candidates) == 0 {
		if s.knocks.walking {
			s.rest()
		}
		return
	}
	if !s.hunting {
		s.hunting = true
		s.stepAt = s.now.Add(s.dwell())
		s.pollBefore = time.Time{}
		s.huntProbe = s.now
		why := "no handshake succeeds"
		switch {
		case s.knocks.walking:
			s.stepAt = s.knocks.last.Add(s.dwell())
		case s.unanswered():
			s.knocks.last = s.now
			s.walk()
		}
		if s.knocks.walking {
			why = "there is no link, and nobody answers"
		}
		s.note(NoteHunting, none, fmt.Sprintf("%s; candidates for the key of the other end: %d", why, len(candidates)))
	}
	if s.due(s.stepAt) {
		s.step(candidates)
		if s.op != nil || !s.hunting {
			return
		}
	}
	if s.due(s.huntProbe) {
		s.huntProbe = s.now.Add(HuntProbe)
		s.at(s.huntProbe)
		if s.knocks.walking {
			s.knocks.probed = s.now
			s.huntProbe = s.now.Add(ServerDwell) // WireGuard tries for longer than that
		}
		s.out = append(s.out, Probe{})
	}
}

// step is H3 and H4: a dump that began after the step fell due must still show
// no handshake; then the next key is set.
func (s *KeyRotationScheduler) step(candidates []*record) {
	if s.pollBefore.IsZero() {
		s.pollBefore = s.now
		s.out = append(s.out, Poll{})
		return
	}
	if s.last.Began.Before(s.pollBefore) {
		return // Observed will come
	}
	s.pollBefore = time.Time{}
	s.stepAt = s.now.Add(s.dwell())
	s.at(s.stepAt)
	i := slices.Index(candidates, s.installed)
	next := s.onwards(candidates[(i+1)%len(candidates)], candidates)
	switch {
	case next != s.installed:
		s.begin(&operation{kind: opStep, record: next})
	case s.knocks.homeward:
		s.endHunt("at where the walk began")
	}
}

// huntDue is H1.
func (s *KeyRotationScheduler) huntDue() bool {
	if !s.ready || s.absent > 1 {
		return false
	}
	if s.tunnel.linked {
		return s.due(s.differsSince.Add(HuntRepair)) && !s.differsSince.IsZero()
	}
	old := !s.alive || s.now.Sub(s.handshakeAt) >= RekeyAfter
	if s.knocks.walking {
		return true
	}
	return old && s.trying[1].Sub(s.trying[0]) >= HuntEvidence || s.unheard[1].Sub(s.unheard[0]) >= DeadAfter
}

func (s *KeyRotationScheduler) dwell() time.Duration {
	if s.tunnel.config.Role == Client {
		return ClientDwell
	}
	return ServerDwell
}

func (s *KeyRotationScheduler) endHunt(why string) {
	s.hunting = false
	s.pollBefore = time.Time{}
	key := none
	if in := s.installed; in != nil {
		key = in.name()
		switch {
		case in.recovery:
			why += "; on the recovery key until the next"
		case in.found() && s.verifiedOnce:
			why += "; fell back to the PSK found at the first start until the next key"
		}
	}
	s.note(NoteHuntEnded, key, why)
	if s.knocks.walking {
		s.rest()
	}
}
