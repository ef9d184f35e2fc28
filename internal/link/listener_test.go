package link

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"runtime"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// network is a listener over net.Pipe whose clients choose their addresses. A
// non-nil error sent to failing is what the next Accept returns.
type network struct {
	conns   chan net.Conn
	failing chan error
	closed  chan struct{}
}

func newNetwork() *network {
	return &network{make(chan net.Conn), make(chan error), make(chan struct{})}
}

func (n *network) Accept() (net.Conn, error) {
	select {
	case c := <-n.conns:
		return c, nil
	case err := <-n.failing:
		return nil, err
	case <-n.closed:
		return nil, net.ErrClosed
	}
}

func (n *network) Close() error   { close(n.closed); return nil }
func (n *network) Addr() net.Addr { return &net.TCPAddr{} }

type pipeFrom struct {
	net.Conn
	from net.Addr
}

func (p pipeFrom) RemoteAddr() net.Addr { return p.from }

// connect opens a connection from an address without sending anything.
func (n *network) connect(from string) net.Conn {
	here, there := net.Pipe()
	n.conns <- pipeFrom{there, &net.TCPAddr{IP: net.ParseIP(from), Port: 1024}}
	return here
}

// bubble is a listener in a synctest bubble that echoes, with what it rejects.
type bubble struct {
	*Listener
	network  *network
	peer     *Identity
	rejected chan error
}

func newBubble(t *testing.T) *bubble {
	t.Helper()
	b := &bubble{network: newNetwork(), peer: testIdentity(t, 2), rejected: make(chan error, 1000)}
	b.Listener = NewListener(b.network, testIdentity(t, 1), knows(b.peer),
		WithRejected(func(_ net.Addr, err error) { b.rejected <- err }))
	return b
}

func (b *bubble) echo() {
	for {
		c, err := b.Accept(context.Background())
		if err != nil {
			return
		}
		go echo(c)
	}
}

// dial returns a link from an address, or why there is none.
func (b *bubble) dial(t *testing.T, from string) (*Conn, error) {
	t.Helper()
	return Client(t.Context(), b.network.connect(from), b.peer, Pins{b.self.fingerprint})
}

func (b *bubble) mustDial(t *testing.T, from string) *Conn {
	t.Helper()
	c, err := b.dial(t, from)
	if err != nil {
		t.Fatalf("dial from %s: %v", from, err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

// drain returns how many were rejected so far with each error.
func (b *bubble) drain() map[error]int {
	synctest.Wait()
	counts := make(map[error]int)
	for {
		select {
		case err := <-b.rejected:
			counts[err]++
		default:
			return counts
		}
	}
}

func TestIdleConnections(t *testing.T) {
	for name, start := range map[string]func(*bubble) net.Conn{
		"after connecting": func(b *bubble) net.Conn { return b.network.connect("192.0.2.1") },
		"after TLS": func(b *bubble) net.Conn {
			c := tls.Client(b.network.connect("192.0.2.1"), b.peer.client)
			if err := c.Handshake(); err != nil {
				t.Fatal(err)
			}
			return c
		},
		"within its proof": func(b *bubble) net.Conn {
			c := tls.Client(b.network.connect("192.0.2.1"), b.peer.client)
			if _, err := c.Write([]byte{0x14, 0x8d, 1, 2, 3}); err != nil {
				t.Fatal(err)
			}
			return c
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := newBubble(t)
				defer func() { _ = b.Close() }()
				go b.echo()
				peer := b.mustDial(t, "192.0.2.2")
				began := time.Now()
				idle := start(b)
				exchange(t, peer)
				if _, err := idle.Read(make([]byte, 1)); err != io.EOF {
					t.Errorf("the idle client sees %v", err)
				}
				if took := time.Since(began); took != HandshakeTimeout {
					t.Errorf("dropped after %v", took)
				}
				wantIs(t, <-b.rejected, ErrHandshakeTimeout)
				exchange(t, peer)
				exchange(t, b.mustDial(t, "192.0.2.1"))
			})
		})
	}
}

func TestCrowdFromOneHost(t *testing.T) {
	for name, crowd := range map[string]struct{ from, neighbour, other string }{
		"IPv4":        {"192.0.2.1", "192.0.2.1", "192.0.2.2"},
		"IPv4 mapped": {"192.0.2.1", "::ffff:192.0.2.1", "192.0.2.2"},
		"IPv6":        {"2001:db8::1", "2001:db8::2", "2001:db8:0:1::1"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := newBubble(t)
				defer func() { _ = b.Close() }()
				go b.echo()
				peer := b.mustDial(t, crowd.from) // authenticated, so it does not count
				synctest.Wait()                   // for it to leave its place
				for range maxPendingPerHost {
					b.network.connect(crowd.from)
				}
				if got := b.drain(); len(got) != 0 {
					t.Fatalf("rejected too early: %v", got)
				}
				if _, err := b.dial(t, crowd.neighbour); err == nil {
					t.Error("one more than the limit got in")
				}
				if got := b.drain(); len(got) != 1 || got[ErrCrowded] != 1 {
					t.Errorf("rejected: %v", got)
				}
				exchange(t, b.mustDial(t, crowd.other))
				exchange(t, peer)

				time.Sleep(settle) // now the oldest has to go
				exchange(t, b.mustDial(t, crowd.neighbour))
				if got := b.drain(); len(got) != 1 || got[ErrCrowded] != 1 {
					t.Errorf("displaced: %v", got)
				}
				time.Sleep(HandshakeTimeout - settle)
				if got := b.drain(); len(got) != 1 || got[ErrHandshakeTimeout] != maxPendingPerHost-1 {
					t.Errorf("dropped in the end: %v", got)
				}
				exchange(t, peer)
			})
		})
	}
}

func TestCrowdFromManyHosts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBubble(t)
		defer func() { _ = b.Close() }()
		go b.echo()
		peer := b.mustDial(t, "192.0.2.1")
		synctest.Wait() // for it to leave its place
		first := b.network.connect("198.51.100.0")
		for i := 1; i < maxPending; i++ {
			b.network.connect(net.IPv4(198, 51, 100, byte(i)).String())
		}
		if _, err := b.dial(t, "192.0.2.2"); err == nil {
			t.Error("one more than the limit got in")
		}
		if got := b.drain(); len(got) != 1 || got[ErrCrowded] != 1 {
			t.Errorf("rejected: %v", got)
		}
		exchange(t, peer)

		time.Sleep(settle)
		exchange(t, b.mustDial(t, "192.0.2.2"))
		if got := b.drain(); len(got) != 1 || got[ErrCrowded] != 1 {
			t.Errorf("displaced: %v", got)
		}
		if _, err := first.Read(make([]byte, 1)); err != io.EOF {
			t.Errorf("it was not the oldest that had to go: %v", err)
		}
		exchange(t, peer)
	})
}

// Where nobody accepts, links wait no longer than a handshake may take, and
// within the same bound.
func TestNobodyAccepts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBubble(t)
		defer func() { _ = b.Close() }()
		began := time.Now()
		c := b.mustDial(t, "192.0.2.1")
		_, err := c.Receive()
		wantIs(t, err, io.EOF)
		if took := time.Since(began); took != HandshakeTimeout {
			t.Errorf("closed after %v", took)
		}
		wantIs(t, <-b.rejected, ErrHandshakeTimeout)
	})
}

func TestAcceptEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBubble(t)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		_, err := b.Accept(ctx)
		wantIs(t, err, context.DeadlineExceeded)
		time.AfterFunc(time.Second, func() { _ = b.Close() })
		_, err = b.Accept(t.Context())
		wantIs(t, err, net.ErrClosed)
	})
}

// Accept errors other than the listener's end pass, with growing pauses.
func TestAcceptErrors(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBubble(t)
		defer func() { _ = b.Close() }()
		go b.echo()
		peer := b.mustDial(t, "192.0.2.1")
		tooMany := errors.New("too many open files")
		began := time.Now()
		for range 10 {
			b.network.failing <- tooMany
		}
		exchange(t, b.mustDial(t, "192.0.2.1"))
		// 5, 10, 20 ... 640 ms, then one second twice.
		if took := time.Since(began); took != 3275*time.Millisecond {
			t.Errorf("back after %v", took)
		}
		if got := b.drain(); got[tooMany] != 10 {
			t.Errorf("rejected: %v", got)
		}
		exchange(t, peer)
	})
}

func TestListenerClosedUnderneath(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBubble(t)
		b.network.failing <- net.ErrClosed
		_, err := b.Accept(t.Context())
		wantIs(t, err, net.ErrClosed)
		if err := b.Close(); err != nil {
			t.Error(err)
		}
	})
}

// Close ends the handshakes under way and its goroutines, says nothing of
// them, and leaves accepted links alone.
func TestCloseDuringHandshake(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBubble(t)
		peer := make(chan *Conn)
		go func() { peer <- b.mustDial(t, "192.0.2.1") }()
		srv, err := b.Accept(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		client := <-peer
		go echo(srv)
		idle := b.network.connect("192.0.2.1")
		halfway := tls.Client(b.network.connect("192.0.2.1"), b.peer.client)
		if err := halfway.Handshake(); err != nil {
			t.Fatal(err)
		}
		waiting := b.mustDial(t, "192.0.2.1") // nobody will accept it
		began := time.Now()
		if err := b.Close(); err != nil {
			t.Error(err)
		}
		if took := time.Since(began); took != 0 {
			t.Errorf("Close took %v", took)
		}
		b.mu.Lock()
		if len(b.pending) != 0 {
			t.Error("Close did not wait for the handshakes")
		}
		b.mu.Unlock()
		for _, c := range []net.Conn{idle, halfway} {
			if _, err := c.Read(make([]byte, 1)); err != io.EOF {
				t.Errorf("the client sees %v", err)
			}
		}
		if _, err := waiting.Receive(); !errors.Is(err, io.EOF) {
			t.Errorf("the waiting client sees %v", err)
		}
		exchange(t, client)
		if got := b.drain(); len(got) != 0 {
			t.Errorf("rejected: %v", got)
		}
	})
}

// Pins can change while the listener runs.
func TestKnownIsAskedEachTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var pinned atomic.Pointer[Identity]
		self, before, after := testIdentity(t, 1), testIdentity(t, 2), testIdentity(t, 3)
		n := newNetwork()
		l := NewListener(n, self, func(f Fingerprint) bool { return f == pinned.Load().fingerprint })
		b := &bubble{Listener: l, network: n}
		defer func() { _ = b.Close() }()
		go b.echo()
		for _, now := range []*Identity{before, after} {
			pinned.Store(now)
			for _, b.peer = range []*Identity{before, after} {
				c, err := b.dial(t, "192.0.2.1")
				if b.peer != now {
					wantIs(t, err, ErrRefused)
					continue
				}
				if err != nil {
					t.Fatal(err)
				}
				exchange(t, c)
				_ = c.Close()
			}
		}
	})
}

func TestHostOf(t *testing.T) {
	for _, tt := range []struct {
		addr net.Addr
		want string
	}{
		{&net.TCPAddr{IP: net.ParseIP("192.0.2.1"), Port: 1}, "192.0.2.1/32"},
		{&net.TCPAddr{IP: net.ParseIP("2001:db8:1:2:3::4"), Port: 1}, "2001:db8:1:2::/64"},
		{&net.TCPAddr{IP: net.ParseIP("fe80::1"), Zone: "eth0"}, "fe80::/64"},
		{&net.TCPAddr{}, "invalid Prefix"},
		{&net.UnixAddr{Name: "/x"}, "invalid Prefix"},
		{nil, "invalid Prefix"},
	} {
		if got := hostOf(tt.addr).String(); got != tt.want {
			t.Errorf("%v: got %v, want %v", tt.addr, got, tt.want)
		}
	}
}

// BenchmarkIdleConn measures what one end of an idle link costs in memory,
// with TLS and the goroutine that waits in Receive, without the kernel.
func BenchmarkIdleConn(b *testing.B) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	self, peer := testIdentity(b, 1), testIdentity(b, 2)
	l := NewListener(ln, self, knows(peer))
	defer func() { _ = l.Close() }()
	var conns []*Conn
	before := inUse()
	for b.Loop() {
		client, err := Dial(b.Context(), l.Addr().String(), peer, Pins{self.fingerprint})
		if err != nil {
			b.Fatal(err)
		}
		srv, err := l.Accept(b.Context())
		if err != nil {
			b.Fatal(err)
		}
		for _, c := range []*Conn{client, srv} {
			go echo(c)
			conns = append(conns, c)
		}
		_ = client.Send(make([]byte, 200)) // a heartbeat that goes round for ever
	}
	b.ReportMetric(float64(inUse()-before)/float64(len(conns)), "B/conn")
	for _, c := range conns {
		_ = c.Close()
	}
}

func inUse() uint64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc + m.StackInuse
}
