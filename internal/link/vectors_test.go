package link

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"flag"
	"os"
	"testing"

	"filippo.io/mldsa"
)

var rewrite = flag.Bool("rewrite", false, "write testdata anew; read it before it is committed")

const vectorsFile = "testdata/vectors.json"

// vectors is what another implementation needs to check itself against
// docs/PROTOCOL.md. All bytes are in hex, fingerprints and secrets as users
// see them. The secrets are for tests only.
type vectors struct {
	Identities []identityVector `json:"identities"`
	Proofs     []proofVector    `json:"proofs"`
}

type identityVector struct {
	Secret        string      `json:"secret"`
	Ed25519Seed   string      `json:"ed25519_seed"`
	MLDSASeed     string      `json:"mldsa65_seed"`
	Ed25519Public string      `json:"ed25519_public"`
	MLDSAPublic   string      `json:"mldsa65_public"`
	Fingerprint   Fingerprint `json:"fingerprint"`
	Certificate   string      `json:"certificate"` // DER
}

type proofVector struct {
	Exporter  string      `json:"exporter"`
	Role      role        `json:"role"`
	Client    Fingerprint `json:"client"`
	Server    Fingerprint `json:"server"`
	Context   string      `json:"context"` // text
	Signed    string      `json:"signed"`
	Signature string      `json:"signature_deterministic"` // any valid one will do on the wire
}

func makeVectors(t *testing.T) vectors {
	t.Helper()
	var v vectors
	client, srv := testIdentity(t, 1), testIdentity(t, 2)
	for _, id := range []*Identity{client, srv} {
		v.Identities = append(v.Identities, identityVector{
			Secret:        id.Secret(),
			Ed25519Seed:   hex.EncodeToString(id.ed25519.Seed()),
			MLDSASeed:     hex.EncodeToString(id.mldsa.Bytes()),
			Ed25519Public: hex.EncodeToString(id.ed25519[32:]),
			MLDSAPublic:   hex.EncodeToString(id.mldsaPublic),
			Fingerprint:   id.fingerprint,
			Certificate:   hex.EncodeToString(id.server.Certificates[0].Certificate[0]),
		})
	}
	s := statement{client: client.fingerprint, server: srv.fingerprint}
	for i := range s.exporter {
		s.exporter[i] = byte(i)
	}
	for _, end := range []struct {
		signer role
		id     *Identity
	}{{roleClient, client}, {roleServer, srv}} {
		s.signer = end.signer
		signature, err := end.id.mldsa.SignDeterministic(s.bytes(), &mldsa.Options{Context: contextProof})
		if err != nil {
			t.Fatal(err)
		}
		v.Proofs = append(v.Proofs, proofVector{
			Exporter:  hex.EncodeToString(s.exporter[:]),
			Role:      s.signer,
			Client:    s.client,
			Server:    s.server,
			Context:   contextProof,
			Signed:    hex.EncodeToString(s.bytes()),
			Signature: hex.EncodeToString(signature),
		})
	}
	return v
}

// A change here breaks every installed identity, or the link between versions.
func TestVectors(t *testing.T) {
	got, err := json.MarshalIndent(makeVectors(t), "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	got = append(got, '\n')
	if *rewrite {
		if err := os.WriteFile(vectorsFile, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(vectorsFile)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%s no longer holds; run with -rewrite and look at the difference", vectorsFile)
	}
}

// The vectors as another implementation would read them.
func TestVectorsHold(t *testing.T) {
	b, err := os.ReadFile(vectorsFile)
	if err != nil {
		t.Fatal(err)
	}
	var v vectors
	if err := json.Unmarshal(b, &v); err != nil {
		t.Fatal(err)
	}
	for _, i := range v.Identities {
		id, err := ParseIdentity(i.Secret)
		if err != nil {
			t.Fatal(err)
		}
		if id.Fingerprint() != i.Fingerprint || fingerprintOf(unhex(t, i.Ed25519Public), unhex(t, i.MLDSAPublic)) != i.Fingerprint {
			t.Errorf("fingerprint of %v", i.Fingerprint)
		}
	}
	for n, p := range v.Proofs {
		s := statement{signer: p.Role, client: p.Client, server: p.Server}
		copy(s.exporter[:], unhex(t, p.Exporter))
		if !bytes.Equal(s.bytes(), unhex(t, p.Signed)) {
			t.Errorf("bytes to be signed of proof %d", n)
		}
		signed := proof{public: unhex(t, v.Identities[n].MLDSAPublic), signature: unhex(t, p.Signature)}
		if err := signed.verify(&s); err != nil {
			t.Errorf("proof %d: %v", n, err)
		}
	}
}

func unhex(t *testing.T, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func FuzzDecodeProof(f *testing.F) {
	f.Add([]byte{})
	f.Add(make([]byte, proofSize-1))
	f.Add(make([]byte, proofSize))
	f.Add(make([]byte, proofSize+1))
	f.Fuzz(func(t *testing.T, in []byte) {
		p, err := decodeProof(in)
		if (err == nil) != (len(in) == proofSize) {
			t.Fatalf("%d bytes: %v", len(in), err)
		}
		if err != nil {
			return
		}
		if !bytes.Equal(p.encode(), in) {
			t.Error("encodes to other bytes")
		}
		if p.verify(new(statement)) == nil {
			t.Error("a made-up proof holds")
		}
	})
}
