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

// position is a place in the file: both numbers from 1, the column in
// characters.
type position struct{ line, column int }

// document is the text that problems point into.
type document struct {
	name  string   // as the user named it
	lines []string // without line ends
}

// problem describes something wrong at a place, which is moved into the text
// where a parser points behind its end.
func (d *document) problem(at position, hint, message string) Problem {
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
	p.Source = printable(text)
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
	ps.note(at, hint, fmt.Sprintf(format, args...), mask)
}

// addPublic is add for a line that is known to hold public keys only.
func (ps *problems) addPublic(at position, hint, format string, args ...any) {
	ps.note(at, hint, fmt.Sprintf(format, args...), func(s string) string { return s })
}

func (ps *problems) note(at position, hint, message string, show func(string) string) {
	switch {
	case len(ps.all) == maxProblems:
		message, hint = "too many problems: the rest is not shown", ""
	case len(ps.all) > maxProblems:
		return
	}
	p := ps.problem(at, hint, message)
	p.Source = show(p.Source)
	ps.all = append(ps.all, p)
}

// keyLike matches 32 bytes in the encodings in which keys are written.
var keyLike = regexp.MustCompile(`[A-Za-z0-9+/]{43}=|\b[0-9A-Fa-f]{64}\b`)

// mask hides whatever has the form of a key.
func mask(s string) string { return keyLike.ReplaceAllString(s, "(key)") }

// quote shows a foreign value: in quotes, bounded, and no keys.
func quote(s string) string { return strconv.Quote(mask(shorten(s, maxQuoted))) }

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
