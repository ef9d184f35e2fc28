package wg

import (
	"net/netip"
	"strings"
	"testing"
	"time"
)

const (
	peerOne = "public_key=" + "b85996fecc9c7f1fc6d2572a76eda11d59bcd20be8e543b15ce4bd85a8e75a33" + "\n"
	anyHex  = "188515093e952f5f22e865cef3012e72f8b5f0b598ac0309d5dacce3b70fcf52"
)

func TestParseUAPI(t *testing.T) {
	d, err := parseUAPI([]byte("private_key=" + anyHex + "\nlisten_port=12912\nfwmark=7\n" + peerOne +
		"preshared_key=" + anyHex + "\nprotocol_version=1\nendpoint=[abcd:23::33%2]:51820\n" +
		"last_handshake_time_sec=100\nlast_handshake_time_nsec=5\ntx_bytes=3\nrx_bytes=18446744073709551615\n" +
		"persistent_keepalive_interval=25\nallowed_ip=192.168.4.4/32\nallowed_ip=::/0\n" +
		strings.Replace(peerOne, "b8", "b9", 1)))
	if err != nil {
		t.Fatal(err)
	}
	if len(d.Peers) != 2 || d.ListenPort != 12912 || d.PublicKey == (PublicKey{}) {
		t.Errorf("device %v port %d, %d peers", d.PublicKey, d.ListenPort, len(d.Peers))
	}
	for k, p := range d.Peers {
		if k[0] == 0xb9 {
			if !p.Handshake.IsZero() || !p.PSK.IsZero() || p.Rx != 0 || len(p.AllowedIPs) != 0 {
				t.Errorf("empty peer: %+v", p)
			}
			continue
		}
		if p.PSK.IsZero() || !p.Handshake.Equal(time.Unix(100, 5)) || p.Tx != 3 || p.Rx != 1<<64-1 ||
			p.Keepalive != 25*time.Second || len(p.AllowedIPs) != 2 || p.Endpoint != netip.MustParseAddrPort("[abcd:23::33%2]:51820") {
			t.Errorf("peer: %+v", p)
		}
	}
}

func TestParseUAPIRefuses(t *testing.T) {
	for text, want := range map[string]string{
		"\n":                                            "line 1: not key=value",
		"listen_port":                                   "line 1: not key=value",
		"errno=0\n":                                     `line 1: unknown key "errno"`,
		"preshared_key=" + anyHex:                       `line 1: unknown key "preshared_key"`,
		"listen_port=65536\n":                           "line 1: listen_port: value is not valid",
		"fwmark=-1\n":                                   "line 1: fwmark: value is not valid",
		"private_key=18\n":                              "line 1: private_key: value is not valid",
		"public_key=zz" + anyHex[2:]:                    "line 1: public_key: value is not valid",
		peerOne + "listen_port=1\n":                     `line 2: unknown key "listen_port"`,
		peerOne + "tx_bytes=1\n" + peerOne:              "line 3: peer uFmW/sycfx/G0lcqdu2hHVm80gvo5UOxXOS9hajnWjM= is listed twice",
		peerOne + "preshared_key=zz\n":                  "line 2: preshared_key: value is not valid",
		peerOne + "protocol_version=0\n":                "line 2: protocol_version: value is not valid",
		peerOne + "endpoint=host:1\n":                   "line 2: endpoint: value is not valid",
		peerOne + "allowed_ip=10.0.0.1\n":               "line 2: allowed_ip: value is not valid",
		peerOne + "last_handshake_time_nsec=1000000000": "line 2: last_handshake_time_nsec: value is not valid",
		peerOne + "persistent_keepalive_interval=65536": "line 2: persistent_keepalive_interval: value is not valid",
	} {
		if _, err := parseUAPI([]byte(text)); err == nil || err.Error() != want {
			t.Errorf("%q: %v, want %s", text, err, want)
		}
	}
}

func FuzzParseUAPI(f *testing.F) {
	f.Add([]byte("private_key=" + anyHex + "\nlisten_port=1\n" + peerOne + "preshared_key=" + anyHex + "\nallowed_ip=10.0.0.0/8\n"))
	f.Add([]byte(peerOne + "endpoint=[::1]:1\nlast_handshake_time_sec=1\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		d, err := parseUAPI(text)
		if err != nil {
			if strings.Contains(err.Error(), anyHex) {
				t.Error("the error holds a value")
			}
			return
		}
		for k, p := range d.Peers {
			if p.PublicKey != k || p.PSK == nil {
				t.Errorf("peer %v: %+v", k, p)
			}
			_ = hostsOf(k, appendRoutes(nil, d))
		}
	})
}
