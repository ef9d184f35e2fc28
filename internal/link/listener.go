package link

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"
)

// Limits on connections that have not authenticated yet. A connection to spare
// costs a hub about 30 KiB while it lasts.
const (
	maxPending        = 128 // in all
	maxPendingPerHost = 32  // from one IPv4 address or one IPv6 /64

	// settle is how long a connection is safe from being displaced. A
	// handshake takes three round trips, so an honest one is done by then;
	// without this time, a crowd of honest clients (a hub that restarts)
	// would displace each other for ever.
	settle = time.Second

	minAcceptDelay = 5 * time.Millisecond // after an error of accept; doubles
	maxAcceptDelay = time.Second
)

// Listener accepts links. It runs handshakes side by side, each within
// HandshakeTimeout, and bounds how many there are. Where the bound, in all or
// for one host, is reached, a newcomer takes the place of the oldest of them
// once that one is a second old, and is turned away otherwise: idle
// connections, however many, cannot keep peers out, and one host cannot use
// all the places.
type Listener struct {
	ln       net.Listener
	self     *Identity
	known    func(Fingerprint) bool
	rejected func(remote net.Addr, err error)

	accepted chan *Conn
	ctx      context.Context // ends with Close
	cancel   context.CancelCauseFunc
	wg       sync.WaitGroup // the accept loop and the handshakes

	mu      sync.Mutex
	pending []*candidate // oldest first
}

// candidate is a connection that has not been handed to Accept.
type candidate struct {
	raw    net.Conn
	host   netip.Prefix
	since  time.Time
	cancel context.CancelCauseFunc
}

// A ListenerOption changes what NewListener makes.
type ListenerOption func(*Listener)

// WithRejected has f called for each connection that was turned away, and why;
// remote is nil where accepting itself went wrong. Strangers can make it
// happen at any rate, and from several goroutines at once: f must not block,
// and limits what it logs.
func WithRejected(f func(remote net.Addr, err error)) ListenerOption {
	return func(l *Listener) { l.rejected = f }
}

// NewListener starts to accept links on ln, which it closes in the end. A
// client must prove an identity for which known returns true; known is called
// for each handshake, from many goroutines, so that pins can change meanwhile.
func NewListener(ln net.Listener, self *Identity, known func(Fingerprint) bool, options ...ListenerOption) *Listener {
	l := &Listener{
		ln:       ln,
		self:     self,
		known:    known,
		rejected: func(net.Addr, error) {},
		accepted: make(chan *Conn),
	}
	l.ctx, l.cancel = context.WithCancelCause(context.Background())
	for _, option := range options {
		option(l)
	}
	l.wg.Go(l.run)
	return l
}

// Addr returns the address that the listener listens on.
func (l *Listener) Addr() net.Addr { return l.ln.Addr() }

// Accept returns the next link whose client has proved itself; the caller
// closes it. A link that waits for Accept longer than its handshake had left
// is closed. The error is that of ctx, or net.ErrClosed after Close.
func (l *Listener) Accept(ctx context.Context) (*Conn, error) {
	select {
	case c := <-l.accepted:
		return c, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-l.ctx.Done():
		return nil, net.ErrClosed
	}
}

// Close stops listening, drops the handshakes under way, and waits for all
// goroutines of the listener. Links that Accept has returned live on.
func (l *Listener) Close() error {
	l.cancel(net.ErrClosed)
	err := l.ln.Close()
	l.wg.Wait()
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

// run accepts until the listener is closed. Any other error may pass (too many
// open files, for one), and a rotator that stopped listening would be worse
// than one that keeps trying.
func (l *Listener) run() {
	var delay time.Duration
	for {
		raw, err := l.ln.Accept()
		switch {
		case err == nil:
			delay = 0
			l.admit(raw)
		case l.ctx.Err() != nil:
			return
		case errors.Is(err, net.ErrClosed): // by somebody else
			l.cancel(net.ErrClosed)
			return
		default:
			l.rejected(nil, err)
			delay = min(max(2*delay, minAcceptDelay), maxAcceptDelay)
			select {
			case <-time.After(delay):
			case <-l.ctx.Done():
				return
			}
		}
	}
}

// admit starts the handshake of a new connection if there is a place for it.
func (l *Listener) admit(raw net.Conn) {
	ctx, cancel := context.WithCancelCause(l.ctx)
	c := &candidate{raw: raw, host: hostOf(raw.RemoteAddr()), since: time.Now(), cancel: cancel}
	if !l.enter(c) {
		cancel(ErrCrowded)
		_ = raw.Close()
		l.rejected(raw.RemoteAddr(), ErrCrowded)
		return
	}
	l.wg.Go(func() {
		defer l.leave(c)
		l.serve(ctx, c)
	})
}

// enter makes c a candidate, in the place of an older one where need be.
func (l *Listener) enter(c *candidate) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	sameHost := func(o *candidate) bool { return o.host == c.host }
	siblings := 0
	for _, o := range l.pending {
		if sameHost(o) {
			siblings++
		}
	}
	oldest := -1
	switch {
	case siblings >= maxPendingPerHost:
		oldest = slices.IndexFunc(l.pending, sameHost)
	case len(l.pending) >= maxPending:
		oldest = 0
	}
	if oldest >= 0 {
		victim := l.pending[oldest]
		if c.since.Sub(victim.since) < settle {
			return false
		}
		victim.cancel(ErrCrowded)
		l.pending = slices.Delete(l.pending, oldest, oldest+1)
	}
	l.pending = append(l.pending, c)
	return true
}

func (l *Listener) leave(c *candidate) {
	l.mu.Lock()
	defer l.mu.Unlock()
	c.cancel(nil)
	if i := slices.Index(l.pending, c); i >= 0 {
		l.pending = slices.Delete(l.pending, i, i+1)
	}
}

// serve runs a handshake and hands the link to Accept. Until then it keeps its
// place, so that the bound also holds where nobody calls Accept.
func (l *Listener) serve(ctx context.Context, c *candidate) {
	ctx, cancel := context.WithTimeoutCause(ctx, HandshakeTimeout, ErrHandshakeTimeout)
	defer cancel()
	conn, err := server(ctx, c.raw, l.self, l.known)
	if err == nil {
		select {
		case l.accepted <- conn:
			return
		case <-ctx.Done():
			err = context.Cause(ctx)
			_ = conn.Close()
		}
	}
	if l.ctx.Err() == nil {
		l.rejected(c.raw.RemoteAddr(), err)
	}
}

// hostOf returns what the limit for one host counts by. An IPv6 host commands
// its whole /64. Addresses that are not of TCP count as one host.
func hostOf(addr net.Addr) netip.Prefix {
	tcp, ok := addr.(*net.TCPAddr)
	if !ok {
		return netip.Prefix{}
	}
	ip := tcp.AddrPort().Addr().Unmap().WithZone("")
	bits := 32
	if ip.Is6() {
		bits = 64
	}
	host, err := ip.Prefix(bits)
	if err != nil {
		return netip.Prefix{}
	}
	return host
}
