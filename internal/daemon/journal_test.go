package daemon

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"keyturn/internal/config"
	"keyturn/internal/psk"
	"keyturn/internal/rotation"
	"keyturn/internal/wg"
)

var lisbon, madrid = wg.PublicKey{1}, wg.PublicKey{2}

func testKey(t testing.TB) *psk.Key {
	t.Helper()
	k, err := psk.Random(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func sample(t testing.TB) rotation.Journal {
	return rotation.Journal{High: 9, Entries: []rotation.Entry{
		{Serial: 0, Key: testKey(t)},
		{Serial: 7, Key: testKey(t), Installed: time.Unix(1_800_000_000, 5), Agreed: true, Seen: true, Confirmed: true},
		{Serial: 8, Key: testKey(t), Agreed: true},
	}}
}

// same compares journals without ever printing a key.
func same(a, b rotation.Journal) bool {
	if a.High != b.High || len(a.Entries) != len(b.Entries) {
		return false
	}
	for i, x := range a.Entries {
		y := b.Entries[i]
		if !x.Key.Equal(y.Key) || !x.Installed.Equal(y.Installed) || x.Serial != y.Serial ||
			x.Agreed != y.Agreed || x.Seen != y.Seen || x.Confirmed != y.Confirmed || x.Recovery != y.Recovery {
			return false
		}
	}
	return true
}

// stores are the two kinds of journal on disk.
func stores(t *testing.T, f func(t *testing.T, open func() (*files, error), dir string)) {
	for _, encrypted := range []bool{false, true} {
		name := "plain"
		if encrypted {
			name = "encrypted"
		}
		t.Run(name, func(t *testing.T) {
			base := t.TempDir()
			c := &config.Config{Interface: "wg0", Peers: []*config.Peer{{PublicKey: lisbon, Fallback: config.FallbackInitial}, {PublicKey: madrid}}}
			dir := JournalDir(base, "wg0")
			if encrypted {
				keyFile := filepath.Join(base, "journal.key")
				if err := os.WriteFile(keyFile, []byte(strings.Repeat("A", 42)+"8=\n"), 0o600); err != nil {
					t.Fatal(err)
				}
				dir = filepath.Join(base, "persistent")
				c.Journal = &config.Journal{Path: dir, KeyFile: keyFile}
			}
			f(t, func() (*files, error) { return openStore(c, base, base) }, dir)
		})
	}
}

// A recovery key is read back as one; where fallback: initial has come since,
// the recorded PSK takes its place.
func TestJournalRecovery(t *testing.T) {
	stores(t, func(t *testing.T, open func() (*files, error), _ string) {
		f, err := open()
		if err != nil {
			t.Fatal(err)
		}
		want := sample(t)
		want.Entries[0].Recovery = true
		if err := f.Save(madrid, &want); err != nil {
			t.Fatal(err)
		}
		if got, err := f.Load(madrid); err != nil || !same(got, want) {
			t.Errorf("it is not read back: %v", err)
		}
		f.records[madrid] = true
		got, err := f.Load(madrid)
		if want.Entries = want.Entries[1:]; err != nil || !same(got, want) {
			t.Errorf("with fallback: %d entries, %v", len(got.Entries), err)
		}
	})
}

func TestJournal(t *testing.T) {
	stores(t, func(t *testing.T, open func() (*files, error), dir string) {
		f, err := open()
		if err != nil {
			t.Fatal(err)
		}
		if j, err := f.Load(madrid); err != nil || len(j.Entries) != 0 {
			t.Fatalf("a journal that was never written: %d entries, %v", len(j.Entries), err)
		}
		first, second := sample(t), sample(t)
		second.High = 10
		for _, j := range []rotation.Journal{first, second} {
			if err := f.Save(madrid, &j); err != nil {
				t.Fatal(err)
			}
		}
		f, err = open() // another process
		if err != nil {
			t.Fatal(err)
		}
		if j, err := f.Load(madrid); err != nil || !same(j, second) {
			t.Errorf("the journal came back otherwise: %v", err)
		}
		entries, err := os.ReadDir(dir)
		if err != nil || len(entries) != 1 {
			t.Fatalf("%d files, %v", len(entries), err)
		}
		info, err := entries[0].Info()
		if err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("mode %v, %v", info.Mode(), err)
		}
		raw, err := os.ReadFile(filepath.Join(dir, entries[0].Name()))
		if err != nil {
			t.Fatal(err)
		}
		if in := bytes.Contains(raw, second.Entries[1].Key.Bytes()); in == (f.key != nil) {
			t.Errorf("key in the file: %v", in)
		}
	})
}

// TestJournalDamaged: a journal that is damaged, cut short, or another peer's
// is set aside with an error, and the next one is written beside it.
func TestJournalDamaged(t *testing.T) {
	damages := map[string]func(b []byte) []byte{
		"a bit flipped": func(b []byte) []byte { b[len(b)/2] ^= 1; return b },
		"cut short":     func(b []byte) []byte { return b[:len(b)-1] },
		"longer":        func(b []byte) []byte { return append(b, 0) },
		"empty":         func([]byte) []byte { return nil },
		"text":          func([]byte) []byte { return []byte("keyturn journal 1\n") },
	}
	stores(t, func(t *testing.T, open func() (*files, error), dir string) {
		for what, damage := range damages {
			f, err := open()
			if err != nil {
				t.Fatal(err)
			}
			j := sample(t)
			if err := f.Save(madrid, &j); err != nil {
				t.Fatal(err)
			}
			path := name(dir, madrid)
			raw, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path, damage(raw), 0o600); err != nil {
				t.Fatal(err)
			}
			if got, err := f.Load(madrid); err == nil || len(got.Entries) != 0 || !strings.Contains(err.Error(), "set aside") {
				t.Errorf("%s: %d entries, error %v", what, len(got.Entries), err)
			}
			if _, err := os.Stat(path + ".bad0"); err != nil {
				t.Errorf("%s: %v", what, err)
			}
		}
		f, err := open()
		if err != nil {
			t.Fatal(err)
		}
		j := sample(t)
		if err := f.Save(madrid, &j); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(name(dir, madrid), name(dir, lisbon)); err != nil {
			t.Fatal(err)
		}
		if got, err := f.Load(lisbon); err == nil || len(got.Entries) != 0 {
			t.Errorf("another peer's journal: %d entries, error %v", len(got.Entries), err)
		}
	})
}

// TestInitialRecordedOnce: the PSK found at the first start survives the loss
// of the journal, and later ones do not replace it.
func TestInitialRecordedOnce(t *testing.T) {
	stores(t, func(t *testing.T, open func() (*files, error), dir string) {
		f, err := open()
		if err != nil {
			t.Fatal(err)
		}
		first, second := sample(t), sample(t)
		for _, j := range []rotation.Journal{first, second} {
			if err := f.Save(lisbon, &j); err != nil {
				t.Fatal(err)
			}
			if err := f.Save(madrid, &j); err != nil {
				t.Fatal(err)
			}
		}
		if err := empty(dir); err != nil { // a reboot
			t.Fatal(err)
		}
		if f, err = open(); err != nil {
			t.Fatal(err)
		}
		j, err := f.Load(lisbon)
		if err != nil || len(j.Entries) != 1 || !j.Entries[0].Key.Equal(first.Entries[0].Key) {
			t.Errorf("%d entries after the reboot, %v", len(j.Entries), err)
		}
		if j, err := f.Load(madrid); err != nil || len(j.Entries) != 0 {
			t.Errorf("without fallback: %d entries, %v", len(j.Entries), err)
		}
	})
}

func TestForget(t *testing.T) {
	stores(t, func(t *testing.T, open func() (*files, error), dir string) {
		f, err := open()
		if err != nil {
			t.Fatal(err)
		}
		j := sample(t)
		if err := f.Save(madrid, &j); err != nil {
			t.Fatal(err)
		}
		foreign := filepath.Join(dir, "notes.txt")
		if err := os.WriteFile(foreign, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		base := filepath.Dir(dir)
		for range 2 {
			if err := Forget(base, base, "wg0", &config.Journal{Path: dir}); err != nil {
				t.Fatal(err)
			}
		}
		entries, err := os.ReadDir(dir)
		if err != nil || len(entries) != 1 || entries[0].Name() != "notes.txt" {
			t.Errorf("left %v, %v: what is not ours must stay, and nothing else", entries, err)
		}
	})
}

func TestJournalKey(t *testing.T) {
	for what, text := range map[string]string{"empty": "", "short": "AAAA\n", "zero": strings.Repeat("A", 43) + "=\n", "text": "hello world"} {
		path := filepath.Join(t.TempDir(), "key")
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := readKey(path); err == nil {
			t.Errorf("%s: taken for a key", what)
		}
	}
}

// FuzzJournal: whatever a journal is read from, it is written to again.
func FuzzJournal(f *testing.F) {
	s := &files{}
	for _, j := range []rotation.Journal{{}, sample(f)} {
		b, err := s.encode(&j, madrid)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b[:len(b)-sha256.Size])
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		sum := sha256.Sum256(append(madrid[:len(madrid):len(madrid)], b...)) // which no fuzzer would find
		b = append(b[:len(b):len(b)], sum[:]...)
		j, err := s.decode(bytes.Clone(b), madrid)
		if err != nil {
			return
		}
		again, err := s.encode(&j, madrid)
		if err != nil || !bytes.Equal(again, b) {
			t.Errorf("a journal of %d entries is written otherwise: %v", len(j.Entries), err)
		}
	})
}
