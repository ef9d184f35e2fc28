package etsi014

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"time"

	"keyturn/internal/kms"
	"keyturn/internal/psk"
)

// firstRetry is the time until an unknown key ID is asked for again; it doubles
// each time.
const firstRetry = 50 * time.Millisecond

// keyBits is the size asked for. Some KMEs have another default.
const keyBits = 8 * psk.Size

// Client is the source of the keys shared with one peer.
type Client struct {
	kms  *KMS
	peer string // its SAE ID
}

// Key implements kms.Source by "Get key" (ETSI GS QKD 014 V1.1.1, 5.2). It
// lasts at most one timeout for each URI, and another to wait for its turn.
func (c *Client) Key(ctx context.Context) (string, *psk.Key, error) {
	r := &request{peer: c.peer, verb: "enc_keys", means: keyStatus}
	if c.kms.post {
		r.body = marshal(keyRequest{Number: 1, Size: keyBits})
	} else {
		r.query = url.Values{"number": {"1"}, "size": {strconv.Itoa(keyBits)}}.Encode()
	}
	a, err := c.kms.ask(ctx, r)
	if err != nil {
		return "", nil, fmt.Errorf("fetch key: %w", err)
	}
	defer clear(a.body)
	id, key, err := decodeKey(a.body)
	if err != nil {
		return "", nil, fmt.Errorf("fetch key: %w", a.wrong(err))
	}
	return id, key, nil
}

// KeyByID implements kms.Source by "Get key with key IDs" (ETSI GS QKD 014
// V1.1.1, 5.3). Our KME may hear of a key later than the peer asks us for it:
// while it says that it has no such key it is asked again, for up to half of
// the timeout, so that the last request has the other half to be answered.
// After anything but a plain "no", the key counts as gone.
func (c *Client) KeyByID(ctx context.Context, id string) (*psk.Key, error) {
	if err := kms.CheckKeyID(id); err != nil {
		return nil, err
	}
	r := &request{peer: c.peer, verb: "dec_keys", once: true, means: keyByIDStatus}
	if c.kms.post {
		r.body = marshal(keyIDs{KeyIDs: []keyID{{KeyID: id}}})
	} else {
		r.query = url.Values{"key_ID": {id}}.Encode()
	}
	began := time.Now()
	for wait := firstRetry; ; wait *= 2 {
		a, err := c.kms.ask(ctx, r)
		if err == nil {
			return c.take(a, id)
		}
		err = fmt.Errorf("fetch key %q: %w", id, err)
		if r.lost || !saysNotFound(err) || time.Since(began)+wait > c.kms.timeout/2 {
			return nil, err
		}
		t := time.NewTimer(wait)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return nil, fmt.Errorf("%w, before that: %w", context.Cause(ctx), err)
		}
	}
}

// take returns the key of an answer, which must be the one with this ID.
func (c *Client) take(a *answer, id string) (*psk.Key, error) {
	defer clear(a.body)
	got, key, err := decodeKey(a.body)
	if err == nil && got != id {
		key.Wipe()
		err = fmt.Errorf("answer holds the key %q instead", got)
	}
	if err != nil {
		return nil, fmt.Errorf("fetch key %q: %w", id, a.wrong(err))
	}
	return key, nil
}

// Status implements kms.Source by "Get status" (ETSI GS QKD 014 V1.1.1, 5.1).
func (c *Client) Status(ctx context.Context) (kms.Status, error) {
	r := &request{peer: c.peer, verb: "status", means: statusStatus}
	a, err := c.kms.ask(ctx, r)
	if err != nil {
		return kms.Status{}, fmt.Errorf("get status: %w", err)
	}
	s, err := decodeStatus(a.body)
	if err != nil {
		return kms.Status{}, fmt.Errorf("get status: %w", a.wrong(err))
	}
	return s, nil
}

// Close does nothing: the connections belong to the KMS.
func (c *Client) Close() error { return nil }

// keyStatus is what an answer to "Get key" means. KMEs without keys are known
// to say 400, 404, 503 and 504.
func keyStatus(status int) error {
	switch status {
	case http.StatusBadRequest, http.StatusNotFound, http.StatusTooManyRequests,
		http.StatusServiceUnavailable, http.StatusGatewayTimeout:
		return kms.ErrNoKeys
	}
	return statusStatus(status)
}

// keyByIDStatus is what an answer to "Get key with key IDs" means.
func keyByIDStatus(status int) error {
	switch status {
	case http.StatusBadRequest, http.StatusNotFound, http.StatusServiceUnavailable:
		return kms.ErrUnknownKey
	}
	return statusStatus(status)
}

// statusStatus is what an answer to "Get status" means.
func statusStatus(status int) error {
	switch {
	case status == http.StatusRequestTimeout, status == http.StatusTooManyRequests,
		status < 300, status >= 500:
		return nil
	}
	return kms.ErrRefused // redirects as well: who redirects is not our KME
}

// saysNotFound reports whether a KME answered by one of the statuses by which
// they say that they do not have a key. 401 is one: nobody is named for a key
// that has not arrived.
func saysNotFound(err error) bool {
	se, ok := errors.AsType[*statusError](err)
	return ok && (errors.Is(se, kms.ErrUnknownKey) || se.status == http.StatusUnauthorized)
}

// The bodies of requests (ETSI GS QKD 014 V1.1.1, 6.2 and 6.4). Nothing
// optional goes in that we do not need: some KMEs refuse what they do not know.
type (
	keyRequest struct {
		Number int `json:"number"`
		Size   int `json:"size"`
	}
	keyIDs struct {
		KeyIDs []keyID `json:"key_IDs"`
	}
	keyID struct {
		KeyID string `json:"key_ID"`
	}
)

// marshal encodes one of the bodies above, which cannot fail.
func marshal(v any) []byte {
	b, err := json.Marshal(v)
	if err != nil {
		panic(err)
	}
	return b
}
