package demo

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"keyturn/internal/rotation"
	"keyturn/internal/wg"
	"keyturn/internal/wire"
)

const (
	pingEvery      = 50 * time.Millisecond
	handshakeEvery = 6 * time.Second
	settle         = 4 * time.Second // after the last handshake: no commit is under way
	patience       = 20 * time.Second
	kept           = 8 // events that the view shows
)

// Options of a demonstration.
type Options struct {
	Out  io.Writer
	For  time.Duration // zero: until ctx ends
	JSON bool          // print nothing but the summary, as one JSON object
	Live bool          // Out is a terminal: draw a view instead of lines
	// Size returns the terminal's columns and rows (Live).
	Size func() (columns, rows int)
}

// Summary is what a demonstration came to.
type Summary struct {
	Seconds          float64 `json:"seconds"`
	Keys             int     `json:"keys"`      // established and verified at both ends
	Rotations        int     `json:"rotations"` // keys installed at both ends
	Confirmed        int     `json:"confirmed"` // of those, seen in a handshake by both ends
	FirstConfirmed   float64 `json:"first_confirmed_seconds,omitzero"`
	PingsSent        uint64  `json:"pings_sent"`
	PingsLost        uint64  `json:"pings_lost"`
	FailedHandshakes int     `json:"failed_handshakes"` // without a completed one within 5 s
	InStep           bool    `json:"in_step"`           // both ends have the same PSK in WireGuard
}

// ErrImperfect means that the demonstration lost a packet or a handshake, or
// ended out of step; the summary says which.
var ErrImperfect = errors.New("the tunnel was disturbed")

// event is a note of a host.
type event struct {
	at   time.Duration
	host string
	note rotation.Note
}

// show is the state of a running demonstration.
type show struct {
	Options
	started  time.Time
	lab      *lab
	provoked time.Time // the last handshake

	mu          sync.Mutex
	events      []event
	established map[wire.Named]int
	installed   map[wire.Named]int
	confirmed   map[wire.Named]int
	first       time.Duration
	ending      bool
}

// Run runs the demonstration and returns nil if nothing was disturbed.
func Run(ctx context.Context, o Options) (err error) {
	s := &show{
		Options: o, started: time.Now(),
		established: map[wire.Named]int{}, installed: map[wire.Named]int{}, confirmed: map[wire.Named]int{},
	}
	// Everything in it ends with this context, which outlives ctx until the
	// tunnel has settled.
	world, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	var g errgroup.Group
	s.lab, err = newLab(world, &g, s.watch)
	if err != nil {
		stop()
		return errors.Join(err, g.Wait())
	}
	s.say("two WireGuard devices, two KMEs (%s, %s), two rotators; a handshake is provoked every %v", s.lab.uris[0], s.lab.uris[1], handshakeEvery)
	rotators, stopRotators := context.WithCancel(world)
	defer stopRotators()
	var running errgroup.Group
	running.Go(func() error { return s.lab.run(rotators) })
	g.Go(func() error { return s.traffic(world) })
	leave := func() {}
	if o.Live && !o.JSON {
		leave = s.enter(world)
		defer leave()
	}

	s.handshakesUntil(ctx)
	if err := s.settle(world); err != nil {
		stop()
		return errors.Join(err, running.Wait(), g.Wait(), s.lab.close())
	}
	stopRotators()
	err = running.Wait()
	inStep, compareErr := s.lab.inStep()
	summary := s.summary(inStep)
	stop()
	err = errors.Join(err, compareErr, g.Wait(), s.lab.close())
	leave()
	if err != nil {
		return err
	}
	if err := s.print(summary); err != nil {
		return err
	}
	if summary.PingsLost > 0 || summary.FailedHandshakes > 0 || !summary.InStep {
		return ErrImperfect
	}
	return nil
}

// handshakesUntil provokes handshakes from one side until time is up.
func (s *show) handshakesUntil(ctx context.Context) {
	var end <-chan time.Time
	if s.For > 0 {
		timer := time.NewTimer(s.For)
		defer timer.Stop()
		end = timer.C
	}
	tick := time.NewTicker(handshakeEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-end:
			return
		case <-tick.C:
			_ = s.lab.pair.Handshake()
			s.provoked = time.Now()
		}
	}
}

// settle waits until no commit can be under way: both ends have the same key
// installed, and the last handshake lies some seconds back.
func (s *show) settle(ctx context.Context) error {
	s.mu.Lock()
	s.ending = true
	s.mu.Unlock()
	s.say("no more handshakes; waiting until the ends have settled")
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(200 * time.Millisecond):
		}
		a, b := s.lab.rotators[0].Status().Peers[0], s.lab.rotators[1].Status().Peers[0]
		quiet := time.Since(s.provoked) > settle && a.HandshakeAge != nil && b.HandshakeAge != nil &&
			time.Duration(*a.HandshakeAge) > settle && time.Duration(*b.HandshakeAge) > settle
		if quiet && a.Installed != nil && b.Installed != nil && a.Installed.Fingerprint == b.Installed.Fingerprint {
			return nil
		}
	}
	return nil // the comparison will say so
}

// traffic pings in both directions until ctx ends.
func (s *show) traffic(ctx context.Context) error {
	tick := time.NewTicker(pingEvery)
	defer tick.Stop()
	for i := 0; ; i++ {
		end := s.lab.pair.A
		if i%2 == 1 {
			end = s.lab.pair.B
		}
		if err := end.Ping(); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// watch takes in what a rotator's machines say.
func (s *show) watch(host string, n rotation.Note) {
	s.mu.Lock()
	defer s.mu.Unlock()
	e := event{time.Since(s.started), host, n}
	side := 1
	if host == names[1] {
		side = 2
	}
	switch n.Kind {
	case rotation.NoteEstablished:
		s.established[n.Key] |= side
	case rotation.NoteInstalled:
		s.installed[n.Key] |= side
	case rotation.NoteConfirmed:
		s.confirmed[n.Key] |= side
		if s.confirmed[n.Key] == 3 && s.first == 0 {
			s.first = e.at
		}
	}
	if s.events = append(s.events, e); len(s.events) > kept {
		s.events = s.events[1:]
	}
	if !s.Live && !s.JSON {
		_, _ = fmt.Fprintf(s.Out, "%6.1fs  %s\n", e.at.Seconds(), describe(e))
	}
}

// describe is an event in words.
func describe(e event) string {
	n := e.note
	switch n.Kind {
	case rotation.NoteEstablished:
		return fmt.Sprintf("%s  key %v established and verified: QKD + ML-KEM-1024", e.host, n.Key)
	case rotation.NoteInstalled:
		return fmt.Sprintf("%s  key %v set as PSK", e.host, n.Key)
	case rotation.NoteConfirmed:
		return fmt.Sprintf("%s  key %v confirmed: both ends saw a handshake under it", e.host, n.Key)
	}
	if n.Key.Serial != 0 && n.Key.Fingerprint.IsZero() {
		return fmt.Sprintf("%s  %v %d: %s", e.host, n.Kind, n.Key.Serial, n.Text)
	}
	if n.Key.Serial != 0 {
		return fmt.Sprintf("%s  %v %v: %s", e.host, n.Kind, n.Key, n.Text)
	}
	return fmt.Sprintf("%s  %v: %s", e.host, n.Kind, n.Text)
}

// say prints a line where lines are printed.
func (s *show) say(format string, args ...any) {
	if s.JSON || s.Live {
		return
	}
	_, _ = fmt.Fprintf(s.Out, "%6.1fs  "+format+"\n", append([]any{time.Since(s.started).Seconds()}, args...)...)
}

func both(m map[wire.Named]int) (n int) {
	for _, sides := range m {
		if sides == 3 {
			n++
		}
	}
	return n
}

func (s *show) traffics() wg.Traffic { return s.lab.pair.Traffic() }

func (s *show) summary(inStep bool) Summary {
	t := s.traffics()
	s.mu.Lock()
	defer s.mu.Unlock()
	return Summary{
		Seconds: time.Since(s.started).Round(time.Millisecond).Seconds(), Keys: both(s.established),
		Rotations: both(s.installed), Confirmed: both(s.confirmed), FirstConfirmed: s.first.Round(time.Millisecond).Seconds(),
		PingsSent: t.Sent, PingsLost: t.Lost, FailedHandshakes: s.lab.pair.FailedHandshakes(), InStep: inStep,
	}
}

func (s *show) print(m Summary) error {
	if s.JSON {
		return json.NewEncoder(s.Out).Encode(m)
	}
	step := "the ends hold the same key"
	if !m.InStep {
		step = "THE ENDS HOLD DIFFERENT KEYS"
	}
	_, err := fmt.Fprintf(s.Out, `
%.0f s: %d keys established, %d rotations, %d confirmed (the first after %.1f s)
%d pings sent, %d lost; %d failed handshakes; %s
`, m.Seconds, m.Keys, m.Rotations, m.Confirmed, m.FirstConfirmed, m.PingsSent, m.PingsLost, m.FailedHandshakes, step)
	return err
}
