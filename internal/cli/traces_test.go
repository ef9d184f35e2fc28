package cli

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"keyturn/internal/config"
	"keyturn/internal/daemon"
	"keyturn/internal/logfile"
	"keyturn/internal/registry"
)

// tree lists what lies below a directory.
func tree(t *testing.T, root string) []string {
	t.Helper()
	var out []string
	err := filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
		out = append(out, strings.TrimPrefix(path, root))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// bringUp makes everything that a rotator does before it is ready.
func bringUp(t *testing.T, d *dirs, iface, journal string) *registry.Lock {
	t.Helper()
	lock, err := registry.TakeLock(d.run, iface)
	if err != nil {
		t.Fatal(err)
	}
	log, err := logfile.Append(logfile.Path(d.log, iface))
	if err != nil {
		t.Fatal(err)
	}
	log.Close()
	for _, dir := range []string{journal, daemon.InitialDir(d.state, iface)} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	return lock
}

// TestTraces: a rotator that does not get ready takes away all that it made,
// and nothing else.
func TestTraces(t *testing.T) {
	for name, persistent := range map[string]bool{"journal in memory": false, "journal on disk": true} {
		t.Run(name, func(t *testing.T) {
			root := t.TempDir()
			d := &dirs{run: root + "/a/b/run", state: root + "/a/state", log: root + "/log"}
			c := &config.Config{Interface: "wg0"}
			journal := daemon.JournalDir(d.run, "wg0")
			if persistent {
				c.Journal = &config.Journal{Path: root + "/journal"}
				journal = c.Journal.Path
			}
			before := tree(t, root)
			traces := d.tracesOf(c)
			lock := bringUp(t, d, "wg0", journal)
			traces.remove(lock)
			if diff := cmp.Diff(before, tree(t, root)); diff != "" {
				t.Errorf("where there was nothing (-before +after):\n%s", diff)
			}

			// Beside another rotator, and with what an earlier one left.
			bringUp(t, d, "wg1", daemon.JournalDir(d.run, "wg1")).Release()
			bringUp(t, d, "wg0", journal).Release()
			before = tree(t, root)
			traces = d.tracesOf(c)
			traces.remove(bringUp(t, d, "wg0", journal))
			if diff := cmp.Diff(before, tree(t, root)); diff != "" {
				t.Errorf("where there was something (-before +after):\n%s", diff)
			}
			if registry.Locked(d.run, "wg0") {
				t.Error("the lock was not given up")
			}

			// One that comes up meanwhile keeps its own.
			second := &dirs{run: root + "/other/run", state: root + "/other/state", log: root + "/other/log"}
			traces = second.tracesOf(c)
			lock = bringUp(t, second, "wg0", daemon.JournalDir(second.run, "wg0"))
			bringUp(t, second, "wg1", daemon.JournalDir(second.run, "wg1")).Release()
			traces.remove(lock)
			if _, err := os.Stat(registry.LockPath(second.run, "wg1")); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestTracesLog: a log that says something stays.
func TestTracesLog(t *testing.T) {
	root := t.TempDir()
	d := &dirs{run: root + "/run", state: root + "/state", log: root + "/log"}
	c := &config.Config{Interface: "wg0"}
	traces := d.tracesOf(c)
	lock := bringUp(t, d, "wg0", daemon.JournalDir(d.run, "wg0"))
	if traces.logged() {
		t.Error("an empty log says something")
	}
	if err := os.WriteFile(traces.log, []byte("journal cannot be used\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	traces.remove(lock)
	if diff := cmp.Diff([]string{"", "/log", "/log/wg0.log"}, tree(t, root)); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if !traces.logged() {
		t.Error("the log says nothing")
	}
	if d.tracesOf(c).logged() {
		t.Error("what was said before is taken for new")
	}
}

// TestCrashed: what a daemon wrote before it had a log is shown.
func TestCrashed(t *testing.T) {
	var b strings.Builder
	report(&b, crashed{withHint(errors.New("wg0: it ended"), "look"), "panic: oh\n\x1b[31mline\n"})
	if want := "panic: oh\n\ufffd[31mline\nerror: wg0: it ended\nhint: look\n"; b.String() != want {
		t.Errorf("got %q", b.String())
	}
}

// TestForgetDirectories: with the last rotator go the directories that keyturn
// made, and no others.
func TestForgetDirectories(t *testing.T) {
	root := t.TempDir()
	d := &dirs{run: root + "/run", state: root + "/state", log: root + "/log"}
	comesAndGoes := func(iface string) {
		t.Helper()
		e := registry.Entry{Interface: iface, Config: "/nowhere.yaml"}
		if err := d.registry().Put(e); err != nil {
			t.Fatal(err)
		}
		if err := bringUp(t, d, iface, daemon.JournalDir(d.run, iface)).Release(); err != nil {
			t.Fatal(err)
		}
		if out, errOut, code := keyturn(t, d, "rm", iface); code != exitOK || out != iface+": removed\n" {
			t.Fatalf("exit code %d: %s%s", code, out, errOut)
		}
	}
	comesAndGoes("wg0")
	if diff := cmp.Diff([]string{""}, tree(t, root)); diff != "" {
		t.Errorf("of the only rotator stays (-want +got):\n%s", diff)
	}

	if err := errors.Join(os.Mkdir(d.state, 0o755), os.Chmod(d.state, 0o755)); err != nil {
		t.Fatal(err)
	}
	bringUp(t, d, "wg1", daemon.JournalDir(d.run, "wg1")).Release()
	if err := errors.Join(os.Remove(logfile.Path(d.log, "wg1")), os.Remove(daemon.InitialDir(d.state, "wg1"))); err != nil {
		t.Fatal(err)
	}
	comesAndGoes("wg0")
	want := []string{"", "/run", "/run/wg1.journal", "/run/wg1.lock", "/state"}
	if diff := cmp.Diff(want, tree(t, root)); diff != "" {
		t.Errorf("beside another and in a directory of another (-want +got):\n%s", diff)
	}
}
