package etsi004

import (
	"bytes"
	"encoding/hex"
	"strings"
	"testing"

	"keyturn/internal/kms"
)

// The example of FACTS: source sae_a, destination sae_b, chunks of 32 bytes.
var exampleQoS = qos{chunk: 32, maxBPS: 32, minBPS: 32, metadataType: "application/json"}

var (
	ed3, ed1  = &dialects[0], &dialects[1]
	exampleID = streamID{0x4e, 0xb8, 0x1a, 0x5c, 0x03, 0x1f, 0x4d, 0x1f, 0x88, 0x1d, 0x30, 0x9b, 0xee, 0x44, 0xfc, 0x20}
)

const (
	hexID  = "4eb81a5c031f4d1f881d309bee44fc20"
	hexKey = "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f"
	noID   = "00000000000000000000000000000000"
)

func unhex(t testing.TB, text string) []byte {
	t.Helper()
	b, err := hex.DecodeString(strings.ReplaceAll(strings.ReplaceAll(text, " ", ""), "\n", ""))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// TestRequests compares requests with bytes that this code did not make.
func TestRequests(t *testing.T) {
	for _, tt := range []struct {
		name string
		got  []byte
		want string
	}{
		{"forge-ed3 open", ed3.request(openConnect, ed3.encodeOpen("sae_a", "sae_b", exampleQoS, streamID{})),
			"0201010200000049 7361655f6100 7361655f6200 00000020 00000020 00000020 00000000 00000000 00000000 00000000" +
				"6170706c69636174696f6e2f6a736f6e00" + noID},
		{"forge-ed3 get key", ed3.request(getKey, ed3.encodeGetKey(exampleID, 5, 2)),
			"020101040000001a" + hexID + "00000005 00000002 0000"},
		{"forge-ed3 close", ed3.request(closeStream, exampleID[:]), "0201010800000010" + hexID},
		{"forge-ed1 open", ed1.request(openConnect, ed1.encodeOpen("qkd://sae_a", "qkd://sae_b", qos{32, 64, 16, 5, 1, 2500, 3600, "application/json"}, exampleID)),
			"0100010200000144 716b643a2f2f7361655f6100 716b643a2f2f7361655f6200" +
				"00000020 00000040 00000010 00000005 00000001 000009c4 00000e10" +
				"6170706c69636174696f6e2f6a736f6e" + strings.Repeat("00", 240) + hexID},
		{"forge-ed1 get key", ed1.request(getKey, ed1.encodeGetKey(exampleID, 0xfffffffe, 1024)),
			"0100010400000018" + hexID + "fffffffe 00000400"},
		{"forge-ed1 close", ed1.request(closeStream, exampleID[:]), "0100010800000010" + hexID},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if want := unhex(t, tt.want); !bytes.Equal(tt.got, want) {
				t.Errorf("request\n%x, want\n%x", tt.got, want)
			}
		})
	}
}

// TestOpenAnswers decodes answers to OPEN_CONNECT made by hand.
func TestOpenAnswers(t *testing.T) {
	const (
		numbers = "00000020 00000040 00000010 00000005 00000001 000009c4 00000e10"
		json    = "6170706c69636174696f6e2f6a736f6e"
	)
	pad := strings.Repeat("00", 240)
	asked := qos{32, 64, 16, 5, 1, 2500, 3600, "application/json"}
	for _, tt := range []struct {
		name string
		d    *dialect
		in   string
		want opened
		err  string
	}{
		{"ed3", ed3, "00000000" + numbers + json + "00" + hexID, opened{statusOK, asked, exampleID}, ""},
		{"ed3, peer not connected", ed3, "00000001" + numbers + json + "00" + hexID, opened{statusAlone, asked, exampleID}, ""},
		{"ed3, counter-offer", ed3, "00000007" + numbers + "00" + noID, opened{statusQoS, qos{32, 64, 16, 5, 1, 2500, 3600, ""}, streamID{}}, ""},
		{"ed3, in use", ed3, "00000005" + numbers + json + "00" + hexID, opened{status: statusInUse}, ""},
		{"ed3, status alone", ed3, "00000004", opened{status: statusNoQKD}, ""},
		{"ed3, no offer", ed3, "00000007", opened{status: statusQoS}, ""},
		{"ed1", ed1, "00000000" + numbers + json + pad + hexID, opened{statusOK, asked, exampleID}, ""},
		{"ed1, rubbish behind the NUL", ed1, "00000000" + numbers + json + "00ff" + pad[4:] + hexID, opened{statusOK, asked, exampleID}, ""},
		{"ed1, in use", ed1, "00000005", opened{status: statusInUse}, ""},
		{"ed1, unknown", ed1, "000000ff", opened{status: 255}, ""},
		{"empty", ed3, "", opened{}, "answer is cut off"},
		{"success alone", ed1, "00000000", opened{}, "answer is cut off"},
		{"cut in the numbers", ed3, "00000000" + numbers[:20], opened{}, "answer is cut off"},
		{"cut in the numbers, before a NUL", ed3, "00000000 3000", opened{}, "answer is cut off"},
		{"no NUL", ed3, "00000000" + numbers + json, opened{}, "answer is cut off"},
		{"cut in the ID", ed3, "00000000" + numbers + json + "00" + hexID[:30], opened{}, "answer is cut off"},
		{"ed1 in ed3", ed3, "00000000" + numbers + json + pad + hexID, opened{}, "answer is 239 bytes too long"},
		{"ed3 in ed1", ed1, "00000000" + numbers + json + "00" + hexID, opened{}, "answer is cut off"},
		{"unprintable type", ed3, "00000000" + numbers + "0a00" + hexID, opened{}, "metadata type is not printable"},
		{"long type", ed3, "00000000" + numbers + strings.Repeat("61", 256) + "00" + hexID, opened{}, "metadata type is 256 bytes long, over 255"},
		{"type that is not ended", ed1, "00000000" + numbers + strings.Repeat("61", 256) + hexID, opened{}, "metadata type is 256 bytes long, over 255"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := tt.d.decodeOpen(unhex(t, tt.in))
			if errText(err) != tt.err {
				t.Fatalf("error %q, want %q", errText(err), tt.err)
			}
			if err == nil && got != tt.want {
				t.Errorf("got %+v, want %+v", got, tt.want)
			}
		})
	}
}

// TestKeyAnswers decodes answers to GET_KEY made by hand.
func TestKeyAnswers(t *testing.T) {
	for _, tt := range []struct {
		name   string
		in     string
		status status
		index  uint32
		err    string
	}{
		{"plain", "00000000 00000005 00000020" + hexKey + "00000000", statusOK, 5, ""},
		{"with metadata", "00000000 ffffffff 00000020" + hexKey + "00000002 7b7d", statusOK, 0xffffffff, ""},
		{"peer not connected", "00000001 00000005 00000020" + hexKey + "00000000", statusAlone, 5, ""},
		{"no key, alone", "00000002", statusNoKeys, 0, ""},
		{"no key, all fields", "00000002 00000000 00000000 00000000", statusNoKeys, 0, ""},
		{"metadata too large, with their size", "00000008 00000400", statusNoRoom, 0, ""},
		{"unknown", "00000063", 99, 0, ""},
		{"empty", "", 0, 0, "answer is cut off"},
		{"status cut off", "000000", 0, 0, "answer is cut off"},
		{"success alone", "00000000", 0, 0, "answer is cut off"},
		{"key cut off", "00000000 00000005 00000020" + hexKey[:62], 0, 0, "answer is cut off"},
		{"no metadata", "00000000 00000005 00000020" + hexKey, 0, 0, "answer is cut off"},
		{"metadata cut off", "00000000 00000005 00000020" + hexKey + "00000003 7b7d", 0, 0, "answer is cut off"},
		{"too long", "00000000 00000005 00000020" + hexKey + "00000000 00", 0, 0, "answer is 1 bytes too long"},
		{"key of four gigabytes", "00000000 00000005 ffffffff" + hexKey + "00000000", 0, 0, "answer is cut off"},
		{"short key", "00000000 00000005 0000001f" + hexKey[2:] + "00000000", 0, 0, "key has 248 bits, not 256"},
		{"long key", "00000000 00000005 00000021" + hexKey + "00 00000000", 0, 0, "key has 264 bits, not 256"},
		{"no key at all", "00000000 00000005 00000000 00000000", 0, 0, "key has 0 bits, not 256"},
		{"zero key", "00000000 00000005 00000020" + noID + noID + "00000000", 0, 0, "key is all zero"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := decodeKey(unhex(t, tt.in))
			if errText(err) != tt.err {
				t.Fatalf("error %q, want %q", errText(err), tt.err)
			}
			if got.status != tt.status || got.index != tt.index {
				t.Errorf("status %d and index %d, want %d and %d", got.status, got.index, tt.status, tt.index)
			}
			success := err == nil && (tt.status == statusOK || tt.status == statusAlone)
			if has := got.key != nil; has != success || has && !bytes.Equal(got.key.Bytes(), unhex(t, hexKey)) {
				t.Error("wrong key")
			}
		})
	}
}

func TestCloseAnswers(t *testing.T) {
	for in, want := range map[string]string{"00000000": "", "00000001": "", "000000": "answer is cut off", "0000000000": "answer is 1 bytes too long"} {
		if _, err := decodeClose(unhex(t, in)); errText(err) != want {
			t.Errorf("%s: error %q, want %q", in, errText(err), want)
		}
	}
}

func TestHeaders(t *testing.T) {
	for _, tt := range []struct {
		name string
		d    *dialect
		s    service
		in   string
		n    int
		err  string
	}{
		{"open", ed3, openConnect, "02010103 00000040", 64, ""},
		{"get key", ed1, getKey, "01000105 00000004", 4, ""},
		{"close", ed1, closeStream, "01000109 00010000", 65536, ""},
		{"other dialect", ed3, getKey, "01000105 00000004", 0, "answer has version 1.0.1, not that of dialect forge-ed3"},
		{"other service", ed3, getKey, "02010103 00000004", 0, "answer has service 0x03, not 0x05"},
		{"request", ed3, getKey, "02010104 00000004", 0, "answer has service 0x04, not 0x05"},
		{"HTTP", ed3, getKey, "48545450 2f312e31", 0, "answer has version 72.84.84, not that of dialect forge-ed3"},
		{"no status", ed1, getKey, "01000105 00000003", 0, "answer is cut off"},
		{"too long", ed1, getKey, "01000105 00010001", 0, "answer has 65537 bytes, over 65536"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			n, err := tt.d.decodeHeader([headerSize]byte(unhex(t, tt.in)), tt.s)
			if n != tt.n || errText(err) != tt.err {
				t.Errorf("%d, %q, want %d, %q", n, errText(err), tt.n, tt.err)
			}
		})
	}
}

// TestPredefined fixes the stream of two applications: both ends and every
// version must derive the same. By hand:
//
//	printf '\0\0\0\034keyturn/1 etsi004 key stream\0\0\0\5sae_a\0\0\0\5sae_b' | sha256sum | cut -c1-32
func TestPredefined(t *testing.T) {
	const want = "a687de810544e7268e899ec2f23ba6e1"
	if got := predefined("sae_a", "sae_b").String(); got != want {
		t.Errorf("stream %s, want %s", got, want)
	}
	if predefined("sae_b", "sae_a") != predefined("sae_a", "sae_b") {
		t.Error("the ends derive different streams")
	}
	if predefined("sae_as", "ae_b") == predefined("sae_a", "sae_b") {
		t.Error("names run into each other")
	}
}

// TestKeyIDs: only what String makes is a key ID.
func TestKeyIDs(t *testing.T) {
	for _, index := range []uint32{0, 7, 0xffffffff} {
		id := keyID{exampleID, index, "0badcafe"}
		if got, err := parseKeyID(id.String()); err != nil || got != id {
			t.Errorf("%v became %v, %v", id, got, err)
		}
		if err := kms.CheckKeyID(id.String()); err != nil {
			t.Error(err)
		}
	}
	for _, text := range []string{
		"", ":", "::", hexID, hexID + ":5", hexID + ":5:0badcafe:", hexID + ":05:0badcafe", hexID + ":+5:0badcafe", hexID + ":4294967296:0badcafe",
		hexID + ":5:0badcaf", hexID + ":5:0badcaf\n", noID + ":5:0badcafe", hexID[2:] + ":5:0badcafe", strings.ToUpper(hexID) + ":5:0badcafe",
		"bc490419-7d60-487f-adc1-4ddcc177c139",
	} {
		if _, err := parseKeyID(text); err == nil {
			t.Errorf("%q is taken", text)
		}
	}
}

func errText(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}
