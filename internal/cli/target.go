package cli

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"keyturn/internal/control"
	"keyturn/internal/registry"
)

// absolute makes the directories independent of where the daemon runs.
func (d *dirs) absolute() error {
	for _, dir := range []*string{&d.run, &d.state, &d.log} {
		abs, err := filepath.Abs(*dir)
		if err != nil {
			return err
		}
		*dir = abs
	}
	return nil
}

func (d *dirs) registry() *registry.Registry { return registry.Open(d.state) }

func (d *dirs) client(iface string) *control.Client {
	return control.NewClient(control.SocketPath(d.run, iface))
}

// configOf returns the configuration that an argument CONFIG|INTERFACE means.
// What has a slash or ends in .yaml or .yml is a file; anything else is an
// interface if one of that name was ever brought up, or else a file again.
func (d *dirs) configOf(arg string) (string, error) {
	isFile := strings.Contains(arg, "/") || strings.HasSuffix(arg, ".yaml") || strings.HasSuffix(arg, ".yml")
	if isFile || registry.CheckInterface(arg) != nil {
		return arg, nil
	}
	e, err := d.registry().Get(arg)
	if err == nil {
		return e.Config, nil
	}
	if !errors.Is(err, registry.ErrUnknown) {
		return "", err
	}
	if _, statErr := os.Stat(arg); statErr == nil {
		return arg, nil
	}
	return "", withHint(err, "name its configuration file: "+arg+".yaml")
}

// known returns the entry of an interface that was brought up, or whose
// control socket is there.
func (d *dirs) known(iface string) (registry.Entry, error) {
	e, err := d.registry().Get(iface)
	if errors.Is(err, registry.ErrUnknown) {
		if _, statErr := os.Lstat(control.SocketPath(d.run, iface)); statErr == nil {
			return registry.Entry{Interface: iface}, nil
		}
		return e, withHint(err, "keyturn ls")
	}
	return e, err
}

// interfaces completes arguments that are interfaces.
func (d *dirs) interfaces(_ *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	names, _ := d.registry().Interfaces()
	return names, cobra.ShellCompDirectiveNoFileComp
}

// configs completes arguments that are interfaces or configuration files.
func (d *dirs) configs(_ *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	names, _ := d.registry().Interfaces()
	return names, cobra.ShellCompDirectiveDefault
}

func errRunning(iface string, err error) error {
	return withHint(fmt.Errorf("%s: %w", iface, err), "keyturn status "+iface, "keyturn down "+iface)
}
