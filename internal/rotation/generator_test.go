package rotation_test

import (
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"keyturn/internal/psk"
	"keyturn/internal/rotation"
	"keyturn/internal/wire"
)

// TestSameKeyInTwoRounds: a KMS gives one key under two IDs to rounds that are
// under way at once, and the first round, which is slow at the server, holds
// both back. Where QKD is the only source both would make the same PSK.
func TestSameKeyInTwoRounds(t *testing.T) {
	random := rand.NewChaCha8([32]byte{1})
	now := time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC)
	once, _ := psk.Random(random)
	twice, _ := psk.Random(random)
	keys := map[string]*psk.Key{"K1": once, "K2": twice, "K3": twice}

	type event struct {
		to    int
		event rotation.Event
	}
	var tunnels [2]*rotation.Tunnel
	var generators [2]*rotation.KeyGenerator
	var queue, late []event
	for i, role := range []rotation.Role{rotation.Client, rotation.Server} {
		tunnels[i] = rotation.NewTunnel(rotation.Config{
			Role: role, Identity: [32]byte{byte(i)}, Boot: wire.BootID{byte(i + 1)}, MaxKeyAge: time.Hour, Random: random,
			Parameters: wire.Parameters{
				Version: wire.Version, SAE: fmt.Sprint(i), PeerSAE: fmt.Sprint(1 - i),
				PublicKey: [32]byte{byte(i)}, PeerPublicKey: [32]byte{byte(1 - i)},
				QKD: true, Require: uint8(rotation.RequireQKD), Combiner: uint8(psk.XOR), Buffer: 3, Window: 30 * time.Second,
			},
		})
		tunnels[i].Restore(rotation.Journal{}, now, now)
		rotation.NewKeyRotationScheduler(tunnels[i]).Step(now, rotation.Observed{Began: now, Wall: now, Present: true, PSK: new(psk.Key)})
		generators[i] = rotation.NewKeyGenerator(tunnels[i])
		queue = append(queue, event{i, rotation.LinkUp{Peer: [32]byte{byte(1 - i)}}})
	}
	fetched := 0
	play := func() {
		for ; len(queue) > 0; queue = queue[1:] {
			e := queue[0]
			for _, f := range generators[e.to].Step(now, e.event) {
				switch f := f.(type) {
				case rotation.Send:
					queue = append(queue, event{1 - e.to, rotation.Received(f)})
				case rotation.Fetch:
					id := f.KeyID
					if id == "" {
						fetched++
						id = fmt.Sprintf("K%d", fetched)
					}
					answer := event{e.to, rotation.Fetched{ID: f.ID, KeyID: id, Key: keys[id].Clone()}}
					if f.KeyID == "K1" {
						late = append(late, answer)
						continue
					}
					queue = append(queue, answer)
				}
			}
		}
	}
	play()
	if fetched != len(keys) || len(late) != 1 {
		t.Fatalf("%d keys fetched, %d late", fetched, len(late))
	}
	queue = late
	play()
	for i, g := range generators {
		if n := g.Health().Keys; n != 2 {
			t.Errorf("end %d has %d keys, want 2", i, n)
		}
		if got := g.Health().LastError; i == 1 && got != "the key was met before" {
			t.Errorf("the server says %q", got)
		}
	}
}
