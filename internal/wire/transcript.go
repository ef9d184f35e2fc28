package wire

import (
	"crypto/sha256"
	"encoding/binary"
)

// transcriptLabel separates transcripts from every other use of SHA-256.
const transcriptLabel = "keyturn/1 transcript"

// Transcript returns the hash of a round's messages, which both ends' digests
// of the key cover: SHA-256 over the label "keyturn/1 transcript", the policy
// that the ends agreed on (Parameters.Require, one byte) and the encodings of
// p, r and f, each of the five preceded by its length in bytes as a u32. Finish's own digest, which the transcript goes into, counts as
// zeros. A message that cannot be encoded, which neither end could have sent
// or received, counts as empty.
func Transcript(require uint8, p *Propose, r *Reply, f *Finish) [32]byte {
	undigested := *f
	undigested.Digest = [32]byte{}

	buf := frame(nil, []byte(transcriptLabel))
	buf = frame(buf, []byte{require})
	for _, m := range []Message{p, r, &undigested} {
		encoded, _ := Encode(m) // nil where it cannot be encoded
		buf = frame(buf, encoded)
	}
	return sha256.Sum256(buf)
}

// frame appends b and, before it, its length.
func frame(dst, b []byte) []byte {
	dst = binary.BigEndian.AppendUint32(dst, uint32(len(b)))
	return append(dst, b...)
}
