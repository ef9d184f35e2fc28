//go:build vm

package guest

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"time"
)

const (
	echoPort     = 7    // RFC 862
	besidePort   = 8007 // the same, answered beside the tunnel
	controlPort  = 8008 // the same, asked beside it as well
	pingInterval = 400 * time.Millisecond
	// WireGuard keeps packets while it has no session. A ping that had to
	// wait for longer than this counts as lost.
	pingGrace = time.Second
)

// answer sends every packet back to where it came from, until its socket closes.
func answer(c net.PacketConn) {
	packet := make([]byte, 64)
	for {
		n, from, err := c.ReadFrom(packet)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err == nil {
			_, _ = c.WriteTo(packet[:n], from) // what cannot be sent is lost, and counted by the sender
		}
	}
}

// answerBeside sends every packet back over the cable beside the tunnel, so
// that WireGuard has traffic one way only.
func answerBeside(c net.PacketConn, p *host) {
	packet := make([]byte, 64)
	to := net.UDPAddrFromAddrPort(netip.AddrPortFrom(p.beside, besidePort))
	for {
		n, _, err := c.ReadFrom(packet)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err == nil {
			_, _ = c.WriteTo(packet[:n], to)
		}
	}
}

// pings is a stream of numbered packets from one host to another, inside the
// tunnel.
type pings struct {
	lab      *lab
	conn     net.Conn
	answers  net.Conn // conn, or where those arrive that come beside the tunnel
	control  net.Conn // sends the same packets beside the tunnel; nil: nothing does
	grace    time.Duration
	quit     chan struct{}
	routines sync.WaitGroup

	mu   sync.Mutex
	sent []ping
}

type ping struct {
	at       time.Time
	answered time.Time
	grace    time.Duration

	controlled bool      // it was sent beside the tunnel as well
	control    time.Time // when that was answered
}

// lost reports whether the ping had no answer in time.
func (p ping) lost() bool { return p.late(p.answered) && !p.doubtful() }

// doubtful reports whether neither it nor the one beside the tunnel had an
// answer in time. That tells nothing of the tunnel.
func (p ping) doubtful() bool { return p.controlled && p.late(p.answered) && p.late(p.control) }

func (p ping) late(answered time.Time) bool { return answered.IsZero() || answered.Sub(p.at) > p.grace }

// until returns when a ping that was lost shows the tunnel to be dead no more.
func (p ping) until() time.Time {
	if p.answered.IsZero() {
		return p.at.Add(pingInterval)
	}
	return p.answered
}

// ping starts a stream of pings to a peer. It ends with stop, or the test.
func (h *host) ping(p *host) *pings {
	h.lab.t.Helper()
	c := h.dial(h.inner, netip.AddrPortFrom(p.inner, echoPort))
	return h.newPings(c, c).start()
}

// pingOneWay is ping to a peer that answers beside the tunnel, and for each ping
// there is another that goes beside it both ways: in real time, a busy machine
// is not to be taken for a tunnel that does not work.
func (h *host) pingOneWay(p *host) *pings {
	h.lab.t.Helper()
	var answers net.Conn
	h.must(h.in(func() (err error) {
		answers, err = net.ListenUDP("udp4", net.UDPAddrFromAddrPort(netip.AddrPortFrom(h.beside, besidePort)))
		return err
	}))
	s := h.newPings(h.dial(h.inner, netip.AddrPortFrom(p.inner, besidePort)), answers)
	s.control = h.dial(h.beside, netip.AddrPortFrom(p.beside, controlPort))
	return s.start()
}

// listenBeside lets a host answer what pingOneWay sends to it.
func (h *host) listenBeside(p *host) {
	h.lab.t.Helper()
	for _, at := range []netip.AddrPort{netip.AddrPortFrom(h.inner, besidePort), netip.AddrPortFrom(h.beside, controlPort)} {
		var c net.PacketConn
		h.must(h.in(func() (err error) {
			c, err = net.ListenUDP("udp4", net.UDPAddrFromAddrPort(at))
			return err
		}))
		go answerBeside(c, p)
	}
}

// dial returns a socket for packets from an address of the host.
func (h *host) dial(from netip.Addr, to netip.AddrPort) (c net.Conn) {
	h.lab.t.Helper()
	h.must(h.in(func() (err error) {
		// Bound, for the interface can be gone when the address is looked for.
		c, err = net.DialUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(from, 0)), net.UDPAddrFromAddrPort(to))
		return err
	}))
	return c
}

func (h *host) newPings(conn, answers net.Conn) *pings {
	return &pings{lab: h.lab, conn: conn, answers: answers, grace: h.lab.grace, quit: make(chan struct{})}
}

func (s *pings) start() *pings {
	s.routines.Go(s.send)
	s.routines.Go(s.receive)
	s.lab.t.Cleanup(func() { s.end() })
	return s
}

func (s *pings) send() {
	tick := time.NewTicker(pingInterval)
	defer tick.Stop()
	for n := uint64(0); ; n++ {
		s.mu.Lock()
		s.sent = append(s.sent, ping{at: time.Now(), grace: s.grace, controlled: s.control != nil})
		s.mu.Unlock()
		// An error, too, means that this ping is not answered.
		packet := binary.BigEndian.AppendUint64(nil, n)
		_, _ = s.conn.Write(packet)
		if s.control != nil {
			_, _ = s.control.Write(append(packet, 0))
		}
		select {
		case <-s.quit:
			return
		case <-tick.C:
		}
	}
}

func (s *pings) receive() {
	packet := make([]byte, 64)
	for {
		n, err := s.answers.Read(packet)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil || n != 8 && n != 9 {
			continue // an ICMP error is of one ping
		}
		s.mark(binary.BigEndian.Uint64(packet), n == 9)
	}
}

// mark notes the answer to a ping, or to its control.
func (s *pings) mark(n uint64, control bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if n >= uint64(len(s.sent)) {
		return
	}
	at := &s.sent[n].answered
	if control {
		at = &s.sent[n].control
	}
	if at.IsZero() {
		*at = time.Now()
	}
}

func (s *pings) end() {
	select {
	case <-s.quit:
	default:
		close(s.quit)
	}
	_ = s.conn.Close()
	_ = s.answers.Close() // a second time where it is the same
	if s.control != nil {
		_ = s.control.Close()
	}
	s.routines.Wait()
}

// traffic is a stream each way.
type traffic [2]*pings

// pingBoth starts both streams, one half an interval after the other: without
// a session each would begin a handshake, and of two that cross neither succeeds.
func (l *lab) pingBoth() traffic {
	l.t.Helper()
	there := l.a.ping(l.b)
	time.Sleep(pingInterval / 2)
	return traffic{there, l.b.ping(l.a)}
}

// stop ends the streams when the last pings had time to be answered, and
// returns what became of them.
func (s traffic) stop() records {
	time.Sleep(s[0].grace + pingInterval)
	r := s.so()
	for _, p := range s {
		p.end()
	}
	return r
}

// so returns what became so far of the pings that had time to be answered.
func (s traffic) so() records { return records{s[0].so(), s[1].so()} }

// stop does for one stream what traffic.stop does for two.
func (s *pings) stop() record {
	time.Sleep(s.grace + pingInterval)
	r := s.so()
	s.end()
	return r
}

func (s *pings) so() record {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	r := make(record, 0, len(s.sent))
	for _, p := range s.sent {
		if now.Sub(p.at) > s.grace {
			r = append(r, p)
		}
	}
	return r
}

// record is what became of a stream.
type record []ping

// since returns the part of a record that was sent after a time.
func (r record) since(t time.Time) record {
	for i, p := range r {
		if p.at.After(t) {
			return r[i:]
		}
	}
	return nil
}

func (r record) lost() (n int) {
	for _, p := range r {
		if p.lost() {
			n++
		}
	}
	return n
}

// recovery returns how long after a time pings were lost: from then on, all
// were answered.
func (r record) recovery(from time.Time) (d time.Duration) {
	for _, p := range r {
		if p.lost() {
			d = max(d, p.until().Sub(from))
		}
	}
	return d
}

func (r record) doubtful() (n int) {
	for _, p := range r {
		if p.doubtful() {
			n++
		}
	}
	return n
}

// outages returns the times in which no ping was answered and some were lost,
// but for those that were over before a time.
func (r record) outages(from time.Time) (all []Outage) {
	var lost record // of the present one
	over := func() {
		if n := len(lost); n > 0 && lost[n-1].until().After(from) {
			all = append(all, Outage{
				Begin:  lost[0].at.Sub(from),
				End:    lost[n-1].until().Sub(from),
				Length: time.Duration(n) * pingInterval,
			})
		}
		lost = nil
	}
	for _, p := range r {
		switch {
		case p.lost():
			lost = append(lost, p)
		case !p.doubtful():
			over()
		}
	}
	over()
	return all
}

func (r record) String() string { return fmt.Sprintf("%d of %d pings lost", r.lost(), len(r)) }

// records are those of both directions.
type records [2]record

func (r records) since(t time.Time) records { return records{r[0].since(t), r[1].since(t)} }
func (r records) sent() int                 { return len(r[0]) + len(r[1]) }
func (r records) lost() int                 { return r[0].lost() + r[1].lost() }

func (r records) recovery(from time.Time) time.Duration {
	return max(r[0].recovery(from), r[1].recovery(from))
}

func (r records) String() string { return fmt.Sprintf("%d of %d pings lost", r.lost(), r.sent()) }
