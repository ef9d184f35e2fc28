package kmesim_test

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"keyturn/internal/kmesim"
	"keyturn/internal/kms"
	"keyturn/internal/kms/etsi004"
	"keyturn/internal/kms/kmstls"
	"keyturn/internal/memnet"
	"keyturn/internal/psk"
)

// simNet is a pair of KMEs in a network in memory. It needs a synctest bubble.
type simNet struct {
	*testing.T
	memnet.Network
	lab   *kmesim.Lab
	pair  *kmesim.Pair
	port  string
	serve func(*kmesim.KME, context.Context, net.Listener, *tls.Config) error
	stop  func()
}

func newSimNet(t *testing.T, port string, serve func(*kmesim.KME, context.Context, net.Listener, *tls.Config) error) *simNet {
	t.Helper()
	n := &simNet{T: t, lab: newLab(t), port: port, serve: serve}
	n.start()
	t.Cleanup(func() { n.stop() })
	return n
}

// start serves a pair that knows of nothing.
func (n *simNet) start() {
	n.Helper()
	n.pair = kmesim.New(kmesim.Options{})
	ctx, cancel := context.WithCancel(context.Background())
	var served sync.WaitGroup
	for i, k := range n.kmes() {
		ln, err := n.Listen(n.address(i))
		if err != nil {
			n.Fatal(err)
		}
		served.Go(func() {
			if err := n.serve(k, ctx, ln, n.lab.ServerTLS(i)); err != nil {
				n.Error(err)
			}
		})
	}
	n.stop = sync.OnceFunc(func() { cancel(); served.Wait() })
}

func (n *simNet) restart() {
	n.Helper()
	n.stop()
	n.start()
}

func (n *simNet) kmes() [2]*kmesim.KME { return [2]*kmesim.KME{n.pair.A, n.pair.B} }

func (n *simNet) address(kme int) string {
	return [2]string{kmesim.NameA, kmesim.NameB}[kme] + ":" + n.port
}

// streamNet is one that serves key streams.
type streamNet struct {
	*simNet
	o kmesim.StreamOptions
}

func newStreamNet(t *testing.T, o kmesim.StreamOptions) *streamNet {
	t.Helper()
	return &streamNet{newSimNet(t, "25575", func(k *kmesim.KME, ctx context.Context, ln net.Listener, conf *tls.Config) error {
		return k.ServeStreams(ctx, ln, conf, o)
	}), o}
}

// client is an application that uses one KME for keys shared with one peer. Like
// a rotator it keeps its stream open.
type client struct {
	kms.Source
	stop func()
}

func (n *streamNet) client(sae, peer, kme int) *client {
	n.Helper()
	return newClient(n.T, etsi004.Config{
		URIs: []string{n.address(kme)}, SAE: kmesim.SAEName(sae), TLS: kmstls.Config{Memory: n.lab.ClientTLS(sae)},
		Dialect: n.o.Dialect.String(), Dial: n.Dial,
	}, peer)
}

func newClient(tb testing.TB, c etsi004.Config, peer int) *client {
	tb.Helper()
	k, err := etsi004.New(c)
	if err != nil {
		tb.Fatal(err)
	}
	s, err := k.For(kmesim.SAEName(peer))
	if err != nil {
		tb.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var kept sync.WaitGroup
	if keeper, ok := s.(kms.Keeper); ok {
		kept.Go(func() { keeper.Keep(ctx) })
	}
	cl := &client{Source: s, stop: sync.OnceFunc(func() {
		cancel()
		kept.Wait()
		k.Close()
	})}
	tb.Cleanup(cl.stop)
	return cl
}

// leave closes the stream and goes.
func (c *client) leave() {
	c.Close()
	c.stop()
}

// fetch gets one key at both ends.
func fetch(lead, follow kms.Source) (a, b *psk.Key, err error) {
	id, a, err := lead.Key(context.Background())
	if err != nil {
		return nil, nil, err
	}
	b, err = follow.KeyByID(context.Background(), id)
	return a, b, err
}

// flows makes sure that the ends get number keys, the same at both and none
// twice, after some tries that may fail while the two of them find each other.
func flows(tb testing.TB, lead, follow kms.Source, number, tries int) {
	tb.Helper()
	var met []*psk.Key
	for len(met) < number {
		a, b, err := fetch(lead, follow)
		if err == nil && !a.Equal(b) {
			err = errors.New("the ends got different keys")
		}
		if err != nil {
			if tries--; tries < 0 {
				tb.Fatalf("after %d keys: %v", len(met), err)
			}
			time.Sleep(time.Second)
			continue
		}
		for _, m := range met {
			if m.Equal(a) {
				tb.Fatal("a key came twice")
			}
		}
		met = append(met, a)
	}
}

var streamOptions = []kmesim.StreamOptions{
	{Dialect: kmesim.ForgeEd3},
	{Dialect: kmesim.ForgeEd3, PeerFirst: true, Metadata: true},
	{Dialect: kmesim.ForgeEd3, Hold: true},
	{Dialect: kmesim.ForgeEd1},
	{Dialect: kmesim.ForgeEd1, PeerFirst: true, Metadata: true},
	{Dialect: kmesim.ForgeEd1, Hold: true},
}

// eachStreamNet runs f in a bubble for each kind of KME, or for the plain ones.
func eachStreamNet(t *testing.T, plain bool, f func(n *streamNet)) {
	for _, o := range streamOptions {
		if plain && o != (kmesim.StreamOptions{Dialect: o.Dialect}) {
			continue
		}
		name := fmt.Sprintf("%v,peer-first=%v,hold=%v", o.Dialect, o.PeerFirst, o.Hold)
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { f(newStreamNet(t, o)) })
		})
	}
}

func TestClient004(t *testing.T) {
	eachStreamNet(t, false, func(n *streamNet) {
		for _, places := range [][2]int{{0, 1}, {1, 0}} {
			lead, follow := n.client(1, 2, places[0]), n.client(2, 1, places[1])
			flows(n, lead, follow, 5, 5)
			// And the other way round.
			flows(n, follow, lead, 2, 5)
			lead.leave()
			follow.leave()
		}
	})
}

// TestClient004AtOnce: several keys under way, as a rotator has them.
func TestClient004AtOnce(t *testing.T) {
	eachStreamNet(t, true, func(n *streamNet) {
		lead, follow := n.client(1, 2, 0), n.client(2, 1, 1)
		flows(n, lead, follow, 1, 5)
		var all sync.WaitGroup
		for range 4 {
			all.Go(func() {
				for range 3 {
					if a, b, err := fetch(lead, follow); err != nil || !a.Equal(b) {
						n.Errorf("the ends got different keys, or none: %v", err)
					}
				}
			})
		}
		all.Wait()
	})
}

// TestClient004Restarts: whoever starts anew, keys flow again.
func TestClient004Restarts(t *testing.T) {
	eachStreamNet(t, false, func(n *streamNet) {
		lead, follow := n.client(1, 2, 0), n.client(2, 1, 1)
		flows(n, lead, follow, 3, 5)
		for _, step := range []struct {
			name string
			do   func()
		}{
			{"both KMEs", n.restart},
			{"lead crashes", func() { lead.stop(); lead = n.client(1, 2, 0) }},
			{"lead leaves", func() { lead.leave(); lead = n.client(1, 2, 0) }},
			{"follow crashes", func() { follow.stop(); follow = n.client(2, 1, 1) }},
			{"follow leaves", func() { follow.leave(); follow = n.client(2, 1, 1) }},
			{"lead moves", func() { lead.stop(); lead = n.client(1, 2, 1) }},
			{"both crash", func() { lead.stop(); follow.stop(); lead, follow = n.client(1, 2, 0), n.client(2, 1, 1) }},
			{"KMEs again", n.restart},
			{"all", func() {
				lead.stop()
				follow.stop()
				n.restart()
				lead, follow = n.client(1, 2, 0), n.client(2, 1, 1)
			}},
		} {
			step.do()
			began := time.Now()
			flows(n, lead, follow, 3, 10)
			if took := time.Since(began); took > 10*time.Second {
				n.Errorf("%s: keys flow again after %v", step.name, took)
			}
		}
	})
}

// TestClient004Faults: what the client makes of each fault, and that keys flow
// again when it has passed.
func TestClient004Faults(t *testing.T) {
	eachStreamNet(t, true, func(n *streamNet) {
		lead, follow := n.client(1, 2, 0), n.client(2, 1, 1)
		flows(n, lead, follow, 1, 5)
		for _, tt := range []struckBy{
			{kme: 0, fault: "out-of-keys", lead: kms.ErrNoKeys},
			{kme: 1, fault: "late", follow: kms.ErrUnknownKey},
			{kme: 0, fault: "out-of-step", follow: kms.ErrUnknownKey},
			{kme: 1, fault: "wrong-bytes", otherBytes: true},
			{kme: 1, fault: "wrong-size", follow: errAny},
			{kme: 0, fault: "wrong-size=128", lead: errAny},
			{kme: 0, fault: "lost", lead: errAny},
			{kme: 1, fault: "lost", follow: errAny},
			{kme: 0, fault: "slow=1s"},
			{kme: 0, fault: "slow=20s", lead: errAny},
			{kme: 1, fault: "slow=20s", follow: errAny},
			{kme: 0, fault: "drip=1ms"},
			{kme: 0, fault: "drip=1s", lead: errAny},
			{kme: 0, fault: "html", lead: errAny},
			{kme: 1, fault: "html", follow: errAny},
			{kme: 0, fault: "down", lead: errAny},
			{kme: 1, fault: "down", follow: errAny},
			{kme: 0, fault: "silent", lead: errAny},
			{kme: 1, fault: "silent", follow: errAny},
			{kme: 0, fault: "silent-tls", lead: errAny},
			{kme: 0, fault: "expired", lead: errAny},
			{kme: 0, fault: "cut", lead: errAny},
		} {
			n.strike(lead, follow, tt)
			flows(n, lead, follow, 2, 5)
		}
	})
}

// errAny is any error.
var errAny = errors.New("any error")

// struckBy is a fault of a KME, and what its clients are to make of it.
type struckBy struct {
	kme        int
	fault      string
	lead       error // of Key
	follow     error // of KeyByID
	otherBytes bool
}

// strike fetches a key while a KME fails.
func (n *simNet) strike(lead, follow kms.Source, by struckBy) {
	n.Helper()
	f, err := kmesim.ParseFault(by.fault)
	if err != nil {
		n.Fatal(err)
	}
	n.kmes()[by.kme].SetFault(f)
	defer n.kmes()[by.kme].SetFault(kmesim.Fault{})
	meant := func(who string, got, want error) {
		n.Helper()
		if !errors.Is(got, want) && (want != errAny || got == nil) {
			n.Errorf("%s at kme %d: %s: %v, want %v", by.fault, by.kme, who, got, want)
		}
	}
	id, a, err := lead.Key(context.Background())
	meant("lead", err, by.lead)
	if err != nil {
		return
	}
	b, err := follow.KeyByID(context.Background(), id)
	meant("follow", err, by.follow)
	if err == nil && a.Equal(b) == by.otherBytes {
		n.Errorf("%s at kme %d: the same keys is %v", by.fault, by.kme, !by.otherBytes)
	}
}

// TestTwoProcesses004: each KME runs for itself, over loopback, and they keep in
// step over their link; either can be restarted.
func TestTwoProcesses004(t *testing.T) {
	lab := newLab(t)
	for _, d := range []kmesim.Dialect{kmesim.ForgeEd3, kmesim.ForgeEd1} {
		links, ports := freePorts(t, 2), freePorts(t, 2)
		run := func(i int) (stop func()) {
			c := kmesim.Config{
				AddrA: "127.0.0.1:0", AddrB: "127.0.0.1:0", Lab: lab,
				Only: []string{kmesim.NameA, kmesim.NameB}[i], Link: links[i], Peer: links[1-i],
				Streams: []kmesim.StreamPort{{StreamOptions: kmesim.StreamOptions{Dialect: d}, AddrA: ports[0], AddrB: ports[1]}},
			}
			ctx, cancel := context.WithCancel(context.Background())
			ready, done := make(chan struct{}), make(chan error, 1)
			go func() { done <- kmesim.Run(ctx, c, func(net.Addr, net.Addr) { close(ready) }) }()
			select {
			case <-ready:
			case err := <-done:
				t.Fatal(err)
			}
			stop = sync.OnceFunc(func() {
				cancel()
				if err := <-done; err != nil {
					t.Error(err)
				}
			})
			t.Cleanup(stop)
			return stop
		}
		stops := []func(){run(0), run(1)}
		source := func(sae, peer, kme int) *client {
			return newClient(t, etsi004.Config{
				URIs: []string{ports[kme]}, SAE: kmesim.SAEName(sae), TLS: kmstls.Config{Memory: lab.ClientTLS(sae)},
				Dialect: d.String(), Timeout: 2 * time.Second,
			}, peer)
		}
		lead, follow := source(1, 2, 0), source(2, 1, 1)
		flows(t, lead, follow, 5, 3)
		for i := range stops {
			stops[i]()
			if _, _, err := fetch(lead, follow); err == nil {
				t.Errorf("%v: a key without KME %d", d, i)
			}
			stops[i] = run(i)
			flows(t, lead, follow, 2, 5)
		}
	}
}

// freePorts returns addresses where nobody listens.
func freePorts(tb testing.TB, n int) (addrs []string) {
	tb.Helper()
	var lns []net.Listener // all at once, so that they differ
	for range n {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			tb.Fatal(err)
		}
		lns, addrs = append(lns, ln), append(addrs, ln.Addr().String())
	}
	for _, ln := range lns {
		ln.Close()
	}
	return addrs
}

// TestWrongDialect: the other dialect is turned away, not waited for.
func TestWrongDialect(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newStreamNet(t, kmesim.StreamOptions{Dialect: kmesim.ForgeEd3})
		n.o.Dialect = kmesim.ForgeEd1 // of the client
		c := n.client(1, 2, 0)
		began := time.Now()
		if _, _, err := c.Key(context.Background()); err == nil || time.Since(began) > time.Second || strings.Contains(err.Error(), "deadline") {
			t.Errorf("%v after %v", err, time.Since(began))
		}
	})
}
