// Package registry remembers which rotators were brought up on this host, so
// that `keyturn up wg0` finds the configuration again and `keyturn ls` tells
// the truth after a kill -9 or a reboot. It owns <state-dir>/<interface>.json
// and what makes a rotator the only one of its interface: the claim of the
// interface and the lock of its files. It holds no key material and starts
// nothing.
package registry

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// ErrUnknown means that no rotator was ever brought up for an interface, or
// that it was removed since.
var ErrUnknown = errors.New("not known on this host")

// maxEntry bounds a file of the registry, in bytes.
const maxEntry = 64 << 10

// Entry is one rotator as it was last brought up.
type Entry struct {
	Interface string    `json:"interface"`
	Config    string    `json:"config"`     // absolute path of the configuration
	Process   Process   `json:"process"`    // zero after an orderly end
	StartedAt time.Time `json:"started_at"` // of the process
}

// Registry is a directory of entries.
type Registry struct {
	dir string
}

// Open returns the registry in dir, which need not exist yet.
func Open(dir string) *Registry { return &Registry{dir: dir} }

const suffix = ".json"

func (r *Registry) path(iface string) string { return filepath.Join(r.dir, iface+suffix) }

// CheckInterface returns an error unless name can be that of a network
// interface: 1 to 15 bytes, none of them a slash, colon or white space
// (dev_valid_name in Linux). File names are made of it, so it is
// checked before any of them is.
func CheckInterface(name string) error {
	bad := func(c rune) bool { return c <= ' ' || c > '~' || c == '/' || c == ':' }
	if name == "" || len(name) > 15 || name == "." || name == ".." || strings.ContainsFunc(name, bad) {
		return fmt.Errorf("%q cannot be the name of a network interface", name)
	}
	return nil
}

// Put records e in place of what was recorded for its interface. After a
// crash either of the two is there, whole.
func (r *Registry) Put(e Entry) error {
	if err := e.check(); err != nil {
		return fmt.Errorf("registry: %w", err)
	}
	b, err := json.MarshalIndent(e, "", "  ")
	if err != nil {
		return fmt.Errorf("registry: %w", err)
	}
	if err := os.MkdirAll(r.dir, 0o700); err != nil {
		return fmt.Errorf("registry: %w", err)
	}
	if err := replaceFile(r.path(e.Interface), append(b, '\n')); err != nil {
		return fmt.Errorf("registry: %w", err)
	}
	return nil
}

// Get returns the entry of an interface. The error is ErrUnknown where there
// is none.
func (r *Registry) Get(iface string) (Entry, error) {
	if err := CheckInterface(iface); err != nil {
		return Entry{}, err
	}
	f, err := os.Open(r.path(iface))
	if errors.Is(err, fs.ErrNotExist) {
		return Entry{}, fmt.Errorf("%s: %w", iface, ErrUnknown)
	}
	if err != nil {
		return Entry{}, fmt.Errorf("registry: %w", err)
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxEntry+1))
	if err != nil {
		return Entry{}, fmt.Errorf("registry: %w", err)
	}
	e, err := decode(b)
	if err == nil && e.Interface != iface {
		err = fmt.Errorf("it is of %q", e.Interface)
	}
	if err != nil {
		return Entry{}, fmt.Errorf("registry: %s: %w", f.Name(), err)
	}
	return e, nil
}

// Interfaces returns the names of all entries, sorted. Reading one of them
// may still fail.
func (r *Registry) Interfaces() ([]string, error) {
	files, err := os.ReadDir(r.dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("registry: %w", err)
	}
	var names []string
	for _, f := range files {
		name, ok := strings.CutSuffix(f.Name(), suffix)
		if ok && CheckInterface(name) == nil {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names, nil
}

// Remove forgets an interface. Removing what is not there is no error.
func (r *Registry) Remove(iface string) error {
	if err := CheckInterface(iface); err != nil {
		return err
	}
	if err := os.Remove(r.path(iface)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("registry: %w", err)
	}
	return nil
}

func decode(b []byte) (Entry, error) {
	if len(b) > maxEntry {
		return Entry{}, fmt.Errorf("more than %d bytes", maxEntry)
	}
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	var e Entry
	if err := d.Decode(&e); err != nil {
		return Entry{}, err
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return Entry{}, errors.New("more than one value")
	}
	return e, e.check()
}

func (e Entry) check() error {
	if err := CheckInterface(e.Interface); err != nil {
		return err
	}
	if !filepath.IsAbs(e.Config) {
		return fmt.Errorf("configuration %q is not an absolute path", e.Config)
	}
	return nil
}

// replaceFile writes a file beside name and renames it into place, each made
// durable before the next step.
func replaceFile(name string, b []byte) error {
	dir := filepath.Dir(name)
	// No suffix: Interfaces must not take it for an entry.
	f, err := os.CreateTemp(dir, "."+filepath.Base(name)+"-*") // mode 0600
	if err != nil {
		return err
	}
	defer os.Remove(f.Name()) // gone after the rename
	_, err = f.Write(b)
	err = errors.Join(err, f.Sync(), f.Close())
	if err != nil {
		return err
	}
	if err := os.Rename(f.Name(), name); err != nil {
		return err
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}
