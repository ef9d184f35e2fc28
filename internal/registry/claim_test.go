package registry

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// ownName is an interface that no other process claims.
func ownName(n int) string { return fmt.Sprintf("kt%d.%d", os.Getpid(), n) }

func TestClaimIsHeldByOne(t *testing.T) {
	first, err := TakeClaim(t.Context(), ownName(1), "/run/first")
	if err != nil {
		t.Fatal(err)
	}
	defer first.Release()
	_, err = TakeClaim(t.Context(), ownName(1), "/run/second")
	held, ok := errors.AsType[*HeldError](err)
	if !ok || !errors.Is(err, ErrLocked) || *held != (HeldError{Rotator: true, PID: os.Getpid(), UID: os.Geteuid(), RunDir: "/run/first"}) {
		t.Fatalf("second claim: %v", err)
	}
	if want := fmt.Sprintf("already running: process %d, run directory /run/first", os.Getpid()); !strings.Contains(err.Error(), want) {
		t.Errorf("it says %q", err)
	}
	other, err := TakeClaim(t.Context(), ownName(2), "/run/first")
	if err != nil {
		t.Fatalf("claim of another interface: %v", err)
	}
	other.Release()
	first.Release()
	again, err := TakeClaim(t.Context(), ownName(1), "/run/second")
	if err != nil {
		t.Fatalf("claim after its release: %v", err)
	}
	again.Release()
	if _, err := TakeClaim(t.Context(), "../x", "/run"); err == nil {
		t.Error("a claim of what is no interface")
	}
}

// asNobody runs f on a thread of another user, without privileges.
func asNobody(t *testing.T, f func() error) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("missing privilege: root, to be another user")
	}
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		const nobody = 65534
		if _, _, errno := syscall.RawSyscall(unix.SYS_SETRESUID, nobody, nobody, nobody); errno != 0 {
			done <- errno
			return
		}
		done <- f()
	}()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

// TestClaimSquatted: what another user holds is named, and is no rotator,
// whether he listens, answers, or does neither.
func TestClaimSquatted(t *testing.T) {
	var l net.Listener
	asNobody(t, func() (err error) {
		l, err = net.Listen("unix", claimPrefix+ownName(3))
		return err
	})
	_, err := TakeClaim(t.Context(), ownName(3), "/run/first")
	held, ok := errors.AsType[*HeldError](err)
	if !ok || errors.Is(err, ErrLocked) || *held != (HeldError{PID: os.Getpid(), UID: 65534}) {
		t.Errorf("a name held by another user: %+v, %v", held, err)
	}
	l.Close()
}

// TestClaimOfDying: the socket of a process that was killed goes a little later
// than the signal comes.
func TestClaimOfDying(t *testing.T) {
	l, err := net.Listen("unix", claimPrefix+ownName(6))
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		for range 3 {
			if c, err := l.Accept(); err == nil {
				c.Close()
			}
		}
		l.Close()
	}()
	c, err := TakeClaim(t.Context(), ownName(6), "/run/next")
	if err != nil {
		t.Fatal(err)
	}
	c.Release()
}

// TestClaimOfStopped: a rotator that is stopped, and so silent, is one.
func TestClaimOfStopped(t *testing.T) {
	l, err := net.Listen("unix", claimPrefix+ownName(7))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	_, err = TakeClaim(t.Context(), ownName(7), "/run/next")
	if held, ok := errors.AsType[*HeldError](err); !ok || *held != (HeldError{Rotator: true, PID: os.Getpid(), UID: os.Geteuid()}) {
		t.Errorf("got %v", err)
	}
}

// TestClaimNotAnswered: a name that is bound only, and so shows no user.
func TestClaimNotAnswered(t *testing.T) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := unix.Bind(fd, &unix.SockaddrUnix{Name: claimPrefix + ownName(4)}); err != nil {
		t.Fatal(err)
	}
	_, err = TakeClaim(t.Context(), ownName(4), "/run/first")
	if held, ok := errors.AsType[*HeldError](err); !ok || errors.Is(err, ErrLocked) || held.UID != -1 {
		t.Errorf("a name that nobody listens at: %v", err)
	}
}

// TestClaimFlooded: a user without privileges cannot hide a rotator by
// connections that he leaves open, nor learn its run directory.
func TestClaimFlooded(t *testing.T) {
	c, err := TakeClaim(t.Context(), ownName(5), "/run/first")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Release()
	var open []net.Conn
	asNobody(t, func() error {
		for range 500 {
			conn, err := new(net.Dialer).DialContext(context.Background(), "unix", claimPrefix+ownName(5))
			if err != nil {
				return err
			}
			open = append(open, conn)
		}
		if n, err := open[0].Read(make([]byte, 1)); n != 0 || err == nil {
			return fmt.Errorf("another user reads %d bytes", n)
		}
		return nil
	})
	defer func() {
		for _, conn := range open {
			conn.Close()
		}
	}()
	if _, err := TakeClaim(t.Context(), ownName(5), "/run/second"); !errors.Is(err, ErrLocked) {
		t.Errorf("beside them: %v", err)
	}
}
