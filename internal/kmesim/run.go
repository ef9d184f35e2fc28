package kmesim

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"

	"golang.org/x/sync/errgroup"
)

// Config of a running pair, or of one KME of it.
type Config struct {
	AddrA, AddrB string // TCP addresses to listen on, as "127.0.0.1:8443"
	// Dir is where WriteLab wrote the certificates; Lab is the same in memory.
	// One of them is set.
	Dir string
	Lab *Lab
	// Pair is what to run, for those who set faults. A new one, with Options,
	// if nil.
	Pair    *Pair
	Options Options

	// Only is the name of the one KME to run, where the other runs in another
	// process; both run if it is empty. Link is the TCP address where the one
	// listens for the other, and Peer where that one listens, as HOST:PORT.
	Only, Link, Peer string
	// Admin is the path of the admin endpoint's socket; none if empty.
	Admin string
	// Streams is where the KMEs answer by ETSI GS QKD 004 as well.
	Streams []StreamPort
}

// port is an address where a KME listens, and what it does there.
type port struct {
	addr  string
	serve func(context.Context, net.Listener) error
	at    *net.Addr // is set to where it listens; may be nil
}

// Run serves a pair of KMEs until ctx ends, then returns nil. ready is called
// once, when all listen; a KME that does not run has no address.
func Run(ctx context.Context, c Config, ready func(addrA, addrB net.Addr)) error {
	pair := c.Pair
	if pair == nil {
		pair = New(c.Options)
	}
	if (c.Dir == "") == (c.Lab == nil) {
		return errors.New("certificates are given by a directory or in memory, one of them")
	}
	if err := c.checkOnly(); err != nil {
		return err
	}
	var ports []port
	var runs []*KME
	var at [2]net.Addr
	streamsAt := make([][2]net.Addr, len(c.Streams))
	for i, k := range []*KME{pair.A, pair.B} {
		if c.Only != "" && k.name != c.Only {
			continue
		}
		proof, err := c.proof(i, k.name)
		if err != nil {
			return err
		}
		if k.expires = proof.expires(); !k.expires && k.Fault().Kind == Expired {
			return errNoRootKey
		}
		runs = append(runs, k)
		serve := func(f func(context.Context, net.Listener, *tls.Config) error) func(context.Context, net.Listener) error {
			return func(ctx context.Context, ln net.Listener) error { return f(ctx, ln, proof.serverTLS()) }
		}
		ports = append(ports, port{[]string{c.AddrA, c.AddrB}[i], serve(k.Serve), &at[i]})
		for j, p := range c.Streams {
			if addr := []string{p.AddrA, p.AddrB}[i]; addr != "" {
				ports = append(ports, port{addr, serve(func(ctx context.Context, ln net.Listener, conf *tls.Config) error {
					return k.ServeStreams(ctx, ln, conf, p.StreamOptions)
				}), &streamsAt[j][i]})
			}
		}
		if c.Only != "" {
			server, client := proof.linkTLS(k.other)
			r := newRemote(c.Peer, client, new(net.Dialer).DialContext)
			k.peer = r
			ports = append(ports, port{c.Link, func(ctx context.Context, ln net.Listener) error {
				return k.runLink(ctx, ln, server, r)
			}, nil})
		}
	}
	lns, err := listenAll(ctx, ports)
	if err != nil {
		return err
	}
	var admin net.Listener
	if c.Admin != "" {
		if admin, err = listenAdmin(ctx, c.Admin); err != nil {
			closeAll(lns)
			return err
		}
	}
	for i, p := range c.Streams {
		if p.Listening != nil {
			p.Listening(streamsAt[i][0], streamsAt[i][1])
		}
	}
	if ready != nil {
		ready(at[0], at[1])
	}
	tasks, ctx := errgroup.WithContext(ctx)
	for i, p := range ports {
		tasks.Go(func() error { return p.serve(ctx, lns[i]) })
	}
	if admin != nil {
		tasks.Go(func() error { return serveAdmin(ctx, admin, runs) })
	}
	return tasks.Wait()
}

func (c *Config) checkOnly() error {
	switch {
	case c.Only == "" && c.Link == "" && c.Peer == "":
		return nil
	case c.Only != NameA && c.Only != NameB:
		return fmt.Errorf("%q is neither %s nor %s", c.Only, NameA, NameB)
	case c.Link == "" || c.Peer == "":
		return errors.New("one KME of two needs an address for its link, and that of the other one's")
	}
	return nil
}

func (c *Config) proof(kme int, name string) (*proof, error) {
	if c.Lab != nil {
		return c.Lab.proof(kme), nil
	}
	return loadProof(c.Dir, name)
}

// listenAll listens on all ports or on none.
func listenAll(ctx context.Context, ports []port) (lns []net.Listener, err error) {
	for _, p := range ports {
		ln, err := new(net.ListenConfig).Listen(ctx, "tcp", p.addr)
		if err != nil {
			closeAll(lns)
			return nil, err
		}
		lns = append(lns, ln)
		if p.at != nil {
			*p.at = ln.Addr()
		}
	}
	return lns, nil
}

func closeAll(lns []net.Listener) {
	for _, ln := range lns {
		ln.Close()
	}
}
