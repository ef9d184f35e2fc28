package config

import (
	"cmp"
	"encoding/base64"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"
)

// maxProblems bounds what one file can make us say.
const maxProblems = 1000

// Bounds on what of a foreign text is shown, in runes.
const (
	maxQuoted = 64
	maxSource = 200
	// What is masked before it is shortened is bounded as well, so far beyond that
	// a secret which this bound cuts in two is not among what is shown.
	maxMasked = 4096
)

// Problem is one thing wrong with a configuration file.
type Problem struct {
	File    string // as the user named it
	Line    int    // from 1; 0 where the file as a whole is meant
	Column  int    // in characters, from 1; 0 with Line 0
	Message string
	Source  string // text of the line, made printable; secrets are masked
	Hint    string // what to do about it; may be empty
}

// String renders the problem as one paragraph without a final newline.
func (p Problem) String() string {
	var b strings.Builder
	b.WriteString(p.File)
	if p.Line > 0 {
		fmt.Fprintf(&b, ":%d:%d", p.Line, p.Column)
	}
	b.WriteString(": " + p.Message)
	if p.Line > 0 {
		b.WriteString(strings.TrimRight(fmt.Sprintf("\n%5d | %s", p.Line, p.Source), " "))
	}
	if p.Hint != "" {
		b.WriteString("\n      hint: " + p.Hint)
	}
	return b.String()
}

// Problems is every problem of a configuration, in the order of the file. It
// is the type of all errors that this package returns.
type Problems []Problem

// Error renders all problems, one paragraph each.
func (ps Problems) Error() string {
	paragraphs := make([]string, len(ps))
	for i, p := range ps {
		paragraphs[i] = p.String()
	}
	return strings.Join(paragraphs, "\n")
}

// err returns ps, in order, as an error: a nil one where there are none.
func (ps Problems) err() error {
	if len(ps) == 0 {
		return nil
	}
	slices.SortStableFunc(ps, func(a, b Problem) int {
		return cmp.Or(cmp.Compare(a.Line, b.Line), cmp.Compare(a.Column, b.Column))
	})
	return ps
}

// asRoot is what to do about a lack of rights.
const asRoot = "run it as root, as wg itself"

// position is a place in the file: both numbers from 1, the column in
// characters.
type position struct{ line, column int }

// document is the text that problems point into.
type document struct {
	name  string   // as the user named it
	lines []string // without line ends
	pem   bool     // it holds a block of a PEM file
}

// problem describes something wrong at a place, which is moved into the text
// where a parser points behind its end. show is what of the line may be seen.
func (d *document) problem(at position, hint, message string, show func(string) string) Problem {
	p := Problem{File: d.name, Message: message, Hint: hint}
	if len(d.lines) == 0 {
		return p
	}
	p.Line = min(max(at.line, 1), len(d.lines))
	text := d.lines[p.Line-1]
	end := utf8.RuneCountInString(text) + 1
	p.Column = min(max(at.column, 1), end)
	if at.line > len(d.lines) {
		p.Column = end
	}
	p.Source = printable(show(text))
	return p
}

// problems collects what is wrong with one document.
type problems struct {
	*document
	all Problems
}

// add notes a problem. The source line is shown with everything masked that
// has the form of a key, for it may be a secret that has no business there.
func (ps *problems) add(at position, hint, format string, args ...any) {
	show := func(line string) string { return mask(shorten(line, maxMasked)) }
	if ps.pem {
		// The last line of a key may be too short to be told from a word.
		show = func(string) string { return "" }
	}
	ps.note(at, mask(hint), mask(fmt.Sprintf(format, args...)), show)
}

// addPublic is add for a line that is known to hold public keys only.
func (ps *problems) addPublic(at position, hint, format string, args ...any) {
	ps.note(at, hint, fmt.Sprintf(format, args...), asItIs)
}

// asItIs shows a line that holds nothing secret.
func asItIs(line string) string { return line }

func (ps *problems) note(at position, hint, message string, show func(string) string) {
	switch {
	case len(ps.all) == maxProblems:
		message, hint = "too many problems: the rest is not shown", ""
	case len(ps.all) > maxProblems:
		return
	}
	ps.all = append(ps.all, ps.problem(at, hint, message, show))
}

// pemBegin begins a block of a PEM file (RFC 7468, 2), most often a secret key.
const pemBegin = "-----BEGIN"

var (
	// runs matches what may be a secret in base64 or in hex, or a part of one.
	runs = regexp.MustCompile(`[A-Za-z0-9+/_=-]{32,}`)
	// absolute matches the beginning of a path.
	absolute = regexp.MustCompile(`^/[a-z]{2,10}/`)
)

// mask hides whatever may be a secret or a part of one. Some harmless texts
// look the same.
func mask(s string) string {
	if before, _, found := strings.Cut(s, pemBegin); found {
		s = before + "(key)"
	}
	return runs.ReplaceAllStringFunc(s, func(run string) string {
		parts, least := []string{run}, 32
		if absolute.MatchString(run) {
			parts, least = strings.Split(run, "/"), 40 // long names of directories are common
		}
		for i, part := range parts {
			if len(part) >= least && secretLike(part) {
				parts[i] = "(key)"
			}
		}
		return strings.Join(parts, "/")
	})
}

// secretLike reports whether a long run of characters looks like hex or base64.
func secretLike(run string) bool {
	bare := strings.TrimRight(run, "=")
	return strings.Trim(bare, "0123456789abcdefABCDEF") == "" || len(bare) == 43 ||
		strings.ContainsFunc(run, unicode.IsUpper) && strings.ContainsFunc(run, unicode.IsLower) && strings.ContainsFunc(run, unicode.IsDigit)
}

// quote shows a foreign value: in quotes, bounded, and no keys. What is masked
// is masked before it could be cut in two.
func quote(s string) string { return strconv.Quote(shorten(mask(shorten(s, maxMasked)), maxQuoted)) }

// encode writes a public key or fingerprint as WireGuard does.
func encode(k [32]byte) string { return base64.StdEncoding.EncodeToString(k[:]) }

// printable makes a line fit for a terminal.
func printable(line string) string {
	return strings.Map(func(r rune) rune {
		switch {
		case r == '\t':
			return '→' // a tab is often the very problem: let it be seen
		case unicode.IsPrint(r):
			return r
		}
		return unicode.ReplacementChar
	}, shorten(line, maxSource))
}

// shorten bounds s to most runes.
func shorten(s string, most int) string {
	n := 0
	for i := range s {
		if n == most {
			return s[:i] + "…"
		}
		n++
	}
	return s
}
