//go:build e2e

package e2e

import (
	"crypto/ed25519"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"filippo.io/mldsa"

	"keyturn/internal/control"
	"keyturn/internal/link"
	"keyturn/internal/psk"
)

// TestHostile: strangers, an impostor who stole half an identity, and a peer
// that talks nonsense are turned away by a hub, while another peer of the hub
// rotates over one link that stays as it is.
func TestHostile(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	hub, good, bad, stranger := l.host("hub"), l.host("lisbon"), l.host("mallory"), l.host("eve")
	connect(hub, good)
	connect(hub, bad)
	good.handshake(hub)
	pings := good.ping(hub)
	serves := settings{"role": "server", "address": nil}
	hub.keyturn("up", hub.write(nil, good.as().with(serves), bad.as().with(serves)))
	good.keyturn("up", good.write(nil, hub.as().with(settings{"role": "client"})))
	last := eventuallyRotated(t, hub, good, psk.Fingerprint{})
	var since time.Time
	linkOf := func(p control.PeerStatus) error {
		if p.Link.State != control.LinkUp {
			return errors.New(string(p.Link.State))
		}
		since = p.Link.Since
		return nil
	}
	hub.towards(good, 5*time.Second, "a link", linkOf)
	before := since

	at := net.JoinHostPort(hub.addr.String(), linkPort)
	theirs, own := readIdentity(t, bad), newIdentity(t)
	halfStolen := identity{ed25519: theirs.ed25519, mldsa: own.mldsa, claim: theirs.claim}
	for _, c := range []struct {
		name string
		from *host
		talk func(net.Conn) error // returns how it was turned away, nil if it was not
	}{
		{"plain text", stranger, func(c net.Conn) error { return say(c, "GET / HTTP/1.0\r\n\r\n") }},
		{"zeros", stranger, func(c net.Conn) error { return say(c, strings.Repeat("\x00", 100)) }},
		{"an endless hello", stranger, func(c net.Conn) error {
			return say(c, "\x16\x03\x01\x40\x00"+strings.Repeat("\x01", 64<<10))
		}},
		{"TLS without a post-quantum exchange", stranger, func(c net.Conn) error {
			return own.tls(c, &tls.Config{CurvePreferences: []tls.CurveID{tls.X25519, tls.CurveP256}}).Handshake()
		}},
		{"TLS 1.2", stranger, func(c net.Conn) error {
			return own.tls(c, &tls.Config{MaxVersion: tls.VersionTLS12}).Handshake()
		}},
		{"another protocol", stranger, func(c net.Conn) error {
			return afterHandshake(own.tls(c, &tls.Config{NextProtos: []string{"h2"}}))
		}},
		{"no certificate", stranger, func(c net.Conn) error {
			none := identity{}
			return afterHandshake(none.tls(c, &tls.Config{}))
		}},
		{"an unknown identity", stranger, func(c net.Conn) error {
			return own.prove(own.tls(c, &tls.Config{}), hub)
		}},
		{"half an identity", stranger, func(c net.Conn) error {
			return halfStolen.prove(halfStolen.tls(c, &tls.Config{}), hub)
		}},
		{"half an identity, the other half without its secret", stranger, func(c net.Conn) error {
			forged := halfStolen
			forged.shown = theirs.mldsa.PublicKey().Bytes()
			return forged.prove(forged.tls(c, &tls.Config{}), hub)
		}},
		{"half an identity and no proof", stranger, func(c net.Conn) error {
			return afterHandshake(halfStolen.tls(c, &tls.Config{}), 0, 1, 'x')
		}},
		{"an empty frame from a stranger", stranger, func(c net.Conn) error {
			return afterHandshake(own.tls(c, &tls.Config{}), 0, 0)
		}},
		{"an oversized frame from a stranger", stranger, func(c net.Conn) error {
			return afterHandshake(own.tls(c, &tls.Config{}), 0xff, 0xff)
		}},
		{"an oversized frame from a peer", bad, func(c net.Conn) error {
			t := theirs.tls(c, &tls.Config{})
			if err := theirs.prove(t, hub); err != nil {
				return fmt.Errorf("%w: %w", errGoodProof, err)
			}
			return send(t, 0xff, 0xff)
		}},
		{"nonsense from a peer", bad, func(c net.Conn) error {
			t := theirs.tls(c, &tls.Config{})
			if err := theirs.prove(t, hub); err != nil {
				return fmt.Errorf("%w: %w", errGoodProof, err)
			}
			return send(t, append([]byte{0, 100}, make([]byte, 100)...)...)
		}},
	} {
		conn, err := c.from.dial("tcp", at)
		if err != nil {
			t.Fatal(err)
		}
		_ = conn.SetDeadline(time.Now().Add(2 * link.HandshakeTimeout))
		err = c.talk(conn)
		if err == nil || errors.Is(err, errGoodProof) || errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("%s: %v", c.name, err)
		}
		conn.Close()
	}

	// The honest peer keeps its link, and comes back, through a crowd.
	stranger.crowd(at)
	good.handshake(hub)
	last = eventuallyRotated(t, hub, good, last)
	hub.towards(good, 5*time.Second, "the same link", linkOf)
	if !since.Equal(before) {
		t.Error("the link of the honest peer was disturbed")
	}
	good.keyturn("down", wg0)
	stranger.crowd(at)
	good.keyturn("up", wg0)
	rotateAgain(t, good, hub, last)
	hub.logs(time.Second, "connection turned away")
	s, err := hub.status()
	if err != nil {
		t.Fatal(err)
	}
	if p := s.Peers[1]; p.Protected || p.Rotations != 0 || !hub.fingerprint(bad).IsZero() {
		t.Errorf("the peer that talks nonsense: %+v", p)
	}
	pings.stop().mustBeComplete(t)
}

// TestCrowd: ten thousand connections from a hundred addresses that never
// prove anything: some say nothing, some begin a TLS record and do not end it,
// some read nothing of what they are told. The peer keeps its link, keeps
// rotating, and comes back; the rotator's memory stays bounded.
func TestCrowd(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	hub, good, stranger := l.host("hub"), l.host("lisbon"), l.host("eve")
	connect(hub, good)
	good.handshake(hub)
	pings := good.ping(hub)
	hub.keyturn("up", hub.write(nil, good.as().with(settings{"role": "server", "address": nil})))
	good.keyturn("up", good.write(nil, hub.as().with(settings{"role": "client"})))
	last := eventuallyRotated(t, hub, good, psk.Fingerprint{})
	s, err := hub.status()
	if err != nil {
		t.Fatal(err)
	}
	before := hub.memory(s.PID)

	const strangers, each = 100, 100
	at := &net.TCPAddr{IP: hub.addr.AsSlice(), Port: 51822}
	var open []net.Conn
	defer func() {
		for _, c := range open {
			c.Close()
		}
	}()
	err = stranger.in(func() error {
		for i := range strangers {
			from := net.IPv4(192, 0, 2, byte(100+i))
			if err := ip(fmt.Sprintf("addr add %s/24 dev eth0", from)); err != nil {
				return err
			}
			for j := range each {
				c, err := (&net.Dialer{Timeout: 2 * time.Second, LocalAddr: &net.TCPAddr{IP: from}}).Dial("tcp", at.String())
				if err != nil {
					continue // the hub has enough of this one
				}
				open = append(open, c)
				if j%2 == 1 {
					_, _ = c.Write([]byte("\x16\x03\x01\x40\x00\x01"))
				}
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(open) < strangers {
		t.Errorf("only %d connections", len(open))
	}
	good.handshake(hub)
	last = eventuallyRotated(t, hub, good, last)
	after := hub.memory(s.PID)
	t.Logf("%d connections were accepted by the kernel; memory before %d KiB, after %d KiB", len(open), before, after)
	if after > before+16<<10 {
		t.Errorf("memory grew from %d to %d KiB", before, after)
	}
	good.keyturn("down", wg0)
	good.keyturn("up", wg0)
	rotateAgain(t, good, hub, last)
	pings.stop().mustBeComplete(t)
}

// memory returns what a process of the host has of the machine's memory, in KiB.
func (h *host) memory(pid int) (kib int) {
	h.lab.t.Helper()
	err := h.in(func() error {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
		if err != nil {
			return err
		}
		_, rest, _ := strings.Cut(string(text), "VmRSS:")
		_, err = fmt.Sscan(rest, &kib)
		return err
	})
	if err != nil {
		h.lab.t.Fatal(err)
	}
	return kib
}

// crowd opens more connections than a listener has places for, and leaves them
// idle until the test ends.
func (h *host) crowd(at string) {
	h.lab.t.Helper()
	for range 300 {
		c, err := h.dial("tcp", at)
		if err != nil {
			h.lab.t.Fatal(err)
		}
		h.lab.t.Cleanup(func() { c.Close() })
	}
}

var errGoodProof = errors.New("a good proof was refused")

// say sends text, and returns how it was turned away.
func say(c io.ReadWriter, text string) error {
	_, _ = io.WriteString(c, text) // the other end may have enough before the end
	if _, err := io.Copy(io.Discard, c); err != nil {
		return err
	}
	return io.EOF
}

func send(c *tls.Conn, frame ...byte) error { return say(c, string(frame)) }

// afterHandshake completes the TLS handshake, sends a frame if there is one,
// and returns how it was turned away.
func afterHandshake(c *tls.Conn, frame ...byte) error {
	if err := c.Handshake(); err != nil {
		return err
	}
	return send(c, frame...)
}

// identity is a rotator's identity taken apart, to be put together wrongly. It
// stands on docs/PROTOCOL.md and not on the link package, which would refuse.
type identity struct {
	ed25519 ed25519.PrivateKey // nil: no certificate
	mldsa   *mldsa.PrivateKey
	claim   string // the certificate's common name
	shown   []byte // ML-DSA public key in the proof; nil: that of mldsa
}

func newIdentity(t *testing.T) identity {
	t.Helper()
	secret := make([]byte, link.SecretSize)
	_, _ = rand.Read(secret)
	return derive(t, secret)
}

func readIdentity(t *testing.T, h *host) identity {
	t.Helper()
	h.identify()
	text, err := os.ReadFile(h.path("identity.key"))
	if err != nil {
		t.Fatal(err)
	}
	secret, err := base64.StdEncoding.DecodeString(strings.TrimSpace(string(text)))
	if err != nil {
		t.Fatal(err)
	}
	id := derive(t, secret)
	if id.claim != h.identify() {
		t.Fatal("the identity was derived wrongly")
	}
	return id
}

func derive(t *testing.T, secret []byte) identity {
	t.Helper()
	seed := func(label string) []byte {
		b, err := hkdf.Key(sha256.New, secret, nil, label, 32)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	id := identity{ed25519: ed25519.NewKeyFromSeed(seed("keyturn/1 identity ed25519"))}
	var err error
	if id.mldsa, err = mldsa.NewPrivateKey(mldsa.MLDSA65(), seed("keyturn/1 identity ml-dsa-65")); err != nil {
		t.Fatal(err)
	}
	id.claim = base64.StdEncoding.EncodeToString(id.fingerprint())
	return id
}

// public returns the ML-DSA public key that the identity shows.
func (id *identity) public() []byte {
	if id.shown != nil {
		return id.shown
	}
	return id.mldsa.PublicKey().Bytes()
}

func (id *identity) fingerprint() []byte {
	var b []byte
	for _, field := range [][]byte{[]byte("keyturn/1 identity fingerprint"), id.ed25519.Public().(ed25519.PublicKey), id.public()} {
		b = binary.BigEndian.AppendUint32(b, uint32(len(field)))
		b = append(b, field...)
	}
	sum := sha256.Sum256(b)
	return sum[:]
}

// tls makes c the client's end of a TLS connection; c's settings win.
func (id *identity) tls(raw net.Conn, c *tls.Config) *tls.Conn {
	c.InsecureSkipVerify = true
	if c.NextProtos == nil {
		c.NextProtos = []string{link.Protocol}
	}
	if id.ed25519 != nil {
		template := &x509.Certificate{
			SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: id.claim},
			NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		}
		// An error leaves no certificate, and the good proofs fail.
		der, _ := x509.CreateCertificate(rand.Reader, template, template, id.ed25519.Public(), id.ed25519)
		c.Certificates = []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: id.ed25519}}
	}
	return tls.Client(raw, c)
}

// prove completes the TLS handshake, sends a proof to the host's rotator, and
// waits for that one's own.
func (id *identity) prove(c *tls.Conn, to *host) error {
	if err := c.Handshake(); err != nil {
		return err
	}
	cs := c.ConnectionState()
	statement, err := cs.ExportKeyingMaterial("EXPORTER-keyturn-1-link", nil, 32)
	if err != nil {
		return err
	}
	server, err := base64.StdEncoding.DecodeString(to.identify())
	if err != nil {
		return err
	}
	statement = append(append(append(statement, 1), id.fingerprint()...), server...)
	signature, err := id.mldsa.Sign(nil, statement, &mldsa.Options{Context: "keyturn/1 link proof"})
	if err != nil {
		return err
	}
	proof := append(append([]byte(nil), id.public()...), signature...)
	if _, err := c.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(proof))), proof...)); err != nil {
		return err
	}
	_, err = io.ReadFull(c, make([]byte, 2+len(proof)))
	return err
}
