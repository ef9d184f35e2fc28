//go:build vm

package guest

import "time"

// Orders are what the test on the host of the virtual machines says to a guest
// that is one end of a pair: a line of JSON on its second serial port, which
// the guest answers by a line when it has done it. A guest that cannot do it
// says why on its console, and ends.

// Order is one of them.
type Order struct {
	Verb   Verb      `json:"verb"`
	End    int       `json:"end,omitempty"`    // Begin: 0 is the client
	Keys   Keys      `json:"keys,omitzero"`    // Begin
	Inside bool      `json:"inside,omitempty"` // Begin: the link runs inside the tunnel
	Clock  time.Time `json:"clock,omitzero"`   // SetClock, Reboot
}

// Verb says what to do.
type Verb string

// What a guest does. Times are measured on its own monotonic clock, which
// stands still while the guest does, and goes on from the snapshot's time.
const (
	Begin    Verb = "begin"   // become a host, and start its rotator
	Forget   Verb = "forget"  // drop the session, so that there is a handshake
	Ping     Verb = "ping"    // begin a stream of pings to the other end, which answers them beside the tunnel
	Mark     Verb = "mark"    // the fault is over
	Look     Verb = "look"    // answer with a View, the time, and what became of the pings
	SetClock Verb = "clock"   // set the wall clock
	Reboot   Verb = "reboot"  // as the host: WireGuard with the original key, no run directory; the clock as given
	Suspend  Verb = "suspend" // to RAM; answered after the guest was woken
	Explain  Verb = "explain" // answer with the rotator's log
)

// Keys are what both hosts of a pair come up with. They are hosts of a
// laboratory: each guest knows all.
type Keys struct {
	Private  [2]string `json:"private"`  // WireGuard's
	Identity [2]string `json:"identity"` // the rotators'
	Original string    `json:"original"` // the pre-shared key
}

// Answer is a guest's, to any order.
type Answer struct {
	View  View      `json:"view,omitzero"`
	Clock time.Time `json:"clock,omitzero"` // the wall clock
	Pings Pings     `json:"pings,omitzero"`
	Log   string    `json:"log,omitempty"`
}

// Pings are what became of those that had time to be answered.
type Pings struct {
	Sent int `json:"sent"`
	Lost int `json:"lost"`
	// After the mark:
	Since    int      `json:"since"`             // lost ones
	Doubtful int      `json:"doubtful"`          // where what went beside the tunnel was lost as well
	Outages  []Outage `json:"outages,omitempty"` // that ended then
}

// Outage is a time in which no ping was answered.
type Outage struct {
	Begin  time.Duration `json:"begin"`  // after the mark; before it if negative
	End    time.Duration `json:"end"`    // after the mark
	Length time.Duration `json:"length"` // without that for which doubtful pings stand
}
