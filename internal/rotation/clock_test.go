package rotation_test

import (
	"bytes"
	"testing"
	"time"

	"keyturn/internal/rotation"
	"keyturn/internal/rotation/rotationtest"
	"keyturn/internal/wire"
)

// TestClock is section 7.5: WireGuard refuses a handshake that begins at an end
// whose clock has gone back, until the clock has caught up. Whichever clocks go
// back, and whoever sends, the tunnel is away for no longer than the bound, and
// keys go on being confirmed.
func TestClock(t *testing.T) {
	const hours = -5 * time.Hour
	client, server, both := []int{rotationtest.Client}, []int{rotationtest.Server}, []int{rotationtest.Client, rotationtest.Server}
	// Both ends have begun a handshake, or only one.
	begun := func(ends []int) func(*rotationtest.World) {
		return func(w *rotationtest.World) {
			for _, i := range ends {
				w.Handshake(i)
				w.Run(10 * time.Second)
			}
		}
	}
	restart := func(w *rotationtest.World) {
		begun(both)(w)
		w.Ends[rotationtest.Server].Crash()
		w.Ends[rotationtest.Server].Start()
	}
	for _, x := range []struct {
		name    string
		ends    []int // whose clock goes back
		options rotationtest.Options
		before  func(*rotationtest.World)
		reboot  bool // as the clock goes back
		renews  bool // the peer is made anew
	}{
		{name: "both have begun, both go back", ends: both, before: begun(both), renews: true},
		{name: "both have begun, the client last, both go back", ends: both, before: begun([]int{rotationtest.Server, rotationtest.Client}), renews: true},
		{name: "both have begun, both go back, only the client sends", ends: both, before: begun(both), options: rotationtest.Options{Listens: [2]bool{false, true}}, renews: true},
		{name: "both have begun, both go back, only the server sends", ends: both, before: begun(both), options: rotationtest.Options{Listens: [2]bool{true, false}}, renews: true},
		{name: "both have begun, the client's goes back", ends: client, before: begun(both)},
		{name: "both have begun, the server's goes back", ends: server, before: begun(both)},
		{name: "the client's goes back, only the client sends", ends: client, options: rotationtest.Options{Listens: [2]bool{false, true}}},
		{name: "the server's goes back, only the server sends", ends: server, options: rotationtest.Options{Listens: [2]bool{true, false}}},
		{name: "the client reboots, its clock goes back, only the client sends", ends: client, before: begun(both), options: rotationtest.Options{Listens: [2]bool{false, true}}, reboot: true, renews: true},
		{name: "the server reboots, its clock goes back, only the server sends", ends: server, before: begun(both), options: rotationtest.Options{Listens: [2]bool{true, false}}, reboot: true, renews: true},
		{name: "the client reboots, its clock goes back, the server has just restarted, only the client sends", ends: client, before: restart, options: rotationtest.Options{Listens: [2]bool{false, true}}, reboot: true, renews: true},
		{name: "both reboot, both go back", ends: both, before: begun(both), reboot: true},
		{name: "the clock goes ahead", ends: nil, before: begun(both)},
	} {
		for _, where := range []struct {
			name               string
			inside, persistent bool
			bound              time.Duration
		}{
			{"beside", false, false, 10 * time.Second},
			{"inside with fallback", true, false, 180 * time.Second},
			{"inside with a journal", true, true, 180 * time.Second},
		} {
			t.Run(x.name+", "+where.name, func(t *testing.T) {
				seeds := uint64(4)
				if testing.Short() {
					seeds = 1
				}
				for seed := range seeds {
					o := x.options
					o.Seed, o.Inside = seed, where.inside
					o.Persistent, o.Fallback = where.persistent, where.inside && !where.persistent
					var trace bytes.Buffer
					o.Trace = &trace
					w := rotationtest.New(o)
					w.Run(5 * time.Minute)
					if x.before != nil {
						x.before(w)
					}
					confirmed := w.Confirmed()
					for _, i := range x.ends {
						w.Ends[i].WallOffset += hours
						if x.reboot {
							w.Ends[i].Reboot()
							w.Ends[i].Start()
						}
					}
					if x.ends == nil {
						w.Ends[0].WallOffset -= hours
					}
					down := w.Outage(20 * time.Minute)
					renewed := w.Ends[0].Notes[rotation.NoteRenewed] + w.Ends[1].Notes[rotation.NoteRenewed]
					switch {
					case w.Err() != nil:
						t.Error(w.Err())
					case down > where.bound:
						t.Errorf("seed %d: the tunnel did not work for %v", seed, down)
					case w.Confirmed() < confirmed+7:
						t.Errorf("seed %d: %d keys were confirmed in 20 minutes", seed, w.Confirmed()-confirmed)
					case !where.inside && x.renews != (renewed > 0):
						t.Errorf("seed %d: the peer was made anew %d times, want it %v", seed, renewed, x.renews)
					}
					if t.Failed() {
						b := trace.Bytes()
						t.Fatalf("%s\n%s", w.Describe(), b[max(0, len(b)-6000):])
					}
					if seed == 0 {
						t.Logf("away for %v; made anew %d times", down, renewed)
					}
				}
			})
		}
	}
}

// A clock that is set, forward or back by a little, and a tunnel that is used
// seldom: no peer is made anew, for its session is alive.
func TestClockSetRight(t *testing.T) {
	for _, step := range []time.Duration{6 * time.Second, -6 * time.Second, time.Hour} {
		for _, gap := range []time.Duration{time.Second, 8 * time.Second, 20 * time.Second, time.Minute} {
			for end := range 2 {
				w := rotationtest.New(rotationtest.Options{Seed: 1, Idle: true})
				for i := range 60 {
					w.Send(i % 2)
					w.Run(gap)
					if i%5 == 4 {
						w.Ends[end].WallOffset += step
					}
				}
				if n := w.Ends[0].Notes[rotation.NoteRenewed] + w.Ends[1].Notes[rotation.NoteRenewed]; n > 0 || w.Err() != nil {
					t.Errorf("step %v at end %d, a packet each %v: %d made anew, %v", step, end, gap, n, w.Err())
				}
			}
		}
	}
}

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
