package wg

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
)

func routesOf(t testing.TB, peers ...string) []route {
	t.Helper()
	var routes []route
	for i, prefixes := range peers {
		for _, s := range strings.Fields(prefixes) {
			routes = append(routes, route{netip.MustParsePrefix(s).Masked(), PublicKey{byte(i)}})
		}
	}
	return routes
}

func TestHostsOf(t *testing.T) {
	// The first peer is probed; the others take what is theirs.
	for name, c := range map[string]struct {
		peers []string
		want  string
	}{
		"single address":         {[]string{"10.0.0.2/32", "10.0.0.0/24"}, "10.0.0.2"},
		"single IPv6":            {[]string{"fd00::2/128"}, "fd00::2"},
		"subnet":                 {[]string{"10.0.0.0/24"}, "10.0.0.1 10.0.0.2 10.0.0.3"},
		"point to point":         {[]string{"10.0.0.2/31"}, "10.0.0.2 10.0.0.3"},
		"single first":           {[]string{"10.0.0.0/30 10.9.0.1/32"}, "10.9.0.1 10.0.0.1 10.0.0.2 10.0.0.3"},
		"start taken":            {[]string{"10.0.0.0/24", "10.0.0.0/25", "10.0.0.128/32"}, "10.0.0.129 10.0.0.130 10.0.0.131"},
		"hole":                   {[]string{"10.0.0.0/29", "10.0.0.0/30", "10.0.0.6/31"}, "10.0.0.4 10.0.0.5"},
		"all taken":              {[]string{"10.0.0.0/24", "10.0.0.0/25 10.0.0.128/25"}, ""},
		"default route":          {[]string{"0.0.0.0/0"}, "192.0.2.1 198.51.100.1 203.0.113.1"},
		"default route, taken":   {[]string{"0.0.0.0/0", "192.0.2.0/24"}, "198.51.100.1 203.0.113.1"},
		"half of the internet":   {[]string{"128.0.0.0/1"}, "192.0.2.1 198.51.100.1 203.0.113.1"},
		"IPv6 default route":     {[]string{"::/0"}, "2001:db8::1"},
		"both families":          {[]string{"10.0.0.2/32 fd00::2/128"}, "10.0.0.2 fd00::2"},
		"multicast and loopback": {[]string{"224.0.0.5/32 127.0.0.1/32 ff02::5/128 ::1/128 0.0.0.0/32"}, ""},
		"link-local":             {[]string{"fe80::2/128"}, "fe80::2"},
		"none":                   {[]string{""}, ""},
		"bounded": {
			[]string{"10.0.0.0/24 10.0.1.0/24 10.0.2.0/24 10.0.3.0/24"},
			"10.0.0.1 10.0.0.2 10.0.0.3 10.0.1.1 10.0.1.2 10.0.1.3 10.0.2.1 10.0.2.2",
		},
	} {
		t.Run(name, func(t *testing.T) {
			routes := routesOf(t, c.peers...)
			got := fmt.Sprint(hostsOf(PublicKey{0}, routes))
			if name == "IPv6 default route" { // and whatever follows ::1
				got = strings.Fields(got)[0] + "]"
			}
			if got != "["+c.want+"]" {
				t.Errorf("%s, want [%s]", got, c.want)
			}
		})
	}
}

// A hub with a peer for each address and one with the rest must not be
// searched for ever.
func TestHostsOfManyPeers(t *testing.T) {
	routes := routesOf(t, "10.0.0.0/16")
	a := netip.MustParseAddr("10.0.0.0")
	for range 300 {
		routes = append(routes, route{netip.PrefixFrom(a, 32), PublicKey{1}})
		a = a.Next()
	}
	if got := hostsOf(PublicKey{0}, routes); !slices.Contains(got, a) {
		t.Errorf("%v, want %v, the first free one", got, a)
	}
	for _, r := range routes {
		if last := lastOf(r.prefix); !r.prefix.Contains(last) || r.prefix.Contains(last.Next()) {
			t.Fatalf("last of %v is %v", r.prefix, last)
		}
	}
}

func TestCheckName(t *testing.T) {
	for _, name := range []string{"wg0", "a", "wg-to-lisbon.1", "fifteen-letters"} {
		if err := checkName(name); err != nil {
			t.Error(err)
		}
	}
	for _, name := range []string{"", ".", "..", "../x", "a/b", "a b", "a\n", "a\x00", "wg0:1", "sixteen-letters!"} {
		if err := checkName(name); err == nil {
			t.Errorf("%q was accepted", name)
		}
		if d, err := Open(name); err == nil || d != nil {
			t.Errorf("Open(%q) did not refuse the name", name)
		}
	}
}

func TestParsePublicKey(t *testing.T) {
	const good = "9OmSKzF5QHD5mckhBHyoN2uPPRGJNDYOl15+DKbtV1M="
	var k PublicKey
	if err := k.UnmarshalText([]byte(good)); err != nil || k.String() != good {
		t.Errorf("%v, %v", k, err)
	}
	for _, s := range []string{"", good[:43], good + "\n", " " + good, good[:4] + "\n" + good[4:], good[:42] + "N=", good[:42] + "==", "AAAA"} {
		if err := k.UnmarshalText([]byte(s)); err == nil {
			t.Errorf("%q was accepted", s)
		}
	}
	if k.String() != good {
		t.Error("a refused key changed the receiver")
	}
}
