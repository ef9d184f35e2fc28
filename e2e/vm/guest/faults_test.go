//go:build vm

package guest

import (
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"keyturn/internal/kmesim"
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
	late   time.Duration // is allowed on top of the bound; why, says the fault
	with   settingsOf    // the hosts' configurations, besides the defaults
}

// run plays a fault with the link beside the tunnel or inside it, and judges:
// the tunnel works within the bound, stays so over its next handshakes, and
// both ends have rotated since and are in step.
func (f fault) run(t *testing.T, inside bool) {
	where, bound := "beside", boundBeside
	if inside {
		where, bound = "inside", boundInside
		if f.with == nil {
			f.with = withFallback
		}
	}
	t.Run(f.name+", "+where, func(t *testing.T) {
		found := "the test did not come to its end"
		defer func() {
			verdict("%-6s | %s | %-55s | %s", outcome(t), where, f.name, found)
		}()
		l := newLab(t)
		l.configure(inside, f.with)
		l.begin(inside)
		l.traffic = l.pingBoth()
		time.Sleep(10 * time.Second)
		if r := l.traffic.so(); r.lost() > 0 {
			t.Errorf("before anything went wrong: %v", r)
		}

		f.do(l)
		end, serial := time.Now(), l.confirmedAtMost()
		// If the ends have different keys, a session that was there at the
		// end has died of it by then.
		time.Sleep(max(bound, rejectAfter) + 10*time.Second)
		l.eventually(time.Minute, "in step", l.inStep)
		// The handshake that brought the tunnel back came by now, late ones but
		// for f.late. What was set after it, the next handshake confirms.
		l.eventually(f.late+rekeyAfter, "a further key", func() error { return l.confirmedSince(serial) })
		r := l.traffic.stop()
		back := r.recovery(end)
		if back > bound+f.late {
			t.Errorf("the tunnel came back after %v", back)
		}
		if f.spares && r.lost() > 0 {
			t.Errorf("nothing should have been lost: %v", r)
		}
		found = fmt.Sprintf("back after %5.1f s | lost %4d of %4d pings, %3d of them after the end",
			back.Seconds(), r.lost(), r.sent(), r.since(end).lost())
	})
}

// withFallback lets a tunnel whose link is inside it go back to the original key.
func withFallback(*host) (rotator, peer settings) { return nil, settings{"fallback": "initial"} }

// each makes of one fault one of the client, one of the server, and one of both.
func each(f fault, do func(l *lab, hosts []*host)) []fault {
	client, server, both := f, f, f
	client.name += ", client"
	client.do = func(l *lab) { do(l, []*host{l.a}) }
	server.name += ", server"
	server.do = func(l *lab) { do(l, []*host{l.b}) }
	both.name += ", both"
	both.do = func(l *lab) { do(l, []*host{l.a, l.b}) }
	return []fault{client, server, both}
}

// whileDown takes something of the hosts away and brings it back after a while.
// Two hosts come back a second apart: in the same millisecond, which does not
// happen to machines, their handshakes would cross, and neither succeed.
func whileDown(d time.Duration, down, up func(h *host)) func(l *lab, hosts []*host) {
	return func(_ *lab, hosts []*host) {
		for _, h := range hosts {
			down(h)
		}
		time.Sleep(d)
		for i, h := range hosts {
			if i > 0 {
				time.Sleep(time.Second)
			}
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

// betweenSets waits until the server has set a key, and cuts the link before
// the client hears of it: the answer would have taken half a second.
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
	l.weather(cut, besideCable)
	time.Sleep(time.Second) // for the answer, if it got through
	if l.a.peer().PresharedKey == l.b.peer().PresharedKey {
		l.t.Error("the client has set the key all the same")
	}
}

// everywhere are the faults that are the same wherever the link runs.
func everywhere() []fault {
	all := slices.Concat(
		each(fault{name: "kill -9, again after 5 s", spares: true}, whileDown(5*time.Second, (*host).kill, (*host).start)),
		each(fault{name: "reboot, 20 s"}, whileDown(20*time.Second, (*host).shutdown, (*host).boot)),
		each(fault{name: "interface deleted, again after 5 s"}, whileDown(5*time.Second, (*host).deleteDevice, (*host).createDevice)),
		each(fault{name: "peer removed, added after 5 s"}, whileDown(5*time.Second, (*host).removePeer, (*host).addPeer)),
		each(fault{name: "foreign PSK", spares: true}, func(_ *lab, hosts []*host) {
			for _, h := range hosts {
				h.setPSK(newKey(h.lab.t))
			}
		}))
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
		mixture(1), mixture(2),
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

// mixture is ten minutes in which anything happens, drawn from a seed, alone or
// under a storm.
func mixture(seed uint64) fault {
	return fault{name: fmt.Sprintf("a mixture of all, 10 min, seed %d", seed), do: func(l *lab) {
		draw := rand.New(rand.NewPCG(seed, 0))
		foreign := func(h *host) { h.setPSK(newKey(l.t)) }
		nothing := func(*host) {}
		blows := []struct{ down, up func(*host) }{
			{(*host).kill, (*host).start},
			{(*host).shutdown, (*host).boot},
			{(*host).deleteDevice, (*host).createDevice},
			{(*host).removePeer, (*host).addPeer},
			{foreign, nothing},
			{nothing, nothing},
		}
		seconds := func(from, to int) time.Duration { return time.Duration(from+draw.IntN(to-from)) * time.Second }
		for end := time.Now().Add(10 * time.Minute); time.Now().Before(end); {
			for _, cable := range []string{tunnelCable, besideCable} {
				l.weather([]weather{{}, {loss: 0.2}, {loss: 0.5}, cut}[draw.IntN(4)], cable)
			}
			blow, h := blows[draw.IntN(len(blows))], []*host{l.a, l.b}[draw.IntN(2)]
			blow.down(h)
			time.Sleep(seconds(1, 10))
			blow.up(h)
			time.Sleep(seconds(5, 60))
		}
		l.weather(weather{}, tunnelCable, besideCable)
	}}
}

// setBack gives a host the pre-shared key and the files that it had some
// minutes ago: what a snapshot brings back, but for the memory of the rotator
// and of WireGuard, which begin anew.
func (l *lab) setBack(h *host) {
	l.t.Helper()
	key, copied := h.peer().PresharedKey, h.path("snapshot")
	disks := []string{"run", "state"}
	if _, err := os.Stat(h.path("journal")); err == nil {
		disks = append(disks, "journal")
	}
	for _, d := range disks {
		h.must(copyFiles(h.path(d), filepath.Join(copied, d)))
	}
	time.Sleep(5 * time.Minute)
	if h.peer().PresharedKey == key {
		l.t.Error("nothing was rotated")
	}
	h.shutdown()
	for _, d := range disks {
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
	for _, f := range append(faults, atTheKMS()...) {
		f.run(t, false)
	}
}

// TestInside: the link runs inside the tunnel, with fallback: initial or, where
// it says so, with a journal that survives a reboot.
func TestInside(t *testing.T) {
	faults := everywhere()
	faults = append(faults, each(fault{
		name: "reboot with a journal, 20 s",
		with: withJournal,
	}, whileDown(20*time.Second, (*host).shutdown, (*host).boot))...)
	faults = append(faults,
		fault{name: "client set back, with a journal", with: withJournal, do: func(l *lab) { l.setBack(l.a) }},
		fault{name: "server set back, with a journal", with: withJournal, do: func(l *lab) { l.setBack(l.b) }})
	for _, f := range faults {
		f.run(t, true)
	}
}

// withJournal lets it survive a reboot.
func withJournal(h *host) (rotator, peer settings) {
	h.writeSecret(h.path("journal.key"))
	return settings{"journal": settings{"path": "journal", "key_file": "journal.key"}}, nil
}

// atTheKMS are ten minutes in which a KMS of either end does not do what it
// should. The simulator runs at the first host.
func atTheKMS() []fault {
	var all []fault
	for _, f := range []struct {
		name string
		args []string // none: it does not run
	}{
		{"both KMEs down", nil},
		{"the client's KME out of keys", []string{"--fault-a", "out-of-keys"}},
		{"the server's KME slow", []string{"--fault-b", "slow=1m"}},
		{"the server's KME wrong", []string{"--fault-b", "wrong-bytes"}},
	} {
		all = append(all, fault{
			name:   f.name + ", 10 min",
			spares: true,
			with:   withKMS,
			do: func(l *lab) {
				l.kmes.kill()
				if f.args == nil {
					time.Sleep(10 * time.Minute)
				} else {
					l.startKMEs(f.args...)
					time.Sleep(10 * time.Minute)
					l.kmes.kill()
				}
				l.startKMEs()
			},
		})
	}
	return all
}

const (
	kmeA = "198.51.100.1:8443"
	kmeB = "198.51.100.1:8444"
)

// withKMS lets the hosts use QKD as well, from KMEs that it starts.
func withKMS(h *host) (rotator, peer settings) {
	l, n := h.lab, 1
	at := kmeA
	if h == l.a {
		h.keyturn("kme", "init", h.path("kme"), "--saes", "2", "--name", h.beside.String())
		l.startKMEs()
	} else {
		n, at = 2, kmeB
	}
	sae := kmesim.SAEName(n)
	return settings{"kms": settings{
		"uri":              "https://" + at,
		"sae":              sae,
		"certificate":      l.a.path("kme", sae+".crt"),
		"secret_key":       l.a.path("kme", sae+".key"),
		"root_certificate": l.a.path("kme", "root.crt"),
		"timeout":          "2s",
	}}, settings{"sae": kmesim.SAEName(3 - n)}
}

// startKMEs starts the pair of KMEs.
func (l *lab) startKMEs(args ...string) {
	l.t.Helper()
	l.kmes = l.a.background("kme.log", append([]string{"kme", "--dir", l.a.path("kme"), "--a", kmeA, "--b", kmeB}, args...)...)
}
