package daemon

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	"keyturn/internal/config"
	"keyturn/internal/control"
	"keyturn/internal/rotation"
	"keyturn/internal/wire"
)

// recently is how long a momentary event stays among the warnings.
const recently = 10 * time.Minute

// states translates the scheduler's word where it is the status's as well.
var states = map[rotation.State]control.PeerState{
	rotation.StateHold: control.PeerHold, rotation.StateRefused: control.PeerRefused,
	rotation.StateUnprotected: control.PeerWaiting, rotation.StateUnconfirmed: control.PeerUnconfirmed,
	rotation.StateProtected: control.PeerProtected, rotation.StateRepairing: control.PeerRepairing,
	rotation.StateHunting: control.PeerHunting, rotation.StateStale: control.PeerStale,
	rotation.StateBlocked: control.PeerBlocked, rotation.StateMissing: control.PeerMissing,
}

// why is one sentence for each state in which a tunnel is not protected.
var why = map[control.PeerState]string{
	control.PeerHold:         "waiting for the peer's rotator; the pre-shared key is still the one found at the start",
	control.PeerRefused:      "the two ends are configured differently",
	control.PeerEstablishing: "no verified key yet",
	control.PeerWaiting:      "verified keys are ready; the first goes in after the tunnel's next handshake",
	control.PeerUnconfirmed:  "the first key is installed and waits for a handshake that confirms it",
	control.PeerRepairing:    "the ends have different keys installed; repairing",
	control.PeerHunting:      "no handshake succeeds, and the rotators cannot repair it (no link, or no key in common); trying the keys that the other end may have",
	control.PeerStale:        "no fresh key for longer than max_key_age",
	control.PeerBlocked:      "closed until the next verified key",
	control.PeerMissing:      "WireGuard does not know the peer",
}

// status says what the peer is doing.
func (p *peer) status() control.PeerStatus {
	now := time.Now()
	p.mu.Lock()
	v, health := p.scheduler.View(), p.generator.Health()
	length, capacity := p.tunnel.Buffer()
	session, accepted := p.tunnel.Session()
	differences := slices.Clone(p.tunnel.Differences())
	p.mu.Unlock()
	p.connMu.Lock()
	defer p.connMu.Unlock()

	c := p.config
	sae, peerSAE := saes(c)
	s := control.PeerStatus{
		Name: c.Name, PublicKey: p.key.String(), Role: p.role.String(), SAE: sae, PeerSAE: peerSAE,
		State: states[v.State], Protected: v.Protected, Rotations: v.Rotations, LastRotation: v.LastRotation,
		// A server holds the key that the client has pulled as well.
		Buffer: control.Buffer{Len: min(length, capacity), Cap: capacity}, Differences: []control.Difference{}, Warnings: []control.Warning{},
	}
	switch {
	case s.State == control.PeerWaiting && length == 0 && !v.Pulled:
		s.State = control.PeerEstablishing
	case !accepted && !session.IsZero() && s.State == control.PeerHold:
		s.State = control.PeerRefused
	}
	if !s.Protected {
		s.Why = why[s.State]
		if s.State == control.PeerProtected {
			s.Why = "the installed key is not confirmed"
		}
		if v.Recovery && s.State == control.PeerUnconfirmed {
			s.Why = "back by the recovery key; the next key follows"
		}
	}
	if v.Handshake >= 0 {
		s.HandshakeAge = seconds(v.Handshake)
	}
	if !v.Installed.Fingerprint.IsZero() {
		s.Installed = &control.Key{Serial: v.Installed.Serial, Fingerprint: v.Installed.Fingerprint.String(), Since: v.Since, Sources: sourceNames(v.Sources, c.KEMs), Recovery: v.Recovery}
		if !v.Found && !v.Since.IsZero() {
			s.KeyAge = seconds(now.Sub(v.Since))
		}
	}
	if !v.Confirmed.Fingerprint.IsZero() {
		s.Confirmed = &control.Key{Serial: v.Confirmed.Serial, Fingerprint: v.Confirmed.Fingerprint.String()}
	}
	for _, d := range differences {
		ours, theirs := d.Client, d.Server
		if p.role == rotation.Server {
			ours, theirs = theirs, ours
		}
		s.Differences = append(s.Differences, control.Difference{Field: d.Field, Ours: ours, Theirs: theirs})
	}
	s.Link = p.linkStatus()
	if s.Link.State == control.LinkDown && slices.Equal(differences, rotation.SameRole(rotation.Server)) {
		s.Link.Error = "neither end dials: both are server"
	}
	s.KMS = p.kmsStatus()
	s.Warnings = p.warnings(now, &s, v, health)
	return s
}

func seconds(d time.Duration) *control.Seconds {
	s := control.Seconds(max(d, 0))
	return &s
}

func (p *peer) linkStatus() control.Link {
	l := control.Link{State: control.LinkDown, Since: p.linkAt.Round(0), RemoteAddr: p.config.Address, Inside: p.inside, Error: p.linkError}
	switch {
	case p.conn != nil:
		l.State, l.RemoteAddr = control.LinkUp, p.conn.RemoteAddr().String()
	case p.refused:
		l.State = control.LinkRefused
	case p.role == rotation.Server && l.Error == "":
		l.Error = "the peer's rotator has not connected"
	}
	return l
}

func (p *peer) kmsStatus() *control.KMS {
	if p.config.KMS == nil {
		return nil
	}
	k := &control.KMS{State: control.KMSUnknown, URI: p.config.KMS.URIs[0], LastError: p.kmsError, LastKeyAt: p.kmsLast.Round(0)}
	switch {
	case p.kmsError != "":
		k.State = control.KMSFailing
	case !p.kmsLast.IsZero():
		k.State = control.KMSOK
	}
	return k
}

// warnings names what an operator should know of.
func (p *peer) warnings(now time.Time, s *control.PeerStatus, v rotation.View, health rotation.Health) []control.Warning {
	warnings := []control.Warning{}
	warn := func(when bool, code control.Code, detail string) {
		if when {
			warnings = append(warnings, control.Warn(code, detail))
		}
	}
	stopped := s.Link.Error
	if v.PeerStopped {
		stopped = cmp.Or("the peer's rotator said goodbye", stopped)
	}
	warn(s.Link.State == control.LinkDown, control.LinkIsDown, stopped)
	warn(s.Link.State == control.LinkRefused, control.LinkIsRefused, s.Link.Error)
	warn(len(s.Differences) > 0, control.ParametersDiffer, "")
	warn(s.KMS != nil && s.KMS.State == control.KMSFailing, control.KMSFails, p.kmsError)
	warn(!v.Found && v.Sources != 0 && v.Sources != p.allSources(), control.SourcesReduced, "")
	warn(s.Buffer.Len == 0 && s.State == control.PeerProtected && health.LastError != "", control.BufferEmpty, health.LastError)
	warn(s.State == control.PeerRepairing, control.KeysDiffer, "")
	warn(p.aging(now, s, &v), control.KeyAging, p.aged(now, &v))
	warn(s.State == control.PeerStale, control.KeyStale, health.LastError)
	warn(s.State == control.PeerBlocked, control.TunnelBlocked, health.LastError)
	tried := s.State == control.PeerHunting // not more than that
	warn(v.Found && !v.Recovery && v.Confirmed.Serial != 0 && !tried, control.FallbackUsed, "")
	warn(v.Recovery && !tried, control.RecoveryKey, "")
	warn(v.NoPSK, control.NoFallback, "")
	warn(v.Foreign == 1 && now.Sub(p.foreignAt) < recently, control.ForeignChange, "undone")
	warn(v.Foreign > 1 && now.Sub(p.foreignAt) < recently, control.ForeignTool, fmt.Sprintf("%d times", v.Foreign))
	warn(s.State == control.PeerMissing && p.deviceError == "", control.PeerIsMissing, "")
	warn(s.State == control.PeerMissing && p.deviceError != "", control.InterfaceMissing, p.deviceError)
	// Without a session there is no handshake that could confirm it.
	live := v.Handshake >= 0 && v.Handshake < rotation.SessionLife
	warn(live && !v.Found && !v.Since.IsZero() && v.Installed != v.Confirmed && now.Sub(v.Since) > recently, control.KeyUnconfirmed, "")
	warn(v.Failing, control.NoHandshake, "")
	warn(v.LastError != "" && p.journalError == "", control.WireGuardFails, v.LastError)
	warn(p.journalError != "", control.JournalFails, p.journalError)
	warn(p.config.Recovery == config.RecoveryManual, control.ManualRecovery, "")
	warn(!p.jumpedAt.IsZero() && now.Sub(p.jumpedAt) < recently && s.HandshakeAge == nil, control.TimeJumped, "")
	return warnings
}

// aging reports whether the installed key will be stale soon, and is not yet.
func (p *peer) aging(now time.Time, s *control.PeerStatus, v *rotation.View) bool {
	if v.Found || v.Since.IsZero() || s.State == control.PeerStale || s.State == control.PeerBlocked {
		return false
	}
	return now.Sub(v.Since) >= rotation.AgingAt(p.config.MaxKeyAge)
}

// aged says what becomes of a tunnel whose key becomes stale, and when.
func (p *peer) aged(now time.Time, v *rotation.View) string {
	left := max(0, p.config.MaxKeyAge-now.Sub(v.Since)).Round(time.Second)
	if p.config.OnStale == config.StaleBlock {
		return fmt.Sprintf("the tunnel will be blocked in %v", left)
	}
	return fmt.Sprintf("it will be stale in %v", left)
}

func (p *peer) allSources() wire.Sources {
	all := wire.Sources(1<<len(p.config.KEMs)-1) << 1
	if p.config.KMS != nil {
		all |= 1
	}
	return all
}
