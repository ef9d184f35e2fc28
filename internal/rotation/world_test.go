package rotation_test

import (
	"os"
	"testing"
	"time"

	"keyturn/internal/rotation/rotationtest"
)

func TestCalm(t *testing.T) {
	o := rotationtest.Options{Seed: 1}
	if testing.Verbose() {
		o.Trace = os.Stdout
	}
	w := rotationtest.New(o)
	w.Run(24 * time.Hour)
	if err := w.Err(); err != nil {
		t.Fatal(err)
	}
	n := w.Tunnel
	if n.Lost != 0 || n.Failed != 0 || w.Confirmed() < 700 {
		t.Errorf("%s, failed handshakes %d", w.Describe(), n.Failed)
	}
	t.Log(w.Describe())
}

// A tunnel without traffic: the first key goes in at once, and the probes make
// a handshake that confirms it; hours later it is renewed in the same way.
func TestCalmIdle(t *testing.T) {
	w := rotationtest.New(rotationtest.Options{Seed: 1, Idle: true})
	w.Run(15 * time.Second)
	if w.Confirmed() == 0 {
		t.Errorf("no key was confirmed in 15 s: %s", w.Describe())
	}
	w.Run(24 * time.Hour)
	if err := w.Err(); err != nil {
		t.Fatal(err)
	}
	// A key of an hour is renewed at half of that.
	if n := w.Confirmed(); n < 40 || n > 60 || w.Tunnel.Failed > 0 {
		t.Errorf("%d keys confirmed in a day, %d handshakes failed: %s", n, w.Tunnel.Failed, w.Describe())
	}
}
