package rotationtest

import (
	"fmt"
	"time"

	"keyturn/internal/psk"
	"keyturn/internal/rotation"
	"keyturn/internal/wire"
)

// Link is the connection between the rotators.
type Link struct {
	Cut   bool // partitioned: silence, and no new connection
	Lose  int  // one message in Lose is lost on a standing connection
	Twice int  // one in Twice comes twice
	Late  int  // one in Late is delayed by up to 5 s, and overtaken

	delay   time.Duration
	up      [2]bool
	number  int          // of the connection
	waiting [2][]sent    // in Manual: for each end
	busy    [2]time.Time // keeps the order of each direction
	holed   int          // number of a connection that lost a message
	stale   int          // and of one that carries nothing any more
}

type sent struct {
	message wire.Message
	number  int
}

func (l *Link) send(w *World, from int, m wire.Message) {
	to := 1 - from
	if !l.up[from] {
		return
	}
	m = w.Ends[from].behindhand(m)
	b, err := wire.Encode(m)
	if err != nil {
		w.fail("%s: %v", names[from], err)
		return
	}
	m, err = wire.Decode(b)
	if err != nil {
		w.fail("%s sent what cannot be decoded: %v", names[from], err)
		return
	}
	if _, heartbeat := m.(*wire.Report); !heartbeat || w.Manual {
		w.trace("%s -> %s: %v", names[from], names[to], m)
	}
	if l.number == l.stale {
		return
	}
	if w.Manual {
		l.waiting[to] = append(l.waiting[to], sent{m, l.number})
		return
	}
	if w.Inside && !l.Cut {
		w.data(w.Ends[from], false) // as much as the link's bytes are to WireGuard
	}
	if w.draw(l.Lose) {
		l.holed = l.number
		return
	}
	times := 1
	if w.draw(l.Twice) {
		times = 2
	}
	for range times {
		at := w.Now.Add(l.delay)
		if w.draw(l.Late) {
			at = at.Add(time.Duration(w.rng.IntN(5000)) * time.Millisecond)
		} else if l.Late == 0 {
			if at.Before(l.busy[to]) {
				at = l.busy[to]
			}
			l.busy[to] = at
		}
		number := l.number
		w.after(at.Sub(w.Now), func() {
			switch {
			case l.number != number:
			case !l.up[to]:
				if w.Ends[to].up && w.linkWorks() {
					w.after(l.delay, func() { l.reset(w, from, number) }) // nobody there has this connection
				}
			case !w.linkWorks():
				l.holed = number
			default:
				w.Ends[to].receive(m)
			}
		})
	}
}

// Deliver hands the oldest message that waits for an end to it (Manual). It
// reports whether there was one.
func (w *World) Deliver(to int) bool {
	l := &w.Link
	for len(l.waiting[to]) > 0 {
		s := l.waiting[to][0]
		l.waiting[to] = l.waiting[to][1:]
		if s.number == l.number && l.up[to] {
			w.Ends[to].receive(s.message)
			return true
		}
	}
	return false
}

// Lose drops the oldest message that waits for an end (Manual).
func (w *World) Lose(to int) (wire.Message, bool) {
	l := &w.Link
	if len(l.waiting[to]) == 0 {
		return nil, false
	}
	m := l.waiting[to][0].message
	l.waiting[to] = l.waiting[to][1:]
	return m, true
}

// Repeat puts a copy of the oldest message that waits for an end behind it.
func (w *World) Repeat(to int) bool {
	l := &w.Link
	if len(l.waiting[to]) == 0 {
		return false
	}
	first := l.waiting[to][0]
	b, err := wire.Encode(first.message)
	if err != nil {
		return false
	}
	again, err := wire.Decode(b)
	if err != nil {
		return false
	}
	l.waiting[to] = append([]sent{first, {again, first.number}}, l.waiting[to][1:]...)
	return true
}

// Swap lets the second message that waits for an end overtake the first.
func (w *World) Swap(to int) bool {
	l := &w.Link
	if len(l.waiting[to]) < 2 {
		return false
	}
	l.waiting[to][0], l.waiting[to][1] = l.waiting[to][1], l.waiting[to][0]
	return true
}

// Inject hands a message to an end as if it had come from the peer.
func (w *World) Inject(to int, m wire.Message) { w.Ends[to].receive(m) }

// Stale lets the connection carry nothing any more, of which no end hears, as
// when a machine is put back to a snapshot of all its memory.
func (w *World) Stale() {
	w.Link.stale = w.Link.number
	w.Link.waiting = [2][]sent{}
}

// Redial breaks the connection and makes a new one at once.
func (w *World) Redial() {
	w.Link.drop(w)
	w.connect()
}

func (w *World) linkWorks() bool {
	return !w.Link.Cut && (!w.Inside || w.tunnelWorks())
}

// dial tries every two seconds, for ever, as the client's link does; in Manual
// only until the first connection.
func (w *World) dial() {
	if !w.Link.up[Client] && w.Ends[Client].up && !w.Ends[Client].asleep && (!w.Manual || w.Link.number == 0) {
		if w.Inside && !w.Link.Cut {
			w.data(w.Ends[Client], false)
		}
		if w.Ends[Server].up && !w.Ends[Server].asleep && w.linkWorks() {
			w.connect()
		}
	}
	w.after(time.Second+time.Duration(w.rng.IntN(1000))*time.Millisecond, w.dial)
}

// attempt is one to make a second connection.
type attempt struct{ number int } // of the one that stands

// beside is the client's second connection (L5): made three round trips later,
// if the network lets it, unless it was given up. In Manual it never is.
func (w *World) beside(e *End) {
	a := &attempt{w.Link.number}
	e.second = a
	if w.Inside && !w.Link.Cut {
		w.data(e, false)
	}
	if w.Manual {
		return
	}
	w.after(6*w.Link.delay, func() {
		if e.second != a {
			return
		}
		e.second = nil
		server := w.Ends[Server]
		if w.Link.number == a.number && e.up && !e.asleep && server.up && !server.asleep && w.linkWorks() {
			w.connect()
		}
	})
}

func (w *World) connect() {
	l := &w.Link
	l.number++
	w.trace("link up")
	for _, to := range []int{Server, Client} {
		e := w.Ends[to]
		if l.up[to] { // a half-open one is replaced
			l.up[to] = false
			e.both(rotation.LinkDown{})
		}
	}
	l.up = [2]bool{true, true}
	l.waiting = [2][]sent{}
	w.Ends[Server].both(rotation.LinkUp{Peer: identity(Client), Inside: w.Inside})
	if l.up[Client] { // unless the server crashed over it
		w.Ends[Client].both(rotation.LinkUp{Peer: identity(Server), Inside: w.Inside})
	}
}

func (e *End) both(ev rotation.Event) {
	e.generator(ev)
	e.scheduler(ev)
}

// reset is what an end hears that sends into a connection of which the other
// host, switched off meanwhile, knows nothing.
func (l *Link) reset(w *World, end, number int) {
	if l.number == number && l.up[end] && w.linkWorks() {
		l.up[end] = false
		w.Ends[end].both(rotation.LinkDown{})
	}
}

// close ends one end's side; the other hears of it if the network lets it.
func (l *Link) close(w *World, by int) {
	if !l.up[by] {
		return
	}
	number := l.number
	down := func(end int) func() {
		l.up[end] = false
		return func() {
			if l.number == number { // otherwise a new connection has replaced it
				w.Ends[end].both(rotation.LinkDown{})
			}
		}
	}
	w.after(0, down(by))
	if to := 1 - by; w.linkWorks() && l.up[to] {
		w.after(l.delay, down(to))
	}
}

// heal is TCP's promise: a connection that has lost a message does not go on
// without it. The world lets it, for as long as the fault lasts.
func (l *Link) heal(w *World) {
	if l.holed == l.number && l.Lose == 0 && w.linkWorks() {
		l.holed = 0
		l.drop(w)
	}
}

// drop ends the connection at both ends, unless a partition hides it.
func (l *Link) drop(w *World) {
	for i, e := range w.Ends {
		if l.up[i] && (!e.up || w.linkWorks()) {
			l.up[i] = false
			if e.up {
				e.both(rotation.LinkDown{})
			}
		}
	}
}

// Network is what carries WireGuard's packets.
type Network struct {
	Cut  bool
	Loss int // one packet in Loss is lost

	delay time.Duration

	Sent, Lost      int // pings
	Failed          int // handshakes that got no answer in 5 s, after the first session
	Handshakes      int
	established     bool
	lastEstablished time.Time
}

// device is WireGuard's view of the peer.
type device struct {
	psk      *psk.Key
	session  *session
	stamp    time.Time
	rx, tx   uint64
	trying   int // attempt under way; zero: none
	tried    time.Time
	unheard  time.Time // first data sent since anything was heard
	attempts uint64
	pending  uint64    // attempt that message 2 may answer; zero: none, or overwritten by the peer's message 1
	life     int       // packets under way to an earlier one are lost
	heard    time.Time // when, by the other end's clock, its last initiation was made
	kept     time.Time // when the last keepalive was sent
}

type session struct {
	birth     time.Time
	initiator int
	known     [2]bool
}

// reset is WireGuard without any memory but the configured PSK.
func (e *End) reset() { e.forgetPeer(e.original) }

// forgetPeer is a peer that is removed and added again.
func (e *End) forgetPeer(k *psk.Key) {
	for _, x := range e.world.Ends {
		if s := x.device.session; s != nil {
			s.known[e.index] = false
		}
	}
	e.device = device{psk: k.Clone(), life: e.device.life + 1}
}

func (s *session) live(now time.Time) bool {
	return s != nil && now.Sub(s.birth) < rotation.SessionLife
}

func (w *World) pass() bool { return !w.Tunnel.Cut && !w.draw(w.Tunnel.Loss) }

func (w *World) tunnelWorks() bool {
	for _, e := range w.Ends {
		if s := e.device.session; e.Gone || e.asleep || !s.live(w.Now) || !s.known[1-e.index] {
			return false
		}
	}
	return !w.Tunnel.Cut
}

// Works reports whether the tunnel carries packets now.
func (w *World) Works() bool { return w.tunnelWorks() }

// Behind reports whether WireGuard at either end refuses what the other begins,
// whose clock has gone back.
func (w *World) Behind() bool {
	for i, e := range w.Ends {
		if w.Ends[1-i].device.heard.After(e.wall()) {
			return true
		}
	}
	return false
}

// Outage runs for d and returns for how long at most the tunnel did not carry
// packets.
func (w *World) Outage(d time.Duration) (longest time.Duration) {
	down := time.Duration(0)
	const step = 100 * time.Millisecond
	for range d / step {
		w.Run(step)
		if down += step; w.Reachable() {
			down = 0
		}
		longest = max(longest, down)
	}
	return longest
}

// Reachable reports whether the tunnel carries packets, where it is idle with
// the help of a packet that makes it try.
func (w *World) Reachable() bool {
	if w.Idle && !w.tunnelWorks() {
		w.data(w.Ends[Client], false)
	}
	return w.tunnelWorks()
}

// data is one packet handed to WireGuard at an end.
func (w *World) data(e *End, ping bool) {
	d := &e.device
	if e.Gone || e.asleep {
		return
	}
	n := &w.Tunnel
	if ping && n.established {
		n.Sent++
	}
	counts := ping && n.established
	lost := func() {
		if counts {
			n.Lost++
			w.trace("packet from %s lost", names[e.index])
		}
	}
	life := d.life
	if !d.session.live(w.Now) {
		d.session = nil
		w.initiate(e)
		// WireGuard keeps it until there is a session; whoever sent it waits
		// for a second.
		w.after(time.Second, func() {
			if d := &e.device; d.life != life || !d.session.live(w.Now) {
				lost()
			}
		})
		return
	}
	w.refresh(e)
	if d.unheard.IsZero() {
		d.unheard = w.Now
		w.after(15*time.Second, func() {
			if e.device.life == life && e.device.unheard.Equal(w.Now.Add(-15*time.Second)) && !e.Gone && !e.asleep {
				e.device.unheard = time.Time{} // the next packet sets the timer again
				w.initiate(e)
			}
		})
	}
	d.tx += 128
	s := d.session
	if !w.pass() {
		lost()
		return
	}
	peer := w.Ends[1-e.index]
	theirs := peer.device.life
	w.after(n.delay, func() {
		p := &peer.device
		if !s.live(w.Now) || !s.known[peer.index] || peer.Gone || peer.asleep || p.life != theirs {
			lost()
			return
		}
		if p.session == nil || s.birth.After(p.session.birth) { // the responder's first packet of a new session
			p.adopt(s, peer.wall())
		}
		p.rx += 128
		p.unheard = time.Time{}
		if d.session == s {
			d.unheard = time.Time{} // the answer, or a keepalive
		}
		if w.Listens[peer.index] && w.Now.Sub(p.kept) >= 10*time.Second {
			p.kept = w.Now
			p.tx += 32
			d.rx += 32
			w.refresh(peer)
		}
	})
}

// refresh is what the initiator of a session does whenever it sends.
func (w *World) refresh(e *End) {
	if s := e.device.session; s != nil && s.initiator == e.index && w.Now.Sub(s.birth) >= rotation.RekeyAfter {
		w.initiate(e)
	}
}

// adopt is the responder's end of a handshake: the first packet of the new
// session proves it, and ends an attempt of its own.
func (d *device) adopt(s *session, wall time.Time) {
	d.session, d.stamp = s, wall
	d.trying, d.pending = 0, 0
}

// initiate starts a handshake unless one is under way.
func (w *World) initiate(e *End) {
	d := &e.device
	if d.trying != 0 || w.Now.Sub(d.tried) < 5*time.Second {
		return
	}
	d.trying = 1
	w.message1(e)
}

// Handshake provokes a handshake at an end, as SendHandshakeInitiation does.
func (w *World) Handshake(end int) {
	e := w.Ends[end]
	e.device.trying, e.device.tried = 1, time.Time{}
	w.message1(e)
}

func (w *World) message1(e *End) {
	d, n := &e.device, &w.Tunnel
	d.tried = w.Now
	d.tx += 148
	d.attempts++
	attempt := d.attempts
	d.pending = attempt
	retry := 5*time.Second + time.Duration(w.rng.IntN(333))*time.Millisecond
	w.after(retry, func() {
		if d.trying == 0 || d.attempts != attempt || e.Gone {
			return
		}
		if e.asleep {
			d.trying = 0 // the next packet begins anew
			return
		}
		if n.established {
			n.Failed++
			w.trace("handshake by %s fails", names[e.index])
		}
		if d.trying++; d.trying > 18 {
			d.trying = 0
			return
		}
		w.message1(e)
	})
	if !w.pass() {
		return
	}
	peer := w.Ends[1-e.index]
	p := &peer.device
	mine, theirs := d.life, p.life
	made := e.wall()
	gone := func() bool {
		return d.life != mine || p.life != theirs || e.Gone || peer.Gone || e.asleep || peer.asleep
	}
	w.after(n.delay, func() {
		if gone() {
			return
		}
		if !made.After(p.heard) {
			return // a replay, or made by a clock that has gone back: not even counted
		}
		p.heard = made
		p.rx += 148
		p.tx += 92
		responder := p.psk.Fingerprint() // the responder reads its PSK here
		// There is one handshake state for each peer: answering gives up an
		// initiation of one's own, and counts as one for the limit of one in 5 s.
		p.pending, p.tried = 0, w.Now
		s := &session{initiator: e.index}
		s.birth = w.Now
		s.known[peer.index] = true
		if !w.pass() {
			return
		}
		w.after(n.delay, func() {
			if d.trying == 0 || d.pending != attempt || gone() || d.psk.Fingerprint() != responder {
				return
			}
			s.known[e.index] = true
			d.rx += 92
			d.trying, d.pending = 0, 0
			d.session = s
			d.stamp = e.wall()
			d.unheard = time.Time{}
			n.established = true
			n.lastEstablished = w.Now
			n.Handshakes++
			w.trace("handshake by %s under %v", names[e.index], responder)
			if !w.pass() {
				return
			}
			w.after(n.delay, func() { // the keepalive that follows
				if (p.session == nil || s.birth.After(p.session.birth)) && s.live(w.Now) && !gone() {
					p.adopt(s, peer.wall())
					p.rx += 32
				}
			})
		})
	})
}

// Describe is a line about both ends, for failing tests.
func (w *World) Describe() string {
	a, b := w.Ends[0], w.Ends[1]
	for _, e := range w.Ends {
		if e.up {
			w.trace("%s: %+v candidates %v", names[e.index], e.View(), e.tunnel.Candidates())
		}
	}
	return fmt.Sprintf("at %v: client %v, server %v, link %v, works %v, confirmed %d, pings lost %d of %d",
		w.elapsed(), a.device.psk.Fingerprint(), b.device.psk.Fingerprint(), w.Link.up, w.tunnelWorks(), w.Confirmed(), w.Tunnel.Lost, w.Tunnel.Sent)
}

// identity is what the link proves of an end.
func identity(end int) [32]byte { return [32]byte{byte(end + 1)} }

// Send hands WireGuard at an end one packet.
func (w *World) Send(end int) { w.data(w.Ends[end], true) }
