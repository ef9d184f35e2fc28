//go:build vm

package guest

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// What DESIGN promises after the end of any fault, for the link beside the
// tunnel and inside it.
const (
	boundBeside = 10 * time.Second
	boundInside = 180 * time.Second
)

// fault is one thing that goes wrong.
type fault struct {
	name string
	// do breaks something and returns when nothing is broken any more.
	do func(l *lab)
	// spares: the tunnel does not lose a packet over it.
	spares bool
	// rotator and peer are settings of both ends.
	rotator, peer settings
}

// run plays a fault with the link beside the tunnel or inside it, and judges:
// the tunnel works within the bound, stays so over its next handshakes, and
// both ends have rotated since and are in step.
func (f fault) run(t *testing.T, inside bool) {
	l := newLab(t)
	bound, where := boundBeside, "beside"
	if inside {
		bound, where = boundInside, "inside"
	}
	l.configure(inside, f.rotator, f.peer)
	l.a.start()
	l.b.start()
	l.eventually(20*time.Second, "protected", l.inStep)
	both := l.pingBoth()
	time.Sleep(10 * time.Second)
	if r := both.so(); r.lost() > 0 {
		t.Errorf("before anything went wrong: %v", r)
	}

	f.do(l)
	end, serial := time.Now(), l.confirmedAtMost()
	// A session that was there at the end has died of different keys by now,
	// if they are different.
	time.Sleep(bound + rejectAfter + 10*time.Second)
	l.eventually(time.Minute, "in step", l.inStep)
	r := both.stop()
	back := r.recovery(end)
	if back > bound {
		t.Errorf("the tunnel came back after %v", back)
	}
	if f.spares && r.lost() > 0 {
		t.Errorf("nothing should have been lost: %v", r)
	}
	if n := l.confirmedAtMost(); n <= serial {
		t.Errorf("no key was confirmed since: %d then, %d now", serial, n)
	}
	word := "ok"
	if t.Failed() {
		word = "FAILED"
	}
	verdict("%-6s | %-6s | %-55s | %6.1f s | %5d of %5d lost, %4d after the end", word, where, f.name,
		back.Seconds(), r.lost(), r.sent(), r.since(end).lost())
}

// each returns a fault for the client, one for the server, and one for both.
func each(name string, do func(l *lab, hosts []*host)) []fault {
	return []fault{
		{name: name + " (client)", do: func(l *lab) { do(l, []*host{l.a}) }},
		{name: name + " (server)", do: func(l *lab) { do(l, []*host{l.b}) }},
		{name: name + " (both)", do: func(l *lab) { do(l, []*host{l.a, l.b}) }},
	}
}

// whileDown takes something of the hosts away and brings it back after a while.
func whileDown(d time.Duration, down, up func(h *host)) func(l *lab, hosts []*host) {
	return func(_ *lab, hosts []*host) {
		for _, h := range hosts {
			down(h)
		}
		time.Sleep(d)
		for _, h := range hosts {
			up(h)
		}
	}
}

// cutFor loses everything on some cables for a while.
func cutFor(d time.Duration, cables ...string) func(l *lab) {
	return func(l *lab) { l.storm(cut, d, cables...) }
}

// storm is weather that passes.
func (l *lab) storm(w weather, d time.Duration, cables ...string) {
	l.t.Helper()
	l.weather(w, cables...)
	time.Sleep(d)
	l.weather(weather{}, cables...)
}

// betweenSets waits until the server has set a key that the client does not
// know of yet, for its answer takes half a second.
func (l *lab) betweenSets() {
	l.t.Helper()
	before := l.b.peer().PresharedKey
	l.b.weather(besideCable, weather{delay: 500 * time.Millisecond})
	l.eventually(3*time.Minute, "a set of the server", func() error {
		if l.b.peer().PresharedKey == before {
			return fmt.Errorf("it has not set one")
		}
		return nil
	})
	l.b.weather(besideCable, cut)
	l.a.weather(besideCable, cut)
	if l.a.peer().PresharedKey == l.b.peer().PresharedKey {
		l.t.Error("the client was faster than the test")
	}
}

// everywhere are the faults that are the same wherever the link runs.
func everywhere() []fault {
	var all []fault
	all = append(all, each("kill -9, again after 5 s", whileDown(5*time.Second, (*host).kill, (*host).start))...)
	all = append(all, each("reboot, 20 s", whileDown(20*time.Second, (*host).shutdown, (*host).boot))...)
	all = append(all, each("interface deleted, made anew after 5 s", whileDown(5*time.Second, (*host).deleteDevice, (*host).createDevice))...)
	all = append(all, each("peer removed, added after 5 s", whileDown(5*time.Second, (*host).removePeer, (*host).addPeer))...)
	all = append(all, each("foreign PSK", func(_ *lab, hosts []*host) {
		for _, h := range hosts {
			h.setPSK(newKey(h.lab.t))
		}
	})...)
	for _, d := range []time.Duration{30 * time.Second, 3 * time.Minute, 10 * time.Minute} {
		all = append(all, fault{name: fmt.Sprintf("everything cut, %v", d), do: cutFor(d, tunnelCable, besideCable)})
	}
	return append(all,
		fault{name: "20 % loss, repetition, reordering, 7 min", do: func(l *lab) {
			w := weather{loss: 0.2, repetition: 0.1, reordering: 0.1, delay: 30 * time.Millisecond}
			l.storm(w, 7*time.Minute, tunnelCable, besideCable)
		}},
		fault{name: "50 % loss, 7 min", do: func(l *lab) {
			l.storm(weather{loss: 0.5}, 7*time.Minute, tunnelCable, besideCable)
		}},
		fault{name: "everything cut 3 min, kill -9 of both in it", do: func(l *lab) {
			l.weather(cut, tunnelCable, besideCable)
			time.Sleep(2 * time.Minute)
			l.a.kill()
			l.b.kill()
			l.a.start()
			l.b.start()
			time.Sleep(time.Minute)
			l.weather(weather{}, tunnelCable, besideCable)
		}},
		fault{name: "everything cut 3 min, reboot of the server in it", do: func(l *lab) {
			l.weather(cut, tunnelCable, besideCable)
			time.Sleep(time.Minute)
			l.b.shutdown()
			time.Sleep(20 * time.Second)
			l.b.boot()
			time.Sleep(100 * time.Second)
			l.weather(weather{}, tunnelCable, besideCable)
		}},
		fault{name: "client set back to what it was 5 min ago", do: func(l *lab) { l.setBack(l.a) }},
		fault{name: "server set back to what it was 5 min ago", do: func(l *lab) { l.setBack(l.b) }},
		fault{name: "disk full for journal and log, 10 min", spares: true, do: func(l *lab) {
			for _, end := range l.hosts() {
				end[0].fillDisk()
			}
			time.Sleep(10 * time.Minute)
			for _, end := range l.hosts() {
				end[0].freeDisk()
			}
		}},
	)
}

// setBack gives a host the pre-shared key and the files that it had some
// minutes ago: what a snapshot brings back, but for the memory of the rotator
// and of WireGuard, which begin anew.
func (l *lab) setBack(h *host) {
	l.t.Helper()
	key, copied := h.peer().PresharedKey, h.path("snapshot")
	for _, d := range []string{"run", "state"} {
		h.must(copyFiles(h.path(d), filepath.Join(copied, d)))
	}
	time.Sleep(5 * time.Minute)
	if h.peer().PresharedKey == key {
		l.t.Error("nothing was rotated")
	}
	h.shutdown()
	for _, d := range []string{"run", "state"} {
		h.must(os.RemoveAll(h.path(d)))
		h.must(os.Rename(filepath.Join(copied, d), h.path(d)))
	}
	time.Sleep(5 * time.Second)
	h.createDevice()
	h.setPSK(key)
	h.start()
}

// copyFiles copies a directory, but for sockets.
func copyFiles(from, to string) error {
	return filepath.WalkDir(from, func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(from, name)
		if err != nil {
			return err
		}
		target := filepath.Join(to, rel)
		if d.IsDir() {
			return os.MkdirAll(target, 0o700)
		}
		if !d.Type().IsRegular() {
			return nil
		}
		b, err := os.ReadFile(name)
		if err != nil {
			return err
		}
		return os.WriteFile(target, b, 0o600)
	})
}

// fillDisk leaves no room where the host's journal and log lie.
func (h *host) fillDisk() {
	h.lab.t.Helper()
	f, err := os.Create(h.path("ballast"))
	h.must(err)
	defer f.Close()
	for block := make([]byte, 64<<10); err == nil; {
		_, err = f.Write(block)
	}
	if !errors.Is(err, unix.ENOSPC) {
		h.must(err)
	}
}

func (h *host) freeDisk() {
	h.lab.t.Helper()
	h.must(os.Remove(h.path("ballast")))
}

// TestBeside: the link runs beside the tunnel, over another cable.
func TestBeside(t *testing.T) {
	faults := everywhere()
	for _, d := range []time.Duration{30 * time.Second, 3 * time.Minute, 10 * time.Minute} {
		faults = append(faults,
			fault{name: fmt.Sprintf("link cut, %v", d), spares: true, do: cutFor(d, besideCable)},
			fault{name: fmt.Sprintf("tunnel cut, %v", d), do: cutFor(d, tunnelCable)})
	}
	faults = append(faults,
		fault{name: "link cut between the two sets, 10 min", spares: true, do: func(l *lab) {
			l.betweenSets()
			time.Sleep(10 * time.Minute)
			l.weather(weather{}, besideCable)
		}},
		fault{name: "kill -9 of the client between the two sets", do: func(l *lab) {
			l.betweenSets()
			l.a.kill()
			l.weather(weather{}, besideCable)
			l.a.start()
		}},
		fault{name: "reboot of the server between the two sets", do: func(l *lab) {
			l.betweenSets()
			l.b.shutdown()
			l.weather(weather{}, besideCable)
			time.Sleep(20 * time.Second)
			l.b.boot()
		}})
	for _, f := range faults {
		t.Run(f.name, func(t *testing.T) { f.run(t, false) })
	}
}

// TestInside: the link runs inside the tunnel, with fallback: initial.
func TestInside(t *testing.T) {
	for _, f := range everywhere() {
		f.peer = settings{"fallback": "initial"}
		t.Run(f.name, func(t *testing.T) { f.run(t, true) })
	}
}
