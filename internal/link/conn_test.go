package link

import (
	"bytes"
	"errors"
	"io"
	"net"
	"testing"
	"testing/synctest"
	"time"
)

func TestSendSize(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client, srv := pipe(t)
		go echo(srv)
		wantIs(t, client.Send(nil), ErrFrame)
		wantIs(t, client.Send(make([]byte, MaxFrame+1)), ErrFrame)
		exchange(t, client) // the link is none the worse
	})
}

func TestSendCopies(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client, srv := pipe(t)
		b := []byte("first")
		if err := client.Send(b); err != nil {
			t.Fatal(err)
		}
		copy(b, "other")
		if got, err := srv.Receive(); err != nil || string(got) != "first" {
			t.Errorf("received %q, %v", got, err)
		}
	})
}

// Bad frames from a peer that has proved itself.
func TestReceiveBadFrame(t *testing.T) {
	for name, sent := range map[string][]byte{
		"empty":     {0, 0},
		"oversized": {0x40, 0x01},
		"largest":   {0xff, 0xff},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				client, srv := pipe(t)
				go func() { _, _ = client.tls.Write(sent) }()
				_, err := srv.Receive()
				wantIs(t, err, ErrFrame)
				_, err = srv.Receive()
				wantIs(t, err, ErrFrame)
				wantIs(t, srv.Send([]byte("x")), ErrFrame)
				_, err = client.Receive()
				wantIs(t, err, io.EOF) // it was closed
			})
		})
	}
}

func TestReceiveHalfFrame(t *testing.T) {
	for name, sent := range map[string][]byte{
		"half a header": {0},
		"half a frame":  {0, 4, 'p', 'i'},
	} {
		t.Run(name+", then silence", func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				client, srv := pipe(t)
				srv.SetSilence(0) // the limit on a frame holds without it
				go func() { _, _ = client.tls.Write(sent) }()
				began := time.Now()
				_, err := srv.Receive()
				wantIs(t, err, ErrSilent)
				if took := time.Since(began); took != frameTimeout {
					t.Errorf("took %v", took)
				}
			})
		})
		t.Run(name+", then closed", func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				client, srv := pipe(t)
				go func() {
					_, _ = client.tls.Write(sent)
					_ = client.Close()
				}()
				_, err := srv.Receive()
				wantIs(t, err, io.ErrUnexpectedEOF)
				wantSaid(t, err, "other end closed the connection in the middle of a message")
			})
		})
	}
}

// A byte each second is no silence, and yet no way to hold a reader.
func TestReceiveDrip(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client, srv := pipe(t)
		ended := make(chan struct{})
		defer func() { <-ended }()
		go func() {
			defer close(ended)
			for _, b := range []byte{0, 100, 1, 2, 3, 4, 5, 6, 7} {
				if _, err := client.tls.Write([]byte{b}); err != nil {
					return
				}
				time.Sleep(time.Second)
			}
		}()
		began := time.Now()
		_, err := srv.Receive()
		wantIs(t, err, ErrSilent)
		if took := time.Since(began); took != frameTimeout {
			t.Errorf("took %v", took)
		}
	})
}

func TestSilence(t *testing.T) {
	for _, tt := range []struct {
		name string
		set  func(*Conn)
		want time.Duration
	}{
		{"default", func(*Conn) {}, DefaultSilence},
		{"before Receive", func(c *Conn) { c.SetSilence(8 * time.Second) }, 8 * time.Second},
		{"while it waits", func(c *Conn) {
			time.AfterFunc(2*time.Second, func() { c.SetSilence(8 * time.Second) })
		}, 10 * time.Second},
		{"longer while it waits", func(c *Conn) {
			c.SetSilence(8 * time.Second)
			time.AfterFunc(2*time.Second, func() { c.SetSilence(time.Minute) })
		}, 62 * time.Second},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				_, srv := pipe(t)
				tt.set(srv)
				began := time.Now()
				_, err := srv.Receive()
				wantIs(t, err, ErrSilent)
				if took := time.Since(began); took != tt.want {
					t.Errorf("took %v, want %v", took, tt.want)
				}
			})
		})
	}
}

func TestSilenceStartsAnewWithEachFrame(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client, srv := pipe(t)
		srv.SetSilence(8 * time.Second)
		go func() {
			for range 3 {
				time.Sleep(7 * time.Second)
				_ = client.Send([]byte("here"))
			}
		}()
		began := time.Now()
		for {
			if _, err := srv.Receive(); err != nil {
				wantIs(t, err, ErrSilent)
				break
			}
		}
		if took := time.Since(began); took != 29*time.Second {
			t.Errorf("took %v", took)
		}
	})
}

// With nobody reading, the queue fills up: Send never blocks, and the link ends.
func TestSlowReaderFillsQueue(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client, _ := pipe(t)
		began := time.Now()
		var err error
		queued := 0
		for ; err == nil; queued += frameHeader + 1000 {
			err = client.Send(make([]byte, 1000))
		}
		wantIs(t, err, ErrSlow)
		if queued <= maxQueued || queued > maxQueued+2*(frameHeader+1000) {
			t.Errorf("%d bytes were queued", queued)
		}
		if time.Since(began) != 0 {
			t.Error("Send blocked")
		}
		wantIs(t, client.Send([]byte("x")), ErrSlow)
		_, err = client.Receive()
		wantIs(t, err, ErrSlow)
	})
}

func TestSlowReaderBlocksWrite(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client, _ := pipe(t)
		if err := client.Send([]byte("x")); err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		_, err := client.Receive()
		wantIs(t, err, ErrSlow)
		if took := time.Since(began); took != writeTimeout {
			t.Errorf("took %v", took)
		}
	})
}

// A pause longer than a write may take does no harm afterwards.
func TestWriteAfterPause(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client, srv := pipe(t)
		go echo(srv)
		exchange(t, client)
		time.Sleep(3 * writeTimeout)
		// As TLS does on its own when the other end asks for a new key.
		if _, err := client.tls.Write(appendFrame(nil, []byte("x"))); err != nil {
			t.Errorf("write past Send: %v", err)
		}
		if _, err := client.Receive(); err != nil {
			t.Error(err)
		}
		exchange(t, client)
	})
}

func TestCloseSendsWhatIsQueued(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client, srv := pipe(t)
		for _, s := range []string{"one", "two", "bye"} {
			if err := client.Send([]byte(s)); err != nil {
				t.Fatal(err)
			}
		}
		go func() { _ = client.Close() }()
		for _, want := range []string{"one", "two", "bye"} {
			if got, err := srv.Receive(); err != nil || string(got) != want {
				t.Fatalf("received %q, %v, want %q", got, err, want)
			}
		}
		_, err := srv.Receive()
		wantIs(t, err, io.EOF)
		wantSaid(t, err, "other end closed the connection")
		synctest.Wait()
		wantIs(t, client.Send([]byte("x")), net.ErrClosed)
		_, err = client.Receive()
		wantIs(t, err, net.ErrClosed)
	})
}

func TestCloseDoesNotWaitForSlowReader(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client, _ := pipe(t)
		received := make(chan error)
		go func() {
			_, err := client.Receive()
			received <- err
		}()
		if err := client.Send([]byte("x")); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		began := time.Now()
		go func() {
			if err := client.Close(); err != nil {
				t.Error(err)
			}
			if took := time.Since(began); took != closeGrace {
				t.Errorf("Close took %v", took)
			}
		}()
		wantIs(t, <-received, net.ErrClosed)
		if time.Since(began) != 0 {
			t.Error("Receive did not return at once")
		}
		wantIs(t, client.Send([]byte("x")), net.ErrClosed)
		if err := client.Close(); err != nil { // again, and at the same time
			t.Error(err)
		}
		time.Sleep(closeGrace)
		synctest.Wait()
		_, err := client.Receive()
		wantIs(t, err, net.ErrClosed)
	})
}

// An idle link holds no goroutine: the bubble would not end with one left.
func TestNoGoroutineOutlivesItsUse(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client, srv := pipe(t)
		if err := client.Send([]byte("x")); err != nil {
			t.Fatal(err)
		}
		if _, err := srv.Receive(); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		client.mu.Lock()
		defer client.mu.Unlock()
		if client.writer != nil || client.pending != nil || client.inFlight != 0 {
			t.Error("the writer is still there")
		}
	})
}

func FuzzReadFrame(f *testing.F) {
	f.Add([]byte{0, 1, 'a'})
	f.Add([]byte{0, 0})
	f.Add([]byte{0x40, 0x01})
	f.Add(appendFrame(nil, make([]byte, MaxFrame)))
	f.Fuzz(func(t *testing.T, in []byte) {
		begun := 0
		frame, err := readFrame(bytes.NewReader(in), func() { begun++ })
		if (begun == 1) != (len(in) > 0) {
			t.Errorf("begun %d times", begun)
		}
		switch {
		case err == nil:
			if again := appendFrame(nil, frame); !bytes.HasPrefix(in, again) {
				t.Error("the frame encodes to other bytes")
			}
			if len(frame) == 0 || len(frame) > MaxFrame {
				t.Errorf("frame of %d bytes", len(frame))
			}
		case err == io.EOF:
			if len(in) > 0 {
				t.Error("EOF within a frame")
			}
		case !errors.Is(err, ErrFrame) && err != io.ErrUnexpectedEOF:
			t.Errorf("unexpected error %v", err)
		}
	})
}
