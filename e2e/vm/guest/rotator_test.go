//go:build vm

package guest

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"keyturn/internal/control"
	"keyturn/internal/link"
	"keyturn/internal/psk"
)

const (
	program  = "/keyturn"
	linkPort = 51822
)

// settings is a block of a configuration. The file is JSON, which is YAML.
type settings map[string]any

// with returns a copy with some settings changed.
func (s settings) with(changes settings) settings {
	c := make(settings)
	for _, m := range []settings{s, changes} {
		for k, v := range m {
			c[k] = v
		}
	}
	return c
}

// identify gives the host's rotator an identity, once, and returns its public form.
func (h *host) identify() string {
	h.lab.t.Helper()
	path := h.path("identity.key")
	if _, err := os.Stat(path); err != nil {
		h.writeSecret(path)
	}
	id, err := link.ReadIdentityFile(path)
	h.must(err)
	return id.Fingerprint().String()
}

// writeSecret is keyturn genkey.
func (h *host) writeSecret(path string) {
	h.lab.t.Helper()
	id, err := link.GenerateIdentity(rand.Reader)
	h.must(err)
	h.must(os.WriteFile(path, []byte(id.Secret()+"\n"), 0o600))
}

// settingsOf returns what a host's configuration has besides the defaults: of
// the rotator, and of its peer.
type settingsOf func(h *host) (rotator, peer settings)

// configure writes the configurations of both ends. They work by PQ-KE alone,
// unless more is said. The first host is the client.
func (l *lab) configure(inside bool, more settingsOf) {
	l.t.Helper()
	for i, end := range l.hosts() {
		h, p := end[0], end[1]
		at := p.beside
		if inside {
			at = p.inner
		}
		var rotator, peer settings
		if more != nil {
			rotator, peer = more(h)
		}
		text, err := json.MarshalIndent(settings{
			"interface": wg0,
			"identity":  "identity.key",
			"peers": []settings{settings{
				"name":       p.name,
				"public_key": p.public().String(),
				"identity":   p.identify(),
				"address":    netip.AddrPortFrom(at, linkPort).String(),
				"kems":       []string{"ML-KEM-768"},
				"role":       []string{"client", "server"}[i],
			}.with(peer)},
		}.with(rotator), "", "  ")
		h.identify()
		h.must(err)
		h.must(os.WriteFile(h.path("wg0.yaml"), text, 0o600))
	}
}

// begin starts both rotators and waits until the tunnel is protected.
func (l *lab) begin(inside bool) {
	l.t.Helper()
	l.a.start()
	l.b.start()
	if inside {
		// The link itself has made a session, so that the first key waits for
		// the next. It need not wait for two minutes.
		l.eventually(20*time.Second, "a first key", l.rotated)
		time.Sleep(3 * time.Second) // sooner it would not count as seen
		l.a.forgetSession()
	}
	l.eventually(20*time.Second, "protected", l.inStep)
}

// forgetSession makes the host's interface forget the session with its peer,
// and nothing else.
func (h *host) forgetSession() {
	h.lab.t.Helper()
	p := h.peer()
	h.configure(wgtypes.Config{Peers: []wgtypes.PeerConfig{
		{PublicKey: p.PublicKey, Remove: true},
		{PublicKey: p.PublicKey, PresharedKey: &p.PresharedKey, Endpoint: p.Endpoint, AllowedIPs: p.AllowedIPs},
	}})
}

// command returns a command of keyturn, with the host's directories.
func (h *host) command(args ...string) *exec.Cmd {
	c := exec.Command(program, args...)
	c.Dir = h.path()
	c.Env = []string{
		"HOME=" + h.path(),
		"KEYTURN_RUN_DIR=" + h.path("run"),
		"KEYTURN_STATE_DIR=" + h.path("state"),
		"KEYTURN_LOG_DIR=" + h.path("log"),
	}
	return c
}

// keyturn runs a command that must succeed.
func (h *host) keyturn(args ...string) {
	h.lab.t.Helper()
	var out []byte
	err := h.in(func() (err error) {
		out, err = h.command(args...).CombinedOutput()
		return err
	})
	if err != nil {
		h.lab.t.Fatalf("%s: keyturn %s: %v\n%s", h.name, strings.Join(args, " "), err, out)
	}
}

// background starts a command that stays. What it prints goes to a file.
func (h *host) background(log string, args ...string) *process {
	h.lab.t.Helper()
	f, err := os.OpenFile(h.path(log), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	h.must(err)
	defer f.Close()
	c := h.command(args...)
	c.Stdout, c.Stderr = f, f
	h.must(h.in(c.Start))
	p := &process{Cmd: c, ended: make(chan struct{})}
	go func() {
		_ = c.Wait()
		close(p.ended)
	}()
	return p
}

// process is one that runs in the background.
type process struct {
	*exec.Cmd
	ended chan struct{}
}

// kill is kill -9.
func (p *process) kill() {
	_ = p.Process.Kill()
	<-p.ended
}

// start starts the host's rotator.
func (h *host) start() {
	h.lab.t.Helper()
	h.rotator = h.background("rotator.log", "run", h.path("wg0.yaml"))
}

// kill kills the host's rotator, if one runs.
func (h *host) kill() {
	if h.rotator != nil {
		h.rotator.kill()
		h.rotator = nil
	}
}

// shutdown is what a reboot takes away: the rotator, the interface, and what
// lies in memory.
func (h *host) shutdown() {
	h.lab.t.Helper()
	h.kill()
	h.deleteDevice()
	h.must(os.RemoveAll(h.path("run")))
	h.must(os.Mkdir(h.path("run"), 0o700))
}

// boot brings the interface up, with the original pre-shared key, and the rotator.
func (h *host) boot() {
	h.lab.t.Helper()
	h.createDevice()
	h.start()
}

// showLog prints what the rotator said, when a test has failed.
func (h *host) showLog() {
	text, _ := os.ReadFile(h.path("rotator.log"))
	h.lab.t.Logf("%s:\n%s", h.name, text)
}

// towards returns what the host's rotator says of the other host.
func (h *host) towards() (*control.PeerStatus, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	s, err := control.NewClient(control.SocketPath(h.path("run"), wg0)).Status(ctx)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", h.name, err)
	}
	if len(s.Peers) != 1 {
		return nil, fmt.Errorf("%s: %d peers", h.name, len(s.Peers))
	}
	return &s.Peers[0], nil
}

// view returns what the host shows of the tunnel.
func (h *host) view() (View, error) {
	p, err := h.tryPeer()
	if err != nil {
		return View{}, fmt.Errorf("%s: %w", h.name, err)
	}
	key, err := psk.New(p.PresharedKey[:])
	if err != nil {
		return View{}, fmt.Errorf("%s: %w", h.name, err)
	}
	defer key.Wipe()
	v := View{
		Key:       key.Fingerprint(),
		Original:  p.PresharedKey == h.original,
		Handshake: p.LastHandshakeTime,
		Sent:      p.TransmitBytes,
		Received:  p.ReceiveBytes,
	}
	if v.Peer, err = h.towards(); err != nil {
		v.Why = err.Error()
	}
	return v, nil
}

// views returns what both hosts show.
func (l *lab) views() (a, b View, err error) {
	if a, err = l.a.view(); err == nil {
		b, err = l.b.view()
	}
	return a, b, err
}

// rotated is Rotated for both hosts.
func (l *lab) rotated() error {
	a, b, err := l.views()
	if err != nil {
		return err
	}
	return Rotated(a, b)
}

// inStep is InStep for both hosts.
func (l *lab) inStep() error {
	a, b, err := l.views()
	if err != nil {
		return err
	}
	return InStep(a, b)
}

// confirmedAtMost is ConfirmedAtMost for both hosts.
func (l *lab) confirmedAtMost() uint64 {
	l.t.Helper()
	a, b, err := l.views()
	if err != nil {
		l.t.Fatal(err)
	}
	return ConfirmedAtMost(a, b)
}

// confirmedSince returns nil when an end has confirmed a newer key than serial.
func (l *lab) confirmedSince(serial uint64) error {
	a, b, err := l.views()
	if err != nil {
		return err
	}
	if n := ConfirmedAtMost(a, b); n <= serial {
		return fmt.Errorf("no key was confirmed since: %d then, %d now", serial, n)
	}
	return nil
}
