package etsi014

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptrace"
	"net/url"
	"strconv"
	"strings"

	"keyturn/internal/kms"
	"keyturn/internal/kms/kmshttp"
	"keyturn/internal/psk"
)

// keyBits is the size asked for. Some KMEs have another default.
const keyBits = 8 * psk.Size

// Client is the source of the keys shared with one peer.
type Client struct {
	kms  *KMS
	peer string // its SAE ID

	sharing
}

func newClient(k *KMS, peer string) *Client {
	c := &Client{kms: k, peer: peer}
	c.life, c.end = context.WithCancel(context.Background())
	return c
}

// Key implements kms.Source by "Get key" (ETSI GS QKD 014 V1.1.1, 5.3). Calls
// at the same time share a request where the KME allows it. A request lasts at
// most one timeout for each URI, and another to wait for its turn. A call waits
// for that of others for at most a quarter of the timeout and then takes one;
// two where it shared the first and the KME gave fewer keys than were asked for.
func (c *Client) Key(ctx context.Context) (string, *psk.Key, error) {
	d := delivery{err: errAlone}
	if c.enter() {
		d = c.share(ctx)
	}
	if errors.Is(d.err, errAlone) {
		var keys []namedKey
		if keys, _, d.err = c.fetch(ctx, 1); d.err == nil {
			d.namedKey = keys[0]
		}
	}
	c.leave()
	if d.err != nil {
		return "", nil, fmt.Errorf("fetch key: %w", d.err)
	}
	return d.id, d.key, nil
}

// fetch asks for n fresh keys and returns one to n of them, or an error.
// tookNothing says that whoever may have heard the request answered that it
// gives none: asking again costs none.
func (c *Client) fetch(ctx context.Context, n int) (keys []namedKey, tookNothing bool, err error) {
	sent, denied := 0, 0 // to so many URIs, by so many
	ctx = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{
		GotConn: func(httptrace.GotConnInfo) { sent++ },
	})
	r := c.request("enc_keys", func(status int) error {
		if status < 500 || status == http.StatusServiceUnavailable {
			denied++
		}
		return keyStatus(status)
	})
	if c.kms.post {
		r.Body = marshal(keyRequest{Number: n, Size: keyBits})
	} else {
		r.Query = url.Values{"number": {strconv.Itoa(n)}, "size": {strconv.Itoa(keyBits)}}.Encode()
	}
	a, err := c.kms.http.Do(ctx, r)
	if err != nil {
		return nil, denied > 0 && denied == sent, err
	}
	defer clear(a.Body)
	keys, err = decodeKeys(a.Body)
	if err != nil {
		return nil, false, a.Wrong(err)
	}
	return first(n, keys), false, nil // some KMEs have a number of their own
}

// first returns the first n keys, or as many as there are, and wipes the others.
func first(n int, keys []namedKey) []namedKey {
	n = min(n, len(keys))
	for _, k := range keys[n:] {
		k.key.Wipe()
	}
	return keys[:n]
}

// KeyByID implements kms.Source by "Get key with key IDs" (ETSI GS QKD 014
// V1.1.1, 5.4). Our KME may hear of a key later than the peer asks us for it:
// while it says that it has no such key it is asked again, for up to half of
// the timeout, so that the last request has the other half to be answered.
// After anything but a plain "no", the key counts as gone.
func (c *Client) KeyByID(ctx context.Context, id string) (*psk.Key, error) {
	if err := kms.CheckKeyID(id); err != nil {
		return nil, err
	}
	r := c.request("dec_keys", keyByIDStatus)
	r.Once, r.NotYet = true, notYet
	if c.kms.post {
		r.Body = marshal(keyIDs{KeyIDs: []keyID{{KeyID: id}}})
	} else {
		r.Query = url.Values{"key_ID": {id}}.Encode()
	}
	a, err := c.kms.http.Do(ctx, r)
	if err != nil {
		return nil, fmt.Errorf("fetch key %q: %w", id, err)
	}
	defer clear(a.Body)
	key, err := only(id, a.Body)
	if err != nil {
		return nil, fmt.Errorf("fetch key %q: %w", id, a.Wrong(err))
	}
	return key, nil
}

// only returns the key of a container that holds the one with this ID and no
// other.
func only(id string, container []byte) (*psk.Key, error) {
	keys, err := decodeKeys(container)
	switch {
	case err != nil:
		return nil, err
	case len(keys) > 1:
		err = fmt.Errorf("answer holds %d keys, not 1", len(keys))
	case !strings.EqualFold(keys[0].id, id): // the case of a UUID does not count
		err = fmt.Errorf("answer holds the key %q instead", keys[0].id)
	default:
		return keys[0].key, nil
	}
	first(0, keys)
	return nil, err
}

// request is what all requests have (ETSI GS QKD 014 V1.1.1, 5).
func (c *Client) request(verb string, means func(status int) error) *kmshttp.Request {
	return &kmshttp.Request{Path: []string{"api", "v1", "keys", c.peer, verb}, Means: means, Text: errorText}
}

// Status implements kms.Source by "Get status" (ETSI GS QKD 014 V1.1.1, 5.2).
func (c *Client) Status(ctx context.Context) (kms.Status, error) {
	a, err := c.kms.http.Do(ctx, c.request("status", statusStatus))
	if err != nil {
		return kms.Status{}, fmt.Errorf("get status: %w", err)
	}
	s, err := decodeStatus(a.Body)
	if err != nil {
		return kms.Status{}, fmt.Errorf("get status: %w", a.Wrong(err))
	}
	return s, nil
}

// Close ends what was begun for nobody in particular. The connections belong to
// the KMS.
func (c *Client) Close() error {
	c.end()
	c.busy.Wait()
	return nil
}

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

// notYet names the statuses by which KMEs say that they do not have a key. 401
// is one: nobody is named for a key that has not arrived. 429 tells nothing
// about the key, and takes none.
func notYet(status int) bool {
	switch status {
	case http.StatusBadRequest, http.StatusUnauthorized, http.StatusNotFound,
		http.StatusTooManyRequests, http.StatusServiceUnavailable:
		return true
	}
	return false
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
