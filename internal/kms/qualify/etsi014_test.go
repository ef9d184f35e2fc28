package qualify

import (
	"context"
	"crypto/tls"
	"flag"
	"fmt"
	"net"
	"net/http"
	"os"
	"regexp"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"keyturn/internal/kmesim"
	"keyturn/internal/kms/kmstls"
	"keyturn/internal/memnet"
)

var rewrite = flag.Bool("rewrite", false, "write the reports of testdata anew")

// network is a pair of simulated KMEs, kme-a and kme-b, and what two SAEs at
// them need.
type network struct {
	memnet.Network
	t    *testing.T
	lab  *kmesim.Lab
	pair *kmesim.Pair
}

// theLab is made once, and in a bubble, for every test is in the year 2000.
var theLab = sync.OnceValues(func() (*kmesim.Lab, error) { return kmesim.NewLab(kmesim.LabOptions{}) })

func newNetwork(t *testing.T) *network {
	t.Helper()
	if time.Now().Year() != 2000 {
		t.Fatal("not in a bubble")
	}
	lab, err := theLab()
	if err != nil {
		t.Fatal(err)
	}
	return &network{t: t, lab: lab, pair: kmesim.New(kmesim.Options{})}
}

// serve lets both KMEs answer until the test ends, each as f says.
func (n *network) serve(f func(*kmesim.KME) func(context.Context, net.Listener, *tls.Config) error) {
	n.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	var serving sync.WaitGroup
	for i, k := range []*kmesim.KME{n.pair.A, n.pair.B} {
		ln, err := n.Listen([]string{"kme-a:443", "kme-b:443"}[i])
		if err != nil {
			n.t.Fatal(err)
		}
		serving.Go(func() {
			if err := f(k)(ctx, ln, n.lab.ServerTLS(i)); err != nil {
				n.t.Error(err)
			}
		})
	}
	n.t.Cleanup(func() { cancel(); serving.Wait() })
}

// fail sets what is wrong with each KME.
func (n *network) fail(a, b string) {
	n.t.Helper()
	for kme, text := range map[*kmesim.KME]string{n.pair.A: a, n.pair.B: b} {
		f, err := kmesim.ParseFault(text)
		if err != nil {
			n.t.Fatal(err)
		}
		kme.SetFault(f)
	}
}

// The simulator has SKIP at the same ports.
func etsi014Server(k *kmesim.KME) func(context.Context, net.Listener, *tls.Config) error {
	return k.Serve
}

// end is one of the two ends: 0 or 1.
func (n *network) end(i int) End {
	return End{
		SAE: kmesim.SAEName(i + 1), URI: []string{"https://kme-a", "https://kme-b"}[i],
		TLS: kmstls.Config{Memory: n.lab.ClientTLS(i + 1)}, Dial: n.Dial,
	}
}

func (n *network) config() Config {
	there := n.end(1)
	return Config{Here: n.end(0), There: &there, Peer: there.SAE}
}

// table writes a report as a page, without what differs from run to run.
func table(r *Report) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s, %d keys taken\n\n", r.Specification, r.KeysTaken)
	for _, l := range r.Lines {
		needed := " "
		if l.Needed {
			needed = "*"
		}
		line := fmt.Sprintf("%-13s%-8s%s %-63s %-14s %s", l.Clause, l.At, needed, l.What, l.Verdict, l.Detail)
		b.WriteString(strings.TrimRight(line, " ") + "\n")
	}
	return regexp.MustCompile(`[A-Za-z0-9+/]{43}=`).ReplaceAllString(b.String(), "(pin)")
}

func golden(t *testing.T, path string, r *Report) {
	t.Helper()
	got := table(r)
	if *rewrite {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("%s (-want +got):\n%s", path, diff)
	}
}

// wrong names the lines of a report that are wrong: "SAE: rule", with a star
// where keyturn needs it.
func wrong(r *Report) []string {
	var out []string
	for _, l := range r.Lines {
		if l.Verdict == Wrong {
			name := l.At + ": " + l.What
			if l.Needed {
				name += " *"
			}
			out = append(out, name)
		}
	}
	return out
}

// TestETSI014 is about what a KME does right that is as the standard has it.
func TestETSI014(t *testing.T) {
	for name, edit := range map[string]func(*Config){
		"two-ends": func(*Config) {},
		"post":     func(c *Config) { c.Here.Method, c.There.Method = http.MethodPost, http.MethodPost },
		"one-end":  func(c *Config) { c.There = nil },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				n := newNetwork(t)
				n.serve(etsi014Server)
				c := n.config()
				edit(&c)
				r, err := ETSI014(t.Context(), c)
				if err != nil {
					t.Fatal(err)
				}
				golden(t, "testdata/etsi014-"+name+".txt", r)
			})
		})
	}
}

// TestETSI014Faults: for everything that a KME can get wrong there is a line
// that says so, and no other line does.
func TestETSI014Faults(t *testing.T) {
	var (
		get  = "sae_001: GET a key of 256 bits *"
		post = "sae_001: POST for a key of 256 bits"
		many = "sae_001: several keys at a time"
		back = "sae_002: the same key the other way round *"
		byID = []string{
			"sae_002: the same key by GET and its ID *", "sae_002: the same key by POST and its ID",
			"sae_002: several keys by their IDs",
		}
	)
	for _, tt := range []struct {
		a, b string
		want []string
	}{
		{"healthy", "healthy", nil},
		{"out-of-keys", "healthy", []string{get, post, many}},
		{"healthy", "out-of-keys", []string{back}},
		{"healthy", "late", byID},
		{"out-of-step", "healthy", byID},
		{"slow=1s", "slow=2s", nil},
		{"slow=6s", "healthy", []string{"sae_001: GET status", get}},
		{"healthy", "wrong-bytes", byID},
		{"wrong-bytes", "healthy", []string{"sae_001: the same key the other way round *"}},
		{"wrong-size", "healthy", []string{get, post, many, "sae_001: the same key the other way round *"}},
		{"lost", "healthy", []string{get, post}},
		{"healthy", "lost", byID[:2]},
		{"html", "healthy", []string{
			"sae_001: GET status", get, post, many, "sae_001: a size that is no multiple of 8 is refused",
			"sae_001: an unknown extension_mandatory is refused", "sae_001: a malformed body is refused",
			"sae_001: another method than GET and POST is refused", "sae_001: the same key the other way round *",
		}},
		{"down", "healthy", []string{"sae_001: TLS 1.2 or later *"}},
		{"healthy", "down", []string{"sae_002: TLS 1.2 or later *"}},
		{"silent", "healthy", []string{"sae_001: GET status", get}},
		{"healthy", "silent", []string{"sae_002: GET status", byID[0]}},
		{"silent-tls", "healthy", []string{"sae_001: GET status", get}},
		{"drip=1ms", "healthy", nil},
	} {
		t.Run(tt.a+" "+tt.b, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				n := newNetwork(t)
				n.fail(tt.a, tt.b)
				n.serve(etsi014Server)
				began := time.Now()
				r, err := ETSI014(t.Context(), n.config())
				if err != nil {
					t.Fatal(err)
				}
				if diff := cmp.Diff(tt.want, wrong(r)); diff != "" {
					t.Errorf("wrong lines (-want +got):\n%s\n%s", diff, table(r))
				}
				if took := time.Since(began); took > 5*time.Minute {
					t.Errorf("took %v", took)
				}
			})
		})
	}
}
