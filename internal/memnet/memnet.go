// Package memnet is a network in memory, for tests in virtual time: TLS and
// HTTP run over it inside a testing/synctest bubble, which net.Pipe alone can
// hang, because a write there waits for the reader while locks are held.
package memnet

import (
	"context"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"slices"
	"sync"
	"time"
)

// limit bounds what one direction of a connection holds, in bytes. Beyond it
// a write fails, for nothing in a test should come near.
const limit = 4 << 20

// Network connects listeners and dialers by address. The zero value is ready.
type Network struct {
	mu        sync.Mutex
	listeners map[string]*listener
	cut       bool
	streams   map[*stream]bool // of connections that stand
}

// Listen returns a listener at an address, any text.
func (n *Network) Listen(address string) (net.Listener, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.listeners[address] != nil {
		return nil, fmt.Errorf("listen %s: address in use", address)
	}
	if n.listeners == nil {
		n.listeners = map[string]*listener{}
	}
	l := &listener{network: n, address: address, waiting: make(chan net.Conn), closed: make(chan struct{})}
	n.listeners[address] = l
	return l, nil
}

// Dial connects to a listener.
func (n *Network) Dial(ctx context.Context, _, address string) (net.Conn, error) {
	n.mu.Lock()
	l, cut := n.listeners[address], n.cut
	n.mu.Unlock()
	if l == nil || cut {
		return nil, fmt.Errorf("dial %s: unreachable", address)
	}
	a, b := newStream(), newStream()
	n.stand(a, b)
	near := &conn{network: n, in: a, out: b, local: "dialer", remote: address}
	far := &conn{network: n, in: b, out: a, local: address, remote: "dialer"}
	select {
	case l.waiting <- far:
		return near, nil
	case <-l.closed:
		n.gone(a, b)
		return nil, fmt.Errorf("dial %s: refused", address)
	case <-ctx.Done():
		n.gone(a, b)
		return nil, ctx.Err()
	}
}

func (n *Network) stand(streams ...*stream) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.streams == nil {
		n.streams = map[*stream]bool{}
	}
	for _, s := range streams {
		n.streams[s] = true
	}
}

func (n *Network) gone(streams ...*stream) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, s := range streams {
		delete(n.streams, s)
	}
}

// Stall holds up the connections that stand, and no others: until resume is
// called nothing arrives, the end of a connection neither, and nobody is told.
func (n *Network) Stall() (resume func()) {
	n.mu.Lock()
	defer n.mu.Unlock()
	stalled := slices.Collect(maps.Keys(n.streams))
	set := func(to bool) {
		for _, s := range stalled {
			s.change(func() { s.stalled = to })
		}
	}
	set(true)
	return func() { set(false) }
}

// Cut partitions the network, or heals it: nothing that is written arrives,
// and nobody is told.
func (n *Network) Cut(cut bool) {
	n.mu.Lock()
	n.cut = cut
	n.mu.Unlock()
}

func (n *Network) isCut() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.cut
}

type listener struct {
	network *Network
	address string
	waiting chan net.Conn
	once    sync.Once
	closed  chan struct{}
}

func (l *listener) Accept() (net.Conn, error) {
	select {
	case c := <-l.waiting:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *listener) Close() error {
	l.once.Do(func() {
		close(l.closed)
		l.network.mu.Lock()
		delete(l.network.listeners, l.address)
		l.network.mu.Unlock()
	})
	return nil
}

func (l *listener) Addr() net.Addr { return addr(l.address) }

type addr string

func (a addr) Network() string { return "memory" }
func (a addr) String() string  { return string(a) }

// stream is one direction of a connection.
type stream struct {
	mu       sync.Mutex
	buffer   []byte
	closed   bool // by the writer
	ended    bool // by the reader
	stalled  bool
	changed  chan struct{} // closed and replaced at each change
	deadline time.Time
}

func newStream() *stream { return &stream{changed: make(chan struct{})} }

func (s *stream) change(f func()) {
	s.mu.Lock()
	f()
	close(s.changed)
	s.changed = make(chan struct{})
	s.mu.Unlock()
}

func (s *stream) read(b []byte) (int, error) {
	for {
		s.mu.Lock()
		switch {
		case s.ended:
			s.mu.Unlock()
			return 0, io.EOF
		case s.stalled: // wait
		case len(s.buffer) > 0:
			n := copy(b, s.buffer)
			s.buffer = s.buffer[n:]
			s.mu.Unlock()
			return n, nil
		case s.closed:
			s.mu.Unlock()
			return 0, io.EOF
		}
		changed, deadline := s.changed, s.deadline
		s.mu.Unlock()
		var expired <-chan time.Time
		if !deadline.IsZero() {
			left := time.Until(deadline)
			if left <= 0 {
				return 0, os.ErrDeadlineExceeded
			}
			expired = time.After(left)
		}
		select {
		case <-changed:
		case <-expired:
			return 0, os.ErrDeadlineExceeded
		}
	}
}

type conn struct {
	network       *Network
	in, out       *stream
	local, remote string
	once          sync.Once
}

func (c *conn) Read(b []byte) (int, error) { return c.in.read(b) }

func (c *conn) Write(b []byte) (n int, err error) {
	if c.network.isCut() {
		return len(b), nil
	}
	c.out.change(func() {
		switch {
		case c.out.closed, c.out.ended && !c.out.stalled:
			err = io.ErrClosedPipe
		case len(c.out.buffer)+len(b) > limit:
			err = fmt.Errorf("%d bytes are unread", len(c.out.buffer))
		default:
			c.out.buffer = append(c.out.buffer, b...)
			n = len(b)
		}
	})
	return n, err
}

// Close ends the connection. The other end reads what was written before,
// unless the network is cut: then it is never told.
func (c *conn) Close() error {
	c.once.Do(func() {
		cut := c.network.isCut()
		c.network.gone(c.in)
		c.in.change(func() { c.in.ended, c.in.buffer = true, nil })
		if !cut {
			c.out.change(func() { c.out.closed = true })
		}
	})
	return nil
}

func (c *conn) LocalAddr() net.Addr  { return addr(c.local) }
func (c *conn) RemoteAddr() net.Addr { return addr(c.remote) }

func (c *conn) SetDeadline(t time.Time) error { return c.SetReadDeadline(t) }

func (c *conn) SetReadDeadline(t time.Time) error {
	c.in.change(func() { c.in.deadline = t })
	return nil
}

// SetWriteDeadline does nothing: a write never waits.
func (c *conn) SetWriteDeadline(time.Time) error { return nil }
