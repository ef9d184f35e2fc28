package config

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"strings"
	"unicode"
	"unicode/utf8"

	"go.yaml.in/yaml/v4"
)

// MaxFile is the size in bytes up to which a configuration is read: room for
// the 10,000 peers of a large hub.
const MaxFile = 4 << 20

// place returns where a node begins.
func place(n *yaml.Node) position { return position{n.Line, n.Column} }

// tree returns the root of the document's YAML. Where it returns nil there is
// a problem that makes it pointless to look further.
func (ps *problems) tree(data []byte) *yaml.Node {
	if len(data) > MaxFile {
		ps.add(position{}, "", "the file is larger than %d MiB", MaxFile>>20)
		return nil
	}
	data = bytes.TrimPrefix(data, []byte("\ufeff"))
	for line := range strings.Lines(string(data)) {
		ps.lines = append(ps.lines, strings.TrimSuffix(strings.TrimSuffix(line, "\n"), "\r"))
		ps.pem = ps.pem || strings.Contains(line, pemBegin)
	}
	if !ps.characters() {
		return nil
	}

	loader, err := yaml.NewLoader(bytes.NewReader(data))
	if err != nil {
		ps.syntax(err)
		return nil
	}
	var document, second yaml.Node
	switch err := loader.Load(&document); {
	case errors.Is(err, io.EOF):
		ps.add(position{1, 1}, "keyturn example prints one with every key explained", "the file is empty")
		return nil
	case err != nil:
		ps.syntax(err)
		return nil
	}
	if err := loader.Load(&second); !errors.Is(err, io.EOF) {
		ps.add(place(&second), `remove the line "---": one interface is one file`, "a second document in the file")
		return nil
	}
	if len(document.Content) != 1 || !ps.plain(document.Content[0]) {
		return nil
	}
	return document.Content[0]
}

// characters refuses what is not text. It also keeps our count of lines and
// YAML's the same, which knows more line ends than we do.
func (ps *problems) characters() bool {
	for i, line := range ps.lines {
		column := 0
		for j, r := range line {
			column++
			at := position{i + 1, column}
			_, width := utf8.DecodeRuneInString(line[j:])
			switch {
			case r == utf8.RuneError && width == 1:
				ps.add(at, "save the file as UTF-8", "not UTF-8 text")
				return false
			case r != '\t' && unicode.IsControl(r), r == '\u2028', r == '\u2029', r == '\ufeff':
				ps.add(at, "remove it", "a control character (%U)", r)
				return false
			}
		}
	}
	return true
}

// plain refuses those parts of YAML that let a text mean something else than
// it says (tags), or far more (aliases: the billion laughs).
func (ps *problems) plain(n *yaml.Node) bool {
	const writeOut = "write the value out where it is needed"
	switch {
	case n.Kind == yaml.AliasNode:
		ps.add(place(n), writeOut, "aliases are not supported")
		return false
	case n.Anchor != "":
		ps.add(place(n), writeOut, "anchors are not supported")
		return false
	case n.Style&yaml.TaggedStyle != 0:
		ps.add(place(n), "remove it", "tags are not supported")
		return false
	}
	ok := true
	for i, c := range n.Content {
		if n.Kind == yaml.MappingNode && i%2 == 0 && c.Tag == "!!merge" {
			ps.add(place(c), writeOut, "merge keys are not supported")
			ok = false
			continue
		}
		ok = ps.plain(c) && ok
	}
	return ok
}

// syntax puts the YAML parser's error into our words. It finds one at a time.
func (ps *problems) syntax(err error) {
	e, ok := errors.AsType[*yaml.LoadError](err)
	if !ok {
		ps.add(position{1, 1}, "", "not valid YAML: %s", quote(err.Error()))
		return
	}
	at := position{e.Mark.Line, e.Mark.Column}
	opened := position{e.ContextMark.Line, e.ContextMark.Column}
	message, hint := "", ""
	switch m := e.Message; {
	case strings.Contains(m, "tab character"), strings.Contains(m, "cannot start any token") && ps.at(at) == '\t':
		message, hint = "a tab in the indentation", "indent with spaces"
	case strings.Contains(m, "cannot start any token"):
		message, hint = fmt.Sprintf("a value cannot begin with %q", ps.at(at)), "put the value in quotes"
	case strings.Contains(m, "mapping values are not allowed"):
		message, hint = `unexpected ":"`, `check the indentation, the space after ":" of the line before, or put the value in quotes`
	case strings.Contains(m, "block sequence entries"):
		message, hint = `unexpected "-"`, "a list begins on a line of its own"
	case strings.Contains(m, "unexpected end of stream"):
		message, at = "the quoted text is never closed", opened
	case strings.Contains(m, "unknown escape"):
		message, hint = `unknown escape after "\"`, "use single quotes"
	case strings.Contains(m, "',' or ']'"):
		message, at, hint = `"[" without its "]"`, opened, "or a comma is missing between two items"
	case strings.Contains(m, "',' or '}'"):
		message, at, hint = `"{" without its "}"`, opened, "or a comma is missing between two items"
	case strings.Contains(m, "expected '-' indicator"):
		message, hint = fmt.Sprintf("this line does not fit into the list of line %d", opened.line), "check the indentation"
	case strings.Contains(m, "did not find expected key"):
		message, hint = fmt.Sprintf("this line does not fit into the block of line %d", opened.line), "check the indentation"
	case strings.Contains(m, "could not find expected ':'"):
		message, at, hint = `a key without ":"`, opened, `write "key: value", with a space after the colon`
	case strings.Contains(m, "expected node content"):
		message = "a value is missing here"
	case strings.Contains(m, "unknown anchor"):
		message, hint = "aliases are not supported", "put the value in quotes if it begins with a star"
	case strings.Contains(m, "max depth"):
		message = "too deeply nested"
	default:
		message = "not valid YAML: " + quote(m)
	}
	ps.add(at, hint, "%s", message)
}

// at returns the character at a position, 0 where there is none.
func (d *document) at(p position) rune {
	if p.line < 1 || p.line > len(d.lines) {
		return 0
	}
	runes := []rune(d.lines[p.line-1])
	if p.column < 1 || p.column > len(runes) {
		return 0
	}
	return runes[p.column-1]
}
