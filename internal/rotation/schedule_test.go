package rotation_test

import (
	"bytes"
	"strings"
	"testing"
	"time"

	"keyturn/internal/rotation/rotationtest"
	"keyturn/internal/wire"
)

// A commit of another session is dropped without an answer, also where the
// server could say at once that it has the key installed.
func TestOtherSession(t *testing.T) {
	var trace bytes.Buffer
	w := rotationtest.New(rotationtest.Options{Seed: 1, Trace: &trace})
	w.Run(10 * time.Second)
	server := w.Ends[rotationtest.Server]
	trace.Reset()
	w.Inject(rotationtest.Server, &wire.Commit{
		Session: wire.SessionID{1}, Attempt: 9, Key: server.View().Installed, Mode: wire.ModeRepair,
	})
	if strings.Contains(trace.String(), "committed") {
		t.Errorf("the server answers a commit of another session:\n%s", trace.String())
	}
}

// TestSchedules repeats schedules that once broke an invariant and that the
// adversary rarely finds.
func TestSchedules(t *testing.T) {
	for _, x := range []struct {
		name string
		acts []rotationtest.Act
	}{
		{"a hunt with a key that the journal refused", []rotationtest.Act{
			{Wait: 20 * time.Second, Fault: rotationtest.JournalServer, Last: 10 * time.Minute},
			{Wait: 130 * time.Second, Fault: rotationtest.CutBoth, Last: 5 * time.Minute},
			{Wait: 5 * time.Minute, Fault: rotationtest.RotateNow},
		}},
		{"a device that cannot set while nothing is in common", []rotationtest.Act{
			{Wait: 20 * time.Second, Fault: rotationtest.RebootClient, Last: time.Second},
			{Fault: rotationtest.DeviceClient, Last: 5 * time.Minute},
			{Wait: 5 * time.Minute, Fault: rotationtest.RotateNow},
		}},
	} {
		t.Run(x.name, func(t *testing.T) {
			for seed := range uint64(8) {
				w := rotationtest.New(rotationtest.Options{Seed: seed})
				for _, a := range x.acts {
					w.Strike(a)
				}
				w.Calm()
				wrong := recovered(beside)(w)
				if err := w.Err(); err != nil {
					wrong = err.Error()
				}
				if wrong != "" {
					t.Fatalf("seed %d: %s", seed, wrong)
				}
			}
		})
	}
}
