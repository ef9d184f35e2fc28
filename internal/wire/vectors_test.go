package wire

import (
	"encoding/hex"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"reflect"
	"strings"
	"testing"
	"time"
)

var rewrite = flag.Bool("rewrite", false, "write the test vectors anew; read them before they are committed")

const (
	vectorsFile   = "testdata/vectors.txt"
	vectorsHeader = `# Test vectors of keyturn's message encoding (docs/PROTOCOL.md, 4).
#
# message: the name; the fields as JSON, byte strings in hex and durations in
# milliseconds (their order on the wire is that of the protocol's tables, not
# this one: a version comes first); the encoding in hex.
# transcript: of the propose, reply and finish that stand first, under require: qkd.
# invalid: what this implementation says; the encoding that it refuses.
`
)

// plain returns v as JSON values that another implementer can read without
// knowing Go's encoder: structs keep the order of their fields.
func plain(v reflect.Value) string {
	if d, ok := v.Interface().(time.Duration); ok {
		return fmt.Sprint(d.Milliseconds())
	}
	switch v.Kind() {
	case reflect.Struct:
		var fields []string
		for i := range v.NumField() {
			fields = append(fields, fmt.Sprintf("%q: %s", v.Type().Field(i).Name, plain(v.Field(i))))
		}
		return "{" + strings.Join(fields, ", ") + "}"
	case reflect.Slice, reflect.Array:
		if v.Type().Elem().Kind() == reflect.Uint8 {
			var b strings.Builder
			for i := range v.Len() {
				fmt.Fprintf(&b, "%02x", v.Index(i).Uint())
			}
			return `"` + b.String() + `"`
		}
		var elements []string
		for i := range v.Len() {
			elements = append(elements, plain(v.Index(i)))
		}
		return "[" + strings.Join(elements, ", ") + "]"
	case reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64:
		return fmt.Sprint(v.Uint()) // a Mode's number, not its name
	}
	b, err := json.Marshal(v.Interface())
	if err != nil {
		panic(err)
	}
	return string(b)
}

func vectors(t *testing.T) string {
	t.Helper()
	var b strings.Builder
	b.WriteString(vectorsHeader)
	for _, m := range samples() {
		encoded, err := Encode(m)
		if err != nil {
			t.Fatal(err)
		}
		fields := plain(reflect.ValueOf(m).Elem())
		if !json.Valid([]byte(fields)) {
			t.Fatalf("%v: fields are no JSON", m.kind())
		}
		fmt.Fprintf(&b, "\nmessage %v\n%s\n%x\n", m.kind(), fields, encoded)
	}
	e := every()
	fmt.Fprintf(&b, "\ntranscript\n%x\n", Transcript(1, e[2].(*Propose), e[3].(*Reply), e[4].(*Finish)))
	for _, in := range refused(t) {
		if len(in.in) > 0 && len(in.in) < 300 {
			fmt.Fprintf(&b, "\ninvalid\n%s\n%x\n", in.want, in.in)
		}
	}
	return b.String()
}

func TestVectors(t *testing.T) {
	got := vectors(t)
	if *rewrite {
		if err := os.WriteFile(vectorsFile, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(vectorsFile)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("%s holds other values than this code gives: compare with -rewrite", vectorsFile)
	}

	// And as another implementer would use the file.
	for _, stanza := range strings.Split(string(want), "\n\n")[1:] {
		lines := strings.Split(strings.TrimSpace(stanza), "\n")
		encoded, err := hex.DecodeString(lines[len(lines)-1])
		if err != nil {
			t.Fatal(err)
		}
		m, err := Decode(encoded)
		switch name, isMessage := strings.CutPrefix(lines[0], "message "); {
		case isMessage && err != nil:
			t.Errorf("%s: %v", name, err)
		case isMessage && (m.kind().String() != name || plain(reflect.ValueOf(m).Elem()) != lines[1]):
			t.Errorf("%s decodes as %v", name, m)
		case lines[0] == "invalid" && (err == nil || err.Error() != lines[1]):
			t.Errorf("got %v, want %s", err, lines[1])
		}
	}
}
