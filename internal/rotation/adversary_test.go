package rotation_test

import (
	"bytes"
	"flag"
	"fmt"
	"os"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"pgregory.net/rapid"

	"keyturn/internal/rotation"
	"keyturn/internal/rotation/rotationtest"
)

// The faults by what they strike.
var (
	linkFaults = []rotationtest.Fault{
		rotationtest.CutLink, rotationtest.Lossy, rotationtest.Twofold, rotationtest.Overtaken, rotationtest.BreakLink,
	}
	kmsFaults = []rotationtest.Fault{
		rotationtest.KMSDownClient, rotationtest.KMSDownServer, rotationtest.KMSWrong, rotationtest.KMSZero,
		rotationtest.KMSReuse, rotationtest.KMSSlow,
	}
	localFaults = []rotationtest.Fault{
		rotationtest.JournalClient, rotationtest.JournalServer, rotationtest.DoubtJournalClient, rotationtest.DoubtJournalServer,
		rotationtest.DoubtDeviceClient, rotationtest.DoubtDeviceServer,
	}
	deviceFaults = []rotationtest.Fault{rotationtest.DeviceClient, rotationtest.DeviceServer}
)

func act(faults ...rotationtest.Fault) *rapid.Generator[rotationtest.Act] {
	return rapid.Custom(func(t *rapid.T) rotationtest.Act {
		return rotationtest.Act{
			Wait:  time.Duration(rapid.IntRange(0, 200_000).Draw(t, "wait")) * time.Millisecond,
			Fault: rapid.SampledFrom(faults).Draw(t, "fault"),
			Last:  time.Duration(rapid.IntRange(0, 240_000).Draw(t, "last")) * time.Millisecond,
			Steps: rapid.IntRange(0, 40).Draw(t, "steps"),
		}
	})
}

// every returns all faults.
func every() (faults []rotationtest.Fault) {
	for f := range rotationtest.Faults {
		faults = append(faults, f)
	}
	return faults
}

// check runs a world and shows the schedule's trace where it fails.
func check(t *rapid.T, o rotationtest.Options, faults []rotationtest.Fault, judge func(*rotationtest.World) string) {
	o.Seed = rapid.Uint64().Draw(t, "seed")
	acts := rapid.SliceOfN(act(faults...), 1, 12).Draw(t, "acts")
	rest := time.Duration(rapid.IntRange(0, 300_000).Draw(t, "rest")) * time.Millisecond
	run := func(o rotationtest.Options) (*rotationtest.World, string) {
		w := rotationtest.New(o)
		if o.Inside && !o.Fallback {
			// Whoever changes the PSK of a tunnel that was never rotated, with
			// nothing to fall back on, has closed it for good; so has whoever
			// goes back to a snapshot of that time.
			w.Run(5 * time.Minute)
		}
		for _, a := range acts {
			w.Strike(a)
		}
		w.Run(rest)
		w.Calm()
		wrong := judge(w)
		if err := w.Err(); err != nil {
			wrong = err.Error()
		}
		return w, wrong
	}
	w, wrong := run(o)
	steps.Add(int64(w.Steps))
	worlds.Add(1)
	if wrong == "" {
		return
	}
	// A world is drawn from its seed: the trace of the second run is that of the first.
	var trace bytes.Buffer
	o.Trace = &trace
	w, wrong = run(o)
	b := trace.Bytes()
	t.Fatalf("%s\n%s\n%s", wrong, w.Describe(), b[max(0, len(b)-20000):])
}

// steps and worlds count what all properties took.
var steps, worlds atomic.Int64

// recovered says what has not come back in time after the adversary stopped.
func recovered(bound time.Duration) func(*rotationtest.World) string {
	return func(w *rotationtest.World) string {
		bound, step := bound, 30*time.Second
		for _, e := range w.Ends {
			if e.View().Foreign > 1 {
				bound, step = bound+time.Minute, step+time.Minute // the backoff against another tool
			}
		}
		if !w.Until(bound, w.Reachable) {
			return fmt.Sprintf("the tunnel does not work %v after the last fault", bound)
		}
		if !w.Until(step, w.InStep) {
			return fmt.Sprintf("the ends are not in step %v after the tunnel came back", step)
		}
		before := w.Confirmed()
		if !w.Until(w.MaxKeyAge/2+10*time.Minute, func() bool { return w.Confirmed() > before }) {
			return "no new key was confirmed"
		}
		if w.Behind() {
			// WireGuard refuses handshakes, and the session at hand ends by that.
			if down := w.Outage(10 * time.Minute); down > bound {
				return fmt.Sprintf("after a clock went back the tunnel did not work for %v", down)
			}
		}
		w.Run(time.Minute) // a handshake of before may still be tried again
		lost, failed := w.Tunnel.Lost, w.Tunnel.Failed
		w.Run(10 * time.Minute)
		if (w.Tunnel.Lost != lost || w.Tunnel.Failed != failed) && !w.Behind() {
			return "packets or handshakes are still lost in calm"
		}
		if !w.InStep() {
			return "the ends fell out of step in calm"
		}
		return ""
	}
}

// Bounds of recovery after the last fault. Beside the tunnel: a dial (3 s, and
// up to 2 s until the next), a bootstrap, a fresh key, a report (2 s), the
// repair, and WireGuard's own retry (5.4 s).
const (
	beside = 20 * time.Second
	inside = 180*time.Second + 20*time.Second
	// Where a hub beats every 15 s, the silence of a dead link lasts a minute.
	besideHub = beside + time.Minute
	insideHub = inside + time.Minute
)

// TestAdversary is the property: whatever happens, no unverified or erased key
// goes in, the ends keep a key in common, and when the adversary stops the
// tunnel comes back and new keys are confirmed.
func TestAdversary(t *testing.T) {
	for _, x := range []struct {
		name    string
		options rotationtest.Options
		bound   time.Duration
	}{
		{"beside", rotationtest.Options{}, beside},
		{"idle", rotationtest.Options{Idle: true}, beside},
		{"any", rotationtest.Options{Require: rotation.RequireAny}, beside},
		{"qkd", rotationtest.Options{Require: rotation.RequireQKD}, beside},
		{"pqc", rotationtest.Options{Require: rotation.RequirePQC}, beside},
		{"fallback", rotationtest.Options{Fallback: true}, beside},
		{"block stale", rotationtest.Options{BlockStale: true, MaxKeyAge: 5 * time.Minute}, beside},
		{"block start", rotationtest.Options{BlockStart: true, BlockStale: true, MaxKeyAge: 10 * time.Minute}, beside},
		{"hub is server", rotationtest.Options{Hub: [2]bool{false, true}}, besideHub},
		{"hub is client", rotationtest.Options{Hub: [2]bool{true, false}}, besideHub},
		{"inside with fallback", rotationtest.Options{Inside: true, Fallback: true}, inside},
		{"inside with fallback, hub", rotationtest.Options{Inside: true, Fallback: true, Hub: [2]bool{false, true}}, insideHub},
		{"inside with journal", rotationtest.Options{Inside: true, Persistent: true}, inside},
		{"only the client sends", rotationtest.Options{Listens: [2]bool{false, true}}, beside},
		{"only the server sends", rotationtest.Options{Listens: [2]bool{true, false}}, beside},
		{"inside with fallback, only the client sends", rotationtest.Options{Inside: true, Fallback: true, Listens: [2]bool{false, true}}, inside},
		{"inside with fallback, only the server sends", rotationtest.Options{Inside: true, Fallback: true, Listens: [2]bool{true, false}}, inside},
		{"inside with journal, only the client sends", rotationtest.Options{Inside: true, Persistent: true, Listens: [2]bool{false, true}}, inside},
		{"inside with journal, only the server sends", rotationtest.Options{Inside: true, Persistent: true, Listens: [2]bool{true, false}}, inside},
	} {
		t.Run(x.name, func(t *testing.T) {
			rapid.Check(t, func(t *rapid.T) { check(t, x.options, every(), recovered(x.bound)) })
		})
	}
}

// TestNoLoss is the promise that rotation costs no packet: while nothing but
// the link, the KMS, the disk or the rotators fail, not one ping is lost. Nor
// is one while WireGuard cannot be set, as long as the ends can talk: without a
// link, an end that cannot be set can neither repair nor hunt.
func TestNoLoss(t *testing.T) {
	faults := slices.Concat([]rotationtest.Fault{rotationtest.RotateNow, rotationtest.CrashClient, rotationtest.CrashServer}, linkFaults, kmsFaults, localFaults)
	for _, x := range []struct {
		name    string
		options rotationtest.Options
		faults  []rotationtest.Fault
	}{
		{"beside", rotationtest.Options{}, faults},
		{"inside", rotationtest.Options{Inside: true, Fallback: true}, faults},
		{"hub is server", rotationtest.Options{Hub: [2]bool{false, true}}, faults},
		{"device", rotationtest.Options{}, slices.Concat(deviceFaults, kmsFaults, []rotationtest.Fault{rotationtest.RotateNow})},
	} {
		t.Run(x.name, func(t *testing.T) {
			rapid.Check(t, func(t *rapid.T) {
				check(t, x.options, x.faults, func(w *rotationtest.World) string {
					w.Run(10 * time.Minute)
					if w.Tunnel.Lost > 0 {
						return fmt.Sprintf("%d pings were lost", w.Tunnel.Lost)
					}
					return ""
				})
			})
		})
	}
}

// TestMain lets KEYTURN_SOAK say how often each property is checked, with seeds
// drawn at random. Without it the runs are few and always the same ones: what
// gates a change must not depend on luck.
func TestMain(m *testing.M) {
	flag.Parse()
	if os.Getenv("KEYTURN_SOAK") == "" && flag.Lookup("rapid.seed").Value.String() == "0" {
		if err := flag.Set("rapid.seed", "1"); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(2)
		}
	}
	if n := os.Getenv("KEYTURN_SOAK"); n != "" {
		if err := flag.Set("rapid.checks", n); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(2)
		}
	}
	code := m.Run()
	if n := worlds.Load(); n > 0 && testing.Verbose() {
		fmt.Printf("the adversary met %d worlds, in which the machines took %d steps\n", n, steps.Load())
	}
	os.Exit(code)
}
