package kms_test

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"keyturn/internal/kms"
)

func TestCheckKeyID(t *testing.T) {
	for _, tt := range []struct{ id, want string }{
		{"0", ""},
		{"bc490419-7d60-487f-adc1-4ddcc177c139", ""},
		{"with a space & more/?#", ""},
		{strings.Repeat("k", kms.MaxKeyID), ""},
		{"", "key ID is empty"},
		{strings.Repeat("k", kms.MaxKeyID+1), "key ID is 1025 bytes long, over 1024"},
		{"a\nb", "key ID has the unprintable byte 0x0a at offset 1"},
		{"k\xff", "key ID has the unprintable byte 0xff at offset 1"},
		{"k\x7f", "key ID has the unprintable byte 0x7f at offset 1"},
	} {
		got := ""
		if err := kms.CheckKeyID(tt.id); err != nil {
			got = err.Error()
		}
		if got != tt.want {
			t.Errorf("CheckKeyID(%.20q) = %q, want %q", tt.id, got, tt.want)
		}
	}
}

func TestFakeDeliversOnceAtTheOtherEnd(t *testing.T) {
	a, b := kms.NewFakePair(rand.Reader)
	ctx := t.Context()
	id, key, err := a.Key(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := a.KeyByID(ctx, id); !errors.Is(err, kms.ErrUnknownKey) {
		t.Errorf("own end: %v, want ErrUnknownKey", err)
	}
	if s, err := b.Status(ctx); err != nil || s.StoredKeys != 1 {
		t.Errorf("status = %+v, %v; want one key stored", s, err)
	}
	got, err := b.KeyByID(ctx, id)
	if err != nil {
		t.Fatal(err)
	}
	if !got.Equal(key) {
		t.Error("the two ends got different keys")
	}
	got.Wipe()
	if key.IsZero() {
		t.Error("the two ends share memory")
	}
	if _, err := b.KeyByID(ctx, id); !errors.Is(err, kms.ErrUnknownKey) {
		t.Errorf("second delivery: %v, want ErrUnknownKey", err)
	}
}

func TestFakeFaults(t *testing.T) {
	a, b := kms.NewFakePair(rand.Reader)
	ctx := t.Context()

	a.Fail(kms.ErrNoKeys)
	if _, _, err := a.Key(ctx); !errors.Is(err, kms.ErrNoKeys) {
		t.Errorf("Key = %v, want ErrNoKeys", err)
	}
	if _, err := a.Status(ctx); !errors.Is(err, kms.ErrNoKeys) {
		t.Errorf("Status = %v, want ErrNoKeys", err)
	}
	a.Fail(nil)

	b.Wrong(true)
	id, key, err := a.Key(ctx)
	if err != nil {
		t.Fatal(err)
	}
	got, err := b.KeyByID(ctx, id)
	if err != nil {
		t.Fatal(err)
	}
	if got.Equal(key) {
		t.Error("Wrong gave the right bytes")
	}
}

func TestFakeHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, _ := kms.NewFakePair(rand.Reader)
		a.Hang(true)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, _, err := a.Key(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Key = %v, want the context's end", err)
		}
		done := make(chan error)
		go func() {
			_, _, err := a.Key(t.Context())
			done <- err
		}()
		synctest.Wait()
		a.Hang(false)
		if err := <-done; err != nil {
			t.Errorf("after the hang: %v", err)
		}
	})
}

func TestFakeIsBounded(t *testing.T) {
	a, b := kms.NewFakePair(rand.Reader)
	ctx := t.Context()
	const n = 1500
	for range n {
		if _, _, err := a.Key(ctx); err != nil {
			t.Fatal(err)
		}
	}
	if s, _ := b.Status(ctx); s.StoredKeys != s.MaxKeys {
		t.Errorf("%d keys stored, want %d", s.StoredKeys, s.MaxKeys)
	}
	if _, err := b.KeyByID(ctx, "key-1"); !errors.Is(err, kms.ErrUnknownKey) {
		t.Errorf("oldest key: %v, want ErrUnknownKey", err)
	}
	if _, err := b.KeyByID(ctx, fmt.Sprintf("key-%d", n)); err != nil {
		t.Errorf("newest key: %v", err)
	}
}
