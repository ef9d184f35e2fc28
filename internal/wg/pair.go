package wg

import (
	"crypto/ecdh"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.zx2c4.com/wireguard/conn"
	"golang.zx2c4.com/wireguard/conn/bindtest"
	"golang.zx2c4.com/wireguard/device"

	"keyturn/internal/psk"
)

// PairOptions say how a Pair is made. The zero value is a tunnel in memory,
// which works in testing/synctest.
type PairOptions struct {
	// Loopback carries the tunnel over real UDP on 127.0.0.1.
	Loopback bool
	// Keepalive is the persistent keepalive of end A, in whole seconds. B
	// has none, so that the ends do not start handshakes at the same moment.
	Keepalive time.Duration
	// PSK is set at both ends before anything is sent; nil or all-zero: none.
	PSK *psk.Key
	// Drop, if not nil, is asked for each of WireGuard's datagrams whether
	// it gets lost. It is called by several goroutines at once.
	Drop func(datagram []byte) bool
}

// Pair is a tunnel between two real WireGuard devices in this process, that
// needs no privileges. Keys are drawn at random.
//
// A pair that was made in a testing/synctest bubble must stay reachable for as
// long as the process lives: wireguard-go drains its queues by finalizers,
// which run outside the bubble, where the bubble's channels are out of bounds.
type Pair struct {
	A, B       *End
	handshakes handshakes
}

// End is one end of a Pair.
type End struct {
	pair    *Pair
	index   int
	device  inProcess
	tun     *memoryTUN
	public  PublicKey
	peer    *device.Peer // the other end, as this one's device knows it
	other   *End
	address netip.Addr
	pings   pings
}

// NewPair makes a pair with its tunnel up; the first packet or keepalive
// makes the first handshake.
func NewPair(o PairOptions) (*Pair, error) {
	if o.Keepalive < 0 || o.Keepalive%time.Second != 0 || o.Keepalive >= 1<<16*time.Second {
		return nil, fmt.Errorf("keepalive %v is not whole seconds up to 65535", o.Keepalive)
	}
	p := new(Pair)
	var binds [2]conn.Bind
	if o.Loopback {
		binds = [2]conn.Bind{new(loopbackBind), new(loopbackBind)}
	} else {
		binds = bindtest.NewChannelBinds()
	}
	if o.Drop != nil {
		binds = [2]conn.Bind{&lossy{binds[0], o.Drop}, &lossy{binds[1], o.Drop}}
	}
	p.A = newEnd(p, 0, binds[0])
	p.B = newEnd(p, 1, binds[1])
	p.A.other, p.B.other = p.B, p.A
	if err := p.configure(o); err != nil {
		return nil, errors.Join(err, p.Close())
	}
	return p, nil
}

func newEnd(p *Pair, index int, bind conn.Bind) *End {
	e := &End{
		pair:    p,
		index:   index,
		address: netip.AddrFrom4([4]byte{192, 0, 2, byte(index + 1)}),
	}
	e.tun = newMemoryTUN(e.receive)
	e.device = inProcess{
		device: device.NewDevice(e.tun, bind, &device.Logger{Verbosef: e.watch, Errorf: device.DiscardLogf}),
		probe:  e.probe,
	}
	return e
}

func (p *Pair) configure(o PairOptions) error {
	var endpoints [2]string
	for i, e := range []*End{p.A, p.B} {
		private, err := ecdh.X25519().GenerateKey(rand.Reader)
		if err != nil {
			return fmt.Errorf("draw private key: %w", err)
		}
		e.public = PublicKey(private.PublicKey().Bytes())
		secret := private.Bytes()
		err = e.device.set(func(w *uapiWriter) { w.secret("private_key", secret) })
		clear(secret)
		if err != nil {
			return err
		}
		if err := e.device.device.Up(); err != nil {
			return fmt.Errorf("bring up in-process device: %w", err)
		}
		d, err := e.device.Dump()
		if err != nil {
			return err
		}
		port := d.ListenPort
		if !o.Loopback {
			port = uint16(2 - i) // how bindtest names the other end's bind
		}
		endpoints[i] = netip.AddrPortFrom(loopback(), port).String()
	}
	for i, e := range []*End{p.A, p.B} {
		if err := e.addPeer(o.PSK, endpoints[1-i]); err != nil {
			return err
		}
	}
	// Last, for it sends at once and B must know A by then.
	return p.A.device.set(func(w *uapiWriter) {
		w.secret("public_key", p.B.public[:])
		w.line("persistent_keepalive_interval", strconv.Itoa(int(o.Keepalive/time.Second)))
	})
}

func (e *End) addPeer(key *psk.Key, endpoint string) error {
	err := e.device.set(func(w *uapiWriter) {
		w.secret("public_key", e.other.public[:])
		if key != nil {
			w.secret("preshared_key", key.Bytes())
		}
		w.line("endpoint", endpoint)
		w.line("allowed_ip", netip.PrefixFrom(e.other.address, 32).String())
	})
	e.peer = e.device.device.LookupPeer(device.NoisePublicKey(e.other.public))
	return err
}

// Handshake makes A start a handshake, also while the session is fresh, and
// without losing a packet. WireGuard ignores it within five seconds of the
// handshake message that A sent last. That can be one it sent by itself: where
// an answer comes at once, wireguard-go can arm the timer of its retry after
// the answer, and makes one more handshake five seconds later.
func (p *Pair) Handshake() error {
	return p.A.peer.SendHandshakeInitiation(false)
}

// FailedHandshakes counts the initiations, from either end and after the
// first session, that no completed handshake followed within five seconds.
func (p *Pair) FailedHandshakes() int { return p.handshakes.failures(time.Now()) }

// Traffic returns the pings of both ends together.
func (p *Pair) Traffic() Traffic {
	a, b := p.A.Traffic(), p.B.Traffic()
	return Traffic{Sent: a.Sent + b.Sent, Answered: a.Answered + b.Answered, Lost: a.Lost + b.Lost}
}

// Close takes the tunnel down and waits for its goroutines.
func (p *Pair) Close() error {
	p.A.device.device.Close()
	p.B.device.device.Close()
	return nil
}

// Device returns the end's WireGuard device. It is the Pair that ends it.
func (e *End) Device() Device { return &e.device }

// PublicKey returns the end's own public key.
func (e *End) PublicKey() PublicKey { return e.public }

// Traffic counts the pings of an end. Sent less Answered and Lost are under way.
type Traffic struct {
	Sent     uint64
	Answered uint64
	// Lost were overtaken by the answer to a later one, for a tunnel keeps
	// its packets in order, or are unanswered for two seconds. The latter
	// count as answered after all if an answer still comes.
	Lost uint64
}

const (
	answerTime = 2 * time.Second
	// maxPending bounds the pings that wait for an answer: of more, the
	// oldest are lost for good.
	maxPending = 4096
)

// Ping sends one small packet to the other end, which sends it back. It does
// not wait for the answer.
func (e *End) Ping() error {
	if !e.tun.inject(e.packet(kindRequest, e.pings.sent(time.Now()))) {
		return ErrNoDevice
	}
	return nil
}

// Traffic tells what became of the end's pings.
func (e *End) Traffic() Traffic { return e.pings.traffic(time.Now()) }

func (e *End) probe(peer PublicKey) error {
	if peer != e.other.public {
		return ErrNoPeer
	}
	if !e.tun.inject(e.packet(kindProbe, 0)) {
		return ErrNoDevice
	}
	return nil
}

// Layout of the packets in the tunnel: an IPv4 header (RFC 791) with a
// protocol number for experiments (RFC 3692), a kind, and a sequence number. No
// checksum: no IP stack ever sees them.
const (
	ipHeader   = 20
	protocol   = 253
	packetSize = ipHeader + 1 + 8
)

const (
	kindProbe byte = iota
	kindRequest
	kindAnswer
)

func (e *End) packet(kind byte, seq uint64) []byte {
	p := make([]byte, packetSize)
	p[0] = 4<<4 | ipHeader/4
	binary.BigEndian.PutUint16(p[2:], packetSize)
	p[8], p[9] = 64, protocol
	copy(p[12:], e.address.AsSlice())
	copy(p[16:], e.other.address.AsSlice())
	p[ipHeader] = kind
	binary.BigEndian.PutUint64(p[ipHeader+1:], seq)
	return p
}

// receive takes a packet that came out of the tunnel.
func (e *End) receive(p []byte) {
	if len(p) < packetSize || p[9] != protocol {
		return
	}
	seq := binary.BigEndian.Uint64(p[ipHeader+1:])
	switch p[ipHeader] {
	case kindRequest:
		e.tun.inject(e.packet(kindAnswer, seq))
	case kindAnswer:
		e.pings.answered(seq)
	}
}

// pings keeps the books of the pings of one end.
type pings struct {
	mu      sync.Mutex
	counts  Traffic
	pending []ping // in order of sequence
}

type ping struct {
	seq  uint64
	sent time.Time
}

// sent enters a new ping and returns its sequence number.
func (p *pings) sent(now time.Time) uint64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.pending) == maxPending {
		p.pending = p.pending[1:]
		p.counts.Lost++
	}
	p.counts.Sent++
	p.pending = append(p.pending, ping{p.counts.Sent, now})
	return p.counts.Sent
}

func (p *pings) answered(seq uint64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for len(p.pending) > 0 && p.pending[0].seq <= seq {
		if p.pending[0].seq == seq {
			p.counts.Answered++
		} else {
			p.counts.Lost++
		}
		p.pending = p.pending[1:]
	}
}

func (p *pings) traffic(now time.Time) Traffic {
	p.mu.Lock()
	defer p.mu.Unlock()
	t := p.counts
	for _, waiting := range p.pending {
		if now.Sub(waiting.sent) > answerTime {
			t.Lost++
		}
	}
	return t
}

// watch is the verbose log of the end's device, the only place where it tells
// of handshake messages. The words are those of wireguard-go at the version in
// go.mod; a test fails where others come.
func (e *End) watch(format string, _ ...any) {
	switch {
	case strings.HasSuffix(format, "Sending handshake initiation"):
		e.pair.handshakes.initiated(e.index, time.Now())
	case strings.HasSuffix(format, "Received handshake response"):
		e.pair.handshakes.completed(time.Now())
	}
}

// handshakes keeps the books of the handshakes of a pair.
type handshakes struct {
	mu      sync.Mutex
	first   bool         // there was a session
	started [2]time.Time // the initiation of each end that waits for its completion
	failed  int
}

// answerLimit is WireGuard's REKEY_TIMEOUT: an end sends no other initiation
// within it, and takes the first for lost after it.
const answerLimit = 5 * time.Second

func (h *handshakes) initiated(end int, now time.Time) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.first && !h.started[end].IsZero() {
		h.failed++
	}
	h.started[end] = now
}

// completed settles the initiations of both ends: where both began at once,
// one handshake is enough.
func (h *handshakes) completed(now time.Time) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for i, at := range h.started {
		if h.first && !at.IsZero() && now.Sub(at) > answerLimit {
			h.failed++
		}
		h.started[i] = time.Time{}
	}
	h.first = true
}

func (h *handshakes) failures(now time.Time) int {
	h.mu.Lock()
	defer h.mu.Unlock()
	n := h.failed
	for _, at := range h.started {
		if h.first && !at.IsZero() && now.Sub(at) > answerLimit {
			n++
		}
	}
	return n
}
