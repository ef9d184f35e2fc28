// Package daemon composes a rotator: it connects the machines of
// internal/rotation with WireGuard, the KMS, the links and the journal, and
// runs them until its context ends.
package daemon

import (
	"context"
	"errors"
	"log/slog"
)

// Options is what a rotator needs from whoever starts it.
type Options struct {
	ConfigPath string // the configuration file
	RunDir     string // control socket and journal: mode 0700, gone at reboot
	StateDir   string // what must survive a reboot: the initial PSK of each peer; exists, mode 0700
	Version    string // of keyturn, for control.Status
	Log        *slog.Logger
	LogDropped func() uint64 // lines lost so far, for control.LogDropped; nil: none can be
	Ready      func()        // called once: configuration valid, device readable, listening, control socket up
}

// Run runs the rotator that the configuration describes until ctx ends or an
// operator says down; it then says goodbye to the peers, leaves the last PSK
// in place and returns nil. An error before Ready means that nothing was changed.
func Run(ctx context.Context, o Options) error {
	return errors.New("not composed yet")
}
