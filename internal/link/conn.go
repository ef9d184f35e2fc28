package link

import (
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"time"
)

// frameHeader is the size of a frame's header: the number of bytes that
// follow, as a big-endian u16.
const frameHeader = 2

// Conn is a link: a connection whose two ends have proved who they are. Send,
// SetSilence and Close may be called from any goroutine, Receive from one at a
// time. The first thing that goes wrong closes it, and every later call
// returns that error; net.ErrClosed stands for Close.
//
// An idle Conn has no goroutine and no buffer of its own: a hub has thousands.
type Conn struct {
	raw  net.Conn
	tls  *tls.Conn
	peer Fingerprint

	mu       sync.Mutex
	cause    error         // why it is closed; nil while it is not
	closing  bool          // Close was called: nothing new goes out
	pending  []byte        // frames that no write has taken yet
	inFlight int           // bytes that the current write has taken
	writer   chan struct{} // closed when the writing goroutine ends; nil when there is none
	silence  time.Duration
	inFrame  bool // Receive has part of a frame
}

// Peer returns the proved identity of the other end.
func (c *Conn) Peer() Fingerprint { return c.peer }

// LocalAddr returns the address of this end.
func (c *Conn) LocalAddr() net.Addr { return c.raw.LocalAddr() }

// RemoteAddr returns the address of the other end.
func (c *Conn) RemoteAddr() net.Addr { return c.raw.RemoteAddr() }

// Send queues one frame, 1 to MaxFrame bytes, which it copies, and never
// blocks. Frames go out in order. Where 256 KiB are queued already, or a write
// makes no progress for ten seconds, the connection is closed and the error is
// ErrSlow: a peer that does not read has to start afresh. A frame of the wrong
// size is ErrFrame and changes nothing.
func (c *Conn) Send(b []byte) error {
	if len(b) == 0 || len(b) > MaxFrame {
		return fmt.Errorf("%w: %d", ErrFrame, len(b))
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.cause != nil:
		return c.cause
	case c.closing:
		return net.ErrClosed
	case c.inFlight+len(c.pending)+frameHeader+len(b) > maxQueued:
		c.failLocked(ErrSlow)
		return ErrSlow
	}
	c.pending = appendFrame(c.pending, b)
	if c.writer == nil {
		c.writer = make(chan struct{})
		go c.write(c.writer)
	}
	return nil
}

// write carries the queue out and ends when it is empty.
func (c *Conn) write(done chan struct{}) {
	defer close(done)
	c.mu.Lock()
	defer c.mu.Unlock()
	for c.cause == nil && len(c.pending) > 0 {
		batch := c.pending
		c.pending, c.inFlight = nil, len(batch)
		c.mu.Unlock()
		err := c.writeBatch(batch)
		c.mu.Lock()
		c.inFlight = 0
		if err != nil {
			c.failLocked(err)
		}
	}
	c.writer = nil
}

func (c *Conn) writeBatch(b []byte) error {
	if err := c.raw.SetWriteDeadline(time.Now().Add(writeTimeout)); err != nil {
		return err
	}
	if _, err := c.tls.Write(b); err != nil {
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return ErrSlow
		}
		return err
	}
	// TLS writes on its own as well, when the other end asks for a new key,
	// and must not meet a deadline of the past.
	return c.raw.SetWriteDeadline(time.Time{})
}

// Receive returns the next frame, whose bytes are the caller's. It fails with
// ErrSilent when no frame begins within the limit of SetSilence or when one
// that began is not complete within five seconds, with ErrFrame when one is
// announced that is empty or too long, and with what is io.EOF to errors.Is
// when the other end closed the connection between two frames. Frames that
// were queued here when
// Close was called are lost.
func (c *Conn) Receive() ([]byte, error) {
	if err := c.await(); err != nil {
		return nil, err
	}
	b, err := readFrame(c.tls, c.begun)
	if err != nil {
		return nil, c.readFailed(err)
	}
	return b, nil
}

// await starts the wait for a frame's first byte.
func (c *Conn) await() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.cause != nil {
		return c.cause
	}
	if c.closing {
		return net.ErrClosed
	}
	c.inFrame = false
	c.armLocked()
	return nil
}

// begun starts the time for the rest of a frame. Without a limit of its own, a
// peer that sends a byte now and then would never be silent.
func (c *Conn) begun() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.inFrame = true
	if !c.closing {
		c.armLocked()
	}
}

func (c *Conn) readFailed(err error) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.cause == nil && c.closing {
		return net.ErrClosed // Close is still sending what is queued
	}
	if errors.Is(err, os.ErrDeadlineExceeded) {
		if c.inFrame {
			err = fmt.Errorf("%w in the middle of a frame", ErrSilent)
		} else {
			err = fmt.Errorf("%w for %v", ErrSilent, c.silence)
		}
	}
	c.failLocked(inWords(err))
	return c.cause
}

// SetSilence sets how long Receive waits for a frame to begin, from when it is
// called, also where it is waiting already. Zero or less means for ever.
func (c *Conn) SetSilence(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.silence = d
	if c.cause == nil && !c.closing && !c.inFrame {
		c.armLocked()
	}
}

// armLocked sets the read deadline. An error means that the connection is
// closed, which the read finds out by itself.
func (c *Conn) armLocked() {
	var deadline time.Time
	switch {
	case c.inFrame:
		deadline = time.Now().Add(frameTimeout)
	case c.silence > 0:
		deadline = time.Now().Add(c.silence)
	}
	_ = c.raw.SetReadDeadline(deadline)
}

// Close closes the connection once what is queued has been sent, or a second
// later. Receive, where it is waiting, returns at once. It is safe to call
// more than once; only the first call waits.
func (c *Conn) Close() error {
	c.mu.Lock()
	if c.closing {
		c.mu.Unlock()
		return nil
	}
	c.closing = true
	_ = c.raw.SetReadDeadline(time.Unix(1, 0)) // wakes Receive
	done := c.writer
	c.mu.Unlock()

	if done != nil {
		grace := time.NewTimer(closeGrace)
		defer grace.Stop()
		select {
		case <-done:
		case <-grace.C:
		}
	}
	c.mu.Lock()
	c.failLocked(net.ErrClosed)
	c.mu.Unlock()
	if done != nil {
		<-done
	}
	return nil
}

// failLocked closes the connection for the first reason it is given. There is
// no close_notify: frames say where they end, and writing it could block.
func (c *Conn) failLocked(err error) {
	if c.cause != nil {
		return
	}
	c.cause = err
	c.pending = nil
	_ = c.raw.Close() // nothing is left that its error could tell
}

func appendFrame(to, b []byte) []byte {
	to = binary.BigEndian.AppendUint16(to, uint16(len(b)))
	return append(to, b...)
}

// readFrame reads one frame. It calls begun after the first byte. The error is
// io.EOF only where the input ends before that byte.
func readFrame(r io.Reader, begun func()) ([]byte, error) {
	var header [frameHeader]byte
	if _, err := io.ReadFull(r, header[:1]); err != nil {
		return nil, err
	}
	begun()
	if _, err := io.ReadFull(r, header[1:]); err != nil {
		return nil, unexpected(err)
	}
	n := int(binary.BigEndian.Uint16(header[:]))
	if n == 0 || n > MaxFrame {
		return nil, fmt.Errorf("%w: %d announced", ErrFrame, n)
	}
	b := make([]byte, n)
	if _, err := io.ReadFull(r, b); err != nil {
		return nil, unexpected(err)
	}
	return b, nil
}

// hangUp is an end of the input, in words.
type hangUp struct {
	text  string
	cause error // io.EOF or io.ErrUnexpectedEOF
}

func (e hangUp) Error() string { return e.text }

func (e hangUp) Unwrap() error { return e.cause }

// inWords says what an end of the input means.
func inWords(err error) error {
	switch {
	case errors.Is(err, io.EOF):
		return hangUp{"other end closed the connection", io.EOF}
	case errors.Is(err, io.ErrUnexpectedEOF):
		return hangUp{"other end closed the connection in the middle of a message", io.ErrUnexpectedEOF}
	}
	return err
}

func unexpected(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}
