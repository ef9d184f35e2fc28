package kmesim

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
)

func TestCreateOverwritesNothing(t *testing.T) {
	path := filepath.Join(t.TempDir(), "key")
	if err := create(path, 0o600, []byte("first")); err != nil {
		t.Fatal(err)
	}
	if err := create(path, 0o600, []byte("second")); !errors.Is(err, fs.ErrExist) {
		t.Errorf("got %v, want ErrExist", err)
	}
	if b, err := os.ReadFile(path); err != nil || string(b) != "first" {
		t.Errorf("file holds %q, %v", b, err)
	}
}
