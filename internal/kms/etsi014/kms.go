// Package etsi014 speaks to a key management entity by ETSI GS QKD 014
// V1.1.1: JSON over HTTPS with mutual TLS. It owns what a rotator needs of
// that interface (256-bit keys) and what real systems are known
// to get wrong. It never skips the verification of a certificate, follows no
// redirect, and repeats no request for a key whose answer may have been lost:
// delivery removes a key from the KME.
package etsi014

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"time"
	"unicode"
	"unicode/utf8"

	"keyturn/internal/kms"
	"keyturn/internal/kms/kmstls"
)

// Limits of one KMS.
const (
	DefaultTimeout = 5 * time.Second
	MaxTimeout     = time.Minute
	// maxRequests is the number of requests, and connections, under way to one
	// KMS at a time, however many peers use it.
	maxRequests = 16
	maxSAE      = 1024 // bytes: what a message between rotators can carry
	maxURIs     = 16
)

// idleTimeout closes an unused connection before the server does (common
// servers do after 5 s and more): a request written into a connection that
// closes at that moment is lost, and perhaps a key with it.
const idleTimeout = 4 * time.Second

// downTime is how long a URI that could not be reached is tried last.
const downTime = 30 * time.Second

// apiPath follows a KME's host name in every URI (ETSI GS QKD 014 V1.1.1, 5).
const apiPath = "/api/v1/keys"

// Config says where a KMS is and how to prove who we are.
type Config struct {
	// URIs of the KMS, tried in order, with or without /api/v1/keys.
	URIs []string
	// SAE is our own SAE ID. The KMS takes it from the certificate.
	SAE string

	// TLS says how to prove who we are, and what the KMS has to prove.
	TLS kmstls.Config

	// Dial connects to a KMS; nil: over the network.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)

	Method  string        // GET (default) or POST
	Timeout time.Duration // of one request, to the last byte of its answer; DefaultTimeout if zero
}

// KMS is one key management system and the connections to it, shared by the
// sources of all peers.
type KMS struct {
	sae       string
	post      bool
	timeout   time.Duration
	transport *http.Transport
	slots     chan struct{} // one for each request under way

	mu   sync.Mutex // guards uris[i].down
	uris []endpoint
}

type endpoint struct {
	base *url.URL
	name string    // for errors: without /api/v1/keys
	down time.Time // tried last until then
}

// New checks c and reads the files that it names. It does not connect.
func New(c Config) (*KMS, error) {
	k := &KMS{sae: c.SAE, timeout: c.Timeout, slots: make(chan struct{}, maxRequests)}
	if err := checkSAE(c.SAE); err != nil {
		return nil, err
	}
	switch c.Method {
	case "", http.MethodGet:
	case http.MethodPost:
		k.post = true
	default:
		return nil, fmt.Errorf("method %q is neither GET nor POST", c.Method)
	}
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
		e, err := parseURI(uri)
		if err != nil {
			return nil, err
		}
		k.uris = append(k.uris, e)
	}
	conf, err := c.TLS.Client(tls.VersionTLS12)
	if err != nil {
		return nil, err
	}
	if c.Dial == nil {
		c.Dial = (&net.Dialer{Timeout: k.timeout}).DialContext
	}
	k.transport = &http.Transport{
		// No Proxy: the KMS stands in the same trusted site.
		DialContext:            c.Dial,
		TLSClientConfig:        conf,
		TLSHandshakeTimeout:    k.timeout,
		DisableCompression:     true,
		MaxIdleConnsPerHost:    maxRequests,
		MaxConnsPerHost:        maxRequests,
		IdleConnTimeout:        idleTimeout,
		MaxResponseHeaderBytes: 16 << 10,
		Protocols:              new(http.Protocols),
	}
	// HTTP/2 repeats requests by itself.
	k.transport.Protocols.SetHTTP1(true)
	return k, nil
}

// For returns the source of the keys shared with a peer. It costs a few words
// of memory; the connections are those of k.
func (k *KMS) For(peerSAE string) (kms.Source, error) {
	if err := checkSAE(peerSAE); err != nil {
		return nil, err
	}
	if peerSAE == k.sae {
		return nil, fmt.Errorf("SAE %q is our own, not a peer's", peerSAE)
	}
	return newClient(k, peerSAE), nil
}

// Close closes the connections that are not in use. The sources of k are not
// used after it.
func (k *KMS) Close() error {
	k.transport.CloseIdleConnections()
	return nil
}

// checkSAE says why id cannot be an SAE ID, which goes into the path of every
// request.
func checkSAE(id string) error {
	switch {
	case id == "":
		return errors.New("SAE ID is empty")
	case len(id) > maxSAE:
		return fmt.Errorf("SAE ID is %d bytes long, over %d", len(id), maxSAE)
	case id == "." || id == "..":
		// Servers take them for directories, escaped or not.
		return fmt.Errorf("SAE ID %q cannot stand in a URI", id)
	case !printable(id):
		return fmt.Errorf("SAE ID %q is not printable text", id)
	}
	return nil
}

func parseURI(uri string) (endpoint, error) {
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
	name = strings.TrimRight(strings.TrimSuffix(name, apiPath), "/")
	u, err = url.Parse(name)
	if err != nil {
		return endpoint{}, fmt.Errorf("URI %q is malformed", uri)
	}
	return endpoint{base: u, name: name}, nil
}

func printable(s string) bool {
	return utf8.ValidString(s) && strings.IndexFunc(s, func(r rune) bool { return !unicode.IsPrint(r) }) < 0
}

var _ kms.System = (*KMS)(nil)
