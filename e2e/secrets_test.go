//go:build e2e

package e2e

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"keyturn/internal/psk"
)

// TestSecrets: nothing that a rotator shows of itself holds a byte of a key:
// arguments, environment, open files, the control socket's answer, and, as
// after every test, logs, run and state directories and what commands print.
// Other users reach none of it, and a crash leaves no core and no key.
func TestSecrets(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	a, b := l.host("lisbon"), l.host("porto")
	qkd := l.kmes(a, b)
	qkd.start()
	connect(a, b)
	share(a, b)
	a.handshake(b)
	how := settings{"fallback": "initial"}
	a.keyturn("up", a.write(settings{"kms": qkd.kms(a)}, b.as().with(how).with(qkd.peer(b))))
	b.keyturn("up", b.write(settings{"kms": qkd.kms(b)}, a.as().with(how).with(qkd.peer(a))))
	rotateThrice(t, a, b, eventuallyRotated(t, a, b, psk.Fingerprint{}))
	s, err := a.status()
	if err != nil {
		t.Fatal(err)
	}

	a.recordProcess(s.PID)
	a.recordSocket()
	if leaks := l.leaks(); len(leaks) > 0 {
		t.Errorf("key material in %v", leaks)
	}

	// Everything above keyturn's own files is open: what is closed, it closed.
	for _, dir := range []string{l.dir, a.path(), a.path("run"), a.path("state"), a.path("log")} {
		if err := os.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	a.mustBeClosed(s.PID)

	// SIGABRT makes the Go runtime print every stack, and a core if it may.
	a.signal(s.PID, unix.SIGABRT)
	eventually(t, 10*time.Second, "the end of the rotator", func() error {
		return a.in(func() error {
			if _, err := os.Stat(fmt.Sprintf("/proc/%d", s.PID)); err == nil {
				return errors.New("it runs")
			}
			return nil
		})
	})
	text, err := os.ReadFile(a.path("log", wg0+".log"))
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(text), "SIGABRT") {
		t.Error("the crash is not in the log")
	}
	for _, k := range l.secrets {
		// Stacks show words of eight bytes, as numbers.
		for i := 0; i < psk.Size; i += 8 {
			if word := binary.LittleEndian.Uint64(k.Bytes()[i:]); strings.Contains(string(text), fmt.Sprintf("%#x", word)) {
				t.Error("a word of a key is in the stacks of the crash")
			}
		}
	}
	a.keyturn("up", wg0)
	rotateAgain(t, a, b, agree(t, a, b))
}

// recordProcess keeps, to be searched for keys, what a process shows of itself
// in /proc, and what it has open but for the journals.
func (h *host) recordProcess(pid int) {
	h.lab.t.Helper()
	proc := fmt.Sprintf("/proc/%d", pid)
	err := h.in(func() error {
		limits, err := os.ReadFile(proc + "/limits")
		if err != nil {
			return err
		}
		if !strings.Contains(strings.Join(strings.Fields(string(limits)), " "), "Max core file size 0 0 ") {
			return errors.New("a core may be written")
		}
		for _, name := range []string{"cmdline", "environ", "comm", "maps", "status", "mountinfo"} {
			text, err := os.ReadFile(filepath.Join(proc, name))
			if err != nil {
				return err
			}
			h.lab.record(h.name+": "+name, text)
		}
		open, err := os.ReadDir(proc + "/fd")
		if err != nil {
			return err
		}
		for _, fd := range open {
			path := filepath.Join(proc, "fd", fd.Name())
			target, err := os.Readlink(path)
			if err != nil {
				continue // closed meanwhile
			}
			h.lab.record(h.name+": open file", []byte(target))
			if i, err := os.Stat(path); err == nil && i.Mode().IsRegular() && filepath.IsAbs(target) {
				if strings.Contains(target, ".journal") || strings.HasSuffix(target, ".key") {
					return fmt.Errorf("%s is kept open", target)
				}
				text, err := os.ReadFile(path)
				if err != nil {
					return err
				}
				h.lab.record(h.name+": content of "+target, text)
			}
		}
		return nil
	})
	if err != nil {
		h.lab.t.Error(err)
	}
}

// recordSocket keeps what the control socket answers, byte for byte.
func (h *host) recordSocket() {
	h.lab.t.Helper()
	err := h.in(func() error {
		c, err := net.Dial("unix", h.path("run", wg0+".sock"))
		if err != nil {
			return err
		}
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(5 * time.Second))
		for _, path := range []string{"/status", "/v1/status", "/"} {
			if _, err := fmt.Fprintf(c, "GET %s HTTP/1.1\r\nHost: x\r\n\r\n", path); err != nil {
				return err
			}
			b := make([]byte, 64<<10)
			n, err := c.Read(b)
			if err != nil {
				return err
			}
			h.lab.record(h.name+": "+path, b[:n])
		}
		return nil
	})
	if err != nil {
		h.lab.t.Error(err)
	}
}

// mustBeClosed tries, as a user without rights, everything that leads to a key.
func (h *host) mustBeClosed(pid int) {
	h.lab.t.Helper()
	proc := fmt.Sprintf("/proc/%d", pid)
	journals, err := filepath.Glob(h.path("run", "*.journal"))
	if err != nil || len(journals) == 0 {
		h.lab.t.Fatalf("no journal, %v", err)
	}
	initials, err := filepath.Glob(h.path("state", "*.initial"))
	if err != nil || len(initials) == 0 {
		h.lab.t.Fatalf("no initial keys, %v", err)
	}
	reads := append(append(journals, initials...),
		h.path("log", wg0+".log"), h.path("identity.key"), proc+"/mem", proc+"/environ", proc+"/fd", proc+"/maps")
	err = h.in(func() error {
		const nobody = 65534
		for _, call := range []uintptr{unix.SYS_SETRESGID, unix.SYS_SETRESUID} { // of this thread alone
			if _, _, errno := syscall.RawSyscall(call, nobody, nobody, nobody); errno != 0 {
				return fmt.Errorf("become another user: %w", errno)
			}
		}
		if _, err := os.Stat(h.path("run")); err != nil {
			return fmt.Errorf("the other user does not get as far as keyturn's files: %w", err)
		}
		for _, name := range reads {
			f, err := os.Open(name)
			if err == nil {
				// maps and the like are judged at the first read.
				_, err = f.Read(make([]byte, 1))
				f.Close()
			}
			if !errors.Is(err, fs.ErrPermission) {
				return fmt.Errorf("another user opens %s: %w", name, err)
			}
		}
		c, err := net.Dial("unix", h.path("run", wg0+".sock"))
		if err == nil {
			c.Close()
		}
		if !errors.Is(err, fs.ErrPermission) {
			return fmt.Errorf("another user reaches the control socket: %w", err)
		}
		return nil
	})
	if errors.Is(err, unix.EINVAL) {
		h.lab.t.Log("no other user exists in this user namespace")
		return
	}
	if err != nil {
		h.lab.t.Error(err)
	}
}
