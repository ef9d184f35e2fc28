package daemon

import (
	"bytes"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// TestLimitLog: a peer's lines are bounded, those that were dropped are
// counted, and another peer's are not touched.
func TestLimitLog(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var b bytes.Buffer
		log := slog.New(slog.NewTextHandler(&b, &slog.HandlerOptions{ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
			if a.Key == slog.TimeKey {
				return slog.Attr{}
			}
			return a
		}}))
		noisy, quiet := limitLog(log.With("peer", "noisy")), limitLog(log.With("peer", "quiet"))
		for range 10 * logBurst {
			noisy.With("more", 1).Warn("again")
		}
		if n := strings.Count(b.String(), "\n"); n != logBurst {
			t.Errorf("%d lines, want %d", n, logBurst)
		}
		b.Reset()
		quiet.Info("well")
		time.Sleep(logInterval)
		noisy.Warn("again")
		noisy.Warn("again")
		time.Sleep(time.Hour)
		noisy.WithGroup("g").Warn("again", "x", 1)
		want := `level=INFO msg=well peer=quiet
level=WARN msg=again peer=noisy dropped=900
level=WARN msg=again peer=noisy g.x=1 g.dropped=1
`
		if b.String() != want {
			t.Errorf("got\n%swant\n%s", b.String(), want)
		}
	})
}
