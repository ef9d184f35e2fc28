package detach

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// The test binary plays the daemon too, and the starter that is killed.
func TestMain(m *testing.M) {
	if len(os.Args) == 4 && os.Args[1] == "play" {
		play(os.Args[2], os.Args[3])
		return
	}
	os.Exit(m.Run())
}

func play(part, arg string) {
	if part == "starter" {
		_ = Start(context.Background(), []string{"play", "slow", arg}, os.Stderr)
		return
	}
	r, err := Child()
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	switch part {
	case "look":
		err := Harden()
		b, _ := json.Marshal(look(err))
		_ = os.WriteFile(arg, b, 0o666)
		r.Ready()
	case "refuse":
		_ = r.NotReady(arg)
		os.Exit(1)
	case "die":
		fmt.Println("last words")
		os.Exit(7)
	case "hang": // neither ready nor impressed by SIGTERM
		_, _ = os.ReadFile(arg)
	case "slow":
		_, _ = os.ReadFile(arg) // until the test lets go
		r.Ready()
		_ = os.WriteFile(arg, []byte("still here"), 0)
	}
}

// situation is what a daemon finds itself in.
type situation struct {
	Dir       string
	Leads     bool // a session and process group of its own
	Terminal  bool
	Stdin     string
	Open      []string // descriptors but the readiness pipe and the list itself
	Umask     int
	CoreLimit uint64
	Dumpable  int
	Notify    string
	Error     string
}

func look(err error) situation {
	var s situation
	s.Dir, _ = os.Getwd()
	sid, _ := unix.Getsid(0)
	s.Leads = sid == os.Getpid() && unix.Getpgrp() == os.Getpid()
	if tty, err := os.OpenFile("/dev/tty", os.O_RDWR, 0); err == nil {
		s.Terminal = true
		tty.Close()
	}
	s.Stdin, _ = os.Readlink("/proc/self/fd/0")
	for fd := range 64 {
		var stat unix.Stat_t
		flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0)
		// What the Go runtime opens for itself is closed on exec.
		if err == nil && flags&unix.FD_CLOEXEC == 0 && unix.Fstat(fd, &stat) == nil {
			s.Open = append(s.Open, fmt.Sprint(fd))
		}
	}
	s.Umask = unix.Umask(0o077)
	var limit unix.Rlimit
	_ = unix.Getrlimit(unix.RLIMIT_CORE, &limit)
	s.CoreLimit = limit.Max
	s.Dumpable, _ = unix.PrctlRetInt(unix.PR_GET_DUMPABLE, 0, 0, 0, 0)
	s.Notify = os.Getenv("NOTIFY_SOCKET")
	if err != nil {
		s.Error = err.Error()
	}
	return s
}

func output(t *testing.T) *os.File {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "output"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func TestDaemonsSituation(t *testing.T) {
	t.Setenv("NOTIFY_SOCKET", "/nowhere")
	// A descriptor as a shell would leave it to us: inherited.
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	leaked, err := unix.FcntlInt(w.Fd(), unix.F_DUPFD, 20)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(leaked)

	found := filepath.Join(t.TempDir(), "found")
	if err := Start(t.Context(), []string{"play", "look", found}, output(t)); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(found)
	if err != nil {
		t.Fatal(err)
	}
	var got situation
	if err := json.Unmarshal(b, &got); err != nil {
		t.Fatal(err)
	}
	want := situation{Dir: "/", Leads: true, Stdin: "/dev/null", Open: []string{"0", "1", "2"}, Umask: 0o077}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("-want +got:\n%s", d)
	}
	if info, err := os.Stat(found); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("its files have mode %v, %v", info.Mode(), err)
	}
}

func TestChildSaysWhyNot(t *testing.T) {
	reason := "error: one\nerror: two\n" + strings.Repeat("x", 100<<10)
	err := Start(t.Context(), []string{"play", "refuse", reason}, output(t))
	if no, ok := errors.AsType[NotReady](err); !ok || string(no) != reason {
		t.Errorf("got %T of %d bytes, want a NotReady of %d", err, len(err.Error()), len(reason))
	}
}

func TestChildDies(t *testing.T) {
	out, err := Output()
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	err = Start(t.Context(), []string{"play", "die", ""}, out)
	if !errors.Is(err, ErrSilent) || !strings.Contains(err.Error(), "exit status 7") {
		t.Errorf("got %v", err)
	}
	if said := Said(out); said != "last words\n" {
		t.Errorf("its output was %q", said)
	}
	long := strings.Repeat("x", maxSaid)
	if _, err := out.WriteString(long); err != nil || Said(out) != long {
		t.Errorf("%v, %d bytes of a long output", err, len(Said(out)))
	}
}

// fifo is a named pipe: reading it waits until the test writes to it.
func fifo(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "fifo")
	if err := syscall.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestImpatience(t *testing.T) {
	ctx, cancel := context.WithCancelCause(t.Context())
	why := errors.New("interrupted")
	path := fifo(t)
	go func() {
		// The open returns when the child has come to its reading end.
		f, err := os.OpenFile(path, os.O_WRONLY, 0)
		if err == nil {
			defer f.Close()
		}
		cancel(why)
		<-t.Context().Done()
	}()
	if err := Start(ctx, []string{"play", "hang", path}, output(t)); !errors.Is(err, why) {
		t.Errorf("got %v", err)
	}
	// Nobody reads any more: the child has ended.
	if fd, err := unix.Open(path, unix.O_WRONLY|unix.O_NONBLOCK, 0); err == nil {
		unix.Close(fd)
		t.Error("the child is still there")
	}
}

// A starter that is killed while it waits takes nothing with it.
func TestStarterIsKilled(t *testing.T) {
	path := fifo(t)
	starter := exec.Command("/proc/self/exe", "play", "starter", path)
	if err := starter.Start(); err != nil {
		t.Fatal(err)
	}
	hold, err := os.OpenFile(path, os.O_WRONLY, 0) // the child is there
	if err != nil {
		t.Fatal(err)
	}
	if err := starter.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = starter.Wait()
	hold.Close()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if b, err := io.ReadAll(f); string(b) != "still here" {
		t.Errorf("the child wrote %q, %v", b, err)
	}
}

func TestNotStartedByStart(t *testing.T) {
	cmd := exec.Command("/proc/self/exe", "play", "look", "/dev/null")
	if b, err := cmd.CombinedOutput(); err == nil || !strings.Contains(string(b), "not started by keyturn up") {
		t.Errorf("%v: %q", err, b)
	}
}
