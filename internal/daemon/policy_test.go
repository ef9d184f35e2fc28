package daemon_test

import (
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"keyturn/internal/config"
	"keyturn/internal/control"
	"keyturn/internal/kmesim"
	"keyturn/internal/rotation"
)

// warning returns what is said under a code, or nothing.
func warning(s control.PeerStatus, code control.Code) string {
	for _, w := range s.Warnings {
		if w.Code == code {
			return w.Text
		}
	}
	return ""
}

// TestStale: no keys for longer than max_key_age. Both ends say beforehand what
// will happen; then on_stale: keep keeps the tunnel as it is, and block closes
// it at its next handshake. When keys come again the tunnel is as before, with
// nobody's help.
func TestStale(t *testing.T) {
	for _, stale := range []config.OnStale{config.StaleKeep, config.StaleBlock} {
		t.Run(string(stale), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s, stop := start(t, options{peer: func(_ int, p *config.Peer) {
					p.OnStale, p.MaxKeyAge = stale, 20*time.Minute
				}})
				time.Sleep(5 * time.Minute)
				healthy := func(kme *kmesim.KME, yes bool) {
					kind := kmesim.OutOfKeys
					if yes {
						kind = kmesim.Healthy
					}
					kme.SetFault(kmesim.Fault{Kind: kind})
				}
				healthy(s.kmes.A, false)
				time.Sleep(12 * time.Minute) // the buffers run dry: the last key is some minutes old
				if s.peer(0).Buffer.Len != 0 || warning(s.peer(0), control.KeyAging) != "" {
					t.Fatalf("%+v", s.peer(0))
				}
				age := time.Duration(*s.peer(0).KeyAge)
				time.Sleep(15*time.Minute - age + 5*time.Second)
				for end := range 2 {
					want := map[config.OnStale]string{
						config.StaleKeep: "it will be stale in 4m5", config.StaleBlock: "the tunnel will be blocked in 4m5",
					}[stale]
					if got := warning(s.peer(end), control.KeyAging); !strings.Contains(got, want) {
						t.Errorf("end %d warns %q, want %q", end, got, want)
					}
					if s.count(end, rotation.NoteAging) != 1 {
						t.Errorf("end %d does not say it in the log, once", end)
					}
				}
				s.undisturbed("before the key was stale")

				time.Sleep(10 * time.Minute)
				switch stale {
				case config.StaleKeep:
					s.undisturbed("under the stale key")
					for end := range 2 {
						if p := s.peer(end); p.State != control.PeerStale || p.Protected || warning(p, control.KeyStale) == "" || warning(p, control.KeyAging) != "" {
							t.Errorf("end %d: %+v", end, p)
						}
					}
				case config.StaleBlock:
					before := s.pair.Traffic()
					time.Sleep(time.Minute)
					if now := s.pair.Traffic(); now.Lost == before.Lost {
						t.Error("the blocked tunnel passes packets")
					}
					for end := range 2 {
						if p := s.peer(end); p.State != control.PeerBlocked || p.Protected || warning(p, control.TunnelBlocked) == "" {
							t.Errorf("end %d: %+v", end, p)
						}
					}
				}

				healthy(s.kmes.A, true)
				// A blocked tunnel is opened by the next key; any other gets it after
				// its next handshake, and another one confirms it.
				time.Sleep(5 * time.Minute)
				before := s.pair.Traffic()
				time.Sleep(5 * time.Minute)
				if now := s.pair.Traffic(); now.Lost != before.Lost {
					t.Errorf("%d pings were lost after it was over", now.Lost-before.Lost)
				}
				for end := range 2 {
					if p := s.peer(end); !p.Protected || p.State != control.PeerProtected || len(p.Warnings) != 0 {
						t.Errorf("end %d: %s, %s, %v", end, p.State, p.Why, p.Warnings)
					}
				}
				if !s.inStep() {
					t.Error("the ends hold different keys")
				}
				stop()
			})
		})
	}
}

// TestIdle: a tunnel that nobody uses has no session most of the time, and its
// newest key waits for a handshake for as long. It is well all the same.
func TestIdle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, stop := start(t, options{quiet: true})
		time.Sleep(time.Minute)
		for range 3 * 60 {
			time.Sleep(time.Minute)
			for end := range 2 {
				if p := s.peer(end); !p.Protected || len(p.Warnings) != 0 {
					t.Errorf("end %d: %s, %s, %v", end, p.State, p.Why, p.Warnings)
				}
			}
		}
		stop()
	})
}
