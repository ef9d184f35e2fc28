package skip

import (
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"

	"keyturn/internal/kms"
	"keyturn/internal/kms/kmshttp"
	"keyturn/internal/psk"
)

// decodeKey returns the key of an answer to "Get Key" (draft-cisco-skip-02,
// 4.2). The error says what is wrong without quoting the key.
func decodeKey(body []byte) (id string, key *psk.Key, err error) {
	var a struct {
		ID  *string `json:"keyId"`
		Key hexKey  `json:"key"`
	}
	defer func() {
		if err != nil {
			a.Key.key.Wipe()
		}
	}()
	if err := kmshttp.Unmarshal(body, &a); err != nil {
		return "", nil, err
	}
	switch {
	case a.Key.err != nil:
		return "", nil, a.Key.err
	case a.Key.key == nil:
		return "", nil, errors.New("key is missing")
	case a.Key.key.IsZero():
		return "", nil, errors.New("key is all zero")
	case a.ID == nil:
		return "", nil, errors.New("key ID is missing")
	}
	if err := checkKeyID(*a.ID); err != nil {
		return "", nil, err
	}
	return *a.ID, a.Key.key, nil
}

// hexKey decodes a key straight out of the bytes of the answer: encoding/json
// would leave copies of it behind.
type hexKey struct {
	key *psk.Key
	err error
}

// UnmarshalJSON takes hexadecimal digits of either case, without escapes.
func (k *hexKey) UnmarshalJSON(b []byte) error {
	k.key.Wipe() // of a field that comes twice
	k.key, k.err = nil, nil
	switch {
	case b[0] == 'n': // null
		return nil
	case b[0] != '"':
		k.err = errors.New("key is not a JSON string")
		return nil
	}
	text := b[1 : len(b)-1]
	raw := make([]byte, hex.DecodedLen(len(text)))
	defer clear(raw)
	switch _, err := hex.Decode(raw, text); {
	case errors.Is(err, hex.ErrLength):
		k.err = errors.New("key has an odd number of hexadecimal digits")
		return nil
	case err != nil:
		k.err = errors.New("key is not hexadecimal") // err quotes the digit
		return nil
	}
	if k.key, k.err = psk.New(raw); k.err != nil {
		k.err = fmt.Errorf("key has %d bits, not %d", 8*len(raw), 8*psk.Size)
	}
	return nil
}

// capabilities of a key provider (draft-cisco-skip-02, 4.1).
type capabilities struct {
	key           bool     // hands out keys
	localSystemID string   // its own name; printable
	remotes       []string // glob patterns of whom it shares keys with
}

func decodeCapabilities(body []byte) (*capabilities, error) {
	var a struct {
		Key            *bool    `json:"key"`
		LocalSystemID  string   `json:"localSystemID"`
		RemoteSystemID []string `json:"remoteSystemID"`
	}
	if err := kmshttp.Unmarshal(body, &a); err != nil {
		return nil, err
	}
	if a.Key == nil {
		return nil, errors.New("answer does not say whether there are keys")
	}
	return &capabilities{*a.Key, kmshttp.Shown(a.LocalSystemID), a.RemoteSystemID}, nil
}

// covers says why there are no keys to share with a peer's key provider.
func (c *capabilities) covers(peer string) error {
	if !c.key {
		return fmt.Errorf("%w: key provider %q hands out no keys", kms.ErrRefused, c.localSystemID)
	}
	for _, p := range c.remotes {
		if Match(p, peer) {
			return nil
		}
	}
	return fmt.Errorf("%w: key provider %q shares no keys with %q", kms.ErrRefused, c.localSystemID, peer)
}

// errorText finds a message in an error answer, for which the draft has no
// form, or returns nothing.
func errorText(body []byte) string {
	var e map[string]json.RawMessage
	if kmshttp.Unmarshal(body, &e) != nil {
		return ""
	}
	for _, name := range []string{"message", "error", "detail"} {
		var text string
		if json.Unmarshal(e[name], &text) == nil && text != "" {
			return kmshttp.Shown(text)
		}
	}
	return ""
}
