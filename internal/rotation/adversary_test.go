package rotation_test

import (
	"bytes"
	"testing"
	"time"

	"pgregory.net/rapid"

	"keyturn/internal/rotation/rotationtest"
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

func all() []rotationtest.Fault {
	var faults []rotationtest.Fault
	for f := range rotationtest.Faults {
		faults = append(faults, f)
	}
	return faults
}

// check runs a world and shows the schedule's trace where it fails.
func check(t *rapid.T, o rotationtest.Options, faults []rotationtest.Fault, judge func(*rotationtest.World) string) {
	var trace bytes.Buffer
	o.Seed = rapid.Uint64().Draw(t, "seed")
	o.Trace = &trace
	w := rotationtest.New(o)
	for _, a := range rapid.SliceOfN(act(faults...), 1, 12).Draw(t, "acts") {
		w.Strike(a)
	}
	w.Run(time.Duration(rapid.IntRange(0, 300_000).Draw(t, "rest")) * time.Millisecond)
	w.Calm()
	wrong := judge(w)
	if err := w.Err(); err != nil {
		wrong = err.Error()
	}
	if wrong != "" {
		b := trace.Bytes()
		t.Fatalf("%s\n%s\n%s", wrong, w.Describe(), b[max(0, len(b)-20000):])
	}
}

// recovered says what has not come back in time after the adversary stopped.
func recovered(bound time.Duration) func(*rotationtest.World) string {
	return func(w *rotationtest.World) string {
		if !w.Until(bound, func() bool { return w.Works() }) {
			return "the tunnel does not work " + bound.String() + " after the last fault"
		}
		if !w.Until(bound, w.InStep) {
			return "the ends are not in step " + bound.String() + " after the tunnel came back"
		}
		before := w.Confirmed()
		if !w.Until(600*time.Second, func() bool { return w.Confirmed() > before }) {
			return "no new key was confirmed"
		}
		w.Run(time.Minute) // a handshake of before may still be tried again
		lost, failed := w.Tunnel.Lost, w.Tunnel.Failed
		w.Run(10 * time.Minute)
		if w.Tunnel.Lost != lost || w.Tunnel.Failed != failed {
			return "packets or handshakes are still lost in calm"
		}
		if !w.InStep() {
			return "the ends fell out of step in calm"
		}
		return ""
	}
}

// TestAdversary is the property: whatever happens, no unverified or erased key
// goes in, the ends keep a key in common, and when the adversary stops the
// tunnel comes back and new keys are confirmed.
func TestAdversary(t *testing.T) {
	t.Run("beside", func(t *testing.T) {
		rapid.Check(t, func(t *rapid.T) {
			check(t, rotationtest.Options{}, all(), recovered(30*time.Second))
		})
	})
}
