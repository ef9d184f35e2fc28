package etsi004

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"

	"keyturn/internal/kms"
	"keyturn/internal/psk"
)

// What is asked of a key stream beside 32-byte keys: about nothing, for a
// tunnel needs one key in two minutes. A KMS may still insist on more.
const (
	askedBPS = 32
	askedTTL = 10 * time.Minute // of keys that only one end has taken, and of a stream that only one has closed
)

// A KMS has no key at an index when it has run out of keys, which is over some
// time, or when the key was taken, which is never over. From the minSkip-th
// call in a row on a later index is tried as well, up to maxSkip farther.
const (
	minSkip = 3
	maxSkip = 16
)

// stream is a key stream as this end sees it: an association with one URI of
// the KMS, within which each index is asked for once.
type stream struct {
	id streamID
	at *endpoint // where it is open; nil: nowhere
	// fresh: it was not open before we opened it, so that no index from next on
	// was ever asked for. Otherwise an earlier life of ours may have done so.
	fresh bool
	next  uint32
	// refused counts the calls that got no key at next, and ahead is how far
	// beyond it was asked for one.
	refused, ahead uint32
	// tag is of this association: it keeps the ID of a key apart from that of
	// an earlier key with the same index.
	tag   string
	alone bool // when the KMS last spoke of it, the peer had not opened it
}

// begin notes that the stream was opened at e and had not been open.
func (s *stream) begin(e *endpoint, said status) {
	var tag [4]byte
	_, _ = rand.Read(tag[:]) // never fails
	*s = stream{id: s.id, at: e, fresh: true, tag: hex.EncodeToString(tag[:]), alone: said == statusAlone}
}

// pass notes that an index is not to be asked for again.
func (s *stream) pass(index uint32) {
	if index == math.MaxUint32 {
		s.fresh = false // used up: the next key needs another association
		return
	}
	if index >= s.next {
		s.next, s.refused, s.ahead = index+1, 0, 0
	}
}

// skip notes that the KMS has no key at next. If it says so for long, a tunnel
// of ours beside this one, which has the same stream, may have taken that key:
// then skip returns an index to try instead, each time one farther ahead.
func (s *stream) skip() (index uint32, try bool) {
	s.refused = min(s.refused+1, maxSkip)
	if s.refused < minSkip {
		return 0, false
	}
	s.ahead += s.refused
	index = s.next + s.ahead
	return index, index > s.next
}

// keyID is what travels over the link between the rotators.
type keyID struct {
	stream streamID
	index  uint32
	tag    string
}

const tagLength = 8

func (id keyID) String() string { return fmt.Sprintf("%v:%d:%s", id.stream, id.index, id.tag) }

// parseKeyID takes what String makes, and nothing else.
func parseKeyID(text string) (keyID, error) {
	parts := strings.Split(text, ":")
	if len(parts) == 3 && len(parts[2]) == tagLength {
		raw, err := hex.DecodeString(parts[0])
		index, err2 := strconv.ParseUint(parts[1], 10, 32)
		if err == nil && err2 == nil && len(raw) == len(streamID{}) {
			id := keyID{stream: streamID(raw), index: uint32(index), tag: parts[2]}
			if id.String() == text && id.stream != (streamID{}) && kms.CheckKeyID(text) == nil {
				return id, nil
			}
		}
	}
	return keyID{}, fmt.Errorf("key ID %q is not one of a key stream", text)
}

// open opens a stream at e: a success, or statusInUse. A zero id asks for a new
// stream. A counter-offer is taken if it gives the keys that we need, and asked
// for from then on. The caller has the turn.
func (s *Source) open(ctx context.Context, e *endpoint, id streamID) (streamID, status, error) {
	for again := false; ; again = true {
		a, err := s.openOnce(ctx, e, id)
		if err != nil {
			return streamID{}, 0, err
		}
		no := refusal(e, openConnect, a.status)
		switch a.status {
		case statusOK, statusAlone:
			if a.qos.chunk != psk.Size {
				return streamID{}, 0, fmt.Errorf("%w: %s opened a stream with keys of %d bytes, not %d", kms.ErrRefused, e.address, a.qos.chunk, psk.Size)
			}
			return a.id, a.status, nil
		case statusInUse:
			return id, a.status, nil
		case statusQoS:
			if a.qos.chunk != psk.Size {
				return streamID{}, 0, fmt.Errorf("%w; it offers keys of %d bytes, not %d", no, a.qos.chunk, psk.Size)
			}
			if again || a.qos == s.qos {
				return streamID{}, 0, fmt.Errorf("%w, although that is what it offers", no)
			}
			s.qos = a.qos
		default:
			return streamID{}, 0, no
		}
	}
}

func (s *Source) openOnce(ctx context.Context, e *endpoint, id streamID) (opened, error) {
	k := s.kms
	b, err := k.exchange(ctx, e, openConnect, k.dialect.encodeOpen(k.sae, s.peer, s.qos, id))
	if err != nil {
		return opened{}, err
	}
	a, err := k.dialect.decodeOpen(b)
	if err == nil && (a.status == statusOK || a.status == statusAlone) {
		switch {
		case a.id == streamID{}:
			err = errors.New("answer names no key stream")
		case id != streamID{} && a.id != id:
			err = fmt.Errorf("answer is about key stream %v, not %v", a.id, id)
		}
	}
	if err != nil {
		return opened{}, &exchangeError{e.address, openConnect, true, err}
	}
	return a, nil
}

// close ends this end's association. Whatever the KMS says to it, nothing more
// can be done.
func (s *Source) close(ctx context.Context, e *endpoint, id streamID) error {
	b, err := s.kms.exchange(ctx, e, closeStream, id[:])
	if err != nil {
		return err
	}
	if _, err := decodeClose(b); err != nil {
		return &exchangeError{e.address, closeStream, true, err}
	}
	return nil
}

// get asks for the key at an index. The answer may be about another index.
func (s *Source) get(ctx context.Context, e *endpoint, id streamID, index uint32) (delivered, error) {
	k := s.kms
	for _, room := range k.dialect.rooms {
		b, err := k.exchange(ctx, e, getKey, k.dialect.encodeGetKey(id, index, room))
		if err != nil {
			return delivered{}, err
		}
		a, err := decodeKey(b)
		clear(b)
		switch {
		case err != nil:
			return delivered{}, &exchangeError{e.address, getKey, true, err}
		case a.key != nil:
			return a, nil
		case a.status != statusNoRoom:
			return delivered{}, refusal(e, getKey, a.status)
		}
	}
	return delivered{}, refusal(e, getKey, statusNoRoom)
}

// mayBeGone reports whether an answer to GET_KEY could mean that the stream is
// not open. The standard has no status for it, and servers use several.
func mayBeGone(err error) bool {
	se, ok := errors.AsType[*statusError](err)
	if !ok || se.service != getKey {
		return false
	}
	switch se.status {
	case statusNoKeys, statusTimeout, statusNoRoom:
		return false
	}
	return true
}

// enter opens a stream, and reports whether the KMS may not have had it open
// for us. Some KMSs say that an open stream is in use; others open it as if it
// were not, and only being asked twice tells which kind this is. Where it was
// certainly not open, its indices begin anew. The caller has the turn.
func (s *Source) enter(ctx context.Context, e *endpoint, st *stream) (bool, error) {
	_, first, err := s.open(ctx, e, st.id)
	if err != nil {
		return false, err
	}
	was := *st
	st.at, st.fresh = nil, false // until we know
	second := statusInUse
	if first != statusInUse {
		if _, second, err = s.open(ctx, e, st.id); err != nil {
			return false, err
		}
	}
	switch {
	case first != statusInUse && second == statusInUse:
		st.begin(e, first)
	case was.at == e:
		*st = was
	default:
		st.at = e
	}
	if second != statusInUse {
		st.alone = second == statusAlone
	}
	return first != statusInUse, nil
}
