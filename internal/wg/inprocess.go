package wg

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strconv"
	"sync"
	"time"

	"golang.zx2c4.com/wireguard/conn"
	"golang.zx2c4.com/wireguard/device"
	"golang.zx2c4.com/wireguard/tun"

	"keyturn/internal/psk"
)

// inProcess is a wireguard-go device of this process as a Device.
type inProcess struct {
	device *device.Device
	probe  func(PublicKey) error
}

// Dump implements Device.
func (d *inProcess) Dump() (*Dump, error) {
	began := time.Now()
	if d.closed() {
		return nil, ErrNoDevice
	}
	var text bytes.Buffer
	defer func() { clear(text.Bytes()) }()
	if err := d.device.IpcGetOperation(&text); err != nil {
		return nil, fmt.Errorf("read in-process device: %w", err)
	}
	dump, err := parseUAPI(text.Bytes())
	if err != nil {
		return nil, fmt.Errorf("read in-process device: %w", err)
	}
	dump.Began, dump.Ended = began, time.Now()
	return dump, nil
}

// SetPSK implements Device.
func (d *inProcess) SetPSK(peer PublicKey, key *psk.Key) error {
	secret, err := presharedKey(key)
	if err != nil {
		return err
	}
	defer clear(secret[:])
	if d.closed() {
		return ErrNoDevice
	}
	return d.set(func(c *uapiWriter) {
		c.secret("public_key", peer[:])
		c.line("update_only", "true")
		c.secret("preshared_key", secret[:])
	})
}

// Renew implements Device.
func (d *inProcess) Renew(peer PublicKey) error {
	dump, err := d.Dump()
	if err != nil {
		return err
	}
	defer dump.Wipe()
	p, ok := dump.Peers[peer]
	switch {
	case !ok:
		return ErrNoPeer
	case len(p.AllowedIPs) > maxRenewedHere:
		return ErrNotRenewable
	}
	return d.set(func(c *uapiWriter) {
		c.secret("public_key", peer[:])
		c.line("remove", "true")
		c.secret("public_key", peer[:])
		c.secret("preshared_key", p.PSK.Bytes())
		if p.Endpoint.IsValid() {
			c.line("endpoint", p.Endpoint.String())
		}
		c.line("persistent_keepalive_interval", strconv.Itoa(int(p.Keepalive/time.Second)))
		for _, a := range p.AllowedIPs {
			c.line("allowed_ip", a.String())
		}
	})
}

// maxRenewedHere is how many allowed IPs a uapiWriter has room for, and more
// than the peer of a Pair has.
const maxRenewedHere = 32

// Probe implements Device.
func (d *inProcess) Probe(peer PublicKey) error {
	if d.closed() {
		return ErrNoDevice
	}
	return d.probe(peer)
}

func (d *inProcess) closed() bool {
	select {
	case <-d.device.Wait():
		return true
	default:
		return false
	}
}

// set configures the device and wipes the text that did it.
func (d *inProcess) set(write func(*uapiWriter)) error {
	w := &uapiWriter{text: make([]byte, 0, 4096)} // never grows: nothing is left behind
	defer func() { clear(w.text) }()
	write(w)
	if err := d.device.IpcSetOperation(bytes.NewReader(w.text)); err != nil {
		return fmt.Errorf("configure in-process device: %w", err)
	}
	return nil
}

// uapiWriter writes the lines of a "set" of WireGuard's cross-platform interface.
type uapiWriter struct{ text []byte }

func (w *uapiWriter) line(key, value string) {
	w.text = append(append(append(append(w.text, key...), '='), value...), '\n')
}

func (w *uapiWriter) secret(key string, value []byte) {
	w.text = append(append(w.text, key...), '=')
	w.text = append(hex.AppendEncode(w.text, value), '\n')
}

// memoryTUN is a network interface without a kernel: what comes out of the
// tunnel goes to deliver, and inject puts a packet in.
type memoryTUN struct {
	deliver func(packet []byte) // keeps no reference
	packets chan []byte
	events  chan tun.Event
	closed  chan struct{}
	once    sync.Once
}

const (
	tunMTU   = 1420
	tunQueue = 128 // packets
)

func newMemoryTUN(deliver func([]byte)) *memoryTUN {
	return &memoryTUN{
		deliver: deliver,
		packets: make(chan []byte, tunQueue),
		events:  make(chan tun.Event),
		closed:  make(chan struct{}),
	}
}

// inject gives the device a packet to send, whose owner it becomes. It waits
// while the queue is full; false means that the interface is closed.
func (t *memoryTUN) inject(packet []byte) bool {
	select {
	case <-t.closed: // also while there is room in the queue
		return false
	default:
	}
	select {
	case <-t.closed:
		return false
	case t.packets <- packet:
		return true
	}
}

// Read implements tun.Device.
func (t *memoryTUN) Read(bufs [][]byte, sizes []int, offset int) (int, error) {
	select {
	case <-t.closed:
		return 0, os.ErrClosed
	case p := <-t.packets:
		sizes[0] = copy(bufs[0][offset:], p)
		return 1, nil
	}
}

// Write implements tun.Device.
func (t *memoryTUN) Write(bufs [][]byte, offset int) (int, error) {
	for _, b := range bufs {
		t.deliver(b[offset:])
	}
	return len(bufs), nil
}

// Close implements tun.Device.
func (t *memoryTUN) Close() error {
	t.once.Do(func() {
		close(t.closed)
		close(t.events)
	})
	return nil
}

func (t *memoryTUN) File() *os.File           { return nil }
func (t *memoryTUN) MTU() (int, error)        { return tunMTU, nil }
func (t *memoryTUN) Name() (string, error)    { return "memory", nil }
func (t *memoryTUN) Events() <-chan tun.Event { return t.events }
func (t *memoryTUN) BatchSize() int           { return 1 }

// loopbackBind carries WireGuard's datagrams over real UDP that never leaves
// this machine. wireguard-go's own bind would listen on all addresses.
type loopbackBind struct {
	mu   sync.Mutex
	conn *net.UDPConn // nil while closed
}

// Open implements conn.Bind.
func (b *loopbackBind) Open(port uint16) ([]conn.ReceiveFunc, uint16, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.conn != nil {
		return nil, 0, conn.ErrBindAlreadyOpen
	}
	c, err := net.ListenUDP("udp4", net.UDPAddrFromAddrPort(netip.AddrPortFrom(loopback(), port)))
	if err != nil {
		return nil, 0, err
	}
	b.conn = c
	receive := func(bufs [][]byte, sizes []int, from []conn.Endpoint) (int, error) {
		n, addr, err := c.ReadFromUDPAddrPort(bufs[0])
		if err != nil {
			return 0, err
		}
		sizes[0], from[0] = n, &conn.StdNetEndpoint{AddrPort: addr}
		return 1, nil
	}
	bound, ok := c.LocalAddr().(*net.UDPAddr)
	if !ok {
		return nil, 0, net.ErrClosed
	}
	return []conn.ReceiveFunc{receive}, uint16(bound.Port), nil
}

// Close implements conn.Bind.
func (b *loopbackBind) Close() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.conn == nil {
		return nil
	}
	c := b.conn
	b.conn = nil
	return c.Close()
}

// Send implements conn.Bind.
func (b *loopbackBind) Send(datagrams [][]byte, to conn.Endpoint) error {
	b.mu.Lock()
	c := b.conn
	b.mu.Unlock()
	e, ok := to.(*conn.StdNetEndpoint)
	if !ok {
		return conn.ErrWrongEndpointType
	}
	if c == nil {
		return net.ErrClosed
	}
	for _, d := range datagrams {
		if _, err := c.WriteToUDPAddrPort(d, e.AddrPort); err != nil {
			return err
		}
	}
	return nil
}

// ParseEndpoint implements conn.Bind.
func (b *loopbackBind) ParseEndpoint(s string) (conn.Endpoint, error) {
	a, err := netip.ParseAddrPort(s)
	if err != nil {
		return nil, err
	}
	return &conn.StdNetEndpoint{AddrPort: a}, nil
}

func (b *loopbackBind) SetMark(uint32) error { return nil }
func (b *loopbackBind) BatchSize() int       { return 1 }

func loopback() netip.Addr { return netip.AddrFrom4([4]byte{127, 0, 0, 1}) }

// lossy is a bind that loses the datagrams that drop chooses.
type lossy struct {
	conn.Bind
	drop func(datagram []byte) bool
}

// Send implements conn.Bind.
func (l *lossy) Send(datagrams [][]byte, to conn.Endpoint) error {
	kept := make([][]byte, 0, len(datagrams))
	for _, d := range datagrams {
		if !l.drop(d) {
			kept = append(kept, d)
		}
	}
	if len(kept) == 0 {
		return nil
	}
	return l.Bind.Send(kept, to)
}
