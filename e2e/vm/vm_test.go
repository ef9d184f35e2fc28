//go:build vm

package vm

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const (
	kernelVar = "KEYTURN_VM_KERNEL" // an unpacked kernel package; fetched where it is not given
	modeVar   = "KEYTURN_VM"        // "required": where it cannot run, it fails

	qemu = "qemu-system-x86_64"

	// The guest's last words, and what its tests print of what they found.
	passed  = "guest: passed"
	verdict = "verdict: "
)

// lab is what every guest is started with.
var lab struct {
	unable error // why no guest can be started here
	image  string
	initrd string
}

func TestMain(m *testing.M) {
	dir, err := os.MkdirTemp("", "keyturn-vm-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
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
	lab.image, lab.initrd = k.image, filepath.Join(dir, "initramfs")
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

// boot starts a guest that runs the tests which the pattern names, and waits
// for its verdict. limit is real time.
func boot(t *testing.T, pattern string, limit time.Duration) {
	t.Helper()
	if lab.unable != nil {
		t.Skipf("cannot run here: %v", lab.unable)
	}
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	start := time.Now()
	machine := exec.CommandContext(ctx, qemu,
		"-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-serial", "stdio",
		"-machine", "pc", "-cpu", "max", "-smp", "1", "-m", "512",
		// Virtual time: each instruction takes 8 ns, and while the guest
		// waits its time jumps to whatever it waits for. The clock on the
		// mainboard goes with it.
		"-accel", "tcg", "-icount", "shift=3,sleep=off", "-rtc", "base=utc,clock=vm",
		"-kernel", lab.image, "-initrd", lab.initrd,
		"-append", "console=ttyS0 quiet panic=-1 random.trust_cpu=on -- -test.v -test.timeout=0 -test.run="+pattern)
	machine.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: unix.SIGKILL}
	machine.Stderr = t.Output()
	console, err := machine.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := machine.Start(); err != nil {
		t.Fatal(err)
	}
	said, good := listen(t, console)
	// That QEMU ends without an error says nothing about the guest.
	if err := machine.Wait(); err != nil || !good {
		t.Errorf("the guest did not pass within %v (QEMU: %v). It said:\n%s", limit, err, said)
	}
	t.Logf("%.0f s of real time", time.Since(start).Seconds())
}

// listen reads the guest's console to its end, shows its verdicts as they
// come, and returns everything else and whether the guest passed.
func listen(t *testing.T, console io.Reader) (said []byte, good bool) {
	var all bytes.Buffer
	lines := bufio.NewScanner(console)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		line := strings.TrimRight(lines.Text(), "\r")
		fmt.Fprintln(&all, line)
		if _, text, is := strings.Cut(line, verdict); is {
			t.Log(text)
		}
		good = good || line == passed
	}
	if err := lines.Err(); err != nil {
		fmt.Fprintln(&all, "console:", err)
		_, _ = io.Copy(io.Discard, console)
	}
	return all.Bytes(), good
}

func TestFacts(t *testing.T) {
	t.Parallel()
	boot(t, cmp.Or(os.Getenv("VMRUN"), "^TestFact"), 30*time.Minute)
}
