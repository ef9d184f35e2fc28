package link

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"slices"
	"testing"
)

// testIdentity returns the identity whose secret is n and 31 zeros.
func testIdentity(t testing.TB, n byte) *Identity {
	t.Helper()
	id, err := newIdentity(&[SecretSize]byte{n})
	if err != nil {
		t.Fatal(err)
	}
	return id
}

// without returns what an attacker can do who holds id's Ed25519 key, as one
// with a quantum computer would, and its public keys, but signs with the
// ML-DSA key of another.
func without(id, other *Identity) *Identity {
	return &Identity{
		ed25519:     id.ed25519,
		mldsa:       other.mldsa,
		mldsaPublic: id.mldsaPublic,
		fingerprint: id.fingerprint,
		client:      id.client,
		server:      id.server,
	}
}

// withOther is the same with the other's ML-DSA public key shown as well.
func withOther(id, other *Identity) *Identity {
	forged := without(id, other)
	forged.mldsaPublic = other.mldsaPublic
	return forged
}

func knows(pins ...*Identity) func(Fingerprint) bool {
	return func(f Fingerprint) bool {
		return slices.ContainsFunc(pins, func(id *Identity) bool { return id.fingerprint == f })
	}
}

// pipe returns two ends of a link over net.Pipe, for use in a synctest bubble.
func pipe(t *testing.T) (client, srv *Conn) {
	t.Helper()
	a, b := testIdentity(t, 1), testIdentity(t, 2)
	rawClient, rawServer := net.Pipe()
	type result struct {
		conn *Conn
		err  error
	}
	served := make(chan result)
	go func() {
		conn, err := server(t.Context(), rawServer, b, knows(a))
		served <- result{conn, err}
	}()
	client, err := Client(t.Context(), rawClient, a, Pins{b.fingerprint})
	r := <-served
	if err != nil || r.err != nil {
		t.Fatalf("client: %v, server: %v", err, r.err)
	}
	t.Cleanup(func() { _ = client.Close(); _ = r.conn.Close() })
	return client, r.conn
}

// hub is a listener on loopback that echoes every frame, and a bystander: a
// link that must not notice what others do.
type hub struct {
	*Listener
	self, peer *Identity
	rejected   chan error
	bystander  *Conn
}

func newHub(t *testing.T) *hub {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	h := &hub{self: testIdentity(t, 1), peer: testIdentity(t, 2), rejected: make(chan error, 16)}
	h.Listener = NewListener(ln, h.self, knows(h.peer),
		WithRejected(func(_ net.Addr, err error) { h.rejected <- err }))
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for {
			c, err := h.Accept(context.Background())
			if err != nil {
				return
			}
			go echo(c)
		}
	}()
	t.Cleanup(func() {
		if err := h.Close(); err != nil {
			t.Error(err)
		}
		<-ended
	})
	h.bystander = h.dial(t)
	return h
}

func echo(c *Conn) {
	for {
		b, err := c.Receive()
		if err != nil || c.Send(b) != nil {
			_ = c.Close()
			return
		}
	}
}

func (h *hub) dial(t *testing.T) *Conn {
	t.Helper()
	c, err := Dial(t.Context(), h.Addr().String(), h.peer, Pins{h.self.fingerprint})
	if err != nil {
		t.Fatalf("dial: %v", err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

// undisturbed checks that the bystander's link works and that a peer gets in.
func (h *hub) undisturbed(t *testing.T) {
	t.Helper()
	exchange(t, h.bystander)
	exchange(t, h.dial(t))
	select {
	case err := <-h.rejected:
		t.Errorf("rejected besides: %v", err)
	default:
	}
}

func exchange(t *testing.T, c *Conn) {
	t.Helper()
	if err := c.Send([]byte("ping")); err != nil {
		t.Fatalf("send: %v", err)
	}
	if b, err := c.Receive(); err != nil || string(b) != "ping" {
		t.Fatalf("received %q, %v", b, err)
	}
}

// tlsClient connects to addr by bare TLS, with id's configuration as changed
// by edit, and completes the handshake as far as it goes.
func tlsClient(t *testing.T, addr string, id *Identity, edit func(*tls.Config)) (*tls.Conn, error) {
	t.Helper()
	raw, err := new(net.Dialer).DialContext(t.Context(), "tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = raw.Close() })
	config := id.client.Clone()
	config.VerifyConnection = nil
	edit(config)
	c := tls.Client(raw, config)
	err = c.Handshake()
	return c, err
}

func wantSaid(t *testing.T, err error, want string) {
	t.Helper()
	if err == nil || err.Error() != want {
		t.Errorf("got error %v, want %s", err, want)
	}
}

func wantIs(t *testing.T, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("got error %v, want %v", err, want)
	}
}
