package etsi004

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"keyturn/internal/kms"
	"keyturn/internal/psk"
)

const (
	// A stream is looked after every minKeep, and more rarely where a KMS has so
	// many that it would be asked more often than once in keepApart; give or
	// take a quarter, so that the streams of a hub spread.
	minKeep   = 5 * time.Second
	maxKeep   = time.Minute
	keepApart = 20 * time.Millisecond

	// firstRetry is the time until a key that our KMS does not have yet is asked
	// for again; it doubles each time.
	firstRetry = 50 * time.Millisecond

	// closeTimeout bounds what Close takes: nobody waits for a stream to close.
	closeTimeout = 500 * time.Millisecond

	maxMet  = 256 // key IDs
	maxLeft = 16  // streams
)

// Source hands out the keys shared with one peer. Key leads: it decides which
// stream and which index; KeyByID follows.
type Source struct {
	kms  *KMS
	peer string // its name on the wire

	// leading is held by Key: it asks for one index after the other, for one
	// that was refused is asked for again.
	leading chan struct{}

	// turn is held by whoever reads or changes what follows, for an exchange or
	// two. Whoever waits for it has a place among the KMS's calls already.
	turn  chan struct{}
	qos   qos
	known *stream // the one that both ends know
	led   *stream // of Key: known, or one that the KMS has allocated
	// followed is the stream that the peer allocated and named last.
	followed *stream
	left     []streamID // to be closed, for nothing will be asked of them

	mu  sync.Mutex
	met []keyID // that KeyByID has asked for and not been refused, oldest first
}

var (
	_ kms.Source = (*Source)(nil)
	_ kms.Keeper = (*Source)(nil)
)

func newSource(k *KMS, peer string) *Source {
	s := &Source{kms: k, peer: peer, leading: make(chan struct{}, 1), turn: make(chan struct{}, 1)}
	s.known = &stream{id: predefined(k.sae, peer)}
	s.led = s.known
	s.qos = qos{
		chunk: psk.Size, maxBPS: askedBPS, minBPS: askedBPS,
		// A KMS may wait so long for the peer, or for a key. It is to give up before
		// we do, also where a call takes several requests: then no key is lost.
		timeout: uint32(k.timeout.Milliseconds() / 5),
		ttl:     uint32(askedTTL / time.Second), metadataType: jsonMetadata,
	}
	return s
}

// take waits for the turn.
func (s *Source) take(ctx context.Context) (release func(), err error) {
	if err := s.kms.acquire(ctx, s.turn); err != nil {
		return nil, err
	}
	return func() { <-s.turn }, nil
}

// Key implements kms.Source: OPEN_CONNECT where it is needed, and GET_KEY. It
// lasts at most one timeout for each URI, and others to wait for its turn.
func (s *Source) Key(ctx context.Context) (string, *psk.Key, error) {
	if err := s.kms.acquire(ctx, s.leading); err != nil {
		return "", nil, fmt.Errorf("fetch key: %w", err)
	}
	defer func() { <-s.leading }()
	var id keyID
	var key *psk.Key
	err := s.kms.each(ctx, func(ctx context.Context, e *endpoint) (err error) {
		id, key, err = s.keyAt(ctx, e)
		return err
	})
	if err != nil {
		return "", nil, fmt.Errorf("fetch key: %w", err)
	}
	return id.String(), key, nil
}

// keyAt takes the next key at e, and opens the stream again if it has gone.
func (s *Source) keyAt(ctx context.Context, e *endpoint) (keyID, *psk.Key, error) {
	release, err := s.take(ctx)
	if err != nil {
		return keyID{}, nil, err
	}
	defer release()
	if err := s.lead(ctx, e); err != nil {
		return keyID{}, nil, err
	}
	id, key, err := s.nextKey(ctx, e)
	if !mayBeGone(err) {
		return id, key, err
	}
	s.led.alone = true
	reopened, openErr := s.enter(ctx, e, s.led)
	switch {
	case openErr != nil:
		return keyID{}, nil, fmt.Errorf("%w; open it again: %w", err, openErr)
	case reopened && s.led.fresh:
		return s.nextKey(ctx, e)
	}
	if s.led != s.known {
		// The peer would learn of it by a key that we do not get.
		s.led.fresh = false
	}
	return keyID{}, nil, err
}

// lead makes sure that the stream we lead is open at e, and that its next index
// was never asked for. A stream that is open from an earlier life of ours is
// closed and opened again. Where the KMS holds it back until the peer has
// closed it, too, it allocates another, which the peer learns of by the key ID.
func (s *Source) lead(ctx context.Context, e *endpoint) error {
	if s.led.at == e && s.led.fresh {
		return nil
	}
	if s.led != s.known {
		s.retire(s.led)
		s.led = s.known
	}
	st := s.known
	if st.at != e {
		if _, err := s.enter(ctx, e, st); err != nil {
			return err
		}
		if st.fresh {
			return nil
		}
	}
	st.at = nil
	if err := s.close(ctx, e, st.id); err != nil {
		return err
	}
	id, said, err := s.open(ctx, e, st.id)
	if err == nil && said == statusInUse {
		s.led = new(stream)
		id, said, err = s.open(ctx, e, streamID{})
	}
	switch {
	case err != nil:
		return err
	case said == statusInUse:
		return refusal(e, openConnect, said)
	}
	s.led.id = id
	s.led.begin(e, said)
	return nil
}

// nextKey asks for the next index. Only one that was plainly refused is ever
// asked for again.
func (s *Source) nextKey(ctx context.Context, e *endpoint) (keyID, *psk.Key, error) {
	st := s.led
	index := st.next
	a, err := s.get(ctx, e, st.id, index)
	if se, ok := errors.AsType[*statusError](err); ok && se.status == statusNoKeys {
		if later, try := st.skip(); try {
			index = later
			a, err = s.get(ctx, e, st.id, index)
		}
	}
	switch {
	case lost(err):
		st.pass(index)
		fallthrough
	case err != nil:
		return keyID{}, nil, err
	case a.index < st.next:
		// It has begun to count anew, or repeats itself.
		a.key.Wipe()
		st.fresh = false
		return keyID{}, nil, fmt.Errorf("%s delivered the key with index %d when asked for %d", e.address, a.index, index)
	}
	id := keyID{stream: st.id, index: a.index, tag: st.tag}
	st.pass(a.index)
	st.alone = false
	return id, a.key, nil
}

// KeyByID implements kms.Source: OPEN_CONNECT where it is needed, and GET_KEY
// for the stream and index that the ID names. After anything but a plain "no",
// the key counts as gone.
func (s *Source) KeyByID(ctx context.Context, text string) (*psk.Key, error) {
	id, err := parseKeyID(text)
	if err != nil {
		return nil, err
	}
	if s.kms.foreign(id.stream, s.peer) {
		return nil, fmt.Errorf("key %q is of the key stream shared with another peer", text)
	}
	if !s.meet(id) {
		return nil, fmt.Errorf("key %q was asked for before", text)
	}
	key, err := s.await(ctx, id)
	if err != nil {
		if !lost(err) {
			s.forget(id)
		}
		return nil, fmt.Errorf("fetch key %q: %w", text, err)
	}
	return key, nil
}

// meet notes an ID, unless it was noted before.
func (s *Source) meet(id keyID) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if slices.Contains(s.met, id) {
		return false
	}
	if len(s.met) == maxMet {
		s.met = slices.Delete(s.met, 0, 1)
	}
	s.met = append(s.met, id)
	return true
}

// forget takes back meet.
func (s *Source) forget(id keyID) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if i := slices.Index(s.met, id); i >= 0 {
		s.met = slices.Delete(s.met, i, i+1)
	}
}

// await asks for a key that the peer's KMS has delivered. Ours may be slower:
// while it says that it has no such key it is asked again, for up to half of
// the timeout, so that the last request has the other half to be answered.
func (s *Source) await(ctx context.Context, id keyID) (key *psk.Key, err error) {
	began := time.Now()
	for wait := firstRetry; ; wait *= 2 {
		err = s.kms.each(ctx, func(ctx context.Context, e *endpoint) (err error) {
			key, err = s.keyByIDAt(ctx, e, id)
			return err
		})
		if err == nil || lost(err) || !errors.Is(err, kms.ErrUnknownKey) || time.Since(began)+wait > s.kms.timeout/2 {
			return key, err
		}
		t := time.NewTimer(wait)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return nil, fmt.Errorf("%w, before that: %w", context.Cause(ctx), err)
		}
	}
}

// keyByIDAt takes one key at e, and opens its stream again if that has gone.
func (s *Source) keyByIDAt(ctx context.Context, e *endpoint, id keyID) (*psk.Key, error) {
	st, tag, err := s.follow(ctx, e, id)
	if err != nil {
		return nil, err
	}
	a, err := s.get(ctx, e, id.stream, id.index)
	if mayBeGone(err) {
		reopened, openErr := s.enterAgain(ctx, e, st, tag)
		switch {
		case openErr != nil:
			return nil, fmt.Errorf("%w; open it again: %w", err, openErr)
		case reopened:
			a, err = s.get(ctx, e, id.stream, id.index)
		}
	}
	if err == nil && a.index != id.index {
		a.key.Wipe()
		err = fmt.Errorf("%s delivered the key with index %d instead", e.address, a.index)
	}
	if se, ok := errors.AsType[*statusError](err); ok {
		switch se.status {
		case statusNoKeys, statusPeerAbsent, statusTimeout:
			se.means = kms.ErrUnknownKey // yet: the peer has it
		}
	}
	if err != nil {
		return nil, err
	}
	return a.key, nil
}

// follow makes sure that a stream of the peer's is open at e. It returns the
// tag of our association beside it.
func (s *Source) follow(ctx context.Context, e *endpoint, id keyID) (st *stream, tag string, err error) {
	release, err := s.take(ctx)
	if err != nil {
		return nil, "", err
	}
	defer release()
	st = s.known
	if id.stream != st.id {
		if s.followed == nil || s.followed.id != id.stream {
			if err := s.leave(); err != nil {
				return nil, "", err
			}
			s.followed = &stream{id: id.stream}
		}
		st = s.followed
	}
	if st.at != e {
		if _, err := s.enter(ctx, e, st); err != nil {
			return nil, "", err
		}
	}
	st.pass(id.index) // as the peer has it, Key must not hand it out
	return st, st.tag, nil
}

// leave notes that the peer leads another stream than before. A KMS may hold
// the old one back for as long as our end is open. Keep closes it. Until then a
// peer that leads ever other streams has to wait: we would open all of them.
func (s *Source) leave() error {
	if n := len(s.left); n > maxLeft-2 {
		return fmt.Errorf("%d key streams that the peer has left are still open", n)
	}
	s.retire(s.known)
	if s.followed != nil {
		s.retire(s.followed)
	}
	return nil
}

// retire notes that a stream is to be closed.
func (s *Source) retire(st *stream) {
	if st.at != nil && len(s.left) < maxLeft && !slices.Contains(s.left, st.id) {
		s.left = append(s.left, st.id)
	}
}

// enterAgain enters a stream, or finds that another call has done so since tag
// was of its association.
func (s *Source) enterAgain(ctx context.Context, e *endpoint, st *stream, tag string) (bool, error) {
	release, err := s.take(ctx)
	if err != nil {
		return false, err
	}
	defer release()
	if st.tag != tag {
		return true, nil
	}
	return s.enter(ctx, e, st)
}

// Keep implements kms.Keeper. Some KMSs deliver nothing before both ends have
// opened a stream, and the peer learns of ours by the first key only. So the
// one that both know is opened at once, and again when the KMS has lost it.
func (s *Source) Keep(ctx context.Context) {
	for {
		_ = s.keep(ctx) // Key and KeyByID meet the same error
		wait := min(max(minKeep, keepApart*time.Duration(s.kms.sources.Load())), maxKeep)
		t := time.NewTimer(wait*3/4 + rand.N(wait/2)) //nolint:gosec // spreading is no secret
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return
		}
	}
}

func (s *Source) keep(ctx context.Context) error {
	// As long as it takes: nobody waits for a look.
	select {
	case s.kms.looks <- struct{}{}:
		defer func() { <-s.kms.looks }()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	return s.kms.each(ctx, func(ctx context.Context, e *endpoint) error {
		release, err := s.take(ctx)
		if err != nil {
			return err
		}
		defer release()
		for len(s.left) > 0 {
			if err := s.close(ctx, e, s.left[0]); err != nil {
				return err
			}
			if s.left[0] == s.known.id {
				s.known.at = nil
			}
			s.left = s.left[1:]
		}
		if s.led.at != e {
			s.led = s.known
		}
		_, err = s.enter(ctx, e, s.led)
		return err
	})
}

// Status implements kms.Source by OPEN_CONNECT, the only request that takes no
// key. A stream that another process has open stays as it is.
func (s *Source) Status(ctx context.Context) (kms.Status, error) {
	status := kms.Status{
		MasterSAE: s.kms.sae, SlaveSAE: s.peer, MaxKeysPerRequest: 1,
		KeySize: 8 * psk.Size, MinKeySize: 8 * psk.Size, MaxKeySize: 8 * psk.Size,
	}
	err := s.kms.each(ctx, func(ctx context.Context, e *endpoint) (err error) {
		status.SourceKME = e.address
		status.PeerAbsent, err = s.look(ctx, e)
		return err
	})
	if err != nil {
		return kms.Status{}, fmt.Errorf("get status: %w", err)
	}
	return status, nil
}

// look opens the stream, if only to see whether it can be. It reports whether
// the KMS says that the peer has not.
func (s *Source) look(ctx context.Context, e *endpoint) (alone bool, err error) {
	release, err := s.take(ctx)
	if err != nil {
		return false, err
	}
	defer release()
	if s.led.at == e {
		_, err := s.enter(ctx, e, s.led)
		return s.led.alone, err
	}
	_, said, err := s.open(ctx, e, s.known.id)
	if err != nil || said == statusInUse {
		return false, err
	}
	// If the KMS opens it again as if it were not open, it may be another's.
	_, again, err := s.open(ctx, e, s.known.id)
	if err == nil && again == statusInUse {
		err = s.close(ctx, e, s.known.id)
	}
	return said == statusAlone, err
}

// Close closes our streams, as far as the KMS answers at once.
func (s *Source) Close() error {
	s.kms.sources.Add(-1)
	ctx, cancel := context.WithTimeout(context.Background(), closeTimeout)
	defer cancel()
	var open []*stream
	for _, st := range []*stream{s.known, s.led, s.followed} {
		if st != nil && st.at != nil && !slices.Contains(open, st) {
			open = append(open, st)
		}
	}
	// What stays open the KMS forgets some time after the last key.
	if len(open) == 0 || s.kms.acquire(ctx, s.kms.slots) != nil {
		return nil
	}
	defer func() { <-s.kms.slots }()
	for _, st := range open {
		_ = s.close(ctx, st.at, st.id)
		st.at = nil
	}
	return nil
}
