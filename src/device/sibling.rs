//! Connections between two guests of one sidecar.
//!
//! Each device has half of the connection, as with any other host end: the two halves are the ends of a socket pair. So
//! back-pressure, half-close and resets pass through the kernel as they do with a service, and nothing that one guest does to
//! its half can be more to the other than what a service can do. One thing passes beside it (`Ears`).
//!
//! ```text
//!   guest a: REQUEST b:5 ──▶ device a ── Command::Sibling { stream } ──▶ device b ── REQUEST from a's CID ──▶ guest b
//!   guest a: RESPONSE   ◀── device a ◀── Command::SiblingAnswered ────── device b ◀── RESPONSE ──────────── guest b
//!                            stream ◀═══════ socket pair ═══════▶ stream
//! ```

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::host::HostStream;
use crate::host::dial::DialError;
use crate::quota::Share;
use crate::vsock::RefuseReason;

use super::handle::DeviceHandle;
use super::limits;
use super::rules::{Rule, Rules};

/// The guests of the sidecar, for those who may dial them. Clones share the list, which is replaced as a whole when guests or
/// rules come and go.
#[derive(Clone, Default)]
pub struct Siblings {
    by_name: Arc<Mutex<HashMap<String, Sibling>>>,
}

/// A guest that others dial.
pub struct Sibling {
    handle: DeviceHandle,
    /// Who may dial it, and what their connections count into, is among these.
    rules: Arc<Rules>,
}

impl Sibling {
    /// A guest that the callers among `rules` may dial.
    pub fn new(handle: DeviceHandle, rules: Arc<Rules>) -> Sibling {
        Sibling { handle, rules }
    }
}

impl Siblings {
    /// Makes these guests known, and no others.
    pub fn replace(&self, siblings: HashMap<String, Sibling>) {
        let before = std::mem::replace(&mut *self.lock(), siblings);
        // Not under the lock: what it holds may end with it.
        drop(before);
    }

    /// How to reach the guest `name`, and what allows the guest `from` to.
    pub(super) fn find(&self, name: &str, from: &str) -> Option<(DeviceHandle, Arc<Rule>)> {
        let siblings = self.lock();
        let sibling = siblings.get(name)?;
        let rule = sibling.rules.callers().get(from)?;
        Some((sibling.handle.clone(), Arc::clone(rule)))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<String, Sibling>> {
        // A replacement is all that ever happens under it.
        self.by_name.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Siblings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.lock().keys()).finish()
    }
}

/// Whether the guests at the two ends of a connection still listen to each other: one of the pair for each half.
///
/// A guest that stops to read has told its peer so (SHUTDOWN of RCV), and the peer's next `send` fails. The socket pair tells
/// as much only to who writes to it (EPIPE), when that `send` has succeeded; a poll shows nothing (`unix_poll` in Linux's
/// net/unix/af_unix.c). So it is told here, before the socket is shut down or closed, which wakes the other device.
#[derive(Debug)]
pub(super) struct Ears {
    ours: Arc<AtomicBool>,
    theirs: Arc<AtomicBool>,
}

impl Ears {
    /// For the two halves of one connection.
    pub(super) fn pair() -> (Ears, Ears) {
        let (one, other) = <(Arc<AtomicBool>, Arc<AtomicBool>)>::default();
        let ears = Ears {
            ours: Arc::clone(&one),
            theirs: Arc::clone(&other),
        };
        let others = Ears {
            ours: other,
            theirs: one,
        };
        (ears, others)
    }

    /// Our guest reads no more. So does a half that is dropped.
    pub(super) fn close(&self) {
        self.ours.store(true, Ordering::Release);
    }

    /// Whether the guest at the other half reads no more.
    pub(super) fn are_closed_there(&self) -> bool {
        self.theirs.load(Ordering::Acquire)
    }
}

impl Drop for Ears {
    fn drop(&mut self) {
        self.close();
    }
}

/// A guest that wants a connection to another one.
#[derive(Debug)]
pub struct SiblingRequest {
    /// What allows it.
    pub(super) rule: Arc<Rule>,
    /// Its name.
    pub(super) peer: Arc<str>,
    /// Its CID and port.
    pub(super) address: (u32, u32),
    /// Port in the guest that is asked.
    pub(super) port: u32,
    /// Whether messages are wanted, in frames.
    pub(super) seqpacket: bool,
    /// The half of the connection that is for the guest that is asked.
    pub(super) stream: HostStream,
    /// Beside it.
    pub(super) ears: Ears,
    /// Who waits for the outcome.
    pub(super) answer: SiblingAnswer,
    /// Its part of what may wait like this; given back when the other device has got to it.
    pub(super) _waits: Share,
}

/// The outcome of a request, which is told once: when it is dropped untold, the guest that was asked is gone.
///
/// The half of the guest that asks is not here: that it is closed tells the other device that nobody waits any more.
pub(super) struct SiblingAnswer {
    target: String,
    tell: Option<Box<Tell>>,
}

/// Takes an outcome to the device of the guest that asks.
type Tell = dyn FnOnce(Result<(), DialError>) + Send;

impl SiblingAnswer {
    /// `target` is the guest that is asked; `tell` must not block.
    pub(super) fn new(
        target: String,
        tell: impl FnOnce(Result<(), DialError>) + Send + 'static,
    ) -> SiblingAnswer {
        SiblingAnswer {
            target,
            tell: Some(Box::new(tell)),
        }
    }

    /// The guest has accepted.
    pub(super) fn accepted(mut self) {
        if let Some(tell) = self.tell.take() {
            tell(Ok(()));
        }
    }

    /// The guest has refused, or was not asked.
    pub(super) fn refused(mut self, reason: RefuseReason) {
        self.refuse(reason);
    }

    fn refuse(&mut self, reason: RefuseReason) {
        let Some(tell) = self.tell.take() else { return };
        let target = self.target.clone();
        let because = |kind: io::ErrorKind, text: &str| io::Error::new(kind, text.to_owned());
        tell(Err(match reason {
            RefuseReason::GuestRst => DialError::Refused {
                target,
                source: because(
                    io::ErrorKind::ConnectionRefused,
                    "nothing listens on that port in the guest",
                ),
            },
            reason if limits::is_bound(reason) => DialError::Resources {
                target,
                source: because(
                    io::ErrorKind::QuotaExceeded,
                    "a limit of the guest that is dialled is reached",
                ),
            },
            reason => DialError::Unreachable {
                target,
                source: because(
                    io::ErrorKind::HostUnreachable,
                    match reason {
                        RefuseReason::GuestTimeout => {
                            "the guest does not answer: it is not running, or it hangs"
                        }
                        RefuseReason::UnsupportedType => "the guest's driver has not agreed on SEQPACKET",
                        RefuseReason::Draining => "the sidecar is shutting down",
                        _ => "the guest went away",
                    },
                ),
            },
        }));
    }
}

impl Drop for SiblingAnswer {
    fn drop(&mut self) {
        self.refuse(RefuseReason::SessionLost);
    }
}

impl fmt::Debug for SiblingAnswer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SiblingAnswer")
            .field("target", &self.target)
            .finish_non_exhaustive()
    }
}
