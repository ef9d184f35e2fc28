package kmesim

import (
	"bytes"
	"context"
	"crypto/tls"
	"io"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"keyturn/internal/memnet"
)

// linked is two KMEs that reach each other over a network only.
type linked struct {
	t       *testing.T
	lab     *Lab
	network memnet.Network
	kmes    [2]*KME // kme-a, kme-b
	stop    [2]func()
}

const linkPort = ":8445"

// link starts two KMEs, in a bubble.
func link(t *testing.T) *linked {
	lab, err := NewLab(LabOptions{})
	if err != nil {
		t.Fatal(err)
	}
	l := &linked{t: t, lab: lab}
	for i := range l.kmes {
		l.start(i)
		t.Cleanup(func() { l.stop[i]() })
	}
	time.Sleep(helloInterval) // the first may have been alone for a moment
	synctest.Wait()
	return l
}

// start starts a KME, without whatever it had before.
func (l *linked) start(i int) {
	pair := New(Options{})
	k := []*KME{pair.A, pair.B}[i]
	server, client := l.lab.proof(i).linkTLS(k.other)
	r := newRemote(k.other+linkPort, client, l.network.Dial)
	k.peer = r
	l.kmes[i] = k
	ln, err := l.network.Listen(k.name + linkPort)
	if err != nil {
		l.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(l.t.Context())
	done := make(chan error)
	go func() { done <- k.runLink(ctx, ln, server, r) }()
	l.stop[i] = func() {
		if cancel == nil {
			return
		}
		cancel()
		cancel = nil
		if err := <-done; err != nil {
			l.t.Errorf("runLink = %v, want nil at its context's end", err)
		}
	}
}

// make asks a KME for a key of sae_001 and further slaves than sae_002.
func (l *linked) make(kme int, slaves ...string) (code int, id string, made []byte) {
	l.t.Helper()
	body := `{}`
	if len(slaves) > 0 {
		body = `{"additional_slave_SAE_IDs":["` + strings.Join(slaves, `","`) + `"]}`
	}
	code, answer := call(l.kmes[kme], "sae_001", "POST", api+"sae_002/enc_keys", body)
	if code != 200 {
		return code, answer, nil
	}
	ids, all := keys(l.t, code, answer)
	return code, ids[0], all[0]
}

// fetch asks a KME for a key of sae_001.
func (l *linked) fetch(kme int, slave, id string) (code int, got []byte) {
	l.t.Helper()
	code, answer := call(l.kmes[kme], slave, "GET", api+"sae_001/dec_keys?key_ID="+id, "")
	if code != 200 {
		return code, nil
	}
	_, all := keys(l.t, code, answer)
	return code, all[0]
}

// TestLink: a key is the same at both ends, and delivered once, wherever it was
// made and wherever its slaves ask.
func TestLink(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := link(t)
		for _, where := range []struct{ made, fetched int }{{0, 1}, {1, 0}, {0, 0}, {1, 1}} {
			code, id, made := l.make(where.made, "sae_003")
			if code != 200 {
				t.Fatal(code, id)
			}
			if code, _ := l.fetch(where.fetched, "sae_004", id); code != 401 {
				t.Errorf("%v: stranger: %d", where, code)
			}
			for _, slave := range []string{"sae_002", "sae_003"} {
				if code, got := l.fetch(where.fetched, slave, id); code != 200 || !bytes.Equal(got, made) {
					t.Errorf("%v: %s: %d, or another key", where, slave, code)
				}
				for kme := range 2 {
					if code, _ := l.fetch(kme, slave, id); code == 200 {
						t.Errorf("%v: %s got the key twice, from KME %d", where, slave, kme)
					}
				}
			}
		}
		for _, id := range []string{"unknown", strings.Repeat("x", 100)} {
			if code, _ := l.fetch(0, "sae_002", id); code != 400 {
				t.Errorf("unknown ID: %d", code)
			}
		}
		for _, k := range l.kmes {
			if n := k.store.waiting(); n != 0 {
				t.Errorf("%d keys wait at %s", n, k.name)
			}
		}
	})
}

// TestLinkLost: while the other KME is out of reach there are no new keys, those
// that it holds can be fetched from it, and the link comes back by itself.
func TestLinkLost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := link(t)
		code, id, _ := l.make(0)
		if s := l.kmes[0].State().Link; code != 200 || !s.Up || s.To != "kme-b:8445" {
			t.Fatalf("%d %s, link %+v", code, id, s)
		}
		l.network.Cut(true)
		began := time.Now()
		code, answer, _ := l.make(0)
		if want := `{"message":"the other KME cannot be reached"}`; code != 503 || answer != want || time.Since(began) > linkTimeout {
			t.Errorf("%d %s after %v", code, answer, time.Since(began))
		}
		if s := l.kmes[0].State().Link; s.Up || s.Error != "no answer within 2s" {
			t.Errorf("link %+v", s)
		}
		if stored := stored(l.kmes[0], "sae_001", "sae_002"); stored != DefaultPool {
			t.Errorf("%d keys stored: one that nobody got is gone", stored)
		}
		if code, _ := l.fetch(1, "sae_002", id); code != 200 {
			t.Errorf("a key that had arrived: %d", code)
		}
		if code, _ := l.fetch(0, "sae_002", id); code != 400 {
			t.Errorf("a key that the other KME may have: %d", code)
		}
		time.Sleep(time.Minute)
		l.network.Cut(false)
		healed := time.Now()
		time.Sleep(helloInterval + linkTimeout)
		if s := l.kmes[0].State().Link; !s.Up || s.Error != "" || s.Since.Before(healed) {
			t.Errorf("link %+v, healed at %v", s, healed)
		}
		if code, answer, _ := l.make(0); code != 200 {
			t.Errorf("healed: %d %s", code, answer)
		}
	})
}

// TestRestart: the first request after a restart of the other KME finds a dead
// connection and gets its key all the same.
func TestRestart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := link(t)
		_, old, _ := l.make(0)
		l.stop[1]()
		if code, _, _ := l.make(0); code != 503 {
			t.Errorf("while the other KME is gone: %d", code)
		}
		l.start(1)
		code, id, made := l.make(0)
		if code != 200 {
			t.Fatalf("after its restart: %d %s", code, id)
		}
		if code, got := l.fetch(1, "sae_002", id); code != 200 || !bytes.Equal(got, made) {
			t.Errorf("after its restart: %d, or another key", code)
		}
		if code, _ := l.fetch(1, "sae_002", old); code != 400 {
			t.Errorf("a key from before its restart: %d", code)
		}
	})
}

// TestUnheard: keys whose master got no answer, because none came from the other
// KME, do not stay there.
func TestUnheard(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := link(t)
		b := l.kmes[1]
		store := b.verbs[verbKeys]
		b.verbs[verbKeys] = func(ctx context.Context, body []byte) ([]byte, error) {
			answer, err := store(ctx, body)
			<-ctx.Done()
			return answer, err
		}
		code, _, _ := l.make(0)
		if n := b.store.waiting(); code != 503 || n != 1 {
			t.Errorf("%d, and %d keys wait", code, n)
		}
		time.Sleep(helloInterval)
		synctest.Wait()
		if n := b.store.waiting(); n != 0 {
			t.Errorf("%d keys wait that nobody heard of", n)
		}
		l.kmes[0].addUnheard(make([]string, maxUnheard+1))
		if n := len(l.kmes[0].unheard); n != maxUnheard {
			t.Errorf("%d unheard IDs kept", n)
		}
	})
}

// TestLinkStrangers: an SAE, and a KME that is not the other one, get no word.
func TestLinkStrangers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := link(t)
		_, client := l.lab.proof(1).linkTLS(NameA)
		for _, tt := range []struct {
			name string
			cert tls.Certificate
			ok   bool
		}{
			{"kme-b", l.lab.KMEs[1], true},
			{"sae_001", l.lab.SAEs[0], false},
			{"kme-a", l.lab.KMEs[0], false},
		} {
			conf := client.Clone()
			conf.Certificates = []tls.Certificate{tt.cert}
			r := newRemote(NameA+linkPort, conf, l.network.Dial)
			if _, err := r.call(t.Context(), verbHello, nil); (err == nil) != tt.ok {
				t.Errorf("%s: %v", tt.name, err)
			}
			r.http.CloseIdleConnections()
		}
		// And one that answers for the other is not believed.
		_, client = l.lab.proof(0).linkTLS(NameB)
		r := newRemote(NameA+linkPort, client, l.network.Dial)
		if _, err := r.call(t.Context(), verbHello, nil); err == nil || !strings.Contains(err.Error(), `certificate of "kme-a", not of kme-b`) {
			t.Errorf("kme-a for kme-b: %v", err)
		}
	})
}

// TestLinkCalls: what is no call is refused, and refusals leave the link up.
func TestLinkCalls(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := link(t)
		l.kmes[1].handleLink("fail", func(context.Context, []byte) ([]byte, error) { return nil, errMalformed })
		r := l.kmes[0].peer.(*remote)
		for _, tt := range []struct {
			verb string
			body []byte
			want string
		}{
			{"fail", nil, `answered 500 "malformed message of the other KME"`},
			{"none", nil, `answered 500 "no handler of \"none\""`},
			{"", nil, `answered 500 "no handler of \"\""`},
			{verbKeys, []byte("nonsense"), `answered 500 "malformed message of the other KME"`},
			{verbForget, nil, `answered 500 "malformed message of the other KME"`},
			{verbTake, batchOf([]string{"a"}).encode(), `answered 500 "malformed message of the other KME"`},
			{verbHello, make([]byte, maxLinkBody+1), `answered 413 "too long"`},
		} {
			if _, err := r.call(t.Context(), tt.verb, tt.body); err == nil || err.Error() != tt.want {
				t.Errorf("%q: %v, want %s", tt.verb, err, tt.want)
			}
			if s := r.link(); !s.Up {
				t.Errorf("%q: link %+v", tt.verb, s)
			}
		}
		for _, tt := range []struct {
			method, uri string
			body        io.Reader
			code        int
		}{
			{"POST", r.uri + verbHello, nil, 200},
			{"POST", r.uri + verbHello, io.MultiReader(strings.NewReader("no length")), 413},
			{"GET", r.uri + verbHello, nil, 404},
			{"POST", "https://kme-b:8445" + api + "sae_002/enc_keys", nil, 404},
		} {
			req, err := http.NewRequest(tt.method, tt.uri, tt.body)
			if err != nil {
				t.Fatal(err)
			}
			resp, err := r.http.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			resp.Body.Close()
			if resp.StatusCode != tt.code {
				t.Errorf("%s %s: %d, want %d", tt.method, tt.uri, resp.StatusCode, tt.code)
			}
		}
	})
}

// TestCut: the fault separates KMEs of one process as well as of two, and either
// end can have it.
func TestCut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		pair, far := New(Options{}), link(t)
		far.kmes[1].SetFault(Fault{Kind: Cut, Times: 1})
		time.Sleep(3 * helloInterval) // which uses nothing up
		if code, _, _ := far.make(0); code != 503 || far.kmes[1].Fault().Kind != Healthy {
			t.Errorf("%d, then %v", code, far.kmes[1].Fault())
		}
		time.Sleep(helloInterval)
		synctest.Wait()
		for _, kmes := range [][2]*KME{{pair.A, pair.B}, far.kmes} {
			for _, k := range kmes {
				k.SetFault(Fault{Kind: Cut})
				if code, _ := call(kmes[0], "sae_001", "GET", api+"sae_002/enc_keys", ""); code != 503 {
					t.Errorf("%d while %s is cut off", code, k.name)
				}
				if s := k.State().Link; s.Up || s.Error != "the link is cut" {
					t.Errorf("link of %s: %+v", k.name, s)
				}
				k.SetFault(Fault{})
				if code, _ := call(kmes[0], "sae_001", "GET", api+"sae_002/enc_keys", ""); code != 200 {
					t.Errorf("%d when %s is back", code, k.name)
				}
			}
			if n := len(kmes[1].store.keys); n != 2 {
				t.Errorf("%d keys wait, want those two that were answered", n)
			}
		}
	})
}

func TestOutOfStep(t *testing.T) {
	p := New(Options{})
	p.A.SetFault(Fault{Kind: OutOfStep, Times: 1})
	for i, want := range []int{400, 200} {
		code, answer := call(p.A, "sae_001", "GET", api+"sae_002/enc_keys", "")
		ids, _ := keys(t, code, answer)
		if code, _ := call(p.B, "sae_002", "GET", api+"sae_001/dec_keys?key_ID="+ids[0], ""); code != want {
			t.Errorf("key %d: %d, want %d", i, code, want)
		}
	}
}

func FuzzDecodeBatch(f *testing.F) {
	f.Add((&batch{"sae_001", []string{"sae_002", "sae_003"}, []key{{"id", []byte("key")}, {"other", nil}}}).encode())
	f.Add(batchOf([]string{"a"}).encode())
	f.Add(append(batchOf([]string{"a"}).encode(), 0))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, body []byte) {
		b, err := decodeBatch(body)
		if err != nil {
			return
		}
		if len(b.keys) > MaxKeysPerRequest || len(b.slaves) > MaxSAEs+1 {
			t.Errorf("%d keys for %d slaves", len(b.keys), len(b.slaves))
		}
		if !bytes.Equal(b.encode(), body) {
			t.Error("encodes to other bytes")
		}
	})
}

func FuzzDecodeTaken(f *testing.F) {
	asked := batchOf([]string{"a", "b"})
	got := []key{{"a", []byte("one")}, {"b", []byte("two")}}
	f.Add(encodeTaken(batchOf([]string{"a", "b"}), got, nil))
	f.Add(encodeTaken(batchOf([]string{"b", "a"}), []key{got[1], got[0]}, nil))
	f.Add(encodeTaken(asked, nil, bad(textNotFound)))
	f.Fuzz(func(t *testing.T, answer []byte) {
		keys, p, err := decodeTaken(answer, asked)
		if n := 0; err == nil && p == nil {
			for i, k := range keys {
				if k.ID == asked.keys[i].ID {
					n++
				}
			}
			if n != len(asked.keys) {
				t.Errorf("%d of the keys asked for", n)
			}
		} else if keys != nil || err != nil && p != nil {
			t.Error("keys and a problem")
		}
	})
}

// TestTaken: the answer comes out as it went in.
func TestTaken(t *testing.T) {
	asked := batchOf([]string{"a"})
	keys, p, err := decodeTaken(encodeTaken(batchOf([]string{"a"}), []key{{"a", []byte("one")}}, nil), asked)
	if err != nil || p != nil || !cmp.Equal(keys, []key{{"a", []byte("one")}}) {
		t.Errorf("%d keys, %v, %v", len(keys), p, err)
	}
	_, p, err = decodeTaken(encodeTaken(asked, nil, bad(textNotFound)), asked)
	if err != nil || p == nil || p.status != 400 || p.Message != textNotFound {
		t.Errorf("%+v, %v", p, err)
	}
}
