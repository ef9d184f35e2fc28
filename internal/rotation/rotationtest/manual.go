package rotationtest

import (
	"time"

	"keyturn/internal/psk"
	"keyturn/internal/rotation"
	"keyturn/internal/wire"
)

// Waiting returns the messages that wait for an end, the oldest first
// (Manual). Whoever changes one plays a peer that does not keep to the protocol.
func (w *World) Waiting(to int) []wire.Message {
	var all []wire.Message
	for _, s := range w.Link.waiting[to] {
		if s.number == w.Link.number && w.Link.up[to] {
			all = append(all, s.message)
		}
	}
	return all
}

// Play lets d of virtual time pass in which messages and KMS answers come by
// themselves, those that wait first (Manual).
func (w *World) Play(d time.Duration) {
	w.Manual = false
	for w.Answer() || w.Deliver(Server) || w.Deliver(Client) {
	}
	w.Run(d)
	w.Manual = true
}

// Stop is the operator's `down`: the rotator says goodbye and ends.
func (e *End) Stop() {
	if !e.up {
		return
	}
	e.scheduler(rotation.Stop{})
	if !e.world.Until(time.Second, e.sched.Stopped) {
		e.scheduler(rotation.Stop{})
	}
	e.up = false
	e.life++
	e.world.trace("%s: stops", names[e.index])
}

// Version hands an end a bootstrap message of another protocol version.
func (e *End) Version(v uint16) {
	e.generator(rotation.OtherVersion{Version: v})
}

// Add lets WireGuard know the peer again, which has lost its session and its
// PSK's changes.
func (e *End) Add() {
	e.Gone = false
	e.reset()
}

// Tunnel returns what the end's two machines share.
func (e *End) Tunnel() *rotation.Tunnel { return e.tunnel }

// InDevice returns the fingerprint of the PSK in WireGuard.
func (e *End) InDevice() psk.Fingerprint { return e.device.psk.Fingerprint() }

// Up reports whether the rotator runs.
func (e *End) Up() bool { return e.up }
