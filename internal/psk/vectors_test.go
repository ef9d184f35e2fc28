package psk

import (
	"flag"
	"fmt"
	"os"
	"strings"
	"testing"
)

var rewrite = flag.Bool("rewrite", false, "write the test vectors anew; read them before they are committed")

const vectorsHeader = `# Test vectors of keyturn's fingerprints, combiners and digests
# (docs/PROTOCOL.md). Bytes are in hex, numbers in decimal, texts quoted.
# Every key and secret here is test data: bytes counting up.
`

// The vectors are for whoever builds a rotator that interoperates. This test
// alone may print keys: they are no secrets.
func TestVectors(t *testing.T) {
	const file = "testdata/vectors.txt"
	got := vectorsHeader + fingerprintVectors() + combineVectors(t) + digestVectors()
	if *rewrite {
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("%s holds other values; this code gives:\n%s", file, got)
	}
}

func fingerprintVectors() string {
	k := testKey(0x01)
	f := k.Fingerprint() // sliced below, for %x of a fingerprint is that of its short form
	return fmt.Sprintf("\nfingerprint\n  key          %x\n  fingerprint  %x\n", k.Bytes(), f[:]) +
		fmt.Sprintf("\nrecovery key\n  key           %x\n  recovery key  %x\n", k.Bytes(), k.Recovery().Bytes())
}

func combineVectors(t *testing.T) string {
	var b strings.Builder
	transcript := [32]byte(testKey(0x80).Bytes())
	for _, c := range []Combiner{XOR, HKDFSHA384} {
		for _, secrets := range [][]*Key{
			{testKey(0x01)},
			{testKey(0x01), testKey(0x55)},
			{testKey(0x01), testKey(0x55), testKey(0xc0)},
		} {
			k, err := c.Combine(secrets, transcript)
			if err != nil {
				t.Fatal(err)
			}
			fmt.Fprintf(&b, "\ncombine %v\n", c)
			for i, s := range secrets {
				fmt.Fprintf(&b, "  secret %d    %x\n", i+1, s.Bytes())
			}
			fmt.Fprintf(&b, "  transcript  %x\n  key         %x\n", transcript, k.Bytes())
		}
	}
	return b.String()
}

func digestVectors() string {
	var b strings.Builder
	pqc := testContext()
	pqc.ClientSAE, pqc.ServerSAE, pqc.Sources = "", "", 2
	for _, ctx := range []DigestContext{testContext(), pqc} {
		k := testKey(0x01)
		fmt.Fprintf(&b, `
digest
  key              %x
  client sae       %q
  server sae       %q
  client identity  %x
  server identity  %x
  session          %x
  serial           %d
  sources          %d
  transcript       %x
  client digest    %x
  server digest    %x
`, k.Bytes(), ctx.ClientSAE, ctx.ServerSAE, ctx.ClientIdentity, ctx.ServerIdentity, ctx.Session,
			ctx.Serial, ctx.Sources, ctx.Transcript, k.Digest(RoleClient, ctx), k.Digest(RoleServer, ctx))
	}
	return b.String()
}
