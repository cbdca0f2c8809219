//! Messages between a Linux guest's SEQPACKET socket and a host end, whatever their lengths and whoever is slow: each arrives
//! whole and in order, and nobody waits for ever.
//!
//! The guest is a model of net/vmw_vsock/virtio_transport_common.c. It sends as much of a message as it has credit for, with
//! VIRTIO_VSOCK_SEQ_EOM in the packet behind which nothing of it is left (`virtio_transport_send_pkt_info`); refuses what is
//! longer than the buffer of the other end (EMSGSIZE, `virtio_transport_seqpacket_enqueue`); takes only whole messages, makes
//! room then and says so each time (`virtio_transport_seqpacket_do_dequeue`); and drops, without a word, what exceeds its
//! buffer (`virtio_transport_inc_rx_pkt`), which is a failure here. Payload is its length.

use std::collections::VecDeque;

use proptest::prelude::*;

use super::*;
use crate::vsock::SocketTypes;
use crate::vsock::header::MAX_PACKET_PAYLOAD;

/// Payload that fits one RX buffer.
const RX_PAYLOAD: u32 = 3732;

/// A message, as far as one end has it: bytes, and whether it ends a record.
type Message = (u32, bool);

#[derive(Debug)]
struct Socket {
    buf_alloc: u32,
    /// Messages that the application has yet to send; of the first, so many bytes are gone.
    unsent: VecDeque<Message>,
    gone: u32,
    tx_cnt: u32,
    peer_buf_alloc: u32,
    peer_fwd_cnt: u32,
    /// Fragments that arrived: their lengths and flags.
    rx_queue: VecDeque<(u32, u32)>,
    buf_used: u32,
    fwd_cnt: u32,
    received: Vec<Message>,
}

struct Pair {
    mux: Muxer,
    now: Instant,
    id: ConnectionId,
    guest: Socket,
    /// Packets of the guest that were not taken, and RX buffers that it has not looked at.
    tx: VecDeque<Header>,
    rx: VecDeque<Header>,
    /// The host end: a message of the guest that has not ended, those that wait for it, and those that it took.
    partial: u32,
    waiting: VecDeque<Message>,
    taken: Vec<Message>,
    /// Messages for the guest; of the first, so many bytes are gone.
    unsent: VecDeque<Message>,
    gone: u32,
}

impl Pair {
    fn new(buf_alloc: u32, guest_buf: u32) -> Pair {
        let mut mux = Muxer::new(MuxerConfig {
            buf_alloc,
            ..config()
        });
        mux.set_types(SocketTypes {
            stream: false,
            seqpacket: true,
        });
        let now = Instant::now();
        let request = Header {
            socket_type: SocketType::Seqpacket as u16,
            buf_alloc: guest_buf,
            ..FLOW.sends(Op::Request)
        };
        mux.handle_packet(now, &request, 0);
        let Some(Event::Dial { id, .. }) = mux.poll_event() else {
            panic!("no dial");
        };
        assert!(mux.connected(now, id));
        Pair {
            mux,
            now,
            id,
            guest: Socket {
                buf_alloc: guest_buf,
                unsent: VecDeque::new(),
                gone: 0,
                tx_cnt: 0,
                // Until RESPONSE has come.
                peer_buf_alloc: 0,
                peer_fwd_cnt: 0,
                rx_queue: VecDeque::new(),
                buf_used: 0,
                fwd_cnt: 0,
                received: Vec::new(),
            },
            tx: VecDeque::new(),
            rx: VecDeque::new(),
            partial: 0,
            waiting: VecDeque::new(),
            taken: Vec::new(),
            unsent: VecDeque::new(),
            gone: 0,
        }
    }

    // ------------------------------------------------------------------------------------------ the guest

    fn guest_says(&mut self, op: Op, len: u32, flags: u32) {
        self.tx.push_back(Header {
            socket_type: SocketType::Seqpacket as u16,
            len,
            flags,
            buf_alloc: self.guest.buf_alloc,
            fwd_cnt: self.guest.fwd_cnt,
            ..FLOW.sends(op)
        });
    }

    /// The application sends; it blocks on what there is no credit for.
    fn guest_sends(&mut self) {
        while let Some((len, ends_record)) = self.guest.unsent.front().copied() {
            let s = &mut self.guest;
            let in_flight = s.tx_cnt.wrapping_sub(s.peer_fwd_cnt);
            let space = s.peer_buf_alloc.saturating_sub(in_flight);
            let n = space.min(len - s.gone).min(MAX_PACKET_PAYLOAD);
            if n == 0 {
                return;
            }
            s.tx_cnt = s.tx_cnt.wrapping_add(n);
            s.gone += n;
            let mut flags = 0;
            if s.gone == len {
                flags = if ends_record { 3 } else { 1 };
                s.gone = 0;
                s.unsent.pop_front();
            }
            self.guest_says(Op::Rw, n, flags);
        }
    }

    /// It looks at up to `n` packets.
    fn guest_polls(&mut self, n: usize) {
        for _ in 0..n {
            let Some(header) = self.rx.pop_front() else {
                break;
            };
            let s = &mut self.guest;
            (s.peer_buf_alloc, s.peer_fwd_cnt) = (header.buf_alloc, header.fwd_cnt);
            match Op::from_wire(header.op) {
                Some(Op::Rw) => {
                    assert!(
                        s.buf_used + header.len <= s.buf_alloc,
                        "Linux drops {header:?}: {s:?}"
                    );
                    s.buf_used += header.len;
                    s.rx_queue.push_back((header.len, header.flags));
                }
                Some(Op::CreditRequest) => self.guest_says(Op::CreditUpdate, 0, 0),
                Some(Op::Response | Op::CreditUpdate) => {}
                _ => panic!("out of place: {header:?}"),
            }
        }
        self.guest_sends();
    }

    /// The application takes up to `n` messages.
    fn guest_reads(&mut self, n: usize) {
        for _ in 0..n {
            let s = &mut self.guest;
            let Some(last) = s.rx_queue.iter().position(|(_, flags)| flags & 1 != 0) else {
                return;
            };
            let (mut len, mut ends_record) = (0, false);
            for (fragment, flags) in s.rx_queue.drain(..=last) {
                len += fragment;
                ends_record = flags & 2 != 0;
            }
            s.buf_used -= len;
            s.fwd_cnt = s.fwd_cnt.wrapping_add(len);
            s.received.push((len, ends_record));
            self.guest_says(Op::CreditUpdate, 0, 0);
        }
    }

    // ------------------------------------------------------------------------------------------ the device

    /// Takes up to `n` packets of the guest.
    fn takes_packets(&mut self, n: usize) {
        for _ in 0..n {
            let Some(header) = self.tx.pop_front() else {
                break;
            };
            let disposition = self.mux.handle_packet(self.now, &header, header.len);
            if let Disposition::Payload { len, boundary, .. } = disposition {
                self.partial += len;
                if boundary.is_end() {
                    let message = (self.partial, boundary == Boundary::Record);
                    self.waiting.push_back(message);
                    self.partial = 0;
                }
            }
            self.events();
        }
    }

    /// The host end takes up to `n` messages.
    fn host_takes(&mut self, n: usize) {
        for _ in 0..n {
            let Some(message) = self.waiting.pop_front() else {
                break;
            };
            self.taken.push(message);
            self.mux.host_wrote(self.now, self.id, message.0);
            self.events();
        }
    }

    fn host_says(&mut self, message: Message) {
        self.unsent.push_back(message);
        self.mux.host_readable(self.id);
    }

    /// Puts up to `n` packets into RX buffers.
    fn gives(&mut self, mut n: usize) {
        while n > 0 {
            let Some(outgoing) = self.mux.poll_outgoing(self.now) else {
                break;
            };
            match outgoing {
                Outgoing::Control(header) => {
                    n -= 1;
                    self.rx.push_back(header);
                }
                Outgoing::Data { mut limit, .. } => {
                    let mut sent = 0;
                    while let Some((len, ends_record)) = self.unsent.front().copied() {
                        let piece = limit.min(RX_PAYLOAD).min(len - self.gone);
                        if n == 0 || (piece == 0 && len > 0) {
                            break;
                        }
                        self.gone += piece;
                        let boundary = match (self.gone == len, ends_record) {
                            (false, _) => Boundary::None,
                            (true, false) => Boundary::Message,
                            (true, true) => Boundary::Record,
                        };
                        if boundary.is_end() {
                            self.gone = 0;
                            self.unsent.pop_front();
                        }
                        let header = self.mux.data_header(self.id, piece, boundary);
                        self.rx.push_back(header.expect("it lives"));
                        (limit, sent, n) = (limit - piece, sent + piece, n - 1);
                    }
                    self.mux
                        .host_read(self.now, self.id, sent, !self.unsent.is_empty());
                }
            }
            self.events();
        }
    }

    fn events(&mut self) {
        while let Some(event) = self.mux.poll_event() {
            assert!(
                matches!(event, Event::CreditStalled { .. } | Event::CreditResumed { .. }),
                "{event:?}"
            );
        }
    }

    /// Nobody is slow any more.
    fn settles(&mut self) {
        for _ in 0..10_000 {
            self.guest_sends();
            self.takes_packets(usize::MAX);
            self.host_takes(usize::MAX);
            self.gives(usize::MAX);
            let idle = self.rx.is_empty() && self.tx.is_empty();
            self.guest_polls(usize::MAX);
            self.guest_reads(usize::MAX);
            if idle && self.tx.is_empty() {
                return;
            }
        }
        panic!("it never settles");
    }
}

#[derive(Clone, Debug)]
enum Operation {
    GuestSends(Message),
    HostSends(Message),
    GuestReads(usize),
    GuestPolls(usize),
    TakesPackets(usize),
    HostTakes(usize),
    Gives(usize),
}

fn operation() -> impl Strategy<Value = Operation> {
    use Operation::*;
    // Many are as long as they may be: see where they are cut off.
    let len = prop_oneof![1u32..100, 1u32..70_000, 1u32..300_000];
    let message = (len, any::<bool>());
    let some = prop_oneof![1usize..4, 1usize..40];
    prop_oneof![
        4 => message.clone().prop_map(GuestSends),
        4 => message.prop_map(HostSends),
        3 => some.clone().prop_map(GuestReads),
        5 => some.clone().prop_map(GuestPolls),
        5 => some.clone().prop_map(TakesPackets),
        3 => some.clone().prop_map(HostTakes),
        5 => some.prop_map(Gives),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_message_arrives_whole_and_in_order_and_nobody_waits(
        buf_alloc in prop_oneof![Just(4096u32), Just(65_536), Just(OUR_BUF)],
        guest_buf in prop_oneof![Just(1000u32), Just(65_536), Just(OUR_BUF)],
        operations in prop::collection::vec(operation(), 1..80),
    ) {
        let mut pair = Pair::new(buf_alloc, guest_buf);
        let (mut said, mut answered) = (Vec::new(), Vec::new());
        for operation in operations {
            match operation {
                // What is longer is EMSGSIZE.
                Operation::GuestSends((len, ends_record)) => {
                    let message = (len.min(buf_alloc), ends_record);
                    said.push(message);
                    pair.guest.unsent.push_back(message);
                    pair.guest_sends();
                }
                // What is longer is refused by the device, which asks for the longest message.
                Operation::HostSends((len, ends_record)) => {
                    let longest = pair.mux.connection(pair.id).unwrap().longest_message();
                    prop_assert_eq!(longest, guest_buf);
                    let message = (len.min(longest), ends_record);
                    answered.push(message);
                    pair.host_says(message);
                }
                Operation::GuestReads(n) => pair.guest_reads(n),
                Operation::GuestPolls(n) => pair.guest_polls(n),
                Operation::TakesPackets(n) => pair.takes_packets(n),
                Operation::HostTakes(n) => pair.host_takes(n),
                Operation::Gives(n) => pair.gives(n),
            }
            let held = pair.mux.connection(pair.id).unwrap().held();
            prop_assert!(held <= buf_alloc, "invariant 1");
        }
        pair.settles();
        prop_assert_eq!(&pair.taken, &said);
        prop_assert_eq!(&pair.guest.received, &answered);
        prop_assert_eq!(pair.mux.connection(pair.id).unwrap().held(), 0);
    }
}
