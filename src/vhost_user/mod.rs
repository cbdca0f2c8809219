//! The session: how a VMM talks to us over vhost-user, and how what it says reaches the device thread.
//!
//! # Theory of operation
//!
//! `vhost-user-backend` (the *crate*, below) parses the protocol. In front of it stands our [`gate`], always: the crate
//! tells nobody what was negotiated, ends a session over whatever it does not like without a word about the reason, and
//! cannot translate addresses. The crate takes its connection only from a listener, so there is
//! a private one that has no name ([`private_socket`]), to which each session connects.
//!
//! ```text
//!      VMM            session thread                crate's thread                 device thread
//!       │  connect          │                              │                             │
//!       ├──────────────────▶│ first byte: session begins,  │                             │
//!       │                   │ private socket, daemon ─────▶│ started                     │
//!       │ SET_MEM_TABLE +fd │                              │                             │
//!       ├──────────────────▶│ Relay: Gate, Negotiation ───▶│ mmap                        │
//!       │                   │                              ├─ SetMemory ────────────────▶│ uses the new memory
//!       │                   │                              │◀──────────────────── done ──┤
//!       │◀──────────────────┤◀──────────── answer ("done") ┤                             │
//!       │ SET_VRING_* +fd   │                              │                             │
//!       ├──────────────────▶│ ────────────────────────────▶│ Vring: ready, not enabled   │
//!       │ SET_VRING_ENABLE 1│                              │                             │
//!       ├──────────────────▶│ ────────────────────────────▶├─ StartQueue(parts) ────────▶│ owns the ring
//!       │                   │                              │◀──────────────────── done ──┤
//!       │ ......................... kicks and calls: eventfds, past all of us ...........▶│
//!       │ GET_VRING_BASE    │                              │                             │
//!       ├──────────────────▶│ ────────────────────────────▶├─ StopQueue ────────────────▶│ gives it back
//!       │                   │                              │◀──────────────── position ──┤
//!       │◀──────────────────┤◀─────────────── base (avail) ┤                             │
//!       │ close             │                              │                             │
//!       ├──────────────────▶│ closes the private socket ──▶│ ends                        │
//!       │                   ├─ EndSession ───────────────────────────────────────────────▶ lets go of everything
//!       │                   │◀──────────────────────────────────────────────────── done ──┤
//! ```
//!
//! With VIRTIO_F_ACCESS_PLATFORM, and a VMM that translates ([`gate`], [`translation`]):
//!
//! ```text
//!      VMM            session thread                crate's thread                 device thread
//!       │ SET_VRING_ADDR: IOVAs                            │                             │
//!       ├──────────────────▶│ ───────── a placeholder ────▶│ Vring: takes the IOVAs      │
//!       │ IOTLB_MSG: UPDATE │                              │                             │
//!       ├──────────────────▶│ ────────────────── barrier ─▶│                             │
//!       │                   ├─ UpdateIotlb ───────────────────────────────────────────────▶ maps, resumes its rings
//!       │◀───────── done ───┤◀──────────────────────────────────────────────────── done ──┤
//!       │◀══ MISS ══════════┤◀────────────────────────────────────────────── DeviceEvent ─┤ finds nothing, parks, goes on
//!       │ IOTLB_MSG: UPDATE │   answered as above, and only then:                         │
//!       ╞══ yes, or no ════▶│ ─ MissAnswered ─────────────────────────────────────────────▶
//! ```
//!
//! `══` is the back-end's channel ([`channel`]). Nobody waits for what comes on it: a VMM that serves both sockets with one
//! thread answers a miss after its UPDATE was acknowledged.
//!
//! # Threads
//!
//! - The *session thread*, one a guest ([`Session::spawn`]), waits in `poll` for the VMM, the crate, other VMMs that
//!   knock, and its wake descriptor. It relays, observes, and ends sessions. It blocks on nobody; only at the end of a
//!   session does it wait for the two others.
//! - The *crate's thread* lives as long as a session. It parses, keeps the settings, and asks the device thread; our
//!   `Backend` and `Vring` run on it. It waits for every answer of the device, up to a deadline.
//! - The *device thread* owns memory and rings while they run ([`crate::device`]). It knows commands, not sessions.
//!
//! Readers in other threads get copies of [`Negotiation`].
//!
//! # How the crate is made to do it
//!
//! - It starts no worker thread when `queues_per_thread` is empty, and then shows nobody its vrings. `VringT::new` has no
//!   context, so vrings find their session in a thread-local place while the crate makes them (`Vring::hatch`).
//! - Its guards must be of its own types, so `Vring` wraps `VringMutex`, which keeps the settings.
//! - It reads a body with one `recvmsg`, so the relay passes messages on in one piece.
//! - An answer "no" ends its session: it returns the handler's error after having sent it. So does whatever it does not
//!   know. The gate says which request it was, and why.
//! - Should its thread panic, it leaves a duplicate of its socket open, and the VMM would wait for ever: a thread-local
//!   value's destructor tells the session thread (`DeviceLink::enter`).
//!
//! # Invariants
//!
//! 1. What the VMM says reaches the crate byte for byte, with its descriptors and in its order, and the other way round.
//!    The exceptions are the gate's, and named there: the prelude in front of a session that is none of ours, IOTLB messages,
//!    ring addresses that are IOVAs, and refusals. Without ACCESS_PLATFORM only the last can happen after the prelude.
//! 2. "Done" means done: the answer to SET_MEM_TABLE, ADD_MEM_REG, REM_MEM_REG, GET_VRING_BASE, RESET_DEVICE and IOTLB_MSG is sent
//!    after the device thread's answer. A position is back before it is read.
//! 3. Each direction of the relay holds one message at most, and waits for its own reader only.
//! 4. A ring has one owner: the crate's settings are what *will* be started; a change under a running ring stops it first.
//! 5. Memory stays mapped as long as the device has it, whatever the crate has let go of.
//! 6. When the VMM sees its connection end, the device thread has let go of its memory, rings and descriptors, or has been
//!    given up as hanging or dead, which ends the session by an error.
//! 7. A session leaves nothing behind: no thread, descriptor, mapping or file.
//! 8. Nothing that comes over the socket costs more than its session: not the thread, not the guest's other sessions, not
//!    the process.

mod backend;
pub mod channel;
mod end;
mod endpoint;
pub mod features;
pub mod findings;
pub mod gate;
mod link;
pub mod message;
pub mod negotiation;
pub mod private_socket;
pub mod relay;
mod session;
mod terms;
pub mod translation;
mod vring;
pub mod wire;

pub use endpoint::{BindError, Endpoint, Mode, SessionConfig};
pub use features::Features;
pub use findings::{Finding, FindingCode, Severity};
pub use negotiation::{Negotiation, NegotiationWatch, Record, SessionError, SessionState};
pub use session::{Session, SessionHandle};
pub use terms::{SessionTerms, Terms};
pub use translation::{AccessPlatform, Evidence, Translation, TranslationMode};

#[cfg(test)]
mod testing;
