//go:build e2e

package e2e

import (
	"errors"
	"fmt"
	"net"
	"time"

	"golang.zx2c4.com/wireguard/device"
	"golang.zx2c4.com/wireguard/wgctrl"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"keyturn/internal/psk"
)

// Every host has at most one WireGuard interface, and all call it the same:
// a host's /run, and so WireGuard's control socket, is its own.
const (
	wg0    = "wg0"
	wgPort = 51820
)

// interfaceKeys is the identity of a host's interface. It outlives a reboot.
type interfaceKeys struct {
	private, public wgtypes.Key
}

// connect makes the hosts each other's WireGuard peers, without a pre-shared
// key, creating their interfaces where there are none.
func connect(a, b *host) {
	a.lab.t.Helper()
	for _, h := range []*host{a, b} {
		if h.device == nil {
			private, err := wgtypes.GeneratePrivateKey()
			if err != nil {
				h.lab.t.Fatal(err)
			}
			h.device = &interfaceKeys{private, private.PublicKey()}
			h.createDevice()
		}
	}
	a.addPeer(b)
	b.addPeer(a)
}

// createDevice makes the host's interface, without peers, and answers pings
// at its address.
func (h *host) createDevice() {
	h.lab.t.Helper()
	secret, err := psk.New(h.device.private[:])
	if err != nil {
		h.lab.t.Fatal(err)
	}
	h.lab.remember(secret)
	if _, err := h.tell(order{Verb: "create", Device: wg0}); err != nil {
		h.lab.t.Fatal(err)
	}
	port := wgPort
	h.configure(wgtypes.Config{PrivateKey: &h.device.private, ListenPort: &port})
	err = h.in(func() error {
		if err := ip(fmt.Sprintf("addr add %s/24 dev %s", h.inner, wg0), "link set "+wg0+" up"); err != nil {
			return err
		}
		h.echo, err = net.ListenPacket("udp", net.JoinHostPort(h.inner.String(), echoPort))
		return err
	})
	if err != nil {
		h.lab.t.Fatal(err)
	}
	go answer(h.echo)
}

// destroyDevice takes the interface away, with all it knows.
func (h *host) destroyDevice() {
	h.lab.t.Helper()
	h.echo.Close()
	if _, err := h.tell(order{Verb: "destroy", Device: wg0}); err != nil {
		h.lab.t.Fatal(err)
	}
}

func (h *host) addPeer(p *host) {
	h.lab.t.Helper()
	c := wgtypes.PeerConfig{
		PublicKey:  p.device.public,
		Endpoint:   &net.UDPAddr{IP: p.addr.AsSlice(), Port: wgPort},
		AllowedIPs: []net.IPNet{{IP: p.inner.AsSlice(), Mask: net.CIDRMask(32, 32)}},
	}
	if key := h.original[p]; key != nil {
		k := wgtypes.Key(key.Bytes())
		c.PresharedKey = &k
	}
	h.configure(wgtypes.Config{Peers: []wgtypes.PeerConfig{c}})
}

// removePeer takes a peer away, its session and its pre-shared key included.
func (h *host) removePeer(p *host) {
	h.lab.t.Helper()
	h.configure(wgtypes.Config{Peers: []wgtypes.PeerConfig{{PublicKey: p.device.public, Remove: true}}})
}

// share gives both ends an original pre-shared key, and sets it.
func share(a, b *host) {
	a.lab.t.Helper()
	key := randomKey(a.lab.t)
	for _, end := range []struct{ h, p *host }{{a, b}, {b, a}} {
		if end.h.original == nil {
			end.h.original = make(map[*host]*psk.Key)
		}
		end.h.original[end.p] = key
		end.h.setPSK(end.p, key)
	}
}

// setPSK sets the pre-shared key towards a peer, as wg set would.
func (h *host) setPSK(p *host, key *psk.Key) {
	h.lab.t.Helper()
	h.lab.remember(key)
	k := wgtypes.Key(key.Bytes())
	h.configure(wgtypes.Config{Peers: []wgtypes.PeerConfig{{PublicKey: p.device.public, UpdateOnly: true, PresharedKey: &k}}})
}

// fingerprint reads the pre-shared key towards a peer from WireGuard, not
// through keyturn, and names it.
func (h *host) fingerprint(p *host) psk.Fingerprint {
	h.lab.t.Helper()
	peer, err := h.peer(p)
	if err != nil {
		h.lab.t.Fatal(err)
	}
	key, err := psk.New(peer.PresharedKey[:])
	if err != nil {
		h.lab.t.Fatal(err)
	}
	defer key.Wipe()
	return h.lab.remember(key)
}

// handshake makes the host start a handshake with a peer, and waits until
// both ends show that it completed. The session before it lives on: no packet
// is lost. WireGuard lets 5 s pass after an initiation or a response before it
// sends another initiation.
func (h *host) handshake(p *host) {
	h.lab.t.Helper()
	ours, theirs := h.latest(p), p.latest(h)
	eventually(h.lab.t, 15*time.Second, fmt.Sprintf("a handshake of %s with %s", h.name, p.name), func() error {
		h.beginHandshake(p)
		if h.latest(p).Equal(ours) {
			return fmt.Errorf("%s shows none", h.name)
		}
		if p.latest(h).Equal(theirs) {
			return fmt.Errorf("%s shows none", p.name)
		}
		return nil
	})
}

// beginHandshake makes the host send an initiation to a peer, if WireGuard lets it.
func (h *host) beginHandshake(p *host) {
	h.lab.t.Helper()
	if _, err := h.tell(order{Verb: "handshake", Device: wg0, Peer: device.NoisePublicKey(p.device.public)}); err != nil {
		h.lab.t.Fatal(err)
	}
}

// latest returns the time of the latest handshake with a peer by the host's stamp.
func (h *host) latest(p *host) time.Time {
	h.lab.t.Helper()
	peer, err := h.peer(p)
	if err != nil {
		h.lab.t.Fatal(err)
	}
	return peer.LastHandshakeTime
}

// failedHandshakes counts the handshakes that the host's interface began since
// it was created and that had no answer when it began the next, at least 5 s
// later. The last one is not counted yet.
func (h *host) failedHandshakes() int {
	h.lab.t.Helper()
	r, err := h.tell(order{Verb: "failed", Device: wg0})
	if err != nil {
		h.lab.t.Fatal(err)
	}
	return r.Count
}

// peer dumps the interface and returns what it says of a peer.
func (h *host) peer(p *host) (*wgtypes.Peer, error) {
	var d *wgtypes.Device
	err := h.wgctrl(func(c *wgctrl.Client) (err error) {
		d, err = c.Device(wg0)
		return err
	})
	if err != nil {
		return nil, err
	}
	for i := range d.Peers {
		if d.Peers[i].PublicKey == p.device.public {
			return &d.Peers[i], nil
		}
	}
	return nil, errors.New("no such peer")
}

func (h *host) configure(cfg wgtypes.Config) {
	h.lab.t.Helper()
	if err := h.wgctrl(func(c *wgctrl.Client) error { return c.ConfigureDevice(wg0, cfg) }); err != nil {
		h.lab.t.Fatalf("configure %s of %s: %v", wg0, h.name, err)
	}
}

func (h *host) wgctrl(f func(*wgctrl.Client) error) error {
	return h.in(func() error {
		c, err := wgctrl.New()
		if err != nil {
			return err
		}
		defer c.Close()
		return f(c)
	})
}
