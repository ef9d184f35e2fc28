package config

import (
	"path/filepath"

	"go.yaml.in/yaml/v4"
)

// LoadKMS reads of the configuration file at path only what is about key
// management systems, and looks only at the files that this names: for those
// who try a KMS before they have a tunnel. Of a peer there are Name, SAE and
// KMS, each as far as it is given; peers without a KMS are left out. All else
// in the file may be missing, and its values are not looked at. The error is
// Problems.
func LoadKMS(path string) (*Config, error) {
	whole := problems{document: &document{name: path}}
	data, err := read(path)
	if err != nil {
		whole.add(position{}, "", "%s", err)
		return nil, whole.all.err()
	}
	c := &Config{source: document{name: path}}
	r := &reader{problems: problems{document: &c.source}, config: c, dir: filepath.Dir(path)}
	root := r.tree(data)
	if root != nil {
		r.kmsOnly(root)
	}
	if err := append(r.all, c.checkFiles()...).err(); err != nil {
		return nil, err
	}
	return c, nil
}

// kmsOnly reads the root of a file for LoadKMS.
func (r *reader) kmsOnly(n *yaml.Node) {
	b := r.block("the configuration", place(n), n, append([]field{
		{"kms", kms(&r.config.KMS), ""},
		{"peers", (*reader).kmsPeers, ""},
	}, ignored("interface", "listen", "identity", "window", "journal")...))
	if b == nil || len(r.all) > 0 {
		return
	}
	if r.config.KMS == nil && len(r.config.Peers) == 0 {
		r.add(place(n), "add a kms block: where the KMS is and how to prove who we are", "the configuration has no kms")
	}
}

func (r *reader) kmsPeers(key, n *yaml.Node) bool {
	if n.Kind != yaml.SequenceNode {
		r.add(place(n), `begin each peer with "- name: ..."`, "%s: expected a list, found %s", key.Value, kindOf(n))
		return false
	}
	for _, item := range n.Content {
		p := &Peer{KMS: r.config.KMS, begin: place(item)}
		b := r.block("peer", p.begin, item, append([]field{
			{"name", one(&p.Name, peerName), ""},
			{"sae", one(&p.SAE, sae), ""},
			{"kms", func(r *reader, key, n *yaml.Node) bool {
				if p.KMS = nil; n.Kind == yaml.ScalarNode && n.Value == "none" {
					return true
				}
				return kms(&p.KMS)(r, key, n)
			}, ""},
		}, ignored("public_key", "identity", "address", "role", "kems", "require", "combiner", "buffer", "window",
			"on_stale", "max_key_age", "start", "fallback", "recovery")...))
		if b == nil || p.KMS == nil {
			continue
		}
		if p.SAE == p.KMS.SAE {
			r.add(b.at["sae"], "the kms block has the ID of this end, the peer that of the other", "sae: %s is this end's own", quote(p.SAE))
		}
		r.config.Peers = append(r.config.Peers, p)
	}
	return true
}

// ignored are fields whose values are not looked at.
func ignored(keys ...string) []field {
	fields := make([]field, len(keys))
	for i, k := range keys {
		fields[i] = field{k, func(*reader, *yaml.Node, *yaml.Node) bool { return true }, ""}
	}
	return fields
}
