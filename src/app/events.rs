//! What the main thread waits for once everything runs: it alone changes the sidecar, so that a reload never meets another
//! one, nor a drain.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};

use tokio::sync::oneshot;

use crate::admin::ReloadAnswer;

/// Something that the main thread has to see to.
#[derive(Debug)]
pub(super) enum Event {
    /// Drain and end.
    Drain {
        /// Who wants it, for the log.
        cause: &'static str,
    },
    /// Read the configuration again.
    Reload {
        /// Who wants it.
        cause: Cause,
        /// Who waits for the outcome. Dropped unused when the sidecar drains.
        answer: Option<oneshot::Sender<ReloadAnswer>>,
    },
    /// A guest that was removed has nothing open any more, or its time is over.
    Departed {
        /// The guest.
        name: String,
        /// Which departure: it may have come back meanwhile, and gone again.
        number: u64,
    },
}

/// Why the configuration is read again.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Cause {
    /// The file or its directory has changed, or somebody thought that it might have.
    File,
    /// SIGHUP.
    Signal,
    /// `POST /-/reload`.
    Request,
}

impl Cause {
    /// The word for logs and `/state`.
    pub(super) fn label(self) -> &'static str {
        match self {
            Cause::File => "file",
            Cause::Signal => "SIGHUP",
            Cause::Request => "request",
        }
    }
}

/// The main thread's inbox, and the way into it.
pub(super) struct Events {
    sender: Sender<Event>,
    pub(super) inbox: Receiver<Event>,
    drain_asked: Arc<AtomicBool>,
}

impl Events {
    pub(super) fn new() -> Events {
        let (sender, inbox) = channel();
        Events {
            sender,
            inbox,
            drain_asked: Arc::default(),
        }
    }

    pub(super) fn sender(&self) -> Sender<Event> {
        self.sender.clone()
    }

    pub(super) fn drain_request(&self) -> DrainRequest {
        DrainRequest {
            events: self.sender(),
            asked: Arc::clone(&self.drain_asked),
        }
    }

    /// Whether a drain is asked for, though other things may stand before it in the inbox.
    pub(super) fn is_drain_asked(&self) -> bool {
        self.drain_asked.load(Ordering::Relaxed)
    }
}

/// Begins the drain of the sidecar, as SIGTERM does. Cheap to clone; any thread may use it, and it never blocks.
#[derive(Clone, Debug)]
pub struct DrainRequest {
    events: Sender<Event>,
    /// Set before the event is sent: reloads that stand before it have lost their sense.
    asked: Arc<AtomicBool>,
}

impl DrainRequest {
    /// Begins the drain, at whose end the process ends with exit code 0. Again is no harm.
    pub fn begin(&self) {
        self.begin_for("a request within the process");
    }

    pub(super) fn begin_for(&self, cause: &'static str) {
        self.asked.store(true, Ordering::Relaxed);
        // A main thread that is gone has drained.
        let _ = self.events.send(Event::Drain { cause });
    }
}
