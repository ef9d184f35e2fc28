package config

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"unicode"

	"go.yaml.in/yaml/v4"
)

// purpose says what a file must be like.
type purpose int

const (
	readable  purpose = iota // there, and for anybody to read
	secret                   // there, and for its owner only
	directory                // made when it is missing; the one above it is there
)

// file is a path that the configuration names.
type file struct {
	key     string
	purpose purpose
	given   string // as written
	path    string // ready to be opened
	at      position
}

// pathTo reads the path of a file and remembers to look at the file.
func pathTo(dst *string, p purpose) reading {
	return func(r *reader, key, n *yaml.Node) bool {
		given, ok := scalar(r, key.Value, n, filePath)
		if !ok {
			return false
		}
		*dst = given
		if !filepath.IsAbs(given) {
			*dst = filepath.Join(r.dir, given)
		}
		r.config.files = append(r.config.files, file{key.Value, p, given, *dst, place(n)})
		return true
	}
}

func filePath(s string) (string, error) {
	strange := func(r rune) bool { return !unicode.IsPrint(r) }
	switch {
	case mask(s) == "(key)":
		return "", bad("write the key to a file of mode 0600, and its path here", "a key, not the path of a file")
	case s == "" || strings.ContainsFunc(s, strange):
		return "", bad("paths are relative to the configuration file", "%s cannot be a path", quote(s))
	}
	return s, nil
}

// CheckFiles looks at every file that the configuration names: whether it is
// there, can be read, and, where it is a secret, can be read by nobody else.
// The error is Problems.
func (c *Config) CheckFiles() error { return c.checkFiles().err() }

func (c *Config) checkFiles() Problems {
	ps := problems{document: &c.source}
	for _, f := range c.files {
		if err := f.check(); err != nil {
			hint := ""
			if errors.Is(err, os.ErrPermission) {
				hint = asRoot
			}
			if e, ok := errors.AsType[*badValue](err); ok {
				hint = e.hint
			}
			ps.add(f.at, hint, "%s: %s", f.key, err)
		}
	}
	return ps.all
}

func (f file) check() error {
	name := quote(f.given)
	if f.purpose == directory {
		if i, err := os.Stat(filepath.Dir(f.path)); err != nil || !i.IsDir() {
			return bad("make it: mkdir -m 0700 "+filepath.Dir(f.path), "the directory of %s does not exist", name)
		}
	}
	// Stat follows links: what counts is the file that is opened in the end.
	i, err := os.Stat(f.path)
	switch {
	case os.IsNotExist(err) && f.purpose == directory:
		return nil
	case os.IsNotExist(err):
		return bad("keyturn looks for "+f.path, "no such file: %s", name)
	case err != nil:
		return fmt.Errorf("%s: %w", name, cause(err))
	case f.purpose == directory && !i.IsDir():
		return fmt.Errorf("%s is not a directory", name)
	case f.purpose == directory && i.Mode().Perm()&0o077 != 0:
		return bad("chmod 700 "+f.path, "others have access to the directory %s (mode %#o)", name, i.Mode().Perm())
	case f.purpose == directory:
		return nil
	case i.IsDir():
		return fmt.Errorf("%s is a directory, not a file", name)
	case !i.Mode().IsRegular():
		return fmt.Errorf("%s is not a regular file", name)
	case i.Size() == 0:
		return fmt.Errorf("%s is empty", name)
	case f.purpose == secret && i.Mode().Perm()&0o077 != 0:
		return bad("chmod 600 "+f.path, "others have access to the secret %s (mode %#o)", name, i.Mode().Perm())
	}
	return f.open()
}

// open proves that the file can be opened, which no mode does.
func (f file) open() error {
	h, err := os.Open(f.path)
	if err != nil {
		return fmt.Errorf("%s: %w", quote(f.given), cause(err))
	}
	return h.Close()
}
