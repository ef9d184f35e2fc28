package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"keyturn/internal/config"
	"keyturn/internal/daemon"
	"keyturn/internal/detach"
	"keyturn/internal/logfile"
	"keyturn/internal/registry"
)

func newRun(d *dirs) *cobra.Command {
	var detached bool
	cmd := &cobra.Command{
		Use:   "run CONFIG",
		Short: "Run a rotator in the foreground",
		Long: `Run the rotator that CONFIG describes in the foreground, for systemd and
containers. It logs to standard error and tells systemd (Type=notify) when it is
ready and when it stops.

SIGINT and SIGTERM stop it as "keyturn down" does: it says goodbye to the peers
and leaves the last pre-shared keys in place. A second one ends it at once.
SIGHUP is ignored: the configuration is read at the start only.`,
		Args: exactly("CONFIG"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if detached {
				return d.runDetached(cmd.Context(), args[0])
			}
			log := func(string) (io.Writer, error) { return cmd.ErrOrStderr(), nil }
			return d.runRotator(cmd.Context(), args[0], rotator{log: log})
		},
	}
	// How up starts this command, with the readiness pipe.
	cmd.Flags().BoolVar(&detached, "detached", false, "")
	_ = cmd.Flags().MarkHidden("detached")
	return cmd
}

// runDetached is the daemon's side of up: problems go to the starter, or,
// once that has gone, to the log.
func (d *dirs) runDetached(ctx context.Context, path string) error {
	starter, err := detach.Child()
	if err != nil {
		return err
	}
	var log *logfile.File
	isReady := false
	err = d.runRotator(ctx, path, rotator{
		log: func(iface string) (_ io.Writer, err error) {
			if log, err = logfile.Open(logfile.Path(d.log, iface), logfile.Size); err != nil {
				return nil, err
			}
			err = log.TakeOutput()
			return log, err
		},
		closeLog: func() {
			if log != nil {
				log.Close()
			}
		},
		dropped: func() uint64 { return log.Dropped() },
		ready:   func() { isReady = true; starter.Ready() },
	})
	if err != nil && !isReady {
		var b strings.Builder
		report(&b, err)
		if starter.NotReady(b.String()) == nil {
			return errTold
		}
	}
	return err
}

// rotator is how a rotator speaks to whoever started it.
type rotator struct {
	log      func(iface string) (io.Writer, error) // opens the log
	closeLog func()                                // called last, also where log failed or was not called; may be nil
	dropped  func() uint64                         // log lines lost; nil: none can be
	ready    func()                                // may be nil
}

// runRotator runs a rotator, the only one of its interface, from the first
// look at its configuration to its end. What can fail without writing anything
// comes first; nothing of the rest is left if it does not get ready.
func (d *dirs) runRotator(ctx context.Context, path string, r rotator) (err error) {
	if r.closeLog != nil {
		defer r.closeLog()
	}
	// Rotation does not end because nobody reads the log any more.
	signal.Ignore(syscall.SIGHUP, syscall.SIGPIPE)
	if err := detach.Harden(); err != nil {
		return err
	}
	if err := d.absolute(); err != nil {
		return err
	}
	c, err := config.Load(path)
	if err != nil {
		return err
	}
	entry, err := newEntry(c.Interface, path)
	if err != nil {
		return err
	}
	claim, squatted, err := d.claim(ctx, c.Interface)
	if err != nil {
		return err
	}
	defer claim.Release()
	setup, err := daemon.Open(ctx, c)
	if errors.Is(err, syscall.EADDRINUSE) {
		err = withHint(err, "ss -ltnp shows that process", "each rotator of a host needs a port of its own: listen in "+path+", address at its peers")
	}
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, setup.Close()) }()

	traces := d.tracesOf(c)
	lock, err := takeLock(d.run, c.Interface)
	if err != nil {
		traces.remove(nil)
		return err
	}
	isReady := false
	defer func() {
		claim.Release() // first: whoever finds the lock free may bring up the next
		if isReady {
			_ = lock.Release()
			return
		}
		if r.closeLog != nil {
			r.closeLog() // which writes what is queued
		}
		traces.remove(lock)
		if err != nil && traces.logged() {
			err = withHint(err, append(hintsOf(err), "see the end of "+traces.log)...)
		}
	}()
	w, err := r.log(c.Interface)
	if err != nil {
		return err
	}
	log := slog.New(slog.NewTextHandler(w, nil)).With("interface", c.Interface)
	// By a signal, or (then ctx goes on) because an operator said down.
	stopping := sync.OnceFunc(func() { notify(log, "STOPPING=1") })
	err = setup.Run(ctx, daemon.Options{
		ConfigPath: entry.Config,
		RunDir:     d.run,
		StateDir:   d.state,
		Version:    version(),
		Log:        log,
		LogDropped: r.dropped,
		Ready: func() error {
			if err := d.registry().Put(entry); err != nil {
				return err
			}
			isReady = true
			if squatted != nil {
				log.Warn("a second rotator of the interface would not be noticed", "err", squatted)
			}
			log.Info("rotator is ready", "config", entry.Config, "version", version())
			if r.ready != nil {
				r.ready()
			}
			notify(log, "READY=1")
			context.AfterFunc(ctx, stopping)
			return nil
		},
	})
	if !isReady {
		return err
	}
	stopping()
	// An orderly end: ls must not take the rotator for one that was killed.
	entry.Process = registry.Process{}
	if putErr := d.registry().Put(entry); putErr != nil {
		log.Warn("rotator's end is not in the registry", "err", putErr)
	}
	if err != nil {
		log.Error("rotator stopped", "err", err)
		return err
	}
	log.Info("rotator stopped")
	return nil
}

// claim makes this process the only rotator of the interface. Another user's
// process that has its name does not keep it from running: squatted tells of it.
func (d *dirs) claim(ctx context.Context, iface string) (claim *registry.Claim, squatted, err error) {
	claim, err = registry.TakeClaim(ctx, iface, d.run)
	held, ok := errors.AsType[*registry.HeldError](err)
	switch {
	case !ok:
		return claim, nil, err
	case !held.Rotator:
		return nil, held, nil
	case held.RunDir == "" || held.RunDir == d.run:
		return nil, nil, errRunning(iface, held)
	}
	other := "keyturn --run-dir=" + held.RunDir
	return nil, nil, withHint(fmt.Errorf("%s: %w", iface, held), other+" status "+iface, other+" down "+iface)
}

// takeLock locks what the run directory holds of an interface.
func takeLock(runDir, iface string) (*registry.Lock, error) {
	lock, err := registry.TakeLock(runDir, iface)
	if errors.Is(err, registry.ErrLocked) {
		return nil, errRunning(iface, err)
	}
	return lock, err
}

func newEntry(iface, path string) (registry.Entry, error) {
	abs, err := filepath.Abs(path)
	if err != nil {
		return registry.Entry{}, err
	}
	self, err := registry.Self()
	if err != nil {
		return registry.Entry{}, err
	}
	return registry.Entry{Interface: iface, Config: abs, Process: self, StartedAt: time.Now().Round(time.Second)}, nil
}

// notify tells systemd (sd_notify(3)), where it asked to be told.
func notify(log *slog.Logger, state string) {
	name := os.Getenv("NOTIFY_SOCKET")
	if name == "" {
		return
	}
	c, err := net.Dial("unixgram", name) // a leading @ means the abstract namespace here as there
	if err == nil {
		_, err = io.WriteString(c, state)
		c.Close()
	}
	if err != nil {
		log.Warn("systemd was not told", "err", fmt.Errorf("%s: %w", state, err))
	}
}
