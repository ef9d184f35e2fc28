package kmesim

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
	"net/url"
	"syscall"
	"time"
)

// maxAdminAnswer bounds an answer of the admin endpoint, in bytes: room for
// 1,000 pools of each KME with the longest names there are.
const maxAdminAnswer = 16 << 20

// adminTime is the deadline of a whole request.
const adminTime = 5 * time.Second

// ErrNoSimulator means that nobody is behind an admin endpoint.
var ErrNoSimulator = errors.New("no simulator answers")

// Admin asks the simulator behind an admin endpoint. Each change returns the
// state after it.
type Admin struct {
	path string
	http http.Client
}

// NewAdmin returns a client of the socket at path.
func NewAdmin(path string) *Admin {
	return &Admin{path, http.Client{Timeout: adminTime, Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", path)
		},
	}}}
}

// State asks for the state.
func (a *Admin) State(ctx context.Context) (*State, error) {
	return a.do(ctx, http.MethodGet, "/v1/state", nil)
}

// SetFault sets what is wrong with a KME, kme-a or kme-b, or with all, in the
// words of ParseFault.
func (a *Admin) SetFault(ctx context.Context, kme, fault string) (*State, error) {
	return a.do(ctx, http.MethodPut, "/v1/"+url.PathEscape(kme)+"/fault", faultRequest{fault})
}

// SetRate sets rate and size of the pools; see CheckRate. A pool of 0 keeps its
// size.
func (a *Admin) SetRate(ctx context.Context, rate float64, pool int) (*State, error) {
	return a.do(ctx, http.MethodPut, "/v1/rate", rateRequest{rate, pool})
}

// Drain empties the pools of a KME or of all, for a master and a slave, where
// they are named.
func (a *Admin) Drain(ctx context.Context, kme, master, slave string) (*State, error) {
	q := url.Values{"master": {master}, "slave": {slave}}
	return a.do(ctx, http.MethodDelete, "/v1/"+url.PathEscape(kme)+"/pools?"+q.Encode(), nil)
}

func (a *Admin) do(ctx context.Context, method, resource string, body any) (*State, error) {
	b, err := json.Marshal(body)
	if err != nil {
		return nil, err
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://kme"+resource, bytes.NewReader(b))
	if err != nil {
		return nil, err
	}
	resp, err := a.http.Do(req)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED) {
		return nil, fmt.Errorf("%w on %s", ErrNoSimulator, a.path)
	}
	if err != nil {
		return nil, errors.Unwrap(err) // of url.Error: method and URL say nothing here
	}
	defer resp.Body.Close()
	answer := io.LimitReader(resp.Body, maxAdminAnswer)
	if resp.StatusCode != http.StatusOK {
		var p problem
		if json.NewDecoder(answer).Decode(&p) != nil || p.Message == "" {
			return nil, errors.New(resp.Status) // not an answer of ours
		}
		return nil, errors.New(p.Message)
	}
	var s State
	if err := json.NewDecoder(answer).Decode(&s); err != nil {
		return nil, fmt.Errorf("decode state: %w", err)
	}
	return &s, nil
}
