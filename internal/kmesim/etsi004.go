package kmesim

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"strings"
	"sync"
	"time"
	"unicode/utf8"
)

// StreamOptions says how a KME speaks ETSI GS QKD 004 V2.1.1 at one port.
type StreamOptions struct {
	Dialect Dialect
	// PeerFirst refuses keys of a stream that the peer application has not opened.
	PeerFirst bool
	// Metadata sends some with each key: its age and its hops, in JSON.
	Metadata bool
	// Hold keeps a stream that one application has closed from being opened again
	// before the other has closed it, too. Without it, that begins a new one.
	Hold bool
}

// What a stream can be. What an application asks for beyond that is met by a
// counter-offer.
const (
	minChunk     = 16 // bytes
	maxChunk     = 1024
	defaultChunk = 32
	maxTimeout   = 60_000     // milliseconds
	maxTTL       = 7 * 86_400 // seconds
	metadataMIME = "application/json"
	// metadataRoom is what every metadata has room in, in bytes.
	metadataRoom = 64
	// idleTime is how long a connection may be without a request.
	idleTime = 2 * time.Minute
	// peerPoll is how often an OPEN_CONNECT that waits for the peer looks for it.
	peerPoll = 50 * time.Millisecond
)

// ServeStreams answers on ln by ETSI GS QKD 004 until ctx ends, then returns
// nil. conf must demand and verify client certificates. ln is closed.
func (k *KME) ServeStreams(ctx context.Context, ln net.Listener, conf *tls.Config, o StreamOptions) error {
	l, err := k.listen(ctx, ln, conf)
	if err != nil {
		return err
	}
	var sessions sync.WaitGroup
	defer sessions.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer l.Close()
	defer stop()
	for {
		c, err := l.Accept()
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil:
			return fmt.Errorf("serve streams of %s: %w", k.name, err)
		}
		s := &session{kme: k, o: o, conn: c.(*tls.Conn)}
		sessions.Go(func() { s.run(ctx) })
	}
}

// session is a connection of an application.
type session struct {
	kme  *KME
	o    StreamOptions
	conn *tls.Conn
	sae  string
}

// run answers requests, one after the other, until one of the two has enough.
func (s *session) run(ctx context.Context) {
	defer s.conn.Close()
	stop := context.AfterFunc(ctx, func() { s.conn.NetConn().Close() })
	defer stop()
	log := s.kme.log.With("remote", s.conn.RemoteAddr().String())
	if s.sae = s.conn.ConnectionState().PeerCertificates[0].Subject.CommonName; s.sae == "" {
		log.WarnContext(ctx, "stream refused", "err", "no SAE ID as common name of the client certificate")
		return
	}
	for again := true; again; again = s.o.Dialect == ForgeEd1 {
		err := s.serve(ctx)
		switch {
		case errors.Is(err, errGone), ctx.Err() != nil:
			return
		case err != nil:
			log.WarnContext(ctx, "stream connection closed", "sae", s.sae, "err", err)
			return
		}
	}
}

// serve reads one request and answers it.
func (s *session) serve(ctx context.Context) error {
	var head [headerSize]byte
	if s.read(head[:], idleTime) != nil {
		return errGone
	}
	op, size, err := s.o.Dialect.header(head)
	if err != nil {
		return err
	}
	payload := make([]byte, size)
	if err := s.read(payload, requestTime); err != nil {
		return fmt.Errorf("read payload: %w", err)
	}
	request, err := s.o.Dialect.request(op, payload)
	if err != nil {
		return err
	}
	t, err := s.suffer(ctx)
	if err != nil {
		return err
	}
	var answer []byte
	switch q := request.(type) {
	case openRequest:
		answer = s.o.Dialect.opened(s.open(ctx, q, t))
	case getRequest:
		a := s.get(ctx, q, t)
		defer clear(a.key)
		if a.status == streamOK {
			if f, _ := s.kme.strike(Lost); f.Kind == Lost {
				return errFault
			}
		}
		answer = s.o.Dialect.got(a)
	case closeRequest:
		answer = s.o.Dialect.closed(s.close(ctx, q, t))
	}
	defer clear(answer)
	return s.write(ctx, answer, t)
}

// read fills b within a time.
func (s *session) read(b []byte, limit time.Duration) error {
	if err := s.conn.SetReadDeadline(time.Now().Add(limit)); err != nil {
		return err
	}
	_, err := io.ReadFull(s.conn, b)
	return err
}

// errGone ends a connection whose application has nothing more to ask: it closed
// it, or was idle for too long.
var errGone = errors.New("gone")

// errFault ends a connection whose KME fails on demand.
var errFault = errors.New("fault")

// trouble is what the KME's fault does to one request.
type trouble struct {
	Fault
	lifted <-chan struct{}
}

// suffer lets the KME's fault strike a request. An error ends the connection.
func (s *session) suffer(ctx context.Context) (t trouble, err error) {
	switch f := s.kme.Fault(); {
	case f.Kind == SilentTLS, f.Kind == Expired && !s.conn.NetConn().(*conn).expired:
		// The connection is older than the fault, which strikes the next one.
		return t, errFault
	}
	t.Fault, t.lifted = s.kme.strike(Down, HTML, Page, Silent, Slow, Drip)
	switch t.Kind {
	case Down:
		return t, errFault
	case HTML, Page: // what a web server says to bytes like these
		return t, errors.Join(s.write(ctx, []byte("HTTP/1.1 400 Bad Request\r\nContent-Type: text/html\r\nConnection: close\r\n\r\n"+
			"<html><head><title>Bad Request</title></head><body><h1>Bad Request</h1></body></html>\n"), t), errFault)
	case Silent:
		pause(ctx, maxDelay, t.lifted)
		return t, errFault
	}
	return t, nil
}

// within runs f, after a slow KME's pause, in the time that a call may take: 0
// is as long as it does.
func (t trouble) within(ctx context.Context, timeout time.Duration, f func(context.Context) streamStatus) streamStatus {
	if timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, timeout)
		defer cancel()
	}
	if t.Kind == Slow && !pause(ctx, t.Delay, t.lifted) {
		return streamTimeout
	}
	return f(ctx)
}

func (s *session) write(ctx context.Context, b []byte, t trouble) error {
	step := len(b)
	if t.Kind == Drip {
		step = 1
	}
	for ; len(b) > 0; b = b[step:] {
		if t.Kind == Drip && !pause(ctx, t.Delay, t.lifted) {
			return ctx.Err()
		}
		if err := s.conn.SetWriteDeadline(time.Now().Add(requestTime)); err != nil {
			return err
		}
		if _, err := s.conn.Write(b[:step]); err != nil {
			return err
		}
	}
	return nil
}

// note logs and counts what a request came to.
func (s *session) note(ctx context.Context, what string, stream ksid, status streamStatus, more ...any) {
	if status != streamOK && status != streamPeerAbsent {
		s.kme.counted.refused.Add(1)
	}
	s.kme.log.DebugContext(ctx, what, append([]any{"sae", s.sae, "stream", stream, "status", uint32(status)}, more...)...)
}

// noAnswer is the status where a stream's owner did not answer.
func noAnswer(ctx context.Context) streamStatus {
	if ctx.Err() != nil {
		return streamTimeout
	}
	return streamNoLink
}

// open answers OPEN_CONNECT (ETSI GS QKD 004 V2.1.1): where the ID is one
// that both applications know it waits for the other, as long as the QoS says.
func (s *session) open(ctx context.Context, q openRequest, t trouble) openAnswer {
	a := openAnswer{qos: q.qos, stream: q.stream}
	timeout := time.Duration(min(q.qos.Timeout, maxTimeout)) * time.Millisecond
	a.status = t.within(ctx, timeout, func(ctx context.Context) streamStatus {
		peer, ok := s.partner(q)
		if !ok {
			s.kme.log.WarnContext(ctx, "stream refused", "sae", s.sae, "source", q.source, "destination", q.destination)
			return streamNoLink
		}
		if a.qos = s.kme.offer(q.qos); a.qos != q.qos {
			return streamQoS
		}
		return s.join(ctx, openQuestion{opening: opening{q.stream, s.sae}, Peer: peer, QoS: q.qos, Hold: s.o.Hold}, timeout, &a)
	})
	s.note(ctx, "stream opened", a.stream, a.status)
	return a
}

// partner returns the application at the other end of a stream that this one
// may open.
func (s *session) partner(q openRequest) (string, bool) {
	source, destination := s.o.Dialect.application(q.source), s.o.Dialect.application(q.destination)
	return destination, source == s.sae && destination != "" && destination != source
}

// join opens a stream, and waits for the peer where it can know of it.
func (s *session) join(ctx context.Context, q openQuestion, timeout time.Duration, a *openAnswer) streamStatus {
	wait := timeout > 0 && q.Stream != ksid{}
	id, found, err := s.kme.openStream(ctx, q)
	switch {
	case err != nil:
		return noAnswer(ctx)
	case found.Status != streamOK && found.Status != streamPeerAbsent:
		a.qos = found.QoS
		return found.Status
	}
	q.Stream, a.stream, a.qos.TTL = id, id, found.QoS.TTL
	s.kme.streams.enter(q.opening, timeout)
	if found.Again { // and goes on, also where this KME had to be told of it anew
		return streamInUse
	}
	q.Look = true
	for wait && found.Status == streamPeerAbsent && pause(ctx, peerPoll, nil) {
		if now, err := askOwner(ctx, s.kme, id, verbOpen, s.kme.streams.open, q); err == nil && now.Known {
			found = now
		}
	}
	return found.Status
}

// offer returns the nearest to q that a stream can be.
func (k *KME) offer(q qos) qos {
	if q.Chunk == 0 {
		q.Chunk = defaultChunk
	}
	q.Chunk = min(max(q.Chunk, minChunk), maxChunk)
	if rate := k.pools.bps(); rate > 0 {
		q.MinBPS = uint32(min(int64(q.MinBPS), rate))
	}
	q.Timeout = min(q.Timeout, maxTimeout)
	q.TTL = min(q.TTL, maxTTL)
	if q.MIME != "" {
		q.MIME = metadataMIME
	}
	return q
}

// application returns the ID of the application that a source or destination
// names, or nothing. In a URI that is the user, else the last element of the
// path, else the host: qkd://sae_001@node, qkd://node/sae_001, qkd://sae_001.
func (d Dialect) application(text string) string {
	if !utf8.ValidString(text) {
		return ""
	}
	if !strings.Contains(text, "://") {
		if d == ForgeEd1 { // URIs need scheme and authority
			return ""
		}
		return text
	}
	u, err := url.Parse(text)
	if err != nil || u.Scheme == "" || u.Host == "" {
		return ""
	}
	if user := u.User.Username(); user != "" {
		return user
	}
	if path := strings.TrimSuffix(u.Path, "/"); path != "" {
		return path[strings.LastIndexByte(path, '/')+1:]
	}
	return u.Hostname()
}

// get answers GET_KEY. The caller wipes the key.
func (s *session) get(ctx context.Context, q getRequest, t trouble) getAnswer {
	a := getAnswer{index: q.index}
	o := opening{q.stream, s.sae}
	timeout, open := s.kme.streams.timeout(o)
	a.status = t.within(ctx, timeout, func(ctx context.Context) (status streamStatus) {
		if !open {
			return streamPeerNotYet
		}
		c := claim{opening: o, Index: q.index, PeerFirst: s.o.PeerFirst}
		found, err := askOwner(ctx, s.kme, q.stream, verbClaim, s.kme.streams.claim, c)
		switch {
		case err != nil:
			return noAnswer(ctx)
		case !found.Known: // to its owner, who has been restarted
			s.kme.streams.leave(o)
			return found.Status
		case found.Status != streamOK:
			return found.Status
		}
		if a.metadata = s.metadata(found.Chunk); int(q.room) < len(a.metadata) {
			a.needed = metadataRoom
			return streamMetadataTooBig
		}
		a.key, status = s.key(ctx, c, found)
		return status
	})
	s.note(ctx, "stream key", q.stream, a.status, "index", q.index)
	if a.status != streamOK {
		a.metadata = nil
	}
	return a
}

// metadata is what goes with a key: for how many milliseconds it has been there,
// and over how many hops it came.
func (s *session) metadata(c chunk) []byte {
	if !s.o.Metadata {
		return nil
	}
	var age time.Duration
	if c.ID != "" {
		age = time.Since(c.Made)
	}
	return fmt.Appendf(nil, `{"age":%d,"hops":0}`, max(0, age.Milliseconds()))
}

// key takes the key of an index, or makes it. The caller wipes it.
func (s *session) key(ctx context.Context, c claim, found claimed) ([]byte, streamStatus) {
	if found.Chunk.ID == "" {
		keys, p := s.kme.newKeys(ctx, s.sae, []string{found.Peer}, 1, 8*int(found.QoS.Chunk))
		if p != nil {
			return nil, refused(ctx, p)
		}
		c.ID = keys[0].ID
		now, err := askOwner(ctx, s.kme, c.Stream, verbClaim, s.kme.streams.claim, c)
		if err == nil && now.Chunk.ID == c.ID {
			return keys[0].Key, streamOK
		}
		wipe(keys) // and nobody else gets it
		if s.kme.send(ctx, verbForget, batchOf([]string{c.ID})) != nil {
			s.kme.addUnheard([]string{c.ID})
		}
		switch {
		case err != nil:
			return nil, noAnswer(ctx)
		case now.Status != streamOK:
			return nil, now.Status
		}
		found = now // the peer was faster
	}
	keys, p := s.kme.takeKeys(ctx, found.Chunk.Maker, s.sae, []string{found.Chunk.ID})
	if p != nil {
		return nil, refused(ctx, p)
	}
	return keys[0].Key, streamOK
}

// refused is the status where the KME gives no key.
func refused(ctx context.Context, p *problem) streamStatus {
	switch {
	case ctx.Err() != nil:
		return streamTimeout
	case p.Message == textNoPeer:
		return streamNoLink
	}
	return streamNoKeys
}

// close answers CLOSE. It says streamPeerAbsent where there is nothing to close.
func (s *session) close(ctx context.Context, q closeRequest, t trouble) streamStatus {
	o := opening{q.stream, s.sae}
	timeout, open := s.kme.streams.timeout(o)
	status := t.within(ctx, timeout, func(ctx context.Context) streamStatus {
		if !open {
			return streamPeerAbsent
		}
		a, err := askOwner(ctx, s.kme, q.stream, verbClose, s.kme.streams.close, closing{o})
		if err != nil {
			return noAnswer(ctx)
		}
		s.kme.streams.leave(o)
		return a.Status
	})
	s.note(ctx, "stream closed", q.stream, status)
	return status
}

// bps is how many bits a second a pool fills at; 0 is without limit.
func (p *pools) bps() int64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	return int64(p.rate)
}
