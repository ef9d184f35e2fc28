package wg

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	discardPort = 9 // RFC 863
	sendTimeout = time.Second

	maxHosts      = 8    // addresses that one probe tries
	hostsOfPrefix = 3    // of which from one allowed prefix at most
	maxSteps      = 1024 // foreign prefixes skipped in search of a host
)

// documentation are addresses that no host has (RFC 5737, RFC 3849), to be
// tried first in a prefix as wide as the internet.
var documentation = []netip.Addr{
	netip.MustParseAddr("192.0.2.1"),
	netip.MustParseAddr("198.51.100.1"),
	netip.MustParseAddr("203.0.113.1"),
	netip.MustParseAddr("2001:db8::1"),
}

// route is an entry of WireGuard's cryptokey routing table.
type route struct {
	prefix netip.Prefix
	peer   PublicKey
}

// appendRoutes appends the routing table of a dump.
func appendRoutes(to []route, d *Dump) []route {
	for k, p := range d.Peers {
		for _, prefix := range p.AllowedIPs {
			to = append(to, route{prefix.Masked(), k})
		}
	}
	return to
}

// lookup returns the longest route that holds a, as WireGuard would choose.
func lookup(routes []route, a netip.Addr) (best route) {
	for _, r := range routes {
		if r.prefix.Contains(a) && (!best.prefix.IsValid() || r.prefix.Bits() > best.prefix.Bits()) {
			best = r
		}
	}
	return best
}

// hostsOf returns addresses that WireGuard routes to peer, the best first:
// single addresses, which are the peer's own, then those in narrow prefixes.
// A prefix can be partly or wholly another peer's by longer prefixes.
func hostsOf(peer PublicKey, routes []route) []netip.Addr {
	var own []netip.Prefix
	for _, r := range routes {
		if r.peer == peer {
			own = append(own, r.prefix)
		}
	}
	slices.SortFunc(own, func(a, b netip.Prefix) int {
		return cmp.Or(cmp.Compare(hostBits(a), hostBits(b)), a.Addr().Compare(b.Addr()))
	})

	var hosts []netip.Addr
	for _, p := range own {
		room := min(hostsOfPrefix, maxHosts-len(hosts))
		try := func(a netip.Addr) {
			if room > 0 && usable(a) && lookup(routes, a).peer == peer && !slices.Contains(hosts, a) {
				hosts = append(hosts, a)
				room--
			}
		}
		for _, a := range documentation {
			if hostBits(p) >= 16 && p.Contains(a) {
				try(a)
			}
		}
		a := p.Addr()
		if hostBits(p) >= 2 {
			a = a.Next() // the first address names the network
		}
		for step := 0; step < maxSteps && room > 0 && a.IsValid() && p.Contains(a); step++ {
			if r := lookup(routes, a); r.peer == peer {
				try(a)
			} else {
				a = lastOf(r.prefix)
			}
			a = a.Next()
		}
	}
	return hosts
}

func hostBits(p netip.Prefix) int { return p.Addr().BitLen() - p.Bits() }

// lastOf returns the highest address of a prefix.
func lastOf(p netip.Prefix) netip.Addr {
	b := p.Masked().Addr().AsSlice()
	for i := p.Bits(); i < len(b)*8; i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}

// usable reports whether a packet can be addressed to a at all.
func usable(a netip.Addr) bool {
	if a.IsUnspecified() || a.IsLoopback() || a.IsMulticast() || a.Is4In6() {
		return false
	}
	if a.Is4() {
		first := a.As4()[0]
		return first != 0 && first < 240 // this network, reserved
	}
	return true
}

// sendProbe sends one datagram of one byte to the first of hosts that takes
// it, from a socket bound to the interface. So bound, IPv4 needs no route:
// Linux takes the destination to be on the link (ip_route_output_key_hash_rcu)
// and WireGuard does the rest. IPv6 does need one through this interface, as
// wg-quick makes for all allowed IPs, and is refused if the family is off
// here: therefore several hosts. The host's own addresses are passed over,
// for what is sent to them never leaves it.
func sendProbe(name string, hosts []netip.Addr) error {
	local, err := net.InterfaceAddrs()
	if err != nil {
		return fmt.Errorf("list own addresses: %w", err)
	}
	var errs []error
	for _, a := range hosts {
		if isLocal(a, local) {
			continue
		}
		err := sendByte(name, a)
		if err == nil {
			return nil
		}
		errs = append(errs, fmt.Errorf("send to %s through %q: %w", a, name, err))
	}
	if len(errs) == 0 {
		return ErrNoAddress
	}
	return errors.Join(errs...)
}

func isLocal(a netip.Addr, local []net.Addr) bool {
	return slices.ContainsFunc(local, func(l net.Addr) bool {
		n, ok := l.(*net.IPNet)
		return ok && n.IP.Equal(a.AsSlice())
	})
}

func sendByte(name string, to netip.Addr) error {
	if to.Is6() && to.IsLinkLocalUnicast() {
		to = to.WithZone(name)
	}
	dialer := net.Dialer{
		Timeout: sendTimeout,
		Control: func(_, _ string, c syscall.RawConn) error {
			var bound error
			err := c.Control(func(fd uintptr) { bound = unix.BindToDevice(int(fd), name) })
			return cmp.Or(err, bound)
		},
	}
	conn, err := dialer.DialContext(context.Background(), "udp", netip.AddrPortFrom(to, discardPort).String())
	if err == nil {
		_ = conn.SetWriteDeadline(time.Now().Add(sendTimeout))
		_, err = conn.Write([]byte{0})
		_ = conn.Close()
	}
	return plain(err)
}

// plain leaves of a network error what the system said. A kernel device says
// EDESTADDRREQ if it knows no endpoint of the peer and ENOKEY if the address
// is no longer the peer's.
func plain(err error) error {
	var errno syscall.Errno
	switch {
	case !errors.As(err, &errno):
		return err
	case errno == unix.ENODEV:
		return ErrNoDevice
	case errno == unix.EDESTADDRREQ:
		return fmt.Errorf("the peer's endpoint is not known: %w", errno)
	case errno == unix.ENOKEY:
		return ErrNoPeer
	}
	return errno
}
