package kmesim_test

import (
	"context"
	"crypto/tls"
	"errors"
	"net/http"
	"testing"
	"testing/synctest"
	"time"

	"keyturn/internal/kmesim"
	"keyturn/internal/kms"
	"keyturn/internal/kms/kmstls"
	"keyturn/internal/kms/skip"
)

// skipNet is a pair that serves SKIP, as it does beside 014.
type skipNet struct{ *simNet }

func newSKIPNet(t *testing.T) skipNet {
	t.Helper()
	return skipNet{newSimNet(t, "443", (*kmesim.KME).Serve)}
}

func (n skipNet) source(sae, peer, kme int) kms.Source {
	n.Helper()
	k, err := skip.New(skip.Config{
		URIs: []string{"https://" + n.address(kme)}, SAE: kmesim.SAEName(sae),
		TLS: kmstls.Config{Memory: n.lab.ClientTLS(sae)}, Dial: n.Dial,
	})
	if err != nil {
		n.Fatal(err)
	}
	n.Cleanup(func() { k.Close() })
	s, err := k.For(kmesim.SAEName(peer))
	if err != nil {
		n.Fatal(err)
	}
	return s
}

func TestClientSKIP(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newSKIPNet(t)
		lead, follow := n.source(1, 2, 0), n.source(2, 1, 1)
		flows(t, lead, follow, 10, 0)
		flows(t, follow, lead, 10, 0)
		s, err := lead.Status(context.Background())
		if err != nil || s.SourceKME != "sae_001" || s.TargetKME != "sae_002" {
			t.Errorf("status %+v, %v", s, err)
		}
		// The second delivery is refused.
		id, _, err := lead.Key(context.Background())
		if err != nil {
			t.Fatal(err)
		}
		if _, err := follow.KeyByID(context.Background(), id); err != nil {
			t.Error(err)
		}
		if _, err := n.source(2, 1, 0).KeyByID(context.Background(), id); !errors.Is(err, kms.ErrUnknownKey) {
			t.Errorf("second delivery: %v", err)
		}
		// A KME that starts anew has no keys; the next are there.
		if id, _, err = lead.Key(context.Background()); err != nil {
			t.Fatal(err)
		}
		n.restart()
		if _, err := follow.KeyByID(context.Background(), id); err == nil {
			t.Error("a KME that was started anew has a key of before")
		}
		flows(t, lead, follow, 2, 3)
	})
}

func TestClientSKIPFaults(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newSKIPNet(t)
		lead, follow := n.source(1, 2, 0), n.source(2, 1, 1)
		flows(t, lead, follow, 1, 0)
		for _, tt := range []struckBy{
			{kme: 0, fault: "out-of-keys", lead: kms.ErrNoKeys},
			{kme: 0, fault: "out-of-keys=400", lead: kms.ErrNoKeys},
			{kme: 0, fault: "out-of-keys=500", lead: errAny},
			{kme: 1, fault: "late", follow: kms.ErrUnknownKey},
			{kme: 1, fault: "late=404", follow: kms.ErrUnknownKey},
			{kme: 0, fault: "out-of-step", follow: kms.ErrUnknownKey},
			{kme: 1, fault: "wrong-bytes", otherBytes: true},
			{kme: 0, fault: "wrong-size", lead: errAny},
			{kme: 1, fault: "wrong-size", follow: errAny},
			{kme: 0, fault: "lost", lead: errAny},
			{kme: 1, fault: "lost", follow: errAny},
			{kme: 0, fault: "slow=1s"},
			{kme: 1, fault: "slow=20s", follow: errAny},
			{kme: 0, fault: "drip=1ms"},
			{kme: 0, fault: "html", lead: errAny},
			{kme: 1, fault: "page=404/html", follow: kms.ErrUnknownKey},
			{kme: 0, fault: "page=200/array", lead: errAny},
			{kme: 1, fault: "page=200/long", follow: errAny},
			{kme: 0, fault: "down", lead: errAny},
			{kme: 1, fault: "silent", follow: errAny},
			{kme: 0, fault: "silent-tls", lead: errAny},
			{kme: 0, fault: "expired", lead: errAny},
			{kme: 0, fault: "cut", lead: kms.ErrNoKeys},
		} {
			n.strike(lead, follow, tt)
			time.Sleep(time.Minute) // whoever was down is asked again
			flows(t, lead, follow, 2, 1)
		}
	})
}

// TestSKIPVersions: 1.3 and 1.2, with a certificate in either.
func TestSKIPVersions(t *testing.T) {
	lab := newLab(t)
	uri, _ := start(t, kmesim.Config{Lab: lab})
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		conf := lab.ClientTLS(1)
		conf.MinVersion, conf.MaxVersion = version, version
		c := http.Client{Transport: &http.Transport{TLSClientConfig: conf, DisableKeepAlives: true}}
		resp, err := c.Get(uri + "/capabilities")
		if err != nil {
			t.Errorf("TLS %#x: %v", version, err)
			continue
		}
		resp.Body.Close()
		if resp.StatusCode != http.StatusOK || resp.TLS.Version != version {
			t.Errorf("TLS %#x: status %d over %#x", version, resp.StatusCode, resp.TLS.Version)
		}
	}
}
