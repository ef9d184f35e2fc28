package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"keyturn/internal/control"
)

// watchInterval is how often status --watch looks again.
const watchInterval = time.Second

func newStatus(d *dirs) *cobra.Command {
	var asJSON, watch bool
	cmd := &cobra.Command{
		Use:   "status [INTERFACE]",
		Short: "Show what rotators and their peers are doing",
		Long: `Show the rotator of INTERFACE, or all of this host, with a block for each peer.

A tunnel is protected when it is under a key that both ends have confirmed by a
handshake and that is younger than max_key_age, or under its verified successor.
Where it is not, the line says why. Keys are named by serial and fingerprint;
both ends show the same ones. No key material is ever shown.

--json prints one object for INTERFACE, or an array of all: names and meanings
stay; fields may be added. With --watch it prints one line of JSON each second.

Exit code 3: a tunnel is not protected, something needs attention, or the
rotator does not run.`,
		Args:              exactly("[INTERFACE]"),
		ValidArgsFunction: d.interfaces,
		RunE: func(cmd *cobra.Command, args []string) error {
			out := cmd.OutOrStdout()
			show := func(ctx context.Context) error {
				all, err := d.lookAtArgs(ctx, args)
				if err != nil {
					return err
				}
				if len(all) == 0 && !asJSON {
					return noRotators(cmd)
				}
				var b bytes.Buffer
				if asJSON {
					err = encodeStatus(&b, all, len(args) == 1, watch)
				} else {
					err = writeStatus(&b, all, time.Now(), styleOf(out))
				}
				if err != nil {
					return err
				}
				if watch && !asJSON && isTerminal(out) {
					_, _ = io.WriteString(out, "\x1b[H\x1b[2J")
				}
				if _, err := out.Write(b.Bytes()); err != nil {
					return err
				}
				return degradedIf(slices.ContainsFunc(all, func(s *control.Status) bool { return degraded(s) || !running(s) }))
			}
			if !watch {
				return show(cmd.Context())
			}
			return repeat(cmd.Context(), show)
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	cmd.Flags().BoolVar(&watch, "watch", false, "look again each second, until interrupted")
	return cmd
}

func (d *dirs) lookAtArgs(ctx context.Context, args []string) ([]*control.Status, error) {
	if len(args) == 0 {
		return d.lookAll(ctx)
	}
	s, err := d.look(ctx, args[0])
	if err != nil {
		return nil, err
	}
	return []*control.Status{s}, nil
}

// repeat shows again and again until ctx ends, which is how a watch ends well.
func repeat(ctx context.Context, show func(context.Context) error) error {
	tick := time.NewTicker(watchInterval)
	defer tick.Stop()
	for {
		if err := show(ctx); err != nil && !errors.Is(err, errDegraded) && ctx.Err() == nil {
			return err
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

func encodeStatus(w io.Writer, all []*control.Status, one, compact bool) error {
	statuses := make([]control.Status, len(all))
	for i, s := range all {
		statuses[i] = *s
	}
	var v any = statuses
	if one {
		v = statuses[0]
	}
	e := json.NewEncoder(w)
	if !compact {
		e.SetIndent("", "  ")
	}
	return e.Encode(v)
}

// report lines are "  name: value"; a block of them is an interface or a peer.
type blocks struct {
	strings.Builder
	style
}

func (b *blocks) head(kind, name, after string) {
	if b.Len() > 0 {
		b.WriteString("\n")
	}
	fmt.Fprintf(b, "%s: %s%s\n", b.bold(kind), b.bold(printable(name)), after)
}

func (b *blocks) line(name, value string) {
	fmt.Fprintf(b, "  %s: %s\n", b.bold(name), value)
}

// text is a line with a value that came from elsewhere; none, no line.
func (b *blocks) text(name, value string) {
	if value != "" {
		b.line(name, printable(value))
	}
}

func (b *blocks) warnings(ws []control.Warning) {
	for _, w := range ws {
		switch text := printable(w.Text); w.Severity {
		case control.SeverityInfo:
			b.line("note", text)
		case control.SeverityError:
			b.line(b.red("warning"), text)
		default:
			b.line(b.yellow("warning"), text)
		}
	}
}

func writeStatus(w io.Writer, all []*control.Status, now time.Time, s style) error {
	b := &blocks{style: s}
	for _, r := range all {
		b.rotator(r, now)
	}
	_, err := io.WriteString(w, b.String())
	return err
}

func (b *blocks) rotator(s *control.Status, now time.Time) {
	b.head("interface", s.Interface, "")
	switch {
	case s.Problem != "":
		b.line("state", b.red(string(s.State))+": "+printable(s.Problem))
	case s.State == control.StateUp:
		b.line("state", b.green(string(s.State)))
	default:
		b.line("state", b.yellow(string(s.State)))
	}
	b.text("configuration", s.ConfigPath)
	if !running(s) {
		return
	}
	b.line("process", fmt.Sprintf("%d, started %s", s.PID, ago(now.Sub(s.StartedAt))))
	b.text("public key", s.PublicKey)
	b.text("identity", s.Identity)
	b.text("listening on", s.Listen)
	b.warnings(s.Warnings)
	for i := range s.Peers {
		b.peer(&s.Peers[i], now)
	}
}

func (b *blocks) peer(p *control.PeerStatus, now time.Time) {
	b.head("peer", p.Name, " ("+printable(p.Role)+" here)")
	if p.Protected {
		b.line("protected", b.green("yes"))
	} else {
		b.line("protected", b.red("no")+": "+printable(p.Why))
	}
	b.text("state", string(p.State))
	b.text("public key", p.PublicKey)
	if p.SAE != "" {
		b.text("sae", p.SAE+" here, "+p.PeerSAE+" there")
	}
	if p.HandshakeAge == nil {
		b.line("latest handshake", "none observed")
	} else {
		b.line("latest handshake", ago(time.Duration(*p.HandshakeAge)))
	}
	b.text("installed key", keyText(p.Installed, p.KeyAge))
	b.text("confirmed key", keyText(p.Confirmed, nil))
	if p.Rotations > 0 {
		b.line("rotations", fmt.Sprintf("%d, the last %s", p.Rotations, ago(now.Sub(p.LastRotation))))
	} else {
		b.line("rotations", "none yet")
	}
	b.line("key buffer", fmt.Sprintf("%d of %d", p.Buffer.Len, p.Buffer.Cap))
	b.text("link", linkText(&p.Link, now))
	b.text("kms", kmsText(p.KMS, now))
	for _, d := range p.Differences {
		b.text("differs", fmt.Sprintf("%s: %s here, %s there", d.Field, orNone(d.Ours), orNone(d.Theirs)))
	}
	b.warnings(p.Warnings)
}

func orNone(s string) string {
	if s == "" {
		return "none"
	}
	return s
}

func keyText(k *control.Key, age *control.Seconds) string {
	if k == nil {
		return "none"
	}
	text := fmt.Sprintf("%d (%s)", k.Serial, k.Fingerprint)
	switch {
	case k.Recovery:
		text = k.Fingerprint + ", the recovery key"
	case k.Serial == 0:
		text = k.Fingerprint + ", found at the start"
	}
	if age != nil {
		text += ", " + span(time.Duration(*age)) + " old"
	}
	if len(k.Sources) > 0 {
		text += ", of " + strings.Join(k.Sources, " and ")
	}
	return text
}

func linkText(l *control.Link, now time.Time) string {
	text := string(l.State)
	if !l.Since.IsZero() {
		text += " for " + span(now.Sub(l.Since))
	}
	if l.RemoteAddr != "" {
		text += ", " + l.RemoteAddr
	}
	if l.Inside {
		text += ", inside the tunnel"
	}
	if l.Error != "" {
		text += ": " + l.Error
	}
	return text
}

func kmsText(k *control.KMS, now time.Time) string {
	if k == nil {
		return ""
	}
	text := string(k.State)
	if k.URI != "" {
		text += ", " + k.URI
	}
	if k.Keys != nil {
		text += ", " + count(*k.Keys, "key") + " stored"
	}
	if !k.LastKeyAt.IsZero() {
		text += ", last key " + ago(now.Sub(k.LastKeyAt))
	}
	if k.LastError != "" {
		text += ": " + k.LastError
	}
	return text
}
