package rotation

import (
	"slices"

	"keyturn/internal/psk"
	"keyturn/internal/wire"
)

// The rules of docs/PROTOCOL.md that every action of the model is held to. The
// numbers are its steps and invariants. They are judged by what goes over the
// link, into the journals and into WireGuard, not by what the machines think.

// mostCandidates is MaxCandidates, in figures: it is a rule under test.
const mostCandidates = 3

// candidates are the keys that may be installed at the other end (H2), by what
// is in this end's journal.
func (h *host) candidates(fallback bool) []psk.Fingerprint {
	var all []psk.Fingerprint
	found, anyConfirmed := h.found, false
	for i := len(h.journal) - 1; i >= 0; i-- {
		x := &h.journal[i]
		anyConfirmed = anyConfirmed || x.confirmed
		all = append(all, x.print)
		if x.agreed || x.confirmed || x.serial == 0 {
			break // the base
		}
	}
	if len(h.journal) > 0 && h.journal[0].serial == 0 {
		found = &h.journal[0]
	}
	if found != nil && (fallback || !anyConfirmed) && !slices.Contains(all, found.print) {
		all = append(all, found.print)
	}
	return all
}

// check judges the state after an action.
func (w *world) check() {
	c, s := &w.hosts[client], &w.hosts[server]
	if len(c.journal) == 0 || len(s.journal) == 0 {
		return
	}
	theirs := [2][]psk.Fingerprint{c.candidates(w.scope.fallback), s.candidates(w.scope.fallback)}
	for e, all := range theirs {
		if len(all) > mostCandidates && w.scope.roots == nil {
			w.fail("%s: %d keys may be installed at the other end, and a hunt walks through %d (H2)", endNames[e], len(all), mostCandidates)
		}
	}
	if w.lost {
		return
	}
	if !slices.ContainsFunc(theirs[client], func(p psk.Fingerprint) bool { return slices.Contains(theirs[server], p) }) {
		w.fail("the candidates of the ends have no key in common (8.4)")
	}
	if w.inStep() || c.strange || s.strange {
		return
	}
	for e := range w.hosts {
		if p := w.hosts[e].device.print; w.hosts[e].swapped && !slices.Contains(theirs[1-e], p) {
			w.fail("%s: %v is installed, and the other end would not look for it (8.4)", endNames[e], p)
		}
	}
}

// checkSend judges a message as it goes out.
func (w *world) checkSend(from int, m wire.Message) {
	if w.foreign {
		if _, again := m.(*wire.Init); !again {
			w.fail("%s: a message of another session is answered (B5)", endNames[from])
		}
	}
	h := &w.hosts[from]
	switch m := m.(type) {
	case *wire.Init, *wire.Propose, *wire.Finish:
		if from == server {
			w.fail("server: sends %v on its own (1)", m)
		}
	case *wire.Commit:
		if from == server {
			w.fail("server: sends %v on its own (1)", m)
			return
		}
		if h.entry(m.Key.Fingerprint) == nil {
			w.fail("client: commit is sent before the key is in the journal (J1)")
		}
		in := h.entry(h.device.print)
		live := h.device.current.live(w.now)
		switch m.Mode {
		case wire.ModeWindow:
			peers := w.hosts[server].entry(h.device.print)
			if in != nil && in.serial != 0 && !in.confirmed && (peers == nil || peers.serial != 0) {
				w.fail("client: commits %v although the key before is not confirmed (C2)", m.Key)
			}
		case wire.ModeIdle:
			if live && in != nil && in.serial != 0 && in.print != w.original() {
				w.fail("client: commits %v as idle while a session lives (C6)", m.Key)
			}
		}
	}
}

// checkSet judges what an end has just put into WireGuard.
func (w *world) checkSet(e int) {
	h := &w.hosts[e]
	p := h.device.print
	g := w.ghost(p)
	op := h.sched.op
	if op == nil {
		w.fail("%s: sets %v without an operation", endNames[e], p)
		return
	}
	in := h.entry(p)
	switch found := p == w.original() || in != nil && in.serial == 0; {
	case found:
	case g.verified != [2]bool{true, true} && w.scope.roots == nil:
		w.fail("%s: sets %v, which was not verified by both ends (8.1)", endNames[e], p)
	case in == nil:
		w.fail("%s: sets %v, which its journal does not hold (J1)", endNames[e], p)
	}
	if g.erased[e] {
		w.fail("%s: sets the erased key %v (8.3)", endNames[e], p)
	}
	switch op.kind {
	case opCommit:
		if e == server {
			w.fail("server: sets %v on its own (1)", p)
		}
		if !g.set[server] {
			w.fail("client: sets %v before the server did (C4)", p)
		}
	case opObey:
		if e == client {
			w.fail("client: obeys the server (1)")
		}
	default:
		return
	}
	h.swapped = true
	if op.mode != wire.ModeWindow {
		return
	}
	d := &h.device
	live := d.current.live(w.now)
	if live && w.now.Sub(d.stamp) > h.tunnel.config.Parameters.Window+w.scope.grain {
		w.fail("%s: sets %v outside the window (C2, C3)", endNames[e], p)
	}
	if live && d.stamp.Equal(h.used) {
		w.fail("%s: sets a second key on one handshake (C2)", endNames[e])
	}
	h.used = d.stamp
}

// checkSave judges a journal that has just replaced another: what left it is
// erased, and nothing erased comes back.
func (w *world) checkSave(e int, old []entry) {
	h := &w.hosts[e]
	for i := range old {
		x := &old[i]
		if x.serial == 0 || h.entry(x.print) != nil {
			continue
		}
		w.ghost(x.print).erased[e] = true
		// C7: erased is what was superseded in both journals, or what no end
		// can have: never agreed, and not in the other's WireGuard.
		if !w.lost && w.hosts[1-e].device.print == x.print && !w.hosts[1-e].strange && !w.superseded(x.serial) {
			w.fail("%s: erases %v while the other end has it installed (C7)", endNames[e], x.print)
		}
	}
	for i := range h.journal {
		x := &h.journal[i]
		if x.serial != 0 && w.ghost(x.print).erased[e] {
			w.fail("%s: the erased key %v is back in the journal (8.3)", endNames[e], x.print)
		}
	}
	if w.lost {
		for i := range h.journal {
			x := &h.journal[i]
			if w.ghost(x.print).confirmed == [2]bool{true, true} && w.hosts[1-e].entry(x.print) != nil {
				w.lost = false
			}
		}
	}
}

// superseded says whether a newer key is confirmed in both journals.
func (w *world) superseded(serial uint64) bool {
	for i := range w.hosts[client].journal {
		x := &w.hosts[client].journal[i]
		y := w.hosts[server].entry(x.print)
		if x.serial > serial && x.confirmed && y != nil && y.confirmed {
			return true
		}
	}
	return false
}
