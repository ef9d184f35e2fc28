package rotation_test

import (
	"testing"
	"time"

	"keyturn/internal/rotation/rotationtest"
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
