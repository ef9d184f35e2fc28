package wg

import (
	"context"
	"crypto/ecdh"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/device"
	"golang.zx2c4.com/wireguard/ipc"
	"golang.zx2c4.com/wireguard/tun"
)

// inNamespace tells the test binary that it runs in namespaces of its own.
const inNamespace = "KEYTURN_WG_TEST_NAMESPACE"

// TestUserspaceDevice runs the facade against a wireguard-go device on a real
// TUN interface, found through its control socket. The test binary runs itself
// again in new user, network and mount namespaces, so it needs no root.
func TestUserspaceDevice(t *testing.T) {
	if os.Getenv(inNamespace) != "" {
		userspaceDevice(t)
		return
	}
	tunnels, err := os.OpenFile("/dev/net/tun", os.O_RDWR, 0)
	if err != nil {
		t.Skipf("needs /dev/net/tun: %v", err)
	}
	_ = tunnels.Close()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "/proc/self/exe", "-test.run=^TestUserspaceDevice$", "-test.v=true", "-test.count=1")
	cmd.Env = append(os.Environ(), inNamespace+"=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNET | syscall.CLONE_NEWNS,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}},
	}
	out := new(strings.Builder)
	cmd.Stdout, cmd.Stderr = out, out
	err = cmd.Start()
	if errors.Is(err, os.ErrPermission) || errors.Is(err, syscall.ENOSPC) {
		t.Skipf("needs user namespaces without privileges: %v", err)
	}
	if err == nil {
		err = cmd.Wait()
	}
	if err != nil {
		t.Fatalf("in the namespace: %v\n%s", err, out)
	}
}

// userspace is what a wireguard-go process consists of.
type userspace struct {
	device *device.Device
	uapi   net.Listener
}

func startUserspace(t *testing.T, name string) *userspace {
	t.Helper()
	link, err := tun.CreateTUN(name, tunMTU)
	if err != nil {
		t.Fatal(err)
	}
	silent := &device.Logger{Verbosef: device.DiscardLogf, Errorf: device.DiscardLogf}
	u := &userspace{device: device.NewDevice(link, new(loopbackBind), silent)}
	file, err := ipc.UAPIOpen(name)
	if err != nil {
		t.Fatal(err)
	}
	if u.uapi, err = ipc.UAPIListen(name, file); err != nil {
		t.Fatal(err)
	}
	go func() {
		for {
			c, err := u.uapi.Accept()
			if err != nil {
				return
			}
			go u.device.IpcHandle(c)
		}
	}()
	if err := u.device.Up(); err != nil {
		t.Fatal(err)
	}
	return u
}

func (u *userspace) stop() {
	_ = u.uapi.Close()
	u.device.Close()
}

// configure gives the device a key of its own and peers with the given allowed
// IPs, all with the same endpoint.
func (u *userspace) configure(t *testing.T, endpoint netip.AddrPort, allowed ...[]string) []PublicKey {
	t.Helper()
	var text strings.Builder
	private, err := ecdh.X25519().GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprintf(&text, "private_key=%s\n", hex.EncodeToString(private.Bytes()))
	var peers []PublicKey
	for _, ips := range allowed {
		k, err := ecdh.X25519().GenerateKey(rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		peers = append(peers, PublicKey(k.PublicKey().Bytes()))
		fmt.Fprintf(&text, "public_key=%s\nendpoint=%s\n", hex.EncodeToString(k.PublicKey().Bytes()), endpoint)
		for _, ip := range ips {
			fmt.Fprintf(&text, "allowed_ip=%s\n", ip)
		}
	}
	if err := u.device.IpcSet(text.String()); err != nil {
		t.Fatal(err)
	}
	return peers
}

func userspaceDevice(t *testing.T) {
	if err := errors.Join(unix.Mount("tmpfs", "/run", "tmpfs", 0, ""), linkUp("lo")); err != nil {
		t.Fatal(err)
	}
	// The endpoint of all peers, where datagrams are seen and nobody answers.
	sink, err := net.ListenUDP("udp4", net.UDPAddrFromAddrPort(netip.AddrPortFrom(loopback(), 0)))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = sink.Close() }()
	endpoint := sink.LocalAddr().(*net.UDPAddr).AddrPort()

	if _, err := Open("wg0"); !errors.Is(err, ErrNoDevice) {
		t.Fatalf("Open before there is a device: %v", err)
	}
	u := startUserspace(t, "wg0")
	if _, err := Open("wg0"); !errors.Is(err, errNoAnswer) {
		t.Errorf("Open of a device without a key: %v", err)
	}
	allowed := [][]string{
		{"10.0.0.2/32"},
		{"10.0.1.0/24"},
		{"fd00::/64", "10.9.0.0/16"},
		{"0.0.0.0/0"},
		{"fd00:1::2/128"},
		{},
	}
	for i := len(allowed); i < 40; i++ {
		allowed = append(allowed, []string{fmt.Sprintf("10.1.0.%d/32", i)})
	}
	peers := u.configure(t, endpoint, allowed...)
	d, err := Open("wg0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
		if _, err := d.Dump(); !errors.Is(err, os.ErrClosed) {
			t.Errorf("dump after Close: %v", err)
		}
	}()
	dump := func() *Dump {
		t.Helper()
		got, err := d.Dump()
		if err != nil {
			t.Fatal(err)
		}
		return got
	}

	t.Run("dump", func(t *testing.T) {
		got := dump()
		if len(got.Peers) != 40 || got.PublicKey == (PublicKey{}) || got.ListenPort == 0 {
			t.Fatalf("%d peers, key %v, port %d", len(got.Peers), got.PublicKey, got.ListenPort)
		}
		p := got.Peers[peers[2]]
		if p.PublicKey != peers[2] || p.Endpoint != endpoint || !p.Handshake.IsZero() || len(p.AllowedIPs) != 2 {
			t.Errorf("peer %+v", p)
		}
	})
	t.Run("set", func(t *testing.T) { checkSetPSK(t, d, peers[0]) })
	t.Run("set 40", func(t *testing.T) {
		for _, p := range peers {
			k := randomKey(t)
			if err := d.SetPSK(p, k); err != nil {
				t.Fatal(err)
			}
			if !dump().Peers[p].PSK.Equal(k) {
				t.Fatal("key is not read back")
			}
		}
	})

	t.Run("probe while down", func(t *testing.T) {
		if err := d.Probe(peers[0]); !errors.Is(err, syscall.ENETUNREACH) {
			t.Errorf("probe through an interface that is down: %v", err)
		}
	})
	if err := linkUp("wg0"); err != nil {
		t.Fatal(err)
	}
	probe := func(t *testing.T, peer PublicKey) {
		t.Helper()
		before := dump().Peers[peer].Tx
		if err := d.Probe(peer); err != nil {
			t.Fatal(err)
		}
		awaitInitiation(t, sink)
		// The datagram leaves before it is counted.
		sent := uint64(0)
		for end := time.Now().Add(4 * time.Second); sent == 0 && time.Now().Before(end); {
			sent = dump().Peers[peer].Tx - before
		}
		if sent != initiationSize {
			t.Errorf("tx +%d, want +148", sent)
		}
	}
	// Without any address or route on the interface: that the socket is
	// bound to it is enough for IPv4, not for IPv6.
	t.Run("probe", func(t *testing.T) { probe(t, peers[0]) })
	t.Run("probe subnet", func(t *testing.T) { probe(t, peers[1]) })
	t.Run("probe default route", func(t *testing.T) { probe(t, peers[3]) })
	t.Run("probe mixed families", func(t *testing.T) { probe(t, peers[2]) })
	t.Run("probe without a route", func(t *testing.T) {
		if err := d.Probe(peers[4]); !errors.Is(err, syscall.ENETUNREACH) && !errors.Is(err, syscall.EADDRNOTAVAIL) {
			t.Errorf("IPv6: %v", err)
		}
	})
	t.Run("probe IPv6", func(t *testing.T) {
		if err := addIPv6("wg0", netip.MustParsePrefix("fd00:1::1/64")); err != nil {
			t.Fatal(err)
		}
		probe(t, peers[4])
	})
	t.Run("renew", func(t *testing.T) { checkRenew(t, d, peers[2]) })
	t.Run("renew a peer with many allowed IPs", func(t *testing.T) {
		var many strings.Builder
		fmt.Fprintf(&many, "public_key=%s\n", hex.EncodeToString(peers[6][:]))
		for i := range maxRenewed {
			fmt.Fprintf(&many, "allowed_ip=10.2.0.%d/32\n", i)
		}
		if err := u.device.IpcSet(many.String()); err != nil {
			t.Fatal(err)
		}
		if err := d.Renew(peers[6]); !errors.Is(err, ErrNotRenewable) {
			t.Errorf("%d allowed IPs: %v", maxRenewed+1, err)
		}
		if n := len(dump().Peers[peers[6]].AllowedIPs); n != maxRenewed+1 {
			t.Errorf("%d allowed IPs are left", n)
		}
		if err := u.device.IpcSet(fmt.Sprintf("public_key=%s\nreplace_allowed_ips=true\nallowed_ip=10.2.0.0/24\n", hex.EncodeToString(peers[6][:]))); err != nil {
			t.Fatal(err)
		}
		checkRenew(t, d, peers[6])
	})
	t.Run("probe nowhere", func(t *testing.T) {
		if err := d.Probe(peers[5]); !errors.Is(err, ErrNoAddress) {
			t.Errorf("peer without allowed IPs: %v", err)
		}
		if err := d.Probe(PublicKey{1}); !errors.Is(err, ErrNoPeer) {
			t.Errorf("stranger: %v", err)
		}
	})

	t.Run("deleted and made anew", func(t *testing.T) {
		u.stop()
		if _, err := d.Dump(); !errors.Is(err, ErrNoDevice) {
			t.Errorf("dump: %v", err)
		}
		if err := d.SetPSK(peers[0], randomKey(t)); !errors.Is(err, ErrNoDevice) {
			t.Errorf("set: %v", err)
		}
		if err := d.Probe(peers[0]); !errors.Is(err, ErrNoDevice) {
			t.Errorf("probe: %v", err)
		}
		u = startUserspace(t, "wg0")
		defer u.stop()
		u.configure(t, endpoint, []string{"10.0.0.2/32"})
		if n := len(dump().Peers); n != 1 {
			t.Errorf("%d peers on the new device", n)
		}
	})

	t.Run("stale socket", func(t *testing.T) {
		path := socketDirectory + "/wg1.sock"
		l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
		if err != nil {
			t.Fatal(err)
		}
		l.SetUnlinkOnClose(false) // as when the process is killed
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		if _, err := Open("wg1"); !errors.Is(err, ErrStaleSocket) || !strings.Contains(err.Error(), "remove "+path) {
			t.Errorf("Open: %v", err)
		}
	})
	t.Run("answers that make no sense", func(t *testing.T) {
		for name, answer := range map[string]string{
			"ends at once": "",
			"not a key":    "private_key=7365637265740a\n\n",
			"not a pair":   "preshared_key=736563726574=0a\n\n",
			"refusal":      "errno=5\n\n",
		} {
			answering(t, "wg2", answer)
			_, err := Open("wg2")
			if err == nil || strings.Contains(err.Error(), "736563") {
				t.Errorf("%s: %v", name, err)
			}
		}
	})
}

// answering plays a userspace device that gives one answer to anything.
func answering(t *testing.T, name, answer string) {
	t.Helper()
	path := socketDirectory + "/" + name + ".sock"
	_ = os.Remove(path)
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = io.ReadFull(c, make([]byte, len("get=1\n\n")))
			_, _ = io.WriteString(c, answer)
			_ = c.Close()
		}
	}()
}

func awaitInitiation(t *testing.T, sink *net.UDPConn) {
	t.Helper()
	if err := sink.SetReadDeadline(time.Now().Add(4 * time.Second)); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 2048)
	n, err := sink.Read(b)
	if err != nil {
		t.Fatalf("no handshake initiation: %v", err)
	}
	if n != initiationSize || b[0] != device.MessageInitiationType {
		t.Fatalf("%d bytes of type %d, want an initiation", n, b[0])
	}
}

func linkUp(name string) error {
	s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(s) }()
	ifr, err := unix.NewIfreq(name)
	if err != nil {
		return err
	}
	ifr.SetUint16(unix.IFF_UP)
	return unix.IoctlIfreq(s, unix.SIOCSIFFLAGS, ifr)
}

// addIPv6 adds an address, and with it the route of its prefix.
func addIPv6(name string, p netip.Prefix) error {
	i, err := net.InterfaceByName(name)
	if err != nil {
		return err
	}
	s, err := unix.Socket(unix.AF_INET6, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(s) }()
	request := struct { // struct in6_ifreq of linux/ipv6.h
		address [16]byte
		bits    uint32
		index   int32
	}{p.Addr().As16(), uint32(p.Bits()), int32(i.Index)}
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(s), unix.SIOCSIFADDR, uintptr(unsafe.Pointer(&request)))
	if errno != 0 {
		return errno
	}
	return nil
}
