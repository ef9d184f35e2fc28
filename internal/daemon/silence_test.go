package daemon_test

import (
	"context"
	"errors"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"keyturn/internal/control"
	"keyturn/internal/daemon"
	"keyturn/internal/link"
	"keyturn/internal/rotation"
)

// dialler stands before a client's Dial.
type dialler struct {
	mu       sync.Mutex
	instead  func(context.Context) error // nil: dial
	then     func(*link.Conn) error      // nil: nothing
	attempts []attempt
}

// attempt is one to dial, and how it ended.
type attempt struct {
	took time.Duration
	err  error
}

func (d *dialler) parts(end int, p *daemon.Parts) {
	if end != 0 {
		return
	}
	dial := p.Dial
	p.Dial = func(ctx context.Context, address string, self *link.Identity, pins link.Pins) (*link.Conn, error) {
		d.mu.Lock()
		instead, then := d.instead, d.then
		d.mu.Unlock()
		began := time.Now()
		var c *link.Conn
		var err error
		if instead != nil {
			err = instead(ctx)
		} else {
			c, err = dial(ctx, address, self, pins)
			if err == nil && then != nil {
				c, err = nil, then(c)
			}
		}
		d.mu.Lock()
		d.attempts = append(d.attempts, attempt{time.Since(began), err})
		d.mu.Unlock()
		return c, err
	}
}

// from now on diallers do this instead; it forgets the attempts so far.
func (d *dialler) from(instead func(context.Context) error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.instead, d.attempts = instead, nil
}

// after lets diallers do something with what they have dialled.
func (d *dialler) after(then func(*link.Conn) error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.then = then
}

func (d *dialler) made() []attempt {
	d.mu.Lock()
	defer d.mu.Unlock()
	return append([]attempt(nil), d.attempts...)
}

func hang(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }

// links says since when either end has its link.
func (s *system) links() (since [2]time.Time) {
	s.t.Helper()
	for end := range since {
		l := s.peer(end).Link
		if l.State != control.LinkUp || l.Error != "" {
			s.t.Errorf("end %d: link %s: %s", end, l.State, l.Error)
		}
		since[end] = l.Since
	}
	return since
}

// silenced runs a test on a system that has run for some minutes.
func silenced(t *testing.T, test func(s *system, d *dialler, log *tail)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		d, log := &dialler{}, &tail{}
		s, stop := start(t, options{parts: d.parts, log: log})
		time.Sleep(3 * time.Minute)
		d.from(nil)
		test(s, d, log)
		for end := range 2 {
			if n := s.count(end, rotation.NoteSilent); n != 0 {
				t.Errorf("end %d closed %d links for silence", end, n)
			}
		}
		before := time.Now()
		s.stopRotator(0)
		if took := time.Since(before); took > 2*time.Second {
			t.Errorf("the client took %v to stop", took)
		}
		stop()
	})
}

// TestStaleLink: a connection that carries nothing any more, though neither end
// was told, is replaced by one that is dialled beside it.
func TestStaleLink(t *testing.T) {
	silenced(t, func(s *system, d *dialler, log *tail) {
		for range 3 {
			before := s.links()
			s.network.Stall()
			time.Sleep(5 * time.Second)
			after := s.links()
			for end := range 2 {
				if !after[end].After(before[end]) {
					s.t.Errorf("end %d still has the link of before", end)
				}
			}
			if n := len(d.made()); n != 1 {
				s.t.Errorf("%d attempts", n)
			}
			confirmed := s.count(0, rotation.NoteConfirmed)
			time.Sleep(5 * time.Minute)
			if s.links() != after || s.count(0, rotation.NoteConfirmed) == confirmed {
				s.t.Errorf("the new link does not work: up since %v, then %v", after, s.links())
			}
			d.from(nil)
		}
		s.undisturbed("after three stale links")
		if strings.Contains(log.text(), "link is down") {
			s.t.Errorf("a link that was replaced is logged as lost:\n%s", log.text())
		}
		s.network.Stall()
		time.Sleep(5 * time.Second) // and nothing holds up the client's end
	})
}

// TestLateLink: where the link speaks again while a second one is dialled, that
// one is given up, and the next silence has an attempt of its own.
func TestLateLink(t *testing.T) {
	silenced(t, func(s *system, d *dialler, log *tail) {
		before, lines := s.links(), strings.Count(log.text(), "link")
		for range 3 {
			d.from(hang)
			resume := s.network.Stall()
			time.Sleep(4500 * time.Millisecond)
			if n := len(d.made()); n != 0 {
				s.t.Errorf("%d attempts have ended before the link speaks", n)
			}
			resume()
			synctest.Wait()
			if a := d.made(); len(a) != 1 || !errors.Is(a[0].err, context.Canceled) || a[0].took > 2500*time.Millisecond {
				s.t.Errorf("attempts %v, want one, given up", a)
			}
			time.Sleep(time.Minute)
			if n := len(d.made()); n != 1 {
				s.t.Errorf("%d attempts", n)
			}
		}
		if now := s.links(); now != before || strings.Count(log.text(), "link") != lines {
			s.t.Errorf("the link changed: up since %v, then %v\n%s", before, now, log.text())
		}
		s.undisturbed("after three late links")
		begun := make(chan struct{})
		d.from(func(ctx context.Context) error { close(begun); return hang(ctx) })
		s.network.Stall()
		<-begun // and the attempt does not hold up the client's end
	})
}

// TestSecondLinkFails: that is nothing to the first one.
func TestSecondLinkFails(t *testing.T) {
	silenced(t, func(s *system, d *dialler, log *tail) {
		before, lines := s.links(), strings.Count(log.text(), "link")
		for range 3 {
			d.from(func(context.Context) error { return link.ErrRefused })
			resume := s.network.Stall()
			time.Sleep(5500 * time.Millisecond)
			if now := s.links(); now != before {
				s.t.Errorf("the link changed: up since %v, then %v", before, now)
			}
			if a := d.made(); len(a) != 1 || !errors.Is(a[0].err, link.ErrRefused) {
				s.t.Errorf("attempts %v, want one", a)
			}
			resume()
			time.Sleep(time.Minute)
		}
		if now := s.links(); now != before || strings.Count(log.text(), "link") != lines {
			s.t.Errorf("the link changed: up since %v, then %v\n%s", before, now, log.text())
		}
		s.undisturbed("after three attempts that failed")
	})
}

// TestGivenUpAfterProof: a second connection that is given up once the server
// has seen the client's proof does not cost the link.
func TestGivenUpAfterProof(t *testing.T) {
	silenced(t, func(s *system, d *dialler, log *tail) {
		before, lines := s.links(), strings.Count(log.text(), "link")
		d.after(func(c *link.Conn) error { return errors.Join(c.Close(), link.ErrRefused) })
		resume := s.network.Stall()
		time.Sleep(4500 * time.Millisecond)
		resume()
		time.Sleep(time.Minute)
		if now := s.links(); now != before || strings.Count(log.text(), "link") != lines || len(d.made()) != 1 {
			s.t.Errorf("the link changed after %d attempts: up since %v, then %v\n%s", len(d.made()), before, now, log.text())
		}
	})
}
