package config

import (
	"cmp"
	"errors"
	"strings"

	"go.yaml.in/yaml/v4"
)

// reading takes a value out of a node. It reports what is wrong itself, and
// returns whether the value is good.
type reading func(r *reader, key, n *yaml.Node) bool

// field is one key of a block.
type field struct {
	key  string
	read reading
	// need is the hint for a missing key; empty for one that may be missing.
	need string
}

// block is a mapping that was read: where its good values are, and which keys
// it has at all.
type block struct {
	at    map[string]position // of good values
	given map[string]bool     // keys, with good values or bad
}

// good reports that a key is not given or has a good value: that a rule about
// it can be judged.
func (b *block) good(key string) bool {
	_, ok := b.at[key]
	return ok || !b.given[key]
}

// block reads a mapping, fields in the order of the list, so that a value may
// depend on those listed before. Begin is where a missing key is reported. It
// returns nil where there is no mapping.
func (r *reader) block(what string, begin position, n *yaml.Node, fields []field) *block {
	if n.Kind != yaml.MappingNode {
		r.add(place(n), "write it as lines of key: value", "%s: expected a block of keys, found %s", what, kindOf(n))
		return nil
	}
	b := &block{at: map[string]position{}, given: map[string]bool{}}
	known := make([]string, len(fields))
	for i, f := range fields {
		known[i] = f.key
	}
	type pair struct{ key, value *yaml.Node }
	pairs := map[string]pair{}
	for i := 0; i+1 < len(n.Content); i += 2 {
		k, v := n.Content[i], n.Content[i+1]
		if k.Kind != yaml.ScalarNode {
			r.add(place(k), "", "expected a key, found %s", kindOf(k))
			continue
		}
		if first, again := pairs[k.Value]; again {
			r.add(place(k), "remove one of the two", "key %s is already given in line %d", quote(k.Value), first.key.Line)
			continue
		}
		pairs[k.Value] = pair{k, v}
	}
	for _, f := range fields {
		p, ok := pairs[f.key]
		delete(pairs, f.key)
		switch {
		case !ok && f.need != "":
			r.add(begin, f.need, "missing key %q in %s", f.key, what)
		case !ok:
		case isNull(p.value):
			b.given[f.key] = true
			r.add(place(p.key), cmp.Or(f.need, "write a value, or leave the key out"), "%s: the value is missing", f.key)
		default:
			b.given[f.key] = true
			if f.read(r, p.key, p.value) {
				b.at[f.key] = place(p.value)
			}
		}
	}
	for k, p := range pairs {
		hint := didYouMean(k, known)
		if hint == "" {
			hint = "known here: " + strings.Join(known, ", ")
		}
		r.add(place(p.key), hint, "unknown key %s", quote(k))
	}
	return b
}

// one reads a single value into dst.
func one[T any](dst *T, parse func(string) (T, error)) reading {
	return func(r *reader, key, n *yaml.Node) bool {
		v, ok := scalar(r, key.Value, n, parse)
		if ok {
			*dst = v
		}
		return ok
	}
}

// several reads a list of 1 to most different values into dst; a single value
// stands for a list of one.
func several[T comparable](dst *[]T, most int, parse func(string) (T, error)) reading {
	return func(r *reader, key, n *yaml.Node) bool {
		nodes := []*yaml.Node{n}
		if n.Kind == yaml.SequenceNode {
			nodes = n.Content
		}
		switch {
		case len(nodes) == 0:
			r.add(place(n), "name one, or leave the key out", "%s: the list is empty", key.Value)
			return false
		case len(nodes) > most:
			r.add(place(nodes[most]), "", "%s: more than %d values", key.Value, most)
			return false
		}
		values, good := make([]T, 0, len(nodes)), true
		seen := map[T]bool{}
		for _, n := range nodes {
			v, ok := scalar(r, key.Value, n, parse)
			if ok && seen[v] {
				r.add(place(n), "remove one of the two", "%s: the same value twice", key.Value)
				ok = false
			}
			seen[v] = true
			values = append(values, v)
			good = good && ok
		}
		*dst = values
		return good
	}
}

// scalar reads a node that has to be a single value. What YAML takes it for
// (a number, a truth value) is of no interest: the text counts.
func scalar[T any](r *reader, key string, n *yaml.Node, parse func(string) (T, error)) (T, bool) {
	var none T
	if n.Kind != yaml.ScalarNode || isNull(n) {
		r.add(place(n), "", "%s: expected a single value, found %s", key, kindOf(n))
		return none, false
	}
	v, err := parse(n.Value)
	if err == nil {
		return v, true
	}
	add, hint := r.add, ""
	if e, ok := errors.AsType[*badValue](err); ok {
		hint = e.hint
		if e.public {
			add = r.addPublic
		}
	}
	add(place(n), hint, "%s: %s", key, err)
	return none, false
}

// isNull reports a value that is not there, or written as null.
func isNull(n *yaml.Node) bool { return n.Kind == yaml.ScalarNode && n.Tag == "!!null" }

// kindOf names a node in the user's words.
func kindOf(n *yaml.Node) string {
	switch {
	case n.Kind == yaml.MappingNode:
		return "a block of keys"
	case n.Kind == yaml.SequenceNode:
		return "a list"
	case isNull(n):
		return "nothing"
	}
	return quote(n.Value)
}
