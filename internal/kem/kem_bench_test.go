package kem

import (
	"crypto/rand"
	"testing"
)

// BenchmarkExchange is what one end of a round computes: a key pair, an
// encapsulation to the peer, a decapsulation; and the encapsulation that the
// last one needs.
func BenchmarkExchange(b *testing.B) {
	for _, name := range Names() {
		b.Run(name+"/circl", func(b *testing.B) {
			s := lookup(b, name)
			ek := generate(b, s, rand.Reader).EncapsulationKey()
			b.ReportAllocs()
			for b.Loop() {
				dk := generate(b, s, rand.Reader)
				if _, _, err := s.Encapsulate(rand.Reader, ek); err != nil {
					b.Fatal(err)
				}
				_, ciphertext, err := s.Encapsulate(rand.Reader, dk.EncapsulationKey())
				if err != nil {
					b.Fatal(err)
				}
				if _, err := dk.Decapsulate(ciphertext); err != nil {
					b.Fatal(err)
				}
			}
		})
		std, ok := standards()[name]
		if !ok {
			continue
		}
		b.Run(name+"/crypto", func(b *testing.B) {
			peer, err := std.random()
			if err != nil {
				b.Fatal(err)
			}
			b.ReportAllocs()
			for b.Loop() {
				dk, err := std.random()
				if err != nil {
					b.Fatal(err)
				}
				ek, err := std.newEK(peer.ek)
				if err != nil {
					b.Fatal(err)
				}
				ek.Encapsulate()
				own, err := std.newEK(dk.ek)
				if err != nil {
					b.Fatal(err)
				}
				_, ciphertext := own.Encapsulate()
				if _, err := dk.decapsulate(ciphertext); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
