package kmesim

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"sync"
	"time"
)

// A key stream is known at one KME, its owner: that of kme-a for an ID which the
// applications chose, and for a new ID the KME that made it up. The other asks it
// over the link. The owner tells which key of the pair's store an index is; it
// holds no key.

// Limits of key streams.
const (
	// window is how many indices of a stream can be fetched: asking for a higher
	// one gives the lowest up.
	window = 1024
	// maxStreams bounds the streams that a KME owns; beyond it, the one that was
	// used longest ago goes. A key fetched takes some 150 bytes of its window.
	maxStreams = 1 << 16
)

// The verbs of the link that concern key streams. The bodies are JSON; no key is
// in them.
const (
	verbOpen  = "stream-open"
	verbClaim = "stream-claim"
	verbClose = "stream-close"
)

// streams is what a KME knows of key streams.
type streams struct {
	max    int // streams owned; each may be open to two applications
	mu     sync.Mutex
	owned  map[ksid]*stream
	opened map[opening]time.Duration // at this KME, whoever owns them: the timeout of a call
}

// opening is a stream that an application has opened.
type opening struct {
	Stream ksid
	SAE    string
}

// stream is one that this KME owns.
type stream struct {
	saes   [2]string
	open   [2]bool
	closed [2]bool // by one while the other has it open
	qos    qos
	base   uint32 // lowest index that can be fetched
	chunks map[uint32]chunk
	used   time.Time
}

// chunk is the key at one index.
type chunk struct {
	ID    string
	Maker string // the application that got it first; the other one is its slave
	Made  time.Time
}

func newStreams(limit int) *streams {
	return &streams{max: limit, owned: make(map[ksid]*stream), opened: make(map[opening]time.Duration)}
}

// side returns which of a stream's applications an SAE is.
func (s *stream) side(sae string) (int, bool) {
	for i, name := range s.saes {
		if name == sae {
			return i, true
		}
	}
	return 0, false
}

// The questions to an owner, and its answers.
type (
	openQuestion struct {
		opening
		Peer   string
		QoS    qos
		Create bool // where there is no such stream
		Hold   bool // see StreamOptions
		Look   bool // only whether the peer has opened it by now
	}
	opened struct {
		Known  bool
		Status streamStatus
		QoS    qos
		Again  bool // the application had it open before
	}
	claim struct {
		opening
		Index     uint32
		ID        string // of a key that was made for the index; empty to ask
		PeerFirst bool
	}
	claimed struct {
		Known  bool // and open
		Status streamStatus
		Chunk  chunk // none: a key has to be made
		QoS    qos
		Peer   string
	}
	closing   struct{ opening }
	closedNow struct{ Status streamStatus }
)

// open lets an application into a stream that this KME owns.
func (t *streams) open(q openQuestion) opened {
	t.mu.Lock()
	defer t.mu.Unlock()
	s := t.owned[q.Stream]
	switch {
	case s == nil && (q.Look || !q.Create):
		return opened{}
	case s == nil:
		t.makeRoom()
		s = &stream{saes: [2]string{q.SAE, q.Peer}, qos: q.QoS, chunks: make(map[uint32]chunk)}
		t.owned[q.Stream] = s
	}
	me, mine := s.side(q.SAE)
	answer := opened{Known: true, QoS: s.qos}
	switch {
	case !mine || s.saes[1-me] != q.Peer:
		answer.Status, answer.QoS = streamInUse, q.QoS
		return answer
	case q.Look:
		if !s.open[1-me] {
			answer.Status = streamPeerAbsent
		}
		return answer
	case s.qos.Chunk != q.QoS.Chunk:
		answer.Status = streamQoS
		return answer
	case s.closed[me] && q.Hold:
		answer.Status = streamInUse
		return answer
	case s.closed[me]: // a new association under an old name
		s.base, s.closed = 0, [2]bool{}
		clear(s.chunks)
	}
	answer.Again = s.open[me]
	s.open[me] = true
	s.used = time.Now()
	if !s.open[1-me] {
		answer.Status = streamPeerAbsent
	}
	return answer
}

// makeRoom drops the stream that was used longest ago, where there is no room.
func (t *streams) makeRoom() {
	if len(t.owned) < t.max {
		return
	}
	var oldest ksid
	var at time.Time
	for id, s := range t.owned {
		if at.IsZero() || s.used.Before(at) {
			oldest, at = id, s.used
		}
	}
	delete(t.owned, oldest)
}

// claim says which key an index is, or that one has to be made, or takes down
// which one was made. Of two that were made for one index the first counts.
func (t *streams) claim(q claim) claimed {
	t.mu.Lock()
	defer t.mu.Unlock()
	s := t.owned[q.Stream]
	if s == nil {
		return claimed{Status: streamPeerNotYet}
	}
	me, mine := s.side(q.SAE)
	if !mine || !s.open[me] {
		return claimed{Status: streamPeerNotYet}
	}
	s.used = time.Now()
	c, made := s.chunks[q.Index]
	ttl := time.Duration(s.qos.TTL) * time.Second
	switch {
	case q.PeerFirst && !s.open[1-me], !made && s.closed[1-me]: // after CLOSE, no further keys
		return claimed{Known: true, Status: streamPeerNotYet}
	case q.Index < s.base, made && c.Maker == q.SAE, made && ttl > 0 && s.used.Sub(c.Made) > ttl:
		return claimed{Known: true, Status: streamNoKeys}
	case !made && q.ID != "":
		s.slide(q.Index)
		c = chunk{q.ID, q.SAE, s.used}
		s.chunks[q.Index] = c
	}
	return claimed{Known: true, Chunk: c, QoS: s.qos, Peer: s.saes[1-me]}
}

// slide moves the window so that index is in it.
func (s *stream) slide(index uint32) {
	if index-s.base < window {
		return
	}
	base := index - window + 1
	for i := range uint32(window) {
		if s.base+i >= base {
			break
		}
		delete(s.chunks, s.base+i)
	}
	s.base = base
}

// close ends an application's part in a stream, and the stream where the other
// does not have it open.
func (t *streams) close(q closing) closedNow {
	t.mu.Lock()
	defer t.mu.Unlock()
	s := t.owned[q.Stream]
	if s == nil {
		return closedNow{streamPeerAbsent}
	}
	me, mine := s.side(q.SAE)
	if !mine || !s.open[me] {
		return closedNow{streamPeerAbsent}
	}
	s.open[me], s.closed[me] = false, true
	if !s.open[1-me] {
		delete(t.owned, q.Stream)
	}
	return closedNow{}
}

// enter and leave note what is open at this KME. An application whose note got
// lost opens its stream again, so there is no harm in dropping one.
func (t *streams) enter(o opening, timeout time.Duration) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for other := range t.opened {
		if len(t.opened) < 2*t.max {
			break
		}
		delete(t.opened, other)
	}
	t.opened[o] = timeout
}

func (t *streams) leave(o opening) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.opened, o)
}

// timeout returns how long a call may take, 0 for as long as it does, and
// whether the stream is open at this KME.
func (t *streams) timeout(o opening) (time.Duration, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	d, open := t.opened[o]
	return d, open
}

func (t *streams) owns(id ksid) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.owned[id] != nil
}

// handleStreams answers the verbs that concern key streams.
func (k *KME) handleStreams() {
	handleJSON(k, verbOpen, k.streams.open)
	handleJSON(k, verbClaim, k.streams.claim)
	handleJSON(k, verbClose, k.streams.close)
}

func handleJSON[Q, A any](k *KME, verb string, f func(Q) A) {
	k.handleLink(verb, func(_ context.Context, body []byte) ([]byte, error) {
		var q Q
		if err := json.Unmarshal(body, &q); err != nil {
			return nil, errMalformed
		}
		return json.Marshal(f(q))
	})
}

// askOwner asks this KME where it owns the stream, and the other one where not.
func askOwner[Q, A any](ctx context.Context, k *KME, stream ksid, verb string, here func(Q) A, q Q) (a A, err error) {
	if k.streams.owns(stream) {
		return here(q), nil
	}
	body, err := json.Marshal(q)
	if err != nil {
		return a, err
	}
	answer, err := k.call(ctx, verb, body)
	if err != nil {
		return a, err
	}
	if err := json.Unmarshal(answer, &a); err != nil {
		return a, errMalformed
	}
	return a, nil
}

// openStream finds a stream's owner, or becomes it.
func (k *KME) openStream(ctx context.Context, q openQuestion) (ksid, opened, error) {
	fresh := q.Stream == ksid{}
	if fresh {
		_, _ = rand.Read(q.Stream[:])
	}
	// Where both KMEs meet an ID for the first time, at once, only kme-a takes
	// it. The other one is asked in any case: without a link there is no stream.
	far := q
	far.Create = k.name != NameA && !fresh
	a, err := askOwner(ctx, k, q.Stream, verbOpen, k.streams.open, far)
	if err == nil && !a.Known {
		q.Create = true
		a = k.streams.open(q)
	}
	return q.Stream, a, err
}
