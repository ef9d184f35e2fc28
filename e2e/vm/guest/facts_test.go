//go:build vm

package guest

import (
	"errors"
	"fmt"
	"net"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"keyturn/internal/psk"
	"keyturn/internal/wg"
)

// What the protocol takes for granted of WireGuard (docs/PROTOCOL.md, 6 and 7),
// on the kernel's own. Sizes and times of handshakes are those of WireGuard's
// paper, section 5.4 and 6.1.
const (
	initiationSize = 148
	responseSize   = 92

	rekeyAfter  = 120 * time.Second
	rejectAfter = 180 * time.Second
	// An attempt every 5 s and up to 333 ms, in ticks of 4 ms, and its answer.
	nextAttempt = 5500 * time.Millisecond
)

// openHere opens the first host's interface with the real adapter.
func (l *lab) openHere() *wg.System {
	l.t.Helper()
	d, err := wg.Open(wg0)
	if err != nil {
		l.t.Fatal(err)
	}
	l.t.Cleanup(func() {
		if err := d.Close(); err != nil {
			l.t.Error(err)
		}
	})
	return d
}

// adapterPeer returns what the real adapter says of the second host.
func (l *lab) adapterPeer(d *wg.System) wg.Peer {
	l.t.Helper()
	dump, err := d.Dump()
	if err != nil {
		l.t.Fatal(err)
	}
	l.t.Cleanup(dump.Wipe)
	p, ok := dump.Peers[wg.PublicKey(l.b.public())]
	if !ok {
		l.t.Fatal("the dump lacks the peer")
	}
	return p
}

func toKey(t *testing.T, k wgtypes.Key) *psk.Key {
	t.Helper()
	key, err := psk.New(k[:])
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// handshake waits until both ends stamp another handshake than these.
func (l *lab) handshake(limit time.Duration, a, b time.Time) time.Duration {
	l.t.Helper()
	return l.eventually(limit, "a handshake", func() error {
		if l.a.peer().LastHandshakeTime.Equal(a) || l.b.peer().LastHandshakeTime.Equal(b) {
			return fmt.Errorf("none yet: %v %v", l.a.peer().LastHandshakeTime, l.b.peer().LastHandshakeTime)
		}
		return nil
	})
}

// stamps returns the latest handshake at both ends.
func (l *lab) stamps() (a, b time.Time) {
	l.t.Helper()
	return l.a.peer().LastHandshakeTime, l.b.peer().LastHandshakeTime
}

// TestFactsSet: setting a pre-shared key, at one end or both, leaves a live
// session and everything else of the peer alone; it takes effect at the next
// handshake.
func TestFactsSet(t *testing.T) {
	l := newLabHere(t)
	d := l.openHere()
	both := l.pingBoth()
	l.handshake(10*time.Second, time.Time{}, time.Time{})
	before := l.adapterPeer(d)
	_, stampB := l.stamps()

	var key wgtypes.Key
	const sets = 20
	for range sets {
		key = newKey(t)
		if err := d.SetPSK(wg.PublicKey(l.b.public()), toKey(t, key)); err != nil {
			t.Fatal(err)
		}
		time.Sleep(2 * time.Second) // the ends differ
		l.b.setPSK(key)
		time.Sleep(2 * time.Second)
	}
	after := l.adapterPeer(d)
	if !after.PSK.Equal(toKey(t, key)) {
		t.Error("the key is not read back")
	}
	if !after.Handshake.Equal(before.Handshake) || after.Endpoint != before.Endpoint ||
		!slices.Equal(after.AllowedIPs, before.AllowedIPs) || after.Keepalive != before.Keepalive {
		t.Errorf("before: %v %v %v, after: %v %v %v", before.Handshake, before.Endpoint, before.AllowedIPs,
			after.Handshake, after.Endpoint, after.AllowedIPs)
	}
	took := l.handshake(rekeyAfter, before.Handshake, stampB)
	time.Sleep(10 * time.Second)
	r := both.stop()
	if r.lost() > 0 {
		t.Error(r)
	}
	verdict("fact: %d keys set in a live session at one end, then the other: %v; the next handshake %.0f s later, under the last of them",
		sets, r, took.Seconds())
}

// TestFactsDiffer: with different keys the session lives on to its 180 s, then
// traffic stops. Counters tell: each attempt is +148 sent and nothing received
// at the initiator, +148 received and +92 sent at the responder; both stamps
// stand still. Once the keys are equal, WireGuard's next attempt succeeds.
func TestFactsDiffer(t *testing.T) {
	l := newLabHere(t)
	pings := l.a.ping(l.b) // from one end only: it is the initiator
	l.handshake(10*time.Second, time.Time{}, time.Time{})
	born := time.Now()
	stampA, stampB := l.stamps()
	l.a.setPSK(newKey(t))

	time.Sleep(rejectAfter + 20*time.Second)
	var died time.Duration
	for _, p := range pings.so() {
		if died == 0 && p.lost() {
			died = p.at.Sub(born)
		}
	}
	if died < rejectAfter-2*time.Second || died > rejectAfter+2*time.Second {
		t.Errorf("traffic stopped after %v", died)
	}

	a, b := l.a.peer(), l.b.peer()
	time.Sleep(30 * time.Second)
	a2, b2 := l.a.peer(), l.b.peer()
	attempts := (a2.TransmitBytes - a.TransmitBytes) / initiationSize
	for _, c := range []struct {
		what string
		got  int64
		each int64
	}{
		{"initiator, sent", a2.TransmitBytes - a.TransmitBytes, initiationSize},
		{"initiator, received", a2.ReceiveBytes - a.ReceiveBytes, 0},
		{"responder, received", b2.ReceiveBytes - b.ReceiveBytes, initiationSize},
		{"responder, sent", b2.TransmitBytes - b.TransmitBytes, responseSize},
	} {
		if c.got != c.each*attempts {
			t.Errorf("%s: %+d bytes in %d attempts", c.what, c.got, attempts)
		}
	}
	if attempts < 5 || attempts > 6 {
		t.Errorf("%d attempts in 30 s", attempts)
	}
	if s, r := l.stamps(); !s.Equal(stampA) || !r.Equal(stampB) {
		t.Error("a stamp has moved")
	}

	l.a.setPSK(l.a.original)
	equal := time.Now()
	time.Sleep(10 * time.Second)
	back := pings.stop().recovery(equal)
	if back > nextAttempt {
		t.Errorf("recovery took %v", back)
	}
	verdict("fact: different keys: traffic stopped %.1f s after the handshake; %d attempts in 30 s, +148/+0 and +148/+92 each; back %.1f s after the keys were equal",
		died.Seconds(), attempts, back.Seconds())
}

// TestFactsStamp: the initiator stamps a handshake when message 2 arrives, the
// responder at the first packet of the new session. When that packet is late,
// the responder's stamp can come after it was given another key than the one
// that the handshake ran under. So a handshake counts as seen only with a
// distance from the set (C5).
func TestFactsStamp(t *testing.T) {
	l := newLabHere(t)
	l.b.weather(tunnelCable, weather{delay: time.Second}) // message 2 is on its way for as long
	pings := l.a.ping(l.b)
	l.eventually(5*time.Second, "message 1", func() error {
		if l.b.peer().ReceiveBytes == 0 {
			return errors.New("it has not arrived")
		}
		return nil
	})
	l.a.weather(tunnelCable, cut)
	l.eventually(3*time.Second, "message 2", func() error {
		if l.a.peer().LastHandshakeTime.IsZero() {
			return errors.New("it has not arrived")
		}
		return nil
	})
	if !l.b.peer().LastHandshakeTime.IsZero() {
		t.Fatal("the responder stamps although nothing of the session has arrived")
	}
	l.b.setPSK(newKey(t))
	l.a.weather(tunnelCable, weather{})
	late := l.eventually(2*time.Second, "the responder's stamp", func() error {
		if l.b.peer().LastHandshakeTime.IsZero() {
			return errors.New("none")
		}
		return nil
	})
	pings.stop()
	verdict("fact: the responder stamps at the first packet of the session, here %.1f s after its key had been changed", late.Seconds())
}

// TestFactsPeer: a key for a peer that does not exist is taken and goes
// nowhere; none at all removes the key; probes say why nothing can be sent.
func TestFactsPeer(t *testing.T) {
	l := newLabHere(t)
	d := l.openHere()
	b := wg.PublicKey(l.b.public())
	stranger := newKey(t).PublicKey()
	if err := d.SetPSK(wg.PublicKey(stranger), toKey(t, newKey(t))); err != nil {
		t.Errorf("set for a peer that does not exist: %v", err)
	}
	dump, err := d.Dump()
	if err != nil {
		t.Fatal(err)
	}
	defer dump.Wipe()
	if len(dump.Peers) != 1 {
		t.Errorf("%d peers", len(dump.Peers))
	}
	if !l.adapterPeer(d).PSK.Equal(toKey(t, l.a.original)) {
		t.Error("the peer's key has changed")
	}
	if err := d.SetPSK(b, nil); err != nil {
		t.Fatal(err)
	}
	if !l.adapterPeer(d).PSK.IsZero() {
		t.Error("the key is not removed")
	}

	if err := d.Probe(wg.PublicKey(stranger)); !errors.Is(err, wg.ErrNoPeer) {
		t.Errorf("probe of a stranger: %v", err)
	}
	l.a.configure(wgtypes.Config{Peers: []wgtypes.PeerConfig{{
		PublicKey:  stranger,
		AllowedIPs: []net.IPNet{{IP: net.IPv4(10, 99, 0, 9).To4(), Mask: net.CIDRMask(32, 32)}},
	}}})
	l.adapterPeer(d) // a dump, from which a probe takes its address
	if err := d.Probe(wg.PublicKey(stranger)); !errors.Is(err, unix.EDESTADDRREQ) {
		t.Errorf("probe of a peer without endpoint: %v", err)
	}
	l.a.removePeer()
	if err := d.Probe(b); !errors.Is(err, wg.ErrNoPeer) {
		t.Errorf("probe of a peer that was removed: %v", err)
	}

	l.a.deleteDevice()
	if _, err := d.Dump(); !errors.Is(err, wg.ErrNoDevice) {
		t.Errorf("dump of an interface that was deleted: %v", err)
	}
	if err := d.SetPSK(b, toKey(t, newKey(t))); !errors.Is(err, wg.ErrNoDevice) {
		t.Errorf("set on it: %v", err)
	}
	l.a.createDevice()
	if l.adapterPeer(d); t.Failed() {
		return
	}
	verdict("fact: a key for a peer that does not exist is taken and goes nowhere; none removes the key; errors are told apart")
}

// TestFactsProbe: a probe makes a handshake where there is no session, and none
// where there is; an idle tunnel makes none; with a keepalive it makes one
// every 120 to 145 s.
func TestFactsProbe(t *testing.T) {
	l := newLabHere(t)
	d := l.openHere()
	probe := func() {
		t.Helper()
		if err := d.Probe(wg.PublicKey(l.b.public())); err != nil {
			t.Fatal(err)
		}
	}
	probe()
	first := l.handshake(time.Second, time.Time{}, time.Time{})
	a, b := l.stamps()
	still := func(d time.Duration, what string) {
		t.Helper()
		time.Sleep(d)
		if a2, b2 := l.stamps(); !a2.Equal(a) || !b2.Equal(b) {
			t.Errorf("a handshake %s", what)
		}
	}
	probe()
	still(100*time.Second, "although the session was young")
	still(300*time.Second, "on an idle tunnel")
	probe()
	again := l.handshake(time.Second, a, b)
	a, b = l.stamps()
	still(200*time.Second, "on a tunnel that is idle again")

	every := 25 * time.Second
	l.a.configure(wgtypes.Config{Peers: []wgtypes.PeerConfig{{
		PublicKey: l.b.public(), UpdateOnly: true, PersistentKeepaliveInterval: &every,
	}}})
	l.handshake(time.Second, a, b)
	var pauses []string
	for range 3 {
		a, b = l.stamps()
		pause := l.handshake(150*time.Second, a, b)
		if pause < rekeyAfter-2*time.Second || pause > rekeyAfter+every+time.Second {
			t.Errorf("a handshake after %v", pause)
		}
		pauses = append(pauses, fmt.Sprintf("%.0f s", pause.Seconds()))
	}
	verdict("fact: a probe makes a handshake within %.1f s, only without a session; idle 400 s: none; with a keepalive of 25 s after %v",
		max(first, again).Seconds(), pauses)
}

// TestFactsClock: a responder refuses an initiation whose time is not above the
// last one's. After the clock of a host was set back its initiations are
// refused for as long; a session that lives is left alone, and what the other
// end begins succeeds, which it does by itself where it had something to send.
func TestFactsClock(t *testing.T) {
	l := newLab(t)
	const hours = 5 * time.Hour
	// All of the guest has one clock. In the eyes of the second host that of
	// the first was set back if the last initiation came from the future.
	moveClock(t, hours)
	pings := l.a.ping(l.b)
	a, b := l.stamps()
	l.handshake(5*time.Second, a, b)
	born := time.Now()
	moveClock(t, -hours)
	time.Sleep(rejectAfter + 40*time.Second)
	r := pings.stop()
	back := r.recovery(born)
	if back < rejectAfter || r.lost() == 0 {
		t.Errorf("%v until %v: the responder should have refused", r, back)
	}
	if after := r.since(born.Add(rejectAfter + 30*time.Second)); after.lost() > 0 {
		t.Errorf("long after the other end should have begun: %v", after)
	}
	verdict("fact: after its clock went back %.0f h the initiations of a host are refused (%d pings lost), until the other end begins, %.0f s after the session's death",
		hours.Hours(), r.lost(), (back - rejectAfter).Seconds())

	// Where both have initiated from the future, neither is heard.
	moveClock(t, hours)
	for _, end := range l.hosts() {
		end[0].deleteDevice()
		end[0].createDevice()
	}
	for _, end := range l.hosts() {
		a, b := l.stamps()
		pings := end[0].ping(end[1])
		l.handshake(5*time.Second, a, b)
		pings.stop()
		time.Sleep(rejectAfter)
	}
	moveClock(t, -hours)
	both := l.pingBoth()
	time.Sleep(60 * time.Second)
	if r := both.so(); r.lost() < r.sent() {
		t.Errorf("after both clocks went back: %v", r)
	}
	l.a.removePeer()
	l.a.addPeer()
	mended := time.Now()
	time.Sleep(15 * time.Second)
	r2 := both.stop()
	if back = r2.recovery(mended); back > nextAttempt {
		t.Errorf("after the peer was made anew: %v", r2)
	}
	verdict("fact: after both clocks went back neither end is heard, for as long; to remove the peer at one end and add it mends that, within %.1f s", back.Seconds())
}
