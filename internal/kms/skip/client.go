package skip

import (
	"context"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"strings"

	"keyturn/internal/kms"
	"keyturn/internal/kms/kmshttp"
	"keyturn/internal/psk"
)

// Client is the source of the keys shared with one peer.
type Client struct {
	kms  *KMS
	peer string // its system ID
}

// Key implements kms.Source by "Get Key" (draft-cisco-skip-02, 4.2).
func (c *Client) Key(ctx context.Context) (string, *psk.Key, error) {
	if err := c.check(ctx); err != nil {
		return "", nil, err
	}
	r := &kmshttp.Request{
		Path:  []string{"key"},
		Query: url.Values{"remoteSystemID": {c.peer}, "size": {strconv.Itoa(8 * psk.Size)}}.Encode(),
		Means: keyStatus,
		Text:  errorText,
	}
	a, err := c.kms.http.Do(ctx, r)
	if err != nil {
		return "", nil, fmt.Errorf("fetch key: %w", err)
	}
	defer clear(a.Body)
	id, key, err := decodeKey(a.Body)
	if err != nil {
		return "", nil, fmt.Errorf("fetch key: %w", a.Wrong(err))
	}
	return id, key, nil
}

// KeyByID implements kms.Source by "Get Key" for a specified keyId
// (draft-cisco-skip-02, 4.2). The peer's key provider may be slow to tell ours
// of a key: while ours says that it has no such key it is asked again, for up
// to half of the timeout. After anything but a plain "no", the key counts as
// gone.
func (c *Client) KeyByID(ctx context.Context, id string) (*psk.Key, error) {
	if err := checkKeyID(id); err != nil {
		return nil, err
	}
	if err := c.check(ctx); err != nil {
		return nil, err
	}
	r := &kmshttp.Request{
		Path:   []string{"key", id},
		Query:  url.Values{"remoteSystemID": {c.peer}}.Encode(),
		Means:  keyByIDStatus,
		Text:   errorText,
		Once:   true,
		NotYet: notFound,
	}
	a, err := c.kms.http.Do(ctx, r)
	if err != nil {
		return nil, fmt.Errorf("fetch key %q: %w", id, err)
	}
	defer clear(a.Body)
	got, key, err := decodeKey(a.Body)
	// In a keyId the bits count (4.2.1), not the case of their hexadecimal form.
	if err == nil && !strings.EqualFold(got, id) {
		key.Wipe()
		err = fmt.Errorf("answer holds the key %q instead", got)
	}
	if err != nil {
		return nil, fmt.Errorf("fetch key %q: %w", id, a.Wrong(err))
	}
	return key, nil
}

// Status implements kms.Source by "Get Capabilities" (draft-cisco-skip-02,
// 4.1). An error also says that there are no keys for the peer.
func (c *Client) Status(ctx context.Context) (kms.Status, error) {
	l, err := c.ask(ctx)
	if err != nil {
		return kms.Status{}, err
	}
	return kms.Status{SourceKME: l.localSystemID, TargetKME: c.peer}, nil
}

// Close does nothing: the connections belong to the KMS.
func (c *Client) Close() error { return nil }

// check makes sure that the key provider shares keys with the peer. It is asked
// once for all peers; a "no" is asked about again, for providers learn of each
// other while they run.
func (c *Client) check(ctx context.Context) error {
	c.kms.mu.Lock()
	l := c.kms.last
	c.kms.mu.Unlock()
	if l != nil && l.covers(c.peer) == nil {
		return nil
	}
	_, err := c.ask(ctx)
	return err
}

// ask gets the capabilities of the key provider, which must cover the peer.
func (c *Client) ask(ctx context.Context) (*capabilities, error) {
	r := &kmshttp.Request{Path: []string{"capabilities"}, Means: otherStatus, Text: errorText}
	a, err := c.kms.http.Do(ctx, r)
	if err != nil {
		return nil, fmt.Errorf("get capabilities: %w", err)
	}
	l, err := decodeCapabilities(a.Body)
	if err != nil {
		return nil, fmt.Errorf("get capabilities: %w", a.Wrong(err))
	}
	c.kms.mu.Lock()
	c.kms.last = l
	c.kms.mu.Unlock()
	if err := l.covers(c.peer); err != nil {
		return nil, fmt.Errorf("get capabilities: %w", a.Wrong(err))
	}
	return l, nil
}

// checkKeyID says why id cannot be asked for: a keyId stands in the path.
func checkKeyID(id string) error {
	if err := kms.CheckKeyID(id); err != nil {
		return err
	}
	if id == "." || id == ".." {
		return fmt.Errorf("key ID %q cannot stand in a URI", id)
	}
	return nil
}

// keyStatus is what an answer to "Get Key" without a keyId means. A 400 is
// "the key was not found" (draft-cisco-skip-02, table 7).
func keyStatus(status int) error {
	switch status {
	case http.StatusBadRequest, http.StatusTooManyRequests,
		http.StatusServiceUnavailable, http.StatusGatewayTimeout:
		return kms.ErrNoKeys
	}
	return otherStatus(status)
}

// keyByIDStatus is what an answer to "Get Key" with a keyId means.
func keyByIDStatus(status int) error {
	if notFound(status) {
		return kms.ErrUnknownKey
	}
	return otherStatus(status)
}

// notFound names the statuses by which a key provider says that it does not
// have a key: 400 by the draft, 404 as most servers have it.
func notFound(status int) bool {
	return status == http.StatusBadRequest || status == http.StatusNotFound || status == http.StatusServiceUnavailable
}

// otherStatus is what every other answer means. 404 and 405 stand for a path
// and a method that the provider does not have (draft-cisco-skip-02, table 3).
func otherStatus(status int) error {
	switch {
	case status == http.StatusRequestTimeout, status == http.StatusTooManyRequests,
		status < 300, status >= 500:
		return nil
	}
	return kms.ErrRefused // redirects as well: who redirects is not our KMS
}
