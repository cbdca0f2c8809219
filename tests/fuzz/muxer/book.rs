//! What those around the law know of its connections: kept from what is said to the law and what it says, by nobody's code
//! but this. Whatever contradicts it is a panic.

use std::collections::{BTreeSet, HashMap};
use std::time::{Duration, Instant};

use vsock_sidecar::vsock::{
    Boundary, Caller, CloseReason, ConnectionId, ConnectionKey, Disposition, Event, Header, Misbehavior,
    MuxerConfig, Op, Origin, RefuseReason, SocketType, SocketTypes,
};

const RCV: u32 = 1;
const SEND: u32 = 2;
const BOTH: u32 = 3;

/// The pauses of a request that waits for its guest.
const PAUSES: [u64; 5] = [50, 100, 200, 400, 500];

/// A connection.
#[derive(Clone, Debug)]
pub struct Entry {
    pub id: ConnectionId,
    pub key: ConnectionKey,
    pub origin: Origin,
    pub socket_type: SocketType,
    /// Its client waits for the guest.
    pub waits: bool,
    pub begun: Instant,
    /// Bytes may flow, or might.
    pub established: bool,
    /// Refused or Closed has been said.
    pub ended: Option<Ended>,
    /// When bytes moved last.
    pub moved: Instant,

    /// Bytes of the guest that were accepted, and those of them that the host end took or that were thrown away.
    pub received: u64,
    pub taken: u64,
    /// Bytes of a message that has not ended (SEQPACKET): the host end cannot take them.
    pub message: u64,
    /// How far the guest may send as it was told.
    pub promised: u64,
    pub write_failed: bool,
    pub guest_shut: u32,
    told_host: u32,

    /// Bytes for the guest.
    pub sent: u64,
    pub peer_buf_alloc: u32,
    pub peer_fwd_cnt: u32,
    pub readable: bool,
    pub host_eof: bool,
    told_guest: u32,
    stalled: bool,
    /// CREDIT_REQUEST may be sent so many times.
    credit_requests: u32,

    /// REQUESTs that went out since the guest last knew nothing, and pauses that were made since then.
    requested: bool,
    pauses: usize,
    /// When REQUEST may go out again.
    due: Option<Instant>,
    pub response_sent: bool,
    /// It has ended, and an RST went out that may have been its own or not.
    perhaps_gone: bool,
}

/// How a connection ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Ended {
    Refused(RefuseReason),
    Closed(CloseReason),
}

impl Entry {
    fn new(
        id: ConnectionId,
        key: ConnectionKey,
        origin: Origin,
        socket_type: SocketType,
        now: Instant,
    ) -> Entry {
        Entry {
            id,
            key,
            origin,
            socket_type,
            waits: false,
            begun: now,
            established: false,
            ended: None,
            moved: now,
            received: 0,
            taken: 0,
            message: 0,
            promised: 0,
            write_failed: false,
            guest_shut: 0,
            told_host: 0,
            sent: 0,
            peer_buf_alloc: 0,
            peer_fwd_cnt: 0,
            readable: false,
            host_eof: false,
            told_guest: 0,
            stalled: false,
            credit_requests: 0,
            requested: false,
            pauses: 0,
            due: None,
            response_sent: false,
            perhaps_gone: false,
        }
    }

    pub fn is_open(&self) -> bool {
        self.established && self.ended.is_none()
    }

    pub fn held(&self) -> u64 {
        self.received - self.taken
    }

    /// Bytes that the host end can take: those of whole messages.
    pub fn takeable(&self) -> u64 {
        self.held().saturating_sub(self.message)
    }

    /// What the flags of an RW packet mean.
    fn boundary(&self, header: &Header) -> Boundary {
        match (self.socket_type, header.flags & 3) {
            (SocketType::Seqpacket, 1) => Boundary::Message,
            (SocketType::Seqpacket, 3) => Boundary::Record,
            _ => Boundary::None,
        }
    }

    /// Bytes that the guest has room for by what it said last; of more than 1 GiB no use is made.
    pub fn room(&self) -> i64 {
        let in_flight = (self.sent as u32).wrapping_sub(self.peer_fwd_cnt);
        i64::from(self.peer_buf_alloc.min(1 << 30)) - i64::from(in_flight)
    }

    /// Whether the guest has said the truth, or less, about what it has consumed.
    fn is_honest(&self, fwd_cnt: u32) -> bool {
        (self.sent as u32).wrapping_sub(fwd_cnt) < 1 << 31
    }

    fn learn(&mut self, header: &Header) {
        if self.is_honest(header.fwd_cnt) {
            self.peer_buf_alloc = header.buf_alloc;
            self.peer_fwd_cnt = header.fwd_cnt;
        }
    }
}

/// RSTs have to be deserved: by a packet of the guest that is none itself, or by a REQUEST of ours.
#[derive(Clone, Copy, Default, Debug)]
struct Resets {
    deserved: u64,
    sent: u64,
}

/// All connections that there have been.
pub struct Book {
    config: MuxerConfig,
    pub types: SocketTypes,
    pub entries: Vec<Entry>,
    /// Those that have not ended.
    live: BTreeSet<usize>,
    by_id: HashMap<ConnectionId, usize>,
    /// Which connection packets of a flow belong to, as the guest sees it.
    linked: HashMap<ConnectionKey, usize>,
    resets: HashMap<ConnectionKey, Resets>,
    /// What the guest has done wrong in its last packet.
    faults: Vec<Misbehavior>,
}

impl Book {
    pub fn new(config: MuxerConfig) -> Book {
        Book {
            config,
            types: SocketTypes::IMPLIED,
            entries: Vec::new(),
            live: BTreeSet::new(),
            by_id: HashMap::new(),
            linked: HashMap::new(),
            resets: HashMap::new(),
            faults: Vec::new(),
        }
    }

    pub fn entry(&mut self, id: ConnectionId) -> &mut Entry {
        let at = self.by_id[&id];
        &mut self.entries[at]
    }

    /// Connections that have not ended, the newest first.
    pub fn live(&self) -> impl Iterator<Item = &Entry> {
        self.live.iter().rev().map(|at| &self.entries[*at])
    }

    fn linked(&self, key: &ConnectionKey) -> Option<&Entry> {
        self.linked.get(key).map(|at| &self.entries[*at])
    }

    fn begin(&mut self, entry: Entry) {
        let at = self.entries.len();
        assert_eq!(self.by_id.insert(entry.id, at), None, "invariant 9: {entry:?}");
        if let Some(before) = self.linked.insert(entry.key, at) {
            let before = &self.entries[before];
            assert!(before.ended.is_some(), "two connections, one flow: {before:?}");
        }
        self.live.insert(at);
        self.entries.push(entry);
    }

    // ------------------------------------------------------------------------------------------ host side

    pub fn connects(&mut self, id: ConnectionId, key: ConnectionKey, caller: Caller, now: Instant) {
        assert!(self.linked(&key).is_none_or(|entry| entry.ended.is_some()));
        let mut entry = Entry::new(id, key, Origin::Host, caller.socket_type, now);
        entry.waits = caller.waits;
        self.begin(entry);
    }

    pub fn connected(&mut self, id: ConnectionId, now: Instant, accepted: bool) {
        let entry = self.entry(id);
        let expected = entry.origin == Origin::Guest && !entry.established && entry.ended.is_none();
        assert_eq!(accepted, expected, "{entry:?}");
        if accepted {
            entry.established = true;
            entry.moved = now;
        }
    }

    pub fn host_took(&mut self, id: ConnectionId, n: u32, now: Instant) {
        let entry = self.entry(id);
        entry.taken += u64::from(n);
        entry.moved = now;
    }

    pub fn host_write_failed(&mut self, id: ConnectionId) {
        let entry = self.entry(id);
        entry.taken = entry.received;
        entry.write_failed = true;
    }

    /// The guest has forgotten everything.
    pub fn reset(&mut self) {
        self.linked.clear();
        self.resets.clear();
        for (at, entry) in self.entries.iter_mut().enumerate() {
            // Judged before the events of the reset are read.
            if entry.ended.is_none() && !entry.established && entry.waits {
                entry.requested = false;
                entry.pauses = 0;
                entry.due = None;
                entry.peer_buf_alloc = 0;
                entry.peer_fwd_cnt = 0;
                self.linked.insert(entry.key, at);
            }
        }
    }

    // ------------------------------------------------------------------------------------------ the guest

    /// A packet of the guest and what became of it; its events come after.
    pub fn packet(&mut self, header: &Header, available: u32, disposition: Disposition, now: Instant) {
        self.faults.clear();
        let key = ConnectionKey {
            guest_port: header.src_port,
            peer_cid: header.dst_cid,
            peer_port: header.dst_port,
        };
        if header.src_cid != self.config.guest_cid {
            assert_eq!(disposition, Disposition::Consumed);
            self.faults.push(Misbehavior::WrongSourceCid);
            return;
        }
        let op = Op::from_wire(header.op);
        if header.len > 0 && op.is_some_and(|op| op != Op::Rw) {
            self.faults.push(Misbehavior::UnexpectedPayload);
        }
        if op != Some(Op::Rst) {
            self.resets.entry(key).or_default().deserved += 1;
        }
        // A flow that has ended and whose last word is still to come is nobody's business.
        let at = self.linked.get(&key).copied();
        let at = at.filter(|at| self.entries[*at].ended.is_none());
        let Some(at) = at else {
            assert_eq!(disposition, Disposition::Consumed, "payload of nobody");
            return self.unknown(key, op, header);
        };
        if op == Some(Op::Rst) {
            assert_eq!(disposition, Disposition::Consumed);
            return self.guest_resets(at, now);
        }
        let buf_alloc = u64::from(self.config.buf_alloc);
        let entry = &mut self.entries[at];
        if let Some(kind) = fault(entry, op, header, available, buf_alloc) {
            self.faults.push(kind);
            // Its credit was believed if only its payload or its moment is wrong; the connection ends all the same.
            if matches!(
                kind,
                Misbehavior::NotEstablished
                    | Misbehavior::DataAfterShutdown
                    | Misbehavior::PayloadShort
                    | Misbehavior::CreditExceeded
                    | Misbehavior::MessageTooLong
                    | Misbehavior::MessageCut
            ) {
                entry.learn(header);
            }
            assert_eq!(disposition, Disposition::Consumed, "{kind:?} {entry:?}");
            return;
        }
        entry.learn(header);
        let payload = match disposition {
            Disposition::Consumed => None,
            Disposition::Payload { id, len, boundary } => {
                assert_eq!(id, entry.id);
                Some((len, boundary))
            }
        };
        let boundary = entry.boundary(header);
        match op {
            Some(Op::Rw) => {
                entry.received += u64::from(header.len);
                entry.moved = now;
                if entry.socket_type == SocketType::Seqpacket {
                    entry.message = match boundary {
                        Boundary::None => entry.message + u64::from(header.len),
                        Boundary::Message | Boundary::Record => 0,
                    };
                }
                let says_something = header.len > 0 || boundary != Boundary::None;
                if entry.write_failed {
                    entry.taken = entry.received;
                    assert_eq!(payload, None);
                } else {
                    let expected = says_something.then_some((header.len, boundary));
                    assert_eq!(payload, expected, "the promise was {buf_alloc}: {entry:?}");
                }
            }
            Some(Op::Shutdown) => entry.guest_shut |= header.flags & BOTH,
            Some(Op::Response) => {
                entry.established = true;
                entry.moved = now;
            }
            _ => {}
        }
        if op != Some(Op::Rw) {
            assert_eq!(payload, None);
        }
    }

    fn unknown(&mut self, key: ConnectionKey, op: Option<Op>, header: &Header) {
        let linked = self.linked.get(&key).map(|at| &self.entries[*at]);
        // What crosses our SHUTDOWN of both directions is judged, though nobody is told of more than the fault.
        if linked.is_some() {
            if op == Some(Op::Rst) {
                self.linked.remove(&key);
            }
            return;
        }
        match (op, SocketType::from_wire(header.socket_type)) {
            (Some(Op::Rst), _) => {}
            (_, None) => self.faults.push(Misbehavior::UnknownType),
            (None, _) => self.faults.push(Misbehavior::UnknownOp),
            (Some(Op::Request), Some(SocketType::Seqpacket)) if !self.types.seqpacket => {
                self.faults.push(Misbehavior::UnsupportedType)
            }
            (Some(Op::Request), Some(SocketType::Stream)) if !self.types.stream => {
                self.faults.push(Misbehavior::UnsupportedType)
            }
            _ => {}
        }
    }

    fn guest_resets(&mut self, at: usize, now: Instant) {
        let entry = &mut self.entries[at];
        if entry.established || !entry.waits {
            self.linked.remove(&entry.key);
        } else if entry.requested {
            let pause = PAUSES[entry.pauses.min(PAUSES.len() - 1)];
            entry.requested = false;
            entry.pauses += 1;
            entry.due = Some(now + Duration::from_millis(pause));
            entry.peer_buf_alloc = 0;
            entry.peer_fwd_cnt = 0;
        }
    }

    // ------------------------------------------------------------------------------------------ events

    /// What the law told after some input. `by_packet` is the guest's packet, if that was it.
    pub fn event(&mut self, event: Event, by_packet: Option<&Header>, now: Instant, connections: usize) {
        match event {
            Event::Dial { id, key, socket_type } => {
                let header = by_packet.expect("a guest dials by packet");
                assert_eq!(Op::from_wire(header.op), Some(Op::Request));
                assert_eq!(
                    (key.guest_port, key.peer_cid, key.peer_port),
                    (header.src_port, header.dst_cid, header.dst_port)
                );
                assert_eq!(header.socket_type, socket_type as u16);
                let mut entry = Entry::new(id, key, Origin::Guest, socket_type, now);
                entry.learn(header);
                self.begin(entry);
            }
            Event::Accepted { id, key } => {
                let header = by_packet.expect("a guest accepts by packet");
                assert_eq!(Op::from_wire(header.op), Some(Op::Response));
                let entry = self.entry(id);
                assert!(entry.origin == Origin::Host && entry.is_open(), "{entry:?}");
                assert_eq!(entry.key, key);
            }
            Event::Refused { id, reason } => {
                let entry = self.entry(id);
                assert!(!entry.established, "refused after the beginning: {entry:?}");
                self.end(id, Ended::Refused(reason));
            }
            Event::Closed { id, reason, abort } => {
                let entry = self.entry(id);
                assert!(entry.established, "closed before the beginning: {entry:?}");
                let in_order = matches!(reason, CloseReason::GuestShutdown | CloseReason::PeerFin);
                if in_order {
                    assert!(!abort);
                    assert!(
                        entry.held() == 0,
                        "the end comes before {} bytes: {entry:?}",
                        entry.held()
                    );
                }
                self.end(id, Ended::Closed(reason));
            }
            Event::LimitReached { .. } => {
                assert!(by_packet.is_some_and(|header| Op::from_wire(header.op) == Some(Op::Request)));
                assert!(connections >= self.config.max_connections);
            }
            Event::ShutdownHost { id, flags } => {
                let entry = self.entry(id);
                assert!(entry.is_open(), "{entry:?}");
                let flags = flags.bits();
                assert_ne!(flags, 0);
                assert_eq!(
                    flags & !entry.guest_shut,
                    0,
                    "the guest did not say so: {entry:?}"
                );
                assert_eq!(flags & entry.told_host, 0, "said twice: {entry:?}");
                if flags & SEND != 0 {
                    assert_eq!(
                        entry.held(),
                        0,
                        "the host end has not taken everything: {entry:?}"
                    );
                }
                entry.told_host |= flags;
            }
            Event::Misbehaved { kind, .. } => {
                let expected = self.faults.iter().position(|fault| *fault == kind);
                let closing = by_packet.is_some_and(|header| self.crosses_an_end(header));
                assert!(expected.is_some() || closing, "{kind:?} of {by_packet:?}");
                if let Some(at) = expected {
                    self.faults.remove(at);
                }
            }
            Event::CreditStalled { id } => {
                let entry = self.entry(id);
                assert!(entry.is_open() && !entry.stalled, "{entry:?}");
                assert!(entry.room() <= 0, "there is room: {entry:?}");
                entry.stalled = true;
                entry.credit_requests += 1;
            }
            Event::CreditResumed { id, .. } => {
                let entry = self.entry(id);
                assert!(entry.ended.is_none() && entry.stalled, "{entry:?}");
                assert!(entry.room() > 0, "there is no room: {entry:?}");
                entry.stalled = false;
            }
        }
    }

    /// The guest did something wrong that only the caller of the law sees.
    pub fn misbehaves(&mut self, kind: Misbehavior) {
        self.faults = vec![kind];
    }

    /// What the guest did wrong was told.
    pub fn assert_faults_told(&self) {
        assert_eq!(self.faults, [], "not told");
    }

    fn crosses_an_end(&self, header: &Header) -> bool {
        let key = ConnectionKey {
            guest_port: header.src_port,
            peer_cid: header.dst_cid,
            peer_port: header.dst_port,
        };
        self.linked(&key).is_some_and(|entry| entry.ended.is_some())
    }

    fn end(&mut self, id: ConnectionId, how: Ended) {
        let at = self.by_id[&id];
        let entry = &mut self.entries[at];
        assert_eq!(entry.ended, None, "invariant 8: {how:?} for {entry:?}");
        entry.ended = Some(how);
        self.live.remove(&at);
        // A guest that has not heard of it needs no word of its end.
        let unheard = entry.origin == Origin::Host && !entry.established && !entry.requested;
        if unheard && how != Ended::Refused(RefuseReason::Misbehavior) {
            self.linked.remove(&entry.key);
        }
    }

    // ------------------------------------------------------------------------------------------ packets for the guest

    /// A packet without payload.
    pub fn control(&mut self, header: &Header, now: Instant) {
        let key = self.own(header);
        let op = Op::from_wire(header.op).expect("an operation of the standard");
        assert_eq!(header.len, 0);
        assert_eq!(header.flags != 0, op == Op::Shutdown, "{header:?}");
        assert_ne!(op, Op::Rw);
        let at = self.linked.get(&key).copied();
        if op == Op::Rst {
            let resets = self.resets.entry(key).or_default();
            resets.sent += 1;
            assert!(
                resets.sent <= resets.deserved,
                "invariant 3: {resets:?} for {header:?}"
            );
            // One for a flow that does not exist has no credit to speak of. It may have waited since before that flow's ports
            // became those of a REQUEST of ours, and goes before it.
            let of_nobody = header.buf_alloc == 0;
            if let Some(at) = at.filter(|_| !of_nobody) {
                self.credit_fields(at, header);
            }
            if let Some(at) = at {
                let entry = &self.entries[at];
                let unheard = entry.origin == Origin::Host && !entry.requested;
                assert!(
                    entry.ended.is_some() || (of_nobody && unheard),
                    "a connection that lives: {entry:?}"
                );
                if of_nobody {
                    self.entries[at].perhaps_gone = entry.ended.is_some();
                } else {
                    self.linked.remove(&key);
                }
            }
            return;
        }
        let at = at.unwrap_or_else(|| panic!("for no connection: {header:?}"));
        self.credit_fields(at, header);
        let entry = &mut self.entries[at];
        match op {
            Op::Request => {
                assert!(entry.origin == Origin::Host && entry.ended.is_none() && !entry.established);
                assert!(!entry.requested, "invariant 10: {entry:?}");
                assert!(
                    entry.due.is_none_or(|due| now >= due),
                    "too soon by {:?}: {entry:?}",
                    entry.due.map(|due| due - now)
                );
                entry.requested = true;
                self.resets.entry(key).or_default().deserved += 1;
                return;
            }
            Op::Response => {
                assert!(
                    entry.origin == Origin::Guest && entry.established && !entry.response_sent,
                    "{entry:?}"
                );
                entry.response_sent = true;
                return;
            }
            Op::Shutdown => {
                assert_eq!(header.flags & !BOTH, 0);
                assert_eq!(
                    entry.told_guest & !header.flags,
                    0,
                    "flags only grow: {header:?} {entry:?}"
                );
                entry.told_guest = header.flags;
            }
            Op::CreditRequest => {
                assert!(entry.credit_requests > 0, "invariant 4: {entry:?}");
                entry.credit_requests -= 1;
            }
            _ => {}
        }
        self.may_speak(at, header);
    }

    /// An RW packet.
    pub fn data(&mut self, id: ConnectionId, header: &Header, boundary: Boundary) {
        let key = self.own(header);
        let at = self.by_id[&id];
        assert_eq!(self.linked.get(&key), Some(&at), "{header:?}");
        assert_eq!(Op::from_wire(header.op), Some(Op::Rw));
        let flags = match boundary {
            Boundary::None => 0,
            Boundary::Message => 1,
            Boundary::Record => 3,
        };
        assert_eq!(header.flags, flags);
        self.credit_fields(at, header);
        self.may_speak(at, header);
        let entry = &mut self.entries[at];
        assert!(entry.is_open(), "{entry:?}");
        assert_eq!(entry.told_guest & SEND, 0, "bytes after SHUTDOWN: {entry:?}");
        assert_eq!(entry.guest_shut & RCV, 0, "bytes that nobody wants: {entry:?}");
        assert!(
            i64::from(header.len) <= entry.room(),
            "invariant 2: {} bytes for {entry:?}",
            header.len
        );
        entry.sent += u64::from(header.len);
    }

    fn may_speak(&self, at: usize, header: &Header) {
        let entry = &self.entries[at];
        match entry.origin {
            Origin::Guest => assert!(entry.response_sent, "before the answer: {header:?} {entry:?}"),
            Origin::Host => assert!(
                entry.established || entry.ended.is_some(),
                "before the answer: {header:?} {entry:?}"
            ),
        }
    }

    fn own(&self, header: &Header) -> ConnectionKey {
        assert_eq!(header.dst_cid, self.config.guest_cid);
        ConnectionKey {
            guest_port: header.dst_port,
            peer_cid: header.src_cid,
            peer_port: header.src_port,
        }
    }

    fn credit_fields(&mut self, at: usize, header: &Header) {
        let entry = &mut self.entries[at];
        assert_eq!(header.socket_type, entry.socket_type as u16);
        assert_eq!(header.buf_alloc, self.config.buf_alloc, "invariant 5: {entry:?}");
        // What crosses the end is thrown away, and counted as taken or not.
        if entry.ended.is_none() {
            assert_eq!(header.fwd_cnt, entry.taken as u32, "invariant 5: {entry:?}");
        }
        entry.promised = entry.taken + u64::from(header.buf_alloc);
    }

    // ------------------------------------------------------------------------------------------ time

    /// After the law was told the time.
    pub fn time_passed(&self, now: Instant) {
        let config = &self.config;
        for entry in self.live() {
            let limit = match (entry.established, entry.origin) {
                (false, Origin::Guest) => entry.begun + config.connect_timeout,
                (false, Origin::Host) => entry.begun + config.guest_timeout,
                (true, _) if config.idle_timeout.is_zero() || entry.guest_shut == BOTH => continue,
                (true, _) => entry.moved + config.idle_timeout,
            };
            assert!(now < limit, "overdue by {:?}: {entry:?}", now - limit);
        }
    }

    /// Everything that was owed has been sent, the host ends have taken everything.
    pub fn nobody_waits(&self) {
        for entry in self.live().filter(|entry| entry.established) {
            assert_ne!(entry.guest_shut, BOTH, "closed, taken, and not over: {entry:?}");
            if !entry.write_failed && entry.guest_shut & SEND != 0 {
                assert_ne!(
                    entry.told_host & SEND,
                    0,
                    "the host end waits for its end: {entry:?}"
                );
            }
            if entry.guest_shut & RCV != 0 {
                assert_ne!(entry.told_host & RCV, 0, "{entry:?}");
            }
            // The rest of a message may be all that it wants to send.
            assert!(
                entry.promised > entry.received || entry.guest_shut & SEND != 0,
                "the guest waits for credit: {entry:?}"
            );
            if entry.host_eof {
                assert_ne!(
                    entry.told_guest & SEND,
                    0,
                    "the guest waits for the end: {entry:?}"
                );
            }
            if entry.readable && entry.guest_shut & RCV == 0 && !entry.host_eof {
                assert!(
                    entry.room() <= 0 && entry.stalled,
                    "the host end waits: {entry:?}"
                );
            }
        }
        for (key, at) in &self.linked {
            let entry = &self.entries[*at];
            assert!(
                entry.ended.is_none() || entry.told_guest == BOTH || entry.perhaps_gone,
                "the guest was not told of the end of {key:?}: {entry:?}"
            );
        }
    }
}

/// What is wrong with a packet of a connection that lives.
fn fault(
    entry: &Entry,
    op: Option<Op>,
    header: &Header,
    available: u32,
    buf_alloc: u64,
) -> Option<Misbehavior> {
    let Some(socket_type) = SocketType::from_wire(header.socket_type) else {
        return Some(Misbehavior::UnknownType);
    };
    let Some(op) = op else {
        return Some(Misbehavior::UnknownOp);
    };
    if socket_type != entry.socket_type {
        return Some(Misbehavior::UnsupportedType);
    }
    let unanswered = entry.origin == Origin::Guest && !entry.response_sent;
    let asked = entry.origin == Origin::Host && !entry.established && entry.requested;
    match op {
        // Once it has closed, the answer will not come any more, but the RST.
        Op::Request if !unanswered => return Some(Misbehavior::DuplicateRequest),
        Op::Response if !asked => return Some(Misbehavior::UnexpectedResponse),
        _ if !entry.is_honest(header.fwd_cnt) => return Some(Misbehavior::FwdCntBeyondSent),
        Op::Shutdown if !entry.established => {
            let gives_up = entry.origin == Origin::Guest && header.flags & BOTH == BOTH;
            return (!gives_up).then_some(Misbehavior::NotEstablished);
        }
        Op::Shutdown if header.flags & SEND != 0 && entry.message > 0 && !entry.write_failed => {
            return Some(Misbehavior::MessageCut);
        }
        Op::Rw if !entry.established => return Some(Misbehavior::NotEstablished),
        Op::Rw if entry.guest_shut & SEND != 0 => return Some(Misbehavior::DataAfterShutdown),
        Op::Rw if header.len > available => return Some(Misbehavior::PayloadShort),
        Op::Rw if entry.held() + u64::from(header.len) > buf_alloc => {
            return Some(Misbehavior::CreditExceeded);
        }
        Op::Rw if socket_type == SocketType::Seqpacket && entry.boundary(header) == Boundary::None => {
            // It can never end: the rest of the buffer is for its end.
            let too_long = entry.message + u64::from(header.len) >= buf_alloc;
            return too_long.then_some(Misbehavior::MessageTooLong);
        }
        _ => {}
    }
    None
}
