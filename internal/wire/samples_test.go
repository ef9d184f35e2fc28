package wire

import (
	"bytes"
	"time"

	"keyturn/internal/psk"
)

// count16 returns 16 bytes counting up from first: plainly test data.
func count16(first byte) (b [16]byte) {
	for i := range b {
		b[i] = first + byte(i)
	}
	return b
}

func count32(first byte) (b [32]byte) {
	for i := range b {
		b[i] = first + byte(i)
	}
	return b
}

func key(serial uint64, first byte) Named {
	return Named{Serial: serial, Fingerprint: psk.Fingerprint(count16(first))}
}

// samples holds every kind of message: first those in which no field is zero,
// then the edges.
func samples() []Message {
	client := Parameters{
		Version: Version, SAE: "sae_001", PeerSAE: "sae_002",
		PublicKey: count32(0x20), PeerPublicKey: count32(0x60),
		QKD: true, KEMs: []string{"ML-KEM-1024", "ML-KEM-768"},
		Require: 1, Combiner: 1, Buffer: 3, Window: 30 * time.Second,
		Initial: psk.Fingerprint(count16(0x90)),
	}
	server := client
	server.SAE, server.PeerSAE = client.PeerSAE, client.SAE
	server.PublicKey, server.PeerPublicKey = client.PeerPublicKey, client.PublicKey
	server.Window = 20 * time.Second
	bare := Parameters{
		Version: Version, PublicKey: count32(0x20), PeerPublicKey: count32(0x60),
		KEMs: []string{"ML-KEM-512"}, Buffer: 1, Window: time.Millisecond,
	}
	session := SessionID(count16(0xa0))

	return []Message{
		&Init{Attempt: 3, Boot: count16(0xb0), High: 8, Parameters: client, Held: []Named{key(7, 0xa1), key(8, 0xc0)}},
		&Ack{Attempt: 3, Session: session, Boot: count16(0xd0), High: 9, Parameters: server,
			Held: []Named{key(7, 0xa1)}, Kept: true,
			Differences: []Difference{{Field: "window", Client: "30s", Server: "20s"}}},
		&Propose{Session: session, Serial: 10, Sources: 0b111, KeyID: "bc490419-7d60-487f-adc1-4ddcc177c139",
			EncapsulationKeys: [][]byte{{1, 2, 3, 4}, {5, 6}}, Held: []uint64{8, 9, 10}},
		&Reply{Session: session, Serial: 10, Sources: 0b111,
			EncapsulationKeys: [][]byte{{11, 12, 13, 14}, {15, 16}}, Ciphertexts: [][]byte{{17, 18, 19}, {20}}},
		&Finish{Session: session, Serial: 10, Ciphertexts: [][]byte{{21, 22, 23}, {24}}, Digest: count32(0x40)},
		&Done{Session: session, Serial: 10, Digest: count32(0x50)},
		&Abandon{Session: session, Serial: 10, Reason: "digest differs", High: 10},
		&Commit{Session: session, Attempt: 5, Key: key(7, 0xa1), Installed: key(6, 0x10), Confirmed: 6, Mode: ModeRepair},
		&Committed{Session: session, Attempt: 5, Seq: 77, Key: key(7, 0xa1)},
		&Refused{Session: session, Attempt: 5, Key: key(7, 0xa1), Reason: ReasonNotYet},
		&Report{Session: session, Seq: 78, Interval: 2 * time.Second, Installed: key(7, 0xa1),
			Blocked: true, Missing: true, Trying: true, NoHandshake: true, Seen: true, Confirmed: 7, Held: []Named{key(7, 0xa1), key(8, 0xc0)}},
		&Bye{Session: session, Reason: "stopped by the operator"},

		&Init{Parameters: bare},
		&Ack{Session: session, Parameters: bare},
		&Propose{Session: session, Serial: 1, Sources: 1, KeyID: "clé 1"},
		&Propose{Session: session, Serial: 1, Sources: 2, EncapsulationKeys: [][]byte{bytes.Repeat([]byte{0xee}, 1568)}},
		&Reply{Session: session, Serial: 1, Sources: 1},
		&Finish{Session: session, Serial: 1, Digest: count32(0x40)},
		&Abandon{},
		&Commit{Session: session, Attempt: 1, Key: key(1, 0xa1)},
		&Commit{Session: session, Attempt: 1, Key: key(1<<64-1, 0xa1), Installed: key(0, 0x90), Mode: ModeIdle},
		&Refused{Key: key(7, 0xa1), Reason: ReasonFailed},
		&Report{},
		&Report{Installed: key(0, 0x90), Interval: (1<<32 - 1) * time.Millisecond, Held: []Named{key(0, 0x90), key(1, 1), key(1, 2)}},
		&Bye{},
	}
}
