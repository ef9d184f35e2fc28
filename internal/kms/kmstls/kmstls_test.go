package kmstls_test

import (
	"bytes"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"

	"keyturn/internal/kms/kmstls"
	"keyturn/internal/memnet"
	"keyturn/internal/testca"
)

// shake makes a handshake with a KMS of the host name kme-a. It returns the
// common name by which the KMS knows the client, and what the client says.
func shake(t *testing.T, client, server *tls.Config) (user string, err error) {
	t.Helper()
	var n memnet.Network
	l, err := n.Listen("kms")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	served := make(chan string)
	go func() {
		conn, err := l.Accept()
		if err != nil {
			served <- ""
			return
		}
		defer conn.Close()
		s := tls.Server(conn, server)
		if err := s.HandshakeContext(t.Context()); err != nil || len(s.ConnectionState().PeerCertificates) == 0 {
			served <- ""
			return
		}
		served <- s.ConnectionState().PeerCertificates[0].Subject.CommonName
	}()
	conn, err := n.Dial(t.Context(), "tcp", "kms")
	if err != nil {
		t.Fatal(err)
	}
	client = client.Clone()
	if client.ServerName == "" {
		client.ServerName = "kme-a" // as net/http does
	}
	err = tls.Client(conn, client).HandshakeContext(t.Context())
	if err != nil {
		conn.Close()
	}
	user = <-served
	conn.Close()
	return user, err
}

// server is the TLS side of a KMS that insists on certificates of ca.
func server(ca *testca.Authority, certificate tls.Certificate) *tls.Config {
	return &tls.Config{
		Certificates: []tls.Certificate{certificate},
		ClientAuth:   tls.RequireAndVerifyClientCert,
		ClientCAs:    ca.Pool(),
	}
}

// TestVerification: which certificates of a KMS are good enough, by its host
// name (kme-a), by server_name, and by pins.
func TestVerification(t *testing.T) {
	ca, foreign := testca.New(t, "root"), testca.New(t, "foreign root")
	bare := func(name string) tls.Certificate {
		return ca.Issue(x509.Certificate{Subject: pkix.Name{CommonName: name}})
	}
	expired := ca.Issue(x509.Certificate{
		DNSNames: []string{"kme-a"}, NotAfter: time.Date(1999, 6, 1, 0, 0, 0, 0, time.UTC),
	})
	intermediate := &testca.Authority{}
	*intermediate = *ca
	intermediate.Root = ca.Issue(x509.Certificate{
		Subject: pkix.Name{CommonName: "intermediate"}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	})
	below := intermediate.Server("kme-a")
	chain := below
	chain.Certificate = append(chain.Certificate, intermediate.Root.Certificate[0])

	a, b, other := ca.Server("kme-a"), ca.Server("kme-b"), ca.Server("kme-a")
	pin := func(certs ...tls.Certificate) (pins []kmstls.Pin) {
		for _, c := range certs {
			pins = append(pins, kmstls.PinOf(c.Leaf))
		}
		return pins
	}
	unpinned := func(c tls.Certificate) string {
		return "certificate's key has the pin " + kmstls.PinOf(c.Leaf).String() + ", which is none of those configured"
	}
	stranger, nameless := foreign.Server("kme-a"), bare("kme-z")
	const (
		unknown   = "x509: certificate signed by unknown authority"
		notServer = "x509: certificate specifies an incompatible key usage"
	)
	for _, tt := range []struct {
		name        string
		certificate tls.Certificate
		serverName  string
		pins        []kmstls.Pin
		want        string // error, or empty
	}{
		{"right host name", a, "", nil, ""},
		{"other host name", b, "", nil, "x509: certificate is valid for kme-b, not kme-a"},
		{"foreign root", stranger, "", nil, unknown},
		{"a client's certificate", ca.Client("kme-a"), "", nil, "x509: certificate relies on legacy Common Name field, use SANs instead"},
		{"no SAN", bare("kme-a"), "", nil, "x509: certificate relies on legacy Common Name field, use SANs instead"},
		{"with its intermediate", chain, "", nil, ""},
		{"without its intermediate", below, "", nil, unknown},

		{"server_name", b, "kme-b", nil, ""},
		{"other server_name", a, "kme-b", nil, "x509: certificate is valid for kme-a, not kme-b"},
		{"server_name, no SAN", bare("KME-A"), "kme-a", nil, ""},
		{"other server_name, no SAN", bare("kme-a"), "kme-b", nil, `certificate is for "kme-a", not "kme-b"`},
		{"server_name is the common name beside a SAN", a, "server", nil, "x509: certificate is valid for kme-a, not server"},
		{"server_name, foreign root", stranger, "kme-a", nil, unknown},
		{"server_name, expired", expired, "kme-a", nil,
			"x509: certificate has expired or is not yet valid: current time 2000-01-01T00:00:00Z is after 1999-06-01T00:00:00Z"},
		{"server_name, a client's certificate", ca.Client("kme-a"), "kme-a", nil, notServer},
		{"server_name, with its intermediate", chain, "kme-a", nil, ""},

		{"pin", a, "", pin(a), ""},
		{"pin instead of the host name", b, "", pin(b), ""},
		{"pin, no SAN", nameless, "", pin(nameless), ""},
		{"second pin", a, "", pin(other, a), ""},
		{"another key of the same name", other, "", pin(a), unpinned(other)},
		{"pin of the root", a, "", pin(ca.Root), unpinned(a)},
		{"pin of the intermediate", chain, "", pin(intermediate.Root), unpinned(chain)},
		{"pin, foreign root", stranger, "", pin(stranger), unknown},
		{"pin, expired", expired, "", pin(expired),
			"x509: certificate has expired or is not yet valid: current time 2000-01-01T00:00:00Z is after 1999-06-01T00:00:00Z"},
		{"pin and server_name", b, "kme-b", pin(b), ""},
		{"pin and another server_name", b, "kme-c", pin(b), "x509: certificate is valid for kme-b, not kme-c"},
		{"another pin and server_name", b, "kme-b", pin(a), unpinned(b)},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { // whose clock stands in the year 2000
				t.Setenv("TZ", "UTC")
				conf, err := kmstls.Config{
					Memory:     &tls.Config{RootCAs: ca.Pool(), Certificates: []tls.Certificate{ca.Client("sae_001")}},
					ServerName: tt.serverName, Pins: tt.pins,
				}.Client(tls.VersionTLS12)
				if err != nil {
					t.Fatal(err)
				}
				user, err := shake(t, conf, server(ca, tt.certificate))
				if tt.want == "" {
					if err != nil || user != "sae_001" {
						t.Errorf("got %v as %q", err, user)
					}
					return
				}
				cv, ok := errors.AsType[*tls.CertificateVerificationError](err)
				if !ok || cv.Err.Error() != tt.want {
					t.Errorf("\n got %v\nwant %s", err, tt.want)
				}
			})
		})
	}
}

// TestVersions: the lowest version is that of the interface, unless a program
// wants a higher one.
func TestVersions(t *testing.T) {
	ca := testca.New(t, "root")
	for _, tt := range []struct {
		least, memory, kms uint16
		ok                 bool
	}{
		{tls.VersionTLS12, 0, tls.VersionTLS12, true},
		{tls.VersionTLS12, 0, tls.VersionTLS11, false},
		{tls.VersionTLS12, tls.VersionTLS10, tls.VersionTLS11, false},
		{tls.VersionTLS13, 0, tls.VersionTLS12, false},
		{tls.VersionTLS12, tls.VersionTLS13, tls.VersionTLS12, false},
	} {
		conf, err := kmstls.Config{Memory: &tls.Config{
			RootCAs: ca.Pool(), Certificates: []tls.Certificate{ca.Client("sae_001")}, MinVersion: tt.memory,
		}}.Client(tt.least)
		if err != nil {
			t.Fatal(err)
		}
		kms := server(ca, ca.Server("kme-a"))
		kms.MinVersion, kms.MaxVersion = tls.VersionTLS10, tt.kms
		if _, err := shake(t, conf, kms); (err == nil) != tt.ok {
			t.Errorf("at least %x, the KMS speaks %x: %v", tt.least, tt.kms, err)
		}
	}
}

// TestPinIsTheHashOfThePublicKey: as `openssl x509 -pubkey | openssl pkey
// -pubin -outform der | openssl dgst -sha256 -binary | base64` gives it.
func TestPinIsTheHashOfThePublicKey(t *testing.T) {
	leaf := testca.New(t, "root").Server("kme-a").Leaf
	der, err := x509.MarshalPKIXPublicKey(leaf.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(der)
	if got, want := kmstls.PinOf(leaf).String(), base64.StdEncoding.EncodeToString(sum[:]); got != want {
		t.Errorf("pin %s, want %s", got, want)
	}
}

// makeAlike gives two PEM files of about the same length the same size and time.
func makeAlike(t *testing.T, paths ...string) {
	t.Helper()
	for _, path := range paths {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		b = append(b, bytes.Repeat([]byte("\n"), 2000-len(b))...)
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chtimes(path, time.Time{}, time.Unix(1, 0)); err != nil {
			t.Fatal(err)
		}
	}
}

// TestRenewal replaces the client's certificate step by step: each step has the
// name under which the KMS then knows us, or an error.
func TestRenewal(t *testing.T) {
	type files struct{ certificate, secretKey string }
	replace := func(t *testing.T, from, to string) {
		t.Helper()
		if err := os.Rename(from, to); err != nil {
			t.Fatal(err)
		}
	}
	// rewrite keeps the file and changes what is in it.
	rewrite := func(t *testing.T, from, to string) {
		t.Helper()
		b, err := os.ReadFile(from)
		if err == nil {
			err = os.WriteFile(to, b, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	type step struct {
		do   func(t *testing.T, current, renewed files)
		want string // name, or empty for an error
	}
	certificate := func(t *testing.T, c, r files) { replace(t, r.certificate, c.certificate) }
	secretKey := func(t *testing.T, c, r files) { replace(t, r.secretKey, c.secretKey) }
	expire := func(t *testing.T, _, _ files) { time.Sleep(48 * time.Hour) } // virtual
	for _, tt := range []struct {
		name  string
		steps []step
	}{
		{"certificate, then key", []step{{certificate, "old"}, {secretKey, "new"}}},
		{"key, then certificate", []step{{secretKey, "old"}, {certificate, "new"}}},
		{"in place", []step{
			{func(t *testing.T, c, r files) { rewrite(t, r.secretKey, c.secretKey) }, "old"},
			{func(t *testing.T, c, r files) { rewrite(t, r.certificate, c.certificate) }, "new"},
		}},
		{"half, until the old one expires", []step{{certificate, "old"}, {expire, ""}, {secretKey, "new"}}},
		{"gone for a while", []step{
			{func(t *testing.T, c, _ files) { replace(t, c.secretKey, c.secretKey+".away") }, "old"},
			{func(t *testing.T, c, _ files) { replace(t, c.secretKey+".away", c.secretKey) }, "old"},
			{certificate, "old"},
			{secretKey, "new"},
		}},
		{"a key that others can read", []step{
			{func(t *testing.T, c, r files) {
				certificate(t, c, r)
				if err := os.Chmod(r.secretKey, 0o644); err != nil {
					t.Fatal(err)
				}
				secretKey(t, c, r)
			}, "old"},
			{expire, ""},
			{func(t *testing.T, c, _ files) {
				if err := os.Chmod(c.secretKey, 0o400); err != nil {
					t.Fatal(err)
				}
			}, "new"},
		}},
		{"of the same size and time", []step{
			{func(t *testing.T, c, r files) { makeAlike(t, c.certificate, r.certificate) }, "old"},
			{certificate, "old"},
			{secretKey, "new"},
		}},
		{"never", []step{{func(*testing.T, files, files) {}, "old"}}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ca, dir := testca.New(t, "root"), t.TempDir()
				root, _ := testca.Write(t, dir, "root", ca.Root)
				var current, renewed files
				current.certificate, current.secretKey = testca.Write(t, dir, "sae", ca.Issue(x509.Certificate{
					Subject: pkix.Name{CommonName: "old"}, NotAfter: time.Now().Add(24 * time.Hour),
				}))
				renewed.certificate, renewed.secretKey = testca.Write(t, dir, "new", ca.Client("new"))
				conf, err := kmstls.Config{
					Certificate: current.certificate, SecretKey: current.secretKey, RootCertificate: root,
				}.Client(tls.VersionTLS12)
				if err != nil {
					t.Fatal(err)
				}
				kms := server(ca, ca.Server("kme-a"))
				if user, err := shake(t, conf, kms); err != nil || user != "old" {
					t.Fatalf("at first: %q, %v", user, err)
				}
				for i, s := range tt.steps {
					s.do(t, current, renewed)
					user, err := shake(t, conf, kms)
					if user != s.want || (err == nil) != (s.want != "") {
						t.Errorf("step %d: the KMS knows us as %q (%v), want %q", i+1, user, err, s.want)
					}
				}
			})
		})
	}
}

// TestClientRefuses gives each wrong configuration and its exact error.
func TestClientRefuses(t *testing.T) {
	dir, ca := t.TempDir(), testca.New(t, "root")
	root, _ := testca.Write(t, dir, "root", ca.Root)
	certificate, key := testca.Write(t, dir, "sae", ca.Client("sae_001"))
	_, other := testca.Write(t, dir, "other", ca.Client("sae_002"))
	file := func(name, text string, mode os.FileMode) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), mode); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
		return path
	}
	group, world := file("group.key", "-----BEGIN", 0o640), file("world.key", "-----BEGIN", 0o604)
	locked := file("locked.key", "-----BEGIN ENCRYPTED PRIVATE KEY-----\n", 0o600)
	empty, huge := file("empty.crt", "", 0o644), file("huge.crt", "", 0o644)
	if err := os.Truncate(huge, 1<<20+1); err != nil {
		t.Fatal(err)
	}

	good := kmstls.Config{Certificate: certificate, SecretKey: key, RootCertificate: root}
	if _, err := good.Client(tls.VersionTLS12); err != nil {
		t.Fatal(err)
	}
	inMemory := func(conf *tls.Config) func(*kmstls.Config) {
		return func(c *kmstls.Config) { *c = kmstls.Config{Memory: conf} }
	}
	for _, tt := range []struct {
		name string
		edit func(*kmstls.Config)
		want string
	}{
		{"no root", func(c *kmstls.Config) { c.RootCertificate = "" }, "no root certificate: the KMS could not be verified"},
		{"root missing", func(c *kmstls.Config) { c.RootCertificate = dir + "/none" }, "open " + dir + "/none: no such file or directory"},
		{"root empty", func(c *kmstls.Config) { c.RootCertificate = empty }, empty + ": no certificate in PEM form"},
		{"root a directory", func(c *kmstls.Config) { c.RootCertificate = dir }, dir + ": not a regular file"},
		{"root huge", func(c *kmstls.Config) { c.RootCertificate = huge }, huge + ": 1048577 bytes, over 1048576"},
		{"no certificate", func(c *kmstls.Config) { c.Certificate = "" }, "certificate or secret key is missing"},
		{"no secret key", func(c *kmstls.Config) { c.SecretKey = "" }, "certificate or secret key is missing"},
		{"certificate empty", func(c *kmstls.Config) { c.Certificate = empty }, empty + " and " + key + ": tls: failed to find any PEM data in certificate input"},
		{"group reads the key", func(c *kmstls.Config) { c.SecretKey = group }, group + ": mode 0640 lets others at the secret key, not 0600"},
		{"all read the key", func(c *kmstls.Config) { c.SecretKey = world }, world + ": mode 0604 lets others at the secret key, not 0600"},
		{"encrypted key", func(c *kmstls.Config) { c.SecretKey = locked }, locked + ": the key is encrypted, and nobody is here to type its passphrase"},
		{"another's key", func(c *kmstls.Config) { c.SecretKey = other }, certificate + " and " + other + ": tls: private key does not match public key"},
		{"files and memory", func(c *kmstls.Config) { c.Memory = &tls.Config{RootCAs: ca.Pool()} }, "certificates are given both as files and in memory"},
		{"no roots in memory", inMemory(&tls.Config{}), "TLS configuration does not verify the KMS"},
		{"no verification in memory", inMemory(&tls.Config{RootCAs: ca.Pool(), InsecureSkipVerify: true}), "TLS configuration does not verify the KMS"},
	} {
		c := good
		tt.edit(&c)
		conf, err := c.Client(tls.VersionTLS12)
		if conf != nil || err == nil || err.Error() != tt.want {
			t.Errorf("%s:\n got %v\nwant %s", tt.name, err, tt.want)
		}
	}
}
