package daemon

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/crypto/chacha20poly1305"

	"keyturn/internal/config"
	"keyturn/internal/psk"
	"keyturn/internal/rotation"
	"keyturn/internal/wg"
)

// Store keeps the journals of a rotator's peers.
type Store interface {
	// Load returns a peer's journal, empty if there is none. ErrSetAside means
	// that the one on disk cannot be trusted; after any other error the
	// rotator must not start.
	Load(wg.PublicKey) (rotation.Journal, error)
	// Save replaces a peer's journal. The caller wipes j.
	Save(wg.PublicKey, *rotation.Journal) error
}

// files is a Store with one file for each peer: plain in the run directory,
// which lies in memory, or encrypted at the configured path.
//
// The PSK found at the first start is recorded once in the state directory
// where a peer may fall back to it: it must survive a reboot.
type files struct {
	dir     string
	initial string                // directory of the recorded initial PSKs
	records map[wg.PublicKey]bool // peers with fallback: initial
	key     *psk.Key              // nil: plain
}

// The journal of a peer, before encryption: magic, high (u64), number of
// entries (u8), and for each serial (u64), flags (u8), first
// installation (i64, nanoseconds of Unix time, 0 for none) and key (32).
// Behind it stands the SHA-256 of all, or, encrypted, a nonce stands before
// and the tag of XChaCha20-Poly1305 behind; the peer's public key is bound in.
const (
	magic       = "keyturn journal 1\n"
	entrySize   = 8 + 1 + 8 + psk.Size
	maxEntries  = 255
	flagAgreed  = 1
	flagSeen    = 2
	flagConfirm = 4
	flagRecover = 8
	allFlags    = 15
)

// JournalDir is where the journals of an interface lie without a configured path.
func JournalDir(runDir, iface string) string { return filepath.Join(runDir, iface+".journal") }

// InitialDir is where the recorded initial PSKs of an interface lie.
func InitialDir(stateDir, iface string) string { return filepath.Join(stateDir, iface+".initial") }

// Forget removes the journals and recorded PSKs of an interface.
func Forget(runDir, stateDir, iface string, persistent *config.Journal) error {
	dirs := []string{JournalDir(runDir, iface), InitialDir(stateDir, iface)}
	if persistent != nil {
		dirs = append(dirs, persistent.Path)
	}
	var errs []error
	for _, d := range dirs {
		errs = append(errs, empty(d))
	}
	return errors.Join(errs...)
}

// empty removes what a rotator wrote into a directory, and then the directory
// if nothing else is in it.
func empty(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	left := 0
	for _, e := range entries {
		peer, _, _ := strings.Cut(e.Name(), ".")
		if b, err := hex.DecodeString(peer); err != nil || len(b) != len(wg.PublicKey{}) {
			left++
			continue
		}
		if err := os.Remove(filepath.Join(dir, e.Name())); err != nil {
			return err
		}
	}
	if left > 0 {
		return nil
	}
	return os.Remove(dir)
}

func openStore(c *config.Config, runDir, stateDir string) (*files, error) {
	f := &files{dir: JournalDir(runDir, c.Interface), initial: InitialDir(stateDir, c.Interface), records: map[wg.PublicKey]bool{}}
	if c.Journal != nil {
		f.dir = c.Journal.Path
		key, err := readKey(c.Journal.KeyFile)
		if err != nil {
			return nil, fmt.Errorf("journal key: %w", err)
		}
		f.key = key
	}
	for _, p := range c.Peers {
		if p.Fallback == config.FallbackInitial {
			f.records[p.PublicKey] = true
		}
	}
	if err := os.Mkdir(f.dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, fmt.Errorf("journal: %w", err)
	}
	dirs := []string{f.dir}
	if len(f.records) > 0 {
		if err := os.MkdirAll(f.initial, 0o700); err != nil {
			return nil, fmt.Errorf("journal: %w", err)
		}
		dirs = append(dirs, f.initial)
	}
	for _, d := range dirs {
		if info, err := os.Stat(d); err != nil || !info.IsDir() || info.Mode().Perm()&0o077 != 0 {
			return nil, fmt.Errorf("journal: %s is not a directory of mode 0700", d)
		}
	}
	return f, nil
}

// CheckJournalKey says why the journal cannot be encrypted by its key_file.
func CheckJournalKey(c *config.Config) error {
	key, err := readKey(c.Journal.KeyFile)
	key.Wipe()
	return err
}

// readKey reads a secret as keyturn genkey writes it.
func readKey(path string) (*psk.Key, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	defer clear(b)
	raw := make([]byte, base64.StdEncoding.DecodedLen(len(b)))
	defer clear(raw)
	n, err := base64.StdEncoding.Strict().Decode(raw, bytes.TrimSuffix(b, []byte("\n")))
	if err != nil || n != psk.Size {
		return nil, fmt.Errorf("%s does not hold 32 bytes in base64", path)
	}
	k, err := psk.New(raw[:n])
	if err == nil && k.IsZero() {
		err = fmt.Errorf("%s holds zeros", path)
	}
	return k, err
}

func name(dir string, p wg.PublicKey) string { return filepath.Join(dir, hex.EncodeToString(p[:])) }

// Load reads a peer's journal, and adds the recorded initial PSK.
func (f *files) Load(p wg.PublicKey) (rotation.Journal, error) {
	j, err := f.read(f.dir, p)
	if !f.records[p] {
		return j, err
	}
	if len(j.Entries) > 0 && j.Entries[0].Recovery { // kept before there was a fallback
		j.Entries[0].Key.Wipe()
		j.Entries = j.Entries[1:]
	}
	recorded, err2 := f.read(f.initial, p)
	if len(recorded.Entries) == 1 && (len(j.Entries) == 0 || j.Entries[0].Serial != 0) {
		j.Entries = append(recorded.Entries, j.Entries...)
	} else {
		recorded.Wipe()
	}
	return j, errors.Join(err, err2)
}

func (f *files) read(dir string, p wg.PublicKey) (rotation.Journal, error) {
	path := name(dir, p)
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return rotation.Journal{}, nil
	}
	var j rotation.Journal
	if err == nil {
		j, err = f.decode(b, p)
		clear(b)
	}
	if !errors.Is(err, errForeign) && !errors.Is(err, errFormat) {
		return j, err // nil, or a disk that may do better
	}
	aside, asideErr := setAside(path)
	if asideErr != nil {
		return j, fmt.Errorf("journal %s: %w: %w", path, err, asideErr)
	}
	return j, fmt.Errorf("%w: %s, now %s: %w", ErrSetAside, path, aside, err)
}

// setAside renames a file and never over another: with the wrong key_file the
// one before may be the good one.
func setAside(path string) (string, error) {
	for i := range 100 {
		aside := fmt.Sprintf("%s.bad%d", path, i)
		err := os.Link(path, aside)
		if errors.Is(err, fs.ErrExist) {
			continue
		}
		if err != nil {
			return "", err
		}
		return aside, os.Remove(path)
	}
	return "", errors.New("a hundred files were set aside already")
}

func checksum(p wg.PublicKey, b []byte) []byte {
	h := sha256.New()
	h.Write(p[:])
	h.Write(b)
	return h.Sum(nil)
}

// Save writes a peer's journal: to a new file, synced, renamed over the old
// one, and the directory synced.
func (f *files) Save(p wg.PublicKey, j *rotation.Journal) error {
	if f.records[p] && len(j.Entries) > 0 && j.Entries[0].Serial == 0 {
		if _, err := os.Lstat(name(f.initial, p)); errors.Is(err, fs.ErrNotExist) {
			if err := f.write(f.initial, p, &rotation.Journal{Entries: j.Entries[:1]}); err != nil {
				return err
			}
		}
	}
	return f.write(f.dir, p, j)
}

func (f *files) write(dir string, p wg.PublicKey, j *rotation.Journal) error {
	b, err := f.encode(j, p)
	if err != nil {
		return err
	}
	defer clear(b)
	path := name(dir, p)
	temporary := path + ".new"
	w, err := os.OpenFile(temporary, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = w.Write(b)
	if err == nil {
		err = w.Sync()
	}
	if err = errors.Join(err, w.Close()); err != nil {
		return errors.Join(err, os.Remove(temporary))
	}
	if err := os.Rename(temporary, path); err != nil {
		return err
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

func (f *files) encode(j *rotation.Journal, p wg.PublicKey) ([]byte, error) {
	if len(j.Entries) > maxEntries {
		return nil, fmt.Errorf("%d keys do not fit into a journal", len(j.Entries))
	}
	b := make([]byte, 0, len(magic)+9+len(j.Entries)*entrySize+64)
	b = append(b, magic...)
	b = binary.BigEndian.AppendUint64(b, j.High)
	b = append(b, byte(len(j.Entries)))
	for _, e := range j.Entries {
		flags := byte(0)
		for i, set := range []bool{e.Agreed, e.Seen, e.Confirmed, e.Recovery} {
			if set {
				flags |= 1 << i
			}
		}
		installed := int64(0)
		if !e.Installed.IsZero() {
			installed = e.Installed.UnixNano()
		}
		b = binary.BigEndian.AppendUint64(b, e.Serial)
		b = append(b, flags)
		b = binary.BigEndian.AppendUint64(b, uint64(installed))
		b = append(b, e.Key.Bytes()...)
	}
	if f.key == nil {
		return append(b, checksum(p, b)...), nil
	}
	defer clear(b)
	aead, err := chacha20poly1305.NewX(f.key.Bytes())
	if err != nil {
		return nil, err
	}
	nonce := make([]byte, aead.NonceSize(), aead.NonceSize()+len(b)+aead.Overhead())
	if _, err := io.ReadFull(rand.Reader, nonce); err != nil {
		return nil, err
	}
	return aead.Seal(nonce, nonce, b, p[:]), nil
}

// ErrSetAside means that a journal could not be trusted and was renamed; the
// peer begins without one.
var ErrSetAside = errors.New("journal set aside")

var (
	errForeign = errors.New("it is damaged, or of another peer or key")
	errFormat  = errors.New("it is not a journal of this version")
)

// decode is strict: whatever it takes, encode gives back.
func (f *files) decode(b []byte, p wg.PublicKey) (rotation.Journal, error) {
	var j rotation.Journal
	if f.key == nil {
		n := len(b) - sha256.Size
		if n < 0 {
			return j, errFormat
		}
		if !bytes.Equal(checksum(p, b[:n]), b[n:]) {
			return j, errForeign
		}
		b = b[:n]
	} else {
		aead, err := chacha20poly1305.NewX(f.key.Bytes())
		if err != nil {
			return j, err
		}
		if len(b) < aead.NonceSize() {
			return j, errFormat
		}
		if b, err = aead.Open(nil, b[:aead.NonceSize()], b[aead.NonceSize():], p[:]); err != nil {
			return j, errForeign
		}
		defer clear(b)
	}
	rest, ok := bytes.CutPrefix(b, []byte(magic))
	if !ok || len(rest) < 9 || len(rest) != 9+int(rest[8])*entrySize {
		return j, errFormat
	}
	j.High = binary.BigEndian.Uint64(rest)
	rest = rest[9:]
	for ; len(rest) > 0; rest = rest[entrySize:] {
		e := rotation.Entry{Serial: binary.BigEndian.Uint64(rest)}
		flags := rest[8]
		if n := len(j.Entries); flags > allFlags || n > 0 && e.Serial <= j.Entries[n-1].Serial {
			j.Wipe()
			return rotation.Journal{}, errFormat
		}
		e.Agreed, e.Seen, e.Confirmed, e.Recovery = flags&flagAgreed != 0, flags&flagSeen != 0, flags&flagConfirm != 0, flags&flagRecover != 0
		if ns := int64(binary.BigEndian.Uint64(rest[9:])); ns != 0 {
			e.Installed = time.Unix(0, ns)
		}
		key, err := psk.New(rest[17:entrySize])
		if err != nil {
			return rotation.Journal{}, err
		}
		e.Key = key
		if e.Recovery && (e.Serial != 0 || key.IsZero()) {
			key.Wipe()
			j.Wipe()
			return rotation.Journal{}, errFormat
		}
		j.Entries = append(j.Entries, e)
	}
	return j, nil
}

// Memory is a Store that ends with the process, for demonstrations and tests.
type Memory struct {
	mu       sync.Mutex
	journals map[wg.PublicKey]rotation.Journal
}

// Load implements Store.
func (m *Memory) Load(p wg.PublicKey) (rotation.Journal, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return clone(m.journals[p]), nil
}

// Save implements Store.
func (m *Memory) Save(p wg.PublicKey, j *rotation.Journal) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.journals == nil {
		m.journals = map[wg.PublicKey]rotation.Journal{}
	}
	old := m.journals[p]
	old.Wipe()
	m.journals[p] = clone(*j)
	return nil
}

func clone(j rotation.Journal) rotation.Journal {
	j.Entries = slices.Clone(j.Entries)
	for i := range j.Entries {
		j.Entries[i].Key = j.Entries[i].Key.Clone()
	}
	return j
}
