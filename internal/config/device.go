package config

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"os"
)

// problem describes something wrong with the value of a peer's key, or with
// the whole peer where that key is not given.
func (p *Peer) problem(key, hint, format string, args ...any) Problem {
	at, ok := p.at[key]
	if !ok {
		at = p.begin
	}
	return p.source.problem(at, hint, fmt.Sprintf(format, args...), asItIs)
}

// Ignored names, in the order of the file, the values that have no effect. They
// are no mistakes.
func (c *Config) Ignored() Problems {
	var ps Problems
	for _, p := range c.Peers {
		if p.KMS == nil && p.SAE != "" {
			ps = append(ps, p.problem("sae", "leave it out, or add a kms block", "sae: has no effect on a peer without a kms"))
		}
	}
	return ps
}

func (p *Peer) noAddress() Problem {
	return p.problem("role", "add the host:port at which the peer's rotator listens, or make this end the server",
		"the client of peer %s has no address to dial", quote(p.Name))
}

// ResolveRole returns this end's role towards the peer. Without a configured
// one the end with the smaller WireGuard public key, as raw bytes, is client.
// Own is the interface's public key. The error is Problems: a client without
// an address, or the own key used as the peer's.
func (p *Peer) ResolveRole(own [32]byte) (Role, error) {
	role, ps := p.resolveRole(own)
	return role, ps.err()
}

func (p *Peer) resolveRole(own [32]byte) (Role, Problems) {
	switch order := bytes.Compare(own[:], p.PublicKey[:]); {
	case order == 0:
		return RoleAutomatic, Problems{p.problem("public_key", "name the key of the other end: wg show INTERFACE peers",
			"public_key: this is the interface's own public key")}
	case p.Role != RoleAutomatic:
		// A client without an address did not pass Parse.
		return p.Role, nil
	case order > 0:
		return RoleServer, nil
	case p.Address == "":
		problem := p.noAddress()
		problem.Message += ": its public key is the smaller one, which makes this end the client"
		problem.Hint = "add the host:port at which the peer's rotator listens, or write role: server here and role: client there"
		return RoleAutomatic, Problems{problem}
	}
	return RoleClient, nil
}

// CheckInside reports whether the link to the peer runs inside the tunnel that
// it looks after: whether the peer's address lies in its allowed IPs. Where it
// does, problems are those values that could then cut the link off for good.
// An address that is a host name counts as outside: once it is resolved, ask
// CheckInsideAt.
func (p *Peer) CheckInside(allowed []netip.Prefix) (inside bool, problems Problems) {
	a, err := netip.ParseAddrPort(p.Address)
	if err != nil {
		return false, nil
	}
	return p.CheckInsideAt(a.Addr(), allowed)
}

// CheckInsideAt is CheckInside for a link that goes to or came from addr.
func (p *Peer) CheckInsideAt(addr netip.Addr, allowed []netip.Prefix) (inside bool, problems Problems) {
	addr = addr.Unmap().WithZone("")
	var in netip.Prefix
	for _, a := range allowed {
		if a.Contains(addr) {
			in, inside = a, true
		}
	}
	if !inside {
		return false, nil
	}
	const hint = "a closed tunnel cuts off the link that would open it again: use an address outside the tunnel, or %s"
	why := fmt.Sprintf("the link runs inside the tunnel: %s lies in the peer's allowed IPs (%s)", addr, in)
	if p.OnStale == StaleBlock {
		problems = append(problems, p.problem("on_stale", fmt.Sprintf(hint, "on_stale: keep"), "on_stale: cannot be block, because %s", why))
	}
	if p.Start == StartBlock {
		problems = append(problems, p.problem("start", fmt.Sprintf(hint, "start: hold"), "start: cannot be block, because %s", why))
	}
	if !p.journal && p.Fallback == FallbackNone && p.Recovery == RecoveryAutomatic {
		problems = append(problems, p.problem("address",
			"add a journal, fallback: initial or recovery: manual, or use an address outside the tunnel",
			"nothing brings peer %s back after a reboot, because %s", quote(p.Name), why))
	}
	return inside, problems
}

// CheckDevice judges the configuration against the WireGuard interface that it
// is for: the interface's name, its own public key (zero: it has no private
// key) and the allowed IPs of its peers by public key. The error is Problems.
func (c *Config) CheckDevice(name string, own [32]byte, peers map[[32]byte][]netip.Prefix) error {
	var ps Problems
	if name != c.Interface {
		ps = append(ps, c.problem("interface", "", "interface: this is %s, not %s", quote(name), quote(c.Interface)))
	}
	if own == [32]byte{} {
		ps = append(ps, c.problem("interface", "wg set "+c.Interface+" private-key FILE", "interface: %s has no private key", quote(c.Interface)))
	}
	for _, p := range c.Peers {
		_, problems := p.resolveRole(own)
		ps = append(ps, problems...)
		allowed, known := peers[p.PublicKey]
		if !known && own != p.PublicKey {
			ps = append(ps, p.problem("public_key", "add the peer to WireGuard first, or correct the key: wg show "+c.Interface+" peers",
				"public_key: WireGuard interface %s has no peer %s", quote(c.Interface), encode(p.PublicKey)))
		}
		_, problems = p.CheckInside(allowed)
		ps = append(ps, problems...)
	}
	return ps.err()
}

// NoDevice puts the error of opening the interface into the terms of the
// configuration. The result is Problems.
func (c *Config) NoDevice(err error) error {
	if errors.Is(err, os.ErrNotExist) {
		return Problems{c.problem("interface", "wg show interfaces (as root) lists those there are; keyturn creates none, bring it up first",
			"interface: no WireGuard interface %s", quote(c.Interface))}
	}
	hint := ""
	if errors.Is(err, os.ErrPermission) {
		hint = asRoot
	}
	return Problems{c.problem("interface", hint, "interface: %s: %s", quote(c.Interface), err)}
}

// problem describes something wrong with the value of a key of the file.
func (c *Config) problem(key, hint, format string, args ...any) Problem {
	return c.source.problem(c.at[key], hint, fmt.Sprintf(format, args...), asItIs)
}
