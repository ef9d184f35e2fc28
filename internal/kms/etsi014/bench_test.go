package etsi014

import (
	"context"
	"crypto/tls"
	"encoding/base64"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"

	"keyturn/internal/kms/kmstls"
	"keyturn/internal/psk"
	"keyturn/internal/testca"
)

// BenchmarkKey measures keys fetched over kept connections with mutual TLS, by
// so many callers for each processor, one a request and together. The KME is on
// the same machine and has its keys ready.
func BenchmarkKey(b *testing.B) {
	log.SetOutput(io.Discard)
	key := base64.StdEncoding.EncodeToString([]byte(strings.Repeat("k", psk.Size)))
	for _, bb := range []struct{ callers, most int }{{2, 1}, {2, maxShared}, {8, 1}, {8, maxShared}} {
		b.Run(fmt.Sprintf("callers=%d/together=%d", bb.callers, bb.most), func(b *testing.B) {
			var requests atomic.Int64
			ca := testca.New(b, "root")
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				b.Fatal(err)
			}
			kme := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				requests.Add(1)
				number, _ := strconv.Atoi(r.URL.Query().Get("number"))
				var keys []string
				for i := range number {
					keys = append(keys, fmt.Sprintf(`{"key_ID":"%d","key":"%s"}`, i, key))
				}
				fmt.Fprintf(w, `{"keys":[%s]}`, strings.Join(keys, ","))
			})}
			go func() {
				_ = kme.Serve(tls.NewListener(l, &tls.Config{
					Certificates: []tls.Certificate{ca.Server("kme-a")},
					ClientAuth:   tls.RequireAndVerifyClientCert, ClientCAs: ca.Pool(),
				}))
			}()
			defer kme.Close()
			k, err := New(Config{
				URIs: []string{"https://" + l.Addr().String()}, SAE: "sae_001",
				TLS: kmstls.Config{ServerName: "kme-a", Memory: &tls.Config{
					RootCAs: ca.Pool(), Certificates: []tls.Certificate{ca.Client("sae_001")},
				}},
			})
			if err != nil {
				b.Fatal(err)
			}
			defer k.Close()
			c := newClient(k, "sae_002")
			defer c.Close()
			c.most = bb.most
			b.ReportAllocs()
			b.SetParallelism(bb.callers)
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					_, key, err := c.Key(context.Background())
					if err != nil {
						b.Error(err)
						return
					}
					key.Wipe()
				}
			})
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "keys/s")
			b.ReportMetric(float64(b.N)/float64(requests.Load()), "keys/request")
		})
	}
}
