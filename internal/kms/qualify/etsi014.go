package qualify

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"keyturn/internal/kms/kmshttp"
)

// The texts that ETSI GS QKD 014 V1.1.1 gives. They are compared without regard
// to case and final dots.
const (
	textSize      = "size shall be a multiple of 8"
	textExtension = "not all extension_mandatory parameters are supported"
	textNotFound  = "one or more keys specified are not found on KME"
)

// maxAsked bounds what a KMS that ignores its own limit may hand out to the
// request that goes beyond it.
const maxAsked = 1024

// ETSI014 qualifies by ETSI GS QKD 014 V1.1.1.
func ETSI014(ctx context.Context, c Config) (*Report, error) {
	t := &etsi014{tester: tester{report: Report{Specification: "ETSI GS QKD 014 V1.1.1"}}}
	return &t.report, overHTTPS(ctx, c, "/api/v1/keys", tls.VersionTLS12, t.run)
}

type etsi014 struct {
	tester
	// misshapen is the first answer of status 400 or 503 that is not in the
	// error data format, shapely how many are.
	misshapen *Line
	shapely   int
}

func (t *etsi014) run(ctx context.Context, here, there *side) {
	limits, on := t.status(ctx, here)
	thereOn := false
	if there != nil {
		_, thereOn = t.status(ctx, there)
	}
	if !on {
		return
	}
	keys := t.master(ctx, here, limits)
	if !here.dead() {
		t.refusals(ctx, here, limits)
	}
	why := needsOther
	if there != nil && !thereOn {
		why, there = noConnectionThere, nil
	}
	t.slave(ctx, here, there, keys, why)
	t.unknownID(ctx, here, there)
	t.distinct(Line{Clause: "6.3", What: "key IDs and keys all different, none zero", Needed: true})
	t.identifiers()
	t.errorFormat()
}

// pathOf is that of a method on the keys shared with an SAE (clause 5).
func pathOf(sae, verb string) string { return "/" + url.PathEscape(sae) + "/" + verb }

// do sends a call and looks at the form of an error.
func (t *etsi014) do(ctx context.Context, s *side, c call) reply {
	r := s.ask(ctx, c)
	t.look(s, r)
	return r
}

func (t *etsi014) look(s *side, r reply) {
	if r.err != nil || r.status != http.StatusBadRequest && r.status != http.StatusServiceUnavailable {
		return // a 401 has no body (5.2 to 5.4), the others are not of the standard
	}
	var e struct {
		Message *string                       `json:"message"`
		Details *[]map[string]json.RawMessage `json:"details"`
	}
	err := kmshttp.Unmarshal(r.body, &e)
	switch {
	case err == nil && e.Message != nil:
		t.shapely++
	case t.misshapen == nil:
		l := Line{At: s.SAE, Detail: fmt.Sprintf("the body of a %d: no message", r.status)}
		if err != nil {
			l.Detail = fmt.Sprintf("the body of a %d: %v", r.status, err)
		}
		t.misshapen = &l
	}
}

func (t *etsi014) errorFormat() {
	l := Line{Clause: "6.5", What: "errors say why in a message"}
	switch {
	case t.misshapen != nil:
		l.At = t.misshapen.At
		t.line(l, Wrong, "%s", t.misshapen.Detail)
	case t.shapely == 0:
		t.untested("no error was answered", l)
	default:
		t.line(l, Right, "%s", plural(t.shapely, "answer"))
	}
}

// limits are what a KMS says about itself (6.1); zero where it says nothing.
type limits struct {
	keySize, minSize, maxSize, perRequest, maxSAEs *int64
}

// status judges the connection of one end and "Get status".
func (t *etsi014) status(ctx context.Context, s *side) (limits, bool) {
	r, on := t.connection(ctx, s.SAE, "5.1", s.minimum, s.probe(call{path: pathOf(s.peer, "status")}))
	if !on {
		return limits{}, false
	}
	t.look(s, r)
	var b map[string]json.RawMessage
	problem := r.ok(&b)
	t.judge(Line{Clause: "5.2", What: "GET status"}.on(s, r), problem, "")
	fields := Line{Clause: "6.1", What: "status has all its fields", At: s.SAE}
	figures := Line{Clause: "6.1", What: "status can be true", At: s.SAE}
	if problem != "" {
		t.untested("no status", fields, figures)
		return limits{}, true
	}

	var faults []string
	text := func(name string) (v string) {
		if json.Unmarshal(b[name], &v) != nil {
			faults = append(faults, name)
		}
		return v
	}
	number := func(name string) *int64 {
		var v *int64
		if json.Unmarshal(b[name], &v) != nil || v == nil {
			faults = append(faults, name)
			return nil
		}
		return v
	}
	source, target := text("source_KME_ID"), text("target_KME_ID")
	master, slave := text("master_SAE_ID"), text("slave_SAE_ID")
	l := limits{keySize: number("key_size")}
	stored, most := number("stored_key_count"), number("max_key_count")
	l.perRequest = number("max_key_per_request")
	l.maxSize, l.minSize = number("max_key_size"), number("min_key_size")
	l.maxSAEs = number("max_SAE_ID_count")
	if len(faults) > 0 {
		t.line(fields, Wrong, "missing or of another type: %s", strings.Join(faults, ", "))
	} else {
		t.line(fields, Right, "from %q to %q", kmshttp.Shown(source), kmshttp.Shown(target))
	}

	faults = nil
	unless := func(ok bool, fault string) {
		if !ok {
			faults = append(faults, fault)
		}
	}
	unless(master == s.SAE, fmt.Sprintf("master_SAE_ID is %q", kmshttp.Shown(master)))
	unless(slave == s.peer, fmt.Sprintf("slave_SAE_ID is %q", kmshttp.Shown(slave)))
	ordered := func(low, high *int64) bool { return low == nil || high == nil || *low <= *high }
	least := func(n int64, v *int64) bool { return ordered(&n, v) }
	unless(least(1, l.keySize) && ordered(l.minSize, l.keySize) && ordered(l.keySize, l.maxSize), "key_size is not between min_key_size and max_key_size")
	bits := int64(keyBits)
	unless(ordered(l.minSize, &bits) && ordered(&bits, l.maxSize), "256 bits are not between min_key_size and max_key_size")
	unless(least(0, stored) && ordered(stored, most), "stored_key_count is not between 0 and max_key_count")
	unless(least(1, l.perRequest), "max_key_per_request is 0")
	unless(least(0, l.maxSAEs), "max_SAE_ID_count is negative")
	detail := ""
	if stored != nil && most != nil && l.perRequest != nil {
		detail = fmt.Sprintf("%d of %d keys stored, %d in a request", *stored, *most, *l.perRequest)
	}
	t.judge(figures, strings.Join(faults, "; "), detail)
	return l, true
}

// encKeys takes fresh keys out of an answer to "Get key", or says what is wrong
// with it.
func (t *etsi014) encKeys(r reply, want int) ([]key, string) {
	keys, problem := container(r, want)
	t.report.KeysTaken += len(keys)
	t.fresh = append(t.fresh, keys...)
	if problem != "" {
		return nil, problem
	}
	return keys, ""
}

// wasted counts keys of an answer that should have had none.
func (t *etsi014) wasted(r reply) {
	keys, _ := container(r, 0)
	t.report.KeysTaken += len(keys)
}

// container decodes a key container (6.3) and says what is wrong with it for
// one who wants so many keys of 256 bits.
func container(r reply, want int) (keys []key, problem string) {
	var c struct {
		Keys []struct {
			ID  *string `json:"key_ID"`
			Key *string `json:"key"`
		} `json:"keys"`
	}
	if problem := r.ok(&c); problem != "" {
		return nil, problem
	}
	if len(c.Keys) != want {
		problem = fmt.Sprintf("%s, not %d", plural(len(c.Keys), "key"), want)
	}
	for _, k := range c.Keys {
		switch {
		case k.ID == nil || *k.ID == "":
			return keys, "a key without key_ID"
		case k.Key == nil:
			return keys, "a key_ID without key"
		}
		b, err := base64.StdEncoding.DecodeString(strings.TrimSpace(*k.Key))
		if err != nil {
			return keys, "a key that is not padded base64"
		}
		got := key{*k.ID, b}
		keys = append(keys, got)
		if p := got.problem(); problem == "" {
			problem = p
		}
	}
	return keys, problem
}

var (
	lineGet   = Line{Clause: "5.3", What: "GET a key of 256 bits"}
	linePost  = Line{Clause: "5.3", What: "POST for a key of 256 bits"}
	lineMany  = Line{Clause: "5.3", What: "several keys at a time"}
	lineOpt   = Line{Clause: "6.2", What: "an unknown extension_optional does no harm"}
	lineSame  = Line{Clause: "5.4", What: "the same key by GET and its ID"}
	lineSameP = Line{Clause: "5.4", What: "the same key by POST and its ID"}
	lineSameM = Line{Clause: "5.4", What: "several keys by their IDs"}
	lineAlien = Line{Clause: "5.4", What: "no key for an SAE that it is not for", Needed: true}
	lineOnce  = Line{Clause: "5.4", What: "a key is delivered once", Needed: true}

	lineTwoWay = Line{Clause: "5.4", What: "the same key the other way round", Needed: true}
)

// handed are the keys that the other end can get by their IDs.
type handed struct{ get, post, many []key }

// master asks for keys in each way.
func (t *etsi014) master(ctx context.Context, s *side, l limits) (h handed) {
	byGet, byPost := lineGet, linePost
	byGet.Needed, byPost.Needed = s.Method != http.MethodPost, s.Method == http.MethodPost
	enc := pathOf(s.peer, "enc_keys")
	problem := ""

	r := t.do(ctx, s, call{path: enc, query: url.Values{"number": {"1"}, "size": {"256"}}})
	h.get, problem = t.encKeys(r, 1)
	t.judge(byGet.on(s, r), problem, "")
	if t.silent(s, Line{Clause: "5.3", What: "all else about Get key"}) {
		return h
	}

	// One key for two rules: where the extension does no harm, POST works.
	const plain = `{"number":1,"size":256}`
	r = t.do(ctx, s, call{method: http.MethodPost, path: enc,
		body: `{"number":1,"size":256,"extension_optional":[{"keyturn_kms_test":"ignore me"}]}`})
	h.post, problem = t.encKeys(r, 1)
	if problem == "" {
		t.line(byPost.on(s, r), Right, "")
		t.line(lineOpt.on(s, r), Right, "")
	} else {
		optional := r
		r = t.do(ctx, s, call{method: http.MethodPost, path: enc, body: plain})
		h.post, problem = t.encKeys(r, 1)
		t.judge(byPost.on(s, r), problem, "")
		if problem == "" {
			t.line(lineOpt.on(s, optional), Wrong, "%s", optional.brief())
		} else {
			t.untested("POST does not work", lineOpt.at(s.SAE))
		}
	}

	many := lineMany.at(s.SAE)
	if t.silent(s, many) {
		return h
	}
	if l.perRequest != nil && *l.perRequest < 2 {
		t.line(many, NotSupported, "max_key_per_request is %d", *l.perRequest)
		return h
	}
	r = t.do(ctx, s, enough(s, enc, 2, keyBits))
	h.many, problem = t.encKeys(r, 2)
	t.judge(many.on(s, r), problem, "")
	return h
}

// enough asks for so many keys of so many bits as the end's rotator would.
func enough(s *side, enc string, number, size int64) call {
	if s.Method == http.MethodPost {
		return call{method: http.MethodPost, path: enc, body: fmt.Sprintf(`{"number":%d,"size":%d}`, number, size)}
	}
	return call{path: enc, query: url.Values{"number": {strconv.FormatInt(number, 10)}, "size": {strconv.FormatInt(size, 10)}}}
}

// refusals asks for what has to be refused. A KMS that does so hands out no
// key.
func (t *etsi014) refusals(ctx context.Context, s *side, l limits) {
	enc := pathOf(s.peer, "enc_keys")
	post := func(body string) call { return call{method: http.MethodPost, path: enc, body: body} }
	ask := func(line Line, c call, text string) {
		if t.silent(s, line) {
			return
		}
		r := t.do(ctx, s, c)
		t.wasted(r)
		t.refused(line.on(s, r), r, http.StatusBadRequest, text)
	}
	skip := func(line Line, why string) { t.untested(why, line.at(s.SAE)) }

	line := Line{Clause: "6.2", What: "a size that is no multiple of 8 is refused"}
	r := t.do(ctx, s, enough(s, enc, 1, keyBits-1))
	t.wasted(r)
	if r.err == nil && r.status == http.StatusOK {
		t.line(line.on(s, r), NotSupported, "a key all the same, as the standard permits")
	} else {
		t.refused(line.on(s, r), r, http.StatusBadRequest, textSize)
	}
	line = Line{Clause: "6.2", What: "a size over max_key_size is refused"}
	if l.maxSize != nil {
		ask(line, enough(s, enc, 1, *l.maxSize/8*8+8), "")
	} else {
		skip(line, "status has no max_key_size")
	}
	line = Line{Clause: "6.2", What: "a number over max_key_per_request is refused"}
	switch {
	case l.perRequest == nil:
		skip(line, "status has no max_key_per_request")
	case *l.perRequest >= maxAsked:
		skip(line, "might take too many keys")
	default:
		ask(line, enough(s, enc, *l.perRequest+1, keyBits), "")
	}
	ask(Line{Clause: "6.2", What: "an unknown extension_mandatory is refused"},
		post(`{"number":1,"size":256,"extension_mandatory":[{"keyturn_kms_test":"refuse me"}]}`), textExtension)
	t.multicast(ctx, s, l, post)
	ask(Line{Clause: "5.3", What: "a malformed body is refused"}, post(`{"number":1,`), "")

	line = Line{Clause: "5", What: "another method than GET and POST is refused"}
	if t.silent(s, line) {
		return
	}
	r = t.do(ctx, s, call{method: http.MethodDelete, path: enc})
	t.refused(line.on(s, r), r, http.StatusMethodNotAllowed, "")

	// The standard does not say what becomes of a key for nobody, so that both
	// answers are right.
	line = Line{Clause: "5.3", What: "no key for an SAE that nobody knows"}
	r = t.do(ctx, s, enough(s, pathOf("keyturn-kms-test-nobody", "enc_keys"), 1, keyBits))
	t.wasted(r)
	line = line.on(s, r)
	switch {
	case r.err != nil:
		t.line(line, Wrong, "%v", r.err)
	case r.status == http.StatusOK:
		t.line(line, NotSupported, "a key for whatever SAE is named")
	case r.status == http.StatusServiceUnavailable:
		t.line(line, NotTested, "%s", r.brief())
	default:
		t.line(line, Right, "%s", r.brief())
	}
}

// multicast judges additional_slave_SAE_IDs, as far as it can without a third
// SAE: that their number is limited as status says.
func (t *etsi014) multicast(ctx context.Context, s *side, l limits, post func(string) call) {
	line := Line{Clause: "6.2", What: "more additional_slave_SAE_IDs than max_SAE_ID_count are refused"}.at(s.SAE)
	switch {
	case t.silent(s, line):
		return
	case l.maxSAEs == nil:
		t.untested("status has no max_SAE_ID_count", line)
		return
	case *l.maxSAEs < 0 || *l.maxSAEs >= maxAsked:
		t.untested("max_SAE_ID_count is too large to go beyond it", line)
		return
	}
	var ids []string
	for i := range *l.maxSAEs + 1 {
		ids = append(ids, fmt.Sprintf(`"keyturn-kms-test-%d"`, i))
	}
	r := t.do(ctx, s, post(`{"number":1,"size":256,"additional_slave_SAE_IDs":[`+strings.Join(ids, ",")+`]}`))
	t.wasted(r)
	if *l.maxSAEs == 0 && r.err == nil && r.status == http.StatusBadRequest {
		t.line(line.on(s, r), NotSupported, "no multicast; %s", r.brief())
		return
	}
	t.refused(line.on(s, r), r, http.StatusBadRequest, "")
}

// dec asks by key IDs, by POST or, for one, by GET.
func dec(s *side, method string, keys ...key) call {
	p := pathOf(s.peer, "dec_keys")
	if method != http.MethodPost {
		return call{path: p, query: url.Values{"key_ID": {keys[0].id}}}
	}
	var ids []string
	for _, k := range keys {
		id, _ := json.Marshal(k.id) // strings do not fail
		ids = append(ids, `{"key_ID":`+string(id)+`}`)
	}
	return call{method: http.MethodPost, path: p, body: `{"key_IDs":[` + strings.Join(ids, ",") + `]}`}
}

// slave gets the keys of here at the other end, then the other way round, or
// says why it does not.
func (t *etsi014) slave(ctx context.Context, here, there *side, h handed, why string) {
	byGet, byPost := lineSame.at(here.peer), lineSameP.at(here.peer)
	byGet.Needed, byPost.Needed = here.Method != http.MethodPost, here.Method == http.MethodPost
	if there != nil {
		byGet.Needed, byPost.Needed = there.Method != http.MethodPost, there.Method == http.MethodPost
	}
	alien, back := lineAlien.at(here.SAE), lineTwoWay.at(here.SAE)
	many, once := lineSameM.at(here.peer), lineOnce.at(here.peer)
	if there == nil {
		t.untested(why, alien, byGet, byPost, many, once, back)
		return
	}

	// First an SAE that a key is not for: here, who asked for it. It is the
	// last one of them, in case that it is lost by this.
	if last := slices.Concat(h.get, h.post, h.many); len(last) > 0 {
		k := last[len(last)-1]
		r := t.do(ctx, here, dec(here, "", k))
		t.refused(alien.on(here, r), r, http.StatusUnauthorized, "")
	} else {
		t.untested(noKey, alien)
	}

	var delivered key
	t.deliver(ctx, there, byGet, "", h.get, &delivered)
	t.deliver(ctx, there, byPost, http.MethodPost, h.post, &delivered)
	t.deliver(ctx, there, many, http.MethodPost, h.many, &delivered)
	if delivered.id == "" {
		t.untested(noKey, once)
	} else {
		r := t.do(ctx, there, dec(there, there.Method, delivered))
		t.refused(once.on(there, r), r, http.StatusBadRequest, textNotFound)
	}
	t.back(ctx, here, there, back)
}

// deliver judges the delivery of keys by their IDs.
func (t *etsi014) deliver(ctx context.Context, s *side, l Line, method string, want []key, delivered *key) {
	switch {
	case len(want) == 0:
		t.untested(noKey, l)
		return
	case t.silent(s, l):
		return
	}
	r, waited := s.patiently(ctx, dec(s, method, want...))
	t.look(s, r)
	got, problem := container(r, len(want))
	order := ""
	for i, w := range want {
		at := slices.IndexFunc(got, func(k key) bool { return k.id == w.id })
		switch {
		case problem != "":
		case at < 0:
			problem = "a key under another key_ID"
		default:
			problem = got[at].same(w)
			if at != i {
				order = "in another order"
			}
		}
	}
	if problem == "" {
		*delivered = want[0]
	}
	detail := order
	if waited > 0 {
		detail = strings.TrimPrefix(detail+fmt.Sprintf("; known only after %v", waited.Round(time.Millisecond)), "; ")
	}
	t.judge(l.on(s, r), problem, detail)
}

// back lets the other end ask first.
func (t *etsi014) back(ctx context.Context, here, there *side, l Line) {
	if t.silent(here, l) || t.silent(there, l) {
		return
	}
	r := t.do(ctx, there, enough(there, pathOf(there.peer, "enc_keys"), 1, keyBits))
	keys, problem := t.encKeys(r, 1)
	if problem != "" {
		t.line(l.on(there, r), Wrong, "%s", problem)
		return
	}
	t.deliver(ctx, here, l, here.Method, keys, new(key))
}

// unknownID asks for a key that nobody has.
func (t *etsi014) unknownID(ctx context.Context, here, there *side) {
	s := here
	if there != nil {
		s = there
	}
	l := Line{Clause: "5.4", What: "an unknown key ID is refused"}
	if t.silent(s, l) {
		return
	}
	r := t.do(ctx, s, dec(s, s.Method, key{id: randomUUID()}))
	t.refused(l.on(s, r), r, http.StatusBadRequest, textNotFound)
}

var uuid = regexp.MustCompile(`^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$`)

// identifiers judges the form of key IDs.
func (t *etsi014) identifiers() {
	l := Line{Clause: "6.3", What: "key IDs are UUIDs"}
	if len(t.fresh) == 0 {
		t.untested("no key was handed out", l)
		return
	}
	for _, k := range t.fresh {
		if !uuid.MatchString(k.id) {
			t.line(l, Wrong, "%q is none", kmshttp.Shown(k.id))
			return
		}
	}
	t.line(l, Right, "%s", plural(len(t.fresh), "key"))
}

func randomUUID() string {
	var u [16]byte
	_, _ = rand.Read(u[:]) // never fails
	u[6] = u[6]&0x0f | 0x40
	u[8] = u[8]&0x3f | 0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", u[:4], u[4:6], u[6:8], u[8:10], u[10:])
}
