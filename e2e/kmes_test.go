//go:build e2e

package e2e

import (
	"fmt"
	"net"
	"os"
	"testing"
	"time"

	"keyturn/internal/control"
	"keyturn/internal/kmesim"
	"keyturn/internal/psk"
)

// kmes is a host with a pair of simulated KMEs. The hosts that were named to
// lab.kmes are its SAEs, in that order; the first asks kme-a, the others kme-b.
type kmes struct {
	*host
	saes []*host
}

// kmes adds the host and makes the laboratory's certificates.
func (l *lab) kmes(saes ...*host) *kmes {
	l.t.Helper()
	k := &kmes{l.host("kmes"), saes}
	k.keyturn("kme", "init", k.path("lab"), "--saes", fmt.Sprint(len(saes)), "--name", k.addr.String())
	return k
}

// start runs the pair, with further arguments, until the returned function is
// called or the test ends.
func (k *kmes) start(args ...string) (stop func()) {
	k.lab.t.Helper()
	stop = k.background(append([]string{"kme", "--dir", k.path("lab"),
		"--a", k.at(0), "--b", k.at(1)}, args...)...)
	for i := range 2 {
		eventually(k.lab.t, 10*time.Second, "a KME that listens", func() error {
			c, err := k.dial("tcp", k.at(i))
			if err == nil {
				c.Close()
			}
			return err
		})
	}
	return stop
}

func (k *kmes) at(kme int) string {
	return net.JoinHostPort(k.addr.String(), fmt.Sprint(8443+kme))
}

// sae returns the number of a host's SAE; the first is 1.
func (k *kmes) sae(h *host) int {
	for i, s := range k.saes {
		if s == h {
			return i + 1
		}
	}
	k.lab.t.Fatalf("%s is no SAE", h.name)
	return 0
}

// kms is the kms block of a host's configuration.
func (k *kmes) kms(h *host) settings {
	n := k.sae(h)
	sae := kmesim.SAEName(n)
	return settings{
		"uri":              "https://" + k.at(min(n-1, 1)),
		"sae":              sae,
		"certificate":      k.path("lab", sae+".crt"),
		"secret_key":       k.path("lab", sae+".key"),
		"root_certificate": k.path("lab", "root.crt"),
		"timeout":          "2s",
	}
}

// peer is what a peer's block says of a host's SAE.
func (k *kmes) peer(h *host) settings { return settings{"sae": kmesim.SAEName(k.sae(h))} }

// TestFaults: whatever is wrong with either KMS, the log of the end that
// asked it says so, and nothing is installed. When both are well, keys flow
// without anybody's help.
func TestFaults(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	a, b := l.host("lisbon"), l.host("porto")
	qkd := l.kmes(a, b)
	connect(a, b)
	a.handshake(b)
	pings := a.ping(b)
	kms := func(h *host) settings { return qkd.kms(h).with(settings{"timeout": "1s"}) }
	a.keyturn("up", a.write(settings{"kms": kms(a)}, b.as().with(qkd.peer(b)).with(settings{"role": "client"})))
	b.keyturn("up", b.write(settings{"kms": kms(b)}, a.as().with(qkd.peer(a)).with(settings{"role": "server", "address": nil})))

	for _, c := range []struct {
		which, fault string
		asks         *host
		says         string
	}{
		{"--fault-a", "out-of-keys", a, "503"},
		{"--fault-a", "html", a, "502"},
		{"--fault-a", "wrong-size", a, "key has 32 bits, not 256"},
		{"--fault-a", "lost", a, "closed before the end of the answer"},
		{"--fault-a", "silent", a, "no answer within 1s"},
		{"--fault-b", "late", b, "not found on KME"},
		{"--fault-b", "html", b, "502"},
		{"--fault-b", "wrong-size", b, "key has 32 bits, not 256"},
		{"--fault-b", "slow=1m", b, "no answer within 1s"},
		{"--fault-b", "wrong-bytes", b, "digest differs"},
	} {
		a.truncateLog()
		b.truncateLog()
		stop := qkd.start(c.which, c.fault)
		c.asks.logs(20*time.Second, c.says)
		for _, end := range []struct{ h, p *host }{{a, b}, {b, a}} {
			s, err := end.h.status()
			if err != nil {
				t.Fatal(err)
			}
			if p := s.Peers[0]; p.Rotations != 0 || p.Buffer.Len != 0 || p.Protected {
				t.Errorf("%s %s: %d rotations, %d keys in the buffer of %s", c.which, c.fault, p.Rotations, p.Buffer.Len, end.h.name)
			}
		}
		mustHold(t, a, b, psk.Fingerprint{})
		stop()
	}
	qkd.start()
	a.towards(b, 20*time.Second, "keys", func(p control.PeerStatus) error {
		if p.Buffer.Len == 0 || p.KMS.State != control.KMSOK {
			return fmt.Errorf("kms %+v", p.KMS)
		}
		return nil
	})
	a.handshake(b)
	eventuallyRotated(t, a, b, psk.Fingerprint{})
	pings.stop().mustBeComplete(t)
}

// truncateLog empties the log of the host's rotator, keeping a copy for the
// end of the test.
func (h *host) truncateLog() {
	h.lab.t.Helper()
	path := h.path("log", wg0+".log")
	text, err := os.ReadFile(path)
	if err == nil {
		h.lab.record(path, text)
		err = os.Truncate(path, 0)
	}
	if err != nil {
		h.lab.t.Fatal(err)
	}
}
