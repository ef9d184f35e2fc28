package daemon_test

import (
	"testing"
	"testing/synctest"
	"time"

	"keyturn/internal/rotation"
)

func TestDay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, stop := start(t, options{})
		time.Sleep(10 * time.Second)
		if s.count(0, rotation.NoteInstalled) == 0 {
			t.Error("no rotation within 10 s of the start")
		}
		time.Sleep(24*time.Hour - 10*time.Second)
		traffic, failed := s.pair.Traffic(), s.pair.FailedHandshakes()
		inStep := s.inStep()
		stop()
		t.Logf("pings %d, lost %d; rotations %d, confirmed %d and %d; failed handshakes %d", traffic.Sent, traffic.Lost,
			s.count(0, rotation.NoteInstalled), s.count(0, rotation.NoteConfirmed), s.count(1, rotation.NoteConfirmed), failed)
		if traffic.Lost != 0 || failed != 0 || !inStep {
			t.Errorf("lost %d of %d pings, %d failed handshakes, in step %v", traffic.Lost, traffic.Sent, failed, inStep)
		}
		if n := s.count(1, rotation.NoteConfirmed); n < 700 {
			t.Errorf("%d keys confirmed in a day, want at least 700", n)
		}
	})
}
