//go:build vm

package guest

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/wgctrl"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
)

const (
	wg0    = "wg0"
	wgPort = 51820

	// Two cables join the hosts, so that either can be cut: the tunnel's
	// packets go through one, a link beside the tunnel through the other.
	tunnelCable = "tunnel0"
	besideCable = "beside0"

	diskSize = "4m" // of each host
)

// lab is two hosts and two cables between them.
type lab struct {
	t    *testing.T
	dir  string
	a, b *host

	grace   time.Duration // see pingGrace
	kmes    *process      // nil: none run
	traffic traffic       // while a fault is played
}

// host is a network namespace with a WireGuard interface of the kernel.
type host struct {
	lab    *lab
	name   string
	ns     *os.File
	outer  netip.Addr // on the tunnel's cable
	beside netip.Addr // on the other
	inner  netip.Addr // inside the tunnel
	echo   net.PacketConn

	private  wgtypes.Key
	original wgtypes.Key // the pre-shared key that the interface comes up with
	rotator  *process    // nil: none runs
}

// newLab makes two hosts in namespaces of their own, with a tunnel between
// them that has the same pre-shared key at both ends.
func newLab(t *testing.T) *lab {
	t.Helper()
	l := &lab{t: t, grace: pingGrace}
	l.build(newNamespace(t))
	return l
}

// newLabHere is the same, but the first host is in the namespace of the
// process: what opens sockets at any time, as wg.Open does, can be used there.
func newLabHere(t *testing.T) *lab {
	t.Helper()
	l := &lab{t: t, grace: pingGrace}
	ns, err := os.Open("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	l.build(ns)
	// Nothing else takes away what a test made in a namespace that stays.
	t.Cleanup(func() {
		for _, name := range []string{wg0, tunnelCable, besideCable} {
			l.a.must(l.a.in(func() error { return deleteLink(name) }))
		}
	})
	return l
}

// newNamespace makes a network namespace, which lasts until the file closes
// and nobody is in it any more.
func newNamespace(t *testing.T) *os.File {
	t.Helper()
	var ns *os.File
	err := onThread(func() error {
		err := unix.Unshare(unix.CLONE_NEWNET)
		if err == nil {
			ns, err = os.Open("/proc/thread-self/ns/net")
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return ns
}

// onThread runs f on a thread that ends with it, whatever f makes of it.
func onThread(f func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked
		if unix.Gettid() == unix.Getpid() {
			// The main thread's namespace is the process's, and it cannot be
			// thrown away: another goroutine cannot get it while we hold it.
			done <- onThread(f)
			runtime.UnlockOSThread()
			return
		}
		done <- f()
	}()
	return <-done
}

func (l *lab) build(first *os.File) {
	l.t.Helper()
	var private [2]wgtypes.Key
	for i := range private {
		var err error
		if private[i], err = wgtypes.GeneratePrivateKey(); err != nil {
			l.t.Fatal(err)
		}
	}
	l.populate(private, newKey(l.t))
	l.a.ns, l.b.ns = first, newNamespace(l.t)
	for _, cable := range []string{tunnelCable, besideCable} {
		if err := createCable(cable, l.a.ns, l.b.ns); err != nil {
			l.t.Fatal(err)
		}
	}
	l.a.plugIn()
	l.b.plugIn()
	l.t.Cleanup(func() {
		if l.kmes != nil {
			l.kmes.kill()
		}
		for _, h := range []*host{l.a, l.b} {
			h.kill()
			_ = h.echo.Close()
			_ = h.ns.Close()
			if l.t.Failed() {
				h.showLog()
			}
			h.must(unix.Unmount(h.path(), 0))
		}
		if err := os.RemoveAll(l.dir); err != nil {
			l.t.Error(err)
		}
	})
}

// populate gives the lab its two hosts, each with a disk.
func (l *lab) populate(private [2]wgtypes.Key, original wgtypes.Key) {
	l.t.Helper()
	// Not t.TempDir: unix sockets lie below, and their paths must be short.
	dir, err := os.MkdirTemp("", "kt")
	if err != nil {
		l.t.Fatal(err)
	}
	l.dir = dir
	for i, h := range []**host{&l.a, &l.b} {
		n := byte(i + 1)
		*h = &host{
			lab:      l,
			name:     []string{"lisbon", "porto"}[i],
			outer:    netip.AddrFrom4([4]byte{192, 0, 2, n}),
			beside:   netip.AddrFrom4([4]byte{198, 51, 100, n}),
			inner:    netip.AddrFrom4([4]byte{10, 99, 0, n}),
			private:  private[i],
			original: original,
		}
		(*h).format()
	}
}

// format gives the host an empty disk.
func (h *host) format() {
	h.lab.t.Helper()
	h.must(os.Mkdir(h.path(), 0o700))
	h.must(unix.Mount("tmpfs", h.path(), "tmpfs", 0, "mode=700,size="+diskSize))
	for _, d := range []string{"run", "state", "log"} {
		h.must(os.Mkdir(h.path(d), 0o700))
	}
}

// plugIn gives the host's ends of the cables their addresses, brings its
// interface up, and lets it answer pings.
func (h *host) plugIn() {
	h.lab.t.Helper()
	h.must(h.in(func() error {
		return errors.Join(
			setUp("lo"),
			addAddress(tunnelCable, netip.PrefixFrom(h.outer, 24)), setUp(tunnelCable),
			addAddress(besideCable, netip.PrefixFrom(h.beside, 24)), setUp(besideCable))
	}))
	h.createDevice()
	h.must(h.in(func() (err error) {
		h.echo, err = net.ListenUDP("udp4", &net.UDPAddr{Port: echoPort})
		return err
	}))
	go answer(h.echo)
}

// hosts returns both, with whoever is at the other end.
func (l *lab) hosts() [2][2]*host { return [2][2]*host{{l.a, l.b}, {l.b, l.a}} }

// other returns the host at the other end.
func (h *host) other() *host {
	if h == h.lab.a {
		return h.lab.b
	}
	return h.lab.a
}

// path returns the path of something that belongs to the host.
func (h *host) path(elem ...string) string {
	return filepath.Join(append([]string{h.lab.dir, h.name}, elem...)...)
}

func (h *host) must(err error) {
	h.lab.t.Helper()
	if err != nil {
		h.lab.t.Fatalf("%s: %v", h.name, err)
	}
}

// in runs f on a thread of its own inside the host's namespace. Sockets that f
// opens and processes that it starts stay there.
func (h *host) in(f func() error) error {
	return onThread(func() error {
		if err := unix.Setns(int(h.ns.Fd()), unix.CLONE_NEWNET); err != nil {
			return err
		}
		return f()
	})
}

// weather sets what happens to the packets that leave the host by a cable.
func (h *host) weather(cable string, w weather) {
	h.lab.t.Helper()
	h.must(h.in(func() error { return setWeather(cable, w) }))
}

// weather sets it in both directions.
func (l *lab) weather(w weather, cables ...string) {
	l.t.Helper()
	for _, cable := range cables {
		l.a.weather(cable, w)
		l.b.weather(cable, w)
	}
}

// createDevice brings the host's interface up as wg-quick would at boot: with
// the peer and the original pre-shared key.
func (h *host) createDevice() {
	h.lab.t.Helper()
	h.must(h.in(func() error {
		return errors.Join(
			createWireGuard(wg0),
			addAddress(wg0, netip.PrefixFrom(h.inner, 24)),
			setUp(wg0))
	}))
	port := wgPort
	h.configure(wgtypes.Config{PrivateKey: &h.private, ListenPort: &port})
	h.addPeer()
}

func (h *host) deleteDevice() {
	h.lab.t.Helper()
	h.must(h.in(func() error { return deleteLink(wg0) }))
}

// addPeer makes the other host a peer, with the original pre-shared key.
func (h *host) addPeer() {
	h.lab.t.Helper()
	p := h.other()
	h.configure(wgtypes.Config{Peers: []wgtypes.PeerConfig{{
		PublicKey:    p.public(),
		PresharedKey: &h.original,
		Endpoint:     net.UDPAddrFromAddrPort(netip.AddrPortFrom(p.outer, wgPort)),
		AllowedIPs:   []net.IPNet{{IP: p.inner.AsSlice(), Mask: net.CIDRMask(32, 32)}},
	}}})
}

func (h *host) removePeer() {
	h.lab.t.Helper()
	h.configure(wgtypes.Config{Peers: []wgtypes.PeerConfig{{PublicKey: h.other().public(), Remove: true}}})
}

// setPSK is what wg set does.
func (h *host) setPSK(key wgtypes.Key) {
	h.lab.t.Helper()
	h.configure(wgtypes.Config{Peers: []wgtypes.PeerConfig{{PublicKey: h.other().public(), UpdateOnly: true, PresharedKey: &key}}})
}

func (h *host) public() wgtypes.Key { return h.private.PublicKey() }

func (h *host) configure(c wgtypes.Config) {
	h.lab.t.Helper()
	h.must(h.wgctrl(func(w *wgctrl.Client) error { return w.ConfigureDevice(wg0, c) }))
}

// peer returns what the host's interface says of the other host.
func (h *host) peer() wgtypes.Peer {
	h.lab.t.Helper()
	p, err := h.tryPeer()
	h.must(err)
	return p
}

func (h *host) tryPeer() (p wgtypes.Peer, err error) {
	err = h.wgctrl(func(w *wgctrl.Client) error {
		d, err := w.Device(wg0)
		if err != nil {
			return err
		}
		for _, p = range d.Peers {
			if p.PublicKey == h.other().public() {
				return nil
			}
		}
		return errors.New("no such peer")
	})
	return p, err
}

func (h *host) wgctrl(f func(*wgctrl.Client) error) error {
	return h.in(func() error {
		w, err := wgctrl.New()
		if err != nil {
			return err
		}
		defer w.Close()
		return f(w)
	})
}

// eventually waits until cond returns nil, and returns how long that took. It
// fails the test with the last of its errors after limit.
func (l *lab) eventually(limit time.Duration, what string, cond func() error) time.Duration {
	l.t.Helper()
	start := time.Now()
	for {
		err := cond()
		took := time.Since(start)
		switch {
		case err == nil:
			return took
		case took > limit:
			l.t.Fatalf("%s: not within %v: %v", what, limit, err)
		}
		time.Sleep(100 * time.Millisecond)
	}
}

// verdict prints what a test found, for the host of the virtual machine to show.
func verdict(format string, args ...any) { fmt.Printf("verdict: "+format+"\n", args...) }

// outcome is a verdict's first word.
func outcome(t *testing.T) string {
	if t.Failed() {
		return "FAILED"
	}
	return "ok"
}

func newKey(t *testing.T) wgtypes.Key {
	t.Helper()
	k, err := wgtypes.GenerateKey()
	if err != nil {
		t.Fatal(err)
	}
	return k
}
