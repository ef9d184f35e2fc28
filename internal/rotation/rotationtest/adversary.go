package rotationtest

import (
	"fmt"
	"time"
)

// Fault is one thing that an adversary does to a World.
type Fault uint8

// The faults. Each lasts for the time given to Strike, the momentary ones aside.
const (
	CutLink            Fault = iota
	CutTunnel                // WireGuard's packets
	CutBoth                  // the whole network
	Lossy                    // messages of the link are lost one by one, until it breaks
	Twofold                  // messages come twice
	Overtaken                // messages are delayed and overtake each other
	LossyTunnel              // half of WireGuard's packets are lost
	CrashClient              // kill -9 after a number of effects, started again later
	CrashServer              //
	RebootClient             // WireGuard comes up with its first PSK
	RebootServer             //
	KMSDownClient            //
	KMSDownServer            //
	KMSWrong                 // other bytes under the same ID
	KMSZero                  // an all-zero key
	KMSReuse                 // the same ID again
	KMSSlow                  //
	DeviceClient             // WireGuard refuses to set
	DeviceServer             //
	JournalClient            // disk full
	JournalServer            //
	ForeignClient            // wg set
	ForeignServer            //
	GoneClient               // the peer is removed and comes back
	GoneServer               //
	ClockClient              // the wall clock jumps
	RotateNow                // the operator
	HandshakeA               // one by chance
	HandshakeB               //
	BreakLink                // the connection is reset
	ClockServer              // the wall clock jumps
	DoubtJournalClient       // saved, though it is said to have failed
	DoubtJournalServer       //
	DoubtDeviceClient        // set, though it is said to have failed
	DoubtDeviceServer        //
	SleepClient              // suspended
	SleepServer              //
	PowerClient              // a reboot of which nobody is told
	PowerServer              //
	SnapshotClient           // taken now, and restored at the fault's end
	SnapshotServer           //
	LiveClient               // a snapshot of the running machine, put back at the fault's end
	LiveServer               //
	Faults                   // how many there are
)

var faultNames = [...]string{
	"cut link", "cut tunnel", "cut both", "lossy link", "twofold messages", "overtaking messages", "lossy tunnel",
	"crash client", "crash server", "reboot client", "reboot server", "client's kms down", "server's kms down",
	"wrong key", "zero key", "key id reused", "slow kms", "client's device fails", "server's device fails",
	"client's journal fails", "server's journal fails", "wg set at client", "wg set at server",
	"client's peer removed", "server's peer removed", "client's clock jumps", "rotate", "handshake by client",
	"handshake by server", "link reset", "server's clock jumps",
	"client's journal is in doubt", "server's journal is in doubt", "client's device is in doubt", "server's device is in doubt",
	"client sleeps", "server sleeps", "client's power cut", "server's power cut", "snapshot of client", "snapshot of server",
	"snapshot of running client", "snapshot of running server",
}

func (f Fault) String() string { return faultNames[f] }

// Act is a fault with its circumstances.
type Act struct {
	Wait  time.Duration // before it
	Fault Fault
	Last  time.Duration // how long it lasts
	Steps int           // effects until a crash
}

func (a Act) String() string {
	return fmt.Sprintf("after %v %v for %v (%d)", a.Wait, a.Fault, a.Last, a.Steps)
}

// Strike lets the time before the act pass, then starts it; it ends by itself.
func (w *World) Strike(a Act) {
	w.Run(a.Wait)
	w.trace("ADVERSARY: %v for %v", a.Fault, a.Last)
	calms := w.calms
	end := func(undo func()) {
		w.after(a.Last, func() {
			if w.calms == calms {
				undo()
			}
		})
	}
	flag := func(b *bool) { *b = true; end(func() { *b = false }) }
	oneIn := func(n *int, value int) { *n = value; end(func() { *n = 0 }) }
	crash := func(i int) {
		e := w.Ends[i]
		e.CrashAfter = max(1, a.Steps)
		end(func() { e.Crash(); e.CrashAfter = 0; e.Start() })
	}
	gone := func(i int) {
		e := w.Ends[i]
		e.Gone = true
		end(func() {
			e.Gone = false
			e.reset()
		})
	}
	switch a.Fault {
	case CutLink:
		flag(&w.Link.Cut)
	case CutTunnel:
		flag(&w.Tunnel.Cut)
	case CutBoth:
		flag(&w.Tunnel.Cut)
		flag(&w.Link.Cut)
	case Lossy:
		oneIn(&w.Link.Lose, 2)
	case Twofold:
		oneIn(&w.Link.Twice, 2)
	case Overtaken:
		oneIn(&w.Link.Late, 2)
	case LossyTunnel:
		oneIn(&w.Tunnel.Loss, 2)
	case CrashClient:
		crash(Client)
	case CrashServer:
		crash(Server)
	case RebootClient, RebootServer:
		e := w.Ends[a.Fault-RebootClient]
		e.Reboot()
		end(e.Start)
	case KMSDownClient, KMSDownServer:
		flag(&w.KMS.Down[a.Fault-KMSDownClient])
	case KMSWrong:
		flag(&w.KMS.Wrong)
	case KMSZero:
		flag(&w.KMS.Zero)
	case KMSReuse:
		flag(&w.KMS.Reuse)
	case KMSSlow:
		w.KMS.Delay = time.Duration(1+a.Steps/2) * time.Second
		end(func() { w.KMS.Delay = 0 })
	case DeviceClient, DeviceServer:
		flag(&w.Ends[a.Fault-DeviceClient].DeviceBad)
	case JournalClient, JournalServer:
		flag(&w.Ends[a.Fault-JournalClient].JournalBad)
	case ForeignClient, ForeignServer:
		w.Ends[a.Fault-ForeignClient].Foreign()
	case GoneClient, GoneServer:
		gone(int(a.Fault - GoneClient))
	case ClockClient, ClockServer:
		end := Client
		if a.Fault == ClockServer {
			end = Server
		}
		w.Ends[end].WallOffset += time.Duration(a.Steps-20) * time.Hour
	case DoubtJournalClient, DoubtJournalServer:
		flag(&w.Ends[a.Fault-DoubtJournalClient].JournalDoubt)
	case DoubtDeviceClient, DoubtDeviceServer:
		flag(&w.Ends[a.Fault-DoubtDeviceClient].DeviceDoubt)
	case SleepClient, SleepServer:
		e := w.Ends[a.Fault-SleepClient]
		e.Sleep()
		end(e.wake)
	case PowerClient, PowerServer:
		e := w.Ends[a.Fault-PowerClient]
		e.PowerCut()
		end(e.Start)
	case SnapshotClient, SnapshotServer:
		end(w.Ends[a.Fault-SnapshotClient].Snapshot())
	case LiveClient, LiveServer:
		end(w.Ends[a.Fault-LiveClient].Live())
	case RotateNow:
		w.Ends[Client].Rotate()
	case HandshakeA, HandshakeB:
		w.Handshake(int(a.Fault - HandshakeA))
	case BreakLink:
		w.Link.drop(w)
	}
}

// Calm ends every fault and starts what does not run.
func (w *World) Calm() {
	w.trace("CALM")
	w.calms++
	w.Link.Cut, w.Link.Lose, w.Link.Twice, w.Link.Late = false, 0, 0, 0
	w.Tunnel.Cut, w.Tunnel.Loss = false, 0
	w.KMS.Down, w.KMS.Wrong, w.KMS.Zero, w.KMS.Reuse, w.KMS.Delay = [2]bool{}, false, false, false, 0
	for _, e := range w.Ends {
		if e.Gone {
			e.Gone = false
			e.reset()
		}
		e.DeviceBad, e.JournalBad, e.DeviceDoubt, e.JournalDoubt, e.CrashAfter = false, false, false, false, 0
		e.wake()
		e.Start()
	}
}
