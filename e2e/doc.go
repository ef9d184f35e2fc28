// Package e2e runs the real keyturn binary on hosts made of namespaces, with
// userspace WireGuard. It holds tests alone, behind the build tag e2e:
//
//	make e2e                         # skips, saying why, where privileges are missing
//	KEYTURN_E2E=required make e2e    # fails there
//
// # How it works
//
// The test binary plays three parts, told apart by KEYTURN_E2E_PART
// (main_test.go):
//
//   - started by go test, it builds keyturn and runs itself again in a network
//     and a mount namespace of its own (and a user namespace, unless root);
//   - there, "the lab", the tests run. Each test makes its own bridge;
//   - each host of a test is an init process, the test binary once more, in
//     network, mount and PID namespaces of its own with an empty /run
//     (init_test.go). Whoever kills it pulls the plug: all of the host's
//     processes, devices and addresses are gone at once, and the directories
//     of the host stay.
//
// host.in runs a function of the test on a thread inside a host's namespaces
// (host_test.go). So sockets, wgctrl and commands of a host need no agent: a
// socket or process stays where it was made. The init process holds the
// WireGuard device, which keyturn and wg find as they find any userspace
// device, and asks for a handshake when a test says so (device_test.go):
// without loss, unlike every other way to provoke one. WireGuard lets 5 s
// pass between two handshakes, so that is what a rotation costs.
//
// # What a test reads like
//
//	l := newLab(t)
//	a, b := l.host("lisbon"), l.host("porto")
//	connect(a, b)                      // wg0 at both ends, each other's peer
//	pings := a.ping(b)                 // 50 a second, each answer accounted for
//	a.handshake(b)                     // a new session; waits until both ends show it
//	a.keyturn("up", a.write(nil, b.as()))  // writes a configuration, runs a command
//	b.keyturn("up", b.write(settings{"window": "20s"}, a.as().with(settings{"address": nil})))
//	a.towards(b, 10*time.Second, "protected", func(p control.PeerStatus) error { ... })
//	a.fingerprint(b) == b.fingerprint(a)
//	pings.stop().mustBeComplete(t)
//
// A rotation is a.handshake(b) and eventuallyRotated(t, a, b, last); agree reads
// the key that both ends have. Rotators that ask a KMS have l.kmes(a, b).
//
// Tests that break things find host.crash, reboot, unplug, plug, filter (what
// arrives is dropped), signal, kill9, destroyDevice, removePeer, dial and listen;
// a KME is a host with background("kme", ...).
//
// Every fault that a tunnel must survive is a line of a table in
// recovery_test.go. Its short half is played here; make faults plays all of it,
// with the link beside the tunnel and inside it, 48 at once, and writes what it
// measured into docs/RELIABILITY.md. One line of it alone:
//
//	KEYTURN_FAULTS=/tmp/page.md go test -tags e2e -v -run 'TestRecovery/faults/client_rebooted' ./e2e/
//
// Every pre-shared key that a test reads is remembered by the lab, and when
// the test ends the lab looks for each of them, raw, in base64 and in hex, in
// all log files and in all output of commands. Tests handle fingerprints.
//
// Deadlines are real time: wait for conditions with eventually, never sleep.
package e2e
