package control

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"syscall"
	"time"
)

// ErrNotRunning means that no rotator answers on the socket.
var ErrNotRunning = errors.New("no rotator is running")

// maxAnswer bounds an answer: room for the status of 10,000 peers.
const maxAnswer = 64 << 20

// clientTime is the deadline of a whole request. The rotator answers from
// memory; more than this means that it hangs.
const clientTime = 5 * time.Second

// Client asks the rotator behind one control socket. It keeps no connection
// between requests.
type Client struct {
	http http.Client
}

// NewClient returns a client of the control socket at path.
func NewClient(path string) *Client {
	return &Client{http.Client{
		Timeout: clientTime,
		Transport: &http.Transport{
			DisableKeepAlives: true,
			DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
				var d net.Dialer
				return d.DialContext(ctx, "unix", path)
			},
		},
	}}
}

// Status asks for the rotator's status. The error is ErrNotRunning where
// nobody answers.
func (c *Client) Status(ctx context.Context) (*Status, error) {
	b, err := c.do(ctx, http.MethodGet, pathStatus, nil)
	if err != nil {
		return nil, fmt.Errorf("ask rotator for its status: %w", err)
	}
	var s Status
	if err := json.Unmarshal(b, &s); err != nil {
		return nil, fmt.Errorf("decode the rotator's status: %w", err)
	}
	return &s, nil
}

// Rotate asks for a rotation at the next window, of the named peer or, with
// "", of all. The error is ErrUnknownPeer, ErrNotRunning, or the rotator's.
func (c *Client) Rotate(ctx context.Context, peer string) error {
	body, err := json.Marshal(rotateRequest{Peer: peer})
	if err != nil {
		return err
	}
	if _, err := c.do(ctx, http.MethodPost, pathRotate, body); err != nil {
		return fmt.Errorf("ask rotator to rotate: %w", err)
	}
	return nil
}

// Down asks the rotator to stop. It returns when the rotator has begun to.
func (c *Client) Down(ctx context.Context) error {
	if _, err := c.do(ctx, http.MethodPost, pathDown, nil); err != nil {
		return fmt.Errorf("ask rotator to stop: %w", err)
	}
	return nil
}

// hangUp is a connection that ended before the answer, in words.
type hangUp struct{ cause error }

func (hangUp) Error() string {
	return "the rotator closed the connection before the end of its answer; it may just have ended"
}

func (e hangUp) Unwrap() error { return e.cause }

func inWords(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, syscall.ECONNRESET) {
		return hangUp{err}
	}
	return err
}

func (c *Client) do(ctx context.Context, method, path string, body []byte) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, method, "http://keyturn"+path, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	resp, err := c.http.Do(req)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED) {
		return nil, ErrNotRunning
	}
	if err != nil {
		return nil, inWords(errors.Unwrap(err)) // of url.Error: method and URL say nothing here
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer+1))
	if err != nil {
		return nil, inWords(err)
	}
	if len(b) > maxAnswer {
		return nil, fmt.Errorf("answer is longer than %d bytes", maxAnswer)
	}
	if resp.StatusCode/100 == 2 {
		return b, nil
	}
	var f failure
	if json.Unmarshal(b, &f) != nil || f.Error == "" {
		return nil, errors.New(resp.Status) // not an answer of newMux
	}
	if resp.StatusCode == http.StatusNotFound {
		return nil, ErrUnknownPeer
	}
	return nil, errors.New(f.Error)
}
