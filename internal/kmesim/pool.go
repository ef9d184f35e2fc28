package kmesim

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"
)

// Limits of the pools of a KME.
const (
	DefaultPool = 1024    // keys of KeySize that a pool holds
	MaxPool     = 1 << 20 // the same, at most
	MaxRate     = 1e6     // keys of KeySize a second
	maxPools    = 1 << 17
)

// pools holds how many keys a KME has ready for each master and slave. A pool is
// full when its pair is first heard of, and fills at a constant rate. The keys
// themselves are made when they are asked for: nobody can tell.
type pools struct {
	mu    sync.Mutex
	rate  float64 // bits a second; 0: as many as are asked for
	size  int64   // bits of a full pool
	limit int     // of pairs
	pairs map[pair]*pool
}

// pair is a master and a slave, in this order.
type pair struct{ master, slave string }

// pool has base bits and what came in since. Unless it is full, looking at it
// changes nothing, so that no rounding adds up.
type pool struct {
	base  int64
	since time.Time
	made  uint64 // keys, of whatever size
}

// CheckRate returns an error for a rate, in keys of KeySize a second, or a size
// of a pool, in keys, that is out of bounds.
func CheckRate(rate float64, size int) error {
	if !(rate >= 0 && rate <= MaxRate) || rate > 0 && rate*KeySize < 1 {
		return fmt.Errorf("rate is not 0, for no limit, or between %v and %v keys a second", 1./KeySize, float64(MaxRate))
	}
	if size < 1 || size > MaxPool {
		return fmt.Errorf("pool is not between 1 and %d keys", MaxPool)
	}
	return nil
}

func newPools(rate float64, size int) *pools {
	return &pools{rate: rate * KeySize, size: int64(size) * KeySize, limit: maxPools, pairs: make(map[pair]*pool)}
}

// set changes rate and size of all pools.
func (p *pools) set(rate float64, size int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	for _, q := range p.pairs {
		q.base, q.since = p.bits(q, now), now
	}
	p.rate, p.size = rate*KeySize, int64(size)*KeySize
}

// limits returns rate and size as set takes them.
func (p *pools) limits() (rate float64, size int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.rate / KeySize, int(p.size / KeySize)
}

// take takes number keys of so many bits out of the pool of a master and each of
// its slaves, all or none.
func (p *pools) take(master string, slaves []string, number, bits int) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	cost := int64(number) * int64(bits)
	for _, s := range slaves {
		if q := p.get(pair{master, s}, now); q == nil || p.rate > 0 && p.bits(q, now) < cost {
			return false
		}
	}
	for _, s := range slaves {
		q := p.pairs[pair{master, s}]
		q.made += uint64(number)
		q.base -= cost
	}
	return true
}

// put puts back what take took.
func (p *pools) put(master string, slaves []string, number, bits int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, s := range slaves {
		if q := p.pairs[pair{master, s}]; q != nil {
			q.made -= uint64(number)
			q.base += int64(number) * int64(bits)
		}
	}
}

// stored returns how many keys of KeySize a pool holds, and how many it could.
func (p *pools) stored(master, slave string) (keys, size int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	if q := p.get(pair{master, slave}, now); q != nil {
		keys = int(p.bits(q, now) / KeySize)
	}
	return keys, int(p.size / KeySize)
}

// drain empties the pools of a master and a slave; of all, where a name is
// empty.
func (p *pools) drain(master, slave string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	if master != "" && slave != "" {
		p.get(pair{master, slave}, now) // also before it is first heard of
	}
	for name, q := range p.pairs {
		if (master == "" || master == name.master) && (slave == "" || slave == name.slave) {
			q.base, q.since = 0, now
		}
	}
}

// get returns a pool, a new one where there is none, and nil where there are too
// many.
func (p *pools) get(name pair, now time.Time) *pool {
	q := p.pairs[name]
	if q != nil {
		return q
	}
	if len(p.pairs) >= p.limit {
		// Those that are full are as good as new.
		maps.DeleteFunc(p.pairs, func(_ pair, q *pool) bool { return p.bits(q, now) == p.size })
	}
	if len(p.pairs) >= p.limit {
		return nil
	}
	q = &pool{base: p.size, since: now}
	p.pairs[name] = q
	return q
}

// bits returns how much a pool holds. Of rounding there is no more than a
// millionth of a bit, which must not take one away.
func (p *pools) bits(q *pool, now time.Time) int64 {
	bits := q.base + int64(now.Sub(q.since).Seconds()*p.rate+1e-6)
	if p.rate == 0 || bits >= p.size {
		// What comes in now is lost.
		q.base, q.since = p.size, now
		return p.size
	}
	return bits
}

// list returns the pools in the order of their names, limit at most, and how
// many there are.
func (p *pools) list(limit int) (list []PoolState, all int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	for name, q := range p.pairs {
		list = append(list, PoolState{name.master, name.slave, int(p.bits(q, now) / KeySize), q.made})
	}
	slices.SortFunc(list, func(a, b PoolState) int {
		return cmp.Or(cmp.Compare(a.Master, b.Master), cmp.Compare(a.Slave, b.Slave))
	})
	return list[:min(limit, len(list))], len(list)
}
