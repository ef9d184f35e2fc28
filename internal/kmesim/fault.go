package kmesim

import (
	"errors"
	"fmt"
	"strings"
	"time"
)

// FaultKind is a way in which a KME fails.
type FaultKind int

// The faults of a KME. They concern key requests; Slow, HTML, Down and Silent
// concern status requests as well.
const (
	Healthy    FaultKind = iota
	OutOfKeys            // 503 to "Get key"
	Late                 // "not found" to "Get key with key IDs": the KMEs are not in step
	Slow                 // answers after Fault.Delay
	WrongBytes           // other bytes under the right key ID
	WrongSize            // keys of 32 bits, whatever was asked for
	Lost                 // takes a key out and closes the connection without an answer
	HTML                 // a proxy's error page
	Down                 // closes every connection
	Silent               // accepts TLS and requests, and never answers
)

var faultNames = [...]string{"healthy", "out-of-keys", "late", "slow", "wrong-bytes", "wrong-size", "lost", "html", "down", "silent"}

// String returns the name that ParseFault knows.
func (k FaultKind) String() string {
	if k < 0 || int(k) >= len(faultNames) {
		return fmt.Sprintf("fault %d", int(k))
	}
	return faultNames[k]
}

// Fault is what is wrong with a KME; the zero value is nothing.
type Fault struct {
	Kind  FaultKind
	Delay time.Duration // of Slow
}

// maxDelay bounds the delay of a slow KME.
const maxDelay = 10 * time.Minute

// String returns the text that ParseFault reads.
func (f Fault) String() string {
	if f.Kind == Slow {
		return fmt.Sprintf("%v=%v", f.Kind, f.Delay)
	}
	return f.Kind.String()
}

// ParseFault reads the name of a fault; slow has its delay, as "slow=2s".
func ParseFault(text string) (Fault, error) {
	name, value, valued := strings.Cut(text, "=")
	for i, n := range faultNames {
		if n != name {
			continue
		}
		f := Fault{Kind: FaultKind(i)}
		if valued != (f.Kind == Slow) {
			return Fault{}, fmt.Errorf("fault %q: only slow has a value, as slow=2s", text)
		}
		if !valued {
			return f, nil
		}
		d, err := time.ParseDuration(value)
		if err == nil && (d < 0 || d > maxDelay) {
			err = errors.New("out of range")
		}
		if err != nil {
			return Fault{}, fmt.Errorf("fault %q: delay is not between 0 and %v", text, maxDelay)
		}
		f.Delay = d
		return f, nil
	}
	return Fault{}, fmt.Errorf("unknown fault %q: one of %s", text, strings.Join(faultNames[:], ", "))
}
