package rotation

import (
	"slices"
	"time"

	"keyturn/internal/wire"
)

// knocks is where W4 stands.
type knocks struct {
	lost     time.Time // since when there has been no link; zero: nothing to knock for
	next     time.Time // no knock before
	last     time.Time // the knock that waits for an answer, or that began the walk
	probed   time.Time // the last probe of a knock or a walk
	walking  bool
	home     wire.Named // what was installed when the walk began
	homeward bool       // the walk's next step goes there, and ends it
}

// knock is W4: without a link, and where that runs inside the tunnel, this end
// may have nothing to send, and the other end's attempts be refused for their
// time. The client dials, which is something to send.
func (s *KeyRotationScheduler) knock() {
	k := &s.knocks
	if s.tunnel.config.Role != Server || !s.inside || s.tunnel.linked || s.stopping || s.hunting && !k.walking {
		*k = knocks{probed: k.probed}
		return
	}
	if k.lost.IsZero() {
		k.lost, k.next = s.now, s.now.Add(knockFirst)
	}
	heard := s.received.After(k.last)
	switch {
	case k.walking:
		if heard && !k.homeward {
			k.homeward, s.stepAt = true, s.now // it is there, and so WireGuard shows what H1 needs
		}
	case !s.ready || s.absent > 0:
	case !k.last.IsZero() && heard:
		s.rest()
	case !k.last.IsZero():
		if s.due(k.last.Add(DeadAfter)) {
			s.walk()
		}
	case s.due(k.next) && s.due(later(s.sent, k.lost).Add(knockFirst)): // what was sent made WireGuard try
		k.last, k.probed = s.now, s.now
		s.at(s.now.Add(DeadAfter))
		s.out = append(s.out, Probe{})
	}
}

// walk has the hunt try each candidate once: nothing has answered the knock, for
// there is nobody, or nobody with that key.
func (s *KeyRotationScheduler) walk() {
	if s.installed == nil {
		s.rest()
		return
	}
	s.knocks.walking, s.knocks.home = true, s.installed.name()
}

// rest ends a knock and its walk.
func (s *KeyRotationScheduler) rest() {
	k := &s.knocks
	k.last, k.walking, k.homeward = time.Time{}, false, false
	k.next = s.now.Add(min(max(s.now.Sub(k.lost)/8, knockFirst), knockMost))
	s.at(k.next)
}

// onwards is where a walk goes instead of to next: to where it began once it is
// through, or once the other end is heard. It never ends on another key.
func (s *KeyRotationScheduler) onwards(next *record, candidates []*record) *record {
	k := &s.knocks
	if !k.walking || !k.homeward && next.name() != k.home {
		return next
	}
	k.homeward = true
	if i := slices.IndexFunc(candidates, func(r *record) bool { return r.name() == k.home }); i >= 0 {
		return candidates[i]
	}
	return candidates[0]
}

// knocking says that what WireGuard sends may come of a knock alone.
func (s *KeyRotationScheduler) knocking() bool {
	return !s.knocks.probed.IsZero() && s.now.Sub(s.knocks.probed) < knockEcho
}
