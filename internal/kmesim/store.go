package kmesim

import (
	"crypto/rand"
	"fmt"
	"io"
	"net/http"
	"slices"
	"sync"
)

// store holds the keys that wait for a slave, for both KMEs of a pair. A key
// is delivered once to the master, when it is made, and once to each slave.
type store struct {
	mu     sync.Mutex
	random io.Reader
	max    int
	keys   map[string]*storedKey
	order  []string // oldest first; may name keys that were delivered
}

type storedKey struct {
	bytes  []byte
	master string
	slaves []string // that have not fetched it
}

func newStore(random io.Reader, limit int) *store {
	return &store{random: random, max: limit, keys: make(map[string]*storedKey)}
}

// add makes a key of so many bytes. The caller wipes what it gets. Where the
// store is full, the oldest key goes: its round was abandoned long ago.
func (s *store) add(master string, slaves []string, size int) (id string, key []byte, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var u [16]byte
	if _, err := io.ReadFull(s.random, u[:]); err != nil {
		return "", nil, fmt.Errorf("read random key ID: %w", err)
	}
	key = make([]byte, size)
	if _, err := io.ReadFull(s.random, key); err != nil {
		return "", nil, fmt.Errorf("read random key: %w", err)
	}
	u[6] = u[6]&0x0f | 0x40 // RFC 9562, 5.4: UUIDv4
	u[8] = u[8]&0x3f | 0x80
	id = fmt.Sprintf("%x-%x-%x-%x-%x", u[:4], u[4:6], u[6:8], u[8:10], u[10:])
	s.keys[id] = &storedKey{slices.Clone(key), master, slices.Clone(slaves)}
	s.order = append(s.order, id)
	for len(s.keys) > s.max {
		s.drop(s.order[0])
		s.order = s.order[1:]
	}
	if len(s.order) > 2*s.max {
		s.order = slices.DeleteFunc(s.order, func(id string) bool { return s.keys[id] == nil })
	}
	return id, key, nil
}

// take delivers keys to a slave, all or none. The caller wipes them.
func (s *store) take(master, slave string, ids []string) ([][]byte, *problem) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, id := range ids {
		switch k := s.keys[id]; {
		case k == nil:
			return nil, bad(textNotFound)
		case k.master != master || !slices.Contains(k.slaves, slave):
			return nil, &problem{status: http.StatusUnauthorized, Message: textNotNamed}
		}
	}
	keys := make([][]byte, len(ids))
	for i, id := range ids {
		k := s.keys[id]
		keys[i] = slices.Clone(k.bytes)
		k.slaves = slices.DeleteFunc(k.slaves, func(s string) bool { return s == slave })
		if len(k.slaves) == 0 {
			s.drop(id)
		}
	}
	return keys, nil
}

// stored counts the keys that wait.
func (s *store) stored() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.keys)
}

func (s *store) drop(id string) {
	if k := s.keys[id]; k != nil {
		clear(k.bytes)
		delete(s.keys, id)
	}
}

// scramble replaces a key by other bytes.
func scramble(key []byte) { _, _ = rand.Read(key) }
