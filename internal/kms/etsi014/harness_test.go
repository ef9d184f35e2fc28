package etsi014

import (
	"bytes"
	"crypto/tls"
	"io"
	"log"
	"net/http"
	"sync"
	"testing"

	"keyturn/internal/kms"
	"keyturn/internal/memnet"
	"keyturn/internal/testca"
)

// network is the KMEs of a test and the authority that both ends trust.
type network struct {
	*testca.Authority
	memnet.Network
	t *testing.T
}

func newNetwork(t *testing.T) *network {
	return &network{Authority: testca.New(t, "root"), t: t}
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
	return n.serveTLS(name, n.kmeTLS(name), handler)
}

// kmeTLS is what a KME of this name does well.
func (n *network) kmeTLS(name string) *tls.Config {
	return &tls.Config{
		Certificates: []tls.Certificate{n.Server(name)},
		ClientAuth:   tls.RequireAndVerifyClientCert,
		ClientCAs:    n.Pool(),
	}
}

func (n *network) serveTLS(name string, conf *tls.Config, handler http.HandlerFunc) *host {
	l, err := n.Listen(name + ":443")
	if err != nil {
		n.t.Fatal(err)
	}
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
		c.TLS.Memory = &tls.Config{Certificates: []tls.Certificate{n.Client("sae_001")}, RootCAs: n.Pool()}
	}
	c.Dial = n.Dial
	k, err := New(c)
	if err != nil {
		n.t.Fatal(err)
	}
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
