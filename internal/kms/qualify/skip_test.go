package qualify

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"path"
	"strings"
	"sync"
	"testing"
	"testing/synctest"

	"github.com/google/go-cmp/cmp"

	"keyturn/internal/kmesim"
)

func TestSKIP(t *testing.T) {
	for name, edit := range map[string]func(*Config){
		"two-ends": func(*Config) {},
		"one-end":  func(c *Config) { c.There = nil },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				n := newNetwork(t)
				n.serve(etsi014Server)
				c := n.config()
				edit(&c)
				r, err := SKIP(t.Context(), c)
				if err != nil {
					t.Fatal(err)
				}
				golden(t, "testdata/skip-"+name+".txt", r)
			})
		})
	}
}

func TestSKIPFaults(t *testing.T) {
	const (
		caps     = "sae_001: GET capabilities *"
		get      = "sae_001: GET a key of 256 bits *"
		defaults = "sae_001: a key has 256 bits unless asked otherwise"
		same     = "sae_002: the same key by its keyId *"
		capitals = "sae_002: the same key by its keyId in the other case"
		back     = "sae_001: the same key the other way round *"
	)
	for _, tt := range []struct {
		a, b string
		want []string
	}{
		{"healthy", "healthy", nil},
		{"slow=1s", "healthy", nil},
		{"out-of-keys", "healthy", []string{get, defaults, "sae_001: GET entropy of 256 bits", "sae_001: GET entropy of another size"}},
		{"healthy", "out-of-keys", []string{"sae_002: the same key the other way round *"}},
		{"healthy", "late", []string{same, capitals}},
		{"late", "healthy", []string{back}},
		{"out-of-step", "healthy", []string{same, capitals}},
		{"healthy", "wrong-bytes", []string{same, capitals}},
		{"wrong-size", "healthy", []string{get, defaults, back}},
		{"silent", "healthy", []string{caps, get}},
		{"down", "healthy", []string{"sae_001: TLS 1.3 or later *"}},
		{"healthy", "down", []string{"sae_002: TLS 1.3 or later *"}},
	} {
		t.Run(tt.a+" "+tt.b, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				n := newNetwork(t)
				n.fail(tt.a, tt.b)
				n.serve(etsi014Server)
				r, err := SKIP(t.Context(), n.config())
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

// sloppyProvider is a key provider made by hand that gets one thing wrong, or
// none. What asks is the one that remoteSystemID does not name.
type sloppyProvider struct {
	fault string

	mu   sync.Mutex
	made int
	keys map[string]sloppyKey
}

func (s *sloppyProvider) is(fault string) bool { return s.fault == fault }

func (s *sloppyProvider) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	defer s.mu.Unlock()
	peer := r.URL.Query().Get("remoteSystemID")
	me := map[string]string{"sae_001": "sae_002", "sae_002": "sae_001"}[peer]
	say := func(format string, args ...any) { _, _ = fmt.Fprintf(w, format, args...) }
	switch {
	case r.Method != http.MethodGet && !s.is("any method"):
		w.WriteHeader(405)
	case r.URL.Path == "/capabilities":
		text := `{"entropy":true,"key":true,"algorithm":"none","localSystemID":"kp","remoteSystemID":["sae_00[12]"]}`
		for fault, edit := range map[string][2]string{
			"capability missing": {`"algorithm":"none",`, ""},
			"no keys":            {`"key":true`, `"key":false`},
			"no remote":          {"sae_00[12]", "sae_00[34]"},
			"no entropy":         {`"entropy":true`, `"entropy":false`},
			"everybody":          {"sae_00[12]", "*"},
		} {
			if s.is(fault) {
				text = strings.Replace(text, edit[0], edit[1], 1)
			}
		}
		say("%s", text)
	case r.URL.Path == "/key":
		if me == "" && !s.is("anybody") {
			w.WriteHeader(400)
			return
		}
		s.made++
		id, text := fmt.Sprintf("ab%030x", s.made), fmt.Sprintf("%064x", s.made)
		switch s.fault {
		case "IDs that are none":
			id = fmt.Sprintf("key-%d", s.made)
		case "odd":
			text = text[1:]
		case "base64":
			text = "wHHVxRwDJs3/bXd38GHP3oe4svTuRpZS0yCC7x4Ly+s="
		case "the same key":
			text = fmt.Sprintf("%064x", 1)
		case "default size":
			if r.URL.Query().Get("size") == "" {
				text = text[32:]
			}
		}
		s.keys[strings.ToLower(id)] = sloppyKey{text, me}
		say(`{"keyId":%q,"key":%q}`, id, text)
	case path.Dir(r.URL.Path) == "/key":
		id := path.Base(r.URL.Path)
		if !s.is("case") {
			id = strings.ToLower(id)
		}
		k, ok := s.keys[id]
		if s.is("keys for nothing") && !ok {
			k, ok = sloppyKey{strings.Repeat("0", 64), peer}, true
		}
		if !ok || k.master != peer && !s.is("to the first as well") {
			w.WriteHeader(400)
			return
		}
		if !s.is("again") && !s.is("to the first as well") {
			delete(s.keys, id)
		}
		say(`{"keyId":%q,"key":%q}`, id, k.text)
	case r.URL.Path == "/entropy":
		bits := 256
		if r.URL.Query().Get("minentropy") == "128" && !s.is("entropy size") {
			bits = 128
		}
		say(`{"randomStr":%q,"minentropy":%d}`, strings.Repeat("A", bits/4), bits)
	case s.is("any path"):
		say("{}")
	default:
		w.WriteHeader(404)
	}
}

func (s *sloppyProvider) serve(ctx context.Context, ln net.Listener, conf *tls.Config) error {
	server := &http.Server{Handler: s, ErrorLog: log.New(io.Discard, "", 0)}
	stop := context.AfterFunc(ctx, func() { server.Close() })
	defer stop()
	_ = server.Serve(tls.NewListener(ln, conf))
	return nil
}

func TestSKIPMistakes(t *testing.T) {
	for _, tt := range []struct {
		fault string
		wrong []string
		also  string // in the report
	}{
		{"none", nil, `localSystemID "kp", algorithm "none"; the configuration has "sae_001" as sae`},
		{"capability missing", []string{"sae_001: capabilities have all their fields", "sae_002: capabilities have all their fields"}, "missing or of another type: algorithm"},
		{"no keys", []string{"sae_001: there are keys *", "sae_002: there are keys *"}, ""},
		{"no remote", []string{"sae_001: they are shared with the other end *", "sae_002: they are shared with the other end *"}, `remoteSystemID is "sae_00[34]", without "sae_002"`},
		{"no entropy", nil, "not supported  entropy is not true"},
		{"everybody", nil, "not tested     its remoteSystemID covers every name"},
		{"anybody", []string{"sae_001: no key for a system that it does not know"}, "4 keys taken"},
		{"any method", []string{"sae_001: another method than GET is refused"}, ""},
		{"any path", []string{"sae_001: an unknown path is not found"}, ""},
		{"IDs that are none", []string{": keyIds are hexadecimal"}, ""},
		{"the same key", []string{": keyIds and keys all different, none zero *"}, ""},
		{"default size", []string{"sae_001: a key has 256 bits unless asked otherwise"}, "the key has 128 bits"},
		{"odd", []string{"sae_001: GET a key of 256 bits *", "sae_001: a key has 256 bits unless asked otherwise", "sae_002: the same key the other way round *"}, "an odd number of digits"},
		{"base64", []string{"sae_001: GET a key of 256 bits *", "sae_001: a key has 256 bits unless asked otherwise", "sae_002: the same key the other way round *"}, "not hexadecimal"},
		{"case", []string{"sae_002: the same key by its keyId in the other case"}, ""},
		{"again", []string{"sae_002: a key is delivered once *"}, ""},
		{"to the first as well", []string{"sae_001: a key is not given again to who asked for it *", "sae_002: a key is delivered once *"}, ""},
		{"keys for nothing", []string{"sae_002: a key is delivered once *", "sae_002: an unknown keyId is refused", "sae_002: a malformed keyId is refused"}, ""},
		{"entropy size", []string{"sae_001: GET entropy of another size"}, "256 bits, said to be 256, not 128"},
	} {
		t.Run(tt.fault, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				n := newNetwork(t)
				s := &sloppyProvider{fault: tt.fault, keys: map[string]sloppyKey{}}
				n.serve(func(*kmesim.KME) func(context.Context, net.Listener, *tls.Config) error { return s.serve })
				r, err := SKIP(t.Context(), n.config())
				if err != nil {
					t.Fatal(err)
				}
				if diff := cmp.Diff(tt.wrong, wrong(r)); diff != "" {
					t.Errorf("wrong lines (-want +got):\n%s", diff)
				}
				if page := table(r); !strings.Contains(page, tt.also) {
					t.Errorf("no %q in\n%s", tt.also, page)
				}
			})
		})
	}
}
