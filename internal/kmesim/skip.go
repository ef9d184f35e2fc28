package kmesim

import (
	"cmp"
	"encoding/hex"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
)

// The Secure Key Integration Protocol (Cisco SKIP, draft-cisco-skip-02) at the
// ports of ETSI GS QKD 014: its paths are others. Its systems are key providers,
// each beside an application; here every SAE meets one of its own, which goes by
// the ID of the SAE and shares keys with all others. Keys, pools and faults are
// those of 014.

// Limits of random bytes, in bits.
const (
	entropySize    = 256 // where a request names none
	maxEntropySize = 8192
)

// skipPath takes a path of SKIP apart; keyID is there where the verb is "key"
// and a key is named.
func skipPath(u *url.URL) (verb, keyID string, ok bool) {
	path := u.EscapedPath()
	switch path {
	case "/capabilities", "/entropy", "/key":
		return path[1:], "", true
	}
	escaped, ok := strings.CutPrefix(path, "/key/")
	if !ok || strings.Contains(escaped, "/") {
		return "", "", false
	}
	keyID, err := url.PathUnescape(escaped)
	return "key", keyID, err == nil && keyID != ""
}

// handleSKIP answers a request whose path is one of SKIP.
func (k *KME) handleSKIP(_ http.ResponseWriter, r *http.Request) (answer, *problem) {
	sae, p := caller(r)
	if p != nil {
		return nil, p
	}
	verb, keyID, _ := skipPath(r.URL)
	if r.Method != http.MethodGet {
		return nil, &problem{status: http.StatusMethodNotAllowed, Message: "method not allowed", allow: "GET"}
	}
	query, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		return nil, bad("malformed query")
	}
	switch {
	case verb == "capabilities":
		if p := known(query); p != nil {
			return nil, p
		}
		return &capabilities{Entropy: true, Key: true, Algorithm: "simulated QKD", Local: sae, Remote: []string{"*"}}, nil
	case verb == "entropy":
		return k.entropy(query)
	case keyID != "":
		return k.skipKeyByID(r, sae, keyID, query)
	default:
		return k.skipKey(r, sae, query)
	}
}

// known says what is wrong with the names in a query: each stands once.
func known(query url.Values, names ...string) *problem {
	for name, values := range query {
		if !slices.Contains(names, name) {
			return bad(fmt.Sprintf("unknown parameter %q", name))
		}
		if len(values) != 1 {
			return bad(name + " stands there twice")
		}
	}
	return nil
}

// bits reads a number of bits.
func bits(query url.Values, name string, low, high, none int) (int, *problem) {
	if !query.Has(name) {
		return none, nil
	}
	switch n, err := strconv.Atoi(query.Get(name)); {
	case err != nil:
		return 0, bad(name + " is not a number")
	case n%8 != 0:
		return 0, bad(name + " shall be a multiple of 8")
	case n < low || n > high:
		return 0, bad(fmt.Sprintf("%s shall be between %d and %d", name, low, high))
	default:
		return n, nil
	}
}

// partner reads the system that a key is shared with.
func partner(query url.Values, sae string) (string, *problem) {
	switch id := query.Get("remoteSystemID"); {
	case id == "":
		return "", bad("remoteSystemID is missing")
	case len(id) > maxSAE:
		return "", bad("remoteSystemID is too long")
	case id == sae:
		return "", bad("a system shares no keys with itself")
	default:
		return id, nil
	}
}

// capabilities are what "Get Capabilities" tells (draft-cisco-skip-02, 4.1).
type capabilities struct {
	Entropy   bool     `json:"entropy"`
	Key       bool     `json:"key"`
	Algorithm string   `json:"algorithm"`
	Local     string   `json:"localSystemID"`
	Remote    []string `json:"remoteSystemID"` // glob patterns
}

func (*capabilities) wipe() {}

// skipKey answers "Get Key" without a keyId (draft-cisco-skip-02, 4.2).
func (k *KME) skipKey(r *http.Request, sae string, query url.Values) (answer, *problem) {
	if p := known(query, "remoteSystemID", "size"); p != nil {
		return nil, p
	}
	peer, p := partner(query, sae)
	if p != nil {
		return nil, p
	}
	size, p := bits(query, "size", MinKeySize, MaxKeySize, KeySize)
	if p != nil {
		return nil, p
	}
	keys, p := k.newKeys(r.Context(), sae, []string{peer}, 1, size)
	if p != nil {
		return nil, p
	}
	return &hexKey{keys[0]}, nil
}

// skipKeyByID answers "Get Key" with a keyId. A key that is there for others is
// as good as unknown: SKIP has no status for it.
func (k *KME) skipKeyByID(r *http.Request, sae, keyID string, query url.Values) (answer, *problem) {
	if p := known(query, "remoteSystemID"); p != nil {
		return nil, p
	}
	peer, p := partner(query, sae)
	if p != nil {
		return nil, p
	}
	id, err := hex.DecodeString(keyID)
	if err != nil || len(id) != 16 {
		return nil, bad("malformed keyId")
	}
	uuid := fmt.Sprintf("%x-%x-%x-%x-%x", id[:4], id[4:6], id[6:8], id[8:10], id[10:])
	keys, p := k.takeKeys(r.Context(), peer, sae, []string{uuid})
	switch {
	case p != nil && p.status == http.StatusUnauthorized:
		return nil, bad(textNotFound)
	case p != nil:
		return nil, p
	}
	return &hexKey{keys[0]}, nil
}

// hexKey is a key in the form of SKIP. Its keyId is the key ID of 014 without
// the dashes.
type hexKey struct{ key key }

func (h *hexKey) wipe() { clear(h.key.Key) }

// encode writes the key without the buffers that encoding/json keeps.
func (h *hexKey) encode() []byte {
	id := strings.ReplaceAll(h.key.ID, "-", "")
	b := make([]byte, 0, len(`{"keyId":"","key":""}`)+len(id)+hex.EncodedLen(len(h.key.Key)))
	b = append(b, `{"keyId":"`+id+`","key":"`...)
	b = hex.AppendEncode(b, h.key.Key)
	return append(b, `"}`...)
}

// entropy answers "Get Entropy" (draft-cisco-skip-02, 4.3).
func (k *KME) entropy(query url.Values) (answer, *problem) {
	if p := known(query, "minentropy"); p != nil {
		return nil, p
	}
	size, p := bits(query, "minentropy", 8, maxEntropySize, entropySize)
	if p != nil {
		return nil, p
	}
	none := &problem{status: http.StatusServiceUnavailable, Message: "not enough entropy"}
	if f, _ := k.strike(OutOfKeys); f.Kind == OutOfKeys {
		none.status = cmp.Or(f.Code, none.status)
		return nil, none
	}
	random, err := k.random.keys(1, size/8)
	if err != nil {
		return nil, none
	}
	return &entropy{random[0].Key}, nil
}

// entropy is random bytes, which are as secret as a key.
type entropy struct{ random []byte }

func (e *entropy) wipe() { clear(e.random) }

func (e *entropy) encode() []byte {
	b := append(make([]byte, 0, 64+hex.EncodedLen(len(e.random))), `{"randomStr":"`...)
	b = hex.AppendEncode(b, e.random)
	return fmt.Appendf(b, `","minentropy":%d}`, 8*len(e.random))
}
