package config

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/pem"
	"strings"
	"testing"
)

// TestSecretsAreNotShown: whatever secret is taken for a configuration, or
// pasted into one, no twelve characters of it in a row come back.
func TestSecretsAreNotShown(t *testing.T) {
	random := make([]byte, 48)
	if _, err := rand.Read(random); err != nil {
		t.Fatal(err)
	}
	b64, hexed := base64.StdEncoding.EncodeToString(random[:32]), hex.EncodeToString(random[:32])
	block := func(key any) string {
		der, err := x509.MarshalPKCS8PrivateKey(key)
		if err != nil {
			t.Fatal(err)
		}
		var b bytes.Buffer
		if err := pem.Encode(&b, &pem.Block{Type: "PRIVATE KEY", Bytes: der}); err != nil {
			t.Fatal(err)
		}
		return b.String()
	}
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	ec, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	indented := func(text string) string { return "  " + strings.ReplaceAll(text, "\n", "\n  ") }
	for _, secret := range []string{b64, b64[:43], hexed, hexed[:32] + " " + hexed[32:], base64.StdEncoding.EncodeToString(random), block(ed), block(ec)} {
		for i, text := range []string{
			secret, secret + "\n" + secret, "identity: " + secret, secret + ": 1", "listen: " + secret,
			"peers:\n- name: " + secret + "\n  public_key: x " + secret, "kms:\n  secret_key: |\n" + indented(indented(secret)),
			"interface: " + strings.Repeat("x ", 90) + secret,
		} {
			_, err := Parse("some.yaml", []byte(text))
			if err == nil {
				t.Fatal("a secret is a configuration")
			}
			for at := range len(secret) - 12 {
				part := secret[at : at+12]
				if !strings.ContainsAny(part, " -\n") && strings.Contains(err.Error(), part) {
					t.Errorf("text %d: a part of a secret of %d characters is shown", i, len(secret))
					break
				}
			}
		}
	}
	for _, harmless := range []string{
		"/home/Anna/keyturn2026/a/long/path/to/identity.key", "kms.somewhere-far-away.example.org", "a plain sentence",
	} {
		if got := mask(harmless); got != harmless {
			t.Errorf("mask(%q) = %q", harmless, got)
		}
	}
}
