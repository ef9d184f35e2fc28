package control

// Warning is one of the declared things that can be wrong. Code is for
// programs, Text for people.
type Warning struct {
	Code     Code     `json:"code"`
	Severity Severity `json:"severity"`
	Text     string   `json:"text"`
}

// Severity orders warnings as the log levels do.
type Severity string

// The severities.
const (
	SeverityInfo    Severity = "info"    // worth knowing; nothing to be done
	SeverityWarning Severity = "warning" // degraded, but protected
	SeverityError   Severity = "error"   // not protected
)

// Code names a kind of warning.
type Code string

// The declared warnings. No other code ever appears in a Status.
const (
	LinkIsDown       Code = "link_down"
	LinkIsRefused    Code = "link_refused"
	KMSFails         Code = "kms_failing"
	SourcesReduced   Code = "sources_reduced"
	BufferEmpty      Code = "buffer_empty"
	ParametersDiffer Code = "parameters_differ"
	KeysDiffer       Code = "keys_differ"
	KeyUnconfirmed   Code = "key_unconfirmed"
	NoHandshake      Code = "no_handshake"
	KeyAging         Code = "key_aging"
	KeyStale         Code = "key_stale"
	TunnelBlocked    Code = "tunnel_blocked"
	FallbackUsed     Code = "fallback_used"
	RecoveryKey      Code = "recovery_key"
	NoFallback       Code = "no_fallback"
	ForeignChange    Code = "foreign_change"
	ForeignTool      Code = "foreign_tool"
	PeerIsMissing    Code = "peer_missing"
	InterfaceMissing Code = "interface_missing"
	WireGuardFails   Code = "wireguard_failing"
	JournalFails     Code = "journal_failing"
	ManualRecovery   Code = "manual_recovery"
	TimeJumped       Code = "time_jumped"
	LogDropped       Code = "log_dropped"
)

// catalogue holds what is said of each code, and how bad it is.
var catalogue = map[Code]struct {
	severity Severity
	text     string
}{
	LinkIsDown:       {SeverityWarning, "no connection to the peer's rotator"},
	LinkIsRefused:    {SeverityWarning, "the peer's rotator could not be authenticated"},
	KMSFails:         {SeverityWarning, "the KMS delivers no keys"},
	SourcesReduced:   {SeverityWarning, "the installed key lacks a configured source, as the policy allows"},
	BufferEmpty:      {SeverityWarning, "the key buffer is empty and the key cannot be rotated"},
	ParametersDiffer: {SeverityError, "the two ends are configured differently"},
	KeysDiffer:       {SeverityError, "the two ends have different keys installed"},
	KeyUnconfirmed:   {SeverityWarning, "no handshake has confirmed the installed key for a long time"},
	NoHandshake:      {SeverityWarning, "nothing gets through: no session, and handshakes are tried without success"},
	KeyAging:         {SeverityWarning, "no fresh key for most of max_key_age"},
	KeyStale:         {SeverityError, "no fresh key for longer than max_key_age"},
	TunnelBlocked:    {SeverityError, "the tunnel is closed until a verified key is there"},
	FallbackUsed:     {SeverityError, "the tunnel fell back to its initial pre-shared key"},
	NoFallback:       {SeverityWarning, "fallback: initial, but the tunnel began without a pre-shared key: there is nothing to fall back on"},
	RecoveryKey:      {SeverityWarning, "the tunnel is back by its recovery key, until the next key"},
	ForeignChange:    {SeverityWarning, "another program changed the pre-shared key"},
	ForeignTool:      {SeverityWarning, "another program keeps changing the pre-shared key"},
	PeerIsMissing:    {SeverityError, "WireGuard does not know the peer"},
	InterfaceMissing: {SeverityError, "the WireGuard interface does not exist"},
	WireGuardFails:   {SeverityError, "WireGuard cannot be read or set"},
	JournalFails:     {SeverityWarning, "the journal cannot be written"},
	ManualRecovery:   {SeverityInfo, "recovery is manual: a reboot may need repair by hand"},
	TimeJumped:       {SeverityInfo, "the clock jumped; ages are unknown until the next handshake"},
	LogDropped:       {SeverityInfo, "log lines were lost: the log could not be written"},
}

// Warn returns the declared warning, its text followed by detail if there is
// any. A code that was not declared is an error to look at, not one to hide.
func Warn(code Code, detail string) Warning {
	c, ok := catalogue[code]
	if !ok {
		c.severity, c.text = SeverityError, string(code)
	}
	text := c.text
	if detail != "" {
		text += ": " + detail
	}
	return Warning{Code: code, Severity: c.severity, Text: text}
}
