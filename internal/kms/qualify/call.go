package qualify

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptrace"
	"net/url"
	"strings"
	"time"

	"keyturn/internal/kms/kmshttp"
	"keyturn/internal/kms/kmstls"
)

// maxBody bounds an answer in bytes: a KMS that ignores limits may send more
// keys than were asked for.
const maxBody = 1 << 20

// side is one end while it is being tested over HTTPS.
type side struct {
	End
	peer      string // SAE ID of the other end
	api       string // path of the interface on every host
	minimum   uint16 // TLS version
	transport *http.Transport
	unheard   int // calls in a row without an answer
}

// overHTTPS runs a test with both ends open; there is nil where c has none.
func overHTTPS(ctx context.Context, c Config, api string, minimum uint16, run func(ctx context.Context, here, there *side)) error {
	if err := c.check(); err != nil {
		return err
	}
	here, err := openEnd(c.Here, c.Peer, api, minimum)
	if err != nil {
		return err
	}
	defer here.close()
	var there *side
	if c.There != nil {
		if there, err = openEnd(*c.There, c.Here.SAE, api, minimum); err != nil {
			return fmt.Errorf("the other end: %w", err)
		}
		defer there.close()
	}
	run(ctx, here, there)
	return ctx.Err()
}

// openEnd reads the files that an end names.
func openEnd(e End, peer, api string, minimum uint16) (*side, error) {
	if e.Timeout == 0 {
		e.Timeout = kmshttp.DefaultTimeout
	}
	e.URI = strings.TrimRight(strings.TrimSuffix(strings.TrimRight(e.URI, "/"), api), "/")
	if u, err := url.Parse(e.URI); err != nil || u.Scheme != "https" || u.Host == "" {
		return nil, fmt.Errorf("URI %q is not https with a host", e.URI)
	}
	conf, err := e.TLS.Client(minimum)
	if err != nil {
		return nil, err
	}
	s := &side{End: e, peer: peer, api: api, minimum: minimum}
	s.transport = kmshttp.Transport(conf, e.Dial, e.Timeout)
	return s, nil
}

func (s *side) close() { s.transport.CloseIdleConnections() }

// dead reports that the KMS was silent so often that asking on would only take
// time.
func (s *side) dead() bool { return s.unheard >= 2 }

// call is one request.
type call struct {
	method string // GET if empty
	path   string // after the URI, escaped
	query  url.Values
	body   string // of a POST
}

// reply is what came of a call. The body may hold keys, which protect nothing.
type reply struct {
	status int
	body   []byte
	tls    *tls.ConnectionState // of the connection that the call made, if it did
	took   time.Duration
	err    error // no answer, and why, in our words
	raw    error // as the transport has it
	// refused: one end does not accept the other's certificate.
	refused bool
}

// ask sends a call as the end's rotator would.
func (s *side) ask(ctx context.Context, c call) reply {
	r := s.send(ctx, s.transport, c)
	if r.err != nil {
		s.unheard++
	} else {
		s.unheard = 0
	}
	return r
}

var errLate = errors.New("no whole answer in time")

func (s *side) send(ctx context.Context, transport *http.Transport, c call) (r reply) {
	began := time.Now()
	defer func() {
		r.took = time.Since(began)
		if r.raw == nil {
			return
		}
		r.refused, r.err = kmshttp.Explain(r.raw)
		if errors.Is(context.Cause(ctx), errLate) {
			r.err = fmt.Errorf("no answer within %v", s.Timeout)
		}
	}()
	ctx, cancel := context.WithTimeoutCause(ctx, s.Timeout, errLate)
	defer cancel()
	ctx = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{
		TLSHandshakeDone: func(state tls.ConnectionState, err error) {
			if err == nil {
				r.tls = &state
			}
		},
	})
	u := s.URI + s.api + c.path
	if c.query != nil {
		u += "?" + c.query.Encode()
	}
	// A body that cannot be rewound keeps net/http from sending it twice.
	req, err := http.NewRequestWithContext(ctx, c.method, u, io.NopCloser(bytes.NewReader([]byte(c.body))))
	if err != nil {
		r.raw = err
		return r
	}
	req.Header.Set("Accept", "application/json")
	req.Header.Set("User-Agent", "keyturn")
	if c.method == http.MethodPost {
		req.ContentLength = int64(len(c.body))
		req.Header.Set("Content-Type", "application/json")
	}
	resp, err := transport.RoundTrip(req)
	if err != nil {
		r.raw = err
		return r
	}
	defer resp.Body.Close()
	r.status = resp.StatusCode
	if r.body, err = kmshttp.ReadBody(resp.Body, maxBody); err != nil {
		r.raw = err
	}
	return r
}

// patiently asks by a key ID as a rotator does: the KMS may hear of a key later
// than the other end asks for it, and is asked again for half of the timeout
// while it plainly says "no".
func (s *side) patiently(ctx context.Context, c call) (r reply, waited time.Duration) {
	for wait := 50 * time.Millisecond; ; wait *= 2 {
		r = s.ask(ctx, c)
		no := r.err == nil && (r.status >= 400 && r.status < 500 || r.status == http.StatusServiceUnavailable)
		if !no || waited+wait > s.Timeout/2 {
			return r, waited
		}
		select {
		case <-time.After(wait):
			waited += wait
		case <-ctx.Done():
			return r, waited
		}
	}
}

// brief says in a few words what came.
func (r reply) brief() string {
	if r.err != nil {
		return r.err.Error()
	}
	text := r.text()
	if text == "" {
		return fmt.Sprintf("answered %d", r.status)
	}
	return fmt.Sprintf("answered %d %q", r.status, text)
}

// text returns what a KMS says in an answer that is none of success.
func (r reply) text() string {
	var e map[string]json.RawMessage
	if r.status == http.StatusOK || json.Unmarshal(r.body, &e) != nil {
		return ""
	}
	for _, name := range []string{"message", "error", "detail"} {
		var text string
		if json.Unmarshal(e[name], &text) == nil && text != "" {
			return kmshttp.Shown(text)
		}
	}
	return ""
}

// ok says why an answer is no success; where it is, it decodes the body.
func (r reply) ok(into any) string {
	if r.err != nil || r.status != http.StatusOK {
		return r.brief()
	}
	if err := kmshttp.Unmarshal(r.body, into); err != nil {
		return err.Error()
	}
	return ""
}

// on returns the line for a call that was made for it.
func (l Line) on(s *side, r reply) Line {
	l.At = s.SAE
	l.Seconds = r.took.Seconds()
	return l
}

// silent adds a line as not tested where asking on would only take time.
func (t *tester) silent(s *side, l Line) bool {
	if s.dead() {
		t.untested(noAnswer, l.at(s.SAE))
	}
	return s.dead()
}

// refused judges a request that has to be refused. Where keyturn needs that,
// any refusal will do; the specification's own status and text, if it has one,
// are for the other rules.
func (t *tester) refused(l Line, r reply, status int, text string) {
	switch {
	case r.err != nil:
		t.line(l, Wrong, "%v", r.err)
	case r.status == status && (text == "" || strings.EqualFold(strings.TrimRight(r.text(), "."), text)),
		l.Needed && r.status >= 400 && r.status < 500:
		t.line(l, Right, "%s", r.brief())
	case r.status == status:
		t.line(l, Wrong, "%s; the text is %q", r.brief(), text)
	default:
		t.line(l, Wrong, "%s, not %d", r.brief(), status)
	}
}

// A probe makes a call that takes no key: with nil as a rotator would, otherwise
// over a connection of its own whose TLS is changed.
type probe func(ctx context.Context, change func(*tls.Config)) reply

// connection judges TLS, and reports whether there is any sense in going on.
func (t *tester) connection(ctx context.Context, sae, clause string, minimum uint16, ask probe) (first reply, on bool) {
	var (
		version = Line{Clause: clause, What: tls.VersionName(minimum) + " or later", Needed: true}.at(sae)
		named   = Line{Clause: clause, What: "the KMS proves itself by its certificate", Needed: true}.at(sae)
		demands = Line{Clause: clause, What: "nothing without a client certificate", Needed: true}.at(sae)
		old     = Line{Clause: clause, What: "TLS 1.1 is refused"}.at(sae)
	)
	first = ask(ctx, nil)
	version.Seconds = first.took.Seconds()
	if cv, ok := errors.AsType[*tls.CertificateVerificationError](first.raw); ok {
		t.line(version, Right, "")
		detail := first.err.Error()
		if len(cv.UnverifiedCertificates) > 0 {
			detail += "; it is " + describe(cv.UnverifiedCertificates[0])
		}
		t.line(named, Wrong, "%s", detail)
		t.untested("no connection", demands, old)
		return first, false
	}
	if first.tls == nil {
		problem := "no TLS"
		if first.err != nil {
			problem = first.err.Error()
		}
		t.line(version, Wrong, "%s", problem)
		t.untested("no connection", named, demands, old)
		return first, false
	}
	t.line(version, Right, "%s, %s", tls.VersionName(first.tls.Version), tls.CipherSuiteName(first.tls.CipherSuite))
	t.line(named, Right, "%s", describe(first.tls.PeerCertificates[0]))

	if first.refused {
		// TLS 1.3 servers refuse a client's certificate after the handshake.
		t.line(Line{Clause: clause, What: "our certificate is accepted", Needed: true}.at(sae), Wrong, "%v", first.err)
		t.untested("no connection", demands, old)
		return first, false
	}
	if first.err != nil {
		t.untested(first.err.Error(), demands, old)
		return first, true
	}

	r := ask(ctx, func(c *tls.Config) { c.Certificates, c.GetClientCertificate = nil, nil })
	demands.Seconds = r.took.Seconds()
	switch {
	case r.err != nil: // an alert, or whatever is left of the connection after it
		t.line(demands, Right, "no connection")
	case r.status >= 400 && r.status < 500:
		t.line(demands, Right, "%s", r.brief())
	default:
		t.line(demands, Wrong, "%s", r.brief())
	}
	r = ask(ctx, func(c *tls.Config) { c.MinVersion, c.MaxVersion = tls.VersionTLS10, tls.VersionTLS11 })
	if old.Seconds = r.took.Seconds(); r.tls != nil {
		t.line(old, Wrong, "%s is accepted", tls.VersionName(r.tls.Version))
	} else {
		t.line(old, Right, "no connection")
	}
	return first, true
}

// probe makes a probe of a call.
func (s *side) probe(c call) probe {
	return func(ctx context.Context, change func(*tls.Config)) reply {
		if change == nil {
			return s.ask(ctx, c)
		}
		conf, err := s.TLS.Client(s.minimum)
		if err != nil {
			return reply{err: err}
		}
		change(conf)
		transport := kmshttp.Transport(conf, s.Dial, s.Timeout)
		defer transport.CloseIdleConnections()
		return s.send(ctx, transport, c)
	}
}

// describe says whose a certificate is, and its pin.
func describe(c *x509.Certificate) string {
	var names []string
	for _, n := range c.DNSNames {
		names = append(names, kmshttp.Shown(n))
	}
	for _, ip := range c.IPAddresses {
		names = append(names, ip.String())
	}
	of := "no subject alternative name: give server_name or pin"
	if len(names) > 0 {
		of = "for " + strings.Join(names[:min(len(names), 3)], ", ")
		if len(names) > 3 {
			of += fmt.Sprintf(" and %d more", len(names)-3)
		}
	}
	return fmt.Sprintf("%q, %s; until %s; pin %s", kmshttp.Shown(c.Subject.CommonName), of, c.NotAfter.UTC().Format(time.DateOnly), kmstls.PinOf(c))
}
