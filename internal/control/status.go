// Package control is a rotator's local API: the Status type that `keyturn
// status --json` prints, served with two verbs over HTTP on a unix socket.
// It knows nothing of the rotator behind it but the Handler interface, and
// never carries key material: keys go by serial and fingerprint.
package control

import (
	"fmt"
	"strconv"
	"time"
)

// Status is everything a rotator says of itself, as `keyturn status --json`
// prints it: one object for each interface. Names and meanings are stable;
// fields and words may be added, so readers ignore what they do not know.
// Durations are seconds, times RFC 3339 by this host's clock; a field
// without a value is left out.
type Status struct {
	Interface  string       `json:"interface"`         // WireGuard interface
	PID        int          `json:"pid"`               // process ID of the rotator
	Version    string       `json:"version"`           // of keyturn, of the running process
	State      State        `json:"state"`             // up, hold or down
	StartedAt  time.Time    `json:"started_at"`        // start of the process
	ConfigPath string       `json:"config_path"`       // absolute
	Listen     string       `json:"listen"`            // address of the link's listener
	PublicKey  string       `json:"public_key"`        // WireGuard public key of the interface
	Identity   string       `json:"identity"`          // the rotator's own identity, as `keyturn pubkey` prints it
	Peers      []PeerStatus `json:"peers"`             // in the order of the configuration
	Warnings   []Warning    `json:"warnings"`          // that concern the whole interface
	Problem    string       `json:"problem,omitempty"` // why the rotator does not answer, where it should
}

// PeerStatus is what a rotator says of one peer.
type PeerStatus struct {
	Name      string `json:"name"`
	PublicKey string `json:"public_key"`         // WireGuard public key of the peer
	Role      string `json:"role"`               // of this rotator towards the peer: client or server
	SAE       string `json:"sae,omitempty"`      // own SAE ID; none without QKD
	PeerSAE   string `json:"peer_sae,omitempty"` // the peer's; likewise

	State PeerState `json:"state"`
	// Protected: the tunnel is under a key that both ends have confirmed and
	// that is younger than max_key_age, or under its verified successor,
	// installed but not yet confirmed. Everything else is not protected.
	Protected bool   `json:"protected"`
	Why       string `json:"why,omitempty"` // one sentence, if not Protected

	HandshakeAge *Seconds `json:"handshake_age_seconds,omitempty"` // nil: none since the rotator started, or unknown

	Installed    *Key      `json:"installed,omitempty"`       // in WireGuard now; nil: no PSK, or a blocking one
	Confirmed    *Key      `json:"confirmed,omitempty"`       // the newest that both ends have confirmed
	KeyAge       *Seconds  `json:"key_age_seconds,omitempty"` // since the installed key was first installed
	Rotations    uint64    `json:"rotations"`                 // keys installed since the process started
	LastRotation time.Time `json:"last_rotation,omitzero"`    // when the last of them was

	Buffer      Buffer       `json:"buffer"`
	Link        Link         `json:"link"`
	KMS         *KMS         `json:"kms,omitempty"` // nil: the peer uses no QKD
	Differences []Difference `json:"differences"`   // why the bootstrap was refused
	Warnings    []Warning    `json:"warnings"`
}

// State is that of a whole rotator.
type State string

// The states of a rotator. Words and not integers, like PeerState, because
// a program that reads them may be older or newer than the rotator.
const (
	StateDown State = "down" // stopping, or (in ls) not running
	StateHold State = "hold" // at least one peer has not finished its bootstrap
	StateUp   State = "up"   // every peer has
)

// PeerState says what a rotator is doing about a peer. It does not say
// whether the tunnel is protected: after a restart a peer is in hold while
// its tunnel still has a confirmed key.
type PeerState string

// The states of a peer; where several apply, the last of them.
const (
	PeerHold         PeerState = "hold"         // not bootstrapped (again): no link, or no answer yet
	PeerRefused      PeerState = "refused"      // the two configurations differ: see Differences
	PeerEstablishing PeerState = "establishing" // agreed; no verified key yet
	PeerWaiting      PeerState = "waiting"      // verified keys are there; the first waits for a handshake
	PeerUnconfirmed  PeerState = "unconfirmed"  // the first key is installed and not yet confirmed
	PeerProtected    PeerState = "protected"    // rotating
	PeerStale        PeerState = "stale"        // no fresh key for max_key_age; the old one is kept
	PeerRepairing    PeerState = "repairing"    // the ends have different keys installed
	PeerHunting      PeerState = "hunting"      // trying the keys that the other end may have
	PeerBlocked      PeerState = "blocked"      // a random PSK closes the tunnel until the next verified key
	PeerMissing      PeerState = "missing"      // WireGuard does not know the peer, or the interface has gone
)

// Key names a key without giving anything of it away.
type Key struct {
	Serial      uint64    `json:"serial"`             // 0: found at the start, not made by keyturn; or the recovery key
	Fingerprint string    `json:"fingerprint"`        // eight hex digits
	Since       time.Time `json:"since,omitzero"`     // installed, or confirmed, at this end
	Recovery    bool      `json:"recovery,omitempty"` // the recovery key
	Sources     []string  `json:"sources,omitempty"`  // "QKD" and the names of KEMs; none where not known
}

// Buffer is the fill of a peer's key buffer, in keys.
type Buffer struct {
	Len int `json:"len"`
	Cap int `json:"cap"`
}

// Link is the connection to the peer's rotator.
type Link struct {
	State      LinkState `json:"state"`
	Since      time.Time `json:"since,omitzero"`        // of State
	RemoteAddr string    `json:"remote_addr,omitempty"` // of the connection, or else the configured address
	Inside     bool      `json:"inside"`                // it runs inside the tunnel that it looks after
	Error      string    `json:"error,omitempty"`       // why it is not up
}

// LinkState is that of a link.
type LinkState string

// The states of a link.
const (
	LinkDown    LinkState = "down"    // no connection
	LinkRefused LinkState = "refused" // the other end is not who it should be, or turns us away
	LinkUp      LinkState = "up"      // authenticated, and not silent
)

// KMS is the key management system that a peer's QKD keys come from.
type KMS struct {
	State     KMSState  `json:"state"`
	URI       string    `json:"uri,omitempty"`        // the one used last
	LastError string    `json:"last_error,omitempty"` // while failing
	LastKeyAt time.Time `json:"last_key_at,omitzero"` // when it last delivered
	Keys      *int      `json:"keys,omitempty"`       // stored for this pair, where the KMS says
}

// KMSState is that of a KMS as the peer's last request found it.
type KMSState string

// The states of a KMS.
const (
	KMSUnknown KMSState = "unknown" // not asked yet
	KMSFailing KMSState = "failing"
	KMSOK      KMSState = "ok"
)

// Difference is one parameter on which the two ends disagree.
type Difference struct {
	Field  string `json:"field"` // as in the configuration
	Ours   string `json:"ours"`
	Theirs string `json:"theirs"`
}

// Seconds is a duration that JSON shows as seconds, to the millisecond.
type Seconds time.Duration

// MarshalJSON returns a JSON number.
func (s Seconds) MarshalJSON() ([]byte, error) {
	d := time.Duration(s).Round(time.Millisecond)
	return strconv.AppendFloat(nil, d.Seconds(), 'f', -1, 64), nil
}

// UnmarshalJSON reads what MarshalJSON writes, and no more than a century.
func (s *Seconds) UnmarshalJSON(b []byte) error {
	const century = 100 * 366 * 24 * 3600
	f, err := strconv.ParseFloat(string(b), 64)
	if err != nil || !(f >= -century && f <= century) {
		return fmt.Errorf("%q is not a number of seconds", b)
	}
	*s = Seconds(time.Duration(f * float64(time.Second)).Round(time.Millisecond))
	return nil
}

// Degraded reports whether a tunnel is not protected or a warning says that
// an operator should act: exit code 3 of `status` and `ls`.
func (s *Status) Degraded() bool {
	for _, p := range s.Peers {
		if !p.Protected || anyDegrades(p.Warnings) {
			return true
		}
	}
	return s.State == StateDown || anyDegrades(s.Warnings)
}

// ProtectedPeers counts the peers whose tunnel is protected.
func (s *Status) ProtectedPeers() int {
	n := 0
	for _, p := range s.Peers {
		if p.Protected {
			n++
		}
	}
	return n
}

func anyDegrades(ws []Warning) bool {
	for _, w := range ws {
		if w.Severity != SeverityInfo {
			return true
		}
	}
	return false
}
