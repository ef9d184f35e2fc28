package kmesim

import (
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"
)

// proof is how a KME proves itself, and whom it believes.
type proof struct {
	cert  tls.Certificate
	roots *x509.CertPool
	// root and rootKey sign the certificate of the fault Expired; nil where the
	// laboratory is here without its root key.
	root    *x509.Certificate
	rootKey crypto.Signer
}

func (p *proof) expires() bool { return p.rootKey != nil }

// serverTLS returns the TLS side of a KME towards SAEs. The KMEs are clients as
// well, of each other, but nobody's SAEs.
func (p *proof) serverTLS() *tls.Config {
	expired := sync.OnceValues(p.expired)
	return &tls.Config{
		MinVersion: tls.VersionTLS12,
		GetCertificate: func(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
			if c, ok := hello.Conn.(*conn); ok && c.expired {
				return expired()
			}
			return &p.cert, nil
		},
		ClientAuth: tls.RequireAndVerifyClientCert,
		ClientCAs:  p.roots,
		VerifyConnection: func(s tls.ConnectionState) error {
			if name := s.PeerCertificates[0].Subject.CommonName; name == NameA || name == NameB {
				return fmt.Errorf("%s is no SAE", name)
			}
			return nil
		},
		SessionTicketsDisabled: true, // nobody resumes
	}
}

// linkTLS returns both sides of the link to the KME called other.
func (p *proof) linkTLS(other string) (server, client *tls.Config) {
	verify := func(s tls.ConnectionState) error {
		if name := s.PeerCertificates[0].Subject.CommonName; name != other {
			return fmt.Errorf("certificate of %q, not of %s", name, other)
		}
		return nil
	}
	server = p.serverTLS()
	server.MinVersion, server.VerifyConnection = tls.VersionTLS13, verify
	client = &tls.Config{
		MinVersion:       tls.VersionTLS13,
		Certificates:     []tls.Certificate{p.cert},
		RootCAs:          p.roots,
		ServerName:       other, // wherever it runs
		VerifyConnection: verify,
	}
	return server, client
}

// expired makes a certificate like the KME's own that expired yesterday.
func (p *proof) expired() (*tls.Certificate, error) {
	if !p.expires() {
		return nil, errNoRootKey
	}
	own := p.cert.Leaf
	yesterday := time.Now().AddDate(0, 0, -1)
	c, err := sign(&x509.Certificate{
		Subject:     own.Subject,
		DNSNames:    own.DNSNames,
		IPAddresses: own.IPAddresses,
		KeyUsage:    own.KeyUsage,
		ExtKeyUsage: own.ExtKeyUsage,
		NotBefore:   yesterday.AddDate(0, 0, -90),
		NotAfter:    yesterday,
	}, p.root, p.rootKey)
	return &c, err
}

var errNoRootKey = errors.New("the laboratory's root.key is not here to sign a certificate that has expired")

// loadProof reads what one KME needs from a directory that WriteLab wrote. Only
// root.key may be missing.
func loadProof(dir, name string) (*proof, error) {
	file := func(name string) string { return filepath.Join(dir, name) }
	rootPEM, err := read(file("root.crt"), 0o022)
	if err != nil {
		return nil, err
	}
	p := &proof{roots: x509.NewCertPool()}
	if !p.roots.AppendCertsFromPEM(rootPEM) {
		return nil, fmt.Errorf("%s: no certificate in PEM form", file("root.crt"))
	}
	if p.cert, err = loadCertificate(file(name+".crt"), file(name+".key")); err != nil {
		return nil, err
	}
	if _, err := os.Lstat(file("root.key")); errors.Is(err, fs.ErrNotExist) {
		return p, nil
	}
	root, err := loadCertificate(file("root.crt"), file("root.key"))
	if err != nil {
		return nil, err
	}
	p.root = root.Leaf
	p.rootKey, _ = root.PrivateKey.(crypto.Signer) // as are all that a certificate can be for
	return p, nil
}

func loadCertificate(certFile, keyFile string) (tls.Certificate, error) {
	cert, err := read(certFile, 0o022)
	if err != nil {
		return tls.Certificate{}, err
	}
	key, err := read(keyFile, 0o077)
	if err != nil {
		return tls.Certificate{}, err
	}
	defer clear(key)
	pair, err := tls.X509KeyPair(cert, key)
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("%s: %w", keyFile, err)
	}
	return pair, nil
}
