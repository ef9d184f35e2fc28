package daemon_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdh"
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	mathrand "math/rand/v2"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.zx2c4.com/wireguard/conn"
	"golang.zx2c4.com/wireguard/device"
	"golang.zx2c4.com/wireguard/tun"

	"keyturn/internal/psk"
	"keyturn/internal/wg"
)

// medium carries datagrams from either host to the other: those that it does
// not lose, some of them twice or late.
type medium struct {
	mu     sync.Mutex
	rng    *mathrand.Rand
	cut    int     // partitions that last
	loss   float64 // parts of one
	repeat float64
	late   float64
	queue  [2]chan parcel // towards each host
	take   [2]func([]byte)
}

type parcel struct {
	at time.Time
	b  []byte
}

const (
	latency = 5 * time.Millisecond
	latest  = 500 * time.Millisecond // of a datagram that is overtaken
)

func newMedium(seed, stream uint64) *medium {
	return &medium{rng: mathrand.New(mathrand.NewPCG(seed, stream)), queue: [2]chan parcel{make(chan parcel, 4096), make(chan parcel, 4096)}}
}

// run keeps the order of each direction.
func (m *medium) run(ctx context.Context, to int) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case p := <-m.queue[to]:
			time.Sleep(time.Until(p.at))
			m.take[to](p.b)
		}
	}
}

func (m *medium) send(to int, b []byte) {
	m.mu.Lock()
	defer m.mu.Unlock()
	draw := func(part float64) bool { return part > 0 && m.rng.Float64() < part }
	if m.cut > 0 || draw(m.loss) {
		return
	}
	times := 1
	if draw(m.repeat) {
		times = 2
	}
	for range times {
		p := parcel{time.Now().Add(latency), bytes.Clone(b)}
		if draw(m.late) {
			time.AfterFunc(latency+time.Duration(m.rng.Int64N(int64(latest))), func() { m.take[to](p.b) })
			continue
		}
		select {
		case m.queue[to] <- p:
		default: // as a full queue of a router
		}
	}
}

// hosts are two machines whose tunnel, unlike that of a wg.Pair, can suffer.
type hosts struct {
	ends   [2]*host
	tunnel *medium // WireGuard's datagrams
	link   *medium // the link's segments; inside the tunnel: on their way there
}

// host is one of them: its WireGuard interface, and its TCP.
type host struct {
	world    *hosts
	index    int
	private  []byte
	public   wg.PublicKey
	original *psk.Key // what the host's own configuration sets
	stack    *stack

	mu      sync.Mutex
	device  *device.Device // nil: there is no interface
	gone    int            // reasons for which there is no interface
	removed int            // and for which it has no peer
	shift   time.Duration  // of the wall clock
	stamp   time.Time      // the last stamp, before and after the shift
	shifted time.Time

	// Where packets go. WireGuard waits for whoever delivers them, so that mu
	// must not be in their way.
	tun    atomic.Pointer[memoryTUN]
	socket atomic.Pointer[socket]

	pingMu   sync.Mutex
	pings    map[uint64]time.Time // unanswered
	sent     int
	lost     int
	answered time.Time // when the newest answered one was sent
	lostAt   time.Time // when the ping was sent that was last found lost
}

// everMade keeps all devices and their peers reachable: wireguard-go drains its
// queues by finalizers, which run outside the bubble.
var everMade struct {
	sync.Mutex
	things []any
}

func keep(things ...any) {
	everMade.Lock()
	defer everMade.Unlock()
	everMade.things = append(everMade.things, things...)
}

func newHosts(t *testing.T, seed [2]uint64, inside bool) *hosts {
	t.Helper()
	w := &hosts{tunnel: newMedium(seed[0], seed[1]+1), link: newMedium(seed[0], seed[1]+2)}
	original, err := psk.Random(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for i := range w.ends {
		private, err := ecdh.X25519().GenerateKey(rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		h := &host{
			world: w, index: i, private: private.Bytes(), public: wg.PublicKey(private.PublicKey().Bytes()),
			original: original, pings: map[uint64]time.Time{},
		}
		h.stack = newStack(func(b []byte) { w.link.send(1-i, b) })
		w.ends[i] = h
		w.tunnel.take[i] = h.datagram
		w.link.take[i] = h.stack.receive
		if inside {
			w.link.take[1-i] = func(b []byte) { _ = h.inject(kindSegment, b) }
		}
	}
	for _, h := range w.ends {
		if err := h.boot(); err != nil {
			t.Fatal(err)
		}
	}
	return w
}

func (h *host) other() *host { return h.world.ends[1-h.index] }

func (h *host) address() netip.Addr { return netip.AddrFrom4([4]byte{192, 0, 2, byte(h.index + 1)}) }

// boot makes the interface, as the host's own configuration describes it.
func (h *host) boot() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	in := &memoryTUN{deliver: h.received, packets: make(chan []byte, queueSize), events: make(chan tun.Event), closed: make(chan struct{})}
	out := &socket{send: func(b []byte) { h.world.tunnel.send(1-h.index, b) }, packets: make(chan []byte, queueSize)}
	h.tun.Store(in)
	h.socket.Store(out)
	h.device = device.NewDevice(in, out, device.NewLogger(device.LogLevelSilent, ""))
	keep(h.device)
	if err := h.configure("private_key=" + hex.EncodeToString(h.private) + "\n"); err != nil {
		return err
	}
	if err := h.device.Up(); err != nil {
		return err
	}
	if h.removed > 0 {
		return nil
	}
	return h.addPeer()
}

func (h *host) configure(text string) error {
	if err := h.device.IpcSetOperation(strings.NewReader(text)); err != nil {
		return fmt.Errorf("configure host %d: %w", h.index, err)
	}
	return nil
}

func (h *host) addPeer() error {
	err := h.configure(fmt.Sprintf("public_key=%x\npreshared_key=%x\nendpoint=127.0.0.1:1\nallowed_ip=%v/32\n",
		h.other().public[:], h.original.Bytes(), h.other().address()))
	keep(h.device.LookupPeer(device.NoisePublicKey(h.other().public)))
	return err
}

// vanish takes the interface away, until appear was called as often.
func (h *host) vanish() {
	h.mu.Lock()
	d := h.device
	h.gone++
	h.device = nil
	h.tun.Store(nil)
	h.socket.Store(nil)
	h.mu.Unlock()
	if d != nil {
		d.Close()
	}
}

func (h *host) appear() error {
	h.mu.Lock()
	h.gone--
	back := h.gone == 0
	h.mu.Unlock()
	if back {
		return h.boot()
	}
	return nil
}

// remove takes the peer out of the interface, until add was called as often.
func (h *host) remove() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.removed++
	if h.device == nil || h.removed > 1 {
		return nil
	}
	return h.configure(fmt.Sprintf("public_key=%x\nremove=true\n", h.other().public[:]))
}

func (h *host) add() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.removed--
	if h.device == nil || h.removed > 0 {
		return nil
	}
	return h.addPeer()
}

// Dump implements wg.Device.
func (h *host) Dump() (*wg.Dump, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	d := &wg.Dump{Began: time.Now(), PublicKey: h.public, Peers: map[wg.PublicKey]wg.Peer{}}
	if h.device == nil {
		return nil, wg.ErrNoDevice
	}
	text, err := h.device.IpcGet()
	if err != nil {
		return nil, err
	}
	var p *wg.Peer
	var stamp [2]int64
	lines := bufio.NewScanner(strings.NewReader(text))
	for lines.Scan() {
		key, value, _ := strings.Cut(lines.Text(), "=")
		number, _ := strconv.ParseInt(value, 10, 64)
		switch key {
		case "public_key":
			p = &wg.Peer{PublicKey: h.other().public}
		case "preshared_key":
			b, err := hex.DecodeString(value)
			if err != nil {
				return nil, err
			}
			if p.PSK, err = psk.New(b); err != nil {
				return nil, err
			}
		case "last_handshake_time_sec":
			stamp[0] = number
		case "last_handshake_time_nsec":
			stamp[1] = number
		case "rx_bytes":
			p.Rx = uint64(number)
		case "tx_bytes":
			p.Tx = uint64(number)
		case "allowed_ip":
			p.AllowedIPs = []netip.Prefix{netip.MustParsePrefix(value)}
		}
	}
	if p != nil {
		if stamp != [2]int64{} {
			p.Handshake = h.shiftedStamp(time.Unix(stamp[0], stamp[1]))
		}
		d.Peers[p.PublicKey] = *p
	}
	d.Ended = time.Now()
	return d, nil
}

// shiftedStamp is what the stamp would be if the host's wall clock had been
// moved. The bubble has only one clock, so this is all that can be seen here.
func (h *host) shiftedStamp(at time.Time) time.Time {
	if !at.Equal(h.stamp) {
		h.stamp, h.shifted = at, at.Add(h.shift)
	}
	return h.shifted
}

// SetPSK implements wg.Device. Where there is no such peer it does nothing, as
// WireGuard does; wireguard-go would make one and drop it: see everMade.
func (h *host) SetPSK(peer wg.PublicKey, k *psk.Key) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	switch {
	case h.device == nil:
		return wg.ErrNoDevice
	case h.device.LookupPeer(device.NoisePublicKey(peer)) == nil:
		return nil
	}
	if k == nil {
		k = new(psk.Key)
	}
	return h.configure(fmt.Sprintf("public_key=%x\nupdate_only=true\npreshared_key=%x\n", peer[:], k.Bytes()))
}

// Probe implements wg.Device.
func (h *host) Probe(wg.PublicKey) error { return h.inject(kindProbe, nil) }

// Renew implements wg.Device.
func (h *host) Renew(peer wg.PublicKey) error {
	d, err := h.Dump()
	if err != nil {
		return err
	}
	defer d.Wipe()
	h.mu.Lock()
	defer h.mu.Unlock()
	p, ok := d.Peers[peer]
	switch {
	case h.device == nil:
		return wg.ErrNoDevice
	case !ok:
		return wg.ErrNoPeer
	}
	err = h.configure(fmt.Sprintf("public_key=%x\nremove=true\npublic_key=%x\npreshared_key=%x\nendpoint=127.0.0.1:1\nallowed_ip=%v/32\n",
		peer[:], peer[:], p.PSK.Bytes(), h.other().address()))
	keep(h.device.LookupPeer(device.NoisePublicKey(peer)))
	return err
}

// Device is the host's interface, for whoever has no process.
func (h *host) Device() wg.Device { return h }

// PublicKey is the interface's.
func (h *host) PublicKey() wg.PublicKey { return h.public }

// The packets in the tunnel: an IPv4 header, a kind, and what it says.
const (
	ipHeader     = 20
	kindProbe    = 0
	kindRequest  = 1
	kindAnswer   = 2
	kindSegment  = 3
	experimental = 253 // RFC 3692
	answerTime   = 2 * time.Second
	queueSize    = 4096 // packets
)

func (h *host) inject(kind byte, content []byte) error {
	p := make([]byte, ipHeader, ipHeader+1+len(content))
	p[0], p[8], p[9] = 4<<4|ipHeader/4, 64, experimental
	binary.BigEndian.PutUint16(p[2:], uint16(cap(p)))
	copy(p[12:], h.address().AsSlice())
	copy(p[16:], h.other().address().AsSlice())
	p = append(append(p, kind), content...)
	t := h.tun.Load()
	if t == nil {
		return wg.ErrNoDevice
	}
	select {
	case t.packets <- p:
	default: // the interface's queue is full
	}
	return nil
}

// received takes a packet that came out of the tunnel.
func (h *host) received(p []byte) {
	if len(p) <= ipHeader {
		return
	}
	content := bytes.Clone(p[ipHeader+1:])
	switch p[ipHeader] {
	case kindRequest:
		_ = h.inject(kindAnswer, content)
	case kindAnswer:
		h.pong(binary.BigEndian.Uint64(content))
	case kindSegment:
		h.stack.receive(content)
	}
}

// datagram takes one of WireGuard's.
func (h *host) datagram(b []byte) {
	if s := h.socket.Load(); s != nil {
		select {
		case s.packets <- b:
		default:
		}
	}
}

// Ping sends a packet to the other host, which sends it back.
func (h *host) Ping() error {
	h.pingMu.Lock()
	h.sweep()
	h.sent++
	seq := uint64(h.sent)
	h.pings[seq] = time.Now()
	h.pingMu.Unlock()
	_ = h.inject(kindRequest, binary.BigEndian.AppendUint64(nil, seq)) // without an interface it is lost
	return nil
}

func (h *host) pong(seq uint64) {
	h.pingMu.Lock()
	defer h.pingMu.Unlock()
	if at, ok := h.pings[seq]; ok {
		delete(h.pings, seq)
		if at.After(h.answered) {
			h.answered = at
		}
	}
}

// sweep counts as lost what was not answered in time.
func (h *host) sweep() {
	for seq, at := range h.pings {
		if time.Since(at) > answerTime {
			delete(h.pings, seq)
			h.lost++
			h.lostAt = at
		}
	}
}

// traffic tells of the pings of both hosts: those that were sent, those that
// were lost, and when the newest answered one of the worse end was sent.
func (w *hosts) traffic() (sent, lost int, works time.Time) {
	for i, h := range w.ends {
		h.pingMu.Lock()
		h.sweep()
		sent, lost = sent+h.sent, lost+h.lost
		if i == 0 || h.answered.Before(works) {
			works = h.answered
		}
		h.pingMu.Unlock()
	}
	return sent, lost, works
}

// close takes the interfaces down.
func (w *hosts) close() {
	for _, h := range w.ends {
		h.vanish()
	}
}

// memoryTUN is a network interface without a kernel.
type memoryTUN struct {
	deliver func(packet []byte) // keeps no reference
	packets chan []byte
	events  chan tun.Event
	once    sync.Once
	closed  chan struct{}
}

// Read implements tun.Device.
func (t *memoryTUN) Read(to [][]byte, sizes []int, offset int) (int, error) {
	select {
	case <-t.closed:
		return 0, os.ErrClosed
	case p := <-t.packets:
		sizes[0] = copy(to[0][offset:], p)
		return 1, nil
	}
}

// Write implements tun.Device.
func (t *memoryTUN) Write(packets [][]byte, offset int) (int, error) {
	for _, p := range packets {
		t.deliver(p[offset:])
	}
	return len(packets), nil
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
func (t *memoryTUN) MTU() (int, error)        { return 1420, nil }
func (t *memoryTUN) Name() (string, error)    { return "memory", nil }
func (t *memoryTUN) Events() <-chan tun.Event { return t.events }
func (t *memoryTUN) BatchSize() int           { return 1 }

// socket is what WireGuard sends and receives by.
type socket struct {
	send    func(datagram []byte)
	packets chan []byte

	mu     sync.Mutex
	closed chan struct{} // nil: not open
}

// Open implements conn.Bind.
func (s *socket) Open(uint16) ([]conn.ReceiveFunc, uint16, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	closed := make(chan struct{})
	s.closed = closed
	return []conn.ReceiveFunc{func(to [][]byte, sizes []int, from []conn.Endpoint) (int, error) {
		select {
		case <-closed:
			return 0, net.ErrClosed
		case p := <-s.packets:
			sizes[0], from[0] = copy(to[0], p), &conn.StdNetEndpoint{AddrPort: netip.AddrPortFrom(netip.IPv4Unspecified(), 1)}
			return 1, nil
		}
	}}, 1, nil
}

// Close implements conn.Bind.
func (s *socket) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed != nil {
		close(s.closed)
		s.closed = nil
	}
	return nil
}

// Send implements conn.Bind. There is only one place to send to.
func (s *socket) Send(datagrams [][]byte, _ conn.Endpoint) error {
	for _, b := range datagrams {
		s.send(b)
	}
	return nil
}

// ParseEndpoint implements conn.Bind.
func (s *socket) ParseEndpoint(text string) (conn.Endpoint, error) {
	a, err := netip.ParseAddrPort(text)
	return &conn.StdNetEndpoint{AddrPort: a}, err
}

func (s *socket) SetMark(uint32) error { return nil }
func (s *socket) BatchSize() int       { return 1 }
