//go:build vm

package guest

import (
	"errors"
	"fmt"
	"time"

	"keyturn/internal/control"
	"keyturn/internal/psk"
)

// View is what one end shows of the tunnel.
type View struct {
	Key       psk.Fingerprint `json:"key"`      // of the pre-shared key
	Original  bool            `json:"original"` // it is the one that the interface came up with
	Handshake time.Time       `json:"handshake"`
	Sent      int64           `json:"sent"` // bytes, as wg show has them
	Received  int64           `json:"received"`

	Peer *control.PeerStatus `json:"peer,omitempty"` // nil: the rotator does not answer
	Why  string              `json:"why,omitempty"`  // it does not
}

// Rotated returns nil when both ends have one key and not the one that they
// came up with, or what is not so.
func Rotated(a, b View) error {
	if a.Key != b.Key {
		return errors.New("the ends have different keys")
	}
	if a.Original || a.Key.IsZero() {
		return errors.New("the ends have the key that they came up with")
	}
	return nil
}

// InStep returns nil when both ends have one key and call it protected, or
// what is not so.
func InStep(a, b View) error {
	if err := Rotated(a, b); err != nil {
		return err
	}
	for _, v := range []View{a, b} {
		switch p := v.Peer; {
		case p == nil:
			return errors.New(v.Why)
		case !p.Protected || p.State != control.PeerProtected:
			return fmt.Errorf("the %s: %s: %s", p.Role, p.State, p.Why)
		}
	}
	return nil
}

// ConfirmedAtMost returns the serial of the newest key that an end has confirmed.
func ConfirmedAtMost(a, b View) (serial uint64) {
	for _, v := range []View{a, b} {
		if v.Peer != nil && v.Peer.Confirmed != nil {
			serial = max(serial, v.Peer.Confirmed.Serial)
		}
	}
	return serial
}
