// Package rotationtest is the simulated world of the two machines: two ends of
// a tunnel, a WireGuard that handshakes by its rules, a KMS, a link, journals,
// and whoever wishes them ill. Everything happens in virtual time and is drawn
// from one seed, so that every run can be repeated.
//
// World checks the invariants of docs/PROTOCOL.md, 8 at every step and keeps
// the first violation.
package rotationtest

import (
	"container/heap"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"time"

	"keyturn/internal/kem"
	"keyturn/internal/psk"
	"keyturn/internal/rotation"
	"keyturn/internal/wire"
)

// Options shapes a World. The zero value is a tunnel under traffic with QKD
// and one KEM, the link beside it.
type Options struct {
	Seed       uint64
	Idle       bool    // no traffic
	Listens    [2]bool // an end that sends nothing of its own accord
	Inside     bool    // the link runs inside the tunnel
	Fallback   bool
	Persistent bool    // the journal survives a reboot
	Hub        [2]bool // an end has thousands of peers: see hubPoll
	Manual     bool    // messages and KMS answers wait for Deliver and Answer
	BlockStale bool
	BlockStart bool
	MaxKeyAge  time.Duration // default 1 h
	Require    rotation.Require
	Trace      io.Writer // what happens, one line each
	Config     func(end int, c *rotation.Config)
}

// World is the simulation.
type World struct {
	Options
	Now    time.Time
	Ends   [2]*End // client, server
	Steps  int     // of all machines
	Link   Link
	KMS    KMS
	Tunnel Network
	Ended  int // sessions that a renewal ended though both ends had them

	rng      *rand.Rand
	random   *rand.ChaCha8
	queue    queue
	order    uint64
	err      error
	confirm  map[wire.Named]int       // by which ends
	since    map[wire.Named]int       // the same since a journal was lost
	recovery map[psk.Fingerprint]bool // keys that come of those that both ends verified
	calms    int
	common   psk.Fingerprint // last key confirmed by both since a journal was lost
	apart    time.Duration   // for which the ends have differed although all is well
}

// Client and Server are the indices of the ends.
const (
	Client = 0
	Server = 1
)

var names = [2]string{"client", "server"}

// New returns a world in which both rotators have just started.
func New(o Options) *World {
	if o.MaxKeyAge == 0 {
		o.MaxKeyAge = time.Hour
	}
	var seed [32]byte
	for i := range 8 {
		seed[i] = byte(o.Seed >> (8 * i))
	}
	w := &World{
		Options:  o,
		Now:      time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC),
		rng:      rand.New(rand.NewPCG(o.Seed, 1)), //nolint:gosec // a simulation that can be repeated
		random:   rand.NewChaCha8(seed),
		confirm:  map[wire.Named]int{},
		since:    map[wire.Named]int{},
		recovery: map[psk.Fingerprint]bool{},
	}
	w.KMS.keys = map[string][2]*psk.Key{}
	initial, _ := psk.Random(w.random)
	for i := range w.Ends {
		e := &End{world: w, index: i, erased: map[psk.Fingerprint]bool{}, verified: map[psk.Fingerprint]bool{}, random: map[psk.Fingerprint]bool{}}
		if o.BlockStart {
			e.Lost = 1 // the PSK found is no key to return to
		}
		e.original = initial.Clone()
		e.device.psk = initial.Clone()
		e.known = map[psk.Fingerprint]bool{initial.Fingerprint(): true}
		w.Ends[i] = e
	}
	w.Tunnel.delay = 10 * time.Millisecond
	w.Link.delay = 15 * time.Millisecond
	for i, e := range w.Ends {
		if o.Idle || o.Listens[i] {
			continue
		}
		// Two machines do not begin in the same millisecond: their handshakes
		// would cross, again and again.
		var phase time.Duration
		if i == Server && !o.Manual {
			phase = time.Duration(w.rng.IntN(1000)) * time.Millisecond
		}
		w.after(phase, func() { w.every(time.Second, func() { w.data(e, true) }) })
	}
	w.every(500*time.Millisecond, func() { w.Link.heal(w) })
	w.every(time.Second, w.checkApart)
	w.Ends[Server].Start()
	w.Ends[Client].Start()
	w.after(0, w.dial)
	return w
}

// Err returns the first violation of an invariant.
func (w *World) Err() error { return w.err }

func (w *World) fail(format string, args ...any) {
	if w.err == nil {
		w.err = fmt.Errorf("at %v: %w", w.elapsed(), fmt.Errorf(format, args...))
		w.trace("VIOLATION %v", w.err)
	}
}

func (w *World) elapsed() time.Duration {
	return w.Now.Sub(time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC))
}

func (w *World) trace(format string, args ...any) {
	if w.Trace == nil {
		return
	}
	if !w.Manual {
		_, _ = fmt.Fprintf(w.Trace, "%9.3f  ", w.elapsed().Seconds())
	}
	_, _ = fmt.Fprintf(w.Trace, format+"\n", args...)
}

// Run lets d of virtual time pass.
func (w *World) Run(d time.Duration) {
	end := w.Now.Add(d)
	for len(w.queue) > 0 && !w.queue[0].at.After(end) && w.err == nil {
		e := heap.Pop(&w.queue).(entry)
		if e.at.After(w.Now) {
			w.Now = e.at
		}
		e.do()
	}
	w.Now = end
}

// Until runs until done, at most d, and reports whether it came true.
func (w *World) Until(d time.Duration, done func() bool) bool {
	for end := w.Now.Add(d); w.Now.Before(end) && w.err == nil; {
		if done() {
			return true
		}
		w.Run(100 * time.Millisecond)
	}
	return done()
}

func (w *World) after(d time.Duration, do func()) {
	w.order++
	heap.Push(&w.queue, entry{w.Now.Add(d), w.order, do})
}

func (w *World) every(d time.Duration, do func()) {
	var again func()
	again = func() { do(); w.after(d, again) }
	w.after(d, again)
}

// Draw returns true once in n.
func (w *World) draw(n int) bool { return n > 0 && w.rng.IntN(n) == 0 }

type entry struct {
	at    time.Time
	order uint64
	do    func()
}

type queue []entry

func (q queue) Len() int { return len(q) }
func (q queue) Less(i, j int) bool {
	if q[i].at.Equal(q[j].at) {
		return q[i].order < q[j].order
	}
	return q[i].at.Before(q[j].at)
}
func (q queue) Swap(i, j int) { q[i], q[j] = q[j], q[i] }
func (q *queue) Push(x any)   { *q = append(*q, x.(entry)) }
func (q *queue) Pop() any {
	x := (*q)[len(*q)-1]
	*q = (*q)[:len(*q)-1]
	return x
}

// InStep reports whether both ends have the same PSK in WireGuard.
func (w *World) InStep() bool { return w.Ends[0].device.psk.Equal(w.Ends[1].device.psk) }

// maxApart is how long the ends may differ once messages flow: a bootstrap, a
// fresh key after the longest backoff, a report, and the repair.
const maxApart = 15 * time.Second

// checkApart is the invariant that the ends differ for no longer than a repair
// takes, as long as nothing stands in its way.
func (w *World) checkApart() {
	l, k := &w.Link, &w.KMS
	bound := maxApart
	if w.Hub != [2]bool{} {
		bound += 3 * hubPoll
	}
	well := !l.Cut && l.up[Client] && l.up[Server] && l.Lose == 0 && l.Late == 0 &&
		k.Down == [2]bool{} && !k.Wrong && !k.Zero && !k.Reuse && k.Delay == 0 && !w.Manual
	for _, e := range w.Ends {
		well = well && e.up && !e.asleep && !e.JournalBad && !e.JournalDoubt && !e.DeviceBad && !e.DeviceDoubt && !e.Gone &&
			e.View().Foreign == 0 && e.View().State != rotation.StateBlocked
	}
	if !well || w.InStep() {
		w.apart = 0
		return
	}
	if w.apart += time.Second; w.apart > bound {
		w.fail("the ends have differed for %v although messages flow", w.apart)
	}
}

// Confirmed returns how many keys were confirmed at both ends.
func (w *World) Confirmed() (n int) {
	for _, ends := range w.confirm {
		if ends == 3 {
			n++
		}
	}
	return n
}

// errFault is what a fault answers.
var errFault = errors.New("simulated fault")

// KMS is the key management system of both ends.
type KMS struct {
	Down  [2]bool // for an end
	Wrong bool    // the server gets other bytes under the same ID
	Zero  bool    // the client gets an all-zero key
	Reuse bool    // the client gets the same ID again and again
	Delay time.Duration

	next    int
	keys    map[string][2]*psk.Key
	waiting []func() // in Manual
}

// Answer lets the oldest waiting KMS request be answered; false if none waits.
func (w *World) Answer() bool {
	if len(w.KMS.waiting) == 0 {
		return false
	}
	f := w.KMS.waiting[0]
	w.KMS.waiting = w.KMS.waiting[1:]
	f()
	return true
}

func (w *World) fetch(e *End, f rotation.Fetch) {
	k := &w.KMS
	life := e.life
	answer := func() {
		if e.life != life || !e.up {
			return
		}
		out := rotation.Fetched{ID: f.ID, KeyID: f.KeyID}
		switch {
		case k.Down[e.index]:
			out.Err = errFault
		case f.KeyID == "":
			if !k.Reuse || k.next == 0 {
				k.next++
			}
			out.KeyID = fmt.Sprintf("K%d", k.next)
			key, _ := psk.Random(w.random)
			k.keys[out.KeyID] = [2]*psk.Key{key, key.Clone()}
			out.Key = key.Clone()
			if k.Zero {
				out.Key.Wipe()
			}
		default:
			pair, ok := k.keys[f.KeyID]
			if !ok {
				out.Err = errors.New("no such key")
				break
			}
			delete(k.keys, f.KeyID)
			out.Key = pair[1]
			if k.Wrong {
				out.Key, _ = psk.Random(w.random)
			}
		}
		e.generator(out)
	}
	if w.Manual {
		k.waiting = append(k.waiting, answer)
		return
	}
	w.after(5*time.Millisecond+k.Delay, answer)
}

// sham is a KEM for simulations: cheap, and of no security at all.
type sham struct{}

// Sham is the KEM of the simulated world.
var Sham kem.Scheme = sham{}

func (sham) Name() string              { return "SHAM" }
func (sham) EncapsulationKeySize() int { return psk.Size }
func (sham) CiphertextSize() int       { return psk.Size }
func (sham) GenerateKey(random io.Reader) (kem.DecapsulationKey, error) {
	k, err := psk.Random(random)
	return shamKey{k}, err
}

func (sham) Encapsulate(random io.Reader, ek []byte) (*psk.Key, []byte, error) {
	ct := make([]byte, psk.Size)
	if _, err := io.ReadFull(random, ct); err != nil {
		return nil, nil, err
	}
	s, err := mix(ek, ct)
	return s, ct, err
}

type shamKey struct{ k *psk.Key }

func (s shamKey) EncapsulationKey() []byte                { return append([]byte(nil), s.k.Bytes()...) }
func (s shamKey) Decapsulate(ct []byte) (*psk.Key, error) { return mix(s.k.Bytes(), ct) }
func (s shamKey) Wipe()                                   { s.k.Wipe() }

func mix(a, b []byte) (*psk.Key, error) {
	if len(a) != psk.Size || len(b) != psk.Size {
		return nil, errors.New("wrong size")
	}
	m := make([]byte, psk.Size)
	for i := range m {
		m[i] = a[i] + b[i]
	}
	return psk.New(m)
}

func parameters(o *Options, end int) wire.Parameters {
	p := wire.Parameters{
		Version: wire.Version, SAE: "sae_001", PeerSAE: "sae_002", QKD: true, KEMs: []string{"SHAM"},
		Require: uint8(o.Require), Buffer: 3, Window: 30 * time.Second,
		PublicKey: [32]byte{1}, PeerPublicKey: [32]byte{2},
	}
	if end == Server {
		p.SAE, p.PeerSAE = p.PeerSAE, p.SAE
		p.PublicKey, p.PeerPublicKey = p.PeerPublicKey, p.PublicKey
	}
	return p
}
