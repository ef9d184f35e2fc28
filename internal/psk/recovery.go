package psk

import (
	"crypto/hmac"
	"crypto/sha256"
)

const recoveryLabel = "keyturn/1 recovery key"

// Recovery returns the recovery key that comes of a key: HMAC-SHA-256 under it
// over "keyturn/1 recovery key". Nothing about the key can be learnt from it.
func (k *Key) Recovery() *Key {
	m := hmac.New(sha256.New, k.read())
	m.Write([]byte(recoveryLabel))
	r := blank()
	m.Sum(r.at()[:0])
	return r
}
