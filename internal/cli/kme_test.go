package cli

import (
	"bufio"
	"bytes"
	"context"
	"encoding/base64"
	"io"
	"net"
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

// TestKmeAdmin: the commands reach a running pair and say what they did.
func TestKmeAdmin(t *testing.T) {
	lab := filepath.Join(t.TempDir(), "lab")
	if err := kmesim.WriteLab(lab, kmesim.LabOptions{}); err != nil {
		t.Fatal(err)
	}
	uris, stop := runKme(t, io.Discard, "--dir", lab, "--rate", "0.01", "--pool", "3", "--streams", "forge-ed3,a=127.0.0.1:0")
	defer stop()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	source := laboratorySource(t, lab, uris[0], 1, 2)
	if _, _, err := source.Key(ctx); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		args []string
		want string // the output, or within the error
		ok   bool
	}{
		{[]string{"state", "--dir", lab}, `KME    FAULT    MADE  DELIVERED  REFUSED  WAITING     LINK
kme-a  healthy  1     0          0        0 of 65536  up
kme-b  healthy  0     0          0        1 of 65536  up

0.01 keys a second into each pool of 3 keys

KME    MASTER   SLAVE    STORED  MADE
kme-a  sae_001  sae_002  2 of 3  1
`, true},
		{[]string{"fault", "--dir", lab, "a", "out-of-keys,times=1"}, "kme-a: out-of-keys,times=1\nkme-b: healthy\n", true},
		{[]string{"fault", "--admin", filepath.Join(lab, "kme.sock"), "both", "healthy"}, "kme-a: healthy\nkme-b: healthy\n", true},
		{[]string{"drain", "--dir", lab, "both"}, "", true},
		{[]string{"rate", "--dir", lab, "0.5", "--pool", "7"}, "0.5 keys a second into each pool of 7 keys\n", true},
		{[]string{"rate", "--dir", lab, "0"}, "keys without limit\n", true},
		{[]string{"rate", "--dir", lab, "fast"}, `"fast" is not a number of keys a second`, false},
		{[]string{"rate", "--dir", lab, "--", "-1"}, "rate is not 0", false},
		{[]string{"fault", "--dir", lab, "c", "slow=1s"}, `"c" is none of a, b, both`, false},
		{[]string{"fault", "--dir", lab, "a", "slow"}, "slow needs a delay", false},
		{[]string{"fault", "a", "healthy"}, "--dir or --admin is missing", false},
		{[]string{"state", "--dir", t.TempDir()}, "no simulator runs here that has any KME", false},
		{[]string{"state", "--admin", "/nowhere"}, "no simulator answers on /nowhere", false},
	} {
		root := newRoot()
		var out bytes.Buffer
		root.SetArgs(append([]string{"kme"}, tt.args...))
		root.SetOut(&out)
		err := root.ExecuteContext(ctx)
		switch {
		case tt.ok && (err != nil || out.String() != tt.want):
			t.Errorf("%v: %v\n%s\nwant\n%s", tt.args, err, &out, tt.want)
		case !tt.ok && (err == nil || !strings.Contains(err.Error(), tt.want)):
			t.Errorf("%v: %v, want %s", tt.args, err, tt.want)
		}
	}
}

// TestKmeTwo: two commands, as on two hosts, share keys over their link, and one
// admin command reaches both.
func TestKmeTwo(t *testing.T) {
	lab := filepath.Join(t.TempDir(), "lab")
	if err := kmesim.WriteLab(lab, kmesim.LabOptions{}); err != nil {
		t.Fatal(err)
	}
	links := [2]string{freeAddress(t), freeAddress(t)}
	var uris [2]string
	var stops [2]func()
	defer func() {
		for _, stop := range stops {
			if stop != nil {
				stop()
			}
		}
	}()
	for i, name := range []string{kmesim.NameA, kmesim.NameB} {
		letter := string(rune('a' + i))
		var found []string
		found, stops[i] = runKmes(t, io.Discard, []string{name}, "--dir", lab, "--kme", letter, "--"+letter, "127.0.0.1:0",
			"--link", links[i], "--peer", links[1-i])
		uris[i] = found[0]
	}
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	id, key, err := laboratorySource(t, lab, uris[0], 1, 2).Key(ctx)
	if err != nil {
		t.Fatal(err)
	}
	same, err := laboratorySource(t, lab, uris[1], 2, 1).KeyByID(ctx, id)
	if err != nil || !same.Equal(key) {
		t.Errorf("%v, or another key", err)
	}
	root := newRoot()
	var out bytes.Buffer
	root.SetArgs([]string{"kme", "fault", "--dir", lab, "both", "late"})
	root.SetOut(&out)
	if err := root.ExecuteContext(ctx); err != nil || out.String() != "kme-a: late\nkme-b: late\n" {
		t.Errorf("%v\n%s", err, &out)
	}
}

// freeAddress returns an address that was free a moment ago.
func freeAddress(t *testing.T) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	return ln.Addr().String()
}

// runKme runs the command until stop is called, and returns where kme-a and
// kme-b are.
func runKme(t *testing.T, log io.Writer, args ...string) (uris []string, stop func()) {
	t.Helper()
	return runKmes(t, log, []string{kmesim.NameA, kmesim.NameB}, append([]string{"--a", "127.0.0.1:0", "--b", "127.0.0.1:0"}, args...)...)
}

// runKmes does so for those KMEs that args make run.
func runKmes(t *testing.T, log io.Writer, names []string, args ...string) (uris []string, stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	read, write := io.Pipe()
	root := newRoot()
	root.SetArgs(append([]string{"kme"}, args...))
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
	for i, name := range names {
		if !lines.Scan() {
			t.Fatal(lines.Err())
		}
		uri, ok := strings.CutPrefix(lines.Text(), name+": ")
		if !ok {
			t.Fatalf("line %d is %q", i+1, lines.Text())
		}
		uris = append(uris, uri)
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
