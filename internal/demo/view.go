package demo

import (
	"context"
	"fmt"
	"io"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"keyturn/internal/control"
)

// Escape sequences of ECMA-48 that every terminal in use knows.
const (
	home      = "\x1b[H"
	toEnd     = "\x1b[J"
	lineEnd   = "\x1b[K"
	alternate = "\x1b[?1049h\x1b[?25l" // a screen of its own, no cursor
	restore   = "\x1b[?25h\x1b[?1049l"
	bold      = "\x1b[1m"
	dim       = "\x1b[2m"
	green     = "\x1b[32m"
	yellow    = "\x1b[33m"
	red       = "\x1b[31m"
	plain     = "\x1b[0m"

	frame = 200 * time.Millisecond
)

// enter draws the view on a screen of its own until ctx ends, or the returned
// function is called, which gives the terminal back.
func (s *show) enter(ctx context.Context) (leave func()) {
	_, _ = io.WriteString(s.Out, alternate)
	ctx, stop := context.WithCancel(ctx)
	var g errgroup.Group
	g.Go(func() error { return s.draw(ctx) })
	return sync.OnceFunc(func() {
		stop()
		_ = g.Wait() // a terminal that cannot be written to shows nothing anyway
		_, _ = io.WriteString(s.Out, restore)
	})
}

// draw redraws the view until ctx ends.
func (s *show) draw(ctx context.Context) error {
	tick := time.NewTicker(frame)
	defer tick.Stop()
	for {
		if _, err := io.WriteString(s.Out, s.render()); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// The stages of the cycle that one sees again and again.
var stages = []string{"establish", "wait for a handshake", "commit at both ends", "confirmed by the next handshake"}

// render returns one frame.
func (s *show) render() string {
	columns, rows := 80, 24
	if s.Size != nil {
		columns, rows = s.Size()
	}
	a, b := s.lab.rotators[0].Status().Peers[0], s.lab.rotators[1].Status().Peers[0]
	m := s.summary(false)
	half := max(columns/2-2, 30)

	lines := []string{
		bold + "keyturn demo" + plain + dim + fmt.Sprintf("   %s   two hosts in one process; Ctrl-C ends", clock(time.Since(s.started))) + plain,
		"",
		pad(bold+names[0]+plain+dim+" (client)", half) + plain + bold + names[1] + plain + dim + " (server)" + plain,
	}
	left, right := host(a), host(b)
	for i := range left {
		lines = append(lines, pad(left[i], half)+plain+right[i]+plain)
	}
	lines = append(lines, "",
		tunnel(a, m, min(columns, 2*half)), "",
		fmt.Sprintf("  %s%d%s rotations   %s%d%s confirmed   %d keys established", bold, m.Rotations, plain, bold, m.Confirmed, plain, m.Keys),
		"  "+cycle(a), "")
	s.mu.Lock()
	for _, e := range s.events {
		lines = append(lines, dim+fmt.Sprintf("%6.1fs  ", e.at.Seconds())+plain+cut(describe(e), columns-9))
	}
	if s.ending {
		lines = append(lines, yellow+"  ending: waiting until both ends have settled"+plain)
	}
	s.mu.Unlock()
	lines = lines[:min(len(lines), rows-1)]
	return home + strings.Join(lines, lineEnd+"\n") + lineEnd + toEnd
}

// host is what one end shows, always the same number of lines.
func host(p control.PeerStatus) []string {
	key, made := dim+"none"+plain, ""
	if k := p.Installed; k != nil {
		state := yellow + "waits for a handshake"
		switch {
		case k.Serial == 0:
			key = dim + "the one found at the start" + plain
			state = ""
		case p.Confirmed != nil && p.Confirmed.Serial == k.Serial:
			state = green + "confirmed"
		}
		if k.Serial != 0 {
			key = fmt.Sprintf("#%d %s%s%s %s", k.Serial, bold, k.Fingerprint, plain, state)
			made = strings.Join(k.Sources, " + ")
			if p.KeyAge != nil {
				made += fmt.Sprintf(", %.0f s old", time.Duration(*p.KeyAge).Seconds())
			}
		}
	}
	link := red + "down"
	if p.Link.State == control.LinkUp {
		link = green + "up"
	}
	return []string{
		"  PSK     " + key,
		"  made of " + made,
		"  buffer  " + strings.Repeat("■", p.Buffer.Len) + dim + strings.Repeat("□", max(p.Buffer.Cap-p.Buffer.Len, 0)),
		"  link    " + link,
	}
}

// tunnel is the line between the hosts.
func tunnel(p control.PeerStatus, m Summary, columns int) string {
	age := "no handshake yet"
	if p.HandshakeAge != nil {
		age = fmt.Sprintf("handshake %.0f s ago", time.Duration(*p.HandshakeAge).Seconds())
	}
	colour := green
	if m.PingsLost > 0 || m.FailedHandshakes > 0 {
		colour = red
	}
	text := fmt.Sprintf(" WireGuard: %s, %d pings, %d lost, %d failed handshakes ", age, m.PingsSent, m.PingsLost, m.FailedHandshakes)
	fill := max(columns-len(text)-len(names[0])-len(names[1])-6, 2)
	return "  " + names[0] + " " + colour + strings.Repeat("═", fill/2) + plain + text + colour + strings.Repeat("═", fill-fill/2) + plain + " " + names[1]
}

// cycle marks the stage that the client is in.
func cycle(p control.PeerStatus) string {
	at := 0
	switch {
	case p.Installed != nil && p.Installed.Serial != 0 && (p.Confirmed == nil || p.Confirmed.Serial != p.Installed.Serial):
		at = 3
	case p.Installed != nil && p.Installed.Serial != 0:
		at = 2
	case p.Buffer.Len > 0:
		at = 1
	}
	parts := make([]string, len(stages))
	for i, stage := range stages {
		if i == at {
			parts[i] = green + stage + plain
		} else {
			parts[i] = dim + stage + plain
		}
	}
	return strings.Join(parts, dim+" > "+plain)
}

func clock(d time.Duration) string {
	return fmt.Sprintf("%02d:%02d", int(d.Minutes()), int(d.Seconds())%60)
}

// pad fills a text to a width of visible characters.
func pad(s string, width int) string { return s + strings.Repeat(" ", max(width-visible(s), 0)) }

// visible counts the characters of a text that are not part of escapes.
func visible(s string) (n int) {
	escape := false
	for _, r := range s {
		switch {
		case r == '\x1b':
			escape = true
		case escape:
			escape = r != 'm'
		default:
			n++
		}
	}
	return n
}

func cut(s string, width int) string {
	if r := []rune(s); len(r) > width {
		return string(r[:max(width-1, 0)]) + "…"
	}
	return s
}
