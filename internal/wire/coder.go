package wire

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"fmt"
	"slices"
	"strings"
	"time"
	"unicode/utf8"
)

// coder carries a message's fields into bytes or out of them. Each method
// handles one field in whichever direction is under way; after the first
// error all of them do nothing.
type coder struct {
	kind     kind
	decoding bool
	buf      []byte // encoding: what was written; decoding: what is left
	entry    int    // in a list: which of its entries, counted from 1
	part     string // in a composite field: which part of it
	err      error
}

// fail records the first error, which names the message and the field.
func (c *coder) fail(field, format string, args ...any) {
	if c.err != nil {
		return
	}
	if c.entry > 0 {
		field += fmt.Sprintf(" %d", c.entry)
	}
	if c.part != "" {
		field += " " + c.part
	}
	c.err = fmt.Errorf("%v: %s: %s", c.kind, field, fmt.Sprintf(format, args...))
}

// take returns the next n bytes, or nil after an error.
func (c *coder) take(field string, n int) []byte {
	if c.err != nil {
		return nil
	}
	if missing := n - len(c.buf); missing > 0 {
		c.fail(field, "%s missing", plural(missing, "byte"))
		return nil
	}
	b := c.buf[:n:n]
	c.buf = c.buf[n:]
	return b
}

// fixed is a field whose length both ends know.
func (c *coder) fixed(field string, b []byte) {
	switch {
	case c.err != nil:
	case c.decoding:
		copy(b, c.take(field, len(b)))
	default:
		c.buf = append(c.buf, b...)
	}
}

func (c *coder) u8(field string, v *uint8) {
	b := [1]byte{*v}
	c.fixed(field, b[:])
	if c.decoding { // only then: an encoded message is not written to
		*v = b[0]
	}
}

func (c *coder) u16(field string, v *uint16) {
	var b [2]byte
	binary.BigEndian.PutUint16(b[:], *v)
	c.fixed(field, b[:])
	if c.decoding {
		*v = binary.BigEndian.Uint16(b[:])
	}
}

func (c *coder) u32(field string, v *uint32) {
	var b [4]byte
	binary.BigEndian.PutUint32(b[:], *v)
	c.fixed(field, b[:])
	if c.decoding {
		*v = binary.BigEndian.Uint32(b[:])
	}
}

func (c *coder) u64(field string, v *uint64) {
	var b [8]byte
	binary.BigEndian.PutUint64(b[:], *v)
	c.fixed(field, b[:])
	if c.decoding {
		*v = binary.BigEndian.Uint64(b[:])
	}
}

func (c *coder) version(v *uint16) {
	c.u16("version", v)
	if c.err == nil && *v != Version {
		c.err = fmt.Errorf("%v: %w", c.kind, &VersionError{Got: *v})
	}
}

// bool is a byte that is exactly 0 or 1.
func (c *coder) bool(field string, v *bool) {
	var b uint8
	if *v {
		b = 1
	}
	c.u8(field, &b)
	if b > 1 {
		c.fail(field, "%d is neither 0 nor 1", b)
	}
	if c.decoding {
		*v = b == 1
	}
}

// duration is a u32 of milliseconds.
func (c *coder) duration(field string, v *time.Duration) {
	ms := uint32(*v / time.Millisecond)
	if !c.decoding && time.Duration(ms)*time.Millisecond != *v {
		c.fail(field, "%v is not a whole number of milliseconds from 0 to 2^32-1", *v)
	}
	c.u32(field, &ms)
	if c.decoding {
		*v = time.Duration(ms) * time.Millisecond
	}
}

// length is the u16 in front of a text or blob.
func (c *coder) length(field string, n, limit int) int {
	if n > limit { // before it is squeezed into 16 bits
		c.fail(field, "%d bytes, at most %d allowed", n, limit)
	}
	v := uint16(n)
	c.u16(field, &v)
	if int(v) > limit {
		c.fail(field, "%d bytes, at most %d allowed", v, limit)
	}
	return int(v)
}

// count is the u8 in front of a list.
func (c *coder) count(field string, n, limit int) int {
	if n > limit {
		c.fail(field, "%d of them, at most %d allowed", n, limit)
	}
	v := uint8(n)
	c.u8(field, &v)
	if int(v) > limit {
		c.fail(field, "%d of them, at most %d allowed", v, limit)
	}
	if c.err != nil {
		return 0
	}
	return int(v)
}

func (c *coder) text(field string, v *string, limit int) {
	n := c.length(field, len(*v), limit)
	if c.decoding {
		*v = string(c.take(field, n))
	}
	if c.err != nil {
		return
	}
	if problem := textProblem(*v); problem != "" {
		c.fail(field, "%s", problem)
		return
	}
	if !c.decoding {
		c.buf = append(c.buf, *v...)
	}
}

func (c *coder) blob(field string, v *[]byte) {
	n := c.length(field, len(*v), MaxBlob)
	if c.decoding {
		*v = bytes.Clone(c.take(field, n))
	} else if c.err == nil {
		c.buf = append(c.buf, *v...)
	}
}

// texts is a list in which the order means something.
func (c *coder) texts(field string, v *[]string, limit, textLimit int) {
	n := c.count(field, len(*v), limit)
	if c.decoding && n > 0 {
		*v = make([]string, n)
	}
	for i := range n {
		c.entry = i + 1
		c.text(field, &(*v)[i], textLimit)
	}
	c.entry = 0
}

// anyNumber lets blobs pass whatever their number is.
const anyNumber = -1

func (c *coder) blobs(field string, v *[][]byte, want int) {
	n := c.count(field, len(*v), MaxKEMs)
	if c.err == nil && want != anyNumber && n != want {
		c.fail(field, "%d of them for %s", n, plural(want, "KEM"))
		return
	}
	if c.decoding && n > 0 {
		*v = make([][]byte, n)
	}
	for i := range n {
		c.entry = i + 1
		c.blob(field, &(*v)[i])
	}
	c.entry = 0
}

func (c *coder) sources(field string, v *Sources) {
	c.u16(field, (*uint16)(v))
	if *v >= 1<<(MaxKEMs+1) {
		c.fail(field, "%#x has bits beyond %d KEMs", uint16(*v), MaxKEMs)
	}
}

func (c *coder) named(field string, v *Named) {
	c.part = "serial"
	c.u64(field, &v.Serial)
	c.part = "fingerprint"
	c.fixed(field, v.Fingerprint[:])
	c.part = ""
}

// names is a set: ascending by serial, then fingerprint.
func (c *coder) names(field string, v *[]Named) {
	set(c, field, v, (*coder).named, func(a, b Named) int {
		return cmp.Or(cmp.Compare(a.Serial, b.Serial), bytes.Compare(a.Fingerprint[:], b.Fingerprint[:]))
	})
}

// serials is a set: ascending.
func (c *coder) serials(field string, v *[]uint64) {
	set(c, field, v, (*coder).u64, cmp.Compare[uint64])
}

// set is a list in which the order means nothing; so that it has one encoding
// only, its elements stand in strictly ascending order.
func set[E any](c *coder, field string, v *[]E, element func(*coder, string, *E), compare func(a, b E) int) {
	s := *v
	ascending := func(i int) bool { return compare(s[i-1], s[i]) < 0 }
	if !c.decoding {
		for i := 1; i < len(s); i++ {
			if !ascending(i) {
				s = slices.Clone(s)
				slices.SortFunc(s, compare)
				s = slices.CompactFunc(s, func(a, b E) bool { return compare(a, b) == 0 })
				break
			}
		}
	}
	n := c.count(field, len(s), MaxHeld)
	if c.decoding && n > 0 {
		s = make([]E, n)
	}
	for i := range n {
		c.entry = i + 1
		element(c, field, &s[i])
		if i > 0 && c.err == nil && !ascending(i) {
			c.fail(field, "does not rise above the one before")
		}
	}
	c.entry = 0
	if c.decoding {
		*v = s
	}
}

func (c *coder) differences(field string, v *[]Difference) {
	n := c.count(field, len(*v), MaxDifferences)
	if c.decoding && n > 0 {
		*v = make([]Difference, n)
	}
	for i := range n {
		d := &(*v)[i]
		c.entry = i + 1
		c.part = "field"
		c.text(field, &d.Field, MaxName)
		c.part = "client"
		c.text(field, &d.Client, MaxText)
		c.part = "server"
		c.text(field, &d.Server, MaxText)
	}
	c.entry, c.part = 0, ""
}

// textProblem says why s may not be sent, or nothing.
func textProblem(s string) string {
	if !utf8.ValidString(s) {
		return "text is not valid UTF-8"
	}
	if i := strings.IndexFunc(s, deceptive); i >= 0 {
		r, _ := utf8.DecodeRuneInString(s[i:])
		return fmt.Sprintf("text holds the control character %U", r)
	}
	return ""
}

// deceptive reports the characters that no text may hold, for they could
// forge or disguise a line of the other end's log: the C0 and C1 controls,
// the line and paragraph separators, and what changes the direction of
// writing. A fixed list: a table of Unicode would differ between versions.
func deceptive(r rune) bool {
	return r < 0x20 || 0x7f <= r && r <= 0x9f || 0x2028 <= r && r <= 0x202e || 0x2066 <= r && r <= 0x2069
}

// Text returns s fit to be sent: characters that no text may hold become
// "?", and it is cut to MaxText bytes. For texts from elsewhere, such as the
// error of a KMS given as the reason of an Abandon.
func Text(s string) string {
	s = strings.Map(func(r rune) rune {
		if r == utf8.RuneError || deceptive(r) {
			return '?'
		}
		return r
	}, s)
	if len(s) <= MaxText {
		return s
	}
	end := MaxText
	for !utf8.RuneStart(s[end]) {
		end--
	}
	return s[:end]
}

// plural returns "1 byte" or "3 bytes".
func plural(n int, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	return fmt.Sprintf("%d %ss", n, noun)
}
