package internal

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// TestDocumentLinks follows every relative link of the documents. Where the
// text of a link is code and its target a Go file, it names a declaration:
// Func, Type or Type.Method.
func TestDocumentLinks(t *testing.T) {
	links := regexp.MustCompile(`\[([^]]*)\]\(([^)]*)\)`)
	code := regexp.MustCompile("^`([A-Za-z.]+)`$")
	followed := 0
	for file, text := range documents(t) {
		for _, link := range links.FindAllStringSubmatch(text, -1) {
			target, _, _ := strings.Cut(link[2], "#")
			if target == "" || strings.Contains(target, "://") {
				continue
			}
			followed++
			target = filepath.Join(filepath.Dir(file), target)
			if _, err := os.Stat(target); err != nil {
				t.Errorf("%s: link %q: %v", file, link[0], err)
				continue
			}
			name := code.FindStringSubmatch(link[1])
			if name != nil && path.Ext(target) == ".go" && !slices.Contains(declarations(t, target), name[1]) {
				t.Errorf("%s: link %q: the file declares no %s", file, link[0], name[1])
			}
		}
	}
	if followed < 50 {
		t.Errorf("only %d links: are they written in another way?", followed)
	}
}

// TestPackagesAreDocumented compares the table of docs/ARCHITECTURE.md with
// that of arch_test.go.
func TestPackagesAreDocumented(t *testing.T) {
	rows := tableOf(t, "../docs/ARCHITECTURE.md")
	for name, in := range packages {
		if rows[name] != string(in) {
			t.Errorf("docs/ARCHITECTURE.md has %s in layer %q, and arch_test.go in %q", name, rows[name], in)
		}
	}
	for name := range rows {
		if _, ok := packages[name]; !ok && strings.Contains(name, "/") {
			t.Errorf("docs/ARCHITECTURE.md has %s, and arch_test.go has not", name)
		}
	}
}

// TestModulesAreDefended compares the table of docs/decisions/0002 with what
// the source imports.
func TestModulesAreDefended(t *testing.T) {
	tree, err := readTree(os.DirFS(".."))
	if err != nil {
		t.Fatal(err)
	}
	imported := map[string]map[string]bool{} // module -> packages
	for _, f := range tree.files {
		for _, spec := range f.ast.Imports {
			if module := tree.moduleOf(strings.Trim(spec.Path.Value, `"`)); module != "" {
				if imported[module] == nil {
					imported[module] = map[string]bool{}
				}
				imported[module][path.Base(f.pkg)] = true
			}
		}
	}
	rows := tableOf(t, "../docs/decisions/0002-dependencies.md")
	for module, by := range imported {
		owner, ok := rows[module]
		owner = strings.Trim(owner, "`")
		if !ok || owner != "any" && !(len(by) == 1 && by[owner]) {
			t.Errorf("record 2 gives %s to %q, and these import it: %v", module, owner, slices.Sorted(maps.Keys(by)))
		}
	}
	for module, owner := range rows {
		if owner != "tests" && imported[module] == nil {
			t.Errorf("record 2 defends %s, which nothing imports", module)
		}
		if !slices.Contains(tree.required, module) {
			t.Errorf("record 2 defends %s, which go.mod does not require", module)
		}
	}
}

// documents returns the text of every Markdown file that people read, by path.
func documents(t *testing.T) map[string]string {
	t.Helper()
	all := map[string]string{}
	read := func(name string) {
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		all[name] = string(b)
	}
	read("../README.md")
	err := filepath.WalkDir("../docs", func(name string, d fs.DirEntry, err error) error {
		if err == nil && path.Ext(name) == ".md" {
			read(name)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// tableOf returns the first two columns of a document's first table whose
// first column is code.
func tableOf(t *testing.T, name string) map[string]string {
	t.Helper()
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	rows := map[string]string{}
	for line := range strings.Lines(string(b)) {
		cells := strings.Split(line, "|")
		if len(cells) < 4 || !strings.HasPrefix(cells[1], " `") {
			if len(rows) > 0 {
				break
			}
			continue
		}
		rows[strings.Trim(cells[1], " `")] = strings.TrimSpace(cells[2])
	}
	if len(rows) == 0 {
		t.Fatalf("%s has no table", name)
	}
	return rows
}

// declarations returns the names of a file's functions, methods and types.
func declarations(t *testing.T, name string) []string {
	t.Helper()
	f, err := parser.ParseFile(token.NewFileSet(), name, nil, parser.SkipObjectResolution)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, decl := range f.Decls {
		switch d := decl.(type) {
		case *ast.FuncDecl:
			name := d.Name.Name
			if d.Recv != nil {
				of := d.Recv.List[0].Type
				if pointer, ok := of.(*ast.StarExpr); ok {
					of = pointer.X
				}
				if receiver, ok := of.(*ast.Ident); ok {
					name = receiver.Name + "." + name
				}
			}
			names = append(names, name)
		case *ast.GenDecl:
			for _, spec := range d.Specs {
				if s, ok := spec.(*ast.TypeSpec); ok {
					names = append(names, s.Name.Name)
				}
			}
		}
	}
	return names
}
