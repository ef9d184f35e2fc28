package etsi014

import (
	"bytes"
	"crypto/tls"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"keyturn/internal/kms"
	"keyturn/internal/kms/kmstls"
	"keyturn/internal/psk"
	"keyturn/internal/testca"
)

const (
	testID    = "bc490419-7d60-487f-adc1-4ddcc177c139"
	testKey   = "wHHVxRwDJs3/bXd38GHP3oe4svTuRpZS0yCC7x4Ly+s="
	keyAnswer = `{"keys":[{"key_ID":"` + testID + `","key":"` + testKey + `"}]}`
)

// isTestKey tells whether key is testKey, without printing it.
func isTestKey(t *testing.T, key *psk.Key) bool {
	t.Helper()
	b, err := base64.StdEncoding.DecodeString(testKey)
	if err != nil {
		t.Fatal(err)
	}
	return key != nil && bytes.Equal(key.Bytes(), b)
}

// TestBadAnswers gives each call each wrong answer: the message is exact, the
// sentinel right, and nothing comes back.
func TestBadAnswers(t *testing.T) {
	keyOf := func(text string) string {
		return fmt.Sprintf(`{"keys":[{"key_ID":%q,"key":%q}]}`, testID, text)
	}
	const at = "https://kme-a: "
	for _, tt := range []struct {
		name   string
		answer http.HandlerFunc
		is     error
		want   string // after "fetch key: "
		byID   error  // what KeyByID says, where that differs
	}{
		{"empty", ok(""), nil, at + "answer is empty", nil},
		{"null", ok("null"), nil, at + "answer is JSON but not an object", nil},
		{"array", ok("[]"), nil, at + "answer is JSON but not an object", nil},
		{"number", ok("7"), nil, at + "answer is JSON but not an object", nil},
		{"HTML", says(200, "text/html; charset=utf-8", "<html><body>Please log in</body></html>"), nil,
			at + `answer is not JSON but "text/html"`, nil},
		{"truncated", ok(keyAnswer[:70]), nil, at + "answer is cut off after 70 bytes", nil},
		{"trailing", ok(keyAnswer + "x"), nil, at + "answer is not JSON from byte 114 on", nil},
		{"keys null", ok(`{"keys":null}`), nil, at + "answer holds no key", nil},
		{"no keys", ok(`{"keys":[]}`), nil, at + "answer holds no key", nil},
		{"keys an object", ok(`{"keys":{}}`), nil, at + "answer has a JSON object as keys", nil},
		{"key null", ok(`{"keys":[null]}`), nil, at + "key is missing", nil},
		{"second key bad", ok(`{"keys":[{"key_ID":"a","key":"` + testKey + `"},{"key_ID":"b","key":"AA=="}]}`), nil,
			at + "key has 8 bits, not 256", nil},
		{"huge number as ID", ok(`{"keys":[{"key_ID":1e999999,"key":"` + testKey + `"}]}`), nil,
			at + "answer has a JSON number as keys.key_ID", nil},
		{"number as key", ok(`{"keys":[{"key_ID":"a","key":123456789123456789123456789}]}`), nil,
			at + "key is not a JSON string", nil},
		{"no ID", ok(`{"keys":[{"key":"` + testKey + `"}]}`), nil, at + "key ID is missing", nil},
		{"empty ID", ok(`{"keys":[{"key_ID":"","key":"` + testKey + `"}]}`), nil, at + "key ID is empty", nil},
		{"endless ID", ok(`{"keys":[{"key_ID":"` + strings.Repeat("a", 1025) + `","key":"` + testKey + `"}]}`), nil,
			at + "key ID is 1025 bytes long, over 1024", nil},
		{"unprintable ID", ok(`{"keys":[{"key_ID":"a\u001b[2J","key":"` + testKey + `"}]}`), nil,
			at + "key ID has the unprintable byte 0x1b at offset 1", nil},
		{"key missing", ok(`{"keys":[{"key_ID":"a"}]}`), nil, at + "key is missing", nil},
		{"key empty", ok(keyOf("")), nil, at + "key has 0 bits, not 256", nil},
		{"32 bits", ok(keyOf("AAECAw==")), nil, at + "key has 32 bits, not 256", nil},
		{"264 bits", ok(keyOf(base64.StdEncoding.EncodeToString(make([]byte, 33)))), nil, at + "key has 264 bits, not 256", nil},
		{"not base64", ok(keyOf("!" + testKey[1:])), nil, at + "key is not padded base64", nil},
		{"not padded", ok(keyOf(strings.TrimRight(testKey, "="))), nil, at + "key is not padded base64", nil},
		{"URL-safe base64", ok(keyOf(strings.ReplaceAll(testKey, "/", "_"))), nil, at + "key is not padded base64", nil},
		{"hex", ok(keyOf(strings.Repeat("0f", 32))), nil, at + "key has 384 bits, not 256", nil},
		{"all zero", ok(keyOf(base64.StdEncoding.EncodeToString(make([]byte, 32)))), nil, at + "key is all zero", nil},
		{"endless", func(w http.ResponseWriter, _ *http.Request) {
			for {
				if _, err := io.WriteString(w, strings.Repeat(" ", 1000)); err != nil {
					return
				}
			}
		}, nil, at + "answer is too long: over 65536 bytes", nil},
		{"endless header", func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("X", strings.Repeat("x", 20<<10))
		}, nil, at + "answer breaks the rules of HTTP/1.1", nil},
		{"late", silent, nil, at + "no answer within 5s", nil},
		{"late body", func(w http.ResponseWriter, r *http.Request) {
			_, _ = io.WriteString(w, keyAnswer[:70])
			_ = http.NewResponseController(w).Flush()
			silent(w, r)
		}, nil, at + "no answer within 5s", nil},
		{"cut off body", raw("HTTP/1.1 200 OK\r\nContent-Length: 113\r\n\r\n" + keyAnswer[:70]), nil,
			at + "connection closed before the end of the answer", nil},
		{"no answer", cut, nil, at + "connection closed before the end of the answer", nil},
		{"not HTTP", raw("SSH-2.0-OpenSSH_9.2\r\n"), nil,
			at + "answer breaks the rules of HTTP/1.1", nil},
		{"204", says(204, "", ""), nil, "https://kme-a answered 204", nil},
		{"302", raw("HTTP/1.1 302 Found\r\nLocation: https://kme-b/\r\n\r\n"), kms.ErrRefused,
			"kms refuses: https://kme-a answered 302", nil},
		{"400", says(400, "application/json", `{"message":"size shall be a multiple of 8","details":[{}]}`), kms.ErrNoKeys,
			`kms has no key now: https://kme-a answered 400 "size shall be a multiple of 8"`, kms.ErrUnknownKey},
		{"401", says(401, "application/json", `{"message":"who is that?"}`), kms.ErrRefused,
			`kms refuses: https://kme-a answered 401 "who is that?"`, nil},
		{"403", says(403, "text/plain", "no"), kms.ErrRefused, "kms refuses: https://kme-a answered 403", nil},
		{"404", says(404, "text/html", "<html>"), kms.ErrNoKeys,
			"kms has no key now: https://kme-a answered 404", kms.ErrUnknownKey},
		{"405", says(405, "application/json", `["POST"]`), kms.ErrRefused, "kms refuses: https://kme-a answered 405", nil},
		{"429", says(429, "application/json", `{"message":{"text":7}}`), kms.ErrNoKeys,
			"kms has no key now: https://kme-a answered 429", errors.ErrUnsupported},
		{"500", says(500, "application/json", `{"message":"\u001b[2Jboom\n"}`), nil,
			`https://kme-a answered 500 "[2Jboom"`, nil},
		{"503", says(503, "application/json", `{"message":"`+strings.Repeat("m", 300)+`"}`), kms.ErrNoKeys,
			`kms has no key now: https://kme-a answered 503 "` + strings.Repeat("m", 200) + `"`, kms.ErrUnknownKey},
		{"503 with an endless body", func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(503)
			for {
				if _, err := io.WriteString(w, strings.Repeat(" ", 1000)); err != nil {
					return
				}
			}
		}, kms.ErrNoKeys, "kms has no key now: https://kme-a answered 503", kms.ErrUnknownKey},
		{"504", says(504, "", ""), kms.ErrNoKeys, "kms has no key now: https://kme-a answered 504", errors.ErrUnsupported},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				n := newNetwork(t)
				n.serve("kme-a", tt.answer)
				s := n.source(Config{})

				id, key, err := s.Key(t.Context())
				if err == nil || err.Error() != "fetch key: "+tt.want {
					t.Errorf("Key:\n got %v\nwant fetch key: %s", err, tt.want)
				}
				if id != "" || key != nil {
					t.Error("Key returned something beside the error")
				}
				checkSentinel(t, "Key", err, tt.is)

				key, err = s.KeyByID(t.Context(), testID)
				if err == nil || !strings.HasPrefix(err.Error(), fmt.Sprintf("fetch key %q: ", testID)) {
					t.Errorf("KeyByID: %v", err)
				}
				if key != nil {
					t.Error("KeyByID returned a key beside the error")
				}
				switch tt.byID {
				case nil:
					checkSentinel(t, "KeyByID", err, tt.is)
				case errors.ErrUnsupported: // no sentinel
					checkSentinel(t, "KeyByID", err, nil)
				default:
					checkSentinel(t, "KeyByID", err, tt.byID)
				}
			})
		})
	}
}

// checkSentinel fails unless err is want and none of the other sentinels.
func checkSentinel(t *testing.T, call string, err, want error) {
	t.Helper()
	for _, s := range []error{kms.ErrNoKeys, kms.ErrUnknownKey, kms.ErrRefused} {
		if got := errors.Is(err, s); got != (s == want) {
			t.Errorf("%s: errors.Is(%v, %v) = %v", call, err, s, got)
		}
	}
}

func TestKeyByIDRefusesAnotherID(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNetwork(t)
		two := strings.Replace(keyAnswer, "[", `[{"key_ID":"other","key":"`+testKey+`"},`, 1)
		n.serve("kme-a", inTurn(ok(keyAnswer), ok(two)))
		s := n.source(Config{})
		for _, want := range []string{
			`fetch key "other": https://kme-a: answer holds the key "` + testID + `" instead`,
			`fetch key "other": https://kme-a: answer holds 2 keys, not 1`,
		} {
			key, err := s.KeyByID(t.Context(), "other")
			if key != nil || err == nil || err.Error() != want {
				t.Errorf("got %v\nwant %s", err, want)
			}
		}
	})
}

func TestKeyByIDRefusesABadID(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNetwork(t)
		h := n.serve("kme-a", ok(keyAnswer))
		if _, err := n.source(Config{}).KeyByID(t.Context(), "a\r\nb"); err == nil {
			t.Error("no error")
		}
		if len(h.seen()) != 0 {
			t.Error("the KME was asked")
		}
	})
}

// TestNothingIsAskedTwice is the rule for a key that may be gone: whatever
// happens after the request has left, also on a kept connection, where
// net/http would repeat it, there is no second one.
func TestNothingIsAskedTwice(t *testing.T) {
	for _, tt := range []struct {
		name string
		lose http.HandlerFunc
	}{
		{"connection cut", cut},
		{"cut within the answer", raw("HTTP/1.1 200 OK\r\nContent-Length: 113\r\n\r\n" + keyAnswer[:50])},
		{"silence", silent},
		{"gateway", says(504, "", "")},
		{"gateway fault", says(502, "text/html", "<html>")},
		{"server fault", says(500, "application/json", "{}")},
		{"bad answer", ok("{}")},
	} {
		for _, method := range []string{"GET", "POST"} {
			t.Run(tt.name+" "+method, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					n := newNetwork(t)
					// The first answer leaves a connection behind that is used again.
					a := n.serve("kme-a", inTurn(ok(keyAnswer), tt.lose, ok(keyAnswer)))
					b := n.serve("kme-b", ok(keyAnswer))
					s := n.source(Config{Method: method, URIs: []string{"https://kme-a", "https://kme-b"}})
					if _, err := s.KeyByID(t.Context(), testID); err != nil {
						t.Fatal(err)
					}
					_, err := s.KeyByID(t.Context(), testID)
					if err == nil {
						t.Error("no error")
					}
					checkSentinel(t, "KeyByID", err, nil)
					if got := len(a.seen()) - 1 + len(b.seen()); got != 1 {
						t.Errorf("asked %d times", got)
					}
				})
			})
		}
	}
}

func TestKeyIsAskedOnceOfOneKME(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNetwork(t)
		h := n.serve("kme-a", inTurn(ok(keyAnswer), cut, ok(keyAnswer)))
		s := n.source(Config{})
		for range 2 {
			_, _, _ = s.Key(t.Context())
		}
		if got := len(h.seen()); got != 2 {
			t.Errorf("two calls made %d requests: a key was wasted", got)
		}
	})
}

func TestBadStatus(t *testing.T) {
	for _, tt := range []struct {
		body, want string
	}{
		{"", "get status: https://kme-a: answer is empty"},
		{"[]", "get status: https://kme-a: answer is JSON but not an object"},
		{`{"key_size":1e400}`, "get status: https://kme-a: answer has a JSON number as key_size"},
		{`{"key_size":99999999999999999999}`, "get status: https://kme-a: answer has a JSON number as key_size"},
		{`{"source_KME_ID":["a"]}`, "get status: https://kme-a: answer has a JSON array as source_KME_ID"},
	} {
		synctest.Test(t, func(t *testing.T) {
			n := newNetwork(t)
			n.serve("kme-a", ok(tt.body))
			s, err := n.source(Config{}).Status(t.Context())
			if err == nil || err.Error() != tt.want {
				t.Errorf("%s:\n got %v\nwant %s", tt.body, err, tt.want)
			}
			if s != (kms.Status{}) {
				t.Errorf("%s: a status beside the error", tt.body)
			}
		})
	}
}

func TestAddresses(t *testing.T) {
	for _, tt := range []struct{ uri, peer, want string }{
		{"https://kme-a", "sae_002", "/api/v1/keys/sae_002/"},
		{"https://kme-a/", "sae_002", "/api/v1/keys/sae_002/"},
		{"https://kme-a/api/v1/keys", "sae_002", "/api/v1/keys/sae_002/"},
		{"https://kme-a/api/v1/keys/", "sae_002", "/api/v1/keys/sae_002/"},
		{"https://kme-a/site%2F1/api/v1/keys", "sae_002", "/site%2F1/api/v1/keys/sae_002/"},
		{"https://kme-a/qkd", "a/b?c#d %é+&", "/qkd/api/v1/keys/a%2Fb%3Fc%23d%20%25%C3%A9+&/"},
	} {
		synctest.Test(t, func(t *testing.T) {
			n := newNetwork(t)
			h := n.serve("kme-a", ok(keyAnswer))
			s, err := n.kms(Config{URIs: []string{tt.uri}}).For(tt.peer)
			if err != nil {
				t.Fatal(err)
			}
			if _, _, err := s.Key(t.Context()); err != nil {
				t.Fatal(err)
			}
			want := []string{"GET " + tt.want + "enc_keys?number=1&size=256"}
			if diff := cmp.Diff(want, h.seen()); diff != "" {
				t.Errorf("%s (-want +got):\n%s", tt.uri, diff)
			}
		})
	}
}

func TestKeyIDIsEscaped(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const id = `a&b=c d/?#%"`
		n := newNetwork(t)
		n.serve("kme-a", func(w http.ResponseWriter, r *http.Request) {
			if got := r.URL.Query().Get("key_ID"); got != id {
				t.Errorf("KME was asked for %q", got)
			}
			fmt.Fprintf(w, `{"keys":[{"key_ID":%q,"key":%q}]}`, id, testKey)
		})
		if _, err := n.source(Config{}).KeyByID(t.Context(), id); err != nil {
			t.Error(err)
		}
	})
}

// TestTrust: what comes of certificates that one end or the other does not
// like. Which those are, kmstls says.
func TestTrust(t *testing.T) {
	for _, tt := range []struct {
		name string
		edit func(n *network, foreign *testca.Authority, kme *tls.Config, c *kmstls.Config)
		want string // error, or empty
	}{
		{"both", func(*network, *testca.Authority, *tls.Config, *kmstls.Config) {}, ""},
		{"other host name", func(n *network, _ *testca.Authority, kme *tls.Config, _ *kmstls.Config) {
			kme.Certificates[0] = n.Server("kme-b")
		}, "kms refuses: https://kme-a: certificate: x509: certificate is valid for kme-b, not kme-a"},
		{"server_name", func(n *network, _ *testca.Authority, kme *tls.Config, c *kmstls.Config) {
			kme.Certificates[0], c.ServerName = n.Server("kme-b"), "kme-b"
		}, ""},
		{"pin", func(n *network, _ *testca.Authority, kme *tls.Config, c *kmstls.Config) {
			kme.Certificates[0] = n.Server("kme-b")
			c.Pins = []kmstls.Pin{kmstls.PinOf(kme.Certificates[0].Leaf)}
		}, ""},
		{"foreign root", func(_ *network, foreign *testca.Authority, kme *tls.Config, _ *kmstls.Config) {
			kme.Certificates[0] = foreign.Server("kme-a")
		}, "kms refuses: https://kme-a: certificate: x509: certificate signed by unknown authority"},
		{"our certificate is foreign", func(_ *network, foreign *testca.Authority, kme *tls.Config, c *kmstls.Config) {
			kme.MaxVersion = tls.VersionTLS12 // says so within the handshake
			cert := foreign.Client("sae_001")
			// Certificates would keep one back that the server's roots do not cover.
			c.Memory.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &cert, nil }
		}, "kms refuses: https://kme-a: TLS alert: tls: unknown certificate authority"},
		{"old TLS", func(_ *network, _ *testca.Authority, kme *tls.Config, _ *kmstls.Config) {
			kme.MinVersion, kme.MaxVersion = tls.VersionTLS10, tls.VersionTLS11
		}, "kms refuses: https://kme-a: TLS alert: tls: protocol version not supported"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				n := newNetwork(t)
				kme, c := n.kmeTLS("kme-a"), kmstls.Config{Memory: &tls.Config{RootCAs: n.Pool()}}
				c.Memory.Certificates = []tls.Certificate{n.Client("sae_001")}
				tt.edit(n, testca.New(t, "foreign root"), kme, &c)
				n.serveTLS("kme-a", kme, ok(keyAnswer))
				_, _, err := n.source(Config{TLS: c}).Key(t.Context())
				got, want := "", tt.want
				if err != nil {
					got, want = err.Error(), "fetch key: "+tt.want
					checkSentinel(t, "Key", err, kms.ErrRefused)
				}
				if got != want {
					t.Errorf("got  %s\nwant %s", got, want)
				}
			})
		})
	}
}

func TestNewRefuses(t *testing.T) {
	roots := testca.New(t, "root").Pool()
	good := func() Config {
		return Config{URIs: []string{"https://kme-a"}, SAE: "sae_001", TLS: kmstls.Config{Memory: &tls.Config{RootCAs: roots}}}
	}
	if _, err := New(good()); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name string
		edit func(*Config)
		want string
	}{
		{"no SAE", func(c *Config) { c.SAE = "" }, "SAE ID is empty"},
		{"dots", func(c *Config) { c.SAE = ".." }, `SAE ID ".." cannot stand in a URI`},
		{"unprintable SAE", func(c *Config) { c.SAE = "a\n" }, `SAE ID "a\n" is not printable text`},
		{"long SAE", func(c *Config) { c.SAE = strings.Repeat("s", 1025) }, "SAE ID is 1025 bytes long, over 1024"},
		{"no URI", func(c *Config) { c.URIs = nil }, "0 URIs, not 1 to 16"},
		{"malformed URI", func(c *Config) { c.URIs = []string{"https://kme-a:port"} }, `URI "https://kme-a:port" is malformed`},
		{"http", func(c *Config) { c.URIs = []string{"http://kme-a"} }, `URI "http://kme-a" does not begin with https://`},
		{"no scheme", func(c *Config) { c.URIs = []string{"kme-a"} }, `URI "kme-a" does not begin with https://`},
		{"no host", func(c *Config) { c.URIs = []string{"https:///x"} }, `URI "https:///x" names no host`},
		{"query", func(c *Config) { c.URIs = []string{"https://kme-a?x"} }, `URI "https://kme-a?x" has more than a host and a path`},
		{"user", func(c *Config) { c.URIs = []string{"https://me@kme-a"} }, `URI "https://me@kme-a" has more than a host and a path`},
		{"method", func(c *Config) { c.Method = "PUT" }, `method "PUT" is neither GET nor POST`},
		{"timeout", func(c *Config) { c.Timeout = -1 }, "timeout -1ns is not between 0 and 1m0s"},
		{"long timeout", func(c *Config) { c.Timeout = time.Hour }, "timeout 1h0m0s is not between 0 and 1m0s"},
		{"no verification", func(c *Config) { c.TLS.Memory = &tls.Config{} }, "TLS configuration does not verify the KMS"},
	} {
		c := good()
		tt.edit(&c)
		k, err := New(c)
		if k != nil || err == nil || err.Error() != tt.want {
			t.Errorf("%s:\n got %v\nwant %s", tt.name, err, tt.want)
		}
	}

	k, err := New(good())
	if err != nil {
		t.Fatal(err)
	}
	for peer, want := range map[string]string{
		"sae_001": `SAE "sae_001" is our own, not a peer's`,
		".":       `SAE ID "." cannot stand in a URI`,
	} {
		if s, err := k.For(peer); s != nil || err == nil || err.Error() != want {
			t.Errorf("For(%q) = %v, want %s", peer, err, want)
		}
	}
}
