package rotation

import (
	"errors"
	"fmt"
	"slices"

	"keyturn/internal/psk"
	"keyturn/internal/wire"
)

// errFull means that the key buffer has no room.
var errFull = errors.New("the key buffer is full")

// buffer is the bounded queue of verified keys between a KeyGenerator and its
// KeyRotationScheduler, by strictly rising serial. A key that it drops is wiped.
type buffer struct {
	entries  []*record
	capacity int
}

// push adds a key, which the buffer owns from here on, errors included.
func (b *buffer) push(r *record) error {
	if n := len(b.entries); n >= b.capacity {
		r.key.Wipe()
		return errFull
	} else if n > 0 && r.serial <= b.entries[n-1].serial {
		r.key.Wipe()
		return fmt.Errorf("serial %d is not above %d", r.serial, b.entries[n-1].serial)
	}
	b.entries = append(b.entries, r)
	return nil
}

// pull removes and returns the key of the lowest serial, nil if there is none.
func (b *buffer) pull() *record {
	if len(b.entries) == 0 {
		return nil
	}
	return b.take(b.entries[0].name())
}

// has reports whether the buffer holds a key.
func (b *buffer) has(n wire.Named) bool {
	return slices.ContainsFunc(b.entries, func(r *record) bool { return r.name() == n })
}

// take removes and returns a key, nil if it is not there.
func (b *buffer) take(n wire.Named) *record {
	i := slices.IndexFunc(b.entries, func(r *record) bool { return r.name() == n })
	if i < 0 {
		return nil
	}
	r := b.entries[i]
	b.entries = slices.Delete(b.entries, i, i+1)
	return r
}

// retain drops every key that keep does not want and returns how many.
func (b *buffer) retain(keep func(wire.Named) bool) int {
	before := len(b.entries)
	b.entries = slices.DeleteFunc(b.entries, func(r *record) bool {
		if keep(r.name()) {
			return false
		}
		r.key.Wipe()
		return true
	})
	return before - len(b.entries)
}

// names returns the names of all keys, lowest serial first.
func (b *buffer) names() []wire.Named {
	names := make([]wire.Named, 0, len(b.entries))
	for _, r := range b.entries {
		names = append(names, r.name())
	}
	return names
}

// newRecord names a key that was just verified.
func newRecord(serial uint64, key *psk.Key, sources wire.Sources) *record {
	return &record{serial: serial, key: key, print: key.Fingerprint(), sources: sources}
}
