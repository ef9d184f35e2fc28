//go:build vm

package guest

import (
	"errors"
	"fmt"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// moveClock moves the wall clock, of which the guest has only one: both hosts
// see it jump.
func moveClock(t *testing.T, by time.Duration) {
	t.Helper()
	if err := setClock(time.Now().Add(by)); err != nil {
		t.Fatal(err)
	}
}

func setClock(to time.Time) error {
	now := unix.NsecToTimeval(to.UnixNano())
	return unix.Settimeofday(&now)
}

// suspend puts the guest to sleep until a key is pressed, hours later by the
// wall clock. Processes stand still and WireGuard forgets its sessions
// (wg_pm_notification in drivers/net/wireguard/device.c).
func (l *lab) suspend(hours time.Duration) {
	l.t.Helper()
	write := func(file, text string) {
		if err := os.WriteFile(file, []byte(text), 0o200); err != nil {
			l.t.Fatal(err)
		}
	}
	write("/sys/class/tty/ttyS0/power/wakeup", "enabled")
	fmt.Println("guest: asleep")
	write("/sys/power/state", "freeze")
	fmt.Println("guest: awake")
	moveClock(l.t, hours)
}

// TestClock: faults that concern everything in the guest, so both hosts.
func TestClock(t *testing.T) {
	const hours = 5 * time.Hour
	for _, f := range []fault{
		{name: "clock 5 h ahead", spares: true, do: func(l *lab) { moveClock(l.t, hours) }},
		{name: "clock 5 h back", do: func(l *lab) { moveClock(l.t, -hours) }},
		// The session at hand is left alone, and what the bound is for begins
		// with its end.
		{name: "clock 5 h back, after handshakes of both", late: rejectAfter, do: func(l *lab) {
			// Down and up again, an interface has no session, but remembers when
			// the other end's last handshake began.
			for _, h := range []*host{l.a, l.b} {
				h.must(h.in(func() error { return errors.Join(setDown(wg0), setUp(wg0)) }))
				time.Sleep(10 * time.Second)
			}
			moveClock(l.t, -hours)
		}},
		// Both hosts wake in the same millisecond, as no two machines do: their
		// first handshakes cross, and neither succeeds.
		{name: "suspend, 5 h", late: nextAttempt, do: func(l *lab) { l.suspend(hours) }},
		{name: "client stopped and cut off, 20 min", do: func(l *lab) {
			l.a.must(l.a.rotator.Process.Signal(unix.SIGSTOP))
			l.weather(cut, tunnelCable, besideCable)
			time.Sleep(20 * time.Minute)
			l.weather(weather{}, tunnelCable, besideCable)
			l.a.must(l.a.rotator.Process.Signal(unix.SIGCONT))
		}},
	} {
		for _, inside := range []bool{false, true} {
			f.run(t, inside)
		}
	}
}
