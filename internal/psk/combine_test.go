package psk

import (
	"crypto/hmac"
	"crypto/sha512"
	"errors"
	"testing"
)

func TestXOR(t *testing.T) {
	a, b, c := testKey(1), testKey(0x55), testKey(0xf0)
	k, err := XOR.Combine([]*Key{a, b, c}, [32]byte{1})
	if err != nil {
		t.Fatal(err)
	}
	for i := range k.Bytes() {
		if k.Bytes()[i] != a.Bytes()[i]^b.Bytes()[i]^c.Bytes()[i] {
			t.Fatalf("byte %d is not the exclusive or", i)
		}
	}
	if !a.Equal(testKey(1)) || !b.Equal(testKey(0x55)) || !c.Equal(testKey(0xf0)) {
		t.Error("combining changed a secret")
	}
	one, err := XOR.Combine([]*Key{a}, [32]byte{})
	if err != nil || !one.Equal(a) || one == a {
		t.Errorf("one secret: %v", err)
	}
}

// The derivation once more, from RFC 5869 alone.
func TestHKDFByHand(t *testing.T) {
	a, b := testKey(1), testKey(0x55)
	transcript := [32]byte(testKey(0x80).Bytes())
	mac := func(key []byte, parts ...string) []byte {
		m := hmac.New(sha512.New384, key)
		for _, p := range parts {
			m.Write([]byte(p))
		}
		return m.Sum(nil)
	}
	prk := mac(make([]byte, 48), "\x00\x00\x00\x20", string(a.Bytes()), "\x00\x00\x00\x20", string(b.Bytes()))
	want := mac(prk, "\x00\x00\x00\x11keyturn/1 combine", "\x00\x00\x00\x20", string(transcript[:]), "\x01")[:32]
	k, err := HKDFSHA384.Combine([]*Key{a, b}, transcript)
	if err != nil {
		t.Fatal(err)
	}
	if !hmac.Equal(k.Bytes(), want) {
		t.Error("the key is not the documented HKDF")
	}
}

// Every secret, its place, and the transcript change the derived key.
func TestHKDFCoversAll(t *testing.T) {
	a, b := testKey(1), testKey(0x55)
	seen := map[Fingerprint]bool{}
	for i, in := range []struct {
		secrets    []*Key
		transcript byte
	}{
		{[]*Key{a}, 0}, {[]*Key{b}, 0}, {[]*Key{a, b}, 0}, {[]*Key{b, a}, 0}, {[]*Key{a, a}, 0}, {[]*Key{a, b}, 1},
	} {
		k, err := HKDFSHA384.Combine(in.secrets, [32]byte{in.transcript})
		if err != nil {
			t.Fatal(err)
		}
		if f := k.Fingerprint(); seen[f] {
			t.Errorf("input %d gives a key met before", i)
		} else {
			seen[f] = true
		}
	}
}

func TestCombineRefuses(t *testing.T) {
	a, zero := testKey(1), new(Key)
	for _, c := range []Combiner{XOR, HKDFSHA384} {
		for _, tt := range []struct {
			secrets []*Key
			want    error
		}{
			{nil, ErrNoSource},
			{[]*Key{}, ErrNoSource},
			{[]*Key{zero}, ErrZero},
			{[]*Key{a, zero}, ErrZero},
			{[]*Key{zero, a}, ErrZero},
			{[]*Key{a, nil}, ErrZero},
		} {
			if k, err := c.Combine(tt.secrets, [32]byte{}); !errors.Is(err, tt.want) || k != nil {
				t.Errorf("%v of %d secrets: %v, want %v", c, len(tt.secrets), err, tt.want)
			}
		}
	}
	if _, err := XOR.Combine([]*Key{a, a}, [32]byte{}); !errors.Is(err, ErrZero) {
		t.Errorf("the same secret twice: %v", err)
	}
	if _, err := Combiner(2).Combine([]*Key{a}, [32]byte{}); err == nil || err.Error() != "unknown combiner 2" {
		t.Errorf("unknown combiner: %v", err)
	}
}

func TestCombinerNames(t *testing.T) {
	var def Combiner
	if def != XOR {
		t.Error("xor is not the default")
	}
	for _, c := range []Combiner{XOR, HKDFSHA384} {
		if got, err := ParseCombiner(c.String()); err != nil || got != c {
			t.Errorf("%v parses as %v, %v", c, got, err)
		}
	}
	for _, name := range []string{"", "XOR", "hkdf", "combiner 2"} {
		if _, err := ParseCombiner(name); err == nil {
			t.Errorf("%q was parsed", name)
		}
	}
}
