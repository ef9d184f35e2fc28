//go:build vm

package guest

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"

	"golang.org/x/sys/unix"
)

// TestMain is the guest's first process and, started by that, its tests.
func TestMain(m *testing.M) {
	switch {
	case os.Getpid() == 1:
		err := runInit()
		if err == nil {
			fmt.Println("guest: passed")
		} else {
			fmt.Println("guest: failed:", err)
		}
		unix.Sync()
		// It does not return; where it does, the kernel panics and so QEMU ends.
		_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	case os.Getppid() != 1 || os.Getenv(guestVar) == "":
		fmt.Fprintln(os.Stderr, "these tests run in a virtual machine: make vm")
		os.Exit(1)
	}
	os.Exit(m.Run())
}

const guestVar = "KEYTURN_GUEST"

// runInit makes a system of the bare kernel and runs the tests with the
// arguments that the kernel got after "--".
func runInit() error {
	for _, m := range []struct{ kind, on, options string }{
		{"devtmpfs", "/dev", ""},
		{"proc", "/proc", ""},
		{"sysfs", "/sys", ""},
		{"tmpfs", "/tmp", "mode=755"},
	} {
		if err := unix.Mount(m.kind, m.on, m.kind, 0, m.options); err != nil {
			return fmt.Errorf("mount %s: %w", m.on, err)
		}
	}
	if err := loadModules("/modules"); err != nil {
		return err
	}
	if err := setUp("lo"); err != nil {
		return err
	}
	tests := exec.Command("/proc/self/exe", os.Args[1:]...)
	tests.Env = []string{"PATH=/", "HOME=/tmp", "TMPDIR=/tmp", guestVar + "=1"}
	tests.Stdout, tests.Stderr = os.Stdout, os.Stderr
	return tests.Run()
}

// loadModules loads the modules of a directory in the order of their names.
func loadModules(dir string) error {
	files, err := filepath.Glob(filepath.Join(dir, "*.ko"))
	if err != nil {
		return err
	}
	slices.Sort(files)
	for _, file := range files {
		f, err := os.Open(file)
		if err != nil {
			return err
		}
		err = unix.FinitModule(int(f.Fd()), "", 0)
		_ = f.Close()
		if err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("load %s: %w", file, err)
		}
	}
	return nil
}
