package kmesim

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
)

// Dialect is a way to write ETSI GS QKD 004 V2.1.1 on the wire: the standard
// names operations and their parameters, not bytes. Nothing in a connection
// says which one is meant before it is too late, so each listener has one.
type Dialect int

// The dialects in use. Both begin a message with a header of eight bytes:
// three of the version, the service, and the length of what follows; numbers
// are big-endian.
const (
	// ForgeEd3: MIME types end in NUL, GET_KEY sends the room for metadata, with the
	// key's type and role in it, every answer has all its fields, one request a
	// connection.
	ForgeEd3 Dialect = iota
	// ForgeEd1: MIME types take 256 bytes, GET_KEY sends the size of the room for
	// metadata, an error answer is its status alone, a connection stays open.
	ForgeEd1
)

// dialects is what differs between them before the payload.
var dialects = [...]struct {
	name    string
	version [3]byte
}{
	ForgeEd3: {"forge-ed3", [3]byte{2, 1, 1}},
	ForgeEd1: {"forge-ed1", [3]byte{1, 0, 1}},
}

// String returns the name that ParseDialect knows.
func (d Dialect) String() string {
	if d < 0 || int(d) >= len(dialects) {
		return fmt.Sprintf("dialect %d", int(d))
	}
	return dialects[d].name
}

// ParseDialect reads the name of a dialect.
func ParseDialect(name string) (Dialect, error) {
	for d := range dialects {
		if dialects[d].name == name {
			return Dialect(d), nil
		}
	}
	return 0, fmt.Errorf("unknown dialect %q: one of %v, %v", name, ForgeEd3, ForgeEd1)
}

// service is what a message asks for; its answer is the next number.
type service byte

const (
	serviceOpen  service = 2
	serviceGet   service = 4
	serviceClose service = 8
)

// streamStatus is the outcome of an operation (ETSI GS QKD 004 V2.1.1).
type streamStatus uint32

const (
	streamOK             streamStatus = 0
	streamPeerAbsent     streamStatus = 1 // opened; the peer has not
	streamNoKeys         streamStatus = 2
	streamPeerNotYet     streamStatus = 3 // GET_KEY before the peer, or for a stream that is not open
	streamNoLink         streamStatus = 4
	streamInUse          streamStatus = 5
	streamTimeout        streamStatus = 6
	streamQoS            streamStatus = 7 // not met; the answer holds a counter-offer
	streamMetadataTooBig streamStatus = 8
)

// Sizes of messages, in bytes.
const (
	headerSize = 8
	ksidSize   = 16
	qosNumbers = 7
	mimeSize   = 256     // char[256] in the standard, the NUL included
	maxPayload = 4 << 10 // of a request: two IDs, a MIME type and some numbers
)

// ksid names a key stream; all zero asks for a new one.
type ksid [ksidSize]byte

func (id ksid) String() string { return hex.EncodeToString(id[:]) }

// qos is what an application asks of a stream, and what it gets.
type qos struct {
	Chunk    uint32 // bytes of each key
	MaxBPS   uint32
	MinBPS   uint32
	Jitter   uint32
	Priority uint32
	Timeout  uint32 // milliseconds
	TTL      uint32 // seconds
	MIME     string // of the metadata
}

// The requests.
type (
	openRequest struct {
		source, destination string
		qos                 qos
		stream              ksid
	}
	getRequest struct {
		stream ksid
		index  uint32
		room   uint32 // for metadata, in bytes
		detail []byte // what ForgeEd3 sends in that room: the key's type and role
	}
	closeRequest struct{ stream ksid }
)

// The answers.
type (
	openAnswer struct {
		status streamStatus
		qos    qos
		stream ksid
	}
	getAnswer struct {
		status   streamStatus
		index    uint32
		key      []byte // a secret
		metadata []byte
		needed   uint32 // bytes of metadata, with streamMetadataTooBig
	}
)

// header reads the first eight bytes of a request.
func (d Dialect) header(b [headerSize]byte) (service, int, error) {
	if [3]byte(b[:3]) != dialects[d].version {
		return 0, 0, fmt.Errorf("version %x is not that of %v", b[:3], d)
	}
	s, n := service(b[3]), binary.BigEndian.Uint32(b[4:])
	if s != serviceOpen && s != serviceGet && s != serviceClose {
		return 0, 0, fmt.Errorf("unknown service %#02x", byte(s))
	}
	if n > maxPayload {
		return 0, 0, fmt.Errorf("payload of %d bytes, over %d", n, maxPayload)
	}
	return s, int(n), nil
}

// request reads the payload of a request: all of it, and nothing else.
func (d Dialect) request(s service, payload []byte) (any, error) {
	r := fields{b: payload}
	var v any
	switch s {
	case serviceOpen:
		v = openRequest{source: r.text(maxSAE), destination: r.text(maxSAE), qos: d.readQoS(&r), stream: r.ksid()}
	case serviceGet:
		g := getRequest{stream: r.ksid(), index: r.uint32()}
		if d == ForgeEd1 {
			g.room = r.uint32()
		} else {
			g.room = r.uint32()
			g.detail = r.bytes(g.room)
		}
		v = g
	default:
		v = closeRequest{stream: r.ksid()}
	}
	switch {
	case r.err != nil:
		return nil, r.err
	case len(r.b) > 0:
		return nil, fmt.Errorf("%d bytes too many", len(r.b))
	}
	return v, nil
}

func (d Dialect) readQoS(r *fields) qos {
	q := qos{
		Chunk: r.uint32(), MaxBPS: r.uint32(), MinBPS: r.uint32(), Jitter: r.uint32(),
		Priority: r.uint32(), Timeout: r.uint32(), TTL: r.uint32(),
	}
	if d == ForgeEd3 {
		q.MIME = r.text(mimeSize - 1)
		return q
	}
	// What a C program leaves behind the NUL is nobody's business.
	text, _, _ := bytes.Cut(r.bytes(mimeSize), []byte{0})
	q.MIME = string(text)
	return q
}

func (d Dialect) appendQoS(b []byte, q qos) []byte {
	for _, n := range [qosNumbers]uint32{q.Chunk, q.MaxBPS, q.MinBPS, q.Jitter, q.Priority, q.Timeout, q.TTL} {
		b = binary.BigEndian.AppendUint32(b, n)
	}
	b = append(b, q.MIME...)
	if d == ForgeEd3 {
		return append(b, 0)
	}
	return append(b, make([]byte, mimeSize-len(q.MIME))...)
}

// opened writes the answer to OPEN_CONNECT.
func (d Dialect) opened(a openAnswer) []byte {
	b := d.begin(serviceOpen, a.status, qosNumbers*4+mimeSize+ksidSize)
	if d == ForgeEd3 || a.status == streamOK || a.status == streamPeerAbsent || a.status == streamQoS {
		b = append(d.appendQoS(b, a.qos), a.stream[:]...)
	}
	return finish(b)
}

// got writes the answer to GET_KEY, in a buffer that holds no second copy of
// the key: its owner wipes it.
func (d Dialect) got(a getAnswer) []byte {
	b := d.begin(serviceGet, a.status, 12+len(a.key)+len(a.metadata))
	if d == ForgeEd3 && a.status == streamMetadataTooBig {
		a.metadata = make([]byte, a.needed) // whose size is what counts
	}
	switch {
	case d == ForgeEd3 || a.status == streamOK:
		b = binary.BigEndian.AppendUint32(b, a.index)
		b = binary.BigEndian.AppendUint32(b, uint32(len(a.key)))
		b = append(b, a.key...)
		b = binary.BigEndian.AppendUint32(b, uint32(len(a.metadata)))
		b = append(b, a.metadata...)
	case a.status == streamMetadataTooBig:
		b = binary.BigEndian.AppendUint32(b, a.needed)
	}
	return finish(b)
}

// closed writes the answer to CLOSE.
func (d Dialect) closed(s streamStatus) []byte { return finish(d.begin(serviceClose, s, 0)) }

// begin starts an answer that has room for so many bytes behind its status.
func (d Dialect) begin(asked service, s streamStatus, room int) []byte {
	b := append(make([]byte, 0, headerSize+4+room), dialects[d].version[:]...)
	b = append(b, byte(asked)+1, 0, 0, 0, 0)
	return binary.BigEndian.AppendUint32(b, uint32(s))
}

// finish puts the payload's length into the header.
func finish(b []byte) []byte {
	binary.BigEndian.PutUint32(b[4:], uint32(len(b)-headerSize))
	return b
}

// fields takes a payload apart. After an error it yields zero values.
type fields struct {
	b   []byte
	err error
}

var errShort = errors.New("payload is cut off")

// bytes returns the next n bytes, which it does not copy.
func (r *fields) bytes(n uint32) []byte {
	if r.err == nil && uint64(n) > uint64(len(r.b)) {
		r.err = errShort
	}
	if r.err != nil {
		return nil
	}
	v := r.b[:n]
	r.b = r.b[n:]
	return v
}

func (r *fields) uint32() uint32 {
	b := r.bytes(4)
	if b == nil {
		return 0
	}
	return binary.BigEndian.Uint32(b)
}

func (r *fields) ksid() (id ksid) {
	copy(id[:], r.bytes(ksidSize))
	return id
}

// text returns the bytes up to a NUL, which it takes as well.
func (r *fields) text(limit int) string {
	if r.err != nil {
		return ""
	}
	n := bytes.IndexByte(r.b, 0)
	switch {
	case n < 0:
		r.err = errShort
		return ""
	case n > limit:
		r.err = fmt.Errorf("text of %d bytes, over %d", n, limit)
		return ""
	}
	return string(r.bytes(uint32(n) + 1)[:n])
}
