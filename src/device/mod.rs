//! The shell: one thread a guest that owns its connections, rings and sockets and turns the crank.
//!
//! ```text
//!    session thread          admin            control runtime (DNS, dials that wait, accepts)
//!          \ Command, answer    | Command            / Command
//!           v                   v                   v
//!   +---------------------------------------------------------------+
//!   |  device thread: mio::Poll, everything edge-triggered          |
//!   |    rings (guest)  <->  Switchboard { Muxer (vsock), sockets } |
//!   +---------------------------------------------------------------+
//!        ^ kick, v call eventfds           ^ v host sockets
//! ```
//!
//! A cycle: take what is ready, take commands, and turn the crank. A turn: let deadlines fire, take a burst of the guest's
//! packets, give it a burst of packets. If there is more of either than the budget allows, the next turn comes at once, and
//! after a few of them a look at what has become ready meanwhile. Otherwise the thread asks the guest for a kick and sleeps.
//!
//! # Guest to host
//!
//! A packet's header is copied once and judged by the muxer. Payload of consecutive packets of one connection is
//! gathered as slices of guest memory and leaves with one `writev`; what the socket refuses is copied into the flow's
//! spill buffer, which credit bounds. The chains go back to the guest at the end of the burst, when nobody reads them
//! any more, with one look at whether it wants an interrupt.
//!
//! A burst ends after half of Linux's window, in either direction: the guest fills one half while the other is moved
//! (docs/adr/0013-a-turn-moves-half-a-window.md).
//!
//! # Host to guest
//!
//! While the muxer has something to say and the guest has posted buffers: a control packet takes one buffer; data
//! reserves several, and one `readv` scatters the socket's bytes over them. What is not filled is given back in
//! place. Kicks of the RX ring are wanted only while packets wait for buffers.
//!
//! # Messages
//!
//! The bytes of a SEQPACKET connection are messages (`messages`, `switchboard/messages.rs`). One that is whole within a burst goes
//! to a packet socket as it is; any other waits in the spill buffer for its end, since a frame begins with its length and a packet
//! socket takes all or nothing. Towards the guest a message's last packet says that it ends.
//!
//! # Sibling guests
//!
//! A connection between two guests is one connection of each device, with an end of a socket pair as its host end ([`sibling`]).
//!
//! # Translation
//!
//! With VIRTIO_F_ACCESS_PLATFORM the addresses of a ring and of its buffers may be I/O virtual ones: such a ring is served
//! through the IOTLB, which is this thread's own. Where it has no answer the burst ends, the chain stays where it is, the
//! ring is *parked*, and what is missing is told to the session, which asks the VMM. Nobody waits for that:
//!
//! ```text
//!            +--- burst or start: Missing --> parked (Hold::Translation) --- UPDATE, answer, kick, flush ---+
//!   served --+                                                                                             +--> served
//!            +--- its own memory: Refused --> broken (Hold::Refused) ------- UPDATE, INVALIDATE, flush -----+
//! ```
//!
//! A parked ring costs no wake-ups: the other one is served, timers fire, packets for the guest stay with the muxer and
//! their bytes in the sockets. A buffer that is refused costs its chain only.
//!
//! # Captures
//!
//! Somebody may look at the packets (`captures`): each is recorded when it has been taken or is about to be given, in that
//! order, and what was recorded in a turn is passed on at its end. A reader that is too slow costs records, never time.
//!
//! # Invariants
//!
//! 1. Nothing here blocks but the poll, and for 100 us at a time who kicks and kicks for nothing (`spurious`). Sockets are
//!    non-blocking; a dial that has to wait, and names, are the control runtime's.
//! 2. A ring, its memory and its descriptors are touched only between StartQueue and the answer to StopQueue.
//! 3. When both data rings have stopped, every connection has ended: the guest has lost its memory of them. Rings that
//!    are paused (disabled, and not asked for their base) keep them: so does the guest.
//! 4. Sockets are registered edge-triggered: for reading once and for life, for writing from the first time that one refuses bytes
//!    (`flow::Room`). That a connection is not served (no credit, no buffers) costs no wake-up. Closing a socket, whose
//!    descriptor nobody else has, ends its registration.
//! 5. A turn does a bounded amount of work (`budget`), and so does each connection in it.
//! 6. A malformed chain costs that chain, a broken ring that ring, until it is stopped and started again.
//! 7. A slice of guest memory lives in a burst, which borrows memory and IOTLB. Commands are carried out between bursts, so
//!    that the answer to an UPDATE, an INVALIDATE, a flush or another memory table means: nothing is accessed through what
//!    was before. They wait for one burst at most, whatever else is asked of the device.
//! 8. Translations last as long as a ring runs: when none does, all are forgotten, since the VMM tells of no change then.
//! 9. Guest memory that the VMM takes away ends the session (`containment`): nothing that was read from it since is sent on,
//!    believed or blamed on the guest. A panic ends the session, too; the handles of the device stay valid.
//! 10. What is told to the session is told once (`reports`), and only what waits for something has a timer.

use std::collections::VecDeque;
use std::io;
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicU16, AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use mio::{Events, Poll, Registry, Waker};

use crate::config::Limits;
use crate::guest::{GuestRam, Ring, RingPosition};
use crate::host::dial::Dialer;
use crate::metrics::{GuestMetrics, QUEUE_LABELS};
use crate::quota::Quota;
use crate::vsock::{Cid, Header, Muxer, MuxerConfig};

mod budget;
mod bursts;
mod busy_poll;
mod captures;
mod commands;
mod containment;
mod flow;
pub mod handle;
mod lengths;
mod limits;
mod linger;
mod logbook;
mod messages;
mod reports;
mod rules;
pub mod sibling;
pub mod snapshot;
mod spurious;
mod switchboard;
mod token;
mod translation;

pub use handle::{Command, DeviceEvent, DeviceGone, DeviceHandle, Settings};
pub use rules::{Rule, Rules};
pub use sibling::{Sibling, Siblings};
pub use snapshot::DeviceSnapshot;

use busy_poll::BusyPoll;
use captures::Captures;
use commands::Inbox;
use limits::{Admission, Bounds};
use reports::Reports;
use snapshot::RingSnapshot;
use spurious::Spurious;
use switchboard::{Switchboard, SwitchboardParts};
use token::Source;
use translation::Translation;

/// The queue that brings packets to the guest.
const RX: usize = 0;
/// The queue that brings packets from the guest.
const TX: usize = 1;
/// Queues of the device: rx, tx, event.
const QUEUES: usize = 3;

/// How much longer than its dial a connection waits for the dial's answer.
const DIAL_GRACE: Duration = Duration::from_millis(100);

/// What a device is made from, and made anew from after a panic.
#[derive(Clone)]
pub struct DeviceConfig {
    /// The guest's name in metrics and logs.
    pub name: String,
    /// The guest's context identifier.
    pub cid: u32,
    /// Bounds.
    pub limits: Limits,
    /// Where the guest may connect, and what may connect to it.
    pub rules: Arc<Rules>,
    /// Reaches targets.
    pub dialer: Dialer,
    /// The other guests of the sidecar.
    pub siblings: Siblings,
    /// What all guests share.
    pub quota: Quota,
    /// What is counted.
    pub metrics: Arc<GuestMetrics>,
}

/// A device whose thread runs; dropping it ends the thread, since nothing else does: a device holds a handle on itself.
pub struct RunningDevice {
    /// How to speak to it.
    pub handle: DeviceHandle,
    /// What it shows without being asked.
    pub gauges: Arc<DeviceGauges>,
    thread: Option<JoinHandle<()>>,
}

impl RunningDevice {
    /// Tells the device to end its connections and its thread; does not wait.
    pub fn stop(&self) {
        // A device that is gone has stopped.
        let _ = self.handle.send(Command::Stop);
    }

    /// Stops the device and waits for its thread. An error is a panic that was not contained.
    pub fn join(mut self) -> std::thread::Result<()> {
        self.stop();
        self.thread.take().map_or(Ok(()), JoinHandle::join)
    }
}

impl Drop for RunningDevice {
    fn drop(&mut self) {
        self.stop();
    }
}

/// What a device shows to readers on other threads; written by the device at the end of each turn.
#[derive(Default, Debug)]
pub struct DeviceGauges {
    open_connections: AtomicUsize,
    available: [AtomicU16; QUEUES],
}

impl DeviceGauges {
    /// Connections whose host end is open or being opened.
    pub fn open_connections(&self) -> usize {
        self.open_connections.load(Ordering::Relaxed)
    }

    /// Entries of a ring (0 rx, 1 tx, 2 event) that the guest has made available and that have not been taken.
    pub fn available(&self, queue: usize) -> u16 {
        self.available
            .get(queue)
            .map_or(0, |available| available.load(Ordering::Relaxed))
    }
}

/// Starts a guest's device thread.
pub fn spawn(config: DeviceConfig) -> io::Result<RunningDevice> {
    let name = format!("device-{}", config.name).chars().take(15).collect();
    let (device, handle) = Device::new(config)?;
    let gauges = Arc::clone(&device.gauges);
    let thread = std::thread::Builder::new()
        .name(name)
        .spawn(move || containment::run(device))?;
    Ok(RunningDevice {
        handle,
        gauges,
        thread: Some(thread),
    })
}

/// A ring that was started.
struct RunningRing {
    ring: Ring,
    /// What keeps it from being served.
    held: Option<Hold>,
    /// The log has been told that it is broken.
    told: bool,
    /// The session has been told so, and not of its being mended.
    told_broken: bool,
    /// The session has been told that it is all zero, and not that it is in use after all.
    told_empty: bool,
    /// The guest has kicked since the last burst.
    kicked: bool,
    /// There may be entries for which no kick will come. (Of the tx ring; what goes to the guest is known here.)
    due: bool,
}

/// What keeps a ring from being served.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Hold {
    /// It is parked: its next chain or the ring itself waits for a translation. What the VMM says of translations sets it
    /// free, and so does a kick.
    Translation,
    /// Its own memory is not where the translations say, or the VMM refuses to say: broken as long as they are the same.
    Refused,
    /// It makes no sense, until it is stopped and started again.
    Broken,
}

impl Hold {
    /// The word for people.
    fn label(self) -> &'static str {
        match self {
            Hold::Translation => "translation",
            Hold::Refused | Hold::Broken => "broken",
        }
    }
}

struct Device {
    config: DeviceConfig,
    poll: Poll,
    inbox: mpsc::Receiver<Command>,
    /// Commands that came and can wait, in that order.
    waiting: VecDeque<Command>,
    switchboard: Switchboard,
    rings: [Option<RunningRing>; QUEUES],
    ram: Option<GuestRam>,
    translation: Translation,
    reports: Reports,
    captures: Captures,
    /// A packet that the muxer has handed out and that no buffer could take: those that were posted were malformed, or
    /// not translated.
    unsent: Option<Header>,
    /// Since when packets for the guest have waited for buffers.
    rx_starved_since: Option<Instant>,
    busy_poll: BusyPoll,
    spurious: Spurious,
    gauges: Arc<DeviceGauges>,
}

impl Device {
    /// A device that does not run yet, and how to speak to it.
    fn new(config: DeviceConfig) -> io::Result<(Device, DeviceHandle)> {
        let poll = Poll::new()?;
        let waker = Arc::new(Waker::new(poll.registry(), token::WAKE)?);
        let (commands, inbox) = mpsc::channel();
        let handle = DeviceHandle::new(commands, waker);
        let registry = poll.registry().try_clone()?;
        let switchboard = Device::switchboard(&config, registry, handle.clone());
        let device = Device::assemble(config, poll, inbox, switchboard, Arc::default());
        Ok((device, handle))
    }

    /// A switchboard without connections.
    fn switchboard(config: &DeviceConfig, registry: Registry, handle: DeviceHandle) -> Switchboard {
        let config = config.clone();
        let muxer = Muxer::new(muxer_config(config.cid, &config.limits));
        let admission = Admission::new(bounds(&config.limits), config.quota);
        config.rules.come_into_force();
        config
            .metrics
            .set_limits(config.limits.connections, config.limits.memory);
        Switchboard::new(SwitchboardParts {
            name: config.name.as_str().into(),
            cid: config.cid,
            muxer,
            metrics: config.metrics,
            rules: config.rules,
            dialer: config.dialer,
            admission,
            siblings: config.siblings,
            dial_timeout: config.limits.connect_timeout,
            max_lingering: config.limits.connections,
            registry,
            handle,
        })
    }

    /// A device without a session.
    fn assemble(
        config: DeviceConfig,
        poll: Poll,
        inbox: mpsc::Receiver<Command>,
        switchboard: Switchboard,
        gauges: Arc<DeviceGauges>,
    ) -> Device {
        Device {
            captures: Captures::new(Arc::clone(&config.metrics)),
            busy_poll: BusyPoll::new(config.limits.busy_poll),
            config,
            poll,
            inbox,
            switchboard,
            rings: Default::default(),
            ram: None,
            translation: Translation::new(),
            reports: Reports::default(),
            waiting: VecDeque::new(),
            unsent: None,
            rx_starved_since: None,
            spurious: Spurious::default(),
            gauges,
        }
    }

    /// Turns the crank until the device is told to stop.
    fn run(&mut self) {
        let mut events = Events::with_capacity(budget::EVENTS);
        let no_events = Events::with_capacity(1);
        let mut more = false;
        // What is found by looking is served before the kernel is asked again, once.
        let mut may_look = true;
        loop {
            if !more && may_look && self.look_for_packets() {
                match self.cycle(Instant::now(), &no_events) {
                    ControlFlow::Continue(again) => more = again,
                    ControlFlow::Break(()) => return,
                }
                may_look = false;
                continue;
            }
            may_look = true;
            self.spurious.rest();
            let timeout = if more {
                Some(Duration::ZERO)
            } else {
                self.time_to_sleep()
            };
            match self.poll.poll(&mut events, timeout) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    tracing::error!(guest = %self.switchboard.name, %error, "the device thread cannot wait for events");
                    return;
                }
            }
            match self.cycle(Instant::now(), &events) {
                ControlFlow::Continue(again) => more = again,
                ControlFlow::Break(()) => return,
            }
        }
    }

    /// What follows a poll: whether more should follow at once.
    fn cycle(&mut self, now: Instant, events: &Events) -> ControlFlow<(), bool> {
        let began = self.positions();
        let kicked = self.hear(now, events);
        let commands = self.handle_commands(now);
        // Also after Stop: what the guest is told of the end leaves with this turn.
        let (mut more, mut turns) = (self.turn(now), 1);
        while more && turns < budget::TURNS && !self.has_lost_memory() {
            more = self.turn(now);
            turns += 1;
        }
        self.after_cycle(kicked, began);
        self.let_go_of_lost_memory(now);
        self.show();
        commands.map_continue(|left| left | more)
    }

    /// Takes in what is ready; whether the guest has kicked.
    fn hear(&mut self, now: Instant, events: &Events) -> bool {
        let mut kicked = false;
        for event in events {
            match token::source(event.token()) {
                Source::Wake => {}
                Source::Kick(queue) => {
                    kicked = true;
                    self.handle_kick(now, queue);
                }
                Source::Flow(slot) => self.switchboard.handle_ready(now, slot, event),
                Source::Lingering(index) => self.switchboard.handle_lingering_ready(index),
            }
        }
        kicked
    }

    /// One turn; whether another one should follow at once.
    fn turn(&mut self, now: Instant) -> bool {
        self.switchboard.handle_timeout(now);
        let more_tx = self.take_packets(now);
        // Whoever waits for an answer waits for one burst, not for both.
        let inbox = self.handle_session_commands(now);
        let more_rx = self.give_packets(now);
        self.report(now);
        self.captures.flush();
        more_tx | more_rx | (inbox != Inbox::Empty)
    }

    /// Tells the session what has become due.
    fn report(&mut self, now: Instant) {
        self.reports
            .handle_timeout(now, self.translation.oldest_unanswered());
        if !self.reports.empty_check_due(now) {
            return;
        }
        let (Some(running), Some(ram)) = (&self.rings[RX], &self.ram) else {
            return;
        };
        let view = self.translation.view(&running.ring, ram).without_asking();
        // A ring that has been used is not all zero, and one that waits for translations is told of as that.
        let unused = running.held.is_none() && running.ring.position() == RingPosition::default();
        if unused
            && running.ring.is_blank(view) == Ok(true)
            && let Some(running) = &mut self.rings[RX]
        {
            running.told_empty = true;
            self.reports.tell(DeviceEvent::RingEmpty { index: RX });
        }
    }

    fn time_to_sleep(&self) -> Option<Duration> {
        let ours = self.reports.next_timeout(self.translation.oldest_unanswered());
        let timeouts = [self.switchboard.next_timeout(), ours];
        timeouts.into_iter().flatten().min().map(|at| {
            // Rounded up: the poll counts in milliseconds, and waking early would mean waking twice.
            at.saturating_duration_since(Instant::now()) + Duration::from_micros(999)
        })
    }

    fn handle_kick(&mut self, now: Instant, queue: usize) {
        if queue == TX {
            self.busy_poll.kicked(now);
        }
        if let Some(Some(running)) = self.rings.get_mut(queue) {
            running.kicked = true;
            running.due = true;
            // The VMM may have answered without an UPDATE, and the driver have mapped what it had not.
            if running.ring.is_translated() {
                self.translation.kicked();
            }
            if running.held == Some(Hold::Translation) {
                running.held = None;
            }
            if let Some(metrics) = self.switchboard.metrics.queues.get(queue) {
                metrics.kicks.inc();
            }
        }
    }

    fn show(&mut self) {
        self.gauges
            .open_connections
            .store(self.switchboard.open(), Ordering::Relaxed);
        for (running, shown) in self.rings.iter().zip(&self.gauges.available) {
            shown.store(self.available(running.as_ref()), Ordering::Relaxed);
        }
        let memory = i64::try_from(self.switchboard.buffer_memory()).unwrap_or(i64::MAX);
        self.switchboard.metrics.buffer_memory.set(memory);
        self.translation.show(&self.switchboard.metrics.iotlb);
    }

    fn available(&self, running: Option<&RunningRing>) -> u16 {
        match (running, &self.ram) {
            (Some(running), Some(ram)) if running.held.is_none() => {
                // Nobody waits for this: a guest that takes its ring back must not be asked for it once more.
                let view = self.translation.view(&running.ring, ram).without_asking();
                running.ring.available(view).unwrap_or(0)
            }
            _ => 0,
        }
    }

    fn snapshot(&self, now: Instant) -> DeviceSnapshot {
        let rings = self
            .rings
            .iter()
            .zip(QUEUE_LABELS)
            .filter_map(|(running, queue)| {
                let running = running.as_ref()?;
                let position = running.ring.position();
                let available = self.available(Some(running));
                Some(RingSnapshot {
                    queue,
                    size: running.ring.size(),
                    next_avail: position.next_avail,
                    next_used: position.next_used,
                    available,
                    translated: running.ring.is_translated(),
                    held_by: running.held.map(Hold::label),
                })
            })
            .collect();
        DeviceSnapshot {
            rings,
            iotlb: self.translation.snapshot(now, &self.switchboard.metrics.iotlb),
            connections: self.switchboard.connections(now, DeviceSnapshot::MAX_CONNECTIONS),
            connection_count: self.switchboard.open(),
        }
    }
}

/// What the law is told of a guest.
fn muxer_config(cid: u32, limits: &Limits) -> MuxerConfig {
    MuxerConfig {
        guest_cid: Cid(u64::from(cid)),
        buf_alloc: limits.buffer,
        max_connections: limits.connections,
        connect_timeout: limits.connect_timeout + DIAL_GRACE,
        guest_timeout: limits.guest_timeout,
        idle_timeout: limits.idle_timeout,
    }
}

fn bounds(limits: &Limits) -> Bounds {
    Bounds {
        connections: limits.connections,
        per_second: limits.connections_per_second,
        memory: limits.memory,
    }
}

#[cfg(test)]
mod tests;
