//! The law under whatever a guest, host ends and time do in whatever order.
//!
//! ```text
//! case = head, step*      head: buffer, connections, idle timeout; step: see `Muxed::step`
//! ```
//!
//! The caller keeps to its side of the contract (it polls events after each input, takes no more than it was given, sends no
//! more than it may); the guest keeps to nothing. [`book`] judges.

mod book;

use std::time::{Duration, Instant};

use book::Book;
use vsock_sidecar::vsock::{
    Boundary, Caller, Cid, CloseReason, ConnectionId, ConnectionKey, Header, Misbehavior, Muxer, MuxerConfig,
    Origin, Outgoing, Port, RefuseReason, SocketType, SocketTypes, State,
};

use super::input::Input;

const GUEST: Cid = Cid(3);
/// The most steps of a case.
const MAX_STEPS: usize = 2000;
/// The most connections of a case, so that it stays short.
const MAX_BEGUN: usize = 3000;
/// Where the law takes its own ports from.
const LOCAL_PORTS: u32 = 1 << 30;
/// Resets for unknown flows that may wait.
const MAX_STRAYS: usize = 1024;
/// Kinds of packet that can be owed.
const KINDS: usize = 6;

/// Runs a case; panics where the law breaks a promise.
pub fn run(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let mut muxed = Muxed::new(&mut input);
    for _ in 0..MAX_STEPS {
        if input.is_empty() || muxed.book.entries.len() > MAX_BEGUN {
            break;
        }
        muxed.step(&mut input);
        muxed.check();
    }
    muxed.settle();
}

struct Muxed {
    mux: Muxer,
    book: Book,
    config: MuxerConfig,
    now: Instant,
    /// The flow spoken of last.
    flow: ConnectionKey,
}

impl Muxed {
    fn new(input: &mut Input<'_>) -> Muxed {
        let config = MuxerConfig {
            guest_cid: GUEST,
            buf_alloc: input.choose(&[262_144, 1, 1500, 4096, 65_536, 1 << 30]),
            max_connections: input.choose(&[16, 1, 2, 64]),
            connect_timeout: Duration::from_millis(1500),
            guest_timeout: Duration::from_secs(5),
            idle_timeout: Duration::from_secs(input.choose(&[0, 0, 1, 60])),
        };
        let mut muxed = Muxed {
            mux: Muxer::new(config.clone()),
            book: Book::new(config.clone()),
            config,
            now: Instant::now(),
            flow: ConnectionKey {
                guest_port: Port(1000),
                peer_cid: Cid::HOST,
                peer_port: Port(22),
            },
        };
        muxed.negotiates(input);
        muxed
    }

    /// A driver says which types it knows.
    fn negotiates(&mut self, input: &mut Input<'_>) {
        let which = input.below(8);
        let types = SocketTypes {
            stream: which != 6,
            seqpacket: which < 7,
        };
        self.book.types = types;
        self.mux.set_types(types);
    }

    fn step(&mut self, input: &mut Input<'_>) {
        match input.below(20) {
            0..=3 => self.legal_packet(input),
            4 | 5 => {
                let (header, available) = self.any_packet(input);
                self.packet(header, available);
            }
            6 => {
                // A flood, of one flow or of many.
                let (mut header, available) = self.any_packet(input);
                let (times, further) = (input.size().min(1200), u32::from(input.u8()));
                for _ in 0..times {
                    self.packet(header, available);
                    header.src_port.0 = header.src_port.0.wrapping_add(further);
                }
            }
            7 | 8 => self.send_some(input),
            9 => self.passes(Duration::from_millis(
                input.choose(&[1, 49, 50, 51, 500, 1500, 5000, 8000, 30_000]),
            )),
            10 => self.passes(Duration::from_millis(input.u16().into())),
            11 => self.connects(input),
            12..=17 => self.host(input),
            18 => self.takes_everything(),
            _ => match input.below(4) {
                0 => {
                    self.book.reset();
                    self.mux.reset();
                    self.events(None);
                    self.negotiates(input);
                }
                1 => {
                    self.mux.close_all(CloseReason::Drain, RefuseReason::Draining);
                    self.events(None);
                    assert_eq!(self.book.live().count(), 0, "close_all leaves nothing");
                }
                2 => {
                    self.mux.stop_waiting(RefuseReason::Draining);
                    self.events(None);
                }
                _ => {}
            },
        }
    }

    // ------------------------------------------------------------------------------------------ the guest

    fn flow(&mut self, input: &mut Input<'_>) -> ConnectionKey {
        let with = |key: ConnectionKey, guest_port, peer_port| ConnectionKey {
            guest_port: Port(guest_port),
            peer_port: Port(peer_port),
            ..key
        };
        let key = ConnectionKey {
            peer_cid: Cid::HOST,
            ..self.flow
        };
        let number = u32::from(input.u8());
        self.flow = match input.below(8) {
            0..=2 => self.flow,
            3 => with(key, 1000 + number % 4, 22 + number / 4 % 4),
            4 => with(key, 1000 + number, 22),
            // One of ours, or one that we have not used yet.
            5 => with(key, 22 + number % 2, LOCAL_PORTS + number / 2),
            6 => {
                let entries = &self.book.entries;
                let newest = entries.len().checked_sub(1 + number as usize);
                newest.map_or(self.flow, |at| entries[at].key)
            }
            _ => ConnectionKey {
                guest_port: Port(input.u32()),
                peer_cid: Cid(input.choose(&[2, 4, 0, 1, u64::MAX, 3])),
                peer_port: Port(input.u32()),
            },
        };
        self.flow
    }

    /// A packet that means anything.
    fn any_packet(&mut self, input: &mut Input<'_>) -> (Header, u32) {
        let key = self.flow(input);
        let op = match input.u8() {
            n @ 0..=15 => u16::from(n),
            16 => input.u16(),
            n => u16::from(n % 7 + 1),
        };
        let len = if input.bool() { input.size() } else { 0 };
        let header = Header {
            src_cid: input.choose(&[GUEST, GUEST, GUEST, GUEST, GUEST, GUEST, Cid(4), Cid(3 | 1 << 32)]),
            dst_cid: key.peer_cid,
            src_port: key.guest_port,
            dst_port: key.peer_port,
            len,
            socket_type: match input.u8() {
                0..=199 => self.type_of(key),
                200..=219 => 1,
                220..=239 => 2,
                n => input.choose(&[0, 3, 257, u16::from(n)]),
            },
            op,
            flags: input.choose(&[0, 0, 1, 2, 3, 4, 7, u32::MAX]),
            buf_alloc: input.choose(&[65_536, 65_536, 0, 1, 1000, u32::MAX, 1 << 30]),
            fwd_cnt: match input.u8() {
                0..=199 => self.honest_fwd_cnt(key),
                200..=227 => self.honest_fwd_cnt(key).wrapping_add(1),
                _ => input.u32(),
            },
        };
        let available = match input.below(8) {
            0 => input.size(),
            1 => len.saturating_sub(1),
            _ => len,
        };
        (header, available)
    }

    fn type_of(&self, key: ConnectionKey) -> u16 {
        let entry = self.book.entries.iter().rev().find(|entry| entry.key == key);
        entry.map_or(1, |entry| entry.socket_type as u16)
    }

    fn honest_fwd_cnt(&self, key: ConnectionKey) -> u32 {
        let entry = self.book.entries.iter().rev().find(|entry| entry.key == key);
        entry.map_or(0, |entry| entry.sent as u32)
    }

    /// What a decent guest might say of one of its connections, or the beginning of another.
    fn legal_packet(&mut self, input: &mut Input<'_>) {
        let which = input.u8();
        let Some(entry) = self.book.live().nth(usize::from(which >> 4)) else {
            let key = ConnectionKey {
                guest_port: Port(1000 + u32::from(which)),
                peer_cid: Cid::HOST,
                peer_port: Port(22),
            };
            self.flow = key;
            return self.packet(self.header(key, input.choose(&[1, 2]), 1, 0, 0, 65_536, 0), 0);
        };
        let (key, sent, socket_type) = (entry.key, entry.sent as u32, entry.socket_type as u16);
        let window = u64::from(self.config.buf_alloc);
        let room = window.saturating_sub(entry.held()) as u32;
        let unread = sent.wrapping_sub(entry.peer_fwd_cnt);
        self.flow = key;
        let buf_alloc = input.choose(&[262_144, 65_536, 4096, 100]);
        let fwd_cnt = sent.wrapping_sub(input.size().min(unread));
        let (op, flags, len) = match (entry.established, entry.origin, which & 15) {
            (false, Origin::Guest, 0..=13) => (1, 0, 0),
            (false, Origin::Host, 0..=9) => (2, 0, 0),
            (false, _, _) => (3, 0, 0),
            (true, _, 0..=5) => (5, input.choose(&[1, 0, 3, 2]), input.size().min(room)),
            (true, _, 6) => (5, 1, room),
            (true, _, 7..=9) => (6, 0, 0),
            (true, _, 10) => (7, 0, 0),
            (true, _, 11) => (4, 1, 0),
            (true, _, 12) => (4, 2, 0),
            (true, _, 13) => (4, 3, 0),
            (true, _, 14) => (3, 0, 0),
            // Another connection.
            (true, _, _) => {
                let key = ConnectionKey {
                    guest_port: Port(2000 + u32::from(input.u8())),
                    peer_cid: Cid::HOST,
                    peer_port: Port(22),
                };
                let header = self.header(key, input.choose(&[1, 2]), 1, 0, 0, buf_alloc, 0);
                return self.packet(header, 0);
            }
        };
        let header = self.header(key, socket_type, op, flags, len, buf_alloc, fwd_cnt);
        self.packet(header, len);
    }

    #[allow(clippy::too_many_arguments)] // a header has so many
    fn header(
        &self,
        key: ConnectionKey,
        socket_type: u16,
        op: u16,
        flags: u32,
        len: u32,
        buf_alloc: u32,
        fwd_cnt: u32,
    ) -> Header {
        Header {
            src_cid: GUEST,
            dst_cid: key.peer_cid,
            src_port: key.guest_port,
            dst_port: key.peer_port,
            len,
            socket_type,
            op,
            flags,
            buf_alloc,
            fwd_cnt,
        }
    }

    fn packet(&mut self, header: Header, available: u32) {
        let strays = self.mux.list_lengths().strays;
        assert_eq!(self.mux.accepts_input(), strays < MAX_STRAYS, "invariant 6");
        if !self.mux.accepts_input() {
            return;
        }
        let disposition = self.mux.handle_packet(self.now, &header, available);
        self.book.packet(&header, available, disposition, self.now);
        self.events(Some(&header));
        self.book.assert_faults_told();
    }

    // ------------------------------------------------------------------------------------------ host ends

    fn connects(&mut self, input: &mut Input<'_>) {
        let what = input.u8();
        let caller = Caller {
            guest_port: Port(22 + u32::from(what & 1)),
            socket_type: match what & 4 {
                0 => SocketType::Stream,
                _ => SocketType::Seqpacket,
            },
            // A sibling, whose ports may still be in use here.
            address: (what & 0x30 == 0).then(|| {
                (
                    Cid(4 + u64::from(what >> 7)),
                    Port(1000 + u32::from(what >> 6 & 1)),
                )
            }),
            waits: what & 2 != 0,
        };
        let types = self.book.types;
        let known = match caller.socket_type {
            SocketType::Stream => types.stream,
            SocketType::Seqpacket => types.seqpacket,
        };
        let full = self.mux.len() >= self.config.max_connections;
        match self.mux.request(self.now, caller) {
            Err(RefuseReason::UnsupportedType) => assert!(!known),
            Err(reason) => assert!(reason == RefuseReason::Limit && full && known),
            Ok(id) => {
                assert!(known && !full);
                let key = self.mux.connection(id).expect("it has just begun").key();
                let cid = caller.address.map_or(Cid::HOST, |(cid, _)| cid);
                assert_eq!((key.guest_port, key.peer_cid), (caller.guest_port, cid));
                self.book.connects(id, key, caller, self.now);
            }
        }
        self.events(None);
    }

    fn host(&mut self, input: &mut Input<'_>) {
        let what = input.u8();
        let entries = &self.book.entries;
        let Some(at) = entries.len().checked_sub(1 + usize::from(what >> 4)) else {
            return;
        };
        let entry = &entries[at];
        let (id, held, open) = (entry.id, entry.takeable(), entry.is_open());
        let begun = entry.established || entry.origin == Origin::Host;
        match what & 15 {
            0..=2 => {
                let accepted = self.mux.connected(self.now, id);
                self.book.connected(id, self.now, accepted);
            }
            3 => self.mux.refused(id, RefuseReason::DialRefused),
            4..=6 => self.readable(id),
            7 => {
                self.mux.host_drained(id);
                self.book.entry(id).readable = false;
            }
            8..=10 if open => {
                let n = u64::from(input.size()).min(held) as u32;
                self.takes(id, n);
            }
            11 if open => self.takes(id, held as u32),
            12 | 13 if begun => {
                let entry = self.book.entry(id);
                entry.readable = false;
                entry.host_eof |= entry.ended.is_none() && begun;
                self.mux.host_eof(self.now, id);
            }
            14 if open && input.u8() == 0 => {
                self.book.misbehaves(Misbehavior::EmptyMessages);
                self.mux.misbehaves(id, Misbehavior::EmptyMessages);
            }
            14 if begun => {
                self.book.host_write_failed(id);
                self.mux.host_write_failed(self.now, id);
            }
            15 => self.mux.host_failed(id, CloseReason::PeerRst),
            _ => {}
        }
        self.events(None);
    }

    fn readable(&mut self, id: ConnectionId) {
        self.mux.host_readable(id);
        let entry = self.book.entry(id);
        entry.readable = !entry.host_eof;
    }

    fn takes(&mut self, id: ConnectionId, n: u32) {
        self.book.host_took(id, n, self.now);
        self.mux.host_wrote(self.now, id, n);
        self.events(None);
    }

    fn takes_everything(&mut self) {
        let held: Vec<_> = self
            .book
            .live()
            .map(|entry| (entry.id, entry.takeable()))
            .collect();
        for (id, n) in held {
            if n > 0 {
                self.takes(id, n as u32);
            }
        }
    }

    // ------------------------------------------------------------------------------------------ output

    /// The guest has posted some buffers.
    fn send_some(&mut self, input: &mut Input<'_>) {
        for _ in 0..input.size().min(2000) {
            let Some(outgoing) = self.mux.poll_outgoing(self.now) else {
                break;
            };
            let (reads, more) = match outgoing {
                Outgoing::Data { .. } => (input.size(), input.bool()),
                Outgoing::Control(_) => (0, false),
            };
            self.send(outgoing, reads, more);
        }
        self.events(None);
    }

    /// `outgoing` goes out; the host end has so many bytes, and perhaps more.
    fn send(&mut self, outgoing: Outgoing, reads: u32, more: bool) {
        // What is told of the packet is known before it.
        self.events(None);
        match outgoing {
            Outgoing::Control(header) => self.book.control(&header, self.now),
            Outgoing::Data { id, limit } => {
                let entry = self.book.entry(id);
                assert!(entry.readable && entry.is_open() && limit > 0, "{entry:?}");
                assert!(i64::from(limit) <= entry.room(), "{limit}: {entry:?}");
                let reads = reads.min(limit);
                if reads == 0 {
                    entry.readable = false;
                    self.mux.host_drained(id);
                    return;
                }
                // It may take several buffers.
                let first = reads.min(4096);
                // Of messages, one ends amid what is read, one goes on behind it, and one is empty.
                let boundaries = match self.book.entry(id).socket_type {
                    SocketType::Stream => [Boundary::None; 3],
                    SocketType::Seqpacket => [Boundary::None, Boundary::Record, Boundary::Message],
                };
                let lengths = [first, reads - first, 0].into_iter().zip(boundaries);
                for (len, boundary) in lengths.filter(|(len, end)| *len > 0 || *end == Boundary::Message) {
                    let header = self.mux.data_header(id, len, boundary).expect("it lives");
                    assert_eq!(header.len, len);
                    self.book.data(id, &header, boundary);
                }
                let entry = self.book.entry(id);
                entry.readable = more;
                entry.moved = self.now;
                self.mux.host_read(self.now, id, reads, more);
            }
        }
    }

    /// The guest has buffers for all there is; nobody has bytes for it any more after this.
    fn send_everything(&mut self) {
        let connections = self.mux.len();
        let most = MAX_STRAYS + KINDS * connections + 2 * connections;
        for _ in 0..=most {
            let Some(outgoing) = self.mux.poll_outgoing(self.now) else {
                self.events(None);
                assert!(!self.mux.has_outgoing());
                return;
            };
            self.send(outgoing, u32::MAX, false);
        }
        panic!("invariant 4: more than {most} packets without any input");
    }

    fn events(&mut self, by_packet: Option<&Header>) {
        while let Some(event) = self.mux.poll_event() {
            let connections = self.mux.len();
            self.book.event(event, by_packet, self.now, connections);
        }
        assert!(!self.mux.has_events());
    }

    // ------------------------------------------------------------------------------------------ time and the end

    fn passes(&mut self, time: Duration) {
        self.now += time;
        self.mux.handle_timeout(self.now);
        self.events(None);
        let next = self.mux.poll_timeout();
        assert!(next.is_none_or(|at| at > self.now), "it would spin");
        self.book.time_passed(self.now);
    }

    /// What holds at any time.
    fn check(&self) {
        let lists = self.mux.list_lengths();
        let connections = self.mux.len();
        assert!(connections <= self.config.max_connections, "invariant 6");
        assert!(lists.strays <= MAX_STRAYS, "invariant 6: {lists:?}");
        // As swept, and what came since.
        assert!(
            lists.replies + lists.data <= 4 * connections + 64 + 2 * connections + 2,
            "invariant 6: {lists:?} of {connections}"
        );
        assert!(
            lists.timers <= connections && lists.keys <= connections,
            "{lists:?}"
        );
        assert_eq!(
            self.book.live().count(),
            self.mux
                .ids()
                .filter(|id| {
                    let state = self.mux.connection(*id).map(|connection| connection.state());
                    !matches!(state, Some(State::Closing | State::Dead))
                })
                .count()
        );
        for entry in self.book.live() {
            let connection = self.mux.connection(entry.id).expect("it has not ended");
            assert_eq!(u64::from(connection.held()), entry.held(), "{entry:?}");
            assert!(
                entry.held() <= u64::from(self.config.buf_alloc),
                "invariant 1: {entry:?}"
            );
        }
    }

    fn settle(&mut self) {
        let unanswered: Vec<_> = self
            .book
            .live()
            .filter(|entry| !entry.established && entry.origin == Origin::Guest)
            .map(|entry| entry.id)
            .collect();
        for (n, id) in unanswered.into_iter().enumerate() {
            if n % 2 == 0 {
                self.mux.refused(id, RefuseReason::DialRefused);
            } else {
                let accepted = self.mux.connected(self.now, id);
                self.book.connected(id, self.now, accepted);
            }
        }
        self.events(None);
        self.send_everything();
        self.takes_everything();
        self.send_everything();
        self.check();
        self.book.nobody_waits();
        let lists = self.mux.list_lengths();
        assert_eq!((lists.strays, lists.replies, lists.data), (0, 0, 0));

        // The host ends go, one half after the other; the guest says no more.
        let open: Vec<_> = self.book.live().map(|entry| entry.id).collect();
        for id in open {
            self.mux.host_eof(self.now, id);
            self.events(None);
            if self.book.entry(id).ended.is_none() {
                self.book.host_write_failed(id);
                self.mux.host_write_failed(self.now, id);
                self.events(None);
            }
        }
        self.send_everything();
        for _ in 0..4 {
            self.passes(Duration::from_secs(31));
            self.send_everything();
        }
        assert!(self.mux.is_empty(), "{:?}", self.mux);
        assert_eq!(self.mux.poll_timeout(), None);
        assert_eq!(self.mux.list_lengths(), Default::default());
        let entry = self.book.live().next();
        assert!(entry.is_none(), "invariant 8: {entry:?}");
    }
}
