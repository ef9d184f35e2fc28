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

	"golang.org/x/sync/errgroup"

	"keyturn/internal/config"
	"keyturn/internal/control"
	"keyturn/internal/link"
	"keyturn/internal/wg"
)

// Options is what a rotator needs from whoever starts it.
type Options struct {
	ConfigPath string // the configuration file
	RunDir     string // control socket and journal: mode 0700, gone at reboot
	StateDir   string // what must survive a reboot: the initial PSK of each peer; exists, mode 0700
	Version    string // of keyturn, for control.Status
	Log        *slog.Logger
	LogDropped func() uint64 // lines lost so far, for control.LogDropped; nil: none can be
	Ready      func()        // called once: configuration valid, device readable, listening, control socket up
}

// Run runs the rotator that the configuration describes until ctx ends or an
// operator says down; it then says goodbye to the peers, leaves the last PSK
// in place and returns nil. An error before Ready means that nothing was changed.
func Run(ctx context.Context, o Options) error {
	c, err := config.Load(o.ConfigPath)
	if err != nil {
		return err
	}
	device, err := OpenDevice(c)
	if err != nil {
		return err
	}
	defer device.Close()
	identity, err := ReadIdentity(c)
	if err != nil {
		return fmt.Errorf("identity: %w", err)
	}
	sources, err := OpenSources(c)
	if err != nil {
		return err
	}
	defer sources.Close()
	server, err := control.Listen(control.SocketPath(o.RunDir, c.Interface))
	if err != nil {
		return err
	}
	listener, err := Listen(ctx, c.Listen)
	if err != nil {
		return errors.Join(fmt.Errorf("listen for peers: %w", err), server.Close())
	}
	store, err := openStore(c, o.RunDir, o.StateDir)
	if err != nil {
		return errors.Join(err, listener.Close(), server.Close())
	}
	r, err := New(Parts{
		Config: c, ConfigPath: o.ConfigPath, Device: device, Identity: identity, Listener: listener, Source: sources.For,
		Store: store, Log: o.Log, Version: o.Version, LogDropped: o.LogDropped,
	})
	if err != nil {
		return errors.Join(err, listener.Close(), server.Close())
	}

	ctx, stop := context.WithCancel(ctx)
	defer stop()
	r.stop = stop
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return server.Serve(ctx, r) })
	g.Go(func() error { return r.Run(ctx) })
	o.Ready()
	return g.Wait()
}

// Listen listens at a configured TCP address: at an IPv4 address for IPv4 alone,
// also at 0.0.0.0, which package net takes for every address of either family.
func Listen(ctx context.Context, address string) (net.Listener, error) {
	network := "tcp"
	if a, err := netip.ParseAddrPort(address); err == nil && a.Addr().Is4() {
		network = "tcp4"
	}
	return new(net.ListenConfig).Listen(ctx, network, address)
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
