package rotation

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"reflect"
	"slices"
	"time"
	"unsafe"

	"keyturn/internal/psk"
	"keyturn/internal/wire"
)

// clone returns an independent copy of a world.
func (w *world) clone() *world {
	c := *w
	c.ghosts = slices.Clone(w.ghosts)
	c.effects, c.met = [2]int{}, false
	for e := range c.hosts {
		if h := &c.hosts[e]; h.up {
			h.tunnel, h.gen, h.sched = cloneMachines(&c, h.tunnel, h.gen, h.sched)
		}
	}
	return &c
}

// cloneMachines copies an end's machines. Whatever they only read is shared:
// messages, parameters, names. TestCloneIsComplete knows every field that could
// be shared by mistake.
func cloneMachines(random *world, t *Tunnel, g *KeyGenerator, s *KeyRotationScheduler) (*Tunnel, *KeyGenerator, *KeyRotationScheduler) {
	var from, to []*record
	rec := func(r *record) *record {
		if r == nil {
			return nil
		}
		if i := slices.Index(from, r); i >= 0 {
			return to[i]
		}
		c := *r
		c.key = r.key.Clone()
		from, to = append(from, r), append(to, &c)
		return &c
	}
	recs := func(all []*record) []*record {
		out := make([]*record, len(all), len(all)+1)
		for i, r := range all {
			out[i] = rec(r)
		}
		return out
	}
	key := func(k *psk.Key) *psk.Key {
		if k == nil {
			return nil
		}
		return k.Clone()
	}

	tunnel := *t
	tunnel.config.Random = random
	tunnel.records = recs(t.records)
	tunnel.buffer.entries = recs(t.buffer.entries)
	tunnel.pulled = rec(t.pulled)

	gen := *g
	gen.tunnel, gen.out = &tunnel, nil
	gen.rounds = make([]*round, len(g.rounds), len(g.rounds)+1)
	for i, r := range g.rounds {
		c := *r
		c.qkd, c.key = key(r.qkd), key(r.key)
		gen.rounds[i] = &c
	}
	gen.met.values = slices.Clone(g.met.values)
	gen.metIDs.values = slices.Clone(g.metIDs.values)

	sched := *s
	sched.tunnel, sched.out = &tunnel, nil
	sched.installed = rec(s.installed)
	sched.block = key(s.block)
	if s.op != nil {
		op := *s.op
		op.record = rec(s.op.record)
		sched.op = &op
	}
	return &tunnel, &gen, &sched
}

// Two states are one if nothing that will ever happen can tell them apart. So
// a state is written down with times as ages, with counters as ranks among
// their like, and with names (fingerprints, sessions, boots, key IDs) in the
// order in which they first appear; then it is hashed. A field is written as
// its type says unless the table rules it otherwise.

// rule says how a field is written.
type rule uint8

const (
	byType   rule = iota
	skip          // only shown or derived, or written by hand
	due           // a time that only matters until it has come
	mark          // a time of which only matters whether there is one
	brief         // a past time that no rule looks at after 8 s
	serial        // counters, each kind ranked for itself
	token         // of one end
	own           // sequence of this end's reports
	others        // of the other's
	attempt       // commits
	boot          // inits
	sid           // WireGuard's sessions
	stamped       // a time that is compared, and has an age
	capped        // a count of failures, of which more than ten are as ten
	evidence      // first and last sign: of the last only matters how long after the first it came
	attempts      // the same, and up to 16 s how long ago it was (W1)
)

var rules = map[string]rule{
	"KeyRotationScheduler.tunnel": skip, "KeyRotationScheduler.now": skip, "KeyRotationScheduler.out": skip, "KeyRotationScheduler.wake": skip,
	"KeyRotationScheduler.trying": attempts, "KeyRotationScheduler.unheard": evidence, "KeyRotationScheduler.heard": brief,
	"KeyRotationScheduler.setAt": brief, "KeyRotationScheduler.probeAt": due, "KeyRotationScheduler.saveAt": due,
	"KeyRotationScheduler.token": token, "KeyRotationScheduler.confirmedIn": skip,
	"KeyRotationScheduler.confirmed": serial, "KeyRotationScheduler.journaled": serial,
	"KeyRotationScheduler.peerSeq": others, "KeyRotationScheduler.peerHigh": others, "KeyRotationScheduler.seq": own, "KeyRotationScheduler.attempt": attempt,
	"KeyRotationScheduler.reportAt": due, "KeyRotationScheduler.notBefore": due, "KeyRotationScheduler.nextNotBefore": due,
	"KeyRotationScheduler.forgive": due, "KeyRotationScheduler.stepAt": due, "KeyRotationScheduler.huntProbe": due,
	"KeyRotationScheduler.restoredAt": skip, "KeyRotationScheduler.restoreAt": due, "KeyRotationScheduler.rotations": skip,
	"KeyRotationScheduler.received": brief, "KeyRotationScheduler.helpAt": due, "KeyRotationScheduler.renewAt": due, "KeyRotationScheduler.polledFor": skip, "KeyRotationScheduler.toldDump": brief, "operation.why": skip, "KeyRotationScheduler.reportedAt": brief, "KeyRotationScheduler.notRenewed": skip,
	"knocks.next": due, "knocks.last": stamped,
	// The model carries no Redial out.
	"KeyRotationScheduler.late": skip,
	// The clocks of the model never go back.
	"KeyRotationScheduler.highest":      skip,
	"KeyRotationScheduler.keptFor":      serial,
	"KeyRotationScheduler.lastRotation": skip, "KeyRotationScheduler.lastError": skip, "KeyRotationScheduler.block": skip,

	"Observed.Wall": skip, "Observed.PSK": skip, "Observed.Handshake": stamped, "Observed.Rx": skip, "Observed.Tx": skip,

	"operation.attempt": attempt, "operation.token": token,

	"record.serial": serial, "record.key": skip, "record.sources": skip, "record.since": mark, "record.wall": mark,
	"record.saveToken": skip, "record.session": skip,

	"Tunnel.config": skip, "Tunnel.peerHeld": skip, "Tunnel.peer": skip, "Tunnel.high": serial, "Tunnel.changed": skip, "Tunnel.differences": skip,
	"buffer.capacity": skip,

	"KeyGenerator.tunnel": skip, "KeyGenerator.now": skip, "KeyGenerator.out": skip, "KeyGenerator.fetches": skip,
	"KeyGenerator.notBefore": due, "KeyGenerator.failures": capped, "KeyRotationScheduler.setFailures": capped, "KeyRotationScheduler.restores": capped, "KeyGenerator.lastError": skip, "KeyGenerator.keys": skip,
	"KeyGenerator.lastKey": skip, "KeyGenerator.met": skip, "KeyGenerator.metIDs": skip,
	"bootstrap.attempt": boot, "bootstrap.due": due, "bootstrap.ack": skip, "bootstrap.parameters": skip,
	"round.serial": serial, "round.fetch": skip, "round.keyID": skip, "round.qkd": skip, "round.own": skip, "round.secrets": skip,
	"round.propose": skip, "round.reply": skip, "round.finish": skip, "round.key": skip, "round.expected": skip,

	"Named.Serial": serial,
	"Init.Attempt": boot, "Init.High": serial, "Init.Parameters": skip,
	"Ack.Attempt": boot, "Ack.High": serial, "Ack.Parameters": skip, "Ack.Differences": skip,
	"Propose.Serial": serial, "Propose.EncapsulationKeys": skip, "Propose.Held": serial,
	"Reply.Serial": serial, "Reply.EncapsulationKeys": skip, "Reply.Ciphertexts": skip,
	"Finish.Serial": serial, "Finish.Ciphertexts": skip, "Finish.Digest": skip,
	"Done.Serial": serial, "Done.Digest": skip, "Abandon.Serial": serial, "Abandon.Reason": skip, "Abandon.High": serial,
	"Commit.Attempt": attempt, "Commit.Confirmed": serial,
	"Committed.Attempt": attempt, "Committed.Seq": others,
	"Refused.Attempt": attempt,
	"Report.Seq":      others, "Report.Interval": skip, "Report.Confirmed": serial,
	"Bye.Reason": skip,

	"world.scope": skip, "world.now": skip, "world.hosts": skip, "world.queue": skip, "world.stale": skip, "world.ids": skip,
	"world.keys": skip, "world.ghosts": skip, "world.fuse": skip, "world.fused": skip, "world.effects": skip, "world.met": skip,
	"world.foreign": skip, "world.wrong": skip, "world.trace": skip,
	"host.tunnel": skip, "host.gen": skip, "host.sched": skip, "host.high": serial, "host.last": serial, "host.used": skip,
	"snapshot.high": serial, "snapshot.psk": skip,
	"entry.serial": serial, "entry.key": skip, "entry.installed": mark,
	"device.psk": skip, "device.stamp": stamped, "device.rx": skip, "device.tx": skip, "device.tried": brief,
	"session.id": sid, "session.print": skip, "handshake.id": sid,
}

// oldest is the age from which on all times are the same: no rule, and nothing
// in WireGuard, looks back further.
const oldest = 190 * time.Second

// counters is how many kinds of ranked counters there are: some of one end.
const counters = 2 * (int(attempts) + 1)

// scribe writes a state down.
type scribe struct {
	world *world
	end   int
	words []uint64
	ranks [counters][]int // of words, by kind of counter
	names [][16]byte
	recs  []*record
	bytes []byte
	uniq  []uint64
}

// digest names a state.
type digest [16]byte

// codec writes one value.
type codec func(c *scribe, p unsafe.Pointer)

// codecs are compiled once for each type.
type codecs map[reflect.Type]codec

func (c *scribe) raw(v uint64) { c.words = append(c.words, v) }

func (c *scribe) flag(b bool) {
	if b {
		c.raw(1)
	} else {
		c.raw(0)
	}
}

func (c *scribe) counter(r rule, v uint64) {
	k := 2 * int(r)
	switch r {
	case token, own:
		k += c.end
	case others:
		k = 2*int(own) + 1 - c.end
	}
	c.ranks[k] = append(c.ranks[k], len(c.words))
	c.raw(v)
}

// name writes a name as the place of its first appearance; zero is none.
func (c *scribe) name(b [16]byte) {
	if b == ([16]byte{}) {
		c.raw(0)
		return
	}
	i := slices.Index(c.names, b)
	if i < 0 {
		i = len(c.names)
		c.names = append(c.names, b)
	}
	c.raw(uint64(i) + 1)
}

func (c *scribe) time(r rule, t time.Time) {
	if t.IsZero() {
		c.raw(^uint64(0))
		return
	}
	age := c.world.now.Sub(t)
	grain := c.world.scope.grain
	switch r {
	case mark:
		age = 0
	case due:
		age = max(-age, 0)
		age = (age + moment + grain - 1) / grain
	case brief:
		age = min(age, 8*time.Second)
	case stamped:
		c.name([16]byte(binary.BigEndian.AppendUint64([]byte("a stamp "), uint64(t.UnixNano()))))
		age = min(age, oldest)
	default:
		age = min(age, oldest)
	}
	c.raw(uint64(age))
}

// signs writes the first and the last sign of something. A rule looks at what
// lies between them, and only at whether that is DeadAfter at most.
func (c *scribe) signs(s *[2]time.Time) {
	if s[0].IsZero() {
		c.raw(^uint64(0))
		return
	}
	c.raw(uint64(min(c.world.now.Sub(s[0]), DeadAfter)))
	c.raw(uint64(min(s[1].Sub(s[0]), DeadAfter)))
}

func (cs codecs) of(t reflect.Type) codec {
	if f, ok := cs[t]; ok {
		return f
	}
	f := cs.compile(t)
	cs[t] = f
	return f
}

func (cs codecs) compile(t reflect.Type) codec {
	switch t {
	case reflect.TypeFor[time.Time]():
		return func(c *scribe, p unsafe.Pointer) { c.time(byType, *(*time.Time)(p)) }
	case reflect.TypeFor[*record]():
		var inner codec
		return func(c *scribe, p unsafe.Pointer) {
			r := *(**record)(p)
			if r == nil {
				c.raw(0)
				return
			}
			i := slices.Index(c.recs, r)
			if i < 0 {
				i = len(c.recs)
				c.recs = append(c.recs, r)
				if inner == nil {
					inner = cs.of(t.Elem())
				}
				inner(c, unsafe.Pointer(r))
				h := &c.world.hosts[c.end]
				if !r.journaled {
					c.counter(token, r.saveToken)
				}
				c.flag(r.session == h.sched.session)
				c.flag(r.session == h.tunnel.session)
			}
			c.raw(uint64(i) + 1)
		}
	}
	switch t.Kind() {
	case reflect.Bool, reflect.Uint8:
		return func(c *scribe, p unsafe.Pointer) { c.raw(uint64(*(*uint8)(p))) }
	case reflect.Int, reflect.Int64, reflect.Uint64:
		return func(c *scribe, p unsafe.Pointer) { c.raw(*(*uint64)(p)) }
	case reflect.Uint16:
		return func(c *scribe, p unsafe.Pointer) { c.raw(uint64(*(*uint16)(p))) }
	case reflect.Uint32:
		return func(c *scribe, p unsafe.Pointer) { c.raw(uint64(*(*uint32)(p))) }
	case reflect.String:
		return func(c *scribe, p unsafe.Pointer) {
			h := sha256.Sum256([]byte(*(*string)(p)))
			c.name([16]byte(h[:16]))
		}
	case reflect.Array:
		if t.Elem().Kind() == reflect.Uint8 && t.Len() == 16 {
			return func(c *scribe, p unsafe.Pointer) { c.name(*(*[16]byte)(p)) }
		}
		elem, size := cs.of(t.Elem()), t.Elem().Size()
		return func(c *scribe, p unsafe.Pointer) {
			for i := range t.Len() {
				elem(c, unsafe.Add(p, uintptr(i)*size))
			}
		}
	case reflect.Slice:
		elem, size := cs.of(t.Elem()), t.Elem().Size()
		return func(c *scribe, p unsafe.Pointer) {
			v := reflect.NewAt(t, p).Elem()
			c.raw(uint64(v.Len()))
			for i := range v.Len() {
				elem(c, unsafe.Add(v.UnsafePointer(), uintptr(i)*size))
			}
		}
	case reflect.Pointer:
		inner := cs.of(t.Elem())
		return func(c *scribe, p unsafe.Pointer) {
			to := *(*unsafe.Pointer)(p)
			if c.flag(to != nil); to != nil {
				inner(c, to)
			}
		}
	case reflect.Struct:
		return cs.compileStruct(t)
	}
	panic(fmt.Sprintf("the model cannot write a %v down", t))
}

func (cs codecs) compileStruct(t reflect.Type) codec {
	type field struct {
		offset uintptr
		write  codec
	}
	var fields []field
	for f := range t.Fields() {
		r := rules[t.Name()+"."+f.Name]
		w := func(c *scribe, p unsafe.Pointer) {
			switch f.Type.Kind() {
			case reflect.Uint32:
				c.counter(r, uint64(*(*uint32)(p)))
			case reflect.Slice:
				c.raw(uint64(len(*(*[]uint64)(p))))
				for _, v := range *(*[]uint64)(p) {
					c.counter(r, v)
				}
			default:
				c.counter(r, *(*uint64)(p))
			}
		}
		switch r {
		case skip:
			continue
		case byType:
			w = cs.of(f.Type)
		case capped:
			w = func(c *scribe, p unsafe.Pointer) { c.raw(uint64(min(*(*int)(p), 10))) }
		case evidence:
			w = func(c *scribe, p unsafe.Pointer) { c.signs((*[2]time.Time)(p)) }
		case attempts:
			w = func(c *scribe, p unsafe.Pointer) {
				signs := (*[2]time.Time)(p)
				c.signs(signs)
				c.raw(uint64(min(c.world.now.Sub(signs[1]), tryingRecent+time.Second)))
			}
		case due, mark, brief, stamped:
			w = func(c *scribe, p unsafe.Pointer) { c.time(r, *(*time.Time)(p)) }
		}
		fields = append(fields, field{f.Offset, w})
	}
	return func(c *scribe, p unsafe.Pointer) {
		for i := range fields {
			fields[i].write(c, unsafe.Add(p, fields[i].offset))
		}
	}
}

func write[T any](c *scribe, cs codecs, v *T) { cs.of(reflect.TypeFor[T]())(c, unsafe.Pointer(v)) }

// messages writes a queue for an end.
func (c *scribe) messages(cs codecs, end int, all []wire.Message) {
	c.end = end
	c.raw(uint64(len(all)))
	for _, m := range all {
		v := reflect.ValueOf(m)
		h := sha256.Sum256([]byte(v.Type().Elem().Name()))
		c.raw(binary.BigEndian.Uint64(h[:]))
		cs.of(v.Type().Elem())(c, v.UnsafePointer())
	}
}

// digest writes a state down and hashes it.
func (c *scribe) digest(cs codecs, w *world) digest {
	c.world, c.words, c.names, c.recs = w, c.words[:0], c.names[:0], c.recs[:0]
	for i := range c.ranks {
		c.ranks[i] = c.ranks[i][:0]
	}
	c.name(w.original())
	write(c, cs, w)
	for e := range w.hosts {
		c.host(cs, e)
	}
	for e := range w.queue {
		c.messages(cs, e, w.queue[e])
		c.messages(cs, e, w.stale[e])
	}
	c.remembered()
	c.rank()
	c.bytes = c.bytes[:0]
	for _, v := range c.words {
		c.bytes = binary.LittleEndian.AppendUint64(c.bytes, v)
	}
	h := sha256.Sum256(c.bytes)
	return digest(h[:16])
}

// host writes an end down.
func (c *scribe) host(cs codecs, e int) {
	w := c.world
	h := &w.hosts[e]
	c.end = e
	write(c, cs, h)
	c.flag(h.used.Equal(h.device.stamp))
	c.name(h.device.next.print)
	if !h.up {
		return
	}
	t, g, s := h.tunnel, h.gen, h.sched
	c.name(t.config.Boot)
	write(c, cs, t)
	if t.session != s.session {
		write(c, cs, &t.peerHeld)
	}
	write(c, cs, s)
	if s.journaled != s.confirmed {
		c.counter(token, s.confirmedIn)
	}
	c.flag(s.block != nil)
	c.raw(h.device.rx - s.last.Rx)
	c.raw(h.device.tx - s.last.Tx)
	write(c, cs, g)
	for _, r := range g.rounds {
		c.flag(r.propose != nil)
		c.flag(r.reply != nil)
		c.flag(r.finish != nil)
		for _, k := range []*psk.Key{r.qkd, r.key} {
			if c.flag(k != nil); k != nil {
				c.name(k.Fingerprint())
			}
		}
	}
	c.flag(g.boot.ack != nil)
	again := func(m wire.Message) bool { _, ok := m.(*wire.Init); return ok }
	if g.boot.ack != nil && (slices.ContainsFunc(w.queue[e], again) || slices.ContainsFunc(w.stale[e], again)) {
		write(c, cs, g.boot.ack)
	}
}

// remembered writes down what the model remembers of the keys that there still
// are, and forgets the others: they never come again.
func (c *scribe) remembered() {
	w := c.world
	w.ghosts = slices.DeleteFunc(w.ghosts, func(g ghost) bool { return !slices.Contains(c.names, [16]byte(g.print)) })
	for _, n := range c.names {
		for i := range w.ghosts {
			if g := &w.ghosts[i]; g.print == n {
				for e := range 2 {
					c.flag(g.verified[e])
					c.flag(g.set[e])
					c.flag(g.used[e])
					c.flag(g.confirmed[e])
					c.flag(g.erased[e])
				}
			}
		}
	}
}

// rank replaces every counter by its rank among those of its kind; zero stays.
func (c *scribe) rank() {
	for _, places := range c.ranks {
		c.uniq = c.uniq[:0]
		for _, i := range places {
			c.uniq = append(c.uniq, c.words[i])
		}
		c.uniq = append(c.uniq, 0)
		slices.Sort(c.uniq)
		c.uniq = slices.Compact(c.uniq)
		for _, i := range places {
			n, _ := slices.BinarySearch(c.uniq, c.words[i])
			c.words[i] = uint64(n)
		}
	}
}
