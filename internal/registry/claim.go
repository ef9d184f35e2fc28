package registry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	claimPrefix = "@keyturn/" // in the abstract namespace of unix(7)
	claimTime   = time.Second // for a holder of the name to show itself
	claimRetry  = 10 * time.Millisecond
)

// Claim makes a process the only rotator of an interface in its network
// namespace, whatever its directories. It is a listening socket with an
// abstract name: the kernel keeps those apart by network namespace, as it does
// interfaces, and nothing of it outlives the process. A userspace device that
// is reached from several network namespaces through one /var/run/wireguard
// can be claimed in each of them; there a common run directory (Lock) still
// keeps its rotators apart.
type Claim struct {
	listener net.Listener
	runDir   string
	stop     context.CancelFunc
	served   sync.WaitGroup
}

// HeldError is who has the name of a claim.
type HeldError struct {
	// Rotator: it is root's, or our own user's, so that it is believed to be a
	// rotator. Anybody may take an abstract name: what another user holds must
	// not keep a rotator from running.
	Rotator bool
	PID     int    // 0: of another PID namespace, or not known
	UID     int    // -1: not known, for it does not answer
	RunDir  string // of a Rotator; empty where it did not say
}

// Error implements error.
func (e *HeldError) Error() string {
	switch {
	case e.UID < 0:
		return "a process that does not answer holds the interface's name"
	case !e.Rotator && e.PID == 0:
		return fmt.Sprintf("a process of user %d holds the interface's name", e.UID)
	case !e.Rotator:
		return fmt.Sprintf("process %d of user %d holds the interface's name", e.PID, e.UID)
	}
	text := ErrLocked.Error() + ": process of another PID namespace"
	if e.PID != 0 {
		text = fmt.Sprintf("%v: process %d", ErrLocked, e.PID)
	}
	if e.RunDir != "" {
		text += ", run directory " + e.RunDir
	}
	return text
}

// Is makes a Rotator an ErrLocked.
func (e *HeldError) Is(target error) bool { return target == ErrLocked && e.Rotator }

// TakeClaim claims an interface and tells whoever asks for it the run
// directory. The error is a *HeldError where another process has it.
func TakeClaim(ctx context.Context, iface, runDir string) (*Claim, error) {
	if err := CheckInterface(iface); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, claimTime)
	defer cancel()
	name := claimPrefix + iface
	last := &HeldError{UID: -1}
	for {
		l, err := new(net.ListenConfig).Listen(ctx, "unix", name)
		if err == nil {
			return newClaim(l, runDir), nil
		}
		if !errors.Is(err, unix.EADDRINUSE) {
			return nil, fmt.Errorf("claim interface: %w", err)
		}
		held, sure := holder(ctx, name)
		if held != nil {
			last = held
		}
		if sure {
			return nil, last
		}
		// It has gone or is about to, does not listen yet, or too many others ask.
		select {
		case <-time.After(claimRetry):
		case <-ctx.Done():
			return nil, last
		}
	}
}

// holder asks who has a name; nil if nobody answers. It is sure of a rotator
// that says its run directory, or says nothing and stays: one that was killed a
// moment ago hangs up.
func holder(ctx context.Context, name string) (held *HeldError, sure bool) {
	c, err := new(net.Dialer).DialContext(ctx, "unix", name)
	if err != nil {
		return nil, false
	}
	defer c.Close()
	// The kernel noted it when the socket began to listen: no exec since then,
	// and no use of that PID by another process, makes a root's of it.
	cred, err := credentials(c)
	if err != nil {
		return nil, false
	}
	held = &HeldError{Rotator: trusted(cred), PID: int(cred.Pid), UID: int(cred.Uid)}
	if !held.Rotator {
		return held, true
	}
	deadline, _ := ctx.Deadline()
	_ = c.SetReadDeadline(deadline)
	b, err := io.ReadAll(io.LimitReader(c, unix.PathMax))
	if err == nil && filepath.IsAbs(string(b)) {
		held.RunDir = string(b)
	}
	return held, held.RunDir != "" || errors.Is(err, os.ErrDeadlineExceeded)
}

func trusted(cred *unix.Ucred) bool { return cred.Uid == 0 || int64(cred.Uid) == int64(os.Geteuid()) }

// credentials returns the process at the other end of a unix socket.
func credentials(c net.Conn) (cred *unix.Ucred, err error) {
	raw, err := c.(*net.UnixConn).SyscallConn()
	if err != nil {
		return nil, err
	}
	controlErr := raw.Control(func(fd uintptr) {
		cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	})
	return cred, errors.Join(controlErr, err)
}

func newClaim(l net.Listener, runDir string) *Claim {
	ctx, stop := context.WithCancel(context.Background())
	c := &Claim{listener: l, runDir: runDir, stop: stop}
	c.served.Go(func() { c.serve(ctx) })
	return c
}

// serve answers at once whoever connects, so that nobody can fill the queue.
func (c *Claim) serve(ctx context.Context) {
	for ctx.Err() == nil {
		conn, err := c.listener.Accept()
		if err != nil { // closed, or out of descriptors
			select {
			case <-ctx.Done():
			case <-time.After(claimRetry):
			}
			continue
		}
		if cred, err := credentials(conn); err == nil && trusted(cred) {
			_, _ = io.WriteString(conn, c.runDir) // fits the socket's buffer: this does not block
		}
		conn.Close()
	}
}

// Release gives the claim up before the process ends. A nil Claim has none.
func (c *Claim) Release() {
	if c == nil {
		return
	}
	c.stop()
	_ = c.listener.Close()
	c.served.Wait()
}
