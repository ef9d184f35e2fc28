package kmesim

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
)

// call sends one request to a KME as an SAE.
func call(k *KME, sae, method, target, body string) (status int, answer string) {
	r := httptest.NewRequest(method, target, strings.NewReader(body))
	if sae != "" {
		r.TLS = &tls.ConnectionState{PeerCertificates: []*x509.Certificate{{Subject: pkix.Name{CommonName: sae}}}}
	}
	w := httptest.NewRecorder()
	k.ServeHTTP(w, r)
	return w.Code, w.Body.String()
}

// keys reads a key container into ID and key, in order.
func keys(t *testing.T, status int, answer string) (ids []string, keys [][]byte) {
	t.Helper()
	var c container
	if err := json.Unmarshal([]byte(answer), &c); err != nil || status != 200 {
		t.Fatalf("status %d, %v", status, err)
	}
	for _, k := range c.Keys {
		ids, keys = append(ids, k.ID), append(keys, k.Key)
	}
	return ids, keys
}

const api = "/api/v1/keys/"

func TestStatus(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := New(Options{Rate: 2, Pool: 10})
		if code, _ := call(p.A, "sae_001", "GET", api+"sae_002/enc_keys?number=3", ""); code != 200 {
			t.Fatal(code)
		}
		time.Sleep(500 * time.Millisecond) // one more key
		code, got := call(p.A, "sae_001", "GET", api+"sae_002/status", "")
		want := `{"source_KME_ID":"kme-a","target_KME_ID":"kme-b","master_SAE_ID":"sae_001","slave_SAE_ID":"sae_002",` +
			`"key_size":256,"stored_key_count":8,"max_key_count":10,"max_key_per_request":128,` +
			`"max_key_size":1024,"min_key_size":64,"max_SAE_ID_count":16}`
		if diff := cmp.Diff(want, got); code != 200 || diff != "" {
			t.Errorf("status %d (-want +got):\n%s", code, diff)
		}
	})
}

func TestDeliveredOnce(t *testing.T) {
	for _, method := range []string{"GET", "POST"} {
		p := New(Options{})
		code, answer := call(p.A, "sae_001", method, api+"sae_002/enc_keys", "")
		ids, made := keys(t, code, answer)
		if len(ids) != 1 || len(made[0]) != KeySize/8 {
			t.Fatalf("%s: %d keys", method, len(ids))
		}
		target, body := api+"sae_001/dec_keys?key_ID="+ids[0], ""
		if method == "POST" {
			target, body = api+"sae_001/dec_keys", fmt.Sprintf(`{"key_IDs":[{"key_ID":%q}]}`, ids[0])
		}
		code, answer = call(p.B, "sae_002", method, target, body)
		gotIDs, got := keys(t, code, answer)
		if !cmp.Equal(ids, gotIDs) || !cmp.Equal(made, got) {
			t.Errorf("%s: the slave got other keys", method)
		}
		code, answer = call(p.B, "sae_002", method, target, body)
		if want := `{"message":"one or more keys specified are not found on KME"}`; code != 400 || answer != want {
			t.Errorf("%s: second delivery: %d %s", method, code, answer)
		}
	}
}

func TestManyKeys(t *testing.T) {
	p := New(Options{})
	code, answer := call(p.A, "sae_001", "POST", api+"sae_002/enc_keys",
		`{"number":3,"size":512,"additional_slave_SAE_IDs":["sae_003"],"extension_mandatory":[],"extension_optional":[{"a":1}]}`)
	ids, made := keys(t, code, answer)
	if len(made) != 3 || len(made[2]) != 64 {
		t.Fatalf("%d keys", len(made))
	}
	body := fmt.Sprintf(`{"key_IDs":[{"key_ID":%q},{"key_ID":%q,"key_ID_extension":{}}],"key_IDs_extension":{}}`, ids[2], ids[0])
	// Both slaves get theirs, each once.
	for _, sae := range []string{"sae_002", "sae_003"} {
		code, answer = call(p.B, sae, "POST", api+"sae_001/dec_keys", body)
		if _, got := keys(t, code, answer); !cmp.Equal([][]byte{made[2], made[0]}, got) {
			t.Errorf("%s got other keys", sae)
		}
		if code, _ := call(p.B, sae, "POST", api+"sae_001/dec_keys", body); code == 200 {
			t.Errorf("%s got them twice", sae)
		}
	}
	// All or none: one unknown ID spends nothing.
	body = fmt.Sprintf(`{"key_IDs":[{"key_ID":%q},{"key_ID":"unknown"}]}`, ids[1])
	if code, _ := call(p.B, "sae_002", "POST", api+"sae_001/dec_keys", body); code != 400 {
		t.Errorf("unknown ID: %d", code)
	}
	if code, _ := call(p.B, "sae_002", "GET", api+"sae_001/dec_keys?key_ID="+ids[1], ""); code != 200 {
		t.Errorf("the known key is gone: %d", code)
	}
}

func TestRefusals(t *testing.T) {
	p := New(Options{})
	code, answer := call(p.A, "sae_001", "GET", api+"sae_002/enc_keys", "")
	ids, _ := keys(t, code, answer)
	enc, dec := api+"sae_002/enc_keys", api+"sae_001/dec_keys"
	for _, tt := range []struct {
		name, sae, method, target, body string
		code                            int
		want                            string
	}{
		{"size", "sae_001", "GET", enc + "?size=255", "", 400, "size shall be a multiple of 8"},
		{"size by POST", "sae_001", "POST", enc, `{"size":257}`, 400, "size shall be a multiple of 8"},
		{"small", "sae_001", "GET", enc + "?size=56", "", 400, "size shall be between 64 and 1024"},
		{"large", "sae_001", "GET", enc + "?size=1032", "", 400, "size shall be between 64 and 1024"},
		{"negative", "sae_001", "GET", enc + "?size=-8", "", 400, "size shall be between 64 and 1024"},
		{"none", "sae_001", "GET", enc + "?number=0", "", 400, "number shall be between 1 and 128"},
		{"many", "sae_001", "POST", enc, `{"number":129}`, 400, "number shall be between 1 and 128"},
		{"text", "sae_001", "GET", enc + "?number=one", "", 400, "number is not a number"},
		{"huge", "sae_001", "GET", enc + "?number=99999999999999999999", "", 400, "number is not a number"},
		{"twice", "sae_001", "GET", enc + "?number=1&number=1", "", 400, "a GET has number and size, once each"},
		{"unknown parameter", "sae_001", "GET", enc + "?bits=8", "", 400, "a GET has number and size, once each"},
		{"query", "sae_001", "GET", enc + "?%zz", "", 400, "malformed query"},
		{"mandatory", "sae_001", "POST", enc, `{"extension_mandatory":[{}]}`, 400, "not all extension_mandatory parameters are supported"},
		{"extension that is none", "sae_001", "POST", enc, `{"extension_optional":["route"]}`, 400, "malformed body"},
		{"slaves", "sae_001", "POST", enc, `{"additional_slave_SAE_IDs":["` + strings.Repeat(`a","`, 16) + `b"]}`, 400, "additional_slave_SAE_IDs shall be at most 16"},
		{"empty slave", "sae_001", "POST", enc, `{"additional_slave_SAE_IDs":[""]}`, 400, "additional_slave_SAE_IDs holds no SAE ID"},
		{"self", "sae_002", "GET", enc, "", 400, "an SAE shares no keys with itself"},
		{"self among slaves", "sae_001", "POST", enc, `{"additional_slave_SAE_IDs":["sae_001"]}`, 400, "an SAE shares no keys with itself"},
		{"unknown field", "sae_001", "POST", enc, `{"bits":8}`, 400, "malformed body"},
		{"array", "sae_001", "POST", enc, `[]`, 400, "malformed body"},
		{"huge number", "sae_001", "POST", enc, `{"size":1e999}`, 400, "malformed body"},
		{"truncated", "sae_001", "POST", enc, `{"size":`, 400, "malformed body"},
		{"two values", "sae_001", "POST", enc, `{}{}`, 400, "malformed body"},
		{"long", "sae_001", "POST", enc, strings.Repeat(" ", maxRequest+1), 400, "body is cut off or too long"},
		{"POST and query", "sae_001", "POST", enc + "?size=256", "{}", 400, "a POST has no query"},
		{"unknown ID", "sae_002", "GET", dec + "?key_ID=x", "", 400, "one or more keys specified are not found on KME"},
		{"no ID", "sae_002", "GET", dec, "", 400, "a GET has one key_ID"},
		{"no IDs", "sae_002", "POST", dec, `{"key_IDs":[]}`, 400, "key_IDs shall be between 1 and 128"},
		{"null", "sae_002", "POST", dec, `null`, 400, "key_IDs shall be between 1 and 128"},
		{"empty ID", "sae_002", "POST", dec, `{"key_IDs":[{}]}`, 400, "key_IDs holds an empty key_ID, or one twice"},
		{"ID twice", "sae_002", "POST", dec, `{"key_IDs":[{"key_ID":"a"},{"key_ID":"a"}]}`, 400, "key_IDs holds an empty key_ID, or one twice"},
		{"slave not named", "sae_003", "GET", dec + "?key_ID=" + ids[0], "", 401, "the SAE is not one of those named for the keys"},
		{"master fetches its own", "sae_001", "GET", api + "sae_002/dec_keys?key_ID=" + ids[0], "", 401, "the SAE is not one of those named for the keys"},
		{"other master", "sae_002", "GET", api + "sae_003/dec_keys?key_ID=" + ids[0], "", 401, "the SAE is not one of those named for the keys"},
		{"nobody", "", "GET", enc, "", 401, "no client certificate with an SAE ID as common name"},
		{"method", "sae_001", "PUT", enc, "{}", 405, "method not allowed"},
		{"status by POST", "sae_001", "POST", api + "sae_002/status", "{}", 405, "method not allowed"},
		{"verb", "sae_001", "GET", api + "sae_002/keys", "", 404, "no such resource"},
		{"no SAE", "sae_001", "GET", api + "/status", "", 404, "no such resource"},
		{"deeper", "sae_001", "GET", api + "sae_002/status/", "", 404, "no such resource"},
		{"root", "sae_001", "GET", "/", "", 404, "no such resource"},
	} {
		code, answer := call(p.B, tt.sae, tt.method, tt.target, tt.body)
		want := fmt.Sprintf(`{"message":%q}`, tt.want)
		if code != tt.code || answer != want {
			t.Errorf("%s: %d %s, want %d %s", tt.name, code, answer, tt.code, want)
		}
	}
	if code, _ := call(p.B, "sae_002", "GET", dec+"?key_ID="+ids[0], ""); code != 200 {
		t.Errorf("after all that the key is gone: %d", code)
	}
}

// TestExtensions: those that may be ignored are, those that may not are refused
// by name (ETSI GS QKD 014 V1.1.1, 6.2 and 6.5).
func TestExtensions(t *testing.T) {
	p := New(Options{})
	code, answer := call(p.A, "sae_001", "POST", api+"sae_002/enc_keys", `{"extension_mandatory":[{"route":{"via":["a"]}}]}`)
	want := `{"message":"not all extension_mandatory parameters are supported","details":[{"extension_mandatory_unsupported":"route"}]}`
	if code != 400 || answer != want {
		t.Errorf("mandatory: %d %s", code, answer)
	}
	code, answer = call(p.A, "sae_001", "POST", api+"sae_002/enc_keys",
		`{"extension_mandatory":[],"extension_optional":[{"route":{"via":["a"]}},{"b":1}]}`)
	if ids, _ := keys(t, code, answer); len(ids) != 1 {
		t.Errorf("%d keys", len(ids))
	}
}

// TestLimitsHold: what status says can be asked for can be.
func TestLimitsHold(t *testing.T) {
	p := New(Options{})
	s := p.A.status("sae_001", "sae_002")
	var slaves []string
	for i := range s.MaxSAEs {
		slaves = append(slaves, fmt.Sprintf("%q", fmt.Sprint("more", i)))
	}
	for _, size := range []int{s.MinKeySize, s.KeySize, s.MaxKeySize} {
		body := fmt.Sprintf(`{"number":%d,"size":%d,"additional_slave_SAE_IDs":[%s]}`, s.PerRequest, size, strings.Join(slaves, ","))
		code, answer := call(p.A, "sae_001", "POST", api+"sae_002/enc_keys", body)
		ids, made := keys(t, code, answer)
		if len(ids) != s.PerRequest || len(made[0]) != size/8 {
			t.Errorf("%d bits: %d keys", size, len(ids))
		}
		code, answer = call(p.B, "more15", "GET", api+"sae_001/dec_keys?key_ID="+ids[len(ids)-1], "")
		if _, got := keys(t, code, answer); !cmp.Equal(got[0], made[len(made)-1]) {
			t.Errorf("%d bits: the last slave got another key", size)
		}
	}
}

func TestHeaders(t *testing.T) {
	p := New(Options{})
	for _, tt := range []struct {
		contentType string
		code        int
	}{{"", 200}, {"application/json", 200}, {"application/json; charset=utf-8", 200}, {"text/plain", 400}, {"nonsense;;", 400}} {
		r := httptest.NewRequest("POST", api+"sae_002/enc_keys", strings.NewReader("{}"))
		r.TLS = &tls.ConnectionState{PeerCertificates: []*x509.Certificate{{Subject: pkix.Name{CommonName: "sae_001"}}}}
		if tt.contentType != "" {
			r.Header.Set("Content-Type", tt.contentType)
		}
		w := httptest.NewRecorder()
		p.A.ServeHTTP(w, r)
		if w.Code != tt.code {
			t.Errorf("%q: %d, want %d", tt.contentType, w.Code, tt.code)
		}
		if got := w.Header(); got.Get("Content-Type") != "application/json" || got.Get("Cache-Control") != "no-store" {
			t.Errorf("headers %v", got)
		}
	}
	r := httptest.NewRequest("DELETE", api+"sae_002/enc_keys", nil)
	r.TLS = &tls.ConnectionState{PeerCertificates: []*x509.Certificate{{Subject: pkix.Name{CommonName: "sae_001"}}}}
	w := httptest.NewRecorder()
	p.A.ServeHTTP(w, r)
	if got := w.Header().Get("Allow"); w.Code != 405 || got != "GET, POST" {
		t.Errorf("%d, Allow %q", w.Code, got)
	}
}

func TestEscapedSAE(t *testing.T) {
	p := New(Options{})
	code, answer := call(p.A, "sae_001", "GET", api+"a%2Fb%20c/enc_keys", "")
	ids, _ := keys(t, code, answer)
	if code, _ := call(p.B, "a/b c", "GET", api+"sae_001/dec_keys?key_ID="+ids[0], ""); code != 200 {
		t.Errorf("status %d", code)
	}
}

func TestStoreIsBounded(t *testing.T) {
	p := New(Options{MaxKeys: 4})
	var all []string
	for range 21 {
		code, answer := call(p.A, "sae_001", "GET", api+"sae_002/enc_keys", "")
		ids, _ := keys(t, code, answer)
		all = append(all, ids...)
		if len(all)%2 == 0 { // half of them are fetched
			call(p.B, "sae_002", "GET", api+"sae_001/dec_keys?key_ID="+ids[0], "")
		}
	}
	if n := p.B.store.waiting(); n != 4 {
		t.Errorf("%d keys stored, want 4", n)
	}
	if n := len(p.B.store.order); n > 8 {
		t.Errorf("%d IDs in order, want 8 at most", n)
	}
	if code, _ := call(p.B, "sae_002", "GET", api+"sae_001/dec_keys?key_ID="+all[0], ""); code != 400 {
		t.Errorf("oldest: %d", code)
	}
	if code, _ := call(p.B, "sae_002", "GET", api+"sae_001/dec_keys?key_ID="+all[18], ""); code != 200 {
		t.Errorf("newest: %d", code)
	}
}

func TestRandomFails(t *testing.T) {
	p := New(Options{Random: strings.NewReader("too short")})
	code, answer := call(p.A, "sae_001", "GET", api+"sae_002/enc_keys", "")
	if code != http.StatusServiceUnavailable || strings.Contains(answer, "keys") {
		t.Errorf("%d %s", code, answer)
	}
}

func TestParseFault(t *testing.T) {
	for k := range faults {
		f := Fault{Kind: FaultKind(k)}
		switch f.Kind {
		case Slow, Drip:
			f.Delay = 1500 * time.Millisecond
		case Page:
			f.Code, f.Shape = 404, "text"
		}
		if got, err := ParseFault(f.String()); err != nil || got != f {
			t.Errorf("ParseFault(%q) = %v, %v", f, got, err)
		}
	}
	for _, tt := range []struct{ text, want string }{
		{"", `unknown fault "": one of healthy, out-of-keys, late, out-of-step, slow, drip, wrong-bytes, wrong-size, lost, html, page, down, silent, silent-tls, expired, cut`},
		{"slow", `fault "slow": slow needs a delay, as slow=2s`},
		{"down=1s", `fault "down=1s": down has no value`},
		{"slow=-1s", `fault "slow=-1s": delay is not between 0 and 10m0s`},
		{"slow=1h", `fault "slow=1h": delay is not between 0 and 10m0s`},
		{"slow=soon", `fault "slow=soon": delay is not between 0 and 10m0s`},
		{"wrong-size=12", `fault "wrong-size=12": size is not a multiple of 8 between 8 and 65536 bits`},
		{"late=200", `fault "late=200": code is not between 400 and 599`},
		{"page", `fault "page": page needs a code and a shape, as page=404/text`},
		{"page=100/text", `fault "page=100/text": code is not between 200 and 599`},
		{"page=404", `fault "page=404": unknown shape "": one of html, text, empty, message, problem, nested, array, string, number, null, truncated, no-keys, binary, long`},
		{"down,", `fault "down,": "" is neither for= nor times=`},
		{"down,for=0s", `fault "down,for=0s": for is not a time of up to 168h0m0s`},
		{"down,times=0", `fault "down,times=0": times is not between 1 and 1000000`},
		{"down,when=now", `fault "down,when=now": "when=now" is neither for= nor times=`},
		{"healthy,for=1s", `fault "healthy,for=1s": healthy has no limits`},
	} {
		if _, err := ParseFault(tt.text); err == nil || err.Error() != tt.want {
			t.Errorf("ParseFault(%q) = %v, want %s", tt.text, err, tt.want)
		}
	}
	for _, text := range []string{
		"out-of-keys=404,for=2m0s,times=10", "late=503", "wrong-size=512", "drip=100ms,times=1", "page=200/empty,for=1s",
	} {
		if f, err := ParseFault(text); err != nil || f.String() != text {
			t.Errorf("ParseFault(%q) = %v, %v", text, f, err)
		}
	}
	if got := FaultKind(99).String(); got != "fault 99" {
		t.Errorf("String = %q", got)
	}
}

// TestSlow: a fault that holds requests up lets them go when it is lifted.
func TestSlow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := New(Options{})
		p.A.SetFault(Fault{Kind: Slow, Delay: 3 * time.Second})
		began := time.Now()
		if code, _ := call(p.A, "sae_001", "GET", api+"sae_002/status", ""); code != 200 {
			t.Error(code)
		}
		if got := time.Since(began); got != 3*time.Second {
			t.Errorf("took %v", got)
		}
		done := make(chan int)
		go func() {
			code, _ := call(p.A, "sae_001", "GET", api+"sae_002/status", "")
			done <- code
		}()
		synctest.Wait()
		p.A.SetFault(Fault{})
		if code := <-done; code != 200 || time.Since(began) != 3*time.Second {
			t.Errorf("%d after %v", code, time.Since(began))
		}
	})
}

// TestLimitedFault: a fault ends after its time or its times, and one that has
// ended does not end the next.
func TestLimitedFault(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := New(Options{})
		ask := func() int {
			code, _ := call(p.A, "sae_001", "GET", api+"sae_002/enc_keys", "")
			return code
		}
		p.A.SetFault(Fault{Kind: OutOfKeys, For: time.Minute})
		time.Sleep(time.Minute - time.Nanosecond)
		before := ask()
		time.Sleep(time.Nanosecond)
		synctest.Wait()
		if after := ask(); before != 503 || after != 200 {
			t.Errorf("before its end %d, after it %d", before, after)
		}

		p.A.SetFault(Fault{Kind: OutOfKeys, Times: 2})
		if code, _ := call(p.A, "sae_001", "GET", api+"sae_002/status", ""); code != 200 {
			t.Errorf("status: %d", code) // which the fault does not concern
		}
		if got := []int{ask(), ask(), ask()}; !cmp.Equal(got, []int{503, 503, 200}) {
			t.Errorf("%v", got)
		}

		p.A.SetFault(Fault{Kind: OutOfKeys, For: time.Minute})
		p.A.SetFault(Fault{Kind: OutOfKeys})
		p.A.SetFault(Fault{Kind: OutOfKeys, For: time.Minute, Times: 1})
		ask()
		p.A.SetFault(Fault{Kind: OutOfKeys})
		time.Sleep(time.Hour)
		synctest.Wait()
		if code := ask(); code != 503 {
			t.Errorf("an end of an earlier fault ended a later one: %d", code)
		}
	})
}

// TestLost: a key is gone without an answer; a status is not a key.
func TestLost(t *testing.T) {
	p := New(Options{})
	p.A.SetFault(Fault{Kind: Lost, Times: 1})
	if code, _ := call(p.A, "sae_001", "GET", api+"sae_002/status", ""); code != 200 {
		t.Errorf("status: %d", code)
	}
	defer func() {
		if r := recover(); r != http.ErrAbortHandler || p.B.store.waiting() != 1 {
			t.Errorf("ended by %v with %d keys at the other KME", r, p.B.store.waiting())
		}
	}()
	call(p.A, "sae_001", "GET", api+"sae_002/enc_keys", "")
}

// TestSilentOnce: the last request that a fault strikes is held up until there
// is another fault.
func TestSilentOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := New(Options{})
		p.A.SetFault(Fault{Kind: Silent, Times: 1})
		var aborted any
		done := make(chan struct{})
		go func() {
			defer close(done)
			defer func() { aborted = recover() }()
			call(p.A, "sae_001", "GET", api+"sae_002/status", "")
		}()
		synctest.Wait()
		if code, _ := call(p.A, "sae_001", "GET", api+"sae_002/status", ""); code != 200 {
			t.Errorf("the second request: %d", code)
		}
		select {
		case <-done:
			t.Fatal("the first was answered")
		default:
		}
		p.A.SetFault(Fault{})
		<-done
		if aborted != http.ErrAbortHandler {
			t.Errorf("ended by %v", aborted)
		}
	})
}

func TestServeWantsClientCertificates(t *testing.T) {
	p := New(Options{})
	ln := httptest.NewUnstartedServer(nil).Listener
	if err := p.A.Serve(context.Background(), ln, &tls.Config{}); err == nil {
		t.Error("no error")
	}
	if _, err := ln.Accept(); err == nil {
		t.Error("listener is open")
	}
}

func FuzzDecodeKeyRequest(f *testing.F) {
	f.Add([]byte(`{"number":1,"size":256,"additional_slave_SAE_IDs":["a"],"extension_mandatory":[{}]}`))
	f.Add([]byte(`null`))
	f.Fuzz(func(t *testing.T, body []byte) {
		q, p := decodeKeyRequest(body)
		if p == nil && q.check() != nil {
			t.Error("request over the limits")
		}
	})
}

func FuzzDecodeKeyIDs(f *testing.F) {
	f.Add([]byte(`{"key_IDs":[{"key_ID":"a","key_ID_extension":{}}],"key_IDs_extension":{}}`))
	f.Add([]byte(`{"key_IDs":null}`))
	f.Fuzz(func(t *testing.T, body []byte) {
		ids, p := decodeKeyIDs(body)
		if p == nil && (len(ids) < 1 || len(ids) > MaxKeysPerRequest) {
			t.Errorf("%d IDs", len(ids))
		}
	})
}

// FuzzAddress: no URI makes the handler panic, and an SAE ID comes out bounded.
func FuzzAddress(f *testing.F) {
	f.Add("/api/v1/keys/sae_002/enc_keys?number=1&size=256")
	f.Add("/api/v1/keys/a%2Fb/dec_keys?key_ID=x")
	pair := New(Options{MaxKeys: 8})
	f.Fuzz(func(t *testing.T, target string) {
		r, err := http.NewRequest("GET", target, nil)
		if err != nil {
			return
		}
		r.TLS = &tls.ConnectionState{PeerCertificates: []*x509.Certificate{{Subject: pkix.Name{CommonName: "sae_001"}}}}
		w := httptest.NewRecorder()
		pair.A.ServeHTTP(w, r)
		if b, err := io.ReadAll(w.Body); err != nil || !json.Valid(b) {
			t.Errorf("answer to %q is not JSON", target)
		}
	})
}
