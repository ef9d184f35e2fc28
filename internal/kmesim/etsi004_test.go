package kmesim

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"keyturn/internal/memnet"
)

// lab004 is a pair that serves key streams in memory, and raw clients of it.
type lab004 struct {
	*testing.T
	pair    *Pair
	lab     *Lab
	dialect Dialect
	network memnet.Network
}

// streamLab serves a pair at kme-a and kme-b until the test ends. It needs a
// synctest bubble.
func streamLab(t *testing.T, o StreamOptions, p *Pair) *lab004 {
	t.Helper()
	certs, err := NewLab(LabOptions{SAEs: 3})
	if err != nil {
		t.Fatal(err)
	}
	l := &lab004{T: t, pair: p, lab: certs, dialect: o.Dialect}
	for i, k := range []*KME{p.A, p.B} {
		l.serve(k, i, o)
	}
	return l
}

func (l *lab004) serve(k *KME, i int, o StreamOptions) (stop func()) {
	l.Helper()
	ln, err := l.network.Listen(k.name)
	if err != nil {
		l.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- k.ServeStreams(ctx, ln, l.lab.ServerTLS(i), o) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			l.Errorf("ServeStreams = %v", err)
		}
	})
	l.Cleanup(stop)
	return stop
}

// app is an application, with a connection to one KME.
type app struct {
	*lab004
	sae int
	kme string
	// conn is nil where the last one is used up.
	conn *tls.Conn
}

func (l *lab004) app(sae int, kme string) *app {
	a := &app{lab004: l, sae: sae, kme: kme}
	l.Cleanup(a.hangUp)
	return a
}

func (a *app) hangUp() {
	if a.conn != nil {
		a.conn.Close()
		a.conn = nil
	}
}

func (a *app) dial() error {
	if a.conn != nil {
		return nil
	}
	raw, err := a.network.Dial(context.Background(), "tcp", a.kme)
	if err != nil {
		return err
	}
	conf := a.lab.ClientTLS(a.sae)
	conf.ServerName = a.kme
	a.conn = tls.Client(raw, conf)
	return a.conn.Handshake()
}

// answer004 is any answer, as a client reads it.
type answer004 struct {
	status   streamStatus
	stream   ksid
	chunk    uint32
	minBPS   uint32
	timeout  uint32
	index    uint32
	key      []byte
	metadata []byte
	needed   uint32
	size     int // of the payload
}

// send sends a request as bytes and reads the answer.
func (a *app) send(request []byte) (answer004, error) {
	if err := a.dial(); err != nil {
		a.hangUp()
		return answer004{}, err
	}
	if _, err := a.conn.Write(request); err != nil {
		a.hangUp()
		return answer004{}, err
	}
	got, err := a.receive(request[3])
	if err == nil && a.dialect == ForgeEd3 {
		// One request a connection: it ends behind the answer.
		if n, eof := a.conn.Read(make([]byte, 1)); n != 0 || !errors.Is(eof, io.EOF) {
			err = fmt.Errorf("connection goes on: %d bytes, %w", n, eof)
		}
	}
	if err != nil || a.dialect == ForgeEd3 {
		a.hangUp()
	}
	return got, err
}

func (a *app) receive(asked byte) (got answer004, err error) {
	var head [8]byte
	if _, err := io.ReadFull(a.conn, head[:]); err != nil {
		return got, err
	}
	if [3]byte(head[:3]) != dialects[a.dialect].version || head[3] != asked+1 {
		return got, fmt.Errorf("header %x", head)
	}
	b := make([]byte, binary.BigEndian.Uint32(head[4:]))
	if _, err := io.ReadFull(a.conn, b); err != nil {
		return got, err
	}
	number := func() (n uint32) {
		if len(b) < 4 {
			err = errors.New("answer is cut off")
			return 0
		}
		n, b = binary.BigEndian.Uint32(b), b[4:]
		return n
	}
	sized := func() (v []byte) {
		n := number()
		if uint64(n) > uint64(len(b)) {
			err = errors.New("answer is cut off")
			return nil
		}
		v, b = b[:n], b[n:]
		return v
	}
	got.size = len(b)
	got.status = streamStatus(number())
	switch {
	case len(b) == 0:
	case asked == 2:
		got.chunk, _, got.minBPS = number(), number(), number()
		_, _ = number(), number()
		got.timeout, _ = number(), number()
		mime := 256
		if a.dialect == ForgeEd3 {
			mime = bytes.IndexByte(b, 0) + 1
		}
		got.stream, b = ksid(b[mime:]), b[mime+16:]
	case len(b) == 4:
		got.needed = number()
	default:
		got.index, got.key, got.metadata = number(), sized(), sized()
	}
	if err == nil && len(b) > 0 {
		err = fmt.Errorf("%d bytes too many", len(b))
	}
	return got, err
}

func (a *app) must(request any) answer004 {
	a.Helper()
	got, err := a.send(a.dialect.ask(request))
	if err != nil {
		a.Fatalf("%s at %s: %v", SAEName(a.sae), a.kme, err)
	}
	return got
}

// name is how the dialect names an SAE.
func (l *lab004) name(sae int) string {
	if l.dialect == ForgeEd1 {
		return "qkd://" + SAEName(sae)
	}
	return SAEName(sae)
}

func (a *app) openWith(q qos, stream ksid, peer int) answer004 {
	a.Helper()
	return a.must(openRequest{a.name(a.sae), a.name(peer), q, stream})
}

func (a *app) open(stream ksid, peer int, want streamStatus) ksid {
	a.Helper()
	got := a.openWith(qos{Chunk: 32, MIME: "application/json"}, stream, peer)
	if got.status != want {
		a.Errorf("%s at %s: OPEN_CONNECT: status %d, want %d", SAEName(a.sae), a.kme, got.status, want)
	}
	if got.size > 4 {
		return got.stream
	}
	return stream
}

func (a *app) get(stream ksid, index uint32, want streamStatus) []byte {
	a.Helper()
	got := a.must(getRequest{stream: stream, index: index, room: 1024, detail: []byte{0, 0}})
	if got.status != want {
		a.Errorf("%s at %s: GET_KEY %d: status %d, want %d", SAEName(a.sae), a.kme, index, got.status, want)
	}
	if got.status == streamOK && (len(got.key) != 32 || got.index != index) {
		a.Errorf("%s at %s: GET_KEY %d: %d bytes at %d", SAEName(a.sae), a.kme, index, len(got.key), got.index)
	}
	if got.status != streamOK && len(got.key) > 0 {
		a.Errorf("%s at %s: GET_KEY %d: status %d and a key", SAEName(a.sae), a.kme, index, got.status)
	}
	return got.key
}

func (a *app) close(stream ksid, want streamStatus) {
	a.Helper()
	if got := a.must(closeRequest{stream}); got.status != want {
		a.Errorf("%s at %s: CLOSE: status %d, want %d", SAEName(a.sae), a.kme, got.status, want)
	}
}

// same fetches one key at both ends.
func same(a, b *app, stream ksid, index uint32) {
	a.Helper()
	x, y := a.get(stream, index, streamOK), b.get(stream, index, streamOK)
	if !bytes.Equal(x, y) {
		a.Errorf("index %d: the ends got different keys", index)
	}
}

// eachDialect runs f in a bubble for each dialect, with both ends at each KME.
func eachDialect(t *testing.T, f func(t *testing.T, d Dialect)) {
	for _, d := range []Dialect{ForgeEd3, ForgeEd1} {
		t.Run(d.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { f(t, d) })
		})
	}
}

func TestStreamLife(t *testing.T) {
	for _, places := range [][2]string{{NameA, NameB}, {NameB, NameA}, {NameA, NameA}, {NameB, NameB}} {
		eachDialect(t, func(t *testing.T, d Dialect) {
			l := streamLab(t, StreamOptions{Dialect: d}, New(Options{}))
			one, two := l.app(1, places[0]), l.app(2, places[1])
			id := one.open(ksid{}, 2, streamPeerAbsent)
			if id == (ksid{}) {
				t.Fatal("no stream")
			}
			same0 := one.get(id, 0, streamOK) // before the peer
			two.open(id, 1, streamOK)
			if !bytes.Equal(same0, two.get(id, 0, streamOK)) {
				t.Error("the ends got different keys")
			}
			same(one, two, id, 1)
			same(two, one, id, 2)
			same(two, one, id, 1000) // indices may leave some out
			// Each once.
			for _, index := range []uint32{0, 1, 2, 1000} {
				one.get(id, index, streamNoKeys)
				two.get(id, index, streamNoKeys)
			}
			// Open again: the stream lives on.
			if again := one.open(id, 2, streamInUse); again != id {
				t.Error("status 5 names another stream")
			}
			same(one, two, id, 3)

			held := one.get(id, 4, streamOK)
			one.close(id, streamOK)
			one.get(id, 5, streamPeerNotYet)
			two.get(id, 5, streamPeerNotYet) // no further keys
			if !bytes.Equal(held, two.get(id, 4, streamOK)) {
				t.Error("a key from before CLOSE is another one")
			}
			two.close(id, streamOK)
			two.close(id, streamPeerAbsent)
			two.get(id, 6, streamPeerNotYet)
			if n := l.pair.A.counted.refused.Load() + l.pair.B.counted.refused.Load(); n != 12 {
				t.Errorf("%d requests were refused, want 12", n)
			}
		})
	}
}

// TestStreamAgain: a stream that was closed begins anew under its old ID, at once
// or, with Hold, once both have closed it.
func TestStreamAgain(t *testing.T) {
	for _, hold := range []bool{false, true} {
		eachDialect(t, func(t *testing.T, d Dialect) {
			l := streamLab(t, StreamOptions{Dialect: d, Hold: hold}, New(Options{}))
			one, two := l.app(1, NameA), l.app(2, NameB)
			id := ksid{1}
			one.open(id, 2, streamPeerAbsent)
			two.open(id, 1, streamOK)
			same(one, two, id, 0)
			same(one, two, id, window) // index 0 cannot be fetched any more
			one.close(id, streamOK)
			if hold {
				one.open(id, 2, streamInUse)
				two.close(id, streamOK)
				one.open(id, 2, streamPeerAbsent)
				two.open(id, 1, streamOK)
			} else {
				one.open(id, 2, streamOK)
			}
			same(one, two, id, 0)
			// Both closed: nothing is left.
			one.close(id, streamOK)
			two.close(id, streamOK)
			for _, k := range []*KME{l.pair.A, l.pair.B} {
				if n, m := len(k.streams.owned), len(k.streams.opened); n != 0 || m != 0 {
					t.Errorf("%s: %d streams and %d openings are left", k.name, n, m)
				}
			}
		})
	}
}

// TestStreamWaits: OPEN_CONNECT waits for the peer, as long as the QoS says.
func TestStreamWaits(t *testing.T) {
	eachDialect(t, func(t *testing.T, d Dialect) {
		l := streamLab(t, StreamOptions{Dialect: d}, New(Options{}))
		patient := qos{Chunk: 32, Timeout: 3000}
		for i, places := range [][2]string{{NameA, NameB}, {NameB, NameA}, {NameB, NameB}} {
			one, two := l.app(1, places[0]), l.app(2, places[1])
			id := ksid{byte(i + 1)}
			began := time.Now()
			if got := one.openWith(patient, id, 2); got.status != streamPeerAbsent || time.Since(began) != 3*time.Second {
				t.Errorf("%v: status %d after %v", places, got.status, time.Since(began))
			}
			one.close(id, streamOK)
			opened := make(chan answer004)
			began = time.Now()
			go func() { opened <- one.openWith(patient, id, 2) }()
			time.Sleep(time.Second)
			two.open(id, 1, streamOK)
			if got := <-opened; got.status != streamOK || time.Since(began) > 1100*time.Millisecond {
				t.Errorf("%v: status %d after %v", places, got.status, time.Since(began))
			}
			same(one, two, id, 0)
		}
		// For a new stream there is nothing to wait for: nobody knows its ID.
		began := time.Now()
		if got := l.app(1, NameA).openWith(patient, ksid{}, 2); got.status != streamPeerAbsent || time.Since(began) != 0 {
			t.Errorf("new stream: status %d after %v", got.status, time.Since(began))
		}
	})
}

// TestStreamForeigners: who is refused what.
func TestStreamForeigners(t *testing.T) {
	eachDialect(t, func(t *testing.T, d Dialect) {
		l := streamLab(t, StreamOptions{Dialect: d}, New(Options{}))
		one, two, three := l.app(1, NameA), l.app(2, NameB), l.app(3, NameB)
		id := ksid{1}
		one.open(id, 2, streamPeerAbsent)
		two.open(id, 3, streamInUse) // with another peer
		two.get(id, 0, streamPeerNotYet)
		two.open(id, 1, streamOK)
		three.get(id, 0, streamPeerNotYet)
		three.close(id, streamPeerAbsent)
		three.open(id, 1, streamInUse)
		three.open(id, 2, streamInUse)
		three.get(id, 0, streamPeerNotYet)
		if got := three.openWith(qos{Chunk: 16}, id, 1); got.status != streamInUse {
			t.Errorf("status %d", got.status)
		}
		for _, names := range [][2]string{
			{l.name(1), l.name(2)},          // another's name
			{l.name(3), l.name(3)},          // itself
			{l.name(3), ""},                 // nobody
			{"", l.name(1)},                 // nobody
			{l.name(3) + "\xff", "sae\xff"}, // not text
		} {
			if got := three.must(openRequest{names[0], names[1], qos{Chunk: 32}, ksid{}}); got.status != streamNoLink {
				t.Errorf("%q: status %d", names, got.status)
			}
		}
		same(one, two, id, 0)
	})
}

func TestApplicationName(t *testing.T) {
	for text, want := range map[string][2]string{ // forge-ed3, forge-ed1
		"sae_001":                        {"sae_001", ""},
		"a/b@c":                          {"a/b@c", ""},
		"qkd//app1@node":                 {"qkd//app1@node", ""},
		"qkd://sae_001":                  {"sae_001", "sae_001"},
		"qkd://sae_001:25575/":           {"sae_001", "sae_001"},
		"qkd://sae_001@kme-a":            {"sae_001", "sae_001"},
		"qkd://sae_001@kme-a:25575/path": {"sae_001", "sae_001"},
		"qkd://kme-a/sae_001":            {"sae_001", "sae_001"},
		"qkd://kme-a/x/sae%20001?q":      {"sae 001", "sae 001"},
		"qkd:///sae_001":                 {"", ""},
		"://sae_001":                     {"", ""},
		"qkd://a b":                      {"", ""},
		"sae\xff":                        {"", ""},
		"":                               {"", ""},
	} {
		for d := range want {
			if got := Dialect(d).application(text); got != want[d] {
				t.Errorf("%v: application(%q) = %q, want %q", Dialect(d), text, got, want[d])
			}
		}
	}
}

// TestStreamOffers: what cannot be is met by what comes nearest, which is then
// accepted.
func TestStreamOffers(t *testing.T) {
	eachDialect(t, func(t *testing.T, d Dialect) {
		l := streamLab(t, StreamOptions{Dialect: d}, New(Options{Rate: 2}))
		one, two := l.app(1, NameA), l.app(2, NameB)
		for _, tt := range []struct{ ask, offer qos }{
			{qos{Chunk: 0}, qos{Chunk: 32}},
			{qos{Chunk: 15}, qos{Chunk: 16}},
			{qos{Chunk: 1025}, qos{Chunk: 1024}},
			{qos{Chunk: 32, MinBPS: 513, MaxBPS: 1024}, qos{Chunk: 32, MinBPS: 512, MaxBPS: 1024}},
			{qos{Chunk: 32, Timeout: 60_001}, qos{Chunk: 32, Timeout: 60_000}},
			{qos{Chunk: 32, TTL: 604_801}, qos{Chunk: 32, TTL: 604_800}},
			{qos{Chunk: 32, MIME: "text/plain"}, qos{Chunk: 32, MIME: "application/json"}},
		} {
			got := one.openWith(tt.ask, ksid{}, 2)
			if got.status != streamQoS || got.chunk != tt.offer.Chunk || got.minBPS != tt.offer.MinBPS || got.timeout != tt.offer.Timeout || got.stream != (ksid{}) {
				t.Errorf("%+v: status %d, chunk %d, %d bit/s, %d ms", tt.ask, got.status, got.chunk, got.minBPS, got.timeout)
			}
			if got := one.openWith(tt.offer, ksid{}, 2); got.status != streamPeerAbsent {
				t.Errorf("%+v: status %d", tt.offer, got.status)
			}
		}
		// The second application has to take the chunks of the first.
		id := ksid{1}
		one.openWith(qos{Chunk: 64}, id, 2)
		if got := two.openWith(qos{Chunk: 32}, id, 1); got.status != streamQoS || got.chunk != 64 {
			t.Errorf("status %d, chunk %d", got.status, got.chunk)
		}
		if got := two.openWith(qos{Chunk: 64}, id, 1); got.status != streamOK {
			t.Errorf("status %d", got.status)
		}
		if a, b := one.must(getRequest{stream: id}), two.must(getRequest{stream: id}); len(a.key) != 64 || !bytes.Equal(a.key, b.key) {
			t.Error("keys are not 64 bytes, or not the same")
		}
	})
}

// TestStreamPool: keys come out of the pool of the two SAEs.
func TestStreamPool(t *testing.T) {
	eachDialect(t, func(t *testing.T, d Dialect) {
		l := streamLab(t, StreamOptions{Dialect: d}, New(Options{Rate: 1, Pool: 2}))
		one, two := l.app(1, NameA), l.app(2, NameB)
		id := ksid{1}
		one.open(id, 2, streamPeerAbsent)
		two.open(id, 1, streamOK)
		same(one, two, id, 0)
		same(one, two, id, 1)
		one.get(id, 2, streamNoKeys)
		time.Sleep(time.Second)
		same(one, two, id, 2) // was not used up
	})
}

func TestStreamWindow(t *testing.T) {
	eachDialect(t, func(t *testing.T, d Dialect) {
		l := streamLab(t, StreamOptions{Dialect: d}, New(Options{}))
		one, two := l.app(1, NameA), l.app(2, NameB)
		id := ksid{1}
		one.open(id, 2, streamPeerAbsent)
		two.open(id, 1, streamOK)
		one.get(id, 0, streamOK)
		one.get(id, 1, streamOK)
		same(two, one, id, window) // gives 0 up
		two.get(id, 0, streamNoKeys)
		two.get(id, 1, streamOK)
		same(one, two, id, 1<<32-1)
		two.get(id, 1<<32-1-window, streamNoKeys)
		same(one, two, id, 1<<32-window)
		if n := len(l.pair.A.streams.owned[id].chunks); n > 2 {
			t.Errorf("%d chunks are kept", n)
		}
	})
}

func TestStreamTTL(t *testing.T) {
	eachDialect(t, func(t *testing.T, d Dialect) {
		l := streamLab(t, StreamOptions{Dialect: d}, New(Options{}))
		one, two := l.app(1, NameA), l.app(2, NameB)
		id := ksid{1}
		one.openWith(qos{Chunk: 32, TTL: 10}, id, 2)
		two.openWith(qos{Chunk: 32, TTL: 99}, id, 1)
		one.get(id, 0, streamOK)
		one.get(id, 1, streamOK)
		time.Sleep(10 * time.Second)
		two.get(id, 0, streamOK)
		time.Sleep(time.Second)
		two.get(id, 1, streamNoKeys)
	})
}

func TestStreamPeerFirst(t *testing.T) {
	eachDialect(t, func(t *testing.T, d Dialect) {
		l := streamLab(t, StreamOptions{Dialect: d, PeerFirst: true}, New(Options{}))
		one, two := l.app(1, NameB), l.app(2, NameA)
		id := one.open(ksid{}, 2, streamPeerAbsent)
		one.get(id, 0, streamPeerNotYet)
		two.open(id, 1, streamOK)
		same(one, two, id, 0)
		two.close(id, streamOK)
		one.get(id, 1, streamPeerNotYet)
		two.open(id, 1, streamOK)
		same(one, two, id, 1)
	})
}

func TestStreamMetadata(t *testing.T) {
	eachDialect(t, func(t *testing.T, d Dialect) {
		l := streamLab(t, StreamOptions{Dialect: d, Metadata: true}, New(Options{}))
		one, two := l.app(1, NameA), l.app(2, NameB)
		id := ksid{1}
		one.open(id, 2, streamPeerAbsent)
		two.open(id, 1, streamOK)
		ask := func(room int) getRequest {
			return getRequest{stream: id, room: uint32(room), detail: make([]byte, room)}
		}
		// Too little room: the key is not used up.
		got := one.must(ask(2))
		if d == ForgeEd3 {
			got.needed = uint32(len(got.metadata))
		}
		if got.status != streamMetadataTooBig || got.needed != metadataRoom {
			t.Errorf("status %d, %d bytes needed", got.status, got.needed)
		}
		if got := one.must(ask(metadataRoom)); got.status != streamOK || string(got.metadata) != `{"age":0,"hops":0}` {
			t.Errorf("status %d, metadata %q", got.status, got.metadata)
		}
		time.Sleep(1500 * time.Millisecond)
		if got := two.must(ask(metadataRoom)); got.status != streamOK || string(got.metadata) != `{"age":1500,"hops":0}` {
			t.Errorf("status %d, metadata %q", got.status, got.metadata)
		}
		if got := two.must(ask(metadataRoom)); got.status != streamNoKeys || len(got.metadata) > 0 {
			t.Errorf("status %d, metadata %q", got.status, got.metadata)
		}
	})
}

// TestStreamLinkDown: what needs the other KME is refused, what does not goes
// on, and nothing is used up.
func TestStreamLinkDown(t *testing.T) {
	eachDialect(t, func(t *testing.T, d Dialect) {
		l := streamLab(t, StreamOptions{Dialect: d}, New(Options{}))
		one, two := l.app(1, NameA), l.app(2, NameB)
		id := ksid{1}
		one.open(id, 2, streamPeerAbsent)
		two.open(id, 1, streamOK)
		one.get(id, 0, streamOK)
		l.pair.B.SetFault(Fault{Kind: Cut})
		one.open(ksid{}, 2, streamNoLink)
		two.open(ksid{}, 1, streamNoLink)
		two.open(ksid{2}, 1, streamNoLink)
		two.get(id, 0, streamNoLink)
		two.close(id, streamNoLink)
		one.get(id, 1, streamNoLink) // it cannot tell kme-b
		l.pair.B.SetFault(Fault{})
		two.get(id, 0, streamOK)
		same(one, two, id, 1)
	})
}

// TestStreamRestart: a KME that starts anew knows of no stream; the applications
// open them again. What the other one owns goes on.
func TestStreamRestart(t *testing.T) {
	for _, name := range []string{NameA, NameB} {
		eachDialect(t, func(t *testing.T, d Dialect) {
			p := New(Options{})
			certs, err := NewLab(LabOptions{})
			if err != nil {
				t.Fatal(err)
			}
			o := StreamOptions{Dialect: d}
			l := &lab004{T: t, pair: p, lab: certs, dialect: d}
			stops := map[string]func(){NameA: l.serve(p.A, 0, o), NameB: l.serve(p.B, 1, o)}
			one, two := l.app(1, NameA), l.app(2, NameB)
			id := ksid{1}
			one.open(id, 2, streamPeerAbsent)
			two.open(id, 1, streamOK)
			same(one, two, id, 0)

			stops[name]()
			fresh := New(Options{})
			if name == NameA {
				p.A, p.B.peer = fresh.A, local{fresh.A}
				p.A.peer = local{p.B}
				l.serve(p.A, 0, o)
			} else {
				p.B, p.A.peer = fresh.B, local{fresh.B}
				p.B.peer = local{p.A}
				l.serve(p.B, 1, o)
			}
			if d == ForgeEd1 { // its connection broke
				map[string]*app{NameA: one, NameB: two}[name].hangUp()
			}
			if name == NameA { // the owner
				one.get(id, 1, streamPeerNotYet)
				two.get(id, 1, streamPeerNotYet)
				if n := len(p.B.streams.opened); n != 0 {
					t.Errorf("kme-b remembers %d openings of a stream that is gone", n)
				}
				one.open(id, 2, streamPeerAbsent)
				two.open(id, 1, streamOK)
				same(one, two, id, 0)
			} else {
				two.get(id, 1, streamPeerNotYet)
				two.open(id, 1, streamInUse)
				one.get(id, 0, streamNoKeys)
			}
			same(one, two, id, 1)
			same(two, one, id, 2)
		})
	}
}

func TestStreamFaults(t *testing.T) {
	eachDialect(t, func(t *testing.T, d Dialect) {
		l := streamLab(t, StreamOptions{Dialect: d}, New(Options{}))
		one, two := l.app(1, NameA), l.app(2, NameB)
		id := ksid{1}
		if got := one.openWith(qos{Chunk: 32, Timeout: 2000}, id, 2); got.status != streamPeerAbsent {
			t.Fatalf("status %d", got.status)
		}
		two.open(id, 1, streamOK)
		fail := func(k *KME, text string) {
			t.Helper()
			f, err := ParseFault(text)
			if err != nil {
				t.Fatal(err)
			}
			k.SetFault(f)
		}
		request := func(index uint32) getRequest { return getRequest{stream: id, index: index} }

		fail(l.pair.A, "out-of-keys")
		one.get(id, 0, streamNoKeys)
		fail(l.pair.A, "healthy")
		same(one, two, id, 0) // not used up

		fail(l.pair.B, "late")
		one.get(id, 1, streamOK)
		two.get(id, 1, streamNoKeys)
		fail(l.pair.B, "healthy")
		two.get(id, 1, streamOK)

		fail(l.pair.A, "out-of-step")
		one.get(id, 2, streamOK)
		two.get(id, 2, streamNoKeys)
		fail(l.pair.A, "healthy")
		two.get(id, 2, streamNoKeys)

		fail(l.pair.B, "wrong-bytes")
		if a, b := one.get(id, 3, streamOK), two.get(id, 3, streamOK); bytes.Equal(a, b) {
			t.Error("wrong-bytes: right ones")
		}
		fail(l.pair.B, "wrong-size=64")
		one.get(id, 4, streamOK)
		if got := two.must(request(4)); got.status != streamOK || len(got.key) != 8 {
			t.Errorf("wrong-size: status %d, %d bytes", got.status, len(got.key))
		}
		fail(l.pair.B, "healthy")

		// Slow, and slower than the QoS allows.
		fail(l.pair.A, "slow=1s")
		began := time.Now()
		one.get(id, 5, streamOK)
		if took := time.Since(began); took != time.Second {
			t.Errorf("slow: took %v", took)
		}
		fail(l.pair.A, "slow=1m")
		began = time.Now()
		one.get(id, 6, streamTimeout)
		if took := time.Since(began); took != 2*time.Second {
			t.Errorf("slow: took %v", took)
		}
		fail(l.pair.A, "drip=100ms")
		began = time.Now()
		one.get(id, 6, streamOK)
		if took := time.Since(began); took != 5600*time.Millisecond {
			t.Errorf("drip: 56 bytes took %v", took)
		}
		fail(l.pair.A, "healthy")

		// Used up, and no answer.
		fail(l.pair.A, "lost")
		if _, err := one.send(d.ask(request(7))); err == nil {
			t.Error("lost: answered")
		}
		fail(l.pair.A, "healthy")
		one.get(id, 7, streamNoKeys)
		two.get(id, 7, streamOK)

		fail(l.pair.A, "html")
		if _, err := one.send(d.ask(request(8))); err == nil || !strings.HasPrefix(err.Error(), "header 485454502f312e31") {
			t.Errorf("html: %v", err)
		}
		fail(l.pair.A, "down")
		if _, err := one.send(d.ask(request(8))); err == nil {
			t.Error("down: answered")
		}
		fail(l.pair.A, "healthy")
		same(one, two, id, 8)

		// A connection from before a fault ends with it, too.
		fail(l.pair.A, "down")
		if _, err := one.send(d.ask(request(9))); err == nil {
			t.Error("down: answered")
		}
		fail(l.pair.A, "healthy")
		one.get(id, 9, streamOK)
		fail(l.pair.A, "silent-tls")
		if d == ForgeEd1 {
			if _, err := one.send(d.ask(request(10))); err == nil {
				t.Error("silent-tls: answered on an old connection")
			}
		}
		for _, text := range []string{"silent-tls", "silent"} {
			fail(l.pair.A, text)
			if err := one.dial(); err != nil {
				t.Fatal(err)
			}
			if err := one.conn.SetReadDeadline(time.Now().Add(5 * time.Minute)); err != nil {
				t.Fatal(err)
			}
			_, err := one.send(d.ask(request(10)))
			if timeout := net.Error(nil); !errors.As(err, &timeout) || !timeout.Timeout() {
				t.Errorf("%s: %v", text, err)
			}
		}
		fail(l.pair.A, "healthy")
		two.hangUp() // was idle for too long
		same(one, two, id, 10)
	})
}

// TestStreamSessions: how a connection ends that is not as it should be.
func TestStreamSessions(t *testing.T) {
	eachDialect(t, func(t *testing.T, d Dialect) {
		l := streamLab(t, StreamOptions{Dialect: d}, New(Options{}))
		one := l.app(1, NameA)
		for name, request := range map[string][]byte{
			"the other dialect": (1 - d).ask(closeRequest{}),
			"HTTP":              []byte("GET / HTTP/1.1\r\nHost: kme-a\r\n\r\n"),
			"no such service":   append(append([]byte{}, dialects[d].version[:]...), 6, 0, 0, 0, 0),
			"too long":          append(append([]byte{}, dialects[d].version[:]...), 2, 0, 1, 0, 0),
			"cut off":           finish(d.ask(closeRequest{})[:headerSize+15]),
			"too much":          finish(append(d.ask(closeRequest{}), 0)),
		} {
			began := time.Now()
			_, err := one.send(request)
			if !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) || time.Since(began) != 0 {
				t.Errorf("%s: %v after %v", name, err, time.Since(began))
			}
		}
		// Those who say nothing, and those who stop in the middle.
		for _, tt := range []struct {
			said  []byte
			after time.Duration
		}{
			{nil, idleTime},
			{d.ask(closeRequest{})[:3], idleTime},
			{d.ask(closeRequest{})[:headerSize+1], requestTime},
		} {
			if err := one.dial(); err != nil {
				t.Fatal(err)
			}
			began := time.Now()
			if _, err := one.conn.Write(tt.said); err != nil {
				t.Fatal(err)
			}
			if _, err := one.conn.Read(make([]byte, 1)); err == nil || time.Since(began) != tt.after {
				t.Errorf("%x: %v after %v", tt.said, err, time.Since(began))
			}
			one.hangUp()
		}
		one.open(ksid{}, 2, streamPeerAbsent)
	})
}

// TestStreamOwner: where an ID is known to both KMEs before the first opens it,
// one of them is bound to own it, for both may be asked at once.
func TestStreamOwner(t *testing.T) {
	eachDialect(t, func(t *testing.T, d Dialect) {
		l := streamLab(t, StreamOptions{Dialect: d}, New(Options{}))
		for i, kme := range []string{NameA, NameB} {
			chosen := l.app(1, kme).open(ksid{byte(i + 1)}, 2, streamPeerAbsent)
			if a, b := l.pair.A.streams.owns(chosen), l.pair.B.streams.owns(chosen); !a || b {
				t.Errorf("chosen ID opened at %s: owned by kme-a is %v, by kme-b %v", kme, a, b)
			}
			fresh := l.app(1, kme).open(ksid{}, 2, streamPeerAbsent)
			if a, b := l.pair.A.streams.owns(fresh), l.pair.B.streams.owns(fresh); a != (kme == NameA) || b != (kme == NameB) {
				t.Errorf("ID allocated at %s: owned by kme-a is %v, by kme-b %v", kme, a, b)
			}
		}
	})
}

// TestStreamOpenTwice: an application that has its stream open at both KMEs and
// closes it at one has closed it.
func TestStreamOpenTwice(t *testing.T) {
	eachDialect(t, func(t *testing.T, d Dialect) {
		l := streamLab(t, StreamOptions{Dialect: d}, New(Options{}))
		here, there := l.app(1, NameA), l.app(1, NameB)
		id := ksid{1}
		here.open(id, 2, streamPeerAbsent)
		there.open(id, 2, streamInUse)
		here.get(id, 0, streamOK)
		there.get(id, 0, streamNoKeys)
		there.get(id, 1, streamOK)
		l.app(2, NameA).open(id, 1, streamOK)
		here.close(id, streamOK)
		there.get(id, 2, streamPeerNotYet)
		there.close(id, streamPeerAbsent)
	})
}

// TestClaimTwice: of two keys that were made for an index the first counts, and
// who made the second hears of it.
func TestClaimTwice(t *testing.T) {
	s := newStreams(1)
	one, two := opening{ksid{1}, "a"}, opening{ksid{1}, "b"}
	s.open(openQuestion{opening: one, Peer: "b", Create: true})
	s.open(openQuestion{opening: two, Peer: "a"})
	if c := s.claim(claim{opening: one, ID: "first"}); c.Status != streamOK || c.Chunk.ID != "first" {
		t.Errorf("status %d, key %q", c.Status, c.Chunk.ID)
	}
	if c := s.claim(claim{opening: two, ID: "second"}); c.Status != streamOK || c.Chunk.ID != "first" || c.Chunk.Maker != "a" {
		t.Errorf("status %d, key %q of %q", c.Status, c.Chunk.ID, c.Chunk.Maker)
	}
	if c := s.claim(claim{opening: one, ID: "third"}); c.Status != streamNoKeys {
		t.Errorf("status %d", c.Status)
	}
}

// slowPeer takes its time to hear of keys.
type slowPeer struct{ peer }

func (s slowPeer) call(ctx context.Context, verb string, body []byte) ([]byte, error) {
	if verb == verbKeys {
		time.Sleep(time.Second)
	}
	return s.peer.call(ctx, verb, body)
}

// TestStreamTie: both KMEs make a key for one index at the same time. One of the
// two keys counts, at both ends.
func TestStreamTie(t *testing.T) {
	eachDialect(t, func(t *testing.T, d Dialect) {
		p := New(Options{})
		p.A.peer, p.B.peer = slowPeer{p.A.peer}, slowPeer{p.B.peer}
		l := streamLab(t, StreamOptions{Dialect: d}, p)
		one, two := l.app(1, NameA), l.app(2, NameB)
		id := ksid{1}
		one.open(id, 2, streamPeerAbsent)
		two.open(id, 1, streamOK)
		other := make(chan []byte)
		go func() { other <- two.get(id, 0, streamOK) }()
		if !bytes.Equal(one.get(id, 0, streamOK), <-other) {
			t.Error("the ends got different keys")
		}
		if made, left := p.A.counted.made.Load()+p.B.counted.made.Load(), p.A.store.waiting()+p.B.store.waiting(); made != 2 || left != 0 {
			t.Errorf("%d keys were made, %d are left", made, left)
		}
	})
}

// TestStreamRace: whoever asks first, at whichever KME, both ends get the same
// keys, each once.
func TestStreamRace(t *testing.T) {
	eachDialect(t, func(t *testing.T, d Dialect) {
		const indices = 10
		l := streamLab(t, StreamOptions{Dialect: d}, New(Options{}))
		id := ksid{1}
		l.app(1, NameB).open(id, 2, streamPeerAbsent)
		l.app(1, NameA).open(id, 2, streamInUse)
		l.app(2, NameA).open(id, 1, streamOK)
		l.app(2, NameB).open(id, 1, streamInUse)
		var mu sync.Mutex
		got := map[uint32]map[int][][]byte{}
		var all sync.WaitGroup
		for sae := 1; sae <= 2; sae++ {
			for _, kme := range []string{NameA, NameB} {
				all.Go(func() {
					a := l.app(sae, kme)
					for i := range uint32(indices) {
						answer, err := a.send(d.ask(getRequest{stream: id, index: i}))
						if err != nil {
							t.Error(err)
							return
						}
						mu.Lock()
						if got[i] == nil {
							got[i] = map[int][][]byte{}
						}
						if answer.status == streamOK {
							got[i][sae] = append(got[i][sae], answer.key)
						}
						mu.Unlock()
					}
				})
			}
		}
		all.Wait()
		for i := range uint32(indices) {
			if len(got[i][1]) != 1 || len(got[i][2]) != 1 {
				t.Errorf("index %d: delivered %d and %d times", i, len(got[i][1]), len(got[i][2]))
			} else if !bytes.Equal(got[i][1][0], got[i][2][0]) {
				t.Errorf("index %d: the ends got different keys", i)
			}
		}
	})
}

// TestStreamsAreBounded: the stream that was used longest ago makes room.
func TestStreamsAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const limit = 16
		s := newStreams(limit)
		id := func(n int) (id ksid) {
			binary.BigEndian.PutUint32(id[12:], uint32(n+1))
			return id
		}
		for i := range limit {
			s.open(openQuestion{opening: opening{id(i), "a"}, Peer: "b", Create: true})
		}
		time.Sleep(time.Second)
		for i := range limit {
			if i != 7 {
				s.claim(claim{opening: opening{id(i), "a"}})
			}
		}
		s.open(openQuestion{opening: opening{id(limit), "a"}, Peer: "b", Create: true})
		if n := len(s.owned); n != limit || s.owns(id(7)) || !s.owns(id(0)) || !s.owns(id(limit)) {
			t.Errorf("%d streams, or the wrong ones", n)
		}
		for i := range 2*limit + 5 {
			s.enter(opening{id(i), "a"}, 0)
		}
		if n := len(s.opened); n != 2*limit {
			t.Errorf("%d openings", n)
		}
	})
}
