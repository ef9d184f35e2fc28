package rotation_test

import (
	"bytes"
	"fmt"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/cockroachdb/datadriven"

	"keyturn/internal/rotation"
	"keyturn/internal/rotation/rotationtest"
	"keyturn/internal/wire"
)

// TestTrace plays the files of testdata/trace, each of which tells a story of
// the protocol; testdata/trace/README explains how to read and write them.
func TestTrace(t *testing.T) {
	datadriven.Walk(t, "testdata/trace", func(t *testing.T, path string) {
		if filepath.Base(path) == "README" {
			return
		}
		s := &story{}
		datadriven.RunTest(t, path, func(t *testing.T, d *datadriven.TestData) string {
			return s.play(t, d)
		})
	})
}

// story is the world that a file tells of.
type story struct {
	world   *rotationtest.World
	lines   bytes.Buffer
	names   map[string]string // of fingerprints and ids, in the order in which they appear
	counts  map[string]int
	reports map[string]string // the last one of each end
	failing map[string]bool   // whether handshakes by an end have been told to fail
	playing bool              // in run
	restore [2]func()         // to the snapshot that was taken
}

const (
	settle = 5 * time.Millisecond   // in which a command lets the journal and WireGuard work
	beat   = 100 * time.Millisecond // how often advance looks for heartbeats
)

func (s *story) play(t *testing.T, d *datadriven.TestData) string {
	t.Helper()
	if d.Cmd == "new" {
		s.begin(t, d)
		s.world.Run(settle)
		return s.told()
	}
	if s.world == nil {
		d.Fatalf(t, "%s before new", d.Cmd)
	}
	command, ok := commands[d.Cmd]
	if !ok {
		d.Fatalf(t, "unknown command %q", d.Cmd)
	}
	a := args{s, t, d}
	command(a)
	s.world.Run(settle)
	if err := s.world.Err(); err != nil {
		d.Fatalf(t, "%v\n%s", err, s.told())
	}
	return s.told()
}

// begin makes the world. Without words the tunnel is under traffic, with QKD
// and one KEM, and the link beside it.
func (s *story) begin(t *testing.T, d *datadriven.TestData) {
	*s = story{names: map[string]string{}, counts: map[string]int{}, reports: map[string]string{}, failing: map[string]bool{}}
	o := rotationtest.Options{Seed: 1, Manual: true, Trace: &s.lines}
	var changes []func(end int, c *rotation.Config)
	for _, arg := range d.CmdArgs {
		value := ""
		if len(arg.Vals) > 0 {
			value = arg.Vals[0]
		}
		switch arg.Key {
		case "idle":
			o.Idle = true
		case "inside":
			o.Inside = true
		case "listens":
			end := rotationtest.Client
			if value == "server" {
				end = rotationtest.Server
			}
			o.Listens[end] = true
		case "persistent":
			o.Persistent = true
		case "fallback":
			o.Fallback = value == "initial"
		case "on-stale":
			o.BlockStale = value == "block"
		case "start":
			o.BlockStart = value == "block"
		case "max-key-age":
			o.MaxKeyAge = duration(t, d, value)
		case "require":
			for r := rotation.RequireAll; r <= rotation.RequireAny; r++ {
				if r.String() == value {
					o.Require = r
				}
			}
		case "server":
			change, ok := disagreements[value]
			if !ok {
				d.Fatalf(t, "unknown parameter %q", value)
			}
			changes = append(changes, func(end int, c *rotation.Config) {
				if end == rotationtest.Server {
					change(c)
				}
			})
		case "heartbeat":
			every := duration(t, d, value)
			changes = append(changes, func(_ int, c *rotation.Config) { c.Heartbeat = every })
		case "buffer":
			changes = append(changes, func(_ int, c *rotation.Config) { c.Parameters.Buffer = uint16(value[0] - '0') })
		case "kems":
			changes = append(changes, func(_ int, c *rotation.Config) { setKEMs(c, value) })
		case "qkd":
			changes = append(changes, func(_ int, c *rotation.Config) { c.Parameters.QKD = value == "yes" })
		default:
			d.Fatalf(t, "unknown option %q", arg.Key)
		}
	}
	o.Config = func(end int, c *rotation.Config) {
		for _, change := range changes {
			change(end, c)
		}
	}
	s.world = rotationtest.New(o)
	found := s.world.Ends[rotationtest.Client].View().Installed.Fingerprint
	s.names[found.String()] = "p0"
}

func setKEMs(c *rotation.Config, number string) {
	c.Parameters.KEMs, c.KEMs = nil, nil
	for i := range int(number[0] - '0') {
		c.Parameters.KEMs = append(c.Parameters.KEMs, fmt.Sprintf("SHAM%d", i+1))
		c.KEMs = append(c.KEMs, rotationtest.Sham)
	}
}

// disagreements change one parameter at the server (PROTOCOL 5.2).
var disagreements = map[string]func(*rotation.Config){
	"role":              func(c *rotation.Config) { c.Role = rotation.Client },
	"client-sae":        func(c *rotation.Config) { c.Parameters.PeerSAE = "sae_009" },
	"server-sae":        func(c *rotation.Config) { c.Parameters.SAE = "sae_009" },
	"client-public-key": func(c *rotation.Config) { c.Parameters.PeerPublicKey = [32]byte{9} },
	"server-public-key": func(c *rotation.Config) { c.Parameters.PublicKey = [32]byte{9} },
	"kms":               func(c *rotation.Config) { c.Parameters.QKD = false },
	"kems":              func(c *rotation.Config) { setKEMs(c, "2") },
	"require":           func(c *rotation.Config) { c.Parameters.Require = uint8(rotation.RequireAny) },
	"combiner":          func(c *rotation.Config) { c.Parameters.Combiner = 1 },
	"buffer":            func(c *rotation.Config) { c.Parameters.Buffer = 5 },
	"window":            func(c *rotation.Config) { c.Parameters.Window = 20 * time.Second },
	"fallback":          func(c *rotation.Config) { c.Fallback = true },
}

// args is a command with its story.
type args struct {
	*story
	t *testing.T
	d *datadriven.TestData
}

func (a args) word(i int) string {
	if i < len(a.d.CmdArgs) {
		return a.d.CmdArgs[i].Key
	}
	return ""
}

func (a args) index() int {
	switch a.word(0) {
	case "client":
		return rotationtest.Client
	case "server":
		return rotationtest.Server
	}
	a.d.Fatalf(a.t, "%s wants client or server, not %q", a.d.Cmd, a.word(0))
	return 0
}

func (a args) end() *rotationtest.End { return a.world.Ends[a.index()] }

func (a args) say(format string, values ...any) { _, _ = fmt.Fprintf(&a.lines, format+"\n", values...) }

// fails reads "fails" or "works"; what "lies" says that it failed, and worked.
func (a args) fails(i int) bool {
	switch a.word(i) {
	case "fails":
		return true
	case "works", "lies":
		return false
	}
	a.d.Fatalf(a.t, "%s wants fails, works or lies", a.d.Cmd)
	return false
}

func duration(t *testing.T, d *datadriven.TestData, text string) time.Duration {
	v, err := time.ParseDuration(text)
	if err != nil {
		d.Fatalf(t, "%v", err)
	}
	return v
}

// name is the first word of a message.
func name(m wire.Message) string {
	word, _, _ := strings.Cut(fmt.Sprint(m), " ")
	return strings.TrimSuffix(word, ":")
}

// upTo delivers the messages before the first one of a name, and returns that
// one, or nil if there is none.
func (a args) upTo(to int, want string) wire.Message {
	for {
		waiting := a.world.Waiting(to)
		if len(waiting) == 0 {
			a.say("(no %s waits)", want)
			return nil
		}
		if name(waiting[0]) == want {
			return waiting[0]
		}
		a.world.Deliver(to)
		a.world.Run(settle)
	}
}

// heartbeats delivers those that no other message holds up.
func (a args) heartbeats(to int) {
	for {
		waiting := a.world.Waiting(to)
		if len(waiting) == 0 || name(waiting[0]) != "report" {
			return
		}
		a.world.Deliver(to)
	}
}

func (a args) until(want string) {
	const patience = 40000 // settles: 200 s
	for range patience {
		quiet := true
		for _, to := range []int{rotationtest.Server, rotationtest.Client} {
			if waiting := a.world.Waiting(to); len(waiting) > 0 {
				if name(waiting[0]) == want {
					return
				}
				a.world.Deliver(to)
				quiet = false
			}
		}
		if a.world.Answer() {
			quiet = false
		}
		if quiet && want == "" {
			return
		}
		a.world.Run(settle)
	}
	a.say("(no %s in %v)", want, patience*settle)
}

// answer lets the KMS answer the oldest request, or several, in some state.
func (a args) answer(state func(k *rotationtest.KMS)) {
	k := &a.world.KMS
	state(k)
	n := 1
	if count := a.word(0); count != "" {
		n = int(count[0] - '0')
	}
	for range n {
		if !a.world.Answer() {
			a.say("(nothing was asked)")
		}
	}
	k.Down, k.Wrong, k.Zero, k.Reuse = [2]bool{}, false, false, false
}

var commands = map[string]func(args){
	// deliver hands an end what waits for it: everything, or all up to the
	// first message of a name.
	"deliver": func(a args) {
		to := a.index()
		if want := a.word(1); want != "" {
			if a.upTo(to, want) != nil {
				a.world.Deliver(to)
			}
			return
		}
		n := len(a.world.Waiting(to))
		if n == 0 {
			a.say("(nothing waits)")
		}
		for range n {
			a.world.Deliver(to)
			a.world.Run(settle)
		}
	},
	// until delivers and answers everything until a message of a name is the
	// oldest that waits for an end, or, without a name, until nothing waits.
	"until": func(a args) { a.until(a.word(0)) },

	// together hands an end its two oldest messages at one moment.
	"together": func(a args) {
		a.world.Deliver(a.index())
		a.world.Deliver(a.index())
	},
	"lose": func(a args) {
		if m := a.upTo(a.index(), a.word(1)); m != nil {
			a.world.Lose(a.index())
			a.say("lost: %v", m)
		}
	},
	"repeat": func(a args) {
		a.upTo(a.index(), a.word(1))
		a.world.Repeat(a.index())
	},
	"swap": func(a args) {
		if want := a.word(1); want != "" {
			a.upTo(a.index(), want)
		}
		if !a.world.Swap(a.index()) {
			a.say("(nothing to swap with)")
		}
	},
	"tamper": func(a args) { a.tamper(a.upTo(a.index(), a.word(1)), a.word(2)) },

	"kms":       func(a args) { a.answer(func(*rotationtest.KMS) {}) },
	"kms-down":  func(a args) { a.answer(func(k *rotationtest.KMS) { k.Down = [2]bool{true, true} }) },
	"kms-wrong": func(a args) { a.answer(func(k *rotationtest.KMS) { k.Wrong = true }) },
	"kms-zero":  func(a args) { a.answer(func(k *rotationtest.KMS) { k.Zero = true }) },
	"kms-reuse": func(a args) { a.answer(func(k *rotationtest.KMS) { k.Reuse = true }) },

	// advance lets time pass in which heartbeats alone are delivered, silence
	// some in which nothing is; run plays on with everything delivered, tells the
	// seconds since the beginning, and leaves the rounds out.
	"advance": func(a args) {
		for d := duration(a.t, a.d, a.word(0)); d > 0; d -= beat {
			a.world.Run(min(d, beat))
			a.heartbeats(rotationtest.Server)
			a.heartbeats(rotationtest.Client)
		}
	},
	"silence": func(a args) { a.world.Run(duration(a.t, a.d, a.word(0))) },
	"run": func(a args) {
		a.playing = true
		a.world.Play(duration(a.t, a.d, a.word(0)))
	},

	"handshake": func(a args) { a.world.Handshake(a.index()); a.world.Run(50 * time.Millisecond) },
	"crash":     func(a args) { a.end().Crash() },
	"start":     func(a args) { a.end().Start() },
	"stop":      func(a args) { a.end().Stop() },
	"reboot":    func(a args) { a.end().Reboot() },
	"forget":    func(a args) { a.end().Forget() },
	"redial":    func(a args) { a.world.Redial() },
	"stale":     func(a args) { a.world.Stale() },
	"rotate":    func(a args) { a.end().Rotate() },
	"version":   func(a args) { a.end().Version(1) },
	"wg-set":    func(a args) { a.end().Foreign() },
	"remove":    func(a args) { a.end().Gone = true },
	"add":       func(a args) { a.end().Add() },
	"jump":      func(a args) { a.end().WallOffset += duration(a.t, a.d, a.word(1)) },
	"device":    func(a args) { a.end().DeviceBad, a.end().DeviceDoubt = a.fails(1), a.word(1) == "lies" },
	"journal":   func(a args) { a.end().JournalBad, a.end().JournalDoubt = a.fails(1), a.word(1) == "lies" },
	"snapshot":  func(a args) { a.restore[a.index()] = a.end().Snapshot() },
	"restore":   func(a args) { a.restore[a.index()]() },
	"link":      func(a args) { a.world.Link.Cut = a.fails(0) },
	"network":   func(a args) { a.world.Link.Cut = a.fails(0); a.world.Tunnel.Cut = a.fails(0) },
	"tunnel":    func(a args) { a.world.Tunnel.Cut = a.fails(0) },
	"all-kms":   func(a args) { a.world.KMS.Down = [2]bool{a.fails(0), a.fails(0)} },
	"view":      func(a args) { a.view() },
}

// tamper makes a message what an honest peer would not have sent.
func (a args) tamper(m wire.Message, what string) {
	if m == nil {
		return
	}
	before := fmt.Sprint(m)
	switch m := m.(type) {
	case *wire.Init:
		m.Attempt++
	case *wire.Propose:
		switch what {
		case "serial":
			m.Serial = 1
		case "key-id":
			m.KeyID = "K2"
		case "sources":
			m.Sources &^= 1
			m.KeyID = ""
		case "key":
			m.EncapsulationKeys[0] = m.EncapsulationKeys[0][1:]
		}
	case *wire.Reply:
		switch what {
		case "ciphertext":
			m.Ciphertexts[0] = m.Ciphertexts[0][1:]
		case "sources":
			m.Sources &^= 1
		case "without-kem":
			m.Sources &^= 2
			m.EncapsulationKeys, m.Ciphertexts = nil, nil
		}
	case *wire.Finish:
		switch what {
		case "ciphertexts":
			m.Ciphertexts = nil
		case "digest":
			m.Digest[0] ^= 1
		case "serial":
			m.Serial += 100
		}
	case *wire.Done:
		m.Digest[0] ^= 1
	case *wire.Commit:
		switch what {
		case "key":
			m.Key.Fingerprint[0] ^= 1
		case "serial":
			m.Key.Serial = 1
		case "previous":
			m.Key = a.world.Ends[rotationtest.Server].View().Confirmed
		case "installed":
			m.Installed.Fingerprint[0] ^= 1
		}
	}
	a.say("tampered with: %s (%s)", before, what)
}

// view tells what both ends, or one, say of themselves.
func (a args) view() {
	ends := []int{rotationtest.Client, rotationtest.Server}
	if a.word(0) != "" {
		ends = []int{a.index()}
	}
	for _, i := range ends {
		e := a.world.Ends[i]
		name := [...]string{"client", "server"}[i]
		if !e.Up() {
			a.say("%s: down", name)
			continue
		}
		v := e.View()
		buffered, capacity := e.Tunnel().Buffer()
		line := fmt.Sprintf("%s: %v, installed %v, confirmed %v, buffer %d/%d", name, v.State, v.Installed, v.Confirmed, buffered, capacity)
		if v.Protected {
			line += ", protected"
		}
		if names := e.Tunnel().Candidates(); len(names) > 1 {
			line += fmt.Sprintf(", candidates %v", names)
		}
		a.say("%s", line)
	}
}

var (
	hex    = regexp.MustCompile(`(session |boot )?\b[0-9a-f]{8}\b`)
	again  = regexp.MustCompile(`\w+: abandoned: .*|packet from \w+ lost`)
	fails  = regexp.MustCompile(`handshake by (client|server) (fails|under)`)
	rounds = regexp.MustCompile(`-> kms: |-> \w+: (propose|reply|finish|done) |: established `)
	report = regexp.MustCompile(`^(client|server) -> \w+: (report .*)$`)
)

// told returns the lines since the last command. Fingerprints and ids get
// names by their first appearance, so that a story does not depend on random
// bytes. Left out are heartbeats that say nothing new, handshakes that go on
// failing, and in run whatever else goes wrong as it did before.
func (s *story) told() string {
	var out strings.Builder
	seen := map[string]bool{}
	for line := range strings.Lines(s.lines.String()) {
		line = hex.ReplaceAllStringFunc(strings.TrimRight(line, "\n"), s.rename)
		if m := report.FindStringSubmatch(line); m != nil {
			if s.reports[m[1]] == m[2] {
				continue
			}
			s.reports[m[1]] = m[2]
		}
		if s.playing && rounds.MatchString(line) {
			continue
		}
		if text := again.FindString(line); s.playing && text != "" {
			if seen[text] {
				continue
			}
			seen[text] = true
		}
		if m := fails.FindStringSubmatch(line); m != nil {
			if m[2] == "fails" && s.failing[m[1]] {
				continue
			}
			s.failing[m[1]] = m[2] == "fails"
		}
		out.WriteString(line + "\n")
	}
	s.lines.Reset()
	s.playing = false
	if out.Len() == 0 {
		return "(nothing)\n"
	}
	return out.String()
}

func (s *story) rename(text string) string {
	prefix, kind := "", "p"
	if i := strings.IndexByte(text, ' '); i >= 0 {
		prefix, text = text[:i+1], text[i+1:]
		kind = prefix[:1]
	}
	if s.names[text] == "" {
		s.counts[kind]++
		s.names[text] = fmt.Sprint(kind, s.counts[kind])
	}
	return prefix + s.names[text]
}
