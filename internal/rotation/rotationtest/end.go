package rotationtest

import (
	"time"

	"keyturn/internal/kem"
	"keyturn/internal/psk"
	"keyturn/internal/rotation"
	"keyturn/internal/wire"
)

// End is one host: its WireGuard device, its journal, and its rotator while
// that runs.
type End struct {
	world *World
	index int
	up    bool
	life  int // of the process: answers to an earlier one are lost

	asleep  bool          // the machine is suspended
	sleptAt time.Time     // since when
	slept   time.Duration // for how long in all: Go's monotonic clock stood still, WireGuard's went on
	stash   []func()      // what the process finds when the machine wakes up

	config    rotation.Config
	tunnel    *rotation.Tunnel
	gen       *rotation.KeyGenerator
	sched     *rotation.KeyRotationScheduler
	genTimer  time.Time
	schdTimer time.Time
	polls     int
	parted    time.Duration // of wall and monotonic clock, at the last poll
	busy      busy
	second    *attempt // for a second connection, under way

	journal  *rotation.Journal // on "disk"
	recorded *rotation.Entry   // the PSK found at the first start, in the state directory
	seq      uint64            // of the last report or committed
	behind   uint64            // by how much it is less than the rotator's, after Live
	original *psk.Key          // what the host's own configuration sets after a reboot
	device   device

	// Faults.
	CrashAfter   int           // effects until a crash; zero: none
	JournalBad   bool          // saving fails
	JournalDoubt bool          // saving is reported to fail, but does not
	DeviceBad    bool          // setting fails
	DeviceDoubt  bool          // setting is reported to fail, but does not
	Blind        bool          // dumps fail
	Gone         bool          // WireGuard does not know the peer
	WallOffset   time.Duration // of the wall clock

	// For the invariants.
	known     map[psk.Fingerprint]bool // may be set without verification: found, random
	verified  map[psk.Fingerprint]bool
	erased    map[psk.Fingerprint]bool
	random    map[psk.Fingerprint]bool // set under block, and verified by nobody
	inJournal map[psk.Fingerprint]bool
	last      uint64 // highest serial installed by a window or idle commit
	Lost      int    // times the journal went since a key was confirmed
	fresh     []time.Time
	Notes     map[rotation.NoteKind]int
}

// Start starts the rotator.
func (e *End) Start() {
	w := e.world
	if e.up {
		return
	}
	e.up = true
	e.life++
	e.second = nil
	e.Notes = map[rotation.NoteKind]int{}
	e.seq, e.behind = 0, 0
	role := rotation.Client
	if e.index == Server {
		role = rotation.Server
	}
	e.config = rotation.Config{
		Role: role, Parameters: parameters(&w.Options, e.index), KEMs: []kem.Scheme{Sham},
		Heartbeat: e.heartbeat(), MaxKeyAge: w.MaxKeyAge, Fallback: w.Fallback,
		BlockStale: w.BlockStale, BlockStart: w.BlockStart, Inside: w.Inside, Recovery: w.Persistent && !w.Fallback, Random: w.random,
	}
	e.config.Identity = identity(e.index)
	_, _ = w.random.Read(e.config.Boot[:])
	if w.Config != nil {
		w.Config(e.index, &e.config)
	}
	e.tunnel = rotation.NewTunnel(e.config)
	var j rotation.Journal
	if e.journal != nil {
		j.High = e.journal.High
		j.Entries = clone(e.journal.Entries)
	}
	if e.recorded != nil && (len(j.Entries) == 0 || j.Entries[0].Serial != 0) {
		j.Entries = append(clone([]rotation.Entry{*e.recorded}), j.Entries...)
	}
	e.tunnel.Restore(j, e.now(), e.wall())
	e.gen = rotation.NewKeyGenerator(e.tunnel)
	e.sched = rotation.NewKeyRotationScheduler(e.tunnel)
	w.trace("%s: starts", names[e.index])
	e.observed(e.now(), e.wall(), e.device)
	if e.last = e.View().Installed.Serial; w.BlockStart {
		e.last = 0
	}
	life := e.life
	var again func()
	again = func() {
		if e.life == life && e.up {
			if !e.asleep {
				e.poll()
			}
			w.after(e.interval(), again)
		}
	}
	w.after(time.Duration(w.rng.IntN(int(e.interval()/time.Millisecond)))*time.Millisecond, again)
}

func clone(entries []rotation.Entry) []rotation.Entry {
	out := append([]rotation.Entry(nil), entries...)
	for i := range out {
		out[i].Key = out[i].Key.Clone()
	}
	return out
}

// Crash ends the rotator's process as kill -9 does.
func (e *End) Crash() {
	if !e.up {
		return
	}
	e.halt()
	e.world.trace("%s: crashes", names[e.index])
	e.world.Link.drop(e.world)
}

// halt ends the process, and whatever it would have found waking up.
func (e *End) halt() {
	e.wake()
	e.up = false
	e.life++
	e.CrashAfter = 0
	e.stash = nil
}

// Reboot restarts the host: WireGuard comes up with its original PSK, and the
// run directory is empty.
func (e *End) Reboot() {
	e.Crash()
	e.boot()
}

// PowerCut is a reboot of which nobody tells the peer.
func (e *End) PowerCut() {
	if e.up {
		e.halt()
		e.world.Link.up[e.index] = false
	}
	e.boot()
}

func (e *End) boot() {
	e.world.trace("%s: reboots", names[e.index])
	e.reset()
	if !e.world.Persistent {
		e.journal = nil
		e.loses()
		e.inJournal = nil
		e.erased = map[psk.Fingerprint]bool{}
		e.last = 0
	}
}

// Forget loses the journal of a rotator that does not run, while WireGuard goes
// on, as "keyturn rm" does.
func (e *End) Forget() {
	e.Crash()
	e.world.trace("%s: forgets its journal", names[e.index])
	e.journal = nil
	e.loses()
	e.inJournal = nil
	e.erased = map[psk.Fingerprint]bool{}
	e.last = 0
	e.known[e.device.psk.Fingerprint()] = true
}

// loses says that what the ends had in common is gone with a journal.
func (e *End) loses() {
	e.Lost++
	e.world.common, e.world.since = psk.Fingerprint{}, map[wire.Named]int{}
}

// Snapshot takes one of the host's disk and its PSK. It returns what takes the
// host back to it, and starts the rotator on it.
func (e *End) Snapshot() (restore func()) {
	w := e.world
	var journal *rotation.Journal
	if e.journal != nil {
		journal = &rotation.Journal{High: e.journal.High, Entries: clone(e.journal.Entries)}
	}
	k := e.device.psk.Clone()
	return func() {
		w.trace("%s: goes back to a snapshot", names[e.index])
		if e.up {
			e.halt()
			w.Link.up[e.index] = false
		}
		e.reset()
		e.device.psk = k
		e.journal = journal
		e.inJournal = nil
		if journal != nil {
			e.inJournal = map[psk.Fingerprint]bool{}
			for _, x := range journal.Entries {
				e.inJournal[x.Key.Fingerprint()] = true
			}
		}
		if p := k.Fingerprint(); !e.inJournal[p] {
			e.known[p] = true
		}
		e.erased = map[psk.Fingerprint]bool{}
		e.loses()
		e.last = 0
		e.Start()
	}
}

// Live takes a snapshot of the machine as it runs. It returns what puts it back to
// that: WireGuard has the session of then, which the other end may have given up,
// and what the rotator says has the numbers of then. The rotator's own state cannot
// be put back here, nor the PSK, which has to go with it.
func (e *End) Live() (restore func()) {
	w := e.world
	then, taken, seq := e.device, w.Now, e.seq
	return func() {
		w.trace("%s: goes back to a snapshot of it running", names[e.index])
		d := &e.device
		then.psk, then.life, then.attempts = d.psk, d.life+1, d.attempts
		then.trying, then.pending, then.unheard = 0, 0, time.Time{}
		if s := then.session; s != nil && s != d.session {
			then.session = &session{initiator: s.initiator, birth: s.birth.Add(w.Now.Sub(taken))}
			then.session.known[e.index] = true
			if d.session != nil {
				d.session.known[e.index] = false
			}
		}
		*d = then
		e.behind += e.seq - seq
		e.seq = seq
		w.Stale()
	}
}

// behindhand is a message with the number that it has after Live's restore.
func (e *End) behindhand(m wire.Message) wire.Message {
	switch m := m.(type) {
	case *wire.Report:
		c := *m
		c.Seq -= e.behind
		e.seq = c.Seq
		return &c
	case *wire.Committed:
		c := *m
		c.Seq -= e.behind
		e.seq = c.Seq
		return &c
	}
	return m
}

// Sleep suspends the machine until wake: its monotonic clock stands still, and
// what WireGuard or the network bring is lost or waits.
func (e *End) Sleep() {
	if e.up && !e.asleep {
		e.world.trace("%s: falls asleep", names[e.index])
		e.asleep, e.sleptAt = true, e.world.Now
	}
}

func (e *End) wake() {
	if !e.asleep {
		return
	}
	e.asleep = false
	e.slept += e.world.Now.Sub(e.sleptAt)
	e.world.trace("%s: wakes up", names[e.index])
	for _, f := range e.stash {
		e.world.after(0, f)
	}
	e.stash = nil
}

// Foreign puts another PSK into WireGuard.
func (e *End) Foreign() {
	k, _ := psk.Random(e.world.random)
	e.world.trace("%s: wg set", names[e.index])
	if p := e.device.psk.Fingerprint(); e.known[p] {
		e.loses() // before the first rotation the operator may do so: there is no key to return to
		e.known[k.Fingerprint()] = true
	}
	e.device.psk = k
}

// Rotate is the operator's command.
func (e *End) Rotate() {
	if e.up {
		e.scheduler(rotation.Rotate{})
	}
}

// View returns the scheduler's state.
func (e *End) View() rotation.View { return e.sched.View() }

// Health returns the generator's state.
func (e *End) Health() rotation.Health { return e.gen.Health() }

func (e *End) wall() time.Time { return e.world.Now.Add(e.WallOffset) }

// now is the monotonic clock of the machine.
func (e *End) now() time.Time { return e.world.Now.Add(-e.slept) }

// A hub polls seldom, for a dump takes long, and beats as seldom.
const (
	hubPoll      = 10 * time.Second
	hubDump      = 500 * time.Millisecond
	hubHeartbeat = 15 * time.Second
)

func (e *End) interval() time.Duration {
	if e.world.Hub[e.index] {
		return hubPoll
	}
	return time.Second
}

func (e *End) heartbeat() time.Duration {
	if e.world.Hub[e.index] {
		return hubHeartbeat
	}
	return 2 * time.Second
}

// poll makes a dump. That of a hub takes its time, and shows the peer as it was
// at some moment of it.
func (e *End) poll() {
	w := e.world
	began, wall := e.now(), e.wall()
	if !w.Hub[e.index] {
		e.observed(began, wall, e.device)
		return
	}
	life := e.life
	w.after(time.Duration(w.rng.Int64N(int64(hubDump))), func() {
		d := e.device
		d.psk = d.psk.Clone()
		w.after(began.Add(hubDump).Sub(e.now()), func() {
			if e.life == life {
				e.observed(began, wall, d)
			}
		})
	})
}

// jump is from where on a difference between the clocks is noticed.
const jump = 5 * time.Second

func (e *End) observed(began, wall time.Time, d device) {
	if e.Blind {
		return
	}
	parted := e.WallOffset + e.slept
	e.scheduler(rotation.Observed{
		Began: began, Wall: wall, Present: !e.Gone, PSK: d.psk.Clone(),
		Handshake: d.stamp, Rx: d.rx, Tx: d.tx, Jumped: (parted - e.parted).Abs() > jump,
	})
	e.parted = parted
}

func (e *End) generator(ev rotation.Event) {
	if e.steps(func() { e.generator(ev) }) {
		e.carry(e.gen.Step(e.now(), ev), true)
	}
}

func (e *End) scheduler(ev rotation.Event) {
	if e.steps(func() { e.scheduler(ev) }) {
		e.carry(e.sched.Step(e.now(), ev), false)
	}
}

// steps says whether a machine may step now; if not, perhaps later.
func (e *End) steps(later func()) bool {
	if !e.up {
		return false
	}
	if e.asleep {
		life := e.life
		e.stash = append(e.stash, func() {
			if e.life == life {
				later()
			}
		})
		return false
	}
	e.stepped()
	return true
}

// busy counts the steps of an end within one second of virtual time.
type busy struct {
	since time.Time
	steps int
}

// maxSteps is how many steps an end may take in a second: some are ordinary
// after a restart, and a loop takes ever more.
const maxSteps = 1000

// stepped is the invariant that no machine loops.
func (e *End) stepped() {
	w := e.world
	w.Steps++
	if w.Now.Sub(e.busy.since) >= time.Second {
		e.busy = busy{since: w.Now}
	}
	if e.busy.steps++; e.busy.steps > maxSteps {
		w.fail("%s: more than %d steps in a second", names[e.index], maxSteps)
	}
}

// carry carries effects out and keeps the timers.
func (e *End) carry(effects []rotation.Effect, generator bool) {
	w := e.world
	life := e.life
	for _, f := range effects {
		if e.life != life {
			return
		}
		e.effect(f, generator)
		if e.CrashAfter > 0 {
			if e.CrashAfter--; e.CrashAfter == 0 {
				e.Crash()
				return
			}
		}
	}
	if generator {
		if t, ok := e.gen.Deadline(); ok && !t.Equal(e.genTimer) {
			e.genTimer = t
			w.after(t.Sub(e.now()), func() {
				if e.life == life && e.genTimer.Equal(t) {
					e.genTimer = time.Time{}
					e.generator(rotation.Tick{})
				}
			})
		}
		return
	}
	if t, ok := e.sched.Deadline(); ok && !t.Equal(e.schdTimer) {
		if !t.After(e.now()) {
			w.fail("%s: deadline %v is not in the future", names[e.index], t)
			return
		}
		e.schdTimer = t
		w.after(t.Sub(e.now()), func() {
			if e.life == life && e.schdTimer.Equal(t) {
				e.schdTimer = time.Time{}
				e.scheduler(rotation.Tick{})
			}
		})
	}
}

func (e *End) effect(f rotation.Effect, generator bool) {
	w := e.world
	life := e.life
	later := func(ev rotation.Event) {
		w.after(time.Millisecond, func() {
			if e.life == life {
				e.scheduler(ev)
			}
		})
	}
	switch f := f.(type) {
	case rotation.Send:
		w.Link.send(w, e.index, f.Message)
	case rotation.CloseLink:
		w.trace("%s: closes the link", names[e.index])
		w.Link.close(w, e.index)
	case rotation.Redial:
		if e.second != nil {
			w.trace("%s: gives the second connection up", names[e.index])
			e.second = nil
		}
		if f.Wanted {
			w.trace("%s: dials a second connection", names[e.index])
			w.beside(e)
		}
	case rotation.Fetch:
		if f.KeyID == "" {
			w.trace("%s -> kms: a key", names[e.index])
		} else {
			w.trace("%s -> kms: fetch %q", names[e.index], f.KeyID)
		}
		w.fetch(e, f)
	case rotation.Save:
		var err error
		if e.JournalBad || e.JournalDoubt {
			err = errFault
		}
		if !e.JournalBad {
			e.store(f.Journal)
		}
		later(rotation.Saved{Token: f.Token, Err: err})
	case rotation.SetPSK:
		var err error
		if e.DeviceBad || e.DeviceDoubt {
			err = errFault
		}
		if !e.DeviceBad && !e.Gone {
			e.setPSK(f.Key)
		}
		later(rotation.Set{Token: f.Token, Err: err})
		known := time.Millisecond
		if e.DeviceDoubt {
			known += e.interval() + time.Second // by a dump
		}
		w.after(known, func() { e.blocked(f.Key) })
	case rotation.Renew:
		var err error
		if e.DeviceBad || e.DeviceDoubt {
			err = errFault
		}
		if !e.DeviceBad && !e.Gone {
			w.trace("%s: removes the peer and adds it again", names[e.index])
			if w.tunnelWorks() {
				w.Ended++
				w.trace("%s: ends a session that both have", names[e.index])
			}
			e.forgetPeer(e.device.psk)
		}
		later(rotation.Set{Token: f.Token, Err: err})
	case rotation.Probe:
		w.trace("%s: probes the tunnel", names[e.index])
		w.data(e, false)
	case rotation.Poll:
		if e.polls++; e.polls > 1 {
			return
		}
		w.after(max(200*time.Millisecond, e.interval()-time.Second), func() {
			e.polls = 0
			if e.life == life && !e.asleep {
				e.poll()
			}
		})
	case rotation.Wake:
		w.after(0, func() {
			if e.life != life {
				return
			}
			if generator {
				e.scheduler(rotation.Tick{})
			} else {
				e.generator(rotation.Tick{})
			}
		})
	case rotation.Note:
		e.noted(f)
	}
}

func (e *End) noted(n rotation.Note) {
	w := e.world
	e.Notes[n.Kind]++
	switch n.Kind {
	case rotation.NoteEstablished:
		e.verified[n.Key.Fingerprint] = true
		e.spent()
	case rotation.NoteInstalled:
		// Committed serials rise strictly, repair and hunt aside.
		if n.Text != wire.ModeRepair.String() && n.Text != rotation.NotRefused && n.Key.Serial <= e.last {
			w.fail("%s: committed %v after %d", names[e.index], n.Key, e.last)
		}
		e.last = n.Key.Serial
	case rotation.NoteHunting:
		e.last = n.Key.Serial
	case rotation.NoteBlocked:
		e.last = max(e.last, 1) - 1 // the same key may open the tunnel again
	}
	switch {
	case !n.Key.Fingerprint.IsZero():
		w.trace("%s: %v %v: %s", names[e.index], n.Kind, n.Key, n.Text)
	case n.Key.Serial != 0:
		w.trace("%s: %v %d: %s", names[e.index], n.Kind, n.Key.Serial, n.Text)
	default:
		w.trace("%s: %v: %s", names[e.index], n.Kind, n.Text)
	}
	if n.Kind == rotation.NoteConfirmed {
		w.confirm[n.Key] |= 1 << e.index
		w.since[n.Key] |= 1 << e.index
		if w.since[n.Key] == 3 {
			w.common = n.Key.Fingerprint
		}
	}
}

// maxFresh is how many keys an end may establish in a minute: a full buffer
// after each of several restarts. QKD keys are scarce.
const maxFresh = 40

func (e *End) spent() {
	now := e.world.Now
	for len(e.fresh) > 0 && now.Sub(e.fresh[0]) > time.Minute {
		e.fresh = e.fresh[1:]
	}
	if e.fresh = append(e.fresh, now); len(e.fresh) > maxFresh {
		e.world.fail("%s: more than %d fresh keys in a minute", names[e.index], maxFresh)
	}
}

// store is the journal on disk, and the place where erasures are seen.
func (e *End) store(j rotation.Journal) {
	w := e.world
	now := map[psk.Fingerprint]bool{}
	for _, x := range j.Entries {
		now[x.Key.Fingerprint()] = true
		if x.Serial == 0 && e.recorded == nil && w.Fallback {
			r := x
			r.Key = x.Key.Clone()
			e.recorded = &r
		}
	}
	for _, x := range j.Entries {
		if x.Recovery {
			e.recovers(&x, j.Entries)
		}
	}
	for p := range e.inJournal {
		if !now[p] {
			e.erased[p] = true
		}
	}
	for p := range now {
		if e.known[p] {
			delete(e.erased, p) // found again
		}
		if e.erased[p] {
			w.fail("%s: the erased key %v is back in the journal", names[e.index], p)
		}
	}
	e.inJournal = now
	e.journal = &j
	if n := e.above(); n > maxCandidates {
		w.fail("%s: %d keys may be installed at the other end, and a hunt walks through %d", names[e.index], n, maxCandidates)
	}
	w.checkCommon()
}

// recovers is the invariant of a recovery key: it comes of a key that both ends
// verified.
func (e *End) recovers(x *rotation.Entry, entries []rotation.Entry) {
	w := e.world
	p := x.Key.Fingerprint()
	for _, from := range entries {
		f := from.Key.Fingerprint()
		if from.Confirmed && w.Ends[0].verified[f] && w.Ends[1].verified[f] && from.Key.Recovery().Fingerprint() == p {
			w.recovery[p] = true
		}
	}
	if !w.recovery[p] {
		w.fail("%s: the recovery key %v comes of no key that both ends verified", names[e.index], p)
	}
	e.known[p] = true
}

// setPSK is WireGuard taking a PSK, and the place where keys are checked.
func (e *End) setPSK(k *psk.Key) {
	w := e.world
	if k == nil {
		k = new(psk.Key)
	}
	p := k.Fingerprint()
	w.trace("%s: sets %v", names[e.index], p)
	e.device.psk = k
	both := w.Ends[0].verified[p] && w.Ends[1].verified[p]
	if !both && !e.known[p] {
		if !e.config.BlockStale && !e.config.BlockStart {
			w.fail("%s: installed %v, which was not verified by both ends", names[e.index], p)
		}
		e.random[p] = true // it must be the key of a blocked tunnel: see blocked
	}
	if both && !e.known[p] && !e.inJournal[p] {
		w.fail("%s: installed %v, which its journal does not hold", names[e.index], p)
	}
	if e.erased[p] {
		w.fail("%s: installed the erased key %v", names[e.index], p)
	}
}

// blocked is the invariant that a key which nobody verified goes in only to
// close the tunnel. It holds once the machine knows that the key is set.
func (e *End) blocked(k *psk.Key) {
	if p := e.device.psk.Fingerprint(); k == e.device.psk && e.random[p] && e.up && !e.asleep && e.View().State != rotation.StateBlocked {
		e.world.fail("%s: %v is installed, which nobody verified", names[e.index], p)
	}
}

// checkCommon is the promise that no tunnel is lost: while no journal was
// lost, the keys that the two ends would hunt through have one in common.
func (w *World) checkCommon() {
	if w.Ends[0].Lost+w.Ends[1].Lost > 0 {
		if !w.Ends[0].inJournal[w.common] || !w.Ends[1].inJournal[w.common] {
			return
		}
		w.Ends[0].Lost, w.Ends[1].Lost = 0, 0 // a key was confirmed since
	}
	a, b := w.Ends[0].possible(), w.Ends[1].possible()
	if a == nil || b == nil {
		return
	}
	for p := range a {
		if b[p] {
			return
		}
	}
	w.fail("the ends have no key in common: %v and %v", keys(a), keys(b))
}

func keys(m map[psk.Fingerprint]bool) (out []string) {
	for p := range m {
		out = append(out, p.String())
	}
	return out
}

// possible names the keys that an end would hunt through if it restarted from
// its journal now.
func (e *End) possible() map[psk.Fingerprint]bool {
	if e.journal == nil {
		return nil
	}
	t := rotation.NewTunnel(e.config)
	t.Restore(rotation.Journal{High: e.journal.High, Entries: clone(e.journal.Entries)}, e.now(), e.wall())
	m := map[psk.Fingerprint]bool{}
	for _, n := range t.Candidates() {
		m[n.Fingerprint] = true
	}
	return m
}

// maxCandidates is rotation.MaxCandidates, in figures: it is a rule under test.
const maxCandidates = 3

// above counts the keys of the journal that the other end may have installed:
// the newest that both are known to have had, and those after it.
func (e *End) above() (n int) {
	for i := len(e.journal.Entries) - 1; i >= 0; i-- {
		x := &e.journal.Entries[i]
		n++
		if x.Agreed || x.Confirmed || x.Serial == 0 {
			break
		}
	}
	return n
}

func (e *End) receive(m wire.Message) {
	switch m.(type) {
	case *wire.Commit, *wire.Committed, *wire.Refused, *wire.Bye:
		e.scheduler(rotation.Received{Message: m})
	case *wire.Report:
		e.generator(rotation.Received{Message: m})
		e.scheduler(rotation.Received{Message: m})
	default:
		e.generator(rotation.Received{Message: m})
	}
}
