//! Rings against the switchboard: a burst of packets from the guest, a burst of packets to it.

use std::io::{self, Write as _};
use std::ops::AddAssign;
use std::os::fd::AsFd;
use std::time::Instant;

use tracing::{debug, warn};

use crate::guest::{Finished, RingError, RingFault, RingPosition, RxBurst, TxBurst, View};
use crate::host::HostStream;
use crate::metrics::{Direction, QUEUE_LABELS};
use crate::sys::iovec::IoVecs;
use crate::sys::vectored::{Received, is_memory_fault, readv};
use crate::vsock::{Boundary, ConnectionId, Disposition, HEADER_LEN, Header, Op, Outgoing};

use super::captures::Captures;
use super::handle::DeviceEvent;
use super::messages::Wire;
use super::reports::Reports;
use super::switchboard::{Gather, ReadOutcome, Switchboard};
use super::{Device, Hold, RX, RunningRing, TX, budget};

/// What a burst from the guest ended with.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Taken {
    /// There is nothing more to take; a kick will come with the next.
    All,
    /// There is no room for our replies. No kick will come.
    NoRoom,
    /// There may be more.
    SomeLeft,
    /// The next packet waits for a translation.
    Parked,
}

/// What a burst to the guest ended with.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Given {
    /// There is nothing more to give.
    All,
    /// The budget is used up.
    SomeLeft,
    /// The guest has no buffers for the rest.
    NoBuffers,
    /// The guest's next buffer waits for a translation.
    Parked,
}

impl Device {
    /// Takes a burst of the guest's packets; whether there may be more.
    pub(super) fn take_packets(&mut self, now: Instant) -> bool {
        let Device {
            rings,
            switchboard,
            ram,
            translation,
            reports,
            captures,
            ..
        } = self;
        let (Some(running), Some(ram)) = (&mut rings[TX], ram.as_ref()) else {
            return false;
        };
        // Packets are looked for at every turn, which may save a kick. Not so where a look may become a question: when a guest
        // that is reset takes its ring back, each INVALIDATE makes a turn.
        let due = running.due || !running.ring.is_translated();
        if running.held.is_some() || !due || !switchboard.muxer.accepts_input() {
            return false;
        }
        let view = translation.view(&running.ring, ram);
        let result = take_burst(running, switchboard, captures, view, now);
        if ram.is_lost() {
            // Whatever was wrong in it is not the guest's doing; see `Device::cycle`.
            return false;
        }
        let taken = after_burst(running, switchboard, reports, TX, now, result);
        running.due = taken != Some(Taken::All);
        let mut more = taken == Some(Taken::SomeLeft);
        if taken == Some(Taken::Parked) {
            running.held = Some(Hold::Translation);
            more = translation.want_kick(running, ram);
        }
        if running.ring.is_translated() {
            translation.ask(reports);
        }
        more
    }

    /// Gives the guest a burst of packets; whether there are more and buffers for them.
    pub(super) fn give_packets(&mut self, now: Instant) -> bool {
        let Device {
            rings,
            switchboard,
            ram,
            translation,
            reports,
            captures,
            unsent,
            rx_starved_since,
            busy_poll,
            ..
        } = self;
        let (Some(running), Some(ram)) = (&mut rings[RX], ram.as_ref()) else {
            return false;
        };
        let idle = unsent.is_none() && !switchboard.muxer.has_outgoing();
        // A ring that has just started gets a burst although there is nothing to say: it may owe an interrupt.
        if running.held.is_some() || (idle && !running.kicked) {
            return false;
        }
        let accepted_input = switchboard.muxer.accepts_input();
        let view = translation.view(&running.ring, ram);
        let before = running.ring.position().next_used;
        let result = give_burst(running, switchboard, captures, view, unsent, now);
        if ram.is_lost() {
            return false;
        }
        let given = after_burst(running, switchboard, reports, RX, now, result);
        switchboard.handle_events(now);
        if running.ring.position().next_used != before {
            busy_poll.given(now);
        }

        // A guest that has posted buffers does not starve us, even if the VMM has not said yet where they are.
        let queue = &switchboard.metrics.queues[RX];
        if given == Some(Given::NoBuffers) {
            if rx_starved_since.is_none() {
                *rx_starved_since = Some(now);
                queue.full.inc();
            }
        } else if let Some(since) = rx_starved_since.take() {
            queue
                .full_seconds
                .inc_by(now.saturating_duration_since(since).as_secs_f64());
        }
        let notified = match given {
            Some(Given::NoBuffers) => running.ring.enable_notifications(view),
            Some(Given::All | Given::SomeLeft) => running.ring.disable_notifications(view).map(|()| false),
            Some(Given::Parked) | None => Ok(false),
        };
        let buffers_came = after_burst(running, switchboard, reports, RX, now, notified).unwrap_or(false);
        let mut more = given == Some(Given::SomeLeft) || buffers_came;
        if given == Some(Given::Parked) {
            running.held = Some(Hold::Translation);
            more |= translation.want_kick(running, ram);
        }
        if running.ring.is_translated() {
            translation.ask(reports);
        }
        // Packets of the guest that waited for room among our replies can be taken now; no kick will come for them.
        let input_opened = !accepted_input && switchboard.muxer.accepts_input();
        more || input_opened
    }
}

/// Counts what was wrong with chains, and stops serving a ring that cannot be served.
fn after_burst<T>(
    running: &mut RunningRing,
    switchboard: &Switchboard,
    reports: &mut Reports,
    queue: usize,
    now: Instant,
    result: Result<T, RingError>,
) -> Option<T> {
    let metrics = &switchboard.metrics.queues[queue];
    for (fault, count) in running.ring.take_faults().iter() {
        if let Some(counter) = metrics.errors.get(fault as usize) {
            counter.inc_by(u64::from(count));
        }
        if fault == RingFault::TranslationRefused {
            reports.refused(now, count);
        }
        debug!(guest = %switchboard.name, queue = QUEUE_LABELS[queue], fault = fault.label(), count, "malformed chains");
    }
    let error = match result {
        Ok(value) => {
            let is_used = running.ring.position() != RingPosition::default();
            let was_empty = is_used && std::mem::take(&mut running.told_empty);
            // This may be the second result of a burst whose first was an error.
            let was_broken = running.held.is_none() && std::mem::take(&mut running.told_broken);
            if was_broken || was_empty {
                reports.tell(DeviceEvent::RingMended { index: queue });
            }
            return Some(value);
        }
        Err(error) => error,
    };
    running.held = Some(match error {
        _ if error.awaits_translation() => Hold::Translation,
        RingError::Memory { .. } if running.ring.is_translated() => Hold::Refused,
        _ => Hold::Broken,
    });
    // One that is refused is tried at each UPDATE: it is told once all the same.
    if running.held == Some(Hold::Translation) {
        return None;
    }
    if !std::mem::replace(&mut running.told_broken, true) {
        reports.tell(DeviceEvent::RingBroken { index: queue, error });
    }
    // The guest may have its ring broken and mended as often as it likes.
    if !std::mem::replace(&mut running.told, true) {
        if let Some(counter) = metrics.errors.get(error.reason() as usize) {
            counter.inc();
        }
        warn!(
            guest = %switchboard.name, queue = QUEUE_LABELS[queue], %error,
            "the ring is broken and is not served until the guest restarts it"
        );
    }
    None
}

fn interrupt(running: &RunningRing, switchboard: &Switchboard, queue: usize, finished: Finished) {
    let metrics = &switchboard.metrics.queues[queue];
    // An interrupt may be due although nothing was used: whoever served the ring before may have owed it.
    if !finished.interrupt {
        if finished.used > 0 {
            metrics.interrupts_suppressed.inc();
        }
        return;
    }
    metrics.interrupts.inc();
    if let Err(error) = running.ring.signal() {
        debug!(guest = %switchboard.name, queue = QUEUE_LABELS[queue], %error, "cannot interrupt the guest");
    }
}

fn take_burst(
    running: &mut RunningRing,
    switchboard: &mut Switchboard,
    captures: &mut Captures,
    ram: View<'_>,
    now: Instant,
) -> Result<Taken, RingError> {
    running.ring.disable_notifications(ram)?;
    let mut burst = TxBurst::begin(&mut running.ring, ram)?;
    let mut gather = Gather {
        id: None,
        slices: IoVecs::new(),
        memory: ram,
    };
    let (mut taken, mut bytes) = (0, 0);
    let mut drained = false;
    while taken < budget::TX_PACKETS && bytes < budget::TURN_BYTES && switchboard.muxer.accepts_input() {
        let Some(popped) = burst.pop() else {
            drained = true;
            break;
        };
        taken += 1;
        // It may be zeros, in part.
        if ram.is_lost() {
            break;
        }
        // A fault was counted; its chain goes back with the others.
        let Ok(packet) = popped else { continue };
        let header = Header::decode(&packet.header);
        switchboard
            .metrics
            .packet(Direction::GuestToHost, header.op, header.socket_type);
        if captures.is_on() {
            captures.record_from_guest(&header, &packet);
        }
        let continues = gather.id.is_some_and(|id| switchboard.is_data_of(id, &header));
        if !continues {
            // The muxer must know of all that was taken before it hears what comes next.
            switchboard.flush(now, &mut gather);
            gather.id = None;
            // A SHUTDOWN behind bytes that are lost would make them look as if there were none.
            if ram.is_lost() {
                break;
            }
        }
        match switchboard.muxer.handle_packet(now, &header, packet.payload_len) {
            Disposition::Consumed => {}
            Disposition::Payload { id, len, boundary } => {
                switchboard
                    .metrics
                    .payload(Direction::GuestToHost, header.socket_type, u64::from(len));
                gather.id = Some(id);
                bytes += len as usize;
                for slice in packet.payload(len) {
                    if !gather.slices.push(&slice) {
                        switchboard.flush(now, &mut gather);
                        // An empty list has room for one.
                        let _ = gather.slices.push(&slice);
                    }
                }
                if boundary.is_end() {
                    switchboard.end_message(now, &mut gather, boundary);
                }
            }
        }
        if switchboard.muxer.has_events() {
            switchboard.flush(now, &mut gather);
            gather.id = None;
            switchboard.handle_events(now);
        }
    }
    switchboard.flush(now, &mut gather);
    switchboard.handle_events(now);
    let finished = burst.finish()?;
    let kicked = std::mem::take(&mut running.kicked);
    if taken > 0 && !kicked {
        switchboard.metrics.queues[TX].kicks_suppressed.inc();
    }
    interrupt(running, switchboard, TX, finished);
    if finished.parked {
        return Ok(Taken::Parked);
    }
    if !drained {
        return Ok(match switchboard.muxer.accepts_input() {
            true => Taken::SomeLeft,
            false => Taken::NoRoom,
        });
    }
    Ok(match running.ring.enable_notifications(ram)? {
        true => Taken::SomeLeft,
        false => Taken::All,
    })
}

fn give_burst(
    running: &mut RunningRing,
    switchboard: &mut Switchboard,
    captures: &mut Captures,
    ram: View<'_>,
    unsent: &mut Option<Header>,
    now: Instant,
) -> Result<Given, RingError> {
    let mut burst = RxBurst::begin(&mut running.ring, ram)?;
    let mut all = Portion::default();
    let given = loop {
        if all.packets >= budget::RX_PACKETS || all.bytes >= budget::TURN_BYTES {
            break Given::SomeLeft;
        }
        let outgoing = match unsent.take() {
            Some(header) => Some(Outgoing::Control(header)),
            // What the muxer hands out counts as said. Before there is a buffer for it the guest may ask again from
            // the same port, and an answer to the old question would be taken for one to the new.
            // (With an IOMMU it has the VMM asked for the next buffer before it is needed.)
            None if !burst.has_buffer()? => {
                break match switchboard.muxer.has_outgoing() {
                    true => Given::NoBuffers,
                    false => Given::All,
                };
            }
            None => switchboard.muxer.poll_outgoing(now),
        };
        match outgoing {
            None => break Given::All,
            Some(Outgoing::Control(header)) => {
                // Kept until it is sent, whatever becomes of the ring: the muxer has forgotten it.
                *unsent = Some(header);
                let bytes = header.encode();
                if !burst.control(&bytes)? {
                    break Given::NoBuffers;
                }
                *unsent = None;
                if captures.is_on() {
                    captures.record(Direction::HostToGuest, &bytes, 0, |_| 0);
                }
                switchboard
                    .metrics
                    .packet(Direction::HostToGuest, header.op, header.socket_type);
                all += Portion::EMPTY_PACKET;
            }
            Some(Outgoing::Data { id, limit }) => {
                let most = limit.min(budget::CONNECTION_BYTES) as usize;
                let room = burst.reserve(most, budget::CHAINS_PER_READ);
                let room = match room {
                    Ok(0) | Err(_) => {
                        // Its turn comes again, also if the ring is mended by a translation.
                        switchboard.muxer.host_readable(id);
                        room?;
                        break Given::NoBuffers;
                    }
                    Ok(room) => room,
                };
                let most = most.min(room);
                if !switchboard.has_messages(id) {
                    all += give_data(&mut burst, switchboard, captures, ram, now, id, most)?;
                    continue;
                }
                match give_message(&mut burst, switchboard, captures, ram, now, id, most)? {
                    Some(given) => all += given,
                    None => break Given::NoBuffers,
                }
            }
        }
    };
    let finished = burst.finish()?;
    let kicked = std::mem::take(&mut running.kicked);
    if finished.used > 0 && !kicked {
        switchboard.metrics.queues[RX].kicks_suppressed.inc();
    }
    interrupt(running, switchboard, RX, finished);
    // What parked the ring may lie behind buffers that were good and were not needed: only who needed one waits.
    Ok(match given {
        Given::NoBuffers if finished.parked => Given::Parked,
        _ => given,
    })
}

/// What was given to the guest.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
struct Portion {
    packets: usize,
    /// Of payload.
    bytes: usize,
}

impl Portion {
    /// One packet without payload.
    const EMPTY_PACKET: Portion = Portion { packets: 1, bytes: 0 };
}

impl AddAssign for Portion {
    fn add_assign(&mut self, other: Portion) {
        self.packets += other.packets;
        self.bytes += other.bytes;
    }
}

/// The header of an RW packet with `len` bytes, which announces credit as of now and is counted as sent by what follows it.
fn data_header(
    switchboard: &mut Switchboard,
    id: ConnectionId,
    len: u32,
    boundary: Boundary,
) -> [u8; HEADER_LEN] {
    let socket_type = switchboard.socket_type(id);
    switchboard
        .metrics
        .packet(Direction::HostToGuest, Op::Rw as u16, socket_type);
    switchboard
        .muxer
        .data_header(id, len, boundary)
        .map_or([0; HEADER_LEN], |header| header.encode())
}

/// Fills reserved buffers with up to `most` bytes of the next message of a connection's host end. `None`: the message is empty
/// and there is no buffer for its one packet, it stays the next.
fn give_message(
    burst: &mut RxBurst<'_, '_>,
    switchboard: &mut Switchboard,
    captures: &mut Captures,
    memory: View<'_>,
    now: Instant,
    id: ConnectionId,
    most: usize,
) -> Result<Option<Portion>, RingError> {
    let (Some((message, left)), Some(wire)) = (switchboard.next_message(now, id), switchboard.wire(id))
    else {
        burst.give_back();
        return Ok(Some(Portion::default()));
    };
    if left == 0 {
        let header = data_header(switchboard, id, 0, message.boundary());
        if !burst.control(&header)? {
            switchboard.muxer.host_readable(id);
            return Ok(None);
        }
        if captures.is_on() {
            captures.record(Direction::HostToGuest, &header, 0, |_| 0);
        }
        switchboard.packet_given(now, id, 0);
        return Ok(Some(Portion::EMPTY_PACKET));
    }
    let most = most.min(left as usize);
    let boundary = |end: usize| match end < left as usize {
        true => Boundary::None,
        false => message.boundary(),
    };
    let mut at = 0;
    if wire == Wire::Packets {
        let bytes = switchboard.packet_left(id);
        let bytes = bytes.get(..most.min(bytes.len())).unwrap_or_default();
        let n = burst.fill(bytes);
        // Where it is will be gone when it is asked for.
        let kept = captures.is_on().then(|| bytes.to_vec());
        let packets = burst.commit(0, |len| {
            let header = data_header(switchboard, id, len, boundary(at + len as usize));
            if let Some(kept) = &kept {
                let rest = kept.get(at..).unwrap_or_default();
                captures.record(Direction::HostToGuest, &header, len, |mut into| {
                    into.write(rest).unwrap_or_default()
                });
            }
            at += len as usize;
            header
        })?;
        switchboard.packet_given(now, id, n as u32);
        return Ok(Some(Portion { packets, bytes: n }));
    }
    let mut list = IoVecs::new();
    let asked = burst.push_payload(&mut list, most);
    let outcome = switchboard.read(now, id, asked, |stream| read_into(&list, memory, stream));
    let ReadOutcome::Bytes(n) = outcome else {
        burst.give_back();
        return Ok(Some(Portion::default()));
    };
    switchboard.message_given(id, n);
    let bytes = n as usize;
    let packets = burst.commit(bytes, |len| {
        let header = data_header(switchboard, id, len, boundary(at + len as usize));
        if captures.is_on() {
            captures.record(Direction::HostToGuest, &header, len, |into| {
                list.copy_to(at, into)
            });
        }
        at += len as usize;
        header
    })?;
    Ok(Some(Portion { packets, bytes }))
}

/// Reads once into slices of guest memory. If that is lost, it is no fault of the socket, which keeps its bytes.
fn read_into(list: &IoVecs<'_>, memory: View<'_>, stream: &HostStream) -> io::Result<Received> {
    readv(stream.as_fd(), list).map_err(|error| match is_memory_fault(&error) {
        true => {
            memory.mark_lost();
            io::ErrorKind::WouldBlock.into()
        }
        false => error,
    })
}

/// Fills reserved buffers with up to `most` bytes of a connection's host end.
fn give_data(
    burst: &mut RxBurst<'_, '_>,
    switchboard: &mut Switchboard,
    captures: &mut Captures,
    memory: View<'_>,
    now: Instant,
    id: ConnectionId,
    most: usize,
) -> Result<Portion, RingError> {
    let header = |switchboard: &mut Switchboard, len: u32| data_header(switchboard, id, len, Boundary::None);
    if let Some(preface) = switchboard.preface(id) {
        let bytes = preface.get(..most.min(preface.len())).unwrap_or_default();
        let n = burst.fill(bytes);
        // Where it is will be gone when it is asked for.
        let kept = captures.is_on().then(|| bytes.to_vec());
        let mut at = 0;
        let packets = burst.commit(0, |len| {
            let header = header(switchboard, len);
            if let Some(kept) = &kept {
                let rest = kept.get(at..).unwrap_or_default();
                captures.record(Direction::HostToGuest, &header, len, |mut into| {
                    into.write(rest).unwrap_or_default()
                });
            }
            at += len as usize;
            header
        })?;
        switchboard.preface_sent(now, id, n as u32);
        return Ok(Portion { packets, bytes: n });
    }
    let mut list = IoVecs::new();
    let asked = burst.push_payload(&mut list, most);
    let outcome = switchboard.read(now, id, asked, |stream| read_into(&list, memory, stream));
    match outcome {
        ReadOutcome::Bytes(n) => {
            let mut at = 0;
            let bytes = n as usize;
            let packets = burst.commit(bytes, |len| {
                let header = header(switchboard, len);
                if captures.is_on() {
                    captures.record(Direction::HostToGuest, &header, len, |into| {
                        list.copy_to(at, into)
                    });
                }
                at += len as usize;
                header
            })?;
            Ok(Portion { packets, bytes })
        }
        ReadOutcome::Nothing => {
            burst.give_back();
            Ok(Portion::default())
        }
    }
}
