package kmesim

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/net/netutil"
	"golang.org/x/sys/unix"
)

// Limits of the admin endpoint.
const (
	maxAdminConnections = 32
	maxAdminRequest     = 4 << 10 // bytes of a body
	maxAdminPools       = 1000    // in a state
	maxAdminPath        = 107     // bytes: sun_path of unix(7), without its NUL
)

// State is what the admin endpoint tells. There are no keys in it, nor IDs of
// keys.
type State struct {
	Rate float64    `json:"keys_per_second"` // into each pool; 0: no limit
	Pool int        `json:"pool"`            // keys of 256 bits that each holds
	KMEs []KMEState `json:"kmes"`
}

// KMEState is the state of one KME. Counters count since it was started.
type KMEState struct {
	Name  string `json:"name"`
	Fault string `json:"fault"` // as ParseFault reads it
	// Struck counts requests and connections that a fault was brought down on.
	Struck uint64 `json:"struck"`
	// Made counts keys made for masters here, Delivered those given to slaves here.
	Made      uint64 `json:"made"`
	Delivered uint64 `json:"delivered"`
	// Refused counts requests that got no keys and no status.
	Refused uint64 `json:"refused"`
	// Waiting is how many keys wait here for their slaves.
	Waiting    int         `json:"waiting"`
	MaxWaiting int         `json:"max_waiting"`
	Link       LinkState   `json:"link"`
	PoolCount  int         `json:"pool_count"`
	Pools      []PoolState `json:"pools"` // the first 1,000
}

// LinkState is the state of the link to the other KME.
type LinkState struct {
	To    string    `json:"to"` // its address; empty: in this process
	Up    bool      `json:"up"`
	Since time.Time `json:"since,omitzero"`
	Error string    `json:"error,omitempty"`
}

// PoolState is the state of the pool of a master and a slave.
type PoolState struct {
	Master string `json:"master_SAE_ID"`
	Slave  string `json:"slave_SAE_ID"`
	Stored int    `json:"stored_key_count"` // of 256 bits
	Made   uint64 `json:"made"`             // keys, of whatever size
}

type faultRequest struct {
	Fault string `json:"fault"`
}

type rateRequest struct {
	Rate float64 `json:"keys_per_second"`
	Pool int     `json:"pool"` // as it is, if zero
}

// State returns the KME's state.
func (k *KME) State() KMEState {
	s := KMEState{
		Name: k.name, Fault: k.Fault().String(), Struck: k.counted.struck.Load(),
		Made: k.counted.made.Load(), Delivered: k.counted.delivered.Load(), Refused: k.counted.refused.Load(),
		Waiting: k.store.waiting(), MaxWaiting: k.store.max,
		Link: LinkState{Up: true},
	}
	s.Pools, s.PoolCount = k.pools.list(maxAdminPools)
	if r, ok := k.peer.(*remote); ok {
		s.Link = r.link()
	}
	if s.Link.Up && k.Fault().Kind == Cut {
		s.Link = LinkState{To: s.Link.To, Error: errCut.Error()}
	}
	return s
}

// admin answers requests for the KMEs of this process.
type admin struct{ kmes []*KME }

func (a admin) handler() http.Handler {
	mux := http.NewServeMux()
	answer := func(pattern string, f func(*http.Request) *problem) {
		mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
			r.Body = http.MaxBytesReader(w, r.Body, maxAdminRequest)
			if p := f(r); p != nil {
				writeAdmin(w, p.status, p)
				return
			}
			writeAdmin(w, http.StatusOK, a.state())
		})
	}
	answer("GET /v1/state", func(*http.Request) *problem { return nil })
	answer("PUT /v1/rate", a.setRate)
	answer("PUT /v1/{kme}/fault", a.setFault)
	answer("DELETE /v1/{kme}/fault", func(r *http.Request) *problem { return a.each(r, func(k *KME) { k.SetFault(Fault{}) }) })
	answer("DELETE /v1/{kme}/pools", func(r *http.Request) *problem {
		q := r.URL.Query()
		return a.each(r, func(k *KME) { k.pools.drain(q.Get("master"), q.Get("slave")) })
	})
	return mux
}

// writeAdmin answers for people to read.
func writeAdmin(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	_ = e.Encode(v) // to a client that has gone
}

// each does something to the KMEs that a path names: kme-a, kme-b, or all.
func (a admin) each(r *http.Request, do func(*KME)) *problem {
	name, found := r.PathValue("kme"), false
	for _, k := range a.kmes {
		if name == k.name || name == "all" {
			do(k)
			found = true
		}
	}
	if !found {
		return &problem{status: http.StatusNotFound, Message: fmt.Sprintf("%q does not run here", name)}
	}
	return nil
}

func (a admin) setFault(r *http.Request) *problem {
	var q faultRequest
	if p := decodeAdmin(r, &q); p != nil {
		return p
	}
	f, err := ParseFault(q.Fault)
	if err != nil {
		return bad(err.Error())
	}
	if f.Kind == Expired && !a.kmes[0].expires {
		return &problem{status: http.StatusConflict, Message: errNoRootKey.Error()}
	}
	return a.each(r, func(k *KME) {
		k.SetFault(f)
		k.log.InfoContext(r.Context(), "fault", "fault", f.String())
	})
}

func (a admin) setRate(r *http.Request) *problem {
	var q rateRequest
	if p := decodeAdmin(r, &q); p != nil {
		return p
	}
	if q.Pool == 0 {
		_, q.Pool = a.kmes[0].pools.limits()
	}
	if err := CheckRate(q.Rate, q.Pool); err != nil {
		return bad(err.Error())
	}
	for _, k := range a.kmes {
		k.pools.set(q.Rate, q.Pool)
		k.log.InfoContext(r.Context(), "rate", "keys_per_second", q.Rate, "pool", q.Pool)
	}
	return nil
}

func (a admin) state() State {
	var s State
	s.Rate, s.Pool = a.kmes[0].pools.limits()
	for _, k := range a.kmes {
		s.KMEs = append(s.KMEs, k.State())
	}
	return s
}

// decodeAdmin reads the body of a request, whatever its content type: curl says
// that it is a form.
func decodeAdmin(r *http.Request, v any) *problem {
	d := json.NewDecoder(r.Body)
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return bad("malformed body: " + err.Error())
	}
	return nil
}

// AdminPath returns the path of the admin endpoint of those who name none: in
// the directory of the certificates, kme.sock, or for the only KME of a process
// its name. It is empty, and so there is none, where a socket's path cannot be
// that long.
func AdminPath(dir, only string) string {
	path := filepath.Join(dir, cmp.Or(only, "kme")+".sock")
	if len(path) > maxAdminPath {
		return ""
	}
	return path
}

// listenAdmin makes the socket of the admin endpoint, for this user alone. A
// socket that nobody answers on is replaced.
func listenAdmin(ctx context.Context, path string) (net.Listener, error) {
	if len(path) > maxAdminPath {
		return nil, fmt.Errorf("admin socket %s: the path is %d bytes long, and %d is the limit", path, len(path), maxAdminPath)
	}
	if err := removeDead(ctx, path); err != nil {
		return nil, fmt.Errorf("admin socket %s: %w", path, err)
	}
	// The file takes the mode that the socket has before it is bound, so that it
	// is never open to others.
	closed := func(_, _ string, c syscall.RawConn) (err error) {
		if e := c.Control(func(fd uintptr) { err = unix.Fchmod(int(fd), 0o600) }); e != nil {
			return e
		}
		return err
	}
	ln, err := (&net.ListenConfig{Control: closed}).Listen(ctx, "unix", path)
	if err != nil {
		return nil, fmt.Errorf("admin socket: %w", err)
	}
	return ln, nil
}

// removeDead removes the socket that a killed process left. Anything else at
// that path is not ours to remove.
func removeDead(ctx context.Context, path string) error {
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if info.Mode().Type() != fs.ModeSocket {
		return errors.New("a file that is no socket is in the way")
	}
	c, err := new(net.Dialer).DialContext(ctx, "unix", path)
	if err == nil {
		c.Close()
		return errors.New("another simulator answers there")
	}
	if !errors.Is(err, unix.ECONNREFUSED) {
		return err
	}
	return os.Remove(path)
}

// serveAdmin answers on ln until ctx ends, then removes the socket and returns
// nil.
func serveAdmin(ctx context.Context, ln net.Listener, kmes []*KME) error {
	s := &http.Server{
		Handler:        admin{kmes}.handler(),
		ReadTimeout:    requestTime,
		WriteTimeout:   requestTime,
		IdleTimeout:    requestTime,
		MaxHeaderBytes: 16 << 10,
		Protocols:      new(http.Protocols),
	}
	s.Protocols.SetHTTP1(true)
	if err := serveUntil(ctx, s, netutil.LimitListener(ln, maxAdminConnections)); err != nil {
		return fmt.Errorf("admin socket: %w", err)
	}
	return nil
}
