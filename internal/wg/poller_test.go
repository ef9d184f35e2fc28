package wg

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"keyturn/internal/psk"
)

func key(t testing.TB, fill byte) *psk.Key {
	t.Helper()
	b := make([]byte, psk.Size)
	for i := range b {
		b[i] = fill
	}
	k, err := psk.New(b)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// poll runs body in virtual time with a running poller.
func poll(t *testing.T, f *Fake, body func(*testing.T, *Poller)) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		p := NewPoller(f, 0)
		ended := make(chan error, 1)
		go func() { ended <- p.Run(ctx) }()
		body(t, p)
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("Run: %v, want nil", err)
		}
	})
}

func TestPollerDeliversToEachWatcherItsOwnCopy(t *testing.T) {
	a, b := PublicKey{1}, PublicKey{2}
	f := NewFake(PublicKey{9}, Peer{PublicKey: a, PSK: key(t, 7)}, Peer{PublicKey: b})
	poll(t, f, func(t *testing.T, p *Poller) {
		first, _ := p.Subscribe(a)
		second, _ := p.Subscribe(a)
		other, _ := p.Subscribe(b)
		one, two, three := <-first, <-second, <-other
		one.Peer.PSK.Wipe()
		if !two.Peer.PSK.Equal(key(t, 7)) {
			t.Error("the watchers share a key: one wiped it for the other")
		}
		if three.Peer.PSK == nil || !three.Peer.PSK.IsZero() {
			t.Error("no pre-shared key is not the all-zero key")
		}
		if !one.Present || one.Err != nil || one.Jumped || one.Ended.Before(one.Began) || one.Wall.IsZero() {
			t.Errorf("first observation: %+v", one)
		}
	})
}

func TestPollerKeepsTheNewestForASlowWatcher(t *testing.T) {
	k := PublicKey{1}
	f := NewFake(PublicKey{9}, Peer{PublicKey: k})
	poll(t, f, func(t *testing.T, p *Poller) {
		c, end := p.Subscribe(k)
		time.Sleep(time.Minute)
		synctest.Wait()
		if n := f.Dumps(); n < 59 || n > 61 {
			t.Errorf("%d dumps in a minute, want one each second", n)
		}
		if age := time.Since((<-c).Ended); age > time.Second {
			t.Errorf("observation is %v old: not the newest", age)
		}
		end()
		end()
		time.Sleep(time.Minute)
		synctest.Wait()
		if len(c) != 0 {
			t.Error("an observation came after the subscription ended")
		}
	})
}

func TestPollerReportsErrorsAndGoesOn(t *testing.T) {
	k := PublicKey{1}
	f := NewFake(PublicKey{9}, Peer{PublicKey: k})
	poll(t, f, func(t *testing.T, p *Poller) {
		c, _ := p.Subscribe(k)
		<-c
		f.Fail(Failures{Dump: ErrNoDevice})
		if o := <-c; !errors.Is(o.Err, ErrNoDevice) || o.Present || o.Ended.IsZero() {
			t.Errorf("device vanished: %+v", o)
		}
		f.Fail(Failures{})
		f.RemovePeer(k)
		if o := <-c; o.Err != nil || o.Present {
			t.Errorf("peer vanished: %+v", o)
		}
		f.SetPeer(Peer{PublicKey: k})
		if o := <-c; !o.Present {
			t.Errorf("peer came back: %+v", o)
		}
	})
}

func TestPollSoon(t *testing.T) {
	k := PublicKey{1}
	f := NewFake(PublicKey{9}, Peer{PublicKey: k})
	poll(t, f, func(t *testing.T, p *Poller) {
		c, _ := p.Subscribe(k)
		previous := <-c
		for range 20 {
			asked := time.Now()
			for range 5 {
				p.PollSoon()
			}
			o := <-c
			if o.Began.Before(asked) {
				t.Fatal("the dump began before it was asked for")
			}
			if gap := o.Began.Sub(previous.Began); gap != minGap {
				t.Fatalf("dumps %v apart, want %v", gap, minGap)
			}
			previous = o
		}
		if o := <-c; o.Began.Sub(previous.Began) != DefaultInterval {
			t.Errorf("then %v apart, want the usual interval", o.Began.Sub(previous.Began))
		}
	})
}

func TestPollSoonDuringADumpMakesAnother(t *testing.T) {
	k := PublicKey{1}
	f := NewFake(PublicKey{9}, Peer{PublicKey: k})
	f.DumpTakes(80 * time.Millisecond)
	poll(t, f, func(t *testing.T, p *Poller) {
		c, _ := p.Subscribe(k)
		time.Sleep(time.Millisecond)
		asked := time.Now()
		p.PollSoon()
		if o := <-c; !o.Began.Before(asked) {
			t.Fatal("no dump was under way")
		}
		if o := <-c; !o.Began.After(asked) || o.Began.Sub(asked) > 800*time.Millisecond {
			t.Errorf("next dump began %v after it was asked for", o.Began.Sub(asked))
		}
	})
}

func TestPollerSparesTheProcessor(t *testing.T) {
	k := PublicKey{1}
	f := NewFake(PublicKey{9}, Peer{PublicKey: k})
	f.DumpTakes(360 * time.Millisecond)
	poll(t, f, func(t *testing.T, p *Poller) {
		stop := make(chan struct{})
		go func() { // somebody is always in a hurry
			for {
				select {
				case <-stop:
					return
				case <-time.After(10 * time.Millisecond):
					p.PollSoon()
				}
			}
		}()
		time.Sleep(time.Minute)
		if n := f.Dumps(); n < 15 || n > 18 {
			t.Errorf("%d dumps of 0.36 s in a minute, want a tenth of the time", n)
		}
		if p.Interval() != 3600*time.Millisecond {
			t.Errorf("interval %v", p.Interval())
		}

		f.DumpTakes(0)
		time.Sleep(4 * time.Second) // one fast dump is enough
		if p.Interval() != DefaultInterval {
			t.Errorf("interval %v of a device grown small", p.Interval())
		}
		f.DumpTakes(3 * time.Second)
		time.Sleep(20 * time.Second)
		if p.Interval() != MaxInterval {
			t.Errorf("interval %v of a device far too large", p.Interval())
		}
		close(stop)
	})
}

func TestPollerSeesClockJumps(t *testing.T) {
	for name, step := range map[string]time.Duration{
		"suspend": time.Hour, "set back": -time.Minute, "small": 3 * time.Second,
	} {
		t.Run(name, func(t *testing.T) {
			k := PublicKey{1}
			synctest.Test(t, func(t *testing.T) {
				p := NewPoller(NewFake(PublicKey{9}, Peer{PublicKey: k}), 0)
				c, _ := p.Subscribe(k)
				p.poll(time.Now())
				time.Sleep(time.Hour) // both clocks
				p.poll(time.Now())
				if (<-c).Jumped {
					t.Fatal("time that passed on both clocks is no jump")
				}
				p.wall = func() time.Time { return time.Now().Round(0).Add(step) }
				p.poll(time.Now())
				p.poll(time.Now())
				if got, want := (<-c).Jumped, step.Abs() > jump; got != want {
					t.Errorf("jumped = %v after a step of %v, unseen for one poll", got, step)
				}
				p.poll(time.Now())
				if (<-c).Jumped {
					t.Error("one jump is reported twice")
				}
			})
		})
	}
}
