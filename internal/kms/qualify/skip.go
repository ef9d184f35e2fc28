package qualify

import (
	"context"
	"crypto/tls"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"keyturn/internal/kms/kmshttp"
	"keyturn/internal/kms/skip"
)

// SKIP qualifies by Cisco SKIP, draft-cisco-skip-02.
func SKIP(ctx context.Context, c Config) (*Report, error) {
	t := &skipTester{tester{report: Report{Specification: "Cisco SKIP, draft-cisco-skip-02"}}}
	return &t.report, overHTTPS(ctx, c, "", tls.VersionTLS13, t.run)
}

type skipTester struct{ tester }

func (t *skipTester) run(ctx context.Context, here, there *side) {
	caps, on := t.capabilities(ctx, here)
	thereOn := false
	if there != nil {
		_, thereOn = t.capabilities(ctx, there)
	}
	if !on {
		return
	}
	keys := t.initiator(ctx, here)
	t.refusals(ctx, here, caps)
	why := needsOther
	if there != nil && !thereOn {
		why, there = noConnectionThere, nil
	}
	t.responder(ctx, here, there, keys, why)
	t.entropy(ctx, here, caps)
	t.distinct(Line{Clause: "4.2.1", What: "keyIds and keys all different, none zero", Needed: true})
	t.identifiers()
}

// capabilities of a key provider; the zero value where it does not say.
type capabilities struct {
	entropy, key bool
	remotes      []string
}

// covers reports whether the list has a system's ID.
func (c capabilities) covers(id string) bool {
	return slices.ContainsFunc(c.remotes, func(pattern string) bool { return skip.Match(pattern, id) })
}

// capabilities judges the connection of one end and "Get Capabilities".
func (t *skipTester) capabilities(ctx context.Context, s *side) (c capabilities, on bool) {
	r, on := t.connection(ctx, s.SAE, "3", s.minimum, s.probe(call{path: "/capabilities"}))
	if !on {
		return c, false
	}
	var b map[string]json.RawMessage
	problem := r.ok(&b)
	t.judge(Line{Clause: "4.1", What: "GET capabilities", Needed: true}.on(s, r), problem, "")
	var (
		fields = Line{Clause: "4.1", What: "capabilities have all their fields"}.at(s.SAE)
		gives  = Line{Clause: "4.1", What: "there are keys", Needed: true}.at(s.SAE)
		shares = Line{Clause: "4.1.2", What: "they are shared with the other end", Needed: true}.at(s.SAE)
	)
	if problem != "" {
		t.untested("no capabilities", fields, gives, shares)
		return c, true
	}
	var faults []string
	field := func(name string, into any) {
		if b[name] == nil || json.Unmarshal(b[name], into) != nil {
			faults = append(faults, name)
		}
	}
	var algorithm, local string
	field("entropy", &c.entropy)
	field("key", &c.key)
	field("algorithm", &algorithm)
	field("localSystemID", &local)
	field("remoteSystemID", &c.remotes)
	detail := fmt.Sprintf("localSystemID %q, algorithm %q", kmshttp.Shown(local), kmshttp.Shown(algorithm))
	if local != s.SAE {
		detail += fmt.Sprintf("; the configuration has %q as sae", s.SAE)
	}
	if len(faults) > 0 {
		t.line(fields, Wrong, "missing or of another type: %s", strings.Join(faults, ", "))
	} else {
		t.line(fields, Right, "%s", detail)
	}
	if c.key {
		t.line(gives, Right, "")
	} else {
		t.line(gives, Wrong, "key is not true")
	}
	list := kmshttp.Shown(strings.Join(c.remotes, ", "))
	if c.covers(s.peer) {
		t.line(shares, Right, "%q", list)
	} else {
		t.line(shares, Wrong, "remoteSystemID is %q, without %q", list, s.peer)
	}
	return c, true
}

// skipKey decodes an answer to "Get Key" (4.2).
func skipKey(r reply) (k key, problem string) {
	var b struct {
		ID  *string `json:"keyId"`
		Key *string `json:"key"`
	}
	if problem := r.ok(&b); problem != "" {
		return k, problem
	}
	switch {
	case b.Key == nil:
		return k, "no key in the answer"
	case b.ID == nil || *b.ID == "":
		return k, "a key without keyId"
	}
	k.id = *b.ID
	raw, err := hex.DecodeString(*b.Key)
	switch {
	case errors.Is(err, hex.ErrLength):
		return k, "a key of an odd number of digits"
	case err != nil:
		return k, "a key that is not hexadecimal"
	}
	k.bytes = raw
	return k, k.problem()
}

// newKey asks for a key that is shared with the other end, of so many bits or,
// with 0, of as many as the provider likes.
func (t *skipTester) newKey(ctx context.Context, s *side, bits int) (k key, r reply, problem string) {
	q := url.Values{"remoteSystemID": {s.peer}}
	if bits > 0 {
		q.Set("size", strconv.Itoa(bits))
	}
	r = s.ask(ctx, call{path: "/key", query: q})
	k, problem = skipKey(r)
	if k.bytes != nil {
		t.report.KeysTaken++
		t.fresh = append(t.fresh, k)
	}
	return k, r, problem
}

// byID is the call that gets a key by its keyId.
func byID(s *side, id string) call {
	return call{path: "/key/" + url.PathEscape(id), query: url.Values{"remoteSystemID": {s.peer}}}
}

// initiator asks for keys without a keyId. Only good ones are returned.
func (t *skipTester) initiator(ctx context.Context, s *side) (keys []key) {
	for _, l := range []struct {
		Line
		bits int
	}{
		{Line{Clause: "4.2", What: "GET a key of 256 bits", Needed: true}, keyBits},
		{Line{Clause: "4.2.2", What: "a key has 256 bits unless asked otherwise"}, 0},
	} {
		if t.silent(s, l.Line) {
			continue
		}
		k, r, problem := t.newKey(ctx, s, l.bits)
		t.judge(l.on(s, r), problem, "")
		if problem == "" {
			keys = append(keys, k)
		}
	}
	again := Line{Clause: "4.2.2", What: "a key is not given again to who asked for it", Needed: true}
	if len(keys) == 0 {
		t.untested(noKey, again.at(s.SAE))
		return nil
	}
	// The last one, in case that this takes it from the other end.
	r := s.ask(ctx, byID(s, keys[len(keys)-1].id))
	t.refused(again.on(s, r), r, http.StatusBadRequest, "")
	return keys
}

// refusals asks for what has to be refused and costs no key.
func (t *skipTester) refusals(ctx context.Context, s *side, c capabilities) {
	for _, l := range []struct {
		Line
		call
		status int
	}{
		{Line{Clause: "4", What: "an unknown path is not found"}, call{path: "/keyturn-kms-test"}, http.StatusNotFound},
		{Line{Clause: "4", What: "another method than GET is refused"}, call{method: http.MethodPost, path: "/capabilities"}, http.StatusMethodNotAllowed},
	} {
		if !t.silent(s, l.Line) {
			r := s.ask(ctx, l.call)
			t.refused(l.on(s, r), r, l.status, "")
		}
	}
	const nobody = "keyturn-kms-test-nobody"
	l := Line{Clause: "4.2", What: "no key for a system that it does not know"}
	switch {
	case t.silent(s, l):
	case c.covers(nobody):
		t.untested("its remoteSystemID covers every name", l.at(s.SAE))
	default:
		r := s.ask(ctx, call{path: "/key", query: url.Values{"remoteSystemID": {nobody}, "size": {"256"}}})
		if k, _ := skipKey(r); k.bytes != nil {
			t.report.KeysTaken++
		}
		t.refused(l.on(s, r), r, http.StatusBadRequest, "")
	}
}

// responder gets the keys of here at the other end, then the other way round,
// or says why it does not.
func (t *skipTester) responder(ctx context.Context, here, there *side, keys []key, why string) {
	var (
		same     = Line{Clause: "4.2", What: "the same key by its keyId", Needed: true}.at(here.peer)
		capitals = Line{Clause: "4.2.1", What: "the same key by its keyId in the other case"}.at(here.peer)
		once     = Line{Clause: "4.2.2", What: "a key is delivered once", Needed: true}.at(here.peer)
		back     = Line{Clause: "4.2", What: "the same key the other way round", Needed: true}.at(here.SAE)
		unknown  = Line{Clause: "4.2", What: "an unknown keyId is refused"}.at(here.SAE)
		bad      = Line{Clause: "4.2", What: "a malformed keyId is refused"}.at(here.SAE)
	)
	asked := here
	if there == nil {
		t.untested(why, same, capitals, once, back)
	} else {
		asked = there
		if len(keys) == 0 {
			t.untested(noKey, same, capitals, once)
		} else {
			if t.deliver(ctx, there, same, keys[0].id, keys[0]) && !t.silent(there, once) {
				r := there.ask(ctx, byID(there, keys[0].id))
				t.refused(once.on(there, r), r, http.StatusBadRequest, "")
			}
			if len(keys) > 1 {
				t.deliver(ctx, there, capitals, otherCase(keys[1].id), keys[1])
			}
		}
		if !t.silent(there, back) && !t.silent(here, back) {
			k, r, problem := t.newKey(ctx, there, keyBits)
			if problem != "" {
				t.line(back.on(there, r), Wrong, "%s", problem)
			} else {
				t.deliver(ctx, here, back, k.id, k)
			}
		}
	}
	for _, l := range []struct {
		Line
		id string
	}{{unknown, strings.ReplaceAll(randomUUID(), "-", "")}, {bad, "keyturn-kms-test"}} {
		if !t.silent(asked, l.Line) {
			r := asked.ask(ctx, byID(asked, l.id))
			t.refused(l.on(asked, r), r, http.StatusBadRequest, "")
		}
	}
}

// otherCase returns an ID with the other kind of letters.
func otherCase(id string) string {
	if upper := strings.ToUpper(id); upper != id {
		return upper
	}
	return strings.ToLower(id)
}

// deliver judges the delivery of a key by its ID.
func (t *skipTester) deliver(ctx context.Context, s *side, l Line, id string, want key) bool {
	if t.silent(s, l) {
		return false
	}
	r, waited := s.patiently(ctx, byID(s, id))
	got, problem := skipKey(r)
	switch {
	case problem != "":
	case !strings.EqualFold(got.id, want.id):
		problem = "a key under another keyId"
	default:
		problem = got.same(want)
	}
	detail := ""
	if waited > 0 {
		detail = fmt.Sprintf("known only after %v", waited.Round(time.Millisecond))
	}
	t.judge(l.on(s, r), problem, detail)
	return problem == ""
}

// entropy judges "Get Entropy" (4.3), which keyturn has no use for.
func (t *skipTester) entropy(ctx context.Context, s *side, c capabilities) {
	for _, l := range []struct {
		Line
		bits  int
		query url.Values
	}{
		{Line{Clause: "4.3", What: "GET entropy of 256 bits"}, 256, nil},
		{Line{Clause: "4.3", What: "GET entropy of another size"}, 128, url.Values{"minentropy": {"128"}}},
	} {
		if !c.entropy {
			t.line(l.at(s.SAE), NotSupported, "entropy is not true in capabilities")
			continue
		}
		if t.silent(s, l.Line) {
			continue
		}
		r := s.ask(ctx, call{path: "/entropy", query: l.query})
		var b struct {
			Random string `json:"randomStr"`
			Bits   int    `json:"minentropy"`
		}
		problem := r.ok(&b)
		raw, err := hex.DecodeString(b.Random)
		switch {
		case problem != "":
		case err != nil:
			problem = "randomStr is not hexadecimal"
		case 8*len(raw) != l.bits || b.Bits != l.bits:
			problem = fmt.Sprintf("%d bits, said to be %d, not %d", 8*len(raw), b.Bits, l.bits)
		}
		t.judge(l.on(s, r), problem, "")
	}
}

// identifiers judges the form of keyIds.
func (t *skipTester) identifiers() {
	l := Line{Clause: "4.2.1", What: "keyIds are hexadecimal"}
	for _, k := range t.fresh {
		if _, err := hex.DecodeString(k.id); err != nil {
			t.line(l, Wrong, "%q is not", kmshttp.Shown(k.id))
			return
		}
	}
	if len(t.fresh) == 0 {
		t.untested(noKey, l)
		return
	}
	t.line(l, Right, "%s of %d bits", plural(len(t.fresh), "keyId"), 4*len(t.fresh[0].id))
}
