package control

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// fakeRotator answers with a fixed status and knows one peer.
type fakeRotator struct {
	status  Status
	rotated atomic.Pointer[string]
	down    atomic.Int32
	busy    error
}

func (f *fakeRotator) Status() Status { return f.status }
func (f *fakeRotator) Down()          { f.down.Add(1) }
func (f *fakeRotator) Rotate(peer string) error {
	if peer != "" && peer != "lisbon" {
		return fmt.Errorf("%w: %q", ErrUnknownPeer, peer)
	}
	if f.busy != nil {
		return f.busy
	}
	f.rotated.Store(&peer)
	return nil
}

// serve runs a server until the test ends, or stop is called and has
// returned.
func serve(t *testing.T, h Handler) (path string, stop func()) {
	t.Helper()
	path = SocketPath(filepath.Join(t.TempDir(), "run"), "wg0")
	s, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx, h) }()
	var stopped atomic.Bool
	stop = func() {
		if stopped.Swap(true) {
			return
		}
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Serve returned %v", err)
		}
	}
	t.Cleanup(stop)
	return path, stop
}

func ptr[T any](v T) *T { return &v }

// sample is a status with every field set.
func sample() Status {
	at := time.Date(2026, 11, 22, 10, 0, 0, 0, time.UTC)
	return Status{
		Interface: "wg0", PID: 42, Version: "v1.0.0", State: StateUp, StartedAt: at,
		ConfigPath: "/etc/keyturn/wg0.yaml", Listen: "[::]:51822", PublicKey: "own=", Identity: "id=",
		Peers: []PeerStatus{{
			Name: "lisbon", PublicKey: "peer=", Role: "client", SAE: "sae_001", PeerSAE: "sae_002",
			State: PeerRepairing, Why: "the ends have different keys installed",
			HandshakeAge: ptr(Seconds(1500 * time.Millisecond)),
			Installed:    &Key{Serial: 7, Fingerprint: "01020304", Since: at, Sources: []string{"QKD", "ML-KEM-1024"}},
			Confirmed:    &Key{Serial: 6, Fingerprint: "0a0b0c0d", Since: at},
			KeyAge:       ptr(Seconds(90 * time.Second)), Rotations: 7, LastRotation: at,
			Buffer:      Buffer{Len: 2, Cap: 3},
			Link:        Link{State: LinkUp, Since: at, RemoteAddr: "198.51.100.7:51822", Inside: true, Error: "none"},
			KMS:         &KMS{State: KMSOK, URI: "https://kme-a:8443", LastError: "503", LastKeyAt: at, Keys: ptr(12)},
			Differences: []Difference{{Field: "kems", Ours: "ML-KEM-1024", Theirs: "none"}},
			Warnings:    []Warning{Warn(KeysDiffer, "")},
		}},
		Warnings: []Warning{Warn(LogDropped, "3 lines")},
	}
}

func TestClientReadsWhatTheRotatorSays(t *testing.T) {
	f := &fakeRotator{status: sample()}
	path, _ := serve(t, f)
	c := NewClient(path)
	got, err := c.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(&f.status, got); d != "" {
		t.Errorf("status changed on its way (-sent +got):\n%s", d)
	}
}

func TestRotate(t *testing.T) {
	f := &fakeRotator{}
	path, _ := serve(t, f)
	c := NewClient(path)
	if err := c.Rotate(t.Context(), "lisbon"); err != nil || f.rotated.Load() == nil || *f.rotated.Load() != "lisbon" {
		t.Errorf("rotate lisbon: %v, handler got %v", err, f.rotated.Load())
	}
	if err := c.Rotate(t.Context(), ""); err != nil || *f.rotated.Load() != "" {
		t.Errorf("rotate all: %v", err)
	}
	if err := c.Rotate(t.Context(), "porto"); !errors.Is(err, ErrUnknownPeer) {
		t.Errorf("rotate an unknown peer: %v", err)
	}
	f.busy = errors.New("no verified key is ready")
	if err := c.Rotate(t.Context(), "lisbon"); err == nil || !strings.Contains(err.Error(), "no verified key is ready") {
		t.Errorf("the rotator's own words are lost: %v", err)
	}
}

func TestDownThenGone(t *testing.T) {
	f := &fakeRotator{}
	path, stop := serve(t, f)
	c := NewClient(path)
	if err := c.Down(t.Context()); err != nil || f.down.Load() != 1 {
		t.Fatalf("down: %v, handler called %d times", err, f.down.Load())
	}
	stop()
	if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is still there: %v", err)
	}
	if _, err := c.Status(t.Context()); !errors.Is(err, ErrNotRunning) {
		t.Errorf("status after the end: %v", err)
	}
}

func TestSocketIsPrivate(t *testing.T) {
	path, _ := serve(t, &fakeRotator{})
	for name, want := range map[string]os.FileMode{path: 0o600, filepath.Dir(path): 0o700} {
		info, err := os.Stat(name)
		if err != nil {
			t.Fatal(err)
		}
		if info.Mode().Perm() != want {
			t.Errorf("%s has mode %04o, want %04o", filepath.Base(name), info.Mode().Perm(), want)
		}
	}
}

func TestLiveSocketIsNotTaken(t *testing.T) {
	path, _ := serve(t, &fakeRotator{})
	if _, err := Listen(path); !errors.Is(err, ErrRunning) {
		t.Fatalf("second Listen: %v", err)
	}
	if _, err := NewClient(path).Status(t.Context()); err != nil {
		t.Errorf("the first rotator no longer answers: %v", err)
	}
}

func TestDeadSocketIsReplaced(t *testing.T) {
	path := filepath.Join(t.TempDir(), "wg0.sock")
	dead, err := net.ListenUnix("unix", &net.UnixAddr{Name: path})
	if err != nil {
		t.Fatal(err)
	}
	dead.SetUnlinkOnClose(false) // as kill -9 leaves it
	dead.Close()
	if _, err := NewClient(path).Status(t.Context()); !errors.Is(err, ErrNotRunning) {
		t.Errorf("a dead socket: %v, want ErrNotRunning", err)
	}
	s, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	s.Close()
}

func TestListenRefuses(t *testing.T) {
	dir := t.TempDir()
	plain := filepath.Join(dir, "wg0.sock")
	if err := os.WriteFile(plain, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	open := filepath.Join(dir, "open")
	if err := os.Mkdir(open, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(open, 0o777); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct{ path, want string }{
		{plain, "no socket is in the way"},
		{filepath.Join(open, "wg0.sock"), "mode 0777 lets other users write"},
		{filepath.Join(dir, strings.Repeat("x", 120), "wg0.sock"), "107 is the limit"},
	} {
		if _, err := Listen(tc.path); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("Listen: %v, want %q", err, tc.want)
		}
	}
	if b, _ := os.ReadFile(plain); string(b) != "x" {
		t.Error("a file that is no socket was touched")
	}
}

func TestMayControl(t *testing.T) {
	for _, tc := range []struct {
		uid  uint32
		self int
		want bool
	}{{0, 0, true}, {0, 1000, true}, {1000, 1000, true}, {1000, 0, false}, {1001, 1000, false}} {
		if got := mayControl(tc.uid, tc.self); got != tc.want {
			t.Errorf("uid %d of a rotator of uid %d: %v", tc.uid, tc.self, got)
		}
	}
}

func TestPeerUID(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	s, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if uid, err := peerUID(s); err != nil || int(uid) != os.Geteuid() {
		t.Errorf("uid %d, %v; want our own, %d", uid, err, os.Geteuid())
	}
	a, b := net.Pipe()
	defer a.Close()
	defer b.Close()
	if _, err := peerUID(a); err == nil {
		t.Error("a connection without credentials was let in")
	}
}

// Requests that no client of ours sends change nothing and do not disturb
// those that come after.
func TestHostileRequests(t *testing.T) {
	f := &fakeRotator{}
	path, _ := serve(t, f)
	for _, tc := range []struct {
		name, method, path, body string
		code                     int
	}{
		{"not JSON", "POST", pathRotate, "peer", 400},
		{"unknown field", "POST", pathRotate, `{"peer":"lisbon","now":true}`, 400},
		{"two values", "POST", pathRotate, `{"peer":"lisbon"} {}`, 400},
		{"wrong type", "POST", pathRotate, `{"peer":["lisbon"]}`, 400},
		{"endless", "POST", pathRotate, `{"peer":"` + strings.Repeat("x", maxRequest) + `"}`, 400},
		{"wrong method", "GET", pathDown, "", 405},
		{"unknown path", "POST", "/v1/keys", "", 404},
	} {
		c := NewClient(path)
		req, err := http.NewRequestWithContext(t.Context(), tc.method, "http://keyturn"+tc.path, strings.NewReader(tc.body))
		if err != nil {
			t.Fatal(err)
		}
		resp, err := c.http.Do(req)
		if err != nil {
			t.Fatalf("%s: %v", tc.name, err)
		}
		resp.Body.Close()
		if resp.StatusCode != tc.code {
			t.Errorf("%s: %s, want %d", tc.name, resp.Status, tc.code)
		}
	}
	if f.rotated.Load() != nil || f.down.Load() != 0 {
		t.Error("a hostile request reached the rotator")
	}
	if err := NewClient(path).Rotate(t.Context(), ""); err != nil {
		t.Errorf("afterwards: %v", err)
	}
}

// The client must not believe, or hang on, whatever answers on the socket.
func TestHostileAnswers(t *testing.T) {
	for name, answer := range map[string]string{
		"not HTTP": "hello\r\n\r\n",
		"not JSON": "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
		"bad time": "HTTP/1.1 200 OK\r\nContent-Length: 22\r\n\r\n{\"started_at\":\"today\"}",
		"refused":  forbidden,
		"half":     "HTTP/1.1 200 OK\r\nContent-Length: 22\r\n\r\n{",
		"nothing":  "",
	} {
		path := filepath.Join(t.TempDir(), "s")
		l, err := net.Listen("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		go func() {
			c, err := l.Accept()
			if err != nil {
				return
			}
			defer c.Close()
			_, _ = c.Read(make([]byte, 4096))
			_, _ = io.WriteString(c, answer)
		}()
		if s, err := NewClient(path).Status(t.Context()); err == nil {
			t.Errorf("%s: taken for a status: %+v", name, s)
		} else if ended := name == "half" || name == "nothing"; ended != strings.Contains(err.Error(), "the rotator closed the connection") {
			t.Errorf("%s: %v", name, err)
		}
		l.Close()
	}
}

func TestSeconds(t *testing.T) {
	b, err := json.Marshal(sample())
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{`"handshake_age_seconds":1.5,`, `"key_age_seconds":90,`, `"started_at":"2026-11-22T10:00:00Z"`} {
		if !bytes.Contains(b, []byte(want)) {
			t.Errorf("%s is not in the status", want)
		}
	}
	for _, bad := range []string{`"1"`, `{}`, `1e300`, `true`} {
		var s Seconds
		if err := json.Unmarshal([]byte(bad), &s); err == nil {
			t.Errorf("%s was taken for seconds: %v", bad, time.Duration(s))
		}
	}
}

func TestDegraded(t *testing.T) {
	fine := func() *Status {
		return &Status{State: StateUp, Peers: []PeerStatus{{Protected: true}, {Protected: true}}}
	}
	for _, tc := range []struct {
		name string
		make func(*Status)
		want bool
	}{
		{"all protected", func(*Status) {}, false},
		{"one is not", func(s *Status) { s.Peers[1].Protected = false }, true},
		{"a peer's warning", func(s *Status) { s.Peers[0].Warnings = []Warning{Warn(KMSFails, "")} }, true},
		{"a warning of the interface", func(s *Status) { s.Warnings = []Warning{Warn(JournalFails, "")} }, true},
		{"only information", func(s *Status) { s.Warnings = []Warning{Warn(TimeJumped, "")} }, false},
		{"stopping", func(s *Status) { s.State = StateDown }, true},
	} {
		s := fine()
		tc.make(s)
		if s.Degraded() != tc.want {
			t.Errorf("%s: degraded is %v", tc.name, !tc.want)
		}
	}
	if n := fine().ProtectedPeers(); n != 2 {
		t.Errorf("%d of 2 peers protected", n)
	}
}

func TestWarnOutsideTheCatalogueIsAnError(t *testing.T) {
	if w := Warn("made_up", "x"); w.Severity != SeverityError {
		t.Errorf("%+v", w)
	}
	if w := Warn(KMSFails, "503"); w.Text != "the KMS delivers no keys: 503" || w.Severity != SeverityWarning {
		t.Errorf("%+v", w)
	}
}

func FuzzDecodeRotate(f *testing.F) {
	f.Add([]byte(`{"peer":"lisbon"}`))
	f.Add([]byte(`{"peer":""} `))
	f.Add([]byte(`{}{}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		peer, err := decodeRotate(bytes.NewReader(b))
		if err != nil {
			return
		}
		again, err := json.Marshal(rotateRequest{Peer: peer})
		if err != nil {
			t.Fatal(err)
		}
		if got, err := decodeRotate(bytes.NewReader(again)); err != nil || got != peer {
			t.Fatalf("%q became %q, %v", peer, got, err)
		}
	})
}

// A status that parses is encoded to something that parses to the same.
func FuzzStatus(f *testing.F) {
	b, err := json.Marshal(sample())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add([]byte(`{"peers":[{"handshake_age_seconds":1e9,"kms":{}}]}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		var s, again Status
		if json.Unmarshal(b, &s) != nil {
			return
		}
		first, err := json.Marshal(s)
		if err != nil {
			return // a time of a year that RFC 3339 does not have
		}
		if err := json.Unmarshal(first, &again); err != nil {
			t.Fatalf("does not parse what it wrote: %v\n%s", err, first)
		}
		second, err := json.Marshal(again)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(first, second) {
			t.Fatalf("%s became %s", first, second)
		}
	})
}
