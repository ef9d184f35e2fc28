package config

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

var rewrite = flag.Bool("rewrite", false, "write what was said into the golden files; read them before you commit them")

// golden compares got with the file beside the input.
func golden(t *testing.T, input, got string) {
	t.Helper()
	name := strings.TrimSuffix(input, ".yaml") + ".txt"
	if *rewrite {
		if err := os.WriteFile(name, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

// inputs returns the files of testdata that match, failing where none does.
func inputs(t testing.TB, pattern string) map[string][]byte {
	t.Helper()
	names, err := filepath.Glob(filepath.Join("testdata", pattern))
	if err != nil || len(names) == 0 {
		t.Fatalf("no input %s: %v", pattern, err)
	}
	files := map[string][]byte{}
	for _, n := range names {
		if files[n], err = os.ReadFile(n); err != nil {
			t.Fatal(err)
		}
	}
	return files
}

// TestInvalid holds one file for each mistake, and all that is said about it.
func TestInvalid(t *testing.T) {
	several := map[string]bool{
		"invalid-five-at-once.yaml":        true,
		"invalid-yaml-alias.yaml":          true, // there is none without an anchor
		"invalid-yaml-billion-laughs.yaml": true,
	}
	for name, data := range inputs(t, "invalid-*.yaml") {
		t.Run(filepath.Base(name), func(t *testing.T) {
			c, err := Parse(filepath.Base(name), data)
			ps, ok := errors.AsType[Problems](err)
			if !ok || c != nil {
				t.Fatalf("Parse = %v, %v: want Problems", c, err)
			}
			if len(ps) != 1 && !several[filepath.Base(name)] {
				t.Errorf("%d problems, want one", len(ps))
			}
			golden(t, name, err.Error()+"\n")
		})
	}
}

func TestValid(t *testing.T) {
	for name, data := range inputs(t, "valid-*.yaml") {
		t.Run(filepath.Base(name), func(t *testing.T) {
			c, err := Parse(filepath.Join("/etc/keyturn", filepath.Base(name)), data)
			if err != nil {
				t.Fatal(err)
			}
			golden(t, name, dump("", reflect.ValueOf(c)))
		})
	}
}

// dump writes every exported value that v holds, one on a line.
func dump(name string, v reflect.Value) string {
	var b strings.Builder
	switch k, isKey := v.Interface().([32]byte); {
	case isKey:
		return name + " = " + encode(k) + "\n"
	case v.Kind() == reflect.Pointer && !v.IsNil():
		return dump(name, v.Elem())
	case v.Kind() == reflect.Struct:
		for i := range v.NumField() {
			if f := v.Type().Field(i); f.IsExported() {
				b.WriteString(dump(strings.TrimPrefix(name+"."+f.Name, "."), v.Field(i)))
			}
		}
	case v.Kind() == reflect.Slice && v.Len() > 0:
		for i := range v.Len() {
			b.WriteString(dump(fmt.Sprintf("%s[%d]", name, i), v.Index(i)))
		}
	case v.Kind() == reflect.Slice:
		return name + " = none\n"
	case v.Kind() == reflect.Pointer:
		return name + " = nil\n"
	default:
		return fmt.Sprintf("%s = %v\n", name, v)
	}
	return b.String()
}

// TestExample keeps the manual true: it is valid as it stands, mentions every
// key, and the defaults in its comments are the defaults.
func TestExample(t *testing.T) {
	c, err := Parse("example.yaml", Example)
	if err != nil {
		t.Fatal(err)
	}
	if ps := c.Ignored(); len(ps) != 0 {
		t.Errorf("of no effect in it: %v", ps)
	}
	// What is commented out as "# key: value" is the default; where it is not
	// (a key that another one excludes, a block), the line is left alone.
	skip := []string{"dialect:", "journal:", "kms:", "pin:", "role:", "server_name:"}
	var full strings.Builder
	taken := 0
lines:
	for line := range strings.Lines(string(Example)) {
		indent, comment, ok := strings.Cut(line, "# ")
		key, _, isKey := strings.Cut(comment, ": ")
		if ok && isKey && strings.TrimSpace(indent) == "" && strings.Trim(key, "abcdefghijklmnopqrstuvwxyz_") == "" {
			for _, s := range skip {
				if strings.HasPrefix(comment, s) {
					full.WriteString(line)
					continue lines
				}
			}
			line = indent + comment
			taken++
		}
		full.WriteString(line)
	}
	d, err := Parse("example.yaml", []byte(full.String()))
	if err != nil {
		t.Fatal(err)
	}
	if taken != 14 {
		t.Errorf("%d defaults in the example, want 14", taken)
	}
	if diff := cmp.Diff(dump("", reflect.ValueOf(c)), dump("", reflect.ValueOf(d))); diff != "" {
		t.Errorf("the example's defaults are not the defaults:\n%s", diff)
	}
	for _, key := range []string{"journal:", "path:", "key_file:", "dialect:", "server_name:", "pin:", "role:"} {
		if !strings.Contains(string(Example), "# "+key) && !strings.Contains(string(Example), "#   "+key) {
			t.Errorf("the example does not mention %s", key)
		}
	}
}

func TestTooLarge(t *testing.T) {
	_, err := Parse("large.yaml", make([]byte, MaxFile+1))
	if want := "large.yaml: the file is larger than 4 MiB"; err == nil || err.Error() != want {
		t.Errorf("got %v, want %s", err, want)
	}
}

func TestProblemsAreBounded(t *testing.T) {
	data := []byte("{")
	for i := range 5_000 {
		data = fmt.Appendf(data, "unknown%d: x,", i)
	}
	_, err := Parse("many.yaml", append(data, '}'))
	ps, _ := errors.AsType[Problems](err)
	if len(ps) != maxProblems+1 {
		t.Fatalf("%d problems, want %d", len(ps), maxProblems+1)
	}
	if n := len(err.Error()); n > 2<<20 {
		t.Errorf("%d bytes said about one line", n)
	}
}

func TestLargeHub(t *testing.T) {
	var b strings.Builder
	b.WriteString("interface: wg0\nidentity: identity.key\npeers:\n")
	for i := range 10_000 {
		key := [32]byte{1, byte(i), byte(i >> 8)}
		id := [32]byte{2, byte(i), byte(i >> 8)}
		fmt.Fprintf(&b, "  - name: peer-%05d\n    public_key: %s\n    identity: %s\n    address: 198.51.100.7:51822\n    sae: sae_%05d\n    kems: [ML-KEM-1024]\n    buffer: 3\n",
			i, encode(key), encode(id), i)
	}
	c, err := Parse("hub.yaml", []byte(b.String()))
	if err != nil {
		t.Fatal(err)
	}
	if len(c.Peers) != 10_000 {
		t.Errorf("%d peers", len(c.Peers))
	}
}

// TestSecretsStayUnsaid writes a secret wherever one could end up by mistake.
func TestSecretsStayUnsaid(t *testing.T) {
	secret := encode([32]byte{1, 2, 3, 4, 5, 6, 7, 8, 9})
	for name, data := range inputs(t, "valid-everything.yaml") {
		lines := strings.Split(string(data), "\n")
		for i, line := range lines {
			if strings.Contains(line, "public_key") || strings.Contains(line, "  identity") {
				continue // whoever writes a private key as a public one has the public one shown
			}
			key, _, ok := strings.Cut(line, ": ")
			if !ok {
				continue
			}
			broken := append([]string{}, lines...)
			for _, b := range []string{key + ": " + secret, key + ": [" + secret, key + "x: " + secret, secret + ": " + secret} {
				broken[i] = b
				_, err := Parse(name, []byte(strings.Join(broken, "\n")))
				if err != nil && strings.Contains(err.Error(), secret) {
					t.Errorf("line %d: a secret is shown: %s", i+1, strings.ReplaceAll(err.Error(), secret, "SECRET"))
				}
			}
		}
	}
}

func FuzzParse(f *testing.F) {
	for _, pattern := range []string{"invalid-*.yaml", "valid-*.yaml"} {
		for _, data := range inputs(f, pattern) {
			f.Add(data)
		}
	}
	f.Add(Example)
	f.Fuzz(func(t *testing.T, data []byte) {
		c, err := Parse("fuzz.yaml", data)
		if err == nil {
			if len(c.Peers) == 0 || c.Interface == "" || c.Identity == "" {
				t.Fatal("a configuration without what is required")
			}
			return
		}
		ps, ok := errors.AsType[Problems](err)
		if !ok || len(ps) == 0 || c != nil {
			t.Fatalf("Parse = %v, %v: want Problems", c, err)
		}
		lines := strings.SplitAfter(strings.TrimPrefix(string(data), "\ufeff"), "\n")
		for i, p := range ps {
			if len(data) == 0 && p.Line == 0 {
				continue
			}
			if p.Line < 1 || p.Line > len(lines) || p.Column < 1 || p.Column > len([]rune(lines[p.Line-1]))+1 {
				t.Errorf("%d:%d is outside the file: %s", p.Line, p.Column, p.Message)
			}
			if p.Message == "" || strings.ContainsAny(p.String()[len(p.File):], "\x1b\x00\r") {
				t.Errorf("not fit for a terminal: %q", p.String())
			}
			if i > 0 && (ps[i-1].Line > p.Line || ps[i-1].Line == p.Line && ps[i-1].Column > p.Column) {
				t.Errorf("out of order: %s", err)
			}
		}
	})
}
