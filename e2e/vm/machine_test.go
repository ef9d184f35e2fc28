//go:build vm

package vm

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"keyturn/e2e/vm/guest"
)

// guestCommand returns the command that starts a guest whose first process
// runs some tests. Its console is the command's standard input and output. More
// is what this guest has besides: of the kernel, and of QEMU.
func guestCommand(ctx context.Context, tests, kernel string, more ...string) *exec.Cmd {
	c := exec.CommandContext(ctx, qemu, append([]string{
		"-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-serial", "stdio",
		"-machine", "pc", "-cpu", "max", "-smp", "1",
		"-kernel", lab.image, "-initrd", lab.initrd,
		"-append", "console=ttyS0 quiet panic=-1 random.trust_cpu=on " + kernel + " -- -test.v -test.timeout=0 -test.run=" + tests,
	}, more...)...)
	c.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: unix.SIGKILL}
	return c
}

// machine is a guest that is one end of a pair. It runs in real time: two
// guests whose times jump would have no time in common.
type machine struct {
	t       *testing.T
	name    string
	process *exec.Cmd
	console bytes.Buffer // to be read when the process has ended

	line    net.Conn // to the guest's first process
	answers *json.Decoder
	monitor *monitor // of QEMU

	pings bool // it has begun to
}

const (
	pairMemory = "160" // MiB
	// At boot the kernel measures whether interrupts come in time, and on a busy
	// host they may not. Of what it can tell the time by, the processor's
	// counter alone does not go back with QEMU's snapshots (cpu_ticks_prev in
	// QEMU's softmmu/cpu-timers.c), which would make them come from the future.
	pairKernel = "no_timer_check tsc=unstable clocksource=hpet"
	// Of the harness itself. Nothing that works comes near it, even on a machine
	// that is busy with other things.
	answerLimit = 3 * time.Minute
)

// startMachine starts the end'th machine of a pair with its ends of the
// cables. Everything that joins it to us and to the other is a socket that it
// inherits: nothing has a name, and nothing is left.
func startMachine(t *testing.T, end int, cables [2]*os.File) *machine {
	t.Helper()
	m := &machine{t: t, name: []string{"client", "server"}[end]}
	line, theirLine := socketPair(t)
	monitor, theirMonitor := socketPair(t)
	args := []string{
		// QEMU keeps so many MiB of translated code, and not a part of what the host has.
		"-accel", "tcg,tb-size=64", "-m", pairMemory, "-rtc", "base=utc,clock=host",
		"-chardev", "socket,id=orders,fd=3", "-serial", "chardev:orders",
		"-chardev", "socket,id=monitor,fd=4", "-mon", "chardev=monitor,mode=control",
	}
	for i := range cables {
		args = append(args,
			"-netdev", fmt.Sprintf("dgram,id=cable%d,local.type=fd,local.str=%d", i, 5+i),
			// The guest tells its ends of the cables apart by the fifth byte.
			"-device", fmt.Sprintf("virtio-net-pci,netdev=cable%d,romfile=,mac=52:54:00:00:%02x:%02x", i, i, end))
	}
	m.process = guestCommand(context.Background(), "^TestEnd$", pairKernel, args...)
	m.process.Stdout, m.process.Stderr = &m.console, &m.console
	m.process.ExtraFiles = []*os.File{theirLine, theirMonitor, cables[0], cables[1]}
	err := m.process.Start()
	for _, f := range m.process.ExtraFiles {
		_ = f.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(m.turnOff)
	m.line, m.answers = line, json.NewDecoder(line)
	if m.monitor, err = newMonitor(monitor); err != nil {
		t.Fatalf("%s: %v", m.name, err)
	}
	return m
}

// turnOff pulls the plug, and shows the console where that may tell something.
func (m *machine) turnOff() {
	_ = m.process.Process.Kill()
	_ = m.process.Wait()
	used := m.process.ProcessState
	m.t.Logf("%s: %.0f s of CPU, %d MiB", m.name, (used.UserTime() + used.SystemTime()).Seconds(),
		used.SysUsage().(*syscall.Rusage).Maxrss>>10)
	if m.t.Failed() {
		m.t.Logf("console of the %s:\n%s", m.name, m.console.Bytes())
	}
}

// tell gives an order and returns the guest's answer.
func (m *machine) tell(o guest.Order) guest.Answer {
	m.t.Helper()
	m.order(o)
	return m.answer()
}

// order gives an order without waiting until it is carried out.
func (m *machine) order(o guest.Order) {
	m.t.Helper()
	text, err := json.Marshal(o)
	if err == nil {
		_, err = m.line.Write(append(text, '\n'))
	}
	if err != nil {
		m.t.Fatalf("order the %s to %s: %v", m.name, o.Verb, err)
	}
}

// answer waits for the answer to an order.
func (m *machine) answer() (a guest.Answer) {
	m.t.Helper()
	err := m.line.SetReadDeadline(time.Now().Add(answerLimit))
	if err == nil {
		err = m.answers.Decode(&a)
	}
	if err != nil {
		m.t.Fatalf("answer of the %s: %v", m.name, err)
	}
	return a
}

// execute has QEMU do something, which must succeed.
func (m *machine) execute(command string, arguments any) json.RawMessage {
	m.t.Helper()
	result, err := m.monitor.execute(command, arguments)
	if err != nil {
		m.t.Fatalf("%s: %s: %v", m.name, command, err)
	}
	return result
}

// await waits until QEMU tells of an event, after the last execute or await.
func (m *machine) await(name string, is func(data eventData) bool) {
	m.t.Helper()
	if err := m.monitor.await(name, is); err != nil {
		m.t.Fatalf("%s: wait for %s: %v", m.name, name, err)
	}
}

// suspend has the guest sleep, to RAM, for a while.
func (m *machine) suspend(d time.Duration) {
	m.t.Helper()
	m.order(guest.Order{Verb: guest.Suspend})
	m.await("SUSPEND", anyEvent)
	pass(d)
	m.execute("system_wakeup", nil)
	m.answer()
}

// freeze stops the machine for a while, clocks and all.
func (m *machine) freeze(d time.Duration) {
	m.t.Helper()
	m.execute("stop", nil)
	pass(d)
	m.execute("cont", nil)
}

// The disk of a machine holds nothing but its snapshot.
const (
	diskNode    = "disk"
	snapshotTag = "before"
)

// save takes a snapshot of the running machine: memory, processor, devices.
func (m *machine) save() {
	m.t.Helper()
	file := filepath.Join(lab.dir, fmt.Sprintf("disk-%d", m.process.Process.Pid))
	m.t.Cleanup(func() { _ = os.Remove(file) })
	type node map[string]any
	create := func(options node) {
		m.t.Helper()
		m.job("blockdev-create", node{"options": options})
	}
	create(node{"driver": "file", "filename": file, "size": 0})
	m.execute("blockdev-add", node{"driver": "file", "filename": file, "node-name": "file"})
	create(node{"driver": "qcow2", "file": "file", "size": 1 << 20})
	m.execute("blockdev-add", node{"driver": "qcow2", "file": "file", "node-name": diskNode})
	m.job("snapshot-save", snapshotArguments())
}

// putBack makes the running machine what it was when it was saved.
func (m *machine) putBack() {
	m.t.Helper()
	m.job("snapshot-load", snapshotArguments())
}

func snapshotArguments() map[string]any {
	return map[string]any{"tag": snapshotTag, "vmstate": diskNode, "devices": []string{diskNode}}
}

// job has QEMU do something that takes its time.
func (m *machine) job(command string, arguments map[string]any) {
	m.t.Helper()
	const id = "job"
	arguments["job-id"] = id
	m.execute(command, arguments)
	m.await("JOB_STATUS_CHANGE", func(d eventData) bool { return d.ID == id && d.Status == "concluded" })
	var jobs []struct{ ID, Error string }
	if err := json.Unmarshal(m.execute("query-jobs", nil), &jobs); err != nil {
		m.t.Fatal(err)
	}
	for _, j := range jobs {
		if j.Error != "" {
			m.t.Fatalf("%s: %s: %s", m.name, command, j.Error)
		}
	}
	m.execute("job-dismiss", map[string]any{"id": id})
}

// monitor is a connection to QEMU by its machine protocol, QMP. One goroutine
// uses it.
type monitor struct {
	conn     net.Conn
	messages *json.Decoder
	events   []event // that came and nobody has awaited
}

type event struct {
	name string
	data eventData
}

// eventData is what we look at of the data of events.
type eventData struct{ ID, Status string }

func anyEvent(eventData) bool { return true }

func newMonitor(conn net.Conn) (*monitor, error) {
	q := &monitor{conn: conn, messages: json.NewDecoder(conn)}
	_, err := q.execute("qmp_capabilities", nil)
	return q, err
}

// execute sends a command and returns its result.
func (q *monitor) execute(command string, arguments any) (json.RawMessage, error) {
	request := map[string]any{"execute": command}
	if arguments != nil {
		request["arguments"] = arguments
	}
	text, err := json.Marshal(request)
	if err != nil {
		return nil, err
	}
	if _, err := q.conn.Write(text); err != nil {
		return nil, err
	}
	deadline := time.Now().Add(answerLimit)
	for {
		result, err := q.read(deadline)
		if result != nil || err != nil {
			return result, err
		}
	}
}

// await waits for an event that came after the last one awaited.
func (q *monitor) await(name string, is func(eventData) bool) error {
	deadline := time.Now().Add(answerLimit)
	for {
		i := slices.IndexFunc(q.events, func(e event) bool { return e.name == name && is(e.data) })
		if i >= 0 {
			q.events = q.events[i+1:]
			return nil
		}
		if _, err := q.read(deadline); err != nil {
			return err
		}
	}
}

// read reads one message: a result, or something else, which it keeps.
func (q *monitor) read(deadline time.Time) (json.RawMessage, error) {
	var message struct {
		Return json.RawMessage
		Error  *struct{ Desc string }
		Event  string
		Data   json.RawMessage
	}
	if err := q.conn.SetReadDeadline(deadline); err != nil {
		return nil, err
	}
	if err := q.messages.Decode(&message); err != nil {
		return nil, err
	}
	switch {
	case message.Error != nil:
		return nil, errors.New(message.Error.Desc)
	case message.Event != "":
		e := event{name: message.Event}
		_ = json.Unmarshal(message.Data, &e.data) // what has other fields, or none, is not awaited by them
		q.events = append(q.events, e)
	}
	return message.Return, nil
}

// socketPair returns two sockets that are connected to each other: ours, and
// one for a process.
func socketPair(t *testing.T) (ours net.Conn, theirs *os.File) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	theirs = os.NewFile(uintptr(fds[1]), "")
	f := os.NewFile(uintptr(fds[0]), "")
	defer f.Close()
	if ours, err = net.FileConn(f); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = ours.Close() })
	return ours, theirs
}

// cable returns the ends of a network cable between two machines: two UDP
// sockets on the loopback, each connected to the other. What a machine does not
// take in time is lost, as on a wire. (Of unix sockets the sender would wait.)
func cable(t *testing.T) (ends [2]*os.File) {
	t.Helper()
	var fds [2]int
	var at [2]unix.Sockaddr
	for i := range fds {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err == nil {
			fds[i], ends[i] = fd, os.NewFile(uintptr(fd), "")
			err = unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}})
		}
		if err == nil {
			at[i], err = unix.Getsockname(fd)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	for i, fd := range fds {
		if err := unix.Connect(fd, at[1-i]); err != nil {
			t.Fatal(err)
		}
	}
	return ends
}

// pass lets time pass.
func pass(d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	<-timer.C
}
