//! All connections of one guest.

mod host;
mod outgoing;
mod packets;

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use slab::Slab;

use crate::vsock::backlog::Backlog;
use crate::vsock::connection::{Connection, ConnectionKey, Origin, Owed, Retry, State};
use crate::vsock::header::{Boundary, Cid, Header, Port, ShutdownFlags, SocketType};
use crate::vsock::misbehavior::Misbehavior;
use crate::vsock::reason::{CloseReason, RefuseReason};
use crate::vsock::timer::Deadlines;

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
        /// Bytes, never more than the packet holds; 0 only where an empty message ends, or one whose last bytes came before.
        len: u32,
        /// Whether a message of a SEQPACKET connection ends behind them.
        boundary: Boundary,
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
        /// What it wants there.
        socket_type: SocketType,
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

/// Who wants a connection to the guest, and what kind of one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Caller {
    /// Port in the guest.
    pub guest_port: Port,
    /// Stream or SEQPACKET.
    pub socket_type: SocketType,
    /// The caller's own address, if it is another guest; none: a port of the host is found for it.
    pub address: Option<(Cid, Port)>,
    /// An RST of the guest means "not yet"; see [`Muxer::connect_waiting`].
    pub waits: bool,
}

impl Caller {
    /// A client of the host that wants a stream, at once or not at all.
    pub fn host(guest_port: Port) -> Caller {
        Caller {
            guest_port,
            socket_type: SocketType::Stream,
            address: None,
            waits: false,
        }
    }
}

/// The socket types that were negotiated (VIRTIO_VSOCK_F_STREAM, _SEQPACKET, _NO_IMPLIED_STREAM; virtio 1.2, section 5.10.3).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SocketTypes {
    /// Streams, which a driver has unless it says that nothing is implied.
    pub stream: bool,
    /// SEQPACKET.
    pub seqpacket: bool,
}

impl SocketTypes {
    /// What there is when nothing was negotiated.
    pub const IMPLIED: SocketTypes = SocketTypes {
        stream: true,
        seqpacket: false,
    };

    fn contains(self, socket_type: SocketType) -> bool {
        match socket_type {
            SocketType::Stream => self.stream,
            SocketType::Seqpacket => self.seqpacket,
        }
    }
}

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
    /// Nothing: the driver has not spoken.
    types: Option<SocketTypes>,
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
            types: None,
            entries: Slab::new(),
            keys: HashMap::new(),
            backlog: Backlog::default(),
            deadlines: Deadlines::default(),
            events: VecDeque::new(),
            next_local_port: LOCAL_PORTS.start,
            next_generation: 0,
        }
    }

    /// Gives no id away that `before` has given away: answers that were meant for its connections may still come.
    pub fn succeed(&mut self, before: &Muxer) {
        self.next_generation = before.next_generation;
    }

    /// Other bounds from now on. What connections were promised and have begun to wait for stays as it was; the idle time is
    /// looked at anew when something moves, or when the one before is over.
    pub fn reconfigure(&mut self, config: MuxerConfig) {
        self.config = config;
    }

    /// What it was told.
    pub fn config(&self) -> &MuxerConfig {
        &self.config
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

    /// What was negotiated. Connections of a type that is no longer among them are left alone: the rings stop with a change.
    pub fn set_types(&mut self, types: SocketTypes) {
        self.types = Some(types);
    }

    /// The driver is gone; the next one may know other types. Until it speaks, clients are asked to wait for it rather than
    /// refused for its predecessor's sake.
    pub fn forget_types(&mut self) {
        self.types = None;
    }

    /// Whether the driver that runs knows this type of connection.
    pub(super) fn knows(&self, socket_type: SocketType) -> bool {
        self.types.unwrap_or(SocketTypes::IMPLIED).contains(socket_type)
    }

    /// Asks the guest for a stream to `guest_port` for a client of the host side; see [`Muxer::request`].
    pub fn connect(&mut self, now: Instant, guest_port: Port) -> Result<ConnectionId, RefuseReason> {
        self.request(now, Caller::host(guest_port))
    }

    /// Whether the guest could be asked for a connection of this type now, for who wants to know before anything is spent on it.
    ///
    /// # Errors
    /// [`RefuseReason::Limit`] when there are too many connections, [`RefuseReason::UnsupportedType`] when the guest's driver
    /// has not agreed on the type. While there is no driver, its type is judged when it could be asked.
    pub fn admits(&self, socket_type: SocketType) -> Result<(), RefuseReason> {
        if self.types.is_some() && !self.knows(socket_type) {
            return Err(RefuseReason::UnsupportedType);
        }
        if self.entries.len() >= self.config.max_connections {
            return Err(RefuseReason::Limit);
        }
        Ok(())
    }

    /// Asks the guest for a connection. [`Event::Accepted`] or [`Event::Refused`] follows.
    ///
    /// # Errors
    /// Those of [`Muxer::admits`]. Nothing follows then.
    pub fn request(&mut self, now: Instant, caller: Caller) -> Result<ConnectionId, RefuseReason> {
        self.admits(caller.socket_type)?;
        let key = self.free_key(caller);
        let give_up = now + self.config.guest_timeout;
        let id = self.insert(
            now,
            key,
            Origin::Host,
            caller.socket_type,
            self.config.guest_timeout,
        );
        if caller.waits
            && let Some(connection) = self.connection_mut(id)
        {
            connection.retry = Some(Retry::new(give_up));
        }
        self.owe(id, Owed::REQUEST);
        Ok(id)
    }

    /// The ports and the CID by which the guest will know a caller. A guest that calls has ports of its own; should one be in
    /// use here still (its connection ended there, and not here yet), another one stands in.
    fn free_key(&mut self, caller: Caller) -> ConnectionKey {
        let guest_port = caller.guest_port;
        if let Some((peer_cid, peer_port)) = caller.address {
            let key = ConnectionKey {
                guest_port,
                peer_cid,
                peer_port,
            };
            if !self.keys.contains_key(&key) {
                return key;
            }
        }
        let peer_cid = caller.address.map_or(Cid::HOST, |(cid, _)| cid);
        // There are more ports than connections may ever be, so this ends.
        loop {
            let peer_port = Port(self.next_local_port);
            self.next_local_port += 1;
            if !LOCAL_PORTS.contains(&self.next_local_port) {
                self.next_local_port = LOCAL_PORTS.start;
            }
            let key = ConnectionKey {
                guest_port,
                peer_cid,
                peer_port,
            };
            if !self.keys.contains_key(&key) {
                return key;
            }
        }
    }

    /// As [`Muxer::connect`], for a client that waits for the guest: an RST is followed by another REQUEST after a pause
    /// that grows from 50 ms to 500 ms, and the guest may reboot meanwhile, until `guest_timeout` ends. Then the refusal says
    /// what the guest did last.
    pub fn connect_waiting(&mut self, now: Instant, guest_port: Port) -> Result<ConnectionId, RefuseReason> {
        self.request(
            now,
            Caller {
                waits: true,
                ..Caller::host(guest_port)
            },
        )
    }

    /// Refuses the clients that wait for the guest and have no answer coming; those that have get no second chance.
    pub fn stop_waiting(&mut self, refusal: RefuseReason) {
        let ids: Vec<ConnectionId> = self.ids().collect();
        for id in ids {
            let Some(connection) = self.connection_mut(id) else {
                continue;
            };
            if connection.retry.take().is_some() && !connection.introduced {
                self.refused(id, refusal);
            }
        }
    }

    /// The guest lost its memory of all connections (its rings were stopped): all of them end, without a packet, but for
    /// requests of [`Muxer::connect_waiting`], which are made again.
    pub fn reset(&mut self) {
        // What lives on is silent: it will owe nothing.
        self.backlog.clear();
        let ids: Vec<ConnectionId> = self.ids().collect();
        for id in ids {
            let Some(connection) = self.connection(id) else {
                continue;
            };
            match connection.state {
                State::Requested if connection.retry.is_some() => self.request_anew(id),
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

    fn expire(&mut self, now: Instant, id: ConnectionId) {
        match self.state(id) {
            Some(State::Dialing) => self.refused(id, RefuseReason::DialTimeout),
            Some(State::Requested) => self.expire_request(now, id),
            Some(State::Established) => {
                let idle = self.config.idle_timeout;
                let Some(connection) = self.connection(id) else {
                    return;
                };
                // There was one when this was armed.
                if idle.is_zero() {
                    self.clear_deadline(id);
                    return;
                }
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

    /// A pause is over, or the guest's time.
    fn expire_request(&mut self, now: Instant, id: ConnectionId) {
        let Some(connection) = self.connection_mut(id) else {
            return;
        };
        match &mut connection.retry {
            Some(Retry { due, give_up, .. }) if now < *give_up => {
                *due = None;
                let give_up = *give_up;
                self.owe(id, Owed::REQUEST);
                self.set_deadline(id, give_up);
            }
            // Its last word was RST.
            Some(Retry { due: Some(_), .. }) => self.refused(id, RefuseReason::GuestRst),
            _ => self.refused(id, RefuseReason::GuestTimeout),
        }
    }

    /// Another guest will hear the request, or the same one after a reboot: from its beginning.
    fn request_anew(&mut self, id: ConnectionId) {
        let Some(connection) = self.connection_mut(id) else {
            return;
        };
        let Some(Retry { give_up, .. }) = connection.retry else {
            return;
        };
        connection.retry = Some(Retry::new(give_up));
        connection.forget_request();
        // Of the backlog that was cleared.
        connection.in_replies = false;
        self.owe(id, Owed::REQUEST);
        self.set_deadline(id, give_up);
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

    fn insert(
        &mut self,
        now: Instant,
        key: ConnectionKey,
        origin: Origin,
        socket_type: SocketType,
        within: Duration,
    ) -> ConnectionId {
        let connection = Connection::new(key, origin, socket_type, self.config.buf_alloc, now, within);
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

/// How long the lists are that invariant 6 bounds; for whoever holds the law to it.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct ListLengths {
    /// Resets for unknown flows.
    pub strays: usize,
    /// Connections to which a reply is owed, and some that are gone.
    pub replies: usize,
    /// Connections with bytes for the guest, and some that are gone.
    pub data: usize,
    /// Wake-ups.
    pub timers: usize,
    /// Flows of the guest.
    pub keys: usize,
}

impl Muxer {
    /// How long the lists are.
    pub fn list_lengths(&self) -> ListLengths {
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
    #[cfg(test)]
    pub(super) fn set_next_local_port(&mut self, port: u32) {
        self.next_local_port = port;
    }
}
