package etsi004

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"time"

	"keyturn/internal/kms"
	"keyturn/internal/kms/kmshttp"
)

// idleTimeout closes an unused connection before the server does: a request
// written into a connection that closes at that moment is lost, and perhaps a
// key with it.
const idleTimeout = 4 * time.Second

// downTime is how long a URI that could not be reached is tried last.
const downTime = 30 * time.Second

// errLate is the cause of a context that ended by the timeout of a call.
var errLate = errors.New("no whole answer in time")

// statusError is a whole answer by which the KMS says no.
type statusError struct {
	uri     string
	service service
	status  status
	means   error // sentinel or nil
}

// refusal makes the error of an answer, with what it means to whoever leads.
// Without a sentinel the call failed for now.
func refusal(e *endpoint, s service, code status) *statusError {
	means := map[status]error{
		statusNoKeys:     kms.ErrNoKeys,
		statusPeerAbsent: kms.ErrNoKeys,
		statusQoS:        kms.ErrRefused,
	}
	return &statusError{e.address, s, code, means[code]}
}

func (e *statusError) Error() string {
	s := fmt.Sprintf("%s answered %v with %v", e.uri, e.service, e.status)
	if e.means != nil {
		s = e.means.Error() + ": " + s
	}
	return s
}

func (e *statusError) Unwrap() error { return e.means }

// exchangeError means that a request got no answer that could be used.
type exchangeError struct {
	uri     string
	service service
	sent    bool // it may have arrived
	err     error
}

func (e *exchangeError) Error() string { return fmt.Sprintf("%s: %v: %v", e.uri, e.service, e.err) }

func (e *exchangeError) Unwrap() []error {
	if e.sent && e.service == getKey {
		return []error{e.err, errLost}
	}
	return []error{e.err}
}

// errLost means that a key may have been delivered that did not arrive.
var errLost = errors.New("key may be lost")

func lost(err error) bool { return errors.Is(err, errLost) }

// each carries out a call at one URI after the other until one of them answers
// it, and gives each its own deadline. Once a key may have been lost it is not
// tried elsewhere. The error tells what each URI said.
func (k *KMS) each(ctx context.Context, call func(ctx context.Context, e *endpoint) error) error {
	if err := k.acquire(ctx, k.slots); err != nil {
		return err
	}
	defer func() { <-k.slots }()

	var all error
	for _, e := range k.order() {
		attempt, cancel := context.WithTimeoutCause(ctx, k.timeout, errLate)
		err := call(attempt, e)
		cancel()
		if err == nil {
			k.mark(e, time.Time{})
			return nil
		}
		if all == nil {
			all = err
		} else {
			all = fmt.Errorf("%w; %w", all, err)
		}
		if _, ok := errors.AsType[*exchangeError](err); !ok || ctx.Err() != nil {
			break // the KMS has spoken, or nobody waits any longer
		}
		k.mark(e, time.Now().Add(downTime))
		if lost(err) {
			break
		}
	}
	return all
}

// acquire waits for a place in a semaphore, at most as long as a call may take.
// The waiting does not shorten the call's own time: a request that is sent with
// little time left loses a key.
func (k *KMS) acquire(ctx context.Context, places chan struct{}) error {
	t := time.NewTimer(k.timeout)
	defer t.Stop()
	select {
	case places <- struct{}{}:
		return nil
	case <-t.C:
		return fmt.Errorf("%s: %d calls under way for %v", k.uris[0].address, cap(places), k.timeout)
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// order returns the URIs, those found down last.
func (k *KMS) order() []*endpoint {
	k.mu.Lock()
	defer k.mu.Unlock()
	var up, down []*endpoint
	for now, i := time.Now(), 0; i < len(k.uris); i++ {
		if e := k.uris[i]; now.Before(e.down) {
			down = append(down, e)
		} else {
			up = append(up, e)
		}
	}
	return append(up, down...)
}

func (k *KMS) mark(e *endpoint, down time.Time) {
	k.mu.Lock()
	defer k.mu.Unlock()
	e.down = down
}

// exchange sends one request and returns the payload of its answer, which may
// hold a key: wipe it. Only a request that costs no key is sent again, once,
// when the connection that was kept for it turns out to be dead.
func (k *KMS) exchange(ctx context.Context, e *endpoint, s service, payload []byte) ([]byte, error) {
	c, kept, err := k.connect(ctx, e)
	if err != nil {
		return nil, &exchangeError{e.address, s, false, k.explain(ctx, err)}
	}
	answer, err := c.roundTrip(ctx, k.dialect, s, payload)
	if err != nil && kept && s != getKey && ctx.Err() == nil {
		c.drop()
		if c, err = k.handshake(ctx, e); err != nil {
			return nil, &exchangeError{e.address, s, true, k.explain(ctx, err)}
		}
		answer, err = c.roundTrip(ctx, k.dialect, s, payload)
	}
	if err != nil {
		c.drop()
		return nil, &exchangeError{e.address, s, true, k.explain(ctx, err)}
	}
	k.rest(e, c)
	return answer, nil
}

// conn is one TLS connection to a KMS. At most one request is under way on it.
type conn struct {
	tls   *tls.Conn
	raw   net.Conn
	timer *time.Timer // closes it while it is idle
}

func (c *conn) close() { _ = c.tls.Close() }

// drop closes a connection that failed, without another word.
func (c *conn) drop() { _ = c.raw.Close() }

// connect returns the connection that was kept last, or a new one.
func (k *KMS) connect(ctx context.Context, e *endpoint) (c *conn, kept bool, err error) {
	k.mu.Lock()
	for n := len(e.idle); n > 0 && c == nil; n = len(e.idle) {
		// A connection whose timer has run is being closed.
		if e.idle[n-1].timer.Stop() {
			c = e.idle[n-1]
		}
		e.idle = e.idle[:n-1]
	}
	k.mu.Unlock()
	if c != nil {
		return c, true, nil
	}
	c, err = k.handshake(ctx, e)
	return c, false, err
}

func (k *KMS) handshake(ctx context.Context, e *endpoint) (*conn, error) {
	raw, err := k.dial(ctx, "tcp", e.address)
	if err != nil {
		return nil, err
	}
	c := &conn{tls: tls.Client(raw, e.tls), raw: raw}
	if err := c.tls.HandshakeContext(ctx); err != nil {
		c.drop()
		return nil, err
	}
	return c, nil
}

// rest keeps a connection for the next request where the dialect does so.
func (k *KMS) rest(e *endpoint, c *conn) {
	k.mu.Lock()
	keep := k.dialect.persistent && !k.closed
	if keep {
		// At most maxCalls are idle, for no more were ever in use.
		c.timer = time.AfterFunc(idleTimeout, c.close)
		e.idle = append(e.idle, c)
	}
	k.mu.Unlock()
	if !keep {
		c.close()
	}
}

// roundTrip writes a request and reads its answer until ctx ends. After an
// error the connection is of no use.
func (c *conn) roundTrip(ctx context.Context, d *dialect, s service, payload []byte) ([]byte, error) {
	interrupted := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		_ = c.raw.SetDeadline(time.Unix(1, 0))
		close(interrupted)
	})
	answer, err := c.transfer(d, s, payload)
	if !stop() {
		<-interrupted
		clear(answer)
		return nil, context.Cause(ctx)
	}
	return answer, err
}

func (c *conn) transfer(d *dialect, s service, payload []byte) ([]byte, error) {
	if _, err := c.tls.Write(d.request(s, payload)); err != nil {
		return nil, err
	}
	var header [headerSize]byte
	if _, err := io.ReadFull(c.tls, header[:]); err != nil {
		return nil, err
	}
	n, err := d.decodeHeader(header, s)
	if err != nil {
		return nil, err
	}
	answer := make([]byte, n)
	if _, err := io.ReadFull(c.tls, answer); err != nil {
		clear(answer)
		return nil, err
	}
	return answer, nil
}

// explain says in our words why no answer came.
func (k *KMS) explain(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		if err = context.Cause(ctx); errors.Is(err, errLate) {
			err = fmt.Errorf("no answer within %v", k.timeout)
		}
		return err
	}
	refused, why := kmshttp.Explain(err)
	if refused {
		return fmt.Errorf("%w: %w", kms.ErrRefused, why)
	}
	return why
}
