//go:build e2e

package e2e

import (
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"keyturn/internal/config"
	"keyturn/internal/control"
	"keyturn/internal/link"
	"keyturn/internal/psk"
)

const linkPort = "51822"

// settings is a block of a configuration. The file is JSON, which is YAML.
type settings map[string]any

// with returns a copy with some settings changed; nil takes one away.
func (s settings) with(changes settings) settings {
	c := make(settings)
	for _, m := range []settings{s, changes} {
		for k, v := range m {
			if c[k] = v; v == nil {
				delete(c, k)
			}
		}
	}
	return c
}

// identify gives the host's rotator an identity, once, and returns its public form.
func (h *host) identify() string {
	h.lab.t.Helper()
	path := h.path("identity.key")
	if _, err := os.Stat(path); err != nil {
		id, err := link.GenerateIdentity(rand.Reader)
		if err == nil {
			err = os.WriteFile(path, []byte(id.Secret()+"\n"), 0o600)
		}
		if err != nil {
			h.lab.t.Fatal(err)
		}
		h.lab.remember(secretOf(h.lab.t, id))
	}
	id, err := link.ReadIdentityFile(path)
	if err != nil {
		h.lab.t.Fatal(err)
	}
	return id.Fingerprint().String()
}

// secretOf returns an identity's secret as what may not be written down.
func secretOf(t *testing.T, id *link.Identity) *psk.Key {
	t.Helper()
	b, err := base64.StdEncoding.DecodeString(id.Secret())
	if err != nil {
		t.Fatal(err)
	}
	k, err := psk.New(b)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// as returns how another host's configuration names this one as a peer: by
// PQ-KE alone, over the bridge, everything else by default.
func (h *host) as() settings {
	h.lab.t.Helper()
	return settings{
		"name":       h.name,
		"public_key": h.device.public.String(),
		"identity":   h.identify(),
		"address":    net.JoinHostPort(h.addr.String(), linkPort),
		"kems":       []string{"ML-KEM-768"},
	}
}

// write writes the host's configuration and returns its path.
func (h *host) write(changes settings, peers ...settings) string {
	h.lab.t.Helper()
	h.identify()
	text, err := json.MarshalIndent(settings{
		"interface": wg0,
		"identity":  "identity.key",
		"peers":     peers,
	}.with(changes), "", "  ")
	if err != nil {
		h.lab.t.Fatal(err)
	}
	path := h.path(wg0 + ".yaml")
	if err := os.WriteFile(path, text, 0o600); err != nil {
		h.lab.t.Fatal(err)
	}
	return path
}

// status asks the host's rotator, through the command.
func (h *host) status() (*control.Status, error) {
	h.lab.t.Helper()
	r := h.try("status", wg0, "--json")
	var s control.Status
	if err := json.Unmarshal([]byte(r.stdout), &s); err != nil {
		return nil, fmt.Errorf("status of %s: exit %d, %w: %s", h.name, r.code, err, r.stderr)
	}
	return &s, nil
}

// towards waits until what the host's rotator says of a peer satisfies cond,
// which returns nil or what is not yet so.
func (h *host) towards(p *host, limit time.Duration, what string, cond func(control.PeerStatus) error) {
	h.lab.t.Helper()
	what = fmt.Sprintf("%s towards %s: %s", h.name, p.name, what)
	eventually(h.lab.t, limit, what, func() error {
		s, err := h.status()
		if err != nil {
			return err
		}
		for _, peer := range s.Peers {
			if peer.Name == p.name {
				return cond(peer)
			}
		}
		return fmt.Errorf("status does not name the peer")
	})
}

// TestConfiguration: what the harness writes is a configuration.
func TestConfiguration(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	a, b := l.host("lisbon"), l.host("porto")
	connect(a, b)
	c, err := config.Load(a.write(settings{"window": "20s"}, b.as().with(settings{"address": nil, "role": "server"})))
	if err != nil {
		t.Fatal(err)
	}
	if p := c.Peers[0]; p.Name != b.name || p.Address != "" || p.Role != config.RoleServer || c.Window != 20*time.Second {
		t.Errorf("%+v", p)
	}
}

// logs waits until the log of the host's rotator says a text.
func (h *host) logs(limit time.Duration, text string) {
	h.lab.t.Helper()
	eventually(h.lab.t, limit, fmt.Sprintf("%s in the log of %s", text, h.name), func() error {
		b, err := os.ReadFile(h.path("log", wg0+".log"))
		if err == nil && !strings.Contains(string(b), text) {
			err = fmt.Errorf("it is not there")
		}
		return err
	})
}
