package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/net/netutil"
	"golang.org/x/sys/unix"
)

// Limits of the API. They bound what a local client can cost a rotator.
const (
	maxRequest     = 4 << 10 // bytes of a request's body
	maxConnections = 32
	requestTime    = 5 * time.Second // to send a request, and again to take its answer
	shutdownTime   = time.Second     // for requests under way when the rotator stops
	maxSocketPath  = 107             // bytes: sun_path of unix(7), without its NUL
)

// ErrRunning means that another rotator answers on the socket.
var ErrRunning = errors.New("a rotator is already running")

// ErrUnknownPeer is what Handler.Rotate returns for a peer that is not
// configured.
var ErrUnknownPeer = errors.New("no such peer")

// Handler is the rotator behind the API. Its methods are called from several
// goroutines and return at once.
type Handler interface {
	Status() Status
	// Rotate asks for the next key at the next window, for the named peer
	// or, with "", for all.
	Rotate(peer string) error
	// Down begins the rotator's orderly end.
	Down()
}

// SocketPath returns the path of the control socket of an interface.
func SocketPath(runDir, iface string) string {
	return filepath.Join(runDir, iface+".sock")
}

// Server is a listening control socket.
type Server struct {
	l net.Listener
}

// Listen makes the socket (mode 0600) and, where it is missing, its directory
// (mode 0700). A socket that nobody answers on is replaced; ErrRunning means
// that somebody does. Two processes must not call Listen for one path at the
// same time: registry.Lock sees to that.
func Listen(path string) (*Server, error) {
	if n := len(path); n > maxSocketPath {
		return nil, fmt.Errorf("control socket %s: the path is %d bytes long, and %d is the limit", path, n, maxSocketPath)
	}
	if err := makePrivateDir(filepath.Dir(path)); err != nil {
		return nil, err
	}
	if err := removeDeadSocket(path); err != nil {
		return nil, err
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("control socket: %w", err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		l.Close()
		return nil, fmt.Errorf("control socket: %w", err)
	}
	return &Server{l: l}, nil
}

// makePrivateDir makes dir for this user only. One that exists may be
// readable by others, since every file in it has a mode of its own, but must
// not be writable: whoever could replace the socket would speak for us.
func makePrivateDir(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("run directory: %w", err)
	}
	info, err := os.Stat(dir)
	if err != nil {
		return fmt.Errorf("run directory: %w", err)
	}
	if perm := info.Mode().Perm(); perm&0o022 != 0 {
		return fmt.Errorf("run directory %s: mode %04o lets other users write to it", dir, perm)
	}
	return nil
}

// removeDeadSocket removes the socket that a killed rotator left. Anything
// else at that path is not ours to remove.
func removeDeadSocket(path string) error {
	info, err := os.Lstat(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("control socket: %w", err)
	}
	if info.Mode().Type() != os.ModeSocket {
		return fmt.Errorf("control socket %s: a file that is no socket is in the way", path)
	}
	c, err := net.DialTimeout("unix", path, requestTime)
	if err == nil {
		c.Close()
		return ErrRunning
	}
	if !errors.Is(err, unix.ECONNREFUSED) {
		// A rotator too busy to accept is still a rotator.
		return fmt.Errorf("control socket: %w", err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("control socket: %w", err)
	}
	return nil
}

// Close removes the socket. It is for a server that never came to Serve.
func (s *Server) Close() error { return s.l.Close() }

// Serve answers requests until ctx ends, then removes the socket and returns
// nil. It is called once.
func (s *Server) Serve(ctx context.Context, h Handler) error {
	srv := &http.Server{
		Handler:        newMux(h),
		ReadTimeout:    requestTime,
		WriteTimeout:   requestTime,
		IdleTimeout:    requestTime,
		MaxHeaderBytes: maxRequest,
		// A client that hangs up is no news.
		ErrorLog: slog.NewLogLogger(slog.DiscardHandler, slog.LevelDebug),
	}
	served := make(chan error, 1)
	go func() { served <- srv.Serve(netutil.LimitListener(ownListener{s.l}, maxConnections)) }()
	select {
	case err := <-served:
		srv.Close()
		return fmt.Errorf("control socket: %w", err)
	case <-ctx.Done():
	}
	// Without the cancellation that brought us here, but not for long.
	grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), shutdownTime)
	defer cancel()
	if srv.Shutdown(grace) != nil {
		srv.Close()
	}
	if err := <-served; !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("control socket: %w", err)
	}
	return nil
}

// ownListener accepts root and this process's own user, by SO_PEERCRED. The
// socket's mode says the same; this also holds where somebody changed it.
type ownListener struct{ net.Listener }

const forbidden = "HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"

func (l ownListener) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		uid, err := peerUID(c)
		if err == nil && mayControl(uid, os.Geteuid()) {
			return c, nil
		}
		// The answer fits the socket's buffer: this does not block.
		_, _ = io.WriteString(c, forbidden)
		c.Close()
	}
}

func mayControl(uid uint32, self int) bool { return uid == 0 || int64(uid) == int64(self) }

// peerUID returns the user at the other end of a unix socket.
func peerUID(c net.Conn) (uint32, error) {
	u, ok := c.(*net.UnixConn)
	if !ok {
		return 0, fmt.Errorf("%T has no peer credentials", c)
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *unix.Ucred
	var credErr error
	err = raw.Control(func(fd uintptr) {
		cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	})
	if err = errors.Join(err, credErr); err != nil {
		return 0, err
	}
	return cred.Uid, nil
}

// The requests. Answers other than 2xx carry a failure.
const (
	pathStatus = "/v1/status" // GET: Status
	pathRotate = "/v1/rotate" // POST rotateRequest: 204
	pathDown   = "/v1/down"   // POST: 202, and the rotator begins to stop
)

type rotateRequest struct {
	Peer string `json:"peer"` // empty: all
}

type failure struct {
	Error string `json:"error"`
}

func newMux(h Handler) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET "+pathStatus, func(w http.ResponseWriter, _ *http.Request) {
		answer(w, http.StatusOK, h.Status())
	})
	mux.HandleFunc("POST "+pathRotate, func(w http.ResponseWriter, r *http.Request) {
		peer, err := decodeRotate(http.MaxBytesReader(w, r.Body, maxRequest))
		if err != nil {
			answer(w, http.StatusBadRequest, failure{err.Error()})
			return
		}
		switch err := h.Rotate(peer); {
		case errors.Is(err, ErrUnknownPeer):
			answer(w, http.StatusNotFound, failure{err.Error()})
		case err != nil:
			answer(w, http.StatusConflict, failure{err.Error()})
		default:
			w.WriteHeader(http.StatusNoContent)
		}
	})
	mux.HandleFunc("POST "+pathDown, func(w http.ResponseWriter, _ *http.Request) {
		h.Down()
		w.WriteHeader(http.StatusAccepted)
	})
	return mux
}

func answer(w http.ResponseWriter, code int, v any) {
	b, err := json.Marshal(v)
	if err != nil { // a time beyond year 9999 is all that can do it
		code, b = http.StatusInternalServerError, []byte(`{"error":"status cannot be encoded"}`)
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	_, _ = w.Write(b)
}

// decodeRotate reads exactly one rotateRequest.
func decodeRotate(r io.Reader) (string, error) {
	d := json.NewDecoder(r)
	d.DisallowUnknownFields()
	var q rotateRequest
	if err := d.Decode(&q); err != nil {
		return "", fmt.Errorf("decode request: %w", err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return "", errors.New("decode request: more than one value")
	}
	return q.Peer, nil
}
