package cli

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"keyturn/internal/config"
	"keyturn/internal/control"
	"keyturn/internal/daemon"
	"keyturn/internal/kms"
	"keyturn/internal/link"
	"keyturn/internal/psk"
	"keyturn/internal/wg"
)

const (
	checkTime  = 10 * time.Second // for one KMS or peer
	checkAtOne = 16               // KMSs and peers asked at the same time
)

func newCheck(d *dirs) *cobra.Command {
	return &cobra.Command{
		Use:   "check CONFIG|INTERFACE",
		Short: "Check a configuration and all that it needs",
		Long: `Check the configuration, the WireGuard interface and its peers, the identity,
the address to listen at, each KMS (what its status says; no key is taken), and
each peer's rotator that has an address: whether it is reached and proves the
configured identity. Nothing is changed. Where the rotator of the interface
runs, its own links are looked at instead, since a second connection would
disturb them, and the identity has to be the one that it was started with.

Exit code 1: the configuration is wrong. Exit code 3: something else is.`,
		Args:              exactly("CONFIG|INTERFACE"),
		ValidArgsFunction: d.configs,
		RunE: func(cmd *cobra.Command, args []string) error {
			path, err := d.configOf(args[0])
			if err != nil {
				return err
			}
			c, err := config.Load(path)
			if err != nil {
				return err
			}
			warnIgnored(cmd.ErrOrStderr(), c)
			r := newResults(c)
			d.check(cmd.Context(), c, r)
			if err := writeTable(cmd.OutOrStdout(), r.rows()); err != nil {
				return err
			}
			return degradedIf(r.failed)
		},
	}
}

// results are the lines of a check, in an order that does not depend on which
// answer came first.
type results struct {
	mu     sync.Mutex
	lines  [][]string // WHAT, RESULT, DETAIL
	failed bool
}

func newResults(c *config.Config) *results {
	r := new(results)
	r.set(r.next("configuration"), "ok", count(len(c.Peers), "peer"))
	return r
}

// next begins a line and returns its number.
func (r *results) next(what string) int {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.lines = append(r.lines, []string{what, "", ""})
	return len(r.lines) - 1
}

func (r *results) set(line int, result, detail string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.lines[line][1], r.lines[line][2] = result, detail
}

func (r *results) fail(line int, err error) {
	r.set(line, "failed", err.Error())
	r.mu.Lock()
	defer r.mu.Unlock()
	r.failed = true
}

func (r *results) rows() [][]string {
	return append([][]string{{"CHECK", "RESULT"}}, r.lines...)
}

func (d *dirs) check(ctx context.Context, c *config.Config, r *results) {
	checkInterface(c, r)
	running, err := d.client(c.Interface).Status(ctx)
	if err != nil {
		running = nil
	}
	identity, identityErr := daemon.ReadIdentity(c)
	line := r.next("identity")
	switch {
	case identityErr != nil:
		r.fail(line, identityErr)
	case running != nil && running.Identity != identity.Fingerprint().String():
		r.fail(line, fmt.Errorf("%v; the running rotator has another until it is brought down and up", identity.Fingerprint()))
	default:
		r.set(line, "ok", identity.Fingerprint().String())
	}
	checkListen(ctx, c, running, r)
	if c.Journal != nil {
		line := r.next("journal")
		if err := daemon.CheckJournalKey(c); err != nil {
			r.fail(line, err)
		} else {
			r.set(line, "ok", c.Journal.Path)
		}
	}

	slots := make(chan struct{}, checkAtOne)
	var wg sync.WaitGroup
	defer wg.Wait()
	start := func(what string, ask func(context.Context) (string, error)) {
		line := r.next(what)
		wg.Go(func() {
			slots <- struct{}{}
			defer func() { <-slots }()
			ctx, cancel := context.WithTimeout(ctx, checkTime)
			defer cancel()
			detail, err := ask(ctx)
			if err != nil {
				r.fail(line, err)
				return
			}
			r.set(line, "ok", detail)
		})
	}
	for _, p := range c.Peers {
		if p.KMS == nil {
			continue
		}
		for _, uri := range p.KMS.URIs {
			what := "kms for " + p.Name
			if len(p.KMS.URIs) > 1 {
				what += " at " + uri
			}
			start(what, func(ctx context.Context) (string, error) { return checkKMS(ctx, p, uri) })
		}
	}
	for _, p := range c.Peers {
		switch {
		case running != nil:
			line := r.next("peer " + p.Name)
			if detail, err := linkOf(running, p); err != nil {
				r.fail(line, err)
			} else {
				r.set(line, "ok", detail)
			}
		case identityErr != nil:
			r.set(r.next("peer "+p.Name), "skipped", "needs the identity")
		case p.Address == "":
			r.set(r.next("peer "+p.Name), "skipped", "has no address: it has to dial")
		default:
			start("peer "+p.Name, func(ctx context.Context) (string, error) { return checkPeer(ctx, identity, p) })
		}
	}
}

// checkInterface compares WireGuard with the configuration, one line for each
// problem.
func checkInterface(c *config.Config, r *results) {
	what := "interface " + c.Interface
	device, err := daemon.OpenDevice(c)
	if err == nil {
		defer device.Close()
	}
	problems, ok := errors.AsType[config.Problems](err)
	switch {
	case err == nil:
		r.set(r.next(what), "ok", "")
	case !ok:
		r.fail(r.next(what), err)
	}
	for _, p := range problems {
		at := ""
		if p.Line > 0 {
			at = fmt.Sprintf(" (line %d)", p.Line)
		}
		r.fail(r.next(what), errors.New(p.Message+at))
	}
}

// checkListen tries the address that peers connect to, unless the running
// rotator has it.
func checkListen(ctx context.Context, c *config.Config, running *control.Status, r *results) {
	line := r.next("listen " + c.Listen)
	ln, err := daemon.Listen(ctx, c.Listen)
	switch {
	case err == nil:
		_ = ln.Close()
		r.set(line, "ok", "")
	case running != nil && errors.Is(err, syscall.EADDRINUSE):
		// Its own address may be another form of the one configured.
		r.set(line, "ok", "in use; the running rotator listens at "+running.Listen)
	default:
		r.fail(line, err)
	}
}

// checkKMS asks a KMS at one of its addresses.
func checkKMS(ctx context.Context, p *config.Peer, uri string) (string, error) {
	one := *p.KMS
	one.URIs = []string{uri}
	system, err := daemon.OpenKMS(&one)
	if err != nil {
		return "", err
	}
	defer system.Close()
	source, err := system.For(p.SAE)
	if err != nil {
		return "", err
	}
	defer source.Close()
	status, err := source.Status(ctx)
	if err != nil {
		return "", err
	}
	return describeKMS(p, uri, &status)
}

// describeKMS says what a KMS says of itself, as far as it says anything: many
// leave counts at zero whatever they have. What keeps it from serving the peer
// is an error.
func describeKMS(p *config.Peer, uri string, s *kms.Status) (string, error) {
	const bits = 8 * psk.Size
	known := s.MasterSAE
	if p.KMS.Interface == config.SKIP {
		known = s.SourceKME // the key provider's own system ID is ours
	}
	switch {
	case *s == kms.Status{} && p.KMS.Interface == config.ETSI014:
		return "", errors.New("its status has nothing of what the standard puts there")
	case known != "" && !strings.Contains(known, p.KMS.SAE): // some have another form of the same ID
		return "", fmt.Errorf("knows this end as %q; the configuration says %q", known, p.KMS.SAE)
	case s.MaxKeySize > 0 && s.MaxKeySize < bits:
		return "", fmt.Errorf("has keys of at most %d bits, not %d", s.MaxKeySize, bits)
	case s.MinKeySize > bits:
		return "", fmt.Errorf("has keys of at least %d bits, not %d", s.MinKeySize, bits)
	}
	parts := []string{uri}
	add := func(when bool, format string, args ...any) {
		if when {
			parts = append(parts, fmt.Sprintf(format, args...))
		}
	}
	add(s.SourceKME != "" && s.TargetKME != "", "%s to %s", s.SourceKME, s.TargetKME)
	add(s.MasterSAE != "" && s.MasterSAE != p.KMS.SAE, "knows this end as %s", s.MasterSAE)
	add(s.SlaveSAE != "" && s.SlaveSAE != p.SAE, "the peer as %s", s.SlaveSAE)
	add(s.PeerAbsent, "the peer's application has not connected yet")
	add(s.MaxKeySize > 0, "keys of %d to %d bits", s.MinKeySize, s.MaxKeySize)
	add(s.StoredKeys > 0 && s.MaxKeys == 0, "%d keys stored", s.StoredKeys)
	add(s.MaxKeys > 0, "%d of %d keys stored", s.StoredKeys, s.MaxKeys)
	add(s.MaxKeysPerRequest > 1, "%d keys a request", s.MaxKeysPerRequest)
	return strings.Join(parts, ", "), nil
}

func checkPeer(ctx context.Context, self *link.Identity, p *config.Peer) (string, error) {
	var pins link.Pins
	for _, id := range p.Identities {
		pins = append(pins, id)
	}
	conn, err := link.Dial(ctx, p.Address, self, pins)
	if err != nil {
		return "", err
	}
	defer conn.Close()
	return fmt.Sprintf("%s, identity proved", conn.RemoteAddr()), nil
}

// linkOf is what a running rotator says of its link to a peer.
func linkOf(s *control.Status, p *config.Peer) (string, error) {
	for _, peer := range s.Peers {
		if peer.PublicKey != wg.PublicKey(p.PublicKey).String() {
			continue
		}
		if len(peer.Differences) > 0 {
			d := peer.Differences[0]
			return "", fmt.Errorf("the ends are configured differently: %s is %s here, %s there; %s", d.Field, orNone(d.Ours), orNone(d.Theirs), count(len(peer.Differences), "difference"))
		}
		if peer.Link.State != control.LinkUp {
			return "", fmt.Errorf("the running rotator's link is %s", linkText(&peer.Link, time.Now()))
		}
		return "the running rotator's link is " + linkText(&peer.Link, time.Now()), nil
	}
	return "", errors.New("the running rotator has no such peer: it was started with another configuration")
}
