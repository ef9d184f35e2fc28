package cli

import (
	"bufio"
	"bytes"
	"context"
	"encoding/base64"
	"io"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"keyturn/internal/kmesim"
	"keyturn/internal/kms"
	"keyturn/internal/kms/etsi014"
	"keyturn/internal/kms/kmstls"
)

// TestKme: the pair listens where it says, an SAE gets a key at one end and
// its peer the same at the other, a fault is one, and no key is printed.
func TestKme(t *testing.T) {
	lab := filepath.Join(t.TempDir(), "lab")
	if err := kmesim.WriteLab(lab, kmesim.LabOptions{}); err != nil {
		t.Fatal(err)
	}
	var log bytes.Buffer
	uris, stop := runKme(t, &log, "--dir", lab, "--verbose")
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	id, key, err := laboratorySource(t, lab, uris[0], 1, 2).Key(ctx)
	if err != nil {
		t.Fatal(err)
	}
	same, err := laboratorySource(t, lab, uris[1], 2, 1).KeyByID(ctx, id)
	if err != nil {
		t.Fatal(err)
	}
	if !same.Equal(key) {
		t.Error("the KMEs handed out different keys")
	}
	stop()
	if text := log.String(); !strings.Contains(text, "keys delivered") || strings.Contains(text, base64.StdEncoding.EncodeToString(key.Bytes())) {
		t.Error("the log does not tell the delivery, or tells the key")
	}

	uris, stop = runKme(t, io.Discard, "--dir", lab, "--fault-a", "out-of-keys")
	defer stop()
	if _, _, err := laboratorySource(t, lab, uris[0], 1, 2).Key(ctx); err == nil {
		t.Error("a KME that is out of keys handed one out")
	}
}

// runKme runs the command until stop is called, and returns where kme-a and
// kme-b are.
func runKme(t *testing.T, log io.Writer, args ...string) (uris [2]string, stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	read, write := io.Pipe()
	root := newRoot()
	root.SetArgs(append([]string{"kme", "--a", "127.0.0.1:0", "--b", "127.0.0.1:0"}, args...))
	root.SetOut(write)
	root.SetErr(log)
	ended := make(chan error, 1)
	go func() {
		err := root.ExecuteContext(ctx)
		write.CloseWithError(err)
		ended <- err
	}()
	stop = func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}
	lines := bufio.NewScanner(read)
	for i, name := range []string{kmesim.NameA, kmesim.NameB} {
		if !lines.Scan() {
			t.Fatal(lines.Err())
		}
		uri, ok := strings.CutPrefix(lines.Text(), name+": ")
		if !ok {
			t.Fatalf("line %d is %q", i+1, lines.Text())
		}
		uris[i] = uri
	}
	go func() { _, _ = io.Copy(io.Discard, read) }()
	return uris, stop
}

// laboratorySource is SAE n of a laboratory, for the keys shared with another.
func laboratorySource(t *testing.T, lab, uri string, n, peer int) kms.Source {
	t.Helper()
	file := func(name string) string { return filepath.Join(lab, name) }
	name := kmesim.SAEName(n)
	system, err := etsi014.New(etsi014.Config{
		URIs: []string{uri}, SAE: name,
		TLS:    kmstls.Config{Certificate: file(name + ".crt"), SecretKey: file(name + ".key"), RootCertificate: file("root.crt")},
		Method: "GET", Timeout: 5 * time.Second,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { system.Close() })
	source, err := system.For(kmesim.SAEName(peer))
	if err != nil {
		t.Fatal(err)
	}
	return source
}
