//! How other threads speak to a guest's device thread: commands with answers, never shared state.

use std::os::fd::OwnedFd;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use tokio::sync::oneshot;

use crate::capture::Tap;
use crate::config::Limits;
use crate::guest::{GuestRam, Mapping, MemoryLoss, Miss, RingError, RingParts, RingPosition};
use crate::host::dial::{DialError, DialResult};
use crate::host::listen::Incoming;

use super::rules::{Rule, Rules};
use super::sibling::SiblingRequest;
use super::snapshot::DeviceSnapshot;

/// The answer of a command.
pub type Reply<T> = oneshot::Sender<T>;

/// What the device thread can be asked to do.
pub enum Command {
    /// Use this guest memory from now on; the old one is no longer touched once answered.
    SetMemory {
        /// The new memory; `None` when the session has none any more.
        ram: Option<GuestRam>,
        /// Answered when the old memory is no longer in use.
        done: Reply<()>,
    },
    /// What types of connection the driver knows (features STREAM, SEQPACKET and NO_IMPLIED_STREAM).
    SetTypes {
        /// Streams.
        stream: bool,
        /// SEQPACKET.
        seqpacket: bool,
        /// Answered when connections of another type are refused.
        done: Reply<()>,
    },
    /// Run a ring.
    StartQueue {
        /// 0 rx, 1 tx, 2 event.
        index: usize,
        /// The ring.
        parts: RingParts,
        /// Answered when the ring runs, or with what is wrong with it.
        done: Reply<Result<(), String>>,
    },
    /// Stop a ring and tell where it stands; `None` if it did not run.
    StopQueue {
        /// 0 rx, 1 tx, 2 event.
        index: usize,
        /// Whether it is to go on later where it stands: the guest remembers its connections. Otherwise they end
        /// when both data rings have stopped, also if this one was paused before.
        pause: bool,
        /// Answered when the ring is no longer touched.
        done: Reply<Option<RingPosition>>,
    },
    /// Signal this descriptor instead for a running ring.
    SetCall {
        /// 0 rx, 1 tx, 2 event.
        index: usize,
        /// The new descriptor.
        call: Option<OwnedFd>,
        /// Answered when the old one is no longer used.
        done: Reply<()>,
    },
    /// Tell the session of what happens from now on, or nobody.
    SetListener {
        /// Called on the device thread; must not block.
        listener: Option<Listener>,
        /// Answered when the old one is no longer called.
        done: Reply<()>,
    },
    /// Take translations in (IOTLB_MSG UPDATE).
    UpdateIotlb {
        /// What is mapped.
        mappings: Vec<Mapping>,
        /// Answered when mappings that these replace are no longer used.
        done: Reply<()>,
    },
    /// Forget translations (IOTLB_MSG INVALIDATE).
    InvalidateIotlb {
        /// First I/O virtual address.
        first: u64,
        /// Last I/O virtual address.
        last: u64,
        /// Answered when memory is no longer accessed through them.
        done: Reply<()>,
    },
    /// Forget every translation, refusal and question: what they were for is gone (SET_FEATURES).
    FlushIotlb {
        /// Answered when memory is no longer accessed through them.
        done: Reply<()>,
    },
    /// The VMM has answered a miss. A translation, if there is one, has come by [`Command::UpdateIotlb`].
    MissAnswered {
        /// As it was told to the listener.
        miss: Miss,
        /// Whether the VMM refused.
        refused: bool,
    },
    /// The VMM is gone: stop every ring, drop the memory, end every connection.
    EndSession {
        /// Answered when all of it is done.
        done: Reply<()>,
    },
    /// A client of an inbound rule.
    Incoming {
        /// The rule, as it was when the client came.
        rule: Arc<Rule>,
        /// The client.
        incoming: Incoming,
    },
    /// Another guest of this sidecar wants a connection.
    Sibling(Box<SiblingRequest>),
    /// A dial ended.
    Dialed {
        /// What the device called it.
        token: u64,
        /// The outcome.
        result: DialResult,
        /// How long it took.
        took: Duration,
    },
    /// Another guest has answered; our half of the connection waits with it.
    SiblingAnswered {
        /// What the device called it.
        token: u64,
        /// The outcome.
        result: Result<(), DialError>,
        /// How long it took.
        took: Duration,
    },
    /// Record packets for somebody, until its recording has ended.
    Capture {
        /// Where they go.
        tap: Tap,
        /// Answered when the next packet will be recorded.
        done: Reply<()>,
    },
    /// Describe yourself.
    Snapshot(Reply<DeviceSnapshot>),
    /// Show that you live.
    Ping(Reply<()>),
    /// Other rules and limits from now on. Connections go on, each under the rule that let it in. Ends a drain.
    Reconfigure {
        /// For connections that are asked for from now on.
        settings: Settings,
        /// Answered when the next request will find them.
        done: Reply<()>,
    },
    /// A VMM begins a session whose guest has this CID.
    SetCid {
        /// The context identifier.
        cid: u32,
        /// Answered when packets have it.
        done: Reply<()>,
    },
    /// Refuse new inbound connections from now on.
    Drain,
    /// End all connections and the thread.
    Stop,
}

/// What can change of a device that runs.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Bounds.
    pub limits: Limits,
    /// Where the guest may connect, and what may connect to it.
    pub rules: Arc<Rules>,
}

/// Whom a device tells what the session has to know.
pub type Listener = Box<dyn Fn(DeviceEvent) + Send>;

/// What a device tells its session.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DeviceEvent {
    /// A translation is missing: ask the VMM. Told once; answered by [`Command::MissAnswered`], if the VMM answers.
    Miss(Miss),
    /// This miss has not been answered for [`MISS_PATIENCE`].
    MissOverdue(Miss),
    /// Misses have been answered meanwhile: none is overdue.
    MissesAnswered,
    /// Translations for buffers were refused [`STORM`] times within a minute.
    FaultStorm,
    /// A ring cannot be served until it is started anew, or mended.
    RingBroken {
        /// 0 rx, 1 tx, 2 event.
        index: usize,
        /// Why.
        error: RingError,
    },
    /// A ring that was told as broken or empty is served without having been started anew: translations have mended it, or the
    /// driver was late.
    RingMended {
        /// 0 rx, 1 tx, 2 event.
        index: usize,
    },
    /// The rx ring runs since [`EMPTY_PATIENCE`] and its memory is all zero: the driver, which is up, must have posted
    /// buffers, so this is not the driver's memory.
    RingEmpty {
        /// 0 rx.
        index: usize,
    },
    /// Guest memory, or its dirty log, could not be accessed. The device has let go of it, stopped the rings and ended the
    /// connections: the session can only end.
    MemoryLost(MemoryLoss),
}

/// How long a VMM may leave a miss unanswered before it is told as overdue.
pub const MISS_PATIENCE: Duration = Duration::from_secs(5);
/// How many refused translations within a minute are a storm.
pub const STORM: u32 = 100;
/// How long a ring may be all zero.
pub const EMPTY_PATIENCE: Duration = Duration::from_secs(5);

/// The device thread did not answer: it has ended, it hangs, or it has panicked over this command and begun anew.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the device thread does not answer")]
pub struct DeviceGone;

/// A handle on one guest's device thread.
#[derive(Clone)]
pub struct DeviceHandle {
    commands: mpsc::Sender<Command>,
    waker: Arc<mio::Waker>,
}

impl DeviceHandle {
    /// A handle that sends to `commands` and wakes the receiver with `waker`.
    pub fn new(commands: mpsc::Sender<Command>, waker: Arc<mio::Waker>) -> DeviceHandle {
        DeviceHandle { commands, waker }
    }

    /// Sends a command without waiting.
    pub fn send(&self, command: Command) -> Result<(), DeviceGone> {
        self.commands.send(command).map_err(|_| DeviceGone)?;
        self.waker.wake().map_err(|_| DeviceGone)
    }

    /// Sends a command and blocks until it is answered. Not for async code.
    pub fn call<T>(&self, command: impl FnOnce(Reply<T>) -> Command) -> Result<T, DeviceGone> {
        let (reply, answer) = oneshot::channel();
        self.send(command(reply))?;
        answer.blocking_recv().map_err(|_| DeviceGone)
    }

    /// Sends a command and waits for its answer, at most `within`.
    pub async fn ask<T>(
        &self,
        command: impl FnOnce(Reply<T>) -> Command,
        within: Duration,
    ) -> Result<T, DeviceGone> {
        let (reply, answer) = oneshot::channel();
        self.send(command(reply))?;
        match tokio::time::timeout(within, answer).await {
            Ok(Ok(value)) => Ok(value),
            _ => Err(DeviceGone),
        }
    }
}
