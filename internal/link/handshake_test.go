package link

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"math/big"
	"net"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"filippo.io/mldsa"
)

func TestMutualAuthentication(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	a, b := testIdentity(t, 1), testIdentity(t, 2)
	l := NewListener(ln, a, knows(b))
	defer func() { _ = l.Close() }()
	client, err := Dial(t.Context(), l.Addr().String(), b, Pins{a.fingerprint})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = client.Close() }()
	srv, err := l.Accept(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = srv.Close() }()

	if client.Peer() != a.Fingerprint() || srv.Peer() != b.Fingerprint() {
		t.Errorf("client sees %v, server sees %v", client.Peer(), srv.Peer())
	}
	if client.RemoteAddr().String() != srv.LocalAddr().String() || client.LocalAddr().String() != srv.RemoteAddr().String() {
		t.Error("the ends disagree on their addresses")
	}
	state := client.tls.ConnectionState()
	if state.Version != tls.VersionTLS13 || state.CurveID != tls.X25519MLKEM768 || state.DidResume {
		t.Errorf("version %x, group %v, resumed %v", state.Version, state.CurveID, state.DidResume)
	}
	for _, size := range []int{1, 1000, MaxFrame, MaxFrame, MaxFrame} { // more than maxBeforeIdentity
		sent := []byte(strings.Repeat("x", size))
		for _, ends := range [][2]*Conn{{client, srv}, {srv, client}} {
			if err := ends[0].Send(sent); err != nil {
				t.Fatal(err)
			}
			if got, err := ends[1].Receive(); err != nil || string(got) != string(sent) {
				t.Fatalf("%d bytes: received %d bytes, %v", size, len(got), err)
			}
		}
	}
}

// An end that prefers the other group is served as well.
func TestSecondGroup(t *testing.T) {
	h := newHub(t)
	c, err := tlsClient(t, h.Addr().String(), h.peer, func(config *tls.Config) {
		config.CurvePreferences = []tls.CurveID{tls.SecP384r1MLKEM1024}
	})
	if err != nil {
		t.Fatal(err)
	}
	if group := c.ConnectionState().CurveID; group != tls.SecP384r1MLKEM1024 {
		t.Errorf("group %v", group)
	}
	_, err = c.Write(appendFrame(nil, make([]byte, proofSize)))
	if err != nil {
		t.Fatal(err)
	}
	wantIs(t, <-h.rejected, ErrUnknownPeer) // that far it came
}

func TestSecondPin(t *testing.T) {
	h := newHub(t)
	stranger := testIdentity(t, 9)
	for _, pins := range []Pins{
		{h.self.fingerprint, stranger.fingerprint},
		{stranger.fingerprint, h.self.fingerprint},
	} {
		c, err := Dial(t.Context(), h.Addr().String(), h.peer, pins)
		if err != nil {
			t.Fatal(err)
		}
		if c.Peer() != h.self.fingerprint {
			t.Errorf("peer is %v", c.Peer())
		}
		_ = c.Close()
	}
}

// Whoever dials without being a peer is turned away for the reason given, and
// nobody else notices.
func TestServerTurnsAway(t *testing.T) {
	dialAs := func(id func(*hub) *Identity) func(*testing.T, *hub) error {
		return func(t *testing.T, h *hub) error {
			_, err := Dial(t.Context(), h.Addr().String(), id(h), Pins{h.self.fingerprint})
			return err
		}
	}
	withTLS := func(edit func(*testing.T, *tls.Config)) func(*testing.T, *hub) error {
		return func(t *testing.T, h *hub) error {
			c, err := tlsClient(t, h.Addr().String(), h.peer, func(c *tls.Config) { edit(t, c) })
			if err == nil { // a TLS 1.3 client learns of it by the first read
				_, err = c.Read(make([]byte, 1))
			}
			return err
		}
	}
	withBytes := func(sent string) func(*testing.T, *hub) error {
		return func(t *testing.T, h *hub) error {
			c, err := new(net.Dialer).DialContext(t.Context(), "tcp", h.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = c.Close() }()
			_, _ = io.WriteString(c, sent) // a reset can come half way
			_ = c.(*net.TCPConn).CloseWrite()
			_, _ = io.Copy(io.Discard, c)
			return io.EOF
		}
	}
	// A client hello that announces 65,535 bytes, all of which Go's TLS would
	// read and hold.
	endless := "\x16\x03\x01\x40\x00\x01\x00\xff\xff" + strings.Repeat("a", 16380) +
		strings.Repeat("\x16\x03\x01\x40\x00"+strings.Repeat("a", 16384), 2)

	for _, tt := range []struct {
		name   string
		attack func(*testing.T, *hub) error
		is     error  // of what the listener reports
		text   string // in what the listener reports
		sees   error  // what the client gets
	}{
		{"unknown client", dialAs(func(*hub) *Identity { return testIdentity(t, 9) }), ErrUnknownPeer, "", ErrRefused},
		{"right Ed25519 key, other ML-DSA key", dialAs(func(h *hub) *Identity { return withOther(h.peer, testIdentity(t, 9)) }), ErrUnknownPeer, "", ErrRefused},
		{"right public keys, other ML-DSA signature", dialAs(func(h *hub) *Identity { return without(h.peer, testIdentity(t, 9)) }), ErrProof, "", ErrRefused},
		{"right ML-DSA key, other Ed25519 key", dialAs(func(h *hub) *Identity {
			forged := withOther(h.peer, h.peer)
			forged.client = testIdentity(t, 9).client
			return forged
		}), ErrUnknownPeer, "", ErrRefused},
		{"plain text", withBytes("GET / HTTP/1.1\r\nHost: hub\r\n\r\n"), nil, "does not look like a TLS handshake", nil},
		{"endless handshake", withBytes(endless), nil, "before a proof of identity", nil},
		{"nothing", withBytes(""), io.EOF, "tls handshake: other end closed the connection", nil},
		{"half a record", withBytes(endless[:100]), io.ErrUnexpectedEOF, "closed the connection in the middle of a message", nil},
		{"no pin for us", func(t *testing.T, h *hub) error {
			_, err := Dial(t.Context(), h.Addr().String(), h.peer, Pins{testIdentity(t, 9).fingerprint})
			return err
		}, errLeft, "it may not know our identity", ErrUnknownPeer},
		{"TLS 1.2", withTLS(func(_ *testing.T, c *tls.Config) {
			c.MinVersion, c.MaxVersion, c.CurvePreferences = tls.VersionTLS12, tls.VersionTLS12, nil
		}), nil, "unsupported versions", nil},
		{"no post-quantum group", withTLS(func(_ *testing.T, c *tls.Config) {
			c.CurvePreferences = []tls.CurveID{tls.X25519}
		}), nil, "no key exchanges supported", nil},
		{"hybrid group of another kind", withTLS(func(_ *testing.T, c *tls.Config) {
			c.CurvePreferences = []tls.CurveID{tls.SecP256r1MLKEM768}
		}), nil, "no key exchanges supported", nil},
		{"no ALPN", withTLS(func(_ *testing.T, c *tls.Config) { c.NextProtos = nil }), nil, `does not speak "keyturn/1"`, nil},
		{"other ALPN", withTLS(func(_ *testing.T, c *tls.Config) { c.NextProtos = []string{"h2"} }), nil, "unsupported application protocols", nil},
		{"no certificate", withTLS(func(_ *testing.T, c *tls.Config) { c.Certificates = nil }), nil, "didn't provide a certificate", nil},
		{"two certificates", withTLS(func(_ *testing.T, c *tls.Config) {
			own := c.Certificates[0]
			own.Certificate = append(own.Certificate[:1:1], own.Certificate[0])
			c.Certificates = []tls.Certificate{own} // the old ones are not ours to change
		}), nil, "2 certificates", nil},
		{"long certificate", withTLS(func(t *testing.T, c *tls.Config) {
			key := testIdentity(t, 2).ed25519
			c.Certificates = []tls.Certificate{certificateFor(t, key, strings.Repeat("a", maxCertificate))}
		}), nil, "longer than 2048 bytes", nil},
		{"ECDSA certificate", withTLS(func(t *testing.T, c *tls.Config) {
			key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
			if err != nil {
				t.Fatal(err)
			}
			c.Certificates = []tls.Certificate{certificateFor(t, key, "peer")}
		}), nil, "not for an Ed25519 key", nil},
		{"RSA certificate", withTLS(func(t *testing.T, c *tls.Config) {
			key, err := rsa.GenerateKey(rand.Reader, 2048)
			if err != nil {
				t.Fatal(err)
			}
			c.Certificates = []tls.Certificate{certificateFor(t, key, "peer")}
		}), nil, "not for an Ed25519 key", nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h := newHub(t)
			err := tt.attack(t, h)
			if err == nil {
				t.Error("the attack sees no error")
			}
			if tt.sees != nil {
				wantIs(t, err, tt.sees)
			}
			reported := <-h.rejected
			if tt.is != nil {
				wantIs(t, reported, tt.is)
			}
			if !strings.Contains(reported.Error(), tt.text) {
				t.Errorf("reported %q, want %q in it", reported, tt.text)
			}
			h.undisturbed(t)
		})
	}
}

// certificateFor returns a self-signed certificate for a key of any kind.
func certificateFor(t *testing.T, key crypto.Signer, organization string) tls.Certificate {
	t.Helper()
	template := &x509.Certificate{SerialNumber: big.NewInt(1)}
	template.Subject.Organization = []string{organization}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// The bytes before the proof are as good as a stranger's, and so is the proof.
func TestServerTurnsAwayFirstFrame(t *testing.T) {
	for name, sent := range map[string][]byte{
		"empty":          {0, 0},
		"oversized":      {0xff, 0xff},
		"other message":  appendFrame(nil, []byte("hello")),
		"longer proof":   appendFrame(nil, make([]byte, proofSize+1)),
		"random bytes":   appendFrame(nil, []byte(strings.Repeat("\xa5", proofSize))),
		"half, and gone": appendFrame(nil, make([]byte, proofSize))[:proofSize/2],
	} {
		t.Run(name, func(t *testing.T) {
			h := newHub(t)
			c, err := tlsClient(t, h.Addr().String(), h.peer, func(*tls.Config) {})
			if err != nil {
				t.Fatal(err)
			}
			if _, err := c.Write(sent); err != nil {
				t.Fatal(err)
			}
			_ = c.CloseWrite()
			if n, err := c.Read(make([]byte, 1)); n != 0 || err == nil {
				t.Errorf("server answered with %d bytes, error %v", n, err)
			}
			<-h.rejected
			h.undisturbed(t)
		})
	}
}

func TestReplayedProof(t *testing.T) {
	h := newHub(t)
	none := func(*tls.Config) {}
	first, err := tlsClient(t, h.Addr().String(), h.peer, none)
	if err != nil {
		t.Fatal(err)
	}
	s := statementOf(t, first)
	s.signer, s.client, s.server = roleClient, h.peer.fingerprint, h.self.fingerprint
	p, err := h.peer.prove(s)
	if err != nil {
		t.Fatal(err)
	}
	frame := appendFrame(nil, p.encode())
	if _, err := first.Write(frame); err != nil {
		t.Fatal(err)
	}
	if _, err := receiveProof(first); err != nil {
		t.Fatalf("the proof is good on its own connection, and yet: %v", err)
	}

	second, err := tlsClient(t, h.Addr().String(), h.peer, none)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := second.Write(frame); err != nil {
		t.Fatal(err)
	}
	if _, err := receiveProof(second); err == nil {
		t.Error("the server answers a replayed proof")
	}
	wantIs(t, <-h.rejected, ErrProof)
	h.undisturbed(t)
}

func statementOf(t *testing.T, c *tls.Conn) *statement {
	t.Helper()
	s, _, _, err := handshakeTLS(c)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// A man in the middle who has broken both Ed25519 keys ends TLS on either side
// and relays the proofs as they are.
func TestRelayedProofs(t *testing.T) {
	h := newHub(t)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = ln.Close() }()
	relayed := make(chan error, 1)
	go func() {
		raw, err := ln.Accept()
		if err != nil {
			relayed <- err
			return
		}
		towardsClient := tls.Server(raw, h.self.server)
		defer func() { _ = towardsClient.Close() }()
		towardsServer, err := tls.Dial("tcp", h.Addr().String(), h.peer.client)
		if err != nil {
			relayed <- err
			return
		}
		defer func() { _ = towardsServer.Close() }()
		frame, err := readFrame(towardsClient, func() {})
		if err == nil {
			_, err = towardsServer.Write(appendFrame(nil, frame))
		}
		relayed <- err
		_, _ = io.Copy(towardsClient, towardsServer)
	}()
	_, err = Dial(t.Context(), ln.Addr().String(), h.peer, Pins{h.self.fingerprint})
	wantIs(t, err, ErrRefused)
	if err := <-relayed; err != nil {
		t.Fatalf("relay: %v", err)
	}
	wantIs(t, <-h.rejected, ErrProof)
	h.undisturbed(t)
}

// A client turns away a server that is not the one it dialled.
func TestClientTurnsAway(t *testing.T) {
	self, peer, other := testIdentity(t, 1), testIdentity(t, 2), testIdentity(t, 9)
	for _, tt := range []struct {
		name   string
		server func(*tls.Conn) error
		config *tls.Config
		want   error
	}{
		{"wrong identity", serveAs(other), other.server, ErrUnknownPeer},
		{"right Ed25519 key, other ML-DSA key", serveAs(withOther(self, other)), self.server, ErrUnknownPeer},
		{"right public keys, other ML-DSA signature", serveAs(without(self, other)), self.server, ErrProof},
		{"right claim, other keys", serveAs(renamed(other, self)), claiming(t, other, self), ErrUnknownPeer},
		{"no claim", serveAs(self), claiming(t, self, nil), ErrUnknownPeer},
		{"client's own proof sent back", func(c *tls.Conn) error {
			frame, err := readFrame(c, func() {})
			if err != nil {
				return err
			}
			_, err = c.Write(appendFrame(nil, frame))
			return err
		}, self.server, ErrUnknownPeer},
		{"client's statement signed by the server's key", proving(self, roleClient, peer), self.server, ErrProof},
		{"proof for another client", proving(self, roleServer, other), self.server, ErrProof},
		{"close in place of a proof", func(c *tls.Conn) error {
			_, err := receiveProof(c)
			return err
		}, self.server, ErrRefused},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				rawClient, rawServer := net.Pipe()
				served := make(chan struct{})
				go func() {
					defer close(served)
					c := tls.Server(rawServer, tt.config)
					_ = tt.server(c) // fails where the client leaves early
					_ = rawServer.Close()
				}()
				_, err := Client(t.Context(), rawClient, peer, Pins{self.fingerprint})
				wantIs(t, err, tt.want)
				<-served
			})
		})
	}
}

// serveAs answers as a server with id's keys does that knows everybody.
func serveAs(id *Identity) func(*tls.Conn) error {
	return func(c *tls.Conn) error {
		_, _, err := serverHandshake(c, id, func(Fingerprint) bool { return true })
		return err
	}
}

// proving answers any client with id's proof in that role towards that client.
func proving(id *Identity, signer role, client *Identity) func(*tls.Conn) error {
	return func(c *tls.Conn) error {
		s, _, _, err := handshakeTLS(c)
		if err != nil {
			return err
		}
		if _, err := receiveProof(c); err != nil {
			return err
		}
		s.signer, s.client, s.server = signer, client.fingerprint, id.fingerprint
		return sendProof(c, id, s)
	}
}

// renamed returns id under the fingerprint of another.
func renamed(id, another *Identity) *Identity {
	forged := withOther(id, id)
	forged.fingerprint = another.fingerprint
	return forged
}

// claiming returns id's configuration as a server with a certificate that
// claims to be another, or nobody.
func claiming(t *testing.T, id, another *Identity) *tls.Config {
	t.Helper()
	config := id.server.Clone()
	if another == nil {
		config.Certificates = []tls.Certificate{certificateFor(t, id.ed25519, "nobody")}
		return config
	}
	certificate, err := renamed(id, another).certificate()
	if err != nil {
		t.Fatal(err)
	}
	config.Certificates = []tls.Certificate{certificate}
	return config
}

// The client's limits are those of the server: its dial fails within TLS
// where the server could do no post-quantum exchange, or is something else.
func TestClientTurnsAwayTLS(t *testing.T) {
	self, peer := testIdentity(t, 1), testIdentity(t, 2)
	for name, edit := range map[string]func(*tls.Config){
		"TLS 1.2": func(c *tls.Config) {
			c.MinVersion, c.MaxVersion, c.CurvePreferences = tls.VersionTLS12, tls.VersionTLS12, nil
		},
		"no post-quantum group": func(c *tls.Config) { c.CurvePreferences = []tls.CurveID{tls.X25519} },
		"no ALPN":               func(c *tls.Config) { c.NextProtos = nil },
		"ECDSA certificate": func(c *tls.Config) {
			key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
			if err != nil {
				t.Fatal(err)
			}
			c.Certificates = []tls.Certificate{certificateFor(t, key, "peer")}
		},
	} {
		t.Run(name, func(t *testing.T) {
			ln, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			config := self.server.Clone()
			config.VerifyConnection = nil
			edit(config)
			served := make(chan struct{})
			go func() {
				defer close(served)
				if raw, err := ln.Accept(); err == nil {
					_ = serveAs(self)(tls.Server(raw, config))
					_ = raw.Close()
				}
			}()
			_, err = Dial(t.Context(), ln.Addr().String(), peer, Pins{self.fingerprint})
			if err == nil || !strings.Contains(err.Error(), "tls handshake: ") {
				t.Errorf("got error %v, want one of the TLS handshake", err)
			}
			_ = ln.Close()
			<-served
		})
	}
}

func TestClientDeadlines(t *testing.T) {
	self, peer := testIdentity(t, 1), testIdentity(t, 2)
	cause := errors.New("the rotator stops")
	for _, tt := range []struct {
		name string
		ctx  func(context.Context) (context.Context, context.CancelFunc)
		took time.Duration
		want error
	}{
		{"own deadline", context.WithCancel, HandshakeTimeout, ErrHandshakeTimeout},
		{"caller's deadline", func(ctx context.Context) (context.Context, context.CancelFunc) {
			return context.WithTimeout(ctx, 3*time.Second)
		}, 3 * time.Second, context.DeadlineExceeded},
		{"cancelled", func(ctx context.Context) (context.Context, context.CancelFunc) {
			ctx, cancel := context.WithCancelCause(ctx)
			time.AfterFunc(time.Second, func() { cancel(cause) })
			return ctx, func() { cancel(nil) }
		}, time.Second, cause},
	} {
		for _, tlsFirst := range []bool{false, true} {
			t.Run(tt.name, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					rawClient, rawServer := net.Pipe()
					silent := make(chan struct{})
					go func() { // takes everything, answers at most TLS
						defer close(silent)
						if tlsFirst {
							_ = tls.Server(rawServer, self.server).Handshake()
						}
						_, _ = io.Copy(io.Discard, rawServer)
					}()
					ctx, cancel := tt.ctx(t.Context())
					defer cancel()
					began := time.Now()
					_, err := Client(ctx, rawClient, peer, Pins{self.fingerprint})
					wantIs(t, err, tt.want)
					if took := time.Since(began); took != tt.took {
						t.Errorf("gave up after %v, want %v", took, tt.took)
					}
					<-silent
				})
			})
		}
	}
}

func TestDialNobody(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	_ = ln.Close()
	_, err = Dial(t.Context(), ln.Addr().String(), testIdentity(t, 1), Pins{testIdentity(t, 2).fingerprint})
	if opErr := new(net.OpError); !errors.As(err, &opErr) {
		t.Errorf("got error %v, want that of the dial", err)
	}
}

// What closes at once is said to do so, and what it may be.
func TestDialHangUp(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = ln.Close() }()
	go func() {
		if c, err := ln.Accept(); err == nil {
			_, _ = c.Read(make([]byte, maxBeforeIdentity)) // or it would be a reset
			_ = c.Close()
		}
	}()
	_, err = Dial(t.Context(), ln.Addr().String(), testIdentity(t, 1), Pins{testIdentity(t, 2).fingerprint})
	wantIs(t, err, io.EOF)
	wantSaid(t, err, "tls handshake: other end closed the connection; it may be no rotator, or have too many connections")
}

// The statement is the only thing that ties a proof to its connection, so
// every part of it counts.
func TestProofCoversStatement(t *testing.T) {
	a, b := testIdentity(t, 1), testIdentity(t, 2)
	s := statement{signer: roleClient, client: a.fingerprint, server: b.fingerprint}
	p, err := a.prove(&s)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.verify(&s); err != nil {
		t.Fatal(err)
	}
	for name, edit := range map[string]func(*statement){
		"exporter": func(s *statement) { s.exporter[exporterSize-1] ^= 1 },
		"role":     func(s *statement) { s.signer = roleServer },
		"client":   func(s *statement) { s.client[0] ^= 1 },
		"server":   func(s *statement) { s.server[0] ^= 1 },
	} {
		changed := s
		edit(&changed)
		if err := p.verify(&changed); !errors.Is(err, ErrProof) {
			t.Errorf("%s changed: %v", name, err)
		}
	}
	p.signature, err = a.mldsa.Sign(nil, s.bytes(), &mldsa.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := p.verify(&s); !errors.Is(err, ErrProof) {
		t.Errorf("without the context string: %v", err)
	}
}
