//go:build e2e

package e2e

import (
	"bytes"
	"crypto/rand"
	"encoding/base64"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"keyturn/internal/psk"
)

// The harness proves itself before anything is proved with it.

// TestTunnel is the harness without keyturn: a PSK is set on both ends by
// hand, three handshakes are asked for, and no ping is lost.
func TestTunnel(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	a, b := l.host("lisbon"), l.host("porto")
	connect(a, b)
	a.handshake(b)

	stream := a.ping(b)
	var last psk.Fingerprint
	for range 3 {
		key := randomKey(t)
		a.setPSK(b, key)
		b.setPSK(a, key)
		if a.fingerprint(b) != key.Fingerprint() || b.fingerprint(a) != key.Fingerprint() || key.Fingerprint() == last {
			t.Fatal("the ends do not show the new key")
		}
		last = key.Fingerprint()
		b.handshake(a)
	}
	stream.stop().mustBeComplete(t)
	if n := a.failedHandshakes() + b.failedHandshakes(); n != 0 {
		t.Errorf("%d handshakes failed", n)
	}
}

// TestTunnelDiffers shows that what TestTunnel looks for would be seen:
// with different keys no handshake completes, it is counted, and a stream
// over a cable that is pulled loses pings.
func TestTunnelDiffers(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	a, b := l.host("lisbon"), l.host("porto")
	connect(a, b)
	a.setPSK(b, randomKey(t))
	b.setPSK(a, randomKey(t))
	stream := a.ping(b)
	eventually(t, 20*time.Second, "a failed handshake", func() error {
		if a.failedHandshakes() == 0 {
			return fmt.Errorf("none")
		}
		return nil
	})
	if !a.latest(b).IsZero() {
		t.Error("a handshake completed although the keys differ")
	}
	if r := stream.stop(); r.lost != r.sent || len(r.seconds) < 4 {
		t.Errorf("expected all to be lost for at least 4 s: %v", r)
	}

	key := randomKey(t)
	a.setPSK(b, key)
	b.setPSK(a, key)
	a.handshake(b)
	stream = a.ping(b)
	b.unplug()
	eventually(t, 10*time.Second, "a lost ping", func() error {
		if r := stream.record(); r.lost < 50 {
			return fmt.Errorf("%v", r)
		}
		return nil
	})
	b.plug()
	if r := stream.stop(); r.lost == 0 || r.lost == r.sent && r.sent == 0 {
		t.Errorf("expected some to be lost: %v", r)
	}
}

// TestCrash: a host whose plug is pulled comes back with its files, without
// its processes, and without its pre-shared keys.
func TestCrash(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	a, b := l.host("lisbon"), l.host("porto")
	connect(a, b)
	key := randomKey(t)
	a.setPSK(b, key)
	b.setPSK(a, key)
	a.handshake(b)
	for _, name := range []string{"run", "state"} {
		if err := os.WriteFile(a.path(name, "mark"), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}

	a.reboot(b)
	if !a.fingerprint(b).IsZero() {
		t.Error("a pre-shared key survived")
	}
	if _, err := os.Stat(a.path("state", "mark")); err != nil {
		t.Error("the state directory did not survive")
	}
	if _, err := os.Stat(a.path("run", "mark")); err == nil {
		t.Error("the run directory survived")
	}
	a.setPSK(b, key)
	a.handshake(b)
	a.ping(b).stop().mustBeComplete(t)
}

// TestCommands: commands run where they should, with what they should know,
// and orphans are killed by their ID on the host.
func TestCommands(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	a, b := l.host("lisbon"), l.host("porto")
	connect(a, b)

	r := a.run("", "wg", "show", wg0, "public-key")
	if got := strings.TrimSpace(r.stdout); got != a.device.public.String() {
		t.Errorf("wg shows %q: %s", got, r.stderr)
	}
	if r := a.run("", "sh", "-c", "echo $KEYTURN_RUN_DIR; exit 3"); r.code != 3 || strings.TrimSpace(r.stdout) != a.path("run") {
		t.Errorf("exit %d, %q", r.code, r.stdout)
	}

	r = a.run("", "sh", "-c", "setsid sleep 600 >/dev/null 2>&1 & echo $!")
	pid, err := strconv.Atoi(strings.TrimSpace(r.stdout))
	if err != nil {
		t.Fatal(err)
	}
	alive := func() bool { return a.run("", "sh", "-c", fmt.Sprintf("kill -0 %d", pid)).code == 0 }
	if !alive() {
		t.Fatal("the orphan did not live on")
	}
	a.kill9(pid)
	eventually(t, 5*time.Second, "the end of the orphan", func() error {
		if alive() {
			return fmt.Errorf("it is still there")
		}
		return nil
	})
}

// TestDial: sockets that the test opens on a host stay there.
func TestDial(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	a, b := l.host("lisbon"), l.host("porto")
	ln, err := b.listen(b.addr.String() + ":7000")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	go func() {
		c, err := ln.Accept()
		if err == nil {
			_, _ = io.WriteString(c, c.RemoteAddr().String())
			c.Close()
		}
	}()
	c, err := a.dial("tcp", b.addr.String()+":7000")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	got, err := io.ReadAll(c)
	if err != nil || !strings.HasPrefix(string(got), a.addr.String()+":") {
		t.Errorf("porto saw %q, %v", got, err)
	}
}

// TestLeaks shows that a key in a log would be found in each of its forms,
// and would not be printed by the finding.
func TestLeaks(t *testing.T) {
	l := &lab{t: t, secrets: make(map[psk.Fingerprint]*psk.Key)}
	key := randomKey(t)
	l.remember(key)
	l.remember(new(psk.Key)) // no key, and no secret
	l.record("clean", []byte(base64.StdEncoding.EncodeToString(make([]byte, 32))+key.String()))
	if got := l.leaks(); len(got) != 0 {
		t.Errorf("found %q in what has none", got)
	}
	for i, form := range forms(key) {
		text := append([]byte("psk="), form...)
		l.printed = []output{{"dirty", text}}
		if len(l.leaks()) == 0 {
			t.Errorf("form %d is not found", i)
		}
		if bytes.Contains(l.redact(text), form) {
			t.Errorf("form %d is not cut out", i)
		}
	}
}

func randomKey(t *testing.T) *psk.Key {
	t.Helper()
	k, err := psk.Random(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}
