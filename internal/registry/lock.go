package registry

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// ErrLocked means that another process is the rotator of the interface.
var ErrLocked = errors.New("a rotator of this interface is already running")

// Lock is a rotator's right to what lies in a run directory under the name of
// its interface. The kernel drops it when the process ends, however it ends.
type Lock struct {
	f *os.File
}

// TakeLock locks <run-dir>/<interface>.lock, which it makes, with its
// directory, where they are missing. The error is ErrLocked where another
// process has it.
func TakeLock(runDir, iface string) (*Lock, error) {
	if err := CheckInterface(iface); err != nil {
		return nil, err
	}
	// Whoever removes the file or its directory does so in one moment: the
	// next attempt finds another, or makes it.
	for range 100 {
		if err := os.MkdirAll(runDir, 0o700); err != nil {
			return nil, fmt.Errorf("lock: %w", err)
		}
		f, err := os.OpenFile(LockPath(runDir, iface), os.O_RDWR|os.O_CREATE, 0o600)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("lock: %w", err)
		}
		if err := lock(f); err != nil {
			f.Close()
			return nil, err
		}
		if inPlace(f) {
			return &Lock{f: f}, nil
		}
		f.Close() // its holder removed it between our two calls
	}
	return nil, fmt.Errorf("lock %s: it vanishes again and again", LockPath(runDir, iface))
}

// Locked reports whether TakeLock would return ErrLocked. It makes nothing.
func Locked(runDir, iface string) bool {
	f, err := os.Open(LockPath(runDir, iface))
	if err != nil {
		return false
	}
	defer f.Close()
	return errors.Is(lock(f), ErrLocked)
}

func lock(f *os.File) error {
	err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		return ErrLocked
	}
	if err != nil {
		return fmt.Errorf("lock %s: %w", f.Name(), err)
	}
	return nil
}

// inPlace reports whether f is still the file of its name.
func inPlace(f *os.File) bool {
	ours, err := f.Stat()
	if err != nil {
		return false
	}
	named, err := os.Lstat(f.Name())
	return err == nil && os.SameFile(ours, named)
}

// LockPath returns the path of the lock file.
func LockPath(runDir, iface string) string { return filepath.Join(runDir, iface+".lock") }

// Release gives the lock up before the process ends. The file stays.
func (l *Lock) Release() error { return l.f.Close() }

// Remove removes the file and gives the lock up.
func (l *Lock) Remove() error { return errors.Join(os.Remove(l.f.Name()), l.f.Close()) }
