package psk

import (
	"crypto/hmac"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/binary"
)

// Role is which end of a tunnel made a digest.
type Role uint8

// The roles of a tunnel's ends.
const (
	RoleClient Role = iota
	RoleServer
)

// label separates the digests of the two ends, so that neither can be
// reflected, and from every other use of HMAC under a key.
func (r Role) label() string {
	if r == RoleServer {
		return "keyturn/1 server digest"
	}
	return "keyturn/1 client digest"
}

// DigestContext is what both ends must agree on besides the key.
type DigestContext struct {
	ClientSAE, ServerSAE           string
	ClientIdentity, ServerIdentity [32]byte // fingerprints of the link's identities
	Session                        [16]byte
	Serial                         uint64
	Sources                        uint16
	Transcript                     [32]byte // hash of the round's messages
}

// Digest returns what proves to the other end that this end holds the key and
// saw the same round. It is HMAC-SHA-256 under the key over nine fields, each
// preceded by its length in bytes as a u32, numbers big-endian:
//
//	label            "keyturn/1 client digest" or "keyturn/1 server digest"
//	client SAE ID    empty without QKD
//	server SAE ID
//	client identity  32 bytes
//	server identity  32 bytes
//	session id       16 bytes
//	serial           u64
//	sources          u16
//	transcript       32 bytes
func (k *Key) Digest(role Role, ctx DigestContext) [32]byte {
	in := appendFrame(nil, []byte(role.label()))
	in = appendFrame(in, []byte(ctx.ClientSAE))
	in = appendFrame(in, []byte(ctx.ServerSAE))
	in = appendFrame(in, ctx.ClientIdentity[:])
	in = appendFrame(in, ctx.ServerIdentity[:])
	in = appendFrame(in, ctx.Session[:])
	in = appendFrame(in, binary.BigEndian.AppendUint64(nil, ctx.Serial))
	in = appendFrame(in, binary.BigEndian.AppendUint16(nil, ctx.Sources))
	in = appendFrame(in, ctx.Transcript[:])

	m := hmac.New(sha256.New, k.read())
	m.Write(in)
	return [32]byte(m.Sum(nil))
}

// EqualDigests compares in constant time.
func EqualDigests(a, b [32]byte) bool {
	return subtle.ConstantTimeCompare(a[:], b[:]) == 1
}

// appendFrame appends b and, before it, its length, so that no two lists of
// fields have the same bytes.
func appendFrame(dst, b []byte) []byte {
	dst = binary.BigEndian.AppendUint32(dst, uint32(len(b)))
	return append(dst, b...)
}
