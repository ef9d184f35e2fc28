package qualify

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"encoding/binary"
	"encoding/hex"
	"io"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"

	"github.com/google/go-cmp/cmp"

	"keyturn/internal/kmesim"
)

// streams lets the simulated KMEs speak ETSI GS QKD 004.
func (n *network) streams(dialect string) Config {
	n.t.Helper()
	d, err := kmesim.ParseDialect(dialect)
	if err != nil {
		n.t.Fatal(err)
	}
	n.serve(func(k *kmesim.KME) func(context.Context, net.Listener, *tls.Config) error {
		return func(ctx context.Context, ln net.Listener, conf *tls.Config) error {
			return k.ServeStreams(ctx, ln, conf, kmesim.StreamOptions{Dialect: d})
		}
	})
	c := n.config()
	for i, e := range []*End{&c.Here, c.There} {
		e.URI, e.Dialect = []string{"kme-a:443", "kme-b:443"}[i], dialect
	}
	return c
}

func TestETSI004(t *testing.T) {
	for _, dialect := range []string{"forge-ed3", "forge-ed1"} {
		for name, edit := range map[string]func(*Config){
			"two-ends": func(*Config) {},
			"one-end":  func(c *Config) { c.There = nil },
		} {
			t.Run(dialect+" "+name, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					c := newNetwork(t).streams(dialect)
					edit(&c)
					r, err := ETSI004(t.Context(), c)
					if err != nil {
						t.Fatal(err)
					}
					golden(t, "testdata/etsi004-"+dialect+"-"+name+".txt", r)
				})
			})
		}
	}
}

func TestETSI004Faults(t *testing.T) {
	const (
		same  = "sae_001: the same key at the same index *"
		same2 = "sae_002: the same key at the same index *"
		back  = "sae_001: the same key the other way round *"
		ahead = "sae_002: an index ahead of the next"
		alloc = "sae_002: the same key in it at both ends"
	)
	for _, tt := range []struct {
		a, b string
		want []string
	}{
		{"healthy", "healthy", nil},
		{"out-of-keys", "healthy", []string{same, "sae_001: an index ahead of the next", "sae_001: the same key in it at both ends"}},
		{"healthy", "wrong-bytes", []string{same2, ahead, alloc}},
		{"wrong-bytes", "healthy", []string{back}},
		{"silent", "healthy", []string{"sae_001: a key stream of an agreed ID is opened *"}},
		{"down", "healthy", []string{"sae_001: TLS 1.2 or later *"}},
		{"healthy", "down", []string{"sae_002: TLS 1.2 or later *"}},
		{"html", "healthy", []string{"sae_001: a key stream of an agreed ID is opened *"}},
	} {
		for _, dialect := range []string{"forge-ed3", "forge-ed1"} {
			t.Run(tt.a+" "+tt.b+" "+dialect, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					n := newNetwork(t)
					n.fail(tt.a, tt.b)
					r, err := ETSI004(t.Context(), n.streams(dialect))
					if err != nil {
						t.Fatal(err)
					}
					if diff := cmp.Diff(tt.want, wrong(r)); diff != "" {
						t.Errorf("wrong lines (-want +got):\n%s\n%s", diff, table(r))
					}
				})
			})
		}
	}
}

// TestETSI004WrongDialect: a server of the other dialect is found out, by its
// silence if by nothing else.
func TestETSI004WrongDialect(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newNetwork(t).streams("forge-ed1")
		c.Here.Dialect, c.There.Dialect = "forge-ed3", "forge-ed3"
		r, err := ETSI004(t.Context(), c)
		if err != nil {
			t.Fatal(err)
		}
		if r.Count(Wrong, true) == 0 {
			t.Error(table(r))
		}
	})
}

// sloppyStreams is a KME made by hand, of dialect forge-ed3, that gets one thing
// wrong, or none. Both ends ask the same one.
type sloppyStreams struct {
	fault string

	mu       sync.Mutex
	requests []string // in hexadecimal
	open     map[ksid]int
	closed   map[ksid]bool
	asked    map[string]int // by stream and index
}

func (s *sloppyStreams) is(fault string) bool { return s.fault == fault }

func (s *sloppyStreams) serve(ctx context.Context, ln net.Listener, conf *tls.Config) error {
	if conf.VerifyConnection = nil; s.is("no client certificates") {
		conf.ClientAuth = tls.VerifyClientCertIfGiven
	}
	var sessions sync.WaitGroup
	defer sessions.Wait()
	defer ln.Close()
	stop := context.AfterFunc(ctx, func() { ln.Close() })
	defer stop()
	for {
		c, err := ln.Accept()
		if err != nil {
			return nil
		}
		sessions.Go(func() {
			defer c.Close()
			s.answer(tls.Server(c, conf))
		})
	}
}

func (s *sloppyStreams) answer(c net.Conn) {
	defer c.Close()
	head := make([]byte, 8)
	if _, err := io.ReadFull(c, head); err != nil {
		return
	}
	b := make([]byte, binary.BigEndian.Uint32(head[4:]))
	if _, err := io.ReadFull(c, b); err != nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.requests = append(s.requests, hex.EncodeToString(head)+" "+hex.EncodeToString(b))
	var answer []byte
	number := func(n uint32) { answer = binary.BigEndian.AppendUint32(answer, n) }
	switch head[3] {
	case 2:
		i := bytes.IndexByte(b, 0)
		j := i + 1 + bytes.IndexByte(b[i+1:], 0)
		qos, rest := slices.Clone(b[j+1:]), len(b)-16
		id := ksid(b[rest:])
		if id == (ksid{}) && !s.is("no ID") {
			id[0], id[1] = 7, byte(len(s.requests))
		}
		switch {
		case binary.BigEndian.Uint32(qos) > 32 && !s.is("any chunk"):
			number(7)
			binary.BigEndian.PutUint32(qos, 32)
			if s.is("no offer") {
				qos = nil
			}
		case s.is("offers") && binary.BigEndian.Uint32(qos[4:]) != 64:
			number(7)
			binary.BigEndian.PutUint32(qos[4:], 64)
		case s.open[id] == 2 && s.is("refuses again"):
			number(4)
		case s.open[id] == 2 && !s.is("opens again"):
			number(5)
		default:
			number(uint32(max(0, 1-s.open[id])))
			s.open[id]++
		}
		if s.is("small keys") && qos != nil {
			binary.BigEndian.PutUint32(qos, 16)
		}
		if s.is("other stream") {
			id[3]++
		}
		if qos != nil {
			answer = append(append(answer, qos[:len(qos)-16]...), id[:]...)
		}
	case 4:
		id, index := ksid(b), binary.BigEndian.Uint32(b[16:])
		name := hex.EncodeToString(b[:20])
		s.asked[name]++
		switch {
		case s.open[id] == 0 && !s.is("keys for nothing"), s.closed[id] && !s.is("keys after close"):
			number(3)
		case s.asked[name] > 2 && !s.is("again"), index == 3 && s.is("no index ahead"):
			number(2)
		default:
			number(0)
			if s.is("other index") {
				index++
			}
			number(index)
			sum := sha256.Sum256(b[:20])
			key := sum[:]
			if s.is("the same key") {
				key = bytes.Repeat([]byte{9}, 32)
			}
			if s.is("short key") {
				key = key[:16]
			}
			number(uint32(len(key)))
			answer = append(answer, key...)
			number(0)
		}
	case 8:
		id := ksid(b)
		if s.open[id] == 0 || s.is("never closes") {
			number(3)
			break
		}
		s.closed[id] = true
		number(0)
	}
	if s.is("cut off") {
		answer = answer[:len(answer)-1]
	}
	if s.is("too long") {
		answer = append(answer, 0)
	}
	out := append([]byte{2, 1, 1, head[3] + 1}, binary.BigEndian.AppendUint32(nil, uint32(len(answer)))...)
	_, _ = c.Write(append(out, answer...))
}

func TestETSI004Mistakes(t *testing.T) {
	const (
		opens  = "sae_001: a key stream of an agreed ID is opened *"
		alloc  = "sae_001: a key stream is allocated"
		same   = "sae_002: the same key at the same index *"
		closes = "a key stream is closed *"
	)
	for _, tt := range []struct {
		fault string
		wrong []string
		also  string // in the report
	}{
		{"none", nil, "status 7, quality of service not met; it offers keys of 32 bytes"},
		{"offers", nil, "after a counter-offer; status 1"},
		{"no client certificates", []string{"sae_001: nothing without a client certificate *", "sae_002: nothing without a client certificate *"}, ""},
		{"no ID", []string{alloc}, "names no key stream"},
		{"other stream", []string{opens}, "about another key stream"},
		{"small keys", []string{opens, alloc}, "keys of 16 bytes, not 32"},
		{"any chunk", nil, "not supported  keys of 16777216 bytes are opened"},
		{"no offer", []string{"sae_001: what cannot be had is met by a counter-offer"}, "without an offer"},
		{"opens again", nil, "not supported  it is opened again"},
		{"refuses again", []string{"sae_001: an open key stream is in use"}, "no QKD connection"},
		{"no index ahead", []string{"sae_001: an index ahead of the next"}, "insufficient key"},
		{"other index", []string{"sae_001: the same key at the same index *"}, "the key of index 1, not 0"},
		{"short key", []string{"sae_001: the same key at the same index *"}, ""},
		{"the same key", []string{": keys all different, none zero *"}, "are the same"},
		{"again", []string{"sae_001: a key is delivered once *"}, ""},
		{"keys for nothing", []string{"sae_001: no key of a stream that nobody opened *"}, ""},
		{"keys after close", []string{"sae_001: no key after it"}, ""},
		{"never closes", []string{"sae_001: " + closes, "sae_002: " + closes}, ""},
		{"cut off", []string{opens}, "the answer is cut off after 3 bytes"},
		{"too long", []string{opens}, "a metadata type and a key stream ID"},
	} {
		t.Run(tt.fault, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				n := newNetwork(t)
				s := &sloppyStreams{fault: tt.fault, open: map[ksid]int{}, closed: map[ksid]bool{}, asked: map[string]int{}}
				ln, err := n.Listen("kme:1")
				if err != nil {
					t.Fatal(err)
				}
				ctx, cancel := context.WithCancel(t.Context())
				done := make(chan error)
				go func() { done <- s.serve(ctx, ln, n.lab.ServerTLS(0)) }()
				defer func() { cancel(); <-done }()
				c := n.config()
				for _, e := range []*End{&c.Here, c.There} {
					e.URI, e.Dialect, e.TLS.ServerName = "kme:1", "forge-ed3", "kme-a"
				}
				r, err := ETSI004(t.Context(), c)
				if err != nil {
					t.Fatal(err)
				}
				got := wrong(r)
				for _, w := range tt.wrong {
					if !slices.Contains(got, w) {
						t.Errorf("not wrong: %s", w)
					}
				}
				if tt.wrong == nil && len(got) > 0 || len(tt.wrong) > 0 && len(got) == 0 {
					t.Errorf("wrong: %q", got)
				}
				if page := table(r); !strings.Contains(page, tt.also) || t.Failed() {
					t.Errorf("%q in\n%s", tt.also, page)
				}
			})
		})
	}
}

// TestETSI004Bytes compares what is sent with bytes that were written by hand.
func TestETSI004Bytes(t *testing.T) {
	id := ksid{0xff, 15: 1}
	tail := hex.EncodeToString(id[:])
	const (
		qos  = "000000200000002000000020" + "0000000000000000" + "000003e8" + "00000258"
		json = "6170706c69636174696f6e2f6a736f6e"
	)
	for _, tt := range []struct{ dialect, open, get, close string }{
		{"forge-ed3",
			"0201010200000049" + " " + "7361655f6100" + "7361655f6200" + qos + json + "00" + tail,
			"0201010400000418" + " " + tail + "00000005" + "00000400" + strings.Repeat("00", 1024),
			"0201010800000010" + " " + tail},
		{"forge-ed1",
			"0100010200000144" + " " + "716b643a2f2f7361655f6100" + "716b643a2f2f7361655f6200" + qos + json + strings.Repeat("00", 240) + tail,
			"0100010400000018" + " " + tail + "00000005" + "00000400",
			"0100010800000010" + " " + tail},
	} {
		synctest.Test(t, func(t *testing.T) {
			n := newNetwork(t)
			s := &sloppyStreams{open: map[ksid]int{}, closed: map[ksid]bool{}, asked: map[string]int{}}
			ln, err := n.Listen("kme-a:1")
			if err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithCancel(t.Context())
			done := make(chan error)
			go func() { done <- s.serve(ctx, ln, n.lab.ServerTLS(0)) }()
			defer func() { cancel(); <-done }()
			e := n.end(0)
			e.SAE, e.URI, e.Dialect = "sae_a", "kme-a:1", tt.dialect
			a, err := openApplication(e, "sae_b")
			if err != nil {
				t.Fatal(err)
			}
			defer a.close()
			a.open(t.Context(), id, a.qos)
			a.get(t.Context(), id, 5)
			a.shut(t.Context(), id)
			s.mu.Lock()
			defer s.mu.Unlock()
			if diff := cmp.Diff([]string{tt.open, tt.get, tt.close}, s.requests); diff != "" {
				t.Errorf("%s (-want +got):\n%s", tt.dialect, diff)
			}
		})
	}
}

func TestETSI004ConfigIsChecked(t *testing.T) { synctest.Test(t, testETSI004Config) }

func testETSI004Config(t *testing.T) {
	n := newNetwork(t)
	for _, tt := range []struct {
		edit func(*End)
		want string
	}{
		{func(e *End) { e.Dialect = "" }, `dialect "" is neither forge-ed3 nor forge-ed1`},
		{func(e *End) { e.URI = "https://kme-a" }, `URI "https://kme-a" is not host:port`},
		{func(e *End) { e.TLS.Memory = nil }, "no root certificate: the KMS could not be verified"},
	} {
		c := n.config()
		c.Here.URI, c.Here.Dialect, c.There = "kme-a:1", "forge-ed3", nil
		tt.edit(&c.Here)
		if _, err := ETSI004(t.Context(), c); err == nil || err.Error() != tt.want {
			t.Errorf("got %v, want %s", err, tt.want)
		}
	}
}

// FuzzETSI004Decode: no answer makes the decoder fail in another way than by an
// error, or hold more than was sent.
func FuzzETSI004Decode(f *testing.F) {
	f.Add(byte(2), false, []byte{0, 0, 0, 7})
	f.Add(byte(4), true, []byte{0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 2, 9, 9, 0, 0, 0, 0})
	f.Add(byte(8), false, []byte{0, 0, 0})
	f.Fuzz(func(t *testing.T, v byte, fixed bool, b []byte) {
		var a said
		s := &application{wire: wire{fixed: fixed}}
		if s.decode(service(v), b, &a) == nil && len(a.key) > len(b) {
			t.Error("more than there was")
		}
	})
}
