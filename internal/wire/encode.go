package wire

import (
	"errors"
	"fmt"
)

// kind is the type byte that an encoded message begins with.
type kind uint8

// The type bytes (docs/PROTOCOL.md, 4). Zero is none of them.
const (
	kindInit kind = iota + 1
	kindAck
	kindPropose
	kindReply
	kindFinish
	kindDone
	kindAbandon
	kindCommit
	kindCommitted
	kindRefused
	kindReport
	kindBye
)

// String returns the message's name as errors and traces give it.
func (k kind) String() string {
	if k < kindInit || k > kindBye {
		return fmt.Sprintf("message type %d", uint8(k))
	}
	return [...]string{
		"init", "ack", "propose", "reply", "finish", "done", "abandon",
		"commit", "committed", "refused", "report", "bye",
	}[k-kindInit]
}

// message returns an empty message of the kind, or nil for an unknown one.
func (k kind) message() Message {
	switch k {
	case kindInit:
		return new(Init)
	case kindAck:
		return new(Ack)
	case kindPropose:
		return new(Propose)
	case kindReply:
		return new(Reply)
	case kindFinish:
		return new(Finish)
	case kindDone:
		return new(Done)
	case kindAbandon:
		return new(Abandon)
	case kindCommit:
		return new(Commit)
	case kindCommitted:
		return new(Committed)
	case kindRefused:
		return new(Refused)
	case kindReport:
		return new(Report)
	case kindBye:
		return new(Bye)
	}
	return nil
}

// VersionError means that an Init or Ack is of another version of the
// protocol. Every version has its number right behind the type byte of these
// two, so that the ends can always say what is wrong.
type VersionError struct{ Got uint16 }

// Error names both versions.
func (e *VersionError) Error() string {
	return fmt.Sprintf("protocol version %d, this end speaks %d", e.Got, Version)
}

// errNone is what Append says to a nil message.
var errNone = errors.New("no message to encode")

// Encode returns the encoding of m, or an error that names the field which
// breaks a limit.
func Encode(m Message) ([]byte, error) { return Append(nil, m) }

// Append appends the encoding of m to dst, or returns dst unchanged with an
// error that names the field which breaks a limit. Sets are written sorted
// and without repetitions, in whatever order m has them. It does not change m.
func Append(dst []byte, m Message) ([]byte, error) {
	if m == nil {
		return dst, errNone
	}
	c := coder{kind: m.kind(), buf: append(dst, byte(m.kind()))}
	m.fields(&c)
	if n := len(c.buf) - len(dst); c.err == nil && n > MaxMessage {
		c.err = sizeError(c.kind, n)
	}
	if c.err != nil {
		return dst, c.err
	}
	return c.buf, nil
}

// Decode returns the message that b is the encoding of: the whole of b, and
// the only encoding of that message. Empty lists come out nil, and nothing in
// the message refers to b. An error names the message and the field; an Init
// or Ack of another version gives a *VersionError.
func Decode(b []byte) (Message, error) {
	if len(b) == 0 {
		return nil, errors.New("empty message")
	}
	k := kind(b[0])
	m := k.message()
	if m == nil {
		return nil, fmt.Errorf("unknown %v", k)
	}
	if len(b) > MaxMessage {
		return nil, sizeError(k, len(b))
	}
	c := coder{kind: k, buf: b[1:], decoding: true}
	m.fields(&c)
	if c.err != nil {
		return nil, c.err
	}
	if n := len(c.buf); n > 0 {
		return nil, fmt.Errorf("%v: %s left over", k, plural(n, "byte"))
	}
	return m, nil
}

func sizeError(k kind, n int) error {
	return fmt.Errorf("%v: %d bytes, at most %d allowed", k, n, MaxMessage)
}

func (*Init) kind() kind      { return kindInit }
func (*Ack) kind() kind       { return kindAck }
func (*Propose) kind() kind   { return kindPropose }
func (*Reply) kind() kind     { return kindReply }
func (*Finish) kind() kind    { return kindFinish }
func (*Done) kind() kind      { return kindDone }
func (*Abandon) kind() kind   { return kindAbandon }
func (*Commit) kind() kind    { return kindCommit }
func (*Committed) kind() kind { return kindCommitted }
func (*Refused) kind() kind   { return kindRefused }
func (*Report) kind() kind    { return kindReport }
func (*Bye) kind() kind       { return kindBye }

func (m *Init) fields(c *coder) {
	c.version(&m.Parameters.Version)
	c.u64("attempt", &m.Attempt)
	c.fixed("boot", m.Boot[:])
	c.u64("high", &m.High)
	m.Parameters.fields(c)
	c.names("held", &m.Held)
}

func (m *Ack) fields(c *coder) {
	c.version(&m.Parameters.Version)
	c.u64("attempt", &m.Attempt)
	c.fixed("session", m.Session[:])
	c.fixed("boot", m.Boot[:])
	c.u64("high", &m.High)
	m.Parameters.fields(c)
	c.names("held", &m.Held)
	c.bool("kept", &m.Kept)
	c.differences("differences", &m.Differences)
}

// fields covers all but Version, which stands at the front of the message.
func (p *Parameters) fields(c *coder) {
	c.text("sae", &p.SAE, MaxText)
	c.text("peer sae", &p.PeerSAE, MaxText)
	c.fixed("public key", p.PublicKey[:])
	c.fixed("peer public key", p.PeerPublicKey[:])
	c.bool("qkd", &p.QKD)
	c.texts("kems", &p.KEMs, MaxKEMs, MaxName)
	c.u8("require", &p.Require)
	c.u8("combiner", &p.Combiner)
	c.u16("buffer", &p.Buffer)
	c.duration("window", &p.Window)
	c.fixed("initial", p.Initial[:])
}

func (m *Propose) fields(c *coder) {
	c.fixed("session", m.Session[:])
	c.u64("serial", &m.Serial)
	c.sources("sources", &m.Sources)
	c.text("key id", &m.KeyID, MaxText)
	switch {
	case m.Sources.QKD() && m.KeyID == "":
		c.fail("key id", "missing, though qkd is a source")
	case !m.Sources.QKD() && m.KeyID != "":
		c.fail("key id", "present, though qkd is no source")
	}
	c.blobs("encapsulation keys", &m.EncapsulationKeys, m.Sources.kems())
	c.serials("held", &m.Held)
}

func (m *Reply) fields(c *coder) {
	c.fixed("session", m.Session[:])
	c.u64("serial", &m.Serial)
	c.sources("sources", &m.Sources)
	c.blobs("encapsulation keys", &m.EncapsulationKeys, m.Sources.kems())
	c.blobs("ciphertexts", &m.Ciphertexts, m.Sources.kems())
}

func (m *Finish) fields(c *coder) {
	c.fixed("session", m.Session[:])
	c.u64("serial", &m.Serial)
	c.blobs("ciphertexts", &m.Ciphertexts, anyNumber)
	c.fixed("digest", m.Digest[:])
}

func (m *Done) fields(c *coder) {
	c.fixed("session", m.Session[:])
	c.u64("serial", &m.Serial)
	c.fixed("digest", m.Digest[:])
}

func (m *Abandon) fields(c *coder) {
	c.fixed("session", m.Session[:])
	c.u64("serial", &m.Serial)
	c.text("reason", &m.Reason, MaxText)
	c.u64("high", &m.High)
}

func (m *Commit) fields(c *coder) {
	c.fixed("session", m.Session[:])
	c.u32("attempt", &m.Attempt)
	c.named("key", &m.Key)
	c.named("installed", &m.Installed)
	c.u64("confirmed", &m.Confirmed)
	c.u8("mode", (*uint8)(&m.Mode))
	if m.Mode > ModeRepair {
		c.fail("mode", "%d is unknown", uint8(m.Mode))
	}
}

func (m *Committed) fields(c *coder) {
	c.fixed("session", m.Session[:])
	c.u32("attempt", &m.Attempt)
	c.u64("seq", &m.Seq)
	c.named("key", &m.Key)
}

func (m *Refused) fields(c *coder) {
	c.fixed("session", m.Session[:])
	c.u32("attempt", &m.Attempt)
	c.named("key", &m.Key)
	c.u8("reason", (*uint8)(&m.Reason))
	if m.Reason < ReasonNotYet || m.Reason > ReasonFailed {
		c.fail("reason", "%d is unknown", uint8(m.Reason))
	}
}

func (m *Report) fields(c *coder) {
	c.fixed("session", m.Session[:])
	c.u64("seq", &m.Seq)
	c.duration("interval", &m.Interval)
	c.named("installed", &m.Installed)
	c.bool("blocked", &m.Blocked)
	c.bool("missing", &m.Missing)
	c.bool("trying", &m.Trying)
	c.bool("no handshake", &m.NoHandshake)
	c.bool("seen", &m.Seen)
	c.u64("confirmed", &m.Confirmed)
	c.names("held", &m.Held)
}

func (m *Bye) fields(c *coder) {
	c.fixed("session", m.Session[:])
	c.text("reason", &m.Reason, MaxText)
}
