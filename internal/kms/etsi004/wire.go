package etsi004

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"

	"keyturn/internal/psk"
)

// service says in a header what a message is: a request, or, one higher, its
// answer.
type service byte

const (
	openConnect service = 0x02
	getKey      service = 0x04
	closeStream service = 0x08
)

func (s service) String() string {
	switch s {
	case openConnect:
		return "OPEN_CONNECT"
	case getKey:
		return "GET_KEY"
	case closeStream:
		return "CLOSE"
	}
	return fmt.Sprintf("service %#02x", byte(s))
}

// status is what every answer begins with (ETSI GS QKD 004 V2.1.1, 6.2).
type status uint32

const (
	statusOK         status = 0
	statusAlone      status = 1 // open; the peer's application is not connected
	statusNoKeys     status = 2
	statusPeerAbsent status = 3
	statusNoQKD      status = 4
	statusInUse      status = 5
	statusTimeout    status = 6
	statusQoS        status = 7 // the answer holds a counter-offer
	statusNoRoom     status = 8 // for the metadata
)

// jsonMetadata is the type of metadata that servers are known to have.
const jsonMetadata = "application/json"

// Sizes in bytes.
const (
	headerSize      = 8
	maxMetadataType = 256      // the final NUL among them
	maxAnswer       = 64 << 10 // of payload; one with a key has some 100
)

// says are the words for a status that is not a success.
var says = map[status]string{
	statusNoKeys:     "insufficient key",
	statusPeerAbsent: "the peer's application has not connected yet",
	statusNoQKD:      "no QKD connection",
	statusInUse:      "key stream is in use",
	statusTimeout:    "timeout",
	statusQoS:        "quality of service not met",
	statusNoRoom:     "no room for the metadata",
}

func (s status) String() string {
	if text, ok := says[s]; ok {
		return fmt.Sprintf("status %d, %s", uint32(s), text)
	}
	return fmt.Sprintf("unknown status %d", uint32(s))
}

// dialect is one of the ways to write the messages, which the standard leaves
// open. A server hangs when it is sent the other: never guess.
type dialect struct {
	name    string
	version [3]byte
	// persistent keeps a connection for the next request. Otherwise each
	// request has its own.
	persistent bool
	// fixed gives the metadata type 256 bytes, whatever its length. Otherwise a
	// NUL ends it.
	fixed bool
	// counted asks for metadata by the size of the room for it. Otherwise the
	// room itself is sent.
	counted bool
	// uris wants a scheme and an authority in source and destination.
	uris bool
	// rooms are the sizes of the room for metadata that are tried in turn, in
	// bytes. We read no metadata, so the first is what servers are known to
	// take.
	rooms []uint32
}

var dialects = []dialect{
	{name: "forge-ed3", version: [3]byte{2, 1, 1}, rooms: []uint32{2, 1024, 3072}},
	{name: "forge-ed1", version: [3]byte{1, 0, 1}, persistent: true, fixed: true, counted: true, uris: true, rooms: []uint32{1024, 4096, 16384}},
}

// streamID is a Key_stream_ID: the same at both ends, and no secret. Zero asks
// the KMS to allocate one.
type streamID [16]byte

func (id streamID) String() string { return hex.EncodeToString(id[:]) }

// predefined is the key stream of two applications, which both ends know
// without having spoken to each other.
func predefined(a, b string) streamID {
	if a > b {
		a, b = b, a
	}
	h := sha256.New()
	for _, part := range []string{"keyturn/1 etsi004 key stream", a, b} {
		h.Write(binary.BigEndian.AppendUint32(nil, uint32(len(part))))
		h.Write([]byte(part))
	}
	return streamID(h.Sum(nil)[:len(streamID{})])
}

// qos is the quality of service that is asked for or offered.
type qos struct {
	chunk        uint32 // bytes of each key
	maxBPS       uint32
	minBPS       uint32
	jitter       uint32
	priority     uint32
	timeout      uint32 // milliseconds
	ttl          uint32 // seconds
	metadataType string
}

// request encodes the header and a payload.
func (d *dialect) request(s service, payload []byte) []byte {
	b := make([]byte, 0, headerSize+len(payload))
	b = append(b, d.version[:]...)
	b = append(b, byte(s))
	b = binary.BigEndian.AppendUint32(b, uint32(len(payload)))
	return append(b, payload...)
}

// encodeOpen encodes the payload of OPEN_CONNECT.
func (d *dialect) encodeOpen(source, destination string, q qos, id streamID) []byte {
	b := append([]byte(source), 0)
	b = append(append(b, destination...), 0)
	for _, n := range []uint32{q.chunk, q.maxBPS, q.minBPS, q.jitter, q.priority, q.timeout, q.ttl} {
		b = binary.BigEndian.AppendUint32(b, n)
	}
	b = append(b, q.metadataType...)
	if d.fixed {
		b = append(b, make([]byte, maxMetadataType-len(q.metadataType))...)
	} else {
		b = append(b, 0)
	}
	return append(b, id[:]...)
}

// encodeGetKey encodes the payload of GET_KEY.
func (d *dialect) encodeGetKey(id streamID, index, room uint32) []byte {
	b := binary.BigEndian.AppendUint32(id[:], index)
	b = binary.BigEndian.AppendUint32(b, room)
	if d.counted {
		return b
	}
	return append(b, make([]byte, room)...)
}

// decodeHeader returns the length of the payload of an answer to s.
func (d *dialect) decodeHeader(b [headerSize]byte, s service) (int, error) {
	n := binary.BigEndian.Uint32(b[4:])
	switch {
	case [3]byte(b[:3]) != d.version:
		return 0, fmt.Errorf("answer has version %d.%d.%d, not that of dialect %s", b[0], b[1], b[2], d.name)
	case b[3] != byte(s)+1:
		return 0, fmt.Errorf("answer has service %#02x, not %#02x", b[3], byte(s)+1)
	case n < 4:
		return 0, errShort
	case n > maxAnswer:
		return 0, fmt.Errorf("answer has %d bytes, over %d", n, maxAnswer)
	}
	return int(n), nil
}

// opened is an answer to OPEN_CONNECT. The rest is set with a status of
// success and with a counter-offer.
type opened struct {
	status status
	qos    qos
	id     streamID
}

// decodeOpen decodes the payload of an answer to OPEN_CONNECT. What follows an
// error, if anything does, means nothing.
func (d *dialect) decodeOpen(b []byte) (opened, error) {
	r := reader{b: b}
	a := opened{status: status(r.uint32())}
	switch {
	case r.short:
		return opened{}, errShort
	case a.status == statusQoS && len(r.b) == 0: // no offer
		return a, nil
	case a.status != statusOK && a.status != statusAlone && a.status != statusQoS:
		return a, nil
	}
	for _, n := range []*uint32{&a.qos.chunk, &a.qos.maxBPS, &a.qos.minBPS, &a.qos.jitter, &a.qos.priority, &a.qos.timeout, &a.qos.ttl} {
		*n = r.uint32()
	}
	text, err := d.metadataType(&r)
	if err != nil {
		return opened{}, err
	}
	a.qos.metadataType = text
	copy(a.id[:], r.take(len(a.id)))
	if err := r.end(); err != nil {
		return opened{}, err
	}
	return a, nil
}

// metadataType reads a media type. It may go back to the server, so it must be
// one in form at least.
func (d *dialect) metadataType(r *reader) (string, error) {
	var text []byte
	if d.fixed {
		text, _, _ = bytes.Cut(r.take(maxMetadataType), []byte{0})
	} else {
		n := bytes.IndexByte(r.b, 0)
		if n < 0 {
			return "", errShort
		}
		text = r.take(n + 1)[:n]
	}
	if len(text) >= maxMetadataType {
		return "", fmt.Errorf("metadata type is %d bytes long, over %d", len(text), maxMetadataType-1)
	}
	if !ascii(string(text)) {
		return "", errors.New("metadata type is not printable")
	}
	return string(text), nil
}

// delivered is an answer to GET_KEY. Only one with a status of success has a
// key.
type delivered struct {
	status status
	index  uint32
	key    *psk.Key
}

// decodeKey decodes the payload of an answer to GET_KEY and copies the key out
// of it. The error says what is wrong without quoting the key.
func decodeKey(b []byte) (delivered, error) {
	r := reader{b: b}
	a := delivered{status: status(r.uint32())}
	if r.short {
		return delivered{}, errShort
	}
	if a.status != statusOK && a.status != statusAlone {
		return a, nil
	}
	a.index = r.uint32()
	raw := r.take(r.length())
	r.take(r.length()) // metadata
	if err := r.end(); err != nil {
		return delivered{}, err
	}
	key, err := psk.New(raw)
	switch {
	case err != nil:
		return delivered{}, fmt.Errorf("key has %d bits, not %d", 8*len(raw), 8*psk.Size)
	case key.IsZero():
		return delivered{}, errors.New("key is all zero")
	}
	a.key = key
	return a, nil
}

// decodeClose decodes the payload of an answer to CLOSE.
func decodeClose(b []byte) (status, error) {
	r := reader{b: b}
	s := status(r.uint32())
	return s, r.end()
}

// errShort means that an answer ends before it should.
var errShort = errors.New("answer is cut off")

// reader takes a payload apart. Once it is short it yields zeros.
type reader struct {
	b     []byte
	short bool
}

// take returns the next n bytes, which it does not copy, or none.
func (r *reader) take(n int) []byte {
	if r.short = r.short || n > len(r.b); r.short {
		r.b = nil
		return nil
	}
	taken := r.b[:n]
	r.b = r.b[n:]
	return taken
}

func (r *reader) uint32() uint32 {
	if b := r.take(4); b != nil {
		return binary.BigEndian.Uint32(b)
	}
	return 0
}

// length returns the length of what follows.
func (r *reader) length() int { return int(min(r.uint32(), maxAnswer)) }

// end says what is wrong if not exactly everything was taken.
func (r *reader) end() error {
	switch {
	case r.short:
		return errShort
	case len(r.b) > 0:
		return fmt.Errorf("answer is %d bytes too long", len(r.b))
	}
	return nil
}

// ascii reports whether a text has printable ASCII alone.
func ascii(s string) bool {
	return strings.IndexFunc(s, func(r rune) bool { return r < ' ' || r > '~' }) < 0
}
