package link

import (
	"crypto/ed25519"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"os"
	"slices"
	"strings"
	"syscall"
	"time"

	"filippo.io/mldsa"
)

// SecretSize is the length in bytes of the secret that an identity is made of.
const SecretSize = 32

// textSize is the length of 32 bytes in padded standard base64.
const textSize = 44

// maxIdentityFile bounds what is read of an identity file, so that a wrong
// path is a clear error: an identity and a newline fit many times.
const maxIdentityFile = 512

// Identity is who a rotator is: a 32-byte secret and the Ed25519 and ML-DSA-65
// keys derived from it. It prints as "redacted" for every verb, handler and
// encoder; Secret alone gives the secret away. It is safe for concurrent use.
type Identity struct {
	_           [0]func() // incomparable
	secret      [SecretSize]byte
	ed25519     ed25519.PrivateKey
	mldsa       *mldsa.PrivateKey
	mldsaPublic []byte
	fingerprint Fingerprint
	client      *tls.Config // shared by all connections: at a hub they are many
	server      *tls.Config
}

// GenerateIdentity makes a new identity of SecretSize bytes read from random.
func GenerateIdentity(random io.Reader) (*Identity, error) {
	var secret [SecretSize]byte
	defer clear(secret[:])
	if _, err := io.ReadFull(random, secret[:]); err != nil {
		return nil, fmt.Errorf("read random identity: %w", err)
	}
	return newIdentity(&secret)
}

// ParseIdentity reads what Secret and `keyturn genkey` print: the secret in
// base64, 44 characters, and at most one newline after it. Its errors never
// quote the text.
func ParseIdentity(text string) (*Identity, error) {
	var secret [SecretSize]byte
	defer clear(secret[:])
	if err := decodeText(secret[:], strings.TrimSuffix(text, "\n")); err != nil {
		return nil, fmt.Errorf("identity %w", err)
	}
	return newIdentity(&secret)
}

// ReadIdentityFile reads an identity from a file. A file that its group or
// others can read or change is refused, whatever is in it, and so is anything
// but a regular file (a link to one will do).
func ReadIdentityFile(path string) (*Identity, error) {
	// O_NONBLOCK, or opening a named pipe would wait for its writer.
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("read identity: %w", err)
	}
	defer func() { _ = f.Close() }() // only read

	// The open file is examined, not the path, which may change meanwhile.
	info, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("read identity: %w", err)
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("identity file %q is not a regular file", path)
	}
	if mode := info.Mode().Perm(); mode&0o077 != 0 {
		return nil, fmt.Errorf("identity file %q is open to others (mode %04o); it must be 0600 or stricter", path, mode)
	}
	buf := make([]byte, maxIdentityFile+1)
	defer clear(buf)
	n, err := io.ReadFull(f, buf)
	switch {
	case err == nil:
		return nil, fmt.Errorf("identity file %q is longer than %d bytes", path, maxIdentityFile)
	case !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF):
		return nil, fmt.Errorf("read identity: %w", err)
	}
	id, err := ParseIdentity(string(buf[:n]))
	if err != nil {
		return nil, fmt.Errorf("identity file %q: %w", path, err)
	}
	return id, nil
}

// newIdentity derives the keys. Both seeds come from one secret, so that an
// operator handles 44 characters, as with WireGuard; HKDF keeps them
// independent of each other.
func newIdentity(secret *[SecretSize]byte) (*Identity, error) {
	if subtle.ConstantTimeCompare(secret[:], make([]byte, SecretSize)) == 1 {
		return nil, errors.New("identity is all zeros")
	}
	edSeed, err := hkdf.Key(sha256.New, secret[:], nil, labelEd25519, ed25519.SeedSize)
	if err != nil {
		return nil, fmt.Errorf("derive Ed25519 key: %w", err)
	}
	defer clear(edSeed)
	mldsaSeed, err := hkdf.Key(sha256.New, secret[:], nil, labelMLDSA, mldsa.PrivateKeySize)
	if err != nil {
		return nil, fmt.Errorf("derive ML-DSA key: %w", err)
	}
	defer clear(mldsaSeed)

	id := &Identity{secret: *secret, ed25519: ed25519.NewKeyFromSeed(edSeed)}
	if id.mldsa, err = mldsa.NewPrivateKey(mldsa.MLDSA65(), mldsaSeed); err != nil {
		return nil, fmt.Errorf("derive ML-DSA key: %w", err)
	}
	id.mldsaPublic = id.mldsa.PublicKey().Bytes()
	id.fingerprint = fingerprintOf(id.ed25519.Public().(ed25519.PublicKey), id.mldsaPublic)
	if err := id.configureTLS(); err != nil {
		return nil, err
	}
	return id, nil
}

// certificate makes the self-signed certificate that carries the Ed25519 key
// through TLS. Its common name is the fingerprint: a claim, which tells a
// client with two pins which of them to name in its proof, and which the proof
// must bear out. Everything else in it is filler, the same for everybody.
func (id *Identity) certificate() (tls.Certificate, error) {
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1),
		Subject:      pkix.Name{CommonName: id.fingerprint.String()},
		NotBefore:    time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC),
		NotAfter:     time.Date(9999, 12, 31, 23, 59, 59, 0, time.UTC), // none: RFC 5280, 4.1.2.5
		KeyUsage:     x509.KeyUsageDigitalSignature,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, id.ed25519.Public(), id.ed25519)
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("make certificate: %w", err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: id.ed25519}, nil
}

// Secret returns the secret as text, 44 characters of base64 without a
// newline, for `keyturn genkey` and for nothing else.
func (id *Identity) Secret() string {
	return base64.StdEncoding.EncodeToString(id.secret[:])
}

// Fingerprint returns the public form of the identity.
func (id *Identity) Fingerprint() Fingerprint { return id.fingerprint }

const redacted = "redacted"

// String returns "redacted".
func (id *Identity) String() string { return redacted }

// GoString returns "redacted".
func (id *Identity) GoString() string { return redacted }

// Format writes "redacted" for every verb. It stands on the value so that an
// identity printed as part of another struct is covered as well.
func (id Identity) Format(s fmt.State, _ rune) { _, _ = io.WriteString(s, redacted) }

// LogValue returns "redacted".
func (id Identity) LogValue() slog.Value { return slog.StringValue(redacted) }

// MarshalText returns "redacted"; encoding/json and YAML use it too.
func (id Identity) MarshalText() ([]byte, error) { return []byte(redacted), nil }

// MarshalBinary refuses: gob and its like get no identity either.
func (id Identity) MarshalBinary() ([]byte, error) {
	return nil, errors.New("an identity is not to be encoded")
}

// Fingerprint is the public form of an identity: SHA-256 over the label and
// both public keys, each after its length as a big-endian u32. It is as good
// as the keys themselves, and short enough to be read out over a telephone.
type Fingerprint [sha256.Size]byte

// Pins are the fingerprints that one peer may show: two while its identity is
// being changed, otherwise one.
type Pins []Fingerprint

// Contains reports whether f is among the pins.
func (p Pins) Contains(f Fingerprint) bool { return slices.Contains(p, f) }

func fingerprintOf(ed25519Public, mldsaPublic []byte) Fingerprint {
	var b []byte
	for _, field := range [][]byte{[]byte(labelFingerprint), ed25519Public, mldsaPublic} {
		b = binary.BigEndian.AppendUint32(b, uint32(len(field)))
		b = append(b, field...)
	}
	return sha256.Sum256(b)
}

// ParseFingerprint reads what String and `keyturn pubkey` print: 44 characters
// of base64, nothing before or after.
func ParseFingerprint(text string) (Fingerprint, error) {
	var f Fingerprint
	if err := decodeText(f[:], text); err != nil {
		return Fingerprint{}, fmt.Errorf("fingerprint %w", err)
	}
	if f == (Fingerprint{}) {
		return Fingerprint{}, errors.New("fingerprint is all zeros")
	}
	return f, nil
}

// String returns the fingerprint in base64, 44 characters.
func (f Fingerprint) String() string { return base64.StdEncoding.EncodeToString(f[:]) }

// MarshalText returns what String does.
func (f Fingerprint) MarshalText() ([]byte, error) { return []byte(f.String()), nil }

// UnmarshalText is ParseFingerprint.
func (f *Fingerprint) UnmarshalText(text []byte) (err error) {
	*f, err = ParseFingerprint(string(text))
	return err
}

// decodeText decodes 44 characters of base64 into 32 bytes. Only the canonical
// form is taken, so that each value has one text. Its errors go on after the
// name of what was read, and quote nothing, for it may be a secret.
func decodeText(to []byte, text string) error {
	if len(text) != textSize {
		return fmt.Errorf("is %d characters long, not %d", len(text), textSize)
	}
	b, err := base64.StdEncoding.Strict().DecodeString(text)
	defer clear(b)
	// The decoder skips line breaks, which is how 44 characters can give
	// fewer than 32 bytes.
	if err != nil || len(b) != len(to) || strings.ContainsAny(text, "\r\n") {
		return errors.New("is not base64")
	}
	copy(to, b)
	return nil
}
