package etsi014

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"

	"keyturn/internal/kms"
	"keyturn/internal/kms/kmshttp"
	"keyturn/internal/psk"
)

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
	if err := kmshttp.Unmarshal(body, &c); err != nil {
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
	if err := kmshttp.Unmarshal(body, &s); err != nil {
		return kms.Status{}, err
	}
	for _, text := range []*string{&s.SourceKME, &s.TargetKME, &s.MasterSAE, &s.SlaveSAE} {
		*text = kmshttp.Shown(*text)
	}
	return kms.Status{
		SourceKME:         s.SourceKME,
		TargetKME:         s.TargetKME,
		MasterSAE:         s.MasterSAE,
		SlaveSAE:          s.SlaveSAE,
		KeySize:           max(0, s.KeySize),
		MinKeySize:        max(0, s.MinKeySize),
		MaxKeySize:        max(0, s.MaxKeySize),
		StoredKeys:        max(0, s.StoredKeyCount),
		MaxKeys:           max(0, s.MaxKeyCount),
		MaxKeysPerRequest: max(0, s.MaxKeyPerReq),
		MaxSAEs:           max(0, s.MaxSAEIDCount),
	}, nil
}

// errorText returns the message of an error answer (ETSI GS QKD 014 V1.1.1,
// 6.5), or nothing: real ones are of any shape.
func errorText(body []byte) string {
	var e struct {
		Message string `json:"message"`
	}
	if kmshttp.Unmarshal(body, &e) != nil {
		return ""
	}
	return kmshttp.Shown(e.Message)
}
