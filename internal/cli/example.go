package cli

import (
	"github.com/spf13/cobra"

	"keyturn/internal/config"
)

func newExample() *cobra.Command {
	return &cobra.Command{
		Use:   "example",
		Short: "Print a configuration with every key explained",
		Long: `Print a complete configuration, with what each key means, its default and its
limits: something to begin with, and the reference of the configuration file.`,
		Args: exactly(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			_, err := cmd.OutOrStdout().Write(config.Example)
			return err
		},
	}
}
