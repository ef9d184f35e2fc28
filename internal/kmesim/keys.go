package kmesim

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"sync"
)

// A key is made at the KME that its master asks, and waits for its slaves at
// the other, which is told of it before the master gets it: so an ID never
// overtakes its key. A slave that asks at the KME where the key was made is
// served from the other one, over the link. There is one copy of a key, so that
// no slave gets it twice, wherever it asks.

// The verbs of the link that carry keys. Each has a batch for its body.
const (
	verbKeys   = "keys"   // keys that were made, for their slaves
	verbTake   = "take"   // IDs that the only slave wants; answered by encodeTaken
	verbForget = "forget" // IDs that nobody got
)

// newKeys makes keys of so many bits for a master and its slaves, each SAE named
// once. The caller wipes them.
func (k *KME) newKeys(ctx context.Context, master string, slaves []string, number, bits int) ([]key, *problem) {
	fault, _ := k.strike(OutOfKeys, WrongSize, OutOfStep)
	switch fault.Kind {
	case OutOfKeys:
		return nil, &problem{status: cmp.Or(fault.Code, http.StatusServiceUnavailable), Message: textNoKeys}
	case WrongSize:
		bits = cmp.Or(fault.Bits, shrunk)
	}
	if !k.pools.take(master, slaves, number, bits) {
		return nil, &problem{status: http.StatusServiceUnavailable, Message: textNoKeys}
	}
	keys, err := k.random.keys(number, bits/8)
	if err != nil {
		return nil, &problem{status: http.StatusServiceUnavailable, Message: err.Error()}
	}
	b := &batch{master, slaves, keys}
	if fault.Kind != OutOfStep {
		if err := k.send(ctx, verbKeys, b); err != nil {
			wipe(keys)
			k.pools.put(master, slaves, number, bits)
			if !errors.Is(err, errCut) {
				k.addUnheard(b.ids())
			}
			k.log.DebugContext(ctx, "the other KME was not told of new keys", "err", err)
			return nil, &problem{status: http.StatusServiceUnavailable, Message: textNoPeer}
		}
	}
	k.counted.made.Add(uint64(number))
	k.log.DebugContext(ctx, "keys made", "master", master, "slaves", slaves, "number", number, "bits", bits)
	return keys, nil
}

// maxUnheard bounds the IDs that wait to be forgotten. What is beyond it stays at
// the other KME until it is the oldest there.
const maxUnheard = 4096

func (k *KME) addUnheard(ids []string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.unheard = append(k.unheard, ids[:min(len(ids), maxUnheard-len(k.unheard))]...)
}

// forgetUnheard asks the other KME to drop keys of which nobody got the ID.
func (k *KME) forgetUnheard(ctx context.Context) {
	for {
		k.mu.Lock()
		ids := k.unheard[:min(len(k.unheard), MaxKeysPerRequest)]
		k.unheard = slices.Clone(k.unheard[len(ids):])
		k.mu.Unlock()
		if len(ids) == 0 {
			return
		}
		if err := k.send(ctx, verbForget, batchOf(ids)); err != nil {
			k.addUnheard(ids)
			return
		}
	}
}

// takeKeys delivers keys that newKeys made to one of their slaves, all or none,
// in the order of their IDs. The caller wipes them.
func (k *KME) takeKeys(ctx context.Context, master, slave string, ids []string) ([]key, *problem) {
	fault, _ := k.strike(Late, WrongBytes, WrongSize)
	if fault.Kind == Late {
		return nil, &problem{status: cmp.Or(fault.Code, http.StatusBadRequest), Message: textNotFound}
	}
	keys, p := k.store.take(master, slave, ids)
	if p != nil && p.Message == textNotFound {
		if far, farProblem := k.takeFar(ctx, master, slave, ids); far != nil || farProblem != nil {
			keys, p = far, farProblem
		}
	}
	if p != nil {
		return nil, p
	}
	for i := range keys {
		switch b := keys[i].Key; fault.Kind {
		case WrongBytes:
			_, _ = rand.Read(b)
		case WrongSize:
			keys[i].Key = make([]byte, cmp.Or(fault.Bits, shrunk)/8)
			copy(keys[i].Key, b)
			clear(b)
		}
	}
	k.counted.delivered.Add(uint64(len(keys)))
	k.log.DebugContext(ctx, "keys delivered", "master", master, "slave", slave, "number", len(ids))
	return keys, nil
}

// takeFar delivers keys that wait at the other KME. It returns neither keys nor
// a problem where that one cannot be asked.
func (k *KME) takeFar(ctx context.Context, master, slave string, ids []string) ([]key, *problem) {
	if slices.ContainsFunc(ids, func(id string) bool { return len(id) > maxKeyID }) {
		return nil, nil
	}
	b := batchOf(ids)
	b.master, b.slaves = master, []string{slave}
	answer, err := k.call(ctx, verbTake, b.encode())
	if err != nil {
		k.log.DebugContext(ctx, "the other KME was not asked for keys", "err", err)
		return nil, nil
	}
	defer clear(answer)
	keys, p, err := decodeTaken(answer, b)
	if err != nil {
		k.log.WarnContext(ctx, "the other KME was not understood", "err", err)
		return nil, nil
	}
	return keys, p
}

// send tells the other KME of keys.
func (k *KME) send(ctx context.Context, verb string, b *batch) error {
	body := b.encode()
	defer clear(body)
	_, err := k.call(ctx, verb, body)
	return err
}

// handleKeys answers the verbs that carry keys.
func (k *KME) handleKeys() {
	k.handleLink(verbKeys, func(_ context.Context, body []byte) ([]byte, error) {
		b, err := decodeBatch(body)
		if err != nil {
			return nil, err
		}
		k.store.put(b)
		return nil, nil
	})
	k.handleLink(verbForget, func(_ context.Context, body []byte) ([]byte, error) {
		b, err := decodeBatch(body)
		if err != nil {
			return nil, err
		}
		k.store.forget(b.ids())
		return nil, nil
	})
	k.handleLink(verbTake, func(_ context.Context, body []byte) ([]byte, error) {
		b, err := decodeBatch(body)
		if err != nil {
			return nil, err
		}
		if len(b.slaves) != 1 {
			return nil, errMalformed
		}
		keys, p := k.store.take(b.master, b.slaves[0], b.ids())
		defer wipe(keys)
		return encodeTaken(b, keys, p), nil
	})
}

// maxKeyID bounds the ID of a key that the other KME is asked for, in bytes;
// those that are made here have 36.
const maxKeyID = 64

// encodeTaken answers verbTake: a status, a message where it is not 200, and
// the batch with the keys in it where it is.
func encodeTaken(b *batch, keys []key, p *problem) []byte {
	if p != nil {
		return appendSized(appendNumber(nil, p.status), p.Message)
	}
	b.keys = keys
	body := b.encode()
	defer clear(body)
	return append(appendNumber(make([]byte, 0, 2+len(body)), http.StatusOK), body...)
}

// decodeTaken reads the answer to a batch of IDs.
func decodeTaken(answer []byte, asked *batch) ([]key, *problem, error) {
	in := reader{rest: answer}
	status := in.number(http.StatusOK, 599)
	if status != http.StatusOK {
		p := &problem{status: status, Message: string(in.sized())}
		if in.bad || !in.rest.Empty() {
			return nil, nil, errMalformed
		}
		return nil, p, nil
	}
	b, err := decodeBatch(in.rest)
	if err != nil {
		return nil, nil, err
	}
	if !slices.Equal(b.ids(), asked.ids()) {
		wipe(b.keys)
		return nil, nil, errors.New("other keys than asked for")
	}
	return b.keys, nil, nil
}

// source makes keys and their IDs.
type source struct {
	mu     sync.Mutex
	random io.Reader
}

// keys makes so many keys of so many bytes. The caller wipes them.
func (s *source) keys(number, size int) ([]key, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	keys := make([]key, number)
	for i := range keys {
		var u [16]byte
		if _, err := io.ReadFull(s.random, u[:]); err != nil {
			wipe(keys)
			return nil, fmt.Errorf("read random key ID: %w", err)
		}
		keys[i].Key = make([]byte, size)
		if _, err := io.ReadFull(s.random, keys[i].Key); err != nil {
			wipe(keys)
			return nil, fmt.Errorf("read random key: %w", err)
		}
		u[6] = u[6]&0x0f | 0x40 // RFC 9562, 5.4: UUIDv4
		u[8] = u[8]&0x3f | 0x80
		keys[i].ID = fmt.Sprintf("%x-%x-%x-%x-%x", u[:4], u[4:6], u[6:8], u[8:10], u[10:])
	}
	return keys, nil
}
