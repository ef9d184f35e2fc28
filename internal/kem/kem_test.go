package kem

import (
	"bytes"
	standardlib "crypto/mlkem"
	"crypto/rand"
	"crypto/sha256"
	"crypto/sha3"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"testing"

	"keyturn/internal/psk"
)

func lookup(t testing.TB, name string) Scheme {
	t.Helper()
	s, err := Lookup(name)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func generate(t testing.TB, s Scheme, random io.Reader) DecapsulationKey {
	t.Helper()
	dk, err := s.GenerateKey(random)
	if err != nil {
		t.Fatal(err)
	}
	return dk
}

func TestLookup(t *testing.T) {
	want := []string{"ML-KEM-512", "ML-KEM-768", "ML-KEM-1024"}
	if !slices.Equal(Names(), want) {
		t.Errorf("names %v, want %v", Names(), want)
	}
	for _, name := range want {
		if s := lookup(t, name); s.Name() != name {
			t.Errorf("%s gives %s", name, s.Name())
		}
	}
	for _, tt := range []struct{ name, want string }{
		{"mlkem1024", `unknown KEM "mlkem1024", did you mean ML-KEM-1024?`},
		{"ML-KEM1024", `unknown KEM "ML-KEM1024", did you mean ML-KEM-1024?`},
		{"ml_kem 768", `unknown KEM "ml_kem 768", did you mean ML-KEM-768?`},
		{"ML-KEM-512 ", `unknown KEM "ML-KEM-512 ", did you mean ML-KEM-512?`},
		{"", `unknown KEM "", known are ML-KEM-512, ML-KEM-768, ML-KEM-1024`},
		{"Kyber\n1024", `unknown KEM "Kyber\n1024", known are ML-KEM-512, ML-KEM-768, ML-KEM-1024`},
	} {
		if s, err := Lookup(tt.name); s != nil || err == nil || err.Error() != tt.want {
			t.Errorf("got %v\nwant %s", err, tt.want)
		}
	}
}

// FIPS 203, table 3.
func TestSizes(t *testing.T) {
	for name, want := range map[string][2]int{"ML-KEM-512": {800, 768}, "ML-KEM-768": {1184, 1088}, "ML-KEM-1024": {1568, 1568}} {
		s := lookup(t, name)
		if got := [2]int{s.EncapsulationKeySize(), s.CiphertextSize()}; got != want {
			t.Errorf("%s: sizes %v, want %v", name, got, want)
		}
	}
}

func TestAgreement(t *testing.T) {
	for _, name := range Names() {
		t.Run(name, func(t *testing.T) {
			s := lookup(t, name)
			dk := generate(t, s, rand.Reader)
			sent, ciphertext, err := s.Encapsulate(rand.Reader, dk.EncapsulationKey())
			if err != nil {
				t.Fatal(err)
			}
			received, err := dk.Decapsulate(ciphertext)
			if err != nil {
				t.Fatal(err)
			}
			if !sent.Equal(received) || sent.IsZero() {
				t.Error("the ends have different secrets, or none")
			}

			again, _, err := s.Encapsulate(rand.Reader, dk.EncapsulationKey())
			if err != nil || again.Equal(sent) {
				t.Errorf("two encapsulations give one secret, %v", err)
			}
			dk.EncapsulationKey()[0]++
			if _, _, err := s.Encapsulate(rand.Reader, dk.EncapsulationKey()); err != nil {
				t.Errorf("the key changed with its copy: %v", err)
			}
			dk.Wipe()
			dk.Wipe()
			if k, err := dk.Decapsulate(ciphertext); k != nil || err == nil || err.Error() != name+": decapsulation key is wiped" {
				t.Errorf("after wiping: %v", err)
			}
		})
	}
}

// The randomness is the argument's and nothing else's: simulations repeat.
func TestDeterministic(t *testing.T) {
	for _, name := range Names() {
		s := lookup(t, name)
		run := func(seed byte) (psk.Fingerprint, [32]byte) {
			random := bytes.NewReader(bytes.Repeat([]byte{seed}, keySeedSize+encapsulationSeedSize))
			dk := generate(t, s, random)
			k, ciphertext, err := s.Encapsulate(random, dk.EncapsulationKey())
			if err != nil || random.Len() != 0 {
				t.Fatalf("%s: %v, %d bytes unread", name, err, random.Len())
			}
			return k.Fingerprint(), sha256.Sum256(ciphertext)
		}
		k1, c1 := run(1)
		if k2, c2 := run(1); k1 != k2 || c1 != c2 {
			t.Errorf("%s: one seed, two outcomes", name)
		}
		if k3, c3 := run(3); k1 == k3 || c1 == c3 {
			t.Errorf("%s: two seeds, one outcome", name)
		}
	}
}

func TestBadInput(t *testing.T) {
	for _, name := range Names() {
		t.Run(name, func(t *testing.T) {
			s := lookup(t, name)
			dk := generate(t, s, rand.Reader)
			for _, n := range []int{0, 1, s.EncapsulationKeySize() - 1, s.EncapsulationKeySize() + 1, 1 << 16} {
				want := fmt.Sprintf("%s: encapsulation key of %d bytes, want %d", name, n, s.EncapsulationKeySize())
				if k, c, err := s.Encapsulate(rand.Reader, make([]byte, n)); k != nil || c != nil || err == nil || err.Error() != want {
					t.Errorf("got %v, want %s", err, want)
				}
			}
			for _, n := range []int{0, 1, s.CiphertextSize() - 1, s.CiphertextSize() + 1, 1 << 16} {
				want := fmt.Sprintf("%s: ciphertext of %d bytes, want %d", name, n, s.CiphertextSize())
				if k, err := dk.Decapsulate(make([]byte, n)); k != nil || err == nil || err.Error() != want {
					t.Errorf("got %v, want %s", err, want)
				}
			}
			// FIPS 203, 7.2: a coefficient of 12 bits must be below q = 3329,
			// wherever it stands.
			const q = 3329
			for _, at := range []int{0, s.EncapsulationKeySize() - 32 - 3} {
				for _, c := range []int{q, q + 1, 0xfff} {
					ek := dk.EncapsulationKey()
					ek[at], ek[at+1] = byte(c), ek[at+1]&0xf0|byte(c>>8)
					if k, _, err := s.Encapsulate(rand.Reader, ek); k != nil || err == nil {
						t.Errorf("a coefficient of %d at byte %d was accepted", c, at)
					}
				}
				ek := dk.EncapsulationKey()
				ek[at], ek[at+1] = (q-1)&0xff, ek[at+1]&0xf0|(q-1)>>8
				if _, _, err := s.Encapsulate(rand.Reader, ek); err != nil {
					t.Errorf("a coefficient of q-1 at byte %d: %v", at, err)
				}
			}
			for n := range keySeedSize {
				if dk, err := s.GenerateKey(bytes.NewReader(make([]byte, n))); dk != nil || !(errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, io.EOF)) {
					t.Errorf("key of %d random bytes: %v", n, err)
				}
			}
			if k, _, err := s.Encapsulate(bytes.NewReader(make([]byte, encapsulationSeedSize-1)), dk.EncapsulationKey()); k != nil || !errors.Is(err, io.ErrUnexpectedEOF) {
				t.Errorf("encapsulation with too few random bytes: %v", err)
			}
		})
	}
}

// A ciphertext that was tampered with gives SHAKE256(z, c), FIPS 203,
// algorithm 18: another secret, the same each time, and no error.
func TestImplicitRejection(t *testing.T) {
	for _, name := range Names() {
		s := lookup(t, name)
		seed := make([]byte, keySeedSize)
		_, _ = rand.Read(seed)
		dk := generate(t, s, bytes.NewReader(seed))
		sent, ciphertext, err := s.Encapsulate(rand.Reader, dk.EncapsulationKey())
		if err != nil {
			t.Fatal(err)
		}
		ciphertext[len(ciphertext)/2] ^= 1
		got, err := dk.Decapsulate(ciphertext)
		if err != nil {
			t.Fatal(err)
		}
		want, err := psk.New(sha3.SumSHAKE256(append(seed[32:], ciphertext...), 32))
		if err != nil {
			t.Fatal(err)
		}
		if got.Equal(sent) || !got.Equal(want) {
			t.Errorf("%s: a changed ciphertext is not rejected as the standard says", name)
		}
	}
}

// standard is the part of crypto/mlkem's types that the tests use.
type standard struct {
	newDK  func(seed []byte) (crypto, error)
	newEK  func(ek []byte) (encapsulator, error)
	random func() (crypto, error)
}

// encapsulator is an encapsulation key of crypto/mlkem.
type encapsulator interface {
	Encapsulate() (secret, ciphertext []byte)
}

// crypto is a decapsulation key of crypto/mlkem.
type crypto struct {
	ek          []byte
	decapsulate func([]byte) ([]byte, error)
}

func standards() map[string]standard {
	wrap768 := func(dk *standardlib.DecapsulationKey768, err error) (crypto, error) {
		if err != nil {
			return crypto{}, err
		}
		return crypto{dk.EncapsulationKey().Bytes(), dk.Decapsulate}, nil
	}
	wrap1024 := func(dk *standardlib.DecapsulationKey1024, err error) (crypto, error) {
		if err != nil {
			return crypto{}, err
		}
		return crypto{dk.EncapsulationKey().Bytes(), dk.Decapsulate}, nil
	}
	return map[string]standard{
		"ML-KEM-768": {
			newDK:  func(seed []byte) (crypto, error) { return wrap768(standardlib.NewDecapsulationKey768(seed)) },
			newEK:  func(ek []byte) (encapsulator, error) { return standardlib.NewEncapsulationKey768(ek) },
			random: func() (crypto, error) { return wrap768(standardlib.GenerateKey768()) },
		},
		"ML-KEM-1024": {
			newDK:  func(seed []byte) (crypto, error) { return wrap1024(standardlib.NewDecapsulationKey1024(seed)) },
			newEK:  func(ek []byte) (encapsulator, error) { return standardlib.NewEncapsulationKey1024(ek) },
			random: func() (crypto, error) { return wrap1024(standardlib.GenerateKey1024()) },
		},
	}
}

// same compares a secret of this package with one of the standard library.
func same(t *testing.T, k *psk.Key, std []byte) {
	t.Helper()
	want, err := psk.New(std)
	if err != nil {
		t.Fatal(err)
	}
	if !k.Equal(want) {
		t.Error("the secrets differ")
	}
}

func TestInteroperatesWithStandardLibrary(t *testing.T) {
	for name, std := range standards() {
		t.Run(name, func(t *testing.T) {
			s := lookup(t, name)

			seed := make([]byte, keySeedSize)
			_, _ = rand.Read(seed)
			ours := generate(t, s, bytes.NewReader(seed))
			twin, err := std.newDK(seed)
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(ours.EncapsulationKey(), twin.ek) {
				t.Fatal("one seed, two encapsulation keys")
			}

			// Theirs to ours.
			ek, err := std.newEK(ours.EncapsulationKey())
			if err != nil {
				t.Fatal(err)
			}
			secret, ciphertext := ek.Encapsulate()
			got, err := ours.Decapsulate(ciphertext)
			if err != nil {
				t.Fatal(err)
			}
			same(t, got, secret)

			// Ours to theirs.
			theirs, err := std.random()
			if err != nil {
				t.Fatal(err)
			}
			k, ciphertext, err := s.Encapsulate(rand.Reader, theirs.ek)
			if err != nil {
				t.Fatal(err)
			}
			if secret, err = theirs.decapsulate(ciphertext); err != nil {
				t.Fatal(err)
			}
			same(t, k, secret)

			// Rejection is the same too.
			ciphertext[7] ^= 0x80
			if got, err = ours.Decapsulate(ciphertext); err != nil {
				t.Fatal(err)
			}
			if secret, err = twin.decapsulate(ciphertext); err != nil {
				t.Fatal(err)
			}
			same(t, got, secret)
		})
	}
}

func TestKnownAnswers(t *testing.T) {
	data, err := os.ReadFile("testdata/acvp.txt")
	if err != nil {
		t.Fatal(err)
	}
	unhex := func(s string) []byte {
		b, err := hex.DecodeString(s)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	sum := func(b []byte) string { return fmt.Sprintf("%x", sha256.Sum256(b)) }
	cases := map[string]int{}
	for line := range strings.Lines(string(data)) {
		if strings.HasPrefix(line, "#") {
			continue
		}
		f := strings.Fields(line)
		s := lookup(t, f[1])
		cases[f[0]+" "+f[1]]++
		switch f[0] {
		case "keygen":
			dk := generate(t, s, io.MultiReader(bytes.NewReader(unhex(f[3])), bytes.NewReader(unhex(f[4]))))
			if got := sum(dk.EncapsulationKey()); got != f[5] {
				t.Errorf("%s %s: another encapsulation key", f[1], f[2])
			}
		case "encapsulate":
			k, ciphertext, err := s.Encapsulate(bytes.NewReader(unhex(f[3])), unhex(f[4]))
			if err != nil {
				t.Fatal(err)
			}
			if sum(ciphertext) != f[5] {
				t.Errorf("%s %s: another ciphertext", f[1], f[2])
			}
			same(t, k, unhex(f[6]))
		default:
			t.Errorf("unknown case %q", f[0])
		}
	}
	if len(cases) != 2*len(Names()) {
		t.Errorf("cases only for %v", cases)
	}
}

// A key printed by accident shows its public half at most.
func TestDecapsulationKeyDoesNotPrint(t *testing.T) {
	for _, name := range Names() {
		seed := make([]byte, keySeedSize)
		for i := range seed {
			seed[i] = 0x41 + byte(i)
		}
		dk := generate(t, lookup(t, name), bytes.NewReader(seed))
		z := seed[32:]
		for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%x", "%d", "%q"} {
			out := fmt.Sprintf(verb, dk)
			for _, shown := range []string{string(z[:8]), hex.EncodeToString(z[:8]), strings.Trim(fmt.Sprint(z[:8]), "[]"), "0x61, 0x62, 0x63"} {
				if strings.Contains(out, shown) {
					t.Errorf("%s with %s shows z", name, verb)
				}
			}
		}
	}
}
