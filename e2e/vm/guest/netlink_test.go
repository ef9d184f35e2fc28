//go:build vm

package guest

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"net"
	"net/netip"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// Interfaces are made by rtnetlink itself, so that the guest needs no
// programs but keyturn. All of these act in the namespace of the thread.

// From linux/veth.h and linux/pkt_sched.h.
const (
	vethInfoPeer = 1

	netemReorder   = 3
	netemTick      = 64 * time.Nanosecond
	netemQueue     = 10_000 // packets
	schedRootQdisc = 0xffffffff
)

// message is a request to rtnetlink.
type message struct{ b []byte }

func newMessage(kind, flags uint16) *message {
	m := new(message)
	m.put(unix.NlMsghdr{Type: kind, Flags: unix.NLM_F_REQUEST | unix.NLM_F_ACK | flags})
	return m
}

// put appends a value of fixed size.
func (m *message) put(v any) {
	b, err := binary.Append(m.b, binary.NativeEndian, v)
	if err != nil {
		panic(err) // v has no fixed size
	}
	m.b = b
}

func (m *message) text(kind uint16, s string) {
	m.nest(kind, func() { m.b = append(m.b, s+"\x00"...) })
}
func (m *message) value(kind uint16, v any) { m.nest(kind, func() { m.put(v) }) }

// nest appends an attribute of what content appends.
func (m *message) nest(kind uint16, content func()) {
	start := len(m.b)
	m.put(unix.NlAttr{Type: kind})
	content()
	binary.NativeEndian.PutUint16(m.b[start:], uint16(len(m.b)-start))
	m.b = append(m.b, make([]byte, -len(m.b)&3)...)
}

// send sends the request and returns what the kernel says to it.
func (m *message) send() error {
	binary.NativeEndian.PutUint32(m.b, uint32(len(m.b)))
	s, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(s) }()
	if err := unix.Sendto(s, m.b, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return err
	}
	answer := make([]byte, os.Getpagesize())
	n, _, err := unix.Recvfrom(s, answer, 0)
	if err != nil {
		return err
	}
	if n < unix.NLMSG_HDRLEN+4 || binary.NativeEndian.Uint16(answer[4:]) != unix.NLMSG_ERROR {
		return fmt.Errorf("rtnetlink answered %d bytes of another kind", n)
	}
	if code := int32(binary.NativeEndian.Uint32(answer[unix.NLMSG_HDRLEN:])); code != 0 {
		return unix.Errno(-code)
	}
	return nil
}

func createWireGuard(name string) error {
	m := newMessage(unix.RTM_NEWLINK, unix.NLM_F_CREATE|unix.NLM_F_EXCL)
	m.put(unix.IfInfomsg{})
	m.text(unix.IFLA_IFNAME, name)
	m.nest(unix.IFLA_LINKINFO, func() { m.text(unix.IFLA_INFO_KIND, "wireguard") })
	return m.send()
}

// createCable makes a cable between two namespaces. Its ends have one name.
func createCable(name string, a, b *os.File) error {
	m := newMessage(unix.RTM_NEWLINK, unix.NLM_F_CREATE|unix.NLM_F_EXCL)
	end := func(ns *os.File) {
		m.put(unix.IfInfomsg{})
		m.text(unix.IFLA_IFNAME, name)
		m.value(unix.IFLA_NET_NS_FD, uint32(ns.Fd()))
	}
	end(a)
	m.nest(unix.IFLA_LINKINFO, func() {
		m.text(unix.IFLA_INFO_KIND, "veth")
		m.nest(unix.IFLA_INFO_DATA, func() { m.nest(vethInfoPeer, func() { end(b) }) })
	})
	return m.send()
}

func deleteLink(name string) error {
	m := newMessage(unix.RTM_DELLINK, 0)
	m.put(unix.IfInfomsg{})
	m.text(unix.IFLA_IFNAME, name)
	return m.send()
}

// rename gives an interface that is down another name.
func rename(index int, name string) error {
	m := newMessage(unix.RTM_NEWLINK, 0)
	m.put(unix.IfInfomsg{Index: int32(index)})
	m.text(unix.IFLA_IFNAME, name)
	return m.send()
}

func setUp(name string) error   { return setFlags(name, unix.IFF_UP) }
func setDown(name string) error { return setFlags(name, 0) }

func setFlags(name string, flags uint16) error {
	s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(s) }()
	r, err := unix.NewIfreq(name)
	if err != nil {
		return err
	}
	r.SetUint16(flags)
	return unix.IoctlIfreq(s, unix.SIOCSIFFLAGS, r)
}

func addAddress(name string, p netip.Prefix) error {
	i, err := net.InterfaceByName(name)
	if err != nil {
		return err
	}
	m := newMessage(unix.RTM_NEWADDR, unix.NLM_F_CREATE|unix.NLM_F_EXCL)
	m.put(unix.IfAddrmsg{Family: unix.AF_INET, Prefixlen: uint8(p.Bits()), Index: uint32(i.Index)})
	m.value(unix.IFA_LOCAL, p.Addr().As4())
	m.value(unix.IFA_ADDRESS, p.Addr().As4())
	return m.send()
}

// weather is what happens to packets that leave through an interface. The
// zero value is fair.
type weather struct {
	loss, repetition, reordering float64       // of one; what is reordered overtakes the delayed
	delay                        time.Duration // to 4 min
}

// cut loses everything, without the sender's hearing of it.
var cut = weather{loss: 1}

// setWeather replaces the interface's queue by one of sch_netem. What waits in
// the old one is lost.
func setWeather(name string, w weather) error {
	i, err := net.InterfaceByName(name)
	if err != nil {
		return err
	}
	queue := struct { // struct tcmsg of linux/rtnetlink.h
		Family               uint8
		_                    [3]uint8
		Index                int32
		Handle, Parent, Info uint32
	}{Family: unix.AF_UNSPEC, Index: int32(i.Index), Parent: schedRootQdisc}
	m := newMessage(unix.RTM_DELQDISC, 0)
	m.put(queue)
	if err := m.send(); err != nil && !errors.Is(err, unix.ENOENT) {
		return err // ENOENT: there was none yet
	}

	share := func(p float64) uint32 { return uint32(p * math.MaxUint32) }
	gap := uint32(0)
	if w.reordering > 0 {
		gap = 1
	}
	m = newMessage(unix.RTM_NEWQDISC, unix.NLM_F_CREATE|unix.NLM_F_EXCL)
	m.put(queue)
	m.text(unix.TCA_KIND, "netem")
	m.nest(unix.TCA_OPTIONS, func() {
		m.put(struct { // struct tc_netem_qopt
			Latency, Limit, Loss, Gap, Duplicate, Jitter uint32
		}{uint32(w.delay / netemTick), netemQueue, share(w.loss), gap, share(w.repetition), 0})
		if w.reordering > 0 {
			m.value(netemReorder, [2]uint32{share(w.reordering), 0 /* correlation */})
		}
	})
	return m.send()
}
