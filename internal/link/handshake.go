package link

import (
	"context"
	"crypto/ed25519"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"syscall"
)

// groups are the key exchanges that a link accepts: hybrid ones, and no other.
var groups = []tls.CurveID{tls.X25519MLKEM768, tls.SecP384r1MLKEM1024}

func (id *Identity) configureTLS() error {
	certificate, err := id.certificate()
	if err != nil {
		return err
	}
	id.server = &tls.Config{
		Certificates:           []tls.Certificate{certificate},
		MinVersion:             tls.VersionTLS13,
		MaxVersion:             tls.VersionTLS13,
		CurvePreferences:       groups,
		NextProtos:             []string{Protocol},
		SessionTicketsDisabled: true, // each connection proves both ends anew
		// A certificate from any authority or none: the pins decide, after
		// the proofs.
		ClientAuth:       tls.RequireAnyClientCert,
		VerifyConnection: checkTLS,
	}
	id.client = id.server.Clone()
	// Not skipped but replaced: names and authorities mean nothing here, and
	// the pins are checked against both of the server's keys in Client. That
	// the server holds the certificate's key TLS checks all the same.
	id.client.InsecureSkipVerify = true
	return nil
}

// checkTLS is run at both ends within the TLS handshake. Without it, a client
// that offers no ALPN would pass, and so would chains and other kinds of keys.
func checkTLS(cs tls.ConnectionState) error {
	switch {
	case cs.Version != tls.VersionTLS13 || !slices.Contains(groups, cs.CurveID):
		return errors.New("not TLS 1.3 with a hybrid group")
	case cs.NegotiatedProtocol != Protocol:
		return fmt.Errorf("other end does not speak %q", Protocol)
	case len(cs.PeerCertificates) != 1:
		return fmt.Errorf("%d certificates, not one", len(cs.PeerCertificates))
	case len(cs.PeerCertificates[0].Raw) > maxCertificate:
		return fmt.Errorf("certificate is longer than %d bytes", maxCertificate)
	}
	if _, ok := cs.PeerCertificates[0].PublicKey.(ed25519.PublicKey); !ok {
		return errors.New("certificate is not for an Ed25519 key")
	}
	return nil
}

// Dial connects to the rotator at addr (host:port; a name is resolved anew
// each time), which must prove that it is one of pins. It gives up when ctx
// ends, and after HandshakeTimeout in all.
func Dial(ctx context.Context, addr string, self *Identity, pins Pins) (*Conn, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, HandshakeTimeout, ErrHandshakeTimeout)
	defer cancel()
	var dialer net.Dialer
	raw, err := dialer.DialContext(ctx, "tcp", addr)
	if err != nil {
		return nil, err
	}
	return Client(ctx, raw, self, pins)
}

// Client runs the client's end of the handshake on raw, which it owns from
// then on and closes if it returns an error.
func Client(ctx context.Context, raw net.Conn, self *Identity, pins Pins) (*Conn, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, HandshakeTimeout, ErrHandshakeTimeout)
	defer cancel()
	return establish(ctx, raw, func(m *metered) (*tls.Conn, Fingerprint, error) {
		return clientHandshake(tls.Client(m, self.client), self, pins)
	})
}

// server runs the server's end. Its caller's ctx carries the deadline.
func server(ctx context.Context, raw net.Conn, self *Identity, known func(Fingerprint) bool) (*Conn, error) {
	return establish(ctx, raw, func(m *metered) (*tls.Conn, Fingerprint, error) {
		return serverHandshake(tls.Server(m, self.server), self, known)
	})
}

// establish carries a handshake out under ctx and the limit on bytes.
func establish(ctx context.Context, raw net.Conn, handshake func(*metered) (*tls.Conn, Fingerprint, error)) (*Conn, error) {
	stop := context.AfterFunc(ctx, func() { _ = raw.Close() })
	m := &metered{Conn: raw, left: maxBeforeIdentity}
	secured, peer, err := handshake(m)
	if !stop() {
		err = context.Cause(ctx) // whatever the closed connection said
	}
	if err != nil {
		// To the other end every refusal after TLS looks the same: a close.
		_ = raw.Close()
		return nil, err
	}
	m.left = unmetered
	return &Conn{raw: m, tls: secured, peer: peer, silence: DefaultSilence}, nil
}

// clientHandshake names the server in its proof before it has seen the
// server's: it takes the certificate's claim, which must be one of the pins,
// and holds the server to it.
func clientHandshake(c *tls.Conn, self *Identity, pins Pins) (*tls.Conn, Fingerprint, error) {
	s, peerKey, claim, err := handshakeTLS(c)
	if errors.Is(err, io.EOF) {
		err = fmt.Errorf("%w; it may be no rotator, or have too many connections", err)
	}
	if err != nil {
		return nil, Fingerprint{}, err
	}
	if !pins.Contains(claim) {
		return nil, Fingerprint{}, fmt.Errorf("%w: %s", ErrUnknownPeer, claim)
	}
	s.signer, s.client, s.server = roleClient, self.fingerprint, claim
	if err := sendProof(c, self, s); err != nil {
		return nil, Fingerprint{}, err
	}
	p, err := receiveProof(c)
	if errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET) {
		err = ErrRefused
	}
	if err != nil {
		return nil, Fingerprint{}, err
	}
	if peer := fingerprintOf(peerKey, p.public); peer != claim {
		return nil, Fingerprint{}, fmt.Errorf("%w: %s, under the name of %s", ErrUnknownPeer, peer, claim)
	}
	s.signer = roleServer
	if err := p.verify(s); err != nil {
		return nil, Fingerprint{}, fmt.Errorf("%w: %s", err, claim)
	}
	return c, claim, nil
}

// serverHandshake gives a stranger nothing but its certificate: its own proof
// goes out after the client's was found good.
func serverHandshake(c *tls.Conn, self *Identity, known func(Fingerprint) bool) (*tls.Conn, Fingerprint, error) {
	s, peerKey, _, err := handshakeTLS(c)
	if err != nil {
		return nil, Fingerprint{}, err
	}
	p, err := receiveProof(c)
	if errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET) {
		err = errLeft
	}
	if err != nil {
		return nil, Fingerprint{}, err
	}
	peer := fingerprintOf(peerKey, p.public)
	if !known(peer) {
		return nil, Fingerprint{}, fmt.Errorf("%w: %s", ErrUnknownPeer, peer)
	}
	s.signer, s.client, s.server = roleClient, peer, self.fingerprint
	if err := p.verify(s); err != nil {
		return nil, Fingerprint{}, fmt.Errorf("%w: %s", err, peer)
	}
	s.signer = roleServer
	if err := sendProof(c, self, s); err != nil {
		return nil, Fingerprint{}, err
	}
	return c, peer, nil
}

// handshakeTLS returns a statement that lacks all but the exporter, the other
// end's Ed25519 key, and the fingerprint that its certificate claims (zero
// where it claims none).
func handshakeTLS(c *tls.Conn) (*statement, ed25519.PublicKey, Fingerprint, error) {
	fail := func(err error) (*statement, ed25519.PublicKey, Fingerprint, error) {
		return nil, nil, Fingerprint{}, fmt.Errorf("tls handshake: %w", inWords(err))
	}
	if err := c.Handshake(); err != nil {
		return fail(err)
	}
	cs := c.ConnectionState()
	exporter, err := cs.ExportKeyingMaterial(labelExporter, nil, exporterSize)
	if err != nil {
		return fail(err)
	}
	leaf := cs.PeerCertificates[0] // there is one, for an Ed25519 key: checkTLS
	claim, err := ParseFingerprint(leaf.Subject.CommonName)
	if err != nil {
		claim = Fingerprint{} // matches no pin
	}
	s := new(statement)
	copy(s.exporter[:], exporter)
	return s, leaf.PublicKey.(ed25519.PublicKey), claim, nil
}

func sendProof(c *tls.Conn, self *Identity, s *statement) error {
	p, err := self.prove(s)
	if err != nil {
		return fmt.Errorf("sign proof: %w", err)
	}
	if _, err := c.Write(appendFrame(nil, p.encode())); err != nil {
		return fmt.Errorf("send proof: %w", err)
	}
	return nil
}

func receiveProof(c *tls.Conn) (*proof, error) {
	b, err := readFrame(c, func() {})
	if err != nil {
		return nil, fmt.Errorf("receive proof: %w", inWords(err))
	}
	return decodeProof(b)
}

const unmetered = -1

// metered ends a connection that has sent more than a handshake takes: Go's
// TLS alone would hold a certificate message of 256 KiB for a stranger.
type metered struct {
	net.Conn
	left int // bytes; unmetered once both ends have proved themselves
}

func (m *metered) Read(b []byte) (int, error) {
	if m.left == unmetered {
		return m.Conn.Read(b)
	}
	if m.left == 0 {
		return 0, fmt.Errorf("more than %d bytes before a proof of identity", maxBeforeIdentity)
	}
	n, err := m.Conn.Read(b[:min(len(b), m.left)])
	m.left -= n
	return n, err
}
