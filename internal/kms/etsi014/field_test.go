package etsi014

import (
	"bytes"
	"crypto/tls"
	"fmt"
	"io"
	"log"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"keyturn/internal/kms"
	"keyturn/internal/psk"
)

// quirk is one thing that a KME in the field does.
type quirk struct {
	what   string
	file   string        // of testdata/field
	method string        // GET if empty
	call   string        // "key", or "key ID" of another ID; "3 keys", "by ID", "status"
	is     error         // sentinel
	want   string        // error, or empty
	took   time.Duration // where that matters
	asked  int           // requests, where the last exchange of the file repeats
}

// field lists what KMEs in the field are known to do, each with a whole
// exchange in testdata/field, byte for byte, that neither our client nor our
// simulator wrote, and what the client makes of it.
var field = []quirk{
	{what: "the standard: GET with number and size", file: "key-get", call: "key"},
	{what: "the standard: POST; unknown request fields may be refused, so nothing optional goes out", file: "key-post", method: "POST", call: "key"},
	{what: "several keys in one answer", file: "keys-three", call: "3 keys"},
	{what: "more keys than asked for", file: "key-two-for-one", call: "key"},
	{what: "the key ID is no UUID", file: "key-id-no-uuid", call: "key KME7/0000:4711 a"},
	{what: "the key ends in a line end", file: "key-line-end", call: "key"},
	{what: "the key is wrapped and has blanks around it", file: "key-wrapped", call: "key"},
	{what: "/, + and = are escaped", file: "key-escaped", call: "key"},
	{what: "unknown response fields", file: "key-unknown-fields", call: "key"},
	{what: "JSON as text/plain, indented", file: "key-indented-text", call: "key"},
	{what: "chunked, with extensions and a trailer", file: "key-chunked", call: "key"},
	{what: "HTTP/1.0", file: "key-http10", call: "key"},
	{what: "100 and 103 before the answer", file: "key-continue", call: "key"},
	{what: "lines that end with LF", file: "key-lf", call: "key"},
	{what: "the answer drips, in time", file: "key-drips", call: "key", took: 2890 * time.Millisecond},

	{what: "a default of 32 bits, size ignored", file: "size-32-bits", call: "key", want: "https://kme-a: key has 32 bits, not 256"},
	{what: "another default, size ignored", file: "size-352-bits", call: "key", want: "https://kme-a: key has 352 bits, not 256"},
	{what: "an error under 200", file: "error-in-200", call: "key", want: "https://kme-a: answer holds no key"},
	{what: "a login page under 200", file: "login-page", call: "key", want: `https://kme-a: answer is not JSON but "text/html"`},
	{what: "nothing under 200", file: "empty-200", call: "key", want: "https://kme-a: answer is empty"},
	{what: "compressed, though not asked for", file: "gzip", call: "key", want: `https://kme-a: answer has the content coding "gzip", which was not asked for`},
	{what: "HTTP/2 only", file: "http2", call: "key", want: "https://kme-a: answer breaks the rules of HTTP/1.1"},
	{what: "an upgrade is required", file: "upgrade", call: "key", is: kms.ErrRefused, want: "kms refuses: https://kme-a answered 426"},
	{what: "two lengths", file: "two-lengths", call: "key", want: "https://kme-a: answer breaks the rules of HTTP/1.1"},
	{what: "an impossible chunk", file: "chunk-overflow", call: "key", want: "https://kme-a: http chunk length too large"},
	{what: "a length that is too short", file: "length-too-short", call: "key", want: "https://kme-a: answer is cut off after 100 bytes"},
	{what: "a header without an end: the key stands in it", file: "no-end-of-header", call: "key", want: "https://kme-a: answer breaks the rules of HTTP/1.1"},
	{what: "a trailer that is none: the key stands in it", file: "key-in-trailer", call: "key", want: "https://kme-a: answer breaks the rules of HTTP/1.1"},
	{what: "no HTTP at all", file: "not-http", call: "key", want: "https://kme-a: answer breaks the rules of HTTP/1.1"},

	{what: "silence after TLS", file: "silent", call: "key", want: "https://kme-a: no answer within 5s", took: 5 * time.Second},
	{what: "silence within the header", file: "silent-in-header", call: "key", want: "https://kme-a: no answer within 5s", took: 5 * time.Second},
	{what: "silence within the body", file: "silent-in-body", call: "key", want: "https://kme-a: no answer within 5s", took: 5 * time.Second},
	{what: "the answer drips: one deadline is over the whole", file: "drips", call: "key", want: "https://kme-a: no answer within 5s", took: 5 * time.Second},
	{what: "100 without end", file: "continues-for-ever", call: "key", want: "https://kme-a: answer breaks the rules of HTTP/1.1"},
	{what: "closed without an answer", file: "closed", call: "key", want: "https://kme-a: connection closed before the end of the answer"},
	{what: "closed within the header", file: "closed-in-header", call: "key", want: "https://kme-a: answer breaks the rules of HTTP/1.1"},
	{what: "closed within the body", file: "closed-in-body", call: "key", want: "https://kme-a: connection closed before the end of the answer"},
	{what: "closed within a chunk", file: "closed-in-chunk", call: "key", want: "https://kme-a: connection closed before the end of the answer"},

	{what: "out of keys is 400", file: "no-keys-400", call: "key", is: kms.ErrNoKeys, want: `kms has no key now: https://kme-a answered 400 "not enough keys available"`},
	{what: "out of keys is 404, with HTML", file: "no-keys-404", call: "key", is: kms.ErrNoKeys, want: "kms has no key now: https://kme-a answered 404"},
	{what: "out of keys is 429", file: "no-keys-429", call: "key", is: kms.ErrNoKeys, want: `kms has no key now: https://kme-a answered 429 "slow down"`},
	{what: "out of keys is 503, with a text", file: "no-keys-503", call: "key", is: kms.ErrNoKeys, want: "kms has no key now: https://kme-a answered 503"},
	{what: "out of keys is 504, with nothing", file: "no-keys-504", call: "key", is: kms.ErrNoKeys, want: "kms has no key now: https://kme-a answered 504"},
	{what: "a 400 that is about something else", file: "size-refused", call: "key", is: kms.ErrNoKeys, want: `kms has no key now: https://kme-a answered 400 "size shall be a multiple of 8"`},
	{what: "the error is []", file: "error-array", call: "key", is: kms.ErrNoKeys, want: "kms has no key now: https://kme-a answered 503"},
	{what: "the error is a JSON text", file: "error-text", call: "key", is: kms.ErrNoKeys, want: "kms has no key now: https://kme-a answered 503"},
	{what: "the error is a number", file: "error-number", call: "key", is: kms.ErrNoKeys, want: "kms has no key now: https://kme-a answered 503"},
	{what: "the error is null", file: "error-null", call: "key", is: kms.ErrNoKeys, want: "kms has no key now: https://kme-a answered 503"},
	{what: "the error has other types in it", file: "error-nested", call: "key", is: kms.ErrNoKeys, want: "kms has no key now: https://kme-a answered 503"},
	{what: "the error has other fields", file: "error-errors", call: "key", is: kms.ErrNoKeys, want: "kms has no key now: https://kme-a answered 503"},
	{what: "the error is cut off", file: "error-cut", call: "key", is: kms.ErrNoKeys, want: "kms has no key now: https://kme-a answered 503"},
	{what: "the error plays with the terminal", file: "error-control", call: "key", is: kms.ErrNoKeys, want: `kms has no key now: https://kme-a answered 503 "[31mnot enough keys"`},
	{what: "the error has another length", file: "error-wrong-length", call: "key", is: kms.ErrNoKeys, want: `kms has no key now: https://kme-a answered 503 "not enough keys"`},
	{what: "the error is not UTF-8", file: "error-latin1", call: "key", want: `https://kme-a answered 500 "schlssel fehlt"`},
	{what: "never is 401", file: "refused-401", call: "key", is: kms.ErrRefused, want: `kms refuses: https://kme-a answered 401 "SAE is not registered"`},
	{what: "never is 403", file: "refused-403", call: "key", is: kms.ErrRefused, want: "kms refuses: https://kme-a answered 403"},
	{what: "never is 405", file: "refused-405", call: "key", is: kms.ErrRefused, want: "kms refuses: https://kme-a answered 405"},
	{what: "a redirect is not followed", file: "redirect", call: "key", is: kms.ErrRefused, want: "kms refuses: https://kme-a answered 307"},
	{what: "a fault of the KME", file: "fault-500", call: "key", want: `https://kme-a answered 500 "NullPointerException"`},

	{what: "the standard: GET by ID", file: "by-id-get", call: "by ID"},
	{what: "the standard: POST by ID", file: "by-id-post", method: "POST", call: "by ID"},
	{what: "not there yet is 400", file: "by-id-late-400", call: "by ID", took: 150 * time.Millisecond},
	{what: "not there yet is 401", file: "by-id-late-401", call: "by ID", took: 150 * time.Millisecond},
	{what: "not there yet is 404", file: "by-id-late-404", call: "by ID", took: 150 * time.Millisecond},
	{what: "asked too soon is 429", file: "by-id-late-429", call: "by ID", took: 150 * time.Millisecond},
	{what: "not there yet is 503", file: "by-id-late-503", call: "by ID", took: 150 * time.Millisecond},
	{what: "never there: bounded", file: "by-id-never", call: "by ID", is: kms.ErrUnknownKey, took: 1550 * time.Millisecond, asked: 6,
		want: `kms does not know this key ID: https://kme-a answered 400 "one or more keys specified are not found on KME"`},
	{what: "never named: bounded", file: "by-id-never-named", call: "by ID", is: kms.ErrRefused, took: 1550 * time.Millisecond, asked: 6,
		want: `kms refuses: https://kme-a answered 401 "SAE not authorised for key"`},
	{what: "delivery removes the key: a lost answer is not asked for again", file: "by-id-lost", call: "by ID", want: "https://kme-a: connection closed before the end of the answer"},
	{what: "nor is one that did not come in time", file: "by-id-silent", call: "by ID", want: "https://kme-a: no answer within 5s", took: 5 * time.Second},
	{what: "nor is one that a gateway lost", file: "by-id-gateway", call: "by ID", want: "https://kme-a answered 504"},
	{what: "another key than asked for", file: "by-id-other", call: "by ID", want: `https://kme-a: answer holds the key "2" instead`},
	{what: "the ID comes back in upper case", file: "by-id-upper-case", call: "by ID"},

	{what: "the standard: status", file: "status", call: "status"},
	{what: "all counts are zero", file: "status-zeros", call: "status"},
	{what: "counts below zero", file: "status-negative", call: "status"},
	{what: "fields of the status are missing", file: "status-sparse", call: "status"},
	{what: "numbers as texts", file: "status-text-numbers", call: "status", want: "https://kme-a: answer has a JSON string as key_size"},
	{what: "no status", file: "status-404", call: "status", is: kms.ErrRefused, want: "kms refuses: https://kme-a answered 404"},
	{what: "busy", file: "status-503", call: "status", want: "https://kme-a answered 503"},
}

// statuses are the statuses of the files that hold one.
var statuses = map[string]kms.Status{
	"status": {
		SourceKME: "AAAABBBBCCCCDDDD", TargetKME: "EEEEFFFFGGGGHHHH", MasterSAE: "IIIIJJJJKKKKLLLL", SlaveSAE: "MMMMNNNNOOOOPPPP",
		KeySize: 352, MinKeySize: 64, MaxKeySize: 1024, StoredKeys: 25000, MaxKeys: 100000, MaxKeysPerRequest: 128, MaxSAEs: 2,
	},
	"status-zeros":    {SourceKME: "kme-a", TargetKME: "kme-b", MasterSAE: "sae_001", SlaveSAE: "sae_002", KeySize: 256},
	"status-negative": {KeySize: 256},
	"status-sparse":   {KeySize: 256},
}

// TestField replays each exchange against the bytes of a TLS connection. The
// client must send the very bytes of the file.
func TestField(t *testing.T) {
	// net/http logs by package log what follows an answer on a kept connection;
	// where a length is too short, that is a piece of the key.
	log.SetOutput(io.Discard)
	t.Cleanup(func() { log.SetOutput(os.Stderr) })
	listed := make(map[string]bool)
	for _, tt := range field {
		listed[tt.file] = true
		t.Run(tt.what, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				exchanges := readExchanges(t, tt.file)
				n := newNetwork(t)
				kme := n.replay(exchanges)
				s := n.source(Config{Method: tt.method}).(*Client)
				began := time.Now()
				prefix, err := tt.do(t, s)
				took := time.Since(began)
				got, want := "", tt.want
				if err != nil {
					got = err.Error()
				}
				if want != "" {
					want = prefix + want
				}
				if got != want {
					t.Errorf("\n got %s\nwant %s", got, want)
				}
				if err != nil {
					checkSentinel(t, tt.call, err, tt.is)
				}
				if tt.took != 0 && took.Truncate(time.Millisecond) != tt.took {
					t.Errorf("took %v, want %v", took, tt.took)
				}
				time.Sleep(time.Minute) // virtual: nothing may follow
				if want := max(tt.asked, len(exchanges)); kme.asked != want {
					t.Errorf("%d requests, want %d", kme.asked, want)
				}
			})
		})
	}
	files, err := filepath.Glob("testdata/field/*")
	if err != nil || len(files) == 0 {
		t.Fatal("no exchanges", err)
	}
	for _, f := range files {
		if !listed[filepath.Base(f)] {
			t.Errorf("%s is in no row of the table", f)
		}
	}
}

// do makes the call and checks what comes of it beside the error, which begins
// with prefix.
func (q *quirk) do(t *testing.T, s *Client) (prefix string, err error) {
	var key *psk.Key
	id, want := testID, testID
	switch what, other, _ := strings.Cut(q.call, " "); {
	case what == "key":
		if other != "" {
			want = other
		}
		prefix = "fetch key: "
		id, key, err = s.Key(t.Context())
	case q.call == "3 keys":
		var keys []namedKey
		keys, _, err = s.fetch(t.Context(), 3)
		if len(keys) == 3 && keys[1].id == "2" && keys[2].id == "3" && !keys[1].key.Equal(keys[2].key) {
			id, key = keys[0].id, keys[0].key
		}
	case q.call == "by ID":
		prefix = fmt.Sprintf("fetch key %q: ", testID)
		key, err = s.KeyByID(t.Context(), testID)
	default:
		got, err := s.Status(t.Context())
		if diff := cmp.Diff(statuses[q.file], got); diff != "" {
			t.Errorf("status (-want +got):\n%s", diff)
		}
		return "get status: ", err
	}
	switch {
	case err != nil && key != nil:
		t.Error("a key beside the error")
	case err == nil && (id != want || !isTestKey(t, key)):
		t.Errorf("key %q, want %q; or another key", id, want)
	}
	return prefix, err
}

// exchange is a request, its answer, and what the server does then.
type exchange struct {
	request, answer []byte
	manner          string
}

// readExchanges reads a file of exchanges: lines of comment, then "--- request"
// and "--- answer", each followed by a line end, the bytes, and a line end that
// is not theirs. After "--- answer" may stand how the server gives it.
func readExchanges(tb testing.TB, name string) (all []exchange) {
	tb.Helper()
	b, err := os.ReadFile(filepath.Join("testdata", "field", name))
	if err != nil {
		tb.Fatal(err)
	}
	parts := bytes.Split(append([]byte("\n"), b...), []byte("\n--- "))
	for _, p := range parts[1:] {
		head, data, ok := bytes.Cut(p, []byte("\n"))
		what, manner, _ := strings.Cut(string(head), ", ")
		switch {
		case !ok:
			tb.Fatalf("%s: %q has no bytes", name, head)
		case what == "request":
			all = append(all, exchange{request: data})
		case what == "answer" && len(all) > 0:
			all[len(all)-1].answer, all[len(all)-1].manner = data, manner
		default:
			tb.Fatalf("%s: %q", name, head)
		}
	}
	if len(all) == 0 {
		tb.Fatalf("%s: no exchange", name)
	}
	last := &all[len(all)-1]
	last.answer = bytes.TrimSuffix(last.answer, []byte("\n")) // the file's
	return all
}

// replayed is a KME that has its answers from a file.
type replayed struct {
	t         *testing.T
	exchanges []exchange
	asked     int
}

// replay gives the answers one after the other, the last one as often as asked.
func (n *network) replay(exchanges []exchange) *replayed {
	l, err := n.Listen("kme-a:443")
	if err != nil {
		n.t.Fatal(err)
	}
	k := &replayed{t: n.t, exchanges: exchanges}
	conf := n.kmeTLS("kme-a")
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			k.serve(tls.Server(conn, conf))
		}
	}()
	n.t.Cleanup(func() { l.Close(); <-done })
	return k
}

// serve serves one connection until either end closes it.
func (k *replayed) serve(conn net.Conn) {
	defer conn.Close()
	for {
		e := k.exchanges[min(k.asked, len(k.exchanges)-1)]
		got := make([]byte, 64<<10)
		n := 0
		for n < len(e.request) {
			m, err := conn.Read(got[n:])
			if n += m; err != nil {
				if n > 0 {
					k.t.Errorf("half a request: %q", got[:n])
				}
				return
			}
		}
		k.asked++
		if diff := cmp.Diff(string(e.request), string(got[:n])); diff != "" {
			k.t.Errorf("request (-want +got):\n%s", diff)
		}
		if !e.give(conn) {
			return
		}
	}
}

// give gives the answer in its manner and says whether the connection goes on.
func (e *exchange) give(conn net.Conn) bool {
	rate := 0
	if _, err := fmt.Sscanf(e.manner, "%d bytes a second", &rate); err == nil {
		for rest := e.answer; len(rest) > 0; rest = rest[1:] {
			time.Sleep(time.Second / time.Duration(rate)) // virtual
			if _, err := conn.Write(rest[:1]); err != nil {
				return false
			}
		}
		return true
	}
	_, err := conn.Write(e.answer)
	for err == nil && e.manner == "then again" {
		_, err = conn.Write(e.answer)
	}
	switch e.manner {
	case "then silence":
		_, _ = conn.Read(make([]byte, 1)) // until the client goes
		return false
	case "then close":
		return false
	}
	return err == nil
}
