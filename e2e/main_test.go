//go:build e2e

package e2e

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// The environment that the parts hand on.
const (
	partVar   = "KEYTURN_E2E_PART"   // "", lab or init
	binaryVar = "KEYTURN_E2E_BINARY" // the keyturn under test; built where it is not given
	modeVar   = "KEYTURN_E2E"        // "required": where it cannot run, it fails
)

// unable says why no host can be made here: which privilege is missing. It is
// written by TestMain before any test runs.
var unable error

func TestMain(m *testing.M) {
	switch os.Getenv(partVar) {
	case "init":
		os.Exit(runInit())
	case "lab":
		unable = prepareLab()
	default:
		code, err := runLab()
		if err == nil {
			os.Exit(code)
		}
		unable = err
	}
	if unable != nil && os.Getenv(modeVar) == "required" {
		fmt.Fprintf(os.Stderr, "cannot run here: %v\n", unable)
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// runLab builds keyturn and runs this test binary again in namespaces of its
// own. It returns the exit code, or an error where namespaces are not to be had.
func runLab() (int, error) {
	dir, err := os.MkdirTemp("", "keyturn-e2e-")
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(dir)

	binary := os.Getenv(binaryVar)
	if binary == "" {
		binary = filepath.Join(dir, "keyturn")
		build := exec.Command("go", "build", "-trimpath", "-o", binary, "keyturn/cmd/keyturn")
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		build.Stdout, build.Stderr = os.Stderr, os.Stderr
		if err := build.Run(); err != nil {
			fmt.Fprintln(os.Stderr, "build keyturn:", err)
			return 1, nil
		}
	}

	// Tests wait far more than they work; a -parallel of the caller comes later.
	lab := exec.Command("/proc/self/exe", append([]string{"-test.parallel=8"}, os.Args[1:]...)...)
	lab.Stdin, lab.Stdout, lab.Stderr = os.Stdin, os.Stdout, os.Stderr
	lab.Env = append(os.Environ(), partVar+"=lab", binaryVar+"="+binary)
	lab.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWNS,
		Pdeathsig:  unix.SIGKILL,
	}
	if os.Geteuid() != 0 {
		lab.SysProcAttr.Cloneflags |= unix.CLONE_NEWUSER
		lab.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}}
		lab.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}}
	}
	if err := lab.Start(); err != nil {
		return 0, fmt.Errorf("create namespaces: %w", err)
	}
	err = lab.Wait()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		return 0, err
	}
	return lab.ProcessState.ExitCode(), nil
}

// prepareLab tries, in the lab's namespaces, everything that a host is made of.
func prepareLab() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	if err := unix.Access("/dev/net/tun", unix.R_OK|unix.W_OK); err != nil {
		return fmt.Errorf("open /dev/net/tun: %w", err)
	}
	if err := ip("link set lo up", "link add probe0 type bridge", "link add probe1 type veth peer name probe2",
		"link del probe0", "link del probe1"); err != nil {
		return err
	}
	h, err := startInit(os.Stderr)
	if err != nil {
		return err
	}
	return h.stop()
}
