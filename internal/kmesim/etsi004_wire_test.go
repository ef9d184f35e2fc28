package kmesim

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// bytesOf reads hexadecimal text with blanks.
func bytesOf(tb testing.TB, text string) []byte {
	tb.Helper()
	b, err := hex.DecodeString(strings.Join(strings.Fields(text), ""))
	if err != nil {
		tb.Fatal(err)
	}
	return b
}

// asked reads a whole request.
func (d Dialect) asked(b []byte) (any, error) {
	if len(b) < headerSize {
		return nil, errShort
	}
	s, n, err := d.header([headerSize]byte(b))
	if err != nil {
		return nil, err
	}
	if n != len(b)-headerSize {
		return nil, errShort
	}
	return d.request(s, b[headerSize:])
}

// ask writes a request.
func (d Dialect) ask(v any) []byte {
	b := append([]byte{}, dialects[d].version[:]...)
	switch q := v.(type) {
	case openRequest:
		b = append(b, byte(serviceOpen), 0, 0, 0, 0)
		b = append(append(b, q.source...), 0)
		b = append(append(b, q.destination...), 0)
		b = append(d.appendQoS(b, q.qos), q.stream[:]...)
	case getRequest:
		b = append(b, byte(serviceGet), 0, 0, 0, 0)
		b = binary.BigEndian.AppendUint32(append(b, q.stream[:]...), q.index)
		if d == ForgeEd1 {
			b = binary.BigEndian.AppendUint32(b, q.room)
			break
		}
		b = binary.BigEndian.AppendUint32(b, uint32(len(q.detail)))
		b = append(b, q.detail...)
	case closeRequest:
		b = append(append(b, byte(serviceClose), 0, 0, 0, 0), q.stream[:]...)
	}
	return finish(b)
}

var (
	testStream = ksid{0: 0x5a, 15: 0xa5}
	jsonQoS    = qos{Chunk: 32, MaxBPS: 32, MinBPS: 32, MIME: "application/json"}
)

// requests are written by hand. The three of forge-ed3 are those of its
// reference implementation.
var requests = []struct {
	name    string
	dialect Dialect
	bytes   string
	want    any
}{
	{"ed3 open", ForgeEd3, `0201010200000049 7361655f6100 7361655f6200
		00000020 00000020 00000020 00000000 00000000 00000000 00000000
		6170706c69636174696f6e2f6a736f6e00 00000000000000000000000000000000`,
		openRequest{source: "sae_a", destination: "sae_b", qos: jsonQoS}},
	{"ed3 get", ForgeEd3, `020101040000001a 5a0000000000000000000000000000a5 00000005 00000002 0000`,
		getRequest{stream: testStream, index: 5, room: 2, detail: []byte{0, 0}}},
	{"ed3 get, no metadata", ForgeEd3, `0201010400000018 5a0000000000000000000000000000a5 ffffffff 00000000`,
		getRequest{stream: testStream, index: 1<<32 - 1, detail: []byte{}}},
	{"ed3 close", ForgeEd3, `0201010800000010 5a0000000000000000000000000000a5`, closeRequest{testStream}},
	{"ed1 open", ForgeEd1, `010001020000013c 6b6d653a2f2f6100 6b6d653a2f2f6200
		00000020 00000400 00000008 00000001 00000002 00001388 00000e10
		6170706c69636174696f6e2f6a736f6e` + strings.Repeat("00", 240) + `5a0000000000000000000000000000a5`,
		openRequest{"kme://a", "kme://b", qos{32, 1024, 8, 1, 2, 5000, 3600, "application/json"}, testStream}},
	{"ed1 get", ForgeEd1, `0100010400000018 5a0000000000000000000000000000a5 00000005 00000400`,
		getRequest{stream: testStream, index: 5, room: 1024}},
	{"ed1 close", ForgeEd1, `0100010800000010 5a0000000000000000000000000000a5`, closeRequest{testStream}},
}

func TestRequestBytes(t *testing.T) {
	all := cmp.AllowUnexported(openRequest{}, getRequest{}, closeRequest{})
	for _, tt := range requests {
		b := bytesOf(t, tt.bytes)
		got, err := tt.dialect.asked(b)
		if err != nil {
			t.Errorf("%s: %v", tt.name, err)
			continue
		}
		if diff := cmp.Diff(tt.want, got, all); diff != "" {
			t.Errorf("%s (-want +got):\n%s", tt.name, diff)
		}
		if again := tt.dialect.ask(got); !bytes.Equal(again, b) {
			t.Errorf("%s: written as %x", tt.name, again)
		}
		// No byte can be missing, and none be too many.
		for n := range b {
			if _, err := tt.dialect.asked(finish(bytes.Clone(b[:max(n, headerSize)]))); err == nil {
				t.Errorf("%s: its first %d bytes pass", tt.name, n)
			}
		}
		if _, err := tt.dialect.asked(finish(append(bytes.Clone(b), 0))); err == nil {
			t.Errorf("%s: passes with a byte too many", tt.name)
		}
	}
}

// TestForeignHeaders: what each listener turns away by the first eight bytes.
func TestForeignHeaders(t *testing.T) {
	for _, tt := range []struct {
		name    string
		dialect Dialect
		bytes   string
		want    string
	}{
		{"the other dialect", ForgeEd3, "0100010800000010", "version 010001 is not that of forge-ed3"},
		{"the other dialect", ForgeEd1, "0201010800000010", "version 020101 is not that of forge-ed1"},
		{"HTTP", ForgeEd1, hex.EncodeToString([]byte("GET /api")), "version 474554 is not that of forge-ed1"},
		{"an answer", ForgeEd3, "0201010300000010", "unknown service 0x03"},
		{"server shutdown", ForgeEd3, "020101ff00000000", "unknown service 0xff"},
		{"length", ForgeEd3, "0201010400001001", "payload of 4097 bytes, over 4096"},
		{"length", ForgeEd1, "01000102ffffffff", "payload of 4294967295 bytes, over 4096"},
	} {
		_, _, err := tt.dialect.header([headerSize]byte(bytesOf(t, tt.bytes)))
		if err == nil || err.Error() != tt.want {
			t.Errorf("%s: %v, want %s", tt.name, err, tt.want)
		}
	}
}

// TestTextLimits: no text is longer than what the answer has room for.
func TestTextLimits(t *testing.T) {
	for _, d := range []Dialect{ForgeEd3, ForgeEd1} {
		id := strings.Repeat("x", maxSAE)
		if _, err := d.asked(d.ask(openRequest{source: id, destination: id, qos: jsonQoS})); err != nil {
			t.Errorf("%v: %v", d, err)
		}
		_, err := d.asked(d.ask(openRequest{source: id + "x", destination: "b", qos: jsonQoS}))
		if want := "text of 1025 bytes, over 1024"; err == nil || err.Error() != want {
			t.Errorf("%v: %v, want %s", d, err, want)
		}
	}
	long := openRequest{source: "a", destination: "b", qos: qos{MIME: strings.Repeat("m", mimeSize)}}
	_, err := ForgeEd3.asked(ForgeEd3.ask(long))
	if want := "text of 256 bytes, over 255"; err == nil || err.Error() != want {
		t.Errorf("MIME type: %v, want %s", err, want)
	}
	// In its 256 bytes it may fill them, and have anything behind a NUL.
	got, err := ForgeEd1.asked(ForgeEd1.ask(long))
	if err != nil || got.(openRequest).qos.MIME != long.qos.MIME {
		t.Errorf("full MIME type: %v", err)
	}
	long.qos.MIME = "text/plain\x00garbage"
	got, err = ForgeEd1.asked(ForgeEd1.ask(long))
	if err != nil || got.(openRequest).qos.MIME != "text/plain" {
		t.Errorf("MIME type and garbage: %v", err)
	}
}

func TestAnswerBytes(t *testing.T) {
	mime := `6170706c69636174696f6e2f6a736f6e`
	mime256 := mime + strings.Repeat("00", 240)
	offer := qos{Chunk: 1024, MaxBPS: 9, MinBPS: 8, Jitter: 7, Priority: 6, Timeout: 5, TTL: 4, MIME: "application/json"}
	numbers := `00000400 00000009 00000008 00000007 00000006 00000005 00000004`
	id := `5a0000000000000000000000000000a5`
	for _, tt := range []struct {
		name string
		got  []byte
		want string
	}{
		{"ed3 opened", ForgeEd3.opened(openAnswer{streamPeerAbsent, offer, testStream}),
			`0201010300000041 00000001` + numbers + mime + `00` + id},
		{"ed3 in use", ForgeEd3.opened(openAnswer{streamInUse, offer, testStream}),
			`0201010300000041 00000005` + numbers + mime + `00` + id},
		{"ed3 offer", ForgeEd3.opened(openAnswer{streamQoS, offer, ksid{}}),
			`0201010300000041 00000007` + numbers + mime + `00` + strings.Repeat("00", 16)},
		{"ed3 key", ForgeEd3.got(getAnswer{index: 5, key: []byte{0xaa, 0xbb}, metadata: []byte("{}")}),
			`0201010500000014 00000000 00000005 00000002 aabb 00000002 7b7d`},
		{"ed3 no key", ForgeEd3.got(getAnswer{status: streamNoKeys, index: 5}),
			`0201010500000010 00000002 00000005 00000000 00000000`},
		{"ed3 metadata", ForgeEd3.got(getAnswer{status: streamMetadataTooBig, index: 5, needed: 3}),
			`0201010500000013 00000008 00000005 00000000 00000003 000000`},
		{"ed3 closed", ForgeEd3.closed(streamOK), `0201010900000004 00000000`},

		{"ed1 opened", ForgeEd1.opened(openAnswer{streamOK, offer, testStream}),
			`0100010300000130 00000000` + numbers + mime256 + id},
		{"ed1 peer absent", ForgeEd1.opened(openAnswer{streamPeerAbsent, offer, testStream}),
			`0100010300000130 00000001` + numbers + mime256 + id},
		{"ed1 offer", ForgeEd1.opened(openAnswer{streamQoS, offer, testStream}),
			`0100010300000130 00000007` + numbers + mime256 + id},
		{"ed1 in use", ForgeEd1.opened(openAnswer{streamInUse, offer, testStream}), `0100010300000004 00000005`},
		{"ed1 key", ForgeEd1.got(getAnswer{index: 5, key: []byte{0xaa, 0xbb}, metadata: []byte("{}")}),
			`0100010500000014 00000000 00000005 00000002 aabb 00000002 7b7d`},
		{"ed1 no key", ForgeEd1.got(getAnswer{status: streamNoKeys, index: 5}), `0100010500000004 00000002`},
		{"ed1 metadata", ForgeEd1.got(getAnswer{status: streamMetadataTooBig, index: 5, needed: 18}),
			`0100010500000008 00000008 00000012`},
		{"ed1 closed", ForgeEd1.closed(streamPeerAbsent), `0100010900000004 00000001`},
	} {
		if want := bytesOf(t, tt.want); !bytes.Equal(tt.got, want) {
			t.Errorf("%s:\n got %x\nwant %x", tt.name, tt.got, want)
		}
		if len(tt.got) > cap(tt.got) || cap(tt.got) > len(tt.got)+mimeSize+256 {
			t.Errorf("%s: %d bytes in %d", tt.name, len(tt.got), cap(tt.got))
		}
	}
}

func TestParseDialect(t *testing.T) {
	for _, d := range []Dialect{ForgeEd3, ForgeEd1} {
		if got, err := ParseDialect(d.String()); err != nil || got != d {
			t.Errorf("ParseDialect(%v) = %v, %v", d, got, err)
		}
	}
	_, err := ParseDialect("forge")
	if want := `unknown dialect "forge": one of forge-ed3, forge-ed1`; err == nil || err.Error() != want {
		t.Errorf("%v, want %s", err, want)
	}
	if got := Dialect(7).String(); got != "dialect 7" {
		t.Errorf("String = %q", got)
	}
}

// FuzzRequest004: whatever is read can be written and read again; where there
// are no bytes that nobody looks at, it is written as it was.
func FuzzRequest004(f *testing.F) {
	for _, tt := range requests {
		f.Add(tt.dialect == ForgeEd1, bytesOf(f, tt.bytes))
	}
	f.Fuzz(func(t *testing.T, ed1 bool, b []byte) {
		d := ForgeEd3
		if ed1 {
			d = ForgeEd1
		}
		v, err := d.asked(b)
		if err != nil {
			return
		}
		again := d.ask(v)
		if _, open := v.(openRequest); (!open || d == ForgeEd3) && !bytes.Equal(again, b) {
			t.Errorf("%x is written as %x", b, again)
		}
		w, err := d.asked(again)
		if err != nil || !cmp.Equal(v, w, cmp.AllowUnexported(openRequest{}, getRequest{}, closeRequest{})) {
			t.Errorf("%x is read as another request the second time: %v", b, err)
		}
	})
}
