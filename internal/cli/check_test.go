package cli

import (
	"crypto/rand"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"keyturn/internal/config"
	"keyturn/internal/kms"
	"keyturn/internal/link"
)

// TestCheckIdentity: beside a running rotator, whose links are looked at, an
// identity is only right if that rotator has it.
func TestCheckIdentity(t *testing.T) {
	id, err := link.GenerateIdentity(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	conf := filepath.Join(dir, "wg0.yaml")
	for name, content := range map[string]string{
		filepath.Join(dir, "identity.key"): id.Secret() + "\n",
		conf: "interface: wg0\nidentity: identity.key\nlisten: \"127.0.0.1:51898\"\npeers:\n  - name: lisbon\n" +
			"    public_key: 9OmSKzF5QHD5mckhBHyoN2uPPRGJNDYOl15+DKbtV1M=\n" +
			"    identity: ri+8BEqTL5AkksdpZDhtccwakP71+bhxw3owSO9WH+o=\n    role: server\n    kems: [ML-KEM-1024]\n",
	} {
		if err := os.WriteFile(name, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, tt := range []struct{ running, result string }{
		{id.Fingerprint().String(), "ok"}, {sample().Identity, "failed"},
	} {
		status := sample()
		status.Identity = tt.running
		d, _ := startLive(t, status)
		out, errOut, code := keyturn(t, d, "check", conf)
		line := regexp.MustCompile(`(?m)^identity +(\w+) +(.*)$`).FindStringSubmatch(out)
		if code != exitDegraded || line == nil || line[1] != tt.result || !strings.HasPrefix(line[2], id.Fingerprint().String()) {
			t.Errorf("running as %s: exit code %d\n%s%s", tt.running, code, out, errOut)
		}
	}
}

// TestDescribeKMS: what a KMS says of itself is told, and what keeps it from
// serving a peer is an error.
func TestDescribeKMS(t *testing.T) {
	p := &config.Peer{SAE: "sae_002", KMS: &config.KMS{SAE: "sae_001", Interface: config.ETSI014}}
	whole := kms.Status{
		SourceKME: "kme-a", TargetKME: "kme-b", MasterSAE: "sae_001", SlaveSAE: "sae_002",
		KeySize: 256, MinKeySize: 64, MaxKeySize: 1024, StoredKeys: 3, MaxKeys: 100, MaxKeysPerRequest: 128,
	}
	for _, tt := range []struct {
		name string
		edit func(*kms.Status)
		want string
		err  string
	}{
		{"everything", func(*kms.Status) {}, "https://kme-a, kme-a to kme-b, keys of 64 to 1024 bits, 3 of 100 keys stored, 128 keys a request", ""},
		{"nothing", func(s *kms.Status) { *s = kms.Status{} }, "", "its status has nothing of what the standard puts there"},
		{"another certificate", func(s *kms.Status) { s.MasterSAE = "sae_003" }, "", `knows this end as "sae_003"; the configuration says "sae_001"`},
		{"no peer", func(s *kms.Status) { *s = kms.Status{PeerAbsent: true} }, "https://kme-a, the peer's application has not connected yet", ""},
		{"too small", func(s *kms.Status) { s.MaxKeySize = 128 }, "", "has keys of at most 128 bits, not 256"},
		{"too large", func(s *kms.Status) { s.MinKeySize = 512 }, "", "has keys of at least 512 bits, not 256"},
		{"other names", func(s *kms.Status) { *s = kms.Status{MasterSAE: "qkd://sae_001", SlaveSAE: "qkd://sae_002"} },
			"https://kme-a, knows this end as qkd://sae_001, the peer as qkd://sae_002", ""},
	} {
		s := whole
		tt.edit(&s)
		got, err := describeKMS(p, "https://kme-a", &s)
		if got != tt.want || (err == nil) != (tt.err == "") || err != nil && err.Error() != tt.err {
			t.Errorf("%s: got %q, %v", tt.name, got, err)
		}
	}
}
