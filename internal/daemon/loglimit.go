package daemon

import (
	"context"
	"log/slog"
	"sync"
	"time"
)

// A peer may have so many lines in the log at once, and one more for each
// logInterval. The log is bounded as a whole: a peer that makes its rotator
// complain without end must not push out what was said of the others.
const (
	logBurst    = 100
	logInterval = time.Second
)

// limitedLog is a handler that drops what exceeds the budget, and says with the
// next line how much that was.
type limitedLog struct {
	slog.Handler
	budget *logBudget // shared with the handlers derived from this one
}

type logBudget struct {
	mu      sync.Mutex
	full    time.Time // when the whole burst will be free again
	dropped int
}

// limitLog returns a logger with a budget of its own.
func limitLog(l *slog.Logger) *slog.Logger {
	return slog.New(&limitedLog{l.Handler(), new(logBudget)})
}

// Handle implements slog.Handler.
func (h *limitedLog) Handle(ctx context.Context, r slog.Record) error {
	dropped, ok := h.budget.take(time.Now())
	if !ok {
		return nil
	}
	if dropped > 0 {
		r.AddAttrs(slog.Int("dropped", dropped))
	}
	return h.Handler.Handle(ctx, r)
}

// WithAttrs implements slog.Handler.
func (h *limitedLog) WithAttrs(attrs []slog.Attr) slog.Handler {
	return &limitedLog{h.Handler.WithAttrs(attrs), h.budget}
}

// WithGroup implements slog.Handler.
func (h *limitedLog) WithGroup(name string) slog.Handler {
	return &limitedLog{h.Handler.WithGroup(name), h.budget}
}

// take reports whether one more line may be written, and how many were not
// since the last that was.
func (b *logBudget) take(now time.Time) (dropped int, ok bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.full.Before(now) {
		b.full = now
	}
	if b.full.Sub(now) > (logBurst-1)*logInterval {
		b.dropped++
		return 0, false
	}
	b.full = b.full.Add(logInterval)
	dropped, b.dropped = b.dropped, 0
	return dropped, true
}
