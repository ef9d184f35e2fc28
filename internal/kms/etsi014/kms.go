// Package etsi014 speaks to a key management entity by ETSI GS QKD 014
// V1.1.1: JSON over HTTPS with mutual TLS. It owns what a rotator needs of
// that interface (256-bit keys) and what real systems are known
// to get wrong. It never skips the verification of a certificate, follows no
// redirect, and repeats no request for a key whose answer may have been lost:
// delivery removes a key from the KME.
package etsi014

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"time"

	"keyturn/internal/kms"
	"keyturn/internal/kms/kmshttp"
	"keyturn/internal/kms/kmstls"
)

// maxSAE bounds an SAE ID in bytes: what a message between rotators can carry.
const maxSAE = 1024

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
	Timeout time.Duration // of one request, to the last byte of its answer; that of kmshttp if zero
}

// KMS is one key management system and the connections to it, shared by the
// sources of all peers.
type KMS struct {
	sae      string
	post     bool
	patience time.Duration // for a request of others, before one's own is sent
	http     *kmshttp.Client
}

// New checks c and reads the files that it names. It does not connect.
func New(c Config) (*KMS, error) {
	if err := checkSAE(c.SAE); err != nil {
		return nil, err
	}
	switch c.Method {
	case "", http.MethodGet, http.MethodPost:
	default:
		return nil, fmt.Errorf("method %q is neither GET nor POST", c.Method)
	}
	h, err := kmshttp.New(kmshttp.Config{
		URIs: c.URIs, API: apiPath, TLS: c.TLS, MinTLS: tls.VersionTLS12, Timeout: c.Timeout, Dial: c.Dial,
	})
	if err != nil {
		return nil, err
	}
	return &KMS{
		sae: c.SAE, post: c.Method == http.MethodPost, http: h,
		patience: cmp.Or(c.Timeout, kmshttp.DefaultTimeout) / 4,
	}, nil
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
	k.http.Close()
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
	case !kmshttp.Printable(id):
		return fmt.Errorf("SAE ID %q is not printable text", id)
	}
	return nil
}

var _ kms.System = (*KMS)(nil)
