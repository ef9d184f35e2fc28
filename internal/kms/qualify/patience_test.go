package qualify

import (
	"strings"
	"testing"
	"testing/synctest"
)

// TestPatience: a KMS that hears of a key later than the other end asks for it
// is asked again, as a rotator does, and the line says for how long.
func TestPatience(t *testing.T) {
	for _, tt := range []struct {
		name, a, b, want string
		run              func(n *network) (*Report, error)
	}{
		{"014", "healthy", "late,times=2", "the same key by GET and its ID",
			func(n *network) (*Report, error) {
				n.serve(etsi014Server)
				return ETSI014(n.t.Context(), n.config())
			}},
		{"SKIP", "healthy", "late,times=2", "the same key by its keyId",
			func(n *network) (*Report, error) {
				n.serve(etsi014Server)
				return SKIP(n.t.Context(), n.config())
			}},
		{"004", "healthy", "out-of-keys,times=2", "the same key the other way round",
			func(n *network) (*Report, error) { return ETSI004(n.t.Context(), n.streams("forge-ed3")) }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				n := newNetwork(t)
				n.fail(tt.a, tt.b)
				r, err := tt.run(n)
				if err != nil {
					t.Fatal(err)
				}
				for _, l := range r.Lines {
					if l.What == tt.want && l.Verdict == Right && (tt.name == "004" || strings.Contains(l.Detail, "known only after 150ms")) {
						return
					}
				}
				t.Error(table(r))
			})
		})
	}
}
