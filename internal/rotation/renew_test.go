package rotation_test

import (
	"testing"
	"time"

	"keyturn/internal/rotation"
	"keyturn/internal/rotation/rotationtest"
	"keyturn/internal/wire"
)

// A peer that always says that it tries costs no more than a renewal a minute.
func TestTryingPeer(t *testing.T) {
	w := rotationtest.New(rotationtest.Options{Seed: 1})
	w.Run(5 * time.Minute)
	w.Ends[rotationtest.Client].Crash()
	w.Ends[rotationtest.Client].Start()
	server := w.Ends[rotationtest.Server]
	for range 600 {
		w.Run(time.Second)
		id, _ := server.Tunnel().Session()
		in := server.View().Installed
		w.Inject(rotationtest.Server, &wire.Report{Session: id, Seq: 1 << 40, Interval: 2 * time.Second, Installed: in, Trying: true, NoHandshake: true, Confirmed: in.Serial})
	}
	if n := server.Notes[rotation.NoteRenewed]; n > 10 {
		t.Errorf("made anew %d times in 10 minutes", n)
	}
}

// TestPutBack: a machine is put back to a snapshot of it running, and its WireGuard
// to a session that the other has given up. Both take a session for alive, and
// WireGuard alone would try to make another after 15 s.
func TestPutBack(t *testing.T) {
	for end := range 2 {
		for phase := range 20 {
			w := rotationtest.New(rotationtest.Options{Seed: uint64(phase)})
			w.Run(5*time.Minute + time.Duration(phase)*3*time.Second)
			restore := w.Ends[end].Live()
			w.Run(20 * time.Second)
			w.Handshake(1 - end)
			w.Run(130*time.Second + time.Duration(phase)*time.Second)
			confirmed := w.Confirmed()
			restore()
			if down := w.Outage(10 * time.Minute); down > 7*time.Second {
				t.Errorf("end %d, phase %d: the tunnel did not work for %v", end, phase, down)
			}
			if n := w.Ends[1-end].Notes[rotation.NoteRenewed]; n > 1 || w.Ends[end].Notes[rotation.NoteRenewed] > 0 {
				t.Errorf("end %d, phase %d: made anew %d times", end, phase, n)
			}
			if w.Confirmed() <= confirmed+3 || w.Err() != nil {
				t.Errorf("end %d, phase %d: %v: %s", end, phase, w.Err(), w.Describe())
			}
		}
	}
}

// TestLiveSession: W3 ends no session that both ends have, however old what an
// end knows of the other is.
func TestLiveSession(t *testing.T) {
	const client, server = rotationtest.Client, rotationtest.Server
	for _, x := range []struct {
		name    string
		options rotationtest.Options
		play    func(w *rotationtest.World, end int)
	}{
		{"a handshake before the first report of a peer that was put back", rotationtest.Options{}, func(w *rotationtest.World, end int) {
			restore := w.Ends[end].Live()
			w.Run(20 * time.Second)
			w.Handshake(1 - end)
			w.Run(150 * time.Second)
			restore()
			w.Run(500 * time.Millisecond)
			w.Handshake(end)
		}},
		{"a hub's newest dump is of before the handshake", rotationtest.Options{Idle: true, Hub: [2]bool{false, true}}, hubBehind},
		{"the same, the client is the hub", rotationtest.Options{Idle: true, Hub: [2]bool{true, false}}, hubBehind},
		{"the report of a handshake is late", rotationtest.Options{Idle: true}, func(w *rotationtest.World, end int) {
			w.Ends[end].Gone = true
			w.Run(3 * time.Second)
			w.Ends[end].Add()
			w.Run(1500 * time.Millisecond)
			w.Link.Cut = true
			w.Handshake(1 - end)
			w.Run(9 * time.Second)
			w.Link.Cut = false
		}},
		{"an end that sees nothing of its WireGuard", rotationtest.Options{Listens: [2]bool{true, false}}, func(w *rotationtest.World, end int) {
			w.Ends[end].Blind = true
			w.Ends[end].Crash()
			w.Ends[end].Start()
		}},
	} {
		t.Run(x.name, func(t *testing.T) {
			for end := range 2 {
				for seed := range uint64(20) {
					x.options.Seed = seed
					w := rotationtest.New(x.options)
					w.Run(5*time.Minute + time.Duration(seed)*100*time.Millisecond)
					w.Handshake(client)
					w.Run(3 * time.Second)
					w.Handshake(server)
					w.Run(10 * time.Second)
					x.play(w, end)
					w.Run(5 * time.Minute)
					if w.Ended > 0 || w.Err() != nil {
						t.Errorf("end %d, seed %d: %d sessions ended, %v", end, seed, w.Ended, w.Err())
					}
				}
			}
		})
	}
}

// hubBehind sets a clock back, and makes a handshake when the session has died.
func hubBehind(w *rotationtest.World, end int) {
	w.Ends[end].WallOffset -= 2 * time.Hour
	w.Run(4 * time.Minute)
	w.Send(end)
	w.Run(time.Minute)
	w.Send(1 - end)
}

// TestHubClock: a hub, which dumps seldom, comes up with its clock set back and is
// not heard; the other end has nothing to send, and learns from its reports that it
// has lost the session.
func TestHubClock(t *testing.T) {
	for hub := range 2 {
		for seed := range uint64(10) {
			o := rotationtest.Options{Seed: seed}
			o.Hub[hub], o.Listens[1-hub] = true, true
			w := rotationtest.New(o)
			w.Run(5 * time.Minute)
			w.Handshake(hub)
			w.Run(15 * time.Second)
			e := w.Ends[hub]
			e.WallOffset -= 5 * time.Hour
			e.Reboot()
			e.Start()
			if down := w.Outage(5 * time.Minute); down > 45*time.Second {
				t.Errorf("hub %d, seed %d: the tunnel did not work for %v", hub, seed, down)
			}
		}
	}
}

// TestFailing: an end that says that nothing gets through is right, and does so
// soon, whether the link is there or not.
func TestFailing(t *testing.T) {
	for _, inside := range []bool{false, true} {
		w := rotationtest.New(rotationtest.Options{Seed: 1, Inside: inside, Fallback: inside})
		w.Run(time.Minute)
		failing := func() (n int) {
			for _, e := range w.Ends {
				if e.View().Failing {
					n++
				}
			}
			return n
		}
		for range 600 {
			w.Run(time.Second)
			if failing() > 0 {
				t.Fatalf("inside %v: an end says that nothing gets through: %s", inside, w.Describe())
			}
		}
		w.Tunnel.Cut = true
		if !w.Until(45*time.Second, func() bool { return failing() == 2 }) {
			t.Errorf("inside %v: the tunnel is cut, and %d ends say so: %s", inside, failing(), w.Describe())
		}
		w.Tunnel.Cut = false
		if !w.Until(3*time.Minute, w.Works) || failing() > 0 && !w.Until(3*time.Second, func() bool { return failing() == 0 }) {
			t.Errorf("inside %v: the tunnel works %v, and %d ends say that nothing gets through", inside, w.Works(), failing())
		}
	}
}
