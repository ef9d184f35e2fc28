package wire

import (
	"bytes"
	"errors"
	"fmt"
	"reflect"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"
)

// every holds the samples in which no field is zero, one of each kind.
func every() []Message { return samples()[:kindBye] }

func TestRoundTrip(t *testing.T) {
	for _, m := range samples() {
		b, err := Encode(m)
		if err != nil {
			t.Errorf("encode %v: %v", m, err)
			continue
		}
		got, err := Decode(b)
		if err != nil {
			t.Errorf("decode %v: %v", m, err)
			continue
		}
		if diff := cmp.Diff(m, got); diff != "" {
			t.Errorf("%v changed on the way (-sent +received):\n%s", m, diff)
		}
	}
}

// A field that the encoding forgot would come back zero, which a round trip
// shows only where it was not zero to begin with.
func TestSamplesLeaveNoFieldZero(t *testing.T) {
	for i, m := range every() {
		if want := kind(i + 1); m.kind() != want {
			t.Errorf("sample %d is of kind %v, want %v", i, m.kind(), want)
		}
		v := reflect.ValueOf(m).Elem()
		for i := range v.NumField() {
			if v.Field(i).IsZero() {
				t.Errorf("%v: %s is zero", m.kind(), v.Type().Field(i).Name)
			}
		}
	}
	p := reflect.ValueOf(every()[0].(*Init).Parameters)
	for i := range p.NumField() {
		if p.Field(i).IsZero() {
			t.Errorf("parameters: %s is zero", p.Type().Field(i).Name)
		}
	}
}

func TestEveryKindHasNameAndMessage(t *testing.T) {
	for k := kindInit; k <= kindBye; k++ {
		m := k.message()
		if m == nil || m.kind() != k {
			t.Errorf("kind %d makes the message %T", k, m)
			continue
		}
		if want := strings.ToLower(reflect.TypeOf(m).Elem().Name()); k.String() != want {
			t.Errorf("kind %d is called %q, want %q", k, k, want)
		}
	}
}

// Wherever a message is cut off, and whatever follows it, the error names the
// message.
func TestCutOffAndTrailing(t *testing.T) {
	for _, m := range samples() {
		whole, err := Encode(m)
		if err != nil {
			t.Fatal(err)
		}
		for n := 1; n < len(whole); n++ {
			got, err := Decode(whole[:n])
			if err == nil || got != nil {
				t.Errorf("%v cut to %d of %d bytes gave %v, %v", m.kind(), n, len(whole), got, err)
				break
			}
			if !strings.HasPrefix(err.Error(), m.kind().String()+": ") || !strings.HasSuffix(err.Error(), " missing") {
				t.Errorf("%v cut to %d of %d bytes: %v", m.kind(), n, len(whole), err)
				break
			}
		}
		want := fmt.Sprintf("%v: 1 byte left over", m.kind())
		if _, err := Decode(append(whole, 0)); err == nil || err.Error() != want {
			t.Errorf("with a byte behind it: %v, want %s", err, want)
		}
	}
}

// encoded returns the encoding of m with the bytes at an offset replaced.
func encoded(t *testing.T, m Message, at int, with ...byte) []byte {
	t.Helper()
	b, err := Encode(m)
	if err != nil {
		t.Fatal(err)
	}
	copy(b[at:], with)
	return b
}

// refusal is an encoding that Decode refuses, and with which words.
type refusal struct {
	in   []byte
	want string
}

func refused(t *testing.T) []refusal {
	t.Helper()
	e := every()
	init, propose, commit, refuse, report := e[0], e[2], e[7], e[9], e[10]
	const afterSession = 1 + 16
	const keyID = afterSession + 8 + 2
	const keyIDText = 36
	const initText = 1 + 2 + 8 + 16 + 8
	bye := &Bye{Reason: "0123456789"}
	const byeText = afterSession + 2
	two := &Propose{Sources: 1, KeyID: "x", Held: []uint64{1, 2}}

	return []refusal{
		{nil, "empty message"},
		{[]byte{0}, "unknown message type 0"},
		{[]byte{200, 1, 2}, "unknown message type 200"},
		{make([]byte, MaxMessage+1), "unknown message type 0"},
		{append([]byte{byte(kindDone)}, make([]byte, MaxMessage)...), "done: 16385 bytes, at most 16384 allowed"},
		{encoded(t, commit, 0)[:afterSession+4+8+13], "commit: key fingerprint: 3 bytes missing"},
		{encoded(t, commit, 0)[:afterSession+4+24+7], "commit: installed serial: 1 byte missing"},
		{encoded(t, commit, afterSession+4+24+24+8, 3), "commit: mode: 3 is unknown"},
		{encoded(t, refuse, afterSession+4+24, 0), "refused: reason: 0 is unknown"},
		{encoded(t, refuse, afterSession+4+24, 7), "refused: reason: 7 is unknown"},
		{encoded(t, report, afterSession+8+4+24, 2), "report: blocked: 2 is neither 0 nor 1"},
		{encoded(t, &Report{}, afterSession+8+4+24+5+8, 65), "report: held: 65 of them, at most 64 allowed"},
		{encoded(t, two, 0)[:keyID+2+1+1+1+8], "propose: held 2: 8 bytes missing"},
		{encoded(t, two, keyID+2+1+1+1+8, []byte{0, 0, 0, 0, 0, 0, 0, 1}...), "propose: held 2: does not rise above the one before"},
		{encoded(t, two, keyID+2+1+1+1+8, []byte{0, 0, 0, 0, 0, 0, 0, 0}...), "propose: held 2: does not rise above the one before"},
		{encoded(t, propose, keyID-2, 0x02, 0), "propose: sources: 0x200 has bits beyond 8 KEMs"},
		{encoded(t, propose, keyID-2, 0, 0b110), "propose: key id: present, though qkd is no source"},
		{encoded(t, propose, keyID-2, 0, 0b011), "propose: encapsulation keys: 2 of them for 1 KEM"},
		{encoded(t, propose, keyID-2, 1, 0xff), "propose: encapsulation keys: 2 of them for 8 KEMs"},
		{encoded(t, propose, keyID, 0, 0), "propose: key id: missing, though qkd is a source"},
		{encoded(t, propose, keyID, 0x04, 1), "propose: key id: 1025 bytes, at most 1024 allowed"},
		{encoded(t, propose, keyID+2+keyIDText, 9), "propose: encapsulation keys: 9 of them, at most 8 allowed"},
		{encoded(t, propose, keyID+2+keyIDText+1, 0x10, 1), "propose: encapsulation keys 1: 4097 bytes, at most 4096 allowed"},
		{encoded(t, propose, keyID+2+keyIDText+1+2+4, 0x0f, 0), fmt.Sprintf("propose: encapsulation keys 2: %d bytes missing", 0xf00-2-1-3*8)},
		{encoded(t, bye, byeText, 0xff), "bye: reason: text is not valid UTF-8"},
		{encoded(t, bye, byeText, []byte("\xed\xa0\x80")...), "bye: reason: text is not valid UTF-8"},
		{encoded(t, bye, byeText, '\n'), "bye: reason: text holds the control character U+000A"},
		{encoded(t, bye, byeText, 0), "bye: reason: text holds the control character U+0000"},
		{encoded(t, bye, byeText, 0x7f), "bye: reason: text holds the control character U+007F"},
		{encoded(t, bye, byeText, []byte("\u009b")...), "bye: reason: text holds the control character U+009B"},
		{encoded(t, bye, byeText, []byte("\u2028")...), "bye: reason: text holds the control character U+2028"},
		{encoded(t, bye, byeText, []byte("\u202e")...), "bye: reason: text holds the control character U+202E"},
		{encoded(t, bye, byeText, []byte("\u2067")...), "bye: reason: text holds the control character U+2067"},
		{encoded(t, init, initText+2+7+2+7+32+32, 3), "init: qkd: 3 is neither 0 nor 1"},
		{encoded(t, init, initText+2+7+2+7+32+32+1, 9), "init: kems: 9 of them, at most 8 allowed"},
		{encoded(t, init, initText+2+7+2+7+32+32+2, 0, 65), "init: kems 1: 65 bytes, at most 64 allowed"},
	}
}

func TestDecodeRefuses(t *testing.T) {
	for _, tt := range refused(t) {
		m, err := Decode(tt.in)
		if err == nil || err.Error() != tt.want || m != nil {
			t.Errorf("got %v, %v\nwant the error %s", m, err, tt.want)
		}
	}
}

// Another version is recognised whatever follows its number.
func TestOtherVersion(t *testing.T) {
	for _, b := range [][]byte{
		{byte(kindInit), 0, 1},
		{byte(kindInit), 0, Version + 1, 0xff, 0xff},
		{byte(kindAck), 0x01, 0x01},
		{byte(kindAck), 0, 0},
	} {
		_, err := Decode(b)
		v, ok := errors.AsType[*VersionError](err)
		if want := uint16(b[1])<<8 | uint16(b[2]); !ok || v.Got != want {
			t.Errorf("% x: %v, want a version error of version %d", b, err, want)
		}
	}
	_, err := Decode([]byte{byte(kindAck), 0, 7})
	if want := "ack: protocol version 7, this end speaks 3"; err.Error() != want {
		t.Errorf("got %q, want %q", err, want)
	}
	if _, err := Encode(&Init{}); err == nil {
		t.Error("an init of version 0 was encoded")
	}
}

func TestEncodeRefuses(t *testing.T) {
	long := strings.Repeat("x", MaxText+1)
	var blobs [][]byte
	for range 5 {
		blobs = append(blobs, make([]byte, MaxBlob))
	}
	p := func(change func(*Parameters)) *Init {
		m := *every()[0].(*Init)
		change(&m.Parameters)
		return &m
	}
	for _, tt := range []struct {
		m    Message
		want string
	}{
		{nil, "no message to encode"},
		{&Bye{Reason: long}, "bye: reason: 1025 bytes, at most 1024 allowed"},
		{&Bye{Reason: strings.Repeat("x", 1<<16)}, "bye: reason: 65536 bytes, at most 1024 allowed"},
		{&Bye{Reason: "a\tb"}, "bye: reason: text holds the control character U+0009"},
		{&Bye{Reason: "\xc3"}, "bye: reason: text is not valid UTF-8"},
		{&Finish{Ciphertexts: [][]byte{nil, make([]byte, MaxBlob+1)}}, "finish: ciphertexts 2: 4097 bytes, at most 4096 allowed"},
		{&Finish{Ciphertexts: make([][]byte, 256)}, "finish: ciphertexts: 256 of them, at most 8 allowed"},
		{&Finish{Ciphertexts: blobs}, "finish: 20548 bytes, at most 16384 allowed"},
		{&Reply{Sources: 2, EncapsulationKeys: blobs[:1]}, "reply: ciphertexts: 0 of them for 1 KEM"},
		{&Report{Interval: -time.Millisecond}, "report: interval: -1ms is not a whole number of milliseconds from 0 to 2^32-1"},
		{&Report{Interval: 1500 * time.Microsecond}, "report: interval: 1.5ms is not a whole number of milliseconds from 0 to 2^32-1"},
		{&Report{Interval: 1200 * time.Hour}, "report: interval: 1200h0m0s is not a whole number of milliseconds from 0 to 2^32-1"},
		{&Commit{Mode: 9}, "commit: mode: 9 is unknown"},
		{&Refused{}, "refused: reason: 0 is unknown"},
		{p(func(p *Parameters) { p.KEMs = []string{"ok", long[:MaxName+1]} }), "init: kems 2: 65 bytes, at most 64 allowed"},
		{p(func(p *Parameters) { p.SAE = "\x1b[31m" }), "init: sae: text holds the control character U+001B"},
		{p(func(p *Parameters) { p.Version = 1 }), "init: protocol version 1, this end speaks 3"},
		{&Ack{Parameters: Parameters{Version: Version}, Differences: []Difference{{}, {Client: "\n"}}}, "ack: differences 2 client: text holds the control character U+000A"},
		{&Ack{Parameters: Parameters{Version: Version}, Differences: make([]Difference, 33)}, "ack: differences: 33 of them, at most 32 allowed"},
	} {
		dst := []byte("kept")
		got, err := Append(dst, tt.m)
		if err == nil || err.Error() != tt.want || string(got) != "kept" {
			t.Errorf("got %q, %v\nwant the error %s", got, err, tt.want)
		}
	}
	held := make([]Named, MaxHeld+1)
	for i := range held {
		held[i].Serial = uint64(i)
	}
	if _, err := Encode(&Report{Held: held}); err == nil {
		t.Errorf("%d held keys were encoded", len(held))
	}
	if _, err := Encode(&Report{Held: held[:MaxHeld]}); err != nil {
		t.Error(err)
	}
}

// Sets are encoded in one order, whatever order a message has them in, and
// the message stays as it was.
func TestSetsAreCanonical(t *testing.T) {
	mixed := &Report{Held: []Named{key(9, 1), key(7, 2), key(9, 1), key(7, 1)}}
	before := append([]Named(nil), mixed.Held...)
	sorted := &Report{Held: []Named{key(7, 1), key(7, 2), key(9, 1)}}
	a, err := Encode(mixed)
	if err != nil {
		t.Fatal(err)
	}
	if b, _ := Encode(sorted); !bytes.Equal(a, b) {
		t.Errorf("one set, two encodings:\n%x\n%x", a, b)
	}
	if diff := cmp.Diff(before, mixed.Held); diff != "" {
		t.Errorf("encoding changed the message:\n%s", diff)
	}
}

// The refusal of a bootstrap in which nothing agrees and everything is as
// long as allowed still fits into one message.
func TestLongestHonestRefusalFits(t *testing.T) {
	long := strings.Repeat("s", MaxText)
	kems := make([]string, MaxKEMs)
	for i := range kems {
		kems[i] = strings.Repeat("k", MaxName)
	}
	list := strings.Join(kems, ", ")
	ack := &Ack{Parameters: Parameters{Version: Version, SAE: long, PeerSAE: long, KEMs: kems}}
	for i := range MaxHeld {
		ack.Held = append(ack.Held, key(uint64(i), 1))
	}
	for _, field := range []string{"sae", "peer_sae"} {
		ack.Differences = append(ack.Differences, Difference{field, long, long})
	}
	ack.Differences = append(ack.Differences, Difference{"kems", list, list})
	for range 12 {
		short := strings.Repeat("v", 64)
		ack.Differences = append(ack.Differences, Difference{short, short, short})
	}
	if _, err := Encode(ack); err != nil {
		t.Error(err)
	}
}

func TestText(t *testing.T) {
	for _, tt := range []struct{ in, want string }{
		{"", ""},
		{"plain, clé", "plain, clé"},
		{"a\r\nb\x00", "a??b?"},
		{"\xff\xfeok", "??ok"},
		{"\u202eevil", "?evil"},
		{strings.Repeat("x", MaxText), strings.Repeat("x", MaxText)},
		{strings.Repeat("x", MaxText-1) + "é", strings.Repeat("x", MaxText-1)},
		{strings.Repeat("x", 3*MaxText), strings.Repeat("x", MaxText)},
	} {
		got := Text(tt.in)
		if got != tt.want {
			t.Errorf("Text(%q) = %q, want %q", tt.in, got, tt.want)
		}
		if _, err := Encode(&Bye{Reason: got}); err != nil {
			t.Errorf("Text(%q) cannot be sent: %v", tt.in, err)
		}
	}
}

// Nothing in a decoded message refers to the buffer it came in.
func TestDecodeCopies(t *testing.T) {
	for _, m := range every() {
		b, err := Encode(m)
		if err != nil {
			t.Fatal(err)
		}
		got, err := Decode(b)
		if err != nil {
			t.Fatal(err)
		}
		clear(b)
		if diff := cmp.Diff(m, got); diff != "" {
			t.Errorf("%v changed with its buffer:\n%s", m.kind(), diff)
		}
	}
}

func TestTranscript(t *testing.T) {
	e := every()
	p, r, f := *e[2].(*Propose), *e[3].(*Reply), *e[4].(*Finish)
	base := Transcript(1, &p, &r, &f)

	other := f
	other.Digest = [32]byte{}
	if Transcript(1, &p, &r, &other) != base {
		t.Error("the transcript covers the digest of finish, which covers it")
	}
	if f.Digest == [32]byte{} {
		t.Error("the transcript erased the digest of finish")
	}
	if Transcript(2, &p, &r, &f) == base {
		t.Error("the transcript does not cover the policy")
	}
	for name, change := range map[string]func(p *Propose, r *Reply, f *Finish){
		"propose key id":                 func(p *Propose, _ *Reply, _ *Finish) { p.KeyID += "x" },
		"propose held":                   func(p *Propose, _ *Reply, _ *Finish) { p.Held = nil },
		"reply encapsulation key":        func(_ *Propose, r *Reply, _ *Finish) { r.EncapsulationKeys = [][]byte{{11, 12, 13}, {14, 15, 16}} },
		"reply session":                  func(_ *Propose, r *Reply, _ *Finish) { r.Session[0]++ },
		"finish ciphertext":              func(_ *Propose, _ *Reply, f *Finish) { f.Ciphertexts = f.Ciphertexts[:1] },
		"finish serial":                  func(_ *Propose, _ *Reply, f *Finish) { f.Serial++ },
		"propose and reply key exchange": func(p *Propose, r *Reply, _ *Finish) { p.EncapsulationKeys = r.EncapsulationKeys },
	} {
		p, r, f := p, r, f
		change(&p, &r, &f)
		if Transcript(1, &p, &r, &f) == base {
			t.Errorf("the transcript does not cover: %s", name)
		}
	}
}

func TestStrings(t *testing.T) {
	for _, tt := range []struct {
		v    any
		want string
	}{
		{&Init{Attempt: 3, Boot: count16(0xa1), High: 6, Held: []Named{key(5, 1), key(6, 1)}}, "init 3 boot a1a2a3a4 high 6 held 5,6"},
		{&Init{}, "init 0 boot none high 0"},
		{every()[1], "ack 3 session a0a1a2a3 boot d0d1d2d3 high 9 held 7 kept refused: window"},
		{&Ack{Differences: []Difference{{Field: "kems"}, {Field: "window"}}}, "ack 0 session none boot none high 0 refused: kems, window"},
		{every()[2], `propose 10 qkd+kem1+kem2 key "bc490419-7d60-487f-adc1-4ddcc177c139" held 8,9,10`},
		{&Propose{Serial: 1, Sources: 1 << 8}, "propose 1 kem8"},
		{every()[3], "reply 10 qkd+kem1+kem2"},
		{every()[4], "finish 10"},
		{every()[5], "done 10"},
		{every()[6], "abandon 10 high 10: digest differs"},
		{&Commit{Key: key(7, 0xa1)}, "commit 7 a1a2a3a4 window"},
		{&Committed{Key: key(7, 0xa1)}, "committed 7 a1a2a3a4"},
		{every()[9], "refused 7 a1a2a3a4: not yet"},
		{&Report{Installed: key(7, 0xa1), Seen: true, Confirmed: 7, Held: []Named{key(7, 1), key(8, 1)}}, "report installed 7 a1a2a3a4 seen confirmed 7 held 7,8"},
		{&Report{Blocked: true, Trying: true, NoHandshake: true}, "report installed none blocked trying no handshake confirmed 0"},
		{every()[11], "bye: stopped by the operator"},
		{Sources(0), "none"},
		{Named{}, "none"},
		{key(0, 0xa1), "0 a1a2a3a4"},
		{Difference{"window", "30s", "20s"}, `window: "30s" at the client, "20s" at the server`},
		{ModeWindow, "window"}, {ModeIdle, "idle"}, {ModeRepair, "repair"}, {Mode(3), "mode 3"},
		{Reason(0), "reason 0"}, {ReasonNotYet, "not yet"}, {ReasonUnknown, "unknown"}, {ReasonStale, "stale"},
		{ReasonDiffers, "differs"}, {ReasonBusy, "busy"}, {ReasonFailed, "failed"}, {Reason(7), "reason 7"},
	} {
		if got := fmt.Sprint(tt.v); got != tt.want {
			t.Errorf("got  %s\nwant %s", got, tt.want)
		}
	}
}

// Whatever parses re-encodes to the same bytes, so that a hash over an
// encoding is a hash over the message.
func FuzzDecode(f *testing.F) {
	for _, m := range samples() {
		b, err := Encode(m)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := Decode(b)
		if err != nil {
			if m != nil || !utf8.ValidString(err.Error()) || len(err.Error()) > 200 {
				t.Fatalf("message %v, error %q", m, err)
			}
			return
		}
		again, err := Encode(m)
		if err != nil || !bytes.Equal(b, again) {
			t.Fatalf("decoded   %x\nre-encoded %x, %v", b, again, err)
		}
		if s := fmt.Sprint(m); !strings.HasPrefix(s, m.kind().String()) || strings.ContainsFunc(s, deceptive) {
			t.Fatalf("string %q", s)
		}
	})
}
