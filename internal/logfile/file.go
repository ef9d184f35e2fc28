// Package logfile keeps a rotator's log in a file of bounded size. Whoever
// logs never waits for the disk: lines that cannot be written are dropped and
// counted. It knows nothing of what the lines say.
package logfile

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Size is the size in bytes that a log may reach before it is renamed to
// NAME.1, replacing the one before: a log takes twice this at most.
const Size = 4 << 20

const (
	maxLine  = 16 << 10 // bytes; longer lines are cut
	maxQueue = 1024     // lines that wait for the disk
)

// Path returns the path of the log of an interface.
func Path(logDir, iface string) string { return filepath.Join(logDir, iface+".log") }

// File is a log. It is an io.Writer for slog: every Write is one line.
type File struct {
	path    string
	max     int64
	open    func(path string) (sink, error)
	queue   chan []byte
	stop    chan struct{}
	done    chan struct{}
	once    sync.Once
	dropped atomic.Uint64
	stderr  atomic.Bool

	// Of the writing goroutine alone, once it runs.
	to   sink   // nil while it could not be opened
	size int64  // bytes in to
	said uint64 // dropped lines that the log tells of
}

// sink is what a log is written to: an *os.File, or a full disk in tests.
type sink interface {
	Write([]byte) (int, error)
	Truncate(size int64) error
	Stat() (os.FileInfo, error)
	Close() error
	Fd() uintptr
}

// Open opens the log at path as Append does. max bounds its size; see Size.
func Open(path string, max int64) (*File, error) {
	return newFile(path, max, func(path string) (sink, error) { return Append(path) })
}

// Append opens or makes a log (mode 0600), and its directory where that is
// missing, without bounding it: for the output of a daemon that has not come
// to Open yet.
func Append(path string) (*os.File, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o750); err != nil {
		return nil, err
	}
	return os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_APPEND|unix.O_NOFOLLOW, 0o600)
}

func newFile(path string, max int64, open func(string) (sink, error)) (*File, error) {
	f := &File{
		path: path, max: max, open: open,
		queue: make(chan []byte, maxQueue),
		stop:  make(chan struct{}), done: make(chan struct{}),
	}
	if err := f.reopen(); err != nil {
		return nil, fmt.Errorf("log: %w", err)
	}
	go f.run()
	return f, nil
}

// Write queues a copy of line. It never blocks and never fails.
func (f *File) Write(line []byte) (int, error) {
	kept := line
	if len(kept) > maxLine {
		kept = append(kept[:maxLine-1:maxLine-1], '\n')
	} else {
		kept = append([]byte(nil), kept...)
	}
	select {
	case <-f.stop:
		f.dropped.Add(1)
		return len(line), nil
	default:
	}
	select {
	case f.queue <- kept:
	default:
		f.dropped.Add(1)
	}
	return len(line), nil
}

// Dropped returns how many lines were lost.
func (f *File) Dropped() uint64 { return f.dropped.Load() }

// TakeOutput makes the process's standard output and error follow the log, so
// that a crash leaves its trace there. It is called before the first Write.
func (f *File) TakeOutput() error {
	f.stderr.Store(true)
	return redirect(f.to)
}

func redirect(to sink) error {
	for _, fd := range []int{unix.Stdout, unix.Stderr} {
		if err := unix.Dup3(int(to.Fd()), fd, 0); err != nil {
			return fmt.Errorf("redirect output to the log: %w", err)
		}
	}
	return nil
}

// Close writes what is queued and closes the file. Lines that come later are
// dropped.
func (f *File) Close() error {
	f.once.Do(func() { close(f.stop) })
	<-f.done
	return nil
}

func (f *File) run() {
	defer close(f.done)
	defer func() {
		if f.to != nil {
			f.to.Close()
		}
	}()
	for {
		select {
		case line := <-f.queue:
			f.put(line)
			continue
		case <-f.stop:
		}
		for {
			select {
			case line := <-f.queue:
				f.put(line)
			default:
				return
			}
		}
	}
}

// put writes one line, after a note of those that were dropped before it.
func (f *File) put(line []byte) {
	if lost := f.dropped.Load(); lost > f.said {
		note := fmt.Sprintf("time=%s level=WARN msg=\"log lines were lost\" lines=%d\n",
			time.Now().Format(time.RFC3339Nano), lost-f.said)
		if f.append([]byte(note)) == nil {
			f.said = lost
		}
	}
	if f.append(line) != nil {
		f.dropped.Add(1)
	}
}

// append writes a line whole or not at all.
func (f *File) append(line []byte) error {
	if f.to == nil || (f.size > 0 && f.size+int64(len(line)) > f.max) {
		if err := f.rotate(); err != nil {
			return err
		}
	}
	n, err := f.to.Write(line)
	if err != nil {
		// A full disk may have taken part of it. Should that part stay, it
		// counts.
		if f.to.Truncate(f.size) != nil {
			f.size += int64(n)
		}
		return err
	}
	f.size += int64(n)
	return nil
}

// rotate begins a new file. On an error the next line tries again.
func (f *File) rotate() error {
	if f.to != nil {
		if err := os.Rename(f.path, f.path+".1"); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		f.to.Close()
		f.to = nil
	}
	if err := f.reopen(); err != nil {
		return err
	}
	if f.stderr.Load() {
		// Should it not work, output goes on to the old file.
		_ = redirect(f.to)
	}
	return nil
}

func (f *File) reopen() error {
	to, err := f.open(f.path)
	if err != nil {
		return err
	}
	info, err := to.Stat()
	if err != nil {
		to.Close()
		return err
	}
	f.to, f.size = to, info.Size()
	return nil
}
