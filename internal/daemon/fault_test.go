package daemon_test

import (
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"keyturn/internal/config"
	"keyturn/internal/control"
	"keyturn/internal/kmesim"
	"keyturn/internal/rotation"
)

// undisturbed fails the test if the tunnel lost anything or is out of step.
func (s *system) undisturbed(when string) {
	s.t.Helper()
	if traffic, failed := s.pair.Traffic(), s.pair.FailedHandshakes(); traffic.Lost != 0 || failed != 0 {
		s.t.Errorf("%s: lost %d of %d pings, %d failed handshakes", when, traffic.Lost, traffic.Sent, failed)
	}
	if !s.inStep() {
		s.t.Errorf("%s: the ends hold different keys", when)
	}
}

// TestLinkCutBetweenSets cuts the link when the server has set a key and the
// client has not heard of it: the hunt must find the common key while the old
// session still lives.
func TestLinkCutBetweenSets(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var installs atomic.Int32
		s, stop := start(t, options{watch: func(s *system, end int, n rotation.Note) {
			if end == 1 && n.Kind == rotation.NoteInstalled && installs.Add(1) == 3 {
				s.network.Cut(true)
			}
		}})
		for installs.Load() < 3 {
			time.Sleep(time.Second)
		}
		time.Sleep(10 * time.Second)
		if s.inStep() {
			t.Error("the cut came too late: the ends are in step")
		}
		time.Sleep(10 * time.Minute)
		if traffic := s.pair.Traffic(); traffic.Lost != 0 {
			t.Errorf("lost %d of %d pings while the link was cut", traffic.Lost, traffic.Sent)
		}
		if s.count(0, rotation.NoteHunting)+s.count(1, rotation.NoteHunting) == 0 {
			t.Error("nobody hunted")
		}
		s.network.Cut(false)
		before := s.count(0, rotation.NoteConfirmed)
		time.Sleep(10 * time.Minute)
		if n := s.count(0, rotation.NoteConfirmed); n <= before {
			t.Errorf("no key confirmed after the link came back: %d before, %d now", before, n)
		}
		if traffic := s.pair.Traffic(); traffic.Lost != 0 || !s.inStep() {
			t.Errorf("lost %d pings; in step %v", traffic.Lost, s.inStep())
		}
		stop()
	})
}

// TestRestart restarts either rotator, and both, while keys rotate.
func TestRestart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, stop := start(t, options{})
		time.Sleep(5 * time.Minute)
		for _, ends := range [][]int{{0}, {1}, {0, 1}, {1, 0}} {
			for _, end := range ends {
				s.stopRotator(end)
			}
			time.Sleep(100 * time.Second)
			for _, end := range ends {
				s.startRotator(end)
			}
			before := s.count(0, rotation.NoteConfirmed)
			time.Sleep(5 * time.Minute)
			if n := s.count(0, rotation.NoteConfirmed); n <= before {
				t.Errorf("no key confirmed after the restart of %v", ends)
			}
			s.undisturbed("after a restart")
		}
		stop()
	})
}

// TestKMSFaults lets the KME of either end fail in every way: nothing that was
// not verified goes in, the tunnel is not disturbed, and rotation comes back.
func TestKMSFaults(t *testing.T) {
	// The client asks for fresh keys, the server for those that are named.
	faults := [2][]kmesim.FaultKind{
		{kmesim.OutOfKeys, kmesim.WrongSize, kmesim.Lost, kmesim.HTML, kmesim.Down, kmesim.Silent},
		{kmesim.Late, kmesim.WrongBytes, kmesim.WrongSize, kmesim.Lost, kmesim.HTML, kmesim.Down, kmesim.Silent},
	}
	for end := range faults {
		for _, fault := range faults[end] {
			t.Run([]string{"client ", "server "}[end]+fault.String(), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					s, stop := start(t, options{})
					time.Sleep(3 * time.Minute)
					kme := []*kmesim.KME{s.kmes.A, s.kmes.B}[end]
					kme.SetFault(kmesim.Fault{Kind: fault})
					time.Sleep(15 * time.Minute) // the buffers run dry
					if n := s.peer(0).Buffer.Len; n != 0 {
						t.Errorf("%d keys in the buffer, want none", n)
					}
					s.undisturbed("during the fault")
					kme.SetFault(kmesim.Fault{})
					before := s.count(0, rotation.NoteConfirmed)
					time.Sleep(6 * time.Minute)
					if n := s.count(0, rotation.NoteConfirmed); n <= before {
						t.Errorf("no key confirmed after the fault")
					}
					s.undisturbed("after the fault")
					stop()
				})
			})
		}
	}
}

// TestRefused lets the ends disagree on each parameter: both ends name it, and
// nothing is installed.
func TestRefused(t *testing.T) {
	cases := []struct {
		field  string
		change func(p *config.Peer)
	}{
		{"kems", func(p *config.Peer) { p.KEMs = []string{"ML-KEM-1024"} }},
		{"require", func(p *config.Peer) { p.Require = config.RequireAny }},
		{"combiner", func(p *config.Peer) { p.Combiner = config.HKDFSHA384 }},
		{"buffer", func(p *config.Peer) { p.Buffer = 5 }},
		{"window", func(p *config.Peer) { p.Window = 20 * time.Second }},
		{"kms", func(p *config.Peer) { p.KMS, p.SAE = nil, "" }},
		{"sae of the client", func(p *config.Peer) { p.SAE = "sae_007" }},
		{"role", func(p *config.Peer) { p.Role = config.RoleClient }},
	}
	for _, c := range cases {
		t.Run(c.field, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s, stop := start(t, options{peer: func(end int, p *config.Peer) {
					if end == 1 {
						c.change(p)
					}
				}})
				time.Sleep(time.Minute)
				for end := range 2 {
					p := s.peer(end)
					if p.State != control.PeerRefused || p.Protected || p.Why == "" {
						t.Errorf("end %d: state %s, protected %v, why %q", end, p.State, p.Protected, p.Why)
					}
					if !slices.ContainsFunc(p.Differences, func(d control.Difference) bool {
						return d.Field == c.field && (d.Ours != d.Theirs || c.field == "role")
					}) {
						t.Errorf("end %d: differences %+v do not name %q", end, p.Differences, c.field)
					}
					if s.count(end, rotation.NoteInstalled) != 0 {
						t.Errorf("end %d installed a key", end)
					}
				}
				stop()
			})
		})
	}
}

// TestSAEWithoutKMS: the SAE ID of a peer means nothing without a KMS, and so
// keeps nobody from agreeing.
func TestSAEWithoutKMS(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, stop := start(t, options{peer: func(end int, p *config.Peer) {
			p.KMS, p.KEMs = nil, []string{"ML-KEM-768"}
			if end == 1 {
				p.SAE = ""
			}
		}})
		time.Sleep(10 * time.Minute)
		for end := range 2 {
			if p := s.peer(end); !p.Protected || p.SAE != "" || p.PeerSAE != "" {
				t.Errorf("end %d: %s, sae %q and %q, %+v", end, p.State, p.SAE, p.PeerSAE, p.Differences)
			}
		}
		stop()
	})
}

// TestTwoServers: neither end dials, and both name the reason as soon as one of
// them has the other's address. When one is client at last, nothing is left of it.
func TestTwoServers(t *testing.T) {
	for name, addresses := range map[string][2]bool{"both addresses": {true, true}, "one address": {false, true}, "no address": {}} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				configured := [2]*config.Peer{}
				s, stop := start(t, options{peer: func(end int, p *config.Peer) {
					configured[end] = p
					p.Role = config.RoleServer
					if !addresses[end] {
						p.Address = ""
					}
				}})
				known := addresses[0] || addresses[1]
				time.Sleep(30 * time.Second)
				for range 2 {
					for end := range 2 {
						p := s.peer(end)
						named := slices.Contains(p.Differences, control.Difference{Field: "role", Ours: "server", Theirs: "server"})
						if named != known || (p.State == control.PeerRefused) != known || p.Protected || strings.Contains(p.Link.Error, "both are server") != known {
							t.Errorf("end %d: %s, %+v, link %+v", end, p.State, p.Differences, p.Link)
						}
						if n := s.count(end, rotation.NoteRefused); known && n != 1 {
							t.Errorf("end %d says it %d times", end, n)
						}
					}
					time.Sleep(time.Hour)
				}

				configured[0].Role, configured[0].Address = config.RoleClient, "madrid:51822"
				s.stopRotator(0)
				s.startRotator(0)
				time.Sleep(10 * time.Minute)
				for end := range 2 {
					if p := s.peer(end); !p.Protected || len(p.Differences) != 0 || len(p.Warnings) != 0 {
						t.Errorf("end %d: %s, %+v, %v", end, p.State, p.Differences, p.Warnings)
					}
				}
				stop()
			})
		})
	}
}

// TestClientElsewhere: a client that dials the wrong place is no second server,
// and what the server asks of it leaves no trace.
func TestClientElsewhere(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, stop := start(t, options{peer: func(end int, p *config.Peer) {
			if end == 0 {
				p.Address = "porto:51822"
			}
		}})
		time.Sleep(time.Hour)
		for end := range 2 {
			p := s.peer(end)
			if p.State != control.PeerHold || len(p.Differences) != 0 || s.count(end, rotation.NoteRefused) != 0 || warning(p, control.LinkIsDown) == "" {
				t.Errorf("end %d: %s, %+v, %v", end, p.State, p.Differences, p.Warnings)
			}
		}
		stop()
	})
}

// TestStopOnSilentLink: a rotator stops within two seconds although its peer
// does not answer.
func TestStopOnSilentLink(t *testing.T) {
	for end := range 2 {
		synctest.Test(t, func(t *testing.T) {
			s, stop := start(t, options{})
			time.Sleep(3 * time.Minute)
			s.network.Cut(true)
			time.Sleep(time.Second)
			before := time.Now()
			s.stopRotator(end)
			if took := time.Since(before); took > 2*time.Second {
				t.Errorf("end %d took %v to stop", end, took)
			}
			s.network.Cut(false)
			stop()
		})
	}
}

// TestFallbackWaitsForDump: with fallback, what the ends compare is known only
// when WireGuard was read; a link that is faster must not end in a refusal.
func TestFallbackWaitsForDump(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, stop := start(t, options{peer: func(_ int, p *config.Peer) { p.Fallback = config.FallbackInitial }, slowDump: true})
		time.Sleep(10 * time.Minute)
		for end := range 2 {
			if p := s.peer(end); p.State != control.PeerProtected {
				t.Errorf("end %d: %s, differences %+v", end, p.State, p.Differences)
			}
		}
		stop()
	})
}
