package config

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// laboratory writes a configuration that names every kind of file, and those
// files, and returns the configuration's path.
func laboratory(t *testing.T) string {
	t.Helper()
	// Not t.TempDir: the name of a subtest in it may look like a key.
	dir, err := os.MkdirTemp("", "kt")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	for name, mode := range map[string]os.FileMode{
		"identity.key": 0o600, "journal.key": 0o400, "sae.crt": 0o644, "sae.key": 0o600, "root.crt": 0o644,
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("x"), mode); err != nil {
			t.Fatal(err)
		}
	}
	path := filepath.Join(dir, "wg0.yaml")
	text := `interface: wg0
identity: identity.key
journal:
  path: journal
  key_file: journal.key
kms:
  uri: https://kme-a
  sae: sae_001
  certificate: sae.crt
  secret_key: sae.key
  root_certificate: root.crt
peers:
  - name: lisbon
    public_key: ` + encode([32]byte{1}) + `
    identity: ` + encode([32]byte{2}) + `
    sae: sae_002
`
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestCheckFiles(t *testing.T) {
	for _, test := range []struct {
		name   string
		change func(t *testing.T, dir string) error
		want   string // DIR stands for the directory
	}{
		{"all is well", func(*testing.T, string) error { return nil }, ""},
		{"missing", func(_ *testing.T, dir string) error { return os.Remove(filepath.Join(dir, "sae.crt")) },
			`DIR/wg0.yaml:9:16: certificate: no such file: "sae.crt"
    9 |   certificate: sae.crt
      hint: keyturn looks for DIR/sae.crt`},
		{"a secret that others can read", func(_ *testing.T, dir string) error { return os.Chmod(filepath.Join(dir, "identity.key"), 0o640) },
			`DIR/wg0.yaml:2:11: identity: others have access to the secret "identity.key" (mode 0640)
    2 | identity: identity.key
      hint: chmod 600 DIR/identity.key`},
		{"a secret that others can write", func(_ *testing.T, dir string) error { return os.Chmod(filepath.Join(dir, "sae.key"), 0o602) },
			`DIR/wg0.yaml:10:15: secret_key: others have access to the secret "sae.key" (mode 0602)
   10 |   secret_key: sae.key
      hint: chmod 600 DIR/sae.key`},
		{"a directory", func(_ *testing.T, dir string) error {
			return errors.Join(os.Remove(filepath.Join(dir, "root.crt")), os.Mkdir(filepath.Join(dir, "root.crt"), 0o755))
		}, `DIR/wg0.yaml:11:21: root_certificate: "root.crt" is a directory, not a file
   11 |   root_certificate: root.crt`},
		{"a pipe is not waited for", func(_ *testing.T, dir string) error {
			return errors.Join(os.Remove(filepath.Join(dir, "journal.key")), syscall.Mkfifo(filepath.Join(dir, "journal.key"), 0o600))
		}, `DIR/wg0.yaml:5:13: key_file: "journal.key" is not a regular file
    5 |   key_file: journal.key`},
		{"empty", func(_ *testing.T, dir string) error { return os.Truncate(filepath.Join(dir, "identity.key"), 0) },
			`DIR/wg0.yaml:2:11: identity: "identity.key" is empty
    2 | identity: identity.key`},
		{"a link to a good secret", func(_ *testing.T, dir string) error {
			return errors.Join(os.Rename(filepath.Join(dir, "identity.key"), filepath.Join(dir, "real")),
				os.Symlink("real", filepath.Join(dir, "identity.key")))
		}, ""},
		{"a link to nothing", func(_ *testing.T, dir string) error {
			return errors.Join(os.Remove(filepath.Join(dir, "identity.key")), os.Symlink("gone", filepath.Join(dir, "identity.key")))
		}, `DIR/wg0.yaml:2:11: identity: no such file: "identity.key"
    2 | identity: identity.key
      hint: keyturn looks for DIR/identity.key`},
		{"a link to itself", func(_ *testing.T, dir string) error {
			return errors.Join(os.Remove(filepath.Join(dir, "identity.key")), os.Symlink("identity.key", filepath.Join(dir, "identity.key")))
		}, `DIR/wg0.yaml:2:11: identity: "identity.key": too many levels of symbolic links
    2 | identity: identity.key`},
		{"no directory for the journal", func(_ *testing.T, dir string) error {
			return replace(filepath.Join(dir, "wg0.yaml"), "path: journal", "path: state/journal")
		}, `DIR/wg0.yaml:4:9: path: the directory of "state/journal" does not exist
    4 |   path: state/journal
      hint: make it: mkdir -m 0700 DIR/state`},
		{"the journal of an earlier start", func(_ *testing.T, dir string) error {
			return os.Mkdir(filepath.Join(dir, "journal"), 0o700)
		}, ""},
		{"a journal that others can read", func(_ *testing.T, dir string) error {
			return errors.Join(os.Mkdir(filepath.Join(dir, "journal"), 0o700), os.Chmod(filepath.Join(dir, "journal"), 0o755))
		}, `DIR/wg0.yaml:4:9: path: others have access to the directory "journal" (mode 0755)
    4 |   path: journal
      hint: chmod 700 DIR/journal`},
		{"a file for a journal", func(_ *testing.T, dir string) error {
			return os.WriteFile(filepath.Join(dir, "journal"), nil, 0o600)
		}, `DIR/wg0.yaml:4:9: path: "journal" is not a directory
    4 |   path: journal`},
		{"bad values and missing files at once", func(_ *testing.T, dir string) error {
			return errors.Join(os.Remove(filepath.Join(dir, "sae.crt")),
				replace(filepath.Join(dir, "wg0.yaml"), "interface: wg0", "interface: wg/0"),
				replace(filepath.Join(dir, "wg0.yaml"), "    sae: ", "    saee: "))
		}, `DIR/wg0.yaml:1:12: interface: "wg/0" cannot be the name of an interface
    1 | interface: wg/0
      hint: 1 to 15 characters without spaces, slashes and colons
DIR/wg0.yaml:9:16: certificate: no such file: "sae.crt"
    9 |   certificate: sae.crt
      hint: keyturn looks for DIR/sae.crt
DIR/wg0.yaml:13:5: missing key "sae" in peer with a kms
   13 |   - name: lisbon
      hint: the ID of the peer's end in the QKD network; or opt out with kms: none
DIR/wg0.yaml:16:5: unknown key "saee"
   16 |     saee: sae_002
      hint: did you mean "sae"?`},
		{"the configuration is missing", func(_ *testing.T, dir string) error { return os.Remove(filepath.Join(dir, "wg0.yaml")) },
			`DIR/wg0.yaml: no such file or directory`},
		{"the configuration is a directory", func(_ *testing.T, dir string) error {
			return errors.Join(os.Remove(filepath.Join(dir, "wg0.yaml")), os.Mkdir(filepath.Join(dir, "wg0.yaml"), 0o755))
		}, `DIR/wg0.yaml: a directory, not a configuration file`},
		{"the configuration is a named pipe", func(_ *testing.T, dir string) error {
			return errors.Join(os.Remove(filepath.Join(dir, "wg0.yaml")), syscall.Mkfifo(filepath.Join(dir, "wg0.yaml"), 0o600))
		}, `DIR/wg0.yaml: not a regular file`},
		{"the configuration is too large", func(_ *testing.T, dir string) error { return os.Truncate(filepath.Join(dir, "wg0.yaml"), 1<<40) },
			`DIR/wg0.yaml: the file is larger than 4 MiB`},
	} {
		t.Run(test.name, func(t *testing.T) {
			path := laboratory(t)
			if err := test.change(t, filepath.Dir(path)); err != nil {
				t.Fatal(err)
			}
			c, err := Load(path)
			if (c == nil) != (err != nil) {
				t.Fatalf("Load = %v, %v", c, err)
			}
			got := ""
			if err != nil {
				got = strings.ReplaceAll(err.Error(), filepath.Dir(path), "DIR")
			}
			if diff := cmp.Diff(test.want, got); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
			if c != nil && c.CheckFiles() != nil {
				t.Errorf("Load and CheckFiles differ: %v", c.CheckFiles())
			}
		})
	}
}

func replace(path, from, to string) error {
	data, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	return os.WriteFile(path, []byte(strings.Replace(string(data), from, to, 1)), 0o644)
}
