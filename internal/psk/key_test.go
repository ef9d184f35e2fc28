package psk

import (
	"bytes"
	"encoding/base64"
	"encoding/gob"
	"encoding/hex"
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"testing"
	"testing/iotest"
)

// testKey returns a key of 32 bytes counting up from first: plainly test data.
func testKey(first byte) *Key {
	k := blank()
	for i := range k.Bytes() {
		k.Bytes()[i] = first + byte(i)
	}
	return k
}

// leaks returns how much of the key shows in out, in any usual notation.
func leaks(out string, k *Key) string {
	decimal := fmt.Sprint(k.Bytes())
	for notation, s := range map[string]string{
		"raw":       string(k.Bytes()[4:12]),
		"hex":       hex.EncodeToString(k.Bytes()[4:8]),
		"HEX":       strings.ToUpper(hex.EncodeToString(k.Bytes()[4:8])),
		"base64":    base64.StdEncoding.EncodeToString(k.Bytes())[4:16],
		"decimal":   decimal[len(decimal)/2 : len(decimal)/2+12],
		"Go syntax": fmt.Sprintf("%#x, %#x", k.Bytes()[4], k.Bytes()[5]),
		"spaced":    fmt.Sprintf("% x", k.Bytes()[4:8]),
	} {
		if strings.Contains(out, s) {
			return notation
		}
	}
	return ""
}

type holder struct {
	Name    string
	Pointer *Key
	Value   Key
}

// hidden holds its key where fmt cannot call methods.
type hidden struct {
	pointer *Key
	value   Key
}

func TestPrintsRedacted(t *testing.T) {
	k := testKey(0x41)
	for name, v := range map[string]any{
		"pointer":        k,
		"value":          *k,
		"struct":         holder{"h", k, *k},
		"struct pointer": &holder{"h", k, *k},
		"slice":          []*Key{k},
		"value slice":    []Key{*k},
		"array":          [1]Key{*k},
		"map":            map[string]*Key{"k": k},
		"value map":      map[string]Key{"k": *k},
		"interface":      []any{k, *k},
		"error":          fmt.Errorf("with %v", k),
		"hidden":         hidden{k, *k},
		"hidden pointer": &hidden{k, *k},
	} {
		for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%X", "% x", "%#x", "%d", "%o", "%b", "%c", "%U", "%t", "%e", "%w", "%10.3s", "%z"} {
			out := fmt.Sprintf(verb, v)
			if notation := leaks(out, k); notation != "" {
				t.Errorf("%s with %s shows the key (%s)", name, verb, notation)
			}
			if verb != "%w" && name != "error" && !strings.HasPrefix(name, "hidden") && !strings.Contains(out, redacted) {
				t.Errorf("%s with %s does not say %q", name, verb, redacted)
			}
		}
	}
	if s := k.String() + k.GoString() + fmt.Sprintln(k, *k); strings.ReplaceAll(s, redacted, "") != " \n" {
		t.Error("String, GoString or Sprintln shows more than that the key is redacted")
	}
}

func TestEncodesRedacted(t *testing.T) {
	k := testKey(0x41)
	values := map[string]any{"pointer": k, "value": *k, "struct": holder{"h", k, *k}, "slice": []*Key{k}}
	encoders := map[string]func(io.Writer, any) error{
		"json":      func(w io.Writer, v any) error { return json.NewEncoder(w).Encode(v) },
		"xml":       func(w io.Writer, v any) error { return xml.NewEncoder(w).Encode(v) },
		"slog text": func(w io.Writer, v any) error { slog.New(slog.NewTextHandler(w, nil)).Info("m", "key", v); return nil },
		"slog json": func(w io.Writer, v any) error { slog.New(slog.NewJSONHandler(w, nil)).Info("m", "key", v); return nil },
	}
	for format, encode := range encoders {
		for name, v := range values {
			var b bytes.Buffer
			if err := encode(&b, v); err != nil {
				t.Errorf("%s of a %s: %v", format, name, err)
			}
			if notation := leaks(b.String(), k); notation != "" {
				t.Errorf("%s of a %s shows the key (%s)", format, name, notation)
			}
			if !strings.Contains(b.String(), redacted) {
				t.Errorf("%s of a %s does not say %q", format, name, redacted)
			}
		}
	}
	var b bytes.Buffer
	for name, v := range values {
		if err := gob.NewEncoder(&b).Encode(v); err == nil {
			t.Errorf("gob encoded a %s", name)
		}
	}
	if notation := leaks(b.String(), k); notation != "" {
		t.Errorf("gob shows the key (%s)", notation)
	}
}

func TestLeaksFindsKeys(t *testing.T) {
	k := testKey(0x41)
	for _, s := range []string{
		string(k.Bytes()), fmt.Sprintf("%x", k.Bytes()), fmt.Sprintf("%X", k.Bytes()), fmt.Sprintf("% x", k.Bytes()), fmt.Sprint(k.Bytes()),
		fmt.Sprintf("%#v", k.Bytes()), base64.StdEncoding.EncodeToString(k.Bytes()),
	} {
		if leaks(s, k) == "" {
			t.Errorf("a key printed as %d characters goes unnoticed", len(s))
		}
	}
}

func TestNew(t *testing.T) {
	for _, n := range []int{0, 1, 31, 33, 64} {
		if k, err := New(make([]byte, n)); !errors.Is(err, ErrSize) || k != nil {
			t.Errorf("%d bytes: %v", n, err)
		}
	}
	b := bytes.Repeat([]byte{7}, Size)
	k, err := New(b)
	if err != nil {
		t.Fatal(err)
	}
	clear(b)
	if k.IsZero() {
		t.Error("the key is no copy of what it was made of")
	}
}

func TestRandom(t *testing.T) {
	k, err := Random(bytes.NewReader(testKey(1).Bytes()))
	if err != nil || !k.Equal(testKey(1)) {
		t.Errorf("the key is not what the reader gave: %v", err)
	}
	if _, err := Random(strings.NewReader("short")); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("short reader: %v", err)
	}
	if _, err := Random(iotest.ErrReader(io.ErrClosedPipe)); !errors.Is(err, io.ErrClosedPipe) {
		t.Errorf("failing reader: %v", err)
	}
}

func TestWipeCloneEqual(t *testing.T) {
	k := testKey(1)
	c := k.Clone()
	if !k.Equal(c) || k.Equal(testKey(2)) || k.IsZero() {
		t.Error("equality is wrong")
	}
	k.Wipe()
	if !k.IsZero() || c.IsZero() {
		t.Error("wiping the key left it, or took its clone along")
	}
	(*Key)(nil).Wipe()

	var zero Key
	zero.Wipe()
	if !zero.IsZero() || !zero.Clone().IsZero() || !zero.Equal(new(Key)) || zero.Equal(c) {
		t.Error("the zero value is not the all-zero key")
	}
	copy(zero.Bytes(), c.Bytes())
	if !zero.Equal(c) {
		t.Error("what was written to the zero value's bytes is lost")
	}
}

func TestFingerprint(t *testing.T) {
	if f := new(Key).Fingerprint(); !f.IsZero() || f.String() != "none" {
		t.Errorf("no key has the fingerprint %v", f)
	}
	f := testKey(1).Fingerprint()
	if f.IsZero() || f == testKey(2).Fingerprint() || len(f.String()) != 8 {
		t.Errorf("fingerprint %v", f)
	}
}
