package etsi004

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"net"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"keyturn/internal/kms"
	"keyturn/internal/psk"
)

// manners are in what KMSs differ, for the standard leaves it open.
type manners struct {
	// patient KMSs deliver nothing before both ends have opened the stream.
	patient bool
	// forgiving ones open what is open as if it were not, and keep its keys.
	forgiving bool
	// holding ones keep a stream that one end has closed from that end, until
	// the other has closed it, too.
	holding bool
	// sharing ones let one end close the stream for both.
	sharing bool
}

func (m manners) String() string {
	names := []string{"plain"}
	for i, has := range []bool{m.patient, m.forgiving, m.holding, m.sharing} {
		if has {
			names = append(names, []string{"patient", "forgiving", "holding", "sharing"}[i])
		}
	}
	return strings.Join(names[min(1, len(names)-1):], " ")
}

// pair is two KMEs in step, made by hand, each with one host. Keys are a
// function of the stream, the association and the index; each is delivered
// once to each end.
type pair struct {
	manners
	d *dialect

	mu      sync.Mutex
	streams map[string]*association
	made    int
}

type association struct {
	number int // of all associations: its keys are its own
	open   [2]bool
	held   [2]time.Time // closed by this end then, and not by the other
	taken  [2]map[uint32]bool
}

func (p *pair) associate(id string) *association {
	p.made++
	a := &association{number: p.made, taken: [2]map[uint32]bool{{}, {}}}
	p.streams[id] = a
	return a
}

// restart makes one KME forget everything. The other notices.
func (p *pair) restart(side int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for id, a := range p.streams {
		fresh := p.associate(id)
		fresh.open[1-side], fresh.held[1-side] = a.open[1-side], a.held[1-side]
	}
}

// opened says which ends have how many streams open.
func (p *pair) opened() (n [2]int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, a := range p.streams {
		for side := range n {
			if a.open[side] {
				n[side]++
			}
		}
	}
	return n
}

func (p *pair) handle(side int) func(request) answer {
	return func(r request) answer {
		p.mu.Lock()
		defer p.mu.Unlock()
		id := string(r.id())
		switch r.service {
		case 2:
			if id == string(make([]byte, 16)) {
				id = fmt.Sprintf("allocated %6d", p.made)
			}
			return p.open(side, r, id)
		case 4:
			return p.get(side, r, p.streams[id])
		}
		if a := p.streams[id]; a != nil && a.open[side] {
			p.close(side, id, a)
		}
		return saysNo(p.d, r, 0)
	}
}

func (p *pair) open(side int, r request, id string) answer {
	a := p.streams[id]
	if a == nil {
		a = p.associate(id)
	}
	if since := a.held[side]; !since.IsZero() && time.Since(since) > askedTTL {
		a = p.associate(id)
	}
	if a.open[side] && !p.forgiving || !a.held[side].IsZero() {
		return saysNo(p.d, r, 5)
	}
	a.open[side] = true
	if a.open[1-side] {
		return saysOpen(p.d, r, 0, 32, []byte(id))
	}
	return saysOpen(p.d, r, 1, 32, []byte(id))
}

func (p *pair) close(side int, id string, a *association) {
	other := a.open[1-side]
	switch {
	case p.sharing || !other:
		delete(p.streams, id)
	case p.holding:
		a.open[side], a.held[side] = false, time.Now()
	default:
		// What is opened next under this name has other keys.
		p.associate(id).open[1-side] = true
	}
}

func (p *pair) get(side int, r request, a *association) answer {
	switch {
	case a == nil || !a.open[side], p.patient && !a.open[1-side]:
		return saysNo(p.d, r, 3)
	case a.taken[side][r.index()]:
		return saysNo(p.d, r, 2)
	}
	a.taken[side][r.index()] = true
	key := sha256.Sum256(u32(uint32(a.number), r.index()))
	return saysKey(p.d, r, r.index(), key[:])
}

// world is two ends at a pair of KMEs. Keys that were ever had are remembered.
type world struct {
	t    *testing.T
	n    *network
	pair *pair
	a, b *Source // leads, follows
	keys map[[32]byte]bool
	ids  map[string]bool
}

func newWorld(t *testing.T, n *network, d *dialect, m manners) *world {
	w := &world{
		t: t, n: n, keys: make(map[[32]byte]bool), ids: make(map[string]bool),
		pair: &pair{manners: m, d: d, streams: make(map[string]*association)},
	}
	n.serve(kmeA, w.pair.handle(0))
	n.serve(kmeB, w.pair.handle(1))
	return w
}

// start is a process of one end, from its beginning; crash ends it without
// another word, stop in good order.
func (w *world) start(sae, peer, uri string) (s *Source, crash, stop func()) {
	s = w.n.source(sae, peer, Config{Dialect: w.pair.d.name, URIs: []string{uri}})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { s.Keep(ctx); close(done) }()
	crash = func() { cancel(); <-done }
	w.t.Cleanup(crash)
	stop = func() {
		crash()
		if err := s.Close(); err != nil {
			w.t.Error(err)
		}
	}
	synctest.Wait()
	return s, crash, stop
}

func (w *world) startA() (crash, stop func()) {
	w.a, crash, stop = w.start("sae_a", "sae_b", kmeA)
	return crash, stop
}

func (w *world) startB() (crash, stop func()) {
	w.b, crash, stop = w.start("sae_b", "sae_a", kmeB)
	return crash, stop
}

// transfer has both ends take a key. It says whether that worked; a key that
// differs, or was had before, or an ID that was, fails the test.
func (w *world) transfer() error {
	w.t.Helper()
	id, key, err := w.a.Key(w.t.Context())
	if err != nil {
		return err
	}
	if w.ids[id] {
		w.t.Errorf("ID %q comes twice", id)
	}
	w.ids[id] = true
	w.fresh(key)
	same, err := w.b.KeyByID(w.t.Context(), id)
	if err != nil {
		return err
	}
	if !bytes.Equal(same.Bytes(), key.Bytes()) {
		return fmt.Errorf("the ends have different keys for %q", id)
	}
	return nil
}

func (w *world) fresh(key *psk.Key) {
	w.t.Helper()
	k := [32]byte(key.Bytes())
	if w.keys[k] {
		w.t.Error("a key comes twice")
	}
	w.keys[k] = true
}

// within repeats transfer until it works, which must be soon.
func (w *world) within(what string, limit time.Duration) {
	w.t.Helper()
	began := time.Now()
	var errs []error
	for {
		err := w.transfer()
		if err == nil {
			break
		}
		errs = append(errs, err)
		if time.Since(began) > 2*limit+time.Minute {
			w.t.Fatalf("%s: no key for so long: %v", what, errs[len(errs)-1])
		}
		time.Sleep(max(time.Second, limit/30))
	}
	if took := time.Since(began); took > limit {
		w.t.Errorf("%s: took %v, over %v: %v", what, took, limit, errs[len(errs)-1])
	}
	for range 3 {
		if err := w.transfer(); err != nil {
			w.t.Errorf("%s, and then: %v", what, err)
		}
	}
}

// meet has the first keys flow.
func (w *world) meet() {
	w.t.Helper()
	if w.pair.patient && w.pair.forgiving && w.pair.sharing {
		w.within("start", keepLate) // the leader cannot but close what the follower has opened
		return
	}
	w.within("start", 0)
}

// inWorlds runs a scenario with KMSs of all manners that go together.
func inWorlds(t *testing.T, scenario func(t *testing.T, w *world)) {
	for i := range 16 {
		m := manners{i&1 != 0, i&2 != 0, i&4 != 0, i&8 != 0}
		if m.holding && (m.sharing || m.forgiving) {
			continue
		}
		for i := range dialects {
			if d := &dialects[i]; d.persistent || m == (manners{}) { // the faster one
				t.Run(d.name+" "+m.String(), func(t *testing.T) {
					synctest.Test(t, func(t *testing.T) { scenario(t, newWorld(t, newNetwork(t), d, m)) })
				})
			}
		}
	}
}

// keepLate is when Keep has looked after a stream for sure.
const keepLate = minKeep*5/4 + time.Second

// heldLate is when a KMS holds a stream back no more for sure.
const heldLate = askedTTL + 2*time.Minute

// TestLives is decision record 17: who may end and begin again, and what
// happens then.
func TestLives(t *testing.T) {
	t.Run("both start at once", func(t *testing.T) {
		inWorlds(t, func(t *testing.T, w *world) {
			w.startA()
			w.startB()
			w.meet()
			if n := w.pair.opened(); n != [2]int{1, 1} {
				t.Errorf("%d streams open", n)
			}
		})
	})
	t.Run("one starts late", func(t *testing.T) {
		inWorlds(t, func(t *testing.T, w *world) {
			w.startA()
			_, _, err := w.a.Key(t.Context())
			if w.pair.patient != (err != nil) {
				t.Errorf("alone: %v", err)
			}
			s, err := w.a.Status(t.Context())
			if err != nil || s.PeerAbsent != (w.pair.patient || w.pair.forgiving) {
				t.Errorf("status %+v, %v", s, err)
			}
			time.Sleep(time.Minute)
			w.startB()
			w.meet()
		})
	})
	for _, how := range []string{"crash", "stop"} {
		t.Run("leader's "+how, func(t *testing.T) {
			inWorlds(t, func(t *testing.T, w *world) {
				crash, stop := w.startA()
				w.startB()
				w.meet()
				for range 2 {
					map[string]func(){"crash": crash, "stop": stop}[how]()
					crash, stop = w.startA()
					switch {
					case w.pair.patient && w.pair.holding:
						w.within("restart", heldLate)
					case w.pair.patient && w.pair.sharing:
						w.within("restart", keepLate) // the follower has to notice
					default:
						w.within("restart", 0)
					}
				}
			})
		})
		t.Run("follower's "+how, func(t *testing.T) {
			inWorlds(t, func(t *testing.T, w *world) {
				w.startA()
				crash, stop := w.startB()
				w.meet()
				for range 2 {
					map[string]func(){"crash": crash, "stop": stop}[how]()
					crash, stop = w.startB()
					if how == "stop" && w.pair.holding {
						w.within("restart", heldLate)
					} else {
						w.within("restart", keepLate)
					}
				}
			})
		})
		t.Run("both ends' "+how, func(t *testing.T) {
			inWorlds(t, func(t *testing.T, w *world) {
				crashA, stopA := w.startA()
				crashB, stopB := w.startB()
				w.meet()
				for range 2 {
					map[string]func(){"crash": crashB, "stop": stopB}[how]()
					map[string]func(){"crash": crashA, "stop": stopA}[how]()
					crashB, stopB = w.startB()
					crashA, stopA = w.startA()
					if how == "crash" && w.pair.patient && w.pair.holding {
						w.within("restart", heldLate)
					} else {
						w.within("restart", keepLate)
					}
				}
			})
		})
	}
	for side, name := range []string{"leader's KME", "follower's KME", "both KMEs"} {
		t.Run("restart of "+name, func(t *testing.T) {
			inWorlds(t, func(t *testing.T, w *world) {
				w.startA()
				w.startB()
				w.meet()
				for _, pause := range []time.Duration{0, time.Minute} {
					if side == 2 {
						w.pair.restart(0)
						w.pair.restart(1)
					} else {
						w.pair.restart(side)
					}
					time.Sleep(pause)
					if side > 0 && w.pair.patient {
						w.within("restart", keepLate) // the follower has to notice
					} else {
						w.within("restart", 0)
					}
				}
			})
		})
	}
}

// TestClose: an end leaves nothing open.
func TestClose(t *testing.T) {
	inWorlds(t, func(t *testing.T, w *world) {
		crash, _ := w.startA()
		_, stopB := w.startB()
		w.meet()
		crash()
		_, stopA := w.startA()
		w.within("restart", heldLate)
		time.Sleep(keepLate)
		stopB()
		stopA()
		if n := w.pair.opened(); n != [2]int{} {
			t.Errorf("%d streams open", n)
		}
	})
}

// TestLeft: a stream that the leader has left is closed by the follower as well,
// so that a KMS holds it back no longer and the next leader can have it.
func TestLeft(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, newNetwork(t), ed1, manners{holding: true})
		crash, _ := w.startA()
		w.startB()
		w.meet()
		for _, known := range []bool{false, true} {
			crash()
			crash, _ = w.startA()
			w.within("restart", 0)
			if (w.a.led == w.a.known) != known {
				t.Errorf("led the stream %v, known is %v", w.a.led.id, w.a.known.id)
			}
			time.Sleep(keepLate)
		}
	})
}

// TestMadeUpStreams: a peer that names one stream after the other cannot have
// more of them opened than Keep closes.
func TestMadeUpStreams(t *testing.T) {
	inDialects(t, func(t *testing.T, n *network, d *dialect) {
		w := newWorld(t, n, d, manners{})
		w.startB()
		most := 0
		for i := range uint32(500) {
			id := keyID{stream: streamID(keyOf(i)[:16]), tag: "0badcafe"}
			if _, err := w.b.KeyByID(t.Context(), id.String()); err != nil {
				checkError(t, err, nil, fmt.Sprintf("fetch key %q: 15 key streams that the peer has left are still open", id))
			}
			most = max(most, w.pair.opened()[1])
			time.Sleep(100 * time.Millisecond)
		}
		if most > maxLeft {
			t.Errorf("%d streams open", most)
		}
		time.Sleep(keepLate)
		if n := w.pair.opened()[1]; n > 2 {
			t.Errorf("%d streams open in the end", n)
		}
		w.startA()
		w.meet()
	})
}

// TestLeftOnce: a stream is left once, however often the peer turns from it.
func TestLeftOnce(t *testing.T) {
	inDialects(t, func(t *testing.T, n *network, d *dialect) {
		h, _ := n.serve(kmeA, easy(d))
		s := n.source("sae_b", "sae_a", Config{Dialect: d.name})
		for i := range uint32(2 * maxLeft) {
			for _, stream := range []streamID{s.known.id, streamID(keyOf(0)[:16]), streamID(keyOf(1)[:16])} {
				if _, err := s.KeyByID(t.Context(), keyID{stream, i, "0badcafe"}.String()); err != nil {
					t.Fatal(err)
				}
			}
		}
		if err := s.keep(t.Context()); err != nil {
			t.Error(err)
		}
		if n := strings.Count(h.log(), "close"); n != 3 {
			t.Errorf("%d streams closed", n)
		}
	})
}

// TestCloseIsShort: a KMS that says nothing does not hold the end up.
func TestCloseIsShort(t *testing.T) {
	inDialects(t, func(t *testing.T, n *network, d *dialect) {
		n.serve(kmeA, easy(d, func(r request) answer {
			if r.service == 8 {
				return silence
			}
			return nil
		}))
		s := n.source("sae_a", "sae_b", Config{Dialect: d.name})
		if _, _, err := s.Key(t.Context()); err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		if took := time.Since(began); took != closeTimeout {
			t.Errorf("took %v", took)
		}
	})
}

// TestCloseTogether: the sources of a KMS that does not answer CLOSE end
// together, in no more connections than calls have.
func TestCloseTogether(t *testing.T) {
	inDialects(t, func(t *testing.T, n *network, d *dialect) {
		n.serve(kmeA, easy(d, func(r request) answer {
			if r.service == 8 {
				return silence
			}
			return nil
		}))
		k := n.kms("sae_a", Config{Dialect: d.name})
		var sources []kms.Source
		for i := range 3 * maxCalls {
			s, err := k.For(fmt.Sprintf("sae_%d", i))
			if err != nil {
				t.Fatal(err)
			}
			if _, _, err := s.Key(t.Context()); err != nil {
				t.Fatal(err)
			}
			sources = append(sources, s)
		}
		time.Sleep(2 * idleTimeout)
		var mu sync.Mutex
		var now, most int
		dial := k.dial
		k.dial = func(ctx context.Context, network, address string) (net.Conn, error) {
			c, err := dial(ctx, network, address)
			if err != nil {
				return nil, err
			}
			mu.Lock()
			defer mu.Unlock()
			now++
			most = max(most, now)
			return &counted{c, sync.OnceFunc(func() { mu.Lock(); now--; mu.Unlock() })}, nil
		}
		began := time.Now()
		var running sync.WaitGroup
		for _, s := range sources {
			running.Go(func() {
				if err := s.Close(); err != nil {
					t.Error(err)
				}
			})
		}
		running.Wait()
		if most != maxCalls || now != 0 {
			t.Errorf("%d connections at once, %d left", most, now)
		}
		if took := time.Since(began); took != closeTimeout {
			t.Errorf("took %v", took)
		}
	})
}

// counted is a connection that says when it is closed.
type counted struct {
	net.Conn
	closed func()
}

func (c *counted) Close() error {
	c.closed()
	return c.Conn.Close()
}

// TestStatus takes no key, opens nothing for good, and leaves the stream of a
// running rotator alone.
func TestStatus(t *testing.T) {
	inWorlds(t, func(t *testing.T, w *world) {
		check := w.n.source("sae_a", "sae_b", Config{Dialect: w.pair.d.name})
		want := kms.Status{
			SourceKME: kmeA, MasterSAE: check.kms.sae, SlaveSAE: check.peer,
			KeySize: 256, MinKeySize: 256, MaxKeySize: 256, MaxKeysPerRequest: 1, PeerAbsent: true,
		}
		if s, err := check.Status(t.Context()); err != nil || s != want {
			t.Errorf("status %+v, %v, want %+v", s, err, want)
		}
		if n := w.pair.opened(); n[0] != 0 && !w.pair.forgiving {
			t.Errorf("%d streams open", n)
		}
		w.startA()
		w.startB()
		w.meet()
		want.PeerAbsent = false
		for range 2 {
			if s, err := check.Status(t.Context()); err != nil || s != want {
				t.Errorf("status %+v, %v, want %+v", s, err, want)
			}
			if err := check.Close(); err != nil {
				t.Error(err)
			}
			if err := w.transfer(); err != nil {
				t.Error(err)
			}
		}
		if s, err := w.a.Status(t.Context()); err != nil || s != want {
			t.Errorf("status of the rotator %+v, %v, want %+v", s, err, want)
		}
	})
}

// TestBothLead: an index that was followed is not led.
func TestBothLead(t *testing.T) {
	inWorlds(t, func(t *testing.T, w *world) {
		w.startA()
		w.startB()
		w.meet()
		w.a, w.b = w.b, w.a
		w.within("other way", keepLate)
	})
}

// TestTwoTunnels: two tunnels between the same two SAEs have one key stream, and
// meet indices that the other has taken. Both get keys, none of them twice.
func TestTwoTunnels(t *testing.T) {
	for _, m := range []manners{{}, {patient: true, forgiving: true}} {
		t.Run(m.String(), func(t *testing.T) {
			inDialects(t, func(t *testing.T, n *network, d *dialect) {
				w := newWorld(t, n, d, m)
				var ends [2][2]*Source
				for i := range ends {
					w.startA()
					w.startB()
					w.meet() // the first is ahead of the second
					ends[i] = [2]*Source{w.a, w.b}
				}
				var had [2]int
				const tries = 40
				for range tries {
					for i := range ends {
						w.a, w.b = ends[i][0], ends[i][1]
						if w.transfer() == nil {
							had[i]++
						}
						time.Sleep(time.Second)
					}
				}
				if min(had[0], had[1]) < tries/2 {
					t.Errorf("%v of %d keys", had, tries)
				}
			})
		})
	}
}
