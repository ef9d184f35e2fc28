package kmesim

import (
	"context"
	"crypto/tls"
	"errors"
	"net"

	"golang.org/x/sync/errgroup"
)

// Config of a running pair.
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
}

// Run serves a pair of KMEs until ctx ends, then returns nil. ready is called
// once, when both listen.
func Run(ctx context.Context, c Config, ready func(addrA, addrB net.Addr)) error {
	pair := c.Pair
	if pair == nil {
		pair = New(c.Options)
	}
	if (c.Dir == "") == (c.Lab == nil) {
		return errors.New("certificates are given by a directory or in memory, one of them")
	}
	var confs [2]*tls.Config
	for i, name := range []string{NameA, NameB} {
		if c.Lab != nil {
			confs[i] = c.Lab.ServerTLS(i)
			continue
		}
		var err error
		if confs[i], err = loadServerTLS(c.Dir, name); err != nil {
			return err
		}
	}
	var lns [2]net.Listener
	for i, addr := range []string{c.AddrA, c.AddrB} {
		ln, err := new(net.ListenConfig).Listen(ctx, "tcp", addr)
		if err != nil {
			if i == 1 {
				lns[0].Close()
			}
			return err
		}
		lns[i] = ln
	}
	if ready != nil {
		ready(lns[0].Addr(), lns[1].Addr())
	}
	tasks, ctx := errgroup.WithContext(ctx)
	for i, k := range []*KME{pair.A, pair.B} {
		tasks.Go(func() error { return k.Serve(ctx, lns[i], confs[i]) })
	}
	return tasks.Wait()
}
