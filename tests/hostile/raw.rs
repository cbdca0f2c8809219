//! The hostile guest's verbs: what a driver can put into its rings, a VMM into its socket.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

use vsock_sidecar::embedded_guest::{
    DESC_F_INDIRECT, DriverOptions, EmbeddedGuest, Packet, Profile, RX, Segment, Shape, TX, Table, Virtqueue,
};
use vsock_sidecar::vsock::{Cid, Header, Op, Port};

use crate::stage::{ECHO, GUEST, Stage};
use crate::support::LONG;

/// Guest memory that the driver never uses: 1 MiB and a bit from here on.
pub const SCRATCH: u64 = 0xfe0_0000;
/// A guest-physical address that no region holds.
pub const NOWHERE: u64 = 0x70_0000_0000;
/// Where the guest's memory ends.
pub const END: u64 = 256 << 20;
/// Descriptors of the TX ring from here on are never used by the driver.
pub const SPARE: u16 = 96;
/// What the guest says it can take.
pub const BUF_ALLOC: u32 = 256 * 1024;

/// A connection of the guest, counted by hand.
#[derive(Clone, Copy, Debug)]
pub struct Flow {
    /// The guest's port.
    pub port: u32,
    /// The host's port.
    pub to: u32,
    /// Payload bytes received and consumed.
    pub fwd_cnt: u32,
}

impl Flow {
    /// A packet of this connection.
    pub fn header(&self, op: Op) -> Header {
        Header {
            fwd_cnt: self.fwd_cnt,
            ..header(op as u16, self.port, self.to)
        }
    }
}

/// A bare packet from the guest's port `from` to the host's port `to`.
pub fn header(op: u16, from: u32, to: u32) -> Header {
    Header {
        src_cid: Cid(GUEST),
        dst_cid: Cid::HOST,
        src_port: Port(from),
        dst_port: Port(to),
        len: 0,
        socket_type: 1,
        op,
        flags: 0,
        buf_alloc: BUF_ALLOC,
        fwd_cnt: 0,
    }
}

/// Whether a packet says nothing but credit.
fn is_credit(header: &Header) -> bool {
    [Op::CreditUpdate as u16, Op::CreditRequest as u16].contains(&header.op)
}

/// A buffer for the device to read.
pub fn readable(addr: u64, len: u32) -> Segment {
    Segment {
        addr,
        len,
        writable: false,
    }
}

/// A buffer for the device to write.
pub fn writable(addr: u64, len: u32) -> Segment {
    Segment {
        addr,
        len,
        writable: true,
    }
}

/// The hostile guest, with one connection that does no wrong.
pub struct Raw<'s> {
    pub guest: EmbeddedGuest,
    pub stage: &'s Stage,
    /// The connection that does no wrong.
    good: Flow,
    /// Packets of other flows since they were last taken, credit left aside.
    heard: Vec<Packet>,
    /// Chains were published behind the driver's back, and it will find used elements that it cannot place.
    pub by_hand: bool,
}

impl<'s> Raw<'s> {
    /// Boots, and opens the connection that does no wrong.
    #[track_caller]
    pub fn boot(stage: &'s Stage, (profile, options): (Profile, DriverOptions)) -> Raw<'s> {
        let guest = EmbeddedGuest::boot(&stage.sidecar.path("web.sock"), profile, options).unwrap();
        let mut raw = Raw {
            guest,
            stage,
            good: Flow {
                port: 0,
                to: ECHO,
                fwd_cnt: 0,
            },
            heard: Vec::new(),
            by_hand: false,
        };
        raw.open_good();
        raw
    }

    /// Opens the connection that does no wrong anew.
    #[track_caller]
    pub fn open_good(&mut self) {
        self.good = self.open(ECHO);
    }

    /// The connection that does no wrong, for tricks that talk about it from elsewhere.
    pub fn good(&self) -> Flow {
        self.good
    }

    /// A port that nobody has used in this process.
    pub fn port(&self) -> u32 {
        static NEXT: AtomicU32 = AtomicU32::new(1000);
        NEXT.fetch_add(1, Ordering::Relaxed)
    }

    /// Sends a packet with the length that it has.
    #[track_caller]
    pub fn send(&mut self, header: Header, payload: &[u8]) {
        let header = Header {
            len: payload.len() as u32,
            ..header
        };
        self.send_as_it_is(header, payload);
    }

    /// Sends a packet whose `len` need not be the truth.
    #[track_caller]
    pub fn send_as_it_is(&mut self, header: Header, payload: &[u8]) {
        self.send_shaped(header, payload, &Shape::header_then_payload());
    }

    #[track_caller]
    pub fn send_shaped(&mut self, header: Header, payload: &[u8], shape: &Shape) {
        let sent = self.guest.driver.send_packet_wait(&header, payload, shape, LONG);
        sent.unwrap();
    }

    /// The same packet many times, as fast as the ring takes them, while everything that comes is taken.
    #[track_caller]
    pub fn storm(&mut self, count: u32, mut packet: impl FnMut(u32) -> (Header, &'static [u8])) {
        let deadline = Instant::now() + LONG;
        let mut sent = 0;
        while sent < count {
            assert!(
                Instant::now() < deadline,
                "the ring stands still after {sent} packets"
            );
            let (header, payload) = packet(sent);
            let header = Header {
                len: payload.len() as u32,
                ..header
            };
            let shape = Shape::single();
            if self.guest.driver.queue_packet(&header, payload, &shape).is_ok() {
                sent += 1;
                if sent % 16 == 0 {
                    self.guest.driver.notify_tx();
                }
            } else {
                self.guest.driver.notify_tx();
                if self.guest.driver.reclaim_tx() == 0 {
                    std::thread::yield_now();
                }
            }
            self.hear();
        }
        self.guest.driver.notify_tx();
    }

    /// Takes what has come.
    #[track_caller]
    pub fn hear(&mut self) {
        while let Some(packet) = self.guest.driver.try_recv().unwrap() {
            self.put_aside(packet);
        }
    }

    fn put_aside(&mut self, packet: Packet) {
        if !is_credit(&packet.header) {
            self.heard.push(packet);
        }
    }

    /// Takes what was heard of other flows than the good one.
    pub fn take_heard(&mut self) -> Vec<Packet> {
        std::mem::take(&mut self.heard)
    }

    /// Whether nothing was heard of other flows than the good one.
    pub fn heard_is_empty(&self) -> bool {
        self.heard.is_empty()
    }

    /// The next packet that `is` one of those that are waited for; the others are put aside.
    #[track_caller]
    fn await_packet(&mut self, is: impl Fn(&Header) -> bool) -> Packet {
        if let Some(at) = self.heard.iter().position(|packet| is(&packet.header)) {
            return self.heard.remove(at);
        }
        let deadline = Instant::now() + LONG;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let packet = self.guest.driver.recv_packet(left).unwrap();
            if is(&packet.header) {
                return packet;
            }
            self.put_aside(packet);
        }
    }

    /// The next packet to this port of ours, credit included.
    #[track_caller]
    pub fn await_of(&mut self, port: u32) -> Packet {
        self.await_packet(|header| header.dst_port.0 == port)
    }

    /// The next packet to this port that says more than credit.
    #[track_caller]
    pub fn await_word(&mut self, port: u32) -> Packet {
        self.await_packet(|header| header.dst_port.0 == port && !is_credit(header))
    }

    /// The REQUEST that a client's coming makes, to this port of ours. Ends of earlier clients may come before.
    #[track_caller]
    pub fn await_request(&mut self, port: u32) -> Header {
        self.await_packet(|header| header.dst_port.0 == port && header.op == Op::Request as u16)
            .header
    }

    /// Connects.
    #[track_caller]
    pub fn open(&mut self, to: u32) -> Flow {
        let flow = Flow {
            port: self.port(),
            to,
            fwd_cnt: 0,
        };
        self.send(flow.header(Op::Request), &[]);
        let answer = self.await_word(flow.port);
        assert_eq!(answer.header.op, Op::Response as u16, "{answer:?}");
        flow
    }

    /// Waits for `count` payload bytes on a connection, and consumes them.
    #[track_caller]
    pub fn receive(&mut self, flow: &mut Flow, count: usize) -> Vec<u8> {
        let mut got = Vec::new();
        while got.len() < count {
            let (port, to) = (flow.port, flow.to);
            let packet = self.await_packet(|header| {
                (header.dst_port.0, header.src_port.0) == (port, to) && !is_credit(header)
            });
            assert_eq!(packet.header.op, Op::Rw as u16, "{packet:?}");
            flow.fwd_cnt = flow.fwd_cnt.wrapping_add(packet.payload.len() as u32);
            got.extend(packet.payload);
        }
        got
    }

    /// Sends bytes on a connection to the echo service and waits for them.
    #[track_caller]
    pub fn round_trip(&mut self, flow: &mut Flow, text: &[u8]) {
        self.send(flow.header(Op::Rw), text);
        let got = self.receive(flow, text.len());
        assert!(got == text, "other bytes came back");
    }

    /// A round trip on the connection that does no wrong. When it is over, everything sent before has been judged, and
    /// what was due then was answered.
    #[track_caller]
    pub fn good_goes_on(&mut self) {
        let mut good = self.good;
        self.round_trip(&mut good, b"a word of a well-behaved connection");
        self.good = good;
    }

    /// Posts a chain on the TX ring through the driver.
    #[track_caller]
    pub fn send_chain(&mut self, segments: &[Segment], table: Table) -> u16 {
        self.guest.driver.send_chain(TX, segments, table).unwrap()
    }

    /// Writes descriptors from [`SPARE`] on, relative to it where `next` is below the number of them, and publishes the
    /// first on a ring.
    #[track_caller]
    pub fn publish(&mut self, queue: u16, descriptors: &[(u64, u32, u16, u16)]) {
        let queue = self.quiet(queue);
        for (at, (addr, len, flags, next)) in descriptors.iter().enumerate() {
            let next = match usize::from(*next) < descriptors.len() {
                true => SPARE + next,
                false => *next,
            };
            queue.write_descriptor(SPARE + at as u16, *addr, *len, *flags, next);
        }
        queue.publish(SPARE);
        queue.kick();
    }

    /// Publishes a descriptor on the TX ring that leads to a table of these bytes.
    #[track_caller]
    pub fn publish_table(&mut self, table: &[u8], len: u32, flags: u16) {
        self.guest.driver.memory().write(SCRATCH, table).unwrap();
        self.publish(TX, &[(SCRATCH, len, flags | DESC_F_INDIRECT, 0)]);
    }

    /// A ring to be written by hand; what the driver had under way has come back.
    #[track_caller]
    pub fn quiet(&mut self, queue: u16) -> &mut Virtqueue {
        if queue == TX {
            self.guest.driver.flush_tx(LONG).unwrap();
        }
        self.by_hand = true;
        self.guest.driver.queue(queue)
    }

    /// Guest-physical address of a ring's descriptor table.
    pub fn ring_at(&mut self, queue: u16) -> u64 {
        let base = self.guest.driver.memory().regions()[0].user_addr();
        self.guest.driver.queue(queue).setup(0).desc - base
    }

    /// So many round trips that every receive buffer posted before has had its turn.
    #[track_caller]
    pub fn turn_buffers_over(&mut self) {
        let posted = self.guest.driver.queue(RX).outstanding();
        for _ in 0..posted + 8 {
            self.good_goes_on();
        }
    }

    /// Waits until the device has taken everything that was published on the TX ring.
    #[track_caller]
    pub fn until_taken(&mut self) {
        let queue = self.guest.driver.queue(TX);
        crate::support::until("every TX chain comes back", || {
            queue.used_idx() == queue.avail_idx()
        });
    }
}
