package etsi004

import (
	"bytes"
	"strings"
	"testing"

	"keyturn/internal/kms"
)

const (
	hexOpen3 = "00000000 00000020 00000040 00000010 00000005 00000001 000009c4 00000e10 6170706c69636174696f6e2f6a736f6e00" + hexID
	hexGet   = "00000000 00000005 00000020" + hexKey + "00000002 7b7d"
)

// FuzzDecodeOpen: what is taken for a success or an offer is the same when it
// is written again, as far as it means anything.
func FuzzDecodeOpen(f *testing.F) {
	for _, text := range []string{
		"", "00000005", "00000007", hexOpen3, strings.Replace(hexOpen3, "00000000", "00000007", 1), hexOpen3 + "00",
		strings.Replace(hexOpen3, hexID, strings.Repeat("00", 239)+hexID, 1), "00000001" + strings.Repeat("ff", 300),
	} {
		f.Add(unhex(f, text))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		for i := range dialects {
			d := &dialects[i]
			a, err := d.decodeOpen(b)
			if err != nil {
				if a != (opened{}) {
					t.Error("something beside the error")
				}
				continue
			}
			if a.status != statusOK && a.status != statusAlone && (a.status != statusQoS || len(b) == 4) {
				if a != (opened{status: a.status}) {
					t.Errorf("%v with %+v", a.status, a)
				}
				continue
			}
			if len(a.qos.metadataType) >= maxMetadataType || !ascii(a.qos.metadataType) {
				t.Errorf("metadata type %q", a.qos.metadataType)
			}
			// The fields are laid out as those of a request.
			again := append(u32(uint32(a.status)), d.encodeOpen("", "", a.qos, a.id)[2:]...)
			if len(again) != len(b) || !d.fixed && !bytes.Equal(again, b) {
				t.Errorf("%x became %x", b, again)
			}
		}
	})
}

// FuzzDecodeKey: whatever a KMS sends, there is a whole usable key, a plain
// "no", or an error that gives nothing of the answer away.
func FuzzDecodeKey(f *testing.F) {
	for _, text := range []string{
		"", "00000002", "00000008 00000400", hexGet, hexGet + "00", strings.Replace(hexGet, "00000020", "ffffffff", 1),
		"00000001" + hexGet[8:], "00000000 00000005 00000020" + noID + noID + "00000000",
	} {
		f.Add(unhex(f, text))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		a, err := decodeKey(b)
		switch success := a.status == statusOK || a.status == statusAlone; {
		case err != nil:
			if a != (delivered{}) || len(err.Error()) > 60 {
				t.Errorf("error of %d bytes, or something beside it", len(err.Error()))
			}
		case success && (a.key == nil || a.key.IsZero() || !bytes.Contains(b, a.key.Bytes())):
			t.Error("success with no key of the answer's")
		case !success && (a.key != nil || a.index != 0):
			t.Error("more than a status")
		}
	})
}

func FuzzDecodeHeader(f *testing.F) {
	f.Add(unhex(f, "0201010300000041"), byte(openConnect))
	f.Add(unhex(f, "0100010500000004"), byte(getKey))
	f.Add(unhex(f, "02010109ffffffff"), byte(closeStream))
	f.Fuzz(func(t *testing.T, b []byte, s byte) {
		if len(b) != headerSize {
			return
		}
		for i := range dialects {
			n, err := dialects[i].decodeHeader([headerSize]byte(b), service(s))
			if err == nil && (n < 4 || n > maxAnswer || b[3] != s+1) || err != nil && n != 0 {
				t.Errorf("%d, %v", n, err)
			}
		}
		_, _ = decodeClose(b)
	})
}

// FuzzKeyID: what is taken for a key ID is written in one way only.
func FuzzKeyID(f *testing.F) {
	f.Add(hexID + ":5:0badcafe")
	f.Add(hexID + ":4294967295:00000000")
	f.Add("bc490419-7d60-487f-adc1-4ddcc177c139")
	f.Fuzz(func(t *testing.T, text string) {
		id, err := parseKeyID(text)
		if err == nil && (id.String() != text || kms.CheckKeyID(text) != nil || id.stream == streamID{}) {
			t.Errorf("%q became %v", text, id)
		}
	})
}
