// Package rotation holds the two machines of a peer, KeyGenerator and
// KeyRotationScheduler, and the Tunnel that they share. It does no I/O, starts
// no goroutine, holds no lock and never reads the clock: an owner feeds events
// to Step, carries out the effects that Step returns in their order, and
// sends Tick when Deadline passes. The owner lets only one of a peer's two
// machines step at a time.
//
// The numbers in comments (B1, E3, C2, R1, H4 ...) are the steps of
// docs/PROTOCOL.md.
package rotation

import (
	"encoding/binary"
	"fmt"
	"io"
	"time"

	"keyturn/internal/kem"
	"keyturn/internal/psk"
	"keyturn/internal/wire"
)

// Role is what a rotator does towards one peer. The client starts everything,
// the server answers.
type Role uint8

// The two roles.
const (
	Client Role = iota + 1
	Server
)

func (r Role) String() string {
	switch r {
	case Client:
		return "client"
	case Server:
		return "server"
	}
	return "no role"
}

// Require says which sources a key must be made of.
type Require uint8

// The policies. The zero value is the strictest.
const (
	RequireAll Require = iota // every configured source and KEM
	RequireQKD                // QKD; KEMs may be missing
	RequirePQC                // all KEMs; QKD may be missing
	RequireAny                // at least one
)

var requireNames = [...]string{"all", "qkd", "pqc", "any"}

func (r Require) String() string {
	if int(r) < len(requireNames) {
		return requireNames[r]
	}
	return fmt.Sprintf("require %d", uint8(r))
}

// Times of the protocol (docs/PROTOCOL.md, 9).
const (
	MinAge        = 300 * time.Millisecond  // C2: age of a handshake before a commit
	SeenAfter     = 2 * time.Second         // C5: from an install to a handshake that counts
	ProbeAfter    = 2500 * time.Millisecond // C6: from an install to the client's probe
	LateProbe     = 4 * time.Second         // C6: to the server's, if no handshake came
	SessionLife   = 180 * time.Second       // WireGuard's REJECT_AFTER_TIME
	RekeyAfter    = 120 * time.Second       // WireGuard's REKEY_AFTER_TIME
	HuntEvidence  = 10 * time.Second        // H1: two retries of 5 s: the third attempt has begun
	DeadAfter     = 25 * time.Second        // H1: of sending unheard: WireGuard's 15 s and two retries
	TryingAfter   = 7 * time.Second         // W1: an attempt and WireGuard's first retry had no success
	BlankAfter    = 5 * time.Second         // W3: nothing heard of a peer that has lost the session; by then WireGuard has tried again
	RenewAfter    = 2 * time.Second         // W3: in which the other end may begin a handshake; 3 s at the client
	HuntRepair    = 30 * time.Second        // H1: repair without success
	ClientDwell   = 12 * time.Second        // H3
	ServerDwell   = 40 * time.Second        // H3
	HuntProbe     = 10 * time.Second        // H5
	MaxCandidates = 3                       // H2

	initRetry    = 3 * time.Second        // B1: an unanswered Init; B5: messages of another session
	commitRetry  = 2 * time.Second        // C2: an unanswered commit
	notYetRetry  = 300 * time.Millisecond // C3: a commit refused as "not yet"
	repairRetry  = time.Second            // R2: a refused repair
	setRetry     = 2 * time.Second        // a journal or a WireGuard that failed
	restoreReset = 10 * time.Minute       // foreign changes further apart are not recurring
	restoreMax   = time.Minute            // longest backoff against a recurring foreign change
	roundTimeout = 10 * time.Second       // E1 to E6
	patience     = 6 * time.Second        // E2, E4: for a KMS that may be left out; the other end waits for 10 s
	roundBackoff = 500 * time.Millisecond // after the first failed round, doubled up to:
	roundMaxWait = 5 * time.Second
	tryingRecent = 15 * time.Second // W1: since the last attempt; polls of hubs are 10 s apart
	helpEvery    = 10 * time.Second // W2: probes
	knockFirst   = 30 * time.Second // W4: since the link was lost, since anything was sent, and since the walk before
	knockEcho    = 95 * time.Second // W4: in which it may be a knock that makes WireGuard try, which it does for 90 s
	knockMost    = time.Hour        // W4: of rest, long after the link was lost
	clockBack    = 5 * time.Second  // W3: less is no step of a clock
	blankLate    = 3 * time.Second  // W3: by which a report of no handshake may be older, at either end
	renewAgain   = 20 * time.Second // W3: between two
	renewRetry   = time.Minute      // W3: after one that failed
	lateBeats    = 2                // L5: heartbeats that may be missing before the client dials a second connection
	silentBeats  = 4                // L5: before the link is closed
	maxRecords   = 16               // keys in the scheduler's hands, of which a few are usual
	maxRounds    = 4                // rounds under way at once
	maxHigh      = 1 << 62
	remembered   = 64 // keys and key IDs, each, that must not come back
)

// AgingAt is the age from which on a key is said to become stale (F3): half of
// its life after an idle tunnel should have had the next one.
func AgingAt(maxKeyAge time.Duration) time.Duration { return maxKeyAge / 4 * 3 }

// Config is what the machines of one peer are told at their start.
type Config struct {
	Role       Role
	Parameters wire.Parameters // of this end; Initial is filled in by the scheduler
	KEMs       []kem.Scheme    // those of Parameters.KEMs, in order
	Identity   [32]byte        // link identity of this end
	Boot       wire.BootID
	Heartbeat  time.Duration // interval of reports; 2 s, up to 15 s on a hub of thousands
	MaxKeyAge  time.Duration
	BlockStale bool      // on_stale: block
	BlockStart bool      // start: block
	Fallback   bool      // fallback: initial
	Recovery   bool      // keep a recovery key, with the link inside: the journal survives a reboot, and there is no fallback and no block
	Inside     bool      // until the first link: by the configuration it runs inside the tunnel
	Random     io.Reader // session ids, KEM seeds, jitter; never fails
}

// Tunnel is what the two machines of a peer share: the key buffer, the
// session, and the serials. It holds no lock: see the package comment.
type Tunnel struct {
	config Config
	buffer buffer

	linked      bool
	session     wire.SessionID // zero until a bootstrap on this link, accepted or refused
	accepted    bool           // keys may be established
	differences []wire.Difference
	peerHeld    []wire.Named // what the peer named in the bootstrap
	peerBoot    wire.BootID
	peer        [32]byte // link identity of the peer on this link
	high        uint64   // highest serial that either end knows

	records []*record       // what the scheduler holds, by rising serial
	pulled  *record         // the client's next key, taken from the buffer
	initial psk.Fingerprint // under fallback
	judged  bool            // initial is known: recorded, or seen in a dump
	changed bool            // the other machine has something to look at
}

// NewTunnel returns the shared state of a peer's machines. The configuration
// is trusted: internal/config has checked it.
func NewTunnel(c Config) *Tunnel {
	return &Tunnel{config: c, buffer: buffer{capacity: int(c.Parameters.Buffer) + serverSlack(c.Role)}}
}

// serverSlack is how many keys a server holds beyond the agreed buffer: the one
// that the client has pulled and those whose rounds it has not seen end.
func serverSlack(r Role) int {
	if r == Server {
		return 1 + maxRounds
	}
	return 0
}

// Buffer returns the number of buffered keys and how many there should be.
func (t *Tunnel) Buffer() (length, capacity int) {
	return len(t.buffer.entries), int(t.config.Parameters.Buffer)
}

// Session returns the current session, zero if there is none, and whether
// both ends agreed on everything.
func (t *Tunnel) Session() (id wire.SessionID, accepted bool) { return t.session, t.accepted }

// Differences returns what the last bootstrap refused, nil if it did not.
func (t *Tunnel) Differences() []wire.Difference { return t.differences }

// held names every key this end could set, lowest serial first. One that the
// server could not set is not listed (R1). The client, which chooses, knows its
// own, and lists them: they may be set all the same.
func (t *Tunnel) held() []wire.Named {
	var names []wire.Named
	for _, r := range t.records {
		if (!r.failed || t.config.Role == Client) && r.listed(t.config.Fallback) {
			names = append(names, r.name())
		}
	}
	if t.pulled != nil {
		names = append(names, t.pulled.name())
	}
	return append(names, t.buffer.names()...)
}

// record returns the scheduler's record of a key.
func (t *Tunnel) record(n wire.Named) *record {
	for _, r := range t.records {
		if r.name() == n {
			return r
		}
	}
	return nil
}

// bootable says whether this end knows all that the bootstrap compares.
func (t *Tunnel) bootable() bool { return t.judged || !t.config.Fallback }

func (t *Tunnel) raise(high uint64) {
	if high <= maxHigh {
		t.high = max(t.high, high)
	}
}

// roles orders a pair of this end's and the peer's values as client, server.
func roles[T any](r Role, own, peer T) (client, server T) {
	if r == Client {
		return own, peer
	}
	return peer, own
}

// jitter returns a random duration in [d/2, d).
func (t *Tunnel) jitter(d time.Duration) time.Duration {
	var b [4]byte
	_, _ = io.ReadFull(t.config.Random, b[:])
	return d/2 + time.Duration(uint64(d/2)*uint64(binary.BigEndian.Uint32(b[:]))>>32)
}

func contains(names []wire.Named, n wire.Named) bool {
	for _, m := range names {
		if m == n {
			return true
		}
	}
	return false
}
