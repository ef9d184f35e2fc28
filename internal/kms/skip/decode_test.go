package skip

import (
	"strings"
	"testing"

	"keyturn/internal/kms"
	"keyturn/internal/kms/kmshttp"
)

func TestDecodeKey(t *testing.T) {
	keyOf := func(key string) string { return `{"keyId":"ab","key":` + key + `}` }
	for _, tt := range []struct{ name, body, want string }{
		{"draft", keyAnswer, ""},
		{"upper case", strings.ToUpper(figureKey), ""},
		{"more fields", `{"x":[{"key":7}],"keyId":"ab","key":"` + figureKey + `","expires":null}`, ""},
		{"twice", `{"keyId":"ab","key":"00","key":"` + figureKey + `"}`, ""},
		{"null after a key", `{"keyId":"ab","key":"` + figureKey + `","key":null}`, "key is missing"},
		{"odd", keyOf(`"` + figureKey[1:] + `"`), "key has an odd number of hexadecimal digits"},
		{"128 bits", keyOf(`"` + figureKey[:32] + `"`), "key has 128 bits, not 256"},
		{"512 bits", keyOf(`"` + figureKey + figureKey + `"`), "key has 512 bits, not 256"},
		{"empty", keyOf(`""`), "key has 0 bits, not 256"},
		{"base64", keyOf(`"wHHVxRwDJs3/bXd38GHP3oe4svTuRpZS0yCC7x4Ly+s="`), "key is not hexadecimal"},
		{"0x", keyOf(`"0x` + figureKey[2:] + `"`), "key is not hexadecimal"},
		{"escaped", keyOf(`"\u0061` + figureKey[1:] + `"`), "key is not hexadecimal"},
		{"number", keyOf("12"), "key is not a JSON string"},
		{"object", keyOf("{}"), "key is not a JSON string"},
		{"null", keyOf("null"), "key is missing"},
		{"zero", keyOf(`"` + strings.Repeat("0", 64) + `"`), "key is all zero"},
		{"no key", `{"keyId":"ab"}`, "key is missing"},
		{"no ID", `{"key":"` + figureKey + `"}`, "key ID is missing"},
		{"null ID", `{"keyId":null,"key":"` + figureKey + `"}`, "key ID is missing"},
		{"empty ID", `{"keyId":"","key":"` + figureKey + `"}`, "key ID is empty"},
		{"dots", `{"keyId":"..","key":"` + figureKey + `"}`, `key ID ".." cannot stand in a URI`},
		{"unprintable ID", `{"keyId":"a\u001b","key":"` + figureKey + `"}`, "key ID has the unprintable byte 0x1b at offset 1"},
		{"number as ID", `{"keyId":7,"key":"` + figureKey + `"}`, "answer has a JSON number as keyId"},
		{"HTML", "<html>", "answer is not JSON"},
		{"array", "[]", "answer is JSON but not an object"},
	} {
		body := tt.body
		if tt.name == "upper case" {
			body = keyOf(`"` + body + `"`)
		}
		id, key, err := decodeKey([]byte(body))
		got := ""
		if err != nil {
			got = err.Error()
			if id != "" || key != nil {
				t.Errorf("%s: something beside the error", tt.name)
			}
		} else if !isFigureKey(key) {
			t.Errorf("%s: another key", tt.name)
		}
		if got != tt.want {
			t.Errorf("%s: got %q, want %q", tt.name, got, tt.want)
		}
	}
}

func TestDecodeCapabilities(t *testing.T) {
	for _, tt := range []struct{ body, peer, want string }{
		{aliceKnowsBob, "Bob", ""},
		{`{"key":true,"remoteSystemID":["KP_*_LOC1"]}`, "KP_BOB_LOC1", ""},
		{aliceKnowsBob, "Mallory", `kms refuses: key provider "Alice" shares no keys with "Mallory"`},
		{`{"key":true,"localSystemID":"Alice"}`, "Bob", `kms refuses: key provider "Alice" shares no keys with "Bob"`},
		{strings.Replace(aliceKnowsBob, `"key":true`, `"key":false`, 1), "Bob", `kms refuses: key provider "Alice" hands out no keys`},
		{`{"localSystemID":"Alice","remoteSystemID":["*"]}`, "Bob", "answer does not say whether there are keys"},
		{`{"key":"yes"}`, "Bob", "answer has a JSON string as key"},
		{`{"key":true,"remoteSystemID":"Bob"}`, "Bob", "answer has a JSON string as remoteSystemID"},
		{`{"key":true,"remoteSystemID":[null]}`, "Bob", `kms refuses: key provider "" shares no keys with "Bob"`},
		{"", "Bob", "answer is empty"},
	} {
		c, err := decodeCapabilities([]byte(tt.body))
		if err == nil {
			err = c.covers(tt.peer)
		}
		got := ""
		if err != nil {
			got = err.Error()
		}
		if got != tt.want {
			t.Errorf("%s: got %q, want %q", tt.body, got, tt.want)
		}
	}
}

func TestErrorText(t *testing.T) {
	for body, want := range map[string]string{
		`{"message":"a"}`:               "a",
		`{"error":"b","detail":"c"}`:    "b",
		`{"detail":"\u001b[2Jc\n"}`:     "[2Jc",
		`{"detail":[{"loc":["size"]}]}`: "",
		`<html>`:                        "",
		``:                              "",
		`null`:                          "",
	} {
		if got := errorText([]byte(body)); got != want {
			t.Errorf("%s: got %q, want %q", body, got, want)
		}
	}
}

// FuzzDecodeKey: whatever a key provider sends, there is a whole usable key or
// an error that gives nothing of the answer away.
func FuzzDecodeKey(f *testing.F) {
	for _, s := range []string{
		keyAnswer, "", "null", "[]", "{", `{"key":"0"}`, `{"keyId":"a","key":"zz"}`, `{"key":null,"key":"\u0041"}`,
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		id, key, err := decodeKey(body)
		if err != nil {
			if key != nil || id != "" {
				t.Error("something beside the error")
			}
			if len(err.Error()) > 300 {
				t.Errorf("error of %d bytes", len(err.Error()))
			}
			return
		}
		if key == nil || key.IsZero() || kms.CheckKeyID(id) != nil {
			t.Errorf("unusable key with ID %q", id)
		}
	})
}

func FuzzDecodeCapabilities(f *testing.F) {
	f.Add([]byte(aliceKnowsBob), "Bob")
	f.Add([]byte(`{"key":true,"remoteSystemID":["[!","*\ud800"]}`), "\xff")
	f.Fuzz(func(t *testing.T, body []byte, peer string) {
		c, err := decodeCapabilities(body)
		if err != nil {
			if c != nil {
				t.Error("capabilities beside the error")
			}
			return
		}
		if !kmshttp.Printable(c.localSystemID) {
			t.Errorf("name %q", c.localSystemID)
		}
		_ = c.covers(peer)
	})
}

func FuzzErrorText(f *testing.F) {
	f.Add([]byte(`{"detail":"Key for keyId 'a' not found."}`))
	f.Add([]byte(`<html>`))
	f.Fuzz(func(t *testing.T, body []byte) {
		if text := errorText(body); len(text) > 200 || !kmshttp.Printable(text) {
			t.Errorf("text %q", text)
		}
	})
}
