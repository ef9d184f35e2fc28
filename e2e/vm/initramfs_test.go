//go:build vm

package vm

import (
	"fmt"
	"io"

	"golang.org/x/sys/unix"
)

// archive writes an initramfs: a cpio archive of the form newc, as the kernel's
// Documentation/driver-api/early-userspace/buffer-format.rst describes it. It
// is not compressed, for the guest is the slower of the two.
type archive struct {
	to    io.Writer
	inode uint32
	err   error
}

func (a *archive) directory(name string) {
	a.entry(name, unix.S_IFDIR|0o755, 0, 0, nil)
}

func (a *archive) program(name string, content []byte) {
	a.entry(name, unix.S_IFREG|0o755, 0, 0, content)
}

func (a *archive) file(name string, content []byte) {
	a.entry(name, unix.S_IFREG|0o644, 0, 0, content)
}

func (a *archive) characterDevice(name string, major, minor uint32) {
	a.entry(name, unix.S_IFCHR|0o600, major, minor, nil)
}

// close writes what ends an archive.
func (a *archive) close() error {
	a.inode = 0
	a.entry("TRAILER!!!", 0, 0, 0, nil)
	return a.err
}

// entry writes a header of 13 numbers in hex, the name and the content, each
// filled up to a multiple of four bytes.
func (a *archive) entry(name string, mode, major, minor uint32, content []byte) {
	const headerSize = 6 + 13*8
	a.inode++
	a.print("070701")
	for _, field := range []uint32{
		a.inode, mode, 0 /* uid */, 0 /* gid */, 1 /* links */, 0, /* mtime */
		uint32(len(content)), 0, 0 /* device that it lies on */, major, minor,
		uint32(len(name)) + 1, 0, /* checksum: none */
	} {
		a.print(fmt.Sprintf("%08X", field))
	}
	a.print(name + "\x00" + padding(headerSize+len(name)+1))
	a.write(content)
	a.print(padding(len(content)))
}

func padding(size int) string { return "\x00\x00\x00"[:-size&3] }

func (a *archive) print(s string) { a.write([]byte(s)) }

func (a *archive) write(b []byte) {
	if a.err == nil {
		_, a.err = a.to.Write(b)
	}
}
