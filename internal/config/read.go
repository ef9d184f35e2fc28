package config

import (
	"cmp"
	"errors"
	"io"
	"os"
	"path/filepath"
	"syscall"

	"go.yaml.in/yaml/v4"
)

// Load reads the configuration file at path and looks at every file that it
// names. The error is Problems: all that is wrong with either.
func Load(path string) (*Config, error) {
	whole := problems{document: &document{name: path}}
	data, err := read(path)
	if err != nil {
		whole.add(position{}, "", "%s", err)
		return nil, whole.all.err()
	}
	c, ps := parse(path, data)
	if c != nil {
		ps = append(ps, c.checkFiles()...)
	}
	if err := ps.err(); err != nil {
		return nil, err
	}
	return c, nil
}

// read returns the file's bytes, or one byte too many where it is too large.
func read(path string) ([]byte, error) {
	// Without waiting, as opening a named pipe would.
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, cause(err)
	}
	defer f.Close()
	switch i, err := f.Stat(); {
	case err != nil:
		return nil, cause(err)
	case i.IsDir():
		return nil, errors.New("a directory, not a configuration file")
	case !i.Mode().IsRegular(): // it is read more than once
		return nil, errors.New("not a regular file")
	}
	data, err := io.ReadAll(io.LimitReader(f, MaxFile+1))
	return data, cause(err)
}

// cause takes the path out of an error that is shown beside it.
func cause(err error) error {
	if e, ok := errors.AsType[*os.PathError](err); ok {
		return e.Err
	}
	return err
}

// Parse reads a configuration without looking at the files that it names;
// CheckFiles does that. Name is what problems call the file; relative paths
// are relative to its directory. The error is Problems.
func Parse(name string, data []byte) (*Config, error) {
	c, ps := parse(name, data)
	if err := ps.err(); err != nil {
		return nil, err
	}
	return c, nil
}

// parse returns what could be read beside the problems; nil where that is
// nothing.
func parse(name string, data []byte) (*Config, Problems) {
	c := &Config{source: document{name: name}}
	r := &reader{problems: problems{document: &c.source}, config: c, dir: filepath.Dir(name)}
	root := r.tree(data)
	if root == nil {
		return nil, r.all
	}
	r.root(root)
	return c, r.all
}

// reader makes a Config of a document.
type reader struct {
	problems
	config *Config
	dir    string // that relative paths are relative to

	defaultKMS bool             // the file has a kms block, good or not
	names      map[string]int   // line of the peer that has it
	publicKeys map[[32]byte]int // likewise
	identities map[[32]byte]int // likewise
}

const whyWindow = "a handshake comes about every 120s: a shorter window misses it, a longer one meets the next"

func (r *reader) root(n *yaml.Node) {
	c := r.config
	c.Listen, c.Window = DefaultListen, DefaultWindow
	window := between(MinWindow, MaxWindow, whyWindow)
	b := r.block("the configuration", place(n), n, []field{
		{"interface", one(&c.Interface, interfaceName), "the name of a WireGuard interface, such as wg0"},
		{"listen", one(&c.Listen, address(true)), ""},
		{"identity", pathTo(&c.Identity, secret), "the path of a file that keyturn genkey wrote"},
		{"window", one(&c.Window, window), ""},
		{"journal", (*reader).journal, ""},
		{"kms", func(r *reader, key, n *yaml.Node) bool {
			r.defaultKMS = true
			return kms(&c.KMS)(r, key, n)
		}, ""},
		{"peers", (*reader).peers, "a list: who is at the other end of each tunnel"},
	})
	if b == nil {
		return
	}
	c.at = b.at
}

func (r *reader) journal(key, n *yaml.Node) bool {
	j := &Journal{}
	b := r.block(key.Value, place(key), n, []field{
		{"path", pathTo(&j.Path, directory), "the directory that keyturn keeps the journal in"},
		{"key_file", pathTo(&j.KeyFile, secret), "the path of a secret that keyturn genkey wrote"},
	})
	r.config.Journal = j
	return b != nil
}

// kms reads a kms block. Whether it is good says only whether it is there.
func kms(dst **KMS) reading {
	return func(r *reader, key, n *yaml.Node) bool {
		k := &KMS{Interface: ETSI014, Method: GET, Timeout: DefaultTimeout}
		uri := func(s string) (string, error) {
			if k.Interface == ETSI004 {
				return kmeAddress(s)
			}
			return httpsURI(s)
		}
		timeout := between(MinTimeout, MaxTimeout, "a KMS that is slower than a minute is down; one that is asked for less loses keys on the way")
		b := r.block(key.Value, place(key), n, []field{
			{"interface", one(&k.Interface, oneOf(ETSI014, ETSI004, SKIP)), ""},
			{"dialect", one(&k.Dialect, oneOf(ForgeED3, ForgeED1)), ""},
			{"uri", several(&k.URIs, MaxURIs, uri), "where the KMS is reached, such as https://kme-a:8443"},
			{"sae", one(&k.SAE, sae), "the ID under which the KMS knows this end"},
			{"certificate", pathTo(&k.Certificate, readable), "the path of this end's certificate: a KMS is spoken to over mutual TLS only"},
			{"secret_key", pathTo(&k.SecretKey, secret), "the path of the key of this end's certificate"},
			{"root_certificate", pathTo(&k.RootCertificate, readable), "the path of the certificate that signed the KMS's"},
			{"server_name", one(&k.ServerName, host), ""},
			{"pin", several(&k.Pins, MaxPins, pin), ""},
			{"method", one(&k.Method, oneOf(GET, POST)), ""},
			{"timeout", one(&k.Timeout, timeout), ""},
		})
		if b == nil {
			return false
		}
		*dst = k
		if !b.good("interface") {
			return true
		}
		switch k.Interface {
		case ETSI004:
			if !b.given["dialect"] {
				r.add(place(key), "forge-ed3 or forge-ed1: ask the KMS's vendor; the wrong one hangs", "missing key %q in %s with interface 4", "dialect", key.Value)
			}
		default:
			r.only(b, "dialect", ETSI004)
		}
		if k.Interface != ETSI014 {
			r.only(b, "method", ETSI014)
		}
		return true
	}
}

// only refuses a key that has a meaning with another interface alone.
func (r *reader) only(b *block, key string, i Interface) {
	if at, ok := b.at[key]; ok {
		r.add(at, "remove it", "%s: belongs to interface %s alone", key, i)
	}
}

func (r *reader) peers(key, n *yaml.Node) bool {
	if n.Kind != yaml.SequenceNode {
		r.add(place(n), `begin each peer with "- name: ..."`, "%s: expected a list, found %s", key.Value, kindOf(n))
		return false
	}
	if len(n.Content) == 0 {
		r.add(place(n), "a rotator without peers has nothing to do", "%s: the list is empty", key.Value)
		return false
	}
	r.names, r.publicKeys, r.identities = map[string]int{}, map[[32]byte]int{}, map[[32]byte]int{}
	for _, p := range n.Content {
		r.peer(p)
	}
	return true
}

func (r *reader) peer(n *yaml.Node) {
	p := &Peer{
		Require: RequireAll, Combiner: XOR, Buffer: DefaultBuffer,
		OnStale: StaleKeep, MaxKeyAge: DefaultMaxKeyAge, Start: StartHold,
		Fallback: FallbackNone, Recovery: RecoveryAutomatic,
		Window: r.config.Window, KMS: r.config.KMS,
		source: r.document, begin: place(n), journal: r.config.Journal != nil,
	}
	noKMS := false
	b := r.block("peer", p.begin, n, []field{
		{"name", one(&p.Name, peerName), "what logs and status are to call it"},
		{"public_key", one(&p.PublicKey, publicKey), "the peer's WireGuard public key: wg show INTERFACE peers"},
		{"identity", several(&p.Identities, MaxIdentities, fingerprint), "keyturn pubkey < identity.key, at the other end"},
		{"address", one(&p.Address, address(false)), ""},
		{"sae", one(&p.SAE, sae), ""},
		{"role", one(&p.Role, oneOf(RoleClient, RoleServer)), ""},
		{"kms", func(r *reader, key, n *yaml.Node) bool {
			if n.Kind == yaml.ScalarNode && n.Value == "none" {
				p.KMS, noKMS = nil, true
				return true
			}
			return kms(&p.KMS)(r, key, n)
		}, ""},
		{"kems", several(&p.KEMs, MaxKEMs, knownKEM), ""},
		{"require", one(&p.Require, oneOf(RequireAll, RequireQKD, RequirePQC, RequireAny)), ""},
		{"combiner", one(&p.Combiner, oneOf(XOR, HKDFSHA384)), ""},
		{"buffer", one(&p.Buffer, whole(1, MaxBuffer, "more keys outlast a longer failure of their sources; 3 do well")), ""},
		{"window", one(&p.Window, between(MinWindow, MaxWindow, whyWindow)), ""},
		{"on_stale", one(&p.OnStale, oneOf(StaleKeep, StaleBlock)), ""},
		{"max_key_age", one(&p.MaxKeyAge, between(MinMaxKeyAge, MaxMaxKeyAge, "a key is replaced at half of it, and WireGuard makes a handshake about every 120s")), ""},
		{"start", one(&p.Start, oneOf(StartHold, StartBlock)), ""},
		{"fallback", one(&p.Fallback, oneOf(FallbackNone, FallbackInitial)), ""},
		{"recovery", one(&p.Recovery, oneOf(RecoveryAutomatic, RecoveryManual)), ""},
	})
	if b == nil {
		return
	}
	p.at = b.at
	r.config.Peers = append(r.config.Peers, p)
	r.sources(p, b, !noKMS && (b.given["kms"] || r.defaultKMS))
	if p.Role == RoleClient && !b.given["address"] {
		no := p.noAddress()
		r.add(p.at["role"], no.Hint, "%s", no.Message)
	}
	r.unique(p)
}

// sources judges the rules on where a peer's keys come from.
func (r *reader) sources(p *Peer, b *block, qkd bool) {
	pqc := b.given["kems"]
	switch {
	case !qkd && !pqc:
		r.add(p.begin, "add kems: [ML-KEM-1024], or a kms block", "peer has no source of keys: neither kms nor kems")
		return
	case qkd && p.KMS != nil && !b.given["sae"]:
		r.add(p.begin, "the ID of the peer's end in the QKD network; or opt out with kms: none", "missing key %q in peer with a kms", "sae")
	case p.KMS != nil && p.SAE != "" && p.SAE == p.KMS.SAE:
		r.add(b.at["sae"], "the kms block has the ID of this end, the peer that of the other", "sae: %s is this end's own", quote(p.SAE))
	}
	switch {
	case p.Require == RequireQKD && !qkd:
		r.add(b.at["require"], "add a kms block", "require: qkd needs a kms")
	case p.Require == RequirePQC && !pqc:
		r.add(b.at["require"], "add kems: [ML-KEM-1024]", "require: pqc needs kems")
	}
}

// unique refuses what an earlier peer has already.
func (r *reader) unique(p *Peer) {
	const hint = "each peer has its own"
	if _, ok := p.at["name"]; ok {
		if line, again := r.names[p.Name]; again {
			r.add(p.at["name"], hint, "name: %s is already that of the peer in line %d", quote(p.Name), line)
		}
		r.names[p.Name] = cmp.Or(r.names[p.Name], p.begin.line)
	}
	if at, ok := p.at["public_key"]; ok {
		r.distinct(r.publicKeys, p, "public_key", at, p.PublicKey)
	}
	if at, ok := p.at["identity"]; ok {
		for _, id := range p.Identities {
			r.distinct(r.identities, p, "identity", at, id)
		}
	}
}

func (r *reader) distinct(taken map[[32]byte]int, p *Peer, key string, at position, k [32]byte) {
	if line, again := taken[k]; again {
		r.addPublic(at, "each peer has its own", "%s: %s is already that of the peer in line %d", key, encode(k), line)
		return
	}
	taken[k] = p.begin.line
}
