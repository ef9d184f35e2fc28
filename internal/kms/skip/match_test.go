package skip

import (
	"fmt"
	"regexp"
	"strings"
	"testing"
	"time"
	"unicode/utf8"
)

func TestMatch(t *testing.T) {
	for _, tt := range []struct {
		pattern, id string
		want        bool
	}{
		{"Bob", "Bob", true},
		{"Bob", "bob", false},
		{"Bob", "Bobby", false},
		{"Bobby", "Bob", false},
		{"KP_*_LOC1", "KP_ALICE_LOC1", true}, // draft-cisco-skip-02, 4.1.2
		{"KP_*_LOC1", "KP_BOB_LOC1", true},
		{"KP_*_LOC1", "KP_BOB_LOC2", false},
		{"*", "", true},
		{"*", "kp/with a slash", true},
		{"**b*", "ab", true},
		{"*ab", "aab", true},
		{"a*b*c", "aXbXbc", true},
		{"a*b*c", "aXbXb", false},
		{"?", "é", true},
		{"?", "", false},
		{"k??", "kp1", true},
		{"kp_[123]", "kp_2", true},
		{"kp_[123]", "kp_4", false},
		{"kp_[!123]", "kp_4", true},
		{"kp_[!123]", "kp_3", false},
		{"kp_[1-3]", "kp_2", true},
		{"kp_[1-3x-]", "kp_-", true},
		{"kp_[1-3]", "kp_-", false},
		{"[]]", "]", true},
		{"[!]]", "]", false},
		{"[]-a]", "^", true},
		{"*[!a]", "ba", false},
		{"*[0-9]z", "a1z2z", true},
		{"[ab", "[ab", true},
		{"[ab", "a", false},
		{"[", "[", true},
		{"[]", "[]", true},
		{"[!", "[!", true},
		{"", "", true},
		{"", "a", false},
	} {
		if got := Match(tt.pattern, tt.id); got != tt.want {
			t.Errorf("Match(%q, %q) = %v", tt.pattern, tt.id, got)
		}
	}
}

// A pattern made to be slow takes no time worth mentioning.
func TestMatchIsBounded(t *testing.T) {
	began := time.Now()
	if Match(strings.Repeat("*a", 500)+"b", strings.Repeat("a", maxID)) {
		t.Error("matched")
	}
	if took := time.Since(began); took > time.Second {
		t.Errorf("took %v", took)
	}
}

// FuzzMatch compares with a regular expression of the same meaning.
func FuzzMatch(f *testing.F) {
	for _, s := range [][2]string{{"KP_*_LOC1", "KP_A_LOC1"}, {"[!a]?*", "bc"}, {"[a-c]", "b"}, {"[]x]", "]"}, {"[a-c-e]", "-"}} {
		f.Add(s[0], s[1])
	}
	f.Fuzz(func(t *testing.T, pattern, id string) {
		got := Match(pattern, id)
		if len(pattern) > 200 || len(id) > 200 || !utf8.ValidString(pattern) || !utf8.ValidString(id) {
			return
		}
		if want := meaning(t, pattern).MatchString(id); got != want {
			t.Errorf("Match(%q, %q) = %v", pattern, id, got)
		}
	})
}

// element is one element of a pattern.
var element = regexp.MustCompile(`(?s)^(\[!?.[^\]]*\]|.)`)

func meaning(t *testing.T, pattern string) *regexp.Regexp {
	var b strings.Builder
	b.WriteString(`(?s)^`)
	for pattern != "" {
		e := element.FindString(pattern)
		pattern = pattern[len(e):]
		switch {
		case e == "*":
			b.WriteString(".*")
		case e == "?":
			b.WriteString(".")
		case len(e) > 1:
			list, not := strings.CutPrefix(e[1:len(e)-1], "!")
			if list == "" { // [!] and more: the ! is no negation there
				t.Skip()
			}
			b.WriteString(class([]rune(list), not))
		default:
			b.WriteString(regexp.QuoteMeta(e))
		}
	}
	re, err := regexp.Compile(b.String() + `$`)
	if err != nil {
		t.Skip(err)
	}
	return re
}

// class writes a list as alternatives; a range that is the wrong way round
// holds nothing.
func class(list []rune, not bool) string {
	var in strings.Builder
	for i := 0; i < len(list); i++ {
		from, to := list[i], list[i]
		if i+2 < len(list) && list[i+1] == '-' {
			to = list[i+2]
			i += 2
		}
		if from <= to {
			fmt.Fprintf(&in, `\x{%X}-\x{%X}`, from, to)
		}
	}
	switch {
	case in.Len() == 0 && not:
		return "."
	case in.Len() == 0:
		return `[^\x{0}-\x{10FFFF}]`
	case not:
		return "[^" + in.String() + "]"
	}
	return "[" + in.String() + "]"
}
