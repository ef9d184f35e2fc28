//go:build vm

package guest

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
)

const (
	orderPort = "/dev/ttyS1"
	// A pair runs in real time, on a machine that does other things as well.
	pairGrace = 3 * time.Second
)

// end is a guest that is one host of a pair. The other is known to it and
// elsewhere.
type end struct {
	*lab
	here   *host
	stream *pings // nil: none was begun
	over   time.Time
}

// TestEnd carries out orders until the machine is turned off.
func TestEnd(t *testing.T) {
	port, err := openPort(orderPort)
	if err != nil {
		t.Fatal(err)
	}
	e := &end{lab: &lab{t: t, grace: pairGrace}}
	orders, answers := json.NewDecoder(port), json.NewEncoder(port)
	// Only now would an order be heard.
	if err := answers.Encode(Answer{}); err != nil {
		t.Fatal(err)
	}
	for {
		var o Order
		if err := orders.Decode(&o); err != nil {
			if errors.Is(err, io.EOF) {
				return
			}
			t.Fatal(err)
		}
		a, err := e.carryOut(o)
		if err != nil {
			t.Fatalf("%s: %v", o.Verb, err)
		}
		if err := answers.Encode(a); err != nil {
			t.Fatal(err)
		}
	}
}

// openPort opens a serial port as a line on which bytes are bytes.
func openPort(name string) (*os.File, error) {
	f, err := os.OpenFile(name, os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, err
	}
	raw := unix.Termios{Cflag: unix.CS8 | unix.CREAD | unix.CLOCAL | unix.B115200}
	raw.Cc[unix.VMIN] = 1
	if err := unix.IoctlSetTermios(int(f.Fd()), unix.TCSETS, &raw); err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return f, nil
}

func (e *end) carryOut(o Order) (a Answer, err error) {
	switch o.Verb {
	case Begin:
		return a, e.become(o)
	case Forget:
		e.here.forgetSession()
	case Ping:
		e.stream = e.here.pingOneWay(e.here.other())
	case Mark:
		e.over = time.Now()
	case Look:
		a.View, err = e.here.view()
		a.Clock, a.Pings = time.Now(), e.soFar()
	case SetClock:
		err = setClock(o.Clock)
	case Reboot:
		e.here.shutdown()
		if err = setClock(o.Clock); err == nil {
			e.here.boot()
		}
	case Suspend:
		err = os.WriteFile("/sys/power/state", []byte("mem"), 0o200)
	case Explain:
		var text []byte
		text, err = os.ReadFile(e.here.path("rotator.log"))
		a.Log = string(text)
	default:
		err = errors.New("no such order")
	}
	return a, err
}

// become makes the guest one of the hosts, and starts its rotator.
func (e *end) become(o Order) error {
	e.t.Helper()
	var private [2]wgtypes.Key
	for i, text := range o.Keys.Private {
		var err error
		if private[i], err = wgtypes.ParseKey(text); err != nil {
			return err
		}
	}
	original, err := wgtypes.ParseKey(o.Keys.Original)
	if err != nil {
		return err
	}
	e.populate(private, original)
	for i, h := range []*host{e.a, e.b} {
		h.must(os.WriteFile(h.path("identity.key"), []byte(o.Keys.Identity[i]+"\n"), 0o600))
	}
	e.here = []*host{e.a, e.b}[o.End]
	if e.here.ns, err = os.Open("/proc/self/ns/net"); err != nil {
		return err
	}
	if err := nameCables(); err != nil {
		return err
	}
	e.here.plugIn()
	e.here.listenBeside(e.here.other())
	var with settingsOf
	if o.Inside {
		with = withFallback
	}
	e.configure(o.Inside, with)
	e.here.start()
	return nil
}

// nameCables gives the network cards the names that the cables have elsewhere.
// The fifth byte of a card's address tells whose end it is.
func nameCables() error {
	cards, err := net.Interfaces()
	if err != nil {
		return err
	}
	for _, c := range cards {
		if len(c.HardwareAddr) != 6 {
			continue // the loopback has none
		}
		if err := rename(c.Index, []string{tunnelCable, besideCable}[c.HardwareAddr[4]]); err != nil {
			return err
		}
	}
	return nil
}

// soFar sums up what became of the pings.
func (e *end) soFar() (p Pings) {
	if e.stream == nil {
		return p
	}
	r := e.stream.so()
	p.Sent, p.Lost = len(r), r.lost()
	if !e.over.IsZero() {
		since := r.since(e.over)
		p.Since, p.Doubtful, p.Outages = since.lost(), since.doubtful(), r.outages(e.over)
	}
	return p
}
