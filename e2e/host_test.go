//go:build e2e

package e2e

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"keyturn/internal/psk"
)

// Deadlines of the harness itself. Nothing that works comes near them, even
// on a machine that is busy with other things.
const (
	commandLimit = 30 * time.Second
	pollInterval = 100 * time.Millisecond
)

// lab is the network of one test: a bridge, and the hosts on it.
type lab struct {
	t      *testing.T
	bridge string
	dir    string
	hosts  []*host

	mu      sync.Mutex
	secrets map[psk.Fingerprint]*psk.Key // every key that the test came to see
	printed []output                     // everything that commands printed
}

type output struct {
	from string
	text []byte
}

// serial numbers bridges and cables: their names are of the whole process,
// and tests run side by side.
var serial atomic.Int64

// newLab makes a lab that goes away with the test. It skips the test where
// hosts cannot be made.
func newLab(t *testing.T) *lab {
	t.Helper()
	if unable != nil {
		t.Skipf("missing privilege: %v", unable)
	}
	// Not t.TempDir: unix sockets lie below, and their paths must be short.
	dir, err := os.MkdirTemp("", "kt")
	if err != nil {
		t.Fatal(err)
	}
	l := &lab{
		t:       t,
		bridge:  fmt.Sprintf("lan%d", serial.Add(1)),
		dir:     dir,
		secrets: make(map[psk.Fingerprint]*psk.Key),
	}
	t.Cleanup(l.close)
	if err := ip("link add "+l.bridge+" type bridge", "link set "+l.bridge+" up"); err != nil {
		t.Fatal(err)
	}
	return l
}

func (l *lab) close() {
	for _, h := range l.hosts {
		h.crash()
	}
	if err := ip("link del " + l.bridge); err != nil {
		l.t.Error(err)
	}
	l.collectLogs()
	for _, leak := range l.leaks() {
		l.t.Errorf("key material in %s", leak)
	}
	if l.t.Failed() {
		for _, o := range l.printed {
			l.t.Logf("%s:\n%s", o.from, l.redact(o.text))
		}
	}
	for _, k := range l.secrets {
		k.Wipe()
	}
	if err := os.RemoveAll(l.dir); err != nil {
		l.t.Error(err)
	}
}

// collectLogs adds the log files, and what lies in the run and state
// directories, to what was printed. Keys belong into the journals and the
// recorded initial ones, and nowhere else.
func (l *lab) collectLogs() {
	for _, h := range l.hosts {
		for _, dir := range []string{h.path("log"), h.path("state"), h.path("run")} {
			err := filepath.WalkDir(dir, func(name string, d fs.DirEntry, err error) error {
				if err == nil && d.IsDir() && slices.Contains([]string{".journal", ".initial"}, filepath.Ext(name)) {
					return fs.SkipDir
				}
				if err != nil || !d.Type().IsRegular() {
					return err
				}
				text, err := os.ReadFile(name)
				if err == nil && len(text) > 0 {
					rel, _ := filepath.Rel(l.dir, name)
					l.record(rel, text)
				}
				return err
			})
			if err != nil && !errors.Is(err, fs.ErrNotExist) { // rm takes the last one's along
				l.t.Error(err)
			}
		}
	}
}

func (l *lab) record(from string, text []byte) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.printed = append(l.printed, output{from, text})
}

// remember keeps a copy of a key, to be looked for in logs, and returns its
// fingerprint, which is all that tests handle.
func (l *lab) remember(k *psk.Key) psk.Fingerprint {
	f := k.Fingerprint()
	l.mu.Lock()
	defer l.mu.Unlock()
	if !k.IsZero() && l.secrets[f] == nil {
		l.secrets[f] = k.Clone()
	}
	return f
}

// forms returns the ways in which a key could have been written.
func forms(k *psk.Key) [][]byte {
	b := k.Bytes()
	return [][]byte{
		b,
		[]byte(base64.StdEncoding.EncodeToString(b)[:43]), // the padding may be missing
		[]byte(base64.URLEncoding.EncodeToString(b)[:43]),
		[]byte(hex.EncodeToString(b)),
		[]byte(strings.ToUpper(hex.EncodeToString(b))),
		[]byte(strings.Trim(fmt.Sprint(b), "[]")), // a byte slice printed by mistake
	}
}

// leaks names the places where a key that the test saw was written down.
func (l *lab) leaks() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	var places []string
	for _, o := range l.printed {
		for _, k := range l.secrets {
			for _, form := range forms(k) {
				if bytes.Contains(o.text, form) {
					places = append(places, o.from)
				}
			}
		}
	}
	return places
}

// redact returns a text with every known key cut out.
func (l *lab) redact(text []byte) []byte {
	for _, k := range l.secrets {
		for _, form := range forms(k) {
			text = bytes.ReplaceAll(text, form, []byte("[key material]"))
		}
	}
	return text
}

// host is a machine of the lab.
type host struct {
	*machine
	lab   *lab
	name  string
	cable string     // its end in the lab
	addr  netip.Addr // on the bridge
	inner netip.Addr // inside the tunnels
	log   *os.File   // of the init process

	device *interfaceKeys // nil: no WireGuard interface
	echo   net.PacketConn // answers pings inside the tunnels
	// original are the pre-shared keys that whatever brings the interface up
	// gives it, by peer; without one, there is none.
	original map[*host]*psk.Key
}

// host adds a host to the lab: 192.0.2.n on the bridge, 10.99.0.n inside
// tunnels.
func (l *lab) host(name string) *host {
	l.t.Helper()
	n := byte(len(l.hosts) + 1)
	h := &host{
		lab:   l,
		name:  name,
		cable: fmt.Sprintf("port%d", serial.Add(1)),
		addr:  netip.AddrFrom4([4]byte{192, 0, 2, n}),
		inner: netip.AddrFrom4([4]byte{10, 99, 0, n}),
	}
	for _, dir := range []string{"run", "state", "log"} {
		if err := os.MkdirAll(h.path(dir), 0o700); err != nil {
			l.t.Fatal(err)
		}
	}
	l.hosts = append(l.hosts, h)
	h.boot()
	return h
}

// path returns the path of something that belongs to the host. Nothing there
// is lost in a crash: reboot takes away what lives in memory.
func (h *host) path(elem ...string) string {
	return filepath.Join(append([]string{h.lab.dir, h.name}, elem...)...)
}

// boot starts the init process and plugs the host in.
func (h *host) boot() {
	h.lab.t.Helper()
	var err error
	if h.log, err = os.OpenFile(h.path("log", "init.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600); err != nil {
		h.lab.t.Fatal(err)
	}
	if h.machine, err = startInit(h.log); err != nil {
		h.lab.t.Fatal(err)
	}
	// The same MAC address after each boot: others remember it.
	err = ip(
		fmt.Sprintf("link add %s type veth peer name eth0 address 02:00:00:00:00:%02x netns %d", h.cable, h.addr.As4()[3], h.process.Process.Pid),
		fmt.Sprintf("link set %s master %s up", h.cable, h.lab.bridge))
	if err == nil {
		err = h.in(func() error {
			return ip("link set lo up", fmt.Sprintf("addr add %s/24 dev eth0", h.addr), "link set eth0 up")
		})
	}
	if err != nil {
		h.lab.t.Fatal(err)
	}
}

// crash pulls the plug: every process, device and address of the host is gone.
func (h *host) crash() {
	if h.machine == nil {
		return
	}
	if h.echo != nil {
		h.echo.Close()
		h.echo = nil
	}
	h.kill()
	h.log.Close()
	h.machine = nil
	// The namespace goes away in its own time, and takes its end of the cable
	// along; the new one needs the name.
	_ = ip("link del " + h.cable)
}

// reboot is a crash, the loss of what lives in memory, and a boot; the
// WireGuard interface comes back with its original pre-shared keys, as wg-quick
// would bring it up.
func (h *host) reboot(peers ...*host) {
	h.lab.t.Helper()
	h.crash()
	if err := os.RemoveAll(h.path("run")); err != nil {
		h.lab.t.Fatal(err)
	}
	if err := os.Mkdir(h.path("run"), 0o700); err != nil {
		h.lab.t.Fatal(err)
	}
	h.boot()
	if h.device != nil {
		h.createDevice()
		for _, p := range peers {
			h.addPeer(p)
		}
	}
}

// unplug takes the host off the bridge, plug puts it back.
func (h *host) unplug() { h.mustIP("link set " + h.cable + " down") }
func (h *host) plug()   { h.mustIP("link set " + h.cable + " up") }

func (h *host) mustIP(command string) {
	h.lab.t.Helper()
	if err := ip(command); err != nil {
		h.lab.t.Fatal(err)
	}
}

// in runs f on a thread of its own inside the host's network, mount and PID
// namespaces. Sockets that f opens and processes that it starts stay there.
func (h *host) in(f func() error) error {
	errc := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			// The main thread's namespaces are the process's, and it cannot
			// be thrown away: another goroutine cannot get it while we hold it.
			errc <- h.in(f)
			runtime.UnlockOSThread()
			return
		}
		// Never unlocked: the thread ends with the goroutine.
		errc <- func() error {
			// Threads share their working directory; one that changes its
			// mount namespace must not.
			if err := unix.Unshare(unix.CLONE_FS); err != nil {
				return fmt.Errorf("leave the process's working directory: %w", err)
			}
			for _, ns := range []struct {
				file *os.File
				kind int
			}{{h.net, unix.CLONE_NEWNET}, {h.pid, unix.CLONE_NEWPID}, {h.mnt, unix.CLONE_NEWNS}} {
				if err := unix.Setns(int(ns.file.Fd()), ns.kind); err != nil {
					return fmt.Errorf("enter %s: %w", h.name, err)
				}
			}
			return f()
		}()
	}()
	return <-errc
}

// result is what a command did.
type result struct {
	stdout, stderr string
	code           int
}

// command returns a command that lives on the host, with keyturn's
// directories in its environment and nothing else of ours.
func (h *host) command(ctx context.Context, name string, args ...string) *exec.Cmd {
	c := exec.CommandContext(ctx, name, args...)
	c.Dir = h.path()
	c.Env = []string{
		"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
		"HOME=" + h.path(),
		"KEYTURN_RUN_DIR=" + h.path("run"),
		"KEYTURN_STATE_DIR=" + h.path("state"),
		"KEYTURN_LOG_DIR=" + h.path("log"),
	}
	return c
}

// run runs a command on the host to its end. A command that does not end by
// itself fails the test.
func (h *host) run(stdin string, name string, args ...string) result {
	h.lab.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), commandLimit)
	defer cancel()
	c := h.command(ctx, name, args...)
	var stdout, stderr bytes.Buffer
	c.Stdin, c.Stdout, c.Stderr = strings.NewReader(stdin), &stdout, &stderr
	// A daemon that kept our pipes open would keep us waiting.
	c.WaitDelay = 2 * time.Second
	err := h.in(c.Start)
	if err == nil {
		err = c.Wait()
	}
	what := fmt.Sprintf("%s: %s %s", h.name, filepath.Base(name), strings.Join(args, " "))
	h.lab.record(what+" (stdout)", stdout.Bytes())
	h.lab.record(what+" (stderr)", stderr.Bytes())
	var exit *exec.ExitError
	if err != nil && (!errors.As(err, &exit) || ctx.Err() != nil) {
		h.lab.t.Fatalf("%s: %v", what, err)
	}
	return result{stdout.String(), stderr.String(), c.ProcessState.ExitCode()}
}

// keyturn runs a command of keyturn that must succeed, and returns what it printed.
func (h *host) keyturn(args ...string) string {
	h.lab.t.Helper()
	r := h.try(args...)
	if r.code != 0 {
		h.lab.t.Fatalf("%s: keyturn %s: exit %d\n%s", h.name, strings.Join(args, " "), r.code, h.lab.redact([]byte(r.stderr)))
	}
	return r.stdout
}

// try runs a command of keyturn, whatever comes of it.
func (h *host) try(args ...string) result {
	h.lab.t.Helper()
	return h.run("", os.Getenv(binaryVar), args...)
}

// background starts a command of keyturn that stays: kme, or run. What it
// prints goes to a file in the log directory. It dies with the host, or when
// the returned function is called, which asks it to end and waits.
func (h *host) background(args ...string) (stop func()) {
	h.lab.t.Helper()
	log, err := os.CreateTemp(h.path("log"), args[0]+"-*.log")
	if err != nil {
		h.lab.t.Fatal(err)
	}
	c := h.command(context.Background(), os.Getenv(binaryVar), args...)
	c.Stdout, c.Stderr = log, log
	if err := h.in(c.Start); err != nil {
		h.lab.t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		_ = c.Wait()
		log.Close()
		close(ended)
	}()
	return func() {
		_ = c.Process.Signal(unix.SIGTERM)
		select {
		case <-ended:
		case <-time.After(commandLimit):
			_ = c.Process.Kill()
			<-ended
			h.lab.t.Errorf("%s: keyturn %s did not end when asked", h.name, args[0])
		}
	}
}

// kill9 kills a process of the host, by its ID on the host.
func (h *host) kill9(pid int) {
	h.lab.t.Helper()
	h.signal(pid, unix.SIGKILL)
}

func (h *host) signal(pid int, s unix.Signal) {
	h.lab.t.Helper()
	if _, err := h.tell(order{Verb: "signal", PID: pid, Signal: s}); err != nil {
		h.lab.t.Fatal(err)
	}
}

// filter replaces what the host drops of what arrives, inside tunnels and out:
// rules of nftables.
func (h *host) filter(rules ...string) {
	h.lab.t.Helper()
	script := "table inet faults\ndelete table inet faults\n"
	if len(rules) > 0 {
		script += "table inet faults {\nchain input {\ntype filter hook prerouting priority -300;\n" + strings.Join(rules, "\n") + "\n}\n}\n"
	}
	err := h.in(func() error {
		c := exec.Command("nft", "-f", "-")
		c.Stdin = strings.NewReader(script)
		if out, err := c.CombinedOutput(); err != nil {
			return fmt.Errorf("nft: %w: %s", err, bytes.TrimSpace(out))
		}
		return nil
	})
	if err != nil {
		h.lab.t.Fatal(err)
	}
}

// dial connects from the host.
func (h *host) dial(network, address string) (c net.Conn, err error) {
	err = h.in(func() error {
		d := net.Dialer{Timeout: 5 * time.Second}
		c, err = d.Dial(network, address)
		return err
	})
	return c, err
}

// listen opens a TCP listener on the host.
func (h *host) listen(address string) (ln net.Listener, err error) {
	err = h.in(func() error {
		ln, err = net.Listen("tcp", address)
		return err
	})
	return ln, err
}

// eventually waits until cond returns nil, and fails the test with the last
// of its errors when that takes longer than limit.
func eventually(t *testing.T, limit time.Duration, what string, cond func() error) {
	t.Helper()
	tick := time.NewTicker(pollInterval)
	defer tick.Stop()
	deadline := time.Now().Add(limit)
	for {
		err := cond()
		switch {
		case err == nil:
			return
		case time.Now().After(deadline):
			t.Fatalf("%s: not within %v: %v", what, limit, err)
		}
		<-tick.C
	}
}

// ip gives commands to ip, in the namespace of the calling thread.
func ip(commands ...string) error {
	c := exec.Command("ip", "-batch", "-")
	c.Stdin = strings.NewReader(strings.Join(commands, "\n"))
	if out, err := c.CombinedOutput(); err != nil {
		return fmt.Errorf("ip: %s: %w: %s", strings.Join(commands, "; "), err, bytes.TrimSpace(out))
	}
	return nil
}
