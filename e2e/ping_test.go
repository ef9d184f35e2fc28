//go:build e2e

package e2e

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"testing"
	"time"
)

const (
	echoPort     = "7"                   // RFC 862
	pingInterval = 20 * time.Millisecond // 50 a second
	pingGrace    = 3 * time.Second       // an answer that takes longer is lost
)

// answer sends every packet back to where it came from, until its socket closes.
func answer(c net.PacketConn) {
	packet := make([]byte, 64)
	for {
		n, from, err := c.ReadFrom(packet)
		if err != nil {
			return
		}
		_, _ = c.WriteTo(packet[:n], from) // what cannot be sent is lost, and counted by the sender
	}
}

// pings is a stream of numbered packets from one host to another, inside the tunnel.
type pings struct {
	conn     net.Conn
	interval time.Duration
	quit     chan struct{}
	writers  sync.WaitGroup
	readers  sync.WaitGroup

	mu       sync.Mutex
	sent     []time.Time
	answered []bool
	missing  int
	all      chan struct{} // closed when nothing is missing any more; nil before the end
}

// ping starts a stream of pings to a peer. It ends with stop, or the test.
func (h *host) ping(p *host) *pings {
	h.lab.t.Helper()
	return h.pingEvery(p, pingInterval)
}

func (h *host) pingEvery(p *host, interval time.Duration) *pings {
	h.lab.t.Helper()
	c, err := h.dial("udp", net.JoinHostPort(p.inner.String(), echoPort))
	if err != nil {
		h.lab.t.Fatal(err)
	}
	s := &pings{conn: c, interval: interval, quit: make(chan struct{})}
	s.writers.Go(s.send)
	s.readers.Go(s.receive)
	h.lab.t.Cleanup(func() { s.conn.Close() })
	return s
}

func (s *pings) send() {
	tick := time.NewTicker(s.interval)
	defer tick.Stop()
	for n := uint64(0); ; n++ {
		s.mu.Lock()
		s.sent = append(s.sent, time.Now())
		s.answered = append(s.answered, false)
		s.missing++
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
		if err != nil {
			if errors.Is(err, net.ErrClosed) {
				return
			}
			continue // an ICMP error is of one ping
		}
		if n == 8 {
			s.mark(binary.BigEndian.Uint64(packet))
		}
	}
}

func (s *pings) mark(n uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if n >= uint64(len(s.answered)) || s.answered[n] {
		return
	}
	s.answered[n] = true
	if s.missing--; s.missing == 0 && s.all != nil {
		close(s.all)
		s.all = nil
	}
}

// record is what became of a stream: which seconds of it lost how many pings.
type record struct {
	sent, lost int
	seconds    []second
}

type second struct{ sent, lost int }

// stop ends the stream, gives the last answers time to arrive, and returns
// the record.
func (s *pings) stop() record {
	close(s.quit)
	s.writers.Wait()
	all := make(chan struct{})
	s.mu.Lock()
	if s.missing == 0 {
		close(all)
	} else {
		s.all = all
	}
	s.mu.Unlock()
	select {
	case <-all:
	case <-time.After(pingGrace):
	}
	s.conn.Close()
	s.readers.Wait()
	return s.record()
}

// record sums up; call it when nothing is under way any more.
func (s *pings) record() record {
	s.mu.Lock()
	defer s.mu.Unlock()
	var r record
	for n, at := range s.sent {
		i := int(at.Sub(s.sent[0]) / time.Second)
		for len(r.seconds) <= i {
			r.seconds = append(r.seconds, second{})
		}
		r.sent++
		r.seconds[i].sent++
		if !s.answered[n] {
			r.lost++
			r.seconds[i].lost++
		}
	}
	return r
}

// lastLost returns when the last ping was sent that had no answer; the zero
// time if there is none. Call it when nothing is under way any more.
func (s *pings) lastLost() time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	for n := len(s.sent) - 1; n >= 0; n-- {
		if !s.answered[n] {
			return s.sent[n]
		}
	}
	return time.Time{}
}

// String shows the total and every second that lost something.
func (r record) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%d of %d pings lost", r.lost, r.sent)
	for i, s := range r.seconds {
		if s.lost > 0 {
			fmt.Fprintf(&b, ", in second %d %d of %d", i, s.lost, s.sent)
		}
	}
	return b.String()
}

// mustBeComplete fails the test if a ping was lost, or if fewer were sent
// than half of what the time allowed: then the machine was too busy to tell.
func (r record) mustBeComplete(t *testing.T) {
	t.Helper()
	if r.lost > 0 || r.sent == 0 {
		t.Error(r)
	}
	if want := (len(r.seconds) - 1) * int(time.Second/pingInterval) / 2; r.sent < want {
		t.Errorf("only %d pings in %d s", r.sent, len(r.seconds))
	}
}
