package rotation

import (
	"slices"

	"keyturn/internal/psk"
	"keyturn/internal/wire"
)

// keep is S4, when a key has become confirmed in both journals: with the link
// inside the tunnel an end whose journal survives a reboot has a recovery key,
// and so has the other. It comes
// of a key that both verified, and brings them together when this end, or the
// other, goes back to a snapshot that knows no key of today. Where one of them
// has lost it there is a new one.
func (s *KeyRotationScheduler) keep(confirmed *record) {
	t := s.tunnel
	found := t.foundRecord()
	shared := found != nil && found.recovery && contains(s.peer.Held, found.name())
	switch {
	case shared, t.config.Fallback, found != nil && found == s.installed:
	case s.wantsRecovery():
		s.replaceFound(confirmed.key.Recovery())
	case found != nil && found.recovery: // the other end has lost it, and wants no new one
		t.erase(found)
		s.save()
	}
}

// wantsRecovery: beside the tunnel a fresh key does as well, and better.
func (s *KeyRotationScheduler) wantsRecovery() bool { return s.tunnel.config.Recovery && s.inside }

// recognise is S4 at an end that would not keep a recovery key by itself: it
// knows the one that the peer names by the key that it comes of.
func (s *KeyRotationScheduler) recognise(m *wire.Report) {
	t := s.tunnel
	i := slices.IndexFunc(m.Held, func(n wire.Named) bool { return n.Serial == 0 })
	found := t.foundRecord()
	if i < 0 || s.wantsRecovery() || t.config.Fallback || t.config.BlockStale || t.config.BlockStart || found != nil && (found == s.installed || found.name() == m.Held[i]) {
		return
	}
	for _, r := range t.records {
		if !r.confirmed {
			continue
		}
		if k := r.key.Recovery(); k.Fingerprint() == m.Held[i].Fingerprint {
			s.replaceFound(k)
			return
		}
	}
}

// replaceFound puts a recovery key in the place of the PSK found, which nobody
// needs once a key is confirmed in both journals, or of an older recovery key.
func (s *KeyRotationScheduler) replaceFound(k *psk.Key) {
	t := s.tunnel
	if found := t.foundRecord(); found != nil {
		t.erase(found)
	}
	t.insert(&record{key: k, print: k.Fingerprint(), recovery: true})
	s.reportNow = true
	s.save()
}
