package daemon_test

import (
	"cmp"
	"context"
	"crypto/rand"
	"io"
	"log/slog"
	"os"
	"sync"
	"testing"
	"time"

	"keyturn/internal/config"
	"keyturn/internal/control"
	"keyturn/internal/daemon"
	"keyturn/internal/kmesim"
	"keyturn/internal/kms"
	"keyturn/internal/kms/etsi014"
	"keyturn/internal/kms/kmstls"
	"keyturn/internal/link"
	"keyturn/internal/memnet"
	"keyturn/internal/psk"
	"keyturn/internal/rotation"
	"keyturn/internal/wg"
)

// system is the whole of it in virtual time: two real WireGuard devices, two
// rotators, a link of real TLS, and two KMEs behind mutual TLS.
type system struct {
	t        *testing.T
	network  memnet.Network // of the link
	kmes     *kmesim.Pair
	pair     *wg.Pair
	tunnel   [2]tunnelEnd // its ends, or those of the hosts
	rotators [2]*daemon.Rotator

	make    [2]func() *daemon.Rotator
	end     [2]context.CancelFunc
	running [2]chan struct{}

	mu    sync.Mutex
	notes [2]map[rotation.NoteKind]int
}

// tunnelEnd is one end of the tunnel.
type tunnelEnd interface {
	Device() wg.Device
	PublicKey() wg.PublicKey
	Ping() error
}

// options change the system before it starts.
type options struct {
	// hosts carry the tunnel instead of a wg.Pair. They are the caller's.
	hosts *hosts
	// parts changes what a rotator is put together from; its listener is
	// made only if this does not.
	parts func(end int, p *daemon.Parts)
	log   io.Writer // nil: standard output with -v
	peer  func(end int, p *config.Peer)
	watch func(s *system, end int, n rotation.Note)
	quiet bool // no traffic
	// slowDump: a PSK is there from the start, and each dump takes 50 ms.
	slowDump bool
}

// pairs of all bubbles stay reachable: see wg.Pair.
var pairs struct {
	sync.Mutex
	made []*wg.Pair
}

// start runs the system until the returned function is called.
func start(t *testing.T, o options) (*system, func()) {
	t.Helper()
	// Go 1.26's race detector crashes where the first timer of a bubble is one
	// that has run out when it is first looked at.
	time.Sleep(time.Nanosecond)
	s := &system{t: t, kmes: kmesim.New(kmesim.Options{})}
	ctx, stop := context.WithCancel(t.Context())
	var running sync.WaitGroup
	goes := func(what string, f func(context.Context) error) {
		running.Go(func() {
			if err := f(ctx); err != nil {
				t.Errorf("%s: %v", what, err)
			}
		})
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	lab, err := kmesim.NewLab(kmesim.LabOptions{})
	must(err)
	var site memnet.Network // of the KMEs
	for i, k := range []*kmesim.KME{s.kmes.A, s.kmes.B} {
		ln, err := site.Listen([]string{"kme-a:443", "kme-b:443"}[i])
		must(err)
		goes("kme", func(ctx context.Context) error { return k.Serve(ctx, ln, lab.ServerTLS(i)) })
	}
	var initial *psk.Key
	if o.slowDump {
		initial, err = psk.Random(rand.Reader)
		must(err)
	}
	if o.hosts != nil {
		s.tunnel = [2]tunnelEnd{o.hosts.ends[0], o.hosts.ends[1]}
	} else {
		s.pair, err = wg.NewPair(wg.PairOptions{PSK: initial})
		must(err)
		pairs.Lock()
		pairs.made = append(pairs.made, s.pair)
		pairs.Unlock()
		s.tunnel = [2]tunnelEnd{s.pair.A, s.pair.B}
	}
	ends := &s.tunnel
	var identities [2]*link.Identity
	addresses := [2]string{"lisbon:51822", "madrid:51822"}
	for i := range identities {
		identities[i], err = link.GenerateIdentity(rand.Reader)
		must(err)
	}
	log := o.log
	switch {
	case log != nil:
	case testing.Verbose():
		log = os.Stdout
	default:
		log = io.Discard
	}
	for i := range ends {
		other := 1 - i
		systemOf, err := etsi014.New(etsi014.Config{
			URIs: []string{[]string{"https://kme-a:443", "https://kme-b:443"}[i]}, SAE: kmesim.SAEName(i + 1),
			TLS: kmstls.Config{Memory: lab.ClientTLS(i + 1)}, Timeout: 5 * time.Second, Dial: site.Dial,
		})
		must(err)
		t.Cleanup(func() { _ = systemOf.Close() })
		p := &config.Peer{
			Name: []string{"madrid", "lisbon"}[i], PublicKey: ends[other].PublicKey(),
			Identities: [][32]byte{identities[other].Fingerprint()}, Address: addresses[other], SAE: kmesim.SAEName(other + 1),
			Role: []config.Role{config.RoleClient, config.RoleServer}[i],
			KMS:  &config.KMS{Interface: config.ETSI014, URIs: []string{"-"}, SAE: kmesim.SAEName(i + 1)},
			KEMs: []string{"ML-KEM-768"}, Require: config.RequireAll, Combiner: config.XOR, Buffer: 3,
			Window: 30 * time.Second, OnStale: config.StaleKeep, MaxKeyAge: time.Hour, Start: config.StartHold,
			Fallback: config.FallbackNone, Recovery: config.RecoveryAutomatic,
		}
		if o.peer != nil {
			o.peer(i, p)
		}
		s.notes[i] = map[rotation.NoteKind]int{}
		store := &daemon.Memory{}
		s.make[i] = func() *daemon.Rotator {
			device := ends[i].Device()
			if o.slowDump {
				device = slowDevice{device}
			}
			parts := daemon.Parts{
				Config: &config.Config{Interface: "wg0", Peers: []*config.Peer{p}},
				Device: device, Identity: identities[i],
				Dial: func(ctx context.Context, address string, self *link.Identity, pins link.Pins) (*link.Conn, error) {
					raw, err := s.network.Dial(ctx, "tcp", address)
					if err != nil {
						return nil, err
					}
					return link.Client(ctx, raw, self, pins)
				},
				Source: func(p *config.Peer) (kms.Source, error) {
					if p.KMS == nil {
						return nil, nil
					}
					return systemOf.For(p.SAE)
				},
				Store: store,
				Log:   slog.New(slog.NewTextHandler(log, nil)).With("end", i),
				Watch: func(_ string, n rotation.Note) {
					s.mu.Lock()
					defer s.mu.Unlock()
					s.notes[i][n.Kind]++
					if o.watch != nil {
						o.watch(s, i, n)
					}
				},
			}
			if o.parts != nil {
				o.parts(i, &parts)
			}
			if parts.Listener == nil {
				ln, err := s.network.Listen(addresses[i])
				must(err)
				parts.Listener = ln
			}
			r, err := daemon.New(parts)
			must(err)
			return r
		}
		s.startRotator(i)
	}
	if !o.quiet {
		goes("traffic", s.traffic)
	}
	return s, func() {
		for i := range ends {
			s.stopRotator(i)
		}
		stop()
		running.Wait()
		if s.pair != nil {
			must(s.pair.Close())
		}
	}
}

// slowDevice is a device of many peers.
type slowDevice struct{ wg.Device }

func (d slowDevice) Dump() (*wg.Dump, error) {
	time.Sleep(50 * time.Millisecond)
	return d.Device.Dump()
}

// startRotator starts a rotator as a new process would, with its old journal.
func (s *system) startRotator(end int) {
	ctx, stop := context.WithCancel(s.t.Context())
	done := make(chan struct{})
	r := s.make[end]()
	s.rotators[end], s.end[end], s.running[end] = r, stop, done
	go func() {
		defer close(done)
		if err := r.Run(ctx); err != nil {
			s.t.Errorf("rotator %d: %v", end, err)
		}
	}()
}

// stopRotator ends a rotator and waits for it.
func (s *system) stopRotator(end int) {
	s.end[end]()
	<-s.running[end]
}

// peer is the status of an end's only peer.
func (s *system) peer(end int) control.PeerStatus { return s.rotators[end].Status().Peers[0] }

// traffic pings from both ends once a second.
func (s *system) traffic(ctx context.Context) error {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for i := 0; ; i++ {
		if err := s.tunnel[i%2].Ping(); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// count is how often an end noted something.
func (s *system) count(end int, k rotation.NoteKind) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.notes[end][k]
}

// inStep compares the PSKs in WireGuard itself.
func (s *system) inStep() bool {
	s.t.Helper()
	set := func(end int) *psk.Key {
		d, err := s.tunnel[end].Device().Dump()
		if err != nil {
			return new(psk.Key)
		}
		return cmp.Or(d.Peers[s.tunnel[1-end].PublicKey()].PSK, new(psk.Key))
	}
	a, b := set(0), set(1)
	defer a.Wipe()
	defer b.Wipe()
	return a.Equal(b) && !a.IsZero()
}
