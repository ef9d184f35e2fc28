package rotation

import (
	"slices"
	"time"

	"keyturn/internal/psk"
	"keyturn/internal/wire"
)

// record is a key in the scheduler's hands, from being pulled (client) or
// committed (server) until it is erased.
type record struct {
	serial  uint64 // zero: the PSK found at the first start, or the recovery key
	key     *psk.Key
	print   psk.Fingerprint
	sources wire.Sources // zero: of an earlier process, whose KEMs may have been others

	since     time.Time // first installation, on the clock of now; zero: never
	wall      time.Time // the same on the wall clock, for the journal
	agreed    bool      // both ends reported it installed at one time
	seen      bool      // a later handshake was observed here
	confirmed bool      // at both ends
	failed    bool      // WireGuard refused it a moment ago: another key may do better
	doubtful  bool      // WireGuard refused it, but it may have taken all the same
	recovery  bool      // the recovery key (S4), in the place of the PSK found
	lost      bool      // agreed on once, and then an older one again: the other end may still count on it

	saveToken uint64 // of the first Save that holds it
	journaled bool   // it is in the journal

	// session in which the client took it from its buffer: the server
	// holds it as well, whatever an older report of it says.
	session wire.SessionID
}

// none is the name of no key.
var none = wire.Named{}

func (r *record) name() wire.Named { return wire.Named{Serial: r.serial, Fingerprint: r.print} }

// found says that the record is the PSK found at the first start, which is not
// ours and was never verified, or the recovery key in its place: what ranks
// below every key that was agreed on afresh.
func (r *record) found() bool { return r.serial == 0 }

// listed says whether the peer is told of the key: the PSK found only under
// fallback, and never the absence of one.
func (r *record) listed(fallback bool) bool {
	return !r.found() || r.recovery || fallback && !r.print.IsZero()
}

// age is the time since the first installation, zero before it.
func (r *record) age(now time.Time) time.Duration {
	if r.since.IsZero() {
		return 0
	}
	return now.Sub(r.since)
}

// base is the key that a hunt can rely on the other end to have: the newest
// one that is confirmed or was reported installed by both ends. Until the
// first such key it is the PSK found (H2).
func (t *Tunnel) base() *record {
	for _, r := range slices.Backward(t.records) {
		if r.confirmed || r.agreed || r.found() {
			return r
		}
	}
	return nil
}

// lastConfirmed is the newest confirmed record, nil if there is none.
func (t *Tunnel) lastConfirmed() *record {
	for _, r := range slices.Backward(t.records) {
		if r.confirmed {
			return r
		}
	}
	return nil
}

// foundRecord is the PSK found at the first start, or the recovery key.
func (t *Tunnel) foundRecord() *record {
	if len(t.records) > 0 && t.records[0].found() {
		return t.records[0]
	}
	return nil
}

// candidates are the keys that may be installed at the other end, never more
// than MaxCandidates: the base, those committed above it, and the recovery key,
// or with fallback the PSK found (H2). The newest come first.
func (t *Tunnel) candidates(usable func(*record) bool) []*record {
	base := t.base()
	var all []*record
	room := MaxCandidates
	found := t.foundRecord()
	if base != nil {
		room--
	}
	if found != nil && found != base && (found.listed(t.config.Fallback) || t.lastConfirmed() == nil) {
		room--
	} else {
		found = nil
	}
	for _, r := range slices.Backward(t.records) {
		switch {
		case r == base || r == found:
			all = append(all, r)
		case base != nil && r.serial > base.serial && room > 0:
			all = append(all, r)
			room--
		}
	}
	return slices.DeleteFunc(all, func(r *record) bool { return !usable(r) })
}

// insert adds a record in the order of serials.
func (t *Tunnel) insert(r *record) {
	i, _ := slices.BinarySearchFunc(t.records, r, func(a, b *record) int {
		switch {
		case a.serial < b.serial:
			return -1
		case a.serial > b.serial:
			return 1
		}
		return 0
	})
	t.records = slices.Insert(t.records, i, r)
	t.raise(r.serial)
}

// erase wipes a record and forgets it.
func (t *Tunnel) erase(r *record) {
	r.key.Wipe()
	t.records = slices.DeleteFunc(t.records, func(x *record) bool { return x == r })
}

// journal returns a copy of all records for saving.
func (t *Tunnel) journal() Journal {
	j := Journal{High: t.high}
	for _, r := range t.records {
		j.Entries = append(j.Entries, Entry{
			Serial: r.serial, Key: r.key.Clone(), Installed: r.wall,
			Agreed: r.agreed, Seen: r.seen, Confirmed: r.confirmed, Recovery: r.recovery,
		})
	}
	return j
}

// Restore fills a new tunnel from the journal of an earlier process, before
// the first Step. It takes over the journal's keys. now and wall are the same
// moment on the two clocks; an installation that lies in the future of wall
// is taken to be as old as can be, for its age is unknown.
func (t *Tunnel) Restore(j Journal, now, wall time.Time) {
	t.raise(j.High)
	for _, e := range j.Entries {
		r := &record{
			serial: e.Serial, key: e.Key, print: e.Key.Fingerprint(), wall: e.Installed,
			agreed: e.Agreed, seen: e.Seen, confirmed: e.Confirmed, recovery: e.Recovery, journaled: true,
		}
		if !e.Installed.IsZero() {
			age := wall.Sub(e.Installed)
			if age < 0 {
				age = t.config.MaxKeyAge
			}
			r.since = now.Add(-age)
		}
		t.insert(r)
		if r.found() && t.config.Fallback {
			t.initial, t.judged = r.print, true
		}
	}
}
