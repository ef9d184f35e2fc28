package rotation

import (
	"fmt"
	"time"

	"keyturn/internal/psk"
	"keyturn/internal/wire"
)

// An Event is something that happened to a machine.
type Event interface{ event() }

// Events for both machines.
type (
	// Tick says that the deadline passed, or that the other machine changed
	// the tunnel.
	Tick struct{}
	// LinkUp says that an authenticated link to the peer stands. A new link
	// replaces the old one.
	LinkUp struct {
		Peer   [32]byte // link identity that the peer has proved: one of its pins
		Inside bool     // the link runs inside the tunnel
	}
	// LinkDown says that the link has gone.
	LinkDown struct{}
	// Received is a message from the peer over the link.
	Received struct{ Message wire.Message }
)

// Events for the KeyGenerator.
type (
	// Fetched answers Fetch. The machine owns Key from here on.
	Fetched struct {
		ID    uint64 // of the Fetch
		KeyID string
		Key   *psk.Key // nil if Err is set
		Err   error
	}
	// OtherVersion says that the peer sent a bootstrap message of a protocol
	// version that cannot be decoded.
	OtherVersion struct{ Version uint16 }
	// RoleConflict says that the peer takes itself for what this end is:
	// client, or server.
	RoleConflict struct{}
)

// Events for the KeyRotationScheduler.
type (
	// Observed is what a dump of the WireGuard device showed of the peer.
	Observed struct {
		Began     time.Time // when the dump began, on the clock of Step's now
		Wall      time.Time // wall clock at that time, to judge Handshake once at the start
		Present   bool
		PSK       *psk.Key  // all-zero: none; the owner keeps it
		Handshake time.Time // latest handshake on the wall clock; zero: never
		Rx, Tx    uint64    // bytes
		Jumped    bool      // the wall clock and the monotonic clock have parted
	}
	// Saved answers Save.
	Saved struct {
		Token uint64
		Err   error
	}
	// Set answers SetPSK and Renew.
	Set struct {
		Token uint64
		Err   error
	}
	// Rotate is the operator's wish to rotate at the next window, or at once
	// where there is no live session.
	Rotate struct{}
	// Stop is the operator's wish to end: the scheduler begins nothing any
	// more, and says goodbye when what is under way is done; at once if it
	// is told again.
	Stop struct{}
)

func (Tick) event()         {}
func (LinkUp) event()       {}
func (LinkDown) event()     {}
func (Received) event()     {}
func (Fetched) event()      {}
func (OtherVersion) event() {}
func (RoleConflict) event() {}
func (Observed) event()     {}
func (Saved) event()        {}
func (Set) event()          {}
func (Rotate) event()       {}
func (Stop) event()         {}

// An Effect is something that a machine wants done.
type Effect interface{ effect() }

// The effects.
type (
	// Send queues a message on the link; without a link it is dropped.
	Send struct{ Message wire.Message }
	// CloseLink ends the link: the peer has been silent for too long.
	CloseLink struct{}
	// Redial asks for a second connection beside the one that stands, which
	// has fallen silent; it replaces that one with its first message. Where
	// it is not Wanted, it is no longer: the peer was heard, or there is a
	// new link. Only a client asks.
	Redial struct{ Wanted bool }
	// Fetch asks the KMS for a key: a fresh one if KeyID is empty, otherwise
	// the one of that ID. It is answered by Fetched, at any time.
	Fetch struct {
		ID    uint64
		KeyID string
	}
	// Save makes the journal hold exactly this. It is answered by Saved.
	// The owner wipes the journal's keys.
	Save struct {
		Token   uint64
		Journal Journal
	}
	// SetPSK sets the peer's PSK; a nil Key removes it. It is answered by
	// Set. The owner wipes Key.
	SetPSK struct {
		Token uint64
		Key   *psk.Key
	}
	// Renew removes the peer from WireGuard and adds it again as it was, so
	// that WireGuard forgets the session and when the other end's last
	// handshake began. It is answered by Set.
	Renew struct{ Token uint64 }
	// Probe sends one packet into the tunnel.
	Probe struct{}
	// Poll asks for a dump soon.
	Poll struct{}
	// Wake asks for a Tick to the other machine of the peer.
	Wake struct{}
	// Note is for the log.
	Note struct {
		Kind NoteKind
		Key  wire.Named // zero where it concerns no key
		Text string
	}
)

func (Send) effect()      {}
func (CloseLink) effect() {}
func (Redial) effect()    {}
func (Fetch) effect()     {}
func (Save) effect()      {}
func (SetPSK) effect()    {}
func (Renew) effect()     {}
func (Probe) effect()     {}
func (Poll) effect()      {}
func (Wake) effect()      {}
func (Note) effect()      {}

// NotRefused is the text of the NoteInstalled of a key that WireGuard was
// thought to have refused.
const NotRefused = "though WireGuard seemed to refuse"

// NoteKind says what a Note is about.
type NoteKind uint8

// What machines tell the log.
const (
	NoteBootstrapped NoteKind = iota + 1 // both ends agree
	NoteRefused                          // they do not
	NoteEstablished                      // a verified key lies in the buffer
	NoteAbandoned                        // a round failed
	NoteReduced                          // a source was left out, as the policy allows
	NoteInstalled                        // a key was set
	NoteConfirmed                        // both ends saw a handshake under it
	NoteDropped                          // a key goes unused
	NoteRepairing                        // the installed keys differ
	NoteHunting                          // looking for the key of the other end
	NoteHuntEnded                        // a handshake came
	NoteForeign                          // somebody else changed the PSK
	NoteMissing                          // WireGuard does not know the peer
	NotePresent                          // it does again
	NoteAging                            // no fresh key for three quarters of max_key_age
	NoteStale                            // no fresh key for max_key_age
	NoteBlocked                          // a random PSK closes the tunnel
	NoteFailed                           // the journal or WireGuard failed
	NoteSilent                           // the peer sent nothing for four heartbeats
	NoteGoodbye                          // the peer stops on purpose
	NoteRenewed                          // the peer was removed from WireGuard and added again
)

var noteNames = map[NoteKind]string{
	NoteBootstrapped: "bootstrapped", NoteRefused: "refused", NoteEstablished: "established",
	NoteAbandoned: "abandoned", NoteReduced: "reduced", NoteInstalled: "installed", NoteConfirmed: "confirmed",
	NoteDropped: "dropped", NoteRepairing: "repairing", NoteHunting: "hunting", NoteHuntEnded: "hunt ended",
	NoteForeign: "foreign change", NoteMissing: "missing", NotePresent: "present", NoteAging: "aging", NoteStale: "stale",
	NoteBlocked: "blocked", NoteFailed: "failed", NoteSilent: "silent", NoteGoodbye: "goodbye",
	NoteRenewed: "renewed",
}

func (k NoteKind) String() string {
	if s, ok := noteNames[k]; ok {
		return s
	}
	return fmt.Sprintf("note %d", uint8(k))
}

// Journal is what outlives the process: the keys that may be installed at
// either end.
type Journal struct {
	High    uint64
	Entries []Entry // by rising serial
}

// Entry is one key of a Journal.
type Entry struct {
	Serial    uint64 // zero: the PSK found at the first start, or the recovery key
	Key       *psk.Key
	Installed time.Time // wall clock of its first installation; zero: never installed here
	Agreed    bool      // both ends reported it installed
	Seen      bool      // a later handshake was observed here
	Confirmed bool      // at both ends
	Recovery  bool      // with serial zero: the recovery key, no longer the PSK found
}

// Wipe overwrites the journal's keys.
func (j *Journal) Wipe() {
	for _, e := range j.Entries {
		e.Key.Wipe()
	}
}
