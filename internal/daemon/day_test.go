package daemon_test

import (
	"testing"
	"testing/synctest"
	"time"

	"keyturn/internal/rotation"
)

// TestDay is a day of rotation under traffic; an hour with -short.
func TestDay(t *testing.T) {
	day := 24 * time.Hour
	if testing.Short() {
		day = time.Hour
	}
	synctest.Test(t, func(t *testing.T) {
		s, stop := start(t, options{})
		time.Sleep(10 * time.Second)
		if s.count(0, rotation.NoteInstalled) == 0 {
			t.Error("no rotation within 10 s of the start")
		}
		time.Sleep(day - 10*time.Second)
		traffic, failed := s.pair.Traffic(), s.pair.FailedHandshakes()
		inStep := s.inStep()
		stop()
		t.Logf("pings %d, lost %d; rotations %d, confirmed %d and %d; failed handshakes %d", traffic.Sent, traffic.Lost,
			s.count(0, rotation.NoteInstalled), s.count(0, rotation.NoteConfirmed), s.count(1, rotation.NoteConfirmed), failed)
		if traffic.Lost != 0 || failed != 0 || !inStep {
			t.Errorf("lost %d of %d pings, %d failed handshakes, in step %v", traffic.Lost, traffic.Sent, failed, inStep)
		}
		if n := s.count(1, rotation.NoteConfirmed); n < int(day/(2*time.Minute+3*time.Second)) {
			t.Errorf("%d keys confirmed in %v, want one for each handshake", n, day)
		}
	})
}
