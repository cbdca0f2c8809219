//! How other threads speak to a guest's device thread: commands with answers, never shared state.

use std::os::fd::OwnedFd;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use tokio::sync::oneshot;

use crate::guest::{GuestRam, RingParts, RingPosition};
use crate::host::dial::DialResult;
use crate::host::listen::Incoming;

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
    /// The VMM is gone: stop every ring, drop the memory, end every connection.
    EndSession {
        /// Answered when all of it is done.
        done: Reply<()>,
    },
    /// A client of an inbound rule.
    Incoming(Incoming),
    /// A dial ended.
    Dialed {
        /// What the device called it.
        token: u64,
        /// The outcome.
        result: DialResult,
        /// How long it took.
        took: Duration,
    },
    /// Describe yourself.
    Snapshot(Reply<DeviceSnapshot>),
    /// Show that you live.
    Ping(Reply<()>),
    /// Refuse new inbound connections from now on.
    Drain,
    /// End all connections and the thread.
    Stop,
}

/// The device thread did not answer: it has ended, or it hangs.
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
