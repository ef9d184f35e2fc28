package kmshttp

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"unicode"
	"unicode/utf8"
)

// maxText bounds in bytes what is kept of a foreign text.
const maxText = 200

// errNotJSON means that an answer is no JSON at all.
var errNotJSON = errors.New("answer is not JSON")

// Unmarshal decodes a JSON object. Unknown fields are ignored: KMSs have their
// own. The errors use our words and quote nothing, for body may hold a key.
func Unmarshal(body []byte, v any) error {
	body = bytes.TrimSpace(body)
	switch {
	case len(body) == 0:
		return errors.New("answer is empty")
	case body[0] != '{' && json.Valid(body):
		return errors.New("answer is JSON but not an object")
	case body[0] != '{':
		return errNotJSON
	}
	err := json.Unmarshal(body, v)
	if se, ok := errors.AsType[*json.SyntaxError](err); ok {
		if se.Error() == "unexpected end of JSON input" {
			return fmt.Errorf("answer is cut off after %d bytes", len(body))
		}
		return fmt.Errorf("answer is not JSON from byte %d on", se.Offset)
	}
	if te, ok := errors.AsType[*json.UnmarshalTypeError](err); ok {
		kind, _, _ := strings.Cut(te.Value, " ") // a number comes with its digits
		return fmt.Errorf("answer has a JSON %s as %s", kind, te.Field)
	}
	return err
}

// Printable reports whether all of a text can be shown.
func Printable(s string) bool {
	return utf8.ValidString(s) && strings.IndexFunc(s, func(r rune) bool { return !unicode.IsPrint(r) }) < 0
}

// Shown returns the first 200 bytes of a foreign text, without anything that a
// terminal would act on.
func Shown(s string) string {
	if len(s) > maxText {
		s = s[:maxText]
	}
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) || r == utf8.RuneError {
			return -1
		}
		return r
	}, s)
}
