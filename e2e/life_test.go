//go:build e2e

package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"keyturn/internal/control"
	"keyturn/internal/psk"
)

// TestLife: down, up by the interface's name, kill -9 at either end, rm. The
// tunnel never notices, and the ends are in step again each time.
func TestLife(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	a, b := l.host("lisbon"), l.host("porto")
	connect(a, b)
	a.handshake(b)
	pings := b.ping(a)
	confA := a.write(nil, b.as().with(settings{"role": "client"}))
	a.keyturn("up", confA)
	b.keyturn("up", b.write(nil, a.as().with(settings{"role": "server", "address": nil})))
	eventuallyRotated(t, a, b, psk.Fingerprint{})

	if r := a.try("up", confA); r.code != 1 || !strings.Contains(r.stderr, "already") {
		t.Errorf("up of what is up: exit %d\n%s", r.code, r.stderr)
	}
	a.keyturn("down", wg0)
	if r := a.try("down", wg0); r.code != 1 {
		t.Errorf("down of what is down: exit %d", r.code)
	}
	// Brought down in order is no fault.
	if out := a.keyturn("ls"); !strings.Contains(out, "down") {
		t.Errorf("ls after down:\n%s", out)
	}
	last := agree(t, a, b)
	b.handshake(a)
	mustHold(t, a, b, last)
	a.keyturn("up", wg0)
	last = rotateAgain(t, a, b, last)

	for _, h := range []*host{a, b} {
		s, err := h.status()
		if err != nil {
			t.Fatal(err)
		}
		h.kill9(s.PID)
		eventually(t, 5*time.Second, "ls tells the truth", func() error {
			if r := h.try("ls"); r.code != 3 || !strings.Contains(r.stdout, "down") || !strings.Contains(r.stdout, "without being brought down") {
				return fmt.Errorf("exit %d\n%s", r.code, r.stdout)
			}
			return nil
		})
		if r := h.try("status", wg0); r.code != 3 {
			t.Errorf("status of what was killed: exit %d\n%s", r.code, r.stdout)
		}
		h.keyturn("up", wg0)
		last = rotateAgain(t, a, b, last)
	}

	a.keyturn("rm", wg0)
	mustForget(t, a)
	if r := a.try("status", wg0); r.code != 1 {
		t.Errorf("status of what was removed: exit %d", r.code)
	}
	if out := a.keyturn("ls"); strings.Contains(out, wg0) {
		t.Errorf("ls after rm:\n%s", out)
	}
	last = agree(t, a, b)
	a.handshake(b)
	mustHold(t, a, b, last)
	// Without its journal it begins anew, and is in step again.
	a.keyturn("up", confA)
	rotateAgain(t, a, b, last)

	pings.stop().mustBeComplete(t)
	mustNotFail(t, a, b)
}

// rotateAgain waits until the ends are linked, and protected by a key that
// follows last, after a handshake.
func rotateAgain(t *testing.T, a, b *host, last psk.Fingerprint) psk.Fingerprint {
	t.Helper()
	for _, end := range []struct{ h, p *host }{{a, b}, {b, a}} {
		end.h.towards(end.p, 10*time.Second, "a link", func(p control.PeerStatus) error {
			if p.Link.State != control.LinkUp {
				return fmt.Errorf("%s: %s", p.Link.State, p.Link.Error)
			}
			return nil
		})
	}
	letCount(t)
	a.handshake(b)
	last = eventuallyRotated(t, a, b, last)
	a.handshake(b)
	last = eventuallyRotated(t, a, b, last)
	for _, end := range []struct{ h, p *host }{{a, b}, {b, a}} {
		end.h.towards(end.p, 10*time.Second, "protected", func(p control.PeerStatus) error {
			if !p.Protected || p.State != control.PeerProtected {
				return fmt.Errorf("%s: %s", p.State, p.Why)
			}
			return nil
		})
	}
	return last
}

// TestVanished: the interface goes away under its rotator and comes back
// without its pre-shared keys, as after wg-quick down and up. status says so,
// and the key goes in again before traffic could flow without it.
func TestVanished(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	a, b := l.host("lisbon"), l.host("porto")
	connect(a, b)
	a.handshake(b)
	a.keyturn("up", a.write(nil, b.as()))
	b.keyturn("up", b.write(nil, a.as()))
	last := eventuallyRotated(t, a, b, psk.Fingerprint{})
	a.destroyDevice()
	a.towards(b, 10*time.Second, "nothing to protect", func(p control.PeerStatus) error {
		if p.State != control.PeerMissing || p.Protected {
			return fmt.Errorf("%s, protected %t", p.State, p.Protected)
		}
		return nil
	})
	a.createDevice()
	a.addPeer(b)
	agree(t, a, b)
	rotateAgain(t, b, a, last)
	a.ping(b).stop().mustBeComplete(t)
}

// mustForget fails the test if anything of a rotator is left.
func mustForget(t *testing.T, h *host) {
	t.Helper()
	for _, dir := range []string{"run", "state"} {
		if _, err := os.Lstat(h.path(dir)); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("rm of the only rotator leaves its %s directory: %v", dir, err)
		}
	}
	// The harness writes there as well.
	logs, err := filepath.Glob(h.path("log", wg0+"*"))
	if err != nil || len(logs) > 0 {
		t.Errorf("rm leaves %q: %v", logs, err)
	}
}

// TestLifeFailedUp: an up that fails says why and leaves the file system as it
// was, whatever it fails of, and beside a rotator that runs.
func TestLifeFailedUp(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	a, b := l.host("lisbon"), l.host("porto")
	connect(a, b)
	peer := b.as().with(settings{"role": "client"})
	taken, err := a.listen(a.addr.String() + ":7000")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	for name, content := range map[string]string{"in-the-way": "", "short.key": "short"} {
		if err := os.WriteFile(a.path(name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	unreadable := settings{"journal": settings{"path": a.path("journal"), "key_file": a.path("short.key")}}
	for _, c := range []struct {
		name    string
		changes settings
		peer    settings
		flags   []string
		want    string
	}{
		{"configuration", nil, peer.with(settings{"role": "leader"}), nil, "leader"},
		{"interface", settings{"interface": "wg7"}, peer, nil, "wg7"},
		{"peer", nil, peer.with(settings{"public_key": a.device.public.String()}), nil, "public_key"},
		{"port", settings{"listen": a.addr.String() + ":7000"}, peer, nil, "address already in use by another process\nhint: ss -ltnp "},
		{"address", settings{"listen": "203.0.113.1:7000"}, peer, nil, "cannot assign"},
		{"journal key", unreadable, peer, nil, "does not hold 32 bytes"},
		{"journal", settings{"journal": unreadable["journal"].(settings).with(settings{"path": a.path("none", "journal"), "key_file": a.path("identity.key")})}, peer, nil, "journal"},
		{"run directory", nil, peer, []string{"--run-dir", a.path("in-the-way", "run")}, "not a directory"},
		{"log directory", nil, peer.with(settings{"fallback": "initial"}), []string{"--log-dir", a.path("in-the-way", "log")}, "not a directory"},
		{"state directory", nil, peer, []string{"--state-dir", a.path("in-the-way", "state")}, "not a directory"},
		{"socket's path", nil, peer, []string{"--run-dir", a.path("new", strings.Repeat("x", 100))}, "107 is the limit"},
	} {
		path := a.write(c.changes, c.peer)
		fresh := []string{"--run-dir", a.path("new", "run"), "--state-dir", a.path("new", "state"), "--log-dir", a.path("new", "log")}
		commands := []string{"up", "run"}
		if c.name == "log directory" { // run has none
			commands = commands[:1]
		}
		for _, command := range commands {
			before := a.files()
			r := a.try(append(append([]string{command, path}, fresh...), c.flags...)...)
			if r.code != 1 || !strings.Contains(r.stderr, c.want) {
				t.Errorf("%s, %s: exit %d\n%s", c.name, command, r.code, r.stderr)
			}
			if after := a.files(); !slices.Equal(before, after) {
				t.Errorf("%s, %s leaves\n%s", c.name, command, strings.Join(after, "\n"))
			}
		}
	}

	path := a.write(nil, b.as().with(settings{"role": "server", "address": nil})) // which logs nothing meanwhile
	a.keyturn("up", path)
	log := stat(t, a.path("log", wg0+".log")).Size()
	if r := a.try("up", path); r.code != 1 || !strings.Contains(r.stderr, "already") {
		t.Errorf("a second up: exit %d\n%s", r.code, r.stderr)
	}
	if size := stat(t, a.path("log", wg0+".log")).Size(); size != log {
		t.Errorf("a second up adds %d bytes to the log", size-log)
	}
	a.keyturn("rm", wg0)
	mustForget(t, a)
}

// TestLifeOneRotator: an interface has one rotator, whatever its directories,
// and the next may come when that one has gone, however it went. Another user
// who holds the interface's name is named, and keeps nobody out.
func TestLifeOneRotator(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	a, b := l.host("lisbon"), l.host("porto")
	connect(a, b)
	path := a.write(nil, b.as().with(settings{"role": "server", "address": nil}))
	elsewhere := []string{"--run-dir", a.path("2", "run"), "--state-dir", a.path("2", "state"), "--log-dir", a.path("2", "log")}
	other := func(args ...string) []string { return append(args, elsewhere...) }
	a.keyturn("up", path)
	s, err := a.status()
	if err != nil {
		t.Fatal(err)
	}
	second := a.write(settings{"listen": "[::]:7000"}, b.as().with(settings{"role": "server", "address": nil}))
	for _, command := range []string{"up", "run"} {
		r := a.try(other(command, second)...)
		for _, want := range []string{
			fmt.Sprintf("already running: process %d, run directory %s\n", s.PID, a.path("run")),
			"hint: keyturn --run-dir=" + a.path("run") + " down wg0\n",
		} {
			if r.code != 1 || !strings.Contains(r.stderr, want) {
				t.Errorf("%s with other directories: exit %d, without %q\n%s", command, r.code, want, r.stderr)
			}
		}
	}
	if _, err := os.Stat(a.path("2")); err == nil {
		t.Error("it leaves its directories")
	}
	a.keyturn("down", wg0)
	a.keyturn(other("up", second)...)
	var of2 control.Status
	if err := json.Unmarshal([]byte(a.try(other("status", wg0, "--json")...).stdout), &of2); err != nil || of2.PID == 0 {
		t.Fatalf("status of the other: process %d, %v", of2.PID, err)
	}
	a.kill9(of2.PID)
	if r := a.try("up", path); r.code != 0 {
		t.Errorf("after the other was killed: %s", r.stderr)
	}
	a.keyturn("down", wg0)

	squatter, err := a.listenAsNobody("@keyturn/" + wg0)
	if err != nil {
		t.Skipf("missing privilege: to be another user: %v", err)
	}
	a.keyturn("up", path)
	a.logs(5*time.Second, "a second rotator of the interface would not be noticed")
	a.logs(5*time.Second, "of user 65534 holds the interface's name")
	squatter.Close()
}

// listenAsNobody listens at a unix socket of the host as another user.
func (h *host) listenAsNobody(name string) (ln net.Listener, err error) {
	err = h.in(func() error { // on a thread that nobody else uses again
		if _, _, errno := syscall.RawSyscall(unix.SYS_SETRESUID, 65534, 65534, 65534); errno != 0 {
			return errno
		}
		ln, err = net.Listen("unix", name)
		return err
	})
	return ln, err
}

// files lists all that lies in the host's directory, with its size.
func (h *host) files() []string {
	h.lab.t.Helper()
	var out []string
	err := filepath.WalkDir(h.path(), func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		size := int64(0)
		if err == nil && info.Mode().IsRegular() {
			size = info.Size()
		}
		out = append(out, fmt.Sprintf("%s %v %d", path, d.Type(), size))
		return err
	})
	if err != nil {
		h.lab.t.Fatal(err)
	}
	return out
}

// TestDetached: a rotator that was started from a terminal has none, nor
// anything else of its starter, and lives on when the terminal hangs up.
func TestDetached(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	a, b := l.host("lisbon"), l.host("porto")
	connect(a, b)
	conf := a.write(nil, b.as())
	hangUp := a.fromTerminal("up", conf)
	s, err := a.status()
	if err != nil {
		t.Fatal(err)
	}
	hangUp()

	proc := fmt.Sprintf("/proc/%d/", s.PID)
	read := func(name string) string {
		t.Helper()
		r := a.run("", "cat", proc+name)
		if r.code != 0 {
			t.Fatalf("%s: %s", name, r.stderr)
		}
		return r.stdout
	}
	// proc(5): after the name in parentheses state, ppid, pgrp, session, tty_nr.
	_, rest, _ := strings.Cut(read("stat"), ") ")
	fields := strings.Fields(rest)
	if pid := strconv.Itoa(s.PID); fields[1] != "1" || fields[3] != pid || fields[4] != "0" {
		t.Errorf("parent %s, session %s, terminal %s; process %s", fields[1], fields[3], fields[4], pid)
	}
	limits := read("limits")
	i := strings.Index(limits, "Max core file size")
	if line, _, _ := strings.Cut(limits[i:], "\n"); !slices.Equal(strings.Fields(line)[4:], []string{"0", "0", "bytes"}) {
		t.Errorf("core dumps: %q", line)
	}
	links := strings.Fields(a.run("", "sh", "-c", "cd "+proc+" && readlink cwd fd/0 && readlink fd/*").stdout)
	if len(links) < 5 || links[0] != "/" || links[1] != "/dev/null" {
		t.Fatalf("working directory, standard input and descriptors are %q", links)
	}
	for _, name := range links[2:] {
		known := slices.ContainsFunc([]string{"/sys/fs/cgroup/" /* Go reads how many CPUs it may use */, "socket:", "anon_inode:", "pipe:", "/dev/null", a.path("log", wg0+".log"), a.path("run")},
			func(prefix string) bool { return strings.HasPrefix(name, prefix) })
		if !known {
			t.Errorf("a descriptor for %s", name)
		}
	}
	if r := a.run("", "sh", "-c", "ls -l "+proc+"fd | grep -c pipe:"); strings.TrimSpace(r.stdout) != "0" {
		t.Errorf("%s pipes are open", strings.TrimSpace(r.stdout))
	}
	if mode := stat(t, a.path("run")).Mode().Perm(); mode != 0o700 {
		t.Errorf("the run directory has mode %o", mode)
	}
	if mode := stat(t, a.path("log", wg0+".log")).Mode().Perm(); mode&0o077 != 0 {
		t.Errorf("the log has mode %o", mode)
	}
	a.keyturn("down", wg0)
}

func stat(t *testing.T, path string) os.FileInfo {
	t.Helper()
	fi, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	return fi
}

// fromTerminal runs a command of keyturn that must succeed in a session with a
// terminal, and with a descriptor that nobody should inherit. The returned
// function closes the terminal, which hangs up on whoever still has it.
func (h *host) fromTerminal(args ...string) (hangUp func()) {
	h.lab.t.Helper()
	terminal, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		h.lab.t.Fatal(err)
	}
	if err := unix.IoctlSetPointerInt(int(terminal.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		h.lab.t.Fatal(err)
	}
	fd, _, errno := unix.Syscall(unix.SYS_IOCTL, terminal.Fd(), unix.TIOCGPTPEER, unix.O_RDWR|unix.O_NOCTTY)
	if errno != 0 {
		h.lab.t.Fatal(errno)
	}
	end := os.NewFile(fd, "terminal")
	extra, err := os.Open(h.path("identity.key"))
	if err != nil {
		h.lab.t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), commandLimit)
	defer cancel()
	c := h.command(ctx, os.Getenv(binaryVar), args...)
	c.Stdin, c.Stdout, c.Stderr = end, end, end
	c.ExtraFiles = []*os.File{nil, nil, extra} // as a shell's 5<file
	c.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	if err := h.in(c.Start); err != nil {
		h.lab.t.Fatal(err)
	}
	end.Close()
	extra.Close()
	if err := c.Wait(); err != nil {
		h.lab.t.Fatalf("keyturn %s: %v", strings.Join(args, " "), err)
	}
	return func() { terminal.Close() }
}
