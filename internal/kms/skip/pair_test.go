package skip

import (
	"context"
	"errors"
	"sync"
	"testing"
	"testing/synctest"

	"keyturn/internal/kmesim"
	"keyturn/internal/kms"
	"keyturn/internal/kms/kmstls"
	"keyturn/internal/memnet"
)

// TestAgainstTheSimulator: two rotators' sources at a pair of simulated KMEs.
func TestAgainstTheSimulator(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		lab, err := kmesim.NewLab(kmesim.LabOptions{})
		if err != nil {
			t.Fatal(err)
		}
		var n memnet.Network
		pair := kmesim.New(kmesim.Options{})
		ctx, cancel := context.WithCancel(t.Context())
		var serving sync.WaitGroup
		var ends [2]kms.Source
		for i, k := range []*kmesim.KME{pair.A, pair.B} {
			host := []string{kmesim.NameA, kmesim.NameB}[i]
			ln, err := n.Listen(host + ":443")
			if err != nil {
				t.Fatal(err)
			}
			serving.Go(func() {
				if err := k.Serve(ctx, ln, lab.ServerTLS(i)); err != nil {
					t.Error(err)
				}
			})
			system, err := New(Config{
				URIs: []string{"https://" + host}, SAE: kmesim.SAEName(i + 1),
				TLS: kmstls.Config{Memory: lab.ClientTLS(i + 1)}, Dial: n.Dial,
			})
			if err != nil {
				t.Fatal(err)
			}
			defer system.Close()
			if ends[i], err = system.For(kmesim.SAEName(2 - i)); err != nil {
				t.Fatal(err)
			}
		}
		defer serving.Wait()
		defer cancel()

		for i, from := range ends {
			to := ends[1-i]
			id, key, err := from.Key(ctx)
			if err != nil {
				t.Fatal(err)
			}
			got, err := to.KeyByID(ctx, id)
			if err != nil || !got.Equal(key) {
				t.Fatalf("the ends got different keys, or none: %v", err)
			}
			if _, err := to.KeyByID(ctx, id); !errors.Is(err, kms.ErrUnknownKey) {
				t.Errorf("second delivery: %v, want ErrUnknownKey", err)
			}
			if s, err := from.Status(ctx); err != nil || s.TargetKME != kmesim.SAEName(2-i) {
				t.Errorf("status %+v, %v", s, err)
			}
		}
		pair.A.SetFault(kmesim.Fault{Kind: kmesim.OutOfKeys})
		if _, _, err := ends[0].Key(ctx); !errors.Is(err, kms.ErrNoKeys) {
			t.Errorf("out of keys: %v, want ErrNoKeys", err)
		}
	})
}
