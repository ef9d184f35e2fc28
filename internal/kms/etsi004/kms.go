// Package etsi004 speaks to a key management entity by ETSI GS QKD 004 V2.1.1:
// key streams over TLS, in one of the dialects that are in use, for the
// standard leaves the bytes open. It owns the life of the key stream that this
// end and a peer share, through restarts of every party, and the rule that an
// index which may have been delivered is not asked for again. It never guesses
// a dialect and never skips the verification of a certificate.
package etsi004

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"keyturn/internal/kms"
	"keyturn/internal/kms/kmshttp"
	"keyturn/internal/kms/kmstls"
)

// Limits of one KMS.
const (
	DefaultTimeout = kmshttp.DefaultTimeout
	MaxTimeout     = kmshttp.MaxTimeout
	// maxCalls is the number of calls, and connections, under way to one KMS at
	// a time, however many peers use it.
	maxCalls = 16
	// maxLooks is how many of them may be looks at streams: a KMS may take its
	// time over each whose peer is absent.
	maxLooks = maxCalls / 4
	maxSAE   = 1024 // bytes
	maxURIs  = 16
)

// Config says where a KMS is and how to prove who we are.
type Config struct {
	// URIs of the KMS, tried in order: host:port.
	URIs []string
	// SAE names our end of a key stream, and For the other: an ID, or a URI
	// such as qkd://host/application, whatever the KMS knows it by. Where the
	// dialect wants a URI, the ID sae_001 goes as qkd://sae_001. Both ends must
	// configure the same two names.
	SAE string

	// TLS says how to prove who we are, and what the KMS has to prove.
	TLS kmstls.Config

	// Dialect is forge-ed3 or forge-ed1.
	Dialect string

	// Timeout of one call at one URI, from dialling to the last byte of the last
	// answer; DefaultTimeout if zero.
	Timeout time.Duration

	// Dial connects to a KMS; nil: over the network.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
}

// KMS is one key management system and the connections to it, shared by the
// sources of all peers.
type KMS struct {
	sae     string // as it goes over the wire
	dialect *dialect
	timeout time.Duration
	dial    func(ctx context.Context, network, address string) (net.Conn, error)
	slots   chan struct{} // one for each call under way
	looks   chan struct{} // one for each of them that Keep makes
	sources atomic.Int64  // open ones

	mu     sync.Mutex // guards down and idle of uris, and what follows
	uris   []*endpoint
	closed bool
	known  map[streamID]string // the peer that each predefined stream is shared with
}

type endpoint struct {
	address string
	tls     *tls.Config
	down    time.Time // tried last until then
	idle    []*conn   // of a persistent dialect; the newest last
}

var _ kms.System = (*KMS)(nil)

// New checks c and reads the files that it names. It does not connect.
func New(c Config) (*KMS, error) {
	k := &KMS{
		timeout: c.Timeout, dial: c.Dial, known: make(map[streamID]string),
		slots: make(chan struct{}, maxCalls), looks: make(chan struct{}, maxLooks),
	}
	for i := range dialects {
		if dialects[i].name == c.Dialect {
			k.dialect = &dialects[i]
		}
	}
	if k.dialect == nil {
		return nil, fmt.Errorf("dialect %q is neither forge-ed3 nor forge-ed1", c.Dialect)
	}
	var err error
	if k.sae, err = k.dialect.application(c.SAE); err != nil {
		return nil, err
	}
	if k.timeout == 0 {
		k.timeout = DefaultTimeout
	}
	if k.timeout < 0 || k.timeout > MaxTimeout {
		return nil, fmt.Errorf("timeout %v is not between 0 and %v", c.Timeout, MaxTimeout)
	}
	if k.dial == nil {
		k.dial = new(net.Dialer).DialContext
	}
	if len(c.URIs) == 0 || len(c.URIs) > maxURIs {
		return nil, fmt.Errorf("%d URIs, not 1 to %d", len(c.URIs), maxURIs)
	}
	conf, err := c.TLS.Client(tls.VersionTLS12)
	if err != nil {
		return nil, err
	}
	for _, uri := range c.URIs {
		host, err := hostOf(uri)
		if err != nil {
			return nil, err
		}
		e := &endpoint{address: uri, tls: conf.Clone()}
		if e.tls.ServerName == "" {
			e.tls.ServerName = host
		}
		k.uris = append(k.uris, e)
	}
	return k, nil
}

// For returns the source of the keys shared with a peer. It costs some hundred
// bytes of memory; the connections are those of k.
func (k *KMS) For(peerSAE string) (kms.Source, error) {
	peer, err := k.dialect.application(peerSAE)
	if err != nil {
		return nil, err
	}
	if peer == k.sae {
		return nil, fmt.Errorf("SAE %q is our own, not a peer's", peerSAE)
	}
	k.sources.Add(1)
	s := newSource(k, peer)
	k.mu.Lock()
	defer k.mu.Unlock()
	k.known[s.known.id] = peer
	return s, nil
}

// foreign reports whether a stream is the one shared with another peer than
// this. The KMS would not mind: GET_KEY and CLOSE name the stream alone.
func (k *KMS) foreign(id streamID, peer string) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	other, ok := k.known[id]
	return ok && other != peer
}

// Close closes the connections. The sources of k are not used after it.
func (k *KMS) Close() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.closed = true
	for _, e := range k.uris {
		for _, c := range e.idle {
			c.close()
		}
		e.idle = nil
	}
	return nil
}

// application returns an SAE's name as it goes over the wire.
func (d *dialect) application(sae string) (string, error) {
	switch {
	case sae == "":
		return "", errors.New("SAE ID is empty")
	case len(sae) > maxSAE:
		return "", fmt.Errorf("SAE ID is %d bytes long, over %d", len(sae), maxSAE)
	case !kmshttp.Printable(sae):
		return "", fmt.Errorf("SAE ID %q is not printable text", sae)
	case !d.uris:
		return sae, nil
	}
	name := sae
	if !strings.Contains(sae, "://") {
		name = "qkd://" + sae
	}
	u, err := url.Parse(name)
	if err != nil || u.Scheme == "" || u.Host == "" || name != sae && u.Host != sae {
		return "", fmt.Errorf("SAE ID %q is no URI and cannot be made one, as dialect %s wants", sae, d.name)
	}
	return name, nil
}

// hostOf returns the host of host:port.
func hostOf(uri string) (string, error) {
	host, port, err := net.SplitHostPort(uri)
	if err != nil || host == "" {
		return "", fmt.Errorf("URI %q is not host:port", uri)
	}
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
		return "", fmt.Errorf("URI %q has no port from 1 to 65535", uri)
	}
	return host, nil
}
