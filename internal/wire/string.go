package wire

import (
	"fmt"
	"math/bits"
	"strconv"
	"strings"
)

// The strings of messages are for traces and debug logs: what tells one
// message from another, and nothing long. Digests, encapsulation keys and
// ciphertexts stay out.

// String returns the first eight hex digits; "none" stands for no boot.
func (b BootID) String() string { return short(b) }

// IsZero reports whether there is no session.
func (s SessionID) IsZero() bool { return s == SessionID{} }

// String returns the first eight hex digits; "none" stands for no session.
func (s SessionID) String() string { return short(s) }

func short(id [16]byte) string {
	if id == [16]byte{} {
		return "none"
	}
	return fmt.Sprintf("%x", id[:4])
}

// String returns serial and fingerprint, such as "7 a1b2c3d4"; "none" stands
// for no key.
func (n Named) String() string {
	if n.Fingerprint.IsZero() && n.Serial == 0 {
		return "none"
	}
	return fmt.Sprintf("%d %v", n.Serial, n.Fingerprint)
}

// QKD reports whether QKD is among the sources.
func (s Sources) QKD() bool { return s&1 == 1 }

// KEM reports whether the tunnel's i-th KEM, counted from zero, is among the
// sources.
func (s Sources) KEM(i int) bool { return i >= 0 && s>>(i+1)&1 == 1 }

// kems returns the number of KEMs among the sources.
func (s Sources) kems() int { return bits.OnesCount16(uint16(s >> 1)) }

// String lists the sources: "qkd+kem1+kem2", or "none".
func (s Sources) String() string {
	var names []string
	if s.QKD() {
		names = append(names, "qkd")
	}
	for i := range 15 {
		if s.KEM(i) {
			names = append(names, "kem"+strconv.Itoa(i+1))
		}
	}
	if names == nil {
		return "none"
	}
	return strings.Join(names, "+")
}

// String returns the mode's name.
func (m Mode) String() string {
	switch m {
	case ModeWindow:
		return "window"
	case ModeIdle:
		return "idle"
	case ModeRepair:
		return "repair"
	}
	return fmt.Sprintf("mode %d", uint8(m))
}

// String returns the reason's name.
func (r Reason) String() string {
	switch r {
	case ReasonNotYet:
		return "not yet"
	case ReasonUnknown:
		return "unknown"
	case ReasonStale:
		return "stale"
	case ReasonDiffers:
		return "differs"
	case ReasonBusy:
		return "busy"
	case ReasonFailed:
		return "failed"
	}
	return fmt.Sprintf("reason %d", uint8(r))
}

// String returns, for example, `window: "30s" at the client, "20s" at the
// server`.
func (d Difference) String() string {
	return fmt.Sprintf("%s: %q at the client, %q at the server", d.Field, d.Client, d.Server)
}

// String returns, for example, "init 3 boot a1b2c3d4 high 6 held 5,6".
func (m *Init) String() string {
	return fmt.Sprintf("init %d boot %v high %d%s", m.Attempt, m.Boot, m.High, held(m.Held))
}

// String returns, for example, "ack 3 session a1b2c3d4 boot 01020304 high 6
// held 5,6 kept", or "ack 3 ... refused: kems, window".
func (m *Ack) String() string {
	s := fmt.Sprintf("ack %d session %v boot %v high %d%s", m.Attempt, m.Session, m.Boot, m.High, held(m.Held))
	if m.Kept {
		s += " kept"
	}
	for i, d := range m.Differences {
		if i == 0 {
			s += " refused: " + d.Field
		} else {
			s += ", " + d.Field
		}
	}
	return s
}

// String returns, for example, `propose 8 qkd+kem1 key "K1" held 7`.
func (m *Propose) String() string {
	s := fmt.Sprintf("propose %d %v", m.Serial, m.Sources)
	if m.KeyID != "" {
		s += fmt.Sprintf(" key %q", m.KeyID)
	}
	return s + list(" held ", len(m.Held), func(i int) uint64 { return m.Held[i] })
}

// String returns, for example, "reply 8 qkd+kem1".
func (m *Reply) String() string { return fmt.Sprintf("reply %d %v", m.Serial, m.Sources) }

// String returns, for example, "finish 8".
func (m *Finish) String() string { return fmt.Sprintf("finish %d", m.Serial) }

// String returns, for example, "done 8".
func (m *Done) String() string { return fmt.Sprintf("done %d", m.Serial) }

// String returns, for example, "abandon 8 high 8: digest differs".
func (m *Abandon) String() string {
	return fmt.Sprintf("abandon %d high %d: %s", m.Serial, m.High, m.Reason)
}

// String returns, for example, "commit 7 a1b2c3d4 window".
func (m *Commit) String() string { return fmt.Sprintf("commit %v %v", m.Key, m.Mode) }

// String returns, for example, "committed 7 a1b2c3d4".
func (m *Committed) String() string { return fmt.Sprintf("committed %v", m.Key) }

// String returns, for example, "refused 7 a1b2c3d4: not yet".
func (m *Refused) String() string { return fmt.Sprintf("refused %v: %v", m.Key, m.Reason) }

// String returns, for example, "report installed 7 a1b2c3d4 seen confirmed 7
// held 7,8,9".
func (m *Report) String() string {
	s := fmt.Sprintf("report installed %v", m.Installed)
	for _, flag := range []struct {
		set  bool
		name string
	}{{m.Blocked, "blocked"}, {m.Missing, "missing"}, {m.Trying, "trying"}, {m.NoHandshake, "no handshake"}, {m.Seen, "seen"}} {
		if flag.set {
			s += " " + flag.name
		}
	}
	return s + fmt.Sprintf(" confirmed %d%s", m.Confirmed, held(m.Held))
}

// String returns, for example, "bye: shutting down".
func (m *Bye) String() string { return "bye: " + m.Reason }

// held lists the serials of keys.
func held(keys []Named) string {
	return list(" held ", len(keys), func(i int) uint64 { return keys[i].Serial })
}

// list returns the n serials after a heading, or nothing if there are none.
func list(heading string, n int, serial func(int) uint64) string {
	var b strings.Builder
	for i := range n {
		if i == 0 {
			b.WriteString(heading)
		} else {
			b.WriteByte(',')
		}
		b.WriteString(strconv.FormatUint(serial(i), 10))
	}
	return b.String()
}
