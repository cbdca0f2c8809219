//! Captures, as the admin server asks for them: how many there may be, and the way to the device thread.

use std::sync::Arc;
use std::task::{Context, Poll};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tracing::info;

use super::source::{AdminSource, DEVICE_PATIENCE, GuestView};
use crate::admin::{CaptureRefused, CaptureRequest, Chunks};
use crate::capture::{Options, Recording, capture};
use crate::device::Command;

/// Captures of one guest at once.
const OF_A_GUEST: usize = 2;
/// Captures at once. Each is a connection of the admin server and a queue, and probes and a small container shall not
/// notice them.
const IN_ALL: usize = 4;
/// Bytes that wait for a slow reader, of each capture: a tenth of a second of small packets as fast as they come.
const QUEUE: usize = 4 << 20;

/// How many captures there may be: of everybody, or of one guest.
pub(super) struct Places(Arc<Semaphore>);

impl Places {
    pub(super) fn in_all() -> Places {
        Places(Arc::new(Semaphore::new(IN_ALL)))
    }

    pub(super) fn of_a_guest() -> Places {
        Places(Arc::new(Semaphore::new(OF_A_GUEST)))
    }

    /// A place, until it is dropped.
    fn take(&self, limit: &str) -> Result<OwnedSemaphorePermit, CaptureRefused> {
        let taken = Arc::clone(&self.0).try_acquire_owned();
        taken.map_err(|_| CaptureRefused::Busy {
            limit: limit.to_owned(),
        })
    }
}

/// Begins a capture. When this answers, the next packet is part of it.
pub(super) async fn begin(
    source: &AdminSource,
    request: CaptureRequest,
) -> Result<Box<dyn Chunks>, CaptureRefused> {
    let named = |guest: &&GuestView| guest.config.name == request.guest;
    let views = source.guests.now();
    let Some(guest) = views.iter().find(named) else {
        let names = views.iter().map(|guest| guest.config.name.clone());
        return Err(CaptureRefused::NoSuchGuest {
            names: names.collect(),
        });
    };
    let places = [
        guest
            .captures
            .take("two captures of this guest are running, and no more may")?,
        source
            .captures
            .take("four captures are running, and no more may")?,
    ];
    let (tap, recording) = capture(&Options {
        guest: guest.config.name.clone(),
        cid: guest.session.cid(),
        duration: request.duration,
        snaplen: request.snaplen,
        queue: QUEUE,
    });
    guest
        .device
        .ask(|done| Command::Capture { tap, done }, DEVICE_PATIENCE)
        .await
        .map_err(|_| CaptureRefused::NoAnswer)?;
    // Payload leaves the sidecar: whoever reads the log shall know.
    info!(
        guest = guest.config.name,
        seconds = request.duration.as_secs(),
        snaplen = request.snaplen,
        "a capture of the guest's packets begins"
    );
    Ok(Box::new(Running {
        recording,
        _places: places,
    }))
}

/// A capture that runs until it is dropped, which frees its place.
struct Running {
    recording: Recording,
    _places: [OwnedSemaphorePermit; 2],
}

impl Chunks for Running {
    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Vec<u8>>> {
        self.recording.poll_next(cx)
    }
}
