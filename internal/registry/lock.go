package registry

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// ErrLocked means that another process is the rotator of the interface.
var ErrLocked = errors.New("a rotator of this interface is already running")

// Lock is a rotator's claim to be the only one of its interface. The kernel
// drops it when the process ends, however it ends.
type Lock struct {
	f *os.File
}

// TakeLock claims an interface by a lock on <run-dir>/<interface>.lock, which
// it makes, with its directory, where they are missing. The error is
// ErrLocked where another process has it.
func TakeLock(runDir, iface string) (*Lock, error) {
	if err := CheckInterface(iface); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(runDir, 0o700); err != nil {
		return nil, fmt.Errorf("lock: %w", err)
	}
	f, err := os.OpenFile(LockPath(runDir, iface), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock: %w", err)
	}
	err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if err == nil {
		return &Lock{f: f}, nil
	}
	f.Close()
	if errors.Is(err, unix.EWOULDBLOCK) {
		return nil, ErrLocked
	}
	return nil, fmt.Errorf("lock %s: %w", f.Name(), err)
}

// LockPath returns the path of the lock file. It is never removed: a process
// may hold a lock on the file that another has just replaced.
func LockPath(runDir, iface string) string { return filepath.Join(runDir, iface+".lock") }

// Release gives the claim up before the process ends.
func (l *Lock) Release() error { return l.f.Close() }
