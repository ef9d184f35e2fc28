package kmesim

import (
	"errors"
	"fmt"
	"net"
	"strings"
)

// StreamPort is where a pair answers by ETSI GS QKD 004. A pair can have
// several, for one dialect or more; they share all streams.
type StreamPort struct {
	StreamOptions
	AddrA, AddrB string // TCP addresses; a KME without one is not there
	// Listening is called before Run's ready, if not nil, with where the KMEs are.
	Listening func(addrA, addrB net.Addr)
}

// ParseStreamPort reads a dialect, the addresses of one or both KMEs, and the
// options peer-first, metadata and hold, as
// "forge-ed3,a=127.0.0.1:25575,b=127.0.0.1:25576,hold".
func ParseStreamPort(text string) (p StreamPort, err error) {
	name, rest, _ := strings.Cut(text, ",")
	if p.Dialect, err = ParseDialect(name); err != nil {
		return StreamPort{}, err
	}
	for part := range strings.SplitSeq(rest, ",") {
		name, value, _ := strings.Cut(part, "=")
		switch {
		case name == "a" && value != "":
			p.AddrA = value
		case name == "b" && value != "":
			p.AddrB = value
		case part == "peer-first":
			p.PeerFirst = true
		case part == "metadata":
			p.Metadata = true
		case part == "hold":
			p.Hold = true
		case part != "":
			return StreamPort{}, fmt.Errorf("%q is none of a=ADDRESS, b=ADDRESS, peer-first, metadata, hold", part)
		}
	}
	if p.AddrA == "" && p.AddrB == "" {
		return StreamPort{}, errors.New("no address, as a=127.0.0.1:25575")
	}
	return p, nil
}
