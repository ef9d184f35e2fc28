package daemon_test

import (
	"errors"
	"net"
	"syscall"
	"testing"

	"keyturn/internal/daemon"
)

// TestListen: 0.0.0.0 is IPv4 only, as the manual says; an empty host and [::]
// are everything.
func TestListen(t *testing.T) {
	for address, want := range map[string]string{"0.0.0.0:0": "0.0.0.0", "[::]:0": "::", ":0": "::", "127.0.0.1:0": "127.0.0.1"} {
		ln, err := daemon.Listen(t.Context(), address)
		if err != nil {
			t.Fatal(err)
		}
		ln.Close()
		if host, _, _ := net.SplitHostPort(ln.Addr().String()); host != want {
			t.Errorf("%s listens at %s, want %s", address, host, want)
		}
	}
}

// TestListenTaken: whoever has the address is another, and the address is named.
func TestListenTaken(t *testing.T) {
	ln, err := daemon.Listen(t.Context(), "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	_, err = daemon.Listen(t.Context(), ln.Addr().String())
	want := "listen tcp4 " + ln.Addr().String() + ": bind: address already in use by another process"
	if !errors.Is(err, syscall.EADDRINUSE) || err.Error() != want {
		t.Errorf("got %v, want %s", err, want)
	}
}
