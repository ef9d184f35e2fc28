package kmesim

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"io"
	"mime"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
)

// Limits of a request.
const maxRequest = 64 << 10 // bytes of its body

// ServeHTTP answers one request by ETSI GS QKD 014 or by SKIP, with the KME's
// faults.
func (k *KME) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	k.faulty(http.HandlerFunc(k.serve)).ServeHTTP(w, r)
}

func (k *KME) serve(w http.ResponseWriter, r *http.Request) {
	handle := k.handle
	if _, _, ok := skipPath(r.URL); ok {
		handle = k.handleSKIP
	}
	body, p := handle(w, r)
	if p != nil {
		if p.status == http.StatusMethodNotAllowed {
			w.Header().Set("Allow", p.allow)
		}
		k.counted.refused.Add(1)
		k.log.DebugContext(r.Context(), "refused", "status", p.status, "err", p.Message)
		reply(w, p.status, p)
		return
	}
	defer body.wipe()
	switch body.(type) {
	case *container, *hexKey:
		if f, _ := k.strike(Lost); f.Kind == Lost {
			panic(http.ErrAbortHandler)
		}
	}
	reply(w, http.StatusOK, body)
}

// answer is the body of a 200.
type answer interface{ wipe() }

// handle answers a request by the standard.
func (k *KME) handle(w http.ResponseWriter, r *http.Request) (answer, *problem) {
	sae, p := caller(r)
	if p != nil {
		return nil, p
	}
	peer, verb, p := address(r.URL)
	if p != nil {
		return nil, p
	}
	allow := "GET, POST"
	if verb == "status" {
		allow = "GET"
	}
	if !slices.Contains(strings.Split(allow, ", "), r.Method) {
		return nil, &problem{status: http.StatusMethodNotAllowed, Message: "method not allowed", allow: allow}
	}
	if peer == sae {
		return nil, bad("an SAE shares no keys with itself")
	}
	query, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		return nil, bad("malformed query")
	}
	var body []byte
	if r.Method == http.MethodPost {
		if len(query) > 0 {
			return nil, bad("a POST has no query")
		}
		if body, p = readBody(w, r); p != nil {
			return nil, p
		}
	}
	switch verb {
	case "status":
		return k.status(sae, peer), nil
	case "enc_keys":
		q, p := keyQuery(query)
		if body != nil {
			q, p = decodeKeyRequest(body)
		}
		if p != nil {
			return nil, p
		}
		return k.encKeys(r.Context(), sae, peer, q)
	default: // dec_keys
		ids, p := idQuery(query)
		if body != nil {
			ids, p = decodeKeyIDs(body)
		}
		if p != nil {
			return nil, p
		}
		return k.decKeys(r.Context(), peer, sae, ids)
	}
}

// caller returns the SAE ID of a client: its certificate's common name.
func caller(r *http.Request) (string, *problem) {
	if r.TLS == nil || len(r.TLS.PeerCertificates) == 0 || r.TLS.PeerCertificates[0].Subject.CommonName == "" {
		return "", &problem{status: http.StatusUnauthorized, Message: "no client certificate with an SAE ID as common name"}
	}
	return r.TLS.PeerCertificates[0].Subject.CommonName, nil
}

// address takes /api/v1/keys/{SAE_ID}/{verb} apart. SAE IDs may hold escaped
// slashes.
func address(u *url.URL) (sae, verb string, p *problem) {
	none := &problem{status: http.StatusNotFound, Message: "no such resource"}
	rest, found := strings.CutPrefix(u.EscapedPath(), "/api/v1/keys/")
	escaped, verb, two := strings.Cut(rest, "/")
	if !found || !two || !slices.Contains([]string{"status", "enc_keys", "dec_keys"}, verb) {
		return "", "", none
	}
	sae, err := url.PathUnescape(escaped)
	if err != nil || sae == "" || len(sae) > maxSAE {
		return "", "", none
	}
	return sae, verb, nil
}

func readBody(w http.ResponseWriter, r *http.Request) ([]byte, *problem) {
	if t := r.Header.Get("Content-Type"); t != "" {
		if mt, _, err := mime.ParseMediaType(t); err != nil || mt != "application/json" {
			return nil, bad("content type is not application/json")
		}
	}
	b, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxRequest))
	if err != nil {
		return nil, bad("body is cut off or too long")
	}
	if len(b) == 0 { // all of a key request is optional
		b = []byte("{}")
	}
	return b, nil
}

// status is the status data format (ETSI GS QKD 014 V1.1.1, 6.1).
type status struct {
	SourceKME  string `json:"source_KME_ID"`
	TargetKME  string `json:"target_KME_ID"`
	MasterSAE  string `json:"master_SAE_ID"`
	SlaveSAE   string `json:"slave_SAE_ID"`
	KeySize    int    `json:"key_size"`
	Stored     int    `json:"stored_key_count"`
	MaxKeys    int    `json:"max_key_count"`
	PerRequest int    `json:"max_key_per_request"`
	MaxKeySize int    `json:"max_key_size"`
	MinKeySize int    `json:"min_key_size"`
	MaxSAEs    int    `json:"max_SAE_ID_count"`
}

func (*status) wipe() {}

func (k *KME) status(master, slave string) *status {
	stored, size := k.pools.stored(master, slave)
	return &status{
		SourceKME: k.name, TargetKME: k.other, MasterSAE: master, SlaveSAE: slave,
		KeySize: KeySize, MinKeySize: MinKeySize, MaxKeySize: MaxKeySize,
		Stored: stored, MaxKeys: size, PerRequest: MaxKeysPerRequest, MaxSAEs: MaxSAEs,
	}
}

// container is a key container (ETSI GS QKD 014 V1.1.1, 6.3).
type container struct {
	Keys []key `json:"keys"`
}

func (c *container) wipe() { wipe(c.Keys) }

func (k *KME) encKeys(ctx context.Context, master, slave string, q *keyRequest) (answer, *problem) {
	slaves := append([]string{slave}, q.slaves...)
	slices.Sort(slaves)
	slaves = slices.Compact(slaves)
	if slices.Contains(slaves, master) {
		return nil, bad("an SAE shares no keys with itself")
	}
	keys, p := k.newKeys(ctx, master, slaves, q.number, q.size)
	if p != nil {
		return nil, p
	}
	return &container{keys}, nil
}

func (k *KME) decKeys(ctx context.Context, master, slave string, ids []string) (answer, *problem) {
	keys, p := k.takeKeys(ctx, master, slave, ids)
	if p != nil {
		return nil, p
	}
	return &container{keys}, nil
}

// problem is an error answer (ETSI GS QKD 014 V1.1.1, 6.5).
type problem struct {
	status  int
	Message string              `json:"message"`
	Details []map[string]string `json:"details,omitempty"`
	allow   string              // methods, of a 405
}

func bad(message string) *problem { return &problem{status: http.StatusBadRequest, Message: message} }

// The texts that the standard gives, and the two others that clients meet most.
const (
	textSize      = "size shall be a multiple of 8"
	textExtension = "not all extension_mandatory parameters are supported"
	textNotFound  = "one or more keys specified are not found on KME"
	textNotNamed  = "the SAE is not one of those named for the keys"
	textNoKeys    = "not enough keys stored"
	textNoPeer    = "the other KME cannot be reached"
)

// reply writes an answer and leaves no copy of it behind.
func reply(w http.ResponseWriter, status int, v any) {
	var b []byte
	if secret, ok := v.(interface{ encode() []byte }); ok {
		b = secret.encode()
		defer clear(b)
	} else {
		var err error
		if b, err = json.Marshal(v); err != nil {
			panic(err) // plain structs do not fail
		}
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.Header().Set("Content-Length", strconv.Itoa(len(b)))
	w.WriteHeader(status)
	_, _ = w.Write(b)
}

// encode writes the container without the buffers that encoding/json keeps.
func (c *container) encode() []byte {
	n := 16
	for _, k := range c.Keys {
		n += 32 + 6*len(k.ID) + base64.StdEncoding.EncodedLen(len(k.Key))
	}
	b := append(make([]byte, 0, n), `{"keys":[`...)
	for i, k := range c.Keys {
		if i > 0 {
			b = append(b, ',')
		}
		// IDs are our own UUIDs: nothing in them needs an escape.
		b = append(b, `{"key_ID":"`...)
		b = append(b, k.ID...)
		b = append(b, `","key":"`...)
		b = base64.StdEncoding.AppendEncode(b, k.Key)
		b = append(b, `"}`...)
	}
	return append(b, `]}`...)
}
