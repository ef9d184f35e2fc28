// Package kem gives the key encapsulation mechanisms by name: ML-KEM-512,
// ML-KEM-768 and ML-KEM-1024 of FIPS 203. It draws no randomness of its own,
// accepts whatever bytes a peer may send without panicking, and knows nothing
// of what the secrets are for.
package kem

import (
	"fmt"
	"io"
	"strings"

	"keyturn/internal/psk"
)

// A Scheme is a key encapsulation mechanism.
type Scheme interface {
	// Name returns the name in the configuration, such as "ML-KEM-1024".
	Name() string
	// EncapsulationKeySize and CiphertextSize return sizes in bytes.
	EncapsulationKeySize() int
	CiphertextSize() int
	// GenerateKey returns a fresh key pair made of what random gives.
	GenerateKey(random io.Reader) (DecapsulationKey, error)
	// Encapsulate makes a secret of what random gives, and the ciphertext
	// that carries it to the holder of ek's other half. An ek that is not a
	// valid encapsulation key of the scheme is an error.
	Encapsulate(random io.Reader, ek []byte) (secret *psk.Key, ciphertext []byte, err error)
}

// A DecapsulationKey is the secret half of a key pair. Its owner wipes it.
type DecapsulationKey interface {
	// EncapsulationKey returns the public half, which the caller may keep.
	EncapsulationKey() []byte
	// Decapsulate returns the secret that a ciphertext carries. A ciphertext
	// made for another key, or changed on the way, gives no error but
	// another secret: only a digest of the secret can tell.
	Decapsulate(ciphertext []byte) (*psk.Key, error)
	// Wipe forgets the key; it decapsulates no more.
	Wipe()
}

// Names returns the names of all schemes, the weakest first.
func Names() []string {
	names := make([]string, len(schemes))
	for i, s := range schemes {
		names[i] = s.Name()
	}
	return names
}

// Lookup returns the scheme of that exact name. The error of another name
// lists the known ones, and suggests the one that only its spelling is off.
func Lookup(name string) (Scheme, error) {
	for _, s := range schemes {
		if s.Name() == name {
			return s, nil
		}
	}
	for _, known := range Names() {
		if letters(known) == letters(name) {
			return nil, fmt.Errorf("unknown KEM %q, did you mean %s?", name, known)
		}
	}
	return nil, fmt.Errorf("unknown KEM %q, known are %s", name, strings.Join(Names(), ", "))
}

// letters returns the letters and digits of a name, in lower case.
func letters(name string) string {
	return strings.Map(func(r rune) rune {
		if '0' <= r && r <= '9' || 'a' <= r && r <= 'z' {
			return r
		}
		return -1
	}, strings.ToLower(name))
}
