package cli

import (
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"syscall"

	"keyturn/internal/config"
	"keyturn/internal/control"
	"keyturn/internal/daemon"
	"keyturn/internal/logfile"
	"keyturn/internal/registry"
)

// traces are what bringing a rotator up makes in the file system before it is
// ready, and which of it was not there before. A rotator that does not get
// ready takes it away again.
type traces struct {
	own     []string // of its interface alone
	shared  []string // directories of all rotators
	lock    bool
	log     string
	logSize int64 // -1: there was none
}

// tracesOf looks before anything is made.
func (d *dirs) tracesOf(c *config.Config) *traces {
	journal := daemon.JournalDir(d.run, c.Interface)
	if c.Journal != nil {
		journal = c.Journal.Path
	}
	log := logfile.Path(d.log, c.Interface)
	return &traces{
		own:     missing(journal, daemon.InitialDir(d.state, c.Interface), control.SocketPath(d.run, c.Interface)),
		shared:  missing(withParents(d.run, d.state, d.log)...),
		lock:    missing(registry.LockPath(d.run, c.Interface)) != nil,
		log:     log,
		logSize: fileSize(log),
	}
}

// remove removes what was not there before, and gives the lock up. What has
// something in it stays: another rotator's file in a directory, and a log that
// says something. Without the lock only directories are looked at.
func (t *traces) remove(lock *registry.Lock) {
	if lock != nil {
		if t.logSize < 0 && fileSize(t.log) == 0 {
			os.Remove(t.log)
		}
		removeAll(t.own)
		if t.lock {
			_ = lock.Remove()
		} else {
			_ = lock.Release()
		}
	}
	removeAll(t.shared)
}

// removeAll removes files, and directories that are empty, as far as it can.
func removeAll(paths []string) {
	for _, path := range paths {
		os.Remove(path)
	}
}

// removeUnused removes the directories of all rotators, of which there may have
// been only one. A directory that is not private to this user was not made by
// keyturn, and stays.
func (d *dirs) removeUnused() {
	for _, dir := range []string{d.run, d.state, d.log} {
		info, err := os.Lstat(dir)
		if err != nil {
			continue
		}
		owner, ok := info.Sys().(*syscall.Stat_t)
		private := info.Mode() == fs.ModeDir|0o700 || info.Mode() == fs.ModeDir|0o750 // of logs
		if ok && private && int64(owner.Uid) == int64(os.Geteuid()) {
			os.Remove(dir) // which fails where anything is in it
		}
	}
}

// logged reports whether the log has grown.
func (t *traces) logged() bool { return fileSize(t.log) > max(0, t.logSize) }

// missing returns those of the paths that do not exist, the deepest first.
func missing(paths ...string) []string {
	var out []string
	for _, p := range paths {
		if _, err := os.Lstat(p); os.IsNotExist(err) {
			out = append(out, p)
		}
	}
	slices.SortFunc(out, func(a, b string) int { return len(b) - len(a) })
	return slices.Compact(out)
}

// withParents adds every directory on the way to the given ones.
func withParents(dirs ...string) []string {
	var out []string
	for _, d := range dirs {
		for ; d != filepath.Dir(d); d = filepath.Dir(d) {
			out = append(out, d)
		}
	}
	return out
}

// fileSize returns -1 for a file that is not there.
func fileSize(path string) int64 {
	info, err := os.Stat(path)
	if err != nil {
		return -1
	}
	return info.Size()
}
