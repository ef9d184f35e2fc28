package kmesim

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"

	"golang.org/x/net/netutil"
	"golang.org/x/sync/errgroup"
)

// The link between two processes is HTTPS with mutual TLS 1.3, POST to linkPath
// followed by the verb, and serves no SAE: each KME takes calls from the other
// one alone, by the common name of its certificate. Each KME calls over
// connections of its own.
const (
	linkPath        = "/link/v1/"
	linkTimeout     = 2 * time.Second // of one call
	helloInterval   = 2 * time.Second
	linkConnections = 64
	maxLinkError    = 256 // bytes of an error's text
)

const verbHello = "hello" // is the other KME there; empty both ways

// remote is a peer in another process.
type remote struct {
	uri  string
	http http.Client

	mu    sync.Mutex
	state LinkState
}

// newRemote returns a peer at an address, HOST:PORT.
func newRemote(address string, conf *tls.Config, dial func(ctx context.Context, network, address string) (net.Conn, error)) *remote {
	return &remote{state: LinkState{To: address}, uri: "https://" + address + linkPath, http: http.Client{
		Transport: &http.Transport{
			DialContext:         dial,
			TLSClientConfig:     conf,
			TLSHandshakeTimeout: linkTimeout,
			MaxConnsPerHost:     linkConnections,
			MaxIdleConnsPerHost: linkConnections,
			IdleConnTimeout:     time.Minute,
			DisableCompression:  true,
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}
}

func (r *remote) call(parent context.Context, verb string, body []byte) ([]byte, error) {
	ctx, cancel := context.WithTimeout(parent, linkTimeout)
	defer cancel()
	answer, err := r.post(ctx, verb, body)
	if errors.Is(parent.Err(), context.Canceled) {
		return answer, err // which says nothing about the link
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	_, refused := errors.AsType[refusal](err) // over a link that is up
	up := err == nil || refused
	if up != r.state.Up || r.state.Since.IsZero() {
		r.state.Up, r.state.Since = up, time.Now()
	}
	r.state.Error = ""
	if !up {
		r.state.Error = err.Error()
	}
	return answer, err
}

// refusal is an error that the other KME answered.
type refusal string

func (r refusal) Error() string { return string(r) }

func (r *remote) post(ctx context.Context, verb string, body []byte) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, r.uri+verb, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	// Calls may come twice: so one that finds a kept connection dead, as after
	// the other KME's restart, goes out again over a new one.
	req.Header["Idempotency-Key"] = []string{}
	resp, err := r.http.Do(req)
	if err != nil {
		if ctx.Err() != nil {
			return nil, fmt.Errorf("no answer within %v", linkTimeout)
		}
		return nil, errors.Unwrap(err) // of url.Error: method and URL say nothing here
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		text, _ := io.ReadAll(io.LimitReader(resp.Body, maxLinkError))
		return nil, refusal(fmt.Sprintf("answered %d %q", resp.StatusCode, strings.TrimSpace(string(text))))
	}
	if resp.ContentLength < 0 || resp.ContentLength > maxLinkBody {
		return nil, errMalformed
	}
	answer := make([]byte, resp.ContentLength) // one buffer, for the caller to wipe
	if _, err := io.ReadFull(resp.Body, answer); err != nil {
		clear(answer)
		return nil, err
	}
	return answer, nil
}

func (r *remote) link() LinkState {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.state
}

// runLink answers the other KME on ln and keeps asking it whether it is there,
// until ctx ends, then returns nil.
func (k *KME) runLink(ctx context.Context, ln net.Listener, conf *tls.Config, r *remote) error {
	tasks, ctx := errgroup.WithContext(ctx)
	tasks.Go(func() error { return k.keep(ctx, r) })
	tasks.Go(func() error { return k.serveLink(ctx, ln, conf) })
	return tasks.Wait()
}

// keep asks the other KME whether it is there until ctx ends, so that the link's
// state is known while no keys are made, and says when it changes.
func (k *KME) keep(ctx context.Context, r *remote) error {
	defer r.http.CloseIdleConnections()
	t := time.NewTicker(helloInterval)
	defer t.Stop()
	var told bool
	var last error
	for {
		_, err := k.call(ctx, verbHello, nil)
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil && (!told || last == nil):
			k.log.WarnContext(ctx, "link down", "err", err)
		case err == nil && (!told || last != nil):
			k.log.InfoContext(ctx, "link up")
		}
		told, last = true, err
		if err == nil {
			k.forgetUnheard(ctx)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
		}
	}
}

// serveLink answers the other KME on ln until ctx ends, then returns nil. conf
// is what proof.linkTLS returns.
func (k *KME) serveLink(ctx context.Context, ln net.Listener, conf *tls.Config) error {
	s := &http.Server{
		Handler:           http.HandlerFunc(k.serveCall),
		BaseContext:       func(net.Listener) context.Context { return ctx },
		ReadHeaderTimeout: requestTime,
		ReadTimeout:       requestTime,
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    4 << 10,
		ErrorLog:          slog.NewLogLogger(k.log.Handler(), slog.LevelWarn),
		Protocols:         new(http.Protocols),
	}
	s.Protocols.SetHTTP1(true)
	return serveUntil(ctx, s, tls.NewListener(netutil.LimitListener(ln, 2*linkConnections), conf))
}

func (k *KME) serveCall(w http.ResponseWriter, r *http.Request) {
	verb, found := strings.CutPrefix(r.URL.Path, linkPath)
	if !found || r.Method != http.MethodPost {
		http.Error(w, "no such call", http.StatusNotFound)
		return
	}
	if r.ContentLength < 0 || r.ContentLength > maxLinkBody {
		http.Error(w, "too long", http.StatusRequestEntityTooLarge)
		return
	}
	body := make([]byte, r.ContentLength)
	defer clear(body)
	if _, err := io.ReadFull(r.Body, body); err != nil {
		http.Error(w, "body is cut off", http.StatusBadRequest)
		return
	}
	answer, err := k.answerLink(r.Context(), verb, body)
	if errors.Is(err, errCut) {
		panic(http.ErrAbortHandler)
	}
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	defer clear(answer)
	w.Header().Set("Content-Length", fmt.Sprint(len(answer)))
	_, _ = w.Write(answer)
}
