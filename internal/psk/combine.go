package psk

import (
	"crypto/hkdf"
	"crypto/sha512"
	"crypto/subtle"
	"errors"
	"fmt"
)

// Combine's errors, for those who tell a source that misbehaves from others.
var (
	// ErrNoSource means that there is nothing to make a key of.
	ErrNoSource = errors.New("no source gave a secret")
	// ErrZero means a secret or key of 32 zero bytes: to WireGuard no
	// pre-shared key at all, and never what a working source gives.
	ErrZero = errors.New("secret is all zero")
)

// Combiner says how one key is made of several secrets. The value is what
// goes over the wire.
type Combiner uint8

// The combiners. With either the key is at least as hard to find as the
// hardest of its secrets.
const (
	XOR        Combiner = iota // "xor", the default
	HKDFSHA384                 // "hkdf-sha384", for those whose rules ask for a KDF
)

// combinerNames are the names in the configuration, by value.
var combinerNames = [...]string{XOR: "xor", HKDFSHA384: "hkdf-sha384"}

// String returns the combiner's name in the configuration.
func (c Combiner) String() string {
	if int(c) < len(combinerNames) {
		return combinerNames[c]
	}
	return fmt.Sprintf("combiner %d", uint8(c))
}

// ParseCombiner returns the combiner of that name.
func ParseCombiner(name string) (Combiner, error) {
	for c, known := range combinerNames {
		if name == known {
			return Combiner(c), nil
		}
	}
	return 0, fmt.Errorf("unknown combiner %q, want xor or hkdf-sha384", name)
}

// combineLabel separates the key derivation from every other use of HKDF.
const combineLabel = "keyturn/1 combine"

// Combine makes one key of the secrets: those of the KEMs in the tunnel's
// order, then that of QKD. It neither keeps nor changes the secrets.
//
// XOR is the exclusive or of all secrets; it does not use the transcript,
// which the digests cover. HKDFSHA384 is the concatenating combiner (CatKDF)
// of ETSI TS 103 744 with the two-step derivation of NIST SP 800-56C, HKDF
// (RFC 5869) with SHA-384:
//
//	secret = u32(32) secret_1 ... u32(32) secret_n
//	salt   = none, which is 48 zero bytes
//	info   = u32(17) "keyturn/1 combine" u32(32) transcript
//	key    = the first 32 bytes of HKDF-Expand(HKDF-Extract(salt, secret), info)
//
// The error is ErrNoSource without any secret, and ErrZero if a secret or the
// key is all zero; the same secret twice under XOR is such a case.
func (c Combiner) Combine(secrets []*Key, transcript [32]byte) (*Key, error) {
	if len(secrets) == 0 {
		return nil, ErrNoSource
	}
	for i, s := range secrets {
		if s == nil || s.IsZero() {
			return nil, fmt.Errorf("secret %d of %d: %w", i+1, len(secrets), ErrZero)
		}
	}
	k := blank()
	switch c {
	case XOR:
		for _, s := range secrets {
			subtle.XORBytes(k.at()[:], k.at()[:], s.read())
		}
	case HKDFSHA384:
		if err := k.derive(secrets, transcript); err != nil {
			return nil, fmt.Errorf("derive key: %w", err)
		}
	default:
		return nil, fmt.Errorf("unknown %v", c)
	}
	if k.IsZero() {
		return nil, fmt.Errorf("key of %d secrets: %w", len(secrets), ErrZero)
	}
	return k, nil
}

func (k *Key) derive(secrets []*Key, transcript [32]byte) error {
	joined := make([]byte, 0, len(secrets)*(4+Size)) // never grows, so that no copy escapes clear
	defer func() { clear(joined) }()
	for _, s := range secrets {
		joined = appendFrame(joined, s.read())
	}
	info := appendFrame(nil, []byte(combineLabel))
	info = appendFrame(info, transcript[:])
	derived, err := hkdf.Key(sha512.New384, joined, nil, string(info), Size)
	if err != nil {
		return err
	}
	copy(k.at()[:], derived)
	clear(derived)
	return nil
}
