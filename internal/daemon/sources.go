package daemon

import (
	"errors"
	"fmt"

	"keyturn/internal/config"
	"keyturn/internal/kms"
	"keyturn/internal/kms/etsi004"
	"keyturn/internal/kms/etsi014"
	"keyturn/internal/kms/kmstls"
	"keyturn/internal/kms/skip"
)

// Sources are the key management systems of a configuration. Peers with the
// same kms block share its connections.
type Sources struct {
	systems map[*config.KMS]kms.System
}

// OpenSources reads the certificates of every kms block. It does not connect.
func OpenSources(c *config.Config) (*Sources, error) {
	s := &Sources{systems: map[*config.KMS]kms.System{}}
	for _, p := range c.Peers {
		if p.KMS == nil || s.systems[p.KMS] != nil {
			continue
		}
		system, err := OpenKMS(p.KMS)
		if err != nil {
			return nil, errors.Join(fmt.Errorf("kms of peer %s: %w", p.Name, err), s.Close())
		}
		s.systems[p.KMS] = system
	}
	return s, nil
}

// OpenKMS opens one key management system by the interface that it speaks. It
// does not connect.
func OpenKMS(k *config.KMS) (kms.System, error) {
	tls := TLSOf(k)
	switch k.Interface {
	case config.ETSI014:
		return etsi014.New(etsi014.Config{URIs: k.URIs, SAE: k.SAE, TLS: tls, Method: string(k.Method), Timeout: k.Timeout})
	case config.ETSI004:
		return etsi004.New(etsi004.Config{URIs: k.URIs, SAE: k.SAE, TLS: tls, Dialect: string(k.Dialect), Timeout: k.Timeout})
	case config.SKIP:
		return skip.New(skip.Config{URIs: k.URIs, SAE: k.SAE, TLS: tls, Timeout: k.Timeout})
	default:
		return nil, fmt.Errorf("interface %q is unknown", k.Interface)
	}
}

// TLSOf returns how this end and a KMS prove themselves to each other.
func TLSOf(k *config.KMS) kmstls.Config {
	c := kmstls.Config{
		Certificate: k.Certificate, SecretKey: k.SecretKey, RootCertificate: k.RootCertificate,
		ServerName: k.ServerName,
	}
	for _, pin := range k.Pins {
		c.Pins = append(c.Pins, pin)
	}
	return c
}

// For returns the source of the keys shared with a peer, nil without QKD.
func (s *Sources) For(p *config.Peer) (kms.Source, error) {
	if p.KMS == nil {
		return nil, nil
	}
	return s.systems[p.KMS].For(p.SAE)
}

// Close closes the connections of all systems.
func (s *Sources) Close() error {
	var errs []error
	for _, m := range s.systems {
		errs = append(errs, m.Close())
	}
	return errors.Join(errs...)
}
