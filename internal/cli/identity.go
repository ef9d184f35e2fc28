package cli

import (
	"crypto/rand"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"

	"keyturn/internal/link"
)

func newGenkey() *cobra.Command {
	return &cobra.Command{
		Use:   "genkey",
		Short: "Make a rotator's secret identity",
		Long: `Print a new secret identity: 32 random bytes in base64, from which the
rotator's Ed25519 and ML-DSA-65 keys are derived. Keep it in a file that only
its owner can read; keyturn refuses others.

  (umask 077; keyturn genkey > identity.key)
  keyturn pubkey < identity.key

or, as with wg:

  umask 077; keyturn genkey | tee identity.key | keyturn pubkey`,
		Args: exactly(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			id, err := link.GenerateIdentity(rand.Reader)
			if err != nil {
				return err
			}
			warnIfReadable(cmd.ErrOrStderr(), cmd.OutOrStdout())
			if _, err := fmt.Fprintln(cmd.OutOrStdout(), id.Secret()); err != nil {
				return fmt.Errorf("write identity: %w", err)
			}
			return nil
		},
	}
}

// warnIfReadable warns of a secret that goes into a file that others can read.
func warnIfReadable(warnings, out io.Writer) {
	f, ok := out.(*os.File)
	if !ok {
		return
	}
	info, err := f.Stat()
	if err == nil && info.Mode().IsRegular() && info.Mode().Perm()&0o077 != 0 {
		fmt.Fprintln(warnings, "warning: writing to a file that others can read")
		fmt.Fprintln(warnings, "hint: umask 077, and again with a new file")
	}
}

// maxIdentityText bounds what pubkey reads: an identity has 44 characters.
const maxIdentityText = 1 << 10

func newPubkey() *cobra.Command {
	return &cobra.Command{
		Use:   "pubkey",
		Short: "Print the public form of a secret identity",
		Long: `Read a secret identity from standard input, as genkey prints it, and print its
public form: the fingerprint, 44 characters of base64, that goes into the peers'
configuration as "identity". It gives nothing of the secret away.

  keyturn pubkey < identity.key`,
		Args: exactly(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			text, err := io.ReadAll(io.LimitReader(cmd.InOrStdin(), maxIdentityText))
			defer clear(text)
			if err != nil {
				return fmt.Errorf("read standard input: %w", err)
			}
			id, err := link.ParseIdentity(string(text))
			if err != nil {
				return withHint(fmt.Errorf("standard input: %w", err), "keyturn genkey | tee identity.key | keyturn pubkey")
			}
			if _, err := fmt.Fprintln(cmd.OutOrStdout(), id.Fingerprint()); err != nil {
				return fmt.Errorf("write identity: %w", err)
			}
			return nil
		},
	}
}
