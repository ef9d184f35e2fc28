//go:build e2e

package e2e

import (
	"fmt"
	"net"
	"time"

	"keyturn/internal/kmesim"
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
