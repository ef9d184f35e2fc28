package daemon_test

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"maps"
	"math"
	mathrand "math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"keyturn/internal/config"
	"keyturn/internal/control"
	"keyturn/internal/daemon"
	"keyturn/internal/kmesim"
	"keyturn/internal/link"
	"keyturn/internal/psk"
	"keyturn/internal/rotation"
	"keyturn/internal/wg"
)

// variant is where the link runs, and what recovery can rely on.
type variant struct {
	name       string
	inside     bool
	fallback   bool
	persistent bool
	bound      time.Duration // of recovery, from the end of the last fault
	stream     uint64        // of the seed: each has faults of its own
}

// TestWeekOfFaults lets faults drawn from a seed strike two rotators, their
// hosts, their KMEs and their networks, one, two or three at a time. After each
// the tunnel must work and the ends hold the same PSK within the bound, and
// where only the link, a KMS, a disk or a rotator failed no packet may be lost.
//
// It is some hours from one seed, or, with KEYTURN_SOAK, a week from a new one;
// KEYTURN_SEED and KEYTURN_SPAN give others. The seed decides what strikes when. It does not decide
// what the rotators draw at random, nor which goroutine runs first.
//
// What a bubble cannot show: a wall clock that is moved (here the stamps of
// handshakes move, into the past), a machine that sleeps, and a process that
// wakes up in a snapshot (here it is started anew on the snapshot's disk and PSK).
func TestWeekOfFaults(t *testing.T) {
	span, seed := 4*time.Hour, uint64(1)
	switch {
	case os.Getenv("KEYTURN_SOAK") != "":
		span, seed = 7*24*time.Hour, mathrand.Uint64()
	case testing.Short():
		span = 30 * time.Minute
	}
	if text := os.Getenv("KEYTURN_SEED"); text != "" {
		n, err := strconv.ParseUint(text, 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		seed = n
	}
	if text := os.Getenv("KEYTURN_SPAN"); text != "" {
		d, err := time.ParseDuration(text)
		if err != nil {
			t.Fatal(err)
		}
		span = d
	}
	for _, v := range []variant{
		{name: "beside", bound: 10 * time.Second, stream: 0},
		{name: "inside with fallback", inside: true, fallback: true, bound: 180 * time.Second, stream: 8},
		{name: "inside with journal", inside: true, persistent: true, bound: 180 * time.Second, stream: 16},
	} {
		t.Run(v.name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			synctest.Test(t, func(t *testing.T) {
				w := newWeek(t, v, seed, dir)
				why := w.run(span)
				w.stop()
				w.summary()
				if why != "" {
					t.Errorf("seed %d: %s\n%s", seed, why, w.log.text())
				}
			})
		})
	}
}

// week is the system under faults.
type week struct {
	*system
	variant
	hosts *hosts
	rng   *mathrand.Rand
	seed  uint64
	dir   string
	log   *tail
	stop  func()
	began time.Time

	processes [2]*process
	down      [2]int // reasons for which a rotator does not run
	full      [2]atomic.Int32
	snapshots [2]*snapshot

	took    map[string][]time.Duration // recovery, by fault
	dropped map[string]int             // pings lost, by fault
	strikes int
	worst   time.Duration
	worstOf string
}

func newWeek(t *testing.T, v variant, seed uint64, dir string) *week {
	t.Helper()
	time.Sleep(time.Nanosecond) // see start
	w := &week{
		variant: v, rng: mathrand.New(mathrand.NewPCG(seed, v.stream)), seed: seed, dir: dir, log: &tail{}, began: time.Now(),
		took: map[string][]time.Duration{}, dropped: map[string]int{},
	}
	w.hosts = newHosts(t, [2]uint64{seed, v.stream}, v.inside)
	for end := range w.hosts.ends {
		for _, d := range []string{w.runDir(end), w.stateDir(end)} {
			if err := os.MkdirAll(d, 0o700); err != nil {
				t.Fatal(err)
			}
		}
		key := make([]byte, 32)
		_, _ = rand.Read(key)
		if err := os.WriteFile(w.keyFile(end), []byte(base64.StdEncoding.EncodeToString(key)), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	ctx, end := context.WithCancel(t.Context())
	var carrying sync.WaitGroup
	for _, m := range []*medium{w.hosts.tunnel, w.hosts.link} {
		for to := range 2 {
			carrying.Go(func() { _ = m.run(ctx, to) })
		}
	}
	var stop func()
	// start sets system before the first rotator runs: parts is called by it.
	w.system, stop = start(t, options{hosts: w.hosts, parts: w.parts, log: w.log, peer: w.peer})
	w.stop = func() {
		stop()
		end()
		carrying.Wait()
		w.hosts.close()
	}
	return w
}

func (w *week) runDir(end int) string   { return filepath.Join(w.dir, strconv.Itoa(end), "run") }
func (w *week) stateDir(end int) string { return filepath.Join(w.dir, strconv.Itoa(end), "state") }
func (w *week) keyFile(end int) string  { return filepath.Join(w.dir, strconv.Itoa(end), "key") }

func (w *week) peer(end int, p *config.Peer) {
	if w.fallback {
		p.Fallback = config.FallbackInitial
	}
	if w.inside {
		p.Address = w.hosts.ends[1-end].address().String() + ":51822"
		p.Recovery = config.RecoveryManual // a file would say it by its journal; the rotator does not ask
	}
}

// parts makes the process of a rotator that is about to start.
func (w *week) parts(end int, p *daemon.Parts) {
	h := w.hosts.ends[end]
	if w.persistent {
		p.Config.Journal = &config.Journal{Path: filepath.Join(w.stateDir(end), "journal"), KeyFile: w.keyFile(end)}
	}
	store, err := daemon.OpenStore(p.Config, w.runDir(end), w.stateDir(end))
	if err != nil {
		w.t.Fatal(err)
	}
	process := &process{host: h, Device: h, Store: store, full: &w.full[end], stop: func() { w.end[end]() }}
	process.left.Store(math.MaxInt64)
	w.processes[end] = process
	h.stack.begin(process.step)
	p.Device, p.Store, p.Listener = process, process, h.stack.listen()
	p.Dial = func(ctx context.Context, _ string, self *link.Identity, pins link.Pins) (*link.Conn, error) {
		if process.dead.Load() {
			return nil, errDead
		}
		raw, err := h.stack.dial(ctx)
		if err != nil {
			return nil, err
		}
		return link.Client(ctx, raw, self, pins)
	}
}

// process is what a rotator that runs does to the outside. Each of its doings
// may be its last.
type process struct {
	wg.Device
	daemon.Store
	host *host
	stop func()        // the rotator's goroutines, of which nobody hears any more
	full *atomic.Int32 // the disk
	left atomic.Int64  // doings
	dead atomic.Bool
}

var errDead = errors.New("the process is dead")

// step says whether the process may do one more thing.
func (p *process) step() bool {
	if p.left.Add(-1) == 0 {
		p.die(false)
	}
	return !p.dead.Load()
}

// die is kill -9; silently where the whole host goes.
func (p *process) die(silently bool) {
	if !p.dead.Swap(true) {
		p.stop()
		p.host.stack.end(silently)
	}
}

func (p *process) Dump() (*wg.Dump, error) {
	if p.dead.Load() {
		return nil, errDead
	}
	return p.Device.Dump()
}

func (p *process) SetPSK(k wg.PublicKey, key *psk.Key) error {
	if !p.step() {
		return errDead
	}
	return p.Device.SetPSK(k, key)
}

func (p *process) Renew(k wg.PublicKey) error {
	if !p.step() {
		return errDead
	}
	return p.Device.Renew(k)
}

func (p *process) Probe(k wg.PublicKey) error {
	if !p.step() {
		return errDead
	}
	return p.Device.Probe(k)
}

func (p *process) Save(k wg.PublicKey, j *rotation.Journal) error {
	switch {
	case !p.step():
		return errDead
	case p.full.Load() > 0:
		return syscall.ENOSPC
	}
	return p.Store.Save(k, j)
}

// fault is one that can strike.
type fault struct {
	name     string
	lossless bool // not one packet may be lost
	ends     bool // it strikes the client, the server or both
	lasts    func(*mathrand.Rand) time.Duration
	begin    func(w *week, end int) (undo func())
}

func partition(rng *mathrand.Rand) time.Duration {
	return []time.Duration{30 * time.Second, 3 * time.Minute, 10 * time.Minute}[rng.IntN(3)]
}

func between(least, most time.Duration) func(*mathrand.Rand) time.Duration {
	return func(rng *mathrand.Rand) time.Duration { return least + time.Duration(rng.Int64N(int64(most-least))) }
}

var (
	moment   = between(0, 1)
	tenMins  = between(10*time.Minute, 10*time.Minute+1)
	downtime = between(100*time.Millisecond, 100*time.Second)
)

// cut partitions networks.
func cut(which func(*hosts) []*medium) func(*week, int) func() {
	return func(w *week, _ int) func() {
		media := which(w.hosts)
		add := func(n int) {
			for _, m := range media {
				m.mu.Lock()
				m.cut += n
				m.mu.Unlock()
			}
		}
		add(1)
		return func() { add(-1) }
	}
}

// spoil makes networks lose up to half of what they carry, or bring it twice
// and out of order.
func spoil(which func(*hosts) []*medium, loss bool) func(*week, int) func() {
	return func(w *week, _ int) func() {
		set := func(part float64) {
			for _, m := range which(w.hosts) {
				m.mu.Lock()
				if loss {
					m.loss = part
				} else {
					m.repeat, m.late = part, part
				}
				m.mu.Unlock()
			}
		}
		set(0.1 + 0.4*w.rng.Float64())
		return func() { set(0) }
	}
}

func onlyLink(h *hosts) []*medium   { return []*medium{h.link} }
func onlyTunnel(h *hosts) []*medium { return []*medium{h.tunnel} }
func network(h *hosts) []*medium    { return []*medium{h.link, h.tunnel} }

func faults() []fault {
	all := []fault{
		{name: "link cut", lossless: true, lasts: partition, begin: cut(onlyLink)},
		{name: "tunnel cut", lasts: partition, begin: cut(onlyTunnel)},
		{name: "network cut", lasts: partition, begin: cut(network)},
		{name: "link loses", lossless: true, lasts: partition, begin: spoil(onlyLink, true)},
		{name: "tunnel loses", lasts: partition, begin: spoil(onlyTunnel, true)},
		{name: "network loses", lasts: partition, begin: spoil(network, true)},
		{name: "link repeats and reorders", lossless: true, lasts: partition, begin: spoil(onlyLink, false)},
		// Not without loss: WireGuard alone loses 66 of 360,000 pings where a
		// tenth to a half of its datagrams come up to half a second late, for
		// they are handshakes as well.
		{name: "network repeats and reorders", lasts: partition, begin: spoil(network, false)},
		{name: "crash", lossless: true, ends: true, lasts: downtime, begin: (*week).crash},
		{name: "reboot", ends: true, lasts: downtime, begin: func(w *week, end int) func() { return w.reboot(end, nil) }},
		// A snapshot's keys are gone at the other end, but for the initial PSK
		// or the recovery key.
		{name: "snapshot restored", ends: true, lasts: downtime, begin: (*week).restore},
		{name: "interface made anew", ends: true, lasts: downtime, begin: func(w *week, end int) func() {
			w.hosts.ends[end].vanish()
			return func() { w.must(w.hosts.ends[end].appear()) }
		}},
		{name: "peer removed and added", ends: true, lasts: downtime, begin: func(w *week, end int) func() {
			w.must(w.hosts.ends[end].remove())
			return func() { w.must(w.hosts.ends[end].add()) }
		}},
		{name: "foreign key", ends: true, lasts: moment, begin: func(w *week, end int) func() {
			k, err := psk.Random(rand.Reader)
			w.must(err)
			_ = w.hosts.ends[end].SetPSK(w.hosts.ends[1-end].public, k) // there may be no interface
			return func() {}
		}},
		{name: "disk full", lossless: true, ends: true, lasts: tenMins, begin: func(w *week, end int) func() {
			w.full[end].Add(1)
			return func() { w.full[end].Add(-1) }
		}},
		{name: "clock moved", lossless: true, ends: true, lasts: moment, begin: func(w *week, end int) func() {
			h := w.hosts.ends[end]
			h.mu.Lock()
			// Never into the future: a stamp that lies there is one of before a
			// clock went back (W3), and here the clock itself does not move.
			h.shift -= time.Duration(w.rng.IntN(10)) * time.Hour
			h.mu.Unlock()
			return func() {}
		}},
	}
	for _, k := range []kmesim.FaultKind{kmesim.Down, kmesim.Slow, kmesim.WrongBytes, kmesim.OutOfKeys, kmesim.Silent, kmesim.Lost} {
		all = append(all, fault{name: "kms " + k.String(), lossless: true, ends: true, lasts: tenMins, begin: func(w *week, end int) func() {
			kme := []*kmesim.KME{w.kmes.A, w.kmes.B}[end]
			kme.SetFault(kmesim.Fault{Kind: k, Delay: 4 * time.Second})
			return func() { kme.SetFault(kmesim.Fault{}) }
		}})
	}
	return all
}

func (w *week) must(err error) {
	if err != nil {
		w.t.Error(err)
	}
}

// crash kills a rotator after a number of its doings.
func (w *week) crash(end int) func() {
	w.down[end]++
	w.processes[end].left.Store(1 + w.rng.Int64N(30))
	return func() {
		w.kill(end, false)
		w.down[end]--
	}
}

// kill ends a rotator and waits until nothing of it is left in this process.
func (w *week) kill(end int, silently bool) {
	w.processes[end].die(silently)
	w.stopRotator(end)
}

// reboot lets a host go without a word, and come back with the PSK of its own
// configuration and an empty run directory, or, where it is not nil, what a
// snapshot holds.
func (w *week) reboot(end int, from *snapshot) func() {
	h := w.hosts.ends[end]
	w.down[end]++
	h.stack.power(-1)
	w.kill(end, true)
	h.vanish()
	return func() {
		w.down[end]--
		h.stack.power(1)
		w.must(os.RemoveAll(w.runDir(end)))
		w.must(os.MkdirAll(w.runDir(end), 0o700))
		if from != nil {
			w.must(os.RemoveAll(w.stateDir(end)))
			w.must(os.CopyFS(w.runDir(end), os.DirFS(from.dir+"/run")))
			w.must(os.CopyFS(w.stateDir(end), os.DirFS(from.dir+"/state")))
			for _, d := range []string{w.runDir(end), w.stateDir(end)} {
				w.must(filepath.WalkDir(d, func(path string, e os.DirEntry, err error) error {
					if err == nil && e.IsDir() {
						err = os.Chmod(path, 0o700)
					}
					return err
				}))
			}
		}
		w.must(h.appear())
		if from != nil {
			w.must(ignore(h.SetPSK(w.hosts.ends[1-end].public, from.psk), wg.ErrNoDevice))
		}
	}
}

func ignore(err, that error) error {
	if errors.Is(err, that) {
		return nil
	}
	return err
}

// snapshot is a host's disk and PSK at a moment.
type snapshot struct {
	dir string
	psk *psk.Key
}

// restore takes a host back to its last snapshot; one is taken at each call.
func (w *week) restore(end int) func() {
	before := w.snapshots[end]
	now := &snapshot{dir: filepath.Join(w.dir, strconv.Itoa(end), "snapshot"+strconv.Itoa(w.strikes))}
	w.must(os.RemoveAll(now.dir))
	w.must(os.CopyFS(now.dir+"/run", os.DirFS(w.runDir(end))))
	w.must(os.CopyFS(now.dir+"/state", os.DirFS(w.stateDir(end))))
	if d, err := w.hosts.ends[end].Dump(); err == nil && d.Peers[w.hosts.ends[1-end].public].PSK != nil {
		now.psk = d.Peers[w.hosts.ends[1-end].public].PSK
		w.snapshots[end] = now
	}
	if before == nil {
		before = w.snapshots[end]
	}
	return w.reboot(end, before)
}

// settle starts the rotators that nothing holds down.
func (w *week) settle() {
	for end, p := range w.processes {
		h := w.hosts.ends[end]
		h.mu.Lock()
		present := h.device != nil
		h.mu.Unlock()
		if w.down[end] == 0 && p.dead.Load() && present {
			w.startRotator(end)
		}
	}
}

// event is something that begins or ends.
type event struct {
	at time.Duration
	do func()
}

// run is the span of time, and calm after it. It says what went wrong.
func (w *week) run(span time.Duration) string {
	time.Sleep(5 * time.Minute)
	if !w.inStep() || w.count(0, rotation.NoteConfirmed) == 0 {
		return "no rotation in the first five minutes"
	}
	for time.Since(w.began) < span {
		if why := w.strike(); why != "" {
			return why
		}
	}
	before := w.count(0, rotation.NoteConfirmed)
	_, lost, _ := w.hosts.traffic()
	time.Sleep(15 * time.Minute)
	if _, now, _ := w.hosts.traffic(); now != lost || !w.inStep() || w.count(0, rotation.NoteConfirmed) < before+5 {
		return fmt.Sprintf("in calm at the end: %d pings lost, in step %v, %d keys confirmed", now-lost, w.inStep(), w.count(0, rotation.NoteConfirmed)-before)
	}
	return ""
}

// strike lets some time pass, then one, two or three faults, and judges.
func (w *week) strike() string {
	_, before, _ := w.hosts.traffic()
	confirmed := w.count(0, rotation.NoteConfirmed)
	calm := between(20*time.Second, 5*time.Minute)(w.rng)
	time.Sleep(calm)
	if w.rng.IntN(2) == 0 {
		w.handshake()
	}
	w.strikes++
	_, lost, _ := w.hosts.traffic()
	if lost != before {
		a, b := w.hosts.ends[0], w.hosts.ends[1]
		return fmt.Sprintf("%d pings lost in calm, after the faults before; the newest were sent at %s and %s", lost-before,
			a.lostAt.Format(time.StampMilli), b.lostAt.Format(time.StampMilli))
	}
	if calm > 4*time.Minute && w.count(0, rotation.NoteConfirmed) == confirmed {
		return "no key was confirmed in four minutes of calm"
	}

	var events []event
	var names []string
	lossless := true
	struck := w.draw()
	total := time.Duration(0)
	for _, x := range struck {
		total = max(total, x.last)
	}
	for _, x := range struck {
		lossless = lossless && x.lossless
		names = append(names, x.name)
		for _, end := range x.at {
			// They end within half a minute of each other: what ends long
			// before the others would be judged by nobody.
			ends := total
			if len(struck) > 1 || len(x.at) > 1 {
				ends += between(0, 30*time.Second)(w.rng)
			}
			w.log.say("ADVERSARY in %v: %s (end %d) for %v", ends-x.last, x.name, end, x.last)
			events = append(events, event{ends - x.last, func() {
				undo := x.begin(w, end)
				events = append(events, event{ends, undo})
			}})
		}
	}
	for start := time.Now(); len(events) > 0; {
		slices.SortStableFunc(events, func(a, b event) int { return cmp.Compare(a.at, b.at) })
		e := events[0]
		events = slices.Clone(events[1:])
		time.Sleep(time.Until(start.Add(e.at)))
		e.do()
		w.settle()
	}
	took, why := w.recover()
	time.Sleep(5 * time.Second)
	_, now, _ := w.hosts.traffic()
	for _, n := range names {
		w.took[n] = append(w.took[n], took)
		w.dropped[n] += now - lost
	}
	what := fmt.Sprint(names)
	w.log.say("VERDICT on %s: recovered after %v, %d pings lost %s", what, took, now-lost, why)
	if took > w.worst {
		w.worst, w.worstOf = took, what
	}
	switch {
	case why != "":
		return fmt.Sprintf("at %v, after %s: %s", time.Since(w.began), what, why)
	case lossless && now != lost:
		return fmt.Sprintf("at %v, %d pings lost by %s", time.Since(w.began), now-lost, what)
	}
	return ""
}

// struck is a fault with its circumstances.
type struck struct {
	fault
	at   []int // ends
	last time.Duration
}

// draw draws one fault, or two or three different ones.
func (w *week) draw() (drawn []struck) {
	possible := faults()
	for range 1 + max(0, w.rng.IntN(12)-9) {
		n := w.rng.IntN(len(possible))
		x := struck{fault: possible[n], at: []int{0}}
		possible = slices.Delete(possible, n, n+1)
		if x.ends {
			which := w.rng.IntN(3)
			x.at = [][]int{{0}, {1}, {0, 1}}[which]
			x.name += []string{" at client", " at server", " at both"}[which]
		}
		x.last = x.lasts(w.rng)
		drawn = append(drawn, x)
	}
	return drawn
}

// handshake waits for the tunnel's next, and a moment in which keys are set.
func (w *week) handshake() {
	h := w.hosts.ends[0]
	stamp := func() time.Time {
		d, err := h.Dump()
		if err != nil {
			return time.Time{}
		}
		defer d.Wipe()
		return d.Peers[w.hosts.ends[1].public].Handshake
	}
	before := stamp()
	for range 2000 {
		time.Sleep(100 * time.Millisecond)
		if !stamp().Equal(before) {
			time.Sleep(between(0, 3*time.Second)(w.rng))
			return
		}
	}
}

// recover waits until the tunnel works and the ends hold the same PSK, and
// tells how long that took.
func (w *week) recover() (took time.Duration, why string) {
	began := time.Now()
	bound := w.bound
	for end := range w.rotators {
		for _, x := range w.system.peer(end).Warnings {
			if x.Code == control.ForeignTool {
				bound += time.Minute // the backoff against another tool
			}
		}
	}
	for i := 0; ; i++ {
		_, _, works := w.hosts.traffic()
		took = time.Since(began)
		if works.After(began) && w.inStep() {
			return took, ""
		}
		if took > bound {
			return took, fmt.Sprintf("works since then: %v, in step: %v, after %v", works.After(began), w.inStep(), bound)
		}
		// In turns: two initiations at one moment make both handshakes fail.
		_ = w.hosts.ends[i%2].Ping()
		time.Sleep(50 * time.Millisecond)
	}
}

// summary tells what came of it.
func (w *week) summary() {
	sent, lost, _ := w.hosts.traffic()
	var all []time.Duration
	table := &bytes.Buffer{}
	for _, name := range slices.Sorted(maps.Keys(w.took)) {
		took := slices.Sorted(slices.Values(w.took[name]))
		all = append(all, took...)
		fmt.Fprintf(table, "  %-44s %4d times, recovered after %7.1fs (median) %7.1fs (worst), lost %d\n",
			name, len(took), took[len(took)/2].Seconds(), took[len(took)-1].Seconds(), w.dropped[name])
	}
	slices.Sort(all)
	if len(all) == 0 {
		return
	}
	w.t.Logf("seed %d: %v, %d strikes, %d faults; recovered after %.1fs (median), %.1fs (worst, %s); pings %d, lost %d; rotations %d, confirmed %d\n%s",
		w.seed, time.Since(w.began).Round(time.Minute), w.strikes, len(all), all[len(all)/2].Seconds(), w.worst.Seconds(), w.worstOf,
		sent, lost, w.count(0, rotation.NoteInstalled), w.count(0, rotation.NoteConfirmed), table)
}

// tail keeps the end of a log.
type tail struct {
	mu sync.Mutex
	b  []byte
}

const tailSize = 24 << 10

func (t *tail) Write(b []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.b = append(t.b, b...)
	if len(t.b) > 2*tailSize {
		t.b = append(t.b[:0], t.b[len(t.b)-tailSize:]...)
	}
	return len(b), nil
}

// say writes a line of the test's own.
func (t *tail) say(format string, args ...any) {
	fmt.Fprintf(t, time.Now().Format("15:04:05.000 ")+format+"\n", args...)
}

func (t *tail) text() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return string(t.b[max(0, len(t.b)-tailSize):])
}
