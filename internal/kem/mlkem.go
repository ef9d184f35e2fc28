package kem

import (
	"bytes"
	"fmt"
	"io"

	"github.com/cloudflare/circl/kem/mlkem/mlkem1024"
	"github.com/cloudflare/circl/kem/mlkem/mlkem512"
	"github.com/cloudflare/circl/kem/mlkem/mlkem768"

	"keyturn/internal/psk"
)

// schemes are all KEMs, the weakest first. CIRCL rather than crypto/mlkem: it
// has ML-KEM-512, and is several times faster (see the benchmarks).
var schemes = [...]Scheme{
	mlkem[mlkem512.PublicKey, mlkem512.PrivateKey, *mlkem512.PublicKey, *mlkem512.PrivateKey]{
		name: "ML-KEM-512", ekSize: mlkem512.PublicKeySize, ciphertextSize: mlkem512.CiphertextSize,
		newKey: mlkem512.NewKeyFromSeed,
	},
	mlkem[mlkem768.PublicKey, mlkem768.PrivateKey, *mlkem768.PublicKey, *mlkem768.PrivateKey]{
		name: "ML-KEM-768", ekSize: mlkem768.PublicKeySize, ciphertextSize: mlkem768.CiphertextSize,
		newKey: mlkem768.NewKeyFromSeed,
	},
	mlkem[mlkem1024.PublicKey, mlkem1024.PrivateKey, *mlkem1024.PublicKey, *mlkem1024.PrivateKey]{
		name: "ML-KEM-1024", ekSize: mlkem1024.PublicKeySize, ciphertextSize: mlkem1024.CiphertextSize,
		newKey: mlkem1024.NewKeyFromSeed,
	},
}

// Sizes in bytes that all parameter sets share (FIPS 203, 7.1 and 7.2).
const (
	keySeedSize           = 64 // d and z
	encapsulationSeedSize = 32 // m
)

// The part of CIRCL's key types that is used here. Their methods panic on
// wrong sizes, which are therefore checked before.
type (
	public[P any] interface {
		*P
		Pack(buf []byte)
		// Unpack makes the encapsulation key check of FIPS 203, 7.2.
		Unpack(buf []byte) error
		EncapsulateTo(ciphertext, secret, seed []byte)
	}
	private[S any] interface {
		*S
		DecapsulateTo(secret, ciphertext []byte)
	}
)

// mlkem is a parameter set of ML-KEM.
type mlkem[P, S any, PP public[P], PS private[S]] struct {
	name                   string
	ekSize, ciphertextSize int
	newKey                 func(seed []byte) (PP, PS)
}

func (m mlkem[P, S, PP, PS]) Name() string              { return m.name }
func (m mlkem[P, S, PP, PS]) EncapsulationKeySize() int { return m.ekSize }
func (m mlkem[P, S, PP, PS]) CiphertextSize() int       { return m.ciphertextSize }

func (m mlkem[P, S, PP, PS]) GenerateKey(random io.Reader) (DecapsulationKey, error) {
	var seed [keySeedSize]byte
	defer clear(seed[:])
	if _, err := io.ReadFull(random, seed[:]); err != nil {
		return nil, fmt.Errorf("%s: read seed: %w", m.name, err)
	}
	ek, dk := m.newKey(seed[:])
	packed := make([]byte, m.ekSize)
	ek.Pack(packed)
	return &mlkemKey{
		name: m.name, ciphertextSize: m.ciphertextSize, ek: packed,
		decapsulate: dk.DecapsulateTo,
		erase:       func() { *dk = *new(S) },
	}, nil
}

func (m mlkem[P, S, PP, PS]) Encapsulate(random io.Reader, ek []byte) (*psk.Key, []byte, error) {
	if len(ek) != m.ekSize {
		return nil, nil, fmt.Errorf("%s: encapsulation key of %d bytes, want %d", m.name, len(ek), m.ekSize)
	}
	peer := PP(new(P))
	if err := peer.Unpack(ek); err != nil {
		return nil, nil, fmt.Errorf("%s: invalid encapsulation key: %w", m.name, err)
	}
	var seed [encapsulationSeedSize]byte
	defer clear(seed[:])
	if _, err := io.ReadFull(random, seed[:]); err != nil {
		return nil, nil, fmt.Errorf("%s: read seed: %w", m.name, err)
	}
	secret := new(psk.Key)
	ciphertext := make([]byte, m.ciphertextSize)
	peer.EncapsulateTo(ciphertext, secret.Bytes(), seed[:])
	return secret, ciphertext, nil
}

// mlkemKey is a decapsulation key of ML-KEM. The key proper is in the two
// closures, where nothing that prints a value can look.
type mlkemKey struct {
	name           string
	ciphertextSize int
	ek             []byte
	decapsulate    func(secret, ciphertext []byte) // nil: wiped
	erase          func()
}

func (k *mlkemKey) EncapsulationKey() []byte { return bytes.Clone(k.ek) }

func (k *mlkemKey) Decapsulate(ciphertext []byte) (*psk.Key, error) {
	if k.decapsulate == nil {
		return nil, fmt.Errorf("%s: decapsulation key is wiped", k.name)
	}
	if len(ciphertext) != k.ciphertextSize {
		return nil, fmt.Errorf("%s: ciphertext of %d bytes, want %d", k.name, len(ciphertext), k.ciphertextSize)
	}
	secret := new(psk.Key)
	k.decapsulate(secret.Bytes(), ciphertext)
	return secret, nil
}

// Wipe drops the key and overwrites what CIRCL lets others overwrite: z, the
// seed of implicit rejection. The vector s is left to the garbage collector.
func (k *mlkemKey) Wipe() {
	if k.decapsulate != nil {
		k.erase()
		k.decapsulate, k.erase = nil, nil
	}
}
