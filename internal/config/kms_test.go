package config

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestLoadKMS: what is not about a KMS may be missing or nonsense.
func TestLoadKMS(t *testing.T) {
	const kme = "  uri: https://kme-a:8443\n  sae: sae_001\n  certificate: sae_001.crt\n  secret_key: sae_001.key\n  root_certificate: root.crt\n"
	indented := strings.ReplaceAll("  "+kme, "\n", "\n    ")
	for _, tt := range []struct {
		name, text string
		peers      string // NAME/SAE of each, with @URI where it is not the file's
		want       string // problems, without the sources and hints
	}{
		{"kms alone", "kms:\n" + kme, "", ""},
		{"with a peer", "kms:\n" + kme + "peers:\n- sae: sae_002\n", "/sae_002", ""},
		{"all the rest is ignored", "interface: /\nwindow: [7]\nidentity: nowhere\njournal: {}\nkms:\n" + kme +
			"peers:\n- name: lisbon\n  sae: sae_002\n  public_key: none\n  kems: ROT13\n  role: [x]\n", "lisbon/sae_002", ""},
		{"a peer's own", "peers:\n- name: a\n  kms:\n  " + strings.TrimRight(indented, " ") + "- name: b\n  sae: x\n", "a/@https://kme-a:8443", ""},
		{"a peer without", "kms:\n" + kme + "peers:\n- name: a\n  kms: none\n- name: b\n", "b/", ""},
		{"none", "interface: wg0\n", "", "the configuration has no kms"},
		{"none in peers either", "peers:\n- name: a\n  sae: b\n", "", "the configuration has no kms"},
		{"own SAE", "kms:\n" + kme + "peers:\n- sae: sae_001\n", "", `sae: "sae_001" is this end's own`},
		{"bad kms", "kms:\n" + strings.Replace(kme, "https", "http", 1), "", `uri: "http://kme-a:8443" is not https: a KMS is spoken to over mutual TLS only`},
		{"missing file", "kms:\n" + strings.Replace(kme, "root.crt", "nowhere.crt", 1), "", `root_certificate: no such file: "nowhere.crt"`},
		{"unknown key", "kmss: 1\nkms:\n" + kme, "", `unknown key "kmss"`},
		{"unknown key in a peer", "kms:\n" + kme + "peers:\n- saee: x\n", "", `unknown key "saee"`},
		{"peers no list", "kms:\n" + kme + "peers: 7\n", "", `peers: expected a list, found "7"`},
		{"no YAML", "[", "", `a value is missing here`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			for _, name := range []string{"sae_001.crt", "sae_001.key", "root.crt", "wg0.yaml"} {
				text := "x"
				if name == "wg0.yaml" {
					text = tt.text
				}
				if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			c, err := LoadKMS(filepath.Join(dir, "wg0.yaml"))
			if tt.want != "" {
				ps, ok := err.(Problems)
				if !ok || len(ps) != 1 || ps[0].Message != tt.want {
					t.Errorf("got %v, want %s", err, tt.want)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			var peers []string
			for _, p := range c.Peers {
				text := p.Name + "/" + p.SAE
				if p.KMS != c.KMS {
					text += "@" + p.KMS.URIs[0]
				}
				peers = append(peers, text)
			}
			if got := strings.Join(peers, " "); got != tt.peers {
				t.Errorf("peers %q, want %q", got, tt.peers)
			}
			if c.KMS != nil && c.KMS.Certificate != filepath.Join(dir, "sae_001.crt") {
				t.Errorf("certificate %q", c.KMS.Certificate)
			}
		})
	}
}

func TestLoadKMSWithoutAFile(t *testing.T) {
	if _, err := LoadKMS(filepath.Join(t.TempDir(), "none.yaml")); err == nil {
		t.Error("no error")
	}
}
