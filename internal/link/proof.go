package link

import (
	"errors"

	"filippo.io/mldsa"
)

// Sizes of a proof, in bytes.
const (
	exporterSize  = 32
	proofSize     = mldsa.MLDSA65PublicKeySize + mldsa.MLDSA65SignatureSize // 1952 + 3309 = 5261
	statementSize = exporterSize + 1 + 2*len(Fingerprint{})                 // 97
)

// role says which end of a connection signed a proof, so that no proof can be
// sent back to its maker.
type role byte

const (
	roleClient role = 1
	roleServer role = 2
)

// statement is what a proof says: on this connection, the signer plays that
// role between these two. The exporter alone would not do: it is taken at the
// server's Finished and does not cover the client's certificate (RFC 8446, 7.5).
type statement struct {
	exporter       [exporterSize]byte
	signer         role
	client, server Fingerprint
}

// bytes returns what is signed: exporter, role, client, server. All are of
// fixed size, so that they need no framing.
func (s *statement) bytes() []byte {
	b := make([]byte, 0, statementSize)
	b = append(b, s.exporter[:]...)
	b = append(b, byte(s.signer))
	b = append(b, s.client[:]...)
	return append(b, s.server[:]...)
}

// proof is the first frame from either end: the ML-DSA-65 public key, then the
// signature of the statement under contextProof.
type proof struct {
	public    []byte // mldsa.MLDSA65PublicKeySize bytes
	signature []byte // mldsa.MLDSA65SignatureSize bytes
}

func (id *Identity) prove(s *statement) (*proof, error) {
	signature, err := id.mldsa.Sign(nil, s.bytes(), &mldsa.Options{Context: contextProof})
	if err != nil {
		return nil, err
	}
	return &proof{public: id.mldsaPublic, signature: signature}, nil
}

// verify checks the signature. Whether the key is anybody's that we know must
// have been checked before: that is by far the cheaper question. The error is
// ErrProof.
func (p *proof) verify(s *statement) error {
	key, err := mldsa.NewPublicKey(mldsa.MLDSA65(), p.public)
	if err != nil {
		return ErrProof
	}
	if mldsa.Verify(key, s.bytes(), p.signature, &mldsa.Options{Context: contextProof}) != nil {
		return ErrProof
	}
	return nil
}

func (p *proof) encode() []byte {
	b := make([]byte, 0, proofSize)
	b = append(b, p.public...)
	return append(b, p.signature...)
}

func decodeProof(b []byte) (*proof, error) {
	if len(b) != proofSize {
		return nil, errors.New("first frame is not a proof of identity")
	}
	return &proof{
		public:    b[:mldsa.MLDSA65PublicKeySize],
		signature: b[mldsa.MLDSA65PublicKeySize:],
	}, nil
}
