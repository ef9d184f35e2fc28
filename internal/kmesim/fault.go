package kmesim

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"
)

// FaultKind is a way in which a KME fails.
type FaultKind int

// The faults of a KME. Slow, Drip, HTML, Page, Down, Silent, SilentTLS and
// Expired concern every request of an SAE; OutOfKeys, OutOfStep and Cut requests
// for new keys; Late and WrongBytes requests by ID; WrongSize and Lost both.
const (
	Healthy    FaultKind = iota
	OutOfKeys            // 503, or Fault.Code, to requests for new keys
	Late                 // "not found", 400 or Fault.Code, to requests by ID: the key has not arrived yet
	OutOfStep            // the other KME never hears of the keys that are made
	Slow                 // answers after Fault.Delay
	Drip                 // answers a byte at a time, Fault.Delay apart
	WrongBytes           // other bytes under the right key ID
	WrongSize            // keys of Fault.Bits, whatever was asked for
	Lost                 // takes a key out and closes the connection without an answer
	HTML                 // a proxy's error page
	Page                 // an error page of Fault.Code and Fault.Shape
	Down                 // closes every connection
	Silent               // accepts TLS and requests, and never answers
	SilentTLS            // accepts TLS and never reads a request
	Expired              // proves itself by a certificate that has expired
	Cut                  // the link to the other KME is cut
)

// Fault is what is wrong with a KME; the zero value is nothing.
type Fault struct {
	Kind  FaultKind
	Delay time.Duration // of Slow and Drip
	Bits  int           // of WrongSize; shrunk if zero
	Code  int           // HTTP status of OutOfKeys and Late, where it is not theirs by the standard, and of Page
	Shape string        // of Page: one of those that pages has

	For   time.Duration // after this time the KME is healthy again; never if zero
	Times int           // so many requests or connections are hit; all if zero
}

// Limits and defaults of faults.
const (
	maxDelay     = 10 * time.Minute
	maxFor       = 7 * 24 * time.Hour
	maxTimes     = 1_000_000
	maxWrongBits = 1 << 16
	dripDelay    = 100 * time.Millisecond
	// shrunk is a key size that nobody asks for, but that one simulator in use
	// has for its default.
	shrunk = 32
)

// value is what may stand behind a fault's name and "=".
type value int

const (
	noValue value = iota
	delayValue
	bitsValue
	codeValue
	pageValue
)

// faults has the name of each fault, and what its value is.
var faults = [...]struct {
	name     string
	value    value
	required bool
}{
	Healthy:    {"healthy", noValue, false},
	OutOfKeys:  {"out-of-keys", codeValue, false},
	Late:       {"late", codeValue, false},
	OutOfStep:  {"out-of-step", noValue, false},
	Slow:       {"slow", delayValue, true},
	Drip:       {"drip", delayValue, false},
	WrongBytes: {"wrong-bytes", noValue, false},
	WrongSize:  {"wrong-size", bitsValue, false},
	Lost:       {"lost", noValue, false},
	HTML:       {"html", noValue, false},
	Page:       {"page", pageValue, true},
	Down:       {"down", noValue, false},
	Silent:     {"silent", noValue, false},
	SilentTLS:  {"silent-tls", noValue, false},
	Expired:    {"expired", noValue, false},
	Cut:        {"cut", noValue, false},
}

// String returns the name that ParseFault knows.
func (k FaultKind) String() string {
	if k < 0 || int(k) >= len(faults) {
		return fmt.Sprintf("fault %d", int(k))
	}
	return faults[k].name
}

// String returns the text that ParseFault reads.
func (f Fault) String() string {
	text := f.Kind.String()
	switch {
	case f.Kind == Page:
		text += fmt.Sprintf("=%d/%s", f.Code, f.Shape)
	case f.Kind == Slow || f.Kind == Drip:
		text += "=" + f.Delay.String()
	case f.Bits != 0:
		text += fmt.Sprintf("=%d", f.Bits)
	case f.Code != 0:
		text += fmt.Sprintf("=%d", f.Code)
	}
	if f.For != 0 {
		text += ",for=" + f.For.String()
	}
	if f.Times != 0 {
		text += fmt.Sprintf(",times=%d", f.Times)
	}
	return text
}

// ParseFault reads a fault: its name, where it has one its value, and how long
// it lasts, as "slow=2s", "page=404/text" or "out-of-keys,for=2m,times=10".
func ParseFault(text string) (Fault, error) {
	first, limits, limited := strings.Cut(text, ",")
	name, v, valued := strings.Cut(first, "=")
	kind := FaultKind(-1)
	var names []string
	for i, f := range faults {
		names = append(names, f.name)
		if f.name == name {
			kind = FaultKind(i)
		}
	}
	if kind < 0 {
		return Fault{}, fmt.Errorf("unknown fault %q: one of %s", name, strings.Join(names, ", "))
	}
	f := Fault{Kind: kind}
	if kind == Drip {
		f.Delay = dripDelay
	}
	if err := f.parseValue(v, valued); err != nil {
		return Fault{}, fmt.Errorf("fault %q: %w", text, err)
	}
	if limited {
		if err := f.parseLimits(limits); err != nil {
			return Fault{}, fmt.Errorf("fault %q: %w", text, err)
		}
	}
	return f, nil
}

func (f *Fault) parseValue(text string, given bool) (err error) {
	is := faults[f.Kind]
	if !given {
		switch {
		case !is.required:
			return nil
		case is.value == delayValue:
			return fmt.Errorf("%s needs a delay, as %s=2s", is.name, is.name)
		default:
			return fmt.Errorf("%s needs a code and a shape, as %s=404/text", is.name, is.name)
		}
	}
	switch is.value {
	case delayValue:
		if f.Delay, err = time.ParseDuration(text); err != nil || f.Delay < 0 || f.Delay > maxDelay {
			return fmt.Errorf("delay is not between 0 and %v", maxDelay)
		}
	case bitsValue:
		if f.Bits, err = strconv.Atoi(text); err != nil || f.Bits < 8 || f.Bits > maxWrongBits || f.Bits%8 != 0 {
			return fmt.Errorf("size is not a multiple of 8 between 8 and %d bits", maxWrongBits)
		}
	case codeValue:
		if f.Code, err = strconv.Atoi(text); err != nil || f.Code < 400 || f.Code > 599 {
			return errors.New("code is not between 400 and 599")
		}
	case pageValue:
		code, shape, _ := strings.Cut(text, "/")
		if f.Code, err = strconv.Atoi(code); err != nil || f.Code < 200 || f.Code > 599 {
			return errors.New("code is not between 200 and 599")
		}
		if _, known := page(shape); !known {
			return fmt.Errorf("unknown shape %q: one of %s", shape, strings.Join(Shapes(), ", "))
		}
		f.Shape = shape
	default:
		return fmt.Errorf("%s has no value", is.name)
	}
	return nil
}

func (f *Fault) parseLimits(text string) (err error) {
	if f.Kind == Healthy {
		return errors.New("healthy has no limits")
	}
	for limit := range strings.SplitSeq(text, ",") {
		name, v, _ := strings.Cut(limit, "=")
		switch name {
		case "for":
			if f.For, err = time.ParseDuration(v); err != nil || f.For <= 0 || f.For > maxFor {
				return fmt.Errorf("for is not a time of up to %v", maxFor)
			}
		case "times":
			if f.Times, err = strconv.Atoi(v); err != nil || f.Times < 1 || f.Times > maxTimes {
				return fmt.Errorf("times is not between 1 and %d", maxTimes)
			}
		default:
			return fmt.Errorf("%q is neither for= nor times=", limit)
		}
	}
	return nil
}

// SetFault sets what is wrong with the KME from now on, for requests that a
// fault holds up as well.
func (k *KME) SetFault(f Fault) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.setFault(f)
}

func (k *KME) setFault(f Fault) {
	if k.heal != nil {
		k.heal.Stop()
		k.heal = nil
	}
	k.fault = f
	close(k.lifted)
	lifted := make(chan struct{})
	k.lifted = lifted
	if f.For > 0 {
		k.heal = time.AfterFunc(f.For, func() {
			k.mu.Lock()
			defer k.mu.Unlock()
			if k.lifted == lifted { // no other fault has come since
				k.setFault(Fault{})
			}
		})
	}
}

// Fault returns what is wrong with the KME; Times is how often it will still
// strike.
func (k *KME) Fault() Fault {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.fault
}

// strike returns the KME's fault where it is one of these kinds, which counts
// as one of its times, and Healthy otherwise. The channel is closed when the
// fault is lifted or another takes its place.
func (k *KME) strike(kinds ...FaultKind) (Fault, <-chan struct{}) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, kind := range kinds {
		if k.fault.Kind != kind {
			continue
		}
		f := k.fault
		k.counted.struck.Add(1)
		switch f.Times {
		case 0:
		case 1:
			// What was struck last is held up until another fault comes.
			k.fault = Fault{}
			if k.heal != nil {
				k.heal.Stop()
			}
		default:
			k.fault.Times--
		}
		return f, k.lifted
	}
	return Fault{}, nil
}
