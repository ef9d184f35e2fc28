package rotation_test

import (
	"testing"
	"time"

	"keyturn/internal/rotation"
	"keyturn/internal/rotation/rotationtest"
	"keyturn/internal/wire"
)

// TestForgottenJournal: an end that loses its journal while its PSK stays, just
// after a rotation, takes the key for the PSK found. The other end must not wait
// for a confirmation that cannot come.
func TestForgottenJournal(t *testing.T) {
	for _, end := range []int{rotationtest.Client, rotationtest.Server} {
		for _, idle := range []bool{false, true} {
			w := rotationtest.New(rotationtest.Options{Seed: 1, Idle: idle})
			w.Run(5 * time.Minute)
			e := w.Ends[end]
			e.Forget()
			w.Run(3 * time.Second)
			e.Start()
			before := w.Confirmed()
			w.Run(5 * time.Minute)
			if err := w.Err(); err != nil {
				t.Errorf("end %d: %v", end, err)
			}
			if w.Confirmed() <= before || !w.InStep() {
				t.Errorf("end %d, idle %v: no key was confirmed: %s", end, idle, w.Describe())
			}
		}
	}
}

// recoveryKey returns the recovery key that an end would look for; zero if it
// has none.
func recoveryKey(w *rotationtest.World, end int) (name wire.Named) {
	for _, n := range w.Ends[end].Tunnel().Candidates() {
		if n.Serial == 0 {
			name = n
		}
	}
	return name
}

// TestRecoveryKey is S4 where only one end asks for a recovery key: the other
// has it as well, and there is a new one when an end has lost it.
func TestRecoveryKey(t *testing.T) {
	for asks := range 2 {
		wanted := true
		w := rotationtest.New(rotationtest.Options{Seed: 1, Persistent: true, Inside: true, Config: func(end int, c *rotation.Config) {
			c.Recovery = end == asks && wanted
		}})
		w.Run(10 * time.Minute)
		first := recoveryKey(w, asks)
		if first.Fingerprint.IsZero() || first != recoveryKey(w, 1-asks) {
			t.Fatalf("end %d asks: %v and %v", asks, first, recoveryKey(w, 1-asks))
		}
		w.Run(time.Hour)
		if now := recoveryKey(w, asks); now != first || now != recoveryKey(w, 1-asks) {
			t.Errorf("end %d asks: after an hour %v and %v, before %v", asks, now, recoveryKey(w, 1-asks), first)
		}
		for lost := range 2 {
			before := recoveryKey(w, lost)
			w.Ends[lost].Forget()
			w.Ends[lost].Start()
			w.Run(10 * time.Minute)
			if now := recoveryKey(w, asks); now.Fingerprint.IsZero() || now == before || now != recoveryKey(w, 1-asks) {
				t.Errorf("end %d asks, end %d has lost it: %v and %v, before %v", asks, lost, recoveryKey(w, 0), recoveryKey(w, 1), before)
			}
		}
		// Nobody asks any more, and with one journal it goes from the other.
		wanted = false
		w.Ends[asks].Forget()
		w.Ends[asks].Start()
		w.Run(10 * time.Minute)
		for end := range 2 {
			if k := recoveryKey(w, end); !k.Fingerprint.IsZero() {
				t.Errorf("end %d has kept %v", end, k)
			}
		}
		if err := w.Err(); err != nil {
			t.Error(err)
		}
	}
}
