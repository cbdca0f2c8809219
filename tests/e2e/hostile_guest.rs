//! A guest that does wrong on purpose: one row a trick. What is answered, what is counted, who survives.
//!
//! Beside every trick there is a well-behaved connection of the same guest, and it goes on.

use std::net::{Ipv4Addr, TcpListener};
use std::time::Duration;

use vsock_sidecar::embedded_guest::profile::feature;
use vsock_sidecar::embedded_guest::{
    DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, DriverOptions, EmbeddedGuest, Packet, Profile, RX, Refill,
    RxLayout, Segment, Shape, TX, Table, descriptor,
};
use vsock_sidecar::vsock::{Cid, Header, Op, Port};

use crate::support::*;

/// The host's port of the echo service, one that nobody serves, one without a rule.
const ECHO: u32 = 7;
const CLOSED: u32 = 8;
const NO_RULE: u32 = 9;
/// The CID of the guest.
const GUEST: u64 = 3;
/// The guest's receive buffer in its own words.
const BUF_ALLOC: u32 = 256 * 1024;

/// One connection of the guest, counted by hand.
#[derive(Clone, Copy, Debug)]
struct Flow {
    port: u32,
    /// Payload bytes received and consumed.
    fwd_cnt: u32,
}

/// A guest that is driven packet by packet.
struct Hostile {
    guest: EmbeddedGuest,
    /// The connection that does nothing wrong.
    good: Flow,
    next_port: u32,
    /// Packets of other flows than the good one, since they were last taken.
    others: Vec<Packet>,
}

fn header(op: u16, from: u32, to: u32) -> Header {
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

impl Hostile {
    fn boot(sidecar: &Sidecar, options: DriverOptions) -> Hostile {
        Hostile::boot_at(sidecar, "web.sock", Profile::qemu(), options)
    }

    fn boot_at(sidecar: &Sidecar, socket: &str, profile: Profile, options: DriverOptions) -> Hostile {
        let guest = EmbeddedGuest::boot(&sidecar.path(socket), profile, options).unwrap();
        let mut hostile = Hostile {
            guest,
            good: Flow { port: 0, fwd_cnt: 0 },
            next_port: 1000,
            others: Vec::new(),
        };
        hostile.good = hostile.open();
        hostile
    }

    fn port(&mut self) -> u32 {
        self.next_port += 1;
        self.next_port
    }

    #[track_caller]
    fn send(&mut self, header: Header, payload: &[u8]) {
        let header = Header {
            len: payload.len() as u32,
            ..header
        };
        self.send_as_it_is(header, payload);
    }

    /// `header.len` need not be the truth.
    #[track_caller]
    fn send_as_it_is(&mut self, header: Header, payload: &[u8]) {
        self.guest
            .driver
            .send_packet_wait(&header, payload, &Shape::header_then_payload(), LONG)
            .unwrap();
    }

    #[track_caller]
    fn recv(&mut self) -> Packet {
        self.guest.driver.recv_packet(LONG).unwrap()
    }

    /// Connects to the echo service.
    #[track_caller]
    fn open(&mut self) -> Flow {
        let port = self.port();
        self.send(header(Op::Request as u16, port, ECHO), &[]);
        let answer = self.await_of(port);
        assert_eq!(answer.header.op, Op::Response as u16, "{answer:?}");
        Flow { port, fwd_cnt: 0 }
    }

    /// The next packet to this port of ours.
    #[track_caller]
    fn await_of(&mut self, port: u32) -> Packet {
        loop {
            let packet = self.recv();
            if packet.header.dst_port.0 == port {
                return packet;
            }
            self.others.push(packet);
        }
    }

    /// A round trip on the good connection. When it is over, everything sent before has been judged and answered.
    #[track_caller]
    fn good_goes_on(&mut self) {
        let text = *b"a word of a well-behaved connection";
        let mut head = header(Op::Rw as u16, self.good.port, ECHO);
        head.fwd_cnt = self.good.fwd_cnt;
        self.send(head, &text);
        let mut got = Vec::new();
        while got.len() < text.len() {
            let packet = self.await_of(self.good.port);
            match packet.header.op {
                op if op == Op::Rw as u16 => got.extend(packet.payload),
                op if op == Op::CreditUpdate as u16 => {}
                op if op == Op::CreditRequest as u16 => {
                    let mut head = header(Op::CreditUpdate as u16, self.good.port, ECHO);
                    head.fwd_cnt = self.good.fwd_cnt;
                    self.send(head, &[]);
                }
                _ => panic!("the good connection hears {packet:?}"),
            }
        }
        assert_eq!(got, text);
        self.good.fwd_cnt += text.len() as u32;
    }

    /// Packets that came for other flows, without those that say nothing but credit.
    fn take_others(&mut self) -> Vec<Packet> {
        let mut others = std::mem::take(&mut self.others);
        others.retain(|packet| packet.header.op != Op::CreditUpdate as u16);
        others
    }
}

fn served() -> Sidecar {
    let port = serve(echo);
    Sidecar::start(&format!(
        "guests:\n- name: web\n  cid: {GUEST}\n  vhostUser: {{socket: \"{{dir}}/web.sock\"}}\n  outbound:\n  \
         - {{name: echo, port: {ECHO}, to: \"tcp://127.0.0.1:{port}\"}}\n  \
         - {{name: closed, port: {CLOSED}, to: \"tcp://127.0.0.1:{}\"}}\n\
         - name: other\n  cid: 4\n  vhostUser: {{socket: \"{{dir}}/other.sock\"}}\n  \
         outbound: [{{name: echo, port: {ECHO}, to: \"tcp://127.0.0.1:{port}\"}}]\n",
        free_port(),
    ))
}

/// What the guest hears of a trick.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Answer {
    Silence,
    Rst,
}

/// A trick on a flow of its own (`None`: a flow that does not exist); answers the port it was played on.
struct Row {
    trick: &'static str,
    play: fn(&mut Hostile) -> u32,
    answer: Answer,
    /// `kind` of `vsock_misbehavior_total`, or nothing to complain about.
    counted: Option<&'static str>,
}

/// Sends a bare packet of an operation on a flow that does not exist.
fn stray(hostile: &mut Hostile, change: impl FnOnce(&mut Header)) -> u32 {
    let port = hostile.port();
    let mut head = header(Op::Rw as u16, port, ECHO);
    change(&mut head);
    hostile.send(head, &[]);
    port
}

/// Opens a connection and sends one packet on it.
fn on_open(hostile: &mut Hostile, payload: &[u8], change: impl FnOnce(&mut Header)) -> u32 {
    let flow = hostile.open();
    let mut head = header(Op::Rw as u16, flow.port, ECHO);
    head.len = payload.len() as u32;
    change(&mut head);
    hostile.send_as_it_is(head, payload);
    flow.port
}

const ROWS: &[Row] = &[
    Row {
        trick: "another guest's CID as source",
        play: |h| stray(h, |head| head.src_cid = Cid(4)),
        answer: Answer::Silence,
        counted: Some("wrong_source_cid"),
    },
    Row {
        trick: "the good connection's ports under another CID",
        play: |h| {
            let port = h.good.port;
            let mut head = header(Op::Rst as u16, port, ECHO);
            head.src_cid = Cid(4);
            h.send(head, &[]);
            0
        },
        answer: Answer::Silence,
        counted: Some("wrong_source_cid"),
    },
    Row {
        trick: "REQUEST to CID 1",
        play: |h| stray(h, |head| (head.op, head.dst_cid) = (1, Cid(1))),
        answer: Answer::Rst,
        counted: None,
    },
    Row {
        trick: "REQUEST to another guest",
        play: |h| stray(h, |head| (head.op, head.dst_cid) = (1, Cid(5))),
        answer: Answer::Rst,
        counted: None,
    },
    Row {
        trick: "REQUEST to a CID of 41 bits",
        play: |h| stray(h, |head| (head.op, head.dst_cid) = (1, Cid(1 << 40))),
        answer: Answer::Rst,
        counted: None,
    },
    Row {
        trick: "data to a CID of 41 bits",
        play: |h| stray(h, |head| head.dst_cid = Cid(1 << 40)),
        answer: Answer::Rst,
        counted: None,
    },
    Row {
        trick: "operation 0 on no flow",
        play: |h| stray(h, |head| head.op = 0),
        answer: Answer::Rst,
        counted: Some("unknown_op"),
    },
    Row {
        trick: "operation 8 on a connection",
        play: |h| on_open(h, &[], |head| head.op = 8),
        answer: Answer::Rst,
        counted: Some("unknown_op"),
    },
    Row {
        trick: "operation 65535 on a connection",
        play: |h| on_open(h, &[], |head| head.op = 65535),
        answer: Answer::Rst,
        counted: Some("unknown_op"),
    },
    Row {
        trick: "REQUEST of an unknown type",
        play: |h| stray(h, |head| (head.op, head.socket_type) = (1, 77)),
        answer: Answer::Rst,
        counted: Some("unknown_type"),
    },
    Row {
        trick: "an unknown type on a connection",
        play: |h| on_open(h, b"x", |head| head.socket_type = 0),
        answer: Answer::Rst,
        counted: Some("unknown_type"),
    },
    Row {
        trick: "REQUEST of type SEQPACKET for a target that has no boundaries, which is refused and no fault",
        play: |h| stray(h, |head| (head.op, head.socket_type) = (1, 2)),
        answer: Answer::Rst,
        counted: None,
    },
    Row {
        trick: "SEQPACKET data on a stream",
        play: |h| on_open(h, b"x", |head| head.socket_type = 2),
        answer: Answer::Rst,
        counted: Some("unsupported_type"),
    },
    Row {
        trick: "REQUEST for a connection that is established",
        play: |h| on_open(h, &[], |head| head.op = Op::Request as u16),
        answer: Answer::Rst,
        counted: Some("duplicate_request"),
    },
    Row {
        trick: "RESPONSE on no flow",
        play: |h| stray(h, |head| head.op = Op::Response as u16),
        answer: Answer::Rst,
        counted: None,
    },
    Row {
        trick: "RESPONSE on the guest's own connection",
        play: |h| on_open(h, &[], |head| head.op = Op::Response as u16),
        answer: Answer::Rst,
        counted: Some("unexpected_response"),
    },
    Row {
        trick: "data on no flow",
        play: |h| stray(h, |_| {}),
        answer: Answer::Rst,
        counted: None,
    },
    Row {
        trick: "SHUTDOWN on no flow",
        play: |h| stray(h, |head| (head.op, head.flags) = (4, 3)),
        answer: Answer::Rst,
        counted: None,
    },
    Row {
        trick: "CREDIT_UPDATE on no flow",
        play: |h| stray(h, |head| head.op = 6),
        answer: Answer::Rst,
        counted: None,
    },
    Row {
        trick: "RST on no flow",
        play: |h| stray(h, |head| head.op = 3),
        answer: Answer::Silence,
        counted: None,
    },
    Row {
        trick: "RST of an unknown type",
        play: |h| stray(h, |head| (head.op, head.socket_type) = (3, 9)),
        answer: Answer::Silence,
        counted: None,
    },
    Row {
        trick: "data after SHUTDOWN(SEND)",
        play: |h| {
            let port = on_open(h, &[], |head| (head.op, head.flags) = (4, 2));
            h.send(header(Op::Rw as u16, port, ECHO), b"late");
            port
        },
        answer: Answer::Rst,
        counted: Some("data_after_shutdown"),
    },
    Row {
        trick: "len beyond the chain",
        play: |h| on_open(h, b"short", |head| head.len = 5000),
        answer: Answer::Rst,
        counted: Some("payload_short"),
    },
    Row {
        trick: "len of 4 GiB less one",
        play: |h| on_open(h, b"short", |head| head.len = u32::MAX),
        answer: Answer::Rst,
        counted: Some("payload_short"),
    },
    Row {
        trick: "data of no bytes",
        play: |h| on_open(h, &[], |_| {}),
        answer: Answer::Silence,
        counted: None,
    },
    Row {
        trick: "fwd_cnt beyond what was sent",
        play: |h| on_open(h, b"x", |head| head.fwd_cnt = 1000),
        answer: Answer::Rst,
        counted: Some("fwd_cnt_beyond_sent"),
    },
    Row {
        trick: "fwd_cnt that goes backwards by half the circle",
        play: |h| on_open(h, b"x", |head| head.fwd_cnt = 1 << 31),
        answer: Answer::Rst,
        counted: Some("fwd_cnt_beyond_sent"),
    },
];

/// What a trick is called, the counter that shows it, and how it is played.
type Played = (&'static str, &'static str, fn(&mut Hostile));

/// The same for tricks that need memory: its guest-physical address.
type PlayedAt = (&'static str, &'static str, fn(&mut Hostile, u64));

#[test]
fn a_trick_costs_the_connection_it_is_played_on() {
    let sidecar = served();
    let mut hostile = Hostile::boot(&sidecar, DriverOptions::default());
    hostile.good_goes_on();
    for row in ROWS {
        println!("{}", row.trick);
        let count = |kind: Option<&str>| match kind {
            Some(kind) => sidecar.metric("vsock_misbehavior_total", &[("guest", "web"), ("kind", kind)]),
            None => sidecar.metric("vsock_misbehavior_total", &[("guest", "web")]),
        };
        let (all, of_kind) = (count(None), row.counted.map(|kind| count(Some(kind))));
        hostile.take_others();
        let port = (row.play)(&mut hostile);
        hostile.good_goes_on();
        hostile.good_goes_on();
        let heard = hostile.take_others();
        match row.answer {
            Answer::Silence => assert!(heard.is_empty(), "{}: {heard:?}", row.trick),
            Answer::Rst => {
                // A service may close when it sees its guest's end, and be told of before the trick is played.
                let resets: Vec<_> = heard
                    .iter()
                    .filter(|packet| packet.header.dst_port.0 == port)
                    .filter(|packet| packet.header.op != Op::Shutdown as u16)
                    .collect();
                assert_eq!(resets.len(), 1, "{}: {heard:?}", row.trick);
                let reset = resets[0].header;
                assert_eq!((reset.op, reset.len), (Op::Rst as u16, 0), "{}", row.trick);
                assert_eq!(
                    (reset.dst_cid, reset.src_port.0),
                    (Cid(GUEST), ECHO),
                    "{}",
                    row.trick
                );
            }
        }
        let expected = f64::from(u8::from(row.counted.is_some()));
        assert_eq!(count(None) - all, expected, "{}: counted once", row.trick);
        if let (Some(kind), Some(before)) = (row.counted, of_kind) {
            assert_eq!(count(Some(kind)) - before, 1.0, "{}: {kind}", row.trick);
        }
    }
    // The device itself kept every rule meanwhile.
    assert!(hostile.guest.driver.stats().violations.is_empty());
    assert_eq!(sidecar.metric("vsock_vring_errors_total", &[]), 0.0);
    assert_eq!(
        sidecar.metric(
            "vsock_payload_bytes_total",
            &[("guest", "web"), ("direction", "host_to_guest")]
        ),
        f64::from(hostile.good.fwd_cnt)
    );
}

/// Data on a connection whose dial has not ended: nobody could have allowed it.
#[test]
fn data_before_the_answer_costs_the_connection() {
    let full = rustix::net::socket(
        rustix::net::AddressFamily::INET,
        rustix::net::SocketType::STREAM,
        None,
    )
    .unwrap();
    rustix::net::bind(&full, &std::net::SocketAddr::from((Ipv4Addr::LOCALHOST, 0))).unwrap();
    rustix::net::listen(&full, 0).unwrap();
    let full = TcpListener::from(full);
    let hole = full.local_addr().unwrap();
    let mut queued = Vec::new();
    while let Ok(stream) = std::net::TcpStream::connect_timeout(&hole, Duration::from_millis(200)) {
        queued.push(stream);
    }
    let port = serve(echo);
    let sidecar = Sidecar::start(&format!(
        "guests:\n- name: web\n  cid: {GUEST}\n  vhostUser: {{socket: \"{{dir}}/web.sock\"}}\n  outbound:\n  \
         - {{name: echo, port: {ECHO}, to: \"tcp://127.0.0.1:{port}\"}}\n  \
         - {{name: hole, port: {CLOSED}, to: \"tcp://{hole}\"}}\n"
    ));
    let mut hostile = Hostile::boot(&sidecar, DriverOptions::default());
    let port = hostile.port();
    hostile.send(header(Op::Request as u16, port, CLOSED), &[]);
    hostile.send(header(Op::Rw as u16, port, CLOSED), b"impatient");
    let answer = hostile.await_of(port);
    assert_eq!(answer.header.op, Op::Rst as u16);
    hostile.good_goes_on();
    assert_eq!(
        sidecar.metric("vsock_misbehavior_total", &[("kind", "not_established")]),
        1.0
    );
    let labels = [("rule", "hole"), ("reason", "misbehavior")];
    assert_eq!(sidecar.metric("vsock_connections_refused_total", &labels), 1.0);

    // The same REQUEST again while we dial is Linux's connect() tried again: no fault.
    let port = hostile.port();
    hostile.send(header(Op::Request as u16, port, CLOSED), &[]);
    hostile.send(header(Op::Request as u16, port, CLOSED), &[]);
    hostile.good_goes_on();
    assert!(hostile.take_others().is_empty());
    assert_eq!(sidecar.metric("vsock_misbehavior_total", &[]), 1.0);
    // It changes its mind: no answer to an RST, and the dial is over.
    hostile.send(header(Op::Rst as u16, port, CLOSED), &[]);
    hostile.good_goes_on();
    assert!(hostile.take_others().is_empty());
    assert_eq!(
        sidecar.metric("vsock_connections_refused_total", &[("reason", "client_gone")]),
        1.0
    );
}

#[test]
fn data_beyond_the_credit_costs_the_connection_and_no_memory() {
    let stalled = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = serve(echo);
    let sidecar = Sidecar::start(&format!(
        "guests:\n- name: web\n  cid: {GUEST}\n  vhostUser: {{socket: \"{{dir}}/web.sock\"}}\n  outbound:\n  \
         - {{name: echo, port: {ECHO}, to: \"tcp://127.0.0.1:{port}\"}}\n  \
         - {{name: stalled, port: {CLOSED}, to: \"tcp://{}\"}}\n  limits: {{buffer: 64KiB}}\n",
        stalled.local_addr().unwrap()
    ));
    let mut hostile = Hostile::boot(&sidecar, DriverOptions::default());
    let port = hostile.port();
    hostile.send(header(Op::Request as u16, port, CLOSED), &[]);
    assert_eq!(hostile.await_of(port).header.op, Op::Response as u16);
    let _peer = accept_tcp(&stalled);
    // The peer reads nothing, so this ends when the kernel's buffers and ours are full.
    let chunk = vec![1; 32 * 1024];
    let mut sent = 0;
    let reset = loop {
        hostile.send(header(Op::Rw as u16, port, CLOSED), &chunk);
        sent += chunk.len();
        assert!(sent < 64 << 20, "credit is not enforced");
        hostile.good_goes_on();
        if let Some(packet) = hostile.take_others().pop() {
            break packet;
        }
    };
    assert_eq!((reset.header.op, reset.header.dst_port.0), (Op::Rst as u16, port));
    assert_eq!(
        sidecar.metric("vsock_misbehavior_total", &[("kind", "credit_exceeded")]),
        1.0
    );
    assert_eq!(
        sidecar.metric("vsock_buffered_bytes", &[]),
        0.0,
        "nothing of it is kept"
    );
    hostile.good_goes_on();
}

/// A guest that shrinks its buffer below what is under way: room is negative, which is none, and not 4 GiB.
#[test]
fn a_receive_buffer_that_shrinks_stops_the_flow_and_overflows_nothing() {
    let sidecar = served();
    let mut hostile = Hostile::boot(&sidecar, DriverOptions::default());
    let flow = hostile.open();
    let mut head = header(Op::Rw as u16, flow.port, ECHO);
    head.buf_alloc = 4096;
    hostile.send(head, &[1; 4096]);
    let mut got = 0;
    while got < 4096 {
        let packet = hostile.await_of(flow.port);
        if packet.header.op == Op::Rw as u16 {
            got += packet.payload.len();
        }
    }
    // Nothing is consumed, and now there are only 100 bytes of room for 4096 under way.
    head.buf_alloc = 100;
    hostile.send(head, &[2; 1000]);
    for _ in 0..5 {
        hostile.good_goes_on();
    }
    let heard = hostile.take_others();
    assert!(
        heard.iter().all(|p| p.header.op == Op::CreditRequest as u16),
        "not a byte beyond the buffer: {heard:?}"
    );
    // With room again, the rest comes.
    let mut head = header(Op::CreditUpdate as u16, flow.port, ECHO);
    head.fwd_cnt = 4096;
    hostile.send(head, &[]);
    let mut got = Vec::new();
    while got.len() < 1000 {
        let packet = hostile.await_of(flow.port);
        if packet.header.op == Op::Rw as u16 {
            got.extend(packet.payload);
        }
    }
    assert!(got.iter().all(|byte| *byte == 2));
    assert_eq!(
        sidecar.metric("vsock_misbehavior_total", &[]),
        0.0,
        "it is allowed to"
    );
    hostile.good_goes_on();
}

/// Inbound connections are answered by a guest that means no good: it repeats RESPONSE, or answers clients that have left.
#[test]
fn answers_that_nobody_waits_for_cost_their_connection() {
    use std::io::{Read, Write};
    let sidecar = Sidecar::start(&format!(
        "guests:\n- name: web\n  cid: {GUEST}\n  vhostUser: {{socket: \"{{dir}}/web.sock\"}}\n  \
         outbound: [{{name: echo, port: {ECHO}, to: \"tcp://127.0.0.1:{}\"}}]\n  \
         inbound: [{{name: mux, listen: \"unix://{{dir}}/mux.sock\", protocol: connect}}]\n",
        serve(echo)
    ));
    let mut hostile = Hostile::boot(&sidecar, DriverOptions::default());
    let client = |hostile: &mut Hostile| {
        let mut client = std::os::unix::net::UnixStream::connect(sidecar.path("mux.sock")).unwrap();
        client.set_read_timeout(Some(LONG)).unwrap();
        client.write_all(b"CONNECT 52\n").unwrap();
        // Resets of what came before may still be on their way.
        let request = loop {
            let packet = hostile.await_of(52).header;
            if packet.op == Op::Request as u16 {
                break packet;
            }
            assert_eq!(packet.op, Op::Rst as u16);
        };
        (client, header(Op::Response as u16, 52, request.src_port.0))
    };
    // RESPONSE twice, and a thousand times more: one connection, one count, and never a second OK.
    let (mut patient, response) = client(&mut hostile);
    for _ in 0..1000 {
        hostile.send(response, &[]);
        while let Some(packet) = hostile.guest.driver.try_recv().unwrap() {
            hostile.others.push(packet);
        }
    }
    hostile.good_goes_on();
    let mut said = Vec::new();
    let _ = patient.read_to_end(&mut said);
    let said = String::from_utf8(said).unwrap();
    assert!(
        said.is_empty() || said == format!("OK {}\n", response.dst_port),
        "{said:?}"
    );
    assert_eq!(
        sidecar.metric("vsock_misbehavior_total", &[("kind", "unexpected_response")]),
        1.0
    );
    assert!(
        hostile
            .take_others()
            .iter()
            .all(|packet| packet.header.op == Op::Rst as u16)
    );

    // The client has left before the guest answers: RST, and no word to anybody.
    for _ in 0..50 {
        let (gone, response) = client(&mut hostile);
        drop(gone);
        hostile.send(response, &[]);
        let end = hostile.await_of(52).header;
        assert_eq!((end.op, end.src_port), (Op::Rst as u16, response.dst_port));
    }
    hostile.good_goes_on();
    sidecar.until_metric("vsock_connections_active", &[("rule", "mux")], 0.0);

    // A guest that answers its own REQUESTs' ports, which we never asked for.
    let port = hostile.port();
    hostile.send(header(Op::Response as u16, port, 1 << 30), &[]);
    assert_eq!(hostile.await_of(port).header.op, Op::Rst as u16);
    hostile.good_goes_on();
}

/// CREDIT_REQUESTs without end are answered as often as there is room for answers, which are a set.
#[test]
fn a_storm_of_credit_requests_owes_one_answer_at_a_time() {
    let sidecar = served();
    let mut hostile = Hostile::boot(&sidecar, DriverOptions::default());
    hostile.guest.driver.set_refill(Refill::Never);
    let memory = sidecar.anonymous_memory();
    let flow = hostile.good.port;
    let mut ask = header(Op::CreditRequest as u16, flow, ECHO);
    ask.fwd_cnt = hostile.good.fwd_cnt;
    for _ in 0..20_000 {
        hostile.send(ask, &[]);
    }
    hostile.guest.driver.flush_tx(LONG).unwrap();
    let grown = sidecar.anonymous_memory().saturating_sub(memory);
    assert!(grown < 1 << 20, "grew by {grown} bytes");
    hostile.guest.driver.set_refill(Refill::AtHalf);
    let mut updates = 0;
    while let Some(packet) = hostile.guest.driver.try_recv().unwrap() {
        assert_eq!(packet.header.op, Op::CreditUpdate as u16);
        updates += 1;
    }
    assert!(
        (1..=200).contains(&updates),
        "{updates} answers for one ring of buffers"
    );
    hostile.guest.driver.post_rx(usize::MAX).unwrap();
    hostile.good_goes_on();
    assert_eq!(sidecar.metric("vsock_misbehavior_total", &[]), 0.0);
}

/// Sends `count` bare packets as fast as the ring takes them, and takes what comes meanwhile; answers how many resets
/// that was.
fn storm(hostile: &mut Hostile, count: u32, packet: impl Fn(u32) -> Header) -> usize {
    let driver = &mut hostile.guest.driver;
    let mut answers = 0;
    let mut sent = 0;
    while sent < count {
        if driver.send_packet(&packet(sent), &[], &Shape::single()).is_ok() {
            sent += 1;
        } else if driver.reclaim_tx() == 0 {
            std::thread::yield_now();
        }
        while let Some(got) = driver.try_recv().unwrap() {
            assert_eq!(got.header.op, Op::Rst as u16);
            answers += 1;
        }
    }
    answers
}

#[test]
fn a_storm_of_resets_is_never_answered() {
    let sidecar = served();
    let mut hostile = Hostile::boot(&sidecar, DriverOptions::default());
    let answers = storm(&mut hostile, 100_000, |i| header(Op::Rst as u16, 5000 + i, ECHO));
    hostile.good_goes_on();
    assert_eq!(answers + hostile.take_others().len(), 0);
    let labels = [("guest", "web"), ("direction", "guest_to_host"), ("op", "rst")];
    assert_eq!(sidecar.metric("vsock_packets_total", &labels), 100_000.0);
    assert_eq!(sidecar.metric("vsock_misbehavior_total", &[]), 0.0);
}

#[test]
fn a_storm_of_requests_gets_as_many_resets() {
    const COUNT: u32 = 100_000;
    let sidecar = served();
    let mut hostile = Hostile::boot(&sidecar, DriverOptions::default());
    let memory = sidecar.anonymous_memory();
    let mut answers = storm(&mut hostile, COUNT, |i| {
        header(Op::Request as u16, 5000 + i, NO_RULE)
    });
    hostile.good_goes_on();
    answers += hostile.take_others().len();
    assert_eq!(answers as u32, COUNT);
    let labels = [("guest", "web"), ("rule", ""), ("reason", "no_rule")];
    assert_eq!(
        sidecar.metric("vsock_connections_refused_total", &labels),
        f64::from(COUNT)
    );
    let grown = sidecar.anonymous_memory().saturating_sub(memory);
    assert!(grown < 8 << 20, "grew by {grown} bytes");
    let loud = sidecar.log().lines().filter(|line| line.contains("WARN")).count();
    assert!(loud < 10, "{loud} warnings");
}

/// The same without receive buffers: what is owed is bounded, so the packets wait in the guest's own ring.
#[test]
fn a_storm_of_requests_without_receive_buffers_stays_in_the_guests_ring() {
    let sidecar = served();
    let mut hostile = Hostile::boot(&sidecar, DriverOptions::default());
    // It has read enough: what is posted from now on is posted by hand.
    hostile.guest.driver.set_refill(Refill::Never);
    let memory = sidecar.anonymous_memory();
    let mut sent = 0u32;
    let mut stuck_since = std::time::Instant::now();
    while stuck_since.elapsed() < Duration::from_millis(700) {
        let head = header(Op::Request as u16, 5000 + sent, NO_RULE);
        match hostile.guest.driver.send_packet(&head, &[], &Shape::single()) {
            Ok(_) => {
                sent += 1;
                stuck_since = std::time::Instant::now();
            }
            Err(_) => {
                if hostile.guest.driver.reclaim_tx() == 0 {
                    std::thread::sleep(Duration::from_millis(1));
                }
            }
        }
        assert!(sent < 100_000, "answers without bound are owed");
    }
    println!("{sent} requests until the ring stood still");
    let grown = sidecar.anonymous_memory().saturating_sub(memory);
    assert!(grown < 4 << 20, "grew by {grown} bytes");
    let cpu = sidecar.cpu_time();
    std::thread::sleep(Duration::from_millis(500));
    assert!(sidecar.cpu_time() - cpu < Duration::from_millis(100), "it spins");

    // Other guests do not notice.
    let other = linux(&sidecar.path("other.sock"));
    drop(other.connect(ECHO).unwrap());

    hostile.guest.driver.set_refill(Refill::AtHalf);
    let mut resets = 0;
    while resets < sent {
        match hostile.guest.driver.try_recv().unwrap() {
            Some(packet) => {
                assert_eq!(packet.header.op, Op::Rst as u16);
                resets += 1;
            }
            None => {
                hostile.guest.driver.post_rx(usize::MAX).unwrap();
                let deadline = std::time::Instant::now() + LONG;
                hostile.guest.driver.wait_rx(deadline).unwrap();
            }
        }
    }
    hostile.guest.driver.post_rx(usize::MAX).unwrap();
    hostile.good_goes_on();
    assert!(hostile.take_others().is_empty());
    assert!(hostile.guest.driver.stats().violations.is_empty());
}

/// A malformed chain: sent on a queue, counted under a reason, handed back.
struct ChainRow {
    trick: &'static str,
    segments: fn(u64) -> Vec<Segment>,
    reason: &'static str,
}

fn readable(addr: u64, len: u32) -> Segment {
    Segment {
        addr,
        len,
        writable: false,
    }
}

fn writable(addr: u64, len: u32) -> Segment {
    Segment {
        addr,
        len,
        writable: true,
    }
}

/// `gpa` is an address with a page of memory behind it.
const CHAINS: &[ChainRow] = &[
    ChainRow {
        trick: "shorter than a header",
        segments: |gpa| vec![readable(gpa, 43)],
        reason: "chain_too_short",
    },
    ChainRow {
        trick: "empty",
        segments: |gpa| vec![readable(gpa, 0)],
        reason: "chain_too_short",
    },
    ChainRow {
        trick: "device-writable",
        segments: |gpa| vec![writable(gpa, 100)],
        reason: "wrong_direction",
    },
    ChainRow {
        trick: "a header to read and a payload to write",
        segments: |gpa| vec![readable(gpa, 44), writable(gpa + 44, 100)],
        reason: "wrong_direction",
    },
    ChainRow {
        trick: "out of memory",
        segments: |_| vec![readable(0x70_0000_0000, 44)],
        reason: "address_unmapped",
    },
    ChainRow {
        trick: "header in memory, payload not",
        segments: |gpa| vec![readable(gpa, 44), readable(0x70_0000_0000, 44)],
        reason: "address_unmapped",
    },
    ChainRow {
        trick: "over the end of memory",
        segments: |_| vec![readable((256 << 20) - 20, 44)],
        reason: "address_unmapped",
    },
    ChainRow {
        trick: "over the end of the address space",
        segments: |_| vec![readable(u64::MAX - 20, 44)],
        reason: "address_wraps",
    },
    ChainRow {
        trick: "4 GiB and more",
        segments: |_| vec![readable(0x10_0000, 1 << 27); 33],
        reason: "chain_too_big",
    },
];

#[test]
fn a_malformed_chain_costs_that_chain() {
    let sidecar = served();
    let mut hostile = Hostile::boot(&sidecar, DriverOptions::default());
    let errors = |reason: &str| {
        sidecar.metric(
            "vsock_vring_errors_total",
            &[("guest", "web"), ("queue", "tx"), ("reason", reason)],
        )
    };
    let all = || sidecar.metric("vsock_vring_errors_total", &[("guest", "web")]);
    let gpa = 0xff0_0000;
    for row in CHAINS {
        for table in [Table::Direct, Table::Indirect] {
            println!("{} {table:?}", row.trick);
            let before = (errors(row.reason), all());
            hostile
                .guest
                .driver
                .send_chain(TX, &(row.segments)(gpa), table)
                .unwrap();
            hostile.good_goes_on();
            assert_eq!(
                errors(row.reason) - before.0,
                1.0,
                "{} {table:?}: {}",
                row.trick,
                row.reason
            );
            assert_eq!(all() - before.1, 1.0, "{} {table:?}: counted once", row.trick);
        }
    }
    // Tables by hand: at the head of the ring's own free list lies one descriptor.
    let by_hand: &[PlayedAt] = &[
        ("a loop in a table", "descriptor_loop", |h, gpa| {
            let mut table = Vec::new();
            table.extend(descriptor(gpa, 10, DESC_F_NEXT, 1));
            table.extend(descriptor(gpa, 10, DESC_F_NEXT, 0));
            indirect(h, gpa, &table, 32, DESC_F_INDIRECT);
        }),
        ("next beyond a table", "next_out_of_range", |h, gpa| {
            indirect(h, gpa, &descriptor(gpa, 10, DESC_F_NEXT, 5), 16, DESC_F_INDIRECT);
        }),
        ("a table in a table", "indirect_nested", |h, gpa| {
            indirect(
                h,
                gpa,
                &descriptor(gpa, 16, DESC_F_INDIRECT, 0),
                16,
                DESC_F_INDIRECT,
            );
        }),
        ("a table of 17 bytes", "indirect_length", |h, gpa| {
            indirect(h, gpa, &descriptor(gpa, 44, 0, 0), 17, DESC_F_INDIRECT);
        }),
        ("a table of no bytes", "indirect_length", |h, gpa| {
            indirect(h, gpa, &descriptor(gpa, 44, 0, 0), 0, DESC_F_INDIRECT);
        }),
        ("a table that goes on", "indirect_with_next", |h, gpa| {
            indirect(
                h,
                gpa,
                &descriptor(gpa, 44, 0, 0),
                16,
                DESC_F_INDIRECT | DESC_F_NEXT,
            );
        }),
        ("a writable entry in a table", "wrong_direction", |h, gpa| {
            indirect(h, gpa, &descriptor(gpa, 44, DESC_F_WRITE, 0), 16, DESC_F_INDIRECT);
        }),
        ("a table out of memory", "address_unmapped", |h, _| {
            let head = h
                .guest
                .driver
                .send_chain(TX, &[readable(0xff0_0000, 44)], Table::Indirect);
            // The honest one went; now the same descriptor points elsewhere.
            let head = head.unwrap();
            h.guest.driver.flush_tx(LONG).unwrap();
            let queue = h.guest.driver.queue(TX);
            queue.write_descriptor(head, 0x70_0000_0000, 16, DESC_F_INDIRECT, 0);
            queue.publish(head);
            queue.kick();
        }),
    ];
    for (trick, reason, play) in by_hand {
        println!("{trick}");
        // Chains by hand confuse the driver's own bookkeeping: each has a guest of its own.
        hostile.guest.shut_down().unwrap();
        sidecar.until_metric("vsock_session_active", &[("guest", "web")], 0.0);
        hostile = Hostile::boot(&sidecar, DriverOptions::default());
        let before = errors(reason);
        let used = hostile.guest.driver.queue(TX).used_idx();
        play(&mut hostile, gpa);
        until("the chain was counted", || errors(reason) - before == 1.0);
        until("the chain comes back", || {
            hostile.guest.driver.queue(TX).used_idx() != used
        });
    }
}

/// Publishes a descriptor that points to a table at `gpa`.
fn indirect(hostile: &mut Hostile, gpa: u64, table: &[u8], len: u32, flags: u16) {
    hostile.guest.driver.flush_tx(LONG).unwrap();
    hostile.guest.driver.memory().write(gpa, table).unwrap();
    let queue = hostile.guest.driver.queue(TX);
    let last = queue.size() - 1;
    queue.write_descriptor(last, gpa, len, flags, 0);
    queue.publish(last);
    queue.kick();
}

#[test]
fn loops_and_wild_indices_in_the_ring_itself_cost_that_chain() {
    let sidecar = served();
    let errors = |reason: &str| {
        sidecar.metric(
            "vsock_vring_errors_total",
            &[("guest", "web"), ("reason", reason)],
        )
    };
    let rows: &[Played] = &[
        ("a loop", "descriptor_loop", |h| {
            let queue = h.guest.driver.queue(TX);
            queue.write_descriptor(120, 0x100_0000, 10, DESC_F_NEXT, 121);
            queue.write_descriptor(121, 0x100_0000, 10, DESC_F_NEXT, 120);
            queue.publish(120);
        }),
        ("next beyond the table", "next_out_of_range", |h| {
            let queue = h.guest.driver.queue(TX);
            queue.write_descriptor(120, 0x100_0000, 10, DESC_F_NEXT, 128);
            queue.publish(120);
        }),
        ("a head beyond the table", "head_out_of_range", |h| {
            h.guest.driver.queue(TX).publish(128)
        }),
    ];
    for (trick, reason, play) in rows {
        println!("{trick}");
        let mut hostile = Hostile::boot(&sidecar, DriverOptions::default());
        play(&mut hostile);
        hostile.guest.driver.queue(TX).kick();
        until("it is counted", || errors(reason) == 1.0);
        // The ring goes on: a reset of a fresh flow comes.
        let port = hostile.port();
        hostile.send(header(Op::Request as u16, port, NO_RULE), &[]);
        assert_eq!(hostile.await_of(port).header.op, Op::Rst as u16, "{trick}");
        hostile.guest.shut_down().unwrap();
        sidecar.until_metric("vsock_session_active", &[("guest", "web")], 0.0);
    }
}

/// Receive buffers of the wrong kind among good ones: they come back, data goes on.
#[test]
fn bad_receive_buffers_are_skipped() {
    let sidecar = served();
    let options = DriverOptions {
        rx_buffers: 16,
        ..DriverOptions::default()
    };
    let mut hostile = Hostile::boot(&sidecar, options);
    let errors = |reason: &str| {
        sidecar.metric(
            "vsock_vring_errors_total",
            &[("guest", "web"), ("queue", "rx"), ("reason", reason)],
        )
    };
    for (segments, reason) in [
        (vec![readable(0xff0_0000, 4096)], "wrong_direction"),
        (vec![writable(0xff0_0000, 43)], "chain_too_short"),
        (vec![writable(0x70_0000_0000, 4096)], "address_unmapped"),
        (vec![writable(u64::MAX - 100, 4096)], "address_wraps"),
    ] {
        hostile
            .guest
            .driver
            .send_chain(RX, &segments, Table::Direct)
            .unwrap();
        // Until the ring has come round to it.
        for _ in 0..40 {
            hostile.good_goes_on();
            if errors(reason) > 0.0 {
                break;
            }
        }
        assert_eq!(errors(reason), 1.0, "{reason}");
        hostile.good_goes_on();
    }
}

/// A buffer with room for a header only: control packets go there, data does not, and nothing spins.
#[test]
fn receive_buffers_without_room_for_payload_bring_control_packets() {
    let sidecar = served();
    let options = DriverOptions {
        rx: RxLayout::OneDescriptor(44),
        ..DriverOptions::default()
    };
    let mut hostile = Hostile {
        guest: EmbeddedGuest::boot(&sidecar.path("web.sock"), Profile::qemu(), options).unwrap(),
        good: Flow { port: 0, fwd_cnt: 0 },
        next_port: 1000,
        others: Vec::new(),
    };
    let flow = hostile.open();
    hostile.send(header(Op::Rw as u16, flow.port, ECHO), b"echo this");
    until("it is counted", || {
        sidecar.metric(
            "vsock_vring_errors_total",
            &[("guest", "web"), ("reason", "no_payload_room")],
        ) > 0.0
    });
    let cpu = sidecar.cpu_time();
    std::thread::sleep(Duration::from_millis(500));
    assert!(sidecar.cpu_time() - cpu < Duration::from_millis(150), "it spins");
    let other = linux(&sidecar.path("other.sock"));
    drop(other.connect(ECHO).unwrap());
}

/// The header is read once: what the guest writes there after the kick comes too late or in time, but never in between.
#[test]
fn a_header_that_changes_after_the_kick_is_judged_as_one_or_the_other() {
    let sidecar = served();
    let mut hostile = Hostile::boot(&sidecar, DriverOptions::default());
    for round in 0..2000u32 {
        let port = hostile.port();
        let honest = header(Op::Request as u16, port, NO_RULE);
        let sent = hostile
            .guest
            .driver
            .send_packet_wait(&honest, &[], &Shape::single(), LONG)
            .unwrap();
        let mut other = honest;
        other.op = Op::Rst as u16;
        other.len = u32::MAX;
        other.src_cid = Cid(u64::from(round));
        hostile
            .guest
            .driver
            .memory()
            .write(sent.gpa, &other.encode())
            .unwrap();
        if round % 100 == 0 {
            hostile.good_goes_on();
        }
        while hostile.guest.driver.try_recv().unwrap().is_some() {}
    }
    hostile.good_goes_on();
    assert_eq!(sidecar.metric("vsock_vring_errors_total", &[]), 0.0);
}

/// An available index that no driver could have reached: nothing of this ring can be believed. It rests until it is
/// restarted; the other ring and the other guest go on.
#[test]
fn a_ring_whose_index_jumps_rests_until_it_is_restarted() {
    let sidecar = served();
    let other = linux(&sidecar.path("other.sock"));
    let stream = other.connect(ECHO).unwrap();
    for queue in [TX, RX] {
        let mut hostile = Hostile::boot(&sidecar, DriverOptions::default());
        hostile.good_goes_on();
        let label = if queue == TX { "tx" } else { "rx" };
        let labels = [("guest", "web"), ("queue", label), ("reason", "avail_index")];
        let before = sidecar.metric("vsock_vring_errors_total", &labels);
        let at = hostile.guest.driver.queue(queue).avail_idx();
        hostile
            .guest
            .driver
            .queue(queue)
            .write_avail_idx(at.wrapping_add(5000));
        hostile.guest.driver.queue(queue).kick();
        if queue == RX {
            // The device looks there when it has something to say.
            let port = hostile.port();
            hostile.send(header(Op::Request as u16, port, NO_RULE), &[]);
        }
        sidecar.until_metric("vsock_vring_errors_total", &labels, before + 1.0);
        let cpu = sidecar.cpu_time();
        for _ in 0..1000 {
            hostile.guest.driver.queue(queue).kick();
        }
        std::thread::sleep(Duration::from_millis(300));
        assert!(
            sidecar.cpu_time() - cpu < Duration::from_millis(150),
            "{label}: it spins"
        );
        assert_eq!(
            sidecar.metric("vsock_vring_errors_total", &labels),
            before + 1.0,
            "said once"
        );

        use std::io::{Read, Write};
        (&stream).write_all(b"unharmed").unwrap();
        (&stream).read_exact(&mut [0; 8]).unwrap();

        hostile.guest.reboot().unwrap();
        hostile.good = hostile.open();
        hostile.good_goes_on();
        hostile.guest.shut_down().unwrap();
        sidecar.until_metric("vsock_session_active", &[("guest", "web")], 0.0);
    }
    assert_lawful(&other);
}

/// A shape that no kernel uses, from a guest that negotiated nothing: still only bytes.
#[test]
fn a_guest_that_negotiated_next_to_nothing_is_served() {
    let sidecar = served();
    let profile = Profile::qemu().without(feature::EVENT_IDX | feature::INDIRECT_DESC | feature::SEQPACKET);
    let mut hostile = Hostile::boot_at(&sidecar, "web.sock", profile, DriverOptions::default());
    for _ in 0..200 {
        hostile.good_goes_on();
    }
    assert!(hostile.guest.driver.stats().violations.is_empty());
}
