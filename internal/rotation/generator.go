package rotation

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	"keyturn/internal/kem"
	"keyturn/internal/psk"
	"keyturn/internal/wire"
)

// KeyGenerator is the producer of a peer: it bootstraps with the peer's
// rotator, establishes and verifies keys, and keeps the key buffer full.
//
// Step never fails: what a peer or a KMS does wrong ends a round, is named in
// a Note and to the peer, and leaves everything else as it was.
type KeyGenerator struct {
	tunnel *Tunnel
	now    time.Time
	out    []Effect

	boot    bootstrap
	rounds  []*round // under way, by rising serial; those still fetching (client) come last
	fetches uint64
	asked   int          // fetches without an answer, also those whose round has ended
	suspect wire.Sources // client: what the next round leaves out, if require allows (E9)

	failures  int // of rounds, in a row
	notBefore time.Time
	lastError string
	keys      uint64 // established
	lastKey   time.Time
	met       memory[psk.Fingerprint]
	metIDs    memory[string]
}

// qkd is the source that the KMS delivers; the others are KEMs.
const (
	qkd  wire.Sources = 1
	kems              = ^qkd
)

// digestDiffers is the reason of an Abandon after which the ends know that a
// source gave them different secrets (E9).
const digestDiffers = "digest differs"

// NewKeyGenerator returns the generator of a tunnel, in hold.
func NewKeyGenerator(t *Tunnel) *KeyGenerator { return &KeyGenerator{tunnel: t} }

// round is one establishment. Its serial is zero until the client proposes.
type round struct {
	serial   uint64
	fetch    uint64 // zero unless the KMS is being asked
	since    time.Time
	sources  wire.Sources
	keyID    string
	qkd      *psk.Key
	own      []kem.DecapsulationKey
	secrets  []*psk.Key // encapsulated by this end, one for each KEM in sources
	propose  *wire.Propose
	reply    *wire.Reply
	finish   *wire.Finish
	key      *psk.Key // verified; waits until lower serials are through
	expected [32]byte // client: the server's digest
	done     bool     // client: Done came
}

func (r *round) wipe() {
	r.qkd.Wipe()
	r.key.Wipe()
	for _, k := range r.own {
		k.Wipe()
	}
	for _, s := range r.secrets {
		s.Wipe()
	}
}

// Step takes one event and returns what is to be done, in order.
func (g *KeyGenerator) Step(now time.Time, e Event) []Effect {
	g.now, g.out = now, nil
	g.tunnel.changed = false
	switch e := e.(type) {
	case LinkUp:
		g.linkUp(e.Peer)
	case LinkDown:
		g.linkDown()
	case OtherVersion:
		g.otherVersion(e.Version)
	case RoleConflict:
		g.roleConflict()
	case Fetched:
		g.fetched(e)
	case Received:
		g.receive(e.Message)
	}
	g.expire()
	if g.tunnel.linked && g.tunnel.config.Role == Client && g.tunnel.bootable() && !g.boot.answered && !g.now.Before(g.boot.due) {
		g.sendInit()
	}
	g.fill()
	if g.tunnel.changed {
		g.out = append(g.out, Wake{})
	}
	return g.out
}

// Deadline returns when Step wants a Tick; false if only an event helps.
func (g *KeyGenerator) Deadline() (time.Time, bool) {
	var next time.Time
	soonest := func(t time.Time) {
		if next.IsZero() || t.Before(next) {
			next = t
		}
	}
	for _, r := range g.rounds {
		soonest(r.since.Add(roundTimeout))
		if g.dispensable(r) {
			soonest(r.since.Add(patience))
		}
	}
	if g.tunnel.linked && g.tunnel.config.Role == Client {
		if !g.boot.answered && g.tunnel.bootable() {
			soonest(g.boot.due)
		} else if g.wanting() > 0 {
			soonest(g.notBefore)
		}
	}
	return next, !next.IsZero()
}

func (g *KeyGenerator) receive(m wire.Message) {
	switch m := m.(type) {
	case *wire.Init:
		g.init(m)
	case *wire.Ack:
		g.ack(m)
	case *wire.Propose:
		if g.current(m.Session) {
			g.propose(m)
		}
	case *wire.Reply:
		if g.current(m.Session) {
			g.reply(m)
		}
	case *wire.Finish:
		if g.current(m.Session) {
			g.finish(m)
		}
	case *wire.Done:
		if g.current(m.Session) {
			g.doneBy(m)
		}
	case *wire.Abandon:
		if g.current(m.Session) {
			g.abandoned(m)
		}
	case *wire.Report:
		// The scheduler's message; the generator only watches the session.
		g.current(m.Session)
	}
}

// current drops what belongs to another session (B5).
func (g *KeyGenerator) current(s wire.SessionID) bool {
	if s != g.tunnel.session || s == (wire.SessionID{}) {
		g.strange()
		return false
	}
	return true
}

// wanting is how many rounds may be started now, the backoff aside.
func (g *KeyGenerator) wanting() int {
	t := g.tunnel
	if t.config.Role != Client || !t.linked || !t.accepted || g.drowned() && !g.enough(g.all()&^qkd) {
		return 0
	}
	most := maxRounds
	if g.failures > 0 {
		most = 1 // until one succeeds again
	}
	return min(int(t.config.Parameters.Buffer)-len(t.buffer.entries), most) - len(g.rounds)
}

// fill is E1: the client starts rounds while its buffer is not full.
func (g *KeyGenerator) fill() {
	for g.wanting() > 0 && !g.now.Before(g.notBefore) {
		r := &round{since: g.now, sources: g.all()}
		g.rounds = append(g.rounds, r)
		if less := r.sources &^ g.suspect; less != r.sources {
			g.leaveOut(r, less, "the last round failed: "+g.lastError)
			g.suspect = 0
		}
		switch {
		case !r.sources.QKD():
		case g.drowned():
			g.leaveOut(r, r.sources&^qkd, unanswered)
		default:
			g.fetch(r, "")
			continue
		}
		if !g.offer(r) {
			return
		}
	}
}

// fetch asks the KMS for a round's key, at the server by its ID.
func (g *KeyGenerator) fetch(r *round, id string) {
	g.fetches++
	g.asked++
	r.fetch = g.fetches
	g.out = append(g.out, Fetch{ID: r.fetch, KeyID: id})
}

// drowned reports that so many requests wait for the KMS that no more are made.
func (g *KeyGenerator) drowned() bool { return g.asked >= 2*maxRounds }

const unanswered = "the KMS does not answer"

// leaveOut goes on with fewer sources, which the policy must allow, for this
// key only.
func (g *KeyGenerator) leaveOut(r *round, less wire.Sources, why string) {
	g.note(NoteReduced, wire.Named{Serial: r.serial}, fmt.Sprintf("without %v: %s", r.sources&^less, why))
	r.sources = less
	if !less.QKD() {
		r.fetch, r.keyID = 0, ""
	}
}

// dispensable reports that a round waits for the KMS and could do without.
func (g *KeyGenerator) dispensable(r *round) bool {
	return r.fetch != 0 && g.enough(r.sources&^qkd)
}

// all returns the configured sources.
func (g *KeyGenerator) all() wire.Sources {
	p := &g.tunnel.config.Parameters
	s := wire.Sources(1<<len(p.KEMs)-1) << 1
	if p.QKD {
		s |= qkd
	}
	return s
}

// enough says whether the policy allows a key made of these sources.
func (g *KeyGenerator) enough(s wire.Sources) bool {
	all := g.all()
	if s&^all != 0 {
		return false
	}
	switch Require(g.tunnel.config.Parameters.Require) {
	case RequireAll:
		return s == all
	case RequireQKD:
		return s.QKD()
	case RequirePQC:
		return s|qkd == all|qkd && s&^qkd != 0
	case RequireAny:
		return s != 0
	}
	return false
}

// fetched is E2 at the client and E3 at the server.
func (g *KeyGenerator) fetched(e Fetched) {
	g.asked--
	r := g.find(func(r *round) bool { return r.fetch == e.ID })
	if r == nil {
		e.Key.Wipe() // the round has ended; a delivered key is not used for another
		return
	}
	r.fetch = 0
	err := e.Err
	if err == nil && e.Key.IsZero() {
		err = psk.ErrZero
	}
	if err == nil && g.metIDs.has(e.KeyID) {
		err = fmt.Errorf("key id %q was met before", e.KeyID)
	}
	if err != nil {
		e.Key.Wipe()
		if less := r.sources &^ qkd; g.enough(less) {
			g.leaveOut(r, less, err.Error())
		} else {
			g.abandon(r, "qkd: "+err.Error())
			return
		}
	} else {
		g.metIDs.add(e.KeyID)
		r.qkd, r.keyID = e.Key, e.KeyID
	}
	g.proceed(r)
}

// proceed goes on with a round that waits for its QKD key no longer.
func (g *KeyGenerator) proceed(r *round) {
	if g.tunnel.config.Role == Client {
		g.offer(r)
	} else {
		g.answer(r)
	}
}

// offer is E2: the client proposes.
func (g *KeyGenerator) offer(r *round) bool {
	t := g.tunnel
	if t.high >= maxHigh {
		g.abandon(r, "serials are used up")
		return false
	}
	keys, err := g.generate(r)
	if err != nil {
		g.abandon(r, err.Error())
		return false
	}
	t.high++
	r.serial, r.since = t.high, g.now
	g.sort()
	r.propose = &wire.Propose{
		Session: t.session, Serial: r.serial, Sources: r.sources, KeyID: r.keyID,
		EncapsulationKeys: keys, Held: g.uncommitted(r.serial),
	}
	g.send(r.propose)
	return true
}

// uncommitted names the serials below s that the client holds, the pulled one
// and those under way included (E2). It names the scheduler's keys as well: one
// whose commit is not sent yet is in nobody else's list.
func (g *KeyGenerator) uncommitted(s uint64) []uint64 {
	var serials []uint64
	t := g.tunnel
	if t.pulled != nil {
		serials = append(serials, t.pulled.serial)
	}
	for _, n := range t.buffer.names() {
		serials = append(serials, n.Serial)
	}
	for _, r := range t.records {
		if !r.found() {
			serials = append(serials, r.serial)
		}
	}
	for _, r := range g.rounds {
		if r.serial != 0 {
			serials = append(serials, r.serial)
		}
	}
	slices.Sort(serials)
	serials = slices.DeleteFunc(slices.Compact(serials), func(x uint64) bool { return x >= s })
	return serials[max(0, len(serials)-wire.MaxHeld):]
}

// generate makes the round's ephemeral key pairs.
func (g *KeyGenerator) generate(r *round) ([][]byte, error) {
	var keys [][]byte
	for i, scheme := range g.tunnel.config.KEMs {
		if !r.sources.KEM(i) {
			continue
		}
		d, err := scheme.GenerateKey(g.tunnel.config.Random)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", scheme.Name(), err)
		}
		r.own = append(r.own, d)
		keys = append(keys, d.EncapsulationKey())
	}
	return keys, nil
}

// encapsulate makes a secret for each of the other end's keys.
func (g *KeyGenerator) encapsulate(r *round, keys [][]byte) ([][]byte, error) {
	var ciphertexts [][]byte
	for i, scheme := range g.tunnel.config.KEMs {
		if !r.sources.KEM(i) {
			continue
		}
		if len(ciphertexts) == len(keys) {
			return nil, fmt.Errorf("%s: no encapsulation key", scheme.Name())
		}
		secret, ciphertext, err := scheme.Encapsulate(g.tunnel.config.Random, keys[len(ciphertexts)])
		if err != nil {
			return nil, fmt.Errorf("%s: %w", scheme.Name(), err)
		}
		r.secrets = append(r.secrets, secret)
		ciphertexts = append(ciphertexts, ciphertext)
	}
	if len(ciphertexts) != len(keys) {
		return nil, fmt.Errorf("%d encapsulation keys for %d KEMs", len(keys), len(ciphertexts))
	}
	return ciphertexts, nil
}

// propose is E3: the server checks and fetches its half.
func (g *KeyGenerator) propose(m *wire.Propose) {
	t := g.tunnel
	if t.config.Role != Server {
		return
	}
	if r := g.find(func(r *round) bool { return r.serial == m.Serial }); r != nil {
		if r.reply != nil {
			g.send(r.reply) // repeated
		}
		return
	}
	r := &round{serial: m.Serial, since: g.now, sources: m.Sources, keyID: m.KeyID, propose: m}
	switch {
	case !t.accepted:
		g.refuseRound(r, "the bootstrap was refused")
		return
	case m.Serial <= t.high:
		g.refuseRound(r, fmt.Sprintf("serial is not above %d", t.high))
		return
	case m.Serial > maxHigh:
		g.refuseRound(r, "serial is too high")
		return
	case !g.enough(m.Sources):
		g.refuseRound(r, fmt.Sprintf("sources %v are not what the policy requires", m.Sources))
		return
	case len(g.rounds) >= 2*maxRounds || m.Sources.QKD() && g.drowned() && !g.enough(m.Sources&^qkd):
		g.refuseRound(r, "too many rounds are under way")
		return
	case m.Sources.QKD() && g.metIDs.has(m.KeyID):
		g.refuseRound(r, fmt.Sprintf("key id %q was met before", m.KeyID))
		return
	}
	t.raise(m.Serial)
	wanted := func(serial uint64) bool { return serial >= m.Serial || slices.Contains(m.Held, serial) }
	t.buffer.retain(func(n wire.Named) bool { return wanted(n.Serial) })
	for _, old := range slices.Clone(g.rounds) {
		if !wanted(old.serial) {
			g.drop(old)
		}
	}
	g.rounds = append(g.rounds, r)
	g.sort()
	if m.Sources != g.all() {
		g.note(NoteReduced, wire.Named{Serial: r.serial}, fmt.Sprintf("the peer has only %v", m.Sources))
	}
	switch {
	case !m.Sources.QKD():
	case g.drowned():
		g.leaveOut(r, m.Sources&^qkd, unanswered)
	default:
		g.fetch(r, m.KeyID)
		return
	}
	g.answer(r)
}

// answer is E4: the server, which has its QKD key by now, replies.
func (g *KeyGenerator) answer(r *round) {
	ciphertexts, err := g.encapsulate(r, r.propose.EncapsulationKeys)
	if err == nil {
		var keys [][]byte
		if keys, err = g.generate(r); err == nil {
			r.reply = &wire.Reply{
				Session: g.tunnel.session, Serial: r.serial, Sources: r.sources,
				EncapsulationKeys: keys, Ciphertexts: ciphertexts,
			}
			g.send(r.reply)
			return
		}
	}
	g.abandon(r, err.Error())
}

// reply is E5: the client makes the key and proves that it has it.
func (g *KeyGenerator) reply(m *wire.Reply) {
	r := g.find(func(r *round) bool { return r.serial == m.Serial && r.propose != nil })
	if r == nil || g.tunnel.config.Role != Client {
		return
	}
	if r.reply != nil {
		if r.finish != nil && !r.done {
			g.send(r.finish) // repeated
		}
		return
	}
	if m.Sources&^r.sources != 0 || !g.enough(m.Sources) {
		g.abandon(r, fmt.Sprintf("sources %v are not what the policy requires", m.Sources))
		return
	}
	if m.Sources != r.sources {
		g.note(NoteReduced, wire.Named{Serial: r.serial}, fmt.Sprintf("the peer has only %v", m.Sources))
		if !m.Sources.QKD() {
			r.qkd.Wipe()
			r.qkd = nil
		}
		g.reduce(r, m.Sources)
	}
	r.reply = m
	ciphertexts, err := g.encapsulate(r, m.EncapsulationKeys)
	if err != nil {
		g.doubt(r, kems)
		g.abandon(r, err.Error())
		return
	}
	finish := &wire.Finish{Session: m.Session, Serial: r.serial, Ciphertexts: ciphertexts}
	key, err := g.combine(r, m.Ciphertexts, finish)
	if err != nil {
		g.doubt(r, kems)
		g.abandon(r, err.Error())
		return
	}
	r.key = key
	context := g.context(r, finish)
	finish.Digest = key.Digest(psk.RoleClient, context)
	r.expected = key.Digest(psk.RoleServer, context)
	r.finish = finish
	g.send(finish)
}

// reduce drops the client's key pairs of KEMs that the server left out.
func (g *KeyGenerator) reduce(r *round, sources wire.Sources) {
	kept := r.own[:0]
	own := r.own
	for i := range g.tunnel.config.KEMs {
		if !r.sources.KEM(i) {
			continue
		}
		if sources.KEM(i) {
			kept = append(kept, own[0])
		} else {
			own[0].Wipe()
		}
		own = own[1:]
	}
	r.own, r.sources = kept, sources
}

// finish is E6: the server verifies the client's digest.
func (g *KeyGenerator) finish(m *wire.Finish) {
	r := g.find(func(r *round) bool { return r.serial == m.Serial && r.reply != nil })
	if r == nil || g.tunnel.config.Role != Server {
		g.repeatDone(m)
		return
	}
	if r.key != nil {
		return
	}
	key, err := g.combine(r, m.Ciphertexts, m)
	if err != nil {
		g.abandon(r, err.Error())
		return
	}
	if !psk.EqualDigests(key.Digest(psk.RoleClient, g.context(r, m)), m.Digest) {
		key.Wipe()
		g.abandon(r, digestDiffers)
		return
	}
	r.key, r.finish = key, m
	g.push()
}

// repeatDone answers a repeated Finish: the server's key may be pushed while
// its Done was lost. The client's digest cannot be checked again, so only the
// absence of a round is told.
func (g *KeyGenerator) repeatDone(m *wire.Finish) {
	if g.tunnel.config.Role == Server {
		g.send(&wire.Abandon{Session: m.Session, Serial: m.Serial, Reason: "no such round", High: g.tunnel.high})
	}
}

// doneBy is E7: the client verifies the server's digest.
func (g *KeyGenerator) doneBy(m *wire.Done) {
	r := g.find(func(r *round) bool { return r.serial == m.Serial && r.key != nil })
	if r == nil || r.done || g.tunnel.config.Role != Client {
		return
	}
	if !psk.EqualDigests(r.expected, m.Digest) {
		g.doubt(r, qkd, kems)
		g.abandon(r, digestDiffers)
		return
	}
	r.done = true
	g.push()
}

// combine makes the round's key out of its sources.
func (g *KeyGenerator) combine(r *round, ciphertexts [][]byte, f *wire.Finish) (*psk.Key, error) {
	if len(ciphertexts) != len(r.own) {
		return nil, fmt.Errorf("%d ciphertexts for %d KEMs", len(ciphertexts), len(r.own))
	}
	var secrets []*psk.Key
	defer func() {
		for _, s := range secrets {
			s.Wipe()
		}
	}()
	for i, own := range r.own {
		secret, err := own.Decapsulate(ciphertexts[i])
		if err != nil {
			return nil, fmt.Errorf("decapsulate: %w", err)
		}
		both, err := psk.XOR.Combine([]*psk.Key{secret, r.secrets[i]}, [32]byte{})
		secret.Wipe()
		if err != nil {
			return nil, fmt.Errorf("combine: %w", err)
		}
		secrets = append(secrets, both)
	}
	if r.sources.QKD() {
		secrets = append(secrets, r.qkd.Clone())
	}
	key, err := psk.Combiner(g.tunnel.config.Parameters.Combiner).Combine(secrets, g.transcript(r, f))
	if err != nil {
		return nil, fmt.Errorf("combine: %w", err)
	}
	if g.met.has(key.Fingerprint()) {
		key.Wipe()
		return nil, fmt.Errorf("combine: the key was met before")
	}
	return key, nil
}

func (g *KeyGenerator) transcript(r *round, f *wire.Finish) [32]byte {
	return wire.Transcript(g.tunnel.config.Parameters.Require, r.propose, r.reply, f)
}

func (g *KeyGenerator) context(r *round, f *wire.Finish) psk.DigestContext {
	c := &g.tunnel.config
	context := psk.DigestContext{
		Session: g.tunnel.session, Serial: r.serial, Sources: uint16(r.reply.Sources),
		Transcript: g.transcript(r, f),
	}
	context.ClientSAE, context.ServerSAE = roles(c.Role, c.Parameters.SAE, c.Parameters.PeerSAE)
	context.ClientIdentity, context.ServerIdentity = roles(c.Role, c.Identity, g.tunnel.peer)
	return context
}

// push is E8: verified keys enter the buffer in the order of their serials;
// a serial that is still under way holds back those above it.
func (g *KeyGenerator) push() {
	t := g.tunnel
	for len(g.rounds) > 0 {
		r := g.rounds[0]
		if r.key == nil || r.serial == 0 || t.config.Role == Client && !r.done {
			return
		}
		verified := newRecord(r.serial, r.key.Clone(), r.reply.Sources)
		name := verified.name()
		if g.met.has(name.Fingerprint) { // now: a round beside this one made the same
			verified.key.Wipe()
			g.abandon(r, "the key was met before")
			continue
		}
		if err := t.buffer.push(verified); err != nil {
			g.abandon(r, err.Error())
			continue
		}
		g.met.add(name.Fingerprint)
		if t.config.Role == Server {
			g.send(&wire.Done{Session: t.session, Serial: r.serial, Digest: r.key.Digest(psk.RoleServer, g.context(r, r.finish))})
		}
		g.drop(r)
		g.failures, g.lastError = 0, ""
		g.keys++
		g.lastKey = g.now
		t.changed = true
		g.note(NoteEstablished, name, "verified from "+verified.sources.String())
	}
}

// abandoned is E9: the other end gave a round up.
func (g *KeyGenerator) abandoned(m *wire.Abandon) {
	g.tunnel.raise(m.High)
	r := g.find(func(r *round) bool { return r.serial == m.Serial && r.serial != 0 })
	if r == nil {
		return
	}
	if m.Reason == digestDiffers {
		g.doubt(r, qkd, kems)
	}
	g.fail(r, "the peer says: "+m.Reason)
}

// abandon is E9: this end gives a round up, whole, and says why.
func (g *KeyGenerator) abandon(r *round, reason string) {
	if r.serial != 0 {
		g.turnDown(r, reason)
	}
	g.fail(r, reason)
}

// refuseRound turns a proposal down and says so here as well.
func (g *KeyGenerator) refuseRound(r *round, reason string) {
	g.turnDown(r, reason)
	g.note(NoteAbandoned, wire.Named{Serial: r.serial}, reason)
}

func (g *KeyGenerator) turnDown(r *round, reason string) {
	g.send(&wire.Abandon{Session: g.tunnel.session, Serial: r.serial, Reason: printable(reason), High: g.tunnel.high})
}

// doubt is told of a round of the client in which a source failed that had
// seemed to be well: which of those that may be the culprit, likeliest first.
// Where the digests differed nobody can tell, but a KMS is another party and a
// KEM the peer that has proved itself. The next round does without the first of
// them that may be missing. A round that was only slow gives no cause for doubt:
// whoever delays messages must not choose the sources.
func (g *KeyGenerator) doubt(r *round, culprits ...wire.Sources) {
	if g.tunnel.config.Role != Client || r.reply == nil {
		return
	}
	g.suspect = 0
	for _, s := range culprits {
		if r.sources&s != 0 && g.enough(r.sources&^s) {
			g.suspect = r.sources & s
			return
		}
	}
}

func (g *KeyGenerator) fail(r *round, reason string) {
	g.drop(r)
	g.failures++
	g.lastError = reason
	wait := min(roundBackoff<<min(g.failures-1, 8), roundMaxWait)
	g.notBefore = g.now.Add(g.tunnel.jitter(wait))
	g.note(NoteAbandoned, wire.Named{Serial: r.serial}, reason)
	g.push()
}

// expire gives up rounds that take too long.
func (g *KeyGenerator) expire() {
	for _, r := range slices.Clone(g.rounds) {
		if !slices.Contains(g.rounds, r) {
			continue
		}
		switch age := g.now.Sub(r.since); {
		case age >= roundTimeout:
			g.abandon(r, "no answer in time")
		case age >= patience && g.dispensable(r):
			g.leaveOut(r, r.sources&^qkd, unanswered)
			g.proceed(r)
		}
	}
}

func (g *KeyGenerator) drop(r *round) {
	r.wipe()
	g.rounds = slices.DeleteFunc(g.rounds, func(x *round) bool { return x == r })
}

func (g *KeyGenerator) dropRounds() {
	for _, r := range g.rounds {
		r.wipe()
	}
	g.rounds = nil
}

func (g *KeyGenerator) find(match func(*round) bool) *round {
	for _, r := range g.rounds {
		if match(r) {
			return r
		}
	}
	return nil
}

// sort keeps rounds by serial, those without one last.
func (g *KeyGenerator) sort() {
	slices.SortStableFunc(g.rounds, func(a, b *round) int { return cmp.Compare(a.serial-1, b.serial-1) })
}

func (g *KeyGenerator) send(m wire.Message) { g.out = append(g.out, Send{m}) }

func (g *KeyGenerator) note(k NoteKind, key wire.Named, text string) {
	g.out = append(g.out, Note{k, key, text})
}

// Health is what a KeyGenerator says of itself.
type Health struct {
	Rounds    int       // under way
	Keys      uint64    // established since the start
	LastKey   time.Time // zero: none
	LastError string    // of the last round, empty after a success
}

// Health returns the generator's state for status and metrics.
func (g *KeyGenerator) Health() Health {
	return Health{len(g.rounds), g.keys, g.lastKey, g.lastError}
}

// memory remembers the last values that must not come back.
type memory[T comparable] struct {
	values []T
	next   int
}

func (m *memory[T]) has(v T) bool { return slices.Contains(m.values, v) }

func (m *memory[T]) add(v T) {
	if len(m.values) < remembered {
		m.values = append(m.values, v)
		return
	}
	m.values[m.next] = v
	m.next = (m.next + 1) % remembered
}
