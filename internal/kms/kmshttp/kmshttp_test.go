package kmshttp

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"log"
	"net/http"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"keyturn/internal/kms"
	"keyturn/internal/kms/kmstls"
	"keyturn/internal/memnet"
	"keyturn/internal/testca"
)

// site is the hosts of a test and the authority that both ends trust.
type site struct {
	*testca.Authority
	memnet.Network
	t *testing.T
}

func newSite(t *testing.T) *site { return &site{Authority: testca.New(t, "root"), t: t} }

func (s *site) clientTLS() kmstls.Config {
	return kmstls.Config{Memory: &tls.Config{Certificates: []tls.Certificate{s.Client("sae_001")}, RootCAs: s.Pool()}}
}

func (s *site) serverTLS(host string) *tls.Config {
	return &tls.Config{
		Certificates: []tls.Certificate{s.Server(host)},
		ClientAuth:   tls.RequireAndVerifyClientCert,
		ClientCAs:    s.Pool(),
	}
}

// host records what it is asked: "GET /path?query body".
type host struct {
	mu   sync.Mutex
	seen []string
}

func (h *host) asked() []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return append([]string(nil), h.seen...)
}

// serve answers the n-th request by the n-th handler, and all later ones by
// the last.
func (s *site) serve(name string, handlers ...http.HandlerFunc) *host {
	return s.serveTLS(name, s.serverTLS(name), handlers...)
}

func (s *site) serveTLS(name string, conf *tls.Config, handlers ...http.HandlerFunc) *host {
	s.t.Helper()
	ln, err := s.Listen(name + ":443")
	if err != nil {
		s.t.Fatal(err)
	}
	h := new(host)
	server := &http.Server{
		ErrorLog: log.New(io.Discard, "", 0),
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			body, _ := io.ReadAll(r.Body)
			h.mu.Lock()
			handler := handlers[min(len(h.seen), len(handlers)-1)]
			h.seen = append(h.seen, strings.TrimSpace(r.Method+" "+r.URL.RequestURI()+" "+string(body)))
			h.mu.Unlock()
			handler(w, r)
		}),
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = server.Serve(tls.NewListener(ln, conf))
	}()
	s.t.Cleanup(func() { server.Close(); <-done })
	return h
}

func (s *site) client(c Config) *Client {
	s.t.Helper()
	if c.URIs == nil {
		c.URIs = []string{"https://kme-a"}
	}
	c.MinTLS = max(c.MinTLS, tls.VersionTLS12)
	c.TLS = s.clientTLS()
	c.Dial = s.Dial
	k, err := New(c)
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(k.Close)
	return k
}

func says(status int, body string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(status)
		_, _ = io.WriteString(w, body)
	}
}

// silent never answers.
func silent(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }

// cut closes the connection without an answer.
func cut(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }

func means(status int) error {
	if status == http.StatusBadRequest {
		return kms.ErrUnknownKey
	}
	return nil
}

func request() *Request {
	return &Request{
		Path: []string{"keys", "a b"}, Query: "n=1", Means: means,
		Text: func(b []byte) string { return Shown(string(b)) },
	}
}

func TestRequests(t *testing.T) {
	post := request()
	post.Query, post.Body = "", []byte(`{"n":1}`)
	awkward := request()
	awkward.Path = []string{"keys", `a/b?c#d %é`}
	for _, tt := range []struct {
		uri, api string
		request  *Request
		want     string
	}{
		{"https://kme-a", "", request(), "GET /keys/a%20b?n=1"},
		{"https://kme-a/", "", request(), "GET /keys/a%20b?n=1"},
		{"https://kme-a/site%2F1/", "", request(), "GET /site%2F1/keys/a%20b?n=1"},
		{"https://kme-a/api/v1/", "/api/v1", request(), "GET /keys/a%20b?n=1"},
		{"https://kme-a/x/api/v1", "/api/v1", request(), "GET /x/keys/a%20b?n=1"},
		{"https://kme-a", "", post, `POST /keys/a%20b {"n":1}`},
		{"https://kme-a", "", awkward, "GET /keys/a%2Fb%3Fc%23d%20%25%C3%A9?n=1"},
	} {
		synctest.Test(t, func(t *testing.T) {
			s := newSite(t)
			h := s.serve("kme-a", says(200, "{}"))
			a, err := s.client(Config{URIs: []string{tt.uri}, API: tt.api}).Do(t.Context(), tt.request)
			if err != nil || string(a.Body) != "{}" {
				t.Fatal(err)
			}
			if diff := cmp.Diff([]string{tt.want}, h.asked()); diff != "" {
				t.Errorf("%s (-want +got):\n%s", tt.uri, diff)
			}
		})
	}
}

// TestTurns is about who is asked when the one before gave no key, and who is
// not, because a key might be lost.
func TestTurns(t *testing.T) {
	no := says(400, "unknown")
	for _, tt := range []struct {
		name  string
		a, b  []http.HandlerFunc
		once  bool
		asked [2]int
		want  string // error, or empty
	}{
		{"first", []http.HandlerFunc{says(200, "{}")}, []http.HandlerFunc{cut}, true, [2]int{1, 0}, ""},
		{"a plain no", []http.HandlerFunc{no}, []http.HandlerFunc{says(200, "{}")}, true, [2]int{1, 0},
			`kms does not know this key ID: https://kme-a answered 400 "unknown"`},
		{"busy", []http.HandlerFunc{says(503, "")}, []http.HandlerFunc{says(200, "{}")}, true, [2]int{1, 1}, ""},
		{"fault", []http.HandlerFunc{says(500, "")}, []http.HandlerFunc{says(200, "{}")}, false, [2]int{1, 1}, ""},
		{"fault, once", []http.HandlerFunc{says(500, "")}, []http.HandlerFunc{says(200, "{}")}, true, [2]int{1, 0},
			"https://kme-a answered 500"},
		{"cut", []http.HandlerFunc{cut}, []http.HandlerFunc{says(200, "{}")}, false, [2]int{1, 1}, ""},
		{"cut, once", []http.HandlerFunc{cut}, []http.HandlerFunc{says(200, "{}")}, true, [2]int{1, 0},
			"https://kme-a: connection closed before the end of the answer"},
		{"silent", []http.HandlerFunc{silent}, []http.HandlerFunc{says(200, "{}")}, false, [2]int{1, 1}, ""},
		{"silent, once", []http.HandlerFunc{silent}, []http.HandlerFunc{says(200, "{}")}, true, [2]int{1, 0},
			"https://kme-a: no answer within 5s"},
		{"all", []http.HandlerFunc{says(503, "")}, []http.HandlerFunc{says(502, "")}, false, [2]int{1, 1},
			"https://kme-a answered 503; https://kme-b answered 502"},
		{"redirect", []http.HandlerFunc{says(302, "")}, nil, false, [2]int{1, 0}, "https://kme-a answered 302"},
		{"endless", []http.HandlerFunc{says(200, strings.Repeat(" ", maxAnswer+1))}, nil, true, [2]int{1, 0},
			"https://kme-a: answer is too long: over 65536 bytes"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newSite(t)
				a := s.serve("kme-a", tt.a...)
				b := new(host)
				if tt.b != nil {
					b = s.serve("kme-b", tt.b...)
				}
				r := request()
				r.Once = tt.once
				_, err := s.client(Config{URIs: []string{"https://kme-a", "https://kme-b"}}).Do(t.Context(), r)
				got := ""
				if err != nil {
					got = err.Error()
				}
				if got != tt.want {
					t.Errorf("got %q\nwant %q", got, tt.want)
				}
				if got := [2]int{len(a.asked()), len(b.asked())}; got != tt.asked {
					t.Errorf("asked %v times, want %v", got, tt.asked)
				}
			})
		})
	}
}

// TestNotYet: only a plain "not yet" is followed by the same request, for half
// of the timeout.
func TestNotYet(t *testing.T) {
	no := says(400, "")
	for _, tt := range []struct {
		name  string
		serve []http.HandlerFunc
		asked int
		took  time.Duration
		ok    bool
	}{
		{"third time", []http.HandlerFunc{no, no, says(200, "{}")}, 3, 150 * time.Millisecond, true},
		{"never", []http.HandlerFunc{no}, 6, 1550 * time.Millisecond, false},
		{"lost on the way", []http.HandlerFunc{no, cut, says(200, "{}")}, 2, 50 * time.Millisecond, false},
		{"another no", []http.HandlerFunc{no, says(401, ""), says(200, "{}")}, 2, 50 * time.Millisecond, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newSite(t)
				h := s.serve("kme-a", tt.serve...)
				r := request()
				r.Once, r.NotYet = true, func(status int) bool { return status == 400 }
				began := time.Now()
				_, err := s.client(Config{}).Do(t.Context(), r)
				if (err == nil) != tt.ok {
					t.Errorf("error %v", err)
				}
				if got := time.Since(began); got != tt.took || len(h.asked()) != tt.asked {
					t.Errorf("asked %d times in %v, want %d in %v", len(h.asked()), got, tt.asked, tt.took)
				}
			})
		})
	}
}

func TestNotYetStopsWithItsContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t)
		s.serve("kme-a", says(400, ""))
		r := request()
		r.NotYet = func(int) bool { return true }
		ctx, cancel := context.WithTimeout(t.Context(), 70*time.Millisecond)
		defer cancel()
		_, err := s.client(Config{}).Do(ctx, r)
		if !errors.Is(err, context.DeadlineExceeded) || !errors.Is(err, kms.ErrUnknownKey) {
			t.Errorf("got %v", err)
		}
	})
}

// TestKeptConnections: net/http would repeat a GET on another connection when
// a kept one breaks.
func TestKeptConnections(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t)
		h := s.serve("kme-a", says(200, "{}"), cut, says(200, "{}"))
		c := s.client(Config{})
		for range 2 {
			_, _ = c.Do(t.Context(), request())
		}
		if got := len(h.asked()); got != 2 {
			t.Errorf("two calls made %d requests", got)
		}
	})
}

// TestHealth: a URI that gave no answer is tried last for a while.
func TestHealth(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t)
		a := s.serve("kme-a", silent, says(200, "{}"))
		b := s.serve("kme-b", says(200, "{}"))
		c := s.client(Config{URIs: []string{"https://kme-a", "https://kme-b"}})
		ask := func() {
			t.Helper()
			if _, err := c.Do(t.Context(), request()); err != nil {
				t.Fatal(err)
			}
		}
		began := time.Now()
		for range 3 {
			ask()
		}
		if got := time.Since(began); got != DefaultTimeout {
			t.Errorf("three requests took %v, want one timeout", got)
		}
		time.Sleep(downTime) // virtual
		ask()
		if got := [2]int{len(a.asked()), len(b.asked())}; got != [2]int{2, 3} {
			t.Errorf("asked %v times, want [2 3]", got)
		}
	})
}

// TestHealthOfFools: a URI behind which a key may have been lost, or whose
// answers cannot be used, is tried last for a while: it answers at once, and
// would take every key down with it.
func TestHealthOfFools(t *testing.T) {
	for name, fool := range map[string]http.HandlerFunc{
		"gateway":    says(502, ""),
		"login page": says(200, "<html>"),
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newSite(t)
				a, b := s.serve("kme-a", fool), s.serve("kme-b", says(200, "{}"))
				c := s.client(Config{URIs: []string{"https://kme-a", "https://kme-b"}})
				r := request()
				r.Once = true
				for range 3 {
					if a, err := c.Do(t.Context(), r); err == nil {
						if err := Unmarshal(a.Body, new(struct{})); err != nil {
							_ = a.Wrong(err)
						}
					}
				}
				if got := [2]int{len(a.asked()), len(b.asked())}; got != [2]int{1, 2} {
					t.Errorf("asked %v times, want [1 2]", got)
				}
			})
		})
	}
}

// TestSlots: beyond so many requests under way a call waits, not for ever, and
// its own time begins when its turn comes.
func TestSlots(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t)
		h := s.serve("kme-a", silent)
		c := s.client(Config{})
		errs := make(chan error)
		call := func(ctx context.Context) {
			_, err := c.Do(ctx, request())
			errs <- err
		}
		for range maxRequests {
			go call(t.Context())
		}
		synctest.Wait()
		time.Sleep(time.Second) // virtual
		ctx, cancel := context.WithCancel(t.Context())
		go call(ctx)
		synctest.Wait()
		if got := len(h.asked()); got != maxRequests {
			t.Errorf("%d requests under way, want %d", got, maxRequests)
		}
		cancel()
		if err := <-errs; !errors.Is(err, context.Canceled) {
			t.Errorf("waiting call ended with %v", err)
		}
		began := time.Now()
		go call(t.Context())
		for range maxRequests + 1 {
			if err := <-errs; err == nil || err.Error() != "https://kme-a: no answer within 5s" {
				t.Errorf("got %v", err)
			}
		}
		if got := time.Since(began); got != 9*time.Second {
			t.Errorf("took %v, want 9s", got)
		}
		for range maxRequests {
			c.slots <- struct{}{}
		}
		go call(t.Context())
		if err := <-errs; err == nil || err.Error() != "https://kme-a: 16 requests under way for 5s" {
			t.Errorf("got %v", err)
		}
	})
}

// TestRefusals: what no retry can mend is told apart.
func TestRefusals(t *testing.T) {
	for _, tt := range []struct {
		name string
		conf func(t *testing.T, s *site) *tls.Config
		want string
	}{
		{"its certificate", func(t *testing.T, _ *site) *tls.Config { return newSite(t).serverTLS("kme-a") },
			"kms refuses: https://kme-a: certificate: x509: certificate signed by unknown authority"},
		{"our certificate", func(t *testing.T, s *site) *tls.Config {
			conf := s.serverTLS("kme-a")
			conf.ClientCAs = newSite(t).Pool()
			return conf
		}, "kms refuses: https://kme-a: TLS alert: tls: "},
		{"old TLS", func(_ *testing.T, s *site) *tls.Config {
			conf := s.serverTLS("kme-a")
			conf.MaxVersion = tls.VersionTLS12
			return conf
		}, "kms refuses: https://kme-a: TLS alert: tls: protocol version not supported"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newSite(t)
				h := s.serveTLS("kme-a", tt.conf(t, s), says(200, "{}"))
				_, err := s.client(Config{MinTLS: tls.VersionTLS13}).Do(t.Context(), request())
				if !errors.Is(err, kms.ErrRefused) || !strings.HasPrefix(err.Error(), tt.want) {
					t.Errorf("got %v\nwant %s", err, tt.want)
				}
				if len(h.asked()) != 0 {
					t.Error("the KMS was asked all the same")
				}
			})
		})
	}
}

func TestUnreachable(t *testing.T) {
	s := newSite(t)
	_, err := s.client(Config{}).Do(t.Context(), request())
	if want := "https://kme-a: dial kme-a:443: unreachable"; err == nil || err.Error() != want {
		t.Errorf("got %v, want %s", err, want)
	}
}

func TestNewRefuses(t *testing.T) {
	good := newSite(t).clientTLS()
	for _, tt := range []struct {
		edit func(*Config)
		want string
	}{
		{func(c *Config) { c.URIs = nil }, "0 URIs, not 1 to 16"},
		{func(c *Config) { c.URIs = make([]string, 17) }, "17 URIs, not 1 to 16"},
		{func(c *Config) { c.URIs = []string{"https://kme-a:port"} }, `URI "https://kme-a:port" is malformed`},
		{func(c *Config) { c.URIs = []string{"http://kme-a"} }, `URI "http://kme-a" does not begin with https://`},
		{func(c *Config) { c.URIs = []string{"https:///x"} }, `URI "https:///x" names no host`},
		{func(c *Config) { c.URIs = []string{"https://me@kme-a"} }, `URI "https://me@kme-a" has more than a host and a path`},
		{func(c *Config) { c.Timeout = time.Hour }, "timeout 1h0m0s is not between 0 and 1m0s"},
		{func(c *Config) { c.TLS = kmstls.Config{} }, "no root certificate: the KMS could not be verified"},
	} {
		c := Config{URIs: []string{"https://kme-a"}, TLS: good}
		tt.edit(&c)
		if k, err := New(c); k != nil || err == nil || err.Error() != tt.want {
			t.Errorf("got %v, want %s", err, tt.want)
		}
	}
}

func TestUnmarshal(t *testing.T) {
	for _, tt := range []struct{ body, want string }{
		{`{"n":1}`, ""},
		{` {"n":1,"more":[]} ` + "\n", ""},
		{"", "answer is empty"},
		{"null", "answer is JSON but not an object"},
		{"[]", "answer is JSON but not an object"},
		{"<html>", "answer is not JSON"},
		{`{"n":`, "answer is cut off after 5 bytes"},
		{`{"n":1}x`, "answer is not JSON from byte 8 on"},
		{`{"n":"1"}`, "answer has a JSON string as n"},
		{`{"n":123456789012345678901234567890}`, "answer has a JSON number as n"},
	} {
		var v struct {
			N int `json:"n"`
		}
		got := ""
		if err := Unmarshal([]byte(tt.body), &v); err != nil {
			got = err.Error()
		} else if v.N != 1 {
			t.Errorf("%s: n is %d", tt.body, v.N)
		}
		if got != tt.want {
			t.Errorf("%s: got %q, want %q", tt.body, got, tt.want)
		}
	}
}

func TestWrongNamesTheMediaType(t *testing.T) {
	a := &Answer{"https://kme-a", "text/html", func() {}, []byte("<html>")}
	err := a.Wrong(Unmarshal(a.Body, new(struct{})))
	if want := `https://kme-a: answer is not JSON but "text/html"`; err.Error() != want {
		t.Errorf("got %q, want %q", err, want)
	}
}

func FuzzShown(f *testing.F) {
	f.Add("\x1b[2Jboom\n")
	f.Add(strings.Repeat("é", 150))
	f.Fuzz(func(t *testing.T, s string) {
		if got := Shown(s); len(got) > maxText || !Printable(got) {
			t.Errorf("%q", got)
		}
	})
}

func TestReadBodyLeavesNoCopy(t *testing.T) {
	const secret = "not for the heap"
	r := &watching{text: strings.Repeat(secret, 1000)}
	b, err := ReadBody(r, maxAnswer)
	if err != nil || string(b) != r.text {
		t.Fatal("wrong bytes", err)
	}
	clear(b)
	for _, old := range r.buffers {
		if strings.Contains(string(old), secret) {
			t.Error("a buffer that was grown out of still holds the text")
		}
	}
}

// watching remembers whole buffers that it was read into.
type watching struct {
	text    string
	read    int
	buffers [][]byte
}

func (w *watching) Read(p []byte) (int, error) {
	if w.read == len(w.text) {
		return 0, io.EOF
	}
	n := copy(p, w.text[w.read:])
	w.read += n
	w.buffers = append(w.buffers, p[:n])
	return n, nil
}
