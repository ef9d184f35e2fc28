package cli

import (
	"io"
	"log"
	"os"
	"testing"
)

// TestMainSilencesLog: net/http writes foreign bytes through package log, and
// they may be a key's.
func TestMainSilencesLog(t *testing.T) {
	args, out := os.Args, os.Stdout
	defer func() { os.Args, os.Stdout = args, out }()
	null, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	os.Args, os.Stdout = []string{"keyturn", "version"}, null
	log.SetOutput(os.Stderr)
	if code := Main(); code != 0 || log.Writer() != io.Discard {
		t.Errorf("exit %d, log goes to %T", code, log.Writer())
	}
}
