package rotation_test

import (
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"keyturn/internal/psk"
	"keyturn/internal/rotation"
)

// What TestHunt shows. A common key must stay installed at both ends for long
// enough for WireGuard's own retry (5 s and up to 333 ms) and its two messages.
// The server stays 40 s and a dump on each of three keys, the client comes by
// every key within 36 s and three dumps: a whole stay of the server on the
// common key is always enough. From the moment at which both hunt, what is left
// of a stay may be too short, so it takes two other stays and a whole one more.
const (
	huntMeeting = 5500 * time.Millisecond
	huntBound   = 4 * (rotation.ServerDwell + huntDump)
	huntDump    = 200 * time.Millisecond // from Poll to Observed
)

// stay is one key that an end has installed for some time of its hunt.
type stay struct {
	from, to time.Duration
	key      int
}

// walk lets a scheduler hunt without ever succeeding. Its journal holds so
// many keys: one that is confirmed, and those committed after it. It returns
// where the walk that starts on key start leads, in time since the hunt began.
func walk(t *testing.T, role rotation.Role, keys, start int, limit time.Duration) []stay {
	t.Helper()
	random := rand.NewChaCha8([32]byte{1})
	now := time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC)
	var j rotation.Journal
	index := map[psk.Fingerprint]int{}
	for i := range keys {
		k, err := psk.Random(random)
		if err != nil {
			t.Fatal(err)
		}
		index[k.Fingerprint()] = i
		j.Entries = append(j.Entries, rotation.Entry{
			Serial: uint64(i + 1), Key: k, Installed: now, Agreed: i == 0, Seen: i == 0, Confirmed: i == 0,
		})
	}
	device := j.Entries[start].Key.Clone()
	tunnel := rotation.NewTunnel(rotation.Config{Role: role, MaxKeyAge: time.Hour, Random: random})
	tunnel.Restore(j, now, now)
	s := rotation.NewKeyRotationScheduler(tunnel)

	var tx uint64
	var stays []stay
	var began time.Time // of the hunt
	next, dump := now, now
	for began.IsZero() || now.Before(began.Add(limit)) {
		var events []rotation.Event
		if !now.Before(dump) {
			tx += 148 // a handshake is tried
			events = append(events, rotation.Observed{Began: now, Wall: now, Present: true, PSK: device.Clone(), Tx: tx})
			dump = now.Add(time.Second)
		}
		if !now.Before(next) {
			events = append(events, rotation.Tick{})
		}
		for len(events) > 0 {
			e := events[0]
			events = events[1:]
			for _, f := range s.Step(now, e) {
				switch f := f.(type) {
				case rotation.Save:
					events = append(events, rotation.Saved{Token: f.Token})
				case rotation.SetPSK:
					device = f.Key
					events = append(events, rotation.Set{Token: f.Token})
				case rotation.Poll:
					dump = now.Add(huntDump)
				case rotation.Note:
					if f.Kind == rotation.NoteHunting && began.IsZero() {
						began = now
					}
				}
			}
		}
		if !began.IsZero() {
			key, since := index[device.Fingerprint()], now.Sub(began)
			if n := len(stays); n == 0 || stays[n-1].key != key {
				if n > 0 {
					stays[n-1].to = since
				}
				stays = append(stays, stay{from: since, key: key})
			}
			stays[len(stays)-1].to = since
		}
		deadline, ok := s.Deadline()
		if next = dump; ok {
			if !deadline.After(now) {
				t.Fatalf("deadline %v is not in the future", deadline)
			}
			next = deadline
		}
		if now = dump; next.Before(now) {
			now = next
		}
		if now.Sub(j.Entries[0].Installed) > time.Minute && began.IsZero() {
			t.Fatal("no hunt began")
		}
	}
	return stays
}

// meeting returns when two walks, the second begun later by offset, first
// have the pair of keys that are one installed for long enough.
func meeting(a, b []stay, keyA, keyB int, offset time.Duration) (time.Duration, bool) {
	for _, x := range a {
		if x.key != keyA {
			continue
		}
		for _, y := range b {
			if y.key != keyB {
				continue
			}
			// Both hunt from max(0, offset) on, measured on a's clock.
			from := max(x.from, y.from+offset, 0, offset)
			if min(x.to, y.to+offset)-from >= huntMeeting {
				return from + huntMeeting - max(0, offset), true
			}
		}
	}
	return 0, false
}

// TestHunt is the proof that two hunting ends meet: whichever of their keys is
// the one that both have, wherever each starts, and however their walks lie to
// each other. Five keys stand for any larger number: an end walks three.
func TestHunt(t *testing.T) {
	const step = 500 * time.Millisecond
	limit := 3 * huntBound
	type walks [][]stay
	sizes := []int{1, 2, 3, 5}
	// An end has one of its candidates installed: of five keys, the first and the last two.
	starts := map[int][]int{1: {0}, 2: {0, 1}, 3: {0, 1, 2}, 5: {0, 3, 4}}
	all := map[string]walks{}
	visited := func(w walks) (keys []int) {
		seen := map[int]bool{}
		for _, x := range w[0] {
			if !seen[x.key] {
				seen[x.key] = true
				keys = append(keys, x.key)
			}
		}
		return keys
	}
	for _, role := range []rotation.Role{rotation.Client, rotation.Server} {
		for _, n := range sizes {
			var w walks
			for _, start := range starts[n] {
				w = append(w, walk(t, role, n, start, limit))
			}
			all[fmt.Sprint(role, n)] = w
		}
	}
	var worst time.Duration
	for _, nc := range sizes {
		for _, ns := range sizes {
			client, server := all[fmt.Sprint(rotation.Client, nc)], all[fmt.Sprint(rotation.Server, ns)]
			for _, kc := range visited(client) {
				for _, ks := range visited(server) {
					for _, c := range client {
						for _, s := range server {
							for offset := -huntBound; offset <= huntBound; offset += step {
								at, ok := meeting(c, s, kc, ks, offset)
								if !ok || at > huntBound {
									t.Fatalf("client with %d keys, server with %d, the common one is %d and %d, offset %v: meet %v after %v, want within %v",
										nc, ns, kc, ks, offset, ok, at, huntBound)
								}
								worst = max(worst, at)
							}
						}
					}
				}
			}
		}
	}
	t.Logf("the longest hunt took %v of %v", worst, huntBound)
}
