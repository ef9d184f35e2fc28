//go:build vm

package vm

import (
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"sync"
	"testing"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"keyturn/e2e/vm/guest"
	"keyturn/internal/link"
)

// What a tunnel may take to work again after a fault's end. In real time, on a
// host that does other things as well, three times that passes and is shown as
// late.
const (
	boundBeside = 10 * time.Second
	boundInside = 180 * time.Second
	noise       = 3

	rekeyAfter  = 120 * time.Second // WireGuard's paper, 6.1
	rejectAfter = 180 * time.Second
	// What is lost while WireGuard tries once again, every 5 s and up to 333 ms,
	// is packets. Where it takes longer, the tunnel does not work, long after the
	// fault as well.
	nextAttempt = 5500 * time.Millisecond

	pollInterval = 500 * time.Millisecond
)

// exercise is one tunnel between two machines that one fault happens to.
type exercise struct {
	t     *testing.T
	ends  [2]*machine // client and server
	bound time.Duration
}

// fault is something that happens to one machine. It ends when the function
// returns.
type fault struct {
	name string
	// oneWay: only the machine that it happens to has something to send.
	oneWay bool
	happen func(x *exercise, m *machine)
}

var faults = []fault{
	{name: "put back to a snapshot, 5 min", happen: func(x *exercise, m *machine) { x.putBack(m) }},
	{name: "put back to a snapshot, 5 min, clock set right", happen: func(x *exercise, m *machine) {
		x.putBack(m)
		m.setClock(time.Now())
	}},
	{name: "suspended to RAM, 4 min", happen: func(_ *exercise, m *machine) { m.suspend(4 * time.Minute) }},
	{name: "stopped, 4 min", happen: func(_ *exercise, m *machine) { m.freeze(4 * time.Minute) }},
	{name: "clock 5 h back", happen: clock(-5 * time.Hour)},
	{name: "clock 5 h ahead", happen: clock(5 * time.Hour)},
	{name: "clock 5 h back, traffic from there only", oneWay: true, happen: clock(-5 * time.Hour)},
	{name: "rebooted, clock 5 h back, traffic from there only", oneWay: true, happen: func(x *exercise, m *machine) {
		x.handshake(m)
		m.tell(guest.Order{Verb: guest.Reboot, Clock: time.Now().Add(-5 * time.Hour)})
	}},
	{name: "clock 5 h ahead, traffic from there only", oneWay: true, happen: clock(5 * time.Hour)},
}

// clock moves a machine's clock after both ends have heard the other begin a
// handshake: neither takes one that is older from then on. Where the other end
// has nothing to send, it begins none.
func clock(by time.Duration) func(*exercise, *machine) {
	return func(x *exercise, m *machine) {
		if p := x.other(m); p.pings {
			x.handshake(p)
		}
		x.handshake(m)
		m.setClock(time.Now().Add(by))
	}
}

func (x *exercise) other(m *machine) *machine {
	if m == x.ends[0] {
		return x.ends[1]
	}
	return x.ends[0]
}

// handshake has a machine begin a handshake, which its next ping does, and waits
// until it has brought a key.
func (x *exercise) handshake(m *machine) {
	x.t.Helper()
	serial := guest.ConfirmedAtMost(x.views())
	m.tell(guest.Order{Verb: guest.Forget})
	x.eventually("a new key", func(a, b guest.View) error {
		if guest.ConfirmedAtMost(a, b) == serial {
			return errors.New("there was no handshake yet")
		}
		return guest.InStep(a, b)
	})
	pass(3 * time.Second) // sooner the next would not count as seen
}

// ping begins a stream of pings to the other end.
func (m *machine) ping() {
	m.t.Helper()
	m.tell(guest.Order{Verb: guest.Ping})
	m.pings = true
}

func (m *machine) setClock(to time.Time) {
	m.t.Helper()
	m.tell(guest.Order{Verb: guest.SetClock, Clock: to})
}

// TestPair: faults of a whole machine that concern one end only: by turns the
// client and the server, unless KEYTURN_VM_ENDS says both. Each fault has two
// machines for itself. Most of the time these wait, so all run at once, but they
// boot one pair after the other.
func TestPair(t *testing.T) {
	t.Parallel()
	if lab.unable != nil {
		t.Skipf("cannot run here: %v", lab.unable)
	}
	var all sync.WaitGroup
	defer all.Wait()
	boot := make(chan struct{}, 1)
	for i, f := range faults {
		for j, where := range []string{"beside", "inside"} {
			for end, name := range []string{"client", "server"} {
				if end != (i+j)%2 && os.Getenv(endsVar) != "both" {
					continue
				}
				boot <- struct{}{}
				booted := sync.OnceFunc(func() { <-boot })
				all.Go(func() {
					defer booted() // if it is not among those that were asked for
					t.Run(fmt.Sprintf("%s %s, %s", name, f.name, where), func(t *testing.T) { f.play(t, where, end, booted) })
				})
			}
		}
	}
}

// play sets the scene, lets the fault happen to one end, and judges what follows.
func (f fault) play(t *testing.T, where string, end int, booted func()) {
	outcome, found := "FAILED", "the test did not come to its end"
	x := newExercise(t, where, booted)
	struck := x.ends[end]
	defer func() {
		t.Logf("%-6s | %s | %-55s | %s", outcome, where, struck.name+" "+f.name, found)
	}()
	for _, m := range x.ends {
		if m == struck || !f.oneWay {
			m.ping()
		}
	}
	pass(10 * time.Second)

	f.happen(x, struck)
	over := time.Now()
	for _, m := range x.ends {
		m.tell(guest.Order{Verb: guest.Mark})
	}
	serial := guest.ConfirmedAtMost(x.views())
	// If the ends have different keys, or one refuses the other's handshakes, a
	// session that was there at the end has died of it by then.
	pass(rejectAfter + 10*time.Second)
	// Without an outage for so long, the tunnel works for good: what is younger
	// than a ping's time, or an attempt of WireGuard, is not seen yet.
	const settled = 20 * time.Second
	err := eventually(max(noise*x.bound, rejectAfter+rekeyAfter)-rejectAfter+30*time.Second, func() error {
		a, b := x.views()
		switch back, _ := worst(x.pings().Outages); {
		case time.Since(over)-back < settled:
			return errors.New("pings are lost")
		case guest.ConfirmedAtMost(a, b) <= serial:
			return fmt.Errorf("no key was confirmed since: %d then", serial)
		}
		return guest.InStep(a, b)
	})
	p := x.pings()
	back, longest := worst(p.Outages)
	switch {
	case err != nil:
		t.Errorf("%v after the end: %v", time.Since(over), err)
	case p.Doubtful > p.Sent/10:
		t.Errorf("too busy to tell: of %d pings, %d were lost beside the tunnel as well", p.Sent, p.Doubtful)
	case back > noise*x.bound:
		t.Errorf("the tunnel came back after %v", back)
	case back > x.bound:
		outcome = "late"
	default:
		outcome = "ok"
	}
	found = fmt.Sprintf("back after %5.1f s | lost %4d of %4d pings, %3d of them after the end, for %5.1f s at most",
		back.Seconds(), p.Lost, p.Sent, p.Since, longest.Seconds())
	if outcome != "ok" {
		t.Logf("after the end: %+v, and %d pings in doubt", p.Outages, p.Doubtful)
		x.explain()
	}
}

// worst returns when the tunnel worked for good, after the fault's end, and for
// how long after it nothing came through at most.
func worst(outages []guest.Outage) (back, longest time.Duration) {
	const stillBroken = 2 * time.Second // by then a ping was sent, whatever else the machine did
	for _, o := range outages {
		longest = max(longest, min(o.Length, o.End))
		if o.Begin < stillBroken || o.Length > nextAttempt {
			back = max(back, o.End)
		}
	}
	return back, longest
}

// newExercise starts two machines and sets up a tunnel that is protected.
func newExercise(t *testing.T, where string, booted func()) *exercise {
	t.Helper()
	x := &exercise{t: t, bound: boundBeside}
	if where == "inside" {
		x.bound = boundInside
	}
	tunnel, beside := cable(t), cable(t)
	for i := range x.ends {
		x.ends[i] = startMachine(t, i, [2]*os.File{tunnel[i], beside[i]})
	}
	for _, m := range x.ends {
		m.answer() // to nothing yet
	}
	booted()
	keys := newKeys(t)
	for i, m := range x.ends {
		m.order(guest.Order{Verb: guest.Begin, End: i, Keys: keys, Inside: where == "inside"})
	}
	for _, m := range x.ends {
		m.answer()
	}
	if where == "inside" {
		// The link itself has made a session, so that the first key waits for
		// the next. It need not wait for two minutes.
		x.eventually("a first key", guest.Rotated)
		pass(3 * time.Second) // sooner it would not count as seen
		x.ends[0].tell(guest.Order{Verb: guest.Forget})
	}
	x.eventually("protected", guest.InStep)
	return x
}

// newKeys makes the keys that two hosts come up with.
func newKeys(t *testing.T) (k guest.Keys) {
	t.Helper()
	for i := range k.Private {
		private, err := wgtypes.GeneratePrivateKey()
		if err != nil {
			t.Fatal(err)
		}
		identity, err := link.GenerateIdentity(rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		k.Private[i], k.Identity[i] = private.String(), identity.Secret()
	}
	original, err := wgtypes.GenerateKey()
	if err != nil {
		t.Fatal(err)
	}
	k.Original = original.String()
	return k
}

// putBack takes a snapshot of a running machine and puts it back to that five
// minutes later, when the other end has erased every key that it knew then.
func (x *exercise) putBack(m *machine) {
	x.t.Helper()
	m.save()
	// Below the highest serial are those in the buffer, and the one that the
	// client has pulled.
	p := m.tell(guest.Order{Verb: guest.Look}).View.Peer
	known := p.Installed.Serial + uint64(p.Buffer.Len) + 1
	for range 7 {
		pass(40 * time.Second)
		// What its WireGuard forgets for that comes back with the snapshot.
		x.handshake(m)
	}
	if n := guest.ConfirmedAtMost(x.views()); n <= known {
		x.t.Fatalf("key %d is confirmed, and %d may be known to the snapshot", n, known)
	}
	m.putBack()
	if behind := time.Since(m.tell(guest.Order{Verb: guest.Look}).Clock); behind < 4*time.Minute {
		x.t.Errorf("the clock is %v behind after the machine was put back", behind)
	}
}

// views returns what the ends show.
func (x *exercise) views() (a, b guest.View) {
	x.t.Helper()
	look := guest.Order{Verb: guest.Look}
	return x.ends[0].tell(look).View, x.ends[1].tell(look).View
}

// pings sums up both streams.
func (x *exercise) pings() (sum guest.Pings) {
	x.t.Helper()
	for _, m := range x.ends {
		p := m.tell(guest.Order{Verb: guest.Look}).Pings
		sum.Sent += p.Sent
		sum.Lost += p.Lost
		sum.Since += p.Since
		sum.Doubtful += p.Doubtful
		sum.Outages = append(sum.Outages, p.Outages...)
	}
	return sum
}

// explain shows what both ends can tell.
func (x *exercise) explain() {
	x.t.Helper()
	for _, m := range x.ends {
		v := m.tell(guest.Order{Verb: guest.Look}).View
		x.t.Logf("%s: key %v, handshake %v, sent %d, received %d, %+v\n%s", m.name, v.Key, v.Handshake, v.Sent, v.Received, v.Peer,
			m.tell(guest.Order{Verb: guest.Explain}).Log)
	}
}

// eventually waits, while nothing is judged, until what the ends show is as it
// should be. It fails the test if that takes too long.
func (x *exercise) eventually(what string, is func(a, b guest.View) error) {
	x.t.Helper()
	if err := eventually(answerLimit, func() error { return is(x.views()) }); err != nil {
		x.explain()
		x.t.Fatalf("%s: not within %v: %v", what, answerLimit, err)
	}
}

// eventually waits until cond returns nil. After limit it returns cond's error.
func eventually(limit time.Duration, cond func() error) error {
	deadline := time.Now().Add(limit)
	tick := time.NewTicker(pollInterval)
	defer tick.Stop()
	for {
		err := cond()
		if err == nil || time.Now().After(deadline) {
			return err
		}
		<-tick.C
	}
}
