// Package kms owns what a rotator wants of a key management system: the
// Source interface, what a KMS says about itself, and the errors on which
// callers branch. The packages below it speak to real systems; Fake stands in
// for a pair of them in tests. This package does no I/O.
package kms

import (
	"context"
	"errors"
	"fmt"

	"keyturn/internal/psk"
)

// MaxKeyID is the length in bytes of the longest key ID that is accepted: what
// a message between rotators can carry.
const MaxKeyID = 1024

// Errors on which callers branch. Every other error of a Source means that the
// call failed for now: the KMS was not reached or answered nonsense.
var (
	// ErrNoKeys means that the KMS has no key now: try later.
	ErrNoKeys = errors.New("kms has no key now")
	// ErrUnknownKey means that the KMS does not have the key ID (yet).
	ErrUnknownKey = errors.New("kms does not know this key ID")
	// ErrRefused means that asking again cannot help before the configuration
	// or the authorisation of either side changes.
	ErrRefused = errors.New("kms refuses")
)

// A Source hands out the keys that a QKD network shares between this end and
// one peer. A key is delivered once to each end: a key that was asked for and
// did not arrive is lost. The methods may be called concurrently and end when
// their context does; the caller owns the keys and wipes them.
type Source interface {
	// Key returns a fresh key and its ID (master side). Errors: ErrNoKeys,
	// ErrRefused.
	Key(ctx context.Context) (id string, key *psk.Key, err error)
	// KeyByID returns the key that the peer was given under id (slave side).
	// Errors: ErrUnknownKey, ErrRefused. After any other error the key may be
	// lost: abandon it.
	KeyByID(ctx context.Context, id string) (*psk.Key, error)
	// Status asks the KMS about itself and takes no key.
	Status(ctx context.Context) (Status, error)
	// Close frees what belongs to this source alone. No call follows it.
	Close() error
}

// A Keeper is a Source with something that must be open at both ends before the
// first key can flow. Whoever runs the source calls Keep once.
type Keeper interface {
	// Keep keeps it open until ctx ends.
	Keep(ctx context.Context)
}

// A System is one key management system as one SAE of ours sees it: it opens
// the sources of the keys shared with each peer, which share its connections.
type System interface {
	// For returns the source of the keys shared with a peer's SAE. It does not
	// connect.
	For(peerSAE string) (Source, error)
	// Close closes the connections. The sources are not used after it.
	Close() error
}

// Status is what a KMS says about itself. It may be wrong: show it, and let
// nothing but convenience hang on it. A number is 0 where the KMS says nothing,
// nonsense, or 0, which many say whatever is true; a text is empty then. The
// texts are foreign, printable, and cut off after 200 bytes.
type Status struct {
	SourceKME         string // where we ask
	TargetKME         string // where the peer asks
	MasterSAE         string // us, as the KMS knows us
	SlaveSAE          string // the peer
	KeySize           int64  // bits, unless asked otherwise
	MinKeySize        int64  // bits
	MaxKeySize        int64  // bits
	StoredKeys        int64  // ready for delivery to this pair of SAEs
	MaxKeys           int64  // that it stores for them
	MaxKeysPerRequest int64
	MaxSAEs           int64 // further slaves for one key; here 0 is common, and true
	PeerAbsent        bool  // the peer's application has not connected to its KME yet
}

// CheckKeyID says why id is not a key ID that can be asked for: it has 1 to
// MaxKeyID bytes, all of them printable ASCII.
func CheckKeyID(id string) error {
	switch {
	case id == "":
		return errors.New("key ID is empty")
	case len(id) > MaxKeyID:
		return fmt.Errorf("key ID is %d bytes long, over %d", len(id), MaxKeyID)
	}
	for i := range len(id) {
		if id[i] < ' ' || id[i] > '~' {
			return fmt.Errorf("key ID has the unprintable byte %#02x at offset %d", id[i], i)
		}
	}
	return nil
}
