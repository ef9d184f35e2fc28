// Package wg reads and changes WireGuard interfaces: a small facade over the
// kernel's and userspace devices, one shared poller for each interface, and a
// pair of in-process devices for the demo and for tests. It knows peers,
// handshakes and pre-shared keys; it never decides when a key changes, never
// touches anything else of an interface, and never hands out private keys.
package wg

import (
	"encoding/base64"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"time"

	"keyturn/internal/psk"
)

// Errors that callers tell apart.
var (
	// ErrNoDevice means that there is no WireGuard interface of that name
	// now. One may come (back) later: the same Device then finds it.
	ErrNoDevice = errors.New("no such WireGuard interface")
	// ErrNoPeer means that the interface has no such peer.
	ErrNoPeer = errors.New("no such WireGuard peer")
	// ErrZeroKey refuses the all-zero key, with which WireGuard would remove
	// the pre-shared key instead of setting one.
	ErrZeroKey = errors.New("an all-zero key would remove the pre-shared key")
	// ErrNotRenewable means that a peer cannot be removed and come back as it
	// was.
	ErrNotRenewable = errors.New("the peer would not come back as it was")
	// ErrNoAddress means that no address leads to the peer, so that nothing
	// can be sent to it: it has no allowed IPs of its own.
	ErrNoAddress = errors.New("no address leads to the peer")
	// ErrPrivilege means that the process may not read or change the interface:
	// fs.ErrPermission.
	ErrPrivilege = fmt.Errorf("%w", fs.ErrPermission)
	// ErrStaleSocket means that the process of a userspace device is gone
	// but its control socket is still there.
	ErrStaleSocket = errors.New("nobody answers at the control socket of the interface")
	// ErrTimeout means that the device did not answer in time. What was
	// asked of it may still happen.
	ErrTimeout = errors.New("the WireGuard interface does not answer")
)

// PublicKey is a WireGuard public key: 32 bytes of Curve25519.
type PublicKey [32]byte

// ParsePublicKey reads the base64 form that wg prints. It accepts nothing
// that String would not give back byte for byte.
func ParsePublicKey(s string) (PublicKey, error) {
	var k PublicKey
	b, err := base64.StdEncoding.Strict().DecodeString(s)
	if err != nil || len(b) != len(k) || base64.StdEncoding.EncodeToString(b) != s {
		return PublicKey{}, errors.New("not a WireGuard public key (44 characters of base64)")
	}
	copy(k[:], b)
	return k, nil
}

// String returns the base64 form that wg prints.
func (k PublicKey) String() string { return base64.StdEncoding.EncodeToString(k[:]) }

// MarshalText returns what String returns.
func (k PublicKey) MarshalText() ([]byte, error) { return []byte(k.String()), nil }

// UnmarshalText reads what MarshalText wrote.
func (k *PublicKey) UnmarshalText(b []byte) error {
	parsed, err := ParsePublicKey(string(b))
	if err == nil {
		*k = parsed
	}
	return err
}

// Peer is what a dump tells of one peer.
type Peer struct {
	PublicKey PublicKey
	// PSK is never nil; it is all-zero where no pre-shared key is set. It
	// belongs to whoever asked for the dump, who wipes it.
	PSK *psk.Key
	// Handshake is the wall-clock time of the latest handshake as this end
	// stamped it, zero if there was none. Only a change of it means
	// something; it is never to be compared with another clock.
	Handshake  time.Time
	Rx, Tx     uint64         // bytes, handshake messages included
	AllowedIPs []netip.Prefix // read only
	Endpoint   netip.AddrPort // invalid if none is known
	Keepalive  time.Duration  // zero: off
}

// Dump is the state of an interface at some moment between Began and Ended.
// A dump that began before a change says nothing about it. A dump during
// which peers are removed can be short: absent from one dump does not mean
// removed.
type Dump struct {
	Began, Ended time.Time // with monotonic readings
	PublicKey    PublicKey // the interface's own; zero if it has no private key
	ListenPort   uint16
	Peers        map[PublicKey]Peer
}

// Wipe overwrites the pre-shared keys of all peers.
func (d *Dump) Wipe() {
	for _, p := range d.Peers {
		p.PSK.Wipe()
	}
}

// Device is one WireGuard interface. Its methods may be called by several
// goroutines at once.
type Device interface {
	// Dump reads all peers. It costs in proportion to their number (a
	// quarter of a second at 10,000): share one Poller.
	Dump() (*Dump, error)
	// SetPSK sets the pre-shared key of a peer, which takes effect at its
	// next handshake. It returns nil and does nothing if the peer does not
	// exist, for so does WireGuard: read it back in a dump that began after
	// the call. A nil key removes the pre-shared key; an all-zero one, which
	// WireGuard would take for the same, is ErrZeroKey. The key stays the
	// caller's.
	SetPSK(PublicKey, *psk.Key) error
	// Renew removes a peer and adds it again in one call, with its pre-shared
	// key, endpoint, keepalive and allowed IPs. WireGuard forgets its session,
	// its counters, and when the peer's last handshake began. A peer with more
	// than 250 allowed IPs, which do not fit into one call, or with an endpoint
	// of link-local IPv6, whose interface nobody tells, is ErrNotRenewable.
	// Where WireGuard refuses, it is tried to add the peer all the same.
	Renew(PublicKey) error
	// Probe sends one packet into the tunnel to a peer, so that WireGuard
	// makes a handshake if there is no live session.
	Probe(PublicKey) error
}

// presharedKey returns what WireGuard is to be given for a key: zeros for nil.
func presharedKey(key *psk.Key) (b [psk.Size]byte, err error) {
	if key == nil {
		return b, nil
	}
	if key.IsZero() {
		return b, ErrZeroKey
	}
	return [psk.Size]byte(key.Bytes()), nil
}
