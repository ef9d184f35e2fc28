package cli

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"keyturn/internal/config"
	"keyturn/internal/daemon"
	"keyturn/internal/kms/qualify"
)

func newKms() *cobra.Command {
	cmd := &cobra.Command{
		Use:                        "kms",
		Short:                      "Qualify a key management system",
		Long:                       "Find out whether a key management system (KMS) does what keyturn needs of it.",
		Args:                       cobra.ArbitraryArgs,
		SuggestionsMinimumDistance: 2,
		RunE:                       needCommand,
	}
	cmd.AddCommand(newKmsTest())
	return cmd
}

func newKmsTest() *cobra.Command {
	var peer string
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "test CONFIG [OTHER-END'S-CONFIG]",
		Short: "Find out what a KMS does right, clause by clause",
		Long: `Ask a key management system (KMS) everything that the specification of its
interface has a rule for, and print what it does right, wrong, or not at all,
with the time that each call took. Wrong requests are part of it: best done
before the KMS serves anybody, and never at the cost of a rotator's requests.

CONFIG is a rotator's configuration, of which only the kms block and the peer's
sae have to be there. With the other end's configuration as well, all rules are
tested: that both ends get the same key, once, and nobody else. Without it, what
can be seen from one end. The first URI of each kms block is tested.

It takes some keys, as few as it can, which are used up: it says how many. No
key is shown, also not with --json.

An asterisk marks what keyturn needs: what it, or what it promises, rests on.
Exit code: 1 if any of these is wrong, or if the test could not be made; else 0,
whatever else is wrong.`,
		Args: exactly("CONFIG", "[OTHER-END'S-CONFIG]"),
		RunE: func(cmd *cobra.Command, args []string) error {
			var ends [2]*config.Config
			for i, path := range args {
				c, err := config.LoadKMS(path)
				if err != nil {
					return err
				}
				ends[i] = c
			}
			here, there, err := pick(ends[0], ends[1], peer)
			if err != nil {
				return err
			}
			r, err := qualified(cmd.Context(), here, there)
			if err != nil {
				return err
			}
			if asJSON {
				e := json.NewEncoder(cmd.OutOrStdout())
				e.SetIndent("", "  ")
				err = e.Encode(qualification{r, r.Count(qualify.Wrong, true) == 0})
			} else {
				err = writeQualification(cmd, r)
			}
			if err != nil {
				return err
			}
			if n := r.Count(qualify.Wrong, true); n > 0 {
				return fmt.Errorf("%s that keyturn needs %s wrong", count(n, "thing"), map[bool]string{true: "is", false: "are"}[n == 1])
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&peer, "peer", "", "`NAME` of the peer in CONFIG, where it has several with a KMS")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print one JSON object")
	return cmd
}

// kmsEnd is one end of a QKD network as a configuration has it.
type kmsEnd struct {
	kms  *config.KMS
	name string // of the peer; may be empty
	peer string // its SAE ID; may be empty
}

func kmsEnds(c *config.Config) (all []kmsEnd) {
	for _, p := range c.Peers {
		all = append(all, kmsEnd{p.KMS, p.Name, p.SAE})
	}
	if all == nil {
		all = []kmsEnd{{kms: c.KMS}}
	}
	return all
}

// pick finds the one pair of ends that fit each other, or the one end where
// there is no other configuration.
func pick(here, there *config.Config, name string) (a kmsEnd, b *kmsEnd, err error) {
	type pair struct{ a, b *config.KMS }
	seen := map[pair]bool{}
	var names []string
	add := func(x kmsEnd, y *kmsEnd) {
		p := pair{a: x.kms}
		if y != nil {
			p.b = y.kms
			x.peer = y.kms.SAE
		}
		if !seen[p] || y == nil {
			names = append(names, cmp.Or(x.name, x.peer))
			a, b = x, y
		}
		seen[p] = true
	}
	for _, x := range kmsEnds(here) {
		switch {
		case name != "" && cmp.Or(x.name, x.peer) != name:
		case there != nil:
			for _, y := range kmsEnds(there) {
				if (x.peer == "" || x.peer == y.kms.SAE) && (y.peer == "" || y.peer == x.kms.SAE) {
					add(x, &y)
				}
			}
		case x.peer != "":
			add(x, nil)
		}
	}
	switch {
	case len(names) == 0 && name != "":
		return a, b, usageError{fmt.Errorf("no peer %q with a kms and an sae", name)}
	case len(names) == 0 && there != nil:
		return a, b, usageError{errors.New("the configurations are not of two ends: the sae of neither's kms is that of a peer of the other")}
	case len(names) == 0:
		return a, b, withHint(usageError{errors.New("no peer has an sae")},
			"add it to the configuration: peers: [{sae: ID}]", "or give the other end's configuration as well")
	case len(names) > 1:
		return a, b, withHint(usageError{fmt.Errorf("%d peers have a KMS: %s", len(names), strings.Join(names, ", "))}, "--peer "+names[0])
	case b != nil && (a.kms.Interface != b.kms.Interface || a.kms.Dialect != b.kms.Dialect):
		return a, b, usageError{errors.New("the two ends speak different interfaces or dialects")}
	}
	return a, b, nil
}

// qualified asks the KMSs.
func qualified(ctx context.Context, here kmsEnd, there *kmsEnd) (*qualify.Report, error) {
	c := qualify.Config{Here: endOf(here.kms), Peer: here.peer}
	if there != nil {
		e := endOf(there.kms)
		c.There = &e
	}
	switch i := here.kms.Interface; i {
	case config.ETSI014:
		return qualify.ETSI014(ctx, c)
	case config.ETSI004:
		return qualify.ETSI004(ctx, c)
	case config.SKIP:
		return qualify.SKIP(ctx, c)
	default:
		return nil, fmt.Errorf("interface %s cannot be tested by this version", i)
	}
}

func endOf(k *config.KMS) qualify.End {
	return qualify.End{
		SAE: k.SAE, URI: k.URIs[0], TLS: daemon.TLSOf(k), Timeout: k.Timeout,
		Method: string(k.Method), Dialect: string(k.Dialect),
	}
}

// qualification is the output of kms test --json.
type qualification struct {
	*qualify.Report
	// OK: nothing that keyturn needs is wrong.
	OK bool `json:"ok"`
}

func writeQualification(cmd *cobra.Command, r *qualify.Report) error {
	rows := [][]string{{"CLAUSE", "AT", "", "RULE", "VERDICT", "TIME", "DETAIL"}}
	for _, l := range r.Lines {
		needed := ""
		if l.Needed {
			needed = "*"
		}
		rows = append(rows, []string{l.Clause, l.At, needed, l.What, l.Verdict.String(), took(l.Seconds), l.Detail})
	}
	w := cmd.OutOrStdout()
	if _, err := fmt.Fprintf(w, "%s\n\n", r.Specification); err != nil {
		return err
	}
	if err := writeTable(w, rows); err != nil {
		return err
	}
	result := "nothing that keyturn needs (*) is wrong"
	if n := r.Count(qualify.Wrong, true); n > 0 {
		result = fmt.Sprintf("%d of what keyturn needs (*): exit code 1", n)
	} else if n := r.Count(qualify.NotTested, true); n > 0 {
		result += fmt.Sprintf(", but %d of it not tested", n)
	}
	_, err := fmt.Fprintf(w, "\n%d right, %d not supported, %d not tested; %s used up\n%d wrong; %s\n",
		r.Count(qualify.Right, false), r.Count(qualify.NotSupported, false), r.Count(qualify.NotTested, false),
		count(r.KeysTaken, "key"), r.Count(qualify.Wrong, false), result)
	return err
}

// took says how long a call took; nothing where there was none.
func took(seconds float64) string {
	switch d := time.Duration(seconds * float64(time.Second)); {
	case d == 0:
		return ""
	case d < time.Second:
		return fmt.Sprintf("%.1f ms", seconds*1000)
	default:
		return fmt.Sprintf("%.1f s", seconds)
	}
}
