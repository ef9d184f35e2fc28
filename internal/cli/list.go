package cli

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"

	"keyturn/internal/control"
	"keyturn/internal/registry"
)

// degraded reports whether a rotator needs attention. One that was brought down
// in order does not.
func degraded(s *control.Status) bool { return s.Problem != "" || running(s) && s.Degraded() }

// running reports whether a rotator answered.
func running(s *control.Status) bool { return s.PID != 0 }

// look asks one rotator.
func (d *dirs) look(ctx context.Context, iface string) (*control.Status, error) {
	e, err := d.known(iface)
	if err != nil {
		return nil, err
	}
	status, err := d.client(iface).Status(ctx)
	if err == nil {
		return status, nil
	}
	s := &control.Status{
		Interface: iface, ConfigPath: e.Config, State: control.StateDown,
		Peers: []control.PeerStatus{}, Warnings: []control.Warning{},
	}
	switch {
	case !errors.Is(err, control.ErrNotRunning):
		s.Problem = err.Error()
	case e.Process.Alive():
		s.Problem = fmt.Sprintf("process %d runs but does not answer", e.Process.PID)
	case e.Process != registry.Process{}:
		s.Problem = "ended without being brought down"
	}
	return s, nil
}

// lookAll asks all rotators of this host at once, in the order of their
// interfaces.
func (d *dirs) lookAll(ctx context.Context) ([]*control.Status, error) {
	names, err := d.registry().Interfaces()
	if err != nil {
		return nil, err
	}
	set := make(map[string]struct{})
	for _, n := range names {
		set[n] = struct{}{}
	}
	// The registry may have been lost while a rotator runs.
	files, _ := os.ReadDir(d.run)
	for _, f := range files {
		if n, ok := strings.CutSuffix(f.Name(), ".sock"); ok && registry.CheckInterface(n) == nil {
			set[n] = struct{}{}
		}
	}
	names = slices.Sorted(maps.Keys(set))
	all := make([]*control.Status, len(names))
	var wg sync.WaitGroup
	for i, n := range names {
		wg.Go(func() {
			s, err := d.look(ctx, n)
			if err != nil { // an entry that cannot be read
				s = &control.Status{
					Interface: n, State: control.StateDown, Problem: err.Error(),
					Peers: []control.PeerStatus{}, Warnings: []control.Warning{},
				}
			}
			all[i] = s
		})
	}
	wg.Wait()
	return all, nil
}

func newLs(d *dirs) *cobra.Command {
	return &cobra.Command{
		Use:     "ls",
		Aliases: []string{"list"},
		Short:   "List the rotators of this host",
		Long: `List the rotators that were brought up on this host, running or not.

STATE is up, hold (a peer has not finished its bootstrap) or down. PEERS counts
the peers whose tunnel is protected: under a key that both ends have confirmed
and that is fresh. The last column says what is wrong.

Exit code 3: a tunnel is not protected, something needs attention, or a rotator
ended without being brought down.`,
		Args: exactly(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			all, err := d.lookAll(cmd.Context())
			if err != nil {
				return err
			}
			if len(all) == 0 {
				return noRotators(cmd)
			}
			if err := writeTable(cmd.OutOrStdout(), lsRows(all, time.Now())); err != nil {
				return err
			}
			return degradedIf(slices.ContainsFunc(all, degraded))
		},
	}
}

func noRotators(cmd *cobra.Command) error {
	fmt.Fprintln(cmd.ErrOrStderr(), "no rotator was brought up on this host")
	return nil
}

func degradedIf(degraded bool) error {
	if degraded {
		return errDegraded
	}
	return nil
}

func lsRows(all []*control.Status, now time.Time) [][]string {
	rows := [][]string{{"INTERFACE", "STATE", "PEERS", "LAST ROTATION"}}
	for _, s := range all {
		row := []string{s.Interface, string(s.State), "-", "-"}
		if running(s) {
			row[2] = fmt.Sprintf("%d/%d", s.ProtectedPeers(), len(s.Peers))
			var last time.Time
			for _, p := range s.Peers {
				if p.LastRotation.After(last) {
					last = p.LastRotation
				}
			}
			if !last.IsZero() {
				row[3] = ago(now.Sub(last))
			}
		}
		rows = append(rows, append(row, whatIsWrong(s)))
	}
	return rows
}

// whatIsWrong says in one line what is most wrong with a rotator.
func whatIsWrong(s *control.Status) string {
	if s.Problem != "" {
		return s.Problem
	}
	for _, w := range s.Warnings {
		if w.Severity == control.SeverityError {
			return w.Text
		}
	}
	first, others := "", 0
	for _, p := range s.Peers {
		if p.Protected {
			continue
		}
		if first == "" {
			first = p.Name + ": " + p.Why
		} else {
			others++
		}
	}
	if first != "" {
		if others > 0 {
			first += fmt.Sprintf(" (and %d more)", others)
		}
		return first
	}
	for _, w := range s.Warnings {
		if w.Severity == control.SeverityWarning {
			return w.Text
		}
	}
	for _, p := range s.Peers {
		for _, w := range p.Warnings {
			if w.Severity != control.SeverityInfo {
				return p.Name + ": " + w.Text
			}
		}
	}
	return ""
}
