package registry

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
)

// Process names one process of this host for all time: a process ID is used
// again, but not with the same start time, and start times begin anew with
// each boot.
type Process struct {
	PID    int    `json:"pid"`
	BootID string `json:"boot_id"`    // of the host: /proc/sys/kernel/random/boot_id
	Start  uint64 `json:"start_time"` // clock ticks since boot: field 22 of proc_pid_stat(5)
}

// Self returns the calling process.
func Self() (Process, error) { return find("/proc", os.Getpid()) }

// Alive reports whether the process still runs. One that has ended and was
// not yet waited for by its parent does not.
func (p Process) Alive() bool { return p.aliveIn("/proc") }

func (p Process) aliveIn(proc string) bool {
	if p.PID <= 0 {
		return false
	}
	now, err := find(proc, p.PID)
	return err == nil && now == p
}

// errEnded means that a process is only waited for.
var errEnded = errors.New("process has ended")

func find(proc string, pid int) (Process, error) {
	boot, err := os.ReadFile(proc + "/sys/kernel/random/boot_id")
	if err != nil {
		return Process{}, fmt.Errorf("boot id: %w", err)
	}
	stat, err := os.ReadFile(proc + "/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return Process{}, fmt.Errorf("start time of process %d: %w", pid, err)
	}
	start, err := parseStat(stat)
	if err != nil {
		return Process{}, fmt.Errorf("start time of process %d: %w", pid, err)
	}
	return Process{PID: pid, BootID: strings.TrimSpace(string(boot)), Start: start}, nil
}

// parseStat reads the start time from /proc/PID/stat. The second field is the
// command's name in parentheses, which may itself hold spaces and
// parentheses: fields are counted from the last one.
func parseStat(b []byte) (uint64, error) {
	const afterName = 3 // the number of the first field after the name: the state
	const startTime = 22
	i := bytes.LastIndexByte(b, ')')
	fields := bytes.Fields(b[i+1:])
	if i < 0 || len(fields) <= startTime-afterName {
		return 0, errors.New("too few fields")
	}
	if state := fields[0][0]; state == 'Z' || state == 'X' {
		return 0, errEnded
	}
	return strconv.ParseUint(string(fields[startTime-afterName]), 10, 64)
}
