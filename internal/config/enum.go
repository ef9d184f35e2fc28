package config

// Role is of a rotator towards one peer.
type Role string

// The roles. RoleAutomatic is left to ResolveRole.
const (
	RoleAutomatic Role = ""
	RoleClient    Role = "client" // starts everything
	RoleServer    Role = "server" // answers
)

// String returns the role as it is written in the file, or "automatic".
func (r Role) String() string {
	if r == RoleAutomatic {
		return "automatic"
	}
	return string(r)
}

// Interface is what a KMS speaks.
type Interface string

// The interfaces of a KMS.
const (
	ETSI014 Interface = "14"   // ETSI GS QKD 014
	ETSI004 Interface = "4"    // ETSI GS QKD 004
	SKIP    Interface = "skip" // Cisco SKIP
)

// String returns the interface as it is written in the file.
func (i Interface) String() string { return string(i) }

// Dialect is a wire format of ETSI GS QKD 004.
type Dialect string

// The dialects in use.
const (
	ForgeED3 Dialect = "forge-ed3"
	ForgeED1 Dialect = "forge-ed1"
)

// String returns the dialect as it is written in the file.
func (d Dialect) String() string { return string(d) }

// Method is an HTTP method.
type Method string

// The methods of ETSI GS QKD 014.
const (
	GET  Method = "GET"
	POST Method = "POST"
)

// String returns the method as HTTP wants it.
func (m Method) String() string { return string(m) }

// Require says which sources must be part of a key.
type Require string

// The policies on sources.
const (
	RequireAll Require = "all" // every configured source and KEM
	RequireQKD Require = "qkd" // QKD; KEMs may be missing
	RequirePQC Require = "pqc" // all KEMs; QKD may be missing
	RequireAny Require = "any" // whatever is left
)

// String returns the policy as it is written in the file.
func (r Require) String() string { return string(r) }

// Combiner makes one key of several secrets.
type Combiner string

// The combiners.
const (
	XOR        Combiner = "xor"
	HKDFSHA384 Combiner = "hkdf-sha384"
)

// String returns the combiner as it is written in the file.
func (c Combiner) String() string { return string(c) }

// OnStale says what happens to a tunnel without a fresh key.
type OnStale string

// The policies on stale keys.
const (
	StaleKeep  OnStale = "keep"  // the last confirmed key stays
	StaleBlock OnStale = "block" // the tunnel closes at its next handshake
)

// String returns the policy as it is written in the file.
func (o OnStale) String() string { return string(o) }

// Start says what happens to a tunnel before its first rotation.
type Start string

// The policies at start.
const (
	StartHold  Start = "hold"  // the PSK that was found stays
	StartBlock Start = "block" // the tunnel is closed
)

// String returns the policy as it is written in the file.
func (s Start) String() string { return string(s) }

// Fallback is the last resort of ends that lost each other's keys.
type Fallback string

// The fallbacks.
const (
	FallbackNone    Fallback = "none"
	FallbackInitial Fallback = "initial" // the PSK found at the first start
)

// String returns the fallback as it is written in the file.
func (f Fallback) String() string { return string(f) }

// Recovery says who repairs a tunnel that cannot repair itself.
type Recovery string

// The ways of recovery.
const (
	RecoveryAutomatic Recovery = "automatic"
	RecoveryManual    Recovery = "manual"
)

// String returns the recovery as it is written in the file.
func (r Recovery) String() string { return string(r) }
