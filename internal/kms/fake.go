package kms

import (
	"context"
	"fmt"
	"io"
	"sync"

	"keyturn/internal/psk"
)

// maxFakeKeys bounds the keys that one end of a fake pair keeps for the other;
// the oldest makes room.
const maxFakeKeys = 1024

// Fake is one end of a pair of key management systems in memory, for tests. A
// key made at one end is delivered once at the other, at once and in any order,
// unless a fault is set.
type Fake struct {
	name  string
	pair  *fakePair
	inbox *fakeStore // what the other end made
	peer  *fakeStore // what this end made

	// The rest is guarded by pair.mu.
	err   error
	hang  chan struct{} // not nil: calls wait until it is closed
	wrong bool
}

// fakePair is what both ends share.
type fakePair struct {
	mu     sync.Mutex
	random io.Reader
	made   int
}

type fakeStore struct {
	keys  map[string]*psk.Key
	order []string // oldest first; may name keys already delivered
}

var _ Source = (*Fake)(nil)

// NewFakePair returns two connected fakes whose keys are read from random.
// Key IDs are "key-1", "key-2" and so on over both ends.
func NewFakePair(random io.Reader) (a, b *Fake) {
	p := &fakePair{random: random}
	forA := &fakeStore{keys: make(map[string]*psk.Key)}
	forB := &fakeStore{keys: make(map[string]*psk.Key)}
	return &Fake{name: "kme-a", pair: p, inbox: forA, peer: forB},
		&Fake{name: "kme-b", pair: p, inbox: forB, peer: forA}
}

// Fail makes every call return err from now on; nil heals.
func (f *Fake) Fail(err error) {
	f.pair.mu.Lock()
	defer f.pair.mu.Unlock()
	f.err = err
}

// Hang makes every call wait, silently, for its context or for Hang(false).
func (f *Fake) Hang(on bool) {
	f.pair.mu.Lock()
	defer f.pair.mu.Unlock()
	switch {
	case on && f.hang == nil:
		f.hang = make(chan struct{})
	case !on && f.hang != nil:
		close(f.hang)
		f.hang = nil
	}
}

// Wrong makes KeyByID return other bytes than the other end was given.
func (f *Fake) Wrong(on bool) {
	f.pair.mu.Lock()
	defer f.pair.mu.Unlock()
	f.wrong = on
}

// Key makes a key and leaves it for the other end.
func (f *Fake) Key(ctx context.Context) (string, *psk.Key, error) {
	if err := f.enter(ctx); err != nil {
		return "", nil, err
	}
	defer f.pair.mu.Unlock()
	key, err := psk.Random(f.pair.random)
	if err != nil {
		return "", nil, err
	}
	f.pair.made++
	id := fmt.Sprintf("key-%d", f.pair.made)
	f.peer.put(id, key.Clone())
	return id, key, nil
}

// KeyByID delivers a key of the other end, once.
func (f *Fake) KeyByID(ctx context.Context, id string) (*psk.Key, error) {
	if err := CheckKeyID(id); err != nil {
		return nil, err
	}
	if err := f.enter(ctx); err != nil {
		return nil, err
	}
	defer f.pair.mu.Unlock()
	key, ok := f.inbox.keys[id]
	if !ok {
		return nil, fmt.Errorf("%w: %q", ErrUnknownKey, id)
	}
	delete(f.inbox.keys, id)
	if f.wrong {
		key.Wipe()
		return psk.Random(f.pair.random)
	}
	return key, nil
}

// Status counts the keys that wait here for delivery.
func (f *Fake) Status(ctx context.Context) (Status, error) {
	if err := f.enter(ctx); err != nil {
		return Status{}, err
	}
	defer f.pair.mu.Unlock()
	return Status{
		SourceKME:         f.name,
		KeySize:           8 * psk.Size,
		MinKeySize:        8 * psk.Size,
		MaxKeySize:        8 * psk.Size,
		StoredKeys:        int64(len(f.inbox.keys)),
		MaxKeys:           maxFakeKeys,
		MaxKeysPerRequest: 1,
	}, nil
}

// Close does nothing.
func (f *Fake) Close() error { return nil }

// enter waits while the fake hangs and returns nil with the pair locked.
func (f *Fake) enter(ctx context.Context) error {
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		f.pair.mu.Lock()
		hang := f.hang
		if hang == nil {
			if err := f.err; err != nil {
				f.pair.mu.Unlock()
				return err
			}
			return nil
		}
		f.pair.mu.Unlock()
		select {
		case <-hang:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (s *fakeStore) put(id string, key *psk.Key) {
	if len(s.order) == maxFakeKeys {
		s.keys[s.order[0]].Wipe()
		delete(s.keys, s.order[0])
		s.order = s.order[1:]
	}
	s.keys[id] = key
	s.order = append(s.order, id)
}
