//go:build vm

package guest

import (
	"fmt"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// moveClock moves the wall clock of the guest.
func moveClock(t *testing.T, by time.Duration) {
	t.Helper()
	now := unix.NsecToTimeval(time.Now().Add(by).UnixNano())
	if err := unix.Settimeofday(&now); err != nil {
		t.Fatal(err)
	}
}

// suspend puts the guest to sleep, until the clock on its mainboard wakes it.
func suspend(t *testing.T, state string, d time.Duration) {
	t.Helper()
	for _, w := range []struct{ file, text string }{
		{"/sys/class/rtc/rtc0/wakealarm", fmt.Sprintf("+%d", int(d.Seconds()))},
		{"/sys/power/state", state},
	} {
		if err := os.WriteFile(w.file, []byte(w.text), 0o200); err != nil {
			t.Fatal(err)
		}
	}
}

func TestSuspendWorks(t *testing.T) {
	b, _ := os.ReadFile("/sys/power/state")
	fmt.Printf("%s\n", b)
	b, _ = os.ReadFile("/sys/power/mem_sleep")
	fmt.Printf("%s\n", b)
	for _, state := range []string{"freeze", "mem"} {
		start := time.Now()
		var boot, boot2 unix.Timespec
		unix.ClockGettime(unix.CLOCK_BOOTTIME, &boot)
		suspend(t, state, 2*time.Hour)
		unix.ClockGettime(unix.CLOCK_BOOTTIME, &boot2)
		verdict("%s: monotonic %v, wall %v, boot %d s", state, time.Since(start), time.Now().Round(0).Sub(start.Round(0)), boot2.Sec-boot.Sec)
	}
}
