package qualify

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"time"

	"keyturn/internal/kms/kmshttp"
)

// The messages of ETSI GS QKD 004, as far as they are needed here, written down
// a second time on purpose: a mistake that the rotator's client has would not
// show if it judged itself.

// service is a request; its answer is one higher.
type service byte

const (
	openConnect service = 2
	getKey      service = 4
	closeStream service = 8
)

// wire is a dialect.
type wire struct {
	version    [3]byte
	persistent bool // one connection for all requests
	fixed      bool // the metadata type has 256 bytes
	counted    bool // GET_KEY has the size of the room for metadata, not the room
	uris       bool // applications are URIs
	room       uint32
}

// wires has the dialects by their names in the configuration.
var wires = map[string]wire{
	"forge-ed3": {version: [3]byte{2, 1, 1}, room: 1024},
	"forge-ed1": {version: [3]byte{1, 0, 1}, persistent: true, fixed: true, counted: true, uris: true, room: 1024},
}

// statuses are the meanings of a status, from 0 on.
var statuses = [...]string{
	"success", "success, the peer is not connected", "insufficient key", "the peer's application is not yet connected",
	"no QKD connection", "key stream ID in use", "timeout", "quality of service not met", "metadata size insufficient",
}

const (
	statusOK    = 0
	statusAlone = 1
	statusInUse = 5
	statusQoS   = 7
)

// ksid is a Key_stream_ID.
type ksid [16]byte

// quality is the QoS without the metadata type: Key_chunk_size, Max_bps,
// Min_bps, Jitter, Priority, Timeout, TTL.
type quality [7]uint32

// said is an answer. What a status leaves out is zero.
type said struct {
	reply
	status uint32
	id     ksid
	qos    quality
	index  uint32
	key    []byte
}

// brief says in a few words what came.
func (a said) brief() string {
	if a.err != nil {
		return a.err.Error()
	}
	if int(a.status) < len(statuses) {
		return fmt.Sprintf("status %d, %s", a.status, statuses[a.status])
	}
	return fmt.Sprintf("status %d", a.status)
}

// well reports a success.
func (a said) well() bool { return a.err == nil && (a.status == statusOK || a.status == statusAlone) }

// application is one end of key streams while it is being tested.
type application struct {
	End
	wire
	source, destination string // as they go over the wire
	peer                string // SAE ID of the other end
	conf                *tls.Config
	conn                net.Conn // of a persistent dialect
	qos                 quality
	unheard             int
}

// openApplication reads the files that an end names. It does not connect.
func openApplication(e End, peer string) (*application, error) {
	w, ok := wires[e.Dialect]
	if !ok {
		return nil, fmt.Errorf("dialect %q is neither forge-ed3 nor forge-ed1", e.Dialect)
	}
	if e.Timeout == 0 {
		e.Timeout = kmshttp.DefaultTimeout
	}
	host, port, err := net.SplitHostPort(e.URI)
	if _, bad := strconv.ParseUint(port, 10, 16); err != nil || bad != nil || host == "" {
		return nil, fmt.Errorf("URI %q is not host:port", e.URI)
	}
	conf, err := e.TLS.Client(tls.VersionTLS12)
	if err != nil {
		return nil, err
	}
	if conf.ServerName == "" {
		conf.ServerName = host
	}
	if e.Dial == nil {
		e.Dial = new(net.Dialer).DialContext
	}
	name := func(sae string) string {
		if w.uris && !strings.Contains(sae, "://") {
			return "qkd://" + sae
		}
		return sae
	}
	return &application{
		End: e, wire: w, source: name(e.SAE), destination: name(peer), peer: peer, conf: conf,
		// The KMS is to give up before we do: then no key is lost.
		qos: quality{keyBits / 8, 32, 32, 0, 0, uint32(e.Timeout.Milliseconds() / 5), 600},
	}, nil
}

func (s *application) close() {
	if s != nil && s.conn != nil {
		_ = s.conn.Close()
		s.conn = nil
	}
}

// open asks for a key stream; a zero ID asks the KMS to allocate one.
func (s *application) open(ctx context.Context, id ksid, q quality) said {
	const metadataType = "application/json"
	b := append([]byte(s.source+"\x00"+s.destination), 0)
	for _, n := range q {
		b = binary.BigEndian.AppendUint32(b, n)
	}
	b = append(b, metadataType...)
	if s.fixed {
		b = append(b, make([]byte, 256-len(metadataType))...)
	} else {
		b = append(b, 0)
	}
	return s.ask(ctx, openConnect, append(b, id[:]...))
}

func (s *application) get(ctx context.Context, id ksid, index uint32) said {
	b := binary.BigEndian.AppendUint32(id[:], index)
	b = binary.BigEndian.AppendUint32(b, s.room)
	if !s.counted {
		b = append(b, make([]byte, s.room)...)
	}
	return s.ask(ctx, getKey, b)
}

func (s *application) shut(ctx context.Context, id ksid) said { return s.ask(ctx, closeStream, id[:]) }

// ask sends a request as the end's rotator would.
func (s *application) ask(ctx context.Context, v service, payload []byte) said {
	a := s.send(ctx, s.conf, v, payload, s.persistent)
	if a.err != nil {
		s.unheard++
	} else {
		s.unheard = 0
	}
	return a
}

// probe makes a probe of what takes no key: the closing of a stream that nobody
// has opened.
func (s *application) probe(ctx context.Context, change func(*tls.Config)) reply {
	nobody := randomKSID()
	if change == nil {
		return s.ask(ctx, closeStream, nobody[:]).reply
	}
	conf := s.conf.Clone()
	change(conf)
	return s.send(ctx, conf, closeStream, nobody[:], false).reply
}

// send sends a request over the connection that is kept, or a new one.
func (s *application) send(ctx context.Context, conf *tls.Config, v service, payload []byte, keep bool) (a said) {
	began := time.Now()
	ctx, cancel := context.WithTimeoutCause(ctx, s.Timeout, errLate)
	defer cancel()
	err := func() error {
		var c net.Conn
		if keep && s.conn != nil {
			c = s.conn
		} else {
			raw, err := s.Dial(ctx, "tcp", s.URI)
			if err != nil {
				return err
			}
			secure := tls.Client(raw, conf)
			if err := secure.HandshakeContext(ctx); err != nil {
				_ = raw.Close()
				return err
			}
			state := secure.ConnectionState()
			c, a.tls = secure, &state
		}
		stop := context.AfterFunc(ctx, func() { _ = c.Close() })
		err := s.transfer(c, v, payload, &a)
		if !stop() {
			err = context.Cause(ctx)
		}
		if keep && err == nil {
			s.conn = c
			return nil
		}
		_ = c.Close()
		s.conn = nil
		return err
	}()
	a.took = time.Since(began)
	if err != nil {
		a.raw = err
		a.refused, a.err = kmshttp.Explain(err)
		if errors.Is(context.Cause(ctx), errLate) {
			a.err = fmt.Errorf("no answer within %v", s.Timeout)
		}
	}
	return a
}

func (s *application) transfer(c net.Conn, v service, payload []byte, a *said) error {
	b := append([]byte{s.version[0], s.version[1], s.version[2], byte(v)}, binary.BigEndian.AppendUint32(nil, uint32(len(payload)))...)
	if _, err := c.Write(append(b, payload...)); err != nil {
		return err
	}
	var header [8]byte
	if _, err := io.ReadFull(c, header[:]); err != nil {
		return err
	}
	n := binary.BigEndian.Uint32(header[4:])
	switch {
	case [3]byte(header[:3]) != s.version:
		return fmt.Errorf("the answer has version %d.%d.%d: another dialect?", header[0], header[1], header[2])
	case header[3] != byte(v)+1:
		return fmt.Errorf("the answer has service %#02x, not %#02x", header[3], byte(v)+1)
	case n > maxBody:
		return fmt.Errorf("the answer has %d bytes", n)
	}
	body := make([]byte, n)
	if _, err := io.ReadFull(c, body); err != nil {
		return err
	}
	return s.decode(v, body, a)
}

// decode takes the payload of an answer apart.
func (s *application) decode(v service, b []byte, a *said) error {
	whole := len(b)
	short := fmt.Errorf("the answer is cut off after %d bytes", whole)
	number := func(into *uint32) bool {
		if len(b) < 4 {
			return false
		}
		*into, b = binary.BigEndian.Uint32(b), b[4:]
		return true
	}
	text := func(into *[]byte) bool {
		var n uint32
		if !number(&n) || uint64(n) > uint64(len(b)) {
			return false
		}
		*into, b = b[:n], b[n:]
		return true
	}
	if !number(&a.status) {
		return short
	}
	switch {
	case v == openConnect && (a.status <= statusAlone || a.status == statusQoS && len(b) > 0):
		for i := range a.qos {
			if !number(&a.qos[i]) {
				return short
			}
		}
		n := bytes.IndexByte(b, 0) + 1
		if s.fixed {
			n = 256
		}
		if n == 0 || len(b) != n+len(a.id) {
			return errors.New("the answer to OPEN_CONNECT does not end with a metadata type and a key stream ID")
		}
		copy(a.id[:], b[n:])
		b = nil
	case v == getKey && a.status <= statusAlone:
		var metadata []byte
		if !number(&a.index) || !text(&a.key) || !text(&metadata) {
			return short
		}
	default: // what follows an error means nothing
		b = nil
	}
	if len(b) > 0 {
		return fmt.Errorf("the answer is %d bytes too long", len(b))
	}
	return nil
}
