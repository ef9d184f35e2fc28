package kmesim

import (
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"regexp"
	"strings"
	"testing"
)

// skipKey reads the answer to "Get Key", which must have the form of the
// draft's figure 6.
func skipKey(t *testing.T, code int, answer string, bits int) (id, key string) {
	t.Helper()
	form := regexp.MustCompile(fmt.Sprintf(`^\{"keyId":"([0-9a-f]{32})","key":"([0-9a-f]{%d})"\}$`, bits/4))
	m := form.FindStringSubmatch(answer)
	if code != 200 || m == nil {
		t.Fatalf("code %d, or not a key of %d bits", code, bits)
	}
	return m[1], m[2]
}

func TestSKIP(t *testing.T) {
	p := New(Options{})
	code, got := call(p.A, "sae_001", "GET", "/capabilities", "")
	if want := `{"entropy":true,"key":true,"algorithm":"simulated QKD","localSystemID":"sae_001","remoteSystemID":["*"]}`; code != 200 || got != want {
		t.Errorf("capabilities: %d %s", code, got)
	}
	for bits, query := range map[int]string{256: "", 64: "&size=64", 128: "&size=128", 1024: "&size=1024"} {
		code, got := call(p.A, "sae_001", "GET", "/key?remoteSystemID=sae_002"+query, "")
		id, made := skipKey(t, code, got, bits)
		// A third system does not get it, the second does, at either KME, once.
		if code, _ := call(p.B, "sae_003", "GET", "/key/"+id+"?remoteSystemID=sae_001", ""); code != 400 {
			t.Errorf("a third system: %d", code)
		}
		if code, _ := call(p.B, "sae_002", "GET", "/key/"+id+"?remoteSystemID=sae_003", ""); code != 400 {
			t.Errorf("as if from a third system: %d", code)
		}
		k := map[bool]*KME{true: p.A, false: p.B}[bits == 64]
		code, got = call(k, "sae_002", "GET", "/key/"+strings.ToUpper(id)+"?remoteSystemID=sae_001", "")
		if gotID, taken := skipKey(t, code, got, bits); gotID != id || taken != made {
			t.Errorf("%d bits: another key", bits)
		}
		code, got = call(k, "sae_002", "GET", "/key/"+id+"?remoteSystemID=sae_001", "")
		if want := `{"message":"one or more keys specified are not found on KME"}`; code != 400 || got != want {
			t.Errorf("second delivery: %d %s", code, got)
		}
	}
	for bits, query := range map[int]string{256: "", 8: "?minentropy=8", 8192: "?minentropy=8192"} {
		code, got := call(p.B, "sae_001", "GET", "/entropy"+query, "")
		var e struct {
			Random string `json:"randomStr"`
			Bits   int    `json:"minentropy"`
		}
		if err := json.Unmarshal([]byte(got), &e); code != 200 || err != nil || e.Bits != bits || len(e.Random) != bits/4 {
			t.Errorf("entropy: %d, %v, %d bits in %d digits", code, err, e.Bits, len(e.Random))
		}
		if _, err := hex.DecodeString(e.Random); err != nil {
			t.Error(err)
		}
	}
}

// TestSKIPAnd014: one key, by either interface.
func TestSKIPAnd014(t *testing.T) {
	p := New(Options{})
	code, answer := call(p.A, "sae_001", "GET", api+"sae_002/enc_keys", "")
	ids, made := keys(t, code, answer)
	code, answer = call(p.B, "sae_002", "GET", "/key/"+strings.ReplaceAll(ids[0], "-", "")+"?remoteSystemID=sae_001", "")
	if _, taken := skipKey(t, code, answer, 256); taken != hex.EncodeToString(made[0]) {
		t.Error("another key")
	}
}

func TestSKIPRefusals(t *testing.T) {
	p := New(Options{})
	const id = "00112233445566778899aabbccddeeff"
	for _, tt := range []struct {
		name, sae, method, target string
		code                      int
		want                      string
	}{
		{"nobody", "", "GET", "/capabilities", 401, "no client certificate with an SAE ID as common name"},
		{"POST", "sae_001", "POST", "/capabilities", 405, "method not allowed"},
		{"HEAD", "sae_001", "HEAD", "/key?remoteSystemID=sae_002", 405, "method not allowed"},
		{"PUT", "sae_001", "PUT", "/key/" + id, 405, "method not allowed"},
		{"DELETE", "sae_001", "DELETE", "/entropy", 405, "method not allowed"},
		{"path", "sae_001", "GET", "/keys", 404, "no such resource"},
		{"no ID", "sae_001", "GET", "/key/", 404, "no such resource"},
		{"deeper", "sae_001", "GET", "/key/" + id + "/x", 404, "no such resource"},
		{"slash", "sae_001", "GET", "/entropy/", 404, "no such resource"},
		{"query", "sae_001", "GET", "/key?%zz", 400, "malformed query"},
		{"capabilities of", "sae_001", "GET", "/capabilities?remoteSystemID=x", 400, `unknown parameter "remoteSystemID"`},
		{"no system", "sae_001", "GET", "/key", 400, "remoteSystemID is missing"},
		{"empty system", "sae_001", "GET", "/key?remoteSystemID=", 400, "remoteSystemID is missing"},
		{"long system", "sae_001", "GET", "/key?remoteSystemID=" + strings.Repeat("x", 1025), 400, "remoteSystemID is too long"},
		{"two systems", "sae_001", "GET", "/key?remoteSystemID=x&remoteSystemID=y", 400, "remoteSystemID stands there twice"},
		{"itself", "sae_001", "GET", "/key?remoteSystemID=sae_001", 400, "a system shares no keys with itself"},
		{"unknown parameter", "sae_001", "GET", "/key?remoteSystemID=x&number=2", 400, `unknown parameter "number"`},
		{"size", "sae_001", "GET", "/key?remoteSystemID=x&size=255", 400, "size shall be a multiple of 8"},
		{"small", "sae_001", "GET", "/key?remoteSystemID=x&size=56", 400, "size shall be between 64 and 1024"},
		{"large", "sae_001", "GET", "/key?remoteSystemID=x&size=1032", 400, "size shall be between 64 and 1024"},
		{"text", "sae_001", "GET", "/key?remoteSystemID=x&size=big", 400, "size is not a number"},
		{"no number", "sae_001", "GET", "/key?remoteSystemID=x&size=", 400, "size is not a number"},
		{"size by ID", "sae_001", "GET", "/key/" + id + "?remoteSystemID=x&size=256", 400, `unknown parameter "size"`},
		{"by ID of nobody", "sae_001", "GET", "/key/" + id, 400, "remoteSystemID is missing"},
		{"not hex", "sae_001", "GET", "/key/" + strings.Repeat("x", 32) + "?remoteSystemID=x", 400, "malformed keyId"},
		{"short", "sae_001", "GET", "/key/" + id[2:] + "?remoteSystemID=x", 400, "malformed keyId"},
		{"long", "sae_001", "GET", "/key/" + id + "00?remoteSystemID=x", 400, "malformed keyId"},
		{"escaped slash", "sae_001", "GET", "/key/a%2Fb?remoteSystemID=x", 400, "malformed keyId"},
		{"unknown", "sae_001", "GET", "/key/" + id + "?remoteSystemID=x", 400, "one or more keys specified are not found on KME"},
		{"no entropy", "sae_001", "GET", "/entropy?minentropy=0", 400, "minentropy shall be between 8 and 8192"},
		{"odd entropy", "sae_001", "GET", "/entropy?minentropy=129", 400, "minentropy shall be a multiple of 8"},
	} {
		code, answer := call(p.B, tt.sae, tt.method, tt.target, "")
		if want := fmt.Sprintf(`{"message":%q}`, tt.want); code != tt.code || answer != want {
			t.Errorf("%s: %d %s, want %d %s", tt.name, code, answer, tt.code, want)
		}
	}
}

func TestSKIPFaults(t *testing.T) {
	p := New(Options{})
	get := func() (id, key string) {
		code, answer := call(p.A, "sae_001", "GET", "/key?remoteSystemID=sae_002", "")
		return skipKey(t, code, answer, 256)
	}
	take := func(id string) (int, string) {
		return call(p.B, "sae_002", "GET", "/key/"+id+"?remoteSystemID=sae_001", "")
	}
	for _, tt := range []struct {
		fault     string
		get, take int // of kme-a without an ID, and of kme-b with one
		entropy   int
	}{
		{"out-of-keys", 503, 200, 503},
		{"out-of-keys=500", 500, 200, 500},
		{"late", 200, 400, 200},
		{"late=404", 200, 404, 200},
		{"html", 502, 502, 502},
		{"page=418/empty", 418, 418, 418},
		{"cut", 503, 200, 200},
	} {
		id, _ := get()
		f, err := ParseFault(tt.fault)
		if err != nil {
			t.Fatal(err)
		}
		p.A.SetFault(f)
		p.B.SetFault(f)
		if code, _ := call(p.A, "sae_001", "GET", "/key?remoteSystemID=sae_002", ""); code != tt.get {
			t.Errorf("%s: Get Key: %d, want %d", tt.fault, code, tt.get)
		}
		if code, _ := take(id); code != tt.take {
			t.Errorf("%s: Get Key by ID: %d, want %d", tt.fault, code, tt.take)
		}
		if code, _ := call(p.B, "sae_001", "GET", "/entropy", ""); code != tt.entropy {
			t.Errorf("%s: Get Entropy: %d, want %d", tt.fault, code, tt.entropy)
		}
		p.A.SetFault(Fault{})
		p.B.SetFault(Fault{})
	}
	id, made := get()
	p.B.SetFault(Fault{Kind: WrongBytes})
	code, answer := take(id)
	if _, taken := skipKey(t, code, answer, 256); taken == made {
		t.Error("wrong-bytes: the right ones")
	}
	id, _ = get()
	p.B.SetFault(Fault{Kind: WrongSize})
	code, answer = take(id)
	skipKey(t, code, answer, 32)

	id, _ = get()
	p.B.SetFault(Fault{Kind: Lost})
	func() {
		defer func() {
			if recover() == nil {
				t.Error("lost: answered")
			}
		}()
		take(id)
	}()
	p.B.SetFault(Fault{})
	if code, _ := take(id); code != 400 {
		t.Errorf("lost: %d", code)
	}
}

// FuzzSKIPPath: no URI makes the handler panic, and it answers in JSON.
func FuzzSKIPPath(f *testing.F) {
	f.Add("/key/00112233445566778899aabbccddeeff?remoteSystemID=sae_002")
	f.Add("/key?remoteSystemID=sae_002&size=128")
	f.Add("/entropy?minentropy=128")
	f.Add("/key/%2F")
	pair := New(Options{MaxKeys: 8})
	f.Fuzz(func(t *testing.T, target string) {
		r, err := http.NewRequest("GET", target, nil)
		if err != nil {
			return
		}
		r.TLS = &tls.ConnectionState{PeerCertificates: []*x509.Certificate{{Subject: pkix.Name{CommonName: "sae_001"}}}}
		w := httptest.NewRecorder()
		pair.A.ServeHTTP(w, r)
		if !json.Valid(w.Body.Bytes()) {
			t.Errorf("answer to %q is not JSON", target)
		}
	})
}
