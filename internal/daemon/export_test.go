package daemon

import "keyturn/internal/config"

// OpenStore opens the journals of an interface for tests outside the package.
func OpenStore(c *config.Config, runDir, stateDir string) (Store, error) {
	return openStore(c, runDir, stateDir)
}
