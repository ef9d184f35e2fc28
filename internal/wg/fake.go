package wg

import (
	"errors"
	"maps"
	"os"
	"slices"
	"sync"
	"time"

	"keyturn/internal/psk"
)

// Fake is a Device in memory, for tests of those who use one. Like WireGuard
// it ignores a key that is set on a peer it does not have.
type Fake struct {
	mu     sync.Mutex
	own    PublicKey
	peers  map[PublicKey]Peer
	fail   Failures
	takes  time.Duration
	dumps  int
	sets   []FakeSet
	probes []PublicKey
	closed bool
}

// Failures are the errors that a Fake returns; nil ones mean success. A call
// that fails changes and records nothing.
type Failures struct{ Dump, SetPSK, Probe error }

// FakeSet records a successful call of SetPSK, also on a peer that is missing.
type FakeSet struct {
	Peer PublicKey
	Key  psk.Fingerprint
}

// NewFake returns a device with the given public key and peers.
func NewFake(own PublicKey, peers ...Peer) *Fake {
	f := &Fake{own: own, peers: make(map[PublicKey]Peer)}
	for _, p := range peers {
		f.SetPeer(p)
	}
	return f
}

// SetPeer adds a peer or puts another in its place. A nil PSK means none.
func (f *Fake) SetPeer(p Peer) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.peers[p.PublicKey] = ownPeer(p)
}

// RemovePeer removes a peer.
func (f *Fake) RemovePeer(k PublicKey) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.peers, k)
}

// Handshake stamps the latest handshake of a peer, if there is such a peer.
func (f *Fake) Handshake(k PublicKey, at time.Time) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if p, ok := f.peers[k]; ok {
		p.Handshake = at
		f.peers[k] = p
	}
}

// Fail sets the errors of the calls to come.
func (f *Fake) Fail(failures Failures) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.fail = failures
}

// DumpTakes makes each dump last d, for which it sleeps: use virtual time.
func (f *Fake) DumpTakes(d time.Duration) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.takes = d
}

// Dumps returns how many dumps were asked for.
func (f *Fake) Dumps() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.dumps
}

// Sets returns the keys set so far, by fingerprint, in order.
func (f *Fake) Sets() []FakeSet {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.sets)
}

// Probes returns the peers probed so far, in order.
func (f *Fake) Probes() []PublicKey {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.probes)
}

// Dump implements Device.
func (f *Fake) Dump() (*Dump, error) {
	began := time.Now()
	f.mu.Lock()
	f.dumps++
	takes := f.takes
	f.mu.Unlock()
	if takes > 0 {
		time.Sleep(takes)
	}

	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.check(f.fail.Dump); err != nil {
		return nil, err
	}
	d := &Dump{Began: began, PublicKey: f.own, Peers: maps.Clone(f.peers)}
	for k, p := range d.Peers {
		d.Peers[k] = ownPeer(p)
	}
	d.Ended = time.Now()
	return d, nil
}

// SetPSK implements Device.
func (f *Fake) SetPSK(k PublicKey, key *psk.Key) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	secret, err := presharedKey(key)
	if err != nil {
		return err
	}
	set, err := psk.New(secret[:])
	if err != nil {
		return err
	}
	if err := f.check(f.fail.SetPSK); err != nil {
		return err
	}
	if p, ok := f.peers[k]; ok {
		p.PSK.Wipe()
		p.PSK = set
		f.peers[k] = p
	}
	f.sets = append(f.sets, FakeSet{k, set.Fingerprint()})
	return nil
}

// Renew implements Device.
func (f *Fake) Renew(k PublicKey) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.check(nil); err != nil {
		return err
	}
	p, ok := f.peers[k]
	if !ok {
		return ErrNoPeer
	}
	p.Handshake, p.Rx, p.Tx = time.Time{}, 0, 0
	f.peers[k] = p
	return nil
}

// Probe implements Device.
func (f *Fake) Probe(k PublicKey) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.check(f.fail.Probe); err != nil {
		return err
	}
	if _, ok := f.peers[k]; !ok {
		return ErrNoPeer
	}
	f.probes = append(f.probes, k)
	return nil
}

// Close ends the access. A second call and all calls after it fail.
func (f *Fake) Close() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	err := f.check(nil)
	f.closed = true
	return err
}

func (f *Fake) check(fail error) error {
	if f.closed {
		return errors.Join(os.ErrClosed, fail)
	}
	return fail
}

// ownPeer copies what a peer refers to, so that a caller may wipe its own.
func ownPeer(p Peer) Peer {
	if p.PSK == nil {
		p.PSK = new(psk.Key)
	} else {
		p.PSK = p.PSK.Clone()
	}
	p.AllowedIPs = slices.Clone(p.AllowedIPs)
	return p
}
