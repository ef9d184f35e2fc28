// Package daemon composes a rotator: it connects the machines of
// internal/rotation with WireGuard, the KMS, the links and the journal, and
// runs them until its context ends.
package daemon

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"syscall"

	"golang.org/x/sync/errgroup"

	"keyturn/internal/config"
	"keyturn/internal/control"
	"keyturn/internal/link"
	"keyturn/internal/wg"
)

// Setup is what a rotator needs of the outside, open and judged: its
// interface, identity, sources and the address that it listens at.
type Setup struct {
	config   *config.Config
	device   *wg.System
	identity *link.Identity
	sources  *Sources
	listener net.Listener
}

// Open opens what the rotator of a configuration needs. It writes nothing.
func Open(ctx context.Context, c *config.Config) (*Setup, error) {
	device, err := OpenDevice(c)
	if err != nil {
		return nil, err
	}
	identity, err := ReadIdentity(c)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("identity: %w", err), device.Close())
	}
	sources, err := OpenSources(c)
	if err != nil {
		return nil, errors.Join(err, device.Close())
	}
	listener, err := Listen(ctx, c.Listen)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("listen for peers: %w", err), sources.Close(), device.Close())
	}
	return &Setup{config: c, device: device, identity: identity, sources: sources, listener: listener}, nil
}

// Close closes it all. It is called once, after Run where that is called.
func (s *Setup) Close() error {
	err := s.listener.Close()
	if errors.Is(err, net.ErrClosed) { // Run's rotator was faster
		err = nil
	}
	return errors.Join(err, s.sources.Close(), s.device.Close())
}

// Options is what a rotator needs from whoever starts it.
type Options struct {
	ConfigPath string // the configuration file
	RunDir     string // control socket and journal: mode 0700, gone at reboot
	StateDir   string // what must survive a reboot: the initial PSK of each peer
	Version    string // of keyturn, for control.Status
	Log        *slog.Logger
	LogDropped func() uint64 // lines lost so far, for control.LogDropped; nil: none can be
	// Ready is called once, when nothing can keep the rotator from running any
	// more but the error that it returns. The rotator has done nothing yet.
	Ready func() error
}

// Run runs the rotator until ctx ends or an operator says down; it then says
// goodbye to the peers, leaves the last PSK in place and returns nil. An error
// before Ready means that nothing was changed, but for empty directories of
// journals.
func (s *Setup) Run(ctx context.Context, o Options) error {
	server, err := control.Listen(control.SocketPath(o.RunDir, s.config.Interface))
	if err != nil {
		return err
	}
	r, err := s.rotator(o)
	if err == nil {
		if err = ctx.Err(); err == nil { // nobody waits any more
			err = o.Ready()
		}
	}
	if err != nil {
		return errors.Join(err, server.Close())
	}

	ctx, stop := context.WithCancel(ctx)
	defer stop()
	r.stop = stop
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return server.Serve(ctx, r) })
	g.Go(func() error { return r.Run(ctx) })
	return g.Wait()
}

func (s *Setup) rotator(o Options) (*Rotator, error) {
	store, err := openStore(s.config, o.RunDir, o.StateDir)
	if err != nil {
		return nil, err
	}
	return New(Parts{
		Config: s.config, ConfigPath: o.ConfigPath, Device: s.device, Identity: s.identity, Listener: s.listener, Source: s.sources.For,
		Store: store, Log: o.Log, Version: o.Version, LogDropped: o.LogDropped,
	})
}

// Listen listens at a configured TCP address: at an IPv4 address for IPv4 alone,
// also at 0.0.0.0, which package net takes for every address of either family.
// The error is EADDRINUSE where another process has it.
func Listen(ctx context.Context, address string) (net.Listener, error) {
	network := "tcp"
	if a, err := netip.ParseAddrPort(address); err == nil && a.Addr().Is4() {
		network = "tcp4"
	}
	ln, err := new(net.ListenConfig).Listen(ctx, network, address)
	if errors.Is(err, syscall.EADDRINUSE) {
		return nil, fmt.Errorf("%w by another process", err)
	}
	return ln, err
}

// ReadIdentity reads the identity that the configuration names, which must not
// be a peer's as well.
func ReadIdentity(c *config.Config) (*link.Identity, error) {
	id, err := link.ReadIdentityFile(c.Identity)
	if err != nil {
		return nil, err
	}
	for _, p := range c.Peers {
		if slices.Contains(p.Identities, [32]byte(id.Fingerprint())) {
			return nil, fmt.Errorf("%s is that of peer %s as well: each rotator has its own", c.Identity, p.Name)
		}
	}
	return id, nil
}

// OpenDevice opens the interface and judges the configuration by it.
func OpenDevice(c *config.Config) (*wg.System, error) {
	device, err := wg.Open(c.Interface)
	if err == nil {
		var dump *wg.Dump
		if dump, err = device.Dump(); err == nil {
			defer dump.Wipe()
			if err = CheckDevice(c, dump); err == nil {
				return device, nil
			}
		}
		_ = device.Close()
	}
	if _, ok := errors.AsType[config.Problems](err); ok {
		return nil, err
	}
	if errors.Is(err, wg.ErrNoDevice) {
		err = fs.ErrNotExist
	}
	return nil, c.NoDevice(err)
}

// CheckDevice judges the configuration by what WireGuard shows.
func CheckDevice(c *config.Config, dump *wg.Dump) error {
	peers := make(map[[32]byte][]netip.Prefix, len(dump.Peers))
	for k, p := range dump.Peers {
		peers[k] = p.AllowedIPs
	}
	return c.CheckDevice(c.Interface, dump.PublicKey, peers)
}
