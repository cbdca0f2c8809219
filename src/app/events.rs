//! What the main thread waits for once everything runs: it alone changes the sidecar, so that a reload never meets another
//! one, nor a drain.

use std::sync::mpsc::{Receiver, Sender, channel};

/// Something that the main thread has to see to.
#[derive(Debug)]
pub(super) enum Event {
    /// Drain and end.
    Drain {
        /// Who wants it, for the log.
        cause: &'static str,
    },
}

/// The main thread's inbox, and the way into it.
pub(super) struct Events {
    sender: Sender<Event>,
    pub(super) inbox: Receiver<Event>,
}

impl Events {
    pub(super) fn new() -> Events {
        let (sender, inbox) = channel();
        Events { sender, inbox }
    }

    pub(super) fn sender(&self) -> Sender<Event> {
        self.sender.clone()
    }

    pub(super) fn drain_request(&self) -> DrainRequest {
        DrainRequest {
            events: self.sender(),
        }
    }
}

/// Begins the drain of the sidecar, as SIGTERM does. Cheap to clone; any thread may use it, and it never blocks.
#[derive(Clone, Debug)]
pub struct DrainRequest {
    events: Sender<Event>,
}

impl DrainRequest {
    /// Begins the drain, at whose end the process ends with exit code 0. Again is no harm.
    pub fn begin(&self) {
        self.begin_for("a request within the process");
    }

    pub(super) fn begin_for(&self, cause: &'static str) {
        // A main thread that is gone has drained.
        let _ = self.events.send(Event::Drain { cause });
    }
}
