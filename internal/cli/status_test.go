package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"keyturn/internal/control"
	"keyturn/internal/registry"
)

func ptr[T any](v T) *T { return &v }

var now = time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)

func before(d time.Duration) time.Time { return now.Add(-d) }

// sample is a rotator with a peer that is well, one that is not, and text from
// elsewhere that wants to move the cursor.
func sample() control.Status {
	return control.Status{
		Interface: "wg0", PID: 4242, Version: "v1.0.0", State: control.StateHold, StartedAt: before(3*time.Hour + 5*time.Minute),
		ConfigPath: "/etc/keyturn/wg0.yaml", Listen: "[::]:51822", PublicKey: "(own key)", Identity: "(own identity)",
		Peers: []control.PeerStatus{{
			Name: "lisbon", PublicKey: "(key of lisbon)", Role: "client", SAE: "sae_001", PeerSAE: "sae_002",
			State: control.PeerProtected, Protected: true,
			HandshakeAge: ptr(control.Seconds(63 * time.Second)),
			Installed:    &control.Key{Serial: 7, Fingerprint: "0a1b2c3d", Sources: []string{"QKD", "ML-KEM-1024"}},
			Confirmed:    &control.Key{Serial: 6, Fingerprint: "01020304"},
			KeyAge:       ptr(control.Seconds(62 * time.Second)),
			Rotations:    7, LastRotation: before(62 * time.Second),
			Buffer: control.Buffer{Len: 2, Cap: 3},
			Link:   control.Link{State: control.LinkUp, Since: before(2 * time.Hour), RemoteAddr: "198.51.100.7:51822"},
			KMS:    &control.KMS{State: control.KMSOK, URI: "https://kme-a:8443", Keys: ptr(12), LastKeyAt: before(time.Minute)},
		}, {
			Name: "porto", PublicKey: "(key of porto)", Role: "server",
			State: control.PeerRefused, Why: "the two ends are configured differently",
			Installed: &control.Key{Fingerprint: "ffeeddcc"},
			Buffer:    control.Buffer{Cap: 3},
			Link:      control.Link{State: control.LinkUp, RemoteAddr: "10.0.0.2:51822", Inside: true},
			Differences: []control.Difference{
				{Field: "kems", Ours: "ML-KEM-1024", Theirs: ""},
				{Field: "combiner", Ours: "xor", Theirs: "\x1b[2Jhkdf\nprotected: yes"},
			},
			Warnings: []control.Warning{control.Warn(control.ParametersDiffer, ""), control.Warn(control.ManualRecovery, "")},
		}},
		Warnings: []control.Warning{control.Warn(control.JournalFails, "no space left on device")},
	}
}

const statusText = `interface: wg0
  state: hold
  configuration: /etc/keyturn/wg0.yaml
  process: 4242, started 3 hours, 5 minutes ago
  public key: (own key)
  identity: (own identity)
  listening on: [::]:51822
  warning: the journal cannot be written: no space left on device

peer: lisbon (client here)
  protected: yes
  state: protected
  public key: (key of lisbon)
  sae: sae_001 here, sae_002 there
  latest handshake: 1 minute, 3 seconds ago
  installed key: 7 (0a1b2c3d), 1 minute, 2 seconds old, of QKD and ML-KEM-1024
  confirmed key: 6 (01020304)
  rotations: 7, the last 1 minute, 2 seconds ago
  key buffer: 2 of 3
  link: up for 2 hours, 198.51.100.7:51822
  kms: ok, https://kme-a:8443, 12 keys stored, last key 1 minute ago

peer: porto (server here)
  protected: no: the two ends are configured differently
  state: refused
  public key: (key of porto)
  latest handshake: none observed
  installed key: ffeeddcc, found at the start
  confirmed key: none
  rotations: none yet
  key buffer: 0 of 3
  link: up, 10.0.0.2:51822, inside the tunnel
  differs: kems: ML-KEM-1024 here, none there
  differs: combiner: xor here, ` + "\uFFFD" + `[2Jhkdf protected: yes there
  warning: the two ends are configured differently
  note: recovery is manual: a reboot may need repair by hand
`

func TestStatusText(t *testing.T) {
	one := sample()
	var b bytes.Buffer
	if err := writeStatus(&b, []*control.Status{&one}, now, false); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(statusText, b.String()); d != "" {
		t.Errorf("-want +got:\n%s", d)
	}
	for line := range strings.Lines(b.String()) {
		if len(line) > 81 {
			t.Errorf("%d columns: %s", len(line)-1, line)
		}
	}
	var coloured bytes.Buffer
	if err := writeStatus(&coloured, []*control.Status{&one}, now, true); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(coloured.String(), "\x1b[31mno\x1b[0m: ") || strings.Contains(coloured.String(), "\x1b[2J") {
		t.Error("colours are not there, or not ours alone")
	}
}

func TestLs(t *testing.T) {
	well := sample()
	well.Interface, well.State, well.Peers, well.Warnings = "wg1", control.StateUp, well.Peers[:1], nil
	kmsDown := well
	kmsDown.Interface = "wg2"
	kmsDown.Peers = []control.PeerStatus{well.Peers[0]}
	kmsDown.Peers[0].Warnings = []control.Warning{control.Warn(control.KMSFails, "")}
	journal := well
	journal.Interface = "wg3"
	journal.Warnings = []control.Warning{control.Warn(control.InterfaceMissing, "")}
	several := sample()
	several.Interface, several.Warnings = "wg4", nil
	several.Peers = append(several.Peers, several.Peers[1])
	down := control.Status{Interface: "wg5", State: control.StateDown}
	ended := down
	ended.Problem = "ended\x1b[2J without\nbeing brought down" // as foreign text may be
	first := sample()
	all := []*control.Status{&first, &well, &kmsDown, &journal, &several, &down, &ended}
	var b bytes.Buffer
	if err := writeTable(&b, lsRows(all, now)); err != nil {
		t.Fatal(err)
	}
	const want = `INTERFACE  STATE  PEERS  LAST ROTATION
wg0        hold   1/2    1 minute, 2 seconds ago  porto: the two ends are configured differently
wg1        up     1/1    1 minute, 2 seconds ago
wg2        up     1/1    1 minute, 2 seconds ago  lisbon: the KMS delivers no keys
wg3        up     1/1    1 minute, 2 seconds ago  the WireGuard interface does not exist
wg4        hold   1/3    1 minute, 2 seconds ago  porto: the two ends are configured differently (and 1 more)
wg5        down   -      -
wg5        down   -      -                        ended` + "\uFFFD" + `[2J without being brought down
`
	if d := cmp.Diff(want, b.String()); d != "" {
		t.Errorf("-want +got:\n%s", d)
	}
	for i, want := range []bool{true, false, true, true, true, false, true} {
		if degraded(all[i]) != want {
			t.Errorf("row %d: degraded is %v", i, !want)
		}
	}
}

func TestSpan(t *testing.T) {
	for d, want := range map[time.Duration]string{
		0: "0 seconds", time.Second: "1 second", 90 * time.Second: "1 minute, 30 seconds",
		time.Hour + time.Second: "1 hour", 25 * time.Hour: "1 day, 1 hour", -time.Second: "0 seconds",
	} {
		if got := span(d); got != want {
			t.Errorf("%v is %q, want %q", d, got, want)
		}
	}
}

// liveRotator is a control socket and a lock, as a rotator's process has them.
type liveRotator struct {
	status control.Status
	stop   context.CancelFunc
	mu     sync.Mutex
	peers  []string
}

func (l *liveRotator) Status() control.Status { return l.status }
func (l *liveRotator) Down()                  { l.stop() }
func (l *liveRotator) Rotate(peer string) error {
	if peer != "" && peer != "lisbon" {
		return control.ErrUnknownPeer
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.peers = append(l.peers, peer)
	return nil
}

func startLive(t *testing.T, status control.Status) (*dirs, *liveRotator) {
	t.Helper()
	d := &dirs{run: t.TempDir(), state: t.TempDir(), log: t.TempDir()}
	lock, err := registry.TakeLock(d.run, status.Interface)
	if err != nil {
		t.Fatal(err)
	}
	s, err := control.Listen(control.SocketPath(d.run, status.Interface))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	l := &liveRotator{status: status, stop: cancel}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = s.Serve(ctx, l)
		lock.Release() // the process's end
	}()
	t.Cleanup(func() { cancel(); <-done })
	return d, l
}

// keyturn runs a command line in this process.
func keyturn(t *testing.T, d *dirs, args ...string) (stdout, stderr string, code int) {
	t.Helper()
	var out, errOut bytes.Buffer
	root := newRoot()
	root.SetArgs(append([]string{"--run-dir=" + d.run, "--state-dir=" + d.state, "--log-dir=" + d.log}, args...))
	root.SetOut(&out)
	root.SetErr(&errOut)
	err := root.ExecuteContext(t.Context())
	report(&errOut, err)
	return out.String(), errOut.String(), exitCode(err)
}

func TestRunningRotator(t *testing.T) {
	d, live := startLive(t, sample())
	if out, _, code := keyturn(t, d, "ls"); code != exitDegraded || !strings.Contains(out, "wg0        hold   1/2") {
		t.Errorf("ls: exit code %d\n%s", code, out)
	}
	out, _, code := keyturn(t, d, "status", "wg0", "--json")
	var got control.Status
	if err := json.Unmarshal([]byte(out), &got); err != nil || code != exitDegraded {
		t.Fatalf("status --json: exit code %d, %v", code, err)
	}
	if d := cmp.Diff(live.status, got); d != "" {
		t.Errorf("status --json (-want +got):\n%s", d)
	}
	for peer, want := range map[string]string{
		"":       "wg0: asked to rotate all peers at the next window\n",
		"lisbon": "wg0: asked to rotate lisbon at the next window\n",
	} {
		args := strings.Fields("rotate wg0 " + peer)
		if out, errOut, code := keyturn(t, d, args...); code != exitOK || out != want {
			t.Errorf("%v: exit code %d: %s%s", args, code, out, errOut)
		}
	}
	slices.Sort(live.peers)
	if diff := cmp.Diff([]string{"", "lisbon"}, live.peers); diff != "" {
		t.Errorf("rotated: %s", diff)
	}
	_, errOut, code := keyturn(t, d, "rotate", "wg0", "madrid")
	if code != exitFailed || errOut != "error: wg0 has no peer \"madrid\"\nhint: keyturn status wg0\n" {
		t.Errorf("rotate madrid: exit code %d: %s", code, errOut)
	}
	if out, errOut, code := keyturn(t, d, "down", "wg0"); code != exitOK || out != "wg0: down\n" {
		t.Fatalf("down: exit code %d: %s%s", code, out, errOut)
	}
	lock, err := registry.TakeLock(d.run, "wg0")
	if err != nil {
		t.Fatalf("down returned before the rotator had gone: %v", err)
	}
	lock.Release()
}

// A process that lives but does not answer is neither up nor down.
func TestHangingRotator(t *testing.T) {
	d := &dirs{run: t.TempDir(), state: t.TempDir(), log: t.TempDir()}
	self, err := registry.Self()
	if err != nil {
		t.Fatal(err)
	}
	if err := d.registry().Put(registry.Entry{Interface: "wg0", Config: "/x.yaml", Process: self}); err != nil {
		t.Fatal(err)
	}
	if out, _, code := keyturn(t, d, "ls"); code != exitDegraded || !strings.Contains(out, "runs but does not answer") {
		t.Errorf("ls: exit code %d\n%s", code, out)
	}
	_, errOut, code := keyturn(t, d, "down", "wg0")
	if code != exitFailed || !strings.Contains(errOut, ": kill ") {
		t.Errorf("down: exit code %d: %s", code, errOut)
	}
	if _, _, code := keyturn(t, d, "rm", "wg0"); code != exitFailed {
		t.Errorf("rm of a running rotator: exit code %d", code)
	}
}

// TestSecondUp: with the same run directory, and, in the same network
// namespace, with any other.
func TestSecondUp(t *testing.T) {
	d, _ := startLive(t, sample())
	_, err := takeLock(d.run, "wg0")
	var b bytes.Buffer
	report(&b, err)
	const want = "error: wg0: a rotator of this interface is already running\nhint: keyturn status wg0\nhint: keyturn down wg0\n"
	if b.String() != want || !errors.Is(err, registry.ErrLocked) {
		t.Errorf("got %s", b.String())
	}

	iface := fmt.Sprintf("kt%d", os.Getpid())
	first := &dirs{run: "/first/run"}
	claim, squatted, err := first.claim(t.Context(), iface)
	if err != nil || squatted != nil {
		t.Fatal(err, squatted)
	}
	defer claim.Release()
	for _, tt := range []struct{ run, how string }{{"/first/run", ""}, {"/second/run", "--run-dir=/first/run "}} {
		_, _, err := (&dirs{run: tt.run}).claim(t.Context(), iface)
		b.Reset()
		report(&b, err)
		want := fmt.Sprintf("error: %s: a rotator of this interface is already running: process %d, run directory /first/run\n"+
			"hint: keyturn %sstatus %s\nhint: keyturn %sdown %s\n", iface, os.Getpid(), tt.how, iface, tt.how, iface)
		if b.String() != want || !errors.Is(err, registry.ErrLocked) {
			t.Errorf("got %s", b.String())
		}
	}
}

func TestEveryCommandSaysWhatItDoes(t *testing.T) {
	root := newRoot()
	for _, c := range root.Commands() {
		if c.Name() == "completion" || c.Name() == "help" { // cobra's own
			continue
		}
		if c.Long == "" || c.Short == "" || c.Args == nil {
			t.Errorf("%s lacks a text or a check of its arguments", c.Name())
		}
		for line := range strings.Lines(c.Long) {
			if len(line) > 81 {
				t.Errorf("%s: %d columns: %s", c.Name(), len(line)-1, line)
			}
		}
	}
	if strings.Contains(root.UsageString(), os.Getenv("HOME")+"/") && os.Getenv("HOME") != "/" {
		t.Error("usage shows a path of this machine")
	}
}
