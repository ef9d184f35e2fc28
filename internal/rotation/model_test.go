package rotation

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	"keyturn/internal/psk"
	"keyturn/internal/wire"
)

// A world is one state of the model: a closed world of the real machines of
// both ends, two WireGuard devices, the link, the journals and the KMS. What
// can happen next is an action, and happens at once: time passes only by the
// action tick, by the scope's grain. docs/MODEL.md says what is left out.
type world struct {
	scope *scope
	now   time.Time
	hosts [2]host
	up    [2]bool           // the link, as each end sees it
	queue [2][]wire.Message // on the link, for each end; never changed in place
	stale [2][]wire.Message // of an earlier connection, for each end
	fades int               // grains of time until they are lost
	tries [2]handshake      // WireGuard's, by initiator

	left   int       // faults that may still happen
	broken trouble   // what has failed and not come back
	since  time.Time // when it did
	lost   bool      // a journal went, and no key was confirmed in both since

	ids    uint64 // names given out: random bytes, sessions of WireGuard
	keys   uint64 // given out by the KMS
	ghosts []ghost

	// Of the action under way.
	fuse    int    // effects at the fused end until it crashes; zero: it does not
	fused   int    //
	effects [2]int // that others can see, of each end
	met     bool   // a key came to be confirmed at both ends
	foreign bool   // the message is of another session
	wrong   string // the rule that was broken
	trace   func(format string, args ...any)
}

// trouble is what lasts until it is mended.
type trouble struct {
	link, tunnel    bool // partitioned
	kms, disk, sets [2]bool
}

// host is one end: its WireGuard, its disk, and its rotator while that runs.
type host struct {
	up     bool
	down   time.Time // since when it is not
	tunnel *Tunnel
	gen    *KeyGenerator
	sched  *KeyRotationScheduler

	journal []entry // on disk; never changed in place
	high    uint64
	found   *entry // the PSK found, in the state directory
	device  device

	snapshot *snapshot // that can be put back

	last    uint64    // highest serial committed in the modes window and idle
	used    time.Time // stamp of the handshake of the last commit in mode window
	strange bool      // somebody else's PSK is in WireGuard
	swapped bool      // what is in WireGuard was set by a commit
}

// entry is one key of a journal.
type entry struct {
	serial                  uint64
	print                   psk.Fingerprint
	key                     *psk.Key
	installed               time.Time
	agreed, seen, confirmed bool
}

// snapshot is a copy of an end's journal and PSK; never changed in place.
type snapshot struct {
	journal []entry
	high    uint64
	psk     *psk.Key
	print   psk.Fingerprint
}

// device is WireGuard at one end: one peer.
type device struct {
	psk                     *psk.Key
	print                   psk.Fingerprint
	current, next, previous session // as WireGuard's key pairs
	stamp                   time.Time
	rx, tx                  uint64
	trying                  bool
	tried                   time.Time // last initiation, or answer to one
	unheard                 time.Time // since when data was sent and nothing came
}

type session struct {
	id        uint64
	birth     time.Time
	initiator int
	print     psk.Fingerprint // under which it was made
}

// handshake is an attempt under way.
type handshake struct {
	at    arrival
	void  bool // given up by its initiator
	id    uint64
	print psk.Fingerprint // the PSK that the responder read
}

// arrival is what arrives next of a handshake.
type arrival uint8

const (
	message1 arrival = iota + 1 // the responder reads its PSK
	message2                    // the initiator reads its own, and has a session
	data                        // the responder has one as well, and stamps
)

// ghost is what the model remembers of a key to judge it by.
type ghost struct {
	print     psk.Fingerprint
	verified  [2]bool // the KeyGenerator said so
	set       [2]bool // WireGuard took it
	used      [2]bool // a handshake was made under it
	confirmed [2]bool
	erased    [2]bool
}

const (
	client = 0
	server = 1
)

var endNames = [2]string{"client", "server"}

var errModel = errors.New("fault")

func (s *session) live(now time.Time) bool { return s.id != 0 && now.Sub(s.birth) < SessionLife }

func (d *device) knows(id uint64) bool {
	return id == d.current.id || id == d.next.id || id == d.previous.id
}

// Read gives out bytes that never come again, but for the jitter, which is
// always the same.
func (w *world) Read(b []byte) (int, error) {
	clear(b)
	if len(b) > 4 {
		w.ids++
		binary.LittleEndian.PutUint64(b, w.ids)
	}
	return len(b), nil
}

var _ io.Reader = (*world)(nil)

func (w *world) fail(format string, args ...any) {
	if w.wrong == "" {
		w.wrong = fmt.Sprintf(format, args...)
		w.tell("VIOLATION: %s", w.wrong)
	}
}

func (w *world) tell(format string, args ...any) {
	if w.trace != nil {
		w.trace(format, args...)
	}
}

// ghost returns what is remembered of a key.
func (w *world) ghost(p psk.Fingerprint) *ghost {
	for i := range w.ghosts {
		if w.ghosts[i].print == p {
			return &w.ghosts[i]
		}
	}
	w.ghosts = append(w.ghosts, ghost{print: p})
	return &w.ghosts[len(w.ghosts)-1]
}

// key returns the KMS's n-th key.
func modelKey(kind byte, n uint64) *psk.Key {
	var b [psk.Size]byte
	b[0] = kind
	binary.BigEndian.PutUint64(b[1:], n)
	k, _ := psk.New(b[:])
	return k
}

// newWorld returns a tunnel with a young session under the PSK found, and two
// rotators that have just been started for the first time.
func newWorld(s *scope, root int) *world {
	w := &world{scope: s, now: time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC), left: s.budget, broken: s.dark}
	found := modelKey(1, 1)
	w.ids++
	first := session{w.ids, w.now, client, found.Fingerprint()}
	for e := range w.hosts {
		w.hosts[e].device = device{psk: found, print: found.Fingerprint(), current: first, stamp: w.now}
	}
	if s.roots != nil {
		s.roots[root](w)
	}
	for _, e := range []int{server, client} {
		if w.hosts[e].down.IsZero() {
			w.start(e)
		}
	}
	w.now = w.now.Add(moment)
	return w
}

func (w *world) original() psk.Fingerprint { return modelKey(1, 1).Fingerprint() }

// start starts a rotator.
func (w *world) start(e int) {
	h, s := &w.hosts[e], w.scope
	c := Config{
		Role:       Client,
		Parameters: wire.Parameters{Version: wire.Version, SAE: "a", PeerSAE: "b", QKD: true, Buffer: 1, Window: 30 * time.Second},
		Heartbeat:  2 * time.Second, MaxKeyAge: 1000 * time.Hour, Fallback: s.fallback, Inside: s.inside, Random: w, Identity: [32]byte{byte(e + 1)},
	}
	if e == server {
		c.Role = Server
		c.Parameters.SAE, c.Parameters.PeerSAE = "b", "a"
	}
	_, _ = w.Read(c.Boot[:])
	w.tell("%s: starts", endNames[e])
	h.up, h.down = true, time.Time{}
	h.tunnel = NewTunnel(c)
	j := Journal{High: h.high}
	if h.found != nil && (len(h.journal) == 0 || h.journal[0].serial != 0) {
		j.Entries = append(j.Entries, h.found.restored())
	}
	for i := range h.journal {
		j.Entries = append(j.Entries, h.journal[i].restored())
	}
	h.tunnel.Restore(j, w.now, w.now)
	h.gen = NewKeyGenerator(h.tunnel)
	h.sched = NewKeyRotationScheduler(h.tunnel)
	w.dump(e)
	h.last = h.sched.View().Installed.Serial
}

func (x *entry) restored() Entry {
	return Entry{Serial: x.serial, Key: x.key.Clone(), Installed: x.installed, Agreed: x.agreed, Seen: x.seen, Confirmed: x.confirmed}
}

// crash ends a rotator as kill -9 does. The other end hears of it.
func (w *world) crash(e int) {
	h := &w.hosts[e]
	w.tell("%s: crashes", endNames[e])
	if h.up {
		h.down = w.now
	}
	h.up, h.tunnel, h.gen, h.sched = false, nil, nil, nil
	w.up[e], w.stale[e] = false, nil
	w.drop()
	w.hear(1 - e)
}

// reboot restarts a host: WireGuard comes up with its own configuration, and
// the run directory is empty.
func (w *world) reboot(e int) {
	h := &w.hosts[e]
	w.crash(e)
	w.reset(e, modelKey(1, 1))
	if w.scope.persists {
		return
	}
	h.journal, h.high, h.last = nil, 0, 0
	w.lost = true
	for i := range w.ghosts {
		w.ghosts[i].erased[e], w.ghosts[i].confirmed[e] = false, false
	}
}

// photograph copies what is kept at an end.
func (w *world) photograph(e int) {
	h := &w.hosts[e]
	h.snapshot = &snapshot{h.journal, h.high, h.device.psk, h.device.print}
}

// putBack makes a host what it was at its snapshot, and boots it: WireGuard
// comes up with the PSK of then, the rotator with the journal. Nothing that was
// confirmed before counts, at either end: the end has forgotten it, or may have.
func (w *world) putBack(e int) {
	h := &w.hosts[e]
	w.crash(e)
	w.reset(e, h.snapshot.psk)
	h.journal, h.high, h.last = h.snapshot.journal, h.snapshot.high, 0
	h.snapshot = nil
	w.lost = true
	for i := range w.ghosts {
		g := &w.ghosts[i]
		x := h.entry(g.print)
		g.set[e] = g.print == h.device.print || x != nil && !x.installed.IsZero()
		g.erased[e], g.confirmed = false, [2]bool{}
	}
}

// foreignPSK is "wg set" by somebody else.
func (w *world) foreignPSK(e int) {
	h := &w.hosts[e]
	if h.device.print == w.original() {
		w.lost = true // before the first rotation nothing says which is the right one
	}
	w.ids++
	h.device.psk = modelKey(3, w.ids)
	h.device.print = h.device.psk.Fingerprint()
	h.strange, h.swapped = true, false
}

// reset is WireGuard made anew, with the PSK of its own configuration.
func (w *world) reset(e int, k *psk.Key) {
	w.hosts[e].device = device{psk: k, print: k.Fingerprint()}
	w.hosts[e].used = time.Time{}
	w.hosts[e].strange, w.hosts[e].swapped = false, false
	w.tries = [2]handshake{}
}

// drop loses what is on the link.
func (w *world) drop() { w.queue = [2][]wire.Message{} }

// hear tells an end that its link has gone.
func (w *world) hear(e int) {
	if w.up[e] {
		w.up[e] = false
		w.both(e, LinkDown{})
	}
}

func (w *world) both(e int, ev Event) {
	w.step(e, true, ev)
	w.step(e, false, ev)
}

// works says whether the tunnel carries packets both ways.
func (w *world) works() bool {
	a, b := &w.hosts[client].device, &w.hosts[server].device
	return !w.broken.tunnel && a.current.live(w.now) && b.current.live(w.now) && a.knows(b.current.id) && b.knows(a.current.id)
}

// reachable says whether a connection can be made and carries messages.
func (w *world) reachable() bool { return !w.broken.link && (!w.scope.inside || w.works()) }

// inStep says whether both ends have the same PSK.
func (w *world) inStep() bool { return w.hosts[client].device.print == w.hosts[server].device.print }

// forget drops the sessions that no packet can come under any more.
func (w *world) forget() {
	for e := range w.hosts {
		d, theirs := &w.hosts[e].device, w.hosts[1-e].device.current.id
		if d.previous.id != theirs {
			d.previous = session{}
		}
		if id := d.next.id; id != theirs && id != w.tries[0].id && id != w.tries[1].id {
			d.next = session{}
		}
	}
}

// good is what calm must lead to: the ends hold the same key, a handshake has
// succeeded, and none is overdue.
func (w *world) good() bool {
	const overdue = RekeyAfter + 10*time.Second
	return w.hosts[client].up && w.hosts[server].up && w.broken == w.scope.dark && w.works() && w.inStep() &&
		w.now.Sub(w.hosts[client].device.current.birth) < overdue
}

// pass lets the scope's grain of time pass: timers, WireGuard's traffic, dumps,
// the dialler.
func (w *world) pass() {
	w.now = w.now.Add(w.scope.grain - moment)
	if w.fades--; w.fades <= 0 {
		w.fades, w.stale = 0, [2][]wire.Message{}
	}
	w.traffic()
	for e := range w.hosts {
		if w.hosts[e].up {
			w.dump(e)
		}
	}
	w.now = w.now.Add(moment)
	for e := range w.hosts {
		h := &w.hosts[e]
		if h.up {
			if t, ok := h.gen.Deadline(); ok && !t.After(w.now) {
				w.step(e, true, Tick{})
			}
		}
		if h.up {
			if t, ok := h.sched.Deadline(); ok && !t.After(w.now) {
				w.step(e, false, Tick{})
			}
		}
	}
	if !w.up[client] && w.hosts[client].up && w.hosts[server].up && w.reachable() {
		w.connect()
	}
}

func (w *world) connect() {
	w.tell("link up")
	w.drop()
	w.hear(server) // a half-open one is replaced
	w.up = [2]bool{true, true}
	w.both(server, LinkUp{Peer: [32]byte{1}, Inside: w.scope.inside})
	if w.up[client] { // unless the server crashed over it
		w.both(client, LinkUp{Peer: [32]byte{2}, Inside: w.scope.inside})
	}
}

// dump shows an end its device.
func (w *world) dump(e int) {
	d := &w.hosts[e].device
	w.step(e, false, Observed{Began: w.now, Wall: w.now, Present: true, PSK: d.psk, Handshake: d.stamp, Rx: d.rx, Tx: d.tx})
}

// moment is what lies between the dumps of a grain of time and all else that
// happens in it: a dump never shows what came after it.
const moment = time.Millisecond

// job is an event for one of an end's machines.
type job struct {
	generator bool
	event     Event
}

// step hands a machine an event and carries out what comes of it, the answers
// and the other machine's ticks included, as the daemon does under its lock.
func (w *world) step(e int, generator bool, ev Event) {
	h := &w.hosts[e]
	jobs := []job{{generator, ev}}
	for n := 0; len(jobs) > 0 && h.up; n++ {
		if n > 100 {
			w.fail("%s: a step causes another without end (8.8)", endNames[e])
			return
		}
		j := jobs[0]
		jobs = jobs[1:]
		var effects []Effect
		if j.generator {
			effects = h.gen.Step(w.now, j.event)
		} else {
			effects = h.sched.Step(w.now, j.event)
		}
		for _, f := range effects {
			if jobs = append(jobs, w.carry(e, f, j.generator)...); !h.up {
				return
			}
		}
	}
}

// carry carries an effect out and returns what it leads to.
func (w *world) carry(e int, f Effect, generator bool) []job {
	var next []job
	switch f := f.(type) {
	case Send:
		w.send(e, f.Message)
	case CloseLink:
		w.tell("%s: closes the link", endNames[e])
		w.drop()
		if w.up[e] = false; w.reachable() {
			w.hear(1 - e)
		}
		return []job{{true, LinkDown{}}, {false, LinkDown{}}}
	case Fetch:
		return []job{{true, w.fetch(e, f)}}
	case Save:
		next = []job{{false, Saved{Token: f.Token, Err: w.save(e, f.Journal)}}}
	case SetPSK:
		next = []job{{false, Set{Token: f.Token, Err: w.set(e, f.Key)}}}
	case Renew:
		d, theirs := &w.hosts[e].device, &w.hosts[1-e].device
		if x := theirs.current; x.live(w.now) && d.knows(x.id) {
			w.fail("%s: makes the peer anew, though the other end has a session with it (W3)", endNames[e])
		}
		w.tell("%s: makes the peer anew", endNames[e])
		*d, w.tries = device{psk: d.psk, print: d.print}, [2]handshake{}
		next = []job{{false, Set{Token: f.Token}}}
	case Probe:
		w.tell("%s: probes the tunnel", endNames[e])
		w.packet(e)
		return nil
	case Wake:
		return []job{{!generator, Tick{}}}
	case Note:
		w.note(e, f)
		return nil
	default: // Poll: every grain has a dump. Redial: a second connection is only faster than the four intervals
		return nil
	}
	w.effects[e]++
	if w.fuse > 0 && w.fused == e {
		if w.fuse--; w.fuse == 0 {
			w.crash(e)
		}
	}
	return next
}

func (w *world) fetch(e int, f Fetch) Fetched {
	out := Fetched{ID: f.ID, KeyID: f.KeyID}
	switch {
	case w.broken.kms[e]:
		out.Err = errModel
	case f.KeyID == "":
		w.keys++
		out.KeyID = fmt.Sprint(w.keys)
		out.Key = modelKey(2, w.keys)
	default:
		var n uint64
		_, _ = fmt.Sscan(f.KeyID, &n)
		out.Key = modelKey(2, n)
	}
	return out
}

func (w *world) send(from int, m wire.Message) {
	if !w.up[from] || !w.up[1-from] {
		return
	}
	w.tell("%s -> %s: %v", endNames[from], endNames[1-from], m)
	w.checkSend(from, m)
	q := w.queue[1-from]
	w.queue[1-from] = append(q[:len(q):len(q)], m)
}

// receive hands an end a message.
func (w *world) receive(e int, m wire.Message) {
	id, ok := sessionOf(m)
	w.foreign = ok && id != w.hosts[e].tunnel.session
	switch m.(type) {
	case *wire.Commit, *wire.Committed, *wire.Refused, *wire.Bye:
		w.step(e, false, Received{m})
	case *wire.Report:
		w.step(e, true, Received{m})
		if w.hosts[e].up {
			w.step(e, false, Received{m})
		}
	default:
		w.step(e, true, Received{m})
	}
	w.foreign = false
}

// sessionOf returns the session that a message names, but for a bootstrap's.
func sessionOf(m wire.Message) (wire.SessionID, bool) {
	switch m := m.(type) {
	case *wire.Propose:
		return m.Session, true
	case *wire.Reply:
		return m.Session, true
	case *wire.Finish:
		return m.Session, true
	case *wire.Done:
		return m.Session, true
	case *wire.Abandon:
		return m.Session, true
	case *wire.Commit:
		return m.Session, true
	case *wire.Committed:
		return m.Session, true
	case *wire.Refused:
		return m.Session, true
	case *wire.Report:
		return m.Session, true
	case *wire.Bye:
		return m.Session, true
	}
	return wire.SessionID{}, false
}

// save writes a journal.
func (w *world) save(e int, j Journal) error {
	h := &w.hosts[e]
	if w.broken.disk[e] {
		return errModel
	}
	if w.foreign {
		w.fail("%s: a message of another session changes the journal (8.7)", endNames[e])
	}
	old := h.journal
	h.journal, h.high = make([]entry, len(j.Entries)), j.High
	for i, x := range j.Entries {
		h.journal[i] = entry{x.Serial, x.Key.Fingerprint(), x.Key, x.Installed, x.Agreed, x.Seen, x.Confirmed}
		if x.Serial == 0 && w.scope.fallback && h.found == nil {
			f := h.journal[i]
			h.found = &f
		}
	}
	w.checkSave(e, old)
	return nil
}

// set puts a PSK into WireGuard.
func (w *world) set(e int, k *psk.Key) error {
	h := &w.hosts[e]
	if w.broken.sets[e] {
		return errModel
	}
	w.tell("%s: sets %v", endNames[e], k.Fingerprint())
	if w.foreign {
		w.fail("%s: a message of another session sets a PSK (8.7)", endNames[e])
	}
	h.device.psk, h.device.print = k, k.Fingerprint()
	h.strange, h.swapped = false, false
	w.checkSet(e)
	w.ghost(h.device.print).set[e] = true
	return nil
}

// traffic is what WireGuard does while a grain of time passes: data both ways,
// new handshakes, retries.
func (w *world) traffic() {
	for e := range w.hosts {
		d := &w.hosts[e].device
		if d.trying && w.now.Sub(d.tried) >= 5*time.Second {
			w.initiate(e)
		}
		w.packet(e)
	}
}

// packet is data that is handed to WireGuard at an end.
func (w *world) packet(e int) {
	d, p := &w.hosts[e].device, &w.hosts[1-e].device
	if !d.current.live(w.now) {
		d.current = session{}
		if w.scope.lossless {
			w.fail("a packet of the tunnel is lost")
		}
		w.initiate(e)
		return
	}
	if d.current.initiator == e && w.now.Sub(d.current.birth) >= RekeyAfter {
		w.initiate(e)
	}
	if d.unheard.IsZero() {
		d.unheard = w.now
	} else if w.now.Sub(d.unheard) >= 15*time.Second {
		w.initiate(e)
	}
	d.tx += 128
	if w.broken.tunnel || !p.knows(d.current.id) {
		return
	}
	p.rx += 128
	p.unheard = time.Time{}
	w.adopt(1-e, d.current.id)
	if p.current.live(w.now) && d.knows(p.current.id) {
		d.unheard = time.Time{} // an answer, or a keepalive
	}
}

// adopt is the responder's end of a handshake: the first packet of the new
// session proves it.
func (w *world) adopt(e int, id uint64) {
	d := &w.hosts[e].device
	if d.next.id == 0 || d.next.id != id {
		return
	}
	d.previous, d.current, d.next = d.current, d.next, session{}
	d.stamp, d.trying = w.now, false
	w.ghost(d.current.print).used[e] = true
}

// initiate sends message 1, at most every 5 s.
func (w *world) initiate(e int) {
	d := &w.hosts[e].device
	if !d.tried.IsZero() && w.now.Sub(d.tried) < 5*time.Second {
		return
	}
	d.tried, d.trying = w.now, true
	d.tx += 148
	w.tries[e] = handshake{}
	if !w.broken.tunnel {
		w.ids++
		w.tries[e] = handshake{at: message1, id: w.ids}
	}
}

// shake lets the next message of a handshake arrive.
func (w *world) shake(initiator int) {
	t := &w.tries[initiator]
	d, p := &w.hosts[initiator].device, &w.hosts[1-initiator].device
	if w.broken.tunnel {
		*t = handshake{}
		return
	}
	switch t.at {
	case message1:
		p.rx += 148
		p.tx += 92
		// There is one handshake state for each peer: answering gives up an
		// initiation of one's own, and counts for the limit of one in 5 s.
		w.tries[1-initiator].void = true
		p.tried = w.now
		t.at, t.print = message2, p.print
		p.next = session{t.id, w.now, initiator, p.print}
	case message2:
		if t.void || d.print != t.print {
			w.tell("handshake by %s fails", endNames[initiator])
			if w.left == w.scope.budget && w.scope.roots == nil {
				w.fail("a handshake fails although nothing does")
			}
			*t = handshake{}
			return
		}
		w.tell("handshake by %s under %v", endNames[initiator], t.print)
		d.rx += 92
		d.trying, d.unheard = false, time.Time{}
		d.previous, d.current, d.next = d.current, session{t.id, w.now, initiator, d.print}, session{}
		d.stamp = w.now
		w.ghost(t.print).used[initiator] = true
		t.at = data
	case data:
		p.rx += 32
		if p.next.id == t.id {
			w.adopt(1-initiator, t.id)
		}
		*t = handshake{}
	}
}

// note takes in what a machine says of its keys.
func (w *world) note(e int, n Note) {
	w.tell("%s: %v %v %s", endNames[e], n.Kind, n.Key, n.Text)
	switch n.Kind {
	case NoteEstablished:
		w.ghost(n.Key.Fingerprint).verified[e] = true
	case NoteInstalled:
		h := &w.hosts[e]
		if n.Text != wire.ModeRepair.String() && n.Key.Serial <= h.last {
			w.fail("%s: serial %d is committed after %d (8.2)", endNames[e], n.Key.Serial, h.last)
		}
		h.last = n.Key.Serial
	case NoteHunting:
		w.hosts[e].last = n.Key.Serial
	case NoteConfirmed:
		g := w.ghost(n.Key.Fingerprint)
		if g.confirmed[e] = true; g.confirmed[1-e] {
			w.met = true
		}
		if g.used != [2]bool{true, true} {
			w.fail("%s: %v is confirmed without a handshake under it (C5)", endNames[e], n.Key)
		}
	}
}

// entry returns the journal's entry of a key, nil if there is none.
func (h *host) entry(p psk.Fingerprint) *entry {
	i := slices.IndexFunc(h.journal, func(x entry) bool { return x.print == p })
	if i < 0 {
		return nil
	}
	return &h.journal[i]
}
