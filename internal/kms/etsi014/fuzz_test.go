package etsi014

import (
	"strings"
	"testing"

	"keyturn/internal/kms"
)

// FuzzDecodeKeys: whatever a KME sends, there are whole usable keys or an error
// that gives nothing of the answer away.
func FuzzDecodeKeys(f *testing.F) {
	for _, s := range []string{
		keyAnswer, "", "null", "[]", "{", `{"keys":[{}]}`, `{"keys":[{"key_ID":"a","key":"\u0041\\"}]}`,
		`{"keys":[{"key":"AA==","key":"` + testKey + `","key_ID":"a"}]}`, `{"keys":[{"key":"\uD83D\uDE00"}]}`,
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		keys, err := decodeKeys(body)
		if err != nil {
			if keys != nil {
				t.Error("keys beside the error")
			}
			if len(err.Error()) > 300 {
				t.Errorf("error of %d bytes", len(err.Error()))
			}
			return
		}
		if len(keys) == 0 {
			t.Error("neither a key nor an error")
		}
		for _, k := range keys {
			if k.key == nil || k.key.IsZero() || kms.CheckKeyID(k.id) != nil {
				t.Errorf("unusable key with ID %q", k.id)
			}
		}
	})
}

// FuzzDecodeStatus: every text that comes out can be shown.
func FuzzDecodeStatus(f *testing.F) {
	f.Add([]byte(`{"source_KME_ID":"a","key_size":256}`))
	f.Add([]byte(`{"key_size":1e3,"slave_SAE_ID":"\u0007\ud800"}`))
	f.Fuzz(func(t *testing.T, body []byte) {
		s, err := decodeStatus(body)
		if err != nil && s != (kms.Status{}) {
			t.Error("a status beside the error")
		}
		for _, text := range []string{s.SourceKME, s.TargetKME, s.MasterSAE, s.SlaveSAE} {
			if len(text) > maxText || !printable(text) {
				t.Errorf("text %q", text)
			}
		}
	})
}

func FuzzErrorText(f *testing.F) {
	f.Add([]byte(`{"message":"one or more keys specified are not found on KME","details":[]}`))
	f.Add([]byte(`<html>`))
	f.Add([]byte(`{"message":"` + strings.Repeat("é", 150) + `"}`))
	f.Fuzz(func(t *testing.T, body []byte) {
		if text := errorText(body); len(text) > maxText || !printable(text) {
			t.Errorf("text %q", text)
		}
	})
}
