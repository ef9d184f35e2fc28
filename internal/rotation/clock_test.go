package rotation_test

import (
	"bytes"
	"testing"
	"time"

	"keyturn/internal/rotation"
	"keyturn/internal/rotation/rotationtest"
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
