package wg

import (
	"context"
	"sync"
	"time"
)

const (
	// DefaultInterval is the time between two polls of a device of usual size.
	DefaultInterval = time.Second
	// MaxInterval bounds the time between two polls of a device so large
	// that polling it that seldom costs more than a tenth of a core: the
	// window after a handshake must not pass unseen.
	MaxInterval = 10 * time.Second

	minGap    = 200 * time.Millisecond // between the beginnings of two dumps, however they are asked for
	costRatio = 10                     // a dump may take this part of the time between two of them
	jump      = 5 * time.Second        // difference of wall and monotonic clock that counts as a jump
)

// Observation is what one dump told about one peer.
type Observation struct {
	Began, Ended time.Time // of the dump, with monotonic readings
	Wall         time.Time // the wall clock at Ended
	Err          error     // the dump gave this instead; nothing is known of the peer
	// Present is false where the dump had no such peer. A dump can be
	// short: only two in a row mean that the peer is gone.
	Present bool
	// Peer is set if Present. Its PSK belongs to the receiver, who wipes it.
	Peer Peer
	// Jumped says that since the dump before (or the last Observation that
	// was received) the wall clock and the monotonic clock moved apart by
	// more than five seconds. The clock was set, or the machine slept, during
	// which Go's monotonic clock stands still: ages are unknown.
	Jumped bool
}

// Poller dumps one device at intervals for all who watch its peers. A failed
// dump, also of a device that vanished, is reported and tried again.
type Poller struct {
	device   Device
	base     time.Duration
	soon     chan struct{}    // holds a token while an extra poll is asked for
	wall     func() time.Time // without a monotonic reading
	last     clocks           // at the end of the dump before
	recent   [3]time.Duration // how long the last dumps took
	finished int              // number of dumps that recent is made of

	mu       sync.Mutex
	interval time.Duration
	watchers map[PublicKey]map[chan Observation]struct{}
}

type clocks struct{ mono, wall time.Time }

// NewPoller returns a poller of d, which stays the caller's. An interval of
// zero or less means DefaultInterval.
func NewPoller(d Device, interval time.Duration) *Poller {
	if interval <= 0 {
		interval = DefaultInterval
	}
	return &Poller{
		device:   d,
		base:     interval,
		interval: interval,
		soon:     make(chan struct{}, 1),
		wall:     func() time.Time { return time.Now().Round(0) },
		watchers: make(map[PublicKey]map[chan Observation]struct{}),
	}
}

// Subscribe returns a channel of what is observed of a peer from the next
// poll on, and a function that ends it. The channel holds only the newest
// observation, so a slow receiver misses some and delays nobody. It is never
// closed.
func (p *Poller) Subscribe(k PublicKey) (<-chan Observation, func()) {
	c := make(chan Observation, 1)
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.watchers[k] == nil {
		p.watchers[k] = make(map[chan Observation]struct{})
	}
	p.watchers[k][c] = struct{}{}
	return c, func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		delete(p.watchers[k], c)
		if len(p.watchers[k]) == 0 {
			delete(p.watchers, k)
		}
		select {
		case o := <-c:
			o.Peer.PSK.Wipe()
		default:
		}
	}
}

// PollSoon asks for a dump that begins after this call and as soon as may be:
// not within 200 ms of the one before, nor within ten times the time a dump
// takes. Any number of calls until then are one.
func (p *Poller) PollSoon() {
	select {
	case p.soon <- struct{}{}:
	default:
	}
}

// Interval tells the time between two polls now: the one asked for, or ten
// times the duration of a dump where that is longer, up to MaxInterval.
func (p *Poller) Interval() time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.interval
}

// Run polls until ctx ends, which a dump under way can delay by its deadline.
// It returns nil.
func (p *Poller) Run(ctx context.Context) error {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-timer.C:
		}
		select {
		case <-p.soon: // asked for before this dump begins: it is the answer
		default:
		}
		began := time.Now()
		gap := p.poll(began)

		timer.Reset(time.Until(began.Add(p.Interval())))
		select {
		case <-ctx.Done():
			return nil
		case <-timer.C:
			timer.Reset(0)
		case <-p.soon:
			timer.Reset(time.Until(began.Add(gap)))
		}
	}
}

// poll makes one dump, hands it out, and returns the least time from its
// beginning to that of the next.
func (p *Poller) poll(began time.Time) (gap time.Duration) {
	d, err := p.device.Dump()
	ended := clocks{time.Now(), p.wall()}
	o := Observation{Began: began, Ended: ended.mono, Wall: ended.wall, Err: err, Jumped: p.last.apart(ended)}
	p.last = ended

	p.mu.Lock()
	defer p.mu.Unlock()
	gap = minGap
	if err == nil {
		o.Began, o.Ended = d.Began, d.Ended
		defer d.Wipe()
		gap = p.budget(d.Ended.Sub(d.Began))
	}
	for k, watchers := range p.watchers {
		for c := range watchers {
			o := o
			if err == nil {
				if o.Peer, o.Present = d.Peers[k]; o.Present {
					o.Peer.PSK = o.Peer.PSK.Clone()
				}
			}
			put(c, o)
		}
	}
	return gap
}

// budget sets the interval by the shortest of the last dumps: one that had to
// wait for a processor says nothing of the device's size.
func (p *Poller) budget(took time.Duration) time.Duration {
	if p.finished == 0 {
		p.recent = [...]time.Duration{took, took, took}
	}
	p.recent[p.finished%len(p.recent)] = took
	p.finished++
	gap := min(costRatio*min(p.recent[0], p.recent[1], p.recent[2]), MaxInterval)
	p.interval = max(p.base, gap)
	return max(minGap, gap)
}

// put replaces what c holds. It never blocks, since c has room for one and
// all who send hold the poller's lock.
func put(c chan Observation, o Observation) {
	select {
	case missed := <-c:
		o.Jumped = o.Jumped || missed.Jumped
		missed.Peer.PSK.Wipe()
	default:
	}
	c <- o
}

// apart reports whether the clocks jumped between from and to.
func (from clocks) apart(to clocks) bool {
	if from.mono.IsZero() {
		return false
	}
	return (to.wall.Sub(from.wall) - to.mono.Sub(from.mono)).Abs() > jump
}
