//go:build e2e

package e2e

import (
	"fmt"
	"net"
	"strings"
	"testing"
	"time"

	"keyturn/internal/control"
	"keyturn/internal/psk"
)

// TestSupplies: rotation without a lost ping by each way in which keys come,
// QKD by one interface alone or KEMs alone, and on after the KMEs were
// restarted, which forget all that they had.
func TestSupplies(t *testing.T) {
	t.Parallel()
	stream := func(dialect string) []string {
		return []string{"--streams", dialect + ",a=%[1]s:25575,b=%[1]s:25576"}
	}
	for _, s := range []struct {
		name    string
		args    []string // of keyturn kme
		kms     settings // beside what every kms block has
		port    int      // of kme-a; 0: the one of 014
		sources string
		apart   bool // the two KMEs are two processes on two hosts
	}{
		{name: "014 by GET", sources: "QKD"},
		{name: "014 by POST", kms: settings{"method": "POST"}, sources: "QKD"},
		{name: "014, KMEs on two hosts", sources: "QKD", apart: true},
		{name: "004 forge-ed3", args: stream("forge-ed3"), kms: settings{"interface": 4, "dialect": "forge-ed3"}, port: 25575, sources: "QKD"},
		{name: "004 forge-ed1", args: stream("forge-ed1"), kms: settings{"interface": 4, "dialect": "forge-ed1"}, port: 25575, sources: "QKD"},
		{name: "SKIP", kms: settings{"interface": "skip"}, sources: "QKD"},
		{name: "KEMs alone", sources: "ML-KEM-768"},
	} {
		t.Run(s.name, func(t *testing.T) {
			t.Parallel()
			l := newLab(t)
			a, b := l.host("lisbon"), l.host("porto")
			connect(a, b)
			a.handshake(b)
			pings := a.ping(b)
			confs := map[*host]string{}
			var restart func()
			if s.sources == "QKD" {
				qkd := l.kmes(a, b)
				for i, arg := range s.args {
					if strings.Contains(arg, "%") {
						s.args[i] = fmt.Sprintf(arg, qkd.addr)
					}
				}
				start := func() func() { return qkd.start(s.args...) }
				at := func(h *host) string { return qkd.at(qkd.sae(h) - 1) }
				if s.apart {
					second := l.host("kme-b")
					start = func() func() { return qkd.startApart(second) }
					at = func(h *host) string {
						return net.JoinHostPort(map[*host]*host{a: qkd.host, b: second}[h].addr.String(), "8443")
					}
				}
				stop := start()
				restart = func() {
					stop()
					stop = start()
				}
				for _, end := range []struct{ h, p *host }{{a, b}, {b, a}} {
					kms := qkd.kms(end.h).with(s.kms).with(settings{"uri": "https://" + at(end.h), "server_name": "kme-" + string(rune('a'-1+qkd.sae(end.h)))})
					if s.port != 0 {
						kms["uri"] = net.JoinHostPort(qkd.addr.String(), fmt.Sprint(s.port+qkd.sae(end.h)-1))
					}
					confs[end.h] = end.h.write(settings{"kms": kms}, end.p.as().with(qkd.peer(end.p)).with(settings{"kems": nil}))
				}
			} else {
				confs[a], confs[b] = a.write(nil, b.as()), b.write(nil, a.as())
				restart = func() {}
			}
			a.keyturn("up", confs[a])
			b.keyturn("up", confs[b])
			last := rotateThrice(t, a, b, eventuallyRotated(t, a, b, psk.Fingerprint{}))
			for _, end := range []struct{ h, p *host }{{a, b}, {b, a}} {
				end.h.towards(end.p, 10*time.Second, "keys of "+s.sources, func(p control.PeerStatus) error {
					if p.Installed == nil || strings.Join(p.Installed.Sources, "+") != s.sources || !p.Protected || p.Buffer.Len != 3 || len(p.Warnings) != 0 {
						return fmt.Errorf("%s, installed %+v, buffer %v, warnings %v", p.State, p.Installed, p.Buffer, p.Warnings)
					}
					return nil
				})
				if out := end.h.try("check", wg0); out.code != 0 {
					t.Errorf("check: exit %d\n%s", out.code, out.stdout)
				}
			}
			restart()
			// More than the buffers hold: the last one comes from after the restart.
			for range 5 {
				a.handshake(b)
				last = eventuallyRotated(t, a, b, last)
			}
			pings.stop().mustBeComplete(t)
			mustNotFail(t, a, b)
		})
	}
}

// startApart runs the KMEs as two processes, the second on another host, until
// the returned function is called.
func (k *kmes) startApart(second *host) (stop func()) {
	k.lab.t.Helper()
	var stops []func()
	at := func(h *host, port string) string { return net.JoinHostPort(h.addr.String(), port) }
	for i, h := range []*host{k.host, second} {
		other := []*host{second, k.host}[i]
		name := string(rune('a' + i))
		stops = append(stops, h.background("kme", "--dir", k.path("lab"), "--kme", name,
			"--"+name, at(h, "8443"), "--link", at(h, "8445"), "--peer", at(other, "8445")))
	}
	return func() {
		for _, stop := range stops {
			stop()
		}
	}
}
