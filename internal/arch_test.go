// Package internal enforces the shape of the code. The tables below are the
// architecture (docs/ARCHITECTURE.md says why it is so); the test compares
// them with what every source file imports and declares, under all build tags.
package internal

import (
	"bufio"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"maps"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"
	"testing"
	"testing/fstest"
)

// A layer may import the layers that allowed names for it; of its own layer,
// only core and a package's family (kms and kms/etsi014) are open to it.
type layer string

const (
	core          layer = "core"          // pure: no I/O, no clock, no goroutine, no lock
	world         layer = "world"         // simulated worlds for tests: imported by tests alone
	adapter       layer = "adapter"       // one thing of the outside each, ignorant of each other
	composer      layer = "composer"      // puts core and adapters together
	demonstration layer = "demonstration" // a composition of everything
	commands      layer = "commands"
	program       layer = "program"
)

var allowed = map[layer][]layer{
	core:          {core},
	world:         {core},
	adapter:       {core},
	composer:      {core, adapter},
	demonstration: {core, adapter, composer},
	commands:      {core, adapter, composer, demonstration},
	program:       {commands},
}

// packages places every package of keyturn.
var packages = map[string]layer{
	"internal/psk":                   core,
	"internal/kem":                   core,
	"internal/wire":                  core,
	"internal/rotation":              core,
	"internal/rotation/rotationtest": world,
	"internal/memnet":                world,
	"internal/testca":                world,
	"internal/kms":                   adapter,
	"internal/kms/etsi004":           adapter,
	"internal/kms/etsi014":           adapter,
	"internal/kms/kmshttp":           adapter,
	"internal/kms/kmstls":            adapter,
	"internal/kms/qualify":           adapter,
	"internal/kms/skip":              adapter,
	"internal/kmesim":                adapter,
	"internal/wg":                    adapter,
	"internal/link":                  adapter,
	"internal/config":                adapter,
	"internal/control":               adapter,
	"internal/registry":              adapter,
	"internal/detach":                adapter,
	"internal/logfile":               adapter,
	"internal/daemon":                composer,
	"internal/demo":                  demonstration,
	"internal/cli":                   commands,
	"cmd/keyturn":                    program,
}

// owners names, for each third-party module, the one package that imports it.
// Tests, and golang.org/x outside core, are free. A module without an owner
// serves tests only.
var owners = map[string]string{
	"filippo.io/mldsa":                  "internal/link",
	"github.com/cloudflare/circl":       "internal/kem",
	"github.com/spf13/cobra":            "internal/cli",
	"go.yaml.in/yaml/v4":                "internal/config",
	"golang.zx2c4.com/wireguard":        "internal/wg",
	"golang.zx2c4.com/wireguard/wgctrl": "internal/wg",
}

// impure lists what core may not import, each with all that lies below it.
var impure = []string{"context", "log", "net", "os", "runtime", "sync", "syscall", "testing", "unsafe"}

// pure lists what core may import all the same: values, no effects.
var pure = map[string][]string{
	"internal/psk": {"log/slog"}, // for Key.LogValue, which keeps keys out of logs
}

// clock lists the functions of package time that read the clock or start a timer.
var clock = []string{"After", "AfterFunc", "NewTicker", "NewTimer", "Now", "Since", "Sleep", "Tick", "Until"}

// constructors lists the calls whose result may be a package variable.
var constructors = []string{"errors.New", "fmt.Errorf", "regexp.MustCompile"}

func TestArchitecture(t *testing.T) {
	tree, err := readTree(os.DirFS(".."))
	if err != nil {
		t.Fatal(err)
	}
	for _, problem := range tree.problems() {
		t.Error(problem)
	}
}

// tree is the source of the module as the rules see it.
type tree struct {
	module   string   // path of the module
	required []string // modules of go.mod
	fset     *token.FileSet
	files    []sourceFile
}

// sourceFile is a file outside tests.
type sourceFile struct {
	pkg string // directory within the module
	ast *ast.File
}

// readTree parses every Go file below cmd and internal of a module, tests and
// testdata aside.
func readTree(root fs.FS) (*tree, error) {
	t := &tree{fset: token.NewFileSet()}
	if err := t.readModule(root); err != nil {
		return nil, err
	}
	err := fs.WalkDir(root, ".", func(name string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir():
			inside := name == "." || strings.HasPrefix(name, "cmd") || strings.HasPrefix(name, "internal")
			if !inside || d.Name() == "testdata" {
				return fs.SkipDir
			}
			return nil
		case path.Ext(name) != ".go" || strings.HasSuffix(name, "_test.go"):
			return nil
		}
		src, err := fs.ReadFile(root, name)
		if err != nil {
			return err
		}
		f, err := parser.ParseFile(t.fset, name, src, parser.ParseComments|parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		t.files = append(t.files, sourceFile{pkg: path.Dir(name), ast: f})
		return nil
	})
	return t, err
}

// readModule reads the module's path and its requirements from go.mod.
func (t *tree) readModule(root fs.FS) error {
	f, err := root.Open("go.mod")
	if err != nil {
		return err
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		words := strings.Fields(strings.TrimPrefix(lines.Text(), "require "))
		switch {
		case len(words) >= 2 && words[0] == "module":
			t.module = words[1]
		case len(words) >= 2 && strings.HasPrefix(words[1], "v"):
			t.required = append(t.required, words[0])
		}
	}
	return lines.Err()
}

// problems returns every way in which the tree breaks the tables, and every
// row of the tables that nothing in the tree answers to.
func (t *tree) problems() []string {
	var out []string
	report := func(at token.Pos, format string, args ...any) {
		p := t.fset.Position(at)
		out = append(out, fmt.Sprintf("%s:%d: %s", p.Filename, p.Line, fmt.Sprintf(format, args...)))
	}
	found := make(map[string]bool)
	used := make(map[string]bool)
	for _, f := range t.files {
		in, placed := packages[f.pkg]
		if !placed {
			report(f.ast.Package, "package %s has no place in the architecture", f.pkg)
			continue
		}
		found[f.pkg] = true
		for _, spec := range f.ast.Imports {
			imported, _ := strconv.Unquote(spec.Path.Value)
			own, ok := strings.CutPrefix(imported, t.module+"/")
			module := t.moduleOf(imported)
			switch {
			case ok:
				if why := arrow(f.pkg, in, own); why != "" {
					report(spec.Pos(), "%s may not import %s: %s", f.pkg, own, why)
				}
			case strings.HasPrefix(imported, "golang.org/x/"):
				if in == core {
					report(spec.Pos(), "%s is core and may not import %s", f.pkg, imported)
				}
			case module != "":
				if owners[module] != f.pkg {
					report(spec.Pos(), "%s may not import %s: its owner is %q", f.pkg, imported, owners[module])
				}
				used[module] = true
			case in == core && !slices.Contains(pure[f.pkg], imported) && below(imported, impure):
				report(spec.Pos(), "%s is core and may not import %s", f.pkg, imported)
			}
		}
		checkDeclarations(f, report)
		if in == core {
			checkPurity(f, report)
		}
	}
	for _, pkg := range slices.Sorted(maps.Keys(packages)) {
		if !found[pkg] {
			out = append(out, fmt.Sprintf("package %s has a place in the architecture but does not exist", pkg))
		}
	}
	for _, module := range slices.Sorted(maps.Keys(owners)) {
		if !used[module] {
			out = append(out, fmt.Sprintf("module %s has an owner but nothing imports it", module))
		}
	}
	return out
}

// moduleOf returns the required module that provides an import, or "".
func (t *tree) moduleOf(imported string) string {
	best := ""
	for _, m := range t.required {
		if len(m) > len(best) && below(imported, []string{m}) {
			best = m
		}
	}
	return best
}

// arrow says why a package of a layer may not import another, or "".
func arrow(pkg string, in layer, imported string) string {
	to, ok := packages[imported]
	switch {
	case !ok:
		return "it has no place in the architecture"
	case slices.Contains(allowed[in], to), family(pkg) == family(imported) && to == in:
		return ""
	}
	return fmt.Sprintf("%s may not import %s", in, to)
}

// family is the directory right below internal that a package lies in.
func family(pkg string) string {
	parts := strings.SplitN(pkg, "/", 3)
	return strings.Join(parts[:min(2, len(parts))], "/")
}

// below reports whether an import path is one of the roots or lies below one.
func below(imported string, roots []string) bool {
	return slices.ContainsFunc(roots, func(root string) bool {
		return imported == root || strings.HasPrefix(imported, root+"/")
	})
}

type reporter func(at token.Pos, format string, args ...any)

// checkDeclarations refuses init and every package variable that is neither
// an error, nor a table, nor a compiled pattern, nor an embedded file, nor a
// check that a type implements an interface.
func checkDeclarations(f sourceFile, report reporter) {
	for _, decl := range f.ast.Decls {
		switch d := decl.(type) {
		case *ast.FuncDecl:
			if d.Recv == nil && d.Name.Name == "init" {
				report(d.Pos(), "init: what it does belongs into a constructor")
			}
		case *ast.GenDecl:
			if d.Tok != token.VAR {
				continue
			}
			for _, spec := range d.Specs {
				v := spec.(*ast.ValueSpec)
				if embedded(d.Doc) || embedded(v.Doc) {
					continue
				}
				for i, name := range v.Names {
					if name.Name != "_" && (i >= len(v.Values) || !constant(v.Values[i])) {
						report(name.Pos(), "package variable %s is neither an error nor a table", name.Name)
					}
				}
			}
		}
	}
}

// constant reports whether the value is one that nobody changes later: a
// table, or what one of the constructors returns.
func constant(value ast.Expr) bool {
	switch v := value.(type) {
	case *ast.CompositeLit:
		return true
	case *ast.CallExpr:
		sel, ok := v.Fun.(*ast.SelectorExpr)
		if !ok {
			return false
		}
		x, ok := sel.X.(*ast.Ident)
		return ok && slices.Contains(constructors, x.Name+"."+sel.Sel.Name)
	}
	return false
}

// embedded reports whether a declaration's comment embeds a file.
func embedded(doc *ast.CommentGroup) bool {
	return doc != nil && slices.ContainsFunc(doc.List, func(c *ast.Comment) bool {
		return strings.HasPrefix(c.Text, "//go:embed ")
	})
}

// checkPurity refuses goroutines, channels and the clock.
func checkPurity(f sourceFile, report reporter) {
	timeName := ""
	for _, spec := range f.ast.Imports {
		if spec.Path.Value == `"time"` {
			timeName = "time"
			if spec.Name != nil {
				timeName = spec.Name.Name
			}
		}
	}
	ast.Inspect(f.ast, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.GoStmt:
			report(n.Pos(), "core starts no goroutine")
		case *ast.ChanType:
			report(n.Pos(), "core has no channels")
		case *ast.SelectorExpr:
			x, ok := n.X.(*ast.Ident)
			if ok && timeName != "" && x.Name == timeName && slices.Contains(clock, n.Sel.Name) {
				report(n.Pos(), "core reads no clock: time.%s", n.Sel.Name)
			}
		}
		return true
	})
}

// TestArchitectureCanFail breaks each rule once, in a copy of the tree's
// smallest part, and looks for the complaint.
func TestArchitectureCanFail(t *testing.T) {
	tests := []struct {
		name, file, src, want string
	}{
		{"core imports adapter", "internal/psk/x.go", `package psk; import _ "keyturn/internal/wg"`, "core may not import adapter"},
		{"core imports os", "internal/psk/x.go", `package psk; import _ "os"`, "core and may not import os"},
		{"core imports sync/atomic", "internal/wire/x.go", `package wire; import _ "sync/atomic"`, "core and may not import sync/atomic"},
		{"core imports slog", "internal/wire/x.go", `package wire; import _ "log/slog"`, "core and may not import log/slog"},
		{"core imports golang.org/x", "internal/kem/x.go", `package kem; import _ "golang.org/x/crypto/hkdf"`, "core and may not import golang.org/x"},
		{"core reads the clock", "internal/rotation/x.go", `package rotation; import "time"; func f() time.Time { return time.Now() }`, "time.Now"},
		{"core reads the clock by another name", "internal/rotation/x.go", `package rotation; import clock "time"; func f() { clock.Sleep(1) }`, "time.Sleep"},
		{"core starts a goroutine", "internal/rotation/x.go", `package rotation; func f() { go f() }`, "no goroutine"},
		{"core has a channel", "internal/rotation/x.go", `package rotation; func f(c chan int) {}`, "no channels"},
		{"core imports another's module", "internal/wire/x.go", `package wire; import _ "github.com/cloudflare/circl/kem"`, `its owner is "internal/kem"`},
		{"adapter imports adapter", "internal/wg/x.go", `package wg; import _ "keyturn/internal/link"`, "adapter may not import adapter"},
		{"adapter imports daemon", "internal/wg/x.go", `package wg; import _ "keyturn/internal/daemon"`, "adapter may not import composer"},
		{"daemon imports cli", "internal/daemon/x.go", `package daemon; import _ "keyturn/internal/cli"`, "composer may not import commands"},
		{"main imports daemon", "cmd/keyturn/x.go", `package main; import _ "keyturn/internal/daemon"`, "program may not import composer"},
		{"shipped code imports a world", "internal/daemon/x.go", `package daemon; import _ "keyturn/internal/rotation/rotationtest"`, "composer may not import world"},
		{"package without a place", "internal/util/x.go", `package util`, "internal/util has no place"},
		{"module without an owner", "internal/cli/x.go", `package cli; import _ "pgregory.net/rapid"`, `its owner is ""`},
		{"init", "internal/cli/x.go", `package cli; func init() {}`, "init:"},
		{"variable", "internal/cli/x.go", `package cli; var verbose bool`, "package variable verbose"},
		{"variable from a call", "internal/cli/x.go", `package cli; import "os"; var out = os.Getenv("OUT")`, "package variable out"},
		{"row without a package", "internal/psk/x.go", `package psk`, "package internal/wire has a place in the architecture but does not exist"},
		{"owner without an import", "internal/psk/x.go", `package psk`, "module github.com/spf13/cobra has an owner but nothing imports it"},
	}
	gomod, err := os.ReadFile("../go.mod")
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			tree, err := readTree(fstest.MapFS{
				"go.mod": {Data: gomod},
				tt.file:  {Data: []byte(tt.src)},
			})
			if err != nil {
				t.Fatal(err)
			}
			got := strings.Join(tree.problems(), "\n")
			if !strings.Contains(got, tt.want) {
				t.Errorf("no complaint with %q in:\n%s", tt.want, got)
			}
		})
	}
}

// TestArchitectureAllows gives the checks what they must let pass.
func TestArchitectureAllows(t *testing.T) {
	src := `package etsi014
import (_ "embed"; "errors"; "fmt"; "keyturn/internal/kms"; "keyturn/internal/psk"; "net/http"; "regexp")
var ErrGone = errors.New("gone")
var errWrapped = fmt.Errorf("more: %w", ErrGone)
var table = map[int]string{http.StatusOK: "ok"}
var pattern = regexp.MustCompile("^[0-9]+$")
//go:embed example.yaml
var example string
var _ kms.Source = (*Client)(nil)
type Client struct { key *psk.Key }
`
	tree, err := readTree(fstest.MapFS{
		"go.mod":                         {Data: []byte("module keyturn\n")},
		"internal/kms/etsi014/client.go": {Data: []byte(src)},
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range tree.problems() {
		if strings.HasPrefix(p, "internal/kms/etsi014/") {
			t.Error(p)
		}
	}
}
