//go:build vm

package vm

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const (
	kernelVar = "KEYTURN_VM_KERNEL" // an unpacked kernel package; fetched where it is not given
	onlyVar   = "KEYTURN_VM_ONLY"   // a pattern of subtests in the guest; all where it is not given
	endsVar   = "KEYTURN_VM_ENDS"   // "both": each fault of one machine happens to either; to one where it is not given
	modeVar   = "KEYTURN_VM"        // "required": where it cannot run, it fails

	// In real time, on a machine that has other things to do as well.
	limit = 40 * time.Minute

	qemu = "qemu-system-x86_64"

	// What the guest says to us.
	passed      = "guest: passed" // its last words
	fallsAsleep = "guest: asleep"
	wokeUp      = "guest: awake"
	verdict     = "verdict: " // and what a test found
)

// lab is what every guest is started with.
var lab struct {
	unable error // why no guest can be started here
	nice   string
	dir    string // goes away whatever happens
	image  string
	initrd string
}

func TestMain(m *testing.M) {
	dir, err := os.MkdirTemp("", "keyturn-vm-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	// A stage of CI that took too long leaves nothing behind. It ends whoever
	// reads what we print as well.
	signal.Ignore(unix.SIGPIPE)
	interrupted := make(chan os.Signal, 1)
	signal.Notify(interrupted, os.Interrupt, unix.SIGTERM)
	go func() {
		<-interrupted
		_ = os.RemoveAll(dir)
		os.Exit(1)
	}()
	code := 1
	k, err := tools()
	switch {
	case err == nil:
		err = prepare(dir, k)
	case os.Getenv(modeVar) != "required":
		lab.unable, err = err, nil
	}
	if err == nil {
		code = m.Run()
	} else {
		fmt.Fprintln(os.Stderr, err)
	}
	_ = os.RemoveAll(dir)
	os.Exit(code)
}

// tools finds what is not ours. An error says what is missing.
func tools() (*kernel, error) {
	if _, err := exec.LookPath(qemu); err != nil {
		return nil, err
	}
	var err error
	if lab.nice, err = exec.LookPath("nice"); err != nil {
		return nil, err
	}
	return findKernel()
}

// prepare builds the programs and writes the initramfs.
func prepare(dir string, k *kernel) error {
	modules, err := k.load()
	if err != nil {
		return err
	}
	programs := map[string][]string{
		"init":    {"test", "-c", "-tags", "vm", "-trimpath", "-o", "init", "keyturn/e2e/vm/guest"},
		"keyturn": {"build", "-trimpath", "-ldflags", "-s -w", "-o", "keyturn", "keyturn/cmd/keyturn"},
	}
	lab.dir, lab.image, lab.initrd = dir, k.image, filepath.Join(dir, "initramfs")
	f, err := os.OpenFile(lab.initrd, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	buffered := bufio.NewWriter(f)
	a := &archive{to: buffered}
	for _, d := range []string{"dev", "proc", "sys", "tmp", "modules"} {
		a.directory(d)
	}
	a.characterDevice("dev/console", 5, 1)
	for i, m := range modules {
		a.file(fmt.Sprintf("modules/%02d-%s.ko", i, m.name), m.content)
	}
	for name, args := range programs {
		args[len(args)-2] = filepath.Join(dir, name)
		build := exec.Command("go", args...)
		build.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH=amd64")
		if out, err := build.CombinedOutput(); err != nil {
			return fmt.Errorf("go %s: %w\n%s", strings.Join(args, " "), err, out)
		}
		content, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			return err
		}
		a.program(name, content)
	}
	if err := a.close(); err != nil {
		return err
	}
	return buffered.Flush()
}

// boot starts a guest that runs the tests of the calling test's name, and waits
// for its verdict.
func boot(t *testing.T) {
	t.Helper()
	t.Parallel()
	if lab.unable != nil {
		t.Skipf("cannot run here: %v", lab.unable)
	}
	pattern := "^" + t.Name()
	if only := os.Getenv(onlyVar); only != "" {
		pattern += "/(" + only + ")"
	}
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	start := time.Now()
	machine := guestCommand(ctx, pattern, "", "-m", "512",
		// Virtual time: each instruction takes 8 ns, and while the guest
		// waits its time jumps to whatever it waits for. The clock on the
		// mainboard goes with it.
		"-accel", "tcg", "-icount", "shift=3,sleep=off", "-rtc", "base=utc,clock=vm")
	// Whatever lives in real time goes first.
	machine.Path, machine.Args = lab.nice, append([]string{"nice", "-n", "10"}, machine.Args...)
	machine.Stderr = t.Output()
	console, err := machine.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	keyboard, err := machine.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := machine.Start(); err != nil {
		t.Fatal(err)
	}
	said, good := listen(t, console, keyboard)
	// That QEMU ends without an error says nothing about the guest.
	if err := machine.Wait(); err != nil || !good {
		t.Errorf("the guest did not pass within %v (QEMU: %v). It said:\n%s", limit, err, said)
	}
	t.Logf("%.0f s, %.0f s of CPU", time.Since(start).Seconds(),
		(machine.ProcessState.UserTime() + machine.ProcessState.SystemTime()).Seconds())
}

// listen reads the guest's console to its end and shows its verdicts as they
// come. It returns everything that the guest said, and whether it passed. A
// guest that has gone to sleep is woken by its keyboard.
func listen(t *testing.T, console io.Reader, keyboard io.Writer) (said []byte, good bool) {
	var all bytes.Buffer
	verdicts := 0
	awake := func() {}
	defer func() { awake() }()
	lines := bufio.NewScanner(console)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		line := strings.TrimRight(lines.Text(), "\r")
		fmt.Fprintln(&all, line)
		_, text, is := strings.Cut(line, verdict)
		switch {
		case is:
			t.Log(text)
			verdicts++
		case line == passed:
			good = verdicts > 0 // otherwise nothing was run
		case line == fallsAsleep:
			awake()
			awake = keepKnocking(keyboard)
		case line == wokeUp:
			awake()
		}
	}
	if err := lines.Err(); err != nil {
		fmt.Fprintln(&all, "console:", err)
		_, _ = io.Copy(io.Discard, console)
	}
	return all.Bytes(), good
}

// keepKnocking sends a key each second until the returned function is called:
// a key that comes before the guest sleeps does not wake it.
func keepKnocking(keyboard io.Writer) (stop func()) {
	quit, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		tick := time.NewTicker(time.Second)
		defer tick.Stop()
		for {
			select {
			case <-quit:
				return
			case <-tick.C:
			}
			if _, err := keyboard.Write([]byte("\n")); err != nil {
				return
			}
		}
	}()
	return sync.OnceFunc(func() {
		close(quit)
		<-ended
	})
}

// One guest for each. The longest come first, for as many run at once as there
// are processors.

func TestInside(t *testing.T)   { boot(t) }
func TestBeside(t *testing.T)   { boot(t) }
func TestClock(t *testing.T)    { boot(t) }
func TestRotation(t *testing.T) { boot(t) }
func TestFacts(t *testing.T)    { boot(t) }
