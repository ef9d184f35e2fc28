package kmesim

import (
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestParseStreamPort(t *testing.T) {
	for text, want := range map[string]StreamPort{
		"forge-ed3,a=:1,b=[::1]:2":                  {AddrA: ":1", AddrB: "[::1]:2"},
		"forge-ed1,b=h:2,peer-first,metadata,hold,": {StreamOptions: StreamOptions{ForgeEd1, true, true, true}, AddrB: "h:2"},
	} {
		got, err := ParseStreamPort(text)
		if diff := cmp.Diff(want, got); err != nil || diff != "" {
			t.Errorf("%s: %v (-want +got):\n%s", text, err, diff)
		}
	}
	for text, want := range map[string]string{
		"":                       `unknown dialect "": one of forge-ed3, forge-ed1`,
		"forge,a=:1":             `unknown dialect "forge": one of forge-ed3, forge-ed1`,
		"forge-ed3":              "no address, as a=127.0.0.1:25575",
		"forge-ed3,hold":         "no address, as a=127.0.0.1:25575",
		"forge-ed3,a=":           `"a=" is none of a=ADDRESS, b=ADDRESS, peer-first, metadata, hold`,
		"forge-ed3,127.0.0.1:1":  `"127.0.0.1:1" is none of a=ADDRESS, b=ADDRESS, peer-first, metadata, hold`,
		"forge-ed3,a=:1,hold=no": `"hold=no" is none of a=ADDRESS, b=ADDRESS, peer-first, metadata, hold`,
	} {
		if _, err := ParseStreamPort(text); err == nil || err.Error() != want {
			t.Errorf("%s: %v, want %s", text, err, want)
		}
	}
}
