//! What costs a guest its session and nobody else anything: memory that is taken away, and panics.
//!
//! A device that panics is put together anew on the same thread, around the poll, the channel of commands and what is counted, so
//! that every handle on it stays valid. It has no session: whoever waits for the answer of a command that was being
//! carried out learns that none comes, and the session learns of it by its listener being dropped, however the panic came about.
//! Connections end, rings and memory are let go of; a capture ends; commands that wait are carried out, since who sent them has not
//! failed. What can panic is what a guest, a VMM or a peer may have found, so it is bounded: one line
//! in the log for each [`TELL_AGAIN`], and a pause before the device goes on that grows with each panic.

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mio::unix::SourceFd;
use tracing::{debug, error};

use super::Device;
use super::handle::DeviceEvent;
use super::switchboard::Switchboard;
use crate::guest::GuestRam;
use crate::sys::unwind;

/// Panics within this time after one at error are logged at debug.
const TELL_AGAIN: Duration = Duration::from_secs(10);
/// First and longest pause after a panic. The longest is far below what a liveness probe waits for an answer.
const PAUSE: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(200));
/// After so long without a panic the next one counts as the first.
const QUIET: Duration = Duration::from_secs(60);

/// Runs a device until it is told to stop.
pub(super) fn run(mut device: Device) {
    let mut pauses = Pauses::default();
    loop {
        let Err(panic) = unwind::contain(|| device.run()) else {
            return;
        };
        let now = Instant::now();
        let metrics = Arc::clone(&device.config.metrics);
        metrics.device_panics.inc();
        let guest = device.config.name.clone();
        let pause = pauses.after(now);
        match pauses.is_news(now) {
            true => error!(
                guest, detail = %panic, total = metrics.device_panics.get(),
                "the device thread has panicked: the guest's session ends, and can begin again"
            ),
            false => debug!(guest, detail = %panic, "the device thread has panicked again"),
        }
        device = match unwind::contain(|| device.begin_anew(now)) {
            Ok(device) => device,
            // Whoever has a handle finds the thread gone, and `/livez` says so.
            Err(panic) => {
                return error!(guest, detail = %panic, "the device thread cannot begin anew and ends");
            }
        };
        std::thread::sleep(pause);
    }
}

impl Device {
    /// Whether the VMM has taken guest memory away. Nothing that was read since is to be believed.
    pub(super) fn has_lost_memory(&self) -> bool {
        self.ram.as_ref().is_some_and(GuestRam::is_lost)
    }

    /// Ends what there is of a session whose memory is lost, and tells it why.
    pub(super) fn let_go_of_lost_memory(&mut self, now: Instant) {
        if !self.has_lost_memory() {
            return;
        }
        let loss = self.ram.as_ref().and_then(GuestRam::loss);
        self.let_go(now);
        if let Some(loss) = loss {
            // The session says so to operators.
            debug!(guest = %self.switchboard.name, %loss, "guest memory is lost");
            self.reports.tell(DeviceEvent::MemoryLost(loss));
        }
    }

    /// Another device of the same configuration around what must stay the same, after a panic of this one. Each thing that is
    /// saved or counted may be what has failed, and then is gone without that.
    pub(super) fn begin_anew(self, now: Instant) -> Device {
        let Device {
            config,
            poll,
            inbox,
            waiting,
            mut switchboard,
            rings,
            ram,
            mut translation,
            reports,
            captures,
            gauges,
            ..
        } = self;
        let attempt = |what: &str, work: &mut dyn FnMut()| {
            if let Err(panic) = unwind::contain(work) {
                debug!(guest = config.name, what, detail = %panic, "panicked again");
            }
        };
        // The VMM keeps kick descriptors open, so dropping the rings would not end their registrations.
        attempt("the rings", &mut || {
            for running in rings.iter().flatten() {
                let kick = running.ring.kick().as_raw_fd();
                let _ = poll.registry().deregister(&mut SourceFd(&kick));
            }
        });
        // Twice: who made it panic is gone by then.
        for _ in 0..2 {
            attempt("the connections", &mut || switchboard.abandon(now));
        }
        attempt("the translations", &mut || {
            translation.end_session(&config.metrics.iotlb);
            translation.show(&config.metrics.iotlb);
        });
        Switchboard::settle_gauges(&config.metrics, &config.rules);
        let salvage = switchboard.salvage();
        let mut fresh = Device::switchboard(&config, salvage.registry, salvage.handle);
        fresh.succeed(now, &salvage.wreck);
        let mut rest = Some((rings, ram, translation, captures, salvage.wreck));
        attempt("what is thrown away", &mut || drop(rest.take()));
        // Its listener goes, which is how the session learns of it.
        let mut reports = Some(reports);
        attempt("the listener", &mut || drop(reports.take()));
        let mut device = Device::assemble(config.clone(), poll, inbox, fresh, gauges);
        device.waiting = waiting;
        device.show();
        device
    }
}

/// How panics are held back and told.
#[derive(Default)]
struct Pauses {
    last: Option<Instant>,
    next: Duration,
    told: Option<Instant>,
}

impl Pauses {
    /// How long to wait after a panic.
    fn after(&mut self, now: Instant) -> Duration {
        let recent = |at: Instant| now.saturating_duration_since(at) < QUIET;
        if !self.last.replace(now).is_some_and(recent) {
            self.next = PAUSE.0;
        }
        let pause = self.next;
        self.next = (pause * 2).min(PAUSE.1);
        pause
    }

    /// Whether a panic is to be told to operators.
    fn is_news(&mut self, now: Instant) -> bool {
        let recent = |at: Instant| now.saturating_duration_since(at) < TELL_AGAIN;
        let is_news = !self.told.is_some_and(recent);
        if is_news {
            self.told = Some(now);
        }
        is_news
    }
}
