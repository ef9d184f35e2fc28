//go:build vm

package guest

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"
)

const (
	echoPort     = "7" // RFC 862
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

// pings is a stream of numbered packets from one host to another, inside the
// tunnel.
type pings struct {
	conn     net.Conn
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
}

// lost reports whether the ping had no answer in time.
func (p ping) lost() bool { return p.answered.IsZero() || p.answered.Sub(p.at) > p.grace }

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
	s := &pings{grace: h.lab.grace, quit: make(chan struct{})}
	h.must(h.in(func() (err error) {
		// Bound, for the interface can be gone when the address is looked for.
		from := &net.UDPAddr{IP: h.inner.AsSlice()}
		s.conn, err = (&net.Dialer{LocalAddr: from}).Dial("udp", net.JoinHostPort(p.inner.String(), echoPort))
		return err
	}))
	s.routines.Go(s.send)
	s.routines.Go(s.receive)
	h.lab.t.Cleanup(func() { s.end() })
	return s
}

func (s *pings) send() {
	tick := time.NewTicker(pingInterval)
	defer tick.Stop()
	for n := uint64(0); ; n++ {
		s.mu.Lock()
		s.sent = append(s.sent, ping{at: time.Now(), grace: s.grace})
		s.mu.Unlock()
		// An error, too, means that this ping is not answered.
		_, _ = s.conn.Write(binary.BigEndian.AppendUint64(nil, n))
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
		n, err := s.conn.Read(packet)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil || n != 8 {
			continue // an ICMP error is of one ping
		}
		s.mu.Lock()
		if i := binary.BigEndian.Uint64(packet); i < uint64(len(s.sent)) && s.sent[i].answered.IsZero() {
			s.sent[i].answered = time.Now()
		}
		s.mu.Unlock()
	}
}

func (s *pings) end() {
	select {
	case <-s.quit:
	default:
		close(s.quit)
	}
	_ = s.conn.Close()
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
