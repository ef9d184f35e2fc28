package logfile

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

func mustRead(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestLogIsBounded(t *testing.T) {
	const max = 1000
	path := Path(filepath.Join(t.TempDir(), "log"), "wg0")
	f, err := Open(path, max)
	if err != nil {
		t.Fatal(err)
	}
	const lines = 500 // fewer than fit the queue: none is dropped
	for i := range lines {
		fmt.Fprintf(f, "line %03d of the log\n", i)
	}
	f.Close()
	now, old := mustRead(t, path), mustRead(t, path+".1")
	if len(now) > max || len(old) > max {
		t.Errorf("%d and %d bytes, want %d at most", len(now), len(old), max)
	}
	last := fmt.Sprintf("line %03d of the log\n", lines-1)
	if !strings.HasSuffix(now, last) || strings.Count(old+now, "\n")*len(last) != len(old+now) {
		t.Error("the newest lines are not there whole")
	}
	if n := f.Dropped(); n != 0 {
		t.Errorf("%d lines dropped", n)
	}
	files, err := os.ReadDir(filepath.Dir(path))
	if err != nil || len(files) != 2 {
		t.Errorf("%d files, want 2 (%v)", len(files), err)
	}
}

func TestLogIsPrivateAndAppendedTo(t *testing.T) {
	path := filepath.Join(t.TempDir(), "wg0.log")
	for _, line := range []string{"one\n", "two\n"} {
		f, err := Open(path, Size)
		if err != nil {
			t.Fatal(err)
		}
		f.Write([]byte(line))
		f.Close()
		f.Write([]byte("after the end\n"))
		if f.Dropped() != 1 {
			t.Error("a line after the end was not counted")
		}
	}
	if got := mustRead(t, path); got != "one\ntwo\n" {
		t.Errorf("log is %q", got)
	}
	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
}

func TestLongLineIsCut(t *testing.T) {
	path := filepath.Join(t.TempDir(), "wg0.log")
	f, err := Open(path, Size)
	if err != nil {
		t.Fatal(err)
	}
	long := bytes.Repeat([]byte("x"), 10*maxLine)
	f.Write(long)
	f.Close()
	got := mustRead(t, path)
	if len(got) != maxLine || !strings.HasSuffix(got, "x\n") {
		t.Errorf("%d bytes ending in %q", len(got), got[len(got)-2:])
	}
	if long[maxLine-1] != 'x' {
		t.Error("the caller's bytes were changed")
	}
}

func TestOpenNeedsAPlace(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "log"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(filepath.Join(dir, "log", "wg0.log"), Size); err == nil {
		t.Error("opened a log under a file")
	}
	if err := os.Symlink(filepath.Join(dir, "log"), filepath.Join(dir, "wg0.log")); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(filepath.Join(dir, "wg0.log"), Size); err == nil {
		t.Error("followed a symbolic link")
	}
}

// disk is a log file on a disk that fills up and hangs: each Write waits to be
// told how many bytes it finds free.
type disk struct {
	*os.File
	free chan int
}

func (d *disk) Write(b []byte) (int, error) {
	free, ok := <-d.free
	if ok && len(b) > free {
		n, _ := d.File.Write(b[:free])
		return n, syscall.ENOSPC
	}
	return d.File.Write(b)
}

func openDisk(t *testing.T, d *disk) (*File, string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "wg0.log")
	f, err := newFile(path, Size, func(p string) (sink, error) {
		var err error
		d.File, err = os.OpenFile(p, os.O_RDWR|os.O_CREATE|os.O_APPEND, 0o600)
		return d, err
	})
	if err != nil {
		t.Fatal(err)
	}
	return f, path
}

// A full disk costs lines, which the log tells of once there is room again;
// no line is there in part.
func TestFullDisk(t *testing.T) {
	d := &disk{free: make(chan int)}
	f, path := openDisk(t, d)
	for _, line := range []string{"first\n", "second\n", "third\n", "fourth\n"} {
		f.Write([]byte(line))
	}
	d.free <- 10 // first
	d.free <- 4  // second, in part
	d.free <- 0  // the note of it
	d.free <- 0  // third
	close(d.free)
	f.Close()
	got := mustRead(t, path)
	if !strings.HasPrefix(got, "first\ntime=") || !strings.HasSuffix(got, " lines=2\nfourth\n") {
		t.Errorf("log is %q", got)
	}
	if f.Dropped() != 2 {
		t.Errorf("%d lines dropped, want 2", f.Dropped())
	}
}

// A disk that hangs never makes the rotator wait.
func TestHangingDisk(t *testing.T) {
	d := &disk{free: make(chan int)}
	f, _ := openDisk(t, d)
	for range maxQueue + 100 {
		f.Write([]byte("line\n"))
	}
	if n := f.Dropped(); n < 99 || n > 100 { // one may be with the disk
		t.Errorf("%d lines dropped, want 99 or 100", n)
	}
	close(d.free)
	f.Close()
}
