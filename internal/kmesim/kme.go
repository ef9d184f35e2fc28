// Package kmesim simulates the two key management entities at the ends of a
// QKD link by ETSI GS QKD 014 V1.1.1, with faults on demand, and makes the
// certificates of a laboratory. It is for tests, demonstrations and laboratories:
// its keys come from a random generator, never from a quantum channel.
//
// The standard does not say how a certificate carries an SAE ID. Here it is
// the subject's common name. A key may be fetched by its slaves at either KME.
package kmesim

import (
	"context"
	"crypto/rand"
	"io"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"
)

// Limits of a pair. Sizes are in bits.
const (
	KeySize           = 256 // where a request names none
	MinKeySize        = 64
	MaxKeySize        = 1024
	MaxKeysPerRequest = 128
	MaxSAEs           = 16 // additional slaves for one key
	DefaultMaxKeys    = 1 << 16
	maxSAE            = 1024 // bytes of an SAE ID
)

// Options of a pair. The zero value is good.
type Options struct {
	// MaxKeys is how many keys may wait at each KME for their slaves; beyond it,
	// the oldest goes. DefaultMaxKeys if zero. A key takes some 500 bytes of memory.
	MaxKeys int
	// Rate is how many keys of KeySize come into each pool every second, and Pool
	// how many it holds; see CheckRate. No limit if Rate is zero; DefaultPool if
	// Pool is.
	Rate float64
	Pool int
	// Random is where keys and their IDs come from; crypto/rand if nil.
	Random io.Reader
	// Log says what is delivered to whom, never the keys. Nothing if nil.
	Log *slog.Logger
}

// Pair is two KMEs that share keys.
type Pair struct{ A, B *KME }

// New returns a pair whose KMEs are called kme-a and kme-b.
func New(o Options) *Pair {
	if o.MaxKeys <= 0 {
		o.MaxKeys = DefaultMaxKeys
	}
	if o.Pool == 0 {
		o.Pool = DefaultPool
	}
	if o.Random == nil {
		o.Random = rand.Reader
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	random := &source{random: o.Random}
	p := &Pair{A: newKME(NameA, NameB, random, o), B: newKME(NameB, NameA, random, o)}
	p.A.peer, p.B.peer = local{p.B}, local{p.A}
	return p
}

// KME is one of a pair. As an http.Handler it needs requests that came by
// mutual TLS; Serve sees to that.
type KME struct {
	name, other string
	log         *slog.Logger
	random      *source
	pools       *pools // of masters that ask here
	store       *store // of keys that were made at the other KME
	streams     *streams
	peer        peer
	verbs       map[string]linkHandler // of the link; read only, once the KME is made
	expires     bool                   // the fault Expired can be; set before the KME serves
	counted     counters

	mu     sync.Mutex
	fault  Fault
	lifted chan struct{} // closed when fault is lifted or replaced
	heal   *time.Timer   // lifts a fault after its time
	// unheard has IDs of keys that the other KME may have been told of, but that
	// nobody got; bounded by maxUnheard.
	unheard []string
}

// counters count since the KME was made.
type counters struct {
	made, delivered atomic.Uint64 // keys
	refused, struck atomic.Uint64 // requests
}

func newKME(name, other string, random *source, o Options) *KME {
	k := &KME{
		name: name, other: other, log: o.Log.With("kms", name), random: random,
		pools: newPools(o.Rate, o.Pool), store: newStore(o.MaxKeys), streams: newStreams(maxStreams),
		verbs: make(map[string]linkHandler), lifted: make(chan struct{}),
	}
	k.handleLink(verbHello, func(context.Context, []byte) ([]byte, error) { return nil, nil })
	k.handleKeys()
	k.handleStreams()
	return k
}
