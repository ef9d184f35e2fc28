package skip

import (
	"strings"
	"unicode/utf8"
)

// Match reports whether a system ID is one of those that a glob pattern of a
// remoteSystemID list stands for (draft-cisco-skip-02, table 5): * for any
// characters, ? for one, [list] for one of a list and [!list] for one that is
// not in it. As in POSIX, a list may have ranges, and a ] that comes first in
// it stands for itself; a [ that begins no list stands for itself as well. It
// takes time proportional to the product of both lengths at most.
func Match(pattern, id string) bool {
	// Where a star was met last: the rest of the pattern after it, and the rest
	// of the ID that it has not swallowed yet.
	var afterStar, swallowed string
	starred := false
	for id != "" || pattern != "" {
		if strings.HasPrefix(pattern, "*") {
			pattern = pattern[1:]
			afterStar, swallowed, starred = pattern, id, true
			continue
		}
		if pattern != "" && id != "" {
			if n, ok := matchOne(pattern, id); ok {
				pattern, id = pattern[n:], rest(id)
				continue
			}
		}
		if !starred || swallowed == "" {
			return false
		}
		swallowed = rest(swallowed)
		pattern, id = afterStar, swallowed
	}
	return true
}

// rest returns s without its first character.
func rest(s string) string {
	_, n := utf8.DecodeRuneInString(s)
	return s[n:]
}

// matchOne compares the first character of id with the first element of a
// pattern, which has n bytes.
func matchOne(pattern, id string) (n int, ok bool) {
	c, _ := utf8.DecodeRuneInString(id)
	p, n := utf8.DecodeRuneInString(pattern)
	switch p {
	case '?':
		return n, true
	case '[':
		list, not := strings.CutPrefix(pattern[1:], "!")
		if list == "" {
			break
		}
		end := strings.IndexByte(rest(list), ']')
		if end < 0 {
			break
		}
		end += len(list) - len(rest(list))
		return len(pattern) - len(list) + end + 1, inList(list[:end], c) != not
	}
	return n, p == c
}

// inList reports whether a list of characters and ranges has c.
func inList(list string, c rune) bool {
	r := []rune(list)
	for i := 0; i < len(r); i++ {
		if i+2 < len(r) && r[i+1] == '-' {
			if r[i] <= c && c <= r[i+2] {
				return true
			}
			i += 2
			continue
		}
		if r[i] == c {
			return true
		}
	}
	return false
}
