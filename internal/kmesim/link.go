package kmesim

import (
	"context"
	"errors"
	"fmt"
)

// errCut is what a call over a link comes to that the fault Cut is on.
var errCut = errors.New("the link is cut")

// maxLinkBody bounds a message over the link, in bytes: more than any number of
// keys that one request can bring about.
const maxLinkBody = 2 << 20

// peer is the other KME: in this process, or over a link. call carries a verb
// and a body to it and brings back what its handler of that verb answers. It
// keeps neither slice; both hold keys, and whoever made them wipes them.
type peer interface {
	call(ctx context.Context, verb string, body []byte) ([]byte, error)
}

// local is a peer in the same process.
type local struct{ kme *KME }

func (l local) call(ctx context.Context, verb string, body []byte) ([]byte, error) {
	return l.kme.answerLink(ctx, verb, body)
}

// linkHandler answers calls of one verb that come from the other KME. It must
// not keep body, and the caller wipes what it returns. Where a connection breaks
// in between, a call may come twice.
type linkHandler func(ctx context.Context, body []byte) ([]byte, error)

// handleLink says who answers a verb. It is called while a KME is made, before
// anything can call it.
func (k *KME) handleLink(verb string, f linkHandler) { k.verbs[verb] = f }

// call asks the other KME. An error means that there was no answer, or that its
// handler returned that error.
func (k *KME) call(ctx context.Context, verb string, body []byte) ([]byte, error) {
	if k.isCut(verb) {
		return nil, errCut
	}
	answer, err := k.peer.call(ctx, verb, body)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", k.other, err)
	}
	return answer, nil
}

// isCut reports whether a call does not go through. That the KMEs ask whether the
// other is there does not count as one of the fault's times.
func (k *KME) isCut(verb string) bool {
	if verb == verbHello {
		return k.Fault().Kind == Cut
	}
	f, _ := k.strike(Cut)
	return f.Kind == Cut
}

// answerLink answers the other KME.
func (k *KME) answerLink(ctx context.Context, verb string, body []byte) ([]byte, error) {
	if k.isCut(verb) {
		return nil, errCut
	}
	f := k.verbs[verb]
	if f == nil {
		return nil, fmt.Errorf("no handler of %q", verb)
	}
	return f(ctx, body)
}
