// Package kmesim simulates a pair of key management entities of a QKD network
// by ETSI GS QKD 014 V1.1.1, with faults on demand, and makes the certificates
// of a laboratory. It is for tests, demonstrations and laboratories: its keys
// come from the random generator of one process, never from a quantum channel.
//
// The standard does not say how a certificate carries an SAE ID. Here it is
// the subject's common name. A key may be fetched by its slaves at either KME.
package kmesim

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"mime"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/net/netutil"
)

// Limits of a pair. Sizes are in bits.
const (
	KeySize           = 256 // where a request names none
	MinKeySize        = 64
	MaxKeySize        = 1024
	MaxKeysPerRequest = 128
	MaxSAEs           = 16 // additional slaves for one key
	DefaultMaxKeys    = 1 << 16
	maxSAE            = 1024     // bytes of an SAE ID
	maxRequest        = 64 << 10 // bytes of a request's body
	maxConnections    = 4096     // of one KME
)

// Options of a pair. The zero value is good.
type Options struct {
	// MaxKeys is how many keys may wait for their slaves; beyond it, the oldest
	// goes. DefaultMaxKeys if zero. A key takes some 500 bytes of memory.
	MaxKeys int
	// Random is where keys and their IDs come from; crypto/rand if nil.
	Random io.Reader
	// Log says what is delivered to whom, never the keys. Nothing if nil.
	Log *slog.Logger
}

// Pair is two KMEs that share keys.
type Pair struct{ A, B *KME }

// New returns a pair whose KMEs are called kme-a and kme-b.
func New(o Options) *Pair {
	if o.MaxKeys <= 0 {
		o.MaxKeys = DefaultMaxKeys
	}
	if o.Random == nil {
		o.Random = rand.Reader
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	s := newStore(o.Random, o.MaxKeys)
	kme := func(name, peer string) *KME {
		return &KME{name: name, peer: peer, store: s, log: o.Log.With("kms", name), changed: make(chan struct{})}
	}
	return &Pair{A: kme(NameA, NameB), B: kme(NameB, NameA)}
}

// KME is one of a pair. As an http.Handler it needs requests that came by
// mutual TLS; Serve sees to that.
type KME struct {
	name, peer string
	store      *store
	log        *slog.Logger

	mu      sync.Mutex
	fault   Fault
	changed chan struct{} // closed when fault changes
}

// SetFault sets what is wrong with the KME from now on, for requests that a
// fault holds up as well.
func (k *KME) SetFault(f Fault) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.fault = f
	close(k.changed)
	k.changed = make(chan struct{})
}

// Fault returns what is wrong with the KME.
func (k *KME) Fault() Fault {
	f, _ := k.state()
	return f
}

func (k *KME) state() (Fault, <-chan struct{}) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.fault, k.changed
}

// Serve answers on ln until ctx ends, then returns nil. conf must demand and
// verify client certificates. ln is closed.
func (k *KME) Serve(ctx context.Context, ln net.Listener, conf *tls.Config) error {
	if conf.ClientAuth != tls.RequireAndVerifyClientCert {
		ln.Close()
		return errors.New("TLS configuration does not verify client certificates")
	}
	s := &http.Server{
		Handler:           k,
		BaseContext:       func(net.Listener) context.Context { return ctx },
		ReadHeaderTimeout: 10 * time.Second,
		ReadTimeout:       10 * time.Second,
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    16 << 10,
		ErrorLog:          slog.NewLogLogger(k.log.Handler(), slog.LevelWarn),
		Protocols:         new(http.Protocols),
	}
	s.Protocols.SetHTTP1(true)
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
	err := s.Serve(tls.NewListener(netutil.LimitListener(&listener{ln, k}, maxConnections), conf))
	if !stop() {
		<-done
		return nil
	}
	s.Close()
	return fmt.Errorf("serve %s: %w", k.name, err)
}

// listener closes connections at once while its KME is down.
type listener struct {
	net.Listener
	kme *KME
}

func (l *listener) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil || l.kme.Fault().Kind != Down {
			return c, err
		}
		c.Close()
	}
}

// ServeHTTP answers one request.
func (k *KME) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	fault, changed := k.state()
	switch fault.Kind {
	case Down:
		panic(http.ErrAbortHandler)
	case HTML:
		w.Header().Set("Content-Type", "text/html")
		w.WriteHeader(http.StatusBadGateway)
		_, _ = io.WriteString(w, "<html><head><title>502 Bad Gateway</title></head><body><h1>502 Bad Gateway</h1></body></html>\n")
		return
	case Silent:
		select {
		case <-r.Context().Done():
		case <-changed:
		}
		panic(http.ErrAbortHandler)
	case Slow:
		t := time.NewTimer(fault.Delay)
		defer t.Stop()
		select {
		case <-t.C:
		case <-changed:
		case <-r.Context().Done():
			return
		}
	}
	body, p := k.handle(w, r, fault.Kind)
	if p != nil {
		if p.status == http.StatusMethodNotAllowed {
			w.Header().Set("Allow", p.allow)
		}
		k.log.DebugContext(r.Context(), "refused", "status", p.status, "err", p.Message)
		reply(w, p.status, p)
		return
	}
	if fault.Kind == Lost {
		body.wipe()
		panic(http.ErrAbortHandler)
	}
	reply(w, http.StatusOK, body)
	body.wipe()
}

// answer is the body of a 200.
type answer interface{ wipe() }

// handle answers a request by the standard.
func (k *KME) handle(w http.ResponseWriter, r *http.Request, fault FaultKind) (answer, *problem) {
	sae, p := caller(r)
	if p != nil {
		return nil, p
	}
	peer, verb, p := address(r.URL)
	if p != nil {
		return nil, p
	}
	allow := "GET, POST"
	if verb == "status" {
		allow = "GET"
	}
	if !slices.Contains(strings.Split(allow, ", "), r.Method) {
		return nil, &problem{status: http.StatusMethodNotAllowed, Message: "method not allowed", allow: allow}
	}
	if peer == sae {
		return nil, bad("an SAE shares no keys with itself")
	}
	query, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		return nil, bad("malformed query")
	}
	var body []byte
	if r.Method == http.MethodPost {
		if len(query) > 0 {
			return nil, bad("a POST has no query")
		}
		if body, p = readBody(w, r); p != nil {
			return nil, p
		}
	}
	switch verb {
	case "status":
		return k.status(sae, peer), nil
	case "enc_keys":
		q, p := keyQuery(query)
		if body != nil {
			q, p = decodeKeyRequest(body)
		}
		if p != nil {
			return nil, p
		}
		return k.encKeys(sae, peer, q, fault)
	default: // dec_keys
		ids, p := idQuery(query)
		if body != nil {
			ids, p = decodeKeyIDs(body)
		}
		if p != nil {
			return nil, p
		}
		return k.decKeys(peer, sae, ids, fault)
	}
}

// caller returns the SAE ID of a client: its certificate's common name.
func caller(r *http.Request) (string, *problem) {
	if r.TLS == nil || len(r.TLS.PeerCertificates) == 0 || r.TLS.PeerCertificates[0].Subject.CommonName == "" {
		return "", &problem{status: http.StatusUnauthorized, Message: "no client certificate with an SAE ID as common name"}
	}
	return r.TLS.PeerCertificates[0].Subject.CommonName, nil
}

// address takes /api/v1/keys/{SAE_ID}/{verb} apart. SAE IDs may hold escaped
// slashes.
func address(u *url.URL) (sae, verb string, p *problem) {
	none := &problem{status: http.StatusNotFound, Message: "no such resource"}
	rest, found := strings.CutPrefix(u.EscapedPath(), "/api/v1/keys/")
	escaped, verb, two := strings.Cut(rest, "/")
	if !found || !two || !slices.Contains([]string{"status", "enc_keys", "dec_keys"}, verb) {
		return "", "", none
	}
	sae, err := url.PathUnescape(escaped)
	if err != nil || sae == "" || len(sae) > maxSAE {
		return "", "", none
	}
	return sae, verb, nil
}

func readBody(w http.ResponseWriter, r *http.Request) ([]byte, *problem) {
	if t := r.Header.Get("Content-Type"); t != "" {
		if mt, _, err := mime.ParseMediaType(t); err != nil || mt != "application/json" {
			return nil, bad("content type is not application/json")
		}
	}
	b, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxRequest))
	if err != nil {
		return nil, bad("body is cut off or too long")
	}
	if len(b) == 0 { // all of a key request is optional
		b = []byte("{}")
	}
	return b, nil
}

// status is the status data format (ETSI GS QKD 014 V1.1.1, 6.1).
type status struct {
	SourceKME  string `json:"source_KME_ID"`
	TargetKME  string `json:"target_KME_ID"`
	MasterSAE  string `json:"master_SAE_ID"`
	SlaveSAE   string `json:"slave_SAE_ID"`
	KeySize    int    `json:"key_size"`
	Stored     int    `json:"stored_key_count"`
	MaxKeys    int    `json:"max_key_count"`
	PerRequest int    `json:"max_key_per_request"`
	MaxKeySize int    `json:"max_key_size"`
	MinKeySize int    `json:"min_key_size"`
	MaxSAEs    int    `json:"max_SAE_ID_count"`
}

func (*status) wipe() {}

func (k *KME) status(master, slave string) *status {
	return &status{
		SourceKME: k.name, TargetKME: k.peer, MasterSAE: master, SlaveSAE: slave,
		KeySize: KeySize, MinKeySize: MinKeySize, MaxKeySize: MaxKeySize,
		// Keys are made on demand: as many are ready as there is room for.
		Stored:  k.store.max - k.store.stored(),
		MaxKeys: k.store.max, PerRequest: MaxKeysPerRequest, MaxSAEs: MaxSAEs,
	}
}

// container is a key container (ETSI GS QKD 014 V1.1.1, 6.3).
type container struct {
	Keys []containerKey `json:"keys"`
}

type containerKey struct {
	ID  string `json:"key_ID"`
	Key []byte `json:"key"` // padded standard base64 in JSON
}

func (c *container) wipe() {
	for _, k := range c.Keys {
		clear(k.Key)
	}
}

// shrunk is a key size that nobody asks for, but that one simulator in use has
// for its default.
const shrunk = 32

func (k *KME) encKeys(master, slave string, q *keyRequest, fault FaultKind) (answer, *problem) {
	if fault == OutOfKeys {
		return nil, &problem{status: http.StatusServiceUnavailable, Message: textNoKeys}
	}
	size := q.size
	if fault == WrongSize {
		size = shrunk
	}
	slaves := append([]string{slave}, q.slaves...)
	slices.Sort(slaves)
	slaves = slices.Compact(slaves)
	if slices.Contains(slaves, master) {
		return nil, bad("an SAE shares no keys with itself")
	}
	c := new(container)
	for range q.number {
		id, key, err := k.store.add(master, slaves, size/8)
		if err != nil {
			c.wipe()
			return nil, &problem{status: http.StatusServiceUnavailable, Message: err.Error()}
		}
		c.Keys = append(c.Keys, containerKey{id, key})
	}
	k.log.Debug("keys made", "master", master, "slave", slave, "number", q.number, "bits", size)
	return c, nil
}

func (k *KME) decKeys(master, slave string, ids []string, fault FaultKind) (answer, *problem) {
	if fault == Late {
		return nil, bad(textNotFound)
	}
	keys, p := k.store.take(master, slave, ids)
	if p != nil {
		return nil, p
	}
	c := new(container)
	for i, key := range keys {
		switch fault {
		case WrongBytes:
			scramble(key)
		case WrongSize:
			clear(key[shrunk/8:])
			key = key[:shrunk/8]
		}
		c.Keys = append(c.Keys, containerKey{ids[i], key})
	}
	k.log.Debug("keys delivered", "master", master, "slave", slave, "number", len(ids))
	return c, nil
}

// problem is an error answer (ETSI GS QKD 014 V1.1.1, 6.5).
type problem struct {
	status  int
	Message string `json:"message"`
	allow   string // methods, of a 405
}

func bad(message string) *problem { return &problem{status: http.StatusBadRequest, Message: message} }

// The texts that the standard gives, and the two others that clients meet most.
const (
	textSize      = "size shall be a multiple of 8"
	textExtension = "not all extension_mandatory parameters are supported"
	textNotFound  = "one or more keys specified are not found on KME"
	textNotNamed  = "the SAE is not one of those named for the keys"
	textNoKeys    = "not enough keys stored"
)

// reply writes an answer and leaves no copy of it behind.
func reply(w http.ResponseWriter, status int, v any) {
	var b []byte
	if c, ok := v.(*container); ok {
		b = c.encode()
		defer clear(b)
	} else {
		var err error
		if b, err = json.Marshal(v); err != nil {
			panic(err) // plain structs do not fail
		}
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Content-Length", strconv.Itoa(len(b)))
	w.WriteHeader(status)
	_, _ = w.Write(b)
}

// encode writes the container without the buffers that encoding/json keeps.
func (c *container) encode() []byte {
	n := 16
	for _, k := range c.Keys {
		n += 32 + 6*len(k.ID) + base64.StdEncoding.EncodedLen(len(k.Key))
	}
	b := append(make([]byte, 0, n), `{"keys":[`...)
	for i, k := range c.Keys {
		if i > 0 {
			b = append(b, ',')
		}
		// IDs are our own UUIDs: nothing in them needs an escape.
		b = append(b, `{"key_ID":"`...)
		b = append(b, k.ID...)
		b = append(b, `","key":"`...)
		b = base64.StdEncoding.AppendEncode(b, k.Key)
		b = append(b, `"}`...)
	}
	return append(b, `]}`...)
}
