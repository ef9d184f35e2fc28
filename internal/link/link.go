// Package link owns the authenticated connection between two rotators: the
// identities at its ends, the TLS 1.3 handshake with both proofs, the frames
// on it, dialling and accepting (docs/PROTOCOL.md, 2 and 3). It never looks
// into a frame and never decides who is a peer: its callers hold the pins.
//
// What each part is trusted for:
//
//   - TLS 1.3 with a hybrid group keeps frames secret and whole as long as
//     either its elliptic curve or its ML-KEM half holds.
//   - The Ed25519 key in the certificate proves the other end today; nothing
//     else in a certificate is believed.
//   - The ML-DSA-65 signature over the connection's exporter proves it even
//     to those who reckon with a quantum computer in the path.
//   - The fingerprint, 32 bytes exchanged by the operators, is the only root
//     of trust: there is no authority, no name and no date to check.
//   - The identity file is trusted because nobody but its owner can read it.
//   - A peer that has proved itself is still bounded in size, time and memory,
//     for it may be broken into; whoever has not is bounded more tightly.
package link

import (
	"errors"
	"io"
	"time"
)

// Protocol is the name negotiated by ALPN (RFC 7301). An end that does not
// negotiate it is turned away during the TLS handshake.
const Protocol = "keyturn/1"

// The labels of the link. Each separates one use of a primitive from all others.
const (
	labelEd25519     = "keyturn/1 identity ed25519"     // HKDF info: secret -> Ed25519 seed
	labelMLDSA       = "keyturn/1 identity ml-dsa-65"   // HKDF info: secret -> ML-DSA-65 seed
	labelFingerprint = "keyturn/1 identity fingerprint" // first field of the fingerprint
	labelExporter    = "EXPORTER-keyturn-1-link"        // TLS exporter (RFC 8446, 7.5), no context
	contextProof     = "keyturn/1 link proof"           // ML-DSA context string (FIPS 204, 5.2)
)

// Limits of a link, the same at both ends.
const (
	// MaxFrame is the most bytes that a frame can carry; the fewest is one.
	MaxFrame = 16 << 10

	// HandshakeTimeout bounds everything from the first byte to the second
	// proof. A client counts from the dial.
	HandshakeTimeout = 5 * time.Second

	// DefaultSilence is how long Receive waits before SetSilence is called:
	// four of the longest heartbeat intervals.
	DefaultSilence = time.Minute

	frameTimeout = 5 * time.Second  // from a frame's first byte to its last
	writeTimeout = 10 * time.Second // for what one write hands to TCP
	closeGrace   = time.Second      // for what is queued when Close is called

	maxQueued         = 256 << 10 // bytes, headers included, that Send queues and TCP has not taken
	maxCertificate    = 2 << 10   // bytes of the one certificate; ours have about 300
	maxBeforeIdentity = 32 << 10  // bytes read before both proofs; a handshake takes about 9,000
)

// What a caller can tell apart. Errors of the network are passed on as they are.
var (
	// ErrUnknownPeer means that the other end's keys match no pin.
	ErrUnknownPeer = errors.New("identity of the other end is not a known one")

	// ErrProof means that the other end shows a pinned identity and cannot
	// prove it on this connection: an attack, or a broken implementation.
	ErrProof = errors.New("other end does not prove its identity")

	// ErrRefused means that the server closed the connection on seeing the
	// client's proof. It never says why; most often it does not know the client.
	ErrRefused = errors.New("server closed the connection instead of proving itself; it may not know our identity")

	// errLeft is ErrRefused as the server sees it: a client leaves at once when
	// the certificate claims what it has no pin for.
	errLeft error = hangUp{"client closed the connection instead of proving itself; it may not know our identity", io.EOF}

	// ErrHandshakeTimeout means that HandshakeTimeout passed.
	ErrHandshakeTimeout = errors.New("handshake not complete within " + HandshakeTimeout.String())

	// ErrCrowded means that a connection had to go because too many had not
	// authenticated yet.
	ErrCrowded = errors.New("too many unauthenticated connections")

	// ErrFrame means a frame that is empty or longer than MaxFrame.
	ErrFrame = errors.New("frame is not 1 to 16384 bytes long")

	// ErrSlow means that the other end does not take what is sent to it.
	ErrSlow = errors.New("other end reads too slowly")

	// ErrSilent means that nothing, or half a frame, came for too long.
	ErrSilent = errors.New("other end is silent")
)
