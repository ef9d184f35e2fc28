package cli

import (
	"cmp"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"keyturn/internal/kmesim"
)

// kmeFlags are the flags of keyturn kme.
type kmeFlags struct {
	dir, only, link, peer, admin string
	addr, fault                  [2]string // of kme-a, kme-b
	streams                      []string
	rate                         float64
	pool                         int
	verbose                      bool
}

func newKme() *cobra.Command {
	var flags kmeFlags
	cmd := &cobra.Command{
		Use:   "kme",
		Short: "Simulate a pair of KMEs",
		Long: `Run two simulated key management entities (KMEs) of one QKD link, kme-a and
kme-b, as ETSI GS QKD 014 describes them: HTTPS with mutual TLS, each key handed
out once to either end; and by Cisco SKIP at the same addresses, and by ETSI GS
QKD 004 where --streams says. For tests and laboratories: the keys come from a
random generator, not from a quantum channel.

  keyturn kme init lab
  keyturn kme --dir lab

An SAE proves its ID by the common name of its certificate. No key is printed,
also not with --verbose.

Each master and slave have a pool that --rate fills; without it keys never run
out. To run the KMEs on two hosts, say at each which one it is:

  keyturn kme --dir lab --kme a --a :8443 --link :8445 --peer 192.0.2.2:8445
  keyturn kme --dir lab --kme b --b :8443 --link :8445 --peer 192.0.2.1:8445

While they run, keyturn kme state, fault, rate and drain look and interfere.
What can be wrong with a KME: keyturn kme fault --help.`,
		Args:                       cobra.ArbitraryArgs,
		SuggestionsMinimumDistance: 2,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				return needCommand(cmd, args)
			}
			return flags.run(cmd)
		},
	}
	f := cmd.Flags()
	f.StringVar(&flags.dir, "dir", "", "`DIR` of the certificates, as kme init writes them")
	f.StringVar(&flags.addr[0], "a", "127.0.0.1:8443", "`ADDRESS` of kme-a")
	f.StringVar(&flags.addr[1], "b", "127.0.0.1:8444", "`ADDRESS` of kme-b")
	f.StringVar(&flags.fault[0], "fault-a", "healthy", "what is wrong with kme-a")
	f.StringVar(&flags.fault[1], "fault-b", "healthy", "what is wrong with kme-b")
	f.StringArrayVar(&flags.streams, "streams", nil, "answer by ETSI GS QKD 004 as well: `DIALECT,a=ADDRESS,b=ADDRESS`; may be repeated")
	f.Float64Var(&flags.rate, "rate", 0, "`KEYS` of 256 bits that come into each pool every second; 0: no limit")
	f.IntVar(&flags.pool, "pool", kmesim.DefaultPool, "`KEYS` of 256 bits that a pool holds")
	f.StringVar(&flags.only, "kme", "", "run only this KME, `a|b`; the other one runs elsewhere")
	f.StringVar(&flags.link, "link", "", "`ADDRESS` where the KME of --kme listens for the other")
	f.StringVar(&flags.peer, "peer", "", "`HOST:PORT` where the other KME's --link is")
	f.StringVar(&flags.admin, "admin", "", "`PATH` of the admin socket (default DIR/kme.sock; with --kme DIR/kme-a.sock or DIR/kme-b.sock)")
	f.BoolVarP(&flags.verbose, "verbose", "v", false, "log each delivery and each refusal")
	cmd.AddCommand(newKmeInit(), newKmeState(), newKmeFault(), newKmeRate(), newKmeDrain())
	return cmd
}

func (f *kmeFlags) run(cmd *cobra.Command) error {
	if f.dir == "" {
		return withHint(usageError{errors.New("--dir is missing: the directory of the certificates")}, "keyturn kme init lab")
	}
	conf := kmesim.Config{AddrA: f.addr[0], AddrB: f.addr[1], Dir: f.dir, Link: f.link, Peer: f.peer}
	if err := f.one(cmd, &conf); err != nil {
		return usage(cmd, err)
	}
	conf.Admin = cmp.Or(f.admin, kmesim.AdminPath(f.dir, conf.Only))
	if conf.Admin == "" {
		cmd.PrintErrln("no admin socket: a path in " + f.dir + " is too long for one; name a shorter one by --admin")
	}
	if err := kmesim.CheckRate(f.rate, f.pool); err != nil {
		return usage(cmd, err)
	}
	level := slog.LevelInfo
	if f.verbose {
		level = slog.LevelDebug
	}
	log := slog.New(slog.NewTextHandler(cmd.ErrOrStderr(), &slog.HandlerOptions{Level: level}))
	conf.Pair = kmesim.New(kmesim.Options{Log: log, Rate: f.rate, Pool: f.pool})
	for i, kme := range []*kmesim.KME{conf.Pair.A, conf.Pair.B} {
		fault, err := kmesim.ParseFault(f.fault[i])
		if err != nil {
			return usage(cmd, err)
		}
		kme.SetFault(fault)
	}
	var streams strings.Builder
	for _, text := range f.streams {
		port, err := kmesim.ParseStreamPort(text)
		if err != nil {
			return usage(cmd, fmt.Errorf("--streams %q: %w", text, err))
		}
		port.Listening = func(a, b net.Addr) {
			for i, at := range []net.Addr{a, b} {
				if at != nil {
					fmt.Fprintf(&streams, "%s: %v: %v\n", kmeNames[i], port.Dialect, at)
				}
			}
		}
		conf.Streams = append(conf.Streams, port)
	}
	var printed error
	err := kmesim.Run(cmd.Context(), conf, func(a, b net.Addr) {
		_, printed = fmt.Fprint(cmd.OutOrStdout(), listening(f.dir, conf, a, b, streams.String()))
	})
	if err != nil {
		return err
	}
	return printed
}

// kmeNames has the names of the two KMEs in their order.
var kmeNames = [...]string{kmesim.NameA, kmesim.NameB}

// one reads the flags of a KME that runs alone.
func (f *kmeFlags) one(cmd *cobra.Command, conf *kmesim.Config) error {
	for i, name := range kmeNames {
		letter, other := string(rune('a'+i)), string(rune('b'-i))
		if f.only != letter && f.only != name {
			continue
		}
		conf.Only = name
		for _, flag := range []string{other, "fault-" + other} {
			if cmd.Flags().Changed(flag) {
				return fmt.Errorf("--%s is not for --kme %s: that KME runs elsewhere", flag, letter)
			}
		}
	}
	switch {
	case f.only == "" && (f.link != "" || f.peer != ""):
		return errors.New("--link and --peer need --kme: which one this is")
	case f.only != "" && conf.Only == "":
		return fmt.Errorf("--kme %q is neither a nor b", f.only)
	case f.only != "" && (f.link == "" || f.peer == ""):
		return errors.New("--kme needs --link, where this KME listens for the other, and --peer, where the other does")
	}
	return nil
}

// listening says where the KMEs are, and how to get a key at one end and the
// same at the other with curl.
func listening(dir string, conf kmesim.Config, a, b net.Addr, streams string) string {
	var out strings.Builder
	for i, at := range []net.Addr{a, b} {
		if at != nil {
			fmt.Fprintf(&out, "%s: https://%s\n", kmeNames[i], at)
		}
	}
	out.WriteString(streams)
	if conf.Only != "" {
		fmt.Fprintf(&out, "link: %s to %s\n", conf.Link, conf.Peer)
	}
	if conf.Admin != "" {
		fmt.Fprintf(&out, "admin: %s\n", conf.Admin)
	}
	ask := func(sae int, kme net.Addr, path string) {
		if kme == nil {
			return
		}
		file := func(name string) string { return filepath.Join(dir, name) }
		name := kmesim.SAEName(sae)
		fmt.Fprintf(&out, "  curl --cacert %s --cert %s --key %s 'https://%s/api/v1/keys/%s'\n",
			file("root.crt"), file(name+".crt"), file(name+".key"), kme, path)
	}
	first, second := kmesim.SAEName(1), kmesim.SAEName(2)
	fmt.Fprintf(&out, "\nA key for %s that it shares with %s, and the same at the other end by its ID:\n\n", first, second)
	ask(1, a, second+"/enc_keys?size=256&number=1")
	ask(2, b, first+"/dec_keys?key_ID=...")
	return out.String()
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
