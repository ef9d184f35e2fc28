// Package wire turns the messages of the keyturn protocol into bytes and
// back. It owns the encoding (docs/PROTOCOL.md, 4) and its limits; it does no
// I/O and knows nothing of what messages mean.
package wire

import (
	"time"

	"keyturn/internal/psk"
)

// Version is the version of the protocol that this package encodes.
const Version = 3

// Limits of the encoding. A message that breaks one is refused by Decode and
// cannot be made by Encode.
const (
	MaxMessage     = 16 << 10 // bytes of an encoded message
	MaxText        = 1 << 10  // bytes of any string: an SAE ID, a key ID, a reason
	MaxName        = 64       // bytes of the name of a KEM
	MaxKEMs        = 8        // KEMs of a tunnel
	MaxBlob        = 4 << 10  // bytes of an encapsulation key or ciphertext
	MaxHeld        = 64       // keys named in one message
	MaxDifferences = 32       // differences named in one refusal
)

// BootID is random for each start of a rotator's process.
type BootID [16]byte

// SessionID is random for each bootstrap; the server draws it. Zero means none.
type SessionID [16]byte

// Named is a key by its name: the serial within the tunnel and the
// fingerprint. The PSK found at the first start has serial 0.
type Named struct {
	Serial      uint64
	Fingerprint psk.Fingerprint
}

// Parameters is what both ends of a tunnel must agree on.
type Parameters struct {
	Version       uint16        // of the protocol
	SAE           string        // of the sender; empty where the tunnel uses no QKD
	PeerSAE       string        // of the receiver
	PublicKey     [32]byte      // WireGuard public key of the sender
	PeerPublicKey [32]byte      // WireGuard public key of the receiver
	QKD           bool          // whether QKD is a source
	KEMs          []string      // names, in order
	Require       uint8         // rotation.Require
	Combiner      uint8         // psk.Combiner
	Buffer        uint16        // keys
	Window        time.Duration // whole milliseconds
	// Initial names the PSK found at the first start where fallback is
	// "initial"; zero where fallback is "none".
	Initial psk.Fingerprint
}

// A Message is a pointer to one of the types below.
type Message interface {
	kind() kind
	// fields hands every field to c, in the order of the encoding: one
	// description for both directions, so that they cannot drift apart.
	fields(c *coder)
}

// Init is the initialization message of a bootstrap (client to server).
type Init struct {
	Attempt    uint64 // strictly rising within one boot of the client
	Boot       BootID
	High       uint64 // the highest serial the client knows
	Parameters Parameters
	Held       []Named // every key the client holds; a set
}

// Difference is one parameter on which the two ends disagree.
type Difference struct {
	Field          string // as in the configuration: "kems", "window"
	Client, Server string // the value at either end, printable
}

// Ack is the server's answer to Init: acceptance, or a refusal that names
// every difference. It opens the session in either case.
type Ack struct {
	Attempt     uint64 // of the Init it answers
	Session     SessionID
	Boot        BootID
	High        uint64
	Parameters  Parameters   // the server's own, as the server sees them
	Held        []Named      // every key the server holds; a set
	Kept        bool         // buffered keys that both name are kept: a mere reconnect
	Differences []Difference // none: accepted
}

// Sources says which sources a key is made of. Bit 0 is QKD; bit i+1 is the
// tunnel's i-th KEM.
type Sources uint16

// Propose opens a round (client to server).
type Propose struct {
	Session           SessionID
	Serial            uint64
	Sources           Sources
	KeyID             string   // of the QKD key; empty if and only if QKD is not in Sources
	EncapsulationKeys [][]byte // one for each KEM in Sources, in order; of the client
	Held              []uint64 // uncommitted serials that the client holds or is establishing; a set
}

// Reply answers Propose (server to client).
type Reply struct {
	Session           SessionID
	Serial            uint64
	Sources           Sources  // those of the proposal that the server has as well
	EncapsulationKeys [][]byte // one for each KEM in Sources, in order; of the server
	Ciphertexts       [][]byte // the same; encapsulated to the client's keys
}

// Finish carries the client's ciphertexts and digest (client to server).
type Finish struct {
	Session     SessionID
	Serial      uint64
	Ciphertexts [][]byte // encapsulated to the server's keys
	Digest      [32]byte
}

// Done carries the server's digest (server to client).
type Done struct {
	Session SessionID
	Serial  uint64
	Digest  [32]byte
}

// Abandon ends a round without a key, from either end.
type Abandon struct {
	Session SessionID
	Serial  uint64
	Reason  string // printable, for the other end's log
	High    uint64 // the highest serial the sender knows
}

// Mode says by which rule a commit is sent.
type Mode uint8

// The rules by which a commit is sent.
const (
	ModeWindow Mode = iota // within the window after a handshake
	ModeIdle               // no live session: the window does not apply
	ModeRepair             // the installed keys differ
)

// Commit asks the server to set a key (client to server).
type Commit struct {
	Session   SessionID
	Attempt   uint32 // rising; the answer repeats it
	Key       Named
	Installed Named  // what the client has installed
	Confirmed uint64 // highest serial that the client knows to be confirmed
	Mode      Mode
}

// Committed says that the server has set the key.
type Committed struct {
	Session SessionID
	Attempt uint32
	Seq     uint64 // shared with Report: orders what the server says of itself
	Key     Named
}

// Reason says why the server did not set a key.
type Reason uint8

// The reasons of a refused commit.
const (
	ReasonNotYet  Reason = iota + 1 // its newest dump shows no handshake in the window
	ReasonUnknown                   // it does not hold the key
	ReasonStale                     // the key is not above its installed serial
	ReasonDiffers                   // the installed keys differ: repair comes first
	ReasonBusy                      // it is still carrying out another commit
	ReasonFailed                    // WireGuard or the journal failed
)

// Refused says that the server did not set the key.
type Refused struct {
	Session SessionID
	Attempt uint32
	Key     Named
	Reason  Reason
}

// Report is the heartbeat: what an end says of its own keys.
type Report struct {
	Session   SessionID
	Seq       uint64        // strictly rising within a boot
	Interval  time.Duration // whole milliseconds until the next one, at the latest
	Installed Named         // zero fingerprint: no PSK, or one that this end does not know
	Blocked   bool          // a random PSK closes the tunnel
	Missing   bool          // WireGuard does not know the peer: nothing can be set here
	Trying    bool          // no live session here, and handshakes are tried without success
	// WireGuard has had no handshake with the peer since it was made.
	NoHandshake bool
	Seen        bool    // a later handshake was observed under Installed
	Confirmed   uint64  // highest confirmed serial in this end's journal
	Held        []Named // a set
}

// Bye says that the sender stops on purpose.
type Bye struct {
	Session SessionID
	Reason  string // printable
}
