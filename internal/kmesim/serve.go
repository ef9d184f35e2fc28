package kmesim

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"time"

	"golang.org/x/net/netutil"
)

// Limits of one port of a KME.
const (
	maxConnections = 4096
	handshakeTime  = 10 * time.Second
	requestTime    = 10 * time.Second // to send a request
)

// Serve answers on ln by ETSI GS QKD 014 until ctx ends, then returns nil. conf
// must demand and verify client certificates. ln is closed.
func (k *KME) Serve(ctx context.Context, ln net.Listener, conf *tls.Config) error {
	return k.serveHTTP(ctx, ln, conf, k)
}

// serveHTTP answers by h until ctx ends, then returns nil. Connections fail as
// the KME does; requests, where h is what faulty returns.
func (k *KME) serveHTTP(ctx context.Context, ln net.Listener, conf *tls.Config, h http.Handler) error {
	tlsListener, err := k.listen(ctx, ln, conf)
	if err != nil {
		return err
	}
	s := &http.Server{
		Handler:     h,
		BaseContext: func(net.Listener) context.Context { return ctx },
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			expired := c.(*tls.Conn).NetConn().(*conn).expired
			return context.WithValue(ctx, expiredKey{}, expired)
		},
		ReadHeaderTimeout: requestTime,
		ReadTimeout:       requestTime,
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    16 << 10,
		ErrorLog:          slog.NewLogLogger(k.log.Handler(), slog.LevelWarn),
		Protocols:         new(http.Protocols),
	}
	s.Protocols.SetHTTP1(true)
	if err := serveUntil(ctx, s, tlsListener); err != nil {
		return fmt.Errorf("serve %s: %w", k.name, err)
	}
	return nil
}

// serveUntil serves on ln until ctx ends, then returns nil.
func serveUntil(ctx context.Context, s *http.Server, ln net.Listener) error {
	done := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(done)
		// The context's end has ended the handlers that a fault held up.
		grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
		defer cancel()
		if s.Shutdown(grace) != nil {
			s.Close()
		}
	})
	err := s.Serve(ln)
	if !stop() {
		<-done
		return nil
	}
	s.Close()
	return err
}

// listener hands out connections whose TLS handshake is done, as far as the
// faults of its KME let them come.
type listener struct {
	net.Listener
	kme  *KME
	conf *tls.Config

	ctx   context.Context // of the handshakes
	stop  context.CancelFunc
	tasks sync.WaitGroup
	ready chan *tls.Conn
	err   error // why ready was closed
}

// conn is a connection below TLS.
type conn struct {
	net.Conn
	expired bool // the certificate of this KME that it is shown has expired
}

// expiredKey is the key of a request's context for conn.expired.
type expiredKey struct{}

// listen takes ln over. Its connections are of type *tls.Conn, and of type *conn
// below that; conf must demand and verify client certificates. They end with
// ctx. Who closes the listener waits for its goroutines.
func (k *KME) listen(ctx context.Context, ln net.Listener, conf *tls.Config) (*listener, error) {
	if conf.ClientAuth != tls.RequireAndVerifyClientCert {
		ln.Close()
		return nil, errors.New("TLS configuration does not verify client certificates")
	}
	l := &listener{Listener: netutil.LimitListener(ln, maxConnections), kme: k, conf: conf, ready: make(chan *tls.Conn)}
	l.ctx, l.stop = context.WithCancel(ctx)
	l.tasks.Go(l.run)
	return l, nil
}

func (l *listener) run() {
	defer close(l.ready)
	var greeters sync.WaitGroup
	defer greeters.Wait()
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			l.err = err
			return
		}
		if f, _ := l.kme.strike(Down); f.Kind == Down {
			c.Close()
			continue
		}
		greeters.Go(func() { l.greet(c) })
	}
}

// greet does the handshake.
func (l *listener) greet(raw net.Conn) {
	fault, lifted := l.kme.strike(Expired, SilentTLS)
	c := tls.Server(&conn{raw, fault.Kind == Expired}, l.conf)
	ctx, cancel := context.WithTimeout(l.ctx, handshakeTime)
	defer cancel()
	if err := c.HandshakeContext(ctx); err != nil {
		l.kme.log.WarnContext(ctx, "TLS handshake", "remote", raw.RemoteAddr().String(), "err", err)
		c.Close()
		return
	}
	if fault.Kind == SilentTLS {
		// Not for ever: that the client has gone shows only to those who read.
		pause(l.ctx, maxDelay, lifted)
		c.Close()
		return
	}
	select {
	case l.ready <- c:
	case <-l.ctx.Done():
		c.Close()
	}
}

func (l *listener) Accept() (net.Conn, error) {
	c, ok := <-l.ready
	if !ok {
		return nil, l.err
	}
	return c, nil
}

func (l *listener) Close() error {
	err := l.Listener.Close()
	l.stop()
	l.tasks.Wait()
	return err
}

// faulty returns h with those faults of the KME that concern every request.
func (k *KME) faulty(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch f := k.Fault(); {
		case f.Kind == SilentTLS, f.Kind == Expired && r.Context().Value(expiredKey{}) == false:
			// The connection is older than the fault, which strikes the next one.
			panic(http.ErrAbortHandler)
		}
		f, lifted := k.strike(Down, HTML, Page, Silent, Slow, Drip)
		switch f.Kind {
		case Down:
			panic(http.ErrAbortHandler)
		case HTML:
			writePage(w, http.StatusBadGateway, "html")
			return
		case Page:
			writePage(w, f.Code, f.Shape)
			return
		case Silent:
			select {
			case <-r.Context().Done():
			case <-lifted:
			}
			panic(http.ErrAbortHandler)
		case Slow:
			if !pause(r.Context(), f.Delay, lifted) {
				return
			}
		case Drip:
			w = &dripper{w, r.Context(), f.Delay, lifted}
		}
		h.ServeHTTP(w, r)
	})
}

// pause waits, or less where the fault is lifted. It returns false where ctx
// ends first.
func pause(ctx context.Context, d time.Duration, lifted <-chan struct{}) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-lifted:
	case <-ctx.Done():
		return false
	}
	return true
}

// dripper writes a byte at a time.
type dripper struct {
	http.ResponseWriter
	ctx    context.Context
	delay  time.Duration
	lifted <-chan struct{}
}

func (d *dripper) Write(b []byte) (int, error) {
	flush := http.NewResponseController(d.ResponseWriter)
	for i := range b {
		if !pause(d.ctx, d.delay, d.lifted) {
			return i, d.ctx.Err()
		}
		if _, err := d.ResponseWriter.Write(b[i : i+1]); err != nil {
			return i, err
		}
		if err := flush.Flush(); err != nil {
			return i + 1, err
		}
	}
	return len(b), nil
}
