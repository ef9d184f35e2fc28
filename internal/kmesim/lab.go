package kmesim

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// The names of the two KMEs of a pair and of their certificates.
const (
	NameA = "kme-a"
	NameB = "kme-b"
)

// Limits of a laboratory.
const (
	DefaultSAEs = 2
	MaxLabSAEs  = 100_000
	// labYears is how long its certificates are valid.
	labYears = 10
	maxPEM   = 1 << 20
)

// LabOptions says which certificates a laboratory has.
type LabOptions struct {
	// SAEs is their number; they are called sae_001, sae_002 and so on, which is
	// the common name of each one's certificate. DefaultSAEs if zero.
	SAEs int
	// Names are further host names and IP addresses of the KMEs, beside
	// localhost, 127.0.0.1, ::1, kme-a and kme-b.
	Names []string
}

// Lab is the certificates of a laboratory: a root, two KMEs, and some SAEs.
// They use ECDSA with P-256, which every KMS and every tool can read, and are
// valid for ten years. The secret keys lie in memory: no place for real ones.
type Lab struct {
	Root *x509.Certificate
	KMEs [2]tls.Certificate // kme-a, kme-b
	SAEs []tls.Certificate  // sae_001 and so on

	rootKey *ecdsa.PrivateKey
}

// SAEName returns the SAE ID of SAE n; the first is 1.
func SAEName(n int) string { return fmt.Sprintf("sae_%03d", n) }

// NewLab makes the certificates of a laboratory.
func NewLab(o LabOptions) (*Lab, error) {
	if o.SAEs == 0 {
		o.SAEs = DefaultSAEs
	}
	if o.SAEs < 1 || o.SAEs > MaxLabSAEs {
		return nil, fmt.Errorf("%d SAEs, not 1 to %d", o.SAEs, MaxLabSAEs)
	}
	names := []string{"localhost", NameA, NameB}
	addresses := []net.IP{net.IPv4(127, 0, 0, 1), net.IPv6loopback}
	for _, n := range o.Names {
		if ip := net.ParseIP(n); ip != nil {
			addresses = append(addresses, ip)
		} else if hostName(n) {
			names = append(names, n)
		} else {
			return nil, fmt.Errorf("%q is neither a host name nor an address", n)
		}
	}

	l := new(Lab)
	root, err := l.issue(&x509.Certificate{
		Subject:               pkix.Name{CommonName: "keyturn laboratory"},
		IsCA:                  true,
		BasicConstraintsValid: true,
		MaxPathLenZero:        true,
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	})
	if err != nil {
		return nil, err
	}
	l.Root, l.rootKey = root.Leaf, root.PrivateKey.(*ecdsa.PrivateKey)
	for i, name := range []string{NameA, NameB} {
		l.KMEs[i], err = l.issue(&x509.Certificate{
			Subject:     pkix.Name{CommonName: name},
			DNSNames:    names,
			IPAddresses: addresses,
			KeyUsage:    x509.KeyUsageDigitalSignature,
			// The KMEs are each other's clients.
			ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		})
		if err != nil {
			return nil, err
		}
	}
	for n := range o.SAEs {
		sae, err := l.issue(&x509.Certificate{
			Subject:     pkix.Name{CommonName: SAEName(n + 1)},
			KeyUsage:    x509.KeyUsageDigitalSignature,
			ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
		})
		if err != nil {
			return nil, err
		}
		l.SAEs = append(l.SAEs, sae)
	}
	return l, nil
}

// issue signs a certificate for a fresh key; the first one by itself.
func (l *Lab) issue(c *x509.Certificate) (tls.Certificate, error) {
	now := time.Now()
	c.NotBefore = now.AddDate(0, 0, -1) // for hosts whose clocks are behind
	c.NotAfter = now.AddDate(labYears, 0, 0)
	return sign(c, l.Root, l.rootKey)
}

// sign signs a certificate for a fresh key; by itself where there is no parent.
func sign(c, parent *x509.Certificate, signer crypto.Signer) (tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tls.Certificate{}, err
	}
	c.SerialNumber, err = rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return tls.Certificate{}, err
	}
	if parent == nil {
		parent, signer = c, key
	}
	der, err := x509.CreateCertificate(rand.Reader, c, parent, key.Public(), signer)
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("certificate of %s: %w", c.Subject.CommonName, err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("certificate of %s: %w", c.Subject.CommonName, err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}, nil
}

func hostName(s string) bool {
	for label := range strings.SplitSeq(s, ".") {
		if label == "" || len(label) > 63 || strings.Trim(label, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_") != "" {
			return false
		}
	}
	return len(s) <= 253
}

// ServerTLS returns the TLS side of a KME: 0 for kme-a, 1 for kme-b.
func (l *Lab) ServerTLS(kme int) *tls.Config { return l.proof(kme).serverTLS() }

func (l *Lab) proof(kme int) *proof {
	return &proof{cert: l.KMEs[kme], roots: l.roots(), root: l.Root, rootKey: l.rootKey}
}

// ClientTLS returns the TLS side of SAE n; the first is 1.
func (l *Lab) ClientTLS(n int) *tls.Config {
	return &tls.Config{
		MinVersion:   tls.VersionTLS12,
		Certificates: []tls.Certificate{l.SAEs[n-1]},
		RootCAs:      l.roots(),
	}
}

func (l *Lab) roots() *x509.CertPool {
	p := x509.NewCertPool()
	p.AddCert(l.Root)
	return p
}

// WriteLab makes a laboratory and writes it to dir, which is made if need be:
// root, kme-a, kme-b and each SAE, as NAME.crt and, closed to others,
// NAME.key. It overwrites nothing: the error names the file in the way.
func WriteLab(dir string, o LabOptions) error {
	l, err := NewLab(o)
	if err != nil {
		return err
	}
	return l.Write(dir)
}

// Write writes the laboratory as WriteLab does.
func (l *Lab) Write(dir string) error {
	type named struct {
		name string
		cert tls.Certificate
	}
	all := []named{
		{"root", tls.Certificate{Certificate: [][]byte{l.Root.Raw}, PrivateKey: l.rootKey}},
		{NameA, l.KMEs[0]},
		{NameB, l.KMEs[1]},
	}
	for i, c := range l.SAEs {
		all = append(all, named{SAEName(i + 1), c})
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	// First look for all of them, so that half a laboratory is not mixed with
	// half of another.
	for _, n := range all {
		for _, ext := range []string{".crt", ".key"} {
			path := filepath.Join(dir, n.name+ext)
			if _, err := os.Lstat(path); err == nil {
				return fmt.Errorf("%s: %w", path, fs.ErrExist)
			} else if !errors.Is(err, fs.ErrNotExist) {
				return err
			}
		}
	}
	for _, n := range all {
		der, err := x509.MarshalPKCS8PrivateKey(n.cert.PrivateKey)
		if err != nil {
			return err
		}
		key := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
		err = errors.Join(
			create(filepath.Join(dir, n.name+".key"), 0o600, key),
			create(filepath.Join(dir, n.name+".crt"), 0o644,
				pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: n.cert.Certificate[0]})),
		)
		clear(der)
		clear(key)
		if err != nil {
			return err
		}
	}
	return nil
}

// create writes a file that must not exist.
func create(path string, mode os.FileMode, b []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	return errors.Join(err, f.Close())
}

// read reads a file of bounded size whose mode has none of the bits that are
// forbidden.
func read(path string, forbidden os.FileMode) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	i, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if i.Mode().Perm()&forbidden != 0 {
		return nil, fmt.Errorf("%s: mode %#o lets others at it", path, i.Mode().Perm())
	}
	if !i.Mode().IsRegular() || i.Size() > maxPEM {
		return nil, fmt.Errorf("%s: not a file of at most %d bytes", path, maxPEM)
	}
	var b bytes.Buffer
	b.Grow(int(i.Size()) + bytes.MinRead) // one buffer, for the caller to wipe
	if _, err := b.ReadFrom(io.LimitReader(f, maxPEM)); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return b.Bytes(), nil
}
