package rotation

import (
	"encoding/base64"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"keyturn/internal/psk"
	"keyturn/internal/wire"
)

// bootstrap is the part of a KeyGenerator that agrees with the peer.
type bootstrap struct {
	attempt  uint64    // of the last Init sent (client) or answered (server)
	answered bool      // the client's last Init was
	due      time.Time // client: when to send the next Init
	ack      *wire.Ack // server: its last answer, repeated if the Init is

	// What the last accepted bootstrap agreed with: a reconnect keeps the
	// buffer only where nothing of it changed.
	peerBoot   wire.BootID
	parameters wire.Parameters
}

// linkUp starts afresh on a new link. The buffer waits for the bootstrap.
func (g *KeyGenerator) linkUp(peer [32]byte) {
	g.linkDown()
	g.tunnel.peer = peer
	g.tunnel.linked = true
	g.failures, g.notBefore = 0, time.Time{}
	g.boot.due = g.now
}

func (g *KeyGenerator) linkDown() {
	t := g.tunnel
	t.linked, t.accepted, t.session, t.peerHeld = false, false, wire.SessionID{}, nil // the differences stay visible
	g.boot.ack, g.boot.answered = nil, false
	g.dropRounds()
	t.changed = true
}

// sendInit is B1.
func (g *KeyGenerator) sendInit() {
	g.boot.attempt++
	g.boot.answered = false
	g.boot.due = g.now.Add(initRetry)
	g.send(&wire.Init{
		Attempt:    g.boot.attempt,
		Boot:       g.tunnel.config.Boot,
		High:       g.tunnel.high,
		Parameters: g.parameters(),
		Held:       limit(g.tunnel.held()),
	})
}

func (g *KeyGenerator) parameters() wire.Parameters {
	p := g.tunnel.config.Parameters
	p.Initial = g.tunnel.initial
	return p
}

// init is B2: the server compares, opens a session in any case, and answers.
func (g *KeyGenerator) init(m *wire.Init) {
	t := g.tunnel
	if t.config.Role != Server {
		g.refuse(SameRole(Client))
		return
	}
	if !t.bootable() {
		return // the client asks again
	}
	if g.boot.ack != nil && m.Boot == t.peerBoot {
		if m.Attempt == g.boot.attempt {
			g.send(g.boot.ack)
		}
		if m.Attempt <= g.boot.attempt {
			return
		}
	}
	own := g.parameters()
	differences := Compare(&m.Parameters, &own)
	kept := len(differences) == 0 && m.Boot == g.boot.peerBoot && equal(&m.Parameters, &g.boot.parameters)

	g.boot.attempt = m.Attempt
	g.dropRounds()
	_, _ = io.ReadFull(t.config.Random, t.session[:])
	t.peerBoot, t.peerHeld = m.Boot, m.Held
	t.raise(m.High)
	g.reconcile(kept, m.Held)
	g.boot.ack = &wire.Ack{
		Attempt: m.Attempt, Session: t.session, Boot: t.config.Boot, High: t.high,
		Parameters: own, Held: limit(t.held()), Kept: kept, Differences: differences,
	}
	g.send(g.boot.ack)
	g.agreed(differences, m.Boot, m.Parameters)
}

// ack is B3: the client compares as well, and adopts the session.
func (g *KeyGenerator) ack(m *wire.Ack) {
	t := g.tunnel
	if t.config.Role != Client {
		// A server that asks whether this is one too (5.2); it does not answer.
		g.send(&wire.Ack{Attempt: m.Attempt, Boot: t.config.Boot, Parameters: g.parameters(), Differences: SameRole(Server)})
		g.refuse(SameRole(Server))
		return
	}
	if m.Attempt != g.boot.attempt || g.boot.answered {
		return
	}
	own := g.parameters()
	differences := m.Differences
	if len(differences) == 0 {
		differences = Compare(&own, &m.Parameters)
	}
	g.boot.answered = true
	g.dropRounds()
	t.session, t.peerBoot, t.peerHeld = m.Session, m.Boot, m.Held
	t.raise(m.High)
	g.reconcile(m.Kept && m.Boot == g.boot.peerBoot, m.Held)
	g.agreed(differences, m.Boot, m.Parameters)
}

// SameRole is the difference of two ends that are both client, or both server.
func SameRole(r Role) []wire.Difference {
	return []wire.Difference{{Field: "role", Client: r.String(), Server: r.String()}}
}

// roleConflict refuses what was learnt of the peer without a link. A link that
// a server has got meanwhile is a client's.
func (g *KeyGenerator) roleConflict() {
	if t := g.tunnel; t.config.Role == Client || !t.linked {
		g.refuse(SameRole(t.config.Role))
	}
}

// reconcile is B4: after a mere reconnect, keys that both name are kept;
// otherwise the buffer is emptied. The scheduler's keys are its own.
func (g *KeyGenerator) reconcile(kept bool, held []wire.Named) {
	if !kept {
		held = nil
	}
	g.tunnel.buffer.retain(func(n wire.Named) bool { return contains(held, n) })
}

// agreed ends a bootstrap, with or without success.
func (g *KeyGenerator) agreed(differences []wire.Difference, boot wire.BootID, p wire.Parameters) {
	t := g.tunnel
	t.changed = true
	if len(differences) > 0 {
		g.boot.peerBoot = wire.BootID{}
		g.refuse(differences)
		return
	}
	g.boot.peerBoot, g.boot.parameters = boot, p
	t.accepted, t.differences = true, nil
	g.note(NoteBootstrapped, none, "session "+t.session.String())
}

func (g *KeyGenerator) refuse(differences []wire.Difference) {
	t := g.tunnel
	known := slices.Equal(t.differences, differences) // on an earlier link
	t.accepted, t.differences = false, differences
	t.changed = true
	if known {
		return
	}
	g.note(NoteRefused, none, DescribeDifferences(t.config.Role, differences))
}

// otherVersion answers a bootstrap message that only names its version.
func (g *KeyGenerator) otherVersion(version uint16) {
	t := g.tunnel
	own := g.parameters()
	client, server := roles(t.config.Role, fmt.Sprint(own.Version), fmt.Sprint(version))
	differences := []wire.Difference{{Field: "version", Client: client, Server: server}}
	if t.config.Role == Server {
		g.send(&wire.Ack{Boot: t.config.Boot, Parameters: own, Differences: differences})
	}
	g.boot.answered = true
	g.refuse(differences)
}

// strange is B5: the client starts the bootstrap again where the server keeps
// speaking of another session.
func (g *KeyGenerator) strange() {
	if g.tunnel.config.Role == Client && g.boot.answered && !g.now.Before(g.boot.due) {
		g.sendInit()
	}
}

// DescribeDifferences names every difference in one line, this end's value first.
func DescribeDifferences(r Role, differences []wire.Difference) string {
	texts := make([]string, 0, len(differences))
	for _, d := range differences {
		own, peer := d.Client, d.Server
		if r == Server {
			own, peer = peer, own
		}
		texts = append(texts, fmt.Sprintf("%s: ours %q, theirs %q", d.Field, own, peer))
	}
	return strings.Join(texts, "; ")
}

// Compare names every parameter on which a client and a server disagree, in
// the order of docs/PROTOCOL.md, 5.2.
func Compare(client, server *wire.Parameters) []wire.Difference {
	var all []wire.Difference
	differ := func(field, c, s string) {
		if c != s {
			all = append(all, wire.Difference{Field: field, Client: printable(c), Server: printable(s)})
		}
	}
	key := func(b [32]byte) string { return base64.StdEncoding.EncodeToString(b[:]) }
	yes := func(b bool) string {
		if b {
			return "yes"
		}
		return "no"
	}
	differ("version", fmt.Sprint(client.Version), fmt.Sprint(server.Version))
	differ("sae of the client", client.SAE, server.PeerSAE)
	differ("sae of the server", client.PeerSAE, server.SAE)
	differ("public_key of the client", key(client.PublicKey), key(server.PeerPublicKey))
	differ("public_key of the server", key(client.PeerPublicKey), key(server.PublicKey))
	differ("kms", yes(client.QKD), yes(server.QKD))
	differ("kems", strings.Join(client.KEMs, ","), strings.Join(server.KEMs, ","))
	differ("require", Require(client.Require).String(), Require(server.Require).String())
	differ("combiner", psk.Combiner(client.Combiner).String(), psk.Combiner(server.Combiner).String())
	differ("buffer", fmt.Sprint(client.Buffer), fmt.Sprint(server.Buffer))
	differ("window", client.Window.String(), server.Window.String())
	if client.Initial != server.Initial {
		all = append(all, wire.Difference{Field: "fallback", Client: client.Initial.String(), Server: server.Initial.String()})
	}
	return all
}

// printable bounds a value for a Difference.
func printable(s string) string {
	const most = 200
	if len(s) > most {
		s = s[:most] + "..."
	}
	return wire.Text(s)
}

func equal(a, b *wire.Parameters) bool {
	x, y := *a, *b
	x.KEMs, y.KEMs = nil, nil
	return fmt.Sprint(x) == fmt.Sprint(y) && slices.Equal(a.KEMs, b.KEMs)
}

// limit bounds a list of keys to what a message carries. The newest are kept,
// and the recovery key or PSK found, of which the other end has no other word.
func limit(names []wire.Named) []wire.Named {
	slices.SortFunc(names, func(a, b wire.Named) int {
		if a.Serial != b.Serial {
			if a.Serial < b.Serial {
				return -1
			}
			return 1
		}
		return slices.Compare(a.Fingerprint[:], b.Fingerprint[:])
	})
	names = slices.Compact(names)
	over := max(0, len(names)-wire.MaxHeld)
	if over > 0 && names[0].Serial == 0 {
		return slices.Delete(names, 1, 1+over)
	}
	return names[over:]
}
