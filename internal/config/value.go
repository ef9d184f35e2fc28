package config

import (
	"encoding/base64"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"path"
	"regexp"
	"strconv"
	"strings"
	"time"
	"unicode"
)

// badValue is why a text is not a value, and what would be one.
type badValue struct {
	message, hint string
	public        bool // nobody's secret: may be shown as it is
}

func (e *badValue) Error() string { return e.message }

func bad(hint, format string, args ...any) error {
	return &badValue{message: fmt.Sprintf(format, args...), hint: hint}
}

// list names values as in "a, b or c".
func list[T ~string](values []T) string {
	var b strings.Builder
	for i, v := range values {
		switch {
		case i > 0 && i == len(values)-1:
			b.WriteString(" or ")
		case i > 0:
			b.WriteString(", ")
		}
		b.WriteString(string(v))
	}
	return b.String()
}

// oneOf reads a word of a fixed choice.
func oneOf[T ~string](permitted ...T) func(string) (T, error) {
	return func(s string) (T, error) {
		words := make([]string, len(permitted))
		for i, p := range permitted {
			if s == string(p) {
				return p, nil
			}
			words[i] = string(p)
		}
		return "", bad(didYouMean(s, words), "%s is not %s", quote(s), list(permitted))
	}
}

// between reads a duration of whole milliseconds, which is what the protocol
// carries.
func between(least, most time.Duration, why string) func(string) (time.Duration, error) {
	return func(s string) (time.Duration, error) {
		d, err := time.ParseDuration(s)
		switch {
		case err != nil:
			hint := "write a number with a unit: 500ms, 30s, 5m, 1h"
			if _, err := strconv.ParseUint(s, 10, 32); err == nil {
				hint = fmt.Sprintf("a unit is missing: %ss, %sm", s, s)
			}
			return 0, bad(hint, "%s is not a duration", quote(s))
		case d < least || d > most:
			return 0, bad(why, "%s is not between %s and %s", quote(s), short(least), short(most))
		case d%time.Millisecond != 0:
			return 0, bad("", "%s is not in whole milliseconds", quote(s))
		}
		return d, nil
	}
}

// short writes a duration without the zero units of its standard form.
func short(d time.Duration) string {
	s := d.String()
	if strings.HasSuffix(s, "m0s") {
		s = strings.TrimSuffix(s, "0s")
	}
	if strings.HasSuffix(s, "h0m") {
		s = strings.TrimSuffix(s, "0m")
	}
	return s
}

// whole reads a number.
func whole(least, most int, why string) func(string) (int, error) {
	return func(s string) (int, error) {
		n, err := strconv.Atoi(s)
		if err != nil {
			return 0, bad("", "%s is not a whole number", quote(s))
		}
		if n < least || n > most {
			return 0, bad(why, "%s is not between %d and %d", quote(s), least, most)
		}
		return n, nil
	}
}

var validName = regexp.MustCompile(`^[A-Za-z0-9._-]{1,63}$`)

func peerName(s string) (string, error) {
	if !validName.MatchString(s) {
		return "", bad("1 to 63 of the characters A-Z a-z 0-9 . _ -", "%s cannot be the name of a peer", quote(s))
	}
	return s, nil
}

// interfaceName accepts what Linux does (dev_valid_name in net/core/dev.c),
// printable characters only.
func interfaceName(s string) (string, error) {
	strange := func(r rune) bool {
		return r == '/' || r == ':' || unicode.IsSpace(r) || !unicode.IsPrint(r)
	}
	if s == "" || len(s) > 15 || s == "." || s == ".." || strings.ContainsFunc(s, strange) {
		return "", bad("1 to 15 characters without spaces, slashes and colons", "%s cannot be the name of an interface", quote(s))
	}
	return s, nil
}

// sae accepts any printable ID but the two that HTTP clients and servers take
// out of a URL's path.
func sae(s string) (string, error) {
	strange := func(r rune) bool { return !unicode.IsPrint(r) }
	if s == "" || len(s) > MaxSAE || s == "." || s == ".." || strings.ContainsFunc(s, strange) {
		return "", bad(fmt.Sprintf("1 to %d printable characters", MaxSAE), "%s cannot be an SAE ID", quote(s))
	}
	return s, nil
}

// knownKEM accepts the names of the KEMs that keyturn speaks, exactly: both
// ends compare them as they are written.
func knownKEM(s string) (string, error) {
	return oneOf("ML-KEM-512", "ML-KEM-768", "ML-KEM-1024")(s)
}

// key reads a public value of 32 bytes, written in the only canonical way.
func key(s, what, hint string) ([32]byte, error) {
	b, err := base64.StdEncoding.Strict().DecodeString(s)
	if len(s) != 44 || err != nil || len(b) != 32 {
		// Who mistakes a secret for it makes another mistake as well.
		return [32]byte{}, bad(hint, "%s is not %s: it should be 44 characters of base64, and has %d", quote(s), what, len(s))
	}
	k := [32]byte(b)
	if k == [32]byte{} {
		return k, &badValue{message: what + " cannot be all zeros", hint: hint, public: true}
	}
	return k, nil
}

func publicKey(s string) ([32]byte, error) {
	return key(s, "a WireGuard public key", "wg show INTERFACE public-key, at the other end")
}

func fingerprint(s string) ([32]byte, error) {
	return key(s, "a rotator's identity", "keyturn pubkey < identity.key, at the other end")
}

func pin(s string) ([32]byte, error) {
	return key(s, "the pin of a certificate's key", "keyturn kms test prints it")
}

// address reads host:port. The host may be empty, meaning all of this
// machine's addresses, only where somebody listens.
func address(listens bool) func(string) (string, error) {
	const form = "host:port, such as 198.51.100.7:51822, [2001:db8::7]:51822 or vpn.example.org:51822"
	return func(s string) (string, error) {
		host, port, err := net.SplitHostPort(s)
		if err != nil {
			if _, err := netip.ParseAddr(s); err == nil {
				return "", bad("write "+net.JoinHostPort(s, "51822"), "%s has no port", quote(s))
			}
			return "", bad(form, "%s is not an address", quote(s))
		}
		if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
			return "", bad("a number from 1 to 65535", "%s is not a port", quote(port))
		}
		ip, err := netip.ParseAddr(host)
		switch {
		case err != nil && host == "" && listens:
		case err != nil && !validHost(host):
			return "", bad(form, "%s is not a host", quote(host))
		case err == nil && ip.IsMulticast(), err == nil && ip.IsUnspecified() && !listens:
			return "", bad(form, "%s is not the address of a host", quote(host))
		}
		return s, nil
	}
}

var hostLabel = regexp.MustCompile(`^[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?$`)

// validHost accepts host names of the DNS (RFC 1123, 2.1), underscores
// included, which container networks use. The last label is no number, so
// that a mistyped IPv4 address does not pass for a name.
func validHost(s string) bool {
	labels := strings.Split(strings.TrimSuffix(s, "."), ".")
	for _, l := range labels {
		if !hostLabel.MatchString(l) {
			return false
		}
	}
	_, err := strconv.ParseUint(labels[len(labels)-1], 10, 64)
	return err != nil && len(s) <= 253
}

func host(s string) (string, error) {
	if _, err := netip.ParseAddr(s); err != nil && !validHost(s) {
		return "", bad("a host name or IP address, without port", "%s is not a host", quote(s))
	}
	return s, nil
}

// httpsURI reads the base address of a KMS of interface 14 or skip.
func httpsURI(s string) (string, error) {
	const form = "https://host:port, such as https://kme-a:8443"
	u, err := url.Parse(s)
	switch {
	case err != nil, u.Host == "" || u.Opaque != "":
		return "", bad(form, "%s is not a URI with a host", quote(s))
	case u.Scheme != "https":
		return "", bad(form, "%s is not https: a KMS is spoken to over mutual TLS only", quote(s))
	case u.User != nil || u.RawQuery != "" || u.ForceQuery || u.Fragment != "":
		return "", bad(form, "%s has parts that a KMS's address cannot have", quote(s))
	}
	if _, err := host(u.Hostname()); err != nil {
		return "", bad(form, "%s is not a host", quote(u.Hostname()))
	}
	if p := u.Port(); p != "" || strings.HasSuffix(u.Host, ":") {
		if n, err := strconv.ParseUint(p, 10, 16); err != nil || n == 0 {
			return "", bad("a number from 1 to 65535", "%s is not a port", quote(p))
		}
	}
	base := strings.TrimRight(u.EscapedPath(), "/")
	if base != "" && path.Clean(base) != base {
		return "", bad(form, "%s has a path that is not plain", quote(s))
	}
	return "https://" + u.Host + strings.TrimSuffix(base, "/api/v1/keys"), nil
}

// kmeAddress reads the address of a KMS of interface 4.
func kmeAddress(s string) (string, error) {
	scheme, rest, found := strings.Cut(s, "://")
	if !found {
		scheme, rest = "tls", s
	}
	if scheme != "tls" {
		return "", bad("host:port or tls://host:port", "%s is not tls: a KMS is spoken to over mutual TLS only", quote(s))
	}
	a, err := address(false)(strings.TrimSuffix(rest, "/"))
	if err != nil {
		return "", bad("host:port or tls://host:port; the usual port is 25575", "%s is not the address of a KMS of interface 4", quote(s))
	}
	return a, nil
}
