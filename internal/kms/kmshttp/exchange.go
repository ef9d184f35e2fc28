package kmshttp

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"mime"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/textproto"
	"net/url"
	"strings"
	"time"

	"keyturn/internal/kms"
)

// firstRetry is the time until a request that came too early is sent again; it
// doubles each time.
const firstRetry = 50 * time.Millisecond

// A Request goes to one URI after the other until one of them answers it.
type Request struct {
	// Path is what follows a URI, without the slashes and escapes.
	Path []string
	// Query is of a GET, encoded.
	Query string
	// Body, where it is not nil, makes the request a POST of JSON.
	Body []byte
	// Means is the sentinel of package kms that a status other than 200 stands
	// for, or nil.
	Means func(status int) error
	// Text finds what a KMS says in the body of such an answer.
	Text func(body []byte) string
	// Once forbids to send the request again when it may have arrived: the key
	// would be gone, and "not found" would be mistaken for the truth.
	Once bool
	// NotYet, where it is not nil, names the statuses by which the KMS says
	// that it does not have the key, which may be on its way: the request is
	// sent again for up to half of the timeout, so that the last one has the
	// other half to be answered.
	NotYet func(status int) bool
}

// Answer is the body of a 200. It may hold a key: wipe it.
type Answer struct {
	uri, mediaType string
	distrust       func()
	Body           []byte
}

// Wrong makes the error of an answer that cannot be used. Whoever gave it is
// tried last for a while, as if there had been none.
func (a *Answer) Wrong(err error) error {
	a.distrust()
	if a.mediaType != "application/json" && errors.Is(err, errNotJSON) {
		err = fmt.Errorf("%w but %q", err, a.mediaType)
	}
	return fmt.Errorf("%s: %w", a.uri, err)
}

// statusError is an answer with another status than 200.
type statusError struct {
	uri    string
	status int
	text   string // foreign
	means  error  // sentinel or nil
}

func (e *statusError) Error() string {
	s := fmt.Sprintf("%s answered %d", e.uri, e.status)
	if e.text != "" {
		s += fmt.Sprintf(" %q", e.text)
	}
	if e.means != nil {
		s = e.means.Error() + ": " + s
	}
	return s
}

func (e *statusError) Unwrap() error { return e.means }

// errLate is the cause of a context that ended by the timeout of a request.
var errLate = errors.New("no whole answer in time")

// Do returns the first 200. The error tells what each URI said.
func (c *Client) Do(ctx context.Context, r *Request) (*Answer, error) {
	began := time.Now()
	for wait := firstRetry; ; wait *= 2 {
		a, lost, err := c.ask(ctx, r)
		if err == nil {
			return a, nil
		}
		se, ok := errors.AsType[*statusError](err)
		early := ok && r.NotYet != nil && r.NotYet(se.status)
		if lost || !early || time.Since(began)+wait > c.timeout/2 {
			return nil, err
		}
		t := time.NewTimer(wait)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return nil, fmt.Errorf("%w, before that: %w", context.Cause(ctx), err)
		}
	}
}

// ask sends r to the URIs in turn. lost says that it may have arrived at the
// last of them and that no answer came.
func (c *Client) ask(ctx context.Context, r *Request) (a *Answer, lost bool, err error) {
	if err := c.acquire(ctx); err != nil {
		return nil, false, err
	}
	defer func() { <-c.slots }()

	var all error
	for _, e := range c.order() {
		a, sent, err := c.roundTrip(ctx, e, r)
		if err == nil {
			c.mark(e, time.Time{})
			return a, false, nil
		}
		if all == nil {
			all = err
		} else {
			all = fmt.Errorf("%w; %w", all, err)
		}
		if ctx.Err() != nil {
			return nil, sent, all
		}
		se, answered := errors.AsType[*statusError](err)
		if answered {
			if se.status < 500 {
				return nil, false, all // the KMS has spoken
			}
			// A gateway may have lost what the KMS behind it delivered; only a
			// KMS itself says 503.
			lost = se.status != http.StatusServiceUnavailable
		} else {
			lost = sent
		}
		if lost || !answered {
			c.mark(e, time.Now().Add(downTime))
		}
		if lost && r.Once {
			break
		}
	}
	return nil, lost, all
}

// acquire waits for one of the slots, at most as long as a request may take.
// The waiting does not shorten the request's own time: one that is sent with
// little time left loses a key.
func (c *Client) acquire(ctx context.Context) error {
	t := time.NewTimer(c.timeout)
	defer t.Stop()
	select {
	case c.slots <- struct{}{}:
		return nil
	case <-t.C:
		return fmt.Errorf("%s: %d requests under way for %v", c.uris[0].name, maxRequests, c.timeout)
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// order returns the URIs, those found down last.
func (c *Client) order() []*endpoint {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := time.Now()
	var up, down []*endpoint
	for i := range c.uris {
		if e := &c.uris[i]; now.Before(e.down) {
			down = append(down, e)
		} else {
			up = append(up, e)
		}
	}
	return append(up, down...)
}

func (c *Client) mark(e *endpoint, down time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	e.down = down
}

// roundTrip sends r to one URI. The deadline covers everything from dialling
// to the last byte of the answer. sent says whether the request may have
// arrived.
func (c *Client) roundTrip(ctx context.Context, e *endpoint, r *Request) (a *Answer, sent bool, err error) {
	ctx, cancel := context.WithTimeoutCause(ctx, c.timeout, errLate)
	defer cancel()
	traced := httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{
		GotConn: func(httptrace.GotConnInfo) { sent = true },
	})
	// The transport and no http.Client: no redirects, no cookies, and no URL
	// in each error.
	resp, err := c.transport.RoundTrip(r.http(traced, e))
	if err != nil {
		return nil, sent, c.explain(ctx, e, err)
	}
	defer resp.Body.Close()
	body, err := ReadBody(resp.Body, maxAnswer)
	if resp.StatusCode != http.StatusOK {
		// Whatever the body is, the status counts.
		text := r.Text(body)
		clear(body)
		return nil, true, &statusError{e.name, resp.StatusCode, text, r.Means(resp.StatusCode)}
	}
	if coding := resp.Header.Get("Content-Encoding"); err == nil && coding != "" && !strings.EqualFold(coding, "identity") {
		err = fmt.Errorf("answer has the content coding %q, which was not asked for", Shown(coding))
	}
	if err != nil {
		clear(body)
		return nil, true, c.explain(ctx, e, err)
	}
	mediaType, _, _ := mime.ParseMediaType(resp.Header.Get("Content-Type"))
	distrust := func() { c.mark(e, time.Now().Add(downTime)) }
	return &Answer{e.name, mediaType, distrust, body}, true, nil
}

// http makes the HTTP request for one URI.
func (r *Request) http(ctx context.Context, e *endpoint) *http.Request {
	u := *e.base
	u.Path = e.base.Path + "/" + strings.Join(r.Path, "/")
	u.RawPath = e.base.EscapedPath()
	for _, segment := range r.Path {
		u.RawPath += "/" + url.PathEscape(segment)
	}
	u.RawQuery = r.Query
	h := &http.Request{
		Method: http.MethodGet,
		URL:    &u,
		Header: http.Header{
			"Accept": {"application/json"}, "User-Agent": {"keyturn"},
			"Accept-Encoding": {"identity"}, // without it any coding would do (RFC 9110, 12.5.3)
		},
		// A body, even an empty one, that cannot be rewound keeps the transport
		// from repeating the request on another connection, as it does with any
		// GET when a kept connection breaks.
		Body: io.NopCloser(bytes.NewReader(r.Body)),
	}
	if r.Body != nil {
		h.Method = http.MethodPost
		h.ContentLength = int64(len(r.Body))
		h.Header.Set("Content-Type", "application/json")
	}
	return h.WithContext(ctx)
}

// explain says in our words why no answer came.
func (c *Client) explain(ctx context.Context, e *endpoint, err error) error {
	if ctx.Err() != nil {
		err = context.Cause(ctx)
		if errors.Is(err, errLate) {
			err = fmt.Errorf("no answer within %v", c.timeout)
		}
	}
	refused, why := Explain(err)
	if refused {
		return fmt.Errorf("%w: %s: %w", kms.ErrRefused, e.name, why)
	}
	return fmt.Errorf("%s: %w", e.name, why)
}

// Explain says in our words why a connection failed, and whether that is a
// refusal: one end does not accept the other's certificate.
func Explain(err error) (refused bool, why error) {
	if cv, ok := errors.AsType[*tls.CertificateVerificationError](err); ok {
		return true, fmt.Errorf("certificate: %w", cv.Err)
	}
	// So crypto/tls names an alert of the other side, mostly because it does
	// not like our certificate. TLS 1.3 servers send it after the handshake.
	if op, ok := errors.AsType[*net.OpError](err); ok && op.Op == "remote error" {
		return true, fmt.Errorf("TLS alert: %w", op.Err)
	}
	// net/http quotes what it does not understand. Where lengths are wrong, that
	// may be a key.
	_, malformed := errors.AsType[textproto.ProtocolError](err)
	if malformed || strings.HasPrefix(err.Error(), "net/http: HTTP/1.x transport connection broken: ") {
		return false, errors.New("answer breaks the rules of HTTP/1.1")
	}
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return false, errors.New("connection closed before the end of the answer")
	}
	return false, err
}
