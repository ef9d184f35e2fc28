// Package kmstls makes the TLS side of a client of a key management system:
// both ends prove themselves by certificates, whatever is spoken above. It owns
// what certificates of real systems are known to lack, and never skips the
// verification of one.
package kmstls

import (
	"bytes"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"sync"
	"time"
)

// maxPEM bounds a certificate or key file.
const maxPEM = 1 << 20

// Pin is the SHA-256 of a certificate's SubjectPublicKeyInfo (RFC 7469, 2.4).
type Pin [sha256.Size]byte

// String returns the form of the configuration: padded standard base64.
func (p Pin) String() string { return base64.StdEncoding.EncodeToString(p[:]) }

// PinOf returns the pin of a certificate.
func PinOf(c *x509.Certificate) Pin { return sha256.Sum256(c.RawSubjectPublicKeyInfo) }

// Config says how we prove who we are to a KMS, and what it has to prove.
type Config struct {
	// Certificate, SecretKey and RootCertificate are paths of PEM files. The
	// first two are read again when the certificate changes. A secret key that others can
	// read is refused.
	Certificate, SecretKey, RootCertificate string
	// Memory stands in for the three files where a program holds its
	// certificates in memory. Its RootCAs must be set.
	Memory *tls.Config
	// ServerName is the name in the KMS's certificate where that is not the
	// host of the URI. It also serves certificates without a subject
	// alternative name, whose common name it is compared with.
	ServerName string
	// Pins, where there are any, name the KMS's certificate by its key: one of
	// them has to match, beside the chain up to the root. The URI's host does
	// not count then; ServerName does if it is given.
	Pins []Pin
}

// Client returns the configuration of a TLS client. minimum is the lowest
// version that the interface permits.
func (c Config) Client(minimum uint16) (*tls.Config, error) {
	var conf *tls.Config
	if c.Memory != nil {
		if c.Certificate != "" || c.SecretKey != "" || c.RootCertificate != "" {
			return nil, errors.New("certificates are given both as files and in memory")
		}
		if c.Memory.RootCAs == nil || c.Memory.InsecureSkipVerify {
			return nil, errors.New("TLS configuration does not verify the KMS")
		}
		conf = c.Memory.Clone()
		conf.MinVersion = max(conf.MinVersion, minimum)
	} else {
		roots, err := readRoots(c.RootCertificate)
		if err != nil {
			return nil, err
		}
		p := &keyPair{certificate: c.Certificate, secretKey: c.SecretKey}
		if _, err := p.get(nil); err != nil {
			return nil, err
		}
		conf = &tls.Config{
			MinVersion:           minimum,
			RootCAs:              roots,
			GetClientCertificate: p.get,
		}
	}
	if c.ServerName != "" || len(c.Pins) > 0 {
		conf.ServerName = c.ServerName
		// crypto/tls has no other way to let a common name or a pin count.
		// Nothing is skipped: verify builds the same chain, then compares.
		conf.InsecureSkipVerify = true
		roots := conf.RootCAs
		conf.VerifyConnection = func(s tls.ConnectionState) error {
			return verify(s.PeerCertificates, roots, c.ServerName, c.Pins)
		}
	}
	return conf, nil
}

// verify verifies chain up to roots, that its leaf is for name, unless that is
// empty, and has one of pins, unless there are none.
func verify(chain []*x509.Certificate, roots *x509.CertPool, name string, pins []Pin) error {
	if len(chain) == 0 {
		return errors.New("kms sent no certificate")
	}
	leaf := chain[0]
	opts := x509.VerifyOptions{Roots: roots, Intermediates: x509.NewCertPool()}
	for _, c := range chain[1:] {
		opts.Intermediates.AddCert(c)
	}
	_, err := leaf.Verify(opts)
	if err == nil && name != "" {
		err = verifyName(leaf, name)
	}
	if err == nil && len(pins) > 0 {
		err = verifyPin(leaf, pins)
	}
	if err != nil {
		return &tls.CertificateVerificationError{UnverifiedCertificates: chain, Err: err}
	}
	return nil
}

// verifyName compares the subject alternative names, or, where there are none
// at all, the common name: such certificates occur in KMEs.
func verifyName(leaf *x509.Certificate, name string) error {
	if hasSAN(leaf) {
		return leaf.VerifyHostname(name)
	}
	if !strings.EqualFold(leaf.Subject.CommonName, name) {
		return fmt.Errorf("certificate is for %q, not %q", leaf.Subject.CommonName, name)
	}
	return nil
}

func verifyPin(leaf *x509.Certificate, pins []Pin) error {
	got := PinOf(leaf)
	if slices.Contains(pins, got) {
		return nil
	}
	return fmt.Errorf("certificate's key has the pin %s, which is none of those configured", got)
}

func hasSAN(c *x509.Certificate) bool {
	for _, e := range c.Extensions {
		if e.Id.String() == "2.5.29.17" { // RFC 5280, 4.2.1.6
			return true
		}
	}
	return false
}

func readRoots(path string) (*x509.CertPool, error) {
	if path == "" {
		return nil, errors.New("no root certificate: the KMS could not be verified")
	}
	pem, _, err := readPEM(path, false)
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("%s: no certificate in PEM form", path)
	}
	return roots, nil
}

// keyPair is our certificate and its secret key in two files. Another
// certificate is noticed at the next TLS handshake, and tried with whatever key
// there is until the two fit.
type keyPair struct {
	certificate, secretKey string // paths

	mu     sync.Mutex
	stamp  os.FileInfo // of the certificate's file that loaded was made of
	loaded *tls.Certificate
}

// get has the form of tls.Config.GetClientCertificate. While the files are
// being replaced and do not fit each other, the old certificate goes on until
// it expires.
func (p *keyPair) get(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.loaded != nil && unchanged(p.certificate, p.stamp) {
		return p.loaded, nil
	}
	if err := p.load(); err != nil && (p.loaded == nil || time.Now().After(p.loaded.Leaf.NotAfter)) {
		return nil, err
	}
	return p.loaded, nil
}

func (p *keyPair) load() error {
	if p.certificate == "" || p.secretKey == "" {
		return errors.New("certificate or secret key is missing")
	}
	cert, stamp, err := readPEM(p.certificate, false)
	if err != nil {
		return err
	}
	key, _, err := readPEM(p.secretKey, true)
	if err != nil {
		return err
	}
	defer clear(key)
	if bytes.Contains(key, []byte("ENCRYPTED")) {
		return fmt.Errorf("%s: the key is encrypted, and nobody is here to type its passphrase", p.secretKey)
	}
	pair, err := tls.X509KeyPair(cert, key)
	if err != nil {
		return fmt.Errorf("%s and %s: %w", p.certificate, p.secretKey, err)
	}
	p.loaded, p.stamp = &pair, stamp
	return nil
}

func unchanged(path string, stamp os.FileInfo) bool {
	now, err := os.Stat(path)
	return err == nil && os.SameFile(now, stamp) &&
		now.Size() == stamp.Size() && now.ModTime().Equal(stamp.ModTime())
}

// readPEM reads a regular file of bounded size. A secret one must be closed to
// everybody but its owner. The result has no spare copies, so that it can be
// wiped.
func readPEM(path string, secret bool) ([]byte, os.FileInfo, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, nil, err
	}
	defer f.Close()
	stamp, err := f.Stat()
	if err != nil {
		return nil, nil, err
	}
	switch {
	case !stamp.Mode().IsRegular():
		return nil, nil, fmt.Errorf("%s: not a regular file", path)
	case secret && stamp.Mode().Perm()&0o077 != 0:
		return nil, nil, fmt.Errorf("%s: mode %#o lets others at the secret key, not 0600", path, stamp.Mode().Perm())
	case stamp.Size() > maxPEM:
		return nil, nil, fmt.Errorf("%s: %d bytes, over %d", path, stamp.Size(), maxPEM)
	}
	b := make([]byte, stamp.Size())
	if _, err := io.ReadFull(f, b); err != nil {
		clear(b)
		return nil, nil, fmt.Errorf("%s: %w", path, err)
	}
	return b, stamp, nil
}
