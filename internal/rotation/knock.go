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
	leaving  time.Time  // the rotator stops in a walk, and waits for a dump that begins after
}

// knock is W4: without a link, and where that runs inside the tunnel, this end
// may have nothing to send, and the other end's attempts be refused for their
// time. The client dials, which is something to send.
func (s *KeyRotationScheduler) knock() {
	k := &s.knocks
	if !k.leaving.IsZero() || s.stepping() {
		return
	}
	if !s.knocksFor() || s.tunnel.linked || s.stopping || s.hunting && !k.walking {
		if k.walking && !(s.tunnel.linked && s.inside) { // otherwise a handshake has come
			s.goHome()
		}
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
	home := s.installed
	if home == nil || !slices.Contains(s.tunnel.records, home) { // there is no way back to it
		s.rest()
		return
	}
	if base := s.tunnel.base(); home.found() && base != nil && s.usable(base) {
		home = base
	}
	s.knocks.walking, s.knocks.home = true, home.name()
}

// unanswered says that a hunt which is about to begin is a walk: there is no sign
// of the other end but that what is sent finds no answer.
func (s *KeyRotationScheduler) unanswered() bool {
	since := s.trying[0]
	if u := s.unheard[0]; since.IsZero() || !u.IsZero() && u.Before(since) {
		since = u
	}
	return !s.tunnel.linked && s.knocksFor() && s.received.Before(since)
}

// knocksFor says that this end is the one that knocks.
func (s *KeyRotationScheduler) knocksFor() bool { return s.tunnel.config.Role == Server && s.inside }

// leave is the end of a walk as the rotator stops: the key is set again that it
// had, unless a handshake has come.
func (s *KeyRotationScheduler) leave() {
	k := &s.knocks
	switch {
	case k.leaving.IsZero() || s.op != nil:
	case !k.walking:
		k.leaving = time.Time{}
	case s.last.Began.After(k.leaving):
		s.goHome()
		*k = knocks{}
	}
}

// stepping says that a step is under way: what is installed is not settled.
func (s *KeyRotationScheduler) stepping() bool { return s.op != nil && s.op.kind == opStep }

// goHome has the key set again that was installed before the walk.
func (s *KeyRotationScheduler) goHome() {
	if home := s.tunnel.record(s.knocks.home); home != nil && home != s.installed && s.usable(home) {
		s.installed, s.restoreAt = home, s.now
	}
}

// rest ends a knock and its walk. What nobody answered is no evidence for another.
func (s *KeyRotationScheduler) rest() {
	k := &s.knocks
	if k.walking && !s.received.After(k.last) {
		s.trying, s.unheard = [2]time.Time{}, [2]time.Time{}
	}
	k.last, k.walking, k.homeward = time.Time{}, false, false
	k.next = s.now.Add(min(max(s.now.Sub(k.lost)/8, knockFirst), knockMost))
	s.at(k.next)
}

// onwards is where a walk goes instead of to next: to where it began once it is
// through, or once the other end is heard. It never ends on another key.
func (s *KeyRotationScheduler) onwards(next *record, candidates []*record) *record {
	k := &s.knocks
	if !k.walking {
		return next
	}
	i := slices.IndexFunc(candidates, func(r *record) bool { return r.name() == k.home })
	switch {
	case i >= 0 && !k.homeward && next != candidates[i]:
		return next
	case i < 0: // it may not be set any more
		i = 0
	}
	k.homeward = true
	return candidates[i]
}

// knocking says that what WireGuard sends may come of a knock alone.
func (s *KeyRotationScheduler) knocking() bool {
	return !s.knocks.probed.IsZero() && s.now.Sub(s.knocks.probed) < knockEcho
}
