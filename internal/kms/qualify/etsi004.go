package qualify

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"encoding/hex"
	"fmt"
	"strconv"
	"time"
)

// The functions of ETSI GS QKD 004 stand for its clauses: rules there have no
// numbers, and the bytes are those of a dialect.
const (
	onTLS   = "TLS"
	onOpen  = "OPEN_CONNECT"
	onGet   = "GET_KEY"
	onClose = "CLOSE"
)

// ETSI004 qualifies by ETSI GS QKD 004 V2.1.1, in the dialect of the ends.
func ETSI004(ctx context.Context, c Config) (*Report, error) {
	if err := c.check(); err != nil {
		return nil, err
	}
	t := &etsi004{tester: tester{report: Report{Specification: "ETSI GS QKD 004 V2.1.1, dialect " + c.Here.Dialect}}}
	here, err := openApplication(c.Here, c.Peer)
	if err != nil {
		return nil, err
	}
	defer here.close()
	var there *application
	if c.There != nil {
		if there, err = openApplication(*c.There, c.Here.SAE); err != nil {
			return nil, fmt.Errorf("the other end: %w", err)
		}
		defer there.close()
	}
	t.run(ctx, here, there)
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	return &t.report, nil
}

type etsi004 struct{ tester }

// after returns the line for a request that was sent for it.
func (l Line) after(s *application, a said) Line {
	l.Seconds = a.took.Seconds()
	return l.at(s.SAE)
}

// mute adds a line as not tested where asking on would only take time.
func (t *etsi004) mute(s *application, l Line) bool {
	if s.unheard < 2 {
		return false
	}
	t.untested(noAnswer, l.at(s.SAE))
	return true
}

func (t *etsi004) run(ctx context.Context, here, there *application) {
	_, on := t.connection(ctx, here.SAE, onTLS, tls.VersionTLS12, here.probe)
	thereOn := false
	if there != nil {
		_, thereOn = t.connection(ctx, there.SAE, onTLS, tls.VersionTLS12, there.probe)
	}
	if !on {
		return
	}
	why := needsOther
	if there != nil && !thereOn {
		why, there = noConnectionThere, nil
	}
	t.agreed(ctx, here, there, why)
	t.allocated(ctx, here, there, why)
	t.refusals(ctx, here)
	t.distinct(Line{Clause: onGet, What: "keys all different, none zero", Needed: true})
}

// opened judges an OPEN_CONNECT. A counter-offer of keys of the right size is
// taken, now and from then on.
func (t *etsi004) opened(ctx context.Context, s *application, l Line, id ksid) (ksid, bool) {
	if t.mute(s, l) {
		return id, false
	}
	a := s.open(ctx, id, s.qos)
	offer := ""
	if a.err == nil && a.status == statusQoS && a.qos[0] == s.qos[0] && a.qos != s.qos {
		s.qos, offer = a.qos, "after a counter-offer; "
		a = s.open(ctx, id, s.qos)
	}
	problem := ""
	switch {
	case !a.well():
		problem = a.brief()
	case a.id == ksid{}:
		problem = "the answer names no key stream"
	case id != ksid{} && a.id != id:
		problem = "the answer is about another key stream"
	case a.qos[0] != s.qos[0]:
		problem = fmt.Sprintf("keys of %d bytes, not %d", a.qos[0], s.qos[0])
	}
	t.judge(l.after(s, a), problem, offer+a.brief())
	return a.id, problem == ""
}

// agreed judges a key stream whose ID both ends know beforehand: what a rotator
// has.
func (t *etsi004) agreed(ctx context.Context, here, there *application, why string) {
	id := randomKSID()
	open := Line{Clause: onOpen, What: "a key stream of an agreed ID is opened", Needed: true}
	if _, ok := t.opened(ctx, here, open, id); !ok {
		t.untested("no key stream", Line{Clause: onGet, What: "all about a key stream of an agreed ID", Needed: true}.at(here.SAE))
		return
	}
	join := Line{Clause: onOpen, What: "the other end opens the same key stream", Needed: true}
	joined := false
	if there == nil {
		t.untested(why, join.at(here.peer))
	} else {
		_, joined = t.opened(ctx, there, join, id)
	}

	again := Line{Clause: onOpen, What: "an open key stream is in use"}
	if !t.mute(here, again) {
		switch a := here.open(ctx, id, here.qos); {
		case a.err == nil && a.status == statusInUse:
			t.line(again.after(here, a), Right, "%s", a.brief())
		case a.well():
			t.line(again.after(here, a), NotSupported, "it is opened again: %s", a.brief())
		default:
			t.line(again.after(here, a), Wrong, "%s", a.brief())
		}
	}

	var (
		same  = Line{Clause: onGet, What: "the same key at the same index", Needed: true}
		back  = Line{Clause: onGet, What: "the same key the other way round", Needed: true}
		ahead = Line{Clause: onGet, What: "an index ahead of the next"}
		once  = Line{Clause: onGet, What: "a key is delivered once", Needed: true}
	)
	got := false
	if joined {
		got = t.pair(ctx, here, there, same, id, 0)
		t.pair(ctx, there, here, back, id, 1)
		t.pair(ctx, here, there, ahead, id, 3)
	} else {
		got = t.alone(ctx, here, id)
		t.untested(why, same.at(here.peer), back.at(here.SAE), ahead.at(here.SAE))
	}
	if !got {
		t.untested(noKey, once.at(here.SAE))
	} else if !t.mute(here, once) {
		a := here.get(ctx, id, 0)
		t.no(once.after(here, a), a)
	}
	t.shut(ctx, here, there, joined, id)
}

// alone asks for the first key of a stream that the other end has not opened.
// The KMS may refuse it.
func (t *etsi004) alone(ctx context.Context, s *application, id ksid) bool {
	l := Line{Clause: onGet, What: "a key of 256 bits", Needed: true}
	if t.mute(s, l) {
		return false
	}
	a := s.get(ctx, id, 0)
	k, problem := t.key(a, id, 0)
	switch {
	case problem == "":
		t.report.KeysTaken++
		t.fresh = append(t.fresh, k)
		t.line(l.after(s, a), Right, "")
	case a.err == nil && !a.well():
		t.line(l.after(s, a), NotTested, "the other end may have to open it first: %s", a.brief())
	default:
		t.line(l.after(s, a), Wrong, "%s", problem)
	}
	return problem == ""
}

// pair judges one index, asked for at one end, then at the other.
func (t *etsi004) pair(ctx context.Context, first, second *application, l Line, id ksid, index uint32) bool {
	if t.mute(first, l) || t.mute(second, l) {
		return false
	}
	a, _ := t.patiently(ctx, first, id, index)
	k, problem := t.key(a, id, index)
	if problem != "" {
		t.line(l.after(first, a), Wrong, "%s", problem)
		return false
	}
	t.report.KeysTaken++
	t.fresh = append(t.fresh, k)
	a, waited := t.patiently(ctx, second, id, index)
	other, problem := t.key(a, id, index)
	if problem == "" {
		problem = other.same(k)
	}
	detail := ""
	if waited > 0 {
		detail = fmt.Sprintf("known only after %v", waited.Round(time.Millisecond))
	}
	t.judge(l.after(second, a), problem, detail)
	return problem == ""
}

// key says what is wrong with an answer to GET_KEY.
func (t *etsi004) key(a said, id ksid, index uint32) (key, string) {
	k := key{hex.EncodeToString(id[:]) + ":" + strconv.Itoa(int(index)), a.key}
	switch {
	case !a.well():
		return k, a.brief()
	case a.index != index:
		return k, fmt.Sprintf("the key of index %d, not %d", a.index, index)
	}
	return k, k.problem()
}

// patiently asks for a key as a rotator does: again for half of the timeout,
// while there is none yet.
func (t *etsi004) patiently(ctx context.Context, s *application, id ksid, index uint32) (a said, waited time.Duration) {
	for wait := 50 * time.Millisecond; ; wait *= 2 {
		a = s.get(ctx, id, index)
		if a.err != nil || a.status != 2 && a.status != 3 || waited+wait > s.Timeout/2 {
			return a, waited
		}
		select {
		case <-time.After(wait):
			waited += wait
		case <-ctx.Done():
			return a, waited
		}
	}
}

// no judges a request that has to be refused, by whatever status.
func (t *etsi004) no(l Line, a said) {
	if a.err == nil && !a.well() {
		t.line(l, Right, "%s", a.brief())
		return
	}
	t.line(l, Wrong, "%s", a.brief())
}

// shut judges CLOSE.
func (t *etsi004) shut(ctx context.Context, here, there *application, joined bool, id ksid) {
	closes := Line{Clause: onClose, What: "a key stream is closed", Needed: true}
	after := Line{Clause: onClose, What: "no key after it"}
	if !t.mute(here, closes) {
		a := here.shut(ctx, id)
		if a.err == nil && a.status == statusOK {
			t.line(closes.after(here, a), Right, "")
		} else {
			t.line(closes.after(here, a), Wrong, "%s", a.brief())
		}
	}
	if !t.mute(here, after) {
		a := here.get(ctx, id, 5)
		if a.well() {
			t.report.KeysTaken++
		}
		t.no(after.after(here, a), a)
	}
	if joined {
		a := there.shut(ctx, id)
		if a.err == nil && a.status == statusOK {
			t.line(closes.after(there, a), Right, "")
		} else {
			t.line(closes.after(there, a), Wrong, "%s", a.brief())
		}
	}
}

// allocated judges a key stream whose ID the KMS makes up.
func (t *etsi004) allocated(ctx context.Context, here, there *application, why string) {
	var (
		open = Line{Clause: onOpen, What: "a key stream is allocated"}
		join = Line{Clause: onOpen, What: "the other end opens it by its ID"}
		same = Line{Clause: onGet, What: "the same key in it at both ends"}
	)
	id, ok := t.opened(ctx, here, open, ksid{})
	if !ok {
		t.untested("no key stream", join.at(here.peer), same.at(here.peer))
		return
	}
	defer here.shut(ctx, id)
	if there == nil {
		t.untested(why, join.at(here.peer), same.at(here.peer))
		return
	}
	if _, ok := t.opened(ctx, there, join, id); !ok {
		t.untested("no key stream", same.at(there.SAE))
		return
	}
	defer there.shut(ctx, id)
	t.pair(ctx, here, there, same, id, 0)
}

// refusals asks for what cannot be had.
func (t *etsi004) refusals(ctx context.Context, s *application) {
	unknown := Line{Clause: onGet, What: "no key of a stream that nobody opened", Needed: true}
	if !t.mute(s, unknown) {
		a := s.get(ctx, randomKSID(), 0)
		t.no(unknown.after(s, a), a)
	}
	offer := Line{Clause: onOpen, What: "what cannot be had is met by a counter-offer"}
	if t.mute(s, offer) {
		return
	}
	q := s.qos
	q[0] = 1 << 24
	a := s.open(ctx, ksid{}, q)
	switch l := offer.after(s, a); {
	case a.well():
		s.shut(ctx, a.id)
		t.line(l, NotSupported, "keys of %d bytes are opened", a.qos[0])
	case a.err == nil && a.status == statusQoS && a.qos != (quality{}) && a.qos != q:
		t.line(l, Right, "%s; it offers keys of %d bytes", a.brief(), a.qos[0])
	case a.err == nil && a.status == statusQoS:
		t.line(l, Wrong, "%s, without an offer", a.brief())
	default:
		t.line(l, Wrong, "%s", a.brief())
	}
}

func randomKSID() (id ksid) {
	_, _ = rand.Read(id[:]) // never fails
	return id
}
