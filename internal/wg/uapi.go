package wg

import (
	"bytes"
	"crypto/ecdh"
	"encoding/hex"
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"time"

	"keyturn/internal/psk"
)

// Limits of what parseUAPI accepts.
const (
	maxUAPI      = 64 << 20 // bytes
	maxUAPIPeers = 1 << 16  // as wireguard-go's device.MaxPeers
)

// parseUAPI reads the answer to a "get" of WireGuard's cross-platform
// interface (https://www.wireguard.com/xplatform/) without its errno line. It
// is strict: an unknown key, a value out of range, a peer twice or a key out of
// place is an error. Errors name lines and keys, never values: some are secret.
func parseUAPI(text []byte) (*Dump, error) {
	if len(text) > maxUAPI {
		return nil, fmt.Errorf("answer is longer than %d bytes", maxUAPI)
	}
	u := uapiParser{dump: Dump{Peers: make(map[PublicKey]Peer)}}
	line := 0
	for len(text) > 0 {
		line++
		var entry []byte
		entry, text, _ = bytes.Cut(text, []byte{'\n'})
		key, value, ok := bytes.Cut(entry, []byte{'='})
		if !ok {
			u.dump.Wipe()
			return nil, fmt.Errorf("line %d: not key=value", line)
		}
		if err := u.entry(string(key[:min(len(key), 64)]), value); err != nil {
			u.finish()
			u.dump.Wipe()
			return nil, fmt.Errorf("line %d: %w", line, err)
		}
	}
	u.finish()
	return &u.dump, nil
}

type uapiParser struct {
	dump    Dump
	peer    *Peer // the one being read; nil before the first
	sec, ns int64 // of its latest handshake
}

func (u *uapiParser) finish() {
	if u.peer == nil {
		return
	}
	if u.sec != 0 || u.ns != 0 {
		u.peer.Handshake = time.Unix(u.sec, u.ns)
	}
	u.dump.Peers[u.peer.PublicKey] = *u.peer
}

func (u *uapiParser) entry(key string, value []byte) error {
	if key == "public_key" {
		u.finish()
		var k PublicKey
		if err := unhex(k[:], value); err != nil {
			return fmt.Errorf("%s: %w", key, err)
		}
		if _, ok := u.dump.Peers[k]; ok {
			return fmt.Errorf("peer %s is listed twice", k)
		}
		if len(u.dump.Peers) == maxUAPIPeers {
			return fmt.Errorf("more than %d peers", maxUAPIPeers)
		}
		u.peer = &Peer{PublicKey: k, PSK: new(psk.Key)}
		u.sec, u.ns = 0, 0
		return nil
	}
	set := u.peerEntry
	if u.peer == nil {
		set = u.deviceEntry
	}
	known, err := set(key, value)
	if err != nil {
		return fmt.Errorf("%s: %w", key, err)
	}
	if !known {
		return fmt.Errorf("unknown key %q", key)
	}
	return nil
}

func (u *uapiParser) deviceEntry(key string, value []byte) (known bool, err error) {
	switch key {
	case "private_key":
		u.dump.PublicKey, err = publicOf(value)
	case "listen_port":
		var port uint64
		port, err = number(value, 1<<16-1)
		u.dump.ListenPort = uint16(port)
	case "fwmark":
		_, err = number(value, 1<<32-1)
	default:
		return false, nil
	}
	return true, err
}

func (u *uapiParser) peerEntry(key string, value []byte) (known bool, err error) {
	var n uint64
	switch key {
	case "preshared_key":
		err = unhex(u.peer.PSK.Bytes(), value)
	case "protocol_version":
		if n, err = number(value, 1); err == nil && n != 1 {
			err = errValue
		}
	case "endpoint":
		if u.peer.Endpoint, err = netip.ParseAddrPort(string(value)); err != nil {
			err = errValue
		}
	case "last_handshake_time_sec":
		n, err = number(value, 1<<62)
		u.sec = int64(n)
	case "last_handshake_time_nsec":
		n, err = number(value, 1e9-1)
		u.ns = int64(n)
	case "tx_bytes":
		u.peer.Tx, err = number(value, 1<<64-1)
	case "rx_bytes":
		u.peer.Rx, err = number(value, 1<<64-1)
	case "persistent_keepalive_interval":
		n, err = number(value, 1<<16-1)
		u.peer.Keepalive = time.Duration(n) * time.Second
	case "allowed_ip":
		var p netip.Prefix
		if p, err = netip.ParsePrefix(string(value)); err != nil {
			return true, errValue
		}
		u.peer.AllowedIPs = append(u.peer.AllowedIPs, p)
	default:
		return false, nil
	}
	return true, err
}

// errValue says no more than that, since values can be secret.
var errValue = errors.New("value is not valid")

func number(value []byte, limit uint64) (uint64, error) {
	n, err := strconv.ParseUint(string(value), 10, 64)
	if err != nil || n > limit {
		return 0, errValue
	}
	return n, nil
}

func unhex(to, value []byte) error {
	if len(value) != hex.EncodedLen(len(to)) {
		return errValue
	}
	if _, err := hex.Decode(to, value); err != nil {
		return errValue
	}
	return nil
}

// publicOf returns the public key of a private one in hex.
func publicOf(value []byte) (PublicKey, error) {
	var private [32]byte
	defer clear(private[:])
	if err := unhex(private[:], value); err != nil {
		return PublicKey{}, err
	}
	k, err := ecdh.X25519().NewPrivateKey(private[:])
	if err != nil {
		return PublicKey{}, errValue
	}
	return PublicKey(k.PublicKey().Bytes()), nil
}
