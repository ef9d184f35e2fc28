package etsi014

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	"keyturn/internal/psk"
)

// maxShared bounds the keys of one answer, whatever a KME allows: with it each
// of them may take up 4 KiB of what kmshttp reads of it.
const maxShared = 16

// aloneTime is how long a KME that did not give several keys is asked for one
// at a time, and how long one that did not tell how many it gives is not asked
// for that again.
const aloneTime = time.Minute

// sharing lets those who want a key shared with the same peer at the same time
// share one request. Nothing is fetched that nobody waits for, and nothing is
// kept: keys are scarce, and one in store is one more to lose and to protect.
type sharing struct {
	life context.Context // ends at Close
	end  context.CancelFunc
	busy sync.WaitGroup // the goroutines below

	mu      sync.Mutex
	calls   int                // of Key, under way
	most    int                // keys in one answer, as the KME told; 0: it has not
	alone   time.Time          // until then everybody asks for one key
	queue   []*waiter          // in the order in which they came
	serving bool               // whether a goroutine serves the queue
	began   time.Time          // the request under way
	cancel  context.CancelFunc // of it; nil: there is none
}

// waiter is a call that waits for its key.
type waiter struct {
	asked bool          // whether the request under way asks for its key
	got   chan delivery // of one
}

// delivery is what a call gets: a key, an error, or errAlone.
type delivery struct {
	namedKey
	err error
}

// namedKey is a key and its ID.
type namedKey struct {
	id  string
	key *psk.Key
}

// errAlone sends a call to ask for its key by itself.
var errAlone = errors.New("nobody to share a request with")

// enter counts a call of Key and says whether it may share a request. The first
// call that is not alone has the KME asked how many keys it gives at a time,
// and does not wait for that.
func (c *Client) enter() (share bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.calls++
	if time.Now().Before(c.alone) {
		return false
	}
	if c.most == 0 && c.calls > 1 {
		c.alone = time.Now().Add(aloneTime)
		c.busy.Go(c.learn)
		return false
	}
	return c.most > 1
}

func (c *Client) leave() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.calls--
}

// learn asks how many keys one request may ask for. A KME that does not know
// gives one.
func (c *Client) learn() {
	s, err := c.Status(c.life)
	if err != nil {
		return // until aloneTime is over
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.most = int(min(max(1, s.MaxKeysPerRequest), maxShared))
	c.alone = time.Time{}
}

// share waits for a key of a request that is shared with others.
func (c *Client) share(ctx context.Context) delivery {
	w, tired := c.join()
	if w == nil {
		return delivery{err: errAlone}
	}
	for {
		var why error
		select {
		case d := <-w.got:
			return d
		case <-tired:
			why = errAlone
		case <-ctx.Done():
			why = context.Cause(ctx)
		}
		if d, ok := c.withdraw(w, why); ok {
			return d
		}
	}
}

// join puts a call into the queue for the next request; w is nil where that has
// no room for it. Once tired fires, the one under way has lasted too long.
func (c *Client) join() (w *waiter, tired <-chan time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	gathered := 0
	for _, w := range c.queue {
		if !w.asked {
			gathered++
		}
	}
	if gathered >= c.most {
		return nil, nil
	}
	if c.cancel != nil {
		tired = time.After(time.Until(c.began.Add(c.kms.patience)))
	}
	w = &waiter{got: make(chan delivery, 1)}
	c.queue = append(c.queue, w)
	if !c.serving {
		c.serving = true
		c.busy.Go(c.serve)
	}
	return w, tired
}

// withdraw takes w out of the queue and says what its call gets: why, unless a
// delivery was faster. Once its key is asked for, w does not go to ask alone,
// and ok is false.
func (c *Client) withdraw(w *waiter, why error) (d delivery, ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	select {
	case d := <-w.got:
		return d, true
	default:
	}
	if w.asked && errors.Is(why, errAlone) {
		return delivery{}, false
	}
	c.queue = slices.DeleteFunc(c.queue, func(o *waiter) bool { return o == w })
	if len(c.queue) == 0 && c.cancel != nil {
		c.cancel() // nobody is left who could use an answer
	}
	return delivery{err: why}, true
}

// serve sends one request after the other until the queue is empty. Those who
// come while one is under way share the next; join sees to it that one is enough
// for all of them. When several keys were asked for and fewer came, nobody
// shares for a while: some KMEs give one whatever they said, or seldom have as
// many.
func (c *Client) serve() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for len(c.queue) > 0 {
		n := len(c.queue)
		for _, w := range c.queue {
			w.asked = true
		}
		ctx, cancel := context.WithCancel(c.life)
		c.began, c.cancel = time.Now(), cancel
		c.mu.Unlock()
		keys, tookNothing, err := c.fetch(ctx, n)
		c.mu.Lock()
		c.cancel = nil
		if n > 1 && len(keys) < n && ctx.Err() == nil {
			c.alone = time.Now().Add(aloneTime)
		}
		cancel()
		c.deliver(keys, tookNothing, err)
	}
	c.serving = false
}

// deliver hands out what came of a request. The keys go to those who came
// first, so that one whose caller has gone is another's; nobody left, it is
// wiped.
func (c *Client) deliver(keys []namedKey, tookNothing bool, err error) {
	for _, k := range first(len(c.queue), keys) {
		c.queue[0].got <- delivery{namedKey: k}
		c.queue = c.queue[1:]
	}
	alone := time.Now().Before(c.alone)
	c.queue = slices.DeleteFunc(c.queue, func(w *waiter) bool {
		switch {
		case w.asked && err != nil && !(alone && tookNothing):
			w.got <- delivery{err: err}
		case alone:
			w.got <- delivery{err: errAlone}
		default:
			return false
		}
		return true
	})
}
