// Package config turns a configuration file into a Config, or says everything
// that is wrong with it at once, each problem with its line, column and a
// hint. It owns the language of the file and its limits. It reads the file
// and looks at the files that it names; it never reads a secret, writes
// anything, or talks to WireGuard or the network.
package config

import (
	_ "embed" // for Example
	"time"
)

// Example is a complete configuration with every key explained: the manual.
//
//go:embed example.yaml
var Example []byte

// Ranges and defaults. Whoever changes one changes the manual as well.
const (
	DefaultListen = "[::]:51822"

	// A tunnel's next handshake comes 120 s after the last. A minute is as
	// far into that as a swap may go; below 5 s a busy host can miss the
	// handshake, which is polled for every 2 s.
	DefaultWindow = 30 * time.Second
	MinWindow     = 5 * time.Second
	MaxWindow     = time.Minute

	// A key is replaced at its half life at the latest, which has to leave
	// room for one session of 120 s.
	DefaultMaxKeyAge = time.Hour
	MinMaxKeyAge     = 5 * time.Minute
	MaxMaxKeyAge     = 7 * 24 * time.Hour

	DefaultBuffer = 3
	MaxBuffer     = 64

	DefaultTimeout = 5 * time.Second
	MinTimeout     = 100 * time.Millisecond
	MaxTimeout     = time.Minute

	MaxKEMs       = 8
	MaxIdentities = 2
	MaxURIs       = 16
	MaxPins       = 2
	MaxSAE        = 256 // bytes of an SAE ID
)

// Config is what one configuration file means: one rotator, for one WireGuard
// interface. Every path in it is ready to be opened.
type Config struct {
	// Interface is the name of the WireGuard interface whose tunnels are
	// rotated. It must exist and have a private key before the rotator
	// starts; keyturn creates and configures no interface. Required.
	Interface string

	// Listen is the TCP address, host:port, at which peers reach this
	// rotator. An empty host is every address of the machine. It is used
	// even where this end is client towards every peer. Default [::]:51822.
	Listen string

	// Identity is the path of the secret that this rotator proves itself
	// with, as `keyturn genkey` writes it. Refused where group or others can
	// read it. Required.
	Identity string

	// Window is the time after a tunnel's handshake in which a PSK may be
	// set. Both ends must have the same. 5s to 1m; default 30s. Short windows
	// miss handshakes on busy hosts, long ones come close to the next.
	Window time.Duration

	// Journal, where present, keeps keys on disk and encrypted, so that a
	// tunnel comes back by itself after both ends' reboot even where the link
	// runs inside it. Nil: the journal is in memory and gone at reboot.
	Journal *Journal

	// KMS is the key management system that serves every peer without a kms
	// block of its own. Nil: none.
	KMS *KMS

	// Peers are the tunnels to rotate, at least one. Peers that WireGuard has
	// beside them are left alone.
	Peers []*Peer

	source document
	at     map[string]position // of the values, by key
	files  []file
}

// Journal says where a persistent journal lies.
type Journal struct {
	// Path is the journal's directory, with one file for each peer. It is
	// made when it is missing, mode 0700; the directory above it must exist
	// and be writable. Required.
	Path string

	// KeyFile is the path of the secret that encrypts the journal, as
	// `keyturn genkey` writes it: best on another disk, or handed out by
	// systemd's LoadCredential. Refused where group or others can read it.
	// Required.
	KeyFile string
}

// KMS is how to get keys from the QKD network. A peer's own kms block replaces
// the default as a whole: nothing is inherited.
type KMS struct {
	// Interface is what the KMS speaks: 14 (ETSI GS QKD 014), 4 (ETSI GS QKD
	// 004) or skip (Cisco SKIP). Default 14.
	Interface Interface

	// Dialect is the wire format of interface 4, which the standard leaves
	// open: forge-ed3 or forge-ed1. The wrong one hangs, so it is never
	// guessed. Required with interface 4, refused without.
	Dialect Dialect

	// URIs are where the KMS is reached, tried in order: at most 16. Base
	// addresses without a final slash and without /api/v1/keys for interfaces
	// 14 and skip (https://kme-a:8443), host:port for interface 4. Required.
	URIs []string

	// SAE is the ID under which the KMS knows this end: 1 to 256 bytes of
	// printable text. Required.
	SAE string

	// Certificate, SecretKey and RootCertificate are the paths of the PEM
	// files of mutual TLS: our certificate, its key (refused where group or
	// others can read it), and the authority that signed the KMS's. Required.
	Certificate     string
	SecretKey       string
	RootCertificate string

	// ServerName is the name in the KMS's certificate, where that is not the
	// URI's host. Default: the URI's host.
	ServerName string

	// Pins name the KMS's certificate by its key, beside the authority that
	// signed it, and instead of the URI's host: the SHA-256 of its
	// SubjectPublicKeyInfo, as `keyturn kms test` prints it. One, or two while
	// the certificate is being renewed. Default: none.
	Pins [][32]byte

	// Method is how keys are asked for with interface 14: GET, which every
	// KMS understands, or POST. Default GET.
	Method Method

	// Timeout bounds one request, connecting included. 100ms to 1m; default
	// 5s. Too short, and keys are lost that the KMS has already handed out.
	Timeout time.Duration
}

// Peer is one tunnel: a WireGuard peer that has a rotator of its own. Unless a
// value says otherwise, both ends must be configured alike, and refuse each
// other, naming every difference, where they are not.
type Peer struct {
	// Name is what logs, metrics and status call the peer: 1 to 63 of
	// A-Z a-z 0-9 . _ -. Each end chooses for itself. Required, unique.
	Name string

	// PublicKey is the WireGuard public key of the peer. Required, unique.
	PublicKey [32]byte

	// Identities are the fingerprints that the peer's rotator may prove, as
	// `keyturn pubkey` writes them: one, or two while it is being changed.
	// Required, unique.
	Identities [][32]byte

	// Address is where the peer's rotator listens, host:port; names are
	// resolved at each dial. Empty: the peer has to dial. An address in the
	// peer's allowed IPs puts the link inside the tunnel; over the ordinary
	// network it repairs a lost tunnel sooner. Required on a client.
	Address string

	// SAE is the ID of the peer's SAE in the QKD network: 1 to 256 bytes of
	// printable text. Required with a KMS; without one it means nothing.
	SAE string

	// Role says who starts everything: client or server. The other end must
	// have the other one. Default: the end with the smaller WireGuard public
	// key is client; ask ResolveRole.
	Role Role

	// KMS is the KMS of this tunnel: the peer's own, else the default of the
	// file. Nil: none, or `kms: none`; the tunnel works by KEMs alone.
	KMS *KMS

	// KEMs are the post-quantum key exchanges that take part in every key, in
	// order: at most 8. Required without a KMS. Each costs CPU at both ends.
	KEMs []string

	// Require says which sources a key may lack when they fail: all (none),
	// qkd (KEMs may be missing), pqc (QKD may be missing), any (whatever is
	// left). Default all: rotation stops while a source is down, and the
	// tunnel keeps its last key.
	Require Require

	// Combiner makes one key of the sources: xor or hkdf-sha384. Default xor.
	Combiner Combiner

	// Buffer is how many verified keys are kept ready: 1 to 64; default 3.
	// More outlast a longer failure of the sources; QKD keys are scarce.
	Buffer int

	// Window is the file's window, or the peer's own.
	Window time.Duration

	// OnStale says what happens when no fresh key came for MaxKeyAge: keep
	// (the last confirmed key stays, with a warning) or block (the tunnel
	// closes at its next handshake). Default keep. Each end for itself.
	OnStale OnStale

	// MaxKeyAge is the age at which a key is stale, counted from its first
	// installation. An idle tunnel gets a new key at half of it. 5m to 168h;
	// default 1h. Each end for itself.
	MaxKeyAge time.Duration

	// Start says what happens before the first rotation: hold (the PSK that
	// was found stays) or block (the tunnel is closed). Default hold. Each
	// end for itself.
	Start Start

	// Fallback names a last resort for ends that lost each other's keys: none,
	// or initial, the PSK found at the first start. Whoever can block the
	// tunnel can force it there. Default none.
	Fallback Fallback

	// Recovery is automatic, or manual: I accept to repair the tunnel by hand
	// after a reboot. Asked for only where the link runs inside the tunnel
	// without journal and fallback. Default automatic. Each end for itself.
	Recovery Recovery

	source *document
	begin  position            // of the peer's block
	at     map[string]position // of the values, by key
	// journal: the rotator's journal survives a reboot.
	journal bool
}
