//go:build e2e

package e2e

import (
	"crypto/rand"
	"fmt"
	"strings"
	"testing"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"keyturn/internal/control"
	"keyturn/internal/link"
	"keyturn/internal/psk"
)

// TestRefused: whatever the two configurations disagree on, status --json
// names it at both ends with both values, and nothing is installed.
func TestRefused(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	a, b := l.host("lisbon"), l.host("porto")
	qkd := l.kmes(a, b) // never started: nothing gets as far as asking it
	connect(a, b)
	key := randomKey(t)
	a.setPSK(b, key)
	b.setPSK(a, key)
	stranger, err := wgtypes.GeneratePrivateKey()
	if err != nil {
		t.Fatal(err)
	}
	a.configure(wgtypes.Config{Peers: []wgtypes.PeerConfig{{PublicKey: stranger.PublicKey()}}})
	a.handshake(b)

	peerB := b.as().with(qkd.peer(b)).with(settings{"role": "client", "kms": qkd.kms(a)})
	b.keyturn("up", b.write(nil, a.as().with(qkd.peer(a)).with(settings{"role": "server", "address": nil, "kms": qkd.kms(b)})))
	for _, c := range []struct {
		field        string
		peer, common settings
		ours, theirs string // at lisbon
	}{
		{"sae of the client", settings{"kms": qkd.kms(a).with(settings{"sae": "sae_009"})}, nil, "sae_009", "sae_001"},
		{"sae of the server", settings{"sae": "sae_009"}, nil, "sae_009", "sae_002"},
		{"public_key of the server", settings{"public_key": stranger.PublicKey().String()}, nil, stranger.PublicKey().String(), b.device.public.String()},
		{"kms", settings{"kms": nil}, nil, "no", "yes"},
		{"kems", settings{"kems": []string{"ML-KEM-768", "ML-KEM-1024"}}, nil, "ML-KEM-768,ML-KEM-1024", "ML-KEM-768"},
		{"require", settings{"require": "any"}, nil, "any", "all"},
		{"combiner", settings{"combiner": "hkdf-sha384"}, nil, "hkdf-sha384", "xor"},
		{"buffer", settings{"buffer": 4}, nil, "4", "3"},
		{"window", nil, settings{"window": "20s"}, "20s", "30s"},
		{"fallback", settings{"fallback": "initial"}, nil, key.Fingerprint().String(), "none"},
	} {
		a.keyturn("up", a.write(c.common, peerB.with(c.peer)))
		for _, end := range []struct {
			h, p         *host
			ours, theirs string
		}{{a, b, c.ours, c.theirs}, {b, a, c.theirs, c.ours}} {
			end.h.towards(end.p, 10*time.Second, "a refusal for "+c.field, func(p control.PeerStatus) error {
				for _, d := range p.Differences {
					if d.Field == c.field && d.Ours == end.ours && d.Theirs == end.theirs && !p.Protected {
						return nil
					}
				}
				return fmt.Errorf("%s, link %s %s, %+v", p.State, p.Link.State, p.Link.Error, p.Differences)
			})
		}
		if r := a.try("status", wg0); r.code != 3 || !strings.Contains(r.stdout, c.field) {
			t.Errorf("status of a refused peer: exit %d, without %q:\n%s", r.code, c.field, r.stdout)
		}
		a.keyturn("rm", wg0)
	}

	// Two clients tell each other. Of two servers one asks, once it has waited.
	b.keyturn("down", wg0)
	for _, role := range []string{"client", "server"} {
		both := settings{"role": role}
		if role == "server" {
			both["address"] = nil
		}
		b.keyturn("up", b.write(nil, a.as().with(qkd.peer(a)).with(both).with(settings{"kms": qkd.kms(b)})))
		a.keyturn("up", a.write(nil, peerB.with(settings{"role": role})))
		for _, end := range []struct{ h, p *host }{{a, b}, {b, a}} {
			end.h.towards(end.p, 20*time.Second, "a refusal for role", func(p control.PeerStatus) error {
				for _, d := range p.Differences {
					if d == (control.Difference{Field: "role", Ours: role, Theirs: role}) {
						return nil
					}
				}
				return fmt.Errorf("%s, link %s %s, %+v", p.State, p.Link.State, p.Link.Error, p.Differences)
			})
			if r := end.h.try("check", wg0); r.code != 3 || !strings.Contains(r.stdout, "role is "+role+" here, "+role+" there") {
				t.Errorf("check: exit %d\n%s", r.code, r.stdout)
			}
		}
		mustHold(t, a, b, key.Fingerprint())
		a.keyturn("down", wg0)
		b.keyturn("down", wg0)
	}

	// Agreed at last: by their KEMs alone, for the KMEs never ran.
	b.keyturn("up", b.write(nil, a.as().with(settings{"role": "server", "address": nil})))
	a.keyturn("up", a.write(nil, b.as().with(settings{"role": "client"})))
	letCount(t)
	a.handshake(b)
	eventuallyRotated(t, a, b, key.Fingerprint())
	for _, end := range []struct{ h, p *host }{{a, b}, {b, a}} {
		end.h.towards(end.p, 5*time.Second, "no difference", func(p control.PeerStatus) error {
			if len(p.Differences) != 0 || !p.Protected && p.State != control.PeerUnconfirmed {
				return fmt.Errorf("%s, %+v", p.State, p.Differences)
			}
			return nil
		})
	}
}

// TestWrongIdentity: an end that proves another identity than the configured
// one is turned away by whichever end knows better; nothing is installed.
func TestWrongIdentity(t *testing.T) {
	t.Parallel()
	for _, wrong := range []string{"client", "server"} {
		t.Run("unknown "+wrong, func(t *testing.T) {
			t.Parallel()
			l := newLab(t)
			a, b := l.host("lisbon"), l.host("porto")
			connect(a, b)
			a.handshake(b)
			other, err := link.GenerateIdentity(rand.Reader)
			if err != nil {
				t.Fatal(err)
			}
			bad := settings{"identity": other.Fingerprint().String()}
			peerA, peerB := a.as().with(settings{"role": "server", "address": nil}), b.as().with(settings{"role": "client"})
			if wrong == "client" {
				peerA = peerA.with(bad)
			} else {
				peerB = peerB.with(bad)
			}
			b.keyturn("up", b.write(nil, peerA))
			a.keyturn("up", a.write(nil, peerB))
			a.towards(b, 10*time.Second, "a refused link", func(p control.PeerStatus) error {
				if p.Link.State != control.LinkRefused || p.Link.Error == "" || !strings.Contains(fmt.Sprint(p.Warnings), string(control.LinkIsRefused)) {
					return fmt.Errorf("link %+v, warnings %v", p.Link, p.Warnings)
				}
				return nil
			})
			b.logs(10*time.Second, "connection turned away")
			if r := a.try("check", a.path(wg0+".yaml")); r.code != 3 {
				t.Errorf("check: exit %d\n%s", r.code, r.stdout)
			}
			a.handshake(b)
			mustHold(t, a, b, psk.Fingerprint{})
		})
	}
}
