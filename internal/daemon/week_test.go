package daemon_test

import (
	"os"
	"testing"
	"testing/synctest"
	"time"

	"keyturn/internal/rotation"
)

// TestWeek is rotation under traffic while nothing fails: a week of it with
// KEYTURN_SOAK, otherwise its first day, or hour with -short.
func TestWeek(t *testing.T) {
	span := 24 * time.Hour
	switch {
	case os.Getenv("KEYTURN_SOAK") != "":
		span *= 7
	case testing.Short():
		span = time.Hour
	}
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		began := time.Now()
		log := &tail{}
		s, stop := start(t, options{log: log})
		time.Sleep(10 * time.Second)
		if s.count(0, rotation.NoteInstalled) == 0 {
			t.Error("no rotation within 10 s of the start")
		}
		time.Sleep(span - 10*time.Second)
		traffic, failed := s.pair.Traffic(), s.pair.FailedHandshakes()
		inStep := s.inStep()
		stop()
		t.Logf("%v: pings %d, lost %d; rotations %d, confirmed %d and %d; failed handshakes %d", time.Since(began).Round(time.Minute),
			traffic.Sent, traffic.Lost, s.count(0, rotation.NoteInstalled), s.count(0, rotation.NoteConfirmed), s.count(1, rotation.NoteConfirmed), failed)
		if traffic.Lost != 0 || failed != 0 || !inStep {
			t.Errorf("lost %d of %d pings, %d failed handshakes, in step %v", traffic.Lost, traffic.Sent, failed, inStep)
		}
		if t.Failed() {
			t.Log(log.text())
		}
		if n := s.count(1, rotation.NoteConfirmed); n < int(span/(2*time.Minute+3*time.Second)) {
			t.Errorf("%d keys confirmed in %v, want one for each handshake", n, span)
		}
	})
}
