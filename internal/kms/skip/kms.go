// Package skip speaks to a key provider by the Secure Key Integration Protocol
// (Cisco SKIP, draft-cisco-skip-02): JSON over HTTPS, keys in hexadecimal. Of
// the ways that the draft has for both ends to prove themselves it takes
// certificates over TLS 1.3, the one that the draft requires; Go has no
// external pre-shared keys for TLS. What SKIP calls a system is a key provider,
// not its client: our SAE ID is the system ID of our key provider, a peer's SAE
// ID that of the peer's.
package skip

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"keyturn/internal/kms"
	"keyturn/internal/kms/kmshttp"
	"keyturn/internal/kms/kmstls"
)

// maxID bounds a system ID in bytes: what a message between rotators can carry.
const maxID = 1024

// Config says where a key provider is and how to prove who we are.
type Config struct {
	// URIs of the key provider, tried in order.
	URIs []string
	// SAE is the system ID of our key provider. It is compared with nothing:
	// providers may call themselves otherwise.
	SAE string
	// TLS says how to prove who we are, and what the KMS has to prove.
	TLS kmstls.Config
	// Timeout of one request, to the last byte of its answer; that of kmshttp
	// if zero.
	Timeout time.Duration
	// Dial connects to a KMS; nil: over the network.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
}

// KMS is one key provider and the connections to it, shared by the sources of
// all peers.
type KMS struct {
	sae  string
	http *kmshttp.Client

	mu   sync.Mutex
	last *capabilities // as last told; nil before
}

var _ kms.System = (*KMS)(nil)

// New checks c and reads the files that it names. It does not connect.
func New(c Config) (*KMS, error) {
	if err := checkID(c.SAE); err != nil {
		return nil, err
	}
	h, err := kmshttp.New(kmshttp.Config{
		URIs: c.URIs, TLS: c.TLS, MinTLS: tls.VersionTLS13, Timeout: c.Timeout, Dial: c.Dial,
	})
	if err != nil {
		return nil, err
	}
	return &KMS{sae: c.SAE, http: h}, nil
}

// For returns the source of the keys shared with a peer. It costs a few words
// of memory; the connections are those of k.
func (k *KMS) For(peerSAE string) (kms.Source, error) {
	if err := checkID(peerSAE); err != nil {
		return nil, err
	}
	if peerSAE == k.sae {
		return nil, fmt.Errorf("SAE %q is our own, not a peer's", peerSAE)
	}
	return &Client{kms: k, peer: peerSAE}, nil
}

// Close closes the connections that are not in use. The sources of k are not
// used after it.
func (k *KMS) Close() error {
	k.http.Close()
	return nil
}

// checkID says why id cannot be a system ID.
func checkID(id string) error {
	switch {
	case id == "":
		return errors.New("SAE ID is empty")
	case len(id) > maxID:
		return fmt.Errorf("SAE ID is %d bytes long, over %d", len(id), maxID)
	case !kmshttp.Printable(id):
		return fmt.Errorf("SAE ID %q is not printable text", id)
	}
	return nil
}
