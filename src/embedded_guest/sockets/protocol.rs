//! What a Linux guest does with packets and system calls: connections, credit, shutdown and reset after
//! net/vmw_vsock/virtio_transport_common.c and af_vsock.c. No rings, no threads, no clock: packets and calls come in,
//! headers to send pile up in a queue, and sleepers are woken.
//!
//! Where the device breaks a rule, Linux mostly says nothing (facts that cost days when they show up as a stream with
//! a hole); here it is counted as a [`Violation`] besides.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::sync::{Arc, Condvar};
use std::time::{Duration, Instant};

use slab::Slab;

use crate::embedded_guest::stats::{Violation, Violations};
use crate::vsock::header::{Cid, Header, MAX_PACKET_PAYLOAD, Op, Port, ShutdownFlags, SocketType};

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
    /// The device reset it: nothing may come.
    ByPeer,
    /// The device reset it in answer to our SHUTDOWN of both directions. What we had said behind that, such as a
    /// CREDIT_UPDATE, may have found no connection: an RST may come for each.
    Closed,
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
    state: State,
    /// In the table of connections: packets find it.
    hashed: bool,
    /// The application still holds it.
    owned: bool,
    /// Why connect() or the connection failed.
    error: Option<io::ErrorKind>,
    /// The device reset it, or the session was lost.
    was_reset: bool,
    /// Received and not yet read; never more than `buf_alloc`.
    unread: VecDeque<u8>,
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
    backlog: usize,
    accepted: VecDeque<usize>,
    changed: Arc<Condvar>,
}

/// The guest's vsock layer.
#[derive(Debug)]
pub(super) struct Protocol {
    cid: Cid,
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

/// What a write may do.
pub(super) enum Writable {
    /// Send up to so many bytes.
    Room(usize),
    /// Wait for credit.
    Nothing,
    Broken,
}

impl Protocol {
    pub(super) fn new(cid: u64, buf_alloc: u32, update_when_drained: bool) -> Protocol {
        Protocol {
            cid: Cid(cid),
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

    // ---- system calls ------------------------------------------------------------------------------------------

    /// connect(): sends REQUEST. See [`Protocol::connected`] for the outcome.
    pub(super) fn connect(&mut self, cid: u64, port: u32) -> io::Result<usize> {
        if self.lost {
            return Err(io::ErrorKind::NetworkDown.into());
        }
        self.next_port = self.next_port.wrapping_add(1).max(1024);
        let tuple = Tuple {
            peer_cid: Cid(cid),
            peer_port: Port(port),
            local_port: Port(self.next_port),
        };
        let id = self.insert(tuple, State::Connecting);
        self.reply_on(id, Op::Request, ShutdownFlags::NONE);
        Ok(id)
    }

    /// The outcome of connect(), if there is one.
    pub(super) fn connected(&self, id: usize) -> Option<io::Result<()>> {
        let c = &self.connections[id];
        match (c.error, c.state) {
            (Some(error), _) => Some(Err(error.into())),
            (None, State::Connecting) => None,
            (None, _) => Some(Ok(())),
        }
    }

    /// connect() ran into its timeout: the socket is forgotten without a packet.
    pub(super) fn give_up(&mut self, id: usize) {
        self.connections[id].owned = false;
        self.unhash(id, Ended::GaveUp);
        self.connections.remove(id);
    }

    /// listen(). A second listener on a port is refused.
    pub(super) fn listen(&mut self, port: u32, backlog: usize, changed: Arc<Condvar>) -> io::Result<()> {
        if self.listeners.contains_key(&Port(port)) {
            return Err(io::ErrorKind::AddrInUse.into());
        }
        self.listeners.insert(
            Port(port),
            Listener {
                backlog,
                accepted: VecDeque::new(),
                changed,
            },
        );
        Ok(())
    }

    /// accept(): the oldest connection that waits; an error once the listener is gone.
    pub(super) fn accept(&mut self, port: u32, changed: &Arc<Condvar>) -> io::Result<Option<usize>> {
        let listener = self
            .listeners
            .get_mut(&Port(port))
            .filter(|l| Arc::ptr_eq(&l.changed, changed));
        Ok(listener.ok_or(io::ErrorKind::NotConnected)?.accepted.pop_front())
    }

    /// close() of a listener: what was not accepted is reset.
    pub(super) fn close_listener(&mut self, port: u32, changed: &Arc<Condvar>) {
        // After a reboot the port may be another listener's.
        if self
            .listeners
            .get(&Port(port))
            .is_none_or(|l| !Arc::ptr_eq(&l.changed, changed))
        {
            return;
        }
        let Some(listener) = self.listeners.remove(&Port(port)) else {
            return;
        };
        listener.changed.notify_all();
        for id in listener.accepted {
            self.connections[id].owned = false;
            if self.connections[id].hashed {
                self.reply_on(id, Op::Rst, ShutdownFlags::NONE);
                self.unhash(id, Ended::Reset);
            }
            self.connections.remove(id);
        }
    }

    /// recv(): takes bytes out and tells the device when it may need to know.
    pub(super) fn read(&mut self, id: usize, into: &mut [u8]) -> Readable {
        let c = &mut self.connections[id];
        let len = c.unread.len().min(into.len());
        if len > 0 {
            let (front, back) = c.unread.as_slices();
            let from_front = len.min(front.len());
            into[..from_front].copy_from_slice(&front[..from_front]);
            into[from_front..len].copy_from_slice(&back[..len - from_front]);
            c.unread.drain(..len);
            self.consumed(id, len as u32);
            return Readable::Bytes(len);
        }
        let ended = c.state == State::Done
            || c.peer_shutdown.contains(ShutdownFlags::SEND)
            || c.our_shutdown.contains(ShutdownFlags::RCV);
        if ended || into.is_empty() {
            Readable::Eof
        } else {
            Readable::Nothing
        }
    }

    /// virtio_transport_stream_do_dequeue: CREDIT_UPDATE when the device believes that less than a full packet fits.
    fn consumed(&mut self, id: usize, len: u32) {
        let c = &mut self.connections[id];
        c.fwd_cnt = c.fwd_cnt.wrapping_add(len);
        let untold = c.fwd_cnt.wrapping_sub(c.last_fwd_cnt);
        let believed_free = c.buf_alloc.saturating_sub(untold);
        let drained = self.update_when_drained && c.unread.is_empty();
        if c.state == State::Established && (believed_free < MAX_PACKET_PAYLOAD || drained) {
            self.reply_on(id, Op::CreditUpdate, ShutdownFlags::NONE);
        }
    }

    /// send(): how many bytes the device's credit allows now.
    pub(super) fn writable(&self, id: usize) -> Writable {
        let c = &self.connections[id];
        if c.state == State::Done
            || c.our_shutdown.contains(ShutdownFlags::SEND)
            || c.peer_shutdown.contains(ShutdownFlags::RCV)
        {
            return Writable::Broken;
        }
        match c.room() {
            0 => Writable::Nothing,
            room => Writable::Room(room as usize),
        }
    }

    /// The header of an RW packet of `len` bytes, which is accounted for. The packet must be sent at once.
    pub(super) fn data(&mut self, id: usize, len: usize) -> Header {
        let c = &mut self.connections[id];
        c.tx_cnt = c.tx_cnt.wrapping_add(len as u32);
        Header {
            len: len as u32,
            ..self.header(id, Op::Rw, ShutdownFlags::NONE)
        }
    }

    /// Takes back the accounting of a packet that did not fit the ring.
    pub(super) fn unsend_data(&mut self, id: usize, len: usize) {
        let c = &mut self.connections[id];
        c.tx_cnt = c.tx_cnt.wrapping_sub(len as u32);
    }

    /// shutdown().
    pub(super) fn shutdown(&mut self, id: usize, flags: ShutdownFlags) {
        let c = &mut self.connections[id];
        if c.our_shutdown.contains(flags) || c.state != State::Established {
            return;
        }
        c.our_shutdown = c.our_shutdown.with(flags);
        c.changed.notify_all();
        self.reply_on(id, Op::Shutdown, flags);
    }

    /// close() (virtio_transport_close): SHUTDOWN of both directions, then RST is awaited for eight seconds; or RST at
    /// once when the device has already shut both down.
    pub(super) fn close(&mut self, now: Instant, id: usize) {
        let c = &mut self.connections[id];
        c.owned = false;
        match c.state {
            State::Done => {
                self.connections.remove(id);
            }
            State::Connecting => {
                self.reply_on(id, Op::Rst, ShutdownFlags::NONE);
                self.unhash(id, Ended::Reset);
                self.connections.remove(id);
            }
            State::Established if c.peer_shutdown == ShutdownFlags::BOTH => {
                self.reply_on(id, Op::Rst, ShutdownFlags::NONE);
                self.unhash(id, Ended::Confirmed);
                self.connections.remove(id);
            }
            State::Established => {
                c.close_deadline = Some(now + CLOSE_TIMEOUT);
                c.unread.clear();
                self.shutdown(id, ShutdownFlags::BOTH);
            }
        }
    }

    /// RST without a word before it, as SO_LINGER with zero or a crash would give.
    pub(super) fn abort(&mut self, id: usize) {
        let c = &mut self.connections[id];
        if c.state != State::Done {
            self.reply_on(id, Op::Rst, ShutdownFlags::NONE);
            self.finish(id, Ended::Reset);
        }
    }

    // ---- packets -----------------------------------------------------------------------------------------------

    /// A packet from the device (virtio_transport_recv_pkt).
    pub(super) fn handle(&mut self, header: &Header, payload: &[u8]) {
        if header.dst_cid != self.cid || header.src_cid.0 >> 32 != 0 {
            self.violations.record(Violation::WrongAddress);
        }
        let op = Op::from_wire(header.op);
        match op {
            None => self.violations.record(Violation::InvalidOp),
            Some(Op::Rw) if payload.is_empty() => self.violations.record(Violation::EmptyRw),
            Some(Op::Rw) => {}
            Some(_) if header.len > 0 => self.violations.record(Violation::UnexpectedPayload),
            Some(_) => {}
        }
        if SocketType::from_wire(header.socket_type).is_none() {
            self.violations.record(Violation::UnknownType);
            return self.refuse(header);
        }
        let tuple = Tuple {
            peer_cid: header.src_cid,
            peer_port: header.src_port,
            local_port: header.dst_port,
        };
        match self.table.get(&tuple).copied() {
            Some(id) => {
                self.learn_credit(id, header);
                match self.connections[id].state {
                    State::Connecting => self.handle_connecting(id, op, header),
                    _ => self.handle_established(id, op, header, payload),
                }
                self.connections.get(id).inspect(|c| c.changed.notify_all());
            }
            None if op == Some(Op::Request) => self.handle_request(tuple, header),
            None => self.handle_stray(tuple, op, header),
        }
    }

    fn learn_credit(&mut self, id: usize, header: &Header) {
        let c = &mut self.connections[id];
        c.peer_buf_alloc = header.buf_alloc;
        c.peer_fwd_cnt = header.fwd_cnt;
        if (c.tx_cnt.wrapping_sub(header.fwd_cnt) as i32) < 0 {
            self.violations.record(Violation::ForwardCountAhead);
        }
    }

    fn handle_connecting(&mut self, id: usize, op: Option<Op>, header: &Header) {
        match op {
            Some(Op::Response) => self.connections[id].state = State::Established,
            Some(Op::Rst) => {
                self.connections[id].error = Some(io::ErrorKind::ConnectionReset);
                self.finish(id, Ended::ByPeer);
            }
            None => {}
            Some(_) => {
                // EPROTO to the application.
                self.connections[id].error = Some(io::ErrorKind::InvalidData);
                self.violations.record(Violation::UnexpectedResponse);
                self.refuse(header);
                self.finish(id, Ended::Reset);
            }
        }
    }

    fn handle_established(&mut self, id: usize, op: Option<Op>, header: &Header, payload: &[u8]) {
        match op {
            Some(Op::Rw) => self.receive(id, payload),
            Some(Op::CreditRequest) => self.reply_on(id, Op::CreditUpdate, ShutdownFlags::NONE),
            Some(Op::CreditUpdate) | None => {}
            Some(Op::Shutdown) => self.peer_shuts_down(id, ShutdownFlags::from_wire(header.flags)),
            Some(Op::Rst) => {
                let c = &mut self.connections[id];
                c.was_reset = true;
                let ended = match c.close_deadline {
                    Some(_) => Ended::Closed,
                    None => Ended::ByPeer,
                };
                self.finish(id, ended);
            }
            Some(Op::Response) => self.violations.record(Violation::UnexpectedResponse),
            Some(Op::Request) => self.violations.record(Violation::DuplicateRequest),
        }
    }

    fn receive(&mut self, id: usize, payload: &[u8]) {
        let c = &mut self.connections[id];
        if c.peer_shutdown.contains(ShutdownFlags::SEND) {
            self.violations.record(Violation::DataAfterShutdown);
            return;
        }
        if c.unread.len() + payload.len() > c.buf_alloc as usize {
            self.violations.record(Violation::CreditExceeded);
            return;
        }
        if !c.owned || c.our_shutdown.contains(ShutdownFlags::RCV) {
            // Was on its way when the application stopped reading. Nobody reads it, so nothing is said of it: Linux
            // leaves such bytes in the socket's queue, and a CREDIT_UPDATE behind SHUTDOWN would find no connection.
            return;
        }
        c.unread.extend(payload);
    }

    fn peer_shuts_down(&mut self, id: usize, flags: ShutdownFlags) {
        let c = &mut self.connections[id];
        c.peer_shutdown = c.peer_shutdown.with(flags);
        if c.peer_shutdown != ShutdownFlags::BOTH {
            return;
        }
        if c.unread.is_empty() {
            self.reply_on(id, Op::Rst, ShutdownFlags::NONE);
            self.finish(id, Ended::Confirmed);
        }
        // With unread bytes the RST goes out at close(): virtio_transport_close.
    }

    fn handle_request(&mut self, tuple: Tuple, header: &Header) {
        let full = |l: &Listener| l.accepted.len() >= l.backlog;
        if self.listeners.get(&tuple.local_port).is_none_or(full) {
            return self.refuse(header);
        }
        self.ended.remove(&tuple);
        let id = self.insert(tuple, State::Established);
        self.learn_credit(id, header);
        self.reply_on(id, Op::Response, ShutdownFlags::NONE);
        if let Some(listener) = self.listeners.get_mut(&tuple.local_port) {
            listener.accepted.push_back(id);
            listener.changed.notify_all();
        }
    }

    /// A packet for no connection: answered with RST, unless it is one.
    fn handle_stray(&mut self, tuple: Tuple, op: Option<Op>, header: &Header) {
        let ended = self.ended.get(&tuple).copied();
        match (op, ended) {
            (Some(Op::Rst), Some(Ended::Reset | Ended::GaveUp)) => {
                self.crossed_resets += 1;
                // Once may cross, twice is an answer.
                self.ended.insert(tuple, Ended::ByPeer);
            }
            (Some(Op::Rst), Some(Ended::Closed)) => self.crossed_resets += 1,
            (Some(Op::Rst), _) => self.violations.record(Violation::UnexpectedRst),
            (Some(Op::Response), None) => self.violations.record(Violation::UnexpectedResponse),
            (_, Some(Ended::Reset | Ended::GaveUp)) => {}
            (_, _) => self.violations.record(Violation::NoConnection),
        }
        self.refuse(header);
        if ended == Some(Ended::GaveUp) && op != Some(Op::Rst) {
            self.ended.insert(tuple, Ended::Reset);
        }
    }

    /// virtio_transport_reset_no_sock: RST with the addresses turned around, never in answer to RST.
    fn refuse(&mut self, header: &Header) {
        if header.op == Op::Rst as u16 {
            return;
        }
        let known = SocketType::from_wire(header.socket_type).is_some();
        self.replies.push_back(Header {
            src_cid: header.dst_cid,
            dst_cid: header.src_cid,
            src_port: header.dst_port,
            dst_port: header.src_port,
            len: 0,
            socket_type: if known {
                header.socket_type
            } else {
                SocketType::Stream as u16
            },
            op: Op::Rst as u16,
            flags: 0,
            buf_alloc: 0,
            fwd_cnt: 0,
        });
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

    fn insert(&mut self, tuple: Tuple, state: State) -> usize {
        let id = self.connections.insert(Connection {
            tuple,
            state,
            hashed: true,
            owned: true,
            error: None,
            was_reset: false,
            unread: VecDeque::new(),
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
            socket_type: SocketType::Stream as u16,
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
