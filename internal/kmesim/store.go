package kmesim

import (
	"net/http"
	"slices"
	"sync"
)

// store holds the keys that wait at a KME for their slaves, each once for each
// slave.
type store struct {
	mu    sync.Mutex
	max   int
	keys  map[string]*storedKey
	order []string // oldest first; may name keys that were delivered
}

type storedKey struct {
	bytes  []byte
	master string
	slaves []string // that have not fetched it
}

func newStore(limit int) *store {
	return &store{max: limit, keys: make(map[string]*storedKey)}
}

// put takes keys over from b. Where the store is full, the oldest keys go:
// their rounds were abandoned long ago. Keys that are there already stay as
// they are.
func (s *store) put(b *batch) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, k := range b.keys {
		if s.keys[k.ID] != nil {
			clear(k.Key)
			continue
		}
		s.keys[k.ID] = &storedKey{k.Key, b.master, slices.Clone(b.slaves)}
		s.order = append(s.order, k.ID)
	}
	for len(s.keys) > s.max {
		s.drop(s.order[0])
		s.order = s.order[1:]
	}
	if len(s.order) > 2*s.max {
		s.order = slices.DeleteFunc(s.order, func(id string) bool { return s.keys[id] == nil })
	}
}

// take delivers keys to a slave, all or none. The caller wipes them.
func (s *store) take(master, slave string, ids []string) ([]key, *problem) {
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
	keys := make([]key, len(ids))
	for i, id := range ids {
		k := s.keys[id]
		keys[i] = key{id, slices.Clone(k.bytes)}
		k.slaves = slices.DeleteFunc(k.slaves, func(s string) bool { return s == slave })
		if len(k.slaves) == 0 {
			s.drop(id)
		}
	}
	return keys, nil
}

// forget drops keys that their slaves shall not get.
func (s *store) forget(ids []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, id := range ids {
		s.drop(id)
	}
}

// waiting counts the keys that wait.
func (s *store) waiting() int {
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
