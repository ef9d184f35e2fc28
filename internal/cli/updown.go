package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"keyturn/internal/config"
	"keyturn/internal/control"
	"keyturn/internal/daemon"
	"keyturn/internal/detach"
	"keyturn/internal/logfile"
	"keyturn/internal/registry"
)

func newUp(d *dirs) *cobra.Command {
	return &cobra.Command{
		Use:   "up CONFIG|INTERFACE",
		Short: "Bring a rotator up",
		Long: `Start the rotator that CONFIG describes, or the one of INTERFACE as it was last
brought up, as a process of its own, detached from the terminal.

up returns when the rotator is ready: its configuration is valid, WireGuard can
be read, it listens for its peers and answers "keyturn status". It does not wait
for the KMS or the peers. Otherwise up says why not, and nothing was changed: no
file or directory is left that was not there before, but for a log that has more
to say than the message, which then names it. There is one rotator for an
interface, whatever its directories: a second is refused.

An argument with a slash, or that ends in .yaml or .yml, is a file.`,
		Args:              exactly("CONFIG|INTERFACE"),
		ValidArgsFunction: d.configs,
		RunE: func(cmd *cobra.Command, args []string) error {
			iface, err := d.up(cmd.Context(), args[0], cmd.ErrOrStderr())
			if err != nil {
				return err
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s: up, logging to %s\n", iface, logfile.Path(d.log, iface))
			return err
		},
	}
}

func (d *dirs) up(ctx context.Context, arg string, warnings io.Writer) (iface string, err error) {
	if err := d.absolute(); err != nil {
		return "", err
	}
	path, err := d.configOf(arg)
	if err != nil {
		return "", err
	}
	c, err := config.Load(path)
	if err != nil {
		return "", err
	}
	warnIgnored(warnings, c)
	abs, err := filepath.Abs(path)
	if err != nil {
		return "", err
	}
	output, err := detach.Output()
	if err != nil {
		return "", err
	}
	defer output.Close()
	traces := d.tracesOf(c)
	err = detach.Start(ctx, []string{
		"run", "--detached", "--run-dir=" + d.run, "--state-dir=" + d.state, "--log-dir=" + d.log, "--", abs,
	}, output)
	if _, told := errors.AsType[detach.NotReady](err); err == nil || told {
		return c.Interface, err
	}
	// It ended by force, and could not tidy up.
	if lock, lockErr := registry.TakeLock(d.run, c.Interface); lockErr == nil {
		traces.remove(lock)
	}
	err = fmt.Errorf("%s: %w", c.Interface, err)
	if traces.logged() {
		err = withHint(err, "see the end of "+traces.log)
	}
	return c.Interface, crashed{err, detach.Said(output)}
}

// downTime is how long a rotator may take to say goodbye.
const downTime = 15 * time.Second

func newDown(d *dirs) *cobra.Command {
	return &cobra.Command{
		Use:   "down INTERFACE",
		Short: "Stop a rotator",
		Long: `Stop the rotator of INTERFACE and wait until its process has ended. It says
goodbye to its peers and leaves the pre-shared keys as they are: the tunnels go
on under their last keys, which are no longer rotated. The interface itself is
not touched. "keyturn up INTERFACE" brings the rotator back.`,
		Args:              exactly("INTERFACE"),
		ValidArgsFunction: d.interfaces,
		RunE: func(cmd *cobra.Command, args []string) error {
			e, err := d.known(args[0])
			if err != nil {
				return err
			}
			if err := d.down(cmd.Context(), e); err != nil {
				return err
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s: down\n", args[0])
			return err
		},
	}
}

// down stops a rotator and waits for its end. The error is
// control.ErrNotRunning where there is nothing to stop.
func (d *dirs) down(ctx context.Context, e registry.Entry) error {
	err := d.client(e.Interface).Down(ctx)
	if errors.Is(err, control.ErrNotRunning) && e.Process.Alive() {
		return withHint(fmt.Errorf("%s: process %d runs but does not answer in %s", e.Interface, e.Process.PID, d.run),
			"it may have another run directory (--run-dir, KEYTURN_RUN_DIR): keyturn up says which",
			fmt.Sprintf("if it hangs: kill %d", e.Process.PID))
	}
	if err != nil {
		return fmt.Errorf("%s: %w", e.Interface, err)
	}
	ctx, cancel := context.WithTimeout(ctx, downTime)
	defer cancel()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for !d.gone(e) {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return withHint(fmt.Errorf("%s: the rotator is still stopping", e.Interface), "keyturn ls")
		}
	}
	return nil
}

// gone reports whether a rotator's process has ended: its lock is free, which
// holds in every PID namespace, and where its ID is known, that is free too.
func (d *dirs) gone(e registry.Entry) bool {
	return !registry.Locked(d.run, e.Interface) && !e.Process.Alive()
}

func newRm(d *dirs) *cobra.Command {
	return &cobra.Command{
		Use:   "rm INTERFACE",
		Short: "Stop a rotator and forget it",
		Long: `Stop the rotator of INTERFACE if it runs, and remove what keyturn keeps of it
on this host: the registry's entry, the journals, the recorded initial
pre-shared keys, the log, and the directories of these, once they are empty. The
configuration, the identity, the interface and its pre-shared keys stay.

Without its journal a rotator knows none of the keys that it installed. The
tunnels go on, and the next "keyturn up CONFIG" begins anew.`,
		Args:              exactly("INTERFACE"),
		ValidArgsFunction: d.interfaces,
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := d.absolute(); err != nil {
				return err
			}
			e, err := d.known(args[0])
			if err != nil {
				return err
			}
			if err := d.down(cmd.Context(), e); err != nil && !errors.Is(err, control.ErrNotRunning) {
				return err
			}
			if err := d.forget(e); err != nil {
				return err
			}
			d.removeUnused()
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s: removed\n", e.Interface)
			return err
		},
	}
}

// forget removes the files of a rotator that does not run.
func (d *dirs) forget(e registry.Entry) error {
	made := missing(withParents(d.run)...) // by the lock
	defer removeAll(made)
	lock, err := takeLock(d.run, e.Interface)
	if err != nil {
		return err
	}
	defer func() { _ = lock.Remove() }()
	log := logfile.Path(d.log, e.Interface)
	files := []string{
		control.SocketPath(d.run, e.Interface),
		log, log + ".1",
	}
	var persistent *config.Journal
	if c, err := config.Load(e.Config); err == nil && c.Interface == e.Interface {
		persistent = c.Journal
	}
	if err := daemon.Forget(d.run, d.state, e.Interface, persistent); err != nil {
		return err
	}
	for _, f := range files {
		if err := os.Remove(f); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	// Last, so that a removal that stopped half way can be asked for again.
	return d.registry().Remove(e.Interface)
}

func newRotate(d *dirs) *cobra.Command {
	return &cobra.Command{
		Use:   "rotate INTERFACE [PEER]",
		Short: "Rotate at the next window",
		Long: `Ask the rotator of INTERFACE for the next key of PEER, or of all peers, at the
next window: within seconds after the tunnel's next handshake, which under
traffic comes about every two minutes. rotate says that it asked, and does not
wait; see "keyturn status". While a session lives a key is never set outside the
window, also not by this command: that is what keeps a rotation from losing
packets. A tunnel without a live session gets the next key at once, and is
probed.`,
		Args:              exactly("INTERFACE", "[PEER]"),
		ValidArgsFunction: d.interfaces,
		RunE: func(cmd *cobra.Command, args []string) error {
			e, err := d.known(args[0])
			if err != nil {
				return err
			}
			peer, asked := "", "all peers"
			if len(args) == 2 {
				peer, asked = args[1], args[1]
			}
			err = d.client(e.Interface).Rotate(cmd.Context(), peer)
			switch {
			case errors.Is(err, control.ErrUnknownPeer):
				return withHint(fmt.Errorf("%s has no peer %q", e.Interface, peer), "keyturn status "+e.Interface)
			case errors.Is(err, control.ErrNotRunning):
				return withHint(fmt.Errorf("%s: %w", e.Interface, control.ErrNotRunning), "keyturn up "+e.Interface)
			case err != nil:
				return fmt.Errorf("%s: %w", e.Interface, err)
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s: asked to rotate %s at the next window\n", e.Interface, asked)
			return err
		},
	}
}
