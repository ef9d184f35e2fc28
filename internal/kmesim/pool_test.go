package kmesim

import (
	"fmt"
	"math"
	"testing"
	"testing/synctest"
	"time"
)

// stored asks for a status and returns its stored_key_count.
func stored(k *KME, master, slave string) int { return k.status(master, slave).Stored }

func TestPool(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := New(Options{Rate: 4, Pool: 8})
		ask := func(query string) int {
			code, _ := call(p.A, "sae_001", "GET", api+"sae_002/enc_keys?"+query, "")
			return code
		}
		for _, step := range []struct {
			after  time.Duration
			query  string
			code   int
			stored int
		}{
			{0, "number=9", 503, 8}, // all or none
			{0, "number=8", 200, 0},
			{0, "number=1", 503, 0},
			{249 * time.Millisecond, "number=1", 503, 0},
			{1 * time.Millisecond, "number=1", 200, 0},
			{time.Second, "size=1024&number=1", 200, 0}, // counts for four
			{500 * time.Millisecond, "size=64&number=8", 200, 0},
			{125 * time.Millisecond, "number=1", 503, 0},
			{125 * time.Millisecond, "size=64&number=2", 200, 0}, // half a key is left
			{125 * time.Millisecond, "number=1", 200, 0},
			{time.Hour, "number=1", 200, 7},
		} {
			time.Sleep(step.after)
			if code := ask(step.query); code != step.code || stored(p.A, "sae_001", "sae_002") != step.stored {
				t.Errorf("after %v, %s: %d with %d stored, want %d with %d", step.after, step.query, code,
					stored(p.A, "sae_001", "sae_002"), step.code, step.stored)
			}
		}
		// Keys that the other KME could not be told of are not used up.
		p.A.SetFault(Fault{Kind: Cut, Times: 1})
		if code := ask("number=2"); code != 503 || stored(p.A, "sae_001", "sae_002") != 7 {
			t.Errorf("%d with the link cut, and %d are left", code, stored(p.A, "sae_001", "sae_002"))
		}
		// Pairs do not share: not the reverse one, not at the other KME.
		if a, b := stored(p.A, "sae_002", "sae_001"), stored(p.B, "sae_001", "sae_002"); a != 8 || b != 8 {
			t.Errorf("others have %d and %d", a, b)
		}
		// Multicast takes from the pool of each slave, or of none.
		p.A.pools.drain("sae_001", "sae_003")
		body := `{"additional_slave_SAE_IDs":["sae_003"]}`
		if code, _ := call(p.A, "sae_001", "POST", api+"sae_002/enc_keys", body); code != 503 || stored(p.A, "sae_001", "sae_002") != 7 {
			t.Errorf("%d, and %d are left", code, stored(p.A, "sae_001", "sae_002"))
		}
		time.Sleep(250 * time.Millisecond)
		if code, _ := call(p.A, "sae_001", "POST", api+"sae_002/enc_keys", body); code != 200 || stored(p.A, "sae_001", "sae_003") != 0 {
			t.Error(code)
		}
	})
}

// TestPoolAddsUp: however often one looks, no key comes or goes by rounding.
func TestPoolAddsUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPools(3.3, MaxPool)
		p.stored("a", "b")
		p.drain("a", "b")
		for range 10_000 {
			time.Sleep(7 * time.Millisecond)
			p.stored("a", "b")
		}
		if got, _ := p.stored("a", "b"); got != 231 {
			t.Errorf("%d keys after 70 s at 3.3 a second", got)
		}
		// A float64 says 58879.99999999999 bits.
		p.set(2.3, MaxPool)
		p.drain("a", "b")
		time.Sleep(100 * time.Second)
		if got, _ := p.stored("a", "b"); got != 230 {
			t.Errorf("%d keys after 100 s at 2.3 a second", got)
		}
	})
}

func TestPoolsAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPools(1, 2)
		p.limit = 3
		for i := range p.limit {
			p.take(fmt.Sprint(i), []string{"b"}, 1, KeySize)
		}
		if p.take("one more", []string{"b"}, 1, KeySize) {
			t.Error("a pool too many")
		}
		if keys, _ := p.stored("one more", "b"); keys != 0 {
			t.Errorf("%d keys in a pool that is not there", keys)
		}
		time.Sleep(time.Second) // all are full again, and make room
		if !p.take("one more", []string{"b"}, 1, KeySize) || len(p.pairs) != 1 {
			t.Errorf("%d pools", len(p.pairs))
		}
	})
}

func TestSetRate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPools(0, 4)
		for range 100 {
			if !p.take("a", []string{"b"}, 3, KeySize) {
				t.Fatal("no limit, and out of keys")
			}
		}
		p.set(1, 4)
		p.take("a", []string{"b"}, 4, KeySize)
		time.Sleep(2 * time.Second) // two keys, at the rate of then
		p.set(10, 1)                // of which one has room
		if keys, size := p.stored("a", "b"); keys != 1 || size != 1 {
			t.Errorf("%d of %d keys", keys, size)
		}
		p.set(0.5, 2)
		time.Sleep(time.Second)
		if keys, _ := p.stored("a", "b"); keys != 1 {
			t.Errorf("%d keys after half a key's time", keys)
		}
	})
	for _, tt := range []struct {
		rate float64
		size int
		ok   bool
	}{
		{0, 1, true}, {1. / KeySize, MaxPool, true}, {MaxRate, 1, true},
		{-1, 1, false}, {0.001, 1, false}, {MaxRate + 1, 1, false}, {math.NaN(), 1, false}, {math.Inf(1), 1, false},
		{0, 0, false}, {0, MaxPool + 1, false},
	} {
		if err := CheckRate(tt.rate, tt.size); (err == nil) != tt.ok {
			t.Errorf("CheckRate(%v, %d) = %v", tt.rate, tt.size, err)
		}
	}
}
