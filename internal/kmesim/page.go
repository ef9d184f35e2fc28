package kmesim

import (
	"io"
	"net/http"
)

// longPage is a page of some 4 MiB.
const (
	longPage  = "long"
	longTimes = 150_000
)

// pages has the bodies of error pages as they are met in the field, and some
// that are not met yet. None says anything that a client could go by: the code
// has to do.
var pages = [...]struct{ shape, contentType, body string }{
	{"html", "text/html", "<html><head><title>Bad Gateway</title></head><body><h1>Bad Gateway</h1></body></html>\n"},
	{"text", "text/plain", "upstream connect error or disconnect before headers\n"},
	{"empty", "", ""},
	{"message", "application/json", `{"message":"the key manager is not well","details":[{"component":"qkd-module"}]}`},
	{"problem", "application/problem+json", `{"type":"about:blank","title":"Key manager not well","status":500}`},
	{"nested", "application/json", `{"error":{"code":17,"message":{"en":"the key manager is not well"}}}`},
	{"array", "application/json", `["the key manager is not well"]`},
	{"string", "application/json", `"the key manager is not well"`},
	{"number", "application/json", `17`},
	{"null", "application/json", `null`},
	{"truncated", "application/json", `{"message":"the key mana`},
	{"no-keys", "application/json", `{"keys":[]}`},
	{"binary", "application/octet-stream", "\x00\xff\xfe\x80key\x1b[31m manager\r\n\x00"},
	{longPage, "text/plain", "the key manager is not well\n"}, // again and again
}

// page returns the number of a shape.
func page(shape string) (int, bool) {
	for i, p := range pages {
		if p.shape == shape {
			return i, true
		}
	}
	return 0, false
}

// Shapes returns what a page of the fault Page can look like.
func Shapes() (names []string) {
	for _, p := range pages {
		names = append(names, p.shape)
	}
	return names
}

func writePage(w http.ResponseWriter, code int, shape string) {
	i, _ := page(shape)
	p := pages[i]
	if p.contentType != "" {
		w.Header().Set("Content-Type", p.contentType)
	}
	w.WriteHeader(code)
	times := 1
	if shape == longPage {
		times = longTimes
	}
	for range times {
		if _, err := io.WriteString(w, p.body); err != nil {
			return
		}
	}
}
