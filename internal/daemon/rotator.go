package daemon

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"math/bits"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"keyturn/internal/config"
	"keyturn/internal/control"
	"keyturn/internal/kem"
	"keyturn/internal/kms"
	"keyturn/internal/link"
	"keyturn/internal/psk"
	"keyturn/internal/rotation"
	"keyturn/internal/wg"
	"keyturn/internal/wire"
)

const (
	heartbeat     = 2 * time.Second
	maxHeartbeat  = 15 * time.Second
	manyPeers     = 1000 // from here on heartbeats are rarer
	dialTimeout   = 3 * time.Second
	redialAfter   = 2 * time.Second  // with jitter: half of it to all of it
	firstAsk      = 15 * time.Second // a server without a link asks for the peer's role; with jitter, as above
	rarestAsk     = 4 * time.Minute
	quietSession  = 110 * time.Second // of a tunnel; REKEY_AFTER_TIME is 120 s
	goodbyeWait   = time.Second
	repeatAfter   = 5 * time.Minute  // the same failure is logged again
	rejectedEvery = 10 * time.Second // turned away connections are logged at most so often
)

// Parts is what a Rotator is put together from. The rotator closes none of
// them but the listener.
type Parts struct {
	Config     *config.Config
	ConfigPath string // for the status
	Device     wg.Device
	Identity   *link.Identity
	Listener   net.Listener
	// Dial connects to a peer's rotator; nil: link.Dial.
	Dial func(ctx context.Context, address string, self *link.Identity, pins link.Pins) (*link.Conn, error)
	// Source returns the QKD source shared with a peer, nil if it has none.
	Source     func(*config.Peer) (kms.Source, error)
	Store      Store
	Poll       time.Duration // interval of dumps; zero: wg.DefaultInterval
	Log        *slog.Logger
	Version    string
	LogDropped func() uint64
	// Watch is told of every note of every peer, before it is logged; nil: nobody.
	Watch func(peer string, n rotation.Note)
}

// Rotator rotates the PSKs of one WireGuard interface.
type Rotator struct {
	Parts
	boot      wire.BootID
	publicKey wg.PublicKey
	started   time.Time
	poller    *wg.Poller
	peers     []*peer
	byPin     map[link.Fingerprint]*peer
	stop      context.CancelFunc     // of the rotator, for Down
	lost      atomic.Pointer[string] // why the device cannot be read, nil if it can
	stopping  atomic.Bool
	serving   sync.WaitGroup // connections that peers dialled

	rejectedMu sync.Mutex
	rejectedAt time.Time
	rejected   int
}

// New puts a rotator together. It reads the device once, to learn the roles
// and whether a link runs inside its tunnel.
func New(parts Parts) (*Rotator, error) {
	r := &Rotator{Parts: parts, started: time.Now(), byPin: map[link.Fingerprint]*peer{}, stop: func() {}}
	if r.Dial == nil {
		r.Dial = link.Dial
	}
	if _, err := rand.Read(r.boot[:]); err != nil {
		return nil, err
	}
	dump, err := r.Device.Dump()
	if err != nil {
		return nil, fmt.Errorf("read the device: %w", err)
	}
	defer dump.Wipe()
	r.publicKey = dump.PublicKey
	r.poller = wg.NewPoller(r.Device, r.Poll)
	for _, c := range r.Config.Peers {
		p, err := r.newPeer(c, dump.Peers[c.PublicKey])
		if err != nil {
			return nil, fmt.Errorf("peer %s: %w", c.Name, err)
		}
		r.peers = append(r.peers, p)
		for _, pin := range p.pins {
			r.byPin[pin] = p
		}
	}
	return r, nil
}

// newPeer makes a peer's machines and restores them from its journal.
func (r *Rotator) newPeer(c *config.Peer, now wg.Peer) (*peer, error) {
	role, err := c.ResolveRole(r.publicKey)
	if err != nil {
		return nil, err
	}
	source, err := r.Source(c)
	if err != nil {
		return nil, err
	}
	combiner, err := psk.ParseCombiner(c.Combiner.String())
	if err != nil {
		return nil, err
	}
	inside, _ := c.CheckInside(now.AllowedIPs)
	p := &peer{
		rotator: r, config: c, key: c.PublicKey, source: source, inside: inside, allowed: now.AllowedIPs,
		log:    limitLog(r.Log.With("peer", c.Name)),
		gen:    newInbox(),
		sched:  newInbox(),
		beside: make(chan context.Context, 1),
		giveUp: func() {},
		linkAt: time.Now(),
	}
	p.life, p.end = context.WithCancel(context.Background())
	for _, id := range c.Identities {
		p.pins = append(p.pins, id)
	}
	sae, peerSAE := saes(c)
	conf := rotation.Config{
		Role: rotation.Server,
		Parameters: wire.Parameters{
			Version: wire.Version, SAE: sae, PeerSAE: peerSAE, PublicKey: r.publicKey, PeerPublicKey: c.PublicKey,
			QKD: c.KMS != nil, KEMs: c.KEMs, Require: uint8(requires[c.Require]), Combiner: uint8(combiner),
			Buffer: uint16(c.Buffer), Window: c.Window,
		},
		Identity:   r.Identity.Fingerprint(),
		Boot:       r.boot,
		Heartbeat:  min(heartbeat*time.Duration(1+len(r.Config.Peers)/manyPeers), maxHeartbeat),
		MaxKeyAge:  c.MaxKeyAge,
		BlockStale: c.OnStale == config.StaleBlock,
		BlockStart: c.Start == config.StartBlock,
		Fallback:   c.Fallback == config.FallbackInitial,
		Recovery: r.Config.Journal != nil && c.Fallback != config.FallbackInitial &&
			c.OnStale != config.StaleBlock && c.Start != config.StartBlock,
		Inside: inside,
		Random: rand.Reader,
	}
	if role == config.RoleClient {
		conf.Role = rotation.Client
	}
	for _, n := range c.KEMs {
		scheme, err := kem.Lookup(n)
		if err != nil {
			return nil, err
		}
		conf.KEMs = append(conf.KEMs, scheme)
	}
	p.role = conf.Role
	p.parameters = conf.Parameters
	p.tunnel = rotation.NewTunnel(conf)
	journal, err := r.Store.Load(p.key)
	if err != nil && !errors.Is(err, ErrSetAside) {
		return nil, fmt.Errorf("journal: %w", err)
	}
	if err != nil {
		p.log.Warn("journal cannot be used", "err", err)
		p.journalError = err.Error()
	}
	at := time.Now()
	p.tunnel.Restore(journal, at, at.Round(0))
	p.generator = rotation.NewKeyGenerator(p.tunnel)
	p.scheduler = rotation.NewKeyRotationScheduler(p.tunnel)
	return p, nil
}

// requires are the policies by their names in the configuration.
var requires = map[config.Require]rotation.Require{
	config.RequireAll: rotation.RequireAll, config.RequireQKD: rotation.RequireQKD,
	config.RequirePQC: rotation.RequirePQC, config.RequireAny: rotation.RequireAny,
}

// saes are under which IDs our KMS knows us and the peer. Without a KMS there
// are none, also where the configuration names the peer's.
func saes(c *config.Peer) (own, peer string) {
	if c.KMS == nil {
		return "", ""
	}
	return c.KMS.SAE, c.SAE
}

// Run runs the rotator until ctx ends, then says goodbye to the peers.
func (r *Rotator) Run(ctx context.Context) error {
	listener := link.NewListener(r.Listener, r.Identity, func(f link.Fingerprint) bool { return r.byPin[f] != nil },
		link.WithRejected(r.reject))
	g, ctx := errgroup.WithContext(ctx)
	for _, p := range r.peers {
		observations, end := r.poller.Subscribe(p.key)
		g.Go(func() error { defer end(); return p.run(ctx, observations) })
	}
	g.Go(func() error { return r.poller.Run(ctx) })
	g.Go(func() error { return r.accept(ctx, listener) })
	<-ctx.Done()
	r.stopping.Store(true)
	err := errors.Join(g.Wait(), listener.Close())
	r.serving.Wait()
	return err
}

// accept hands authenticated connections to their peers.
func (r *Rotator) accept(ctx context.Context, l *link.Listener) error {
	for {
		c, err := l.Accept(ctx)
		if ctx.Err() != nil {
			if err == nil {
				_ = c.Close()
			}
			return nil
		}
		if err != nil {
			return fmt.Errorf("accept peers: %w", err)
		}
		p := r.byPin[c.Peer()]
		if p == nil { // cannot be: the listener asked
			_ = c.Close()
			continue
		}
		p.accepted(c)
	}
}

// reject logs connections that were turned away, not more often than a
// stranger should be able to make us write.
func (r *Rotator) reject(remote net.Addr, err error) {
	r.rejectedMu.Lock()
	defer r.rejectedMu.Unlock()
	if time.Since(r.rejectedAt) < rejectedEvery {
		r.rejected++
		return
	}
	from := "?"
	if remote != nil {
		from = remote.String()
	}
	r.Log.Warn("connection turned away", "remote", from, "err", err, "others", r.rejected)
	r.rejectedAt, r.rejected = time.Now(), 0
}

// Rotate asks for a rotation at the next window.
func (r *Rotator) Rotate(name string) error {
	found := false
	for _, p := range r.peers {
		if name == "" || p.config.Name == name {
			found = true
			p.sched.rotate.Store(true)
			p.sched.tick()
		}
	}
	if !found {
		return fmt.Errorf("%w: %q", control.ErrUnknownPeer, name)
	}
	return nil
}

// Down ends the rotator.
func (r *Rotator) Down() { r.stop() }

// Status says what the rotator and its peers are doing.
func (r *Rotator) Status() control.Status {
	s := control.Status{
		Interface: r.Config.Interface, PID: os.Getpid(), Version: r.Version, State: control.StateUp, StartedAt: r.started.Round(0),
		ConfigPath: r.ConfigPath, Listen: r.Listener.Addr().String(), PublicKey: r.publicKey.String(),
		Identity: r.Identity.Fingerprint().String(), Peers: []control.PeerStatus{}, Warnings: []control.Warning{},
	}
	for _, p := range r.peers {
		ps := p.status()
		if ps.State == control.PeerHold || ps.State == control.PeerRefused {
			s.State = control.StateHold
		}
		s.Peers = append(s.Peers, ps)
	}
	if r.stopping.Load() {
		s.State = control.StateDown
	}
	if why := r.lost.Load(); why != nil {
		s.Warnings = append(s.Warnings, control.Warn(control.WireGuardFails, *why))
	}
	if r.LogDropped != nil {
		if n := r.LogDropped(); n > 0 {
			s.Warnings = append(s.Warnings, control.Warn(control.LogDropped, fmt.Sprintf("%d lines", n)))
		}
	}
	return s
}

// sourceNames names the sources of a key.
func sourceNames(s wire.Sources, kems []string) []string {
	names := make([]string, 0, bits.OnesCount16(uint16(s)))
	if s.QKD() {
		names = append(names, "QKD")
	}
	for i, n := range kems {
		if s.KEM(i) {
			names = append(names, n)
		}
	}
	return names
}
