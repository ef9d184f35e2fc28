package cli

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"keyturn/internal/kmesim"
)

// allKMEs is what the admin endpoint calls all KMEs that it knows.
const allKMEs = "all"

// simulators are the running simulators that a command is for.
type simulators struct{ dir, admin string }

func (s *simulators) flags(cmd *cobra.Command) {
	cmd.Flags().StringVar(&s.dir, "dir", "", "`DIR` of the certificates of the running simulator")
	cmd.Flags().StringVar(&s.admin, "admin", "", "`PATH` of its admin socket")
}

// each asks every simulator that there is, of two on one host those that can
// have the KME called kme, and returns their state together.
func (s *simulators) each(cmd *cobra.Command, kme string, ask func(*kmesim.Admin) (*kmesim.State, error)) (*kmesim.State, error) {
	paths := []string{s.admin}
	switch {
	case s.admin == "" && s.dir == "":
		return nil, usage(cmd, errors.New("--dir or --admin is missing: which simulator"))
	case s.admin == "":
		paths = []string{kmesim.AdminPath(s.dir, "")}
		for _, name := range kmeNames {
			if kme == name || kme == allKMEs {
				paths = append(paths, kmesim.AdminPath(s.dir, name))
			}
		}
		paths = slices.DeleteFunc(paths, func(path string) bool {
			_, err := os.Lstat(path)
			return err != nil
		})
	}
	var all *kmesim.State
	for _, path := range paths {
		one, err := ask(kmesim.NewAdmin(path))
		if errors.Is(err, kmesim.ErrNoSimulator) && s.admin == "" {
			continue // killed, it left its socket
		}
		if err != nil {
			return nil, err
		}
		if all == nil {
			all = one
		} else {
			all.KMEs = append(all.KMEs, one.KMEs...)
		}
	}
	if all == nil {
		return nil, withHint(fmt.Errorf("%s: no simulator runs here that has %s", s.dir, map[bool]string{true: "any KME", false: kme}[kme == allKMEs]),
			"keyturn kme --dir "+s.dir)
	}
	return all, nil
}

// parseKME returns the name of a KME that a user names a, kme-a, both or all.
func parseKME(cmd *cobra.Command, text string) (string, error) {
	switch text {
	case "a", kmesim.NameA:
		return kmesim.NameA, nil
	case "b", kmesim.NameB:
		return kmesim.NameB, nil
	case "both", allKMEs:
		return allKMEs, nil
	}
	return "", usage(cmd, fmt.Errorf("%q is none of a, b, both", text))
}

func newKmeState() *cobra.Command {
	var s simulators
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "state",
		Short: "Show running KMEs",
		Long: `Show the KMEs of a running simulator: what is wrong with them, the keys made for
masters and delivered to slaves, the requests refused, the keys that wait for
their slaves, the link between the KMEs, and the pool of each master and slave.`,
		Args: exactly(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			state, err := s.each(cmd, allKMEs, func(a *kmesim.Admin) (*kmesim.State, error) { return a.State(cmd.Context()) })
			if err != nil {
				return err
			}
			if asJSON {
				e := json.NewEncoder(cmd.OutOrStdout())
				e.SetIndent("", "  ")
				return e.Encode(state)
			}
			return writeKMEs(cmd, state)
		},
	}
	s.flags(cmd)
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

func writeKMEs(cmd *cobra.Command, s *kmesim.State) error {
	w := cmd.OutOrStdout()
	rows := [][]string{{"KME", "FAULT", "MADE", "DELIVERED", "REFUSED", "WAITING", "LINK"}}
	pools := [][]string{{"KME", "MASTER", "SLAVE", "STORED", "MADE"}}
	more := 0
	for _, k := range s.KMEs {
		rows = append(rows, []string{k.Name, k.Fault, fmt.Sprint(k.Made), fmt.Sprint(k.Delivered), fmt.Sprint(k.Refused),
			fmt.Sprintf("%d of %d", k.Waiting, k.MaxWaiting), kmeLink(k.Link)})
		for _, p := range k.Pools {
			pools = append(pools, []string{k.Name, p.Master, p.Slave, fmt.Sprintf("%d of %d", p.Stored, s.Pool), fmt.Sprint(p.Made)})
		}
		more += k.PoolCount - len(k.Pools)
	}
	if err := writeTable(w, rows); err != nil {
		return err
	}
	if _, err := fmt.Fprintf(w, "\n%s\n", rateText(s)); err != nil {
		return err
	}
	if len(pools) == 1 {
		return nil
	}
	if _, err := fmt.Fprintln(w); err != nil {
		return err
	}
	if err := writeTable(w, pools); err != nil {
		return err
	}
	if more > 0 {
		_, err := fmt.Fprintf(w, "and %s more\n", count(more, "pool"))
		return err
	}
	return nil
}

func kmeLink(l kmesim.LinkState) string {
	text := "up"
	if l.To != "" {
		text += " to " + l.To
	}
	if !l.Up {
		text = "down"
		if l.To != "" {
			text += " to " + l.To
		}
		if l.Error != "" {
			text += ": " + l.Error
		}
	}
	if !l.Since.IsZero() {
		text += fmt.Sprintf(" (since %s)", span(time.Since(l.Since)))
	}
	return text
}

func rateText(s *kmesim.State) string {
	if s.Rate == 0 {
		return "keys without limit"
	}
	return fmt.Sprintf("%s keys a second into each pool of %s", strconv.FormatFloat(s.Rate, 'f', -1, 64), count(s.Pool, "key"))
}

func newKmeFault() *cobra.Command {
	var s simulators
	cmd := &cobra.Command{
		Use:   "fault a|b|both FAULT",
		Short: "Make running KMEs fail, or heal them",
		Long: `Say what is wrong with one KME of a running simulator or with both, from now on:

  healthy             nothing
  out-of-keys[=CODE]  503, or CODE, to requests for new keys
  late[=CODE]         not found (400, or CODE) to requests by ID, as if keys had not arrived
  out-of-step         the other KME never hears of the keys that this one makes
  slow=DURATION       answers after so long
  drip[=DURATION]     answers a byte at a time, so far apart (100ms)
  wrong-bytes         other bytes under the ID
  wrong-size[=BITS]   keys of so many bits (32), whatever was asked for
  lost                uses a key up and closes the connection without an answer
  html                a proxy's error page
  page=CODE/SHAPE     an error page: html, text, empty, message, problem, nested, array,
                      string, number, null, truncated, no-keys, binary, long
  down                closes every connection
  silent              takes requests and never answers
  silent-tls          does the TLS handshake and never reads a request
  expired             a certificate that has expired
  cut                 the link to the other KME is cut: 503 to requests for new keys

Behind it there may be a time after which the KME is healthy again, and a number
of requests or connections that are hit:

  keyturn kme fault --dir lab a out-of-keys,for=2m
  keyturn kme fault --dir lab both wrong-bytes,times=1`,
		Args: exactly("a|b|both", "FAULT"),
		RunE: func(cmd *cobra.Command, args []string) error {
			kme, err := parseKME(cmd, args[0])
			if err != nil {
				return err
			}
			if _, err := kmesim.ParseFault(args[1]); err != nil {
				return usage(cmd, err)
			}
			state, err := s.each(cmd, kme, func(a *kmesim.Admin) (*kmesim.State, error) { return a.SetFault(cmd.Context(), kme, args[1]) })
			if err != nil {
				return err
			}
			for _, k := range state.KMEs {
				if _, err := fmt.Fprintf(cmd.OutOrStdout(), "%s: %s\n", k.Name, k.Fault); err != nil {
					return err
				}
			}
			return nil
		},
	}
	s.flags(cmd)
	return cmd
}

func newKmeRate() *cobra.Command {
	var s simulators
	var pool int
	cmd := &cobra.Command{
		Use:   "rate KEYS",
		Short: "Set how fast the pools of running KMEs fill",
		Long: `Set how many keys of 256 bits come into each pool every second, at both KMEs; 0
for no limit. Two KMEs on two hosts have a rate each.`,
		Args: exactly("KEYS"),
		RunE: func(cmd *cobra.Command, args []string) error {
			rate, err := strconv.ParseFloat(args[0], 64)
			if err != nil {
				return usage(cmd, fmt.Errorf("%q is not a number of keys a second", args[0]))
			}
			state, err := s.each(cmd, allKMEs, func(a *kmesim.Admin) (*kmesim.State, error) { return a.SetRate(cmd.Context(), rate, pool) })
			if err != nil {
				return err
			}
			_, err = fmt.Fprintln(cmd.OutOrStdout(), rateText(state))
			return err
		},
	}
	s.flags(cmd)
	cmd.Flags().IntVar(&pool, "pool", 0, "`KEYS` of 256 bits that a pool holds (as before)")
	return cmd
}

func newKmeDrain() *cobra.Command {
	var s simulators
	var master, slave string
	cmd := &cobra.Command{
		Use:   "drain a|b|both",
		Short: "Empty the pools of running KMEs",
		Long: `Empty the pools of one KME or of both; they fill again at their rate. Without a
rate a pool is always full.`,
		Args: exactly("a|b|both"),
		RunE: func(cmd *cobra.Command, args []string) error {
			kme, err := parseKME(cmd, args[0])
			if err != nil {
				return err
			}
			_, err = s.each(cmd, kme, func(a *kmesim.Admin) (*kmesim.State, error) { return a.Drain(cmd.Context(), kme, master, slave) })
			return err
		},
	}
	s.flags(cmd)
	cmd.Flags().StringVar(&master, "master", "", "only pools of this `SAE` as master")
	cmd.Flags().StringVar(&slave, "slave", "", "only pools of this `SAE` as slave")
	return cmd
}
