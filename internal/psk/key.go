// Package psk owns key material: the key that cannot be printed, its
// fingerprint and digests, and the combiners that make one key of several
// secrets. It does no I/O, starts no goroutine, reads no clock and holds no
// lock.
package psk

import (
	"crypto/hmac"
	"crypto/sha256"
	"crypto/subtle"
	"errors"
	"fmt"
	"io"
	"log/slog"
)

// Size is the length of a key in bytes: that of a WireGuard pre-shared key.
const Size = 32

// FingerprintSize is the length of a fingerprint in bytes.
const FingerprintSize = 16

// ErrSize means that bytes offered as a key are not exactly Size of them.
var ErrSize = errors.New("key is not 32 bytes long")

// fingerprintLabel separates fingerprints from every other use of HMAC under a key.
const fingerprintLabel = "keyturn/1 fingerprint"

// Key is a 32-byte secret. It prints as "redacted" for every verb, handler
// and encoder, cannot be compared with ==, and is handed on by pointer; its
// owner wipes it.
//
// The zero Key is the all-zero key, which is no key.
type Key struct {
	// at returns the key's bytes; nil stands for zeros. A closure, because
	// fmt calls no method of an unexported field but prints what it finds
	// there, and follows pointers for a verb that does not fit. Into a
	// closure neither fmt nor reflect can look; nor can == compare one.
	at func() *[Size]byte
}

// blank returns an all-zero key to be written to.
func blank() *Key {
	b := new([Size]byte)
	return &Key{at: func() *[Size]byte { return b }}
}

// read returns the key's bytes for reading.
func (k *Key) read() []byte {
	if k.at == nil {
		return make([]byte, Size)
	}
	return k.at()[:]
}

// New returns a key holding a copy of b, which the caller still owns and
// should wipe. The error is ErrSize.
func New(b []byte) (*Key, error) {
	if len(b) != Size {
		return nil, ErrSize
	}
	k := blank()
	copy(k.at()[:], b)
	return k, nil
}

// Random returns a key read from random.
func Random(random io.Reader) (*Key, error) {
	k := blank()
	if _, err := io.ReadFull(random, k.at()[:]); err != nil {
		return nil, fmt.Errorf("read random key: %w", err)
	}
	return k, nil
}

// Bytes returns the key's own bytes, not a copy, for handing to WireGuard, a
// KEM, or the journal. The caller keeps no reference after the call.
func (k *Key) Bytes() []byte {
	if k.at == nil {
		k.at = blank().at // for what is written to the bytes must stay
	}
	return k.at()[:]
}

// Clone returns an independent copy.
func (k *Key) Clone() *Key {
	c := blank()
	copy(c.at()[:], k.read())
	return c
}

// Wipe overwrites the key with zeros. A nil key is already wiped.
func (k *Key) Wipe() {
	if k != nil && k.at != nil {
		clear(k.at()[:])
	}
}

// IsZero reports, in constant time, whether all bytes are zero: WireGuard's
// way of saying "no pre-shared key", never a usable key.
func (k *Key) IsZero() bool {
	var zero [Size]byte
	return subtle.ConstantTimeCompare(k.read(), zero[:]) == 1
}

// Equal compares in constant time.
func (k *Key) Equal(o *Key) bool {
	return subtle.ConstantTimeCompare(k.read(), o.read()) == 1
}

// Fingerprint names a key without giving anything of it away: the first 16
// bytes of HMAC-SHA-256 under the key over a label.
type Fingerprint [FingerprintSize]byte

// Fingerprint returns the key's fingerprint. The all-zero key, which is no
// key, has the zero fingerprint.
func (k *Key) Fingerprint() Fingerprint {
	var f Fingerprint
	if k.IsZero() {
		return f
	}
	m := hmac.New(sha256.New, k.read())
	m.Write([]byte(fingerprintLabel))
	copy(f[:], m.Sum(nil))
	return f
}

// IsZero reports whether f is the fingerprint of no key.
func (f Fingerprint) IsZero() bool { return f == Fingerprint{} }

// String returns the first eight hex digits, enough to tell keys apart in
// logs and status; "none" stands for no key.
func (f Fingerprint) String() string {
	if f.IsZero() {
		return "none"
	}
	return fmt.Sprintf("%x", f[:4])
}

const redacted = "redacted"

// String returns "redacted".
func (k *Key) String() string { return redacted }

// GoString returns "redacted".
func (k *Key) GoString() string { return redacted }

// Format writes "redacted" for every verb. It stands on the value so that a
// key printed as part of another struct is covered as well.
func (k Key) Format(s fmt.State, _ rune) { _, _ = io.WriteString(s, redacted) }

// LogValue returns "redacted".
func (k *Key) LogValue() slog.Value { return slog.StringValue(redacted) }

// MarshalText returns "redacted".
func (k Key) MarshalText() ([]byte, error) { return []byte(redacted), nil }

// MarshalJSON returns "redacted" as a JSON string.
func (k Key) MarshalJSON() ([]byte, error) { return []byte(`"` + redacted + `"`), nil }

// MarshalBinary refuses: gob and its like get no key either.
func (k Key) MarshalBinary() ([]byte, error) {
	return nil, errors.New("a key is not to be encoded")
}
