package rotation

import (
	"fmt"
	"math"
	"os"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"keyturn/internal/wire"
)

// action is one thing that can happen next in a world.
type action struct {
	kind act
	end  uint8
	fuse uint8 // the end crashes after so many effects of the action; zero: it does not
}

type act uint8

// What happens by itself, and from slip on the faults.
const (
	arrive     act = iota // the next message of the handshake that end began
	deliver               // the next message on the link to end
	linger                // the next message of an earlier connection to end
	restart               // end's rotator
	mend                  // all that is broken
	tick                  // a grain of time passes, with nothing on its way
	photograph            // end's journal and PSK are copied: no fault yet
	slip                  // the same as tick, while something is on its way
	repeat                // deliver, and the message comes again
	shut                  // the connection ends, and both ends hear of it
	half                  // only end does
	late                  // as shut, but what is on the link still arrives, later
	crash                 // kill -9, also between two effects of an action
	reboot                // of the host
	putBack               // the host, to the copy
	cutLink               // until mended
	cutTunnel             // the link beside it works
	cutBoth               // the link and the tunnel
	failKMS               // until mended
	failDisk              //
	failSet               // WireGuard refuses
	foreign               // somebody sets another PSK
	handshakeByChance
)

var actNames = [...]string{
	"a message of the handshake arrives that was begun by", "a message reaches", "a late message reaches", "restart", "mend",
	"time passes", "a snapshot is taken of", "time passes, the messages are slow", "a message comes twice to", "the connection breaks",
	"the connection breaks, and nobody hears of it but", "the connection breaks, its messages come late",
	"crash", "reboot", "a snapshot is put back at", "the link is cut", "the tunnel is cut", "the network is cut", "the kms fails at", "the disk is full at",
	"wireguard refuses at", "wg set at", "a handshake by chance, begun by",
}

func (a action) String() string {
	s := actNames[a.kind]
	switch a.kind {
	case mend, tick, slip, shut, late, cutLink, cutTunnel, cutBoth:
	default:
		s += " the " + endNames[a.end]
	}
	if a.fuse > 0 {
		s += fmt.Sprintf(", which crashes after %d of its effects", a.fuse)
	}
	return s
}

// scope is a part of the model that is explored completely: every schedule of
// what happens by itself, with so many of the faults, each at any moment.
type scope struct {
	name     string
	grain    time.Duration // in which time passes: timers are late by up to as much
	faults   []act
	budget   int             // how many of them
	outages  []time.Duration // how long what is down or broken may stay so
	inside   bool            // the link runs inside the tunnel
	fallback bool            // fallback: initial
	persists bool            // the journal survives a reboot
	lossless bool            // the faults are such that no packet may be lost
	dark     trouble         // broken for ever
	bound    time.Duration   // of calm until the tunnel works
	roots    []func(*world)  // where to begin; nil: at the first start of both
}

// apply lets an action happen.
func (w *world) apply(a action) {
	e := int(a.end)
	h := &w.hosts[e]
	w.tell("* %v", a)
	if w.fuse, w.fused = int(a.fuse), e; a.fuse > 0 || a.kind >= slip {
		w.left--
	}
	switch a.kind {
	case arrive:
		w.shake(e)
	case deliver, repeat:
		m := w.queue[e][0]
		if a.kind == deliver {
			w.queue[e] = w.queue[e][1:]
		}
		w.receive(e, m)
	case linger:
		m := w.stale[e][0]
		w.stale[e] = w.stale[e][1:]
		w.receive(e, m)
	case restart:
		w.start(e)
	case mend:
		w.broken, w.since = w.scope.dark, time.Time{}
	case tick, slip:
		w.pass()
	case shut, late:
		if a.kind == late {
			w.stale, w.fades = w.queue, 3
		}
		w.drop()
		w.hear(client)
		w.hear(server)
	case half:
		w.drop()
		w.hear(e)
	case crash:
		w.crash(e)
	case reboot:
		w.reboot(e)
	case photograph:
		w.photograph(e)
	case putBack:
		w.putBack(e)
	case foreign:
		w.foreignPSK(e)
	case handshakeByChance:
		h.device.tried = time.Time{}
		w.initiate(e)
	default:
		w.since = w.now
		switch a.kind {
		case cutLink:
			w.broken.link = true
		case cutTunnel:
			w.broken.tunnel = true
			w.tries = [2]handshake{}
		case cutBoth:
			w.broken.link, w.broken.tunnel = true, true
			w.tries = [2]handshake{}
		case failKMS:
			w.broken.kms[e] = true
		case failDisk:
			w.broken.disk[e] = true
		case failSet:
			w.broken.sets[e] = true
		}
	}
	w.fuse = 0
	w.forget()
	w.check()
}

func (w *world) deliverable(e int) bool {
	return w.hosts[e].up && w.up[e] && len(w.queue[e]) > 0 && w.reachable()
}

// pending says whether anything is on its way.
func (w *world) pending() bool {
	return w.tries[0].at != 0 || w.tries[1].at != 0 || w.deliverable(client) || w.deliverable(server)
}

// first says whether an end's handshake goes on next: of two that cross, the one
// that began first. WireGuard's jitter sees to that in the end.
func (w *world) first(e int) bool {
	mine, theirs := &w.tries[e], &w.tries[1-e]
	return mine.at != 0 && (theirs.at == 0 || mine.id < theirs.id)
}

// fair is what a fair scheduler does next if nothing fails any more.
func (w *world) fair() action {
	for e := range w.tries {
		if w.first(e) {
			return action{kind: arrive, end: uint8(e)}
		}
	}
	for _, e := range []int{server, client} {
		if w.deliverable(e) {
			return action{kind: deliver, end: uint8(e)}
		}
	}
	if w.broken != w.scope.dark {
		return action{kind: mend}
	}
	for e := range w.hosts {
		if !w.hosts[e].up {
			return action{kind: restart, end: uint8(e)}
		}
	}
	return action{kind: tick}
}

// free lists all that can happen by itself, what is fair first.
func (w *world) free() []action {
	fair := w.fair()
	all := []action{fair}
	add := func(k act, e int) {
		if a := (action{kind: k, end: uint8(e)}); a != fair {
			all = append(all, a)
		}
	}
	for e := range w.hosts {
		h := &w.hosts[e]
		if w.first(e) {
			add(arrive, e)
		}
		if w.deliverable(e) {
			add(deliver, e)
		}
		if h.up && w.up[e] && len(w.stale[e]) > 0 && h.tunnel.session != (wire.SessionID{}) {
			add(linger, e)
		}
	}
	if w.pending() {
		return all
	}
	// What is down or broken comes back after one of the scope's outages, the
	// longest of them at the latest. Calm does not wait, so that mend and
	// restart are always listed if they are fair.
	wait := true
	outage := func(since time.Time, k act, e int) {
		if !since.IsZero() {
			lasted := w.now.Sub(since).Round(w.scope.grain)
			wait = wait && lasted < slices.Max(w.scope.outages)
			if slices.Contains(w.scope.outages, lasted) {
				add(k, e)
			}
		}
	}
	outage(w.since, mend, 0)
	for e := range w.hosts {
		outage(w.hosts[e].down, restart, e)
	}
	if wait {
		add(tick, 0)
	}
	return all
}

// faults lists all that can go wrong now.
func (w *world) faults() []action {
	if w.left == 0 {
		return nil
	}
	var all []action
	linked := w.up[client] || w.up[server]
	for _, k := range w.scope.faults {
		for e := range w.hosts {
			h := &w.hosts[e]
			possible := true
			switch k {
			case slip:
				possible = e == client && w.pending()
			case cutLink, cutBoth:
				possible = e == client && !w.broken.link
			case cutTunnel:
				possible = e == client && !w.broken.tunnel
			case shut:
				possible = e == client && linked
			case late:
				possible = e == client && linked && len(w.queue[client])+len(w.queue[server]) > 0
			case repeat:
				possible = w.deliverable(e)
			case half:
				possible = w.up[e]
			case crash:
				possible = h.up
			case failKMS:
				possible = !w.broken.kms[e]
			case failDisk:
				possible = !w.broken.disk[e]
			case failSet:
				possible = !w.broken.sets[e]
			case photograph:
				possible = w.hosts[client].snapshot == nil && w.hosts[server].snapshot == nil
			case putBack:
				possible = h.snapshot != nil
			case foreign:
				possible = !h.strange
			case handshakeByChance:
				possible = w.tries[e].at == 0
			}
			if possible {
				all = append(all, action{kind: k, end: uint8(e)})
			}
		}
	}
	return all
}

// next is a state that an action led to.
type next struct {
	action action
	digest digest
	world  *world // nil if the state was met before, and is not to be compared
	wrong  string
	met    bool
}

// What is known of a state, and of the fair action in it.
const (
	isGood  uint8 = 1 << iota
	isWorks       // the tunnel carries packets
	isTick        // the fair action lets time pass
	isMet         // the fair action confirms a key at both ends
)

// explorer is a breadth-first search through all states of a scope.
type explorer struct {
	scope  *scope
	limit  int // of states
	index  map[digest]int32
	parent []int32  // of each state: the one it was first reached from, -1-root for a root
	by     []action // and by what
	fair   []int32  // where the fair action leads
	bits   []uint8
	edges  int
	depth  int

	compared int // of the states met again

	recovery, confirm time.Duration // the longest that calm took to each
}

// worker expands states; it has what cannot be shared.
type worker struct {
	scribe scribe
	codecs codecs
}

func newWorker() worker { return worker{codecs: codecs{}} }

// sampled picks one action in so many: if it leads to a state that was met before
// it is looked at whether that state is the same.
func (x *explorer) sampled(from int32, n int) bool { return (int(from)+n)%sampleRate == 0 }

const sampleRate = 509

func (x *explorer) expand(k *worker, from int32, w *world) []next {
	var out []next
	do := func(a action) [2]int {
		c := w.clone()
		c.apply(a)
		n := next{action: a, digest: k.scribe.digest(k.codecs, c), wrong: c.wrong, met: c.met}
		if _, known := x.index[n.digest]; !known || x.sampled(from, len(out)) {
			n.world = c
		}
		out = append(out, n)
		return c.effects
	}
	crashes := w.left > 0 && slices.Contains(x.scope.faults, crash)
	more := w.faults()
	for _, a := range w.free() {
		for e, n := range do(a) {
			// A crash after the last effect is one in the state that follows.
			for i := 1; crashes && i < n; i++ {
				if a.kind == tick || a.end == uint8(e) {
					more = append(more, action{a.kind, uint8(e), uint8(i)})
				}
			}
		}
	}
	for _, a := range more {
		do(a)
	}
	return out
}

// add makes a state known.
func (x *explorer) add(d digest, w *world, parent int32, by action) int32 {
	i := int32(len(x.parent))
	x.index[d] = i
	x.parent, x.by, x.fair = append(x.parent, parent), append(x.by, by), append(x.fair, -1)
	var b uint8
	for _, f := range []struct {
		holds bool
		bit   uint8
	}{{w.good(), isGood}, {w.works(), isWorks}, {w.fair().kind == tick, isTick}} {
		if f.holds {
			b |= f.bit
		}
	}
	x.bits = append(x.bits, b)
	return i
}

// node is a state that waits to be expanded.
type node struct {
	index int32
	world *world
}

// run explores the scope and returns what is wrong, and a shortest schedule.
func (x *explorer) run() (wrong string, root int, schedule []action) {
	x.index = map[digest]int32{}
	workers := make([]worker, runtime.GOMAXPROCS(0))
	for i := range workers {
		workers[i] = newWorker()
	}
	var level []node
	for root := range max(1, len(x.scope.roots)) {
		w := newWorld(x.scope, root)
		if w.check(); w.wrong != "" {
			return w.wrong, root, nil
		}
		if d := workers[0].scribe.digest(workers[0].codecs, w); x.index[d] == 0 {
			level = append(level, node{x.add(d, w, int32(-1-root), action{}), w})
		}
	}
	for ; len(level) > 0; x.depth++ {
		var following []node
		for part := range slices.Chunk(level, 4096) {
			results := make([][]next, len(part))
			var group sync.WaitGroup
			for i := range workers {
				group.Go(func() {
					for j := i; j < len(part); j += len(workers) {
						results[j] = x.expand(&workers[i], part[j].index, part[j].world)
						part[j].world = nil
					}
				})
			}
			group.Wait()
			for j, all := range results {
				from := part[j].index
				for n, s := range all {
					x.edges++
					if s.wrong != "" {
						root, schedule = x.path(from)
						return s.wrong, root, append(schedule, s.action)
					}
					i, known := x.index[s.digest]
					if !known {
						i = x.add(s.digest, s.world, from, s.action)
						following = append(following, node{i, s.world})
					} else if x.sampled(from, n) {
						if wrong := x.apart(i, s.world); wrong != "" {
							root, schedule = x.path(from)
							return wrong, root, append(schedule, s.action)
						}
					}
					if n == 0 { // the fair one
						if x.fair[from] = i; s.met {
							x.bits[from] |= isMet
						}
					}
				}
			}
			if len(x.parent) > x.limit {
				return fmt.Sprintf("the scope has more than %d states", x.limit), 0, nil
			}
		}
		level = following
	}
	wrong, at := x.live()
	root, schedule = x.path(at)
	return wrong, root, schedule
}

// path returns the shortest way to a state.
func (x *explorer) path(i int32) (root int, all []action) {
	for ; x.parent[i] >= 0; i = x.parent[i] {
		all = append(all, x.by[i])
	}
	slices.Reverse(all)
	return int(-1 - x.parent[i]), all
}

// progress is within how much calm a further key must be confirmed at both ends:
// the handshake that recovery waits for, and three more 120 s apart.
const progress = 480 * time.Second

// never is longer than any time.
const never = time.Duration(math.MaxInt64)

// live judges what calm leads to (8.6): from every state, if nothing fails any
// more, a fair scheduler comes to a good one within the scope's bound, does not
// leave it for one in which the tunnel does not work, and sees a further key
// confirmed. The first state for which this does not hold is returned.
func (x *explorer) live() (wrong string, at int32) {
	recovery := x.until(isGood)
	x.recovery = slices.Max(recovery)
	if i := slices.IndexFunc(recovery, func(d time.Duration) bool { return d > x.scope.bound }); i >= 0 {
		return "calm, and the tunnel stays lost " + lasting(recovery[i]) + " (8.6)", int32(i)
	}
	for i := range x.fair {
		if x.bits[i]&isGood != 0 && x.bits[x.fair[i]]&isWorks == 0 {
			return "calm, and the tunnel is lost again (8.6)", int32(i)
		}
	}
	if x.scope.dark.link {
		return "", 0 // without a link no key is confirmed
	}
	confirm := x.until(isMet)
	x.confirm = slices.Max(confirm)
	if i := slices.IndexFunc(confirm, func(d time.Duration) bool { return d > progress }); i >= 0 {
		return "calm, and no further key is confirmed " + lasting(confirm[i]) + " (8.6)", int32(i)
	}
	return "", 0
}

func lasting(d time.Duration) string {
	if d == never {
		return "for ever"
	}
	return "for " + d.String()
}

// until returns, for every state, how long calm takes to one with the bit.
func (x *explorer) until(bit uint8) []time.Duration {
	times := make([]time.Duration, len(x.fair))
	known := make([]bool, len(x.fair))
	var chain []int32
	for i := range x.fair {
		chain = chain[:0]
		j := int32(i)
		for ; !known[j]; j = x.fair[j] {
			known[j] = true
			if x.bits[j]&bit != 0 {
				break
			}
			times[j] = never // stands if the chain comes back to it
			chain = append(chain, j)
		}
		t := times[j]
		for _, k := range slices.Backward(chain) {
			if t != never && x.bits[k]&isTick != 0 {
				t += x.scope.grain
			}
			times[k] = t
		}
	}
	return times
}

// show repeats a schedule from its root and tells what happens in it and in the
// calm after it, but for reports.
func show(s *scope, root int, schedule []action, calm time.Duration) string {
	var b strings.Builder
	w := newWorld(s, root)
	start := w.now
	w.trace = func(format string, args ...any) {
		line := fmt.Sprintf(format, args...)
		if w.wrong != "" && !strings.HasPrefix(line, "VIOLATION") {
			return
		}
		plain := strings.HasPrefix(line, "* "+actNames[deliver]) || strings.HasPrefix(line, "* "+actNames[arrive]) || line == "* "+actNames[tick]
		if !strings.Contains(line, ": report ") && !plain {
			fmt.Fprintf(&b, "%4.0f s  %s\n", w.now.Sub(start).Seconds(), line)
		}
	}
	for _, a := range schedule {
		w.apply(a)
	}
	if w.wrong == "" {
		w.tell("calm")
	}
	for end := w.now.Add(calm); w.now.Before(end) && w.wrong == ""; {
		w.apply(w.fair())
	}
	return b.String()
}

// apart compares two worlds that are written down as one state, the one that
// it was first met as and another, by all that can happen next in each, and
// says what tells them apart. Where nothing does, at any of its states, the
// scribe leaves nothing out that matters.
func (x *explorer) apart(i int32, w *world) string {
	k := newWorker()
	root, schedule := x.path(i)
	first := newWorld(x.scope, root)
	for _, a := range schedule {
		first.apply(a)
	}
	x.compared++
	if first.good() != w.good() || first.works() != w.works() {
		return "one state is good in one world, and not in another"
	}
	a, b := x.expand(&k, i, first), x.expand(&k, i, w)
	if len(a) != len(b) {
		return fmt.Sprintf("in one state %d things can happen in one world, and %d in another", len(a), len(b))
	}
	for j := range a {
		if a[j].action != b[j].action || a[j].digest != b[j].digest || (a[j].wrong == "") != (b[j].wrong == "") || a[j].met != b[j].met {
			return fmt.Sprintf("one state leads to two: by %v in one world, by %v in another, first met after:\n%s", a[j].action, b[j].action, show(x.scope, root, schedule, 0))
		}
	}
	return ""
}

// replayed repeats the schedule to a state from its root and says whether it
// leads there: the copies that the search goes on with are then true ones.
func (x *explorer) replayed(i int32) bool {
	root, schedule := x.path(i)
	w := newWorld(x.scope, root)
	for _, a := range schedule {
		w.apply(a)
	}
	var c scribe
	j, known := x.index[c.digest(codecs{}, w)]
	return known && j == i
}

// Outages: gone at once, noticed by the silence, and longer than a session lives.
var outages = []time.Duration{0, 12 * time.Second, 184 * time.Second}

// hunts are all the ways in which two ends can begin to look for each other's
// key: any sizes of journal, any key that both have, any one installed, and one
// end later than the other by any time in which the server's walk goes round.
// Keys are confirmed up to the first; five stand for any larger number.
func hunts(sizes ...int) (roots []func(*world)) {
	candidates := func(n int) []int {
		if n <= mostCandidates {
			return []int{0, 1, 2}[:n]
		}
		return []int{0, n - 2, n - 1}
	}
	for _, nc := range sizes {
		for _, ns := range sizes {
			for _, kc := range candidates(nc) {
				for _, ks := range candidates(ns) {
					for later := range 2 {
						roots = append(roots, func(w *world) {
							common := modelKey(4, 100)
							for e, n := range []int{nc, ns} {
								h := &w.hosts[e]
								h.high = 10
								for i := range n {
									k := modelKey(4, uint64(10*e+i))
									if i == []int{kc, ks}[e] {
										k = common
									}
									h.journal = append(h.journal, entry{
										serial: uint64(i + 1), print: k.Fingerprint(), key: k, installed: w.now,
										agreed: i == 0, seen: i == 0, confirmed: i == 0,
									})
								}
								h.device = device{psk: h.journal[0].key, print: h.journal[0].print}
							}
							w.hosts[later].down = w.now
						})
					}
				}
			}
		}
	}
	return roots
}

// every lists the times from zero to most, a step apart.
func every(step, most time.Duration) (all []time.Duration) {
	for d := time.Duration(0); d <= most; d += step {
		all = append(all, d)
	}
	return all
}

// Bounds of recovery after the last fault: those of the adversary's tests, and
// for a hunt that of docs/PROTOCOL.md, 7.2 with what lies around it: the
// evidence (H1), four stays of the server, each late by a grain.
const (
	besideBound = 20 * time.Second
	insideBound = 200 * time.Second
	huntLimit   = 180 * time.Second
)

// scopes lists what is explored. The first are those of "make test".
func scopes() []scope {
	const grain = 2 * time.Second
	dark := trouble{link: true}
	beside := func(name string, faults ...act) scope {
		return scope{name: name, grain: grain, faults: faults, budget: 1, outages: outages, bound: besideBound}
	}
	lossless := func(s scope) scope { s.lossless = true; return s }
	inside := func(s scope) scope { s.inside, s.persists, s.bound = true, true, insideBound; return s }
	twice := func(s scope) scope { s.budget = 2; return s }
	fallback := func(s scope) scope { s.fallback, s.persists = true, false; return s }
	slow := func(s scope) scope { s.outages = outages[1:]; return s } // no host boots at once
	coarse := func(s scope) scope { s.grain = 4 * time.Second; return s }
	return []scope{
		{name: "calm", grain: time.Second, bound: besideBound, lossless: true},
		{name: "hunt", grain: 4 * time.Second, outages: every(4*time.Second, 4*time.Second), dark: dark, bound: huntLimit, roots: hunts(3, 5)},
		lossless(beside("link", slip, repeat, shut, half, late)),

		{name: "every hunt", grain: 4 * time.Second, outages: every(4*time.Second, 160*time.Second), dark: dark, bound: huntLimit, roots: hunts(1, 2, 3, 5)},
		twice(lossless(beside("link twice", slip, shut))),
		lossless(beside("handshakes by chance", handshakeByChance)),
		lossless(beside("link cut", cutLink)),
		lossless(beside("supplies", failKMS, failDisk)),
		beside("WireGuard refuses", failSet, foreign),
		beside("crash", crash),
		beside("tunnel cut", cutTunnel),
		beside("network cut", cutBoth),
		inside(beside("inside: network cut", cutBoth)),
		slow(inside(beside("inside: reboot with journal", reboot))),
		slow(fallback(inside(beside("inside: reboot with fallback", reboot)))),
		slow(beside("reboot", reboot)),
		coarse(slow(beside("snapshot", photograph, putBack))),
	}
}

// shortScopes is how many of the scopes are explored without KEYTURN_EXPLORE,
// and raceScopes under -short.
const (
	shortScopes = 3
	raceScopes  = 2
)

// TestExplore explores the model: see docs/MODEL.md.
func TestExplore(t *testing.T) {
	all := scopes()
	switch {
	case os.Getenv("KEYTURN_EXPLORE") == "full":
	case testing.Short():
		all = all[:raceScopes]
	default:
		all = all[:shortScopes]
	}
	for _, s := range all {
		t.Run(s.name, func(t *testing.T) {
			x := &explorer{scope: &s, limit: 10_000_000}
			start := time.Now()
			wrong, root, schedule := x.run()
			if wrong != "" {
				t.Fatalf("%s\nafter %d actions, of %d states visited:\n%s", wrong, len(schedule), len(x.parent), show(&s, root, schedule, 2*s.bound))
			}
			t.Logf("%d states, %d actions, %d deep, %d compared, in %.1f s; in calm the tunnel works within %v, and a further key is confirmed within %v",
				len(x.parent), x.edges, x.depth, x.compared, time.Since(start).Seconds(), x.recovery, x.confirm)
			for i := int32(0); int(i) < len(x.parent); i += 5003 {
				if !x.replayed(i) {
					t.Fatalf("the schedule to state %d leads to another: copies share something, or the model is not deterministic", i)
				}
			}
		})
	}
}

// TestModelKnowsTheMachines looks for what the model's copies could share by
// mistake, and for rules about fields that there are no more.
func TestModelKnowsTheMachines(t *testing.T) {
	// What refers to something, and is copied or never changed in place.
	copied := []string{
		"KeyRotationScheduler.tunnel", "KeyRotationScheduler.out", "KeyRotationScheduler.installed", "KeyRotationScheduler.block", "KeyRotationScheduler.op",
		"KeyGenerator.tunnel", "KeyGenerator.out", "KeyGenerator.rounds", "memory.values", "operation.record", "buffer.entries",
		"Tunnel.records", "Tunnel.pulled", "record.key", "round.qkd", "round.key", "Config.Random",
	}
	constant := []string{
		"KeyRotationScheduler.peer", "KeyRotationScheduler.early", "Observed.PSK", "bootstrap.ack", "Tunnel.differences", "Tunnel.peerHeld",
		"round.propose", "round.reply", "round.finish", "Parameters.KEMs", "Config.KEMs",
		"round.own", "round.secrets", // empty: the model's keys come from the KMS alone
	}
	met := map[string]bool{}
	var look func(s reflect.Type)
	look = func(s reflect.Type) {
		name, _, _ := strings.Cut(s.Name(), "[")
		if met[name] || s.Kind() != reflect.Struct || s == reflect.TypeFor[time.Time]() {
			return
		}
		met[name] = true
		for f := range s.Fields() {
			field := name + "." + f.Name
			met[field] = true
			switch f.Type.Kind() {
			case reflect.Struct:
				look(f.Type)
			case reflect.Pointer, reflect.Slice, reflect.Map, reflect.Interface, reflect.Func, reflect.Chan:
				if !slices.Contains(copied, field) && !slices.Contains(constant, field) {
					t.Errorf("cloneMachines does not know %s: is it copied, or never changed in place?", field)
				}
			}
		}
	}
	for _, s := range []reflect.Type{
		reflect.TypeFor[KeyRotationScheduler](), reflect.TypeFor[KeyGenerator](), reflect.TypeFor[Tunnel](),
		reflect.TypeFor[operation](), reflect.TypeFor[record](), reflect.TypeFor[round](),
	} {
		look(s)
	}
	for _, field := range slices.Concat(copied, constant) {
		if !met[field] {
			t.Errorf("%s is listed, and there is no such field", field)
		}
	}
	for _, s := range []reflect.Type{
		reflect.TypeFor[world](), reflect.TypeFor[host](), reflect.TypeFor[entry](), reflect.TypeFor[snapshot](), reflect.TypeFor[device](), reflect.TypeFor[session](),
		reflect.TypeFor[handshake](), reflect.TypeFor[wire.Named](), reflect.TypeFor[wire.Init](), reflect.TypeFor[wire.Ack](), reflect.TypeFor[wire.Propose](),
		reflect.TypeFor[wire.Reply](), reflect.TypeFor[wire.Finish](), reflect.TypeFor[wire.Done](), reflect.TypeFor[wire.Abandon](), reflect.TypeFor[wire.Commit](),
		reflect.TypeFor[wire.Committed](), reflect.TypeFor[wire.Refused](), reflect.TypeFor[wire.Report](), reflect.TypeFor[wire.Bye](),
	} {
		for f := range s.Fields() {
			met[s.Name()+"."+f.Name] = true
		}
	}
	for field := range rules {
		if !met[field] {
			t.Errorf("there is a rule for %s, and no such field", field)
		}
	}
}
