//go:build e2e

package e2e

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/conn"
	"golang.zx2c4.com/wireguard/device"
	"golang.zx2c4.com/wireguard/ipc"
	"golang.zx2c4.com/wireguard/tun"
)

// order is what a test tells a host's init process: one line of JSON on its
// standard input, answered by one of report on its standard output.
type order struct {
	Verb   string      // hello, signal, or of a device: create, destroy, handshake, failed, weather
	PID    int         // signal: to which process, by its ID on the host
	Signal unix.Signal // signal: which
	Device string
	Peer   device.NoisePublicKey // handshake: with whom
	// weather: how many in a hundred of the device's packets are sent twice,
	// and how many after the one that follows.
	Repeated, Overtaken int
}

type report struct {
	Err   string
	Count int // failed: handshakes that the device began in vain
}

// runInit is the init process of a host: it mounts what a host has for
// itself, reaps orphans, and holds the WireGuard devices. It ends, and the
// whole host with it, when the test closes its standard input.
func runInit() int {
	children := make(chan os.Signal, 1)
	signal.Notify(children, unix.SIGCHLD)
	go reap(children)

	h := &initProcess{devices: make(map[string]*wgDevice)}
	in, out := json.NewDecoder(os.Stdin), json.NewEncoder(os.Stdout)
	for {
		var o order
		if err := in.Decode(&o); err != nil {
			if errors.Is(err, io.EOF) {
				return 0
			}
			fmt.Fprintln(os.Stderr, "init:", err)
			return 1
		}
		var r report
		if err := h.obey(o, &r); err != nil {
			r.Err = fmt.Sprintf("%s: %v", o.Verb, err)
		}
		if err := out.Encode(r); err != nil {
			fmt.Fprintln(os.Stderr, "init:", err)
			return 1
		}
	}
}

// reap waits for orphans: a rotator that left its parent ends up with us. We
// start no children of our own, so nobody else's wait is disturbed.
func reap(children <-chan os.Signal) {
	for range children {
		for {
			pid, err := unix.Wait4(-1, nil, unix.WNOHANG, nil)
			if pid <= 0 && !errors.Is(err, unix.EINTR) {
				break
			}
		}
	}
}

type initProcess struct {
	devices map[string]*wgDevice
}

func (h *initProcess) obey(o order, r *report) error {
	switch o.Verb {
	case "hello":
		return mountOwn()
	case "signal":
		return unix.Kill(o.PID, o.Signal)
	case "create":
		d, err := createDevice(o.Device)
		if err == nil {
			h.devices[o.Device] = d
		}
		return err
	}
	d := h.devices[o.Device]
	if d == nil {
		return fs.ErrNotExist
	}
	switch o.Verb {
	case "destroy":
		delete(h.devices, o.Device)
		d.close()
		return nil
	case "handshake":
		p := d.device.LookupPeer(o.Peer)
		if p == nil {
			return errors.New("no such peer")
		}
		return p.SendHandshakeInitiation(false)
	case "weather":
		d.weather.set(o.Repeated, o.Overtaken)
		return nil
	case "failed":
		r.Count = d.attempts.failures()
		return nil
	}
	return errors.ErrUnsupported
}

// mountOwn gives the host its own /proc, for its own process IDs, and an
// empty /run, where WireGuard's control sockets lie.
func mountOwn() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	if err := unix.Mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return fmt.Errorf("mount /proc: %w", err)
	}
	for _, dir := range []string{"/run", "/var/run"} {
		if fi, err := os.Lstat(dir); err != nil || !fi.IsDir() {
			continue // on most systems, /var/run is a link to /run
		}
		if err := unix.Mount("tmpfs", dir, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=755"); err != nil {
			return fmt.Errorf("mount %s: %w", dir, err)
		}
	}
	return nil
}

// wgDevice is a WireGuard interface, as the wireguard-go command makes one.
type wgDevice struct {
	device   *device.Device
	uapi     net.Listener
	attempts attempts
	weather  *weather
}

// weather is a network that repeats and reorders what a device sends.
type weather struct {
	conn.Bind

	mu                  sync.Mutex
	repeated, overtaken int
	held                []byte // goes after the next packet
}

func (w *weather) set(repeated, overtaken int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.repeated, w.overtaken = repeated, overtaken
}

func (w *weather) Send(packets [][]byte, to conn.Endpoint) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	var out [][]byte
	for _, p := range packets {
		if w.held == nil && rand.IntN(100) < w.overtaken {
			w.held = bytes.Clone(p)
			continue
		}
		out = append(out, p)
		if w.held != nil {
			out, w.held = append(out, w.held), nil
		}
		if rand.IntN(100) < w.repeated {
			out = append(out, p)
		}
	}
	for _, p := range out {
		if err := w.Bind.Send([][]byte{p}, to); err != nil {
			return err
		}
	}
	return nil
}

// attempts counts, by what the device logs, the handshakes that it began and
// that had no answer when it began the next.
type attempts struct {
	mu     sync.Mutex
	open   map[any]bool // by peer
	failed int
}

func (a *attempts) log(format string, args ...any) {
	a.mu.Lock()
	defer a.mu.Unlock()
	switch {
	case strings.HasSuffix(format, "Sending handshake initiation"):
		if a.open[args[0]] {
			a.failed++
		}
		a.open[args[0]] = true
	case strings.HasSuffix(format, "Received handshake response"):
		a.open[args[0]] = false
	}
}

func (a *attempts) failures() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.failed
}

func createDevice(name string) (*wgDevice, error) {
	t, err := tun.CreateTUN(name, device.DefaultMTU)
	if err != nil {
		return nil, err
	}
	d := &wgDevice{attempts: attempts{open: make(map[any]bool)}, weather: &weather{Bind: conn.NewDefaultBind()}}
	d.device = device.NewDevice(t, d.weather, &device.Logger{
		Verbosef: d.attempts.log,
		Errorf: func(format string, args ...any) {
			fmt.Fprintf(os.Stderr, name+": "+format+"\n", args...)
		},
	})
	socket, err := ipc.UAPIOpen(name)
	if err != nil {
		d.device.Close()
		return nil, err
	}
	if d.uapi, err = ipc.UAPIListen(name, socket); err != nil {
		d.device.Close()
		return nil, err
	}
	go func() {
		for {
			c, err := d.uapi.Accept()
			if err != nil {
				return
			}
			go d.device.IpcHandle(c)
		}
	}()
	return d, nil
}

func (d *wgDevice) close() {
	d.uapi.Close()
	d.device.Close()
}

// machine is the test's side of a host's init process.
type machine struct {
	process *exec.Cmd
	orders  io.WriteCloser
	reports *json.Decoder
	net     *os.File // the namespaces, for setns
	mnt     *os.File
	pid     *os.File
}

// startInit starts an init process in namespaces of its own.
func startInit(log io.Writer) (*machine, error) {
	p := exec.Command("/proc/self/exe")
	p.Env = []string{partVar + "=init"}
	p.Stderr = log
	p.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWNS | unix.CLONE_NEWPID,
	}
	m := &machine{process: p}
	var err error
	if m.orders, err = p.StdinPipe(); err != nil {
		return nil, err
	}
	out, err := p.StdoutPipe()
	if err != nil {
		return nil, err
	}
	m.reports = json.NewDecoder(out)
	if err := p.Start(); err != nil {
		return nil, fmt.Errorf("create namespaces of a host: %w", err)
	}
	open := func(f **os.File, name string) {
		if err == nil {
			*f, err = os.Open(fmt.Sprintf("/proc/%d/ns/%s", p.Process.Pid, name))
		}
	}
	open(&m.net, "net")
	open(&m.pid, "pid")
	open(&m.mnt, "mnt")
	if err == nil {
		_, err = m.tell(order{Verb: "hello"})
	}
	if err != nil {
		m.kill()
		return nil, err
	}
	return m, nil
}

// tell gives the init process an order and waits for its report.
func (m *machine) tell(o order) (report, error) {
	var r report
	if err := json.NewEncoder(m.orders).Encode(o); err != nil {
		return r, fmt.Errorf("order %s: %w", o.Verb, err)
	}
	if err := m.reports.Decode(&r); err != nil {
		return r, fmt.Errorf("report of %s: %w", o.Verb, err)
	}
	if r.Err != "" {
		return r, errors.New(r.Err)
	}
	return r, nil
}

// stop lets the init process end by itself, and all of the host with it.
func (m *machine) stop() error {
	m.orders.Close()
	err := m.process.Wait()
	m.closeNamespaces()
	return err
}

// kill pulls the plug.
func (m *machine) kill() {
	_ = m.process.Process.Kill()
	_ = m.process.Wait()
	m.orders.Close()
	m.closeNamespaces()
}

func (m *machine) closeNamespaces() {
	for _, f := range []*os.File{m.net, m.mnt, m.pid} {
		if f != nil {
			f.Close()
		}
	}
}
