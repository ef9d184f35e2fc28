package kmesim

import (
	"encoding/binary"
	"errors"
	"math"

	"golang.org/x/crypto/cryptobyte"
)

// key is a key as one SAE gets it, who wipes it. In JSON it is an element of a
// key container (ETSI GS QKD 014 V1.1.1, 6.3).
type key struct {
	ID  string `json:"key_ID"`
	Key []byte `json:"key"` // padded standard base64 in JSON
}

func wipe(keys []key) {
	for _, k := range keys {
		clear(k.Key)
	}
}

// batch is what the KMEs tell each other of keys: whose they are, and all or
// only the IDs of them. On the link each text and each key has its length before
// it, in two bytes, as each list has its number.
type batch struct {
	master string
	slaves []string
	keys   []key
}

// batchOf returns a batch of IDs alone.
func batchOf(ids []string) *batch {
	b := &batch{keys: make([]key, len(ids))}
	for i, id := range ids {
		b.keys[i].ID = id
	}
	return b
}

func (b *batch) ids() []string {
	ids := make([]string, len(b.keys))
	for i, k := range b.keys {
		ids[i] = k.ID
	}
	return ids
}

var errMalformed = errors.New("malformed message of the other KME")

// encode returns the batch as bytes, and leaves no other copy of the keys.
func (b *batch) encode() []byte {
	size := 6 + len(b.master)
	for _, s := range b.slaves {
		size += 2 + len(s)
	}
	for _, k := range b.keys {
		size += 4 + len(k.ID) + len(k.Key)
	}
	out := appendSized(make([]byte, 0, size), b.master)
	out = appendNumber(out, len(b.slaves))
	for _, s := range b.slaves {
		out = appendSized(out, s)
	}
	out = appendNumber(out, len(b.keys))
	for _, k := range b.keys {
		out = appendSized(out, k.ID)
		out = appendSized(out, k.Key)
	}
	return out
}

func appendNumber(out []byte, n int) []byte {
	if n > math.MaxUint16 {
		panic("kmesim: message out of bounds") // each number has a lower limit of its own
	}
	return binary.BigEndian.AppendUint16(out, uint16(n))
}

func appendSized[T string | []byte](out []byte, v T) []byte {
	return append(appendNumber(out, len(v)), v...)
}

// decodeBatch reads what encode wrote.
func decodeBatch(body []byte) (*batch, error) {
	in := reader{rest: body}
	b := &batch{master: string(in.sized())}
	for range in.number(0, MaxSAEs+1) {
		b.slaves = append(b.slaves, string(in.sized()))
	}
	for range in.number(0, MaxKeysPerRequest) {
		b.keys = append(b.keys, key{string(in.sized()), append([]byte(nil), in.sized()...)})
	}
	if in.bad || !in.rest.Empty() {
		wipe(b.keys)
		return nil, errMalformed
	}
	return b, nil
}

// reader reads what appendNumber and appendSized wrote, until something is
// bad.
type reader struct {
	rest cryptobyte.String
	bad  bool
}

// number reads a number between two limits, and 0 where there is none.
func (r *reader) number(low, high uint16) int {
	var n uint16
	if r.bad = r.bad || !r.rest.ReadUint16(&n) || n < low || n > high; r.bad {
		return 0
	}
	return int(n)
}

// sized reads bytes, which lie within the message.
func (r *reader) sized() []byte {
	var b cryptobyte.String
	if r.bad = r.bad || !r.rest.ReadUint16LengthPrefixed(&b); r.bad {
		return nil
	}
	return b
}
