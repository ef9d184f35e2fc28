package cli

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"path/filepath"

	"github.com/spf13/cobra"

	"keyturn/internal/kmesim"
)

func newKme() *cobra.Command {
	var dir, addrA, addrB, faultA, faultB string
	var verbose bool
	cmd := &cobra.Command{
		Use:   "kme",
		Short: "Simulate a pair of KMEs",
		Long: `Run two simulated key management entities (KMEs) of one QKD network, kme-a and
kme-b, as ETSI GS QKD 014 describes them: HTTPS with mutual TLS, each key handed
out once to either end. For tests and laboratories: the keys come from this
process's random generator, not from a quantum channel.

  keyturn kme init lab
  keyturn kme --dir lab

An SAE proves its ID by the common name of its certificate. No key is printed,
also not with --verbose.

Faults: healthy; out-of-keys (503); late (a key ID is not known); slow=DURATION;
wrong-bytes (another key under the ID); wrong-size; lost (a key is used up, the
connection closed); html (a proxy's error page); down (every connection closed);
silent (never answers).`,
		Args:                       cobra.ArbitraryArgs,
		SuggestionsMinimumDistance: 2,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				return needCommand(cmd, args)
			}
			if dir == "" {
				return withHint(usageError{errors.New("--dir is missing: the directory of the certificates")}, "keyturn kme init lab")
			}
			level := slog.LevelInfo
			if verbose {
				level = slog.LevelDebug
			}
			log := slog.New(slog.NewTextHandler(cmd.ErrOrStderr(), &slog.HandlerOptions{Level: level}))
			pair := kmesim.New(kmesim.Options{Log: log})
			for kme, text := range map[*kmesim.KME]string{pair.A: faultA, pair.B: faultB} {
				fault, err := kmesim.ParseFault(text)
				if err != nil {
					return usage(cmd, err)
				}
				kme.SetFault(fault)
			}
			conf := kmesim.Config{AddrA: addrA, AddrB: addrB, Dir: dir, Pair: pair}
			var printed error
			err := kmesim.Run(cmd.Context(), conf, func(a, b net.Addr) {
				_, printed = fmt.Fprint(cmd.OutOrStdout(), listening(dir, a, b))
			})
			if err != nil {
				return err
			}
			return printed
		},
	}
	f := cmd.Flags()
	f.StringVar(&dir, "dir", "", "`DIR` of the certificates, as kme init writes them")
	f.StringVar(&addrA, "a", "127.0.0.1:8443", "`ADDRESS` of kme-a")
	f.StringVar(&addrB, "b", "127.0.0.1:8444", "`ADDRESS` of kme-b")
	f.StringVar(&faultA, "fault-a", "healthy", "what is wrong with kme-a")
	f.StringVar(&faultB, "fault-b", "healthy", "what is wrong with kme-b")
	f.BoolVarP(&verbose, "verbose", "v", false, "log each delivery and each refusal")
	cmd.AddCommand(newKmeInit())
	return cmd
}

// listening says where the KMEs are, and how to get a key at one end and the
// same at the other with curl.
func listening(dir string, a, b net.Addr) string {
	ask := func(sae int, kme net.Addr, path string) string {
		file := func(name string) string { return filepath.Join(dir, name) }
		name := kmesim.SAEName(sae)
		return fmt.Sprintf("  curl --cacert %s --cert %s --key %s 'https://%s/api/v1/keys/%s'\n",
			file("root.crt"), file(name+".crt"), file(name+".key"), kme, path)
	}
	first, second := kmesim.SAEName(1), kmesim.SAEName(2)
	return fmt.Sprintf("%s: https://%s\n%s: https://%s\n", kmesim.NameA, a, kmesim.NameB, b) +
		"\nA key for " + first + " that it shares with " + second + ", and the same at the other end by its ID:\n\n" +
		ask(1, a, second+"/enc_keys?size=256&number=1") +
		ask(2, b, first+"/dec_keys?key_ID=...")
}

func newKmeInit() *cobra.Command {
	var o kmesim.LabOptions
	cmd := &cobra.Command{
		Use:   "init DIR",
		Short: "Write the certificates of a laboratory",
		Long: `Write into DIR, which is made if need be, the certificates and keys of a
laboratory: the root, kme-a, kme-b, and SAEs called sae_001, sae_002 and so on.
Each is a NAME.crt and a NAME.key. Nothing is overwritten.

The KMEs' certificates are for localhost, 127.0.0.1, ::1, kme-a and kme-b, and
for each --name.`,
		Args: exactly("DIR"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := kmesim.WriteLab(args[0], o); err != nil {
				return err
			}
			_, err := fmt.Fprintf(cmd.OutOrStdout(), "%s: certificates of %s, %s and %s\n",
				args[0], kmesim.NameA, kmesim.NameB, count(o.SAEs, "SAE"))
			return err
		},
	}
	cmd.Flags().IntVar(&o.SAEs, "saes", kmesim.DefaultSAEs, "how many SAEs")
	cmd.Flags().StringArrayVar(&o.Names, "name", nil, "a further host name or IP `ADDRESS` of the KMEs; may be repeated")
	return cmd
}
