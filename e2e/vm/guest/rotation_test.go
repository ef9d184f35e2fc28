//go:build vm

package guest

import (
	"testing"
	"time"

	"keyturn/internal/control"
)

// TestRotation is the journey: two rotators that were brought up rotate at each
// handshake that WireGuard makes of itself, from both sources, and the tunnel
// notices nothing.
func TestRotation(t *testing.T) {
	const (
		long = 20 * time.Minute
		// The first key was confirmed before; after that one with each session.
		most = int(long / rekeyAfter)
	)
	for _, inside := range []bool{false, true} {
		where := map[bool]string{false: "beside", true: "inside"}[inside]
		t.Run(where, func(t *testing.T) {
			l := newLab(t)
			l.configure(inside, func(h *host) (rotator, peer settings) {
				rotator, peer = withKMS(h)
				return rotator, peer.with(settings{"fallback": "initial"})
			})
			both := l.pingBoth()
			time.Sleep(2 * time.Second)
			for _, h := range []*host{l.a, l.b} {
				h.keyturn("up", h.path("wg0.yaml"))
				t.Cleanup(func() { h.keyturn("down", wg0) })
			}
			first := l.eventually(5*time.Second, "a first key", l.rotated)
			time.Sleep(long)
			if err := l.inStep(); err != nil {
				t.Error(err)
			}
			r := both.stop()
			if r.lost() > 0 {
				t.Error(r)
			}
			for _, h := range []*host{l.a, l.b} {
				p, err := h.towards()
				h.must(err)
				if p.Rotations < uint64(most-1) || p.Rotations > uint64(most+1) {
					t.Errorf("%s: %d rotations in %v", h.name, p.Rotations, long)
				}
				if len(p.Installed.Sources) != 2 || len(p.Warnings) > 0 || p.Link.State != control.LinkUp {
					t.Errorf("%s: sources %v, warnings %v, link %s", h.name, p.Installed.Sources, p.Warnings, p.Link.State)
				}
			}
			p, err := l.a.towards()
			l.a.must(err)
			verdict("%-6s | %s | %-55s | first key %.1f s after up, %d rotations; lost %d of %d pings",
				outcome(t), where, "QKD and ML-KEM-768, 20 min", first.Seconds(), p.Rotations, r.lost(), r.sent())
		})
	}
}
