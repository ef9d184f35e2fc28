package etsi004

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"keyturn/internal/kms"
	"keyturn/internal/testca"
)

// TestConversation is a whole life of a source in each dialect, byte for byte.
func TestConversation(t *testing.T) {
	const stream = "a687de810544e7268e899ec2f23ba6e1" // of sae_a and sae_b
	const uris = "54c691868967b47e07a9066b7024e701"   // of qkd://sae_a and qkd://sae_b
	for _, tt := range []struct {
		dialect string
		conns   []int // of each request
		lines   []string
	}{
		{"forge-ed3", []int{1, 2, 3, 4}, []string{
			"0201010200000049 7361655f6100 7361655f6200 00000020 00000020 00000020 00000000 00000000 000003e8 00000258 6170706c69636174696f6e2f6a736f6e00" + stream,
			"0201010300000041 00000000 00000020 00000020 00000020 00000000 00000000 000003e8 00000258 6170706c69636174696f6e2f6a736f6e00" + stream,
			"0201010200000049 7361655f6100 7361655f6200 00000020 00000020 00000020 00000000 00000000 000003e8 00000258 6170706c69636174696f6e2f6a736f6e00" + stream,
			"0201010300000041 00000005 00000000 00000000 00000000 00000000 00000000 00000000 00000000 6170706c69636174696f6e2f6a736f6e00" + noID,
			"020101040000001a" + stream + "00000000 00000002 0000",
			"0201010500000032 00000000 00000000 00000020" + hexKey + "00000002 7b7d",
			"0201010800000010" + stream,
			"0201010900000004 00000000",
		}},
		{"forge-ed1", []int{1, 1, 1, 1}, []string{
			"0100010200000144 716b643a2f2f7361655f6100 716b643a2f2f7361655f6200 00000020 00000020 00000020 00000000 00000000 000003e8 00000258" +
				"6170706c69636174696f6e2f6a736f6e" + strings.Repeat("00", 240) + uris,
			"0100010300000130 00000000 00000020 00000020 00000020 00000000 00000000 000003e8 00000258" +
				"6170706c69636174696f6e2f6a736f6e" + strings.Repeat("00", 240) + uris,
			"0100010200000144 716b643a2f2f7361655f6100 716b643a2f2f7361655f6200 00000020 00000020 00000020 00000000 00000000 000003e8 00000258" +
				"6170706c69636174696f6e2f6a736f6e" + strings.Repeat("00", 240) + uris,
			"0100010300000004 00000005",
			"0100010400000018" + uris + "00000000 00000400",
			"0100010500000034 00000000 00000000 00000020" + hexKey + "00000004 7b7d 0d0a",
			"0100010800000010" + uris,
			"0100010900000004 00000000",
		}},
	} {
		t.Run(tt.dialect, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				n := newNetwork(t)
				asked := 0
				h, _ := n.serve(kmeA, func(request) answer { asked++; return raw(tt.lines[2*asked-1]) })
				s := n.source("sae_a", "sae_b", Config{Dialect: tt.dialect})
				id, key, err := s.Key(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				if want := s.known.id.String() + ":0:"; !strings.HasPrefix(id, want) {
					t.Errorf("ID %q, want %q and a tag", id, want)
				}
				if !bytes.Equal(key.Bytes(), unhex(t, hexKey)) {
					t.Error("wrong key")
				}
				if err := s.Close(); err != nil {
					t.Fatal(err)
				}
				for i, r := range h.seen {
					if want := unhex(t, tt.lines[2*i]); !bytes.Equal(r.whole, want) {
						t.Errorf("request %d\n%x, want\n%x", i, r.whole, want)
					}
					if r.conn != tt.conns[i] {
						t.Errorf("request %d came over connection %d, want %d", i, r.conn, tt.conns[i])
					}
				}
				if len(h.seen) != len(tt.conns) {
					t.Errorf("%d requests, want %d", len(h.seen), len(tt.conns))
				}
			})
		})
	}
}

// TestKeyStatuses gives GET_KEY each status, and says what becomes of Key,
// KeyByID and the index.
func TestKeyStatuses(t *testing.T) {
	const at = "kme-a:25575 answered GET_KEY with "
	for _, tt := range []struct {
		status   uint32
		lead     error
		leadText string // after "fetch key: "
		leadLog  string
		follow   error
		asked    int // times that KeyByID asks
	}{
		{2, kms.ErrNoKeys, "kms has no key now: " + at + "status 2, insufficient key", "open open get0", kms.ErrUnknownKey, 6},
		{3, kms.ErrNoKeys, "kms has no key now: " + at + "status 3, the peer's application has not connected yet", "open open get0 open", kms.ErrUnknownKey, 6},
		{4, nil, at + "status 4, no QKD connection", "open open get0 open", nil, 1},
		{5, nil, at + "status 5, key stream is in use", "open open get0 open", nil, 1},
		{6, nil, at + "status 6, timeout", "open open get0", kms.ErrUnknownKey, 6},
		{7, kms.ErrRefused, "kms refuses: " + at + "status 7, quality of service not met", "open open get0 open", kms.ErrRefused, 1},
		{8, nil, at + "status 8, no room for the metadata", "open open get0 get0 get0", nil, 3},
		{9, nil, at + "unknown status 9", "open open get0 open", nil, 1},
		{4000000000, nil, at + "unknown status 4000000000", "open open get0 open", nil, 1},
	} {
		t.Run(fmt.Sprint(tt.status), func(t *testing.T) {
			inDialects(t, func(t *testing.T, n *network, d *dialect) {
				refusing := true
				h, _ := n.serve(kmeA, easy(d, func(r request) answer {
					if r.service == 4 && refusing {
						return saysNo(d, r, tt.status)
					}
					return nil
				}))
				s := n.source("sae_a", "sae_b", Config{Dialect: d.name})
				id, key, err := s.Key(t.Context())
				checkError(t, err, tt.lead, "fetch key: "+tt.leadText)
				if id != "" || key != nil {
					t.Error("something beside the error")
				}
				if got := h.log(); got != tt.leadLog {
					t.Errorf("requests %q, want %q", got, tt.leadLog)
				}
				// A refused index is asked for again.
				h.mu.Lock()
				refusing = false
				h.mu.Unlock()
				if id, key, err = s.Key(t.Context()); err != nil || !isKey(key, 0) {
					t.Fatalf("then the key with ID %q, %v", id, err)
				}

				h.mu.Lock()
				refusing, h.seen = true, nil
				h.mu.Unlock()
				peer := n.source("sae_b", "sae_a", Config{Dialect: d.name})
				began := time.Now()
				key, err = peer.KeyByID(t.Context(), id)
				if key != nil || err == nil || tt.follow != nil && !errors.Is(err, tt.follow) || errors.Is(err, kms.ErrNoKeys) {
					t.Errorf("KeyByID: error %v, want %v", err, tt.follow)
				}
				if got := strings.Count(h.log(), "get0"); got != tt.asked {
					t.Errorf("KeyByID asked %d times, want %d: %s", got, tt.asked, h.log())
				}
				if took := time.Since(began); took > DefaultTimeout/2 {
					t.Errorf("KeyByID asked for %v", took)
				}
				// So is one that the follower was refused.
				h.mu.Lock()
				refusing = false
				h.mu.Unlock()
				if key, err = peer.KeyByID(t.Context(), id); err != nil || !isKey(key, 0) {
					t.Fatalf("KeyByID then: %v", err)
				}
			})
		})
	}
}

// TestOpenStatuses gives OPEN_CONNECT each status that is not a success.
func TestOpenStatuses(t *testing.T) {
	for answered, want := range map[status]error{2: kms.ErrNoKeys, 3: kms.ErrNoKeys, 4: nil, 6: nil, 8: nil, 99: nil} {
		t.Run(answered.String(), func(t *testing.T) {
			inDialects(t, func(t *testing.T, n *network, d *dialect) {
				h, _ := n.serve(kmeA, func(r request) answer { return saysNo(d, r, uint32(answered)) })
				s := n.source("sae_a", "sae_b", Config{Dialect: d.name})
				_, _, err := s.Key(t.Context())
				if err == nil || want != nil && !errors.Is(err, want) || !strings.Contains(err.Error(), fmt.Sprintf("answered OPEN_CONNECT with %v", answered)) {
					t.Errorf("error %v, want %v", err, want)
				}
				if _, err := s.Status(t.Context()); err == nil {
					t.Error("status without an error")
				}
				if got := h.log(); got != "open open" {
					t.Errorf("requests %q", got)
				}
			})
		})
	}
}

// TestCounterOffer: an offer is taken if it gives 32-byte keys, and asked for
// from then on.
func TestCounterOffer(t *testing.T) {
	inDialects(t, func(t *testing.T, n *network, d *dialect) {
		var asked []qos
		h, _ := n.serve(kmeA, easy(d, func(r request) answer {
			if r.service != 2 {
				return nil
			}
			// What is between the names and the ID has the form of an answer's.
			fields := bytes.SplitN(r.payload, []byte{0}, 3)[2]
			a, err := d.decodeOpen(append(u32(0), fields...))
			if err != nil {
				t.Error(err)
			}
			asked = append(asked, a.qos)
			if a.qos.minBPS != 16 {
				return saysOpen(d, r, 7, 32, make([]byte, 16))
			}
			return nil
		}))
		s := n.source("sae_a", "sae_b", Config{Dialect: d.name, Timeout: time.Second})
		if _, key, err := s.Key(t.Context()); err != nil || !isKey(key, 0) {
			t.Fatal(err)
		}
		if err := s.keep(t.Context()); err != nil {
			t.Fatal(err)
		}
		offer := qos{32, 64, 16, 5, 0, 900, 7200, "application/json"}
		want := []qos{{32, 32, 32, 0, 0, 200, 600, "application/json"}, offer, offer, offer}
		if !slices.Equal(asked, want) {
			t.Errorf("asked for %v, want %v", asked, want)
		}
		if got := h.log(); got != "open open open get0 open" {
			t.Errorf("requests %q", got)
		}
	})
}

func TestBadOffers(t *testing.T) {
	for _, tt := range []struct {
		name string
		say  func(d *dialect, r request) answer
		want string
	}{
		{"other chunks", func(d *dialect, r request) answer { return saysOpen(d, r, 7, 16, make([]byte, 16)) },
			"fetch key: kms refuses: kme-a:25575 answered OPEN_CONNECT with status 7, quality of service not met; it offers keys of 16 bytes, not 32"},
		{"none", func(d *dialect, r request) answer { return framed(d, r, u32(7)) },
			"fetch key: kms refuses: kme-a:25575 answered OPEN_CONNECT with status 7, quality of service not met; it offers keys of 0 bytes, not 32"},
		{"again and again", func(d *dialect, r request) answer { return saysOpen(d, r, 7, 32, make([]byte, 16)) },
			"fetch key: kms refuses: kme-a:25575 answered OPEN_CONNECT with status 7, quality of service not met, although that is what it offers"},
		{"success with other chunks", func(d *dialect, r request) answer { return saysOpen(d, r, 0, 64, r.id()) },
			"fetch key: kms refuses: kme-a:25575 opened a stream with keys of 64 bytes, not 32"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			inDialects(t, func(t *testing.T, n *network, d *dialect) {
				n.serve(kmeA, easy(d, func(r request) answer {
					if r.service == 2 {
						return tt.say(d, r)
					}
					return nil
				}))
				_, _, err := n.source("sae_a", "sae_b", Config{Dialect: d.name}).Key(t.Context())
				checkError(t, err, kms.ErrRefused, tt.want)
			})
		})
	}
}

// TestLostAnswers: whatever comes instead of an answer to GET_KEY, the error
// says so in time, and neither end asks for that index again.
func TestLostAnswers(t *testing.T) {
	const late = "no answer within 5s"
	for _, tt := range []struct {
		name string
		say  func(d *dialect, r request) answer
		want string // after "kme-a:25575: GET_KEY: "
	}{
		{"nothing", func(*dialect, request) answer { return silence }, late},
		{"connection closed", func(*dialect, request) answer { return hangUp }, "connection closed before the end of the answer"},
		{"slow drip", func(d *dialect, _ request) answer { return drip(hexOf(d.version[:]) + "0500000034") }, late},
		{"half a header, then closed", func(d *dialect, _ request) answer { return then(raw(hexOf(d.version[:])), hangUp) },
			"connection closed before the end of the answer"},
		{"half an answer, then closed", func(d *dialect, r request) answer {
			return then(raw(hexOf(d.version[:])+"0500000034 00000000 00000000 00000020"+hexKey), hangUp)
		}, "connection closed before the end of the answer"},
		{"half an answer, then nothing", func(d *dialect, r request) answer {
			return raw(hexOf(d.version[:]) + "0500000034 00000000 00000000 00000020" + hexKey)
		}, late},
		{"other version", func(d *dialect, r request) answer { return raw("030000 05 00000004 00000000") }, "answer has version 3.0.0, not that of dialect DIALECT"},
		{"other service", func(d *dialect, r request) answer { return raw(hexOf(d.version[:]) + "03 00000004 00000000") }, "answer has service 0x03, not 0x05"},
		{"four gigabytes", func(d *dialect, r request) answer { return raw(hexOf(d.version[:]) + "05 ffffffff") }, "answer has 4294967295 bytes, over 65536"},
		{"HTTP", func(d *dialect, r request) answer { return raw(hexOf([]byte("HTTP/1.1 400 Bad Request\r\n\r\n"))) },
			"answer has version 72.84.84, not that of dialect DIALECT"},
		{"no fields", func(d *dialect, r request) answer { return framed(d, r, u32(0)) }, "answer is cut off"},
		{"short key", func(d *dialect, r request) answer { return saysKey(d, r, r.index(), keyOf(0)[:16]) }, "key has 128 bits, not 256"},
		{"zero key", func(d *dialect, r request) answer { return saysKey(d, r, r.index(), make([]byte, 32)) }, "key is all zero"},
		{"too long", func(d *dialect, r request) answer {
			return framed(d, r, append(append(u32(0, r.index(), 32), keyOf(0)...), 0, 0, 0, 0, 9))
		}, "answer is 1 bytes too long"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			inDialects(t, func(t *testing.T, n *network, d *dialect) {
				want := "kme-a:25575: GET_KEY: " + strings.ReplaceAll(tt.want, "DIALECT", d.name)
				h, _ := n.serve(kmeA, easy(d, func(r request) answer {
					if r.service == 4 && r.index() == 0 {
						return tt.say(d, r)
					}
					return nil
				}))
				s := n.source("sae_a", "sae_b", Config{Dialect: d.name})
				began := time.Now()
				_, key, err := s.Key(t.Context())
				checkError(t, err, nil, "fetch key: "+want)
				if took := time.Since(began); key != nil || took > DefaultTimeout {
					t.Errorf("took %v", took)
				}
				id, key, err := s.Key(t.Context())
				if err != nil || !isKey(key, 1) {
					t.Fatalf("then %q, %v", id, err)
				}
				if got := h.log(); got != "open open get0 get1" {
					t.Errorf("requests %q", got)
				}

				peer := n.source("sae_b", "sae_a", Config{Dialect: d.name})
				id = strings.Replace(id, ":1:", ":0:", 1)
				_, err = peer.KeyByID(t.Context(), id)
				checkError(t, err, nil, fmt.Sprintf("fetch key %q: %s", id, want))
				_, err = peer.KeyByID(t.Context(), id)
				checkError(t, err, nil, fmt.Sprintf("key %q was asked for before", id))
			})
		})
	}
}

// then says one thing after the other.
func then(says ...answer) answer {
	return func(c net.Conn) {
		for _, say := range says {
			say(c)
		}
	}
}

func hexOf(b []byte) string { return hex.EncodeToString(b) }

// TestBadOpenAnswers: an answer to OPEN_CONNECT that cannot be used costs no
// index.
func TestBadOpenAnswers(t *testing.T) {
	other := bytes.Repeat([]byte{7}, 16)
	for _, tt := range []struct {
		name string
		say  func(d *dialect, r request) answer
		want string
	}{
		{"other stream", func(d *dialect, r request) answer { return saysOpen(d, r, 0, 32, other) }, "answer is about key stream 07070707070707070707070707070707, not STREAM"},
		{"no stream", func(d *dialect, r request) answer { return saysOpen(d, r, 0, 32, make([]byte, 16)) }, "answer names no key stream"},
		{"cut off", func(d *dialect, r request) answer { return framed(d, r, u32(0, 32)) }, "answer is cut off"},
		{"nothing", func(*dialect, request) answer { return silence }, "no answer within 5s"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			inDialects(t, func(t *testing.T, n *network, d *dialect) {
				n.serve(kmeA, easy(d, once(2, 1, func(r request) answer { return tt.say(d, r) })))
				s := n.source("sae_a", "sae_b", Config{Dialect: d.name})
				_, _, err := s.Key(t.Context())
				checkError(t, err, nil, "fetch key: kme-a:25575: OPEN_CONNECT: "+strings.ReplaceAll(tt.want, "STREAM", s.known.id.String()))
				if _, key, err := s.Key(t.Context()); err != nil || !isKey(key, 0) {
					t.Error(err)
				}
			})
		})
	}
}

// TestOtherIndex: the answer says which key it holds. The leader takes a later
// one for its own, the follower none but the one that it asked for.
func TestOtherIndex(t *testing.T) {
	inDialects(t, func(t *testing.T, n *network, d *dialect) {
		skip := uint32(3)
		h, _ := n.serve(kmeA, easy(d, func(r request) answer {
			if r.service == 4 {
				return saysKey(d, r, r.index()+skip, keyOf(r.index()+skip))
			}
			return nil
		}))
		s := n.source("sae_a", "sae_b", Config{Dialect: d.name})
		id, key, err := s.Key(t.Context())
		if err != nil || !strings.HasPrefix(id, s.known.id.String()+":3:") || !isKey(key, 3) {
			t.Fatalf("%q, %v", id, err)
		}
		_, err = n.source("sae_b", "sae_a", Config{Dialect: d.name}).KeyByID(t.Context(), id)
		checkError(t, err, nil, fmt.Sprintf("fetch key %q: kme-a:25575 delivered the key with index 6 instead", id))

		h.mu.Lock()
		skip = ^uint32(0) // one less
		h.seen = nil
		h.mu.Unlock()
		_, key, err = s.Key(t.Context())
		checkError(t, err, nil, "fetch key: kme-a:25575 delivered the key with index 3 when asked for 4")
		if key != nil {
			t.Error("a key delivered before")
		}
		// It may have lost count: the stream begins anew, under other IDs.
		h.mu.Lock()
		skip = 0
		h.mu.Unlock()
		again, key, err := s.Key(t.Context())
		if err != nil || !isKey(key, 0) || strings.HasSuffix(again, id[len(id)-tagLength:]) {
			t.Errorf("then %q after %q, %v", again, id, err)
		}
		if got := h.log(); got != "get4 close open get0" {
			t.Errorf("requests %q", got)
		}
	})
}

// TestInsufficientKey: a KMS that has run out of keys is asked for the same
// index until it has it, and from the third time on for a later one, too. An
// index of which the answer is lost, and what was skipped, is over with.
func TestInsufficientKey(t *testing.T) {
	inDialects(t, func(t *testing.T, n *network, d *dialect) {
		say := func(uint32) answer { return nil }
		h, _ := n.serve(kmeA, easy(d, func(r request) answer {
			if r.service != 4 {
				return nil
			}
			if other := say(r.index()); other != nil {
				return other
			}
			return saysNo(d, r, 2)
		}))
		s := n.source("sae_a", "sae_b", Config{Dialect: d.name})
		want := "open open"
		for _, asked := range []string{"get0", "get0", "get0 get3", "get0 get7", "get0 get12"} {
			_, _, err := s.Key(t.Context())
			checkError(t, err, kms.ErrNoKeys, "fetch key: kms has no key now: kme-a:25575 answered GET_KEY with status 2, insufficient key")
			if want += " " + asked; h.log() != want {
				t.Errorf("requests %q, want %q", h.log(), want)
			}
		}
		for range 20 {
			_, _, _ = s.Key(t.Context())
		}
		if want := fmt.Sprint("get", s.led.ahead); s.led.next != 0 || !strings.HasSuffix(h.log(), want) || s.led.ahead != 12+6+7+8+9+10+11+12+13+14+15+10*16 {
			t.Errorf("requests %q", h.log())
		}

		h.mu.Lock()
		h.seen = nil
		say = func(index uint32) answer {
			if index > 0 {
				return hangUp
			}
			return nil
		}
		h.mu.Unlock()
		last := s.led.ahead + maxSkip
		_, _, err := s.Key(t.Context())
		checkError(t, err, nil, "fetch key: kme-a:25575: GET_KEY: connection closed before the end of the answer")
		h.mu.Lock()
		say = func(index uint32) answer { return saysKey(d, request{service: 4}, index, keyOf(index)) }
		h.mu.Unlock()
		for i := range uint32(2) {
			if _, key, err := s.Key(t.Context()); err != nil || !isKey(key, last+1+i) {
				t.Errorf("then %v", err)
			}
		}
		if got, want := h.log(), fmt.Sprintf("get0 get%d get%d get%d", last, last+1, last+2); got != want {
			t.Errorf("requests %q, want %q", got, want)
		}
	})
}

// TestLastIndex: indices do not wrap, an association ends with them.
func TestLastIndex(t *testing.T) {
	inDialects(t, func(t *testing.T, n *network, d *dialect) {
		h, _ := n.serve(kmeA, easy(d, once(4, 1, func(r request) answer { return saysKey(d, r, 0xffffffff, keyOf(9)) })))
		s := n.source("sae_a", "sae_b", Config{Dialect: d.name})
		if id, key, err := s.Key(t.Context()); err != nil || !strings.Contains(id, ":4294967295:") || !isKey(key, 9) {
			t.Fatalf("%q, %v", id, err)
		}
		if id, key, err := s.Key(t.Context()); err != nil || !strings.Contains(id, ":0:") || !isKey(key, 0) {
			t.Fatalf("%q, %v", id, err)
		}
		if got := h.log(); got != "open open get0 close open get0" {
			t.Errorf("requests %q", got)
		}
	})
}

// TestMetadata: a KMS that has more metadata than there is room for is given
// more room, up to a limit.
func TestMetadata(t *testing.T) {
	inDialects(t, func(t *testing.T, n *network, d *dialect) {
		var rooms []uint32
		n.serve(kmeA, easy(d, func(r request) answer {
			if r.service != 4 {
				return nil
			}
			room := uint32(r.payload[20])<<24 | uint32(r.payload[21])<<16 | uint32(r.payload[22])<<8 | uint32(r.payload[23])
			if d == ed3 && len(r.payload) != 24+int(room) {
				t.Errorf("%d bytes of room, not %d", len(r.payload)-24, room)
			}
			if rooms = append(rooms, room); room < 3000 {
				return framed(d, r, u32(8, 3000))
			}
			return nil
		}))
		if _, key, err := n.source("sae_a", "sae_b", Config{Dialect: d.name}).Key(t.Context()); err != nil || !isKey(key, 0) {
			t.Fatal(err)
		}
		if want := map[string][]uint32{"forge-ed3": {2, 1024, 3072}, "forge-ed1": {1024, 4096}}[d.name]; !slices.Equal(rooms, want) {
			t.Errorf("asked with room for %v, want %v", rooms, want)
		}
	})
}

// TestURIs: in order, with health remembered, and the stream opened wherever a
// key is asked for.
func TestURIs(t *testing.T) {
	inDialects(t, func(t *testing.T, n *network, d *dialect) {
		b, _ := n.serve(kmeB, easy(d))
		s := n.source("sae_a", "sae_b", Config{Dialect: d.name, URIs: []string{kmeA, kmeB}})
		if _, key, err := s.Key(t.Context()); err != nil || !isKey(key, 0) {
			t.Fatal(err)
		}
		a, stopA := n.serve(kmeA, easy(d))
		if _, key, err := s.Key(t.Context()); err != nil || !isKey(key, 1) { // a is not tried for a while
			t.Fatal(err)
		}
		time.Sleep(downTime)
		if _, key, err := s.Key(t.Context()); err != nil || !isKey(key, 0) {
			t.Fatal(err)
		}
		stopA()
		time.Sleep(idleTimeout) // ended connections are no more in use
		if _, key, err := s.Key(t.Context()); err != nil || !isKey(key, 0) {
			t.Fatal(err)
		}
		if got, want := a.log(), "open open get0"; got != want {
			t.Errorf("requests to a %q, want %q", got, want)
		}
		// Coming back, it does not trust what it knew of the stream there.
		if got, want := b.log(), "open open get0 get1 open close open get0"; got != want {
			t.Errorf("requests to b %q, want %q", got, want)
		}
		st, err := s.Status(t.Context())
		if err != nil || st.SourceKME != kmeB {
			t.Errorf("status of %q, %v", st.SourceKME, err)
		}
	})
}

// TestLostAtOneURI: a request that may have cost a key is not sent elsewhere.
func TestLostAtOneURI(t *testing.T) {
	inDialects(t, func(t *testing.T, n *network, d *dialect) {
		n.serve(kmeA, easy(d, once(4, 1, func(request) answer { return silence })))
		b, _ := n.serve(kmeB, easy(d))
		s := n.source("sae_a", "sae_b", Config{Dialect: d.name, URIs: []string{kmeA, kmeB}})
		_, _, err := s.Key(t.Context())
		checkError(t, err, nil, "fetch key: kme-a:25575: GET_KEY: no answer within 5s")
		if got := b.log(); got != "" {
			t.Errorf("requests to b %q", got)
		}
		if _, key, err := s.Key(t.Context()); err != nil || !isKey(key, 0) {
			t.Fatal(err)
		}
		if got := b.log(); got != "open open get0" {
			t.Errorf("requests to b %q", got)
		}
	})
}

func TestNothingReached(t *testing.T) {
	inDialects(t, func(t *testing.T, n *network, d *dialect) {
		s := n.source("sae_a", "sae_b", Config{Dialect: d.name, URIs: []string{kmeA, kmeB}})
		_, _, err := s.Key(t.Context())
		checkError(t, err, nil, "fetch key: kme-a:25575: OPEN_CONNECT: dial kme-a:25575: unreachable; kme-b:25575: OPEN_CONNECT: dial kme-b:25575: unreachable")
	})
}

// TestDialDeadline: the deadline of a call covers dialling and the handshake.
func TestDialDeadline(t *testing.T) {
	inDialects(t, func(t *testing.T, n *network, d *dialect) {
		l, err := n.Listen(kmeA) // nobody accepts
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		s := n.source("sae_a", "sae_b", Config{Dialect: d.name, Timeout: 2 * time.Second})
		began := time.Now()
		_, _, err = s.Key(t.Context())
		checkError(t, err, nil, "fetch key: kme-a:25575: OPEN_CONNECT: no answer within 2s")
		if took := time.Since(began); took != 2*time.Second {
			t.Errorf("took %v", took)
		}
		ctx, cancel := context.WithCancelCause(t.Context())
		time.AfterFunc(time.Second, func() { cancel(errors.New("stopped")) })
		_, _, err = s.Key(ctx)
		checkError(t, err, nil, "fetch key: kme-a:25575: OPEN_CONNECT: stopped")
	})
}

func TestCertificates(t *testing.T) {
	for _, tt := range []struct {
		name string
		set  func(n *network, c *Config)
		want string
	}{
		{"KMS of another authority", func(n *network, c *Config) {
			c.TLS = trusting(testca.New(n.t, "other"), n.ca.Client("sae_a"))
		}, "certificate: x509: certificate signed by unknown authority"},
		{"KMS of another name", func(_ *network, c *Config) { c.URIs = []string{"10.0.0.1:25575"} },
			"certificate: x509: cannot validate certificate for 10.0.0.1 because it doesn't contain any IP SANs"},
		{"our certificate of another authority", func(n *network, c *Config) {
			c.TLS = trusting(n.ca, testca.New(n.t, "other").Client("sae_a"))
		}, "TLS alert: tls: "},
		{"old TLS", func(*network, *Config) {}, "TLS alert: tls: protocol version not supported"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			inDialects(t, func(t *testing.T, n *network, d *dialect) {
				c := Config{Dialect: d.name, URIs: []string{kmeA}}
				tt.set(n, &c)
				conf := &tls.Config{
					Certificates: []tls.Certificate{n.ca.Server("kme-a")}, ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: n.ca.Pool(),
				}
				if tt.name == "old TLS" {
					conf.MinVersion, conf.MaxVersion = tls.VersionTLS11, tls.VersionTLS11
				}
				h, _ := n.serveTLS(c.URIs[0], conf, easy(d))
				_, _, err := n.source("sae_a", "sae_b", c).Key(t.Context())
				if !errors.Is(err, kms.ErrRefused) || !strings.Contains(err.Error(), tt.want) {
					t.Errorf("error %v, want %q", err, tt.want)
				}
				if h.connections() != 0 {
					t.Error("a connection came about")
				}
			})
		})
	}
}

// TestKeptConnections: forge-ed1 keeps a connection between requests, but not
// so long that the server closes it first.
func TestKeptConnections(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNetwork(t)
		h, stop := n.serve(kmeA, easy(ed1))
		s := n.source("sae_a", "sae_b", Config{Dialect: "forge-ed1"})
		for i := range uint32(3) {
			if _, key, err := s.Key(t.Context()); err != nil || !isKey(key, i) {
				t.Fatal(err)
			}
			time.Sleep(idleTimeout - time.Second)
		}
		if h.connections() != 1 {
			t.Errorf("%d connections, want 1", h.connections())
		}
		time.Sleep(2 * time.Second)
		synctest.Wait()
		if _, key, err := s.Key(t.Context()); err != nil || !isKey(key, 3) {
			t.Fatal(err)
		}
		if h.connections() != 2 {
			t.Errorf("%d connections, want 2", h.connections())
		}

		// The server restarts: a request that costs a key is not repeated on
		// another connection, one that does not is.
		stop()
		h, stop = n.serve(kmeA, easy(ed1))
		if _, _, err := s.Key(t.Context()); !lost(err) || h.log() != "" {
			t.Fatalf("error %v, then %q", err, h.log())
		}
		if _, key, err := s.Key(t.Context()); err != nil || !isKey(key, 5) {
			t.Fatal(err)
		}
		stop()
		h, _ = n.serve(kmeA, easy(ed1))
		if err := s.keep(t.Context()); err != nil {
			t.Fatal(err)
		}
		if got := h.log(); got != "open open" { // the second to see whether it was gone
			t.Errorf("requests %q", got)
		}
	})
}

// TestConcurrency: calls of many goroutines get each key once; a slow KMS has
// no more than maxCalls of them to answer.
func TestConcurrency(t *testing.T) {
	inDialects(t, func(t *testing.T, n *network, d *dialect) {
		n.serve(kmeA, easy(d))
		s := n.source("sae_a", "sae_b", Config{Dialect: d.name})
		peer := n.source("sae_b", "sae_a", Config{Dialect: d.name})
		var mu sync.Mutex
		met := make(map[string]bool)
		var running sync.WaitGroup
		for range 40 {
			running.Go(func() {
				id, key, err := s.Key(t.Context())
				if err != nil {
					t.Error(err)
					return
				}
				same, err := peer.KeyByID(t.Context(), id)
				if err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				defer mu.Unlock()
				if !bytes.Equal(same.Bytes(), key.Bytes()) || met[id] {
					t.Error("keys differ, or one came twice")
				}
				met[id] = true
			})
		}
		running.Wait()
		if len(met) != 40 {
			t.Errorf("%d keys", len(met))
		}
	})
}

// TestForgottenUnderway: several followers meet a KMS that has forgotten their
// stream. One of them opens it again, for all.
func TestForgottenUnderway(t *testing.T) {
	inDialects(t, func(t *testing.T, n *network, d *dialect) {
		opens := 0
		n.serve(kmeA, easy(d, func(r request) answer {
			switch {
			case r.service == 2:
				if opens++; opens == 3 { // the first two found that it was not open
					return saysOpen(d, r, 0, 32, r.id())
				}
			case r.service == 4 && opens < 3:
				return func(c net.Conn) {
					time.Sleep(time.Second)
					saysNo(d, r, 9)(c)
				}
			}
			return nil
		}))
		s := n.source("sae_b", "sae_a", Config{Dialect: d.name})
		var running sync.WaitGroup
		for i := range uint32(4) {
			running.Go(func() {
				id := keyID{s.known.id, i, "0badcafe"}
				if key, err := s.KeyByID(t.Context(), id.String()); err != nil || !isKey(key, i) {
					t.Error(err)
				}
			})
		}
		running.Wait()
	})
}

// TestBusy: whoever finds no place waits as long as a call takes, no longer.
func TestBusy(t *testing.T) {
	inDialects(t, func(t *testing.T, n *network, d *dialect) {
		n.serve(kmeA, func(request) answer { return silence })
		k := n.kms("sae_a", Config{Dialect: d.name})
		var running sync.WaitGroup
		for i := range maxCalls {
			s, err := k.For(fmt.Sprintf("sae_%d", i))
			if err != nil {
				t.Fatal(err)
			}
			running.Go(func() { _, _ = s.Status(t.Context()) })
		}
		synctest.Wait()
		s, err := k.For("sae_b")
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		_, _, err = s.Key(ctx)
		checkError(t, err, context.DeadlineExceeded, "fetch key: context deadline exceeded")
		running.Wait()
	})
}

// TestAbsentPeers: a KMS that waits for absent peers as long as it may does not
// keep the keys of one that is there.
func TestAbsentPeers(t *testing.T) {
	inDialects(t, func(t *testing.T, n *network, d *dialect) {
		absent, looked := false, make(map[string]bool)
		h, _ := n.serve(kmeA, easy(d, func(r request) answer {
			if r.service != 2 || !absent {
				return nil
			}
			looked[string(r.id())] = true
			return func(c net.Conn) {
				time.Sleep(DefaultTimeout / 5)
				saysOpen(d, r, 1, 32, r.id())(c)
			}
		}))
		k := n.kms("sae_a", Config{Dialect: d.name})
		s, err := k.For("sae_b")
		if err != nil {
			t.Fatal(err)
		}
		if _, _, err := s.Key(t.Context()); err != nil {
			t.Fatal(err)
		}
		h.mu.Lock()
		absent = true
		h.mu.Unlock()
		ctx, cancel := context.WithCancel(t.Context())
		var running sync.WaitGroup
		for i := range 60 {
			other, err := k.For(fmt.Sprintf("sae_%d", i))
			if err != nil {
				t.Fatal(err)
			}
			running.Go(func() { other.(kms.Keeper).Keep(ctx) })
		}
		for range 20 {
			time.Sleep(1500 * time.Millisecond)
			began := time.Now()
			if _, _, err := s.Key(t.Context()); err != nil || time.Since(began) != 0 {
				t.Errorf("after %v: %v", time.Since(began), err)
			}
		}
		time.Sleep(10 * time.Second)
		cancel()
		running.Wait()
		h.mu.Lock()
		defer h.mu.Unlock()
		if len(looked) < 60 {
			t.Errorf("looked after %d streams of 60", len(looked))
		}
	})
}

func TestNew(t *testing.T) {
	n := newNetwork(t)
	good := Config{URIs: []string{kmeA}, SAE: "sae_a", Dialect: "forge-ed3", TLS: trusting(n.ca, n.ca.Client("sae_a"))}
	for _, tt := range []struct {
		set  func(c *Config)
		want string
	}{
		{func(*Config) {}, ""},
		{func(c *Config) { c.Timeout = MaxTimeout }, ""},
		{func(c *Config) { c.URIs = []string{"[2001:db8::1]:25575", "10.0.0.1:1"} }, ""},
		{func(c *Config) { c.SAE = "qkd://node-a/app" }, ""},
		{func(c *Config) { c.SAE, c.Dialect = "qkd://node-a/app", "forge-ed1" }, ""},
		{func(c *Config) { c.SAE, c.Dialect = "sae/a", "forge-ed1" }, `SAE ID "sae/a" is no URI and cannot be made one, as dialect forge-ed1 wants`},
		{func(c *Config) { c.SAE, c.Dialect = "qkd:///app", "forge-ed1" }, `SAE ID "qkd:///app" is no URI and cannot be made one, as dialect forge-ed1 wants`},
		{func(c *Config) { c.Dialect = "" }, `dialect "" is neither forge-ed3 nor forge-ed1`},
		{func(c *Config) { c.Dialect = "Forge-ED3" }, `dialect "Forge-ED3" is neither forge-ed3 nor forge-ed1`},
		{func(c *Config) { c.SAE = "" }, "SAE ID is empty"},
		{func(c *Config) { c.SAE = "a\x00b" }, `SAE ID "a\x00b" is not printable text`},
		{func(c *Config) { c.SAE = strings.Repeat("a", 1025) }, "SAE ID is 1025 bytes long, over 1024"},
		{func(c *Config) { c.URIs = nil }, "0 URIs, not 1 to 16"},
		{func(c *Config) { c.URIs = make([]string, 17) }, "17 URIs, not 1 to 16"},
		{func(c *Config) { c.URIs = []string{"kme-a"} }, `URI "kme-a" is not host:port`},
		{func(c *Config) { c.URIs = []string{":25575"} }, `URI ":25575" is not host:port`},
		{func(c *Config) { c.URIs = []string{"kme-a:0"} }, `URI "kme-a:0" has no port from 1 to 65535`},
		{func(c *Config) { c.URIs = []string{"kme-a:https"} }, `URI "kme-a:https" has no port from 1 to 65535`},
		{func(c *Config) { c.Timeout = -1 }, "timeout -1ns is not between 0 and 1m0s"},
		{func(c *Config) { c.Timeout = time.Hour }, "timeout 1h0m0s is not between 0 and 1m0s"},
		{func(c *Config) { c.TLS.Memory = nil }, "no root certificate: the KMS could not be verified"},
	} {
		c := good
		tt.set(&c)
		k, err := New(c)
		if errText(err) != tt.want {
			t.Errorf("error %q, want %q", errText(err), tt.want)
		}
		if err == nil {
			_ = k.Close()
		}
	}
	k, err := New(good)
	if err != nil {
		t.Fatal(err)
	}
	for peer, want := range map[string]string{"": "SAE ID is empty", "sae_a": `SAE "sae_a" is our own, not a peer's`} {
		if _, err := k.For(peer); errText(err) != want {
			t.Errorf("error %q, want %q", errText(err), want)
		}
	}
}

func checkError(t *testing.T, err, is error, want string) {
	t.Helper()
	if err == nil || is != nil && !errors.Is(err, is) || err.Error() != want {
		t.Errorf("error %q, want %q", errText(err), want)
	}
	if is == nil && (errors.Is(err, kms.ErrNoKeys) || errors.Is(err, kms.ErrRefused) || errors.Is(err, kms.ErrUnknownKey)) {
		t.Errorf("error %q has a meaning", errText(err))
	}
}

// TestForeignStream: a peer cannot have keys fetched out of a key stream that
// this end shares with another peer, whose ID anybody can compute. Each index
// is delivered once: the other peer's keys would be gone.
func TestForeignStream(t *testing.T) {
	inDialects(t, func(t *testing.T, n *network, d *dialect) {
		h, _ := n.serve(kmeA, easy(d))
		k := n.kms("sae_a", Config{Dialect: d.name})
		var sources [2]kms.Source
		for i, peer := range []string{"sae_b", "sae_c"} {
			s, err := k.For(peer)
			if err != nil {
				t.Fatal(err)
			}
			sources[i] = s
		}
		id, _, err := sources[0].Key(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		before := h.log()
		next := strings.Replace(id, ":0:", ":1:", 1)
		_, err = sources[1].KeyByID(t.Context(), next)
		checkError(t, err, nil, fmt.Sprintf("key %q is of the key stream shared with another peer", next))
		if got := h.log(); got != before {
			t.Errorf("requests %q, before %q", got, before)
		}
		if key, err := sources[0].KeyByID(t.Context(), next); err != nil || !isKey(key, 1) {
			t.Errorf("the peer's own: %v", err)
		}
	})
}
