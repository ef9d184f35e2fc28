// Command keyturn rotates the pre-shared keys of WireGuard tunnels.
package main

import (
	"os"

	"keyturn/internal/cli"
)

func main() { os.Exit(cli.Main()) }
