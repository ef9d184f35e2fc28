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
