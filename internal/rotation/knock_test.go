package rotation_test

import (
	"bytes"
	"testing"
	"time"

	"keyturn/internal/rotation"
	"keyturn/internal/rotation/rotationtest"
)

// A client that is merely away, with its link inside the tunnel: the server
// knocks, and walks once through its keys when nobody answers, more and more
// rarely. When the client comes back and is heard, it finds the key that it left.
func TestKnock(t *testing.T) {
	// A dump, the step and its own dump, and an attempt.
	const bound = 10 * time.Second
	for _, away := range []time.Duration{time.Minute, 10 * time.Minute, time.Hour, 24 * time.Hour} {
		for phase := range 24 {
			var trace bytes.Buffer
			w := rotationtest.New(rotationtest.Options{Seed: uint64(phase), Idle: true, Inside: true, Fallback: true, Trace: &trace})
			w.Run(5 * time.Minute)
			client, server := w.Ends[rotationtest.Client], w.Ends[rotationtest.Server]
			left := server.View().Installed
			client.Stop()
			w.Run(15 * time.Second)
			w.Tunnel.Cut = true
			w.Run(away + time.Duration(phase)*7*time.Second)
			if n := server.Notes[rotation.NoteHunting]; n > 150 {
				t.Errorf("away for %v: the server hunted, with %d steps", away, n)
			}
			if server.View().Failing {
				t.Errorf("away for %v: the server, which has nothing to send, says that nothing gets through", away)
			}
			w.Tunnel.Cut = false
			client.Start()
			w.Send(rotationtest.Client)
			if !w.Until(bound, w.Works) {
				b := trace.Bytes()
				t.Fatalf("away for %v, phase %d: the client came back, and the tunnel does not work: %s\n%s", away, phase, w.Describe(), b[max(0, len(b)-6000):])
			}
			w.Run(2 * time.Minute)
			if in := server.View().Installed; in.Serial < left.Serial {
				t.Errorf("the client came back to %v instead of %v", in, left)
			}
		}
	}
}

// The host of the client comes up at any time without its key and with its clock
// set back, while the server has nothing to send: nothing that begins there is
// heard, and no sign tells the server that somebody is there.
func TestWalk(t *testing.T) {
	for _, off := range []time.Duration{0, 30 * time.Second, 3 * time.Minute, 12 * time.Minute} {
		for phase := range 32 {
			w := rotationtest.New(rotationtest.Options{Seed: uint64(phase), Inside: true, Fallback: true, Listens: [2]bool{false, true}})
			w.Run(5 * time.Minute)
			client := w.Ends[rotationtest.Client]
			w.Handshake(rotationtest.Client)
			w.Run(time.Duration(phase) * 5 * time.Second)
			client.Reboot()
			w.Tunnel.Cut = true
			client.WallOffset -= 5 * time.Hour
			w.Run(off + time.Duration(phase)*5*time.Second)
			w.Tunnel.Cut = false
			client.Start()
			if !w.Until(180*time.Second, w.Works) {
				t.Errorf("off for %v, phase %d: not within 180s: %s", off, phase, w.Describe())
			}
		}
	}
}

// TestWalkCutShort: whatever ends a walk, it does not leave the server on another
// key than the one that it had: neither when the rotator stops, nor when WireGuard
// does not know the peer for a moment.
func TestWalkCutShort(t *testing.T) {
	for _, x := range []struct {
		name string
		cut  func(w *rotationtest.World, server *rotationtest.End)
	}{
		{"the rotator stops", func(w *rotationtest.World, server *rotationtest.End) { server.Stop() }},
		{"the peer is gone", func(w *rotationtest.World, server *rotationtest.End) {
			server.Gone = true
			w.Run(3 * time.Second)
			server.Gone = false
		}},
	} {
		t.Run(x.name, func(t *testing.T) {
			for phase := range 40 {
				w := rotationtest.New(rotationtest.Options{Seed: uint64(phase), Idle: true, Inside: true, Fallback: true})
				w.Run(5 * time.Minute)
				server := w.Ends[rotationtest.Server]
				home := server.InDevice()
				w.Ends[rotationtest.Client].Stop()
				w.Run(15 * time.Second)
				w.Tunnel.Cut = true
				w.Run(30*time.Second + time.Duration(phase)*5*time.Second)
				x.cut(w, server)
				w.Run(3 * time.Second)
				if server.InDevice() != home {
					t.Errorf("phase %d: the walk was cut short, and the server has another key", phase)
				}
				away := 0
				for range 60 {
					w.Run(10 * time.Second)
					if server.InDevice() != home {
						away++
					}
				}
				// A walk has the server on the other key for 40 s, of 155 at the least.
				if away > 24 || !server.Up() && away > 0 {
					t.Errorf("phase %d: for %d of 60 looks the server has another key", phase, away)
				}
			}
		})
	}
}

// TestVanish: a client that goes without a word, as one whose network fails, has
// the server walk as often as one that says goodbye, and not hunt for ever.
func TestVanish(t *testing.T) {
	w := rotationtest.New(rotationtest.Options{Seed: 1, Idle: true, Inside: true, Fallback: true})
	w.Run(5 * time.Minute)
	server := w.Ends[rotationtest.Server]
	home := server.InDevice()
	w.Tunnel.Cut = true
	w.Ends[rotationtest.Client].Crash()
	away := 0
	for range 6 * 60 {
		w.Run(time.Minute)
		if server.InDevice() != home {
			away++
		}
	}
	if n := server.Notes[rotation.NoteHunting]; n > 120 || away > 40 {
		t.Errorf("in six hours %d steps; for %d of 360 minutes the server has another key", n, away)
	}
}

// TestStopMet: the ends have just met on a walk's key, and the rotator of the one
// that walked is stopped before a dump has shown it.
func TestStopMet(t *testing.T) {
	for seed := range uint64(20) {
		w := rotationtest.New(rotationtest.Options{Seed: seed, Inside: true, Fallback: true, Listens: [2]bool{false, true}})
		w.Run(5 * time.Minute)
		client := w.Ends[rotationtest.Client]
		w.Handshake(rotationtest.Client)
		w.Run(time.Second)
		client.Reboot()
		w.Tunnel.Cut = true
		client.WallOffset -= 5 * time.Hour
		w.Run(20 * time.Second)
		w.Tunnel.Cut = false
		client.Start()
		for !w.Works() {
			w.Run(time.Millisecond)
		}
		w.Ends[rotationtest.Server].Stop()
		if down := w.Outage(20 * time.Minute); down > 3*time.Minute {
			t.Errorf("seed %d: the tunnel did not work for %v", seed, down)
		}
	}
}
