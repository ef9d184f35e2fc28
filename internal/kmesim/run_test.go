package kmesim_test

import (
	"context"
	"crypto/x509"
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"keyturn/internal/kmesim"
	"keyturn/internal/kms"
	"keyturn/internal/kms/etsi014"
	"keyturn/internal/kms/kmstls"
)

// start runs a pair on loopback until the test ends and returns its URIs.
func start(tb testing.TB, c kmesim.Config) (uriA, uriB string) {
	tb.Helper()
	c.AddrA, c.AddrB = "127.0.0.1:0", "127.0.0.1:0"
	ctx, cancel := context.WithCancel(context.Background())
	ready, done := make(chan struct{}), make(chan error, 1)
	go func() {
		done <- kmesim.Run(ctx, c, func(a, b net.Addr) {
			for uri, at := range map[*string]net.Addr{&uriA: a, &uriB: b} {
				if at != nil { // else it does not run here
					*uri = "https://" + at.String()
				}
			}
			close(ready)
		})
	}()
	select {
	case <-ready:
	case err := <-done:
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			tb.Errorf("Run = %v, want nil at its context's end", err)
		}
	})
	return uriA, uriB
}

// patience is a timeout that no healthy KME exceeds, also on a busy machine.
const patience = 20 * time.Second

// source connects SAE n to a KME, for the keys shared with another SAE.
func source(tb testing.TB, lab *kmesim.Lab, uri string, n, peer int) kms.Source {
	tb.Helper()
	return sourceWithin(tb, patience, lab, uri, n, peer)
}

func sourceWithin(tb testing.TB, timeout time.Duration, lab *kmesim.Lab, uri string, n, peer int) kms.Source {
	tb.Helper()
	return connect(tb, etsi014.Config{
		URIs: []string{uri}, SAE: kmesim.SAEName(n), TLS: kmstls.Config{Memory: lab.ClientTLS(n)}, Timeout: timeout,
	}, peer)
}

func connect(tb testing.TB, c etsi014.Config, peer int) kms.Source {
	tb.Helper()
	k, err := etsi014.New(c)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { k.Close() })
	s, err := k.For(kmesim.SAEName(peer))
	if err != nil {
		tb.Fatal(err)
	}
	return s
}

func newLab(tb testing.TB) *kmesim.Lab {
	tb.Helper()
	lab, err := kmesim.NewLab(kmesim.LabOptions{})
	if err != nil {
		tb.Fatal(err)
	}
	return lab
}

// exchange fetches a key at one end and the same at the other.
func exchange(ctx context.Context, a, b kms.Source) error {
	id, key, err := a.Key(ctx)
	if err != nil {
		return err
	}
	defer key.Wipe()
	got, err := b.KeyByID(ctx, id)
	if err != nil {
		return err
	}
	defer got.Wipe()
	if !got.Equal(key) {
		return errors.New("the ends got different keys")
	}
	return nil
}

// TestFaults drives our own client against each fault of either KME.
func TestFaults(t *testing.T) {
	lab, pair := newLab(t), kmesim.New(kmesim.Options{})
	uriA, uriB := start(t, kmesim.Config{Lab: lab, Pair: pair})
	const soon = 250 * time.Millisecond
	const notFound = `"one or more keys specified are not found on KME"`
	type test struct {
		kme   *kmesim.KME
		fault string
		is    error
		want  string // within the error
	}
	tests := []test{
		{pair.A, "healthy", nil, ""},
		{pair.A, "out-of-keys", kms.ErrNoKeys, `answered 503 "not enough keys stored"`},
		{pair.A, "out-of-keys=404", nil, `answered 404 "not enough keys stored"`},
		{pair.A, "html", nil, "answered 502"},
		{pair.A, "wrong-size", nil, "key has 32 bits, not 256"},
		{pair.A, "wrong-size=512", nil, "key has 512 bits, not 256"},
		{pair.A, "lost", nil, "connection closed before the end of the answer"},
		{pair.A, "slow=10m", nil, "no answer within 250ms"},
		{pair.A, "drip=20ms", nil, "no answer within 250ms"},
		{pair.A, "silent-tls", nil, "no answer within 250ms"},
		{pair.A, "expired", nil, "certificate has expired or is not yet valid"},
		{pair.A, "cut", kms.ErrNoKeys, `answered 503 "the other KME cannot be reached"`},
		{pair.A, "out-of-step", kms.ErrUnknownKey, "answered 400 " + notFound},
		{pair.B, "late", kms.ErrUnknownKey, "answered 400 " + notFound},
		{pair.B, "late=404", kms.ErrUnknownKey, "answered 404 " + notFound},
		{pair.B, "wrong-bytes", nil, "the ends got different keys"},
		{pair.B, "wrong-size", nil, "key has 32 bits, not 256"},
		{pair.B, "wrong-size=264", nil, "key has 264 bits, not 256"},
		{pair.B, "lost", nil, "connection closed before the end of the answer"},
		{pair.B, "drip=20ms", nil, "no answer within 250ms"},
		{pair.B, "drip=1us", nil, ""},
		{pair.B, "silent", nil, "no answer within 250ms"},
		{pair.B, "silent-tls", nil, "no answer within 250ms"},
		{pair.B, "expired", nil, "certificate has expired or is not yet valid"},
		{pair.B, "down", nil, uriB},
		{pair.B, "slow=1ms", nil, ""},
	}
	for _, shape := range kmesim.Shapes() {
		tests = append(tests, test{pair.A, "page=500/" + shape, nil, "answered 500"}, test{pair.B, "page=200/" + shape, nil, uriB})
	}
	for _, tt := range tests {
		f, err := kmesim.ParseFault(tt.fault)
		if err != nil {
			t.Fatal(err)
		}
		// Over new connections: a fault of TLS ends those that it finds.
		// A short timeout for those who will spend it.
		within := [2]time.Duration{patience, patience}
		switch {
		case strings.HasSuffix(tt.want, notFound): // and asked for again
			within[1] = time.Second
		case !strings.HasPrefix(tt.want, "no answer"):
		case tt.kme == pair.A:
			within[0] = soon
		default:
			within[1] = soon
		}
		a, b := sourceWithin(t, within[0], lab, uriA, 1, 2), sourceWithin(t, within[1], lab, uriB, 2, 1)
		tt.kme.SetFault(f)
		err = exchange(t.Context(), a, b)
		tt.kme.SetFault(kmesim.Fault{})
		if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
			t.Errorf("%s: %v, want %q", tt.fault, err, tt.want)
		}
		if tt.is != nil && !errors.Is(err, tt.is) {
			t.Errorf("%s: %v is not %v", tt.fault, err, tt.is)
		}
		if within != [2]time.Duration{patience, patience} {
			a, b = source(t, lab, uriA, 1, 2), source(t, lab, uriB, 2, 1)
		}
		if err := exchange(t.Context(), a, b); err != nil {
			t.Errorf("healed after %s: %v", tt.fault, err)
		}
	}
	if s, err := source(t, lab, uriA, 1, 2).Status(t.Context()); err != nil || s.SourceKME != kmesim.NameA || s.SlaveSAE != "sae_002" {
		t.Errorf("status %+v, %v", s, err)
	}
}

// TestKeptConnections: a fault of TLS ends the connections that it finds, so that
// it is met at the latest by the second request.
func TestKeptConnections(t *testing.T) {
	lab, pair := newLab(t), kmesim.New(kmesim.Options{})
	uriA, _ := start(t, kmesim.Config{Lab: lab, Pair: pair})
	for _, kind := range []kmesim.FaultKind{kmesim.Expired, kmesim.SilentTLS, kmesim.Down} {
		s := sourceWithin(t, time.Second, lab, uriA, 1, 2)
		pair.A.SetFault(kmesim.Fault{})
		if _, err := s.Status(t.Context()); err != nil {
			t.Fatal(err)
		}
		pair.A.SetFault(kmesim.Fault{Kind: kind})
		for i := range 2 {
			if _, err := s.Status(t.Context()); err == nil {
				t.Errorf("%v: request %d was answered", kind, i+1)
			}
		}
	}
}

// TestStrangers: a certificate of another laboratory gets no answer, and an SAE
// no key of others.
func TestStrangers(t *testing.T) {
	lab := newLab(t)
	uriA, uriB := start(t, kmesim.Config{Lab: lab})
	other := newLab(t)
	conf := lab.ClientTLS(1)
	conf.Certificates = other.ClientTLS(1).Certificates
	s := connect(t, etsi014.Config{URIs: []string{uriA}, SAE: "sae_001", TLS: kmstls.Config{Memory: conf}}, 2)
	if _, _, err := s.Key(t.Context()); !errors.Is(err, kms.ErrRefused) {
		t.Errorf("foreign certificate: %v, want ErrRefused", err)
	}

	conf = lab.ClientTLS(1)
	conf.Certificates = lab.KMEs[1:]
	s = connect(t, etsi014.Config{URIs: []string{uriA}, SAE: "kme-b", TLS: kmstls.Config{Memory: conf}}, 2)
	if _, _, err := s.Key(t.Context()); !errors.Is(err, kms.ErrRefused) {
		t.Errorf("a KME: %v, want ErrRefused", err)
	}

	id, _, err := source(t, lab, uriA, 1, 2).Key(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := source(t, lab, uriB, 1, 2).KeyByID(t.Context(), id); !errors.Is(err, kms.ErrRefused) {
		t.Errorf("an SAE that is not named: %v, want ErrRefused", err)
	}
}

// TestDirectory goes the way of an operator: write the certificates, start the
// pair on them, point both ends at the files.
func TestDirectory(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "lab")
	if err := kmesim.WriteLab(dir, kmesim.LabOptions{SAEs: 3, Names: []string{"kms.example.org", "192.0.2.1"}}); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"root", "kme-a", "kme-b", "sae_001", "sae_002", "sae_003"} {
		if i, err := os.Stat(filepath.Join(dir, name+".key")); err != nil || i.Mode() != 0o600 {
			t.Errorf("%s.key: %v, %v", name, i.Mode(), err)
		}
	}
	uriA, uriB := start(t, kmesim.Config{Dir: dir})
	file := func(name string) string { return filepath.Join(dir, name) }
	ends := make([]kms.Source, 2)
	for i, uri := range []string{uriA, uriB} {
		name := kmesim.SAEName(i + 1)
		ends[i] = connect(t, etsi014.Config{
			URIs: []string{uri + "/api/v1/keys"}, SAE: name, Method: "POST",
			TLS: kmstls.Config{
				Certificate: file(name + ".crt"), SecretKey: file(name + ".key"), RootCertificate: file("root.crt"),
				ServerName: []string{"kms.example.org", "kme-b"}[i],
			},
		}, 2-i)
	}
	if err := exchange(t.Context(), ends[0], ends[1]); err != nil {
		t.Error(err)
	}

	// Nothing is overwritten, and nothing new is mixed in.
	before, err := os.ReadFile(file("kme-b.key"))
	if err != nil {
		t.Fatal(err)
	}
	err = kmesim.WriteLab(dir, kmesim.LabOptions{SAEs: 4})
	if !errors.Is(err, fs.ErrExist) || !strings.Contains(err.Error(), file("root.crt")) {
		t.Errorf("second time: %v, want the name of the file in the way", err)
	}
	if after, err := os.ReadFile(file("kme-b.key")); err != nil || string(after) != string(before) {
		t.Error("a key was overwritten")
	}
	if _, err := os.Lstat(file("sae_004.key")); !errors.Is(err, fs.ErrNotExist) {
		t.Error("a key of the second laboratory was written")
	}
}

func TestLab(t *testing.T) {
	lab, err := kmesim.NewLab(kmesim.LabOptions{SAEs: 1, Names: []string{"kms.example.org", "2001:db8::1"}})
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(lab.Root)
	for _, k := range lab.KMEs {
		for _, host := range []string{"localhost", "127.0.0.1", "::1", "kme-a", "kme-b", "kms.example.org", "2001:db8::1"} {
			if err := k.Leaf.VerifyHostname(host); err != nil {
				t.Error(err)
			}
		}
		in := x509.VerifyOptions{Roots: roots, CurrentTime: time.Now().AddDate(9, 11, 0)}
		if _, err := k.Leaf.Verify(in); err != nil {
			t.Error(err)
		}
	}
	if got := lab.SAEs[0].Leaf.Subject.CommonName; got != "sae_001" {
		t.Errorf("common name %q", got)
	}
	for _, o := range []kmesim.LabOptions{{SAEs: -1}, {SAEs: kmesim.MaxLabSAEs + 1}, {Names: []string{"a b"}}, {Names: []string{""}}} {
		if _, err := kmesim.NewLab(o); err == nil {
			t.Errorf("%+v: no error", o)
		}
	}
}

func TestRunRefuses(t *testing.T) {
	lab := newLab(t)
	dir := t.TempDir()
	if err := lab.Write(dir); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(filepath.Join(dir, "kme-b.key"), 0o640); err != nil {
		t.Fatal(err)
	}
	withoutRoot, expired := t.TempDir(), kmesim.New(kmesim.Options{})
	if err := lab.Write(withoutRoot); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(withoutRoot, "root.key")); err != nil {
		t.Fatal(err)
	}
	expired.B.SetFault(kmesim.Fault{Kind: kmesim.Expired})
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	for _, tt := range []struct {
		c    kmesim.Config
		want string
	}{
		{kmesim.Config{}, "certificates are given by a directory or in memory, one of them"},
		{kmesim.Config{Dir: dir, Lab: lab}, "certificates are given by a directory or in memory, one of them"},
		{kmesim.Config{Lab: lab, Only: "kme-c", Link: "127.0.0.1:0", Peer: "127.0.0.1:1"}, `"kme-c" is neither kme-a nor kme-b`},
		{kmesim.Config{Lab: lab, Peer: "127.0.0.1:1"}, `"" is neither kme-a nor kme-b`},
		{kmesim.Config{Lab: lab, Only: "kme-a", Link: "127.0.0.1:0"}, "one KME of two needs an address for its link, and that of the other one's"},
		{kmesim.Config{Dir: withoutRoot, Pair: expired}, "the laboratory's root.key is not here to sign a certificate that has expired"},
		{kmesim.Config{Dir: dir}, filepath.Join(dir, "kme-b.key") + ": mode 0640 lets others at it"},
		{kmesim.Config{Dir: filepath.Join(dir, "none")}, "open " + filepath.Join(dir, "none", "root.crt") + ": no such file or directory"},
		{kmesim.Config{Lab: lab, AddrA: "127.0.0.1:0", AddrB: taken.Addr().String()},
			"listen tcp " + taken.Addr().String() + ": bind: address already in use"},
	} {
		err := kmesim.Run(t.Context(), tt.c, func(net.Addr, net.Addr) { t.Error("ready") })
		if err == nil || err.Error() != tt.want {
			t.Errorf("got %v\nwant %s", err, tt.want)
		}
	}
}

// startTwo runs kme-a and kme-b as two processes would, on loopback, until the
// test ends, and returns their URIs.
func startTwo(tb testing.TB, lab *kmesim.Lab) (uriA, uriB string) {
	tb.Helper()
	linkA, linkB := freeAddress(tb), freeAddress(tb)
	uriA, _ = start(tb, kmesim.Config{Lab: lab, Only: kmesim.NameA, Link: linkA, Peer: linkB})
	_, uriB = start(tb, kmesim.Config{Lab: lab, Only: kmesim.NameB, Link: linkB, Peer: linkA})
	return uriA, uriB
}

// freeAddress returns an address that was free a moment ago.
func freeAddress(tb testing.TB) string {
	tb.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		tb.Fatal(err)
	}
	defer ln.Close()
	return ln.Addr().String()
}

func TestTwoProcesses(t *testing.T) {
	lab := newLab(t)
	uriA, uriB := startTwo(t, lab)
	a, b := source(t, lab, uriA, 1, 2), source(t, lab, uriB, 2, 1)
	for _, ends := range [][2]kms.Source{{a, b}, {b, a}} {
		if err := exchange(t.Context(), ends[0], ends[1]); err != nil {
			t.Error(err)
		}
	}
}

// BenchmarkKeys measures keys that both ends have fetched, over kept
// connections with mutual TLS, by several rounds at a time; both ends and both
// KMEs share the machine, also where they are as two processes would be.
func BenchmarkKeys(b *testing.B) {
	lab := newLab(b)
	for _, bb := range []struct {
		name  string
		start func(testing.TB) (uriA, uriB string)
	}{
		{"process=one", func(tb testing.TB) (string, string) { return start(tb, kmesim.Config{Lab: lab}) }},
		{"process=one/pool=fills", func(tb testing.TB) (string, string) {
			return start(tb, kmesim.Config{Lab: lab, Options: kmesim.Options{Rate: kmesim.MaxRate}})
		}},
		{"process=two", func(tb testing.TB) (string, string) { return startTwo(tb, lab) }},
	} {
		b.Run(bb.name, func(b *testing.B) {
			uriA, uriB := bb.start(b)
			benchmarkKeys(b, source(b, lab, uriA, 1, 2), source(b, lab, uriB, 2, 1))
		})
	}
}

func benchmarkKeys(b *testing.B, master, slave kms.Source) {
	b.ReportAllocs()
	b.SetParallelism(4)
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			if err := exchange(context.Background(), master, slave); err != nil {
				b.Error(err)
				return
			}
		}
	})
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "keys/s")
}
