package link

import (
	"bytes"
	"crypto/rand"
	"encoding/base64"
	"encoding/gob"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"testing/iotest"
)

func TestIdentityRoundTrip(t *testing.T) {
	id, err := GenerateIdentity(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for _, newline := range []string{"", "\n"} {
		again, err := ParseIdentity(id.Secret() + newline)
		if err != nil {
			t.Fatal(err)
		}
		if again.Secret() != id.Secret() || again.Fingerprint() != id.Fingerprint() {
			t.Error("read back as another identity")
		}
	}
	f, err := ParseFingerprint(id.Fingerprint().String())
	if err != nil || f != id.Fingerprint() {
		t.Errorf("fingerprint read back as %v, %v", f, err)
	}
	other, err := GenerateIdentity(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	if other.Fingerprint() == id.Fingerprint() {
		t.Error("two identities are the same")
	}
}

func TestGenerateIdentityWithoutRandomness(t *testing.T) {
	broken := errors.New("no entropy")
	_, err := GenerateIdentity(iotest.ErrReader(broken))
	wantIs(t, err, broken)
	if _, err := GenerateIdentity(bytes.NewReader(make([]byte, SecretSize))); err == nil {
		t.Error("an all-zero identity was made")
	}
}

// badTexts has what neither an identity nor a fingerprint may look like, and
// the end of the error that says so.
var badTexts = map[string]struct{ text, want string }{
	"empty":              {"", "is 0 characters long, not 44"},
	"short":              {strings.Repeat("A", 42) + "=", "is 43 characters long, not 44"},
	"31 bytes":           {base64.StdEncoding.EncodeToString(make([]byte, 31)), "is not base64"},
	"33 bytes":           {base64.StdEncoding.EncodeToString(bytes.Repeat([]byte{1}, 33)), "is not base64"},
	"not base64":         {strings.Repeat("!", 43) + "=", "is not base64"},
	"URL alphabet":       {strings.Repeat("_", 42) + "8=", "is not base64"},
	"not canonical":      {strings.Repeat("A", 42) + "B=", "is not base64"},
	"newline within":     {"\n" + strings.Repeat("B", 43), "is not base64"},
	"newlines within":    {"\r\n\r\n" + strings.Repeat("B", 40), "is not base64"},
	"two newlines after": {strings.Repeat("B", 42) + "A=\n\n", " characters long, not 44"},
	"space after":        {strings.Repeat("B", 42) + "A= ", "is 45 characters long, not 44"},
	"zero":               {strings.Repeat("A", 43) + "=", "is all zeros"},
	"hex":                {strings.Repeat("ab", 32), "is 64 characters long, not 44"},
}

func TestParseErrors(t *testing.T) {
	for name, tt := range badTexts {
		_, idErr := ParseIdentity(tt.text)
		_, fingerprintErr := ParseFingerprint(tt.text)
		for _, err := range []error{idErr, fingerprintErr} {
			if err == nil || !strings.HasSuffix(err.Error(), tt.want) {
				t.Errorf("%s: got error %v, want %q", name, err, tt.want)
			}
			if err != nil && len(tt.text) > 0 && strings.Contains(err.Error(), tt.text) {
				t.Errorf("%s: the error quotes what may be a secret", name)
			}
		}
	}
	if _, err := ParseFingerprint(testIdentity(t, 1).fingerprint.String() + "\n"); err == nil {
		t.Error("a newline after a fingerprint was taken")
	}
}

func TestIdentityNeverPrints(t *testing.T) {
	id := testIdentity(t, 1)
	secret := id.Secret()
	holder := struct {
		Pointer *Identity
		Value   Identity
	}{id, *id} // copied on purpose: the copy must not print either
	var out bytes.Buffer
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%X", "%d", "%t"} {
		fmt.Fprintf(&out, verb+" "+verb+" "+verb+"\n", id, holder, &holder)
	}
	fmt.Fprintln(&out, id.String(), id.GoString())
	slog.New(slog.NewTextHandler(&out, nil)).Info("text", "id", id, "value", *id, "holder", holder)
	slog.New(slog.NewJSONHandler(&out, nil)).Info("json", "id", id, "value", *id, "holder", holder)
	if err := json.NewEncoder(&out).Encode(holder); err != nil {
		t.Fatal(err)
	}
	if err := gob.NewEncoder(&out).Encode(id); err == nil {
		t.Error("gob encodes an identity")
	}
	for _, leak := range []string{
		secret,
		fmt.Sprintf("%x", id.secret), fmt.Sprintf("%X", id.secret), fmt.Sprintf("%v", id.secret),
		fmt.Sprintf("%x", id.ed25519.Seed()), fmt.Sprintf("%v", []byte(id.ed25519.Seed())),
		fmt.Sprintf("%x", id.mldsa.Bytes()), fmt.Sprintf("%v", id.mldsa.Bytes()),
	} {
		if bytes.Contains(out.Bytes(), []byte(strings.Trim(leak, "[]"))) {
			t.Error("an identity was printed")
		}
	}
	if !bytes.Contains(out.Bytes(), []byte(redacted)) {
		t.Error("not even the placeholder was printed")
	}
}

func TestReadIdentityFile(t *testing.T) {
	dir := t.TempDir()
	id := testIdentity(t, 1)
	write := func(name, content string, mode os.FileMode) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, mode); err != nil { // whatever the umask
			t.Fatal(err)
		}
		return path
	}
	link := filepath.Join(dir, "link")
	if err := os.Symlink(write("linked", id.Secret()+"\n", 0o400), link); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{write("good", id.Secret()+"\n", 0o600), link} {
		got, err := ReadIdentityFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if got.Fingerprint() != id.Fingerprint() {
			t.Errorf("%s holds another identity", filepath.Base(path))
		}
	}

	fifo := filepath.Join(dir, "fifo")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct{ path, want string }{
		{filepath.Join(dir, "missing"), "no such file or directory"},
		{dir, "is not a regular file"},
		{fifo, "is not a regular file"},
		{"/dev/zero", "is not a regular file"},
		{write("group", id.Secret(), 0o640), "is open to others (mode 0640); it must be 0600 or stricter"},
		{write("others", id.Secret(), 0o604), "is open to others (mode 0604); it must be 0600 or stricter"},
		{write("writable", id.Secret(), 0o620), "is open to others (mode 0620); it must be 0600 or stricter"},
		{write("empty", "", 0o600), "identity is 0 characters long, not 44"},
		{write("other", "PrivateKey = x\n", 0o600), "identity is 14 characters long, not 44"},
		{write("fits", strings.Repeat("x", maxIdentityFile), 0o600), "identity is 512 characters long, not 44"},
		{write("long", strings.Repeat("x", maxIdentityFile+1), 0o600), "is longer than 512 bytes"},
	} {
		_, err := ReadIdentityFile(tt.path)
		if err == nil || !strings.HasSuffix(err.Error(), tt.want) {
			t.Errorf("%s: got error %v, want %q", filepath.Base(tt.path), err, tt.want)
		}
		if err != nil && strings.Contains(err.Error(), id.Secret()) {
			t.Errorf("%s: the error quotes the secret", filepath.Base(tt.path))
		}
	}
}

func TestFingerprintText(t *testing.T) {
	want := struct{ F Fingerprint }{testIdentity(t, 1).fingerprint}
	b, err := json.Marshal(want)
	if err != nil {
		t.Fatal(err)
	}
	got := want
	got.F = Fingerprint{}
	if err := json.Unmarshal(b, &got); err != nil || got != want {
		t.Errorf("read %s back as %v, %v", b, got, err)
	}
	if err := json.Unmarshal([]byte(`{"F":"x"}`), &got); err == nil {
		t.Error("a bad fingerprint was taken")
	}
}

func FuzzParseFingerprint(f *testing.F) {
	f.Add(testIdentity(f, 1).fingerprint.String())
	for _, tt := range badTexts {
		f.Add(tt.text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		if fp, err := ParseFingerprint(text); err == nil && fp.String() != text {
			t.Errorf("%q is read, and printed as %q", text, fp)
		}
	})
}
