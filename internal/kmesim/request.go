package kmesim

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/url"
	"slices"
	"strconv"
)

// keyRequest is what a valid "Get key" asks for.
type keyRequest struct {
	number, size int // size in bits
	slaves       []string
}

// check holds a request against the limits.
func (q *keyRequest) check() *problem {
	switch {
	case q.number < 1 || q.number > MaxKeysPerRequest:
		return bad(fmt.Sprintf("number shall be between 1 and %d", MaxKeysPerRequest))
	case q.size%8 != 0:
		return bad(textSize)
	case q.size < MinKeySize || q.size > MaxKeySize:
		return bad(fmt.Sprintf("size shall be between %d and %d", MinKeySize, MaxKeySize))
	case len(q.slaves) > MaxSAEs:
		return bad(fmt.Sprintf("additional_slave_SAE_IDs shall be at most %d", MaxSAEs))
	}
	for _, s := range q.slaves {
		if s == "" || len(s) > maxSAE {
			return bad("additional_slave_SAE_IDs holds no SAE ID")
		}
	}
	return nil
}

// keyQuery reads the query of "Get key" by GET.
func keyQuery(query url.Values) (*keyRequest, *problem) {
	q := &keyRequest{number: 1, size: KeySize}
	for name, values := range query {
		into := map[string]*int{"number": &q.number, "size": &q.size}[name]
		if into == nil || len(values) != 1 {
			return nil, bad("a GET has number and size, once each")
		}
		n, err := strconv.Atoi(values[0])
		if err != nil {
			return nil, bad(name + " is not a number")
		}
		*into = n
	}
	if p := q.check(); p != nil {
		return nil, p
	}
	return q, nil
}

// extension is a parameter of an extension, of which this KME has none.
type extension map[string]json.RawMessage

// decodeKeyRequest reads the body of "Get key" by POST (ETSI GS QKD 014
// V1.1.1, 6.2).
func decodeKeyRequest(body []byte) (*keyRequest, *problem) {
	var b struct {
		Number    *int        `json:"number"`
		Size      *int        `json:"size"`
		Slaves    []string    `json:"additional_slave_SAE_IDs"`
		Mandatory []extension `json:"extension_mandatory"`
		Optional  []extension `json:"extension_optional"` // may be ignored
	}
	if p := decode(body, &b); p != nil {
		return nil, p
	}
	if len(b.Mandatory) > 0 {
		p := bad(textExtension)
		for _, e := range b.Mandatory {
			for _, name := range slices.Sorted(maps.Keys(e)) {
				p.Details = append(p.Details, map[string]string{"extension_mandatory_unsupported": name})
			}
		}
		return nil, p
	}
	q := &keyRequest{number: 1, size: KeySize, slaves: b.Slaves}
	if b.Number != nil {
		q.number = *b.Number
	}
	if b.Size != nil {
		q.size = *b.Size
	}
	if p := q.check(); p != nil {
		return nil, p
	}
	return q, nil
}

// idQuery reads the query of "Get key with key IDs" by GET.
func idQuery(query url.Values) ([]string, *problem) {
	if len(query) != 1 || len(query["key_ID"]) != 1 || query.Get("key_ID") == "" {
		return nil, bad("a GET has one key_ID")
	}
	return query["key_ID"], nil
}

// decodeKeyIDs reads the body of "Get key with key IDs" by POST (ETSI GS QKD
// 014 V1.1.1, 6.4).
func decodeKeyIDs(body []byte) ([]string, *problem) {
	var b struct {
		IDs []struct {
			ID        string          `json:"key_ID"`
			Extension json.RawMessage `json:"key_ID_extension"`
		} `json:"key_IDs"`
		Extension json.RawMessage `json:"key_IDs_extension"`
	}
	if p := decode(body, &b); p != nil {
		return nil, p
	}
	if len(b.IDs) < 1 || len(b.IDs) > MaxKeysPerRequest {
		return nil, bad(fmt.Sprintf("key_IDs shall be between 1 and %d", MaxKeysPerRequest))
	}
	var ids []string
	for _, k := range b.IDs {
		if k.ID == "" || slices.Contains(ids, k.ID) {
			return nil, bad("key_IDs holds an empty key_ID, or one twice")
		}
		ids = append(ids, k.ID)
	}
	return ids, nil
}

// decode is as strict as the strictest KMEs in the field.
func decode(body []byte, v any) *problem {
	d := json.NewDecoder(bytes.NewReader(body))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return bad("malformed body")
	}
	if _, err := d.Token(); err != io.EOF {
		return bad("malformed body")
	}
	return nil
}
