package etsi014

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"keyturn/internal/kms"
	"keyturn/internal/psk"
)

// supply is a KME that says how many keys it gives at a time.
type supply struct {
	says  int                           // max_key_per_request
	takes func(asked int) time.Duration // for so many keys, 0: a status; nil: a second
	gives func(asked int) int           // keys for so many asked; nil: as many
	fail  func(asked int) string        // "", or the whole answer to so many; nil: none

	mu   sync.Mutex
	made int
	gone int // requests whose client had gone before the answer
}

// keyOf is the key of the n-th ID.
func keyOf(id string) string {
	sum := sha256.Sum256([]byte(id))
	return base64.StdEncoding.EncodeToString(sum[:])
}

func (s *supply) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	number, _ := strconv.Atoi(r.URL.Query().Get("number"))
	if r.Method == http.MethodPost {
		var body struct{ Number int }
		_ = json.NewDecoder(r.Body).Decode(&body)
		number = body.Number
	}
	takes := time.Second // virtual
	if s.takes != nil {
		takes = s.takes(number)
	}
	select {
	case <-time.After(takes):
	case <-r.Context().Done():
		s.mu.Lock()
		s.gone++
		s.mu.Unlock()
		return
	}
	if strings.HasSuffix(r.URL.Path, "/status") {
		fmt.Fprintf(w, `{"max_key_per_request":%d}`, s.says)
		return
	}
	if s.fail != nil {
		if answer := s.fail(number); answer != "" {
			raw(answer)(w, r)
			return
		}
	}
	if s.gives != nil {
		number = s.gives(number)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	var keys []string
	for range number {
		s.made++
		id := fmt.Sprintf("key-%d", s.made)
		keys = append(keys, fmt.Sprintf(`{"key_ID":%q,"key":%q}`, id, keyOf(id)))
	}
	fmt.Fprintf(w, `{"keys":[%s]}`, strings.Join(keys, ","))
}

// callers call Key at the same time.
type callers struct {
	t    *testing.T
	s    kms.Source
	host *host
	wait sync.WaitGroup

	mu   sync.Mutex
	ids  []string
	errs []string
	took []time.Duration // by each call
}

func newCallers(t *testing.T, kme *supply, c Config) *callers {
	n := newNetwork(t)
	h := n.serve("kme-a", kme.ServeHTTP)
	return &callers{t: t, s: n.source(c), host: h}
}

// call starts n calls and returns when all of them wait for something.
func (c *callers) call(ctx context.Context, n int) {
	for range n {
		c.wait.Go(func() {
			began := time.Now()
			id, key, err := c.s.Key(ctx)
			c.mu.Lock()
			defer c.mu.Unlock()
			c.took = append(c.took, time.Since(began))
			if err != nil {
				if key != nil || id != "" {
					c.t.Error("something beside the error")
				}
				c.errs = append(c.errs, err.Error())
				return
			}
			c.ids = append(c.ids, id)
			want, _ := base64.StdEncoding.DecodeString(keyOf(id))
			if !slices.Equal(key.Bytes(), want) {
				c.t.Errorf("%s has another one's key", id)
			}
		})
	}
	synctest.Wait()
}

// end waits for the calls and compares: the numbers of keys asked for (0 for a
// status), how many calls got a key, each its own, and the errors.
func (c *callers) end(asked []int, keys int, errs ...string) {
	c.t.Helper()
	c.wait.Wait()
	var got []int
	for _, r := range c.host.seen() {
		_, query, _ := strings.Cut(r, "number")
		query = strings.TrimLeft(query, `=":`)
		digits := strings.IndexFunc(query+"&", func(r rune) bool { return r < '0' || r > '9' })
		number, _ := strconv.Atoi(query[:digits])
		got = append(got, number)
	}
	if diff := cmp.Diff(asked, got); diff != "" {
		c.t.Errorf("keys asked for (-want +got):\n%s", diff)
	}
	slices.Sort(c.ids)
	if len(slices.Compact(slices.Clone(c.ids))) != len(c.ids) || len(c.ids) != keys {
		c.t.Errorf("%d calls got the keys %q, want %d", len(c.ids), c.ids, keys)
	}
	if diff := cmp.Diff(errs, c.errs); diff != "" {
		c.t.Errorf("errors (-want +got):\n%s", diff)
	}
	c.ids, c.errs, c.took = nil, nil, nil
	c.host.mu.Lock()
	c.host.requests = nil
	c.host.mu.Unlock()
}

// meet makes two calls meet, upon which the KME is asked what it gives.
func (c *callers) meet() {
	c.t.Helper()
	c.call(c.t.Context(), 1)
	c.call(c.t.Context(), 1)
	time.Sleep(2 * time.Second) // virtual: the status has come as well
	c.wait.Wait()
	if seen := c.host.seen(); len(seen) != 3 || len(c.ids) != 2 {
		c.t.Fatalf("the first two calls made %d requests and got %d keys", len(seen), len(c.ids))
	}
	c.ids, c.took = nil, nil
	c.host.mu.Lock()
	c.host.requests = nil
	c.host.mu.Unlock()
}

// lasted waits for the calls and compares how long each took, the shortest
// first.
func (c *callers) lasted(want ...time.Duration) {
	c.t.Helper()
	c.wait.Wait()
	slices.Sort(c.took)
	if diff := cmp.Diff(want, c.took); diff != "" {
		c.t.Errorf("calls lasted (-want +got):\n%s", diff)
	}
}

// TestShared: calls that come while a request is under way share the next one,
// as far as the KME, and maxShared, allow. Who does not fit into it asks alone at
// once, so that nobody waits for two requests of others.
func TestShared(t *testing.T) {
	for _, tt := range []struct {
		says, calls int
		asked       []int
	}{
		{128, 4, []int{1, 4}},
		{2, 5, []int{1, 1, 1, 1, 2}},
		{1 << 40, 20, []int{1, 1, 1, 1, 1, 16}},
		{1, 2, []int{1, 1, 1}},
		{0, 2, []int{1, 1, 1}}, // some send zeros whatever is true
		{-7, 2, []int{1, 1, 1}},
	} {
		for _, method := range []string{"GET", "POST"} {
			t.Run(fmt.Sprintf("%d for %d %s", tt.says, tt.calls, method), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					c := newCallers(t, &supply{says: tt.says}, Config{Method: method})
					c.meet()
					c.call(t.Context(), 1)
					c.call(t.Context(), tt.calls)
					began := time.Now()
					c.end(tt.asked, 1+tt.calls)
					if took := time.Since(began); took > 2*time.Second {
						t.Errorf("keys took %v", took)
					}
				})
			})
		}
	}
}

// TestPatience: nobody waits longer than a quarter of the timeout for a request
// of others, so that sharing costs no call more than that.
func TestPatience(t *testing.T) {
	const ms = time.Millisecond
	synctest.Test(t, func(t *testing.T) {
		kme := &supply{says: 128}
		c := newCallers(t, kme, Config{Timeout: 5 * time.Second})
		c.meet()

		// All requests are slow.
		kme.takes = func(int) time.Duration { return 4 * time.Second }
		c.call(t.Context(), 1)
		c.call(t.Context(), 1)
		time.Sleep(1000 * ms)
		c.call(t.Context(), 1) // 250 ms before it is too late
		time.Sleep(1000 * ms)
		c.call(t.Context(), 1) // after it
		c.lasted(4000*ms, 4000*ms, 4250*ms, 5250*ms)
		c.end([]int{1, 1, 1, 1}, 4)

		// Whose key is asked for already does not ask again.
		kme.takes = func(asked int) time.Duration { return time.Duration(asked) * time.Second }
		c.call(t.Context(), 1)
		c.call(t.Context(), 3)
		c.lasted(1000*ms, 4000*ms, 4000*ms, 4000*ms)
		c.end([]int{1, 3}, 4)

		// Nor does a request go on whose caller has gone, when the last of those
		// that waited for it asks alone.
		kme.takes = func(int) time.Duration { return 4 * time.Second }
		ctx, cancel := context.WithCancel(t.Context())
		c.call(ctx, 1)
		c.call(t.Context(), 1)
		cancel()
		c.lasted(0, 5250*ms)
		c.end([]int{1, 1}, 1, "fetch key: context canceled")
		synctest.Wait()
		if kme.gone != 1 {
			t.Errorf("%d requests were given up, want 1", kme.gone)
		}
	})
}

// TestAloneNobodyAsks: as long as nobody meets there is nothing to share, and
// the KME is not asked what it gives.
func TestAloneNobodyAsks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCallers(t, &supply{says: 128}, Config{})
		for range 3 {
			c.call(t.Context(), 1)
			c.wait.Wait()
		}
		c.end([]int{1, 1, 1}, 3)
	})
}

// TestNobodyWaitsForTheStatus: a KME whose status never comes costs nobody
// anything, and is asked for it again later.
func TestNobodyWaitsForTheStatus(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNetwork(t)
		h := n.serve("kme-a", func(w http.ResponseWriter, r *http.Request) {
			if strings.HasSuffix(r.URL.Path, "/status") {
				silent(w, r)
			}
			(&supply{}).ServeHTTP(w, r)
		})
		c := &callers{t: t, s: n.source(Config{}), host: h}
		for range 2 {
			began := time.Now()
			c.call(t.Context(), 1)
			c.call(t.Context(), 1)
			c.wait.Wait()
			if took := time.Since(began); took != time.Second {
				t.Errorf("two keys took %v", took)
			}
			c.call(t.Context(), 2) // while the status is awaited
			c.wait.Wait()
			time.Sleep(aloneTime)
		}
		statuses := 0
		for _, r := range h.seen() {
			if strings.HasSuffix(r, "/status") {
				statuses++
			}
		}
		if statuses != 2 {
			t.Errorf("asked for the status %d times, want 2", statuses)
		}
	})
}

// TestCloseEndsTheStatus: a source that is closed leaves nothing behind.
func TestCloseEndsTheStatus(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNetwork(t)
		n.serve("kme-a", silent)
		c := &callers{t: t, s: n.source(Config{})}
		ctx, cancel := context.WithCancel(t.Context())
		c.call(ctx, 2)
		cancel()
		c.wait.Wait()
		began := time.Now()
		if err := c.s.Close(); err != nil || time.Since(began) != 0 {
			t.Errorf("closing took %v: %v", time.Since(began), err)
		}
	})
}

// TestNotSoMany: a KME that says it gives several keys and does not. Who has
// none asks alone, at once, and so does everybody for a while.
func TestNotSoMany(t *testing.T) {
	says := func(status, body string) func(int) string {
		return func(asked int) string {
			if asked == 1 {
				return ""
			}
			return fmt.Sprintf("HTTP/1.1 %s\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s", status, len(body), body)
		}
	}
	for _, tt := range []struct {
		name  string
		kme   *supply
		asked []int
	}{
		{"400", &supply{fail: says("400 Bad Request", `{"message":"number is too big"}`)}, []int{1, 4, 1, 1, 1, 1}},
		{"429", &supply{fail: says("429 Too Many Requests", "")}, []int{1, 4, 1, 1, 1, 1}},
		{"503", &supply{fail: says("503 Service Unavailable", "")}, []int{1, 4, 1, 1, 1, 1}},
		{"405", &supply{fail: says("405 Method Not Allowed", "<html>")}, []int{1, 4, 1, 1, 1, 1}},
		{"one", &supply{gives: func(int) int { return 1 }}, []int{1, 4, 1, 1, 1}},
		{"one fewer", &supply{gives: func(n int) int { return max(1, n-1) }}, []int{1, 4, 1}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				tt.kme.says = 128
				c := newCallers(t, tt.kme, Config{})
				c.meet()
				c.call(t.Context(), 1)
				c.call(t.Context(), 4)
				c.end(tt.asked, 5)

				c.call(t.Context(), 3)
				c.end([]int{1, 1, 1}, 3)

				time.Sleep(aloneTime)
				c.call(t.Context(), 1)
				c.call(t.Context(), 4)
				c.end(tt.asked, 5)
			})
		})
	}
}

// TestMoreThanAsked: what nobody asked for is not used.
func TestMoreThanAsked(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCallers(t, &supply{says: 128, gives: func(n int) int { return n + 2 }}, Config{})
		c.call(t.Context(), 1)
		c.end([]int{1}, 1)
		c.meet()
		c.call(t.Context(), 1)
		c.call(t.Context(), 2)
		c.end([]int{1, 2}, 3)
	})
}

// TestSharedLoss: a request whose answer may have been lost is not repeated for
// those who shared it. Later calls ask alone.
func TestSharedLoss(t *testing.T) {
	for _, tt := range []struct{ name, answer, want string }{
		{"cut", "HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{", "fetch key: https://kme-a: connection closed before the end of the answer"},
		{"nonsense", "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]", "fetch key: https://kme-a: answer is JSON but not an object"},
		{"gateway", "HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n", "fetch key: https://kme-a answered 502"},
		{"gateway without keys", "HTTP/1.1 504 Gateway Timeout\r\nContent-Length: 0\r\n\r\n", "fetch key: kms has no key now: https://kme-a answered 504"},
		{"no keys", "HTTP/1.1 200 OK\r\nContent-Length: 11\r\n\r\n" + `{"keys":[]}`, "fetch key: https://kme-a: answer holds no key"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c := newCallers(t, &supply{says: 128, fail: func(asked int) string {
					if asked == 1 {
						return ""
					}
					return tt.answer
				}}, Config{})
				c.meet()
				c.call(t.Context(), 1)
				c.call(t.Context(), 3)
				c.end([]int{1, 3}, 1, tt.want, tt.want, tt.want)
				c.call(t.Context(), 3)
				c.end([]int{1, 1, 1}, 3)
			})
		})
	}
}

// TestSharedLossAtOne: nor is it repeated where only one of several URIs may have
// lost its answer.
func TestSharedLossAtOne(t *testing.T) {
	const no, cut, gateway = "HTTP/1.1 503 No\r\nContent-Length: 0\r\n\r\n",
		"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{", "HTTP/1.1 502 No\r\nContent-Length: 0\r\n\r\n"
	for _, tt := range []struct {
		name, a, b string
		keys       int
	}{
		{"second", no, cut, 1},
		{"first", cut, no, 1},
		{"gateway first", gateway, no, 1},
		{"neither", no, no, 4},
		{"nobody there", no, "", 4},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				n := newNetwork(t)
				serve := func(name, answer string) *host {
					kme := &supply{says: 128, fail: func(asked int) string {
						if asked == 1 {
							return ""
						}
						return answer
					}}
					return n.serve(name, kme.ServeHTTP)
				}
				c := &callers{t: t, host: serve("kme-a", tt.a)}
				if tt.b != "" {
					serve("kme-b", tt.b)
				}
				c.s = n.source(Config{URIs: []string{"https://kme-a", "https://kme-b"}})
				c.meet()
				c.call(t.Context(), 1)
				c.call(t.Context(), 3)
				c.wait.Wait()
				if len(c.took) != 4 || 4-len(c.errs) != tt.keys {
					t.Errorf("%d of %d calls got no key, want %d", len(c.errs), len(c.took), 4-tt.keys)
				}
			})
		})
	}
}

// TestSharedAlone: when a request for one fails, those who gathered meanwhile
// are not told so, but share the next.
func TestSharedAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		failed := false
		kme := &supply{says: 128}
		c := newCallers(t, kme, Config{})
		c.meet()
		kme.fail = func(int) string {
			if failed {
				return ""
			}
			failed = true
			return "HTTP/1.1 503 No\r\nContent-Length: 0\r\n\r\n"
		}
		c.call(t.Context(), 1)
		c.call(t.Context(), 3)
		c.end([]int{1, 3}, 3, "fetch key: kms has no key now: https://kme-a answered 503")
	})
}

// TestCallerGoes: whose context ends takes nothing away from the others.
func TestCallerGoes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		kme := &supply{says: 128}
		c := newCallers(t, kme, Config{})
		c.meet()
		ctx, cancel := context.WithCancel(t.Context())

		// Two of those who share go; their keys are for two who came later.
		c.call(t.Context(), 1)
		c.call(ctx, 2)
		c.call(t.Context(), 1)
		time.Sleep(1500 * time.Millisecond)
		cancel()
		c.call(t.Context(), 2)
		gone := "fetch key: context canceled"
		c.end([]int{1, 3}, 4, gone, gone)

		// One goes whose request has not been sent.
		ctx, cancel = context.WithCancel(t.Context())
		c.call(t.Context(), 1)
		c.call(ctx, 1)
		c.call(t.Context(), 1)
		cancel()
		c.end([]int{1, 1}, 2, gone)

		// All of those go who share a request: it is given up.
		ctx, cancel = context.WithCancel(t.Context())
		c.call(t.Context(), 1)
		c.call(ctx, 2)
		time.Sleep(1500 * time.Millisecond)
		cancel()
		c.end([]int{1, 2}, 1, gone, gone)
		synctest.Wait()
		if kme.gone != 1 {
			t.Errorf("%d requests were given up, want 1", kme.gone)
		}

		// Nobody suffers for that later.
		c.call(t.Context(), 1)
		c.call(t.Context(), 2)
		c.end([]int{1, 2}, 3)
	})
}

// TestDeliveryIsFaster: a call whose context ended when its key was there
// already returns the key. What nobody waits for any more is wiped.
func TestDeliveryIsFaster(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		keys := someKeys(t, 2)
		c := newClient(nil, "sae_002")
		c.most = 2
		c.serving = true // by this test
		ctx, cancel := context.WithCancel(t.Context())
		got := make(chan delivery)
		go func() { got <- c.share(ctx) }()
		synctest.Wait()
		c.mu.Lock()
		cancel()
		c.deliver(keys, false, nil)
		c.mu.Unlock()
		if d := <-got; d.err != nil || d.key.IsZero() {
			t.Errorf("the key is gone: %v", d.err)
		}
		if !keys[1].key.IsZero() {
			t.Error("the other key is still there")
		}
	})
}

// someKeys returns n keys.
func someKeys(t *testing.T, n int) (keys []namedKey) {
	t.Helper()
	for i := range n {
		key, err := psk.New(append(make([]byte, psk.Size-1), byte(i+1)))
		if err != nil {
			t.Fatal(err)
		}
		keys = append(keys, namedKey{fmt.Sprintf("key-%d", i+1), key})
	}
	return keys
}

// TestFirst: the keys that nobody waits for are wiped.
func TestFirst(t *testing.T) {
	for n := range 4 {
		keys := someKeys(t, 2)
		got := first(n, keys)
		for i, k := range keys {
			if kept := i < n; k.key.IsZero() == kept || slices.Contains(got, k) != kept {
				t.Errorf("first %d of 2: key %d is kept: %v", n, i, !kept)
			}
		}
	}
}
