package cli

import (
	"errors"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"keyturn/internal/demo"
)

func newDemo() *cobra.Command {
	var o demo.Options
	cmd := &cobra.Command{
		Use:   "demo",
		Short: "Show everything at work in one process, without root",
		Long: `Run two WireGuard devices over loopback UDP, two KMEs with mutual TLS, and two
rotators with QKD and ML-KEM-1024 in one process, with constant traffic through
the tunnel. A handshake is provoked about every 6 seconds, so that one sees the
whole cycle: keys are established, one is committed at both ends after a
handshake, and the next handshake confirms it. Nothing of the machine is changed
and nothing is left behind.

On a terminal it draws a live view, otherwise it prints lines. Ctrl-C ends it.
The exit code is 1 if a ping was lost, a handshake failed, or the ends hold
different keys at the end.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if o.For < 0 || o.For == 0 && cmd.Flags().Changed("for") {
				return usage(cmd, errors.New("--for is a time to run, such as 30s"))
			}
			ctx, stop := signal.NotifyContext(cmd.Context(), os.Interrupt, syscall.SIGTERM)
			defer stop()
			o.Out = cmd.OutOrStdout()
			if f, ok := o.Out.(*os.File); ok && term.IsTerminal(int(f.Fd())) {
				o.Live = true
				o.Size = func() (int, int) {
					columns, rows, err := term.GetSize(int(f.Fd()))
					if err != nil {
						return 80, 24
					}
					return columns, rows
				}
			}
			return demo.Run(ctx, o)
		},
	}
	cmd.Flags().DurationVar(&o.For, "for", 0, "end by itself after this time, such as 30s")
	cmd.Flags().BoolVar(&o.JSON, "json", false, "print only the summary, as one JSON object")
	return cmd
}
