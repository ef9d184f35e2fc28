// Package vm runs keyturn on the WireGuard of a real kernel, in a virtual
// machine whose time jumps over whatever the guest waits for. It holds tests
// alone, behind the build tag vm:
//
//	make vm                          # skips, saying why, where tools are missing
//	KEYTURN_VM=required make vm      # fails there
//
// It needs QEMU (Debian's qemu-system-x86) and one Debian package of a kernel,
// which it fetches once into the user's cache directory with apt-get.
// KEYTURN_VM_KERNEL names the directory of another, unpacked by dpkg-deb -x.
//
// # How it works
//
// On the host, each test builds nothing but starts a guest and reads its serial
// console (vm_test.go). All guests boot one image: the kernel, an initramfs
// written here (initramfs_test.go) with the modules (kernel_test.go), keyturn,
// and the test binary of package guest. That binary is the guest's first
// process, runs itself again as tests, and says whether they passed: the exit
// code of QEMU tells nothing.
//
// QEMU counts instructions, 8 ns each, and skips the time in which the guest
// has nothing to do. So ten minutes of rotation take some seconds, and how busy
// the machine is does not matter to any deadline. Performance cannot be
// measured there.
//
// In such a guest, a host is a network namespace with an interface of the
// kernel's WireGuard; two are joined by two cables, one for the tunnel and one
// for a link beside it (guest/host_test.go). What goes wrong is in
// guest/faults_test.go, in words:
//
//	fault{name: "link cut, 3m0s", spares: true, do: cutFor(3*time.Minute, besideCable)}
//
// Every fault ends in a verdict, which the test prints: after how many seconds
// the tunnel was back, and how many pings it lost. A part of them:
//
//	KEYTURN_VM_ONLY=reboot go test -tags vm -v -run TestInside ./e2e/vm/
//
// # Pairs
//
// In one guest the hosts have one kernel, and whatever happens to the machine
// happens to both. TestPair (pair_test.go) gives each host a guest for itself,
// and lets one of the two be suspended to RAM, stop, go back to a snapshot, or
// have another time. KEYTURN_VM_ENDS=both lets each happen to either, with twice
// the machines:
//
//	{name: "suspended to RAM, 4 min", happen: func(_ *exercise, m *machine) { m.suspend(4 * time.Minute) }},
//
// The times of two guests that jump would have nothing to do with each other,
// so pairs run in real time, all at once, and their deadlines are looser: three
// times the bound passes, as late. The test tells a guest what to do over a
// second serial port (guest/order.go), and QEMU over its monitor
// (machine_test.go); the cables are sockets that both processes inherit. The
// guests' own clocks are what is broken: a time is measured on a guest's
// monotonic clock after the fault's end, or here.
package vm
