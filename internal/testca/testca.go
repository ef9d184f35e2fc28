// Package testca issues certificates for tests, of any shape, wrong ones
// included. They are valid from 1999 on, for a testing/synctest bubble begins
// in the year 2000.
package testca

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// An Authority signs certificates. Whatever goes wrong ends the test.
type Authority struct {
	Root tls.Certificate

	tb   testing.TB
	made int64
}

// New makes an authority whose root certificate is for name.
func New(tb testing.TB, name string) *Authority {
	a := &Authority{tb: tb}
	a.Root = a.Issue(x509.Certificate{
		Subject:               pkix.Name{CommonName: name},
		IsCA:                  true,
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageCertSign,
	})
	return a
}

// Issue signs a certificate for a fresh key, valid for a hundred years unless
// the template ends sooner.
func (a *Authority) Issue(template x509.Certificate) tls.Certificate {
	a.tb.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		a.tb.Fatal(err)
	}
	a.made++
	template.SerialNumber = big.NewInt(a.made)
	template.NotBefore = time.Date(1999, 1, 1, 0, 0, 0, 0, time.UTC)
	if template.NotAfter.IsZero() {
		template.NotAfter = template.NotBefore.AddDate(100, 0, 0)
	}
	parent, signer := a.Root.Leaf, a.Root.PrivateKey
	if parent == nil {
		parent, signer = &template, key
	}
	der, err := x509.CreateCertificate(rand.Reader, &template, parent, key.Public(), signer)
	if err != nil {
		a.tb.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		a.tb.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}
}

// Client issues a client's certificate with a common name.
func (a *Authority) Client(name string) tls.Certificate {
	a.tb.Helper()
	return a.Issue(x509.Certificate{
		Subject:     pkix.Name{CommonName: name},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	})
}

// Server issues a server's certificate for these host names.
func (a *Authority) Server(names ...string) tls.Certificate {
	a.tb.Helper()
	return a.Issue(x509.Certificate{
		Subject:     pkix.Name{CommonName: "server"},
		DNSNames:    names,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	})
}

// Pool holds the root alone.
func (a *Authority) Pool() *x509.CertPool {
	p := x509.NewCertPool()
	p.AddCert(a.Root.Leaf)
	return p
}

// Write writes a certificate and its secret key as name.crt and name.key. It
// replaces both as renewing programs do: by a new file of the same name.
func Write(tb testing.TB, dir, name string, c tls.Certificate) (certificate, secretKey string) {
	tb.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(c.PrivateKey)
	if err != nil {
		tb.Fatal(err)
	}
	certificate, secretKey = filepath.Join(dir, name+".crt"), filepath.Join(dir, name+".key")
	for path, block := range map[string]*pem.Block{
		certificate: {Type: "CERTIFICATE", Bytes: c.Certificate[0]},
		secretKey:   {Type: "PRIVATE KEY", Bytes: der},
	} {
		if err := os.WriteFile(path+".new", pem.EncodeToMemory(block), 0o600); err != nil {
			tb.Fatal(err)
		}
		if err := os.Rename(path+".new", path); err != nil {
			tb.Fatal(err)
		}
	}
	return certificate, secretKey
}
