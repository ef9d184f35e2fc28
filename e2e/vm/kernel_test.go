//go:build vm

package vm

import (
	"bytes"
	"debug/elf"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

// kernelPackage is the name of the package that depends on Debian's newest
// kernel for virtual machines.
const kernelPackage = "linux-image-cloud-amd64"

// wanted are the modules that the tests need; what these need comes with them.
var wanted = []string{"wireguard", "veth", "sch_netem", "virtio_pci", "virtio_net"}

// kernel is an unpacked kernel package.
type kernel struct {
	release string            // as uname -r prints it
	image   string            // path of vmlinuz
	modules map[string]string // name -> path
}

// findKernel returns the kernel in the directory that KEYTURN_VM_KERNEL names,
// or otherwise Debian's newest for virtual machines, which it fetches once.
func findKernel() (*kernel, error) {
	dir := os.Getenv(kernelVar)
	if dir == "" {
		var err error
		if dir, err = fetchKernel(); err != nil {
			return nil, fmt.Errorf("fetch the kernel: %w", err)
		}
	}
	return openKernel(dir)
}

// fetchKernel returns the directory of the unpacked package, which lies in the
// user's cache: outside the repository, and there for the next time.
func fetchKernel() (string, error) {
	out, err := exec.Command("apt-cache", "depends", "--important", kernelPackage).Output()
	if err != nil {
		return "", fmt.Errorf("apt-cache depends %s: %w (is this Debian?)", kernelPackage, err)
	}
	_, name, found := strings.Cut(string(out), "Depends: ")
	name, _, _ = strings.Cut(name, "\n")
	if !found || !strings.HasPrefix(name, "linux-image-") {
		return "", fmt.Errorf("package %s depends on %q, which is no kernel", kernelPackage, name)
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		cache = os.TempDir() // no home directory, as in some containers
	}
	cache = filepath.Join(cache, "keyturn-vm")
	dir := filepath.Join(cache, name)
	if _, err := os.Stat(dir); err == nil {
		return dir, nil
	}
	if err := os.MkdirAll(cache, 0o700); err != nil {
		return "", err
	}
	work, err := os.MkdirTemp(cache, "fetch-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(work)
	if err := command(work, "apt-get", "download", "-q", name); err != nil {
		return "", err
	}
	file, err := only(filepath.Join(work, "*.deb"))
	if err != nil {
		return "", err
	}
	unpacked := filepath.Join(work, "unpacked")
	if err := command(work, "dpkg-deb", "-x", file, unpacked); err != nil {
		return "", err
	}
	// Whole or not at all, also where two of us fetch at once.
	if err := os.Rename(unpacked, dir); err != nil && !errors.Is(err, fs.ErrExist) {
		return "", err
	}
	return dir, nil
}

// openKernel finds the image and the modules of an unpacked package.
func openKernel(dir string) (*kernel, error) {
	image, err := only(filepath.Join(dir, "boot", "vmlinuz-*"))
	if err != nil {
		return nil, err
	}
	k := &kernel{
		release: strings.TrimPrefix(filepath.Base(image), "vmlinuz-"),
		image:   image,
		modules: make(map[string]string),
	}
	for _, lib := range []string{"lib", "usr/lib"} {
		err := filepath.WalkDir(filepath.Join(dir, lib, "modules", k.release), func(path string, d fs.DirEntry, err error) error {
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			if name, _, is := strings.Cut(filepath.Base(path), ".ko"); err == nil && is && d.Type().IsRegular() {
				k.modules[moduleName(name)] = path
			}
			return err
		})
		if err != nil {
			return nil, err
		}
	}
	return k, nil
}

// only returns the one file that a pattern matches.
func only(pattern string) (string, error) {
	files, err := filepath.Glob(pattern)
	if err == nil && len(files) != 1 {
		err = fmt.Errorf("%s matches %d files, and should match one", pattern, len(files))
	}
	if err != nil {
		return "", err
	}
	return files[0], nil
}

// moduleName is the form in which modules name each other: files have either.
func moduleName(s string) string { return strings.ReplaceAll(s, "-", "_") }

// module is a kernel module, ready to be loaded.
type module struct {
	name    string
	content []byte
}

// load reads the wanted modules and all that they depend on, in an order in
// which they can be loaded.
func (k *kernel) load() ([]module, error) {
	var loaded []module
	var visit func(name string) error
	visit = func(name string) error {
		path, ok := k.modules[name]
		if !ok {
			return fmt.Errorf("kernel %s has no module %s", k.release, name)
		}
		if slices.ContainsFunc(loaded, func(m module) bool { return m.name == name }) {
			return nil
		}
		content, err := readModule(path)
		if err != nil {
			return err
		}
		depends, err := dependencies(content)
		if err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
		for _, d := range depends {
			if err := visit(d); err != nil {
				return fmt.Errorf("%s: %w", name, err)
			}
		}
		loaded = append(loaded, module{name, content})
		return nil
	}
	for _, name := range wanted {
		if err := visit(name); err != nil {
			return nil, err
		}
	}
	return loaded, nil
}

// readModule reads a module's file. Since Debian 13 they are compressed.
func readModule(path string) ([]byte, error) {
	if filepath.Ext(path) != ".xz" {
		return os.ReadFile(path)
	}
	b, err := exec.Command("xz", "-dc", path).Output()
	if err != nil {
		return nil, fmt.Errorf("xz -dc %s: %w", path, err)
	}
	return b, nil
}

// dependencies returns the names after "depends=" in a module's .modinfo.
// Modules that are built into the kernel are not among them.
func dependencies(content []byte) ([]string, error) {
	file, err := elf.NewFile(bytes.NewReader(content))
	if err != nil {
		return nil, err
	}
	section := file.Section(".modinfo")
	if section == nil {
		return nil, errors.New("no section .modinfo")
	}
	info, err := section.Data()
	if err != nil {
		return nil, err
	}
	for entry := range bytes.SplitSeq(info, []byte{0}) {
		if list, is := strings.CutPrefix(string(entry), "depends="); is && list != "" {
			return strings.Split(moduleName(list), ","), nil
		}
	}
	return nil, nil
}

// command runs a command in a directory and quotes it where it goes wrong.
func command(dir, name string, args ...string) error {
	c := exec.Command(name, args...)
	c.Dir = dir
	if out, err := c.CombinedOutput(); err != nil {
		return fmt.Errorf("%s %s: %w\n%s", name, strings.Join(args, " "), err, out)
	}
	return nil
}
