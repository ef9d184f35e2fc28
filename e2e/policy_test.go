//go:build e2e

package e2e

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"keyturn/internal/control"
	"keyturn/internal/psk"
)

// away is how long the KMS is gone: the keys that were buffered are used up
// in a quarter of it.
const away = 2 * time.Minute

// TestPolicies: four tunnels, one for each `require`, while both KMEs are gone
// for minutes. Where QKD may be missing, rotation goes on by the KEM, and both
// ends say so; where it may not, the last key stays. When the KMEs are back, so
// is QKD, without anybody's help. No ping is lost anywhere.
func TestPolicies(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	hub := l.host("hub")
	policies := []struct {
		require string
		reduced bool // QKD may be missing
		spoke   *host
		stream  *pings
		last    psk.Fingerprint
	}{{require: "all"}, {require: "qkd"}, {require: "pqc", reduced: true}, {require: "any", reduced: true}}
	saes := []*host{hub}
	for i := range policies {
		policies[i].spoke = l.host(policies[i].require)
		saes = append(saes, policies[i].spoke)
	}
	qkd := l.kmes(saes...)
	stop := qkd.start()
	var peers []settings
	for i := range policies {
		p := &policies[i]
		connect(hub, p.spoke)
		hub.handshake(p.spoke)
		p.stream = p.spoke.ping(hub)
		common := settings{"require": p.require}
		kms := func(h *host) settings { return qkd.kms(h).with(settings{"timeout": "1s"}) }
		// The hub is client of every second.
		ours, theirs := settings{"role": "client"}, settings{"role": "server", "address": nil}
		if i%2 == 1 {
			ours, theirs = theirs, ours
		}
		peers = append(peers, p.spoke.as().with(common).with(ours).with(qkd.peer(p.spoke)).with(settings{"kms": kms(hub)}))
		p.spoke.keyturn("up", p.spoke.write(settings{"kms": kms(p.spoke)}, hub.as().with(common).with(theirs).with(qkd.peer(hub))))
	}
	hub.keyturn("up", hub.write(nil, peers...))
	bothEnds := func(p *host, what string, cond func(control.PeerStatus) error) {
		t.Helper()
		hub.towards(p, 20*time.Second, what, cond)
		p.towards(hub, 20*time.Second, what, cond)
	}
	whole := func(s control.PeerStatus) error {
		if s.Installed == nil || strings.Join(s.Installed.Sources, "+") != "QKD+ML-KEM-768" || strings.Contains(fmt.Sprint(s.Warnings), string(control.SourcesReduced)) {
			return fmt.Errorf("installed %+v, warnings %v", s.Installed, s.Warnings)
		}
		return nil
	}
	for i := range policies {
		p := &policies[i]
		p.last = eventuallyRotated(t, hub, p.spoke, p.last)
		bothEnds(p.spoke, "both sources", whole)
	}

	stop()
	var before []psk.Fingerprint
	for end := time.Now().Add(away); time.Now().Before(end); {
		before = before[:0]
		for i := range policies {
			before = append(before, agree(t, hub, policies[i].spoke))
			hub.handshake(policies[i].spoke)
		}
	}
	for i := range policies {
		p := &policies[i]
		if !p.reduced {
			mustHold(t, hub, p.spoke, before[i])
			client, server := hub, p.spoke
			if i%2 == 1 {
				client, server = server, client
			}
			client.towards(server, 20*time.Second, "no keys, and says so", func(s control.PeerStatus) error {
				if !s.Protected || s.KMS.State != control.KMSFailing || s.Buffer.Len != 0 {
					return fmt.Errorf("%s, kms %+v, buffer %v", s.State, s.KMS, s.Buffer)
				}
				return nil
			})
			bothEnds(p.spoke, "no key without QKD", whole)
			p.last = before[i]
			continue
		}
		p.last = agree(t, hub, p.spoke)
		bothEnds(p.spoke, "QKD is left out, and both say so", func(s control.PeerStatus) error {
			if !s.Protected || s.Installed == nil || strings.Join(s.Installed.Sources, "+") != "ML-KEM-768" ||
				!strings.Contains(fmt.Sprint(s.Warnings), string(control.SourcesReduced)) {
				return fmt.Errorf("%s, installed %+v, warnings %v", s.State, s.Installed, s.Warnings)
			}
			return nil
		})
		for _, h := range []*host{hub, p.spoke} {
			h.logs(time.Second, "key source left out")
		}
	}

	qkd.start()
	for i := range policies {
		p := &policies[i]
		// What was buffered without QKD goes in first.
		eventually(t, time.Minute, "QKD again in "+p.require, func() error {
			hub.handshake(p.spoke)
			s, err := p.spoke.status()
			if err != nil {
				return err
			}
			return whole(s.Peers[0])
		})
		bothEnds(p.spoke, "all is well", func(s control.PeerStatus) error {
			if err := whole(s); err != nil {
				return err
			}
			if !s.Protected || len(s.Warnings) != 0 {
				return fmt.Errorf("%s, warnings %v", s.State, s.Warnings)
			}
			return nil
		})
		agree(t, hub, p.spoke)
		p.stream.stop().mustBeComplete(t)
		mustNotFail(t, hub, p.spoke)
	}
}
