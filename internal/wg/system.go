package wg

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"keyturn/internal/psk"
)

// socketDirectory is where userspace devices have their control sockets.
const socketDirectory = "/var/run/wireguard"

// maxName is the longest name of an interface in bytes: IFNAMSIZ of
// linux/if.h without the terminating zero.
const maxName = 15

// callTimeout bounds one call to a device. wgctrl knows no deadline, and the
// process of a userspace device can be stopped while its socket still accepts.
const callTimeout = 10 * time.Second

// System is an interface of this machine, in the kernel or in userspace.
type System struct {
	name string
	// A wgctrl client serialises its calls. With a second one a key does
	// not wait for a long dump.
	dumps, writes *client

	mu     sync.Mutex // of what a probe takes from the newest dump, to need none of its own
	peers  map[PublicKey]struct{}
	routes []route
}

// Open returns the WireGuard interface of that name, which must exist and be
// readable: the errors are ErrNoDevice, ErrPrivilege, ErrStaleSocket,
// ErrTimeout, and a name that no interface can have. An interface that is
// deleted later and made anew is found again by the same System.
func Open(name string) (*System, error) {
	if err := checkName(name); err != nil {
		return nil, err
	}
	s := &System{name: name, dumps: newClient(), writes: newClient(), peers: make(map[PublicKey]struct{})}
	d, err := s.Dump()
	if err != nil {
		return nil, errors.Join(err, s.Close())
	}
	d.Wipe()
	return s, nil
}

// checkName applies the kernel's rules (dev_valid_name in net/core/dev.c).
// They also keep the name of a control socket inside its directory.
func checkName(name string) error {
	invalid := func(r rune) bool { return r == '/' || r == ':' || r <= ' ' || r == 0x7f }
	if name == "" || len(name) > maxName || name == "." || name == ".." || strings.ContainsFunc(name, invalid) {
		return fmt.Errorf("%q is not the name of an interface (1 to %d bytes, no slash, colon or space)", name, maxName)
	}
	return nil
}

// Dump implements Device.
func (s *System) Dump() (*Dump, error) {
	d, err := call(s.dumps, func(c *wgctrl.Client) (*Dump, error) {
		began := time.Now()
		d, err := c.Device(s.name)
		if err != nil {
			return nil, err
		}
		return convert(d, began, time.Now())
	})
	if err != nil {
		return nil, s.explain("read", err)
	}
	s.mu.Lock()
	clear(s.peers)
	for k := range d.Peers {
		s.peers[k] = struct{}{}
	}
	s.routes = appendRoutes(s.routes[:0], d)
	s.mu.Unlock()
	return d, nil
}

// SetPSK implements Device.
func (s *System) SetPSK(peer PublicKey, key *psk.Key) error {
	raw, err := presharedKey(key)
	if err != nil {
		return err
	}
	secret := wgtypes.Key(raw)
	clear(raw[:])
	_, err = call(s.writes, func(c *wgctrl.Client) (struct{}, error) {
		defer clear(secret[:]) // here, for the call can outlive its deadline
		return struct{}{}, c.ConfigureDevice(s.name, wgtypes.Config{Peers: []wgtypes.PeerConfig{{
			PublicKey:    wgtypes.Key(peer),
			UpdateOnly:   true,
			PresharedKey: &secret,
		}}})
	})
	if err != nil {
		return s.explain("set pre-shared key", err)
	}
	return nil
}

// maxRenewed is how many allowed IPs fit into one call: wgctrl splits others,
// and a process that ends between two calls would leave some out.
const maxRenewed = 250

// Renew implements Device.
func (s *System) Renew(peer PublicKey) error {
	_, err := call(s.writes, func(c *wgctrl.Client) (struct{}, error) {
		return struct{}{}, renew(c, s.name, wgtypes.Key(peer))
	})
	if err != nil {
		return s.explain("remove and add a peer of", err)
	}
	return nil
}

func renew(c *wgctrl.Client, name string, peer wgtypes.Key) error {
	d, err := c.Device(name)
	if err != nil {
		return err
	}
	clear(d.PrivateKey[:])
	defer func() {
		for i := range d.Peers {
			clear(d.Peers[i].PresharedKey[:])
		}
	}()
	i := slices.IndexFunc(d.Peers, func(p wgtypes.Peer) bool { return p.PublicKey == peer })
	if i < 0 {
		return ErrNoPeer
	}
	p := &d.Peers[i]
	switch {
	case len(p.AllowedIPs) > maxRenewed:
		return fmt.Errorf("%w: it has %d allowed IPs", ErrNotRenewable, len(p.AllowedIPs))
	case p.Endpoint != nil && p.Endpoint.IP.To4() == nil && p.Endpoint.IP.IsLinkLocalUnicast():
		return fmt.Errorf("%w: its endpoint is link-local", ErrNotRenewable)
	}
	add := wgtypes.PeerConfig{
		PublicKey: peer, PresharedKey: &p.PresharedKey, Endpoint: p.Endpoint,
		PersistentKeepaliveInterval: &p.PersistentKeepaliveInterval, ReplaceAllowedIPs: true, AllowedIPs: p.AllowedIPs,
	}
	err = c.ConfigureDevice(name, wgtypes.Config{Peers: []wgtypes.PeerConfig{{PublicKey: peer, Remove: true}, add}})
	for try := range 3 {
		if err == nil || errors.Is(err, os.ErrNotExist) { // the interface went
			break
		}
		// The peer may be gone, and must not stay away.
		if try == 2 {
			add.Endpoint = nil // perhaps it is that which is refused
		}
		err = c.ConfigureDevice(name, wgtypes.Config{Peers: []wgtypes.PeerConfig{add}})
	}
	return err
}

// Probe implements Device.
func (s *System) Probe(peer PublicKey) error {
	s.mu.Lock()
	_, known := s.peers[peer]
	hosts := hostsOf(peer, s.routes)
	s.mu.Unlock()
	switch {
	case !known:
		return ErrNoPeer
	case len(hosts) == 0:
		return ErrNoAddress
	}
	return sendProbe(s.name, hosts)
}

// Close gives up the access; the interface goes on.
func (s *System) Close() error { return errors.Join(s.dumps.close(), s.writes.close()) }

// explain says what an error of wgctrl means and what to do about it. Texts
// that wgctrl made itself are dropped: they can quote a line of the device's
// answer, and that line can hold a key.
func (s *System) explain(doing string, err error) error {
	socket := socketDirectory + "/" + s.name + ".sock"
	var errno syscall.Errno
	switch {
	case errors.Is(err, ErrTimeout), errors.Is(err, os.ErrClosed), errors.Is(err, errNoAnswer),
		errors.Is(err, ErrNoPeer), errors.Is(err, ErrNotRenewable):
	case errors.Is(err, os.ErrNotExist):
		err = ErrNoDevice
	case errors.Is(err, os.ErrPermission):
		err = fmt.Errorf("%w: it takes CAP_NET_ADMIN, or for a userspace device access to %s", ErrPrivilege, socket)
	case errors.Is(err, syscall.ECONNREFUSED), errors.Is(err, syscall.EPROTONOSUPPORT):
		err = fmt.Errorf("%w: its process is gone; start it again, or remove %s", ErrStaleSocket, socket)
	case errors.As(err, &errno):
		err = errno
	default:
		err = errors.New("the device's answer makes no sense")
	}
	return fmt.Errorf("%s %q: %w", doing, s.name, err)
}

// errNoAnswer stands for the empty answer of a userspace device whose process
// ended meanwhile, which wgctrl takes for a device without key and peers.
var errNoAnswer = errors.New("the interface has neither a private key nor peers")

// convert takes over what wgctrl read and wipes its secrets. Copies that
// wgctrl made on the way stay in memory until it is used again.
func convert(d *wgtypes.Device, began, ended time.Time) (*Dump, error) {
	unset := d.PrivateKey == wgtypes.Key{}
	clear(d.PrivateKey[:])
	if unset && len(d.Peers) == 0 && d.Type == wgtypes.Userspace {
		return nil, errNoAnswer
	}
	dump := &Dump{
		Began:      began,
		Ended:      ended,
		ListenPort: uint16(d.ListenPort),
		Peers:      make(map[PublicKey]Peer, len(d.Peers)),
	}
	if !unset {
		dump.PublicKey = PublicKey(d.PublicKey)
	}
	for i := range d.Peers {
		p := &d.Peers[i]
		key, err := psk.New(p.PresharedKey[:])
		if err != nil {
			return nil, err
		}
		clear(p.PresharedKey[:])
		peer := Peer{
			PublicKey:  PublicKey(p.PublicKey),
			PSK:        key,
			Handshake:  p.LastHandshakeTime,
			Rx:         uint64(p.ReceiveBytes),
			Tx:         uint64(p.TransmitBytes),
			AllowedIPs: make([]netip.Prefix, 0, len(p.AllowedIPs)),
			Keepalive:  p.PersistentKeepaliveInterval,
		}
		if p.Endpoint != nil {
			e := p.Endpoint.AddrPort()
			peer.Endpoint = netip.AddrPortFrom(e.Addr().Unmap(), e.Port())
		}
		for _, n := range p.AllowedIPs {
			if a, ok := netip.AddrFromSlice(n.IP); ok {
				bits, _ := n.Mask.Size()
				peer.AllowedIPs = append(peer.AllowedIPs, netip.PrefixFrom(a, bits))
			}
		}
		if twice, ok := dump.Peers[peer.PublicKey]; ok { // removed and added meanwhile
			twice.PSK.Wipe()
		}
		dump.Peers[peer.PublicKey] = peer
	}
	return dump, nil
}

// client is a wgctrl client that is opened when needed and again after every
// error: kernel WireGuard may have been loaded since, and a netlink socket
// may be out of step.
type client struct {
	turn   chan struct{} // holds one token, the right to use what follows
	ctl    *wgctrl.Client
	closed bool
}

func newClient() *client {
	c := &client{turn: make(chan struct{}, 1)}
	c.turn <- struct{}{}
	return c
}

// call makes one call through c within callTimeout. A call that takes longer
// is left to itself, for wgctrl cannot be interrupted; until it ends, the
// calls after it time out as well, so that there is never more than one.
func call[T any](c *client, do func(*wgctrl.Client) (T, error)) (T, error) {
	type result struct {
		value T
		err   error
	}
	var none T
	timeout := time.NewTimer(callTimeout)
	defer timeout.Stop()
	select {
	case <-c.turn:
	case <-timeout.C:
		return none, ErrTimeout
	}
	done := make(chan result, 1)
	go func() {
		defer func() { c.turn <- struct{}{} }()
		var r result
		if r.err = c.open(); r.err == nil {
			if r.value, r.err = do(c.ctl); r.err != nil {
				_ = c.ctl.Close() // nothing was left to flush
				c.ctl = nil
			}
		}
		done <- r
	}()
	select {
	case r := <-done:
		return r.value, r.err
	case <-timeout.C:
		return none, ErrTimeout
	}
}

func (c *client) open() (err error) {
	switch {
	case c.closed:
		return os.ErrClosed
	case c.ctl == nil:
		c.ctl, err = wgctrl.New()
	}
	return err
}

func (c *client) close() error {
	select {
	case <-c.turn:
	case <-time.After(callTimeout):
		return ErrTimeout
	}
	defer func() { c.turn <- struct{}{} }()
	c.closed = true
	if c.ctl == nil {
		return nil
	}
	ctl := c.ctl
	c.ctl = nil
	return ctl.Close()
}
