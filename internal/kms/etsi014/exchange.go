package etsi014

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
	"net/url"
	"time"

	"keyturn/internal/kms"
)

// maxAnswer bounds the body of an answer; a container of one key has some 100
// bytes.
const maxAnswer = 64 << 10

// A request goes to one URI after the other until one of them answers it.
type request struct {
	peer, verb string
	query      string // of a GET
	body       []byte // not nil: a POST
	// once forbids to send the request again when it may have arrived: the key
	// would be gone, and "not found" would be mistaken for the truth.
	once bool
	// means is the sentinel that a status stands for, or nil.
	means func(status int) error

	// lost is set when the request may have arrived and no answer came.
	lost bool
}

// answer is the body of a 200. It may hold a key: wipe it.
type answer struct {
	uri  string
	typ  string // media type
	body []byte
}

// wrong makes the error of an answer that cannot be used.
func (a *answer) wrong(err error) error {
	if a.typ != "application/json" && errors.Is(err, errNotJSON) {
		err = fmt.Errorf("%w but %q", err, a.typ)
	}
	return fmt.Errorf("%s: %w", a.uri, err)
}

// statusError is an answer with another status than 200.
type statusError struct {
	uri    string
	status int
	text   string // its message; foreign
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

// lost reports whether keys may have been delivered all the same: a gateway may
// have lost what the KME behind it gave; only a KME itself says 503.
func (e *statusError) lost() bool {
	return e.status >= 500 && e.status != http.StatusServiceUnavailable
}

// errLate is the cause of a context that ended by the timeout of a request.
var errLate = errors.New("no whole answer in time")

// ask sends r to the URIs in turn and returns the first 200. The error tells
// what each URI said.
func (k *KMS) ask(ctx context.Context, r *request) (*answer, error) {
	if err := k.acquire(ctx); err != nil {
		return nil, err
	}
	defer func() { <-k.slots }()

	var all error
	for _, i := range k.order() {
		e := &k.uris[i]
		a, sent, err := k.roundTrip(ctx, e, r)
		if err == nil {
			k.mark(e, time.Time{})
			return a, nil
		}
		if all == nil {
			all = err
		} else {
			all = fmt.Errorf("%w; %w", all, err)
		}
		if ctx.Err() != nil {
			r.lost = sent
			return nil, all
		}
		se, answered := errors.AsType[*statusError](err)
		r.lost = answered && se.lost() || !answered && sent
		if r.lost || !answered {
			k.mark(e, time.Now().Add(downTime))
		}
		if answered && se.status < 500 || r.lost && r.once {
			return nil, all
		}
	}
	return nil, all
}

// acquire waits for one of the slots, at most as long as a request may take.
// The waiting does not shorten the request's own time: one that is sent with
// little time left loses a key.
func (k *KMS) acquire(ctx context.Context) error {
	select {
	case k.slots <- struct{}{}:
		return nil
	default:
	}
	t := time.NewTimer(k.timeout)
	defer t.Stop()
	select {
	case k.slots <- struct{}{}:
		return nil
	case <-t.C:
		return fmt.Errorf("%s: %d requests under way for %v", k.uris[0].name, maxRequests, k.timeout)
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// order returns the indices of the URIs, those found down last.
func (k *KMS) order() []int {
	k.mu.Lock()
	defer k.mu.Unlock()
	now := time.Now()
	order := make([]int, 0, len(k.uris))
	for _, down := range []bool{false, true} {
		for i := range k.uris {
			if now.Before(k.uris[i].down) == down {
				order = append(order, i)
			}
		}
	}
	return order
}

func (k *KMS) mark(e *endpoint, down time.Time) {
	k.mu.Lock()
	defer k.mu.Unlock()
	e.down = down
}

// roundTrip sends r to one URI. The deadline covers everything from dialling
// to the last byte of the answer. sent says whether the request may have
// arrived.
func (k *KMS) roundTrip(ctx context.Context, e *endpoint, r *request) (a *answer, sent bool, err error) {
	ctx, cancel := context.WithTimeoutCause(ctx, k.timeout, errLate)
	defer cancel()
	traced := httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{
		GotConn: func(httptrace.GotConnInfo) { sent = true },
	})
	// The transport and no http.Client: no redirects, no cookies, and no URL
	// in each error.
	resp, err := k.transport.RoundTrip(r.http(traced, e))
	if err != nil {
		return nil, sent, k.explain(ctx, e, err)
	}
	defer resp.Body.Close()
	body, err := readBody(resp.Body)
	if resp.StatusCode != http.StatusOK {
		// Whatever the body is, the status counts.
		text := errorText(body)
		clear(body)
		return nil, true, &statusError{e.name, resp.StatusCode, text, r.means(resp.StatusCode)}
	}
	if err != nil {
		clear(body)
		return nil, true, k.explain(ctx, e, err)
	}
	typ, _, _ := mime.ParseMediaType(resp.Header.Get("Content-Type"))
	return &answer{e.name, typ, body}, true, nil
}

// http makes the HTTP request for one URI.
func (r *request) http(ctx context.Context, e *endpoint) *http.Request {
	u := *e.base
	u.Path = e.base.Path + apiPath + "/" + r.peer + "/" + r.verb
	u.RawPath = e.base.EscapedPath() + apiPath + "/" + url.PathEscape(r.peer) + "/" + r.verb
	u.RawQuery = r.query
	h := &http.Request{
		Method: http.MethodGet,
		URL:    &u,
		Header: http.Header{"Accept": {"application/json"}, "User-Agent": {"keyturn"}},
		// A body, even an empty one, that cannot be rewound keeps the transport
		// from repeating the request on another connection, as it does with any
		// GET when a kept connection breaks.
		Body: io.NopCloser(bytes.NewReader(r.body)),
	}
	if r.body != nil {
		h.Method = http.MethodPost
		h.ContentLength = int64(len(r.body))
		h.Header.Set("Content-Type", "application/json")
	}
	return h.WithContext(ctx)
}

// explain says in our words why no answer came.
func (k *KMS) explain(ctx context.Context, e *endpoint, err error) error {
	if ctx.Err() != nil {
		err = context.Cause(ctx)
		if errors.Is(err, errLate) {
			err = fmt.Errorf("no answer within %v", k.timeout)
		}
		return fmt.Errorf("%s: %w", e.name, err)
	}
	if cv, ok := errors.AsType[*tls.CertificateVerificationError](err); ok {
		return fmt.Errorf("%w: certificate of %s: %w", kms.ErrRefused, e.name, cv.Err)
	}
	// So crypto/tls names an alert of the other side, mostly because it does
	// not like our certificate. TLS 1.3 servers send it after the handshake.
	if op, ok := errors.AsType[*net.OpError](err); ok && op.Op == "remote error" {
		return fmt.Errorf("%w: TLS alert of %s: %w", kms.ErrRefused, e.name, op.Err)
	}
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("%s: connection closed before the end of the answer", e.name)
	}
	return fmt.Errorf("%s: %w", e.name, err)
}

// errTooLong means that an answer is longer than maxAnswer.
var errTooLong = fmt.Errorf("answer is longer than %d bytes", maxAnswer)

// readBody reads an answer of bounded length and leaves no other copy of it.
// The bytes read so far come with an error, too.
func readBody(r io.Reader) ([]byte, error) {
	b := make([]byte, 0, 1<<10)
	for {
		n, err := r.Read(b[len(b):cap(b)])
		b = b[:len(b)+n]
		switch {
		case len(b) > maxAnswer:
			return b, errTooLong
		case err == io.EOF:
			return b, nil
		case err != nil:
			return b, err
		case len(b) == cap(b):
			grown := make([]byte, len(b), 2*cap(b)+1)
			copy(grown, b)
			clear(b)
			b = grown
		}
	}
}
