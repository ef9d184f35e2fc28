// Package detach starts this program once more as a daemon and tells its
// starter when it is ready, or why it is not. It knows nothing of what the
// daemon does.
package detach

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// ReadyTime is how long a daemon may take until it is ready.
	ReadyTime = 30 * time.Second

	stopTime  = 2 * time.Second // from SIGTERM to SIGKILL, for one that did not get ready
	maxReason = 1 << 20         // bytes of the child's reason
	maxSaid   = 16 << 10        // bytes of what a silent child wrote
	reportFD  = 3               // the child's end of the readiness pipe
)

// What the child writes to the pipe: one byte, and after notReady the reason
// up to the end.
const (
	ready    = 'R'
	notReady = 'N'
)

// NotReady is the child's own account, for people, of why it did not start.
type NotReady string

func (e NotReady) Error() string { return string(e) }

// ErrSilent means that the child ended without a word; its output may say
// why.
var ErrSilent = errors.New("the daemon ended before it was ready")

// Output returns a file without a name for the output of a daemon that has no
// log yet: only memory holds it.
func Output() (*os.File, error) {
	fd, err := unix.MemfdCreate("output of a daemon", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("output of the daemon: %w", err)
	}
	return os.NewFile(uintptr(fd), "output of a daemon"), nil
}

// Said returns what a daemon that has ended wrote to its Output, or the last
// 16 KiB of it.
func Said(output *os.File) string {
	info, err := output.Stat()
	if err != nil {
		return ""
	}
	from := max(0, info.Size()-maxSaid)
	b, _ := io.ReadAll(io.NewSectionReader(output, from, maxSaid))
	return string(b)
}

// Start runs this program with args as a daemon: a session of its own
// without a terminal, working directory /, standard input /dev/null, output
// to output, and no other descriptor but the readiness pipe. It returns nil
// once the child has called Reporter.Ready. Otherwise the child has ended
// when Start returns: the error is its NotReady, ErrSilent, or says that
// ReadyTime or ctx is over. Should the caller die meanwhile, the child goes on.
func Start(ctx context.Context, args []string, output *os.File) error {
	r, w, err := os.Pipe()
	if err != nil {
		return fmt.Errorf("readiness pipe: %w", err)
	}
	defer r.Close()
	cmd, err := command(args, output, w)
	if err == nil {
		err = cmd.Start()
	}
	w.Close() // the child's end: its death must be our end of file
	if err != nil {
		return fmt.Errorf("start daemon: %w", err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()

	ctx, cancel := context.WithTimeoutCause(ctx, ReadyTime, fmt.Errorf("the daemon is not ready after %v", ReadyTime))
	defer cancel()
	stop := context.AfterFunc(ctx, func() { _ = r.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	report, err := io.ReadAll(io.LimitReader(r, maxReason))
	switch {
	case err != nil && ctx.Err() != nil:
		_ = end(cmd.Process, ended)
		return context.Cause(ctx)
	case err != nil:
		_ = end(cmd.Process, ended)
		return fmt.Errorf("readiness pipe: %w", err)
	case len(report) > 0 && report[0] == ready:
		return nil
	case len(report) > 0 && report[0] == notReady:
		_ = end(cmd.Process, ended)
		return NotReady(report[1:])
	}
	if err := end(cmd.Process, ended); err != nil {
		return fmt.Errorf("%w: %w", ErrSilent, err)
	}
	return ErrSilent
}

func command(args []string, output, report *os.File) (*exec.Cmd, error) {
	if err := closeOthersOnExec(); err != nil {
		return nil, err
	}
	exe, err := os.Executable()
	if err == nil {
		_, err = os.Stat(exe)
	}
	if err != nil { // removed or replaced since we were started
		exe = "/proc/self/exe"
	}
	cmd := exec.Command(exe, args...)
	cmd.Args[0] = filepath.Base(os.Args[0]) // what ps shows
	cmd.Dir = "/"
	cmd.Stdout, cmd.Stderr = output, output // Stdin nil: /dev/null
	cmd.ExtraFiles = []*os.File{report}     // reportFD
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	cmd.Env = withoutNotify(os.Environ())
	return cmd, nil
}

// withoutNotify drops what would let the daemon speak to systemd as if it
// were the process that systemd started.
func withoutNotify(env []string) []string {
	var kept []string
	for _, e := range env {
		name, _, _ := strings.Cut(e, "=")
		switch name {
		case "NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES":
		default:
			kept = append(kept, e)
		}
	}
	return kept
}

// closeOthersOnExec keeps the descriptors that we inherited ourselves from
// the child. Those that Go opens are marked already.
func closeOthersOnExec() error {
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return err
	}
	for _, e := range fds {
		if fd, err := strconv.Atoi(e.Name()); err == nil && fd > unix.Stderr {
			unix.CloseOnExec(fd)
		}
	}
	return nil
}

// end waits for the child, with force where it does not end by itself, and
// returns how it ended.
func end(p *os.Process, ended <-chan error) error {
	for _, sig := range []os.Signal{syscall.SIGTERM, os.Kill} {
		_ = p.Signal(sig)
		select {
		case err := <-ended:
			return err
		case <-time.After(stopTime):
		}
	}
	return <-ended
}

// Reporter is the child's way to tell its starter how it went.
type Reporter struct {
	pipe *os.File
}

// Child returns the Reporter of a process that Start made. It is called
// before the process opens anything.
func Child() (*Reporter, error) {
	var stat unix.Stat_t
	if err := unix.Fstat(reportFD, &stat); err != nil || stat.Mode&unix.S_IFMT != unix.S_IFIFO {
		return nil, errors.New("not started by keyturn up")
	}
	unix.CloseOnExec(reportFD)
	return &Reporter{pipe: os.NewFile(reportFD, "readiness pipe")}, nil
}

// Ready tells the starter that all is well. Nobody may be listening any
// more, which is no error.
func (r *Reporter) Ready() { _ = r.report([]byte{ready}) }

// NotReady tells the starter why not. An error means that it has gone.
func (r *Reporter) NotReady(reason string) error {
	return r.report(append([]byte{notReady}, reason...))
}

func (r *Reporter) report(b []byte) error {
	_, err := r.pipe.Write(b)
	return errors.Join(err, r.pipe.Close())
}

// Harden keeps keys out of core dumps and away from debuggers, and files that
// the process makes away from other users. It is called before the process
// reads its first secret.
func Harden() error {
	unix.Umask(0o077)
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
		return fmt.Errorf("disable core dumps: %w", err)
	}
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("disable core dumps: %w", err)
	}
	return nil
}
