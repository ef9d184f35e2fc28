package rotation

import (
	"time"

	"keyturn/internal/psk"
	"keyturn/internal/wire"
)

// State is what a peer is doing, in one word.
type State uint8

// The states. The zero value is the safe one: not protected, waiting.
const (
	StateHold        State = iota // no bootstrap yet, or not again
	StateRefused                  // the ends do not agree
	StateUnprotected              // bootstrapped; the PSK is still the one found
	StateUnconfirmed              // a verified key is installed, no handshake was seen under it
	StateProtected                // a confirmed, fresh key is installed
	StateRepairing                // the ends have different keys installed
	StateHunting                  // looking for the other end's key
	StateStale                    // no fresh key for max_key_age
	StateBlocked                  // a random PSK closes the tunnel
	StateMissing                  // WireGuard does not know the peer
)

var stateNames = [...]string{
	"hold", "refused", "unprotected", "unconfirmed", "protected", "repairing", "hunting", "stale", "blocked", "missing",
}

func (s State) String() string { return stateNames[s] }

// View is what a KeyRotationScheduler says of itself.
type View struct {
	State     State
	Installed wire.Named // zero fingerprint: none
	Since     time.Time  // wall clock of its first installation
	Sources   wire.Sources
	Found     bool // Installed is the PSK found, not one of ours, or the recovery key
	Recovery  bool // Installed is the recovery key
	NoPSK     bool // with fallback: there was no PSK at the first start, and so there is nothing to fall back on
	Confirmed wire.Named
	// Protected: a verified key is installed that is confirmed, or follows a
	// confirmed one and waits for its handshake; and it is fresh.
	Protected    bool
	Handshake    time.Duration // age, -1 if unknown
	Failing      bool          // no session is alive, and handshakes are tried without success
	Rotations    uint64
	LastRotation time.Time // wall clock
	Linked       bool
	Pulled       bool // a key waits for its window
	PeerStopped  bool
	Foreign      int    // foreign changes undone lately
	LastError    string // of the journal or WireGuard
}

// View returns the scheduler's state as of the last Step.
func (s *KeyRotationScheduler) View() View {
	v := View{
		Handshake: -1, Failing: s.failing, Rotations: s.rotations, LastRotation: s.lastRotation,
		Linked: s.tunnel.linked, Pulled: s.tunnel.pulled != nil, PeerStopped: s.goodbye, Foreign: s.restores, LastError: s.lastError,
	}
	if found := s.tunnel.foundRecord(); found != nil && s.tunnel.config.Fallback {
		v.NoPSK = found.print.IsZero()
	}
	if s.alive {
		v.Handshake = s.now.Sub(s.handshakeAt)
	}
	if r := s.tunnel.lastConfirmed(); r != nil {
		v.Confirmed = r.name()
	}
	if in := s.installed; in != nil {
		v.Installed, v.Since, v.Sources, v.Found, v.Recovery = in.name(), in.wall, in.sources, in.found(), in.recovery
		v.Protected = !in.found() && !s.stale && s.confirmed != 0 && !s.hunting && s.absent < 2 && !s.foreign() && !s.underFound && !s.apart()
	}
	v.State = s.state()
	return v
}

func (s *KeyRotationScheduler) state() State {
	in := s.installed
	switch {
	case s.absent > 1:
		return StateMissing
	case s.blocked:
		return StateBlocked
	case s.hunting:
		return StateHunting
	case s.foreign(), s.apart():
		return StateRepairing
	case s.stale:
		return StateStale
	case len(s.tunnel.differences) > 0:
		return StateRefused
	case in != nil && !in.found() && s.confirmed != 0 && !s.underFound:
		return StateProtected
	case in != nil && (!in.found() || in.recovery):
		return StateUnconfirmed
	case s.tunnel.accepted:
		return StateUnprotected
	}
	return StateHold
}

// apart says that the ends have had different keys installed for longer than a
// report can be on its way.
func (s *KeyRotationScheduler) apart() bool {
	return !s.differsSince.IsZero() && s.now.Sub(s.differsSince) > s.tunnel.config.Heartbeat
}

// foreign says that a dump which began after the last set shows another PSK.
func (s *KeyRotationScheduler) foreign() bool {
	return s.ready && !s.setInProgress() && s.last.Began.After(s.setAt) && !s.matches(s.lastPrint)
}

// Candidates names the keys that a hunt would try, newest first.
func (t *Tunnel) Candidates() []wire.Named {
	var names []wire.Named
	for _, r := range t.candidates(func(*record) bool { return true }) {
		names = append(names, r.name())
	}
	return names
}

// InDevice returns the fingerprint of the PSK in the newest dump.
func (s *KeyRotationScheduler) InDevice() psk.Fingerprint { return s.lastPrint }
