//go:build mutation

package rotation_test

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

// A mutation takes one rule of the protocol out of the code.
type mutation struct {
	rule  string
	run   string // the test that goes red
	edits []edit
}

// edit replaces text that occurs exactly once in a file.
type edit struct{ file, old, new string }

// mutations are the rules that exist because their absence was seen to fail.
var mutations = []mutation{
	{"the client alone pulls", "TestAdversary", []edit{
		{"commit.go", "t.config.Role != Client || !t.linked", "!t.linked"},
		{"scheduler.go", "if m.Session == s.tunnel.session && s.tunnel.config.Role == Server {", "if m.Session == s.tunnel.session {"},
	}},
	{"the client leads repair", "TestAdversary", []edit{
		{"commit.go", "t.config.Role != Client || !t.linked", "t.config.Role != Client && !s.differs() || !t.linked"},
		{"scheduler.go", "if m.Session == s.tunnel.session && s.tunnel.config.Role == Server {", "if m.Session == s.tunnel.session {"},
	}},
	{"commit waits for the confirmation of the one before", "TestAdversary", []edit{
		{"commit.go", "if s.used || in != nil && !in.found() && !in.confirmed && !s.foundByPeer() {", "if s.used {"},
	}},
	{"one commit for each lost session", "TestCalmIdle", []edit{
		{"commit.go", "return wire.ModeIdle, s.rotate || in == nil || in.found() || s.foundByPeer() || s.due(in.since.Add(s.tunnel.config.MaxKeyAge/2))", "return wire.ModeIdle, true"},
	}},
	{"probe only 2.5 s after the set", "TestCalmIdle", []edit{
		{"commit.go", "s.probeAt = s.now.Add(s.probeAfter()) // C6", "s.probeAt = s.now"},
	}},
	{"commits of another session are dropped", "TestOtherSession", []edit{
		{"scheduler.go", "if m.Session == s.tunnel.session && s.tunnel.config.Role == Server {", "if s.tunnel.config.Role == Server {"},
	}},
	{"messages of another session are dropped", "TestOtherSession", []edit{
		{"scheduler.go", "if m.Session == s.tunnel.session && s.tunnel.config.Role == Server {", "if s.tunnel.config.Role == Server {"},
		{"scheduler.go", "\tcase *wire.Committed:\n\t\tif m.Session == s.session {", "\tcase *wire.Committed:\n\t\tif true {"},
		{"scheduler.go", "\tcase *wire.Refused:\n\t\tif m.Session == s.session {", "\tcase *wire.Refused:\n\t\tif true {"},
		{"scheduler.go", "\t\tif m.Session != s.session {\n\t\t\ts.early = m\n\t\t\tbreak\n\t\t}\n", ""},
		{"generator.go", "if s != g.tunnel.session || s == (wire.SessionID{}) {", "if false {"},
	}},
	{"rounds of another session are dropped", "TestAdversary|TestTrace", []edit{
		{"generator.go", "if s != g.tunnel.session || s == (wire.SessionID{}) {", "if s == (wire.SessionID{}) {"},
	}},
	{"at most three hunt candidates", "TestHunt", []edit{
		{"rotation.go", "MaxCandidates = 3 ", "MaxCandidates = 4 "},
	}},
	{"unequal dwell", "TestHunt", []edit{
		{"rotation.go", "ServerDwell   = 40 * time.Second", "ServerDwell   = 12 * time.Second"},
	}},
	{"both ends walk: the server", "TestHunt|TestAdversary", []edit{
		{"hunt.go", "if !s.huntDue() {", "if s.tunnel.config.Role == Server || !s.huntDue() {"},
	}},
	{"both ends walk: the client", "TestHunt|TestAdversary", []edit{
		{"hunt.go", "if !s.huntDue() {", "if s.tunnel.config.Role == Client || !s.huntDue() {"},
	}},
	{"a key is in the journal before it is set", "TestAdversary", []edit{
		{"commit.go", "\t\top.stage = saving\n\t\top.token = s.save()\n", "\t\ts.save()\n\t\tif op.kind == opCommit {\n\t\t\ts.ask()\n\t\t} else {\n\t\t\ts.setPSK()\n\t\t}\n"},
	}},
	{"a hunt walks through journaled keys only", "TestSchedules", []edit{
		{"hunt.go", "return r.journaled && s.usable(r)", "return s.usable(r)"},
	}},
	{"the key before is erased only after the confirmation", "TestAdversary", []edit{
		{"commit.go", "\ts.lastError = \"\"\n\ts.prune()\n", "\ts.lastError = \"\"\n\tfor _, x := range slices.Clone(t.records) {\n\t\tif x != r {\n\t\t\tt.erase(x)\n\t\t}\n\t}\n"},
	}},
	{"the key before is erased only with the confirmation in both journals", "TestAdversary|TestTrace", []edit{
		{"scheduler.go", "both := confirmed != nil && s.journaled >= confirmed.serial && s.peer != nil && s.peer.Confirmed >= confirmed.serial", "both := confirmed != nil"},
	}},
	{"the client sets after the server's answer", "TestAdversary", []edit{
		{"commit.go", "\tdefault:\n\t\ts.ask()\n", "\tdefault:\n\t\ts.ask()\n\t\ts.setPSK()\n"},
	}},
	{"seen only by a handshake 2 s after the install", "TestAdversary|TestTrace", []edit{
		{"observe.go", "!o.Began.Before(s.setAt.Add(SeenAfter))", "!o.Began.Before(s.setAt)"},
	}},
	{"repair only while no commit is unanswered", "TestAdversary|TestTrace", []edit{
		{"commit.go", "s.op != nil || !s.ready || s.absent > 1 || s.peer.Missing", "s.op != nil && s.op.stage != asking || !s.ready || s.absent > 1 || s.peer.Missing"},
	}},
	{"refusals are heard", "TestAdversary|TestTrace", []edit{
		{"scheduler.go", "\tcase *wire.Refused:\n\t\tif m.Session == s.session {", "\tcase *wire.Refused:\n\t\tif false {"},
	}},
	{"a restart empties the buffer", "TestAdversary|TestTrace", []edit{
		{"bootstrap.go", "m.Boot == g.boot.peerBoot && equal", "equal"},
		{"bootstrap.go", "m.Kept && m.Boot == g.boot.peerBoot", "m.Kept"},
	}},
	{"both digests are verified", "TestAdversary", []edit{
		{"generator.go", "if !psk.EqualDigests(key.Digest(psk.RoleClient, g.context(r, m)), m.Digest) {", "if false {"},
		{"generator.go", "if !psk.EqualDigests(r.expected, m.Digest) {", "if false {"},
	}},
	{"the server verifies the client's digest", "TestAdversary|TestTrace", []edit{
		{"generator.go", "if !psk.EqualDigests(key.Digest(psk.RoleClient, g.context(r, m)), m.Digest) {", "if false {"},
	}},
	{"the server drops what the client does not name", "TestAdversary|TestTrace", []edit{
		{"generator.go", "\tt.buffer.retain(func(n wire.Named) bool { return wanted(n.Serial) })\n", ""},
	}},
	{"the server wants to see the handshake as well", "TestAdversary|TestTrace", []edit{
		{"commit.go", "case !s.inWindow() && !s.idle() && !opening && !s.degraded():", "case false:"},
	}},
	{"an older key that both have again is the base", "TestTrace", []edit{
		{"scheduler.go", "if x.serial > r.serial && (x.agreed || x.confirmed) {", "if false {"},
	}},
	{"a key that was agreed on is not dropped for an older one", "TestTrace", []edit{
		{"scheduler.go", "!r.lost && (r.session", "(r.session"},
	}},
	{"a key that WireGuard refused and took is ours", "TestTrace", []edit{
		{"observe.go", "if r.doubtful && r.print == print {", "if false {"},
	}},
	{"a random PSK that WireGuard refused and took closes the tunnel", "TestTrace", []edit{
		{"observe.go", "if s.block != nil && !s.blocked && s.matches(print) {", "if false {"},
	}},
	{"a key that is too old to be set is not listed", "TestTrace", []edit{
		{"scheduler.go", "Held: limit(s.held())", "Held: limit(t.held())"},
	}},
	{"what the peer tries in vain is begun here", "TestTrace|TestClock", []edit{
		{"renew.go", "if !s.peerTrying() || !s.gone() || s.stopping {", "if true {"},
	}},
	{"an end whose clock went back makes the peer anew", "TestTrace|TestClock", []edit{
		{"renew.go", "return s.unheeded() && (!s.tries().IsZero()", "return false && (!s.tries().IsZero()"},
	}},
	{"an end that hears nothing of a peer that lost the session makes it anew", "TestTrace|TestClock", []edit{
		{"renew.go", "s.peerBlank() || s.peerPutBack()", "s.peerPutBack()"},
	}},
	{"a peer that was put back to a live snapshot is made anew", "TestPutBack", []edit{
		{"renew.go", "s.peerBlank() || s.peerPutBack()", "s.peerBlank()"},
	}},
	{"the server knocks without a link", "TestTrace|TestClock", []edit{
		{"knock.go", "if !s.knocksFor() || s.tunnel.linked", "if true || s.tunnel.linked"},
	}},
	{"a knock is no sign of anything", "TestKnock", []edit{
		{"observe.go", "echo := received == 0 && s.knocking()", "echo := false && s.knocking()"},
	}},
	{"who answers no knock may have another key", "TestWalk", []edit{
		{"knock.go", "if s.due(k.last.Add(DeadAfter)) {", "if false {"},
	}},
	{"a walk ends where it began", "TestKnock", []edit{
		{"knock.go", "!k.homeward && next != candidates[i]", "!k.homeward"},
	}},
	{"a walk that a stop cuts short goes home", "TestWalkCutShort", []edit{
		{"scheduler.go", "if !s.stopping && s.knocks.walking {", "if false {"},
	}},
	{"a walk that a stop cuts short looks for a handshake first", "TestStopMet", []edit{
		{"knock.go", "case s.last.Began.After(k.leaving):", "default:"},
	}},
	{"a hub tells of each dump without a handshake", "TestHubClock", []edit{
		{"scheduler.go", "again := blank && s.last", "again := false && s.last"},
	}},
	{"a walk that is cut short goes home", "TestWalkCutShort", []edit{
		{"hunt.go", "s.goHome() // it was cut short", "_ = s"},
	}},
	{"a hunt that hears nothing is a walk", "TestVanish", []edit{
		{"hunt.go", "case s.unanswered():", "case false:"},
	}},
	{"a handshake since the last report may be of after the snapshot", "TestLiveSession", []edit{
		{"scheduler.go", "s.handshakeAt.Before(s.reportedAt), 0", "true, 0"},
	}},
	{"a dump before the peer is made anew", "TestLiveSession", []edit{
		{"renew.go", "if !lost && s.last.Began.Before(s.renewAt) {", "if false {"},
	}},
	{"a report of after the silence", "TestLiveSession|TestTrace", []edit{
		{"renew.go", "if s.reportedAt.Sub(since) < blankLate || ", "if "},
		{"renew.go", "by := later(since.Add(BlankAfter), s.reportedAt)", "by := since.Add(BlankAfter)"},
	}},
	{"an end that sees nothing of its WireGuard tells nothing of it", "TestLiveSession", []edit{
		{"scheduler.go", "blank := s.ready && s.last", "blank := s.last"},
		{"scheduler.go", " && s.now.Sub(s.last.Began) <= blankLate", ""},
		{"renew.go", " && !s.peer.Missing && !s.peer.Blocked", ""},
	}},
	{"a walk ends when the other end is heard", "TestKnock", []edit{
		{"knock.go", "if heard && !k.homeward {", "if false {"},
	}},
	{"a recovery key where journals survive a reboot", "TestTrace|TestRecoveryKey", []edit{
		{"recovery.go", "case s.wantsRecovery():", "case false:"},
	}},
	{"the client lists a key that it could not set", "TestTrace", []edit{
		{"rotation.go", "(!r.failed || t.config.Role == Client) &&", "!r.failed &&"},
	}},
	{"a key that could not be set is tried again", "TestAdversary", []edit{
		{"commit.go", "\t\t\tif r.failed {\n\t\t\t\treturn nil // it is tried again; a fresh key would fare no better\n\t\t\t}\n", "\t\t\tif r.failed {\n\t\t\t\tcontinue\n\t\t\t}\n"},
		{"commit.go", "\tif failed {\n\t\treturn nil // it is tried again\n\t}\n", "\t_ = failed\n"},
	}},
}

// exploration is the test that explores the model (docs/MODEL.md).
const exploration = "TestExplore"

// explored are the rules without which the exploration must fail as well, with
// a schedule.
var explored = []string{
	"unequal dwell",
	"at most three hunt candidates",
	"the client sets after the server's answer",
	"the key before is erased only after the confirmation",
	"commit waits for the confirmation of the one before",
	"the client alone pulls",
	"messages of another session are dropped",
}

// mutantTime bounds one run; a mutant that takes longer is a failure of this test.
const mutantTime = 15 * time.Minute

// TestMutations takes each rule out and wants a test to go red.
func TestMutations(t *testing.T) {
	only := os.Getenv("KEYTURN_MUTATION")
	slots := make(chan struct{}, 2)
	all := slices.Clone(mutations)
	for _, rule := range explored {
		i := slices.IndexFunc(mutations, func(m mutation) bool { return m.rule == rule })
		if i < 0 {
			t.Fatalf("there is no rule %q", rule)
		}
		all = append(all, mutation{"explored: " + rule, exploration, mutations[i].edits})
	}
	for _, m := range all {
		if !strings.Contains(m.rule, only) {
			continue
		}
		t.Run(m.rule, func(t *testing.T) {
			t.Parallel()
			slots <- struct{}{}
			defer func() { <-slots }()
			m.check(t)
		})
	}
}

func (m *mutation) check(t *testing.T) {
	overlay := m.overlay(t)
	if out, err := exec.CommandContext(t.Context(), "go", "build", "-overlay", overlay, ".").CombinedOutput(); err != nil {
		t.Fatalf("the mutant does not compile: %v\n%s", err, out)
	}
	var out []byte
	var err error
	tests := strings.Split(m.run, "|")
	slices.Sort(tests)
	for _, test := range slices.Backward(tests) { // TestTrace, which is quick, before TestAdversary
		c := exec.CommandContext(t.Context(), "go", "test", "-overlay", overlay, "-count", "1", "-failfast",
			"-timeout", mutantTime.String(), "-run", "^"+test+"$", "-rapid.nofailfile", "-rapid.shrinktime", "1ms", "-rapid.checks", "200", "-rapid.seed", "7", ".")
		if out, err = c.CombinedOutput(); err != nil {
			break
		}
	}
	red := regexp.MustCompile(`(?m)^--- FAIL: (Test\w+)`).FindSubmatch(out)
	switch {
	case err == nil:
		t.Errorf("no test goes red without it")
	case red == nil || strings.Contains(string(out), "panic: test timed out"):
		t.Errorf("the run broke off: %v\n%.4000s", err, out)
	default:
		why, _, _ := strings.Cut(regexp.MustCompile(`\[rapid\] failed.*|\w+_test\.go:\d+: .*`).FindString(string(out)), "\n")
		t.Logf("%s goes red: %s", red[1], why)
	}
	if m.run == exploration {
		t.Logf("%s", out) // the schedule
	}
}

// overlay writes the mutated files and the overlay that puts them in place.
func (m *mutation) overlay(t *testing.T) string {
	dir := t.TempDir()
	here, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	sources := map[string]string{}
	for _, e := range m.edits {
		text, ok := sources[e.file]
		if !ok {
			b, err := os.ReadFile(e.file)
			if err != nil {
				t.Fatal(err)
			}
			text = string(b)
		}
		if n := strings.Count(text, e.old); n != 1 {
			t.Fatalf("%q occurs %d times in %s, want once", e.old, n, e.file)
		}
		sources[e.file] = strings.Replace(text, e.old, e.new, 1)
	}
	var replace struct{ Replace map[string]string }
	replace.Replace = map[string]string{}
	for file, text := range sources {
		mutated := filepath.Join(dir, file)
		if err := os.WriteFile(mutated, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		replace.Replace[filepath.Join(here, file)] = mutated
	}
	b, err := json.Marshal(replace)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "overlay.json")
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}
