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
	rate  int64 // bits a second; 0: as many as are asked for
	size  int64 // bits of a full pool
	limit int   // of pairs
	pairs map[pair]*pool
}

// pair is a master and a slave, in this order.
type pair struct{ master, slave string }

type pool struct {
	bits int64 // as of at
	at   time.Time
	made uint64 // keys, of whatever size
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
	return &pools{rate: int64(rate * KeySize), size: int64(size) * KeySize, limit: maxPools, pairs: make(map[pair]*pool)}
}

// set changes rate and size of all pools.
func (p *pools) set(rate float64, size int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	for _, q := range p.pairs {
		p.fill(q, now)
	}
	p.rate, p.size = int64(rate*KeySize), int64(size)*KeySize
	for _, q := range p.pairs {
		p.fill(q, now)
	}
}

// limits returns rate and size as set takes them.
func (p *pools) limits() (rate float64, size int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return float64(p.rate) / KeySize, int(p.size / KeySize)
}

// take takes number keys of so many bits out of the pool of a master and each of
// its slaves, all or none.
func (p *pools) take(master string, slaves []string, number, bits int) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	cost := int64(number) * int64(bits)
	for _, s := range slaves {
		if q := p.get(pair{master, s}); q == nil || p.rate > 0 && q.bits < cost {
			return false
		}
	}
	for _, s := range slaves {
		q := p.pairs[pair{master, s}]
		q.made += uint64(number)
		if p.rate > 0 {
			q.bits -= cost
		}
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
			q.bits = min(q.bits+int64(number)*int64(bits), p.size)
		}
	}
}

// stored returns how many keys of KeySize a pool holds, and how many it could.
func (p *pools) stored(master, slave string) (keys, size int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if q := p.get(pair{master, slave}); q != nil {
		keys = int(q.bits / KeySize)
	}
	return keys, int(p.size / KeySize)
}

// drain empties the pools of a master and a slave; of all, where a name is
// empty.
func (p *pools) drain(master, slave string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if master != "" && slave != "" {
		p.get(pair{master, slave}) // also before it is first heard of
	}
	now := time.Now()
	for name, q := range p.pairs {
		if (master == "" || master == name.master) && (slave == "" || slave == name.slave) {
			q.bits, q.at = 0, now
		}
	}
}

// get returns a pool as it is now, a new one where there is none, and nil where
// there are too many.
func (p *pools) get(name pair) *pool {
	now := time.Now()
	q := p.pairs[name]
	if q == nil {
		if len(p.pairs) >= p.limit {
			p.sweep(now)
		}
		if len(p.pairs) >= p.limit {
			return nil
		}
		q = &pool{bits: p.size, at: now}
		p.pairs[name] = q
	}
	p.fill(q, now)
	return q
}

// sweep drops the pools that are full, which are as good as new.
func (p *pools) sweep(now time.Time) {
	maps.DeleteFunc(p.pairs, func(_ pair, q *pool) bool {
		p.fill(q, now)
		return q.bits == p.size
	})
}

// fill brings a pool up to date.
func (p *pools) fill(q *pool, now time.Time) {
	passed := now.Sub(q.at)
	if p.rate == 0 || float64(q.bits)+passed.Seconds()*float64(p.rate) >= float64(p.size) {
		q.bits, q.at = p.size, now
		return
	}
	// Whole bits; what is left of the time counts for the next. The product is
	// less than MaxPool*KeySize*1e9, which an int64 holds.
	bits := int64(passed) * p.rate / int64(time.Second)
	q.bits += bits
	q.at = q.at.Add(time.Duration(bits * int64(time.Second) / p.rate))
}

// list returns the pools in the order of their names, limit at most, and how
// many there are.
func (p *pools) list(limit int) (list []PoolState, all int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	for name, q := range p.pairs {
		p.fill(q, now)
		list = append(list, PoolState{name.master, name.slave, int(q.bits / KeySize), q.made})
	}
	slices.SortFunc(list, func(a, b PoolState) int {
		return cmp.Or(cmp.Compare(a.Master, b.Master), cmp.Compare(a.Slave, b.Slave))
	})
	return list[:min(limit, len(list))], len(list)
}
