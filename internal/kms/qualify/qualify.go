// Package qualify finds out what a key management system does right, clause by
// clause of its interface's specification, and what of that keyturn needs. It
// sends requests that no rotator would, the wrong ones above all, straight from
// here and not through the clients of the rotator, which hide what a KMS gets
// wrong. The keys that it takes are compared and thrown away; no byte of them
// is in a report.
package qualify

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"time"

	"keyturn/internal/kms/kmshttp"
	"keyturn/internal/kms/kmstls"
)

// Verdict says how a KMS stands to one rule.
type Verdict int

// The verdicts. The zero value claims nothing.
const (
	NotTested    Verdict = iota
	Right                // as the specification has it
	Wrong                // otherwise
	NotSupported         // missing, as the specification permits
)

var verdicts = [...]string{"not tested", "right", "wrong", "not supported"}

// String returns the words of a report.
func (v Verdict) String() string {
	if v < 0 || int(v) >= len(verdicts) {
		return fmt.Sprintf("verdict %d", int(v))
	}
	return verdicts[v]
}

// MarshalText writes a verdict as String does.
func (v Verdict) MarshalText() ([]byte, error) { return []byte(v.String()), nil }

// Line is the verdict on one rule.
type Line struct {
	Clause  string  `json:"clause"` // of the specification
	At      string  `json:"at"`     // SAE ID of the end that asked
	What    string  `json:"what"`   // the rule, in a few words
	Needed  bool    `json:"needed"` // keyturn, or what it promises, rests on it
	Verdict Verdict `json:"verdict"`
	// Seconds that the KMS took to answer, the first time with the making of
	// the connection; 0 where nothing was asked for this rule alone.
	Seconds float64 `json:"seconds"`
	// Detail is what the KMS said or did. Foreign texts in it are bounded and
	// printable.
	Detail string `json:"detail,omitempty"`
}

// Report is everything that was found out. Beside an error it is nil or not
// whole.
type Report struct {
	Specification string `json:"specification"`
	Lines         []Line `json:"lines"`
	// KeysTaken is how many keys the KMSs handed out for the test. They are
	// used up.
	KeysTaken int `json:"keys_taken"`
}

// Count returns the number of lines with a verdict, of all or of those that
// keyturn needs.
func (r *Report) Count(v Verdict, neededOnly bool) int {
	n := 0
	for _, l := range r.Lines {
		if l.Verdict == v && (l.Needed || !neededOnly) {
			n++
		}
	}
	return n
}

// End is one end of a QKD network: an SAE and its KMS.
type End struct {
	SAE     string
	URI     string // https://host or, for ETSI GS QKD 004, host:port
	TLS     kmstls.Config
	Timeout time.Duration // of one request; that of a rotator if zero
	// Method by which a rotator asks by ETSI GS QKD 014: GET (default) or POST.
	Method string
	// Dialect of ETSI GS QKD 004: forge-ed3 or forge-ed1.
	Dialect string
	// Dial connects to the KMS; nil: over the network.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
}

// Config is what to qualify.
type Config struct {
	// Here asks for keys first.
	Here End
	// There gets the same keys by their IDs; nil where only one end's KMS can
	// be reached, so that half of the rules remain untested.
	There *End
	// Peer is the SAE ID of the other end.
	Peer string
}

// tester collects verdicts on the KMSs of a network.
type tester struct {
	report Report
	fresh  []key // every key that was asked for without an ID
}

// key is one that a KMS handed out.
type key struct {
	id    string
	bytes []byte
}

// line adds the verdict on a rule.
func (t *tester) line(l Line, v Verdict, detail string, args ...any) {
	l.Verdict = v
	l.Detail = fmt.Sprintf(detail, args...)
	t.report.Lines = append(t.report.Lines, l)
}

// judge adds a line that is right unless there is a problem.
func (t *tester) judge(l Line, problem, detail string) {
	if problem != "" {
		t.line(l, Wrong, "%s", problem)
		return
	}
	t.line(l, Right, "%s", detail)
}

// Why nothing was asked.
const (
	needsOther        = "needs the other end's configuration"
	noConnectionThere = "no connection at the other end"
	noAnswer          = "the KMS was silent twice in a row"
	noKey             = "no key to try it with"
)

// at returns the line for an end.
func (l Line) at(sae string) Line {
	l.At = sae
	return l
}

// untested adds lines that nothing was asked for.
func (t *tester) untested(why string, lines ...Line) {
	for _, l := range lines {
		t.line(l, NotTested, "%s", why)
	}
}

// distinct judges all keys that were handed out as fresh ones.
func (t *tester) distinct(l Line) {
	if len(t.fresh) == 0 {
		t.untested("no key was handed out", l)
		return
	}
	for i, k := range t.fresh {
		if len(bytes.Trim(k.bytes, "\x00")) == 0 {
			t.line(l, Wrong, "key %q is all zero", kmshttp.Shown(k.id))
			return
		}
		for _, o := range t.fresh[:i] {
			if o.id == k.id {
				t.line(l, Wrong, "key ID %q was given twice", kmshttp.Shown(k.id))
				return
			}
			if bytes.Equal(o.bytes, k.bytes) {
				t.line(l, Wrong, "keys %q and %q are the same", kmshttp.Shown(o.id), kmshttp.Shown(k.id))
				return
			}
		}
	}
	t.line(l, Right, "%s", plural(len(t.fresh), "key"))
}

// size says why a key cannot be a PSK.
func (k key) problem() string {
	if len(k.bytes) != keyBits/8 {
		return fmt.Sprintf("the key has %d bits, not %d", 8*len(k.bytes), keyBits)
	}
	return ""
}

// keyBits is the size of the keys that a rotator asks for.
const keyBits = 256

// same compares a key that came by its ID with the one of the other end.
func (k key) same(o key) string {
	switch {
	case k.problem() != "":
		return k.problem()
	case !bytes.Equal(k.bytes, o.bytes):
		return "other bytes than at the other end"
	}
	return ""
}

func plural(n int, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	return fmt.Sprintf("%d %ss", n, noun)
}

var errNoPeer = errors.New("the SAE ID of the peer is missing")

// check says why c cannot be qualified.
func (c Config) check() error {
	switch {
	case c.Peer == "":
		return errNoPeer
	case c.Peer == c.Here.SAE:
		return fmt.Errorf("SAE %q is at both ends", c.Peer)
	case c.There != nil && c.There.SAE != c.Peer:
		return fmt.Errorf("the other end is SAE %q, not %q", c.There.SAE, c.Peer)
	}
	return nil
}
