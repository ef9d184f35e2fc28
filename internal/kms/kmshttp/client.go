// Package kmshttp carries requests for keys to a key management system over
// HTTPS, whatever interface is spoken above: to one URI after the other, by
// one deadline each, so many at a time. It owns the judgement whether a request
// may have arrived, and never sends one twice that might cost a key: delivery
// removes a key from a KMS. It follows no redirect and knows no interface.
package kmshttp

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"time"

	"keyturn/internal/kms/kmstls"
)

// Limits of one KMS.
const (
	DefaultTimeout = 5 * time.Second
	MaxTimeout     = time.Minute
	// maxRequests is the number of requests, and connections, under way to one
	// KMS at a time, however many peers use it.
	maxRequests = 16
	maxURIs     = 16
	maxAnswer   = 64 << 10 // bytes of a body; one with a key has some 100
	maxHeader   = 16 << 10 // bytes of an answer's header
)

// idleTimeout closes an unused connection before common servers do (after 5 s
// and more): a request written into a connection that closes at that moment is
// lost, and perhaps a key with it.
const idleTimeout = 4 * time.Second

// downTime is how long a URI that could not be reached is tried last.
const downTime = 30 * time.Second

// Config says where a KMS is and how to prove who we are.
type Config struct {
	// URIs of the KMS, tried in order.
	URIs []string
	// API is the path that an interface has on every host, such as
	// /api/v1/keys. A URI may end in it; requests name it.
	API string
	// TLS says how to prove who we are, and what the KMS has to prove.
	TLS kmstls.Config
	// MinTLS is the lowest version that the interface permits.
	MinTLS uint16
	// Timeout of one request, to the last byte of its answer; DefaultTimeout if
	// zero.
	Timeout time.Duration
	// Dial connects to a KMS; nil: over the network.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
}

// Client sends requests to one KMS.
type Client struct {
	timeout   time.Duration
	transport *http.Transport
	slots     chan struct{} // one for each request under way

	mu   sync.Mutex // guards uris[i].down
	uris []endpoint
}

type endpoint struct {
	base *url.URL
	name string    // for errors
	down time.Time // tried last until then
}

// New checks c and reads the files that it names. It does not connect.
func New(c Config) (*Client, error) {
	k := &Client{timeout: c.Timeout, slots: make(chan struct{}, maxRequests)}
	switch {
	case c.Timeout == 0:
		k.timeout = DefaultTimeout
	case c.Timeout < 0 || c.Timeout > MaxTimeout:
		return nil, fmt.Errorf("timeout %v is not between 0 and %v", c.Timeout, MaxTimeout)
	}
	if len(c.URIs) == 0 || len(c.URIs) > maxURIs {
		return nil, fmt.Errorf("%d URIs, not 1 to %d", len(c.URIs), maxURIs)
	}
	for _, uri := range c.URIs {
		e, err := parseURI(uri, c.API)
		if err != nil {
			return nil, err
		}
		k.uris = append(k.uris, e)
	}
	conf, err := c.TLS.Client(c.MinTLS)
	if err != nil {
		return nil, err
	}
	k.transport = Transport(conf, c.Dial, k.timeout)
	return k, nil
}

// Transport returns an HTTP/1.1 transport without a proxy, for a KMS stands in
// the same trusted site, and without HTTP/2, which repeats requests by itself.
// A nil dial is over the network.
//
// On a kept connection net/http logs, by package log, the bytes that follow an
// answer. Where a KMS counts its bytes wrongly, those are a piece of a key: a
// program that uses this has to discard what package log writes.
func Transport(conf *tls.Config, dial func(ctx context.Context, network, address string) (net.Conn, error), timeout time.Duration) *http.Transport {
	if dial == nil {
		dial = (&net.Dialer{Timeout: timeout}).DialContext
	}
	t := &http.Transport{
		DialContext:            dial,
		TLSClientConfig:        conf,
		TLSHandshakeTimeout:    timeout,
		DisableCompression:     true,
		MaxIdleConnsPerHost:    maxRequests,
		MaxConnsPerHost:        maxRequests,
		IdleConnTimeout:        idleTimeout,
		MaxResponseHeaderBytes: maxHeader,
		Protocols:              new(http.Protocols),
	}
	t.Protocols.SetHTTP1(true)
	return t
}

// Close closes the connections that are not in use.
func (c *Client) Close() { c.transport.CloseIdleConnections() }

func parseURI(uri, api string) (endpoint, error) {
	u, err := url.Parse(uri)
	if err != nil {
		return endpoint{}, fmt.Errorf("URI %q is malformed", uri)
	}
	switch {
	case u.Scheme != "https":
		return endpoint{}, fmt.Errorf("URI %q does not begin with https://", uri)
	case u.Hostname() == "":
		return endpoint{}, fmt.Errorf("URI %q names no host", uri)
	case u.User != nil || strings.ContainsAny(uri, "?#"):
		return endpoint{}, fmt.Errorf("URI %q has more than a host and a path", uri)
	}
	name := strings.TrimRight(uri, "/")
	name = strings.TrimRight(strings.TrimSuffix(name, api), "/")
	if u, err = url.Parse(name); err != nil {
		return endpoint{}, fmt.Errorf("URI %q is malformed", uri)
	}
	return endpoint{base: u, name: name}, nil
}

// errTooLong means that an answer is longer than is read of it.
var errTooLong = errors.New("answer is too long")

// ReadBody reads an answer of bounded length and leaves no other copy of it.
// The bytes read so far come with an error, too.
func ReadBody(r io.Reader, most int) ([]byte, error) {
	b := make([]byte, 0, 1<<10)
	for {
		n, err := r.Read(b[len(b):cap(b)])
		b = b[:len(b)+n]
		switch {
		case len(b) > most:
			return b, fmt.Errorf("%w: over %d bytes", errTooLong, most)
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
