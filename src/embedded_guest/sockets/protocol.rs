//! What a Linux guest does with packets and system calls: connections, credit, shutdown and reset after
//! net/vmw_vsock/virtio_transport_common.c and af_vsock.c. No rings, no threads, no clock: packets and calls come in,
//! headers to send pile up in a queue, and sleepers are woken.
//!
//! Where the device breaks a rule, Linux mostly says nothing (facts that cost days when they show up as a stream with
//! a hole); here it is counted as a [`Violation`](super::super::stats::Violation) besides.

mod calls;
mod inbox;
mod packets;

use std::collections::{HashMap, VecDeque};
use std::io;
use std::sync::{Arc, Condvar};
use std::time::{Duration, Instant};

use slab::Slab;

use self::inbox::Inbox;
pub use self::inbox::{GuestMessage, SEQ_EOM, SEQ_EOR};
use crate::embedded_guest::profile::feature;
use crate::embedded_guest::stats::Violations;
use crate::vsock::header::{Cid, Header, Op, Port, ShutdownFlags, SocketType};

/// How long a closed socket waits for RST (VSOCK_CLOSE_TIMEOUT).
const CLOSE_TIMEOUT: Duration = Duration::from_secs(8);

/// How many ended connections are remembered to judge late packets by.
const MEMORY: usize = 4096;

/// Both ends of a connection as the guest sees them.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) struct Tuple {
    pub(super) peer_cid: Cid,
    pub(super) peer_port: Port,
    pub(super) local_port: Port,
}

/// How a connection ended, which says what may still come for it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Ended {
    /// We reset it: packets and even an RST may be on their way.
    Reset,
    /// The device had shut both directions down and we confirmed: nothing may come.
    Confirmed,
    /// Both had shut both directions down before either heard of the other: we confirmed, and so may the device, once.
    ConfirmedByBoth,
    /// The device reset it: nothing may come.
    ByPeer,
    /// The device reset it in answer to our SHUTDOWN of both directions. What we had said behind that, such as a
    /// CREDIT_UPDATE, may have found no connection: an RST may come for each.
    Closed,
    /// The device reset it before it said anything else: our RESPONSE may have found no connection, and an RST may come
    /// for it, once.
    Withdrawn,
    /// We gave up connecting without a word: RESPONSE or RST may come, once.
    GaveUp,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    Connecting,
    Established,
    /// No packets any more; unread bytes may be left.
    Done,
}

/// One connection.
#[derive(Debug)]
pub(super) struct Connection {
    tuple: Tuple,
    socket_type: SocketType,
    state: State,
    /// In the table of connections: packets find it.
    hashed: bool,
    /// The application still holds it.
    owned: bool,
    /// Why connect() or the connection failed.
    error: Option<io::ErrorKind>,
    /// The device has said something since its REQUEST, or had none to send.
    confirmed: bool,
    /// The device reset it, or the session was lost.
    was_reset: bool,
    /// Received and not yet read; never more than `buf_alloc`.
    unread: Inbox,
    /// A thread is in the middle of a message: others wait, or their fragments would mix.
    in_message: bool,
    buf_alloc: u32,
    fwd_cnt: u32,
    /// The `fwd_cnt` that the last packet told.
    last_fwd_cnt: u32,
    tx_cnt: u32,
    peer_buf_alloc: u32,
    peer_fwd_cnt: u32,
    our_shutdown: ShutdownFlags,
    peer_shutdown: ShutdownFlags,
    /// When a closed socket stops waiting for RST.
    close_deadline: Option<Instant>,
    /// Signalled at every change.
    changed: Arc<Condvar>,
}

#[derive(Debug)]
struct Listener {
    socket_type: SocketType,
    backlog: usize,
    accepted: VecDeque<usize>,
    changed: Arc<Condvar>,
}

/// The guest's vsock layer.
#[derive(Debug)]
pub(super) struct Protocol {
    cid: Cid,
    /// The acknowledged feature bits: which socket types there are.
    features: u64,
    buf_alloc: u32,
    update_when_drained: bool,
    connections: Slab<Connection>,
    table: HashMap<Tuple, usize>,
    listeners: HashMap<Port, Listener>,
    ended: HashMap<Tuple, Ended>,
    ended_order: VecDeque<Tuple>,
    next_port: u32,
    /// Headers to send, oldest first. The caller stops handing packets in when they pile up, as Linux does at the
    /// size of the ring; so they are bounded by that and by one packet a system call.
    replies: VecDeque<Header>,
    violations: Violations,
    /// RSTs that crossed one of ours.
    crossed_resets: u64,
    /// Nothing works any more: the VMM's connection is gone.
    lost: bool,
}

/// What a read found.
pub(super) enum Readable {
    Bytes(usize),
    Eof,
    Nothing,
}

/// What recv() of a SEQPACKET socket found.
pub(super) enum Received {
    Message(GuestMessage),
    Eof,
    Nothing,
}

/// What a write may do.
pub(super) enum Writable {
    /// Send up to so many bytes.
    Room(usize),
    /// Wait for credit.
    Nothing,
    Broken,
}

impl Protocol {
    pub(super) fn new(cid: u64, features: u64, buf_alloc: u32, update_when_drained: bool) -> Protocol {
        Protocol {
            cid: Cid(cid),
            features,
            buf_alloc,
            update_when_drained,
            connections: Slab::new(),
            table: HashMap::new(),
            listeners: HashMap::new(),
            ended: HashMap::new(),
            ended_order: VecDeque::new(),
            // Linux starts at a random port above 1023; high ones stand out in a log.
            next_port: 0xb000_0000,
            replies: VecDeque::new(),
            violations: Violations::default(),
            crossed_resets: 0,
            lost: false,
        }
    }

    // ---- time and loss -------------------------------------------------------------------------------------------

    /// Resets the closed sockets that waited for RST too long.
    pub(super) fn expire(&mut self, now: Instant) {
        let due: Vec<usize> = self
            .connections
            .iter()
            .filter(|(_, c)| c.close_deadline.is_some_and(|d| d <= now))
            .map(|(id, _)| id)
            .collect();
        for id in due {
            self.reply_on(id, Op::Rst, ShutdownFlags::NONE);
            self.finish(id, Ended::Reset);
        }
    }

    /// When [`Protocol::expire`] has something to do next.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        self.connections
            .iter()
            .filter_map(|(_, c)| c.close_deadline)
            .min()
    }

    /// The device, the VMM or the guest's kernel is gone: every connection and listener with it.
    pub(super) fn lose_everything(&mut self, for_good: bool) {
        self.lost = for_good;
        self.replies.clear();
        self.ended.clear();
        self.ended_order.clear();
        let ids: Vec<usize> = self.connections.iter().map(|(id, _)| id).collect();
        for id in ids {
            let c = &mut self.connections[id];
            c.was_reset = true;
            if c.state == State::Connecting {
                c.error = Some(io::ErrorKind::ConnectionReset);
            }
            self.finish(id, Ended::ByPeer);
        }
        for listener in std::mem::take(&mut self.listeners).into_values() {
            listener.changed.notify_all();
            for id in listener.accepted {
                self.connections.try_remove(id);
            }
        }
        self.ended.clear();
        self.ended_order.clear();
    }

    /// Whether the VMM is gone for good.
    pub(super) fn is_lost(&self) -> bool {
        self.lost
    }

    // ---- for the thread ------------------------------------------------------------------------------------------

    /// The next header to send; [`Protocol::unsend`] takes it back when the ring is full.
    pub(super) fn poll_reply(&mut self) -> Option<Header> {
        self.replies.pop_front()
    }

    pub(super) fn unsend(&mut self, header: Header) {
        self.replies.push_front(header);
    }

    pub(super) fn pending_replies(&self) -> usize {
        self.replies.len()
    }

    pub(super) fn violations(&self) -> &Violations {
        &self.violations
    }

    pub(super) fn crossed_resets(&self) -> u64 {
        self.crossed_resets
    }

    /// Connections that packets can still find.
    pub(super) fn open(&self) -> usize {
        self.table.len()
    }

    pub(super) fn changed(&self, id: usize) -> Arc<Condvar> {
        self.connections[id].changed.clone()
    }

    pub(super) fn tuple(&self, id: usize) -> Tuple {
        self.connections[id].tuple
    }

    pub(super) fn was_reset(&self, id: usize) -> bool {
        self.connections[id].was_reset
    }

    // ---- helpers -------------------------------------------------------------------------------------------------

    /// Whether sockets of this type can exist. Without NO_IMPLIED_STREAM there are always streams.
    fn carries(&self, socket_type: SocketType) -> bool {
        let has = |mask| self.features & mask != 0;
        match socket_type {
            SocketType::Stream => !has(feature::NO_IMPLIED_STREAM) || has(feature::STREAM),
            SocketType::Seqpacket => has(feature::SEQPACKET),
        }
    }

    fn insert(&mut self, tuple: Tuple, socket_type: SocketType, state: State) -> usize {
        let id = self.connections.insert(Connection {
            tuple,
            socket_type,
            state,
            hashed: true,
            owned: true,
            error: None,
            confirmed: state == State::Connecting,
            was_reset: false,
            unread: Inbox::new(socket_type),
            in_message: false,
            buf_alloc: self.buf_alloc,
            fwd_cnt: 0,
            last_fwd_cnt: 0,
            tx_cnt: 0,
            peer_buf_alloc: 0,
            peer_fwd_cnt: 0,
            our_shutdown: ShutdownFlags::NONE,
            peer_shutdown: ShutdownFlags::NONE,
            close_deadline: None,
            changed: Arc::new(Condvar::new()),
        });
        self.table.insert(tuple, id);
        id
    }

    /// No packet finds the connection any more; what ended it is remembered.
    fn unhash(&mut self, id: usize, ended: Ended) {
        let c = &mut self.connections[id];
        if !std::mem::take(&mut c.hashed) {
            return;
        }
        self.table.remove(&c.tuple);
        self.ended.insert(c.tuple, ended);
        self.ended_order.push_back(c.tuple);
        if self.ended_order.len() > MEMORY
            && let Some(oldest) = self.ended_order.pop_front()
        {
            self.ended.remove(&oldest);
        }
    }

    /// virtio_transport_do_close: no packets any more; what was received can still be read.
    fn finish(&mut self, id: usize, ended: Ended) {
        self.unhash(id, ended);
        let c = &mut self.connections[id];
        c.state = State::Done;
        c.close_deadline = None;
        c.changed.notify_all();
        if !c.owned {
            self.connections.remove(id);
        }
    }

    fn reply_on(&mut self, id: usize, op: Op, flags: ShutdownFlags) {
        let header = self.header(id, op, flags);
        self.replies.push_back(header);
    }

    /// Every packet tells our credit (virtio_transport_inc_tx_pkt).
    fn header(&mut self, id: usize, op: Op, flags: ShutdownFlags) -> Header {
        let c = &mut self.connections[id];
        c.last_fwd_cnt = c.fwd_cnt;
        Header {
            src_cid: self.cid,
            dst_cid: c.tuple.peer_cid,
            src_port: c.tuple.local_port,
            dst_port: c.tuple.peer_port,
            len: 0,
            socket_type: c.socket_type as u16,
            op: op as u16,
            flags: flags.bits(),
            buf_alloc: c.buf_alloc,
            fwd_cnt: c.fwd_cnt,
        }
    }
}

impl Connection {
    /// virtio_transport_has_space, with signed arithmetic: the device may shrink its buffer below what is in flight.
    fn room(&self) -> u32 {
        let in_flight = self.tx_cnt.wrapping_sub(self.peer_fwd_cnt);
        self.peer_buf_alloc.saturating_sub(in_flight)
    }
}

#[cfg(test)]
mod tests;
