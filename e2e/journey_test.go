//go:build e2e

package e2e

import (
	"fmt"
	"net"
	"regexp"
	"strings"
	"testing"
	"time"

	"keyturn/internal/control"
	"keyturn/internal/psk"
)

// counts is how old a key is, at least, when a handshake under it counts: 2 s,
// and the time until a poll has seen the key.
const counts = 2500 * time.Millisecond

// TestPair is the journey of two rotators with QKD and a KEM, the link beside
// the tunnel: up, three rotations without a lost ping, down.
func TestPair(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	a, b := l.host("lisbon"), l.host("porto")
	qkd := l.kmes(a, b)
	qkd.start()
	connect(a, b)
	a.handshake(b)
	pings := a.ping(b)

	kems := settings{"kems": []string{"ML-KEM-1024"}}
	confA := a.write(settings{"kms": qkd.kms(a)}, b.as().with(kems).with(qkd.peer(b)))
	confB := b.write(settings{"kms": qkd.kms(b)}, a.as().with(kems).with(qkd.peer(a)))
	a.keyturn("up", confA)
	if out := a.try("check", confA); out.code != 3 || !kmsChecked.MatchString(out.stdout) {
		t.Errorf("check with a peer that is not up: exit %d\n%s", out.code, out.stdout)
	}
	began := time.Now()
	b.keyturn("up", confB)
	// The handshake is some seconds old, its window still open: the first
	// rotation needs no other one.
	first := eventuallyRotated(t, a, b, psk.Fingerprint{})
	if d := time.Since(began); d > 3*time.Second+counts {
		t.Errorf("the first rotation took %v", d)
	}
	for _, end := range []struct{ h, p *host }{{a, b}, {b, a}} {
		if out := end.h.keyturn("check", wg0); strings.Contains(out, "failed") {
			t.Errorf("check finds fault:\n%s", out)
		}
	}

	rotateThrice(t, a, b, first)
	for _, end := range []struct{ h, p *host }{{a, b}, {b, a}} {
		end.h.towards(end.p, 5*time.Second, "all is well", func(p control.PeerStatus) error {
			switch {
			case !p.Protected || p.State != control.PeerProtected || p.Link.State != control.LinkUp || p.Link.Inside:
				return fmt.Errorf("%s, protected %t, link %+v", p.State, p.Protected, p.Link)
			case p.KMS == nil || p.KMS.State != control.KMSOK || len(p.Warnings) != 0 || p.Buffer.Len != 3 || p.Buffer.Cap != 3:
				return fmt.Errorf("kms %+v, warnings %v, buffer %v", p.KMS, p.Warnings, p.Buffer)
			case p.Installed == nil || strings.Join(p.Installed.Sources, "+") != "QKD+ML-KEM-1024":
				return fmt.Errorf("installed %+v", p.Installed)
			case p.Rotations < 4 || p.Confirmed == nil || p.Confirmed.Serial+1 < p.Installed.Serial:
				return fmt.Errorf("%d rotations, confirmed %+v", p.Rotations, p.Confirmed)
			}
			return nil
		})
		if out := end.h.keyturn("ls"); !strings.Contains(out, "up") || !strings.Contains(out, "1/1") {
			t.Errorf("ls of a rotator that is well:\n%s", out)
		}
		end.h.keyturn("status")
	}

	a.keyturn("down", wg0)
	b.towards(a, 10*time.Second, "the goodbye", func(p control.PeerStatus) error {
		if !strings.Contains(fmt.Sprint(p.Warnings), "goodbye") {
			return fmt.Errorf("warnings %v", p.Warnings)
		}
		return nil
	})
	b.keyturn("down", wg0)
	last := agree(t, a, b)
	a.handshake(b)
	mustHold(t, a, b, last)
	pings.stop().mustBeComplete(t)
	mustNotFail(t, a, b)
}

// TestHub: one rotator, one interface, three peers that differ in everything
// that peers may differ in. Each is rotated thrice while all are pinged.
func TestHub(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	hub := l.host("hub")
	spokes := []*host{l.host("lisbon"), l.host("porto"), l.host("faro")}
	qkd := l.kmes(append([]*host{hub}, spokes...)...)
	qkd.start()
	different := []settings{
		{"role": "client", "kems": []string{"ML-KEM-1024"}, "combiner": "xor"},
		{"role": "server", "kems": []string{"ML-KEM-512", "ML-KEM-768"}, "combiner": "hkdf-sha384", "buffer": 5},
		{"role": "client", "kems": nil, "combiner": "hkdf-sha384", "require": "qkd"},
	}
	var peers []settings
	var streams []*pings
	for i, s := range spokes {
		connect(hub, s)
		hub.handshake(s)
		streams = append(streams, s.ping(hub))
		common, theirs := different[i], settings{"role": "client"}
		ours := s.as().with(common)
		if common["role"] == "client" {
			theirs = settings{"role": "server", "address": nil}
		} else {
			ours = ours.with(settings{"address": nil})
		}
		towardsHub, kms := hub.as().with(common).with(theirs), settings{}
		if i != 1 { // the second works by its KEMs alone
			ours = ours.with(qkd.peer(s)).with(settings{"kms": qkd.kms(hub)})
			towardsHub, kms = towardsHub.with(qkd.peer(hub)), settings{"kms": qkd.kms(s)}
		}
		peers = append(peers, ours)
		s.keyturn("up", s.write(kms, towardsHub))
	}
	hub.keyturn("up", hub.write(nil, peers...))

	last := make([]psk.Fingerprint, len(spokes))
	for i, s := range spokes {
		last[i] = eventuallyRotated(t, hub, s, psk.Fingerprint{})
	}
	for range 3 {
		for i, s := range spokes {
			if i%2 == 0 {
				hub.handshake(s)
			} else {
				s.handshake(hub)
			}
		}
		for i, s := range spokes {
			last[i] = eventuallyRotated(t, hub, s, last[i])
		}
	}
	for i, s := range spokes {
		streams[i].stop().mustBeComplete(t)
		if hub.fingerprint(s) == hub.fingerprint(spokes[(i+1)%len(spokes)]) {
			t.Error("two spokes have the same key")
		}
	}
	mustNotFail(t, append(spokes, hub)...)
	s, err := hub.status()
	if err != nil {
		t.Fatal(err)
	}
	for i, want := range []string{"client", "server", "client"} {
		if got := s.Peers[i].Role; got != want {
			t.Errorf("the hub is %s towards %s, not %s", got, s.Peers[i].Name, want)
		}
	}
	for i, want := range []string{"QKD ML-KEM-1024", "ML-KEM-512 ML-KEM-768", "QKD"} {
		if got := strings.Join(s.Peers[i].Installed.Sources, " "); got != want {
			t.Errorf("the key of %s is of %s, not of %s", s.Peers[i].Name, got, want)
		}
	}
}

// TestFirstSession: a tunnel without any session gets its first one by the
// rotators alone, under a verified key, and traffic flows in it at once.
func TestFirstSession(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	a, b := l.host("lisbon"), l.host("porto")
	connect(a, b)
	a.keyturn("up", a.write(nil, b.as()))
	b.keyturn("up", b.write(nil, a.as()))
	for _, end := range []struct{ h, p *host }{{a, b}, {b, a}} {
		end.h.towards(end.p, 12*time.Second, "a confirmed key", func(p control.PeerStatus) error {
			if p.Confirmed == nil || p.Confirmed.Serial == 0 || !p.Protected {
				return fmt.Errorf("%s, confirmed %+v", p.State, p.Confirmed)
			}
			return nil
		})
	}
	pings := a.ping(b)
	last := agree(t, a, b)
	letCount(t)
	b.handshake(a)
	eventuallyRotated(t, a, b, last)
	pings.stop().mustBeComplete(t)
	mustNotFail(t, a, b)
}

// TestInside: the rotators talk inside the tunnel that they rotate.
func TestInside(t *testing.T) {
	t.Parallel()
	for _, safety := range []string{"initial", "manual"} {
		t.Run(safety, func(t *testing.T) {
			t.Parallel()
			l := newLab(t)
			a, b := l.host("lisbon"), l.host("porto")
			connect(a, b)
			how := settings{"recovery": "manual"}
			if safety == "initial" {
				how = settings{"fallback": "initial"}
			}
			inside := func(p *host) settings {
				return p.as().with(how).with(settings{"address": net.JoinHostPort(p.inner.String(), linkPort)})
			}
			if r := a.try("up", a.write(nil, inside(b).with(settings{"recovery": nil, "fallback": nil}))); r.code != 1 ||
				!strings.Contains(r.stderr, "inside the tunnel") {
				t.Errorf("up without any way back: exit %d\n%s", r.code, r.stderr)
			}
			key := randomKey(t)
			a.setPSK(b, key)
			b.setPSK(a, key)
			a.handshake(b)
			pings := b.ping(a)
			a.keyturn("up", a.write(nil, inside(b)))
			b.keyturn("up", b.write(nil, inside(a)))
			rotateThrice(t, a, b, eventuallyRotated(t, a, b, key.Fingerprint()))
			for _, end := range []struct{ h, p *host }{{a, b}, {b, a}} {
				end.h.towards(end.p, 5*time.Second, "a link inside", func(p control.PeerStatus) error {
					if !p.Link.Inside || !p.Protected {
						return fmt.Errorf("inside %t, protected %t", p.Link.Inside, p.Protected)
					}
					return nil
				})
			}
			pings.stop().mustBeComplete(t)
			mustNotFail(t, a, b)
		})
	}
}

// rotateThrice provokes three handshakes, from either end, and waits each time
// until both ends have the same new key.
func rotateThrice(t *testing.T, a, b *host, last psk.Fingerprint) psk.Fingerprint {
	t.Helper()
	for i := range 3 {
		if i%2 == 0 {
			a.handshake(b)
		} else {
			b.handshake(a)
		}
		last = eventuallyRotated(t, a, b, last)
	}
	return last
}

// eventuallyRotated waits until both ends have the same pre-shared key, one
// that is neither none nor last, and returns its fingerprint when the key has
// been there long enough for the next handshake to count as one under it.
func eventuallyRotated(t *testing.T, a, b *host, last psk.Fingerprint) (now psk.Fingerprint) {
	t.Helper()
	eventually(t, 10*time.Second, fmt.Sprintf("a rotation of %s and %s", a.name, b.name), func() error {
		now = a.fingerprint(b)
		if other := b.fingerprint(a); now.IsZero() || now == last || now != other {
			return fmt.Errorf("%s has %s, %s has %s, before it was %s", a.name, now, b.name, other, last)
		}
		return nil
	})
	letCount(t)
	return now
}

// letCount waits until a handshake would count as one under the installed key:
// by the protocol, that is 2 s after the key was set, or after a rotator that
// starts found it.
func letCount(t *testing.T) {
	t.Helper()
	since := time.Now()
	eventually(t, 5*time.Second, "a key that counts", func() error {
		if d := time.Since(since); d < counts {
			return fmt.Errorf("%v old", d)
		}
		return nil
	})
}

// agree waits until both ends have the same pre-shared key, and returns its
// fingerprint. It may be newer than the last one that the test waited for:
// wireguard-go begins a needless handshake now and then, 5 s after one that
// completed before its sender had set the timer for a retry.
func agree(t *testing.T, a, b *host) (now psk.Fingerprint) {
	t.Helper()
	eventually(t, 10*time.Second, fmt.Sprintf("equal keys at %s and %s", a.name, b.name), func() error {
		now = a.fingerprint(b)
		if other := b.fingerprint(a); now.IsZero() || now != other {
			return fmt.Errorf("%s has %s, %s has %s", a.name, now, b.name, other)
		}
		return nil
	})
	return now
}

// mustHold fails the test unless both ends have this key.
func mustHold(t *testing.T, a, b *host, want psk.Fingerprint) {
	t.Helper()
	if gotA, gotB := a.fingerprint(b), b.fingerprint(a); gotA != want || gotB != want {
		t.Errorf("%s has %s, %s has %s, not %s", a.name, gotA, b.name, gotB, want)
	}
}

// mustNotFail fails the test if a handshake failed.
func mustNotFail(t *testing.T, hosts ...*host) {
	t.Helper()
	for _, h := range hosts {
		if n := h.failedHandshakes(); n != 0 {
			t.Errorf("%d handshakes of %s failed", n, h.name)
		}
	}
}

var kmsChecked = regexp.MustCompile(`(?m)^kms for porto +ok `)
