// Package cli is keyturn's command line: commands, tables, hints and exit
// codes. It owns all that people read and nothing of what rotators do.
//
// What goes wrong is said on standard error by one rule: first whatever has a
// form of its own (the problems of a configuration), then one line "error: "
// with what could not be done and why, then for each thing that the user can
// do about it one line "hint: ". What begins with "warning: " changes no exit
// code.
package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"unicode"

	"github.com/spf13/cobra"

	"keyturn/internal/config"
	"keyturn/internal/detach"
)

// Exit codes.
const (
	exitOK       = 0
	exitFailed   = 1
	exitUsage    = 2
	exitDegraded = 3
)

// errDegraded ends status, ls and check: all is said already.
var errDegraded = errors.New("degraded")

// errTold ends a daemon that did not get ready: its starter says it all.
var errTold = errors.New("starter was told")

// usageError is a command line that cannot be understood.
type usageError struct{ error }

func (e usageError) Unwrap() error { return e.error }

// hinted is an error with what the user can do about it.
type hinted struct {
	error
	hints []string
}

func (e hinted) Unwrap() error { return e.error }

// crashed is a daemon that ended without an account of its own, with what it
// wrote instead.
type crashed struct {
	error
	said string
}

func (e crashed) Unwrap() error { return e.error }

func withHint(err error, hints ...string) error { return hinted{err, hints} }

// Main runs the command line and returns the exit code.
func Main() int {
	// Nothing here uses package log, but net/http does: it would quote bytes of
	// a KMS's answer that came too late, which may be a key.
	log.SetOutput(io.Discard)
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	// The second signal finds no handler any more and ends the process.
	context.AfterFunc(ctx, stop)
	root := newRoot()
	err := root.ExecuteContext(ctx)
	report(os.Stderr, err)
	return exitCode(err)
}

func exitCode(err error) int {
	if err == nil {
		return exitOK
	}
	if errors.Is(err, errDegraded) {
		return exitDegraded
	}
	if _, ok := errors.AsType[usageError](err); ok {
		return exitUsage
	}
	return exitFailed
}

// report writes err by the rule of this package.
func report(w io.Writer, err error) {
	if err == nil || errors.Is(err, errDegraded) || errors.Is(err, errTold) {
		return
	}
	if child, ok := errors.AsType[detach.NotReady](err); ok {
		_, _ = io.WriteString(w, string(child)) // by this rule already
		return
	}
	if ps, ok := errors.AsType[config.Problems](err); ok {
		_, _ = fmt.Fprintln(w, ps)
		what := "1 problem"
		if len(ps) != 1 {
			what = fmt.Sprintf("%d problems", len(ps))
		}
		_, _ = fmt.Fprintf(w, "error: %s in the configuration\n", what)
		return
	}
	if c, ok := errors.AsType[crashed](err); ok {
		for line := range strings.Lines(c.said) {
			_, _ = fmt.Fprintln(w, printable(strings.TrimSuffix(line, "\n")))
		}
	}
	_, _ = fmt.Fprintln(w, "error:", printable(err.Error()))
	for _, hint := range hintsOf(err) {
		_, _ = fmt.Fprintln(w, "hint:", printable(hint))
	}
}

// warnIgnored tells of a configuration's values that have no effect.
func warnIgnored(w io.Writer, c *config.Config) {
	for _, p := range c.Ignored() {
		_, _ = fmt.Fprintf(w, "warning: %v\n", p)
	}
}

func hintsOf(err error) []string {
	if h, ok := errors.AsType[hinted](err); ok {
		return h.hints
	}
	if errors.Is(err, fs.ErrPermission) && os.Geteuid() != 0 {
		return []string{"run it as root, as wg itself"}
	}
	return nil
}

// printable makes foreign text fit for one line of a terminal.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		switch {
		case r == '\n':
			return ' '
		case unicode.IsPrint(r):
			return r
		}
		return unicode.ReplacementChar
	}, s)
}

// dirs are where keyturn keeps what; see the flags.
type dirs struct {
	run, state, log string
}

func newRoot() *cobra.Command {
	var d dirs
	root := &cobra.Command{
		Use:   "keyturn",
		Short: "Quantum-safe key rotation for WireGuard",
		Long: `keyturn keeps the pre-shared keys (PSKs) of WireGuard tunnels fresh and
quantum-safe. On each host one rotator per WireGuard interface agrees on keys
with the rotators at the other ends, out of quantum key distribution (QKD) and
post-quantum key exchange, verifies them, and sets them as the tunnels' PSKs.

keyturn creates no interfaces or tunnels: bring them up first, with wg-quick or
whatever you use. Then, at both ends:

  keyturn genkey | (umask 077; tee identity.key) | keyturn pubkey
  keyturn check wg0.yaml
  keyturn up wg0.yaml
  keyturn status

Exit codes: 0 all is well, 1 failed, 2 not understood, 3 degraded (status, ls
and check: a tunnel is not protected, or something needs attention).`,
		SilenceErrors: true,
		SilenceUsage:  true,
		Args:          cobra.ArbitraryArgs,
		RunE:          needCommand,

		SuggestionsMinimumDistance: 2,
	}
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error { return usage(cmd, err) })
	f := root.PersistentFlags()
	f.StringVar(&d.run, "run-dir", fromEnv("KEYTURN_RUN_DIR", "/run/keyturn"), "`DIR` of sockets and journals (KEYTURN_RUN_DIR)")
	f.StringVar(&d.state, "state-dir", fromEnv("KEYTURN_STATE_DIR", "/var/lib/keyturn"), "`DIR` of what was brought up (KEYTURN_STATE_DIR)")
	f.StringVar(&d.log, "log-dir", fromEnv("KEYTURN_LOG_DIR", "/var/log/keyturn"), "`DIR` of logs (KEYTURN_LOG_DIR)")
	root.AddCommand(
		newUp(&d), newDown(&d), newRm(&d), newLs(&d), newStatus(&d), newRun(&d), newCheck(&d), newRotate(&d),
		newGenkey(), newPubkey(), newKme(), newKms(), newDemo(), newExample(), newVersion(),
	)
	root.InitDefaultCompletionCmd()
	root.InitDefaultHelpCmd()
	quietUsage(root)
	return root
}

// quietUsage makes every mistake in arguments a usageError.
func quietUsage(cmd *cobra.Command) {
	if check := cmd.Args; check != nil {
		cmd.Args = func(cmd *cobra.Command, args []string) error {
			if err := check(cmd, args); err != nil {
				return usage(cmd, err)
			}
			return nil
		}
	}
	for _, c := range cmd.Commands() {
		quietUsage(c)
	}
}

func usage(cmd *cobra.Command, err error) error {
	return withHint(usageError{err}, cmd.CommandPath()+" --help")
}

// needCommand is what a command does that only has others below it.
func needCommand(cmd *cobra.Command, args []string) error {
	if len(args) == 0 {
		return cmd.Help()
	}
	err := usageError{fmt.Errorf("unknown command %q for %s", args[0], cmd.CommandPath())}
	var hints []string
	for _, s := range cmd.SuggestionsFor(args[0]) {
		hints = append(hints, cmd.CommandPath()+" "+s)
	}
	if hints == nil {
		hints = []string{cmd.CommandPath() + " --help"}
	}
	return withHint(err, hints...)
}

// exactly is cobra.RangeArgs in words of our own; names are those of the
// arguments, in brackets where one may be left out.
func exactly(names ...string) cobra.PositionalArgs {
	return func(_ *cobra.Command, args []string) error {
		if len(args) > len(names) {
			return fmt.Errorf("unexpected argument %q", args[len(names)])
		}
		for _, missing := range names[len(args):] {
			if !strings.HasPrefix(missing, "[") {
				return fmt.Errorf("argument %s is missing", missing)
			}
		}
		return nil
	}
}

func fromEnv(name, otherwise string) string {
	if v := os.Getenv(name); v != "" {
		return v
	}
	return otherwise
}
