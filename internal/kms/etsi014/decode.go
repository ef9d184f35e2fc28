package etsi014

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	"keyturn/internal/kms"
	"keyturn/internal/psk"
)

// maxText bounds what is kept of a foreign text.
const maxText = 200

// errNotJSON means that an answer is no JSON at all.
var errNotJSON = errors.New("answer is not JSON")

// unmarshal decodes a JSON object. Unknown fields are ignored: KMEs have their
// own. The errors use our words and quote nothing, for body may hold a key.
func unmarshal(body []byte, v any) error {
	body = bytes.TrimSpace(body)
	switch {
	case len(body) == 0:
		return errors.New("answer is empty")
	case body[0] != '{':
		if json.Valid(body) {
			return errors.New("answer is JSON but not an object")
		}
		return errNotJSON
	}
	err := json.Unmarshal(body, v)
	if se, ok := errors.AsType[*json.SyntaxError](err); ok {
		if se.Error() == "unexpected end of JSON input" {
			return fmt.Errorf("answer is cut off after %d bytes", len(body))
		}
		return fmt.Errorf("answer is not JSON from byte %d on", se.Offset)
	}
	if te, ok := errors.AsType[*json.UnmarshalTypeError](err); ok {
		kind, _, _ := strings.Cut(te.Value, " ") // a number comes with its digits
		return fmt.Errorf("answer has a JSON %s as %s", kind, te.Field)
	}
	return err
}

// container is a key container (ETSI GS QKD 014 V1.1.1, 6.3).
type container struct {
	Keys []containerKey `json:"keys"`
}

type containerKey struct {
	ID  *string   `json:"key_ID"`
	Key base64Key `json:"key"`
}

// base64Key decodes a key straight out of the bytes of the answer. What is
// wrong with it is kept for later, so that the number of keys is judged first.
type base64Key struct {
	key *psk.Key
	err error
}

// UnmarshalJSON takes padded standard base64, possibly with line ends, which
// some KMEs add.
func (k *base64Key) UnmarshalJSON(b []byte) error {
	k.key.Wipe() // of a field that comes twice
	k.key = nil
	if b[0] != '"' {
		k.err = errors.New("key is not a JSON string")
		return nil
	}
	text := make([]byte, 0, len(b))
	defer func() { clear(text[:cap(text)]) }()
	text = bytes.TrimSpace(unescape(text, b[1:len(b)-1]))
	raw := make([]byte, base64.StdEncoding.DecodedLen(len(text)))
	defer clear(raw)
	n, err := base64.StdEncoding.Decode(raw, text)
	if err != nil {
		k.err = errors.New("key is not padded base64") // err names an offset into the key
		return nil
	}
	k.key, k.err = psk.New(raw[:n])
	if k.err != nil {
		k.err = fmt.Errorf("key has %d bits, not %d", 8*n, 8*psk.Size)
	}
	return nil
}

// unescape appends to dst the text of a valid JSON string without its quotes.
// What is not ASCII becomes '?', which is not base64. encoding/json would
// leave copies of the key behind.
func unescape(dst, s []byte) []byte {
	for i := 0; i < len(s); i++ {
		c := s[i]
		if c != '\\' {
			dst = append(dst, c)
			continue
		}
		i++
		switch s[i] {
		case 'n', 'r', 't':
			c = '\n'
		case 'u': // some encoders escape '+', '/' and '='
			var u [2]byte
			if _, err := hex.Decode(u[:], s[i+1:i+5]); err != nil || u[0] != 0 {
				u[1] = '?'
			}
			c = u[1]
			i += 4
		default:
			c = s[i]
		}
		dst = append(dst, c)
	}
	return dst
}

// decodeKeys returns the keys of a container, at least one and each of them
// usable. The error says what is wrong with one without quoting the key.
func decodeKeys(body []byte) (keys []namedKey, err error) {
	var c container
	defer func() {
		if err != nil {
			for _, k := range c.Keys {
				k.Key.key.Wipe()
			}
		}
	}()
	if err := unmarshal(body, &c); err != nil {
		return nil, err
	}
	if len(c.Keys) == 0 {
		return nil, errors.New("answer holds no key")
	}
	for _, k := range c.Keys {
		if err := k.check(); err != nil {
			return nil, err
		}
		keys = append(keys, namedKey{*k.ID, k.Key.key})
	}
	return keys, nil
}

// check says why a key cannot be used.
func (k *containerKey) check() error {
	switch {
	case k.Key.err != nil:
		return k.Key.err
	case k.Key.key == nil:
		return errors.New("key is missing")
	case k.Key.key.IsZero():
		return errors.New("key is all zero")
	case k.ID == nil:
		return errors.New("key ID is missing")
	}
	return kms.CheckKeyID(*k.ID)
}

// status is the status data format (ETSI GS QKD 014 V1.1.1, 6.1).
type status struct {
	SourceKME      string `json:"source_KME_ID"`
	TargetKME      string `json:"target_KME_ID"`
	MasterSAE      string `json:"master_SAE_ID"`
	SlaveSAE       string `json:"slave_SAE_ID"`
	KeySize        int64  `json:"key_size"`
	StoredKeyCount int64  `json:"stored_key_count"`
	MaxKeyCount    int64  `json:"max_key_count"`
	MaxKeyPerReq   int64  `json:"max_key_per_request"`
	MaxKeySize     int64  `json:"max_key_size"`
	MinKeySize     int64  `json:"min_key_size"`
	MaxSAEIDCount  int64  `json:"max_SAE_ID_count"`
}

func decodeStatus(body []byte) (kms.Status, error) {
	var s status
	if err := unmarshal(body, &s); err != nil {
		return kms.Status{}, err
	}
	for _, text := range []*string{&s.SourceKME, &s.TargetKME, &s.MasterSAE, &s.SlaveSAE} {
		*text = printableStart(*text)
	}
	return kms.Status{
		SourceKME:         s.SourceKME,
		TargetKME:         s.TargetKME,
		MasterSAE:         s.MasterSAE,
		SlaveSAE:          s.SlaveSAE,
		KeySize:           s.KeySize,
		MinKeySize:        s.MinKeySize,
		MaxKeySize:        s.MaxKeySize,
		StoredKeys:        s.StoredKeyCount,
		MaxKeys:           s.MaxKeyCount,
		MaxKeysPerRequest: s.MaxKeyPerReq,
		MaxSAEs:           s.MaxSAEIDCount,
	}, nil
}

// errorText returns the message of an error answer (ETSI GS QKD 014 V1.1.1,
// 6.5), or nothing: real ones are of any shape.
func errorText(body []byte) string {
	var e struct {
		Message string `json:"message"`
	}
	if unmarshal(body, &e) != nil {
		return ""
	}
	return printableStart(e.Message)
}

// printableStart returns at most maxText bytes of a foreign text, without
// anything that a terminal would act on.
func printableStart(s string) string {
	if len(s) > maxText {
		s = s[:maxText]
	}
	return strings.Map(func(r rune) rune {
		if !printable(string(r)) || r == '\uFFFD' {
			return -1
		}
		return r
	}, s)
}
