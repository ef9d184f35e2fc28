package psk

import "testing"

func testContext() DigestContext {
	return DigestContext{
		ClientSAE: "sae_001", ServerSAE: "sae_002",
		ClientIdentity: [32]byte(testKey(0x10).Bytes()), ServerIdentity: [32]byte(testKey(0x30).Bytes()),
		Session: [16]byte(testKey(0x50).Bytes()[:16]),
		Serial:  7, Sources: 3, Transcript: [32]byte(testKey(0x70).Bytes()),
	}
}

// Whatever the two ends could see differently changes the digest.
func TestDigestCoversAll(t *testing.T) {
	k, base := testKey(1), testContext()
	want := k.Digest(RoleClient, base)
	if !EqualDigests(want, k.Clone().Digest(RoleClient, base)) {
		t.Fatal("the same key and context give another digest")
	}
	if EqualDigests(want, k.Digest(RoleServer, base)) {
		t.Error("client and server have the same digest")
	}
	if EqualDigests(want, testKey(2).Digest(RoleClient, base)) {
		t.Error("another key has the same digest")
	}
	for name, change := range map[string]func(*DigestContext){
		"client sae":      func(c *DigestContext) { c.ClientSAE = "sae_003" },
		"server sae":      func(c *DigestContext) { c.ServerSAE = "sae_003" },
		"sae border":      func(c *DigestContext) { c.ClientSAE, c.ServerSAE = "sae_001s", "ae_002" },
		"swapped saes":    func(c *DigestContext) { c.ClientSAE, c.ServerSAE = c.ServerSAE, c.ClientSAE },
		"client identity": func(c *DigestContext) { c.ClientIdentity[31]++ },
		"server identity": func(c *DigestContext) { c.ServerIdentity[0]++ },
		"session":         func(c *DigestContext) { c.Session[15]++ },
		"serial":          func(c *DigestContext) { c.Serial += 1 << 40 },
		"sources":         func(c *DigestContext) { c.Sources |= 0x100 },
		"transcript":      func(c *DigestContext) { c.Transcript[31]++ },
	} {
		ctx := base
		change(&ctx)
		if EqualDigests(want, k.Digest(RoleClient, ctx)) {
			t.Errorf("the digest does not cover: %s", name)
		}
	}
}
