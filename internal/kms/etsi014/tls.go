package etsi014

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"time"
)

// maxPEM bounds a certificate or key file.
const maxPEM = 1 << 20

// clientTLS makes the TLS side of c: our certificate, read again when its
// files change, and what the KMS has to prove.
func clientTLS(c *Config) (*tls.Config, error) {
	var conf *tls.Config
	if c.TLS != nil {
		if c.Certificate != "" || c.SecretKey != "" || c.RootCertificate != "" {
			return nil, errors.New("certificates are given both as files and in memory")
		}
		if c.TLS.RootCAs == nil || c.TLS.InsecureSkipVerify {
			return nil, errors.New("TLS configuration does not verify the KMS")
		}
		conf = c.TLS.Clone()
		conf.MinVersion = max(conf.MinVersion, tls.VersionTLS12)
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
			MinVersion:           tls.VersionTLS12,
			RootCAs:              roots,
			GetClientCertificate: p.get,
		}
	}
	if c.ServerName != "" {
		conf.ServerName = c.ServerName
		// crypto/tls has no other way to let a common name count. Nothing is
		// skipped: verifyNamed builds the same chain, then compares the name.
		conf.InsecureSkipVerify = true
		roots, now := conf.RootCAs, conf.Time
		conf.VerifyConnection = func(s tls.ConnectionState) error {
			return verifyNamed(s.PeerCertificates, roots, now, c.ServerName)
		}
	}
	return conf, nil
}

// verifyNamed verifies chain up to roots and that its leaf is for name: by its
// subject alternative names, or, where it has none at all, by its common name,
// for such certificates occur in KMEs.
func verifyNamed(chain []*x509.Certificate, roots *x509.CertPool, now func() time.Time, name string) error {
	if len(chain) == 0 {
		return errors.New("kms sent no certificate")
	}
	leaf := chain[0]
	opts := x509.VerifyOptions{Roots: roots, Intermediates: x509.NewCertPool()}
	if now != nil {
		opts.CurrentTime = now()
	}
	for _, c := range chain[1:] {
		opts.Intermediates.AddCert(c)
	}
	_, err := leaf.Verify(opts)
	if err == nil {
		if hasSAN(leaf) {
			err = leaf.VerifyHostname(name)
		} else if !strings.EqualFold(leaf.Subject.CommonName, name) {
			err = fmt.Errorf("certificate is for %q, not %q", leaf.Subject.CommonName, name)
		}
	}
	if err != nil {
		return &tls.CertificateVerificationError{UnverifiedCertificates: chain, Err: err}
	}
	return nil
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

// keyPair is our certificate and its secret key in two files. A change of
// either is noticed at the next TLS handshake.
type keyPair struct {
	certificate, secretKey string // paths

	mu     sync.Mutex
	stamps [2]os.FileInfo // of the files that loaded was made of
	loaded *tls.Certificate
}

// get has the form of tls.Config.GetClientCertificate. While the files are
// being replaced and do not fit each other, the old certificate goes on until
// it expires.
func (p *keyPair) get(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.loaded != nil && unchanged(p.certificate, p.stamps[0]) && unchanged(p.secretKey, p.stamps[1]) {
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
	cert, certStamp, err := readPEM(p.certificate, false)
	if err != nil {
		return err
	}
	key, keyStamp, err := readPEM(p.secretKey, true)
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
	p.loaded, p.stamps = &pair, [2]os.FileInfo{certStamp, keyStamp}
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
