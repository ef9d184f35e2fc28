package registry

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func entry(t *testing.T, iface string) Entry {
	t.Helper()
	self, err := Self()
	if err != nil {
		t.Fatal(err)
	}
	return Entry{
		Interface: iface, Config: "/etc/keyturn/" + iface + ".yaml", Process: self,
		StartedAt: time.Date(2026, 11, 22, 10, 0, 0, 0, time.UTC),
	}
}

func TestPutGetRemove(t *testing.T) {
	r := Open(filepath.Join(t.TempDir(), "state"))
	if names, err := r.Interfaces(); err != nil || names != nil {
		t.Fatalf("before the first Put: %v, %v", names, err)
	}
	if _, err := r.Get("wg0"); !errors.Is(err, ErrUnknown) {
		t.Fatalf("unknown interface: %v", err)
	}
	for _, name := range []string{"wg1", "wg0", "wg0.5"} {
		if err := r.Put(entry(t, name)); err != nil {
			t.Fatal(err)
		}
	}
	// What a crash in the middle of Put leaves is no entry.
	if err := os.WriteFile(filepath.Join(r.dir, ".wg9.json-123"), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	names, err := r.Interfaces()
	if d := cmp.Diff([]string{"wg0", "wg0.5", "wg1"}, names); err != nil || d != "" {
		t.Errorf("interfaces: %v %s", err, d)
	}
	want := entry(t, "wg0")
	want.Process = Process{}
	if err := r.Put(want); err != nil {
		t.Fatal(err)
	}
	got, err := r.Get("wg0")
	if d := cmp.Diff(want, got); err != nil || d != "" {
		t.Errorf("the second Put did not replace the first: %v %s", err, d)
	}
	for range 2 {
		if err := r.Remove("wg0"); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := r.Get("wg0"); !errors.Is(err, ErrUnknown) {
		t.Errorf("removed interface: %v", err)
	}
	if _, err := r.Get("wg0.5"); err != nil {
		t.Errorf("removing wg0 took wg0.5 with it: %v", err)
	}
	info, err := os.Stat(r.path("wg1"))
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("entry has mode %v, %v", info.Mode(), err)
	}
}

func TestNamesThatAreNoInterface(t *testing.T) {
	r := Open(t.TempDir())
	for _, name := range []string{"", ".", "..", "a/b", "../wg0", "wg 0", "wg:0", "wg\n", "sixteen-letters-", "wgé"} {
		_, err := r.Get(name)
		_, lockErr := TakeLock(t.TempDir(), name)
		put := entry(t, name)
		for what, err := range map[string]error{
			"check": CheckInterface(name), "get": err, "remove": r.Remove(name), "put": r.Put(put), "lock": lockErr,
		} {
			if err == nil {
				t.Errorf("%s takes %q for an interface", what, name)
			}
		}
	}
	if err := CheckInterface("fifteen-letters"); err != nil {
		t.Error(err)
	}
}

func TestDamagedEntry(t *testing.T) {
	r := Open(t.TempDir())
	for name, content := range map[string]string{
		"empty":          "",
		"not JSON":       "wg0",
		"half":           `{"interface": "wg0", "config": "/x`,
		"two values":     `{"interface":"wg0","config":"/x"} {}`,
		"unknown field":  `{"interface":"wg0","config":"/x","psk":"x"}`,
		"relative path":  `{"interface":"wg0","config":"wg0.yaml"}`,
		"of another one": `{"interface":"wg1","config":"/x"}`,
		"endless":        `{"interface":"wg0","config":"/` + strings.Repeat("x", maxEntry) + `"}`,
	} {
		if err := os.WriteFile(r.path("wg0"), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		if e, err := r.Get("wg0"); err == nil || errors.Is(err, ErrUnknown) {
			t.Errorf("%s: %+v, %v", name, e, err)
		}
	}
	if err := r.Put(entry(t, "wg0")); err != nil {
		t.Errorf("a damaged entry cannot be replaced: %v", err)
	}
}

// procDir is a /proc that the test writes.
type procDir string

func (d procDir) set(t *testing.T, boot string, pid int, stat string) {
	t.Helper()
	for name, content := range map[string]string{
		"sys/kernel/random/boot_id": boot + "\n",
		fmt.Sprintf("%d/stat", pid): stat,
	} {
		path := filepath.Join(string(d), name)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// stat makes the line of a process whose name is out to mislead.
func stat(pid int, state byte, start int) string {
	return fmt.Sprintf("%d (a) Z 1 (b) %c%s %d 0 0\n", pid, state, strings.Repeat(" 7", 18), start)
}

func TestPIDIsUsedAgain(t *testing.T) {
	proc := procDir(t.TempDir())
	proc.set(t, "boot-1", 42, stat(42, 'S', 1000))
	p := Process{PID: 42, BootID: "boot-1", Start: 1000}
	if !p.aliveIn(string(proc)) {
		t.Fatal("a running process is not alive")
	}
	for _, tc := range []struct {
		what, boot, stat string
	}{
		{"the ID belongs to another process", "boot-1", stat(42, 'S', 1001)},
		{"the host was booted again", "boot-2", stat(42, 'S', 1000)},
		{"it has ended and is only waited for", "boot-1", stat(42, 'Z', 1000)},
		{"the line is short", "boot-1", "42 (x) S 1 2 3\n"},
		{"the line is empty", "boot-1", ""},
	} {
		proc.set(t, tc.boot, 42, tc.stat)
		if p.aliveIn(string(proc)) {
			t.Errorf("%s: still taken for alive", tc.what)
		}
	}
	if (Process{PID: 43, BootID: "boot-1"}).aliveIn(string(proc)) || (Process{}).Alive() {
		t.Error("a process that is not there is alive")
	}
}

// Kill -9 leaves the entry as it was; Alive tells all the same.
func TestKilledProcess(t *testing.T) {
	self, err := Self()
	if err != nil || !self.Alive() {
		t.Fatalf("this process is not alive: %v", err)
	}
	cmd := exec.Command("/bin/cat")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	p, err := find("/proc", cmd.Process.Pid)
	if err != nil || !p.Alive() {
		t.Errorf("a running child is not alive: %v", err)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	if p.Alive() {
		t.Error("a killed child is alive")
	}
}

func TestLockIsHeldByOne(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "run")
	first, err := TakeLock(dir, "wg0")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := TakeLock(dir, "wg0"); !errors.Is(err, ErrLocked) {
		t.Fatalf("second lock: %v", err)
	}
	other, err := TakeLock(dir, "wg1")
	if err != nil {
		t.Fatalf("lock of another interface: %v", err)
	}
	other.Release()
	first.Release()
	again, err := TakeLock(dir, "wg0")
	if err != nil {
		t.Fatalf("lock after its release: %v", err)
	}
	if !Locked(dir, "wg0") {
		t.Error("a lock that is held is not seen")
	}
	again.Release()
	if Locked(dir, "wg0") {
		t.Error("a lock that was released is still seen")
	}
}

// TestLockFileRemoved: a lock on a file that its holder has removed meanwhile
// would be worth nothing beside one on the file that the next one makes.
func TestLockFileRemoved(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "run")
	for range 200 {
		first, err := TakeLock(dir, "wg0")
		if err != nil {
			t.Fatal(err)
		}
		removed := make(chan error, 1)
		go func() {
			err := first.Remove()
			os.Remove(dir)
			removed <- err
		}()
		var held []*Lock
		for range 100 {
			if l, err := TakeLock(dir, "wg0"); err == nil {
				held = append(held, l)
			} else if !errors.Is(err, ErrLocked) {
				t.Fatal(err)
			}
		}
		if err := <-removed; err != nil {
			t.Fatal(err)
		}
		if len(held) > 1 {
			t.Fatalf("%d locks are held at one time", len(held))
		}
		for _, l := range held {
			l.Release()
		}
	}
	if Locked(filepath.Join(t.TempDir(), "none"), "wg0") {
		t.Error("a lock is held where there is no directory")
	}
}

func FuzzEntry(f *testing.F) {
	f.Add([]byte(`{"interface":"wg0","config":"/x","process":{"pid":1,"boot_id":"b","start_time":2},"started_at":"2026-11-22T10:00:00Z"}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		e, err := decode(b)
		if err != nil {
			return
		}
		first, err := json.Marshal(e)
		if err != nil {
			t.Fatal(err)
		}
		again, err := decode(first)
		if err != nil {
			t.Fatalf("does not parse what it wrote: %v\n%s", err, first)
		}
		if second, _ := json.Marshal(again); !bytes.Equal(first, second) {
			t.Fatalf("%s became %s", first, second)
		}
	})
}

func FuzzParseStat(f *testing.F) {
	f.Add([]byte(stat(42, 'S', 1000)))
	f.Add([]byte(")"))
	f.Fuzz(func(_ *testing.T, b []byte) { _, _ = parseStat(b) })
}
