package daemon

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"keyturn/internal/config"
	"keyturn/internal/kms"
	"keyturn/internal/link"
	"keyturn/internal/psk"
	"keyturn/internal/rotation"
	"keyturn/internal/wg"
	"keyturn/internal/wire"
)

// peer runs the two machines of one peer, each in a goroutine of its own: its
// inbox is the only way to it. mu lets only one of them step at a time, for
// they share the tunnel.
type peer struct {
	rotator    *Rotator
	config     *config.Peer
	key        wg.PublicKey
	role       rotation.Role
	parameters wire.Parameters
	pins       link.Pins
	source     kms.Source     // nil: no QKD
	allowed    []netip.Prefix // the peer's allowed IPs at the start
	log        *slog.Logger

	gen, sched *inbox

	// A client's wish for a second connection (L5) is the context of the
	// attempt. It ends when the wish does.
	beside chan context.Context
	giveUp context.CancelFunc // of the last wish; the scheduler's goroutine's own

	// life outlasts the rotator's wish to stop, until the scheduler has done
	// what it had begun and said goodbye.
	life context.Context
	end  context.CancelFunc

	mu        sync.Mutex
	tunnel    *rotation.Tunnel
	generator *rotation.KeyGenerator
	scheduler *rotation.KeyRotationScheduler

	jumped bool       // a clock jump that the scheduler has not heard of; its goroutine's own
	linkMu sync.Mutex // held while a connection is made the peer's

	connMu       sync.Mutex
	conn         *link.Conn // the newest
	inside       bool       // it runs, or would run, inside the tunnel
	linkAt       time.Time  // of its last change
	linkError    string
	refused      bool // linkError says that the other end is not who it should be
	kmsLast      time.Time
	kmsError     string
	journalError string
	deviceError  string
	foreignAt    time.Time
	lastFailure  failure
	jumpedAt     time.Time
}

// inbox is what waits for a machine. A machine that only reads WireGuard's
// newest state and cumulative messages can always catch up; the inbox is
// bounded, and whoever fills it waits.
type inbox struct {
	events chan item
	wake   chan struct{} // holds a token while a Tick is wanted
	rotate atomic.Bool   // the Tick is to be a Rotate
}

// item is an event and the connection that it came over, if any.
type item struct {
	event rotation.Event
	conn  *link.Conn
}

const inboxSize = 16

func newInbox() *inbox {
	return &inbox{events: make(chan item, inboxSize), wake: make(chan struct{}, 1)}
}

// deliver adds an event, waiting for room.
func (b *inbox) deliver(ctx context.Context, e rotation.Event, c *link.Conn) {
	select {
	case b.events <- item{event: e, conn: c}:
	case <-ctx.Done():
	}
}

func (b *inbox) tick() {
	select {
	case b.wake <- struct{}{}:
	default:
	}
}

// machine is what both machines have in common.
type machine interface {
	Step(time.Time, rotation.Event) []rotation.Effect
	Deadline() (time.Time, bool)
}

// run runs the peer until ctx ends.
func (p *peer) run(ctx context.Context, observations <-chan wg.Observation) error {
	defer p.end()
	var running sync.WaitGroup
	fetches := &fetcher{peer: p, ctx: p.life}
	running.Go(func() { p.drive(nil, p.generator, p.gen, nil, fetches) })
	switch {
	case p.role == rotation.Client:
		running.Go(func() { p.dial(p.life) })
	case p.config.Address != "":
		running.Go(func() { p.ask(p.life) })
	}
	if k, ok := p.source.(kms.Keeper); ok {
		running.Go(func() { k.Keep(p.life) })
	}
	p.drive(ctx.Done(), p.scheduler, p.sched, observations, nil)
	p.end()
	p.connMu.Lock()
	conn := p.conn
	p.connMu.Unlock()
	var err error
	if conn != nil {
		err = closed(conn.Close()) // which sends what is queued
	}
	running.Wait()
	fetches.wait.Wait()
	if p.source != nil {
		err = errors.Join(err, p.source.Close())
	}
	return err
}

// closed is err unless it only says that the other end was faster.
func closed(err error) error {
	var opErr *net.OpError
	if errors.Is(err, net.ErrClosed) || errors.Is(err, io.EOF) || errors.As(err, &opErr) {
		return nil
	}
	return err
}

// drive is the goroutine of one machine. It ends with the peer's life; the
// scheduler's, when stop is closed and it has said goodbye, for which it has a
// second.
func (p *peer) drive(stop <-chan struct{}, m machine, in *inbox, observations <-chan wg.Observation, fetches *fetcher) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	var conn *link.Conn // over which the machine speaks
	var hurry <-chan time.Time
	for {
		next := item{event: rotation.Tick{}}
		select {
		case <-p.life.Done():
			return
		case <-stop:
			stop, hurry = nil, time.After(goodbyeWait)
			next.event = rotation.Stop{}
		case <-hurry:
			next.event = rotation.Stop{}
		case next = <-in.events:
		case o := <-observations:
			if e, ok := p.observed(o); ok {
				p.step(m, e, conn, fetches)
				p.rearm(timer, m)
			}
			o.Peer.PSK.Wipe()
			if hurry != nil && p.stopped() {
				return
			}
			continue
		case <-in.wake:
			if in.rotate.Swap(false) {
				next.event = rotation.Rotate{}
			}
		case <-timer.C:
		}
		current := true
		switch next.event.(type) {
		case rotation.LinkUp:
			conn = next.conn
		case rotation.LinkDown:
			if current = conn == next.conn; current { // otherwise replaced already
				conn = nil
			}
		case rotation.Received, rotation.OtherVersion:
			current = conn == next.conn
		}
		if current {
			p.step(m, next.event, conn, fetches)
			p.rearm(timer, m)
		}
		if hurry != nil && p.stopped() {
			return
		}
	}
}

// stopped says whether the scheduler has said goodbye.
func (p *peer) stopped() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.scheduler.Stopped()
}

// rearm sets the timer to the machine's deadline.
func (p *peer) rearm(timer *time.Timer, m machine) {
	p.mu.Lock()
	at, ok := m.Deadline()
	p.mu.Unlock()
	if !ok {
		timer.Stop()
		return
	}
	timer.Reset(max(time.Until(at), 0))
}

// step lets a machine take an event and carries out what it wants, and what
// follows from that.
func (p *peer) step(m machine, first rotation.Event, conn *link.Conn, fetches *fetcher) {
	for events := []rotation.Event{first}; len(events) > 0; events = events[1:] {
		p.mu.Lock()
		effects := m.Step(time.Now(), events[0])
		// Messages go out under the lock, so that what the two machines say
		// of the session is said in order.
		for _, f := range effects {
			if s, ok := f.(rotation.Send); ok {
				p.send(conn, s.Message)
			}
		}
		p.mu.Unlock()
		for _, f := range effects {
			if e := p.carry(f, conn, fetches); e != nil {
				events = append(events, e)
			}
		}
	}
}

// carry carries out one effect and returns what came of it.
func (p *peer) carry(f rotation.Effect, conn *link.Conn, fetches *fetcher) rotation.Event {
	switch f := f.(type) {
	case rotation.CloseLink:
		if conn != nil {
			_ = conn.Close()
		}
	case rotation.Redial:
		p.redial(f.Wanted)
	case rotation.Fetch:
		fetches.start(f)
	case rotation.Save:
		err := p.rotator.Store.Save(p.key, &f.Journal)
		f.Journal.Wipe()
		p.connMu.Lock()
		p.journalError = text(err)
		p.connMu.Unlock()
		return rotation.Saved{Token: f.Token, Err: err}
	case rotation.SetPSK:
		err := p.rotator.Device.SetPSK(p.key, f.Key)
		f.Key.Wipe()
		p.rotator.poller.PollSoon() // read back
		return rotation.Set{Token: f.Token, Err: err}
	case rotation.Renew:
		err := p.rotator.Device.Renew(p.key)
		p.rotator.poller.PollSoon()
		return rotation.Set{Token: f.Token, Err: err}
	case rotation.Probe:
		if err := p.rotator.Device.Probe(p.key); err != nil {
			p.log.Warn("tunnel cannot be probed", "err", err)
		}
	case rotation.Poll:
		p.rotator.poller.PollSoon()
	case rotation.Wake:
		if fetches != nil {
			p.sched.tick()
		} else {
			p.gen.tick()
		}
	case rotation.Note:
		p.note(f)
	}
	return nil
}

// send queues a message. A connection whose queue is full closes itself.
func (p *peer) send(conn *link.Conn, m wire.Message) {
	if conn == nil {
		return
	}
	b, err := wire.Encode(m)
	if err != nil {
		p.log.Error("message cannot be encoded", "err", err)
		return
	}
	_ = conn.Send(b) // whoever receives from the connection learns why it ended
}

// observed turns an observation into the scheduler's event; false if there is
// nothing to tell.
func (p *peer) observed(o wg.Observation) (rotation.Event, bool) {
	why := text(o.Err)
	if o.Err != nil {
		p.rotator.lost.Store(&why)
	} else {
		p.rotator.lost.Store(nil)
	}
	p.jumped = p.jumped || o.Jumped
	p.connMu.Lock()
	p.deviceError = why
	if o.Jumped {
		p.jumpedAt = time.Now()
	}
	p.connMu.Unlock()
	if o.Err != nil && !errors.Is(o.Err, wg.ErrNoDevice) {
		return nil, false // a dump that failed says nothing of the peer
	}
	jumped := p.jumped
	p.jumped = false
	return rotation.Observed{
		Began: o.Began, Wall: o.Wall.Add(o.Began.Sub(o.Ended)), Present: o.Err == nil && o.Present, PSK: o.Peer.PSK,
		Handshake: o.Peer.Handshake, Rx: o.Peer.Rx, Tx: o.Peer.Tx, Jumped: jumped,
	}, true
}

func text(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

// fetcher asks the KMS, in goroutines that it waits for. The generator has
// only a few requests under way.
type fetcher struct {
	peer *peer
	ctx  context.Context
	wait sync.WaitGroup
}

func (f *fetcher) start(e rotation.Fetch) {
	f.wait.Go(func() {
		p := f.peer
		out := rotation.Fetched{ID: e.ID, KeyID: e.KeyID}
		if e.KeyID == "" {
			out.KeyID, out.Key, out.Err = p.source.Key(f.ctx)
		} else {
			out.Key, out.Err = p.source.KeyByID(f.ctx, e.KeyID)
		}
		if out.Key == nil && out.Err == nil {
			out.Err = kms.ErrNoKeys
		}
		p.connMu.Lock()
		p.kmsError = text(out.Err)
		if out.Err == nil {
			p.kmsLast = time.Now()
		}
		p.connMu.Unlock()
		if out.Err != nil {
			out.Key = new(psk.Key)
		}
		select {
		case p.gen.events <- item{event: out}:
		case <-f.ctx.Done():
			out.Key.Wipe()
		}
	})
}

// dial keeps the link up: at most one attempt every two seconds, for ever.
func (p *peer) dial(ctx context.Context) {
	var serving sync.WaitGroup
	defer serving.Wait()
	for ctx.Err() == nil {
		c, err := p.attempt(ctx)
		if err != nil {
			p.linkFailed(err)
		}
		for c != nil {
			ended := make(chan struct{})
			serving.Go(func() { defer close(ended); p.serve(ctx, c, nil) })
			c = p.replacement(ended)
		}
		select {
		case <-ctx.Done():
		case <-time.After(redialAfter/2 + rand.N(redialAfter/2)): //nolint:gosec // jitter is no secret
		}
	}
}

func (p *peer) attempt(ctx context.Context) (*link.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	return p.rotator.Dial(ctx, p.config.Address, p.rotator.Identity, p.pins)
}

// replacement waits until a connection has ended, nil, or until a second one
// was dialled beside it, to take its place (L5). An attempt that is under way
// when the connection ends is the next one.
func (p *peer) replacement(ended <-chan struct{}) *link.Conn {
	for {
		select {
		case <-ended:
			return nil
		case wish := <-p.beside:
			c, err := p.attempt(wish)
			if err == nil {
				return c // also if the wish has ended since: the server has replaced the other
			}
			if wish.Err() == nil {
				p.log.Debug("second link cannot be made", "err", err)
			}
		}
	}
}

// redial hands a wish for a second connection to the dialler, or takes it back.
func (p *peer) redial(wanted bool) {
	p.giveUp()
	if !wanted {
		return
	}
	select {
	case <-p.beside: // a wish that came when the link ended
	default:
	}
	var wish context.Context
	wish, p.giveUp = context.WithCancel(p.life)
	p.beside <- wish
}

func (p *peer) linkFailed(err error) {
	p.connMu.Lock()
	defer p.connMu.Unlock()
	was := p.linkError
	p.linkError = err.Error()
	p.refused = errors.Is(err, link.ErrRefused) || errors.Is(err, link.ErrUnknownPeer) || errors.Is(err, link.ErrProof)
	if was != p.linkError {
		p.log.Warn("link cannot be made", "err", err)
	}
}

// accepted takes a connection that the peer dialled. It replaces an older one
// with its first message: the client may give it up before (L5).
func (p *peer) accepted(c *link.Conn) {
	if p.role == rotation.Client {
		p.rotator.serving.Go(func() { p.conflict(p.life, c) })
		return
	}
	p.rotator.serving.Go(func() {
		first, err := p.first(c)
		if err != nil {
			_ = c.Close()
			return
		}
		p.serve(p.life, c, first)
	})
}

// first waits for the first frame of a connection that stands beside another.
func (p *peer) first(c *link.Conn) ([]byte, error) {
	if !p.linked() {
		return nil, nil
	}
	stop := context.AfterFunc(p.life, func() { _ = c.Close() })
	defer stop()
	c.SetSilence(dialTimeout)
	defer c.SetSilence(link.DefaultSilence)
	return c.Receive()
}

func (p *peer) linked() bool {
	p.connMu.Lock()
	defer p.connMu.Unlock()
	return p.conn != nil
}

// conflict answers a peer that takes itself for the client as well.
func (p *peer) conflict(ctx context.Context, c *link.Conn) {
	stop := context.AfterFunc(ctx, func() { _ = c.Close() })
	defer stop()
	defer c.Close()
	c.SetSilence(dialTimeout)
	b, err := c.Receive()
	if err != nil {
		return
	}
	m, err := wire.Decode(b)
	init, ok := m.(*wire.Init)
	if err != nil || !ok {
		return
	}
	b, err = wire.Encode(&wire.Ack{
		Attempt: init.Attempt, Boot: p.rotator.boot, Parameters: p.parameters, Differences: rotation.SameRole(rotation.Client),
	})
	if err != nil {
		return
	}
	_ = c.Send(b)
	p.gen.deliver(ctx, rotation.RoleConflict{}, nil)
	_, _ = c.Receive() // until the peer has read it and closes, or the silence limit
}

// ask finds out, while the peer does not connect, whether it takes itself for
// the server as well: then neither end would ever dial. It asks more and more
// rarely, for most often the peer is merely away.
func (p *peer) ask(ctx context.Context) {
	wait := firstAsk
	for {
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait/2 + rand.N(wait/2)): //nolint:gosec // jitter is no secret
		}
		if !p.disconnected() {
			wait = 4 * firstAsk
			continue
		}
		if p.bothServers(ctx) {
			p.gen.deliver(ctx, rotation.RoleConflict{}, nil)
		}
		wait = min(2*wait, rarestAsk)
	}
}

// disconnected reports whether the peer may be asked: there is no link. Inside
// a tunnel also a session must live, and not be due for a handshake, which a
// question would otherwise make: rotation leaves those to the client.
func (p *peer) disconnected() bool {
	p.mu.Lock()
	age := p.scheduler.View().Handshake
	p.mu.Unlock()
	p.connMu.Lock()
	defer p.connMu.Unlock()
	return p.conn == nil && (!p.inside || age >= 0 && age < quietSession)
}

// bothServers asks the peer, by the answer that only a client would want. A
// client closes the connection, a server answers with the same.
func (p *peer) bothServers(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	c, err := p.rotator.Dial(ctx, p.config.Address, p.rotator.Identity, p.pins)
	if err != nil {
		return false // it connects, or somebody looks into its log
	}
	stop := context.AfterFunc(ctx, func() { _ = c.Close() })
	defer stop()
	defer c.Close()
	same := rotation.SameRole(rotation.Server)
	b, err := wire.Encode(&wire.Ack{Boot: p.rotator.boot, Parameters: p.parameters, Differences: same})
	if err != nil || c.Send(b) != nil {
		return false
	}
	if b, err = c.Receive(); err != nil {
		return false
	}
	m, err := wire.Decode(b)
	ack, ok := m.(*wire.Ack)
	return err == nil && ok && slices.Equal(ack.Differences, same)
}

// serve reads from a connection until it ends. Its first frame may have been
// read already.
func (p *peer) serve(ctx context.Context, c *link.Conn, first []byte) {
	if !p.adopt(ctx, c) {
		_ = c.Close()
		return
	}
	err := p.receive(ctx, c, first)
	for _, in := range []*inbox{p.gen, p.sched} {
		in.deliver(ctx, rotation.LinkDown{}, c)
	}
	_ = c.Close()
	p.connMu.Lock()
	if p.conn == c {
		p.conn, p.linkAt, p.linkError = nil, time.Now(), text(err)
		p.log.Warn("link is down", "err", err)
	}
	p.connMu.Unlock()
}

// adopt makes c the peer's connection, and tells both machines before another
// can take its place; false if the peer has ended.
func (p *peer) adopt(ctx context.Context, c *link.Conn) bool {
	p.linkMu.Lock()
	defer p.linkMu.Unlock()
	p.connMu.Lock()
	if ctx.Err() != nil {
		p.connMu.Unlock()
		return false
	}
	old := p.conn
	p.conn, p.linkAt, p.linkError, p.refused = c, time.Now(), "", false
	inside := p.runsInside(c)
	p.connMu.Unlock()
	if old != nil {
		_ = old.Close()
	}
	p.log.Info("link is up", "remote", c.RemoteAddr().String())
	for _, in := range []*inbox{p.gen, p.sched} {
		in.deliver(ctx, rotation.LinkUp{Peer: c.Peer(), Inside: inside}, c)
	}
	return true
}

// runsInside finds out whether a connection runs inside the tunnel, and warns
// where the configuration could then close it for good: the address of a peer
// that dials is known only now. The caller holds connMu.
func (p *peer) runsInside(c *link.Conn) bool {
	remote, err := netip.ParseAddrPort(c.RemoteAddr().String())
	if err != nil {
		return p.inside // no TCP: a test's
	}
	was := p.inside
	inside, problems := p.config.CheckInsideAt(remote.Addr(), p.allowed)
	if p.inside = inside; inside && !was {
		for _, x := range problems {
			p.log.Warn("link runs inside the tunnel", "err", x.Message)
		}
	}
	return inside
}

// receive hands messages to the machines until the connection or ctx ends.
func (p *peer) receive(ctx context.Context, c *link.Conn, b []byte) error {
	for ctx.Err() == nil {
		if b == nil {
			var err error
			if b, err = c.Receive(); err != nil {
				return err
			}
		}
		m, err := wire.Decode(b)
		b = nil
		if v, ok := errors.AsType[*wire.VersionError](err); ok {
			p.gen.deliver(ctx, rotation.OtherVersion{Version: v.Got}, c)
			continue
		}
		if err != nil {
			return err
		}
		e := rotation.Received{Message: m}
		switch m.(type) {
		case *wire.Commit, *wire.Committed, *wire.Refused, *wire.Bye:
			p.sched.deliver(ctx, e, c)
		case *wire.Report:
			p.gen.deliver(ctx, e, c)
			p.sched.deliver(ctx, e, c)
		default:
			p.gen.deliver(ctx, e, c)
		}
	}
	return ctx.Err()
}

// messages are what the log says of each kind of note; a note's own text is the
// detail.
var messages = map[rotation.NoteKind]string{
	rotation.NoteBootstrapped: "bootstrapped with the peer",
	rotation.NoteRefused:      "the ends are configured differently",
	rotation.NoteEstablished:  "key established",
	rotation.NoteAbandoned:    "key could not be established",
	rotation.NoteReduced:      "key source left out",
	rotation.NoteInstalled:    "key installed",
	rotation.NoteConfirmed:    "key confirmed",
	rotation.NoteDropped:      "key dropped",
	rotation.NoteRepairing:    "repairing",
	rotation.NoteHunting:      "hunting for the key of the other end",
	rotation.NoteHuntEnded:    "hunt ended",
	rotation.NoteForeign:      "pre-shared key changed by another program",
	rotation.NoteMissing:      "peer is missing in WireGuard",
	rotation.NotePresent:      "peer is back in WireGuard",
	rotation.NoteAging:        "key will be stale",
	rotation.NoteStale:        "key is stale",
	rotation.NoteBlocked:      "tunnel blocked",
	rotation.NoteFailed:       "journal or WireGuard failed",
	rotation.NoteSilent:       "peer's rotator is silent",
	rotation.NoteGoodbye:      "peer's rotator says goodbye",
	rotation.NoteRenewed:      "peer made anew in WireGuard",
}

// levels are those of the notes that are not for information.
var levels = map[rotation.NoteKind]slog.Level{
	rotation.NoteEstablished: slog.LevelDebug,
	rotation.NoteDropped:     slog.LevelDebug,
	rotation.NoteAbandoned:   slog.LevelWarn,
	rotation.NoteReduced:     slog.LevelWarn,
	rotation.NoteRepairing:   slog.LevelWarn,
	rotation.NoteHunting:     slog.LevelWarn,
	rotation.NoteForeign:     slog.LevelWarn,
	rotation.NoteFailed:      slog.LevelWarn,
	rotation.NoteSilent:      slog.LevelWarn,
	rotation.NoteRenewed:     slog.LevelWarn,
	rotation.NoteRefused:     slog.LevelError,
	rotation.NoteMissing:     slog.LevelError,
	rotation.NoteAging:       slog.LevelWarn,
	rotation.NoteStale:       slog.LevelError,
	rotation.NoteBlocked:     slog.LevelError,
}

// note logs what a machine says.
func (p *peer) note(n rotation.Note) {
	if n.Kind == rotation.NoteForeign {
		p.connMu.Lock()
		p.foreignAt = time.Now()
		p.connMu.Unlock()
	}
	if w := p.rotator.Watch; w != nil {
		w(p.config.Name, n)
	}
	args := []any{"phase", n.Kind.String()}
	if n.Kind == rotation.NoteAbandoned || n.Kind == rotation.NoteFailed {
		repeated, again := p.again(n)
		if again {
			return
		}
		if repeated > 0 {
			args = append(args, "repeated", repeated)
		}
	}
	if n.Key.Serial != 0 {
		args = append(args, "serial", n.Key.Serial)
	}
	if !n.Key.Fingerprint.IsZero() {
		args = append(args, "key", n.Key.Fingerprint.String())
	}
	if n.Text != "" {
		args = append(args, "detail", n.Text)
	}
	p.log.Log(context.Background(), levels[n.Kind], messages[n.Kind], args...)
}

// again says whether a failure is the one that was logged a moment ago, and if
// not, how often that one came back meanwhile: a KMS that is down for a night
// must not fill the log.
func (p *peer) again(n rotation.Note) (repeated int, again bool) {
	p.connMu.Lock()
	defer p.connMu.Unlock()
	if l := &p.lastFailure; l.text == n.Text && time.Since(l.at) < repeatAfter {
		l.repeated++
		return 0, true
	}
	repeated = p.lastFailure.repeated
	p.lastFailure = failure{text: n.Text, at: time.Now()}
	return repeated, false
}

// failure is one that was logged.
type failure struct {
	text     string
	at       time.Time
	repeated int
}
