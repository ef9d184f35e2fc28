package cli

import (
	"bytes"
	"log/slog"
	"net"
	"path/filepath"
	"testing"
)

func TestNotify(t *testing.T) {
	var warnings bytes.Buffer
	log := slog.New(slog.NewTextHandler(&warnings, nil))
	name := filepath.Join(t.TempDir(), "notify")
	l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: name, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	t.Setenv("NOTIFY_SOCKET", name)
	notify(log, "READY=1")
	b := make([]byte, 64)
	n, err := l.Read(b)
	if err != nil || string(b[:n]) != "READY=1" {
		t.Errorf("systemd hears %q, %v", b[:n], err)
	}
	t.Setenv("NOTIFY_SOCKET", "")
	notify(log, "READY=1")
	if warnings.Len() > 0 {
		t.Errorf("without systemd: %s", &warnings)
	}
	t.Setenv("NOTIFY_SOCKET", name+"-gone")
	notify(log, "READY=1")
	if warnings.Len() == 0 {
		t.Error("systemd was not told, and nobody said so")
	}
}
