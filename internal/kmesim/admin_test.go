package kmesim_test

import (
	"context"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"keyturn/internal/kmesim"
)

// ask sends one request to an admin endpoint.
func ask(t *testing.T, path, method, resource, body string) (code int, answer string) {
	t.Helper()
	client := http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", path)
		},
	}}
	req, err := http.NewRequestWithContext(t.Context(), method, "http://kme"+resource, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	resp, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(b)
}

func TestAdmin(t *testing.T) {
	dir := t.TempDir()
	socket := filepath.Join(dir, "kme.sock")
	lab, pair := newLab(t), kmesim.New(kmesim.Options{})
	uriA, uriB := start(t, kmesim.Config{Lab: lab, Pair: pair, Admin: socket})
	if i, err := os.Stat(socket); err != nil || i.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", i.Mode(), err)
	}
	a, b := source(t, lab, uriA, 1, 2), source(t, lab, uriB, 2, 1)
	if err := exchange(t.Context(), a, b); err != nil {
		t.Fatal(err)
	}

	admin := kmesim.NewAdmin(socket)
	s, err := admin.State(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if a, b := s.KMEs[0], s.KMEs[1]; a.Name != "kme-a" || a.Fault != "healthy" || a.Made != 1 || a.Delivered != 0 || b.Delivered != 1 ||
		b.Waiting != 0 || !a.Link.Up || a.PoolCount != 1 || a.Pools[0] != (kmesim.PoolState{Master: "sae_001", Slave: "sae_002", Stored: 1024, Made: 1}) {
		t.Errorf("state %+v", s)
	}

	for _, tt := range []struct {
		name, method, resource, body string
		code                         int
		want                         string // within the answer
	}{
		{"state", "GET", "/v1/state", "", 200, `"fault": "healthy"`},
		{"fault", "PUT", "/v1/kme-a/fault", `{"fault":"out-of-keys,for=1h"}`, 200, `"fault": "out-of-keys,for=1h0m0s"`},
		{"fault of all", "PUT", "/v1/all/fault", `{"fault":"expired"}`, 200, `"fault": "expired"`},
		{"clear", "DELETE", "/v1/all/fault", "", 200, `"fault": "healthy"`},
		{"rate", "PUT", "/v1/rate", `{"keys_per_second":2.5,"pool":7}`, 200, `"keys_per_second": 2.5`},
		{"rate alone", "PUT", "/v1/rate", `{"keys_per_second":0.01}`, 200, `"pool": 7`},
		{"drain", "DELETE", "/v1/kme-a/pools?slave=sae_002", "", 200, `"stored_key_count": 0`},
		{"no fault", "PUT", "/v1/kme-a/fault", `{"fault":"sleepy"}`, 400, `unknown fault`},
		{"no JSON", "PUT", "/v1/kme-a/fault", `slow`, 400, `malformed body`},
		{"unknown field", "PUT", "/v1/rate", `{"rate":1}`, 400, `unknown field`},
		{"long", "PUT", "/v1/rate", strings.Repeat(" ", 5000), 400, `malformed body`},
		{"rate too high", "PUT", "/v1/rate", `{"keys_per_second":1e9}`, 400, `rate is not 0`},
		{"no KME", "PUT", "/v1/kme-c/fault", `{"fault":"slow=1s"}`, 404, `\"kme-c\" does not run here`},
		{"no KME to clear", "DELETE", "/v1/kme-c/fault", "", 404, `does not run here`},
		{"method", "POST", "/v1/rate", `{}`, 405, ``},
		{"keys", "GET", "/api/v1/keys/sae_002/enc_keys", "", 404, ``},
	} {
		code, answer := ask(t, socket, tt.method, tt.resource, tt.body)
		if code != tt.code || !strings.Contains(answer, tt.want) {
			t.Errorf("%s: %d %s, want %d and %s", tt.name, code, answer, tt.code, tt.want)
		}
	}
	if err := exchange(t.Context(), a, b); err == nil || !strings.Contains(err.Error(), "not enough keys stored") {
		t.Errorf("drained: %v", err)
	}

	// The client says what the endpoint says.
	if _, err := admin.SetFault(t.Context(), "kme-b", "sleepy"); err == nil || !strings.Contains(err.Error(), `unknown fault "sleepy"`) {
		t.Errorf("SetFault = %v", err)
	}
	if s, err := admin.SetFault(t.Context(), "kme-b", "slow=2s"); err != nil || s.KMEs[1].Fault != "slow=2s" || pair.B.Fault().Kind != kmesim.Slow {
		t.Errorf("SetFault: %+v, %v", s, err)
	}
	if s, err := admin.SetRate(t.Context(), 0, 3); err != nil || s.Rate != 0 || s.Pool != 3 {
		t.Errorf("SetRate: %+v, %v", s, err)
	}
	if _, err := admin.Drain(t.Context(), "all", "a b&c", ""); err != nil {
		t.Errorf("Drain = %v", err)
	}
	if _, err := kmesim.NewAdmin(filepath.Join(dir, "none")).State(t.Context()); err == nil || !strings.Contains(err.Error(), "no simulator answers on "+dir) {
		t.Errorf("State = %v", err)
	}
}

// TestAdminSocket: what a killed process left is replaced, a living one and
// another file are not.
func TestAdminSocket(t *testing.T) {
	dir := t.TempDir()
	lab := newLab(t)
	left := filepath.Join(dir, "left")
	ln, err := net.Listen("unix", left)
	if err != nil {
		t.Fatal(err)
	}
	ln.(*net.UnixListener).SetUnlinkOnClose(false)
	ln.Close()
	start(t, kmesim.Config{Lab: lab, Admin: left})

	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, []byte("mine"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct{ path, want string }{
		{left, "another simulator answers there"},
		{file, "a file that is no socket is in the way"},
		{filepath.Join(dir, strings.Repeat("long", 30)), "107 is the limit"},
		{filepath.Join(dir, "none", "kme.sock"), "no such file or directory"},
	} {
		c := kmesim.Config{Lab: lab, AddrA: "127.0.0.1:0", AddrB: "127.0.0.1:0", Admin: tt.path}
		err := kmesim.Run(t.Context(), c, func(net.Addr, net.Addr) { t.Error("ready") })
		if err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%v, want %q", err, tt.want)
		}
	}
	if b, err := os.ReadFile(file); err != nil || string(b) != "mine" {
		t.Errorf("file holds %q, %v", b, err)
	}
}
