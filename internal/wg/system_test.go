package wg

import (
	"errors"
	"net"
	"os"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
)

// A stopped process accepts at its socket and never answers.
func TestCallTimesOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newClient()
		c.ctl = new(wgctrl.Client)
		release := make(chan struct{})
		hang := func(*wgctrl.Client) (int, error) { <-release; return 1, nil }
		fast := func(*wgctrl.Client) (int, error) { return 2, nil }

		began := time.Now()
		if _, err := call(c, hang); !errors.Is(err, ErrTimeout) || time.Since(began) != callTimeout {
			t.Errorf("hanging call: %v after %v", err, time.Since(began))
		}
		if _, err := call(c, fast); !errors.Is(err, ErrTimeout) {
			t.Errorf("a call beside the hanging one: %v", err)
		}
		if err := c.close(); !errors.Is(err, ErrTimeout) {
			t.Errorf("close beside the hanging call: %v", err)
		}
		close(release)
		synctest.Wait()
		if n, err := call(c, fast); n != 2 || err != nil {
			t.Errorf("after it ended: %d, %v", n, err)
		}
		if err := c.close(); err != nil {
			t.Error(err)
		}
		if _, err := call(c, fast); !errors.Is(err, os.ErrClosed) {
			t.Errorf("after close: %v", err)
		}
	})
}

func TestExplain(t *testing.T) {
	s := &System{name: "wg7"}
	for _, c := range []struct {
		err, is error
		says    string
	}{
		{os.ErrNotExist, ErrNoDevice, `read "wg7": no such WireGuard interface`},
		{syscall.EPERM, ErrPrivilege, `read "wg7": permission denied: it takes CAP_NET_ADMIN`},
		{&net.OpError{Op: "dial", Err: syscall.EACCES}, os.ErrPermission, "/var/run/wireguard/wg7.sock"},
		{&net.OpError{Op: "dial", Err: os.NewSyscallError("connect", syscall.ECONNREFUSED)}, ErrStaleSocket, "remove /var/run/wireguard/wg7.sock"},
		{syscall.EPROTONOSUPPORT, ErrStaleSocket, "remove /var/run/wireguard/wg7.sock"},
		{syscall.ENOBUFS, syscall.ENOBUFS, "no buffer space"},
		{ErrTimeout, ErrTimeout, "does not answer"},
		{errors.New(`wguser: invalid key=value pair: "preshared_key=abc"`), nil, `read "wg7": the device's answer makes no sense`},
	} {
		got := s.explain("read", c.err)
		if c.is != nil && !errors.Is(got, c.is) || !strings.Contains(got.Error(), c.says) || strings.Contains(got.Error(), "abc") {
			t.Errorf("%v becomes: %v", c.err, got)
		}
	}
}

func TestConvertWipesWhatItRead(t *testing.T) {
	d := &wgtypes.Device{PrivateKey: wgtypes.Key{1}, PublicKey: wgtypes.Key{2}, Peers: []wgtypes.Peer{{
		PublicKey:    wgtypes.Key{3},
		PresharedKey: wgtypes.Key{4},
		Endpoint:     &net.UDPAddr{IP: net.ParseIP("192.0.2.1"), Port: 7},
		AllowedIPs:   []net.IPNet{{IP: net.IP{10, 0, 0, 0}, Mask: net.CIDRMask(8, 32)}},
	}}}
	dump, err := convert(d, time.Now(), time.Now())
	if err != nil {
		t.Fatal(err)
	}
	p := dump.Peers[PublicKey{3}]
	if p.PSK.Bytes()[0] != 4 || p.Endpoint.String() != "192.0.2.1:7" || len(p.AllowedIPs) != 1 || p.AllowedIPs[0].String() != "10.0.0.0/8" {
		t.Errorf("peer %+v", p)
	}
	if d.PrivateKey != (wgtypes.Key{}) || d.Peers[0].PresharedKey != (wgtypes.Key{}) {
		t.Error("keys are left in what wgctrl returned")
	}
	dump.Wipe()
	if !p.PSK.IsZero() {
		t.Error("Wipe left a key")
	}
}
