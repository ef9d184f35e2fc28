package etsi014

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"keyturn/internal/kms"
)

// authority issues certificates that are valid in a synctest bubble, too.
type authority struct {
	t    *testing.T
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	made int64
}

func newAuthority(t *testing.T, name string) *authority {
	a := &authority{t: t}
	c := a.issue(x509.Certificate{
		Subject:               pkix.Name{CommonName: name},
		IsCA:                  true,
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageCertSign,
	})
	a.cert, a.key = c.Leaf, c.PrivateKey.(*ecdsa.PrivateKey)
	return a
}

func (a *authority) issue(template x509.Certificate) tls.Certificate {
	a.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		a.t.Fatal(err)
	}
	a.made++
	template.SerialNumber = big.NewInt(a.made)
	template.NotBefore = time.Date(1999, 1, 1, 0, 0, 0, 0, time.UTC)
	if template.NotAfter.IsZero() {
		template.NotAfter = template.NotBefore.AddDate(100, 0, 0)
	}
	parent, signer := a.cert, a.key
	if parent == nil {
		parent, signer = &template, key
	}
	der, err := x509.CreateCertificate(rand.Reader, &template, parent, key.Public(), signer)
	if err != nil {
		a.t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		a.t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}
}

func (a *authority) pool() *x509.CertPool {
	p := x509.NewCertPool()
	p.AddCert(a.cert)
	return p
}

func (a *authority) client(name string) tls.Certificate {
	return a.issue(x509.Certificate{
		Subject:     pkix.Name{CommonName: name},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	})
}

func (a *authority) server(names ...string) tls.Certificate {
	return a.issue(x509.Certificate{
		Subject:     pkix.Name{CommonName: "kme"},
		DNSNames:    names,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	})
}

// write writes a certificate and its key as files and returns their paths.
func write(t *testing.T, dir, name string, c tls.Certificate) (cert, key string) {
	t.Helper()
	cert, key = filepath.Join(dir, name+".crt"), filepath.Join(dir, name+".key")
	der, err := x509.MarshalPKCS8PrivateKey(c.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range []struct {
		path string
		b    pem.Block
	}{
		{cert, pem.Block{Type: "CERTIFICATE", Bytes: c.Certificate[0]}},
		{key, pem.Block{Type: "PRIVATE KEY", Bytes: der}},
	} {
		// A new file each time, as certbot and its like make them.
		if err := os.WriteFile(f.path+".new", pem.EncodeToMemory(&f.b), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(f.path+".new", f.path); err != nil {
			t.Fatal(err)
		}
	}
	return cert, key
}

// network connects hosts by net.Pipe, so that it works in a bubble.
type network struct {
	t *testing.T
	authority
	mu    sync.Mutex
	hosts map[string]*pipeListener
}

func newNetwork(t *testing.T) *network {
	// Virtual time for the last bytes of closed connections.
	t.Cleanup(func() { time.Sleep(time.Minute) })
	return &network{t: t, authority: *newAuthority(t, "root"), hosts: make(map[string]*pipeListener)}
}

// host is a KME made by hand: it records what it is asked.
type host struct {
	mu       sync.Mutex
	requests []string // "GET /path?query body"
	users    []string // common names of the clients' certificates
}

func (h *host) seen() []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return append([]string(nil), h.requests...)
}

// serve answers for a host name until the test ends.
func (n *network) serve(name string, handler http.HandlerFunc) *host {
	return n.serveTLS(name, &tls.Config{
		Certificates: []tls.Certificate{n.server(name)},
		ClientAuth:   tls.RequireAndVerifyClientCert,
		ClientCAs:    n.pool(),
	}, handler)
}

func (n *network) serveTLS(name string, conf *tls.Config, handler http.HandlerFunc) *host {
	l := &pipeListener{conns: make(chan net.Conn), closed: make(chan struct{})}
	n.mu.Lock()
	n.hosts[name+":443"] = l
	n.mu.Unlock()
	h := new(host)
	s := &http.Server{
		ErrorLog: log.New(io.Discard, "", 0),
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			body, err := io.ReadAll(r.Body)
			if err != nil {
				return
			}
			line := r.Method + " " + r.URL.RequestURI()
			if len(body) > 0 {
				line += " " + string(body)
			}
			h.mu.Lock()
			h.requests = append(h.requests, line)
			h.users = append(h.users, r.TLS.PeerCertificates[0].Subject.CommonName)
			h.mu.Unlock()
			r.Body = io.NopCloser(bytes.NewReader(body))
			handler(w, r)
		}),
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = s.Serve(tls.NewListener(l, conf))
	}()
	n.t.Cleanup(func() { s.Close(); <-done })
	return h
}

func (n *network) dial(ctx context.Context, _, addr string) (net.Conn, error) {
	n.mu.Lock()
	l := n.hosts[addr]
	n.mu.Unlock()
	if l == nil {
		return nil, fmt.Errorf("connection to %s refused", addr)
	}
	client, server := net.Pipe()
	select {
	case l.conns <- buffer(server):
		return buffer(client), nil
	case <-l.closed:
		return nil, net.ErrClosed
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// kms connects our sae_001 by c, whose other fields it fills in.
func (n *network) kms(c Config) *KMS {
	n.t.Helper()
	if c.SAE == "" {
		c.SAE = "sae_001"
	}
	if len(c.URIs) == 0 {
		c.URIs = []string{"https://kme-a"}
	}
	if c.TLS.Memory == nil && c.TLS.Certificate == "" {
		c.TLS.Memory = &tls.Config{Certificates: []tls.Certificate{n.client("sae_001")}, RootCAs: n.pool()}
	}
	k, err := New(c)
	if err != nil {
		n.t.Fatal(err)
	}
	k.transport.DialContext = n.dial
	n.t.Cleanup(func() { k.Close() })
	return k
}

// source is the source of sae_002's keys at k.
func (n *network) source(c Config) kms.Source {
	n.t.Helper()
	s, err := n.kms(c).For("sae_002")
	if err != nil {
		n.t.Fatal(err)
	}
	return s
}

// buffered is one end of a pipe whose writes do not wait for the other end to
// read. crypto/tls and net/http write while they hold locks, and who waits for
// a lock keeps a bubble's time from passing.
type buffered struct {
	net.Conn
	out   chan []byte
	quit  chan struct{} // closed by Close
	dead  chan struct{} // closed by the pump
	close sync.Once
}

func buffer(c net.Conn) *buffered {
	b := &buffered{Conn: c, out: make(chan []byte, 64), quit: make(chan struct{}), dead: make(chan struct{})}
	go b.pump()
	return b
}

func (b *buffered) pump() {
	defer close(b.dead)
	defer b.Conn.Close()
	for {
		select {
		case p := <-b.out:
			if _, err := b.Conn.Write(p); err != nil {
				return
			}
			continue
		default:
		}
		select {
		case p := <-b.out:
			if _, err := b.Conn.Write(p); err != nil {
				return
			}
		case <-b.quit:
			if len(b.out) == 0 {
				return
			}
		}
	}
}

func (b *buffered) Write(p []byte) (int, error) {
	select {
	case b.out <- bytes.Clone(p):
		return len(p), nil
	case <-b.dead:
		return 0, net.ErrClosed
	}
}

func (b *buffered) Read(p []byte) (int, error) {
	n, err := b.Conn.Read(p)
	select {
	case <-b.quit:
		return 0, net.ErrClosed
	default:
		return n, err
	}
}

func (b *buffered) Close() error {
	b.close.Do(func() {
		close(b.quit)
		_ = b.Conn.SetReadDeadline(time.Now())
		_ = b.Conn.SetWriteDeadline(time.Now().Add(time.Second))
	})
	return nil
}

func (b *buffered) SetDeadline(t time.Time) error    { return b.Conn.SetReadDeadline(t) }
func (b *buffered) SetWriteDeadline(time.Time) error { return nil }

type pipeListener struct {
	conns  chan net.Conn
	closed chan struct{}
	once   sync.Once
}

func (l *pipeListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *pipeListener) Close() error {
	l.once.Do(func() { close(l.closed) })
	return nil
}

func (l *pipeListener) Addr() net.Addr { return &net.UnixAddr{Name: "pipe", Net: "unix"} }

// raw answers with exactly these bytes and closes the connection.
func raw(text string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		c, _, err := w.(http.Hijacker).Hijack()
		if err != nil {
			panic(err)
		}
		defer c.Close()
		_, _ = io.WriteString(c, text)
	}
}

// chunked is the chunked coding of a body in these parts.
func chunked(parts ...string) string {
	var b strings.Builder
	for _, p := range append(parts, "") {
		fmt.Fprintf(&b, "%x\r\n%s\r\n", len(p), p)
	}
	return b.String()
}

// says answers with a status, a media type and a body.
func says(status int, typ, body string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", typ)
		w.WriteHeader(status)
		_, _ = io.WriteString(w, body)
	}
}

// ok answers with 200 and JSON.
func ok(body string) http.HandlerFunc { return says(http.StatusOK, "application/json", body) }

// inTurn answers the n-th request by the n-th handler, and all later ones by
// the last.
func inTurn(handlers ...http.HandlerFunc) http.HandlerFunc {
	var mu sync.Mutex
	return func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		h := handlers[0]
		if len(handlers) > 1 {
			handlers = handlers[1:]
		}
		mu.Unlock()
		h(w, r)
	}
}

// silent never answers.
func silent(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }

// cut closes the connection without an answer.
func cut(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }
