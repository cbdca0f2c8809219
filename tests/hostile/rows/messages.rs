//! SEQPACKET: messages that never end, end twice, are too long, too many, or cut; and neighbours.

use std::io::{ErrorKind, Read};

use rustix::net::{RecvFlags, recv};
use vsock_sidecar::embedded_guest::profile::feature;
use vsock_sidecar::embedded_guest::{DriverOptions, Profile};
use vsock_sidecar::vsock::{Cid, Header, Op};

use super::credit::spend_all_credit;
use super::stray;
use crate::raw::{Flow, Raw, header};
use crate::stage::{BROKEN, BUFFER, ECHO, FRAMES, LIAR, MUTE, OTHER, PACKETS, PEER, STALLED_FRAMES};
use crate::support::until;
use crate::table::{Answer, ONCE, Row, Survives, linux};

pub const TITLE: &str = "Messages (SEQPACKET) and neighbours";

/// VIRTIO_VSOCK_SEQ_EOM and EOR.
const EOM: u32 = 1;
const EOR: u32 = 2;

const OTHERS: Row = Row {
    source: "virtio 1.2, 5.10.6.6",
    survives: Survives::Others,
    ..Row::USUAL
};

const USUAL: Row = Row {
    source: "virtio 1.2, 5.10.6.6",
    ..Row::USUAL
};

fn without_seqpacket() -> (Profile, DriverOptions) {
    let (profile, options) = linux();
    (profile.without(feature::SEQPACKET), options)
}

/// A packet of a SEQPACKET connection.
fn packet(flow: &Flow, op: Op, flags: u32) -> Header {
    Header {
        socket_type: 2,
        flags,
        ..flow.header(op)
    }
}

/// Connects with messages.
#[track_caller]
fn open(raw: &mut Raw<'_>, to: u32) -> Flow {
    let flow = Flow {
        port: raw.port(),
        to,
        fwd_cnt: 0,
    };
    raw.send(packet(&flow, Op::Request, 0), &[]);
    let answer = raw.await_word(flow.port);
    assert_eq!(
        (answer.header.op, answer.header.socket_type),
        (Op::Response as u16, 2),
        "{answer:?}"
    );
    flow
}

/// The next message, which may come in several packets.
#[track_caller]
fn message(raw: &mut Raw<'_>, flow: &mut Flow) -> Vec<u8> {
    let mut got = Vec::new();
    loop {
        let packet = raw.await_word(flow.port);
        assert_eq!(packet.header.op, Op::Rw as u16, "{packet:?}");
        flow.fwd_cnt += packet.payload.len() as u32;
        got.extend(packet.payload);
        if packet.header.flags & EOM != 0 {
            return got;
        }
    }
}

#[track_caller]
fn round_trip(raw: &mut Raw<'_>, flow: &mut Flow, text: &[u8]) {
    raw.send(packet(flow, Op::Rw, EOM), text);
    assert!(message(raw, flow) == text, "another message came back");
}

/// Waits until the neighbour has no connections but its own two; for it they ended in order.
#[track_caller]
fn until_neighbour_is_alone(raw: &mut Raw<'_>) {
    raw.good_goes_on();
    raw.take_heard();
    raw.stage
        .sidecar
        .until_metric("vsock_connections_active", &[("guest", "other")], 2.0);
}

/// A socket pair knows no reset: what one guest resets, ends for the other.
const NEIGHBOUR_ENDS: &[(&str, std::ops::RangeInclusive<u32>)] = &[
    ("closed peer_fin guest://web", 0..=100),
    ("closed peer_rst guest://web", 0..=100),
    ("closed guest_shutdown guest://web", 0..=100),
    ("closed guest_rst guest://web", 0..=100),
    ("refused client_gone guest://web", 0..=100),
];

pub const ROWS: &[Row] = &[
    // ---- types ---------------------------------------------------------------------------------------------------
    Row {
        trick: "REQUEST of type SEQPACKET, which was not negotiated",
        boot: without_seqpacket,
        play: |raw| stray(raw, |head| (head.op, head.socket_type) = (Op::Request as u16, 2)),
        answer: Answer::Rst,
        counted: &[("misbehavior unsupported_type", ONCE)],
        ..USUAL
    },
    Row {
        trick: "REQUEST of type SEQPACKET to a service that knows streams only",
        play: |raw| stray(raw, |head| (head.op, head.socket_type) = (Op::Request as u16, 2)),
        answer: Answer::Rst,
        counted: &[("refused unsupported_type echo", ONCE)],
        ..USUAL
    },
    Row {
        trick: "stream data on a SEQPACKET connection",
        play: |raw| {
            let mut flow = open(raw, PACKETS);
            round_trip(raw, &mut flow, b"a message");
            raw.send(flow.header(Op::Rw), b"a stream");
        },
        answer: Answer::Rst,
        counted: &[
            ("misbehavior unsupported_type", ONCE),
            ("closed misbehavior packets", ONCE),
        ],
        ..OTHERS
    },
    // ---- ends ----------------------------------------------------------------------------------------------------
    Row {
        trick: "a message that fills the receive buffer and does not end",
        play: |raw| {
            for to in [PACKETS, FRAMES] {
                let flow = open(raw, to);
                raw.storm(BUFFER / 4096, |_| (packet(&flow, Op::Rw, 0), &[1; 4096]));
            }
        },
        answer: Answer::Rsts(2..=2),
        counted: &[
            ("misbehavior message_too_long", 2..=2),
            ("closed misbehavior packets", ONCE),
            ("closed misbehavior frames", ONCE),
        ],
        ..OTHERS
    },
    Row {
        trick: "a message that never ends and grows by a byte a packet",
        play: |raw| {
            let flow = open(raw, PACKETS);
            raw.storm(10_000, |_| (packet(&flow, Op::Rw, 0), b"."));
            raw.good_goes_on();
            raw.send(packet(&flow, Op::Rst, 0), &[]);
        },
        counted: &[("closed guest_rst packets", ONCE)],
        ..OTHERS
    },
    Row {
        trick: "a message of just the receive buffer, in 16 packets",
        play: |raw| {
            let mut flow = open(raw, FRAMES);
            for at in 0..16 {
                let flags = if at == 15 { EOM | EOR } else { 0 };
                raw.send(packet(&flow, Op::Rw, flags), &[at as u8; BUFFER as usize / 16]);
            }
            assert_eq!(message(raw, &mut flow).len(), BUFFER as usize);
        },
        answer: Answer::Seen("the whole message"),
        ..USUAL
    },
    Row {
        trick: "EOR without EOM, and every flag that there is not",
        play: |raw| {
            let mut flow = open(raw, PACKETS);
            raw.send(packet(&flow, Op::Rw, EOR), b"one ");
            raw.send(packet(&flow, Op::Rw, !(EOM | EOR)), b"and the ");
            raw.send(packet(&flow, Op::Rw, EOM), b"same");
            let got = message(raw, &mut flow);
            assert!(got == b"one and the same" || got == b"one ", "{got:?}");
        },
        answer: Answer::Seen("one message"),
        ..USUAL
    },
    Row {
        trick: "EOM on every packet of a stream",
        play: |raw| {
            let mut flow = raw.open(ECHO);
            for _ in 0..10 {
                let mut head = flow.header(Op::Rw);
                head.flags = EOM | EOR;
                raw.send(head, b"x");
            }
            raw.receive(&mut flow, 10);
        },
        answer: Answer::Seen("a stream"),
        ..USUAL
    },
    Row {
        trick: "SHUTDOWN(SEND) within a message",
        play: |raw| {
            let flow = open(raw, PACKETS);
            raw.send(packet(&flow, Op::Rw, 0), b"half a");
            raw.send(packet(&flow, Op::Shutdown, 2), &[]);
        },
        answer: Answer::Rst,
        counted: &[
            ("misbehavior message_cut", ONCE),
            ("closed misbehavior packets", ONCE),
        ],
        ..OTHERS
    },
    Row {
        trick: "RST within a message",
        play: |raw| {
            let flow = open(raw, MUTE);
            let service = raw.stage.mute_service();
            raw.send(packet(&flow, Op::Rw, EOM), b"whole");
            raw.send(packet(&flow, Op::Rw, 0), b"half");
            raw.send(packet(&flow, Op::Rst, 0), &[]);
            raw.good_goes_on();
            let mut room = [0; 100];
            let (count, _) = recv(&service, &mut room[..], RecvFlags::empty()).unwrap();
            assert_eq!(&room[..count], b"whole");
            // Nothing of the other: the end, or a reset.
            assert!(matches!(
                recv(&service, &mut room[..], RecvFlags::empty()),
                Ok((0, _)) | Err(_)
            ));
        },
        counted: &[("closed guest_rst mute", ONCE)],
        ..OTHERS
    },
    Row {
        trick: "RST while frames wait for a service that stalls",
        play: |raw| {
            let flow = open(raw, STALLED_FRAMES);
            let mut service = raw.stage.stalled_service();
            spend_all_credit(raw, packet(&flow, Op::Rw, EOM));
            raw.send(packet(&flow, Op::Rst, 0), &[]);
            raw.good_goes_on();
            let buffered = raw
                .stage
                .sidecar
                .metric("vsock_buffered_bytes", &[("guest", "web")]);
            assert_eq!(buffered, 0.0);
            // What was cut off must not look complete.
            let end = service.read_to_end(&mut Vec::new());
            assert_eq!(end.unwrap_err().kind(), ErrorKind::ConnectionReset);
        },
        counted: &[("closed guest_rst stalled-frames", ONCE)],
        ..OTHERS
    },
    // ---- too many ------------------------------------------------------------------------------------------------
    Row {
        trick: "100,000 empty messages for a service that stalls",
        play: |raw| {
            let flow = open(raw, MUTE);
            let service = raw.stage.mute_service();
            raw.storm(100_000, |_| (packet(&flow, Op::Rw, EOM), b""));
            raw.good_goes_on();
            let heard = raw.take_heard();
            assert!(!heard.is_empty() && heard.iter().all(|packet| packet.header.op == Op::Rst as u16));
            drop(service);
        },
        answer: Answer::Seen("RST, then one for each on the flow that is no more"),
        counted: &[
            ("misbehavior empty_messages", ONCE),
            ("closed misbehavior mute", ONCE),
        ],
        ..OTHERS
    },
    Row {
        trick: "65,536 messages of one byte for a service that stalls",
        source: "virtio 1.2, 5.10.6.3 (only payload counts as credit)",
        play: |raw| {
            let flow = open(raw, MUTE);
            let service = raw.stage.mute_service();
            let memory = raw.stage.sidecar.anonymous_memory();
            raw.storm(BUFFER, |_| (packet(&flow, Op::Rw, EOM), b"1"));
            raw.until_taken();
            let grown = raw.stage.sidecar.anonymous_memory().saturating_sub(memory);
            // Once more than ten times what was promised: 8 bytes to remember each message, and one to send.
            assert!(grown < 6 * u64::from(BUFFER), "grew by {grown} bytes");
            raw.send(packet(&flow, Op::Rst, 0), &[]);
            drop(service);
        },
        counted: &[("closed guest_rst mute", ONCE)],
        ..OTHERS
    },
    // ---- the host end --------------------------------------------------------------------------------------------
    Row {
        trick: "a service that announces a frame of 4 GiB",
        play: |raw| {
            let flow = open(raw, LIAR);
            assert_eq!(raw.await_word(flow.port).header.op, Op::Rst as u16);
        },
        answer: Answer::Seen("RST"),
        counted: &[("closed message_too_long liar", ONCE)],
        ..OTHERS
    },
    Row {
        trick: "a service that ends within a frame",
        play: |raw| {
            let flow = open(raw, BROKEN);
            let mut last = raw.await_word(flow.port);
            while last.header.op == Op::Rw as u16 {
                assert_eq!(last.header.flags & EOM, 0, "half a message as a whole one");
                last = raw.await_word(flow.port);
            }
            assert_eq!(last.header.op, Op::Rst as u16);
        },
        answer: Answer::Seen("RST, and never EOM"),
        counted: &[("closed peer_rst broken", ONCE)],
        ..OTHERS
    },
    Row {
        trick: "a receive buffer that is smaller than the message that is to come",
        source: "Linux (a whole message must fit)",
        play: |raw| {
            let flow = open(raw, FRAMES);
            let mut head = packet(&flow, Op::Rw, EOM);
            head.buf_alloc = 100;
            raw.send(head, &[1; 1000]);
        },
        answer: Answer::Rst,
        counted: &[("closed message_too_long frames", ONCE)],
        ..OTHERS
    },
    // ---- neighbours ----------------------------------------------------------------------------------------------
    Row {
        trick: "REQUEST to a neighbour's port that no rule names",
        source: "design: only where a rule allows it",
        play: |raw| {
            stray(raw, |head| {
                (head.op, head.dst_cid) = (Op::Request as u16, Cid(OTHER))
            })
        },
        answer: Answer::Rst,
        counted: &[("refused no_rule -", ONCE)],
        ..OTHERS
    },
    Row {
        trick: "a neighbour flooded, and its echo never read",
        source: "vhost-device-vsock (the raw packet queue of siblings had no bound)",
        play: |raw| {
            let port = raw.port();
            let mut head = header(Op::Request as u16, port, PEER);
            head.dst_cid = Cid(OTHER);
            head.buf_alloc = 4096;
            raw.send(head, &[]);
            assert_eq!(raw.await_word(port).header.op, Op::Response as u16);
            // As far as credit goes, which is the bound.
            let memory = raw.stage.sidecar.anonymous_memory();
            let (mut sent, mut room) = (0u32, BUFFER);
            let mut stalled = 0;
            head.op = Op::Rw as u16;
            until("nothing moves any more", || {
                while room > 0 {
                    let len = room.min(16 * 1024);
                    raw.send(head, &vec![7; len as usize]);
                    sent += len;
                    room -= len;
                }
                raw.send(
                    Header {
                        op: Op::CreditRequest as u16,
                        ..head
                    },
                    &[],
                );
                let update = loop {
                    let packet = raw.await_of(port).header;
                    if packet.op == Op::CreditUpdate as u16 {
                        break packet;
                    }
                };
                room = update.buf_alloc - (sent - update.fwd_cnt);
                stalled = if room == 0 { stalled + 1 } else { 0 };
                raw.stage.witnesses.went_on_since(raw.stage.witnesses.now());
                stalled > 5
            });
            let grown = raw.stage.sidecar.anonymous_memory().saturating_sub(memory);
            assert!(grown < 4 << 20, "grew by {grown} bytes for {sent}");
            raw.send(
                Header {
                    op: Op::Rst as u16,
                    ..head
                },
                &[],
            );
            until_neighbour_is_alone(raw);
        },
        answer: Answer::Seen("credit, until the neighbour takes no more"),
        counted: &[("closed guest_rst peer", ONCE)],
        neighbour: NEIGHBOUR_ENDS,
        ..OTHERS
    },
    Row {
        trick: "a hundred connections to a neighbour begun and reset",
        source: "vhost-device-vsock (the raw packet queue of siblings had no bound)",
        play: |raw| {
            let port = raw.port();
            for _ in 0..100 {
                raw.port();
            }
            raw.storm(200, |at| {
                let op = if at % 2 == 0 { Op::Request } else { Op::Rst };
                let mut head = header(op as u16, port + at / 2, PEER);
                head.dst_cid = Cid(OTHER);
                (head, b"")
            });
            raw.until_taken();
            until_neighbour_is_alone(raw);
        },
        answer: Answer::Seen("RESPONSE to those that were established for a moment"),
        counted: &[
            ("refused client_gone peer", 0..=100),
            ("closed guest_rst peer", 0..=100),
        ],
        neighbour: NEIGHBOUR_ENDS,
        ..OTHERS
    },
];
