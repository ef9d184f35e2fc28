package etsi014

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"io"
	"log"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"keyturn/internal/kms"
	"keyturn/internal/kms/kmshttp"
	"keyturn/internal/kms/kmstls"
	"keyturn/internal/memnet"
	"keyturn/internal/testca"
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
		if min(s.KeySize, s.MinKeySize, s.MaxKeySize, s.StoredKeys, s.MaxKeys, s.MaxKeysPerRequest, s.MaxSAEs) < 0 {
			t.Errorf("a number below zero: %+v", s)
		}
		for _, text := range []string{s.SourceKME, s.TargetKME, s.MasterSAE, s.SlaveSAE} {
			if len(text) > 200 || !kmshttp.Printable(text) {
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
		if text := errorText(body); len(text) > 200 || !kmshttp.Printable(text) {
			t.Errorf("text %q", text)
		}
	})
}

// FuzzAnswer gives the client any bytes as the whole answer: header, coding and
// body. An error shows no piece of a key, wherever in the answer it stands; the
// texts that are meant to be shown aside.
func FuzzAnswer(f *testing.F) {
	log.SetOutput(io.Discard) // see TestField
	files, err := filepath.Glob("testdata/field/*")
	if err != nil || len(files) == 0 {
		f.Fatal("no exchanges", err)
	}
	for _, name := range files {
		for _, e := range readExchanges(f, filepath.Base(name)) {
			f.Add(e.answer)
		}
	}
	ca := testca.New(f, "root")
	conf := &tls.Config{Certificates: []tls.Certificate{ca.Server("kme-a")}}
	f.Fuzz(func(t *testing.T, answer []byte) {
		var n memnet.Network
		l, err := n.Listen("kme-a:443")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		go func() {
			for {
				conn, err := l.Accept()
				if err != nil {
					return
				}
				server := tls.Server(conn, conf)
				_, _ = http.ReadRequest(bufio.NewReader(server))
				_, _ = server.Write(answer)
				server.Close()
			}
		}()
		k, err := New(Config{
			URIs: []string{"https://kme-a"}, SAE: "sae_001", Timeout: time.Second, Dial: n.Dial,
			TLS: kmstls.Config{Memory: &tls.Config{RootCAs: ca.Pool()}},
		})
		if err != nil {
			t.Fatal(err)
		}
		defer k.Close()
		s, err := k.For("sae_002")
		if err != nil {
			t.Fatal(err)
		}
		id, key, err := s.Key(t.Context())
		if err == nil {
			if key == nil || key.IsZero() || kms.CheckKeyID(id) != nil {
				t.Errorf("unusable key with ID %q", id)
			}
			return
		}
		if key != nil || id != "" {
			t.Error("something beside the error")
		}
		shown := bytes.ToLower(answer)
		if bytes.Contains(shown, []byte("message")) || bytes.Contains(shown, []byte("content-")) {
			return
		}
		for i := range len(testKey) - 12 {
			if strings.Contains(err.Error(), testKey[i:i+12]) {
				t.Error("the error shows a piece of the key")
			}
		}
	})
}
