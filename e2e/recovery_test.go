//go:build e2e

package e2e

import (
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"keyturn/internal/config"
	"keyturn/internal/control"
	"keyturn/internal/psk"
)

// What a tunnel may take to work again after a fault's end. On a host that
// does other things as well, three times that passes and is shown as late: the
// hard bounds are judged in virtual time and in the VM.
const (
	boundBeside = 10 * time.Second
	boundInside = 180 * time.Second
	noise       = 3
)

// way is where the rotators talk, and what brings back a tunnel whose link
// runs inside it.
type way string

const (
	beside  way = "beside"
	initial way = "inside, fallback"
	journal way = "inside, journal"
)

func (w way) bound() time.Duration {
	if w == beside {
		return boundBeside
	}
	return boundInside
}

// exercise is one tunnel that one fault happens to.
type exercise struct {
	t          *testing.T
	way        way
	a, b       *host // client and server
	confs      map[*host]string
	kme        *kmes // nil: keys by KEMs alone
	stopKME    func()
	pings      *pings
	faultEnded time.Time
}

// fault is something that goes wrong. It ends when the function returns.
type fault struct {
	name  string
	short bool // belongs to the short half
	// lossless: nothing but the KMS or the link fails, so no packet of the
	// tunnel may be lost.
	lossless bool
	qkd      bool
	happen   func(*exercise)
}

// The parts of the network that a partition cuts, as what a host drops.
var (
	cutLink    = []string{"tcp dport " + linkPort + " drop", "tcp sport " + linkPort + " drop"}
	cutTunnel  = []string{fmt.Sprintf("udp dport %d drop", wgPort)}
	cutAnswers = []string{"tcp sport " + linkPort + " drop"} // what a server says does not arrive
)

func partition(rules []string, d time.Duration) func(*exercise) {
	return func(x *exercise) {
		x.a.filter(rules...)
		x.b.filter(rules...)
		x.wait(d)
		x.heal()
	}
}

func loss(percent int, d time.Duration) func(*exercise) {
	// On the wire only: what comes out of the tunnel passes the filter again.
	return partition([]string{fmt.Sprintf("iifname eth0 numgen random mod 100 < %d drop", percent)}, d)
}

// ends calls f for one end or both: "client", "server", "both".
func ends(which string, f func(x *exercise, h *host)) func(*exercise) {
	return func(x *exercise) {
		if which != "server" {
			f(x, x.a)
		}
		if which != "client" {
			f(x, x.b)
		}
	}
}

var faults = []fault{
	{name: "20 % of all packets lost, 7 min", happen: loss(20, 7*time.Minute)},
	{name: "50 % of all packets lost, 3 min", happen: loss(50, 3*time.Minute)},
	{name: "packets repeated and reordered, 3 min", happen: func(x *exercise) {
		x.weather(30, 30)
		x.wait(3 * time.Minute)
		x.weather(0, 0)
	}},
	{name: "link cut, 30 s", short: true, lossless: true, happen: partition(cutLink, 30*time.Second)},
	{name: "link cut, 3 min", lossless: true, happen: partition(cutLink, 3*time.Minute)},
	{name: "link cut, 10 min", lossless: true, happen: partition(cutLink, 10*time.Minute)},
	{name: "tunnel cut, 30 s", short: true, happen: partition(cutTunnel, 30*time.Second)},
	{name: "tunnel cut, 3 min", happen: partition(cutTunnel, 3*time.Minute)},
	{name: "tunnel cut, 10 min", happen: partition(cutTunnel, 10*time.Minute)},
	{name: "link and tunnel cut, 30 s", short: true, happen: partition(append(cutTunnel, cutLink...), 30*time.Second)},
	{name: "link and tunnel cut, 3 min", happen: partition(append(cutTunnel, cutLink...), 3*time.Minute)},
	{name: "link and tunnel cut, 10 min", happen: partition(append(cutTunnel, cutLink...), 10*time.Minute)},
	{name: "link silent between the two installs, 30 s", qkd: true, short: true, lossless: true, happen: betweenInstalls(30 * time.Second)},
	{name: "link silent between the two installs, 3 min", qkd: true, lossless: true, happen: betweenInstalls(3 * time.Minute)},
	{name: "link silent between the two installs, 10 min", qkd: true, lossless: true, happen: betweenInstalls(10 * time.Minute)},
	{name: "client's rotator killed", short: true, lossless: true, happen: ends("client", (*exercise).kill)},
	{name: "server's rotator killed", lossless: true, happen: ends("server", (*exercise).kill)},
	{name: "both rotators killed", short: true, lossless: true, happen: ends("both", (*exercise).kill)},
	{name: "rotators killed 12 times around rotations", lossless: true, happen: func(x *exercise) {
		for range 12 {
			x.a.handshake(x.b)
			// The commit comes 0.3 to 2 s after it.
			x.wait(time.Duration(rand.IntN(2000)) * time.Millisecond)
			ends([]string{"client", "server", "both"}[rand.IntN(3)], (*exercise).kill)(x)
			x.linked()
		}
	}},
	{name: "client rebooted", short: true, happen: ends("client", (*exercise).reboot)},
	{name: "server rebooted", happen: ends("server", (*exercise).reboot)},
	{name: "both rebooted", short: true, happen: func(x *exercise) {
		for _, h := range []*host{x.a, x.b} {
			h.crash()
		}
		for _, h := range []*host{x.a, x.b} {
			x.reboot(h)
		}
	}},
	{name: "client's interface made anew", short: true, happen: ends("client", (*exercise).remake)},
	{name: "server's interface made anew", happen: ends("server", (*exercise).remake)},
	{name: "peer removed and added at the client", happen: ends("client", (*exercise).readd)},
	{name: "peer removed and added at the server", short: true, happen: ends("server", (*exercise).readd)},
	{name: "foreign pre-shared key at the client", short: true, lossless: true, happen: ends("client", (*exercise).meddle)},
	{name: "foreign pre-shared key at the server", lossless: true, happen: ends("server", (*exercise).meddle)},
	{name: "foreign pre-shared keys at both", lossless: true, happen: ends("both", (*exercise).meddle)},
	{name: "client suspended, 4 min", happen: ends("client", (*exercise).suspend)},
	{name: "server suspended, 4 min", happen: ends("server", (*exercise).suspend)},
	{name: "client put back to a snapshot", happen: ends("client", (*exercise).restore)},
	{name: "server put back to a snapshot", short: true, happen: ends("server", (*exercise).restore)},
	{name: "KMS of both ends down, 10 min", qkd: true, lossless: true, happen: kmsFault(10*time.Minute, "--fault-a", "down", "--fault-b", "down")},
	{name: "KMS of the client out of keys, 10 min", qkd: true, lossless: true, happen: kmsFault(10*time.Minute, "--fault-a", "out-of-keys")},
	{name: "KMS of the server slow, 10 min", qkd: true, lossless: true, happen: kmsFault(10*time.Minute, "--fault-b", "slow=20s")},
	{name: "KMS of the server wrong, 1 min", short: true, qkd: true, lossless: true, happen: kmsFault(time.Minute, "--fault-b", "wrong-bytes")},
	{name: "KMS of the server wrong, 10 min", qkd: true, lossless: true, happen: kmsFault(10*time.Minute, "--fault-b", "wrong-bytes")},
	{name: "disks of both full, 3 min", lossless: true, happen: func(x *exercise) {
		ends("both", (*exercise).smallDisks)(x)
		x.prove(time.Minute)
		ends("both", (*exercise).fill)(x)
		x.busy(3 * time.Minute)
		ends("both", (*exercise).empty)(x)
	}},
}

// TestRecovery: after each fault the tunnel comes back by itself, whichever
// way the rotators talk. make faults plays all of them, and writes down what
// was measured; else the short half is played, with the link beside.
func TestRecovery(t *testing.T) {
	t.Parallel()
	report := os.Getenv("KEYTURN_FAULTS")
	rows := make(map[string]*row)
	var order []string
	t.Run("faults", func(t *testing.T) {
		for _, f := range faults {
			for _, w := range []way{beside, initial, journal} {
				if report == "" && (!f.short || w != beside && f.name != "both rebooted") {
					continue
				}
				name := f.name + "/" + string(w)
				r := &row{fault: f.name, way: w, verdict: "not judged"}
				t.Run(name, func(t *testing.T) {
					rows[name], order = r, append(order, name)
					t.Parallel()
					r.play(t, f)
				})
			}
		}
	})
	var table strings.Builder
	for _, name := range order {
		r := rows[name]
		fmt.Fprintf(&table, "| %s | %s | %d of %d | %.1f s | %s | %s |\n", r.fault, r.way, r.lost, r.sent, r.took.Seconds(), r.ends, r.verdict)
	}
	t.Logf("what was measured:\n%s", table.String())
	if report != "" {
		if err := writeReport(report, table.String()); err != nil {
			t.Error(err)
		}
	}
}

// row is what became of an exercise.
type row struct {
	fault      string
	way        way
	lost, sent int
	took       time.Duration
	ends       string
	verdict    string
}

// play sets the scene, lets the fault happen, and judges what follows.
func (r *row) play(t *testing.T, f fault) {
	x := newExercise(t, r.way, f.qkd)
	x.pings = x.a.pingEvery(x.b, 100*time.Millisecond)
	x.busy(time.Second)

	f.happen(x)
	x.faultEnded = time.Now()
	equal := x.untilEqual(noise * r.way.bound())
	x.prove(noise * r.way.bound())

	whole := x.pings.stop()
	r.sent, r.lost = whole.sent, whole.lost
	r.ends = "equal"
	r.took = max(equal.Sub(x.faultEnded), x.pings.lastLost().Sub(x.faultEnded), 0)
	switch {
	case f.lossless && r.lost > 0:
		r.verdict = "LOST PACKETS"
		t.Errorf("nothing but the KMS or the link failed: %v", whole)
	case r.took > noise*r.way.bound():
		r.verdict = "TOO LATE"
		t.Errorf("the tunnel worked again after %v: %v", r.took, whole)
	case r.took > r.way.bound():
		r.verdict = "late"
	default:
		r.verdict = "ok"
	}
}

// newExercise sets up a tunnel that is protected by a confirmed key.
func newExercise(t *testing.T, w way, qkd bool) *exercise {
	l := newLab(t)
	x := &exercise{t: t, way: w, a: l.host("lisbon"), b: l.host("porto"), confs: make(map[*host]string)}
	connect(x.a, x.b)
	share(x.a, x.b)
	if qkd {
		x.kme = l.kmes(x.a, x.b)
		x.stopKME = x.kme.start()
	}
	for _, end := range []struct{ h, p *host }{{x.a, x.b}, {x.b, x.a}} {
		if err := os.Mkdir(end.h.path("disk"), 0o700); err != nil {
			t.Fatal(err)
		}
		whole, peer := settings{}, end.p.as()
		if w != beside {
			peer["address"] = net.JoinHostPort(end.p.inner.String(), linkPort)
		}
		peer["role"] = map[*host]string{x.a: "client", x.b: "server"}[end.h]
		switch w {
		case initial:
			peer["fallback"] = "initial"
		case journal:
			key := end.h.path("journal.key")
			if err := os.WriteFile(key, []byte(end.h.keyturn("genkey")), 0o600); err != nil {
				t.Fatal(err)
			}
			whole["journal"] = settings{"path": end.h.path("disk", "journal"), "key_file": key}
		}
		if qkd {
			whole["kms"] = x.kme.kms(end.h).with(settings{"timeout": "2s"})
			peer = peer.with(x.kme.peer(end.p))
		}
		x.confs[end.h] = end.h.write(whole, peer)
		x.up(end.h)
	}
	x.a.handshake(x.b)
	x.linked()
	x.prove(time.Minute)
	return x
}

// up starts the rotator as systemd would, again and again.
func (x *exercise) up(h *host) {
	x.t.Helper()
	h.keyturn("up", x.confs[h])
}

func (x *exercise) other(h *host) *host {
	if h == x.a {
		return x.b
	}
	return x.a
}

// wait lets time pass.
func (x *exercise) wait(d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	<-timer.C
}

// busy lets time pass in which the tunnel would be rotated.
func (x *exercise) busy(d time.Duration) {
	for end := time.Now().Add(d); time.Now().Before(end); x.wait(min(10*time.Second, time.Until(end))) {
		x.a.handshake(x.b)
	}
}

// weather makes both ends' WireGuard send so many packets in a hundred twice,
// and so many after the next.
func (x *exercise) weather(repeated, overtaken int) {
	x.t.Helper()
	for _, h := range []*host{x.a, x.b} {
		if _, err := h.tell(order{Verb: "weather", Device: wg0, Repeated: repeated, Overtaken: overtaken}); err != nil {
			x.t.Fatal(err)
		}
	}
}

func (x *exercise) heal() {
	for _, h := range []*host{x.a, x.b} {
		h.filter()
	}
}

// linked waits until both rotators have their link.
func (x *exercise) linked() {
	x.t.Helper()
	for _, h := range []*host{x.a, x.b} {
		h.towards(x.other(h), noise*x.way.bound(), "a link", func(p control.PeerStatus) error {
			if p.Link.State != control.LinkUp {
				return fmt.Errorf("%s: %s", p.Link.State, p.Link.Error)
			}
			return nil
		})
	}
}

// untilEqual waits until both ends have the same key, not the original one
// unless that is the fallback, and says when.
func (x *exercise) untilEqual(limit time.Duration) (when time.Time) {
	x.t.Helper()
	eventually(x.t, limit, "equal keys", func() error {
		ours, theirs := x.a.fingerprint(x.b), x.b.fingerprint(x.a)
		if ours.IsZero() || ours != theirs {
			return fmt.Errorf("%s and %s", ours, theirs)
		}
		when = time.Now()
		return nil
	})
	return when
}

// prove shows that the tunnel does not only pass packets: handshakes succeed,
// under keys that are rotated and confirmed.
func (x *exercise) prove(limit time.Duration) {
	x.t.Helper()
	x.linked()
	last := x.a.fingerprint(x.b)
	eventually(x.t, limit, "rotation goes on", func() error {
		x.a.handshake(x.b)
		letCount(x.t)
		for _, h := range []*host{x.a, x.b} {
			s, err := h.status()
			if err != nil {
				return err
			}
			if p := s.Peers[0]; !p.Protected || p.State != control.PeerProtected {
				return fmt.Errorf("%s is %s: %s", h.name, p.State, p.Why)
			}
		}
		if now := x.a.fingerprint(x.b); now == last || now != x.b.fingerprint(x.a) || now == x.a.original[x.b].Fingerprint() {
			return fmt.Errorf("%s has %s", x.a.name, now)
		}
		return nil
	})
}

// betweenInstalls lets the server install a key and the client never hear of it.
func betweenInstalls(d time.Duration) func(*exercise) {
	return func(x *exercise) {
		for range 5 {
			if x.splitInstalls() {
				x.wait(d)
				x.heal()
				return
			}
		}
		x.t.Fatal("the server never installed a key alone")
	}
}

// splitInstalls reports whether the server has a key that the client has not.
// A commit that the server is asked for before its own dump shows the handshake
// is refused, and the client does not hear that either.
func (x *exercise) splitInstalls() bool {
	x.t.Helper()
	// A key goes in with the handshake that confirms the one before. So that the
	// link can be cut after this one is confirmed and before that one is
	// committed, the KMEs have a pause that outlasts the window.
	x.stopKME()
	eventually(x.t, 2*time.Minute, "a confirmed key and none after it", func() error {
		letCount(x.t)
		x.a.handshake(x.b)
		s, err := x.a.status()
		if err != nil {
			return err
		}
		if p := s.Peers[0]; p.Buffer.Len != 0 || p.Installed == nil || p.Confirmed == nil || p.Installed.Serial != p.Confirmed.Serial {
			return fmt.Errorf("installed %+v, confirmed %+v, buffer %v", p.Installed, p.Confirmed, p.Buffer)
		}
		return nil
	})
	x.wait(config.DefaultWindow)
	x.stopKME = x.kme.start()
	x.a.towards(x.b, time.Minute, "a key", func(p control.PeerStatus) error {
		if p.Buffer.Len == 0 {
			return fmt.Errorf("the buffer is empty")
		}
		return nil
	})
	x.a.filter(cutAnswers...)
	// Nobody waits for the handshake: with the keys apart there may be no other.
	x.a.beginHandshake(x.b)
	for range 50 {
		if x.a.fingerprint(x.b) != x.b.fingerprint(x.a) {
			return true
		}
		x.wait(pollInterval)
	}
	x.heal()
	x.linked()
	return false
}

// kill kills a rotator, which comes back a second later.
func (x *exercise) kill(h *host) {
	x.t.Helper()
	s, err := h.status()
	if err != nil {
		x.t.Fatal(err)
	}
	h.kill9(s.PID)
	x.wait(time.Second)
	x.up(h)
}

// reboot pulls the plug of a host and boots it.
func (x *exercise) reboot(h *host) {
	x.t.Helper()
	h.reboot(x.other(h))
	x.up(h)
}

// remake takes the interface away for five seconds.
func (x *exercise) remake(h *host) {
	x.t.Helper()
	h.destroyDevice()
	x.wait(5 * time.Second)
	h.createDevice()
	h.addPeer(x.other(h))
}

func (x *exercise) readd(h *host) {
	x.t.Helper()
	h.removePeer(x.other(h))
	x.wait(5 * time.Second)
	h.addPeer(x.other(h))
}

func (x *exercise) meddle(h *host) {
	x.t.Helper()
	h.setPSK(x.other(h), randomKey(x.t))
}

// suspend freezes a host, rotator and WireGuard.
func (x *exercise) suspend(h *host) {
	x.t.Helper()
	s, err := h.status()
	if err != nil {
		x.t.Fatal(err)
	}
	h.signal(s.PID, unix.SIGSTOP)
	freeze := func(s unix.Signal) {
		if err := h.process.Process.Signal(s); err != nil {
			x.t.Fatal(err)
		}
	}
	freeze(unix.SIGSTOP)
	x.wait(4 * time.Minute)
	freeze(unix.SIGCONT)
	h.signal(s.PID, unix.SIGCONT)
}

// restore takes a snapshot of a host's disks, memory disks and pre-shared key,
// rotates on, and puts the host back to it. What WireGuard had of sessions is
// lost: only a VM can bring that back.
func (x *exercise) restore(h *host) {
	x.t.Helper()
	peer, err := h.peer(x.other(h))
	if err != nil {
		x.t.Fatal(err)
	}
	key, err := psk.New(peer.PresharedKey[:])
	if err != nil {
		x.t.Fatal(err)
	}
	dirs := []string{"run", "disk", "state"}
	copyAll := func(from, to string) {
		x.t.Helper()
		for _, dir := range dirs {
			x.must(h.run("", "rm", "-rf", h.path(to, dir)))
			x.must(h.run("", "cp", "-a", h.path(from, dir), h.path(to, dir)))
		}
	}
	x.must(h.run("", "mkdir", h.path("snapshot")))
	copyAll("", "snapshot")
	x.busy(25 * time.Second)
	h.reboot(x.other(h))
	copyAll("snapshot", "")
	h.setPSK(x.other(h), key)
	x.up(h)
}

func (x *exercise) must(r result) {
	x.t.Helper()
	if r.code != 0 {
		x.t.Fatalf("exit %d: %s", r.code, r.stderr)
	}
}

// smallDisks gives a host small disks for journal and log, with what it has.
func (x *exercise) smallDisks(h *host) {
	x.t.Helper()
	h.keyturn("down", wg0)
	for _, dir := range []string{"run", "disk", "log"} {
		x.must(h.run("", "cp", "-a", h.path(dir), h.path("kept")))
		if err := h.in(func() error { return unix.Mount("tmpfs", h.path(dir), "tmpfs", 0, "size=256k,mode=700") }); err != nil {
			x.t.Fatal(err)
		}
		x.must(h.run("", "cp", "-a", h.path("kept")+"/.", h.path(dir)))
		x.must(h.run("", "rm", "-rf", h.path("kept")))
	}
	x.up(h)
}

// fill leaves no byte free on a host's small disks.
func (x *exercise) fill(h *host) {
	x.t.Helper()
	for _, dir := range []string{"run", "disk", "log"} {
		if r := h.run("", "dd", "if=/dev/zero", "bs=1k", "of="+h.path(dir, "full")); !strings.Contains(r.stderr, "No space left") {
			x.t.Fatalf("%s of %s is not full: %s", dir, h.name, r.stderr)
		}
	}
}

func (x *exercise) empty(h *host) {
	x.t.Helper()
	for _, dir := range []string{"run", "disk", "log"} {
		x.must(h.run("", "rm", h.path(dir, "full")))
	}
}

// kmsFault lets the KMEs fail while the tunnel would be rotated.
func kmsFault(d time.Duration, args ...string) func(*exercise) {
	return func(x *exercise) {
		x.stopKME()
		stop := x.kme.start(args...)
		x.busy(d)
		stop()
		x.stopKME = x.kme.start()
	}
}

// writeReport puts what was measured into the file that users read.
func writeReport(path, table string) error {
	text := "# Reliability\n\n" +
		"What `make faults` measured, which wrote this page: the real binary on pairs of hosts in network namespaces, with\n" +
		"userspace WireGuard, ten pings a second through the tunnel, and one thing after the other that goes wrong.\n" +
		"The exercises run side by side on one machine.\n\n" +
		"- *beside*: the rotators talk over the ordinary network. The tunnel has to work again within 10 s of the fault's end.\n" +
		"- *inside*: they talk through the tunnel that they rotate, with `fallback: initial` or a persistent journal: 180 s.\n" +
		"- *recovery* is the time from the fault's end until both ends have the same key and no ping is lost any more. After\n" +
		"  it, each exercise shows that handshakes succeed under keys that are rotated and confirmed.\n" +
		"- *pings lost* counts from before the fault to the end of the exercise. Where nothing but the KMS or the link\n" +
		"  fails, one lost ping is a failure.\n" +
		"- *put back to a snapshot* is played without WireGuard's own state, over several rotations: no key of the snapshot\n" +
		"  is known at the other end any more, but for the initial one or the journals' recovery key.\n" +
		"- On a machine that does other things as well, up to three times the bound passes, as *late*. The bounds\n" +
		"  themselves are judged in virtual time (`go test ./internal/daemon`) and with kernel WireGuard (`make vm`).\n\n" +
		fmt.Sprintf("Commit %s, %s, %s/%s, %d processors.\n\n", os.Getenv("KEYTURN_COMMIT"), time.Now().UTC().Format(time.DateOnly), runtime.GOOS, runtime.GOARCH, runtime.NumCPU()) +
		"| fault | link | pings lost | recovery | keys | verdict |\n|---|---|---|---|---|---|\n" + table
	return os.WriteFile(path, []byte(text), 0o644)
}
