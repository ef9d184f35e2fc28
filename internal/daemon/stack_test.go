package daemon_test

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"sync"
	"time"
)

// stack is the TCP of one host, as much of it as a link needs: segments that
// get lost are sent again after ever longer pauses, those that come twice or
// out of order are put right, and one that nobody waits for is answered with a
// reset. So a link suffers from a bad network, or a bad tunnel, as it would in
// the field.
type stack struct {
	send func(segment []byte) // towards the other host; it may get lost

	mu       sync.Mutex
	listener *stackListener
	conns    map[uint64]*stream
	wrote    func() bool // asked before each write: false, the process is dead
	off      int         // below zero the host is switched off
}

// A segment is the id of its connection (8 bytes), flags, the place of its
// data in the stream (4), the place up to which all has been received (4), data.
const (
	segmentHeader = 17
	segmentSize   = 1200
	windowSize    = 40 * segmentSize
	firstRetry    = 200 * time.Millisecond
	lastRetry     = time.Minute
	closingTries  = 6
)

const (
	flagSyn = 1 << iota
	flagFin
	flagReset
)

func newStack(send func([]byte)) *stack {
	return &stack{send: send, conns: map[uint64]*stream{}}
}

// stream is one connection.
type stream struct {
	stack  *stack
	id     uint64
	dialed bool

	opened   bool
	in       []byte
	next     uint32            // place of what is to come
	early    map[uint32][]byte // what came before its turn; nil data is the end
	ended    bool              // the other end has sent all
	out      []byte            // from base on, not acknowledged
	base     uint32
	sent     int // bytes of out that were sent
	closing  bool
	finSent  bool
	err      error
	changed  chan struct{} // closed and replaced at each change
	retry    time.Duration
	tries    int
	timer    *time.Timer
	deadline time.Time
}

func (s *stack) stream(id uint64, dialed bool) *stream {
	c := &stream{stack: s, id: id, dialed: dialed, early: map[uint32][]byte{}, changed: make(chan struct{}), retry: firstRetry}
	if dialed {
		c.retry = time.Second
	}
	s.conns[id] = c
	return c
}

// begin is a new process's; wrote says before each write whether it still lives.
func (s *stack) begin(wrote func() bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.wrote = wrote
}

// power switches the host off, and on when it was called as often with 1.
func (s *stack) power(by int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.off += by
}

// listen is for one listener at a time.
func (s *stack) listen() net.Listener {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.listener = &stackListener{stack: s, waiting: make(chan net.Conn, 16), closed: make(chan struct{})}
	return s.listener
}

func (s *stack) dial(ctx context.Context) (net.Conn, error) {
	s.mu.Lock()
	c := s.stream(rand.Uint64(), true)
	c.transmit()
	for !c.opened && c.err == nil {
		changed := c.changed
		s.mu.Unlock()
		select {
		case <-changed:
		case <-ctx.Done():
			s.mu.Lock()
			c.fail(ctx.Err())
			s.mu.Unlock()
			return nil, ctx.Err()
		}
		s.mu.Lock()
	}
	defer s.mu.Unlock()
	if c.err != nil {
		return nil, c.err
	}
	return c, nil
}

// end is what becomes of a process's connections: the kernel tells the other
// host of it, once. At a loss of power nobody is told.
func (s *stack) end(silently bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, c := range s.conns {
		if !silently {
			s.send(c.segment(flagReset, c.base, nil))
		}
		c.fail(net.ErrClosed)
	}
	if l := s.listener; l != nil {
		l.shut()
	}
}

var errReset = errors.New("connection reset")

// receive takes a segment from the other host.
func (s *stack) receive(b []byte) {
	if len(b) < segmentHeader {
		return
	}
	id, flags := binary.BigEndian.Uint64(b), b[8]
	place, taken := binary.BigEndian.Uint32(b[9:]), binary.BigEndian.Uint32(b[13:])
	data := b[segmentHeader:]
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.off < 0 {
		return
	}
	c := s.conns[id]
	if c == nil && flags&flagSyn != 0 && flags&flagReset == 0 && s.listener != nil {
		c = s.stream(id, false)
		c.opened = true
		s.listener.waiting <- c
	}
	switch {
	case c == nil && flags&flagReset == 0:
		c = &stream{stack: s, id: id, next: place}
		s.send(c.segment(flagReset, taken, nil))
		return
	case c == nil:
		return
	case flags&flagReset != 0:
		c.fail(errReset)
		return
	}
	if !c.opened {
		c.opened, c.retry = true, firstRetry
	}
	c.acknowledged(taken)
	if flags&flagFin != 0 {
		data = nil
	}
	if flags&(flagSyn|flagFin) != 0 || len(data) > 0 {
		if place >= c.next && (flags&flagFin != 0 || len(data) > 0) {
			c.early[place] = data
		}
		for {
			data, ok := c.early[c.next]
			if !ok {
				break
			}
			delete(c.early, c.next)
			if data == nil {
				c.ended = true
				c.next++
				break
			}
			c.in = append(c.in, data...)
			c.next += uint32(len(data))
		}
		s.send(c.segment(0, c.base, nil))
	}
	c.transmit()
	c.change()
}

func (c *stream) segment(flags byte, place uint32, data []byte) []byte {
	b := make([]byte, 0, segmentHeader+len(data))
	b = binary.BigEndian.AppendUint64(b, c.id)
	b = append(b, flags)
	b = binary.BigEndian.AppendUint32(b, place)
	b = binary.BigEndian.AppendUint32(b, c.next)
	return append(b, data...)
}

func (c *stream) change() {
	close(c.changed)
	c.changed = make(chan struct{})
}

func (c *stream) fail(err error) {
	if c.err == nil {
		c.err = err
	}
	if c.timer != nil {
		c.timer.Stop()
	}
	delete(c.stack.conns, c.id)
	c.change()
}

func (c *stream) acknowledged(taken uint32) {
	n := int(taken - c.base)
	if n <= 0 || n > len(c.out)+1 {
		return
	}
	if n > len(c.out) {
		c.fail(net.ErrClosed) // the other end has the end of the stream as well
		return
	}
	c.out, c.base, c.sent = c.out[n:], taken, max(0, c.sent-n)
	c.retry, c.tries = firstRetry, 0
	if c.timer != nil {
		c.timer.Reset(c.retry)
	}
}

// transmit sends what has not been sent, and sees to it that it is sent again.
func (c *stream) transmit() {
	if c.err != nil {
		return
	}
	if !c.opened {
		c.stack.send(c.segment(flagSyn, 0, nil))
	} else {
		for c.sent < min(len(c.out), windowSize) {
			n := min(segmentSize, len(c.out)-c.sent)
			c.stack.send(c.segment(0, c.base+uint32(c.sent), c.out[c.sent:c.sent+n]))
			c.sent += n
		}
		if c.closing && c.sent == len(c.out) && !c.finSent {
			c.finSent = true
			c.stack.send(c.segment(flagFin, c.base+uint32(c.sent), nil))
		}
	}
	if c.timer == nil && (!c.opened || c.sent > 0 || c.finSent) {
		c.timer = time.AfterFunc(c.retry, c.again)
	}
}

func (c *stream) again() {
	c.stack.mu.Lock()
	defer c.stack.mu.Unlock()
	c.timer = nil
	if c.err != nil || c.opened && c.sent == 0 && !c.finSent {
		return
	}
	if c.tries++; c.closing && c.tries > closingTries {
		c.fail(net.ErrClosed)
		return
	}
	c.retry = min(2*c.retry, lastRetry)
	c.sent, c.finSent = 0, false
	c.transmit()
}

// Read implements net.Conn.
func (c *stream) Read(b []byte) (int, error) {
	c.stack.mu.Lock()
	defer c.stack.mu.Unlock()
	for {
		switch {
		case c.closing:
			return 0, net.ErrClosed
		case len(c.in) > 0:
			n := copy(b, c.in)
			c.in = c.in[n:]
			return n, nil
		case c.err != nil:
			return 0, c.err
		case c.ended:
			return 0, io.EOF
		}
		var expired <-chan time.Time
		if !c.deadline.IsZero() {
			left := time.Until(c.deadline)
			if left <= 0 {
				return 0, os.ErrDeadlineExceeded
			}
			expired = time.After(left)
		}
		changed := c.changed
		c.stack.mu.Unlock()
		select {
		case <-changed:
		case <-expired:
		}
		c.stack.mu.Lock()
	}
}

// Write implements net.Conn. It never waits.
func (c *stream) Write(b []byte) (int, error) {
	c.stack.mu.Lock()
	wrote := c.stack.wrote
	c.stack.mu.Unlock()
	if wrote != nil && !wrote() {
		return 0, net.ErrClosed
	}
	c.stack.mu.Lock()
	defer c.stack.mu.Unlock()
	if c.err != nil || c.closing {
		return 0, net.ErrClosed
	}
	c.out = append(c.out, b...)
	c.transmit()
	return len(b), nil
}

// Close implements net.Conn: what was written still goes out.
func (c *stream) Close() error {
	c.stack.mu.Lock()
	defer c.stack.mu.Unlock()
	if !c.closing && c.err == nil {
		c.closing, c.tries = true, 0
		c.transmit()
	}
	c.change()
	return nil
}

// SetReadDeadline implements net.Conn.
func (c *stream) SetReadDeadline(t time.Time) error {
	c.stack.mu.Lock()
	defer c.stack.mu.Unlock()
	c.deadline = t
	c.change()
	return nil
}

// SetDeadline implements net.Conn.
func (c *stream) SetDeadline(t time.Time) error { return c.SetReadDeadline(t) }

// SetWriteDeadline implements net.Conn: a write never waits.
func (c *stream) SetWriteDeadline(time.Time) error { return nil }

// LocalAddr implements net.Conn.
func (c *stream) LocalAddr() net.Addr { return stackAddr{} }

// RemoteAddr implements net.Conn.
func (c *stream) RemoteAddr() net.Addr { return stackAddr{} }

type stackAddr struct{}

func (stackAddr) Network() string { return "tcp" }
func (stackAddr) String() string  { return "the other host" }

type stackListener struct {
	stack   *stack
	waiting chan net.Conn
	once    sync.Once
	closed  chan struct{}
}

func (l *stackListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.waiting:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

// shut is Close under the lock.
func (l *stackListener) shut() {
	l.once.Do(func() { close(l.closed) })
	if l.stack.listener == l {
		l.stack.listener = nil
	}
}

func (l *stackListener) Close() error {
	l.stack.mu.Lock()
	defer l.stack.mu.Unlock()
	l.shut()
	return nil
}

func (l *stackListener) Addr() net.Addr { return stackAddr{} }
