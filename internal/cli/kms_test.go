package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"keyturn/internal/kmesim"
)

// laboratory runs a pair of KMEs on loopback and writes both ends'
// configurations, of nothing but kms blocks: by an interface or, for 004, a
// dialect.
func laboratory(t *testing.T, speak string) (pair *kmesim.Pair, here, there string) {
	t.Helper()
	dir := t.TempDir()
	if err := kmesim.WriteLab(dir, kmesim.LabOptions{}); err != nil {
		t.Fatal(err)
	}
	pair = kmesim.New(kmesim.Options{})
	ctx, cancel := context.WithCancel(context.Background())
	ready, done := make(chan [2]net.Addr, 1), make(chan error, 1)
	conf := kmesim.Config{AddrA: "127.0.0.1:0", AddrB: "127.0.0.1:0", Dir: dir, Pair: pair}
	listening := func(a, b net.Addr) { ready <- [2]net.Addr{a, b} }
	is, scheme := "interface: "+speak, "https://"
	if dialect, err := kmesim.ParseDialect(speak); err == nil {
		conf.Streams = []kmesim.StreamPort{{
			StreamOptions: kmesim.StreamOptions{Dialect: dialect}, AddrA: "127.0.0.1:0", AddrB: "127.0.0.1:0", Listening: listening,
		}}
		listening = nil
		is, scheme = "interface: 4\n  dialect: "+speak, ""
	}
	go func() { done <- kmesim.Run(ctx, conf, listening) }()
	var at [2]net.Addr
	select {
	case at = <-ready:
	case err := <-done:
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	var paths [2]string
	for i := range at {
		sae := kmesim.SAEName(i + 1)
		text := fmt.Sprintf("kms:\n  %s\n  uri: %s%s\n  sae: %s\n  certificate: %s.crt\n  secret_key: %s.key\n  root_certificate: root.crt\n",
			is, scheme, at[i], sae, sae, sae)
		paths[i] = filepath.Join(dir, fmt.Sprintf("end%d.yaml", i))
		if err := os.WriteFile(paths[i], []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return pair, paths[0], paths[1]
}

// inProcess runs a command line in this process.
func inProcess(t *testing.T, args ...string) (stdout string, err error) {
	t.Helper()
	var out bytes.Buffer
	root := newRoot()
	root.SetOut(&out)
	root.SetArgs(args)
	err = root.ExecuteContext(t.Context())
	return out.String(), err
}

func TestKmsTest(t *testing.T) {
	for _, speak := range []string{"14", "skip", "forge-ed3", "forge-ed1"} {
		t.Run(speak, func(t *testing.T) {
			pair, here, there := laboratory(t, speak)
			page, err := inProcess(t, "kms", "test", here, there)
			if err != nil {
				t.Fatalf("%v\n%s", err, page)
			}
			if !strings.Contains(page, "0 wrong; nothing that keyturn needs (*) is wrong\n") {
				t.Error(page)
			}

			pair.B.SetFault(kmesim.Fault{Kind: kmesim.WrongBytes})
			page, err = inProcess(t, "kms", "test", here, there, "--json")
			if exitCode(err) != exitFailed {
				t.Errorf("exit code %d after %v", exitCode(err), err)
			}
			var report struct {
				OK        bool
				KeysTaken int `json:"keys_taken"`
				Lines     []struct {
					Clause, What, Verdict string
					Needed                bool
				}
			}
			if err := json.Unmarshal([]byte(page), &report); err != nil {
				t.Fatal(err)
			}
			needed := 0
			for _, l := range report.Lines {
				if l.Needed && l.Verdict == "wrong" && l.Clause != "" {
					needed++
				}
			}
			if report.OK || needed == 0 || report.KeysTaken == 0 {
				t.Errorf("ok is %v with %d wrong and %d keys taken", report.OK, needed, report.KeysTaken)
			}
		})
	}
}
