// Package demo runs everything in one process: two WireGuard devices over
// loopback UDP, two KMEs with mutual TLS, two rotators that agree over a TCP
// link, and constant traffic through the tunnel. It needs no root, no network
// and leaves nothing behind.
package demo

import (
	"context"
	"crypto/rand"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"keyturn/internal/config"
	"keyturn/internal/daemon"
	"keyturn/internal/kmesim"
	"keyturn/internal/kms"
	"keyturn/internal/kms/etsi014"
	"keyturn/internal/kms/kmstls"
	"keyturn/internal/link"
	"keyturn/internal/rotation"
	"keyturn/internal/wg"
)

// names of the two hosts; lisbon is the client.
var names = [2]string{"lisbon", "madrid"}

// lab is two hosts with a tunnel between them.
type lab struct {
	pair     *wg.Pair
	sources  [2]*etsi014.KMS
	rotators [2]*daemon.Rotator
	uris     [2]string
	watch    func(host string, n rotation.Note)
}

// newLab puts everything together and starts the KMEs in g.
func newLab(ctx context.Context, g *errgroup.Group, watch func(host string, n rotation.Note)) (_ *lab, err error) {
	l := &lab{watch: watch}
	certificates, err := kmesim.NewLab(kmesim.LabOptions{})
	if err != nil {
		return nil, err
	}
	if err := l.startKMEs(ctx, g, certificates); err != nil {
		return nil, err
	}
	if l.pair, err = wg.NewPair(wg.PairOptions{Loopback: true}); err != nil {
		return nil, err
	}
	var identities [2]*link.Identity
	var listeners [2]net.Listener
	for i := range names {
		if identities[i], err = link.GenerateIdentity(rand.Reader); err != nil {
			return nil, err
		}
		if listeners[i], err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
			return nil, err
		}
	}
	ends := [2]*wg.End{l.pair.A, l.pair.B}
	for i, host := range names {
		other := 1 - i
		block := &config.KMS{Interface: config.ETSI014, URIs: []string{l.uris[i]}, SAE: kmesim.SAEName(i + 1)}
		l.sources[i], err = etsi014.New(etsi014.Config{
			URIs: block.URIs, SAE: block.SAE, TLS: kmstls.Config{Memory: certificates.ClientTLS(i + 1)}, Timeout: 5 * time.Second,
		})
		if err != nil {
			return nil, err
		}
		role := config.RoleClient
		if i == 1 {
			role = config.RoleServer
		}
		l.rotators[i], err = daemon.New(daemon.Parts{
			Config: &config.Config{
				Interface: "demo", Window: config.DefaultWindow,
				Peers: []*config.Peer{{
					Name: names[other], PublicKey: ends[other].PublicKey(), Identities: [][32]byte{identities[other].Fingerprint()},
					Address: listeners[other].Addr().String(), SAE: kmesim.SAEName(other + 1), Role: role, KMS: block,
					KEMs: []string{"ML-KEM-1024"}, Require: config.RequireAll, Combiner: config.XOR,
					Buffer: config.DefaultBuffer, Window: config.DefaultWindow, OnStale: config.StaleKeep,
					MaxKeyAge: config.DefaultMaxKeyAge, Start: config.StartHold, Fallback: config.FallbackNone,
				}},
			},
			Device: ends[i].Device(), Identity: identities[i], Listener: listeners[i],
			Source: func(p *config.Peer) (kms.Source, error) { return l.sources[i].For(p.SAE) },
			Store:  &daemon.Memory{}, Log: slog.New(slog.DiscardHandler),
			Watch: func(_ string, n rotation.Note) { l.watch(host, n) },
		})
		if err != nil {
			return nil, err
		}
	}
	return l, nil
}

// startKMEs returns once both listen.
func (l *lab) startKMEs(ctx context.Context, g *errgroup.Group, certificates *kmesim.Lab) error {
	ready := make(chan struct{})
	failed := make(chan error, 1)
	var once sync.Once
	g.Go(func() error {
		err := kmesim.Run(ctx, kmesim.Config{AddrA: "127.0.0.1:0", AddrB: "127.0.0.1:0", Lab: certificates}, func(a, b net.Addr) {
			l.uris = [2]string{"https://" + a.String(), "https://" + b.String()}
			once.Do(func() { close(ready) })
		})
		failed <- err
		return err
	})
	select {
	case <-ready:
		return nil
	case err := <-failed:
		return fmt.Errorf("start the KMEs: %w", err)
	}
}

// run runs both rotators until ctx ends.
func (l *lab) run(ctx context.Context) error {
	var g errgroup.Group
	for _, r := range l.rotators {
		g.Go(func() error { return r.Run(ctx) })
	}
	return g.Wait()
}

// inStep compares the PSKs of both ends in WireGuard itself.
func (l *lab) inStep() (bool, error) {
	a, err := l.pair.A.Device().Dump()
	if err != nil {
		return false, err
	}
	defer a.Wipe()
	b, err := l.pair.B.Device().Dump()
	if err != nil {
		return false, err
	}
	defer b.Wipe()
	pa, pb := a.Peers[l.pair.B.PublicKey()], b.Peers[l.pair.A.PublicKey()]
	return pa.PSK.Equal(pb.PSK) && !pa.PSK.IsZero(), nil
}

// close frees what is not freed by the end of a context.
func (l *lab) close() error {
	for _, s := range l.sources {
		_ = s.Close()
	}
	return l.pair.Close()
}
