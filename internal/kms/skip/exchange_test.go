package skip

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"keyturn/internal/kms"
	"keyturn/internal/kms/kmstls"
	"keyturn/internal/memnet"
	"keyturn/internal/psk"
	"keyturn/internal/testca"
)

// The key of draft-cisco-skip-02, figure 6.
const (
	figureID  = "1726e9AE76234FB1dd1283d4dca1911e1f93864d70f3069e"
	figureKey = "ad229dfb8a276e74c1f3b6c09349a69fb2fed73c541270663f0e5cbbfb031670"
)

func isFigureKey(key *psk.Key) bool {
	b, err := hex.DecodeString(figureKey)
	return err == nil && key != nil && bytes.Equal(key.Bytes(), b)
}

// provider is a key provider made by hand: it answers the n-th request with
// the n-th text, byte for byte, and closes the connection. Requests are
// recorded as "GET /path?query".
type provider struct {
	answers []string

	mu   sync.Mutex
	seen []string
}

func (p *provider) asked() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return append([]string(nil), p.seen...)
}

// site is a network and the authority that both ends trust. Alice is our
// provider, Bob the peer's.
type site struct {
	*testca.Authority
	memnet.Network
	t *testing.T
}

func newSite(t *testing.T) *site { return &site{Authority: testca.New(t, "root"), t: t} }

func (s *site) clientTLS() kmstls.Config {
	return kmstls.Config{Memory: &tls.Config{Certificates: []tls.Certificate{s.Client("Alice")}, RootCAs: s.Pool()}}
}

func (s *site) serverTLS(host string) *tls.Config {
	return &tls.Config{
		Certificates: []tls.Certificate{s.Server(host)},
		ClientAuth:   tls.RequireAndVerifyClientCert,
		ClientCAs:    s.Pool(),
	}
}

func (s *site) serve(answers ...string) *provider {
	return s.serveTLS("kme-a", s.serverTLS("kme-a"), answers...)
}

func (s *site) serveTLS(host string, conf *tls.Config, answers ...string) *provider {
	s.t.Helper()
	ln, err := s.Listen(host + ":443")
	if err != nil {
		s.t.Fatal(err)
	}
	p := &provider{answers: answers}
	var handlers sync.WaitGroup
	handlers.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			handlers.Go(func() { p.answer(tls.Server(c, conf)) })
		}
	})
	s.t.Cleanup(func() { ln.Close(); handlers.Wait() })
	return p
}

func (p *provider) answer(c net.Conn) {
	defer c.Close()
	r, err := http.ReadRequest(bufio.NewReader(c))
	if err != nil {
		return
	}
	p.mu.Lock()
	text := ""
	if len(p.seen) < len(p.answers) {
		text = p.answers[len(p.seen)]
	}
	p.seen = append(p.seen, r.Method+" "+r.URL.RequestURI())
	p.mu.Unlock()
	_, _ = c.Write([]byte(text))
}

func (s *site) kms(uris ...string) *KMS {
	s.t.Helper()
	if uris == nil {
		uris = []string{"https://kme-a"}
	}
	k, err := New(Config{URIs: uris, SAE: "Alice", TLS: s.clientTLS(), Dial: s.Dial})
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { k.Close() })
	return k
}

func (s *site) source(peer string, uris ...string) kms.Source {
	s.t.Helper()
	c, err := s.kms(uris...).For(peer)
	if err != nil {
		s.t.Fatal(err)
	}
	return c
}

// ok is a plain answer.
func ok(body string) string { return says(200, body) }

func says(status int, body string) string {
	return fmt.Sprintf("HTTP/1.1 %d %s\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s",
		status, http.StatusText(status), len(body), body)
}

const (
	aliceKnowsBob = `{"entropy":true,"key":true,"algorithm":"PRF","localSystemID":"Alice","remoteSystemID":["Bob","Eve"]}`
	keyAnswer     = `{"keyId":"` + figureID + `","key":"` + figureKey + `"}`
)

// exchange is one hand-made exchange of testdata: what is called, what has to
// be asked (lines ">"), the answers byte for byte (lines "<", each ended by
// CR LF but for the last), and the outcome: "key", or the error.
type exchange struct {
	call    string // key, status, or the key ID
	asked   []string
	answers []string
	outcome string
}

func readExchange(t *testing.T, path string) exchange {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var x exchange
	for line := range strings.Lines(string(text)) {
		line = strings.TrimSuffix(line, "\n")
		kind, rest, _ := strings.Cut(line, " ")
		switch kind {
		case "", "#":
		case "call":
			x.call = rest
		case ">":
			x.asked, x.answers = append(x.asked, rest), append(x.answers, "")
		case "<":
			a := &x.answers[len(x.answers)-1]
			if *a != "" {
				*a += "\r\n"
			}
			*a += rest
		case "outcome":
			x.outcome = rest
		default:
			t.Fatalf("%s: %q", path, line)
		}
	}
	return x
}

// TestExchanges is about exchanges that were written by hand, of the shapes
// that the draft and real key providers have.
func TestExchanges(t *testing.T) {
	paths, err := filepath.Glob("testdata/exchange/*.txt")
	if err != nil || len(paths) == 0 {
		t.Fatal("no exchanges", err)
	}
	for _, path := range paths {
		t.Run(strings.TrimSuffix(filepath.Base(path), ".txt"), func(t *testing.T) {
			x := readExchange(t, path)
			synctest.Test(t, func(t *testing.T) {
				s := newSite(t)
				p := s.serve(x.answers...)
				c := s.source("Bob")
				var key *psk.Key
				var err error
				id := figureID
				switch x.call {
				case "key":
					id, key, err = c.Key(t.Context())
				case "status":
					_, err = c.Status(t.Context())
				default:
					key, err = c.KeyByID(t.Context(), x.call)
				}
				got := "key"
				switch {
				case err != nil:
					got = err.Error()
					if key != nil {
						t.Error("a key beside the error")
					}
				case x.call == "status":
					got = "status"
				case id != figureID || !isFigureKey(key):
					got = "another key"
				}
				if got != x.outcome {
					t.Errorf("got  %s\nwant %s", got, x.outcome)
				}
				if got, want := strings.Join(p.asked(), "\n"), strings.Join(x.asked, "\n"); got != want {
					t.Errorf("asked:\n%s\nwant:\n%s", got, want)
				}
			})
		})
	}
}

// TestStatuses: what each status of the draft, and of servers in between,
// means to those who call.
func TestStatuses(t *testing.T) {
	for _, tt := range []struct {
		status    int
		key, byID error
	}{
		{400, kms.ErrNoKeys, kms.ErrUnknownKey},
		{401, kms.ErrRefused, kms.ErrRefused},
		{404, kms.ErrRefused, kms.ErrUnknownKey},
		{405, kms.ErrRefused, kms.ErrRefused},
		{429, kms.ErrNoKeys, nil},
		{500, nil, nil},
		{503, kms.ErrNoKeys, kms.ErrUnknownKey},
		{504, kms.ErrNoKeys, nil},
		{302, kms.ErrRefused, kms.ErrRefused},
	} {
		synctest.Test(t, func(t *testing.T) {
			s := newSite(t)
			no := says(tt.status, `{"detail":"no such thing"}`)
			p := s.serve(ok(aliceKnowsBob), no, no, no, no, no, no, no, no)
			c := s.source("Bob")
			_, _, err := c.Key(t.Context())
			is(t, fmt.Sprint("key, ", tt.status), err, tt.key)
			if want := fmt.Sprintf("https://kme-a answered %d \"no such thing\"", tt.status); !strings.HasSuffix(err.Error(), want) {
				t.Errorf("got %q, want it to end in %s", err, want)
			}
			before := len(p.asked())
			_, err = c.KeyByID(t.Context(), figureID)
			is(t, fmt.Sprint("key by ID, ", tt.status), err, tt.byID)
			if again := len(p.asked()) - before; (again > 1) != errors.Is(tt.byID, kms.ErrUnknownKey) {
				t.Errorf("%d: asked %d times", tt.status, again)
			}
		})
	}
}

// is fails unless err is an error with the one sentinel, or with none.
func is(t *testing.T, what string, err, want error) {
	t.Helper()
	if err == nil {
		t.Errorf("%s: no error", what)
	}
	for _, s := range []error{kms.ErrNoKeys, kms.ErrUnknownKey, kms.ErrRefused} {
		if errors.Is(err, s) != (s == want) {
			t.Errorf("%s: %v, want %v", what, err, want)
		}
	}
}

// TestCapabilities are asked for once, for all peers, unless they do not cover
// the peer: providers learn of each other while they run.
func TestCapabilities(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const nobody = `{"entropy":false,"key":true,"algorithm":"","localSystemID":"Alice","remoteSystemID":[]}`
		s := newSite(t)
		p := s.serve(ok(nobody), ok(aliceKnowsBob), ok(keyAnswer), ok(keyAnswer), ok(keyAnswer))
		k := s.kms()
		bob, err := k.For("Bob")
		if err != nil {
			t.Fatal(err)
		}
		_, _, err = bob.Key(t.Context())
		is(t, "before Bob is known", err, kms.ErrRefused)
		for range 2 {
			if _, _, err := bob.Key(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		eve, err := k.For("Eve")
		if err != nil {
			t.Fatal(err)
		}
		if _, err := eve.KeyByID(t.Context(), figureID); err != nil {
			t.Fatal(err)
		}
		want := []string{
			"GET /capabilities", "GET /capabilities",
			"GET /key?remoteSystemID=Bob&size=256", "GET /key?remoteSystemID=Bob&size=256",
			"GET /key/" + figureID + "?remoteSystemID=Eve",
		}
		if got := p.asked(); strings.Join(got, "\n") != strings.Join(want, "\n") {
			t.Errorf("asked %q, want %q", got, want)
		}
	})
}

func TestStatus(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t)
		s.serve(ok(`{"entropy":true,"key":true,"algorithm":"PRF","localSystemID":"Al\u001bice","remoteSystemID":["B*"]}`))
		got, err := s.source("Bob").Status(t.Context())
		if want := (kms.Status{SourceKME: "Alice", TargetKME: "Bob"}); err != nil || got != want {
			t.Errorf("got %+v, %v", got, err)
		}
	})
}

// TestNothingIsAskedTwice is the rule for a key that may be gone.
func TestNothingIsAskedTwice(t *testing.T) {
	for name, lost := range map[string]string{
		"cut":            "",
		"cut off body":   "HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n{",
		"fault":          says(500, ""),
		"gateway":        says(504, ""),
		"another answer": ok("{}"),
	} {
		synctest.Test(t, func(t *testing.T) {
			s := newSite(t)
			p := s.serve(ok(aliceKnowsBob), lost, ok(keyAnswer), ok(keyAnswer))
			other := s.serveTLS("kme-b", s.serverTLS("kme-b"), ok(keyAnswer))
			_, err := s.source("Bob", "https://kme-a", "https://kme-b").KeyByID(t.Context(), figureID)
			is(t, name, err, nil)
			if got := len(p.asked()) + len(other.asked()); got != 2 {
				t.Errorf("%s: asked %d times, want 2", name, got)
			}
		})
	}
}

// TestKeyByIDWaits is about a provider that hears of the key later than we do.
func TestKeyByIDWaits(t *testing.T) {
	for _, status := range []int{400, 404, 503} {
		synctest.Test(t, func(t *testing.T) {
			s := newSite(t)
			p := s.serve(ok(aliceKnowsBob), says(status, ""), says(status, ""), ok(keyAnswer))
			began := time.Now()
			key, err := s.source("Bob").KeyByID(t.Context(), figureID)
			if err != nil || !isFigureKey(key) {
				t.Fatalf("after %d: %v", status, err)
			}
			if took := time.Since(began); took != 150*time.Millisecond || len(p.asked()) != 4 {
				t.Errorf("asked %d times in %v", len(p.asked()), took)
			}
		})
	}
}

// TestEscapes: whatever a key ID and a system ID are made of, they stay where
// they belong.
func TestEscapes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const id = `a/../b?c&d=e#f %`
		s := newSite(t)
		p := s.serve(ok(strings.Replace(aliceKnowsBob, "Bob", "B&b=?/é", 1)), ok(fmt.Sprintf(`{"keyId":%q,"key":%q}`, id, figureKey)))
		if _, err := s.source("B&b=?/é").KeyByID(t.Context(), id); err != nil {
			t.Fatal(err)
		}
		want := "GET /key/a%2F..%2Fb%3Fc&d=e%23f%20%25?remoteSystemID=B%26b%3D%3F%2F%C3%A9"
		if got := p.asked()[1]; got != want {
			t.Errorf("asked %s\nwant  %s", got, want)
		}
	})
}

func TestKeyIDsThatCannotBeAskedFor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t)
		p := s.serve(ok(aliceKnowsBob))
		c := s.source("Bob")
		for _, id := range []string{"", ".", "..", "a\r\nb", strings.Repeat("a", kms.MaxKeyID+1)} {
			if _, err := c.KeyByID(t.Context(), id); err == nil {
				t.Errorf("%q was asked for", id)
			}
		}
		if len(p.asked()) != 0 {
			t.Error("the provider was asked")
		}
	})
}

func TestTLS12IsRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t)
		conf := s.serverTLS("kme-a")
		conf.MaxVersion = tls.VersionTLS12
		s.serveTLS("kme-a", conf, ok(aliceKnowsBob))
		_, _, err := s.source("Bob").Key(t.Context())
		is(t, "TLS 1.2", err, kms.ErrRefused)
	})
}

func TestNewRefuses(t *testing.T) {
	s := newSite(t)
	for _, tt := range []struct{ uri, sae, want string }{
		{"https://kme-a", "", "SAE ID is empty"},
		{"https://kme-a", "a\n", `SAE ID "a\n" is not printable text`},
		{"https://kme-a", strings.Repeat("a", maxID+1), "SAE ID is 1025 bytes long, over 1024"},
		{"http://kme-a", "Alice", `URI "http://kme-a" does not begin with https://`},
	} {
		k, err := New(Config{URIs: []string{tt.uri}, SAE: tt.sae, TLS: s.clientTLS()})
		if k != nil || err == nil || err.Error() != tt.want {
			t.Errorf("got %v, want %s", err, tt.want)
		}
	}
	for peer, want := range map[string]string{
		"":      "SAE ID is empty",
		"Alice": `SAE "Alice" is our own, not a peer's`,
	} {
		if c, err := s.kms().For(peer); c != nil || err == nil || err.Error() != want {
			t.Errorf("For(%q): %v, want %s", peer, err, want)
		}
	}
}
