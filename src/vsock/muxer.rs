//! All connections of one guest.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use slab::Slab;

use super::backlog::Backlog;
use super::connection::{Connection, ConnectionKey, Origin, Owed, State};
use super::header::{Cid, Header, Op, Port, ShutdownFlags, SocketType};
use super::misbehavior::Misbehavior;
use super::reason::{CloseReason, RefuseReason};
use super::timer::Deadlines;

/// How long a guest may take to answer our SHUTDOWN of both directions with RST; Linux waits as long for us
/// (VSOCK_CLOSE_TIMEOUT, net/vmw_vsock/virtio_transport_common.c).
const CLOSE_TIMEOUT: Duration = Duration::from_secs(8);

/// How long a host socket may take nothing of what a guest sent before it closed.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(30);

/// Host-side ports of connections that the host side asks for: `[2^30, 2^31)`, far from the ports of services.
const LOCAL_PORTS: std::ops::Range<u32> = 1 << 30..1 << 31;

/// Names one connection for its whole life and never another one.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct ConnectionId {
    slot: u32,
    generation: u32,
}

impl ConnectionId {
    /// A small index that no other live connection has: where the caller keeps what belongs to it.
    pub fn slot(self) -> usize {
        self.slot as usize
    }

    /// A number that no other connection of this muxer has had (for 2^32 connections).
    pub fn token(self) -> u64 {
        u64::from(self.generation) << 32 | u64::from(self.slot)
    }
}

/// What a muxer is told once.
#[derive(Clone, Debug)]
pub struct MuxerConfig {
    /// The guest's context identifier.
    pub guest_cid: Cid,
    /// Receive buffer promised for each connection, in bytes.
    pub buf_alloc: u32,
    /// Connections at once, in whatever state.
    pub max_connections: usize,
    /// Time for [`Event::Dial`] to be answered.
    pub connect_timeout: Duration,
    /// Time for the guest to answer REQUEST.
    pub guest_timeout: Duration,
    /// An established connection on which nothing moves for so long is ended; zero means never.
    pub idle_timeout: Duration,
}

/// What becomes of a packet's payload.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Disposition {
    /// The packet is done with.
    Consumed,
    /// The first `len` bytes of the payload go to the host end of `id`; [`Muxer::host_wrote`] hears of them.
    Payload {
        /// The connection.
        id: ConnectionId,
        /// Bytes, never 0, never more than the packet holds.
        len: u32,
    },
}

/// A packet for the guest.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Outgoing {
    /// A packet without payload, complete.
    Control(Header),
    /// Up to `limit` bytes of this connection's host end, each packet with a [`Muxer::data_header`].
    Data {
        /// The connection.
        id: ConnectionId,
        /// The guest's credit in bytes, never 0.
        limit: u32,
    },
}

/// What the caller has to do or to know.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Event {
    /// Reach the target for this port, then [`Muxer::connected`] or [`Muxer::refused`].
    Dial {
        /// The new connection.
        id: ConnectionId,
        /// Whom the guest wants.
        key: ConnectionKey,
    },
    /// The guest accepted the connection that [`Muxer::connect`] asked for.
    Accepted {
        /// The connection.
        id: ConnectionId,
        /// Its flow; `peer_port` is the host-side port.
        key: ConnectionKey,
    },
    /// The connection did not come to be: forget it, stop its dial.
    Refused {
        /// The connection.
        id: ConnectionId,
        /// Why.
        reason: RefuseReason,
    },
    /// A REQUEST was answered with RST because there are too many connections.
    LimitReached {
        /// Whom the guest wanted.
        key: ConnectionKey,
    },
    /// Pass on to the host end what the guest will do no more; all it sent before has been taken.
    ShutdownHost {
        /// The connection.
        id: ConnectionId,
        /// SEND: it will get no more bytes. RCV: its bytes are no longer wanted.
        flags: ShutdownFlags,
    },
    /// The connection is over for the host end: close it, at once when `abort` is set.
    Closed {
        /// The connection.
        id: ConnectionId,
        /// Why.
        reason: CloseReason,
        /// Whether the peer should see a reset rather than an orderly end.
        abort: bool,
    },
    /// The guest broke the protocol.
    Misbehaved {
        /// How.
        kind: Misbehavior,
        /// On which flow.
        key: ConnectionKey,
    },
    /// There are bytes for the guest and it gives no credit.
    CreditStalled {
        /// The connection.
        id: ConnectionId,
    },
    /// The guest gave credit again.
    CreditResumed {
        /// The connection.
        id: ConnectionId,
        /// How long it took.
        waited: Duration,
    },
}

/// No host-side port is left for a connection, or the limit of connections is reached.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NoRoom;

#[derive(Debug)]
struct Entry {
    generation: u32,
    connection: Connection,
}

/// The connections of one guest. See [`crate::vsock`] for the theory of operation.
///
/// Four kinds of method: `handle_*`, `host_*`, [`Muxer::connected`] and [`Muxer::refused`] take input;
/// [`Muxer::connect`], [`Muxer::reset`] and [`Muxer::close_all`] change it; `poll_*` give output; the rest look. After
/// any input, poll events until there are none; poll outgoing packets while the guest has buffers.
#[derive(Debug)]
pub struct Muxer {
    config: MuxerConfig,
    entries: Slab<Entry>,
    keys: HashMap<ConnectionKey, ConnectionId>,
    backlog: Backlog,
    deadlines: Deadlines,
    /// Bounded by the inputs since events were last polled: a few for each.
    events: VecDeque<Event>,
    next_local_port: u32,
    next_generation: u32,
}

impl Muxer {
    /// A muxer without connections.
    pub fn new(config: MuxerConfig) -> Muxer {
        Muxer {
            config,
            entries: Slab::new(),
            keys: HashMap::new(),
            backlog: Backlog::default(),
            deadlines: Deadlines::default(),
            events: VecDeque::new(),
            next_local_port: LOCAL_PORTS.start,
            next_generation: 0,
        }
    }

    /// Whether another packet of the guest may be taken. Not while the resets that it has coming wait for buffers it
    /// does not post: then its packets wait in its own ring (invariant 6).
    pub fn accepts_input(&self) -> bool {
        self.backlog.has_room_for_stray()
    }

    /// Takes a packet of the guest. `available` is how many payload bytes follow the header in its chain.
    pub fn handle_packet(&mut self, now: Instant, header: &Header, available: u32) -> Disposition {
        let key = ConnectionKey {
            guest_port: header.src_port,
            peer_cid: header.dst_cid,
            peer_port: header.dst_port,
        };
        if header.src_cid != self.config.guest_cid {
            self.misbehaved(Misbehavior::WrongSourceCid, key);
            return Disposition::Consumed;
        }
        let op = Op::from_wire(header.op);
        if header.len != 0 && op != Some(Op::Rw) && op.is_some() {
            self.misbehaved(Misbehavior::UnexpectedPayload, key);
        }
        let known = self.keys.get(&key).copied();
        // A finished flow whose RST still waits for a buffer: the guest may use its ports again, and the old RST
        // would kill the new connection.
        let known = match known {
            Some(id) if op == Some(Op::Request) && self.state(id) == Some(State::Dead) => {
                self.remove(id);
                None
            }
            known => known,
        };
        match known {
            Some(id) => self.handle_known(now, id, key, op, header, available),
            None => {
                self.handle_unknown(now, key, op, header);
                Disposition::Consumed
            }
        }
    }

    /// The target of [`Event::Dial`] was reached. False if the connection is no longer wanted.
    pub fn connected(&mut self, now: Instant, id: ConnectionId) -> bool {
        let Some(connection) = self.connection_mut(id) else {
            return false;
        };
        if connection.state != State::Dialing {
            return false;
        }
        connection.state = State::Established;
        connection.last_activity = now;
        self.owe(id, Owed::RESPONSE);
        self.arm_idle(now, id);
        true
    }

    /// A connection that is not established yet will not be: its target was not reached, or its client left.
    pub fn refused(&mut self, id: ConnectionId, reason: RefuseReason) {
        let Some(connection) = self.connection(id) else {
            return;
        };
        if matches!(connection.state, State::Dialing | State::Requested) {
            self.events.push_back(Event::Refused { id, reason });
            self.bury(id);
        }
    }

    /// The host end has, or may have, bytes to read.
    pub fn host_readable(&mut self, id: ConnectionId) {
        if let Some(connection) = self.connection_mut(id) {
            connection.readable = true;
            self.enqueue_data(id);
        }
    }

    /// The host end has no bytes now; [`Muxer::host_readable`] will tell when it has.
    pub fn host_drained(&mut self, id: ConnectionId) {
        if let Some(connection) = self.connection_mut(id) {
            connection.readable = false;
        }
    }

    /// `n` bytes of the host end went to the guest. `more` tells whether there may be others.
    pub fn host_read(&mut self, now: Instant, id: ConnectionId, n: u32, more: bool) {
        if let Some(connection) = self.connection_mut(id) {
            connection.send.sent(n);
            connection.readable = more;
            connection.last_activity = now;
            self.enqueue_data(id);
        }
    }

    /// The host end took `n` of the bytes that [`Disposition::Payload`] gave it.
    pub fn host_wrote(&mut self, now: Instant, id: ConnectionId, n: u32) {
        let Some(connection) = self.connection_mut(id) else {
            return;
        };
        connection.recv.forwarded(n);
        connection.last_activity = now;
        let empty = connection.recv.held() == 0;
        match connection.state {
            State::Draining if empty => self.drained(id),
            State::Draining => self.set_deadline(id, now + DRAIN_TIMEOUT),
            State::Established => {
                if connection.recv.update_owed() {
                    self.owe(id, Owed::CREDIT_UPDATE);
                }
                if empty {
                    self.pass_on_shutdown(now, id);
                }
            }
            _ => {}
        }
    }

    /// The host end has no more bytes for the guest (end of file). It may still take some.
    pub fn host_eof(&mut self, now: Instant, id: ConnectionId) {
        let Some(connection) = self.connection_mut(id) else {
            return;
        };
        connection.readable = false;
        let told = connection.host_shut.contains(ShutdownFlags::SEND);
        match connection.state {
            // A client that said nothing and is done before the guest answered: told when it has.
            State::Requested => connection.host_shut = connection.host_shut.with(ShutdownFlags::SEND),
            State::Established if !told => {
                connection.host_shut = connection.host_shut.with(ShutdownFlags::SEND);
                self.owe(id, Owed::SHUTDOWN);
                self.finish_if_over(now, id, CloseReason::PeerFin);
            }
            _ => {}
        }
    }

    /// The host end takes no more bytes (EPIPE, ECONNRESET). What it has not taken is lost; it may still have some
    /// for the guest.
    pub fn host_write_failed(&mut self, now: Instant, id: ConnectionId) {
        let Some(connection) = self.connection_mut(id) else {
            return;
        };
        let held = connection.recv.held();
        connection.recv.forwarded(held);
        connection.host_write_failed = true;
        match connection.state {
            State::Draining => {
                connection.close_reason = CloseReason::PeerRst;
                self.drained(id);
            }
            State::Requested => connection.host_shut = connection.host_shut.with(ShutdownFlags::RCV),
            State::Established if !connection.host_shut.contains(ShutdownFlags::RCV) => {
                connection.host_shut = connection.host_shut.with(ShutdownFlags::RCV);
                self.owe(id, Owed::SHUTDOWN);
                self.finish_if_over(now, id, CloseReason::PeerRst);
            }
            _ => {}
        }
    }

    /// The host end failed (ECONNRESET, ETIMEDOUT on reading).
    pub fn host_failed(&mut self, id: ConnectionId, reason: CloseReason) {
        let Some(connection) = self.connection(id) else {
            return;
        };
        match connection.state {
            State::Dialing | State::Requested => self.refused(id, RefuseReason::ClientGone),
            State::Established | State::Draining => {
                self.events.push_back(Event::Closed {
                    id,
                    reason,
                    abort: true,
                });
                self.bury(id);
            }
            State::Closing | State::Dead => {}
        }
    }

    /// Ends what has taken too long.
    pub fn handle_timeout(&mut self, now: Instant) {
        while let Some(id) = self.deadlines.pop_due(now) {
            let Some(connection) = self.connection_mut(id) else {
                continue;
            };
            connection.armed = None;
            match connection.deadline {
                Some(deadline) if deadline > now => self.set_deadline(id, deadline),
                Some(_) => self.expire(now, id),
                None => {}
            }
        }
    }

    /// Asks the guest for a connection to `guest_port` for a client of the host side. [`Event::Accepted`] or
    /// [`Event::Refused`] follows.
    pub fn connect(&mut self, now: Instant, guest_port: Port) -> Result<ConnectionId, NoRoom> {
        if self.entries.len() >= self.config.max_connections {
            return Err(NoRoom);
        }
        // There are more ports than connections may ever be, so this ends.
        let key = loop {
            let peer_port = Port(self.next_local_port);
            self.next_local_port += 1;
            if !LOCAL_PORTS.contains(&self.next_local_port) {
                self.next_local_port = LOCAL_PORTS.start;
            }
            let key = ConnectionKey {
                guest_port,
                peer_cid: Cid::HOST,
                peer_port,
            };
            if !self.keys.contains_key(&key) {
                break key;
            }
        };
        let id = self.insert(now, key, Origin::Host, self.config.guest_timeout);
        self.owe(id, Owed::REQUEST);
        Ok(id)
    }

    /// The guest lost its memory of all connections (its rings were stopped): all of them end, without a packet.
    pub fn reset(&mut self) {
        // What lives on is silent: it will owe nothing.
        self.backlog.clear();
        let ids: Vec<ConnectionId> = self.ids().collect();
        for id in ids {
            let Some(connection) = self.connection(id) else {
                continue;
            };
            match connection.state {
                State::Dialing | State::Requested => {
                    self.events.push_back(Event::Refused {
                        id,
                        reason: RefuseReason::SessionLost,
                    });
                    self.remove(id);
                }
                State::Established => {
                    self.events.push_back(Event::Closed {
                        id,
                        reason: CloseReason::SessionLost,
                        abort: true,
                    });
                    self.remove(id);
                }
                // The guest had finished with it; what it sent is still delivered.
                State::Draining => self.silence(id),
                State::Closing | State::Dead => self.remove(id),
            }
        }
    }

    /// Ends every connection with RST to the guest.
    pub fn close_all(&mut self, reason: CloseReason, refusal: RefuseReason) {
        let ids: Vec<ConnectionId> = self.ids().collect();
        for id in ids {
            let Some(connection) = self.connection(id) else {
                continue;
            };
            match connection.state {
                State::Dialing | State::Requested => self.refused(id, refusal),
                State::Established | State::Draining => {
                    self.events.push_back(Event::Closed {
                        id,
                        reason,
                        abort: false,
                    });
                    self.bury(id);
                }
                State::Closing => self.bury(id),
                State::Dead => {}
            }
        }
    }

    /// The next packet for the guest. The caller has a buffer for it.
    pub fn poll_outgoing(&mut self, now: Instant) -> Option<Outgoing> {
        if let Some(header) = self.backlog.pop_stray() {
            return Some(Outgoing::Control(header));
        }
        while let Some(id) = self.backlog.pop_reply() {
            let guest_cid = self.config.guest_cid;
            let Some(connection) = self.connection_mut(id) else {
                continue;
            };
            connection.in_replies = false;
            let Some(header) = connection.next_reply(guest_cid) else {
                continue;
            };
            if !connection.owed.is_empty() {
                connection.in_replies = true;
                self.backlog.push_reply(id);
            } else if connection.state == State::Dead {
                self.remove(id);
            }
            return Some(Outgoing::Control(header));
        }
        while let Some(id) = self.backlog.pop_data() {
            let Some(connection) = self.connection_mut(id) else {
                continue;
            };
            connection.in_data = false;
            if !connection.may_send() {
                continue;
            }
            match connection.send.room() {
                0 => self.stall(now, id),
                limit => return Some(Outgoing::Data { id, limit }),
            }
            // The stall owes a CREDIT_REQUEST, which goes before other connections' data.
            if let Some(Outgoing::Control(header)) = self.poll_reply_of(id) {
                return Some(Outgoing::Control(header));
            }
        }
        None
    }

    /// Whether [`Muxer::poll_outgoing`] may have something.
    pub fn has_outgoing(&self) -> bool {
        !self.backlog.is_empty()
    }

    /// The next thing to do or to know.
    pub fn poll_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// Whether [`Muxer::poll_event`] has something.
    pub fn has_events(&self) -> bool {
        !self.events.is_empty()
    }

    /// When [`Muxer::handle_timeout`] wants to be called next. It may turn out to be for nothing.
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.deadlines.next()
    }

    /// The header of an RW packet with `len` payload bytes.
    pub fn data_header(&mut self, id: ConnectionId, len: u32) -> Option<Header> {
        let guest_cid = self.config.guest_cid;
        self.connection_mut(id)
            .map(|connection| connection.header(guest_cid, Op::Rw, len, 0))
    }

    /// The connection of this name.
    pub fn connection(&self, id: ConnectionId) -> Option<&Connection> {
        self.entries
            .get(id.slot())
            .filter(|e| e.generation == id.generation)
            .map(|e| &e.connection)
    }

    /// The names of all connections.
    pub fn ids(&self) -> impl Iterator<Item = ConnectionId> + '_ {
        // Slots fit: there are at most max_connections entries, and insert() refuses what u32 cannot number.
        self.entries.iter().map(|(slot, e)| ConnectionId {
            slot: slot as u32,
            generation: e.generation,
        })
    }

    /// How many connections there are, in whatever state.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether nothing is left: no connection, no owed packet.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty() && !self.has_outgoing() && self.events.is_empty()
    }

    fn handle_unknown(&mut self, now: Instant, key: ConnectionKey, op: Option<Op>, header: &Header) {
        // Never an RST for an RST, whatever else is wrong with it.
        if op == Some(Op::Rst) {
            return;
        }
        let fault = match (SocketType::from_wire(header.socket_type), op) {
            (None, _) => Some(Misbehavior::UnknownType),
            (_, None) => Some(Misbehavior::UnknownOp),
            (Some(SocketType::Seqpacket), Some(Op::Request)) => Some(Misbehavior::UnsupportedType),
            _ => None,
        };
        if let Some(kind) = fault {
            self.misbehaved(kind, key);
        } else if op == Some(Op::Request) {
            if self.entries.len() < self.config.max_connections {
                self.backlog.forget_strays_of(&key);
                let id = self.insert(now, key, Origin::Guest, self.config.connect_timeout);
                if let Some(connection) = self.connection_mut(id) {
                    // A fresh flow has sent nothing; a claim to the contrary is judged with the next packet.
                    let _ = connection.send.update(header.buf_alloc, header.fwd_cnt);
                }
                self.events.push_back(Event::Dial { id, key });
                return;
            }
            self.events.push_back(Event::LimitReached { key });
        }
        self.backlog.push_stray(Header {
            src_cid: header.dst_cid,
            dst_cid: header.src_cid,
            src_port: header.dst_port,
            dst_port: header.src_port,
            len: 0,
            socket_type: header.socket_type,
            op: Op::Rst as u16,
            flags: 0,
            buf_alloc: 0,
            fwd_cnt: 0,
        });
    }

    fn handle_known(
        &mut self,
        now: Instant,
        id: ConnectionId,
        key: ConnectionKey,
        op: Option<Op>,
        header: &Header,
        available: u32,
    ) -> Disposition {
        let Some(connection) = self.connection_mut(id) else {
            return Disposition::Consumed;
        };
        if op == Some(Op::Rst) {
            self.handle_rst(id);
            return Disposition::Consumed;
        }
        if connection.state == State::Dead {
            // It crossed the RST that we owe.
            return Disposition::Consumed;
        }
        let fault = match (SocketType::from_wire(header.socket_type), op) {
            (None, _) => Some(Misbehavior::UnknownType),
            (_, None) => Some(Misbehavior::UnknownOp),
            (Some(socket_type), _) if socket_type != connection.socket_type => {
                Some(Misbehavior::UnsupportedType)
            }
            (_, Some(Op::Request)) if !connection.awaits_answer() => Some(Misbehavior::DuplicateRequest),
            (_, Some(Op::Response)) if connection.state != State::Requested || !connection.introduced => {
                Some(Misbehavior::UnexpectedResponse)
            }
            _ => connection
                .send
                .update(header.buf_alloc, header.fwd_cnt)
                .err()
                .map(|_| Misbehavior::FwdCntBeyondSent),
        };
        if let Some(kind) = fault {
            self.offend(id, key, kind);
            return Disposition::Consumed;
        }
        // Before the operation, which may end the connection: nothing is told of it after its end.
        self.resume_after_credit(now, id);
        let verdict = match op {
            Some(Op::Rw) => return self.handle_rw(now, id, key, header.len, available),
            Some(Op::Shutdown) => self.handle_shutdown(now, id, ShutdownFlags::from_wire(header.flags)),
            Some(Op::Response) => {
                self.accepted(now, id, key);
                Ok(())
            }
            Some(Op::CreditRequest) if self.state(id) == Some(State::Established) => {
                self.owe(id, Owed::CREDIT_UPDATE);
                Ok(())
            }
            _ => Ok(()),
        };
        if let Err(kind) = verdict {
            self.offend(id, key, kind);
        }
        Disposition::Consumed
    }

    /// The guest accepted what [`Muxer::connect`] asked for.
    fn accepted(&mut self, now: Instant, id: ConnectionId, key: ConnectionKey) {
        let Some(connection) = self.connection_mut(id) else {
            return;
        };
        connection.state = State::Established;
        connection.last_activity = now;
        let host_shut = connection.host_shut;
        self.events.push_back(Event::Accepted { id, key });
        self.arm_idle(now, id);
        if host_shut != ShutdownFlags::NONE {
            self.owe(id, Owed::SHUTDOWN);
            self.finish_if_over(now, id, CloseReason::PeerRst);
        }
    }

    fn handle_rw(
        &mut self,
        now: Instant,
        id: ConnectionId,
        key: ConnectionKey,
        len: u32,
        available: u32,
    ) -> Disposition {
        let Some(connection) = self.connection_mut(id) else {
            return Disposition::Consumed;
        };
        let fault = match connection.state {
            State::Dialing | State::Requested => Some(Misbehavior::NotEstablished),
            _ if connection.guest_shut.contains(ShutdownFlags::SEND) => Some(Misbehavior::DataAfterShutdown),
            _ if len > available => Some(Misbehavior::PayloadShort),
            _ => connection
                .recv
                .receive(len)
                .err()
                .map(|_| Misbehavior::CreditExceeded),
        };
        if let Some(kind) = fault {
            self.offend(id, key, kind);
            return Disposition::Consumed;
        }
        connection.last_activity = now;
        let discard = connection.host_write_failed;
        if discard {
            connection.recv.forwarded(len);
        }
        let update_owed = discard && connection.recv.update_owed();
        if update_owed {
            self.owe(id, Owed::CREDIT_UPDATE);
        }
        if len == 0 || discard {
            Disposition::Consumed
        } else {
            Disposition::Payload { id, len }
        }
    }

    fn handle_shutdown(
        &mut self,
        now: Instant,
        id: ConnectionId,
        flags: ShutdownFlags,
    ) -> Result<(), Misbehavior> {
        let Some(connection) = self.connection_mut(id) else {
            return Ok(());
        };
        match connection.state {
            // The guest no longer wants what it asked for.
            State::Dialing if flags == ShutdownFlags::BOTH => {
                self.refused(id, RefuseReason::ClientGone);
                return Ok(());
            }
            State::Dialing | State::Requested => return Err(Misbehavior::NotEstablished),
            _ => {}
        }
        let before = connection.guest_shut;
        connection.guest_shut = before.with(flags);
        let both = connection.guest_shut == ShutdownFlags::BOTH;
        match connection.state {
            State::Closing if both => self.bury(id),
            State::Established if both => {
                connection.state = State::Draining;
                if connection.host_shut.contains(ShutdownFlags::SEND) {
                    connection.close_reason = CloseReason::PeerFin;
                }
                if connection.recv.held() == 0 {
                    self.drained(id);
                } else {
                    self.set_deadline(id, now + DRAIN_TIMEOUT);
                }
            }
            State::Established => {
                if connection.guest_shut.contains(ShutdownFlags::RCV) && !before.contains(ShutdownFlags::RCV)
                {
                    self.events.push_back(Event::ShutdownHost {
                        id,
                        flags: ShutdownFlags::RCV,
                    });
                }
                self.pass_on_shutdown(now, id);
                // A host end that takes nothing, and now a guest that takes nothing.
                self.finish_if_over(now, id, CloseReason::PeerRst);
            }
            _ => {}
        }
        Ok(())
    }

    fn handle_rst(&mut self, id: ConnectionId) {
        match self.state(id) {
            Some(State::Dialing) => {
                self.events.push_back(Event::Refused {
                    id,
                    reason: RefuseReason::ClientGone,
                });
                self.remove(id);
            }
            Some(State::Requested) => {
                self.events.push_back(Event::Refused {
                    id,
                    reason: RefuseReason::GuestRst,
                });
                self.remove(id);
            }
            Some(State::Established) => {
                self.events.push_back(Event::Closed {
                    id,
                    reason: CloseReason::GuestRst,
                    abort: true,
                });
                self.remove(id);
            }
            // It closed in order and did not wait for our RST (Linux does so after 8 s): its bytes still count.
            Some(State::Draining) => self.silence(id),
            Some(State::Closing | State::Dead) => self.remove(id),
            None => {}
        }
    }

    /// The guest broke the protocol on a connection, which ends.
    fn offend(&mut self, id: ConnectionId, key: ConnectionKey, kind: Misbehavior) {
        self.misbehaved(kind, key);
        if let Some(connection) = self.connection_mut(id) {
            // It spoke on this flow: it hears of the end even if our REQUEST has not left.
            connection.introduced = true;
        }
        match self.state(id) {
            Some(State::Dialing | State::Requested) => {
                self.events.push_back(Event::Refused {
                    id,
                    reason: RefuseReason::Misbehavior,
                });
            }
            Some(State::Established | State::Draining) => {
                self.events.push_back(Event::Closed {
                    id,
                    reason: CloseReason::Misbehavior,
                    abort: true,
                });
            }
            Some(State::Closing | State::Dead) | None => {}
        }
        self.bury(id);
    }

    /// The host end took all that a guest sent before it closed both directions.
    fn drained(&mut self, id: ConnectionId) {
        let Some(connection) = self.connection(id) else {
            return;
        };
        let reason = connection.close_reason;
        self.events.push_back(Event::Closed {
            id,
            reason,
            abort: reason == CloseReason::PeerRst,
        });
        self.bury(id);
    }

    /// Tells the host end that the guest sends no more, once it has taken everything.
    fn pass_on_shutdown(&mut self, now: Instant, id: ConnectionId) {
        let Some(connection) = self.connection_mut(id) else {
            return;
        };
        if connection.state == State::Established
            && connection.guest_shut.contains(ShutdownFlags::SEND)
            && !connection.host_write_closed
            && connection.recv.held() == 0
        {
            connection.host_write_closed = true;
            self.events.push_back(Event::ShutdownHost {
                id,
                flags: ShutdownFlags::SEND,
            });
            self.finish_if_over(now, id, CloseReason::PeerFin);
        }
    }

    /// Nothing can flow any more in either direction: the host end closes, the guest is told so and answers RST.
    fn finish_if_over(&mut self, now: Instant, id: ConnectionId, reason: CloseReason) {
        let Some(connection) = self.connection_mut(id) else {
            return;
        };
        let to_guest_over = connection.host_shut.contains(ShutdownFlags::SEND)
            || connection.guest_shut.contains(ShutdownFlags::RCV);
        let to_host_over = connection.host_write_closed || connection.host_write_failed;
        if connection.state == State::Established && to_guest_over && to_host_over {
            connection.host_shut = ShutdownFlags::BOTH;
            connection.state = State::Closing;
            self.events.push_back(Event::Closed {
                id,
                reason,
                abort: false,
            });
            self.owe(id, Owed::SHUTDOWN);
            self.set_deadline(id, now + CLOSE_TIMEOUT);
        }
    }

    fn expire(&mut self, now: Instant, id: ConnectionId) {
        match self.state(id) {
            Some(State::Dialing) => self.refused(id, RefuseReason::DialTimeout),
            Some(State::Requested) => self.refused(id, RefuseReason::GuestTimeout),
            Some(State::Established) => {
                let idle = self.config.idle_timeout;
                let Some(connection) = self.connection(id) else {
                    return;
                };
                let due = connection.last_activity + idle;
                if due > now {
                    self.set_deadline(id, due);
                } else {
                    let reason = CloseReason::IdleTimeout;
                    self.events.push_back(Event::Closed {
                        id,
                        reason,
                        abort: false,
                    });
                    self.bury(id);
                }
            }
            Some(State::Draining) => {
                self.events.push_back(Event::Closed {
                    id,
                    reason: CloseReason::IdleTimeout,
                    abort: true,
                });
                self.bury(id);
            }
            Some(State::Closing) => self.bury(id),
            Some(State::Dead) | None => {}
        }
    }

    /// Owes the RST that ends a flow and nothing else; or forgets the flow if the guest needs none.
    fn bury(&mut self, id: ConnectionId) {
        self.clear_deadline(id);
        let Some(connection) = self.connection_mut(id) else {
            return;
        };
        connection.state = State::Dead;
        connection.readable = false;
        if connection.introduced && !connection.silent {
            self.owe(id, Owed::RST);
        } else {
            self.remove(id);
        }
    }

    /// The guest has forgotten this flow: its ports are free, no packet is sent for it.
    fn silence(&mut self, id: ConnectionId) {
        if let Some(connection) = self.connection_mut(id) {
            connection.silent = true;
            connection.owed = Owed::default();
            let key = connection.key;
            if self.keys.get(&key) == Some(&id) {
                self.keys.remove(&key);
            }
        }
    }

    fn misbehaved(&mut self, kind: Misbehavior, key: ConnectionKey) {
        self.events.push_back(Event::Misbehaved { kind, key });
    }

    fn resume_after_credit(&mut self, now: Instant, id: ConnectionId) {
        let Some(connection) = self.connection_mut(id) else {
            return;
        };
        if connection.state != State::Established || connection.send.room() == 0 {
            return;
        }
        if let Some(since) = connection.stalled_since.take() {
            let waited = now.saturating_duration_since(since);
            self.events.push_back(Event::CreditResumed { id, waited });
        }
        self.enqueue_data(id);
    }

    fn stall(&mut self, now: Instant, id: ConnectionId) {
        let Some(connection) = self.connection_mut(id) else {
            return;
        };
        if connection.stalled_since.is_none() {
            connection.stalled_since = Some(now);
            self.events.push_back(Event::CreditStalled { id });
            self.owe(id, Owed::CREDIT_REQUEST);
        }
    }

    /// The packet just owed for `id`, ahead of its turn.
    fn poll_reply_of(&mut self, id: ConnectionId) -> Option<Outgoing> {
        let guest_cid = self.config.guest_cid;
        // Its place in the list of replies stays; an entry with nothing owed is skipped there.
        self.connection_mut(id)?
            .next_reply(guest_cid)
            .map(Outgoing::Control)
    }

    fn owe(&mut self, id: ConnectionId, kind: Owed) {
        let Some(connection) = self.connection_mut(id) else {
            return;
        };
        connection.owe(kind);
        if !connection.owed.is_empty() && !connection.in_replies {
            connection.in_replies = true;
            self.backlog.push_reply(id);
        }
    }

    fn enqueue_data(&mut self, id: ConnectionId) {
        let Some(connection) = self.connection_mut(id) else {
            return;
        };
        if connection.may_send() && !connection.in_data && connection.stalled_since.is_none() {
            connection.in_data = true;
            self.backlog.push_data(id);
        }
    }

    fn arm_idle(&mut self, now: Instant, id: ConnectionId) {
        let idle = self.config.idle_timeout;
        if idle.is_zero() {
            self.clear_deadline(id);
        } else {
            self.set_deadline(id, now + idle);
        }
        // Bytes may have come before the connection was established.
        self.enqueue_data(id);
    }

    fn set_deadline(&mut self, id: ConnectionId, at: Instant) {
        let Some(connection) = self.connection_mut(id) else {
            return;
        };
        connection.deadline = Some(at);
        if connection.armed.is_none_or(|armed| at < armed) {
            if let Some(armed) = connection.armed.replace(at) {
                self.deadlines.remove(armed, id);
            }
            self.deadlines.insert(at, id);
        }
    }

    fn clear_deadline(&mut self, id: ConnectionId) {
        let Some(connection) = self.connection_mut(id) else {
            return;
        };
        connection.deadline = None;
        if let Some(armed) = connection.armed.take() {
            self.deadlines.remove(armed, id);
        }
    }

    fn insert(&mut self, now: Instant, key: ConnectionKey, origin: Origin, within: Duration) -> ConnectionId {
        let connection = Connection::new(
            key,
            origin,
            SocketType::Stream,
            self.config.buf_alloc,
            now,
            within,
        );
        let generation = self.next_generation;
        self.next_generation = generation.wrapping_add(1);
        let slot = self.entries.insert(Entry {
            generation,
            connection,
        });
        let id = ConnectionId {
            slot: slot as u32,
            generation,
        };
        self.keys.insert(key, id);
        self.set_deadline(id, now + within);
        id
    }

    fn remove(&mut self, id: ConnectionId) {
        if self.connection(id).is_some() {
            self.clear_deadline(id);
            let entry = self.entries.remove(id.slot());
            let key = entry.connection.key;
            if self.keys.get(&key) == Some(&id) {
                self.keys.remove(&key);
            }
            // A stalled wait that nobody will answer any more has no CreditResumed.
            let entries = &self.entries;
            self.backlog.sweep(entries.len(), |id| {
                entries
                    .get(id.slot())
                    .is_some_and(|e| e.generation == id.generation)
            });
        }
    }

    fn state(&self, id: ConnectionId) -> Option<State> {
        self.connection(id).map(|c| c.state)
    }

    fn connection_mut(&mut self, id: ConnectionId) -> Option<&mut Connection> {
        self.entries
            .get_mut(id.slot())
            .filter(|e| e.generation == id.generation)
            .map(|e| &mut e.connection)
    }
}

/// How long the lists are that invariant 6 bounds.
#[cfg(test)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct ListLengths {
    pub(super) strays: usize,
    pub(super) replies: usize,
    pub(super) data: usize,
    pub(super) timers: usize,
    pub(super) keys: usize,
}

#[cfg(test)]
impl Muxer {
    pub(super) fn list_lengths(&self) -> ListLengths {
        let (strays, replies, data) = self.backlog.lengths();
        ListLengths {
            strays,
            replies,
            data,
            timers: self.deadlines.len(),
            keys: self.keys.len(),
        }
    }

    /// The host-side port to try next, as if so many had been used.
    pub(super) fn set_next_local_port(&mut self, port: u32) {
        self.next_local_port = port;
    }
}
