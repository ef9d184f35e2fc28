package qualify

import (
	"context"
	"crypto/tls"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"

	"github.com/google/go-cmp/cmp"

	"keyturn/internal/kmesim"
)

// sloppy is a KME made by hand that gets one thing wrong, or none.
type sloppy struct {
	fault string

	mu   sync.Mutex
	made int
	keys map[string]sloppyKey
}

type sloppyKey struct{ text, master string }

func (s *sloppy) is(fault string) bool { return s.fault == fault }

func (s *sloppy) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	defer s.mu.Unlock()
	fail := func(status int, text string) {
		if s.is("misshapen errors") {
			text = `["` + text + `"]`
		} else {
			text = `{"message":"` + text + `","details":[{"none":null}]}`
		}
		w.WriteHeader(status)
		_, _ = io.WriteString(w, text)
	}
	body, _ := io.ReadAll(r.Body)
	parts := strings.Split(r.URL.Path, "/") // /api/v1/keys/SAE/verb
	peer, verb := parts[4], parts[5]
	me := map[string]string{"sae_001": "sae_002", "sae_002": "sae_001"}[peer]
	if r.Method == http.MethodDelete && !s.is("any method") {
		fail(405, "no")
		return
	}
	switch verb {
	case "status":
		text := `{"source_KME_ID":"a","target_KME_ID":"b","master_SAE_ID":"` + me + `","slave_SAE_ID":"` + peer + `",
			"key_size":256,"stored_key_count":0,"max_key_count":0,"max_key_per_request":2,
			"max_key_size":256,"min_key_size":256,"max_SAE_ID_count":0,"status_extension":{}}`
		switch s.fault {
		case "status fields":
			text = strings.Replace(text, `"max_key_count":0,`, `"max_key_count":"many",`, 1)
		case "status figures":
			text = strings.Replace(text, `"max_key_size":256`, `"max_key_size":128`, 1)
		case "one at a time":
			text = strings.Replace(text, `"max_key_per_request":2`, `"max_key_per_request":1`, 1)
		}
		_, _ = io.WriteString(w, text)
	case "enc_keys":
		s.encKeys(w, r, body, me, fail)
	default:
		s.decKeys(w, r, body, peer, fail)
	}
}

func (s *sloppy) encKeys(w http.ResponseWriter, r *http.Request, body []byte, me string, fail func(int, string)) {
	q := struct {
		Number, Size    int
		SAEs            []string          `json:"additional_slave_SAE_IDs"`
		ExtensionMust   []json.RawMessage `json:"extension_mandatory"`
		ExtensionOption []json.RawMessage `json:"extension_optional"`
	}{Number: 1, Size: 256}
	if r.Method == http.MethodPost {
		if s.is("no post") {
			fail(405, "no")
			return
		}
		if json.Unmarshal(body, &q) != nil && !s.is("any body") {
			fail(400, "bad request")
			return
		}
	} else {
		q.Number, _ = strconv.Atoi(r.URL.Query().Get("number"))
		q.Size, _ = strconv.Atoi(r.URL.Query().Get("size"))
	}
	switch {
	case q.Size%8 != 0 && !s.is("any size") && s.is("other text"):
		fail(400, "what a size")
		return
	case q.Size%8 != 0 && !s.is("any size"):
		fail(400, "Size shall be a multiple of 8.")
		return
	case q.Size > 256 && !s.is("any size"), q.Number > 2 && !s.is("any number"),
		len(q.SAEs) > 0 && !s.is("any SAEs"):
		fail(400, "too much")
		return
	case len(q.ExtensionMust) > 0 && !s.is("any extension"):
		fail(400, "not all extension_mandatory parameters are supported")
		return
	case len(q.ExtensionOption) > 0 && s.is("no extension"):
		fail(400, "unknown field")
		return
	case me == "":
		fail(404, "who?")
		return
	}
	var keys []string
	for range q.Number {
		s.made++
		id, b := fmt.Sprintf("00000000-0000-4000-8000-%012d", s.made), make([]byte, 32)
		b[0] = byte(s.made)
		switch s.fault {
		case "IDs that are none":
			id = fmt.Sprint(s.made)
		case "the same ID":
			id = "00000000-0000-4000-8000-000000000000"
		case "the same key":
			b[0] = 1
		case "no key at all":
			b[0] = 0
		}
		text := base64.StdEncoding.EncodeToString(b)
		s.keys[id] = sloppyKey{text, me}
		if s.is("line ends") {
			text += `\n`
		}
		if s.is("hex") {
			text = strings.Repeat("0f", 31)
		}
		keys = append(keys, fmt.Sprintf(`{"key_ID":%q,"key":"%s"}`, id, text))
	}
	_, _ = io.WriteString(w, `{"keys":[`+strings.Join(keys, ",")+`]}`)
}

func (s *sloppy) decKeys(w http.ResponseWriter, r *http.Request, body []byte, master string, fail func(int, string)) {
	var q struct {
		IDs []struct {
			ID string `json:"key_ID"`
		} `json:"key_IDs"`
	}
	ids := r.URL.Query()["key_ID"]
	if r.Method == http.MethodPost {
		_ = json.Unmarshal(body, &q)
		for _, k := range q.IDs {
			ids = append(ids, k.ID)
		}
	}
	var keys []string
	for _, id := range ids {
		k, ok := s.keys[id]
		text := k.text
		if ok && k.master != master && !s.is("anybody") {
			fail(401, "")
			return
		}
		if !ok && !s.is("keys for nothing") {
			fail(400, "one or more keys specified are not found on KME")
			return
		}
		if !ok {
			text = base64.StdEncoding.EncodeToString(make([]byte, 32))
		}
		if !s.is("again") && !s.is("anybody") {
			delete(s.keys, id)
		}
		keys = append(keys, fmt.Sprintf(`{"key_ID":%q,"key":"%s"}`, id, text))
	}
	if s.is("other order") {
		slices.Reverse(keys)
	}
	_, _ = io.WriteString(w, `{"keys":[`+strings.Join(keys, ",")+`]}`)
}

// TestETSI014Mistakes: a mistake in anything else that a line is about makes
// that line wrong. What a line is in a fault's place that is no mistake says
// the last column.
func TestETSI014Mistakes(t *testing.T) {
	const get, post = "sae_001: GET a key of 256 bits *", "sae_001: POST for a key of 256 bits"
	for _, tt := range []struct {
		fault string
		wrong []string
		also  string // in the report
	}{
		{"none", nil, "not supported  no multicast"},
		{"status fields", []string{"sae_001: status has all its fields", "sae_002: status has all its fields"}, "missing or of another type: max_key_count"},
		{"status figures", []string{"sae_001: status can be true", "sae_002: status can be true", "sae_001: a size over max_key_size is refused"}, "256 bits are not between"},
		{"one at a time", nil, "not supported  max_key_per_request is 1"},
		{"any method", []string{"sae_001: another method than GET and POST is refused"}, ""},
		{"no post", []string{post, "sae_001: an unknown extension_mandatory is refused", "sae_001: more additional_slave_SAE_IDs than max_SAE_ID_count are refused", "sae_001: a malformed body is refused"}, ""},
		{"any body", []string{"sae_001: a malformed body is refused"}, ""},
		{"any size", []string{"sae_001: a size over max_key_size is refused"}, "a key all the same, as the standard permits"},
		{"other text", []string{"sae_001: a size that is no multiple of 8 is refused"}, `answered 400 "what a size"; the text is "size shall be a multiple of 8"`},
		{"any number", []string{"sae_001: a number over max_key_per_request is refused"}, "8 keys taken"},
		{"any SAEs", []string{"sae_001: more additional_slave_SAE_IDs than max_SAE_ID_count are refused"}, ""},
		{"any extension", []string{"sae_001: an unknown extension_mandatory is refused"}, ""},
		{"no extension", []string{"sae_001: an unknown extension_optional does no harm"}, ""},
		{"IDs that are none", []string{": key IDs are UUIDs"}, `"1" is none`},
		{"the same ID", nil, "was given twice"},
		{"the same key", []string{": key IDs and keys all different, none zero *"}, "are the same"},
		{"no key at all", []string{": key IDs and keys all different, none zero *"}, "is all zero"},
		{"line ends", nil, ""},
		{"hex", nil, "a key that is not padded base64"},
		{"anybody", []string{"sae_001: no key for an SAE that it is not for *", "sae_002: a key is delivered once *"}, ""},
		{"again", []string{"sae_002: a key is delivered once *"}, ""},
		{"other order", nil, "in another order"},
		{"keys for nothing", []string{"sae_002: a key is delivered once *", "sae_002: an unknown key ID is refused"}, ""},
		{"misshapen errors", []string{"sae_001: errors say why in a message"}, "the body of a 400: answer is JSON but not an object"},
		{"no client certificates", []string{"sae_001: nothing without a client certificate *", "sae_002: nothing without a client certificate *"}, ""},
		{"old TLS", []string{"sae_001: TLS 1.1 is refused", "sae_002: TLS 1.1 is refused"}, "TLS 1.1 is accepted"},
	} {
		t.Run(tt.fault, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				n := newNetwork(t)
				s := &sloppy{fault: tt.fault, keys: map[string]sloppyKey{}}
				n.serve(func(*kmesim.KME) func(context.Context, net.Listener, *tls.Config) error { return s.serve })
				r, err := ETSI014(t.Context(), n.config())
				if err != nil {
					t.Fatal(err)
				}
				got := wrong(r)
				// Where one mistake has consequences, the first of them counts.
				if tt.wrong != nil {
					if diff := cmp.Diff(tt.wrong, got); diff != "" && !slices.Contains([]string{"misshapen errors", "no post"}, tt.fault) {
						t.Errorf("wrong lines (-want +got):\n%s", diff)
					}
					for _, w := range tt.wrong {
						if !slices.Contains(got, w) {
							t.Errorf("not wrong: %s", w)
						}
					}
				}
				if page := table(r); !strings.Contains(page, tt.also) {
					t.Errorf("no %q in\n%s", tt.also, page)
				}
			})
		})
	}
}

// serve answers over TLS until ctx ends.
func (s *sloppy) serve(ctx context.Context, ln net.Listener, conf *tls.Config) error {
	switch s.fault {
	case "no client certificates":
		conf.ClientAuth, conf.VerifyConnection = tls.VerifyClientCertIfGiven, nil
	case "old TLS":
		conf.MinVersion = tls.VersionTLS10
	}
	server := &http.Server{Handler: s, ErrorLog: log.New(io.Discard, "", 0)}
	stop := context.AfterFunc(ctx, func() { server.Close() })
	defer stop()
	_ = server.Serve(tls.NewListener(ln, conf))
	return nil
}

// TestETSI014Certificates: neither end's certificate is taken for granted, and
// the pin is there to be compared.
func TestETSI014Certificates(t *testing.T) {
	for _, tt := range []struct {
		name string
		edit func(c *Config, other *kmesim.Lab)
		want string
	}{
		{"foreign KMS", func(c *Config, other *kmesim.Lab) { c.Here.TLS.Memory.RootCAs = other.ClientTLS(1).RootCAs },
			`wrong          certificate: x509: certificate signed by unknown authority (possibly because of "x509: ECDSA verification failure" while trying to verify candidate authority certificate "keyturn laboratory"); it is "kme-a", for localhost, kme-a, kme-b and 2 more; until 2010-01-01; pin (pin)`},
		{"foreign SAE", func(c *Config, other *kmesim.Lab) { c.Here.TLS.Memory.Certificates = other.ClientTLS(1).Certificates },
			""}, // the alert may be overtaken by the connection's end
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				n := newNetwork(t)
				n.serve(etsi014Server)
				c := n.config()
				other, err := kmesim.NewLab(kmesim.LabOptions{})
				if err != nil {
					t.Fatal(err)
				}
				tt.edit(&c, other)
				r, err := ETSI014(t.Context(), c)
				if err != nil {
					t.Fatal(err)
				}
				page := table(r)
				if !strings.Contains(page, tt.want) || r.Count(Wrong, true) != 1 || r.KeysTaken != 0 {
					t.Errorf("no %q in\n%s", tt.want, page)
				}
			})
		})
	}
}

func TestConfigIsChecked(t *testing.T) { synctest.Test(t, testConfigIsChecked) }

func testConfigIsChecked(t *testing.T) {
	n := newNetwork(t)
	for _, tt := range []struct {
		edit func(*Config)
		want string
	}{
		{func(c *Config) { c.Peer = "" }, "the SAE ID of the peer is missing"},
		{func(c *Config) { c.Peer = "sae_001" }, `SAE "sae_001" is at both ends`},
		{func(c *Config) { c.Peer = "sae_003" }, `the other end is SAE "sae_002", not "sae_003"`},
		{func(c *Config) { c.Here.URI = "http://kme-a" }, `URI "http://kme-a" is not https with a host`},
		{func(c *Config) { c.There.TLS.Memory = nil }, "the other end: no root certificate: the KMS could not be verified"},
	} {
		c := n.config()
		tt.edit(&c)
		if _, err := ETSI014(t.Context(), c); err == nil || err.Error() != tt.want {
			t.Errorf("got %v, want %s", err, tt.want)
		}
	}
}
