package etsi004

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"keyturn/internal/kms/kmstls"
	"keyturn/internal/memnet"
	"keyturn/internal/psk"
	"keyturn/internal/testca"
)

const (
	kmeA = "kme-a:25575"
	kmeB = "kme-b:25575"
)

// network has an authority, and KMEs made by hand.
type network struct {
	t *testing.T
	memnet.Network
	ca *testca.Authority
}

func newNetwork(t *testing.T) *network {
	return &network{t: t, ca: testca.New(t, "root")}
}

// kms connects an SAE by c, whose other fields it fills in.
func (n *network) kms(sae string, c Config) *KMS {
	n.t.Helper()
	if c.TLS.Memory == nil {
		c.TLS.Memory = &tls.Config{Certificates: []tls.Certificate{n.ca.Client(sae)}, RootCAs: n.ca.Pool()}
	}
	if c.URIs == nil {
		c.URIs = []string{kmeA}
	}
	c.SAE, c.Dial = sae, n.Dial
	k, err := New(c)
	if err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(func() { _ = k.Close() })
	return k
}

// source is the source of the keys that sae shares with peer.
func (n *network) source(sae, peer string, c Config) *Source {
	n.t.Helper()
	s, err := n.kms(sae, c).For(peer)
	if err != nil {
		n.t.Fatal(err)
	}
	return s.(*Source)
}

// request is a message as it came: header and payload.
type request struct {
	conn    int // number of its connection, from 1
	service byte
	payload []byte
	whole   []byte
}

// answer writes what a KME says to a request.
type answer func(net.Conn)

// host is a KME made by hand.
type host struct {
	mu    sync.Mutex
	conns int
	seen  []request
	// handle says what is answered; requests come one by one.
	handle func(request) answer
}

// log lists the requests so far, each by service and connection.
func (h *host) log() string {
	h.mu.Lock()
	defer h.mu.Unlock()
	var b strings.Builder
	for _, r := range h.seen {
		name := map[byte]string{2: "open", 4: "get", 8: "close"}[r.service]
		if r.service == 4 {
			name += fmt.Sprint(binary.BigEndian.Uint32(r.payload[16:]))
		}
		if r.service == 2 && bytes.Equal(r.payload[len(r.payload)-16:], make([]byte, 16)) {
			name += "-new"
		}
		fmt.Fprintf(&b, "%s ", name)
	}
	return strings.TrimSpace(b.String())
}

func (h *host) connections() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.conns
}

// serve answers at an address until the test ends or the returned stop is called.
func (n *network) serve(address string, handle func(request) answer) (h *host, stop func()) {
	name, _, _ := strings.Cut(address, ":")
	return n.serveTLS(address, &tls.Config{
		Certificates: []tls.Certificate{n.ca.Server(name)},
		ClientAuth:   tls.RequireAndVerifyClientCert,
		ClientCAs:    n.ca.Pool(),
	}, handle)
}

func (n *network) serveTLS(address string, conf *tls.Config, handle func(request) answer) (h *host, stop func()) {
	n.t.Helper()
	l, err := n.Listen(address)
	if err != nil {
		n.t.Fatal(err)
	}
	h = &host{handle: handle}
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() {
		for {
			raw, err := l.Accept()
			if err != nil {
				return
			}
			running.Go(func() {
				closing := context.AfterFunc(ctx, func() { _ = raw.Close() })
				defer closing()
				defer raw.Close()
				h.converse(tls.Server(raw, conf))
			})
		}
	})
	stop = func() { cancel(); _ = l.Close(); running.Wait() }
	n.t.Cleanup(stop)
	return h, stop
}

func (h *host) converse(c *tls.Conn) {
	if c.Handshake() != nil {
		return
	}
	h.mu.Lock()
	h.conns++
	number := h.conns
	h.mu.Unlock()
	for {
		header := make([]byte, 8)
		if _, err := io.ReadFull(c, header); err != nil {
			return
		}
		payload := make([]byte, binary.BigEndian.Uint32(header[4:]))
		if _, err := io.ReadFull(c, payload); err != nil {
			return
		}
		r := request{number, header[3], payload, append(header, payload...)}
		h.mu.Lock()
		h.seen = append(h.seen, r)
		say := h.handle(r)
		h.mu.Unlock()
		say(c)
	}
}

// raw answers with exactly these bytes, in hex; spaces do not count.
func raw(text string) answer {
	b, err := hex.DecodeString(strings.ReplaceAll(text, " ", ""))
	if err != nil {
		panic(err)
	}
	return func(c net.Conn) { _, _ = c.Write(b) }
}

// drip answers with these bytes, one each second.
func drip(text string) answer {
	b, _ := hex.DecodeString(strings.ReplaceAll(text, " ", ""))
	return func(c net.Conn) {
		for i := range b {
			if _, err := c.Write(b[i : i+1]); err != nil {
				return
			}
			time.Sleep(time.Second)
		}
	}
}

// silence never answers.
func silence(net.Conn) {}

// hangUp closes the connection.
func hangUp(c net.Conn) { _ = c.Close() }

// framed answers r by a payload.
func framed(d *dialect, r request, payload []byte) answer {
	b := append([]byte{d.version[0], d.version[1], d.version[2], r.service + 1}, 0, 0, 0, 0)
	binary.BigEndian.PutUint32(b[4:], uint32(len(payload)))
	b = append(b, payload...)
	return func(c net.Conn) { _, _ = c.Write(b) }
}

func u32(numbers ...uint32) (b []byte) {
	for _, n := range numbers {
		b = binary.BigEndian.AppendUint32(b, n)
	}
	return b
}

// saysOpen answers OPEN_CONNECT with a chunk size.
func saysOpen(d *dialect, r request, status, chunk uint32, id []byte) answer {
	b := append(u32(status, chunk, 64, 16, 5, 0, 900, 7200), "application/json"...)
	if d.fixed {
		b = append(b, make([]byte, 240)...)
	} else {
		b = append(b, 0)
	}
	return framed(d, r, append(b, id...))
}

// saysKey answers GET_KEY.
func saysKey(d *dialect, r request, index uint32, key []byte) answer {
	b := append(u32(0, index, uint32(len(key))), key...)
	return framed(d, r, append(b, 0, 0, 0, 2, '{', '}'))
}

// saysNo answers with a status: alone, or, in forge-ed3, with everything that
// belongs to a success, empty.
func saysNo(d *dialect, r request, status uint32) answer {
	switch {
	case d.fixed || r.service == 8:
		return framed(d, r, u32(status))
	case r.service == 2:
		return saysOpen(d, r, status, 0, make([]byte, 16))
	}
	return framed(d, r, u32(status, 0, 0, 0))
}

// id returns the Key_stream_ID of a request.
func (r request) id() []byte {
	if r.service == 2 {
		return r.payload[len(r.payload)-16:]
	}
	return r.payload[:16]
}

func (r request) index() uint32 { return binary.BigEndian.Uint32(r.payload[16:]) }

// keyOf is the key of a number.
func keyOf(n uint32) []byte { k := sha256.Sum256(u32(n)); return k[:] }

// isKey tells whether key is keyOf(n), without printing it.
func isKey(key *psk.Key, n uint32) bool { return key != nil && bytes.Equal(key.Bytes(), keyOf(n)) }

// easy answers as a KME does with which all is well, and with overrides for
// what is asked of it: the first that is not nil.
func easy(d *dialect, overrides ...func(request) answer) func(request) answer {
	opened := make(map[string]bool)
	return func(r request) answer {
		for _, o := range overrides {
			if say := o(r); say != nil {
				return say
			}
		}
		id := string(r.id())
		switch r.service {
		case 2:
			if id == string(make([]byte, 16)) {
				id = "allocated stream"
			}
			if opened[id] {
				return saysNo(d, r, 5)
			}
			opened[id] = true
			return saysOpen(d, r, 0, 32, []byte(id))
		case 4:
			return saysKey(d, r, r.index(), keyOf(r.index()))
		}
		delete(opened, id)
		return saysNo(d, r, 0)
	}
}

// once gives an answer to the n-th request of a service, from 1.
func once(service byte, n int, say func(request) answer) func(request) answer {
	return func(r request) answer {
		if r.service != service {
			return nil
		}
		if n--; n != 0 {
			return nil
		}
		return say(r)
	}
}

// inDialects runs a test in a bubble for each dialect.
func inDialects(t *testing.T, test func(t *testing.T, n *network, d *dialect)) {
	for i := range dialects {
		t.Run(dialects[i].name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { test(t, newNetwork(t), &dialects[i]) })
		})
	}
}

// trusting is a TLS side.
func trusting(root *testca.Authority, own tls.Certificate) kmstls.Config {
	return kmstls.Config{Memory: &tls.Config{Certificates: []tls.Certificate{own}, RootCAs: root.Pool()}}
}
