package config

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// tunnel is a configuration with one peer, whose public key is 2, 0, 0 ...
func tunnel(t *testing.T, lines ...string) *Config {
	t.Helper()
	text := "interface: wg0\nidentity: identity.key\n"
	peer := "peers:\n  - name: lisbon\n    public_key: " + encode([32]byte{2}) + "\n    identity: " + encode([32]byte{9}) + "\n    kems: [ML-KEM-768]\n"
	for _, l := range lines {
		if strings.HasPrefix(l, "journal") {
			text += l + "\n"
			continue
		}
		peer += "    " + l + "\n"
	}
	c, err := Parse("wg0.yaml", []byte(text+peer))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestResolveRole(t *testing.T) {
	const address = "address: 198.51.100.7:51822"
	smaller, larger := [32]byte{1, 255}, [32]byte{2, 0, 1}
	for _, test := range []struct {
		lines []string
		own   [32]byte
		want  Role
		fails string
	}{
		{[]string{address}, smaller, RoleClient, ""},
		{[]string{address}, larger, RoleServer, ""},
		{nil, larger, RoleServer, ""},
		{[]string{address, "role: server"}, smaller, RoleServer, ""},
		{[]string{address, "role: client"}, larger, RoleClient, ""},
		{nil, smaller, RoleAutomatic, `the client of peer "lisbon" has no address to dial: its public key is the smaller one`},
		{[]string{address, "role: client"}, [32]byte{2}, RoleAutomatic, "public_key: this is the interface's own public key"},
	} {
		t.Run(fmt.Sprint(test.lines, test.own[:3]), func(t *testing.T) {
			role, err := tunnel(t, test.lines...).Peers[0].ResolveRole(test.own)
			if role != test.want || (err != nil) != (test.fails != "") || err != nil && !strings.Contains(err.Error(), test.fails) {
				t.Errorf("ResolveRole = %v, %v; want %v, %q", role, err, test.want, test.fails)
			}
		})
	}
}

func TestCheckInside(t *testing.T) {
	const (
		in       = "address: 10.9.0.2:51822"
		onStale  = "on_stale: cannot be block"
		start    = "start: cannot be block"
		recovery = "nothing brings peer \"lisbon\" back"
	)
	for _, test := range []struct {
		name   string
		lines  []string
		inside bool
		fails  []string
	}{
		{"beside", []string{"address: 198.51.100.7:51822", "on_stale: block", "start: block"}, false, nil},
		{"a name", []string{"address: lisbon.example.org:51822", "on_stale: block"}, false, nil},
		{"no address", []string{"on_stale: block"}, false, nil},
		{"no recovery", []string{in}, true, []string{recovery}},
		{"IPv6", []string{`address: "[2001:db8::2]:51822"`}, true, []string{recovery}},
		{"IPv4 in IPv6", []string{`address: "[::ffff:10.9.0.2]:51822"`}, true, []string{recovery}},
		{"a zone", []string{`address: "[2001:db8::2%eth0]:51822"`}, true, []string{recovery}},
		{"manual", []string{in, "recovery: manual"}, true, nil},
		{"fallback", []string{in, "fallback: initial"}, true, nil},
		{"journal", []string{in, "journal: {path: journal, key_file: journal.key}"}, true, nil},
		{"on_stale", []string{in, "recovery: manual", "on_stale: block"}, true, []string{onStale}},
		{"start", []string{in, "recovery: manual", "start: block"}, true, []string{start}},
		{"everything", []string{in, "start: block", "on_stale: block"}, true, []string{onStale, start, recovery}},
	} {
		t.Run(test.name, func(t *testing.T) {
			inside, ps := tunnel(t, test.lines...).Peers[0].CheckInside([]netip.Prefix{
				netip.MustParsePrefix("10.9.0.0/24"), netip.MustParsePrefix("2001:db8::/32"),
			})
			if inside != test.inside || len(ps) != len(test.fails) {
				t.Fatalf("CheckInside = %v, %v; want %v and %d problems", inside, ps, test.inside, len(test.fails))
			}
			for i, want := range test.fails {
				if !strings.HasPrefix(ps[i].Message, want) {
					t.Errorf("problem %q, want %q", ps[i].Message, want)
				}
			}
		})
	}
}

func TestCheckDevice(t *testing.T) {
	own, peer := [32]byte{3}, [32]byte{2}
	inside := map[[32]byte][]netip.Prefix{peer: {netip.MustParsePrefix("0.0.0.0/0")}}
	for _, test := range []struct {
		name   string
		config *Config
		device string
		own    [32]byte
		peers  map[[32]byte][]netip.Prefix
		want   string
	}{
		{"fits", tunnel(t, "recovery: manual", "address: 10.9.0.2:51822"), "wg0", own, inside, ""},
		{"unknown peer", tunnel(t), "wg0", own, nil,
			`wg0.yaml:5:17: public_key: WireGuard interface "wg0" has no peer AgAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=
    5 |     public_key: AgAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=
      hint: add the peer to WireGuard first, or correct the key: wg show wg0 peers`},
		{"own key", tunnel(t), "wg0", peer, nil,
			`wg0.yaml:5:17: public_key: this is the interface's own public key
    5 |     public_key: AgAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=
      hint: name the key of the other end: wg show INTERFACE peers`},
		{"another interface without a key", tunnel(t, "address: 198.51.100.7:1"), "wg1", [32]byte{}, map[[32]byte][]netip.Prefix{peer: nil},
			`wg0.yaml:1:12: interface: this is "wg1", not "wg0"
    1 | interface: wg0
wg0.yaml:1:12: interface: "wg0" has no private key
    1 | interface: wg0
      hint: wg set wg0 private-key FILE`},
		{"inside and automatic client", tunnel(t, "start: block", "address: 10.9.0.2:51822"), "wg0", own, inside,
			`wg0.yaml:8:12: start: cannot be block, because the link runs inside the tunnel: 10.9.0.2 lies in the peer's allowed IPs (0.0.0.0/0)
    8 |     start: block
      hint: a closed tunnel cuts off the link that would open it again: use an address outside the tunnel, or start: hold
wg0.yaml:9:14: nothing brings peer "lisbon" back after a reboot, because the link runs inside the tunnel: 10.9.0.2 lies in the peer's allowed IPs (0.0.0.0/0)
    9 |     address: 10.9.0.2:51822
      hint: add a journal, fallback: initial or recovery: manual, or use an address outside the tunnel`},
		{"automatic client without address", tunnel(t), "wg0", [32]byte{1}, map[[32]byte][]netip.Prefix{peer: nil},
			`wg0.yaml:4:5: the client of peer "lisbon" has no address to dial: its public key is the smaller one, which makes this end the client
    4 |   - name: lisbon
      hint: add the host:port at which the peer's rotator listens, or write role: server here and role: client there`},
	} {
		t.Run(test.name, func(t *testing.T) {
			got := ""
			if err := test.config.CheckDevice(test.device, test.own, test.peers); err != nil {
				got = err.Error()
			}
			if diff := cmp.Diff(test.want, got); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
		})
	}
}

func TestNoDevice(t *testing.T) {
	c := tunnel(t)
	for err, want := range map[error][2]string{
		fmt.Errorf("open: %w", os.ErrNotExist):   {`interface: no WireGuard interface "wg0"`, "wg show interfaces "},
		fmt.Errorf("read: %w", os.ErrPermission): {`interface: "wg0": read: permission denied`, "run it as root"},
		errors.New("no answer"):                  {`interface: "wg0": no answer`, ""},
	} {
		ps, _ := errors.AsType[Problems](c.NoDevice(err))
		if len(ps) != 1 || ps[0].Message != want[0] || !strings.HasPrefix(ps[0].Hint, want[1]) || (want[1] == "") != (ps[0].Hint == "") {
			t.Errorf("NoDevice(%v) = %v, want %q", err, ps, want)
		}
	}
}
