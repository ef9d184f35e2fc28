package daemon

import (
	"errors"
	"fmt"

	"keyturn/internal/config"
	"keyturn/internal/kms"
	"keyturn/internal/kms/etsi014"
)

// Sources are the key management systems of a configuration. Peers with the
// same kms block share its connections.
type Sources struct {
	systems map[*config.KMS]*etsi014.KMS
}

// OpenSources reads the certificates of every kms block. It does not connect.
func OpenSources(c *config.Config) (*Sources, error) {
	s := &Sources{systems: map[*config.KMS]*etsi014.KMS{}}
	for _, p := range c.Peers {
		k := p.KMS
		if k == nil || s.systems[k] != nil {
			continue
		}
		if k.Interface != config.ETSI014 {
			return nil, errors.Join(fmt.Errorf("peer %s: kms interface %s is not supported by this version; 14 is", p.Name, k.Interface), s.Close())
		}
		m, err := etsi014.New(etsi014.Config{
			URIs: k.URIs, SAE: k.SAE,
			Certificate: k.Certificate, SecretKey: k.SecretKey, RootCertificate: k.RootCertificate,
			ServerName: k.ServerName, Method: string(k.Method), Timeout: k.Timeout,
		})
		if err != nil {
			return nil, errors.Join(fmt.Errorf("kms of peer %s: %w", p.Name, err), s.Close())
		}
		s.systems[k] = m
	}
	return s, nil
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
