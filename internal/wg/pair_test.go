package wg

import (
	"crypto/rand"
	"errors"
	"maps"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"keyturn/internal/psk"
)

// Sizes of WireGuard's handshake messages in bytes, as the counters see them.
const (
	initiationSize = 148
	responseSize   = 92
)

// inTunnel runs body in virtual time with a tunnel.
// pairs of all bubbles stay reachable: see Pair.
var pairs struct {
	sync.Mutex
	made []*Pair
}

func keep(p *Pair) {
	pairs.Lock()
	defer pairs.Unlock()
	pairs.made = append(pairs.made, p)
}

func inTunnel(t *testing.T, o PairOptions, body func(*testing.T, *Pair)) {
	synctest.Test(t, func(t *testing.T) {
		p, err := NewPair(o)
		if err != nil {
			t.Fatal(err)
		}
		keep(p)
		defer func() {
			if err := p.Close(); err != nil {
				t.Error(err)
			}
		}()
		body(t, p)
	})
}

func randomKey(t testing.TB) *psk.Key {
	t.Helper()
	k, err := psk.Random(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// peerOf returns what an end's device says of the other end.
func peerOf(t testing.TB, e *End) Peer {
	t.Helper()
	d, err := e.Device().Dump()
	if err != nil {
		t.Fatal(err)
	}
	if d.PublicKey != e.PublicKey() || len(d.Peers) != 1 {
		t.Fatalf("device %s has %d peers, want %s with one", d.PublicKey, len(d.Peers), e.PublicKey())
	}
	p, ok := d.Peers[e.other.PublicKey()]
	if !ok {
		t.Fatal("the other end is not a peer")
	}
	return p
}

func setPSK(t testing.TB, e *End, k *psk.Key) {
	t.Helper()
	if err := e.Device().SetPSK(e.other.PublicKey(), k); err != nil {
		t.Fatal(err)
	}
}

func pingBoth(t testing.TB, p *Pair) {
	t.Helper()
	if err := errors.Join(p.A.Ping(), p.B.Ping()); err != nil {
		t.Fatal(err)
	}
}

// connect makes the first session, from A.
func connect(t testing.TB, p *Pair) {
	t.Helper()
	if err := p.A.Ping(); err != nil {
		t.Fatal(err)
	}
	synctest.Wait()
	if got := p.A.Traffic(); got != (Traffic{Sent: 1, Answered: 1}) {
		t.Fatalf("first ping: %+v", got)
	}
}

// provoke makes A send an initiation and returns what both devices said just
// before, in the same moment of virtual time.
func provoke(t testing.TB, p *Pair) (a, b Peer) {
	t.Helper()
	for range 20 {
		a, b = peerOf(t, p.A), peerOf(t, p.B)
		if err := p.Handshake(); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if peerOf(t, p.A).Tx != a.Tx {
			return a, b
		}
		time.Sleep(time.Second) // within five seconds of the last
	}
	t.Fatal("no initiation was sent")
	return a, b
}

func TestPairRotatesWithoutLoss(t *testing.T) {
	inTunnel(t, PairOptions{PSK: randomKey(t)}, func(t *testing.T, p *Pair) {
		connect(t, p)
		var seen time.Time
		sets := 0
		for range 600 {
			if at := peerOf(t, p.A).Handshake; !at.Equal(seen) {
				seen = at
				k := randomKey(t)
				setPSK(t, p.A, k)
				setPSK(t, p.B, k)
				if !peerOf(t, p.A).PSK.Equal(k) || !peerOf(t, p.B).PSK.Equal(k) {
					t.Fatal("the key that was set is not read back")
				}
				sets++
			}
			pingBoth(t, p)
			time.Sleep(time.Second)
		}
		if want := (Traffic{Sent: 1201, Answered: 1201}); p.Traffic() != want {
			t.Errorf("traffic %+v, want %+v", p.Traffic(), want)
		}
		if sets < 5 || sets > 15 { // at 0, 120, ... 480 s, and what wireguard-go repeats
			t.Errorf("%d handshakes in ten minutes, want 5 or a few more", sets)
		}
		if n := p.FailedHandshakes(); n != 0 {
			t.Errorf("%d handshakes failed", n)
		}
	})
}

func TestPairDiesOfUnequalKeys(t *testing.T) {
	inTunnel(t, PairOptions{PSK: randomKey(t)}, func(t *testing.T, p *Pair) {
		connect(t, p)
		setPSK(t, p.A, randomKey(t))
		began := time.Now()
		var died time.Duration
		for died == 0 {
			before := p.A.Traffic().Answered
			if err := p.A.Ping(); err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Second)
			if p.A.Traffic().Answered == before {
				died = time.Since(began)
			}
			if time.Since(began) > time.Hour {
				t.Fatal("the tunnel lives on under unequal keys")
			}
		}
		if died < 180*time.Second || died > 200*time.Second {
			t.Errorf("the tunnel died after %v", died)
		}
		if n := p.FailedHandshakes(); n < 10 { // from 120 s on, one in 5.0 to 5.3 s
			t.Errorf("%d failed handshakes counted", n)
		}
		failed := p.FailedHandshakes()

		k := randomKey(t)
		setPSK(t, p.A, k)
		setPSK(t, p.B, k)
		time.Sleep(6 * time.Second) // WireGuard's own retry
		before := p.A.Traffic().Answered
		if err := p.A.Ping(); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if p.A.Traffic().Answered != before+1 {
			t.Error("the tunnel did not recover under equal keys")
		}
		time.Sleep(20 * time.Second)
		if n := p.FailedHandshakes(); n > failed+2 {
			t.Errorf("%d more failed handshakes counted after recovery", n-failed)
		}
	})
}

func TestPairCountersTellUnequalKeys(t *testing.T) {
	inTunnel(t, PairOptions{PSK: randomKey(t)}, func(t *testing.T, p *Pair) {
		connect(t, p)
		time.Sleep(30 * time.Second) // no retry of the first handshake is to come
		setPSK(t, p.B, randomKey(t))
		a, b := provoke(t, p)
		a2, b2 := peerOf(t, p.A), peerOf(t, p.B)
		if tx, rx := a2.Tx-a.Tx, a2.Rx-a.Rx; tx != initiationSize || rx != 0 {
			t.Errorf("initiator: tx +%d rx +%d, want +148 +0", tx, rx)
		}
		if tx, rx := b2.Tx-b.Tx, b2.Rx-b.Rx; tx != responseSize || rx != initiationSize {
			t.Errorf("responder: tx +%d rx +%d, want +92 +148", tx, rx)
		}
		if !a2.Handshake.Equal(a.Handshake) || !b2.Handshake.Equal(b.Handshake) {
			t.Error("the latest handshake moved")
		}
		if n := p.FailedHandshakes(); n != 0 {
			t.Errorf("%d failed handshakes within five seconds", n)
		}
		time.Sleep(6 * time.Second)
		if n := p.FailedHandshakes(); n != 1 {
			t.Errorf("%d failed handshakes after one, want 1", n)
		}
	})
}

func TestPairHandshakesOnDemand(t *testing.T) {
	inTunnel(t, PairOptions{}, func(t *testing.T, p *Pair) {
		connect(t, p)
		for range 10 {
			time.Sleep(6 * time.Second)
			before, _ := provoke(t, p)
			if !peerOf(t, p.A).Handshake.After(before.Handshake) {
				t.Fatal("no handshake")
			}
			pingBoth(t, p)
		}
		synctest.Wait()
		if got := p.Traffic(); got.Lost != 0 || got.Answered != got.Sent {
			t.Errorf("traffic %+v", got)
		}
		if n := p.FailedHandshakes(); n != 0 {
			t.Errorf("%d failed handshakes", n)
		}
	})
}

func TestPairProbe(t *testing.T) {
	inTunnel(t, PairOptions{}, func(t *testing.T, p *Pair) {
		time.Sleep(time.Minute)
		if !peerOf(t, p.A).Handshake.IsZero() {
			t.Fatal("an idle tunnel without keepalive made a handshake")
		}
		if err := p.B.Device().Probe(p.A.PublicKey()); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		a, b := peerOf(t, p.A), peerOf(t, p.B)
		if a.Handshake.IsZero() || b.Handshake.IsZero() {
			t.Error("a probe made no handshake")
		}
		if err := p.B.Device().Probe(PublicKey{1}); !errors.Is(err, ErrNoPeer) {
			t.Errorf("probe of a stranger: %v", err)
		}
	})
}

func TestPairKeepalive(t *testing.T) {
	inTunnel(t, PairOptions{Keepalive: 25 * time.Second}, func(t *testing.T, p *Pair) {
		time.Sleep(500 * time.Second)
		if at := peerOf(t, p.A).Handshake; time.Since(at) > 150*time.Second {
			t.Errorf("latest handshake %v ago under keepalive", time.Since(at))
		}
		if got := peerOf(t, p.A).Keepalive; got != 25*time.Second {
			t.Errorf("keepalive %v", got)
		}
	})
	if _, err := NewPair(PairOptions{Keepalive: time.Millisecond}); err == nil {
		t.Error("a keepalive of a millisecond was accepted")
	}
}

func TestPairLosesWhatIsDropped(t *testing.T) {
	var cut atomic.Bool
	inTunnel(t, PairOptions{Drop: func([]byte) bool { return cut.Load() }}, func(t *testing.T, p *Pair) {
		connect(t, p)
		cut.Store(true)
		pingBoth(t, p)
		synctest.Wait()
		if got := p.Traffic(); got.Lost != 0 {
			t.Errorf("lost at once: %+v", got)
		}
		time.Sleep(answerTime + time.Millisecond)
		if got := p.Traffic(); got != (Traffic{Sent: 3, Answered: 1, Lost: 2}) {
			t.Errorf("unanswered for two seconds: %+v", got)
		}
		cut.Store(false)
		pingBoth(t, p)
		synctest.Wait()
		if got := p.Traffic(); got != (Traffic{Sent: 5, Answered: 3, Lost: 2}) {
			t.Errorf("overtaken: %+v", got)
		}
	})
}

func TestPairOverLoopback(t *testing.T) {
	p, err := NewPair(PairOptions{Loopback: true, PSK: randomKey(t), Keepalive: time.Second})
	if err != nil {
		t.Fatal(err)
	}
	deadline := time.After(10 * time.Second)
	tick := time.NewTicker(10 * time.Millisecond) // real packets take real time
	defer tick.Stop()
	for p.A.Traffic().Answered == 0 {
		select {
		case <-tick.C:
			if err := p.A.Ping(); err != nil {
				t.Fatal(err)
			}
		case <-deadline:
			t.Fatal("no answer to any ping over loopback")
		}
	}
	if e := peerOf(t, p.A).Endpoint; e.Addr() != loopback() {
		t.Errorf("endpoint %v is not on loopback", e)
	}
	if err := p.Close(); err != nil {
		t.Error(err)
	}

	if _, err := p.A.Device().Dump(); !errors.Is(err, ErrNoDevice) {
		t.Errorf("dump of a closed device: %v", err)
	}
	if err := p.A.Device().SetPSK(p.B.PublicKey(), randomKey(t)); !errors.Is(err, ErrNoDevice) {
		t.Errorf("set on a closed device: %v", err)
	}
	if err := p.A.Device().Probe(p.B.PublicKey()); !errors.Is(err, ErrNoDevice) {
		t.Errorf("probe on a closed device: %v", err)
	}
	if err := p.A.Ping(); !errors.Is(err, ErrNoDevice) {
		t.Errorf("ping on a closed device: %v", err)
	}
}

// The devices that need no privileges; the third is tested in a namespace.
func TestSetPSKLikeWireGuard(t *testing.T) {
	p, err := NewPair(PairOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = p.Close() }()
	known := p.B.PublicKey()
	fake := NewFake(p.A.PublicKey(), Peer{PublicKey: known})
	for name, d := range map[string]Device{"in-process": p.A.Device(), "fake": fake} {
		t.Run(name, func(t *testing.T) {
			checkSetPSK(t, d, known)
			checkRenew(t, d, known)
		})
	}
	if got := fake.Sets(); len(got) != 2 || got[0].Peer != known {
		t.Errorf("fake recorded %v", got)
	}
}

// checkSetPSK is what every Device does.
func checkSetPSK(t *testing.T, d Device, known PublicKey) {
	t.Helper()
	read := func() *psk.Key {
		t.Helper()
		dump, err := d.Dump()
		if err != nil {
			t.Fatal(err)
		}
		if _, ok := dump.Peers[PublicKey{1}]; ok {
			t.Fatal("setting the key of a missing peer made it")
		}
		if dump.Began.IsZero() || dump.Ended.Before(dump.Began) {
			t.Error("a dump without its time")
		}
		return dump.Peers[known].PSK
	}
	if !read().IsZero() {
		t.Fatal("a peer without a key has one")
	}
	k := randomKey(t)
	if err := d.SetPSK(known, k); err != nil {
		t.Fatal(err)
	}
	if !read().Equal(k) {
		t.Error("key is not read back")
	}
	if err := d.SetPSK(known, new(psk.Key)); !errors.Is(err, ErrZeroKey) {
		t.Errorf("all-zero key: %v", err)
	}
	if !read().Equal(k) {
		t.Error("a refused key changed something")
	}
	if err := d.SetPSK(PublicKey{1}, k); err != nil {
		t.Errorf("missing peer: %v, want nil as from WireGuard", err)
	}
	read()
}

// checkRenew is what every Device does: the peer is as it was, but for what
// WireGuard itself remembered, and nothing happens to the others.
func checkRenew(t *testing.T, d Device, peer PublicKey) {
	t.Helper()
	read := func() *Dump {
		t.Helper()
		dump, err := d.Dump()
		if err != nil {
			t.Fatal(err)
		}
		return dump
	}
	before := read()
	if err := d.Renew(peer); err != nil {
		t.Fatal(err)
	}
	after := read()
	if len(after.Peers) != len(before.Peers) {
		t.Errorf("%d peers, before %d", len(after.Peers), len(before.Peers))
	}
	for k, was := range before.Peers {
		is := after.Peers[k]
		if !is.PSK.Equal(was.PSK) || is.Endpoint != was.Endpoint || is.Keepalive != was.Keepalive || !sameSet(is.AllowedIPs, was.AllowedIPs) {
			t.Errorf("peer %v: before %v %v %v, after %v %v %v", k, was.Endpoint, was.Keepalive, was.AllowedIPs, is.Endpoint, is.Keepalive, is.AllowedIPs)
		}
		if k == peer && (!is.Handshake.IsZero() || is.Rx+is.Tx != 0) {
			t.Errorf("WireGuard remembers: handshake %v, rx %d, tx %d", is.Handshake, is.Rx, is.Tx)
		}
		if k != peer && (!is.Handshake.Equal(was.Handshake) || is.Tx < was.Tx) {
			t.Errorf("peer %v was made anew as well", k)
		}
	}
	if err := d.Renew(PublicKey{1}); !errors.Is(err, ErrNoPeer) {
		t.Errorf("missing peer: %v", err)
	}
	if len(read().Peers) != len(before.Peers) {
		t.Error("renewing a missing peer made it")
	}
}

func sameSet(a, b []netip.Prefix) bool {
	set := func(s []netip.Prefix) map[netip.Prefix]bool {
		m := map[netip.Prefix]bool{}
		for _, p := range s {
			m[p] = true
		}
		return m
	}
	return len(a) == len(b) && maps.Equal(set(a), set(b))
}
