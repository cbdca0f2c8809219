//! A guest that says anything, in any order, to a shell that keeps to its contract: no panic, no memory beyond the
//! bounds, no loop without end, every connection ends once, and no RST answers an RST.

use std::collections::HashMap;

use proptest::prelude::*;

use super::*;
use crate::vsock::{CloseReason, RefuseReason};

const MAX_CONNECTIONS: usize = 4;
const BUF: u32 = 10_000;
const IDLE: Duration = Duration::from_secs(20);

/// What happens next; the first number of a host end's chooses among those there are.
#[derive(Clone, Debug)]
enum Operation {
    Packet(Header, u32),
    Connect(u32),
    Dialled(usize, bool),
    Readable(usize),
    Eof(usize),
    WriteFails(usize),
    Fails(usize),
    /// The host end takes up to so many bytes.
    Takes(usize, u32),
    /// The guest posts so many buffers.
    Buffers(usize),
    Passes(u64),
    Reset,
    CloseAll,
}

/// Numbers that counters, lengths and sizes turn on.
fn number() -> impl Strategy<Value = u32> {
    prop_oneof![
        6 => 0u32..4,
        4 => 1u32..2 * BUF,
        1 => (BUF - 1)..BUF + 2,
        1 => (1u32 << 30) - 2..(1 << 30) + 2,
        1 => (1u32 << 31) - 2..(1 << 31) + 2,
        1 => u32::MAX - 3..=u32::MAX,
        1 => any::<u32>(),
    ]
}

/// Mostly a packet of one of few flows, with a field or two gone wrong.
fn header() -> impl Strategy<Value = Header> {
    let cid = |usual: u64| {
        prop_oneof![
            40 => Just(Cid(usual)),
            1 => prop_oneof![Just(0u64), Just(1), Just(2), Just(3), Just(u64::MAX), any::<u64>()].prop_map(Cid),
        ]
    };
    // The flows of the guest, and those that connect() makes.
    let ports = prop_oneof![
        4 => (1u32..4, Just(80u32)),
        3 => (Just(22u32), (1u32 << 30)..(1 << 30) + 3),
        1 => (number(), number()),
    ];
    let op = prop_oneof![20 => 1u16..8, 1 => 0u16..10, 1 => any::<u16>()];
    let socket_type = prop_oneof![30 => Just(1u16), 1 => 0u16..4, 1 => any::<u16>()];
    let len = prop_oneof![3 => Just(0u32), 2 => 1u32..4000, 1 => number()];
    let flags = prop_oneof![6 => 0u32..4, 1 => any::<u32>()];
    let buf_alloc = prop_oneof![3 => Just(5000u32), 2 => number()];
    let fwd_cnt = prop_oneof![5 => Just(0u32), 1 => 0u32..5000, 1 => number()];
    let addresses = (cid(3), cid(2), ports);
    (addresses, len, socket_type, op, flags, buf_alloc, fwd_cnt).prop_map(
        |((src_cid, dst_cid, (src_port, dst_port)), len, socket_type, op, flags, buf_alloc, fwd_cnt)| {
            Header {
                src_cid,
                dst_cid,
                src_port: Port(src_port),
                dst_port: Port(dst_port),
                len,
                socket_type,
                op,
                flags,
                buf_alloc,
                fwd_cnt,
            }
        },
    )
}

fn operation() -> impl Strategy<Value = Operation> {
    use Operation::*;
    let which = 0usize..MAX_CONNECTIONS;
    let available = prop_oneof![3 => Just(65_536u32), 1 => number()];
    prop_oneof![
        30 => (header(), available).prop_map(|(header, available)| Packet(header, available)),
        2 => Just(Connect(22)),
        6 => (which.clone(), prop::bool::weighted(0.8)).prop_map(|(w, reached)| Dialled(w, reached)),
        4 => which.clone().prop_map(Readable),
        2 => which.clone().prop_map(Eof),
        1 => which.clone().prop_map(WriteFails),
        1 => which.clone().prop_map(Fails),
        4 => (which, number()).prop_map(|(w, n)| Takes(w, n)),
        8 => (0usize..8).prop_map(Buffers),
        3 => prop_oneof![0u64..3000, 0u64..40_000].prop_map(Passes),
        1 => prop::bool::weighted(0.3).prop_map(|reset| if reset { Reset } else { CloseAll }),
    ]
}

/// The smallest shell that keeps to the contract, and the judges.
struct Shell {
    s: Scene,
    /// Host ends that live, and whether they are connected.
    live: HashMap<ConnectionId, bool>,
    order: Vec<ConnectionId>,
    /// RX buffers posted.
    buffers: usize,
}

impl Shell {
    fn new() -> Shell {
        let scene = Scene::with(MuxerConfig {
            buf_alloc: BUF,
            max_connections: MAX_CONNECTIONS,
            idle_timeout: IDLE,
            ..config()
        });
        Shell {
            s: scene,
            live: HashMap::new(),
            order: Vec::new(),
            buffers: 0,
        }
    }

    fn does(&mut self, operation: &Operation) {
        use Operation::*;
        let now = self.s.now;
        let chosen = |which: &usize| self.order.get(*which).copied();
        match operation {
            Packet(header, available) => self.takes_packet(header, *available),
            Connect(port) => {
                if let Ok(id) = self.s.mux.connect(now, Port(*port)) {
                    self.add(id);
                }
            }
            Dialled(which, reached) => {
                if let Some(id) = chosen(which) {
                    if *reached {
                        let wanted = self.s.state(id) == Some(State::Dialing);
                        assert_eq!(self.s.mux.connected(now, id), wanted);
                        if wanted {
                            self.live.insert(id, true);
                        }
                    } else {
                        self.s.mux.refused(id, RefuseReason::NoRule);
                    }
                }
            }
            Readable(which) => {
                if let Some(id) = chosen(which) {
                    self.s.mux.host_readable(id);
                }
            }
            Eof(which) => {
                if let Some(id) = chosen(which) {
                    self.s.mux.host_eof(now, id);
                }
            }
            WriteFails(which) => {
                if let Some(id) = chosen(which) {
                    self.s.mux.host_write_failed(now, id);
                }
            }
            Fails(which) => {
                if let Some(id) = chosen(which) {
                    self.s.mux.host_failed(id, CloseReason::PeerRst);
                }
            }
            Takes(which, n) => {
                if let Some(id) = chosen(which) {
                    let held = self.s.mux.connection(id).map_or(0, |c| c.held());
                    if held > 0 {
                        self.s.mux.host_wrote(now, id, 1 + n % held);
                    }
                }
            }
            Buffers(n) => {
                self.buffers += n;
                self.gives();
            }
            Passes(milliseconds) => {
                self.s.now += Duration::from_millis(*milliseconds);
                self.s.mux.handle_timeout(self.s.now);
                if let Some(due) = self.s.mux.poll_timeout() {
                    assert!(due > self.s.now, "what was due is done");
                }
            }
            Reset => {
                self.s.mux.reset();
                assert!(!self.s.mux.has_outgoing(), "the next guest knows of nothing");
            }
            CloseAll => self.s.mux.close_all(CloseReason::Drain, RefuseReason::Draining),
        }
        self.takes_events();
        self.check();
    }

    fn takes_packet(&mut self, header: &Header, available: u32) {
        let is_rst = header.op == Op::Rst as u16;
        if !self.s.mux.accepts_input() {
            return;
        }
        if is_rst {
            // With nothing owed before it, nothing but the word of others may be owed after it.
            self.buffers = 4096;
            self.gives();
        }
        let known = self.s.mux.len();
        let disposition = self.s.mux.handle_packet(self.s.now, header, available);
        if let Disposition::Payload { id, len, .. } = disposition {
            assert!(0 < len && len <= available && len == header.len);
            assert_eq!(self.live.get(&id), Some(&true), "payload for nobody");
        }
        self.takes_events();
        if is_rst {
            assert_eq!(disposition, Disposition::Consumed);
            assert!(self.s.mux.len() <= known);
            assert_eq!(self.s.poll(), None, "{header:?} was answered");
            self.buffers = 0;
        }
    }

    /// Packets go into the guest's buffers.
    fn gives(&mut self) {
        let mut polls = 0;
        while self.buffers > 0 {
            let Some(outgoing) = self.s.poll() else { break };
            polls += 1;
            assert!(polls <= 8192, "no end");
            self.buffers -= 1;
            match outgoing {
                Outgoing::Control(header) => {
                    assert!(Op::from_wire(header.op).is_some_and(|op| op != Op::Rw));
                    assert_eq!((header.dst_cid, header.len), (GUEST, 0));
                }
                Outgoing::Data { id, limit } => {
                    assert_eq!(self.live.get(&id), Some(&true), "bytes of nobody");
                    assert_eq!(limit, self.s.room(id));
                    // Small packets, huge ones, and sockets that turn out to be empty or ended.
                    match polls % 4 {
                        0 => self.s.mux.host_drained(id),
                        1 => self.s.mux.host_eof(self.s.now, id),
                        turn => {
                            let n = if turn == 2 { limit } else { limit.min(100) };
                            let header = self
                                .s
                                .mux
                                .data_header(id, n, Boundary::None)
                                .expect("it has data");
                            assert_eq!((header.op, header.len), (Op::Rw as u16, n));
                            self.s.mux.host_read(self.s.now, id, n, polls % 8 < 4);
                        }
                    }
                }
            }
            self.takes_events();
        }
    }

    fn add(&mut self, id: ConnectionId) {
        assert_eq!(self.live.insert(id, false), None);
        self.order.push(id);
    }

    fn takes_events(&mut self) {
        let mut events = 0;
        while let Some(event) = self.s.mux.poll_event() {
            events += 1;
            assert!(events <= 4 + 2 * MAX_CONNECTIONS, "{event:?}: no end");
            match event {
                Event::Dial { id, .. } => self.add(id),
                Event::Accepted { id, .. } => assert_eq!(self.live.insert(id, true), Some(false)),
                Event::Refused { id, .. } => {
                    assert_eq!(self.live.remove(&id), Some(false), "{event:?}");
                    self.order.retain(|other| *other != id);
                }
                Event::Closed { id, .. } => {
                    assert_eq!(self.live.remove(&id), Some(true), "{event:?}");
                    self.order.retain(|other| *other != id);
                }
                Event::ShutdownHost { id, flags } => {
                    assert_eq!(self.live.get(&id), Some(&true), "{event:?}");
                    assert_ne!(flags, ShutdownFlags::NONE);
                }
                Event::CreditStalled { id } | Event::CreditResumed { id, .. } => {
                    assert_eq!(self.live.get(&id), Some(&true), "{event:?}");
                }
                Event::LimitReached { .. } | Event::Misbehaved { .. } => {}
            }
        }
    }

    fn check(&self) {
        let mux = &self.s.mux;
        assert!(mux.len() <= MAX_CONNECTIONS);
        for id in mux.ids() {
            let connection = mux.connection(id).expect("it has a name");
            assert!(connection.held() <= BUF, "invariant 1");
            let waits = matches!(connection.state(), State::Closing | State::Dead);
            assert_ne!(self.live.contains_key(&id), waits, "{connection:?}");
            assert!(!waits || connection.held() == 0 || connection.state() == State::Dead);
        }
        assert!(
            self.live.keys().all(|id| mux.connection(*id).is_some()),
            "a host end without connection"
        );
        let lists = mux.list_lengths();
        assert!(lists.strays <= crate::vsock::backlog::Backlog::MAX_STRAYS);
        assert!(
            lists.replies + lists.data <= 64 + 6 * MAX_CONNECTIONS,
            "{lists:?}"
        );
        assert!(lists.timers <= mux.len() && lists.keys <= mux.len(), "{lists:?}");
    }

    /// Time and buffers without end.
    fn ends(&mut self) {
        for _ in 0..4 {
            self.buffers = usize::MAX;
            self.gives();
            // Nobody answers a dial, takes a byte or says another word.
            self.does(&Operation::Passes(31_000));
        }
        self.buffers = usize::MAX;
        self.gives();
        assert_eq!(self.live.len(), 0, "invariant 8");
        self.s.assert_over();
        let lists = self.s.mux.list_lengths();
        assert_eq!((lists.timers, lists.keys), (0, 0));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 250, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn nothing_a_guest_says_breaks_the_law(operations in prop::collection::vec(operation(), 1..200)) {
        let mut shell = Shell::new();
        for operation in &operations {
            shell.does(operation);
        }
        shell.ends();
    }

    #[test]
    fn every_bit_pattern_is_a_header(bytes in prop::array::uniform32(any::<u8>()), more in prop::array::uniform12(any::<u8>())) {
        let mut whole = [0; crate::vsock::HEADER_LEN];
        whole[..32].copy_from_slice(&bytes);
        whole[32..].copy_from_slice(&more);
        let header = Header::decode(&whole);
        prop_assert_eq!(header.encode(), whole);
        let mut s = Scene::new();
        prop_assert_eq!(s.mux.handle_packet(s.now, &header, u32::MAX), Disposition::Consumed);
    }
}
