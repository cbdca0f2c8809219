//! Where connections meet their host ends: the muxer's events become socket calls, socket readiness becomes input of
//! the muxer. Knows nothing of rings.

mod abandon;
mod bounds;
mod events;
mod gather;
mod messages;
mod room;
mod siblings;

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mio::Registry;
use mio::event::Event as Readiness;
use rustix::io::Errno;
use tracing::{debug, warn};

use crate::config::{self, Framing};
use crate::host::dial::{DialError, Dialer};
use crate::host::listen::Incoming;
use crate::host::{HostStream, SpillBuf};
use crate::metrics::{Direction, GuestMetrics};
use crate::sys::vectored::Received;
use crate::vsock::{
    Caller, Cid, CloseReason, Connection, ConnectionId, Event, Header, Muxer, MuxerConfig, Op, Port,
    RefuseReason, ShutdownFlags, SocketType,
};

use super::flow::{Flow, Flows, HostEnd, Room};
use super::handle::{DeviceHandle, Settings};
use super::limits::{self, Admission};
use super::linger::Lingering;
use super::logbook::Logbook;
use super::messages::{Messages, Outbox, Wire};
use super::rules::{Rule, Rules};
use super::sibling::Siblings;
use super::snapshot::ConnectionSnapshot;
use super::{bounds, muxer_config};
pub(super) use gather::Gather;
use gather::Unspilled;

/// What [`Switchboard::read`] got for the guest.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum ReadOutcome {
    /// So many bytes.
    Bytes(u32),
    /// None: the connection's turn is over.
    Nothing,
}

/// The connections of one guest and their host ends.
pub(super) struct Switchboard {
    pub(super) name: Arc<str>,
    pub(super) cid: u32,
    pub(super) muxer: Muxer,
    pub(super) metrics: Arc<GuestMetrics>,
    flows: Flows,
    lingering: Lingering,
    rules: Arc<Rules>,
    dialer: Dialer,
    admission: Admission,
    siblings: Siblings,
    dial_timeout: Duration,
    registry: Registry,
    /// Of our own thread: dials are answered through it.
    handle: DeviceHandle,
    logbook: Logbook,
    /// Where messages of packet sockets are received: room for the longest, which no connection keeps.
    packet_room: Vec<u8>,
    /// New inbound connections are refused.
    draining: bool,
}

/// What a switchboard is made from.
pub(super) struct SwitchboardParts {
    pub(super) name: Arc<str>,
    pub(super) cid: u32,
    pub(super) muxer: Muxer,
    pub(super) metrics: Arc<GuestMetrics>,
    pub(super) rules: Arc<Rules>,
    pub(super) dialer: Dialer,
    pub(super) admission: Admission,
    pub(super) siblings: Siblings,
    pub(super) dial_timeout: Duration,
    pub(super) max_lingering: usize,
    pub(super) registry: Registry,
    pub(super) handle: DeviceHandle,
}

impl Switchboard {
    pub(super) fn new(parts: SwitchboardParts) -> Switchboard {
        Switchboard {
            name: parts.name,
            cid: parts.cid,
            muxer: parts.muxer,
            metrics: parts.metrics,
            flows: Flows::default(),
            lingering: Lingering::new(parts.max_lingering),
            rules: parts.rules,
            dialer: parts.dialer,
            admission: parts.admission,
            siblings: parts.siblings,
            dial_timeout: parts.dial_timeout,
            registry: parts.registry,
            handle: parts.handle,
            logbook: Logbook::default(),
            packet_room: Vec::new(),
            draining: false,
        }
    }

    /// Connections whose host end is open or being opened, those that linger left out.
    pub(super) fn open(&self) -> usize {
        self.flows.len()
    }

    /// Bytes of memory that buffers have.
    pub(super) fn buffer_memory(&self) -> u64 {
        self.admission.memory()
    }

    /// When [`Switchboard::handle_timeout`] wants to be called.
    pub(super) fn next_timeout(&self) -> Option<Instant> {
        match (self.muxer.poll_timeout(), self.lingering.next_timeout()) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        }
    }

    pub(super) fn handle_timeout(&mut self, now: Instant) {
        self.lingering.handle_timeout(now);
        self.muxer.handle_timeout(now);
        self.handle_events(now);
    }

    /// A socket is ready.
    pub(super) fn handle_ready(&mut self, now: Instant, slot: usize, ready: &Readiness) {
        let Some(id) = self.flows.at(slot) else { return };
        let Some(flow) = self.flows.get_mut(id) else {
            return;
        };
        let ended = ready.is_read_closed() || ready.is_error();
        // recv() ends at the mark of urgent data, behind which there may be more.
        flow.read_on |= ended || ready.is_priority();
        flow.hung_up |= ready.is_error() || ready.is_write_closed();
        if !flow.established && flow.hung_up && (ready.is_error() || !flow.left_bytes()) {
            // The client of an inbound rule hung up before the guest answered, and left nothing to be delivered.
            self.muxer.host_failed(id, CloseReason::PeerRst);
        } else {
            if ready.is_readable() || ended {
                self.muxer.host_readable(id);
            }
            if ready.is_writable() || ready.is_write_closed() {
                self.flush_spill(now, id);
            }
            self.end_if_deaf(now, id);
        }
        self.handle_events(now);
    }

    /// A lingering socket is ready.
    pub(super) fn handle_lingering_ready(&mut self, index: usize) {
        self.lingering.handle_ready(index);
    }

    /// A client of an inbound rule wants a guest port.
    pub(super) fn handle_incoming(&mut self, now: Instant, rule: Arc<Rule>, incoming: Incoming) {
        if self.draining {
            self.refuse_incoming(&rule, incoming, RefuseReason::Draining);
            return;
        }
        let caller = Caller {
            guest_port: Port(incoming.port),
            socket_type: match incoming.socket_type {
                config::SocketType::Stream => SocketType::Stream,
                config::SocketType::Seqpacket => SocketType::Seqpacket,
            },
            address: None,
            waits: incoming.wait_for_guest,
        };
        let (id, place) = match self.let_in(now, &rule, caller) {
            Ok(let_in) => let_in,
            Err(reason) => {
                if limits::is_bound(reason) {
                    self.log_bound(now, &rule, incoming.port, reason);
                }
                self.refuse_incoming(&rule, incoming, reason);
                return;
            }
        };
        let host_port = self.muxer.connection(id).map_or(0, |c| c.key().peer_port.0);
        let peer = incoming.peer;
        let mut flow = self.new_flow(id, rule, incoming.port, host_port, now, peer);
        flow.place = Some(place);
        flow.preface = incoming.preface;
        flow.messages = match caller.socket_type {
            SocketType::Stream => None,
            SocketType::Seqpacket => Some(Box::new(Messages::new(wire(incoming.framing)))),
        };
        flow.wants_ok = incoming.wants_ok;
        if let Err(error) = self.register(&incoming.stream, id, flow.room) {
            warn!(guest = %self.name, %error, "cannot watch an inbound client's socket");
            self.flows.insert(flow);
            self.muxer.refused(id, RefuseReason::Limit);
        } else {
            let has_preface = !flow.preface.is_empty();
            flow.end = HostEnd::Connected(incoming.stream);
            self.flows.insert(flow);
            if has_preface {
                self.muxer.host_readable(id);
            }
        }
        self.handle_events(now);
    }

    /// A dial that had to wait has ended.
    pub(super) fn handle_dialed(
        &mut self,
        now: Instant,
        token: u64,
        result: Result<HostStream, DialError>,
        took: Duration,
    ) {
        // The connection may have ended while its target was being reached; then the socket closes here.
        if let Some(id) = self.dialing(token) {
            self.dialed(now, id, result, took);
            self.handle_events(now);
        }
    }

    /// A dial ended. What the muxer has to say to that is among its events.
    fn dialed(
        &mut self,
        now: Instant,
        id: ConnectionId,
        result: Result<HostStream, DialError>,
        took: Duration,
    ) {
        let Some(flow) = self.flows.get(id) else { return };
        let rule = Arc::clone(&flow.rule);
        let (port, room) = (flow.host_port, flow.room);
        let outcome = result
            .map_err(|error| (refuse_reason(&error), error.to_string()))
            .and_then(|stream| match self.register(&stream, id, room) {
                Ok(()) => Ok(stream),
                Err(error) => Err((RefuseReason::Limit, format!("cannot watch the socket: {error}"))),
            });
        let rule_metrics = rule.metrics();
        match outcome {
            Ok(mut stream) => {
                if let Some(histogram) = &rule_metrics.dial_duration {
                    histogram.observe(took.as_secs_f64());
                }
                self.logbook.target_reached(rule.id);
                if let Some(flow) = self.flows.get_mut(id) {
                    if let Some(descriptor) = flow.place.as_mut().and_then(|place| place.descriptor.take()) {
                        stream.hold(descriptor);
                    }
                    flow.peer = stream.peer().to_owned();
                    flow.end = HostEnd::Connected(stream);
                }
                if self.muxer.connected(now, id) {
                    self.established(now, id);
                }
            }
            Err((reason, error)) => {
                if let Some(failures) = &rule_metrics.dial_failures {
                    failures.inc();
                }
                let (guest, name) = (&*self.name, rule.name());
                if self.logbook.target_failed(now, rule.id) {
                    warn!(
                        guest,
                        rule = name,
                        port,
                        reason = reason.label(),
                        error,
                        "target of a rule cannot be reached"
                    );
                } else {
                    debug!(
                        guest,
                        rule = name,
                        port,
                        reason = reason.label(),
                        error,
                        "dial failed"
                    );
                }
                self.muxer.refused(id, reason);
            }
        }
    }

    /// Does what the muxer's events ask for, until there are none.
    pub(super) fn handle_events(&mut self, now: Instant) {
        while let Some(event) = self.muxer.poll_event() {
            match event {
                Event::Dial { id, key, socket_type } => self.dial(now, id, key, socket_type),
                Event::Accepted { id, key } => self.accepted(now, id, key),
                Event::Refused { id, reason } => self.forget_refused(id, reason),
                Event::LimitReached { key } => self.limit_reached(now, key),
                Event::ShutdownHost { id, flags } => self.shutdown_host(now, id, flags),
                Event::Closed { id, reason, abort } => self.close(now, id, reason, abort),
                Event::Misbehaved { kind, key } => self.misbehaved(kind, key),
                Event::CreditStalled { .. } => {
                    self.metrics.credit_stalls[Direction::HostToGuest as usize].inc();
                }
                Event::CreditResumed { waited, .. } => {
                    self.metrics.credit_stall_seconds[Direction::HostToGuest as usize]
                        .inc_by(waited.as_secs_f64());
                }
            }
        }
    }

    /// Whether a packet goes on with the payload of `id`, so that both may leave with one system call.
    pub(super) fn is_data_of(&self, id: ConnectionId, header: &Header) -> bool {
        header.op == Op::Rw as u16
            && self.muxer.connection(id).is_some_and(|connection| {
                let key = connection.key();
                key.guest_port == header.src_port
                    && key.peer_port == header.dst_port
                    && key.peer_cid == header.dst_cid
            })
    }

    /// Writes gathered payload to its socket; what the socket refuses goes to the flow's spill buffer. The slices may
    /// be reused when this returns.
    pub(super) fn flush(&mut self, now: Instant, gather: &mut Gather<'_>) {
        let Some(id) = gather.id else { return };
        let bytes = gather.slices.bytes();
        if bytes > 0 && self.has_messages(id) {
            self.keep_of_message(now, id, gather, bytes);
        } else if bytes > 0 {
            self.send_to_host(now, id, gather, bytes);
        }
        gather.slices.clear();
    }

    fn send_to_host(&mut self, now: Instant, id: ConnectionId, gather: &Gather<'_>, bytes: usize) {
        let Some(flow) = self.flows.get_mut(id) else {
            return;
        };
        flow.bytes_from_guest += bytes as u64;
        // The rest of a packet whose beginning was lost must not follow it.
        if flow.write_failed {
            return;
        }
        let HostEnd::Connected(stream) = &flow.end else {
            return;
        };
        let written = if flow.spill.is_empty() {
            match gather.write_to(stream) {
                Ok(written) => written,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
                Err(error) => {
                    self.write_failed(now, id, &error);
                    return;
                }
            }
        } else {
            0
        };
        let rest = bytes - written;
        if rest > 0 {
            if let Err(full) = flow.make_room(rest) {
                count_written(&flow.rule, written);
                self.wrote(now, id, written);
                self.out_of_memory(now, id, full);
                return;
            }
            // Credit bounds what is held (invariant 1 of the law), so this fits.
            let spilled = gather.keep_in(&mut flow.spill, written, rest);
            let direction = Direction::GuestToHost as usize;
            match spilled {
                Ok(()) => {
                    self.metrics.buffered_bytes[direction].add(rest as i64);
                    self.metrics.backpressure_pauses[direction].inc();
                }
                Err(Unspilled::MemoryLost) => {}
                Err(Unspilled::Full(error)) => {
                    warn!(guest = %self.name, %error, "the spill buffer is smaller than the credit");
                    self.muxer.host_failed(id, CloseReason::Error);
                    return;
                }
            }
        }
        count_written(&flow.rule, written);
        if rest > 0 {
            self.await_room(id);
        }
        self.wrote(now, id, written);
    }

    fn wrote(&mut self, now: Instant, id: ConnectionId, written: usize) {
        if written > 0 {
            self.muxer.host_wrote(now, id, written as u32);
        }
    }

    fn flush_spill(&mut self, now: Instant, id: ConnectionId) {
        if self.has_messages(id) {
            self.flush_messages(now, id);
            return;
        }
        let Some(flow) = self.flows.get_mut(id) else {
            return;
        };
        let HostEnd::Connected(stream) = &flow.end else {
            return;
        };
        if flow.spill.is_empty() {
            return;
        }
        let flush = flow.spill.write_to(stream);
        flow.settle();
        count_written(&flow.rule, flush.written);
        self.metrics.buffered_bytes[Direction::GuestToHost as usize].sub(flush.written as i64);
        self.wrote(now, id, flush.written);
        if let Some(error) = flush.error {
            self.write_failed(now, id, &error);
        }
    }

    /// A socket that is gone and whose bytes the guest does not want will never be read or written again: nobody else
    /// would notice its end. Nor that a guest at the other end reads no more, before ours writes.
    fn end_if_deaf(&mut self, now: Instant, id: ConnectionId) {
        let Some(flow) = self.flows.get(id) else { return };
        let unwanted = || {
            let connection = self.muxer.connection(id);
            connection.is_some_and(|connection| connection.guest_shut().contains(ShutdownFlags::RCV))
        };
        if flow.is_unheard() {
            self.reads_no_more(now, id);
        } else if flow.hung_up && unwanted() {
            self.takes_no_more(now, id);
        }
    }

    /// The guest at the other end has said that it reads no more.
    fn reads_no_more(&mut self, now: Instant, id: ConnectionId) {
        self.forget_held(id);
        self.muxer.host_reads_no_more(now, id);
    }

    fn write_failed(&mut self, now: Instant, id: ConnectionId, error: &io::Error) {
        debug!(guest = %self.name, %error, "a host socket takes no more");
        self.takes_no_more(now, id);
        // Its last bytes, then the end of file or the error, are read in the usual way.
        self.muxer.host_readable(id);
    }

    fn takes_no_more(&mut self, now: Instant, id: ConnectionId) {
        self.forget_held(id);
        self.muxer.host_write_failed(now, id);
    }

    /// Forgets what the socket has not taken.
    fn forget_held(&mut self, id: ConnectionId) {
        let empty = self.spill_buffer(id);
        if let Some(flow) = self.flows.get_mut(id) {
            let lost = std::mem::replace(&mut flow.spill, empty).len();
            flow.settle();
            self.metrics.buffered_bytes[Direction::GuestToHost as usize].sub(lost as i64);
            if let Some(messages) = &mut flow.messages {
                messages.outbox = Outbox::default();
            }
            flow.read_on = true;
            flow.write_failed = true;
        }
    }

    /// Bytes of a CONNECT preface still to be sent, if any: they go before the socket's.
    pub(super) fn preface(&self, id: ConnectionId) -> Option<&[u8]> {
        self.flows
            .get(id)
            .map(Flow::preface_left)
            .filter(|left| !left.is_empty())
    }

    /// `n` bytes of the preface went to the guest.
    pub(super) fn preface_sent(&mut self, now: Instant, id: ConnectionId, n: u32) {
        let Some(flow) = self.flows.get_mut(id) else {
            return;
        };
        flow.preface_sent += n as usize;
        flow.bytes_to_guest += u64::from(n);
        let direction = Direction::HostToGuest;
        flow.rule.metrics().upstream_bytes[direction as usize].inc_by(u64::from(n));
        self.metrics
            .payload(direction, SocketType::Stream as u16, u64::from(n));
        if flow.preface_left().is_empty() {
            flow.preface = Vec::new();
            flow.preface_sent = 0;
        }
        self.muxer.host_read(now, id, n, true);
    }

    /// Reads from a flow's socket into guest memory through `read`, which is given the socket.
    pub(super) fn read(
        &mut self,
        now: Instant,
        id: ConnectionId,
        asked: usize,
        read: impl FnOnce(&HostStream) -> io::Result<Received>,
    ) -> ReadOutcome {
        let Some(flow) = self.flows.get_mut(id) else {
            return ReadOutcome::Nothing;
        };
        let HostEnd::Connected(stream) = &flow.end else {
            return ReadOutcome::Nothing;
        };
        match read(stream) {
            Ok(Received { bytes: 0, .. }) => self.messages_ended(now, id),
            Ok(Received { bytes: n, cut_short }) => {
                flow.bytes_to_guest += n as u64;
                // A short read of a stream socket means that it is drained, and its next bytes will be an edge
                // (epoll(7)), but for a read that was cut short. An end of file that is there already will be none.
                let more = n == asked || cut_short || flow.read_on;
                flow.rule.metrics().upstream_bytes[Direction::HostToGuest as usize].inc_by(n as u64);
                self.metrics
                    .payload(Direction::HostToGuest, self.socket_type(id), n as u64);
                self.muxer.host_read(now, id, n as u32, more);
                return ReadOutcome::Bytes(n as u32);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.muxer.host_drained(id),
            Err(error) => {
                debug!(guest = %self.name, %error, "a host socket failed");
                self.muxer.host_failed(id, CloseReason::PeerRst);
            }
        }
        ReadOutcome::Nothing
    }

    /// The socket type of a connection, as headers have it.
    pub(super) fn socket_type(&self, id: ConnectionId) -> u16 {
        self.muxer
            .connection(id)
            .map_or(SocketType::Stream, |connection| connection.socket_type()) as u16
    }

    /// The VMM is gone, and with it whatever its guest was told about.
    pub(super) fn session_ended(&mut self, now: Instant) {
        self.reset(now);
        self.logbook.forget();
    }

    /// The guest has lost its connections: so do their host ends.
    pub(super) fn reset(&mut self, now: Instant) {
        self.muxer.reset();
        self.handle_events(now);
    }

    /// Other rules and limits, for connections that are asked for from now on. Those that there are keep the rule that let them
    /// in, with its name and its counters, and the buffer that they were promised.
    pub(super) fn reconfigure(&mut self, settings: Settings) {
        let Settings { limits, rules } = settings;
        rules.come_into_force();
        self.rules = rules;
        self.admission.set_bounds(bounds(&limits));
        self.muxer.reconfigure(muxer_config(self.cid, &limits));
        self.dial_timeout = limits.connect_timeout;
        self.lingering.set_most(limits.connections);
        self.metrics.set_limits(limits.connections, limits.memory);
        self.logbook.reconfigured();
        self.draining = false;
    }

    /// The CID of the guest in the session that begins.
    pub(super) fn set_cid(&mut self, cid: u32) {
        self.cid = cid;
        let config = MuxerConfig {
            guest_cid: Cid(u64::from(cid)),
            ..self.muxer.config().clone()
        };
        self.muxer.reconfigure(config);
    }

    /// What is open may go on, what is new is refused, and so is a client that still waits for its guest: it has nothing to
    /// lose, and might hold the drain up to its end.
    pub(super) fn drain(&mut self, now: Instant) {
        self.draining = true;
        self.muxer.stop_waiting(RefuseReason::Draining);
        self.handle_events(now);
    }

    /// Ends all connections at the end of the drain period.
    pub(super) fn close_all(&mut self, now: Instant) {
        self.muxer.close_all(CloseReason::Drain, RefuseReason::Draining);
        self.handle_events(now);
    }

    /// The first `most` connections, for people.
    pub(super) fn connections(&self, now: Instant, most: usize) -> Vec<ConnectionSnapshot> {
        self.flows
            .iter()
            .take(most)
            .map(|flow| self.describe(now, flow))
            .collect()
    }

    fn describe(&self, now: Instant, flow: &Flow) -> ConnectionSnapshot {
        let connection = self.muxer.connection(flow.id);
        ConnectionSnapshot {
            rule: flow.rule.name().to_owned(),
            opened_by: flow.rule.opened_by.label(),
            guest_port: flow.guest_port,
            host_port: flow.host_port,
            peer: flow.peer.clone(),
            state: connection.map_or("gone", |c| c.state().label()),
            bytes_from_guest: flow.bytes_from_guest,
            bytes_to_guest: flow.bytes_to_guest,
            buffered: flow.spill.len(),
            credit: connection.map_or(0, |c| c.room()),
            age_seconds: now.saturating_duration_since(flow.since).as_secs_f64(),
        }
    }

    fn new_flow(
        &self,
        id: ConnectionId,
        rule: Arc<Rule>,
        guest_port: u32,
        host_port: u32,
        now: Instant,
        peer: String,
    ) -> Flow {
        Flow {
            id,
            rule,
            end: HostEnd::Dialing { _task: None },
            spill: self.spill_buffer(id),
            account: self.admission.account(),
            place: None,
            messages: None,
            asked_by: None,
            ears: None,
            preface: Vec::new(),
            preface_sent: 0,
            wants_ok: false,
            read_on: false,
            hung_up: false,
            write_failed: false,
            eof: false,
            since: now,
            established: false,
            bytes_from_guest: 0,
            bytes_to_guest: 0,
            guest_port,
            host_port,
            peer,
            room: Room::Assumed,
        }
    }

    /// The connection that a dial was begun for under this name, if it is still there.
    fn dialing(&self, token: u64) -> Option<ConnectionId> {
        self.flows
            .at(token as u32 as usize)
            .filter(|id| id.token() == token)
    }

    /// An empty buffer for as much as the connection's guest was promised, which later connections may not be.
    fn spill_buffer(&self, id: ConnectionId) -> SpillBuf {
        let promised = self.muxer.connection(id).map_or(0, Connection::buf_alloc);
        SpillBuf::new(promised as usize)
    }
}

fn count_written(rule: &Rule, bytes: usize) {
    rule.metrics().upstream_bytes[Direction::GuestToHost as usize].inc_by(bytes as u64);
}

/// How messages travel on a socket that is dialled or accepted.
fn wire(framing: Option<Framing>) -> Wire {
    match framing {
        None => Wire::Packets,
        Some(Framing { max_message }) => Wire::Frames {
            max_message,
            marks_records: false,
        },
    }
}

fn refuse_reason(error: &DialError) -> RefuseReason {
    match error {
        DialError::Refused { .. } => RefuseReason::DialRefused,
        DialError::TimedOut { .. } => RefuseReason::DialTimeout,
        DialError::Resolve { .. } => RefuseReason::Dns,
        DialError::Unreachable { .. } => RefuseReason::Unreachable,
        DialError::WrongType { .. } => RefuseReason::UnsupportedType,
        DialError::Resources { source, .. } => match Errno::from_io_error(source) {
            Some(Errno::MFILE | Errno::NFILE) => RefuseReason::Descriptors,
            _ => RefuseReason::Limit,
        },
    }
}
