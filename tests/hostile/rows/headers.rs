//! Headers that lie: addresses, types, operations, lengths, flags.

use vsock_sidecar::embedded_guest::Shape;
use vsock_sidecar::vsock::{Cid, Op, Port};

use super::{on_open, stray};
use crate::raw::header;
use crate::stage::{ECHO, OTHER};
use crate::table::{Answer, ONCE, Row, Survives};

pub const TITLE: &str = "Headers";

const OTHERS: Row = Row {
    survives: Survives::Others,
    ..Row::USUAL
};

pub const ROWS: &[Row] = &[
    // ---- addresses -----------------------------------------------------------------------------------------------
    Row {
        trick: "another guest's CID as source",
        source: "virtio 1.2, 5.10.6.2",
        play: |raw| stray(raw, |head| head.src_cid = Cid(OTHER)),
        counted: &[("misbehavior wrong_source_cid", ONCE)],
        ..Row::USUAL
    },
    Row {
        trick: "the host's CID as source",
        source: "virtio 1.2, 5.10.6.2",
        play: |raw| stray(raw, |head| head.src_cid = Cid::HOST),
        counted: &[("misbehavior wrong_source_cid", ONCE)],
        ..Row::USUAL
    },
    Row {
        trick: "its own CID with a bit set above 2^32",
        source: "virtio 1.2, 5.10.4 (upper 32 bits are reserved)",
        play: |raw| stray(raw, |head| head.src_cid = Cid(head.src_cid.0 | 1 << 32)),
        counted: &[("misbehavior wrong_source_cid", ONCE)],
        ..Row::USUAL
    },
    Row {
        trick: "RST of the good connection under another guest's CID",
        source: "virtio 1.2, 5.10.6.2",
        play: |raw| {
            let good = raw.good();
            let mut head = good.header(Op::Rst);
            head.src_cid = Cid(OTHER);
            raw.send(head, &[]);
        },
        counted: &[("misbehavior wrong_source_cid", ONCE)],
        ..Row::USUAL
    },
    Row {
        trick: "a header of zeros",
        source: "vhost-device-vsock #963 (op 0)",
        play: |raw| {
            raw.guest.driver.send_raw(&[0; 44], &Shape::single()).unwrap();
        },
        counted: &[("misbehavior wrong_source_cid", ONCE)],
        ..Row::USUAL
    },
    Row {
        trick: "a header of ones",
        play: |raw| {
            raw.guest.driver.send_raw(&[0xff; 44], &Shape::single()).unwrap();
        },
        counted: &[("misbehavior wrong_source_cid", ONCE)],
        ..Row::USUAL
    },
    Row {
        trick: "REQUEST to CID 0, 1, itself, another guest, VMADDR_CID_ANY and one of 41 bits",
        source: "vhost-device-vsock #943 (no RST)",
        play: |raw| {
            for cid in [0, 1, 3, OTHER, 0xffff_ffff, 1 << 40] {
                stray(raw, |head| {
                    (head.op, head.dst_cid) = (Op::Request as u16, Cid(cid))
                });
            }
        },
        answer: Answer::Rsts(6..=6),
        counted: &[("refused no_rule -", 6..=6)],
        ..Row::USUAL
    },
    Row {
        trick: "data to a CID of 41 bits",
        play: |raw| stray(raw, |head| head.dst_cid = Cid(1 << 40)),
        answer: Answer::Rst,
        ..Row::USUAL
    },
    Row {
        trick: "REQUEST from port 0 and from VMADDR_PORT_ANY",
        play: |raw| {
            for port in [0, u32::MAX] {
                let mut head = header(Op::Request as u16, port, ECHO);
                raw.send(head, &[]);
                assert_eq!(raw.await_word(port).header.op, Op::Response as u16);
                head.op = Op::Rst as u16;
                raw.send(head, &[]);
            }
        },
        answer: Answer::Seen("RESPONSE: a port is a number"),
        counted: &[("closed guest_rst echo", 2..=2)],
        ..Row::USUAL
    },
    Row {
        trick: "REQUEST to port 0 and to VMADDR_PORT_ANY",
        play: |raw| {
            for port in [0, u32::MAX] {
                stray(raw, |head| {
                    (head.op, head.dst_port) = (Op::Request as u16, Port(port))
                });
            }
        },
        answer: Answer::Rsts(2..=2),
        counted: &[("refused no_rule -", 2..=2)],
        ..Row::USUAL
    },
    // ---- operations and types ------------------------------------------------------------------------------------
    Row {
        trick: "operation 0 on no flow",
        source: "vhost-device-vsock #963 (op 0)",
        play: |raw| stray(raw, |head| head.op = 0),
        answer: Answer::Rst,
        counted: &[("misbehavior unknown_op", ONCE)],
        ..Row::USUAL
    },
    Row {
        trick: "operation 0 on a connection",
        source: "vhost-device-vsock #963 (op 0)",
        play: |raw| on_open(raw, &[], |head| head.op = 0),
        answer: Answer::Rst,
        counted: &[
            ("misbehavior unknown_op", ONCE),
            ("closed misbehavior echo", ONCE),
        ],
        ..OTHERS
    },
    Row {
        trick: "operation 8 on a connection",
        play: |raw| on_open(raw, &[], |head| head.op = 8),
        answer: Answer::Rst,
        counted: &[
            ("misbehavior unknown_op", ONCE),
            ("closed misbehavior echo", ONCE),
        ],
        ..OTHERS
    },
    Row {
        trick: "operation 65535 with a payload",
        play: |raw| on_open(raw, b"payload", |head| head.op = u16::MAX),
        answer: Answer::Rst,
        counted: &[
            ("misbehavior unknown_op", ONCE),
            ("closed misbehavior echo", ONCE),
        ],
        ..OTHERS
    },
    Row {
        trick: "REQUEST of type 0, 77 and 65535",
        source: "virtio 1.2, 5.10.6.4",
        play: |raw| {
            for kind in [0, 77, u16::MAX] {
                stray(raw, |head| {
                    (head.op, head.socket_type) = (Op::Request as u16, kind)
                });
            }
        },
        answer: Answer::Rsts(3..=3),
        counted: &[("misbehavior unknown_type", 3..=3)],
        ..Row::USUAL
    },
    Row {
        trick: "an unknown type on a connection",
        source: "virtio 1.2, 5.10.6.4",
        play: |raw| on_open(raw, b"x", |head| head.socket_type = 0),
        answer: Answer::Rst,
        counted: &[
            ("misbehavior unknown_type", ONCE),
            ("closed misbehavior echo", ONCE),
        ],
        ..OTHERS
    },
    Row {
        trick: "RST of an unknown type",
        source: "Cloud Hypervisor #8692 (RST for an RST)",
        play: |raw| stray(raw, |head| (head.op, head.socket_type) = (Op::Rst as u16, 9)),
        ..Row::USUAL
    },
    Row {
        trick: "SEQPACKET data on a stream",
        play: |raw| on_open(raw, b"x", |head| head.socket_type = 2),
        answer: Answer::Rst,
        counted: &[
            ("misbehavior unsupported_type", ONCE),
            ("closed misbehavior echo", ONCE),
        ],
        ..OTHERS
    },
    // ---- lengths -------------------------------------------------------------------------------------------------
    Row {
        trick: "len one more than the chain has",
        source: "vhost-device-vsock (TX parse errors lost their descriptor)",
        play: |raw| on_open(raw, b"short", |head| head.len = 6),
        answer: Answer::Rst,
        counted: &[
            ("misbehavior payload_short", ONCE),
            ("closed misbehavior echo", ONCE),
        ],
        ..OTHERS
    },
    Row {
        trick: "len of 4 GiB less one",
        source: "vhost-device-vsock (TX parse errors lost their descriptor)",
        play: |raw| on_open(raw, b"short", |head| head.len = u32::MAX),
        answer: Answer::Rst,
        counted: &[
            ("misbehavior payload_short", ONCE),
            ("closed misbehavior echo", ONCE),
        ],
        ..OTHERS
    },
    Row {
        trick: "len smaller than the chain",
        source: "vm-virtio #204 (only the first len bytes are data)",
        play: |raw| {
            let mut flow = raw.open(ECHO);
            let mut head = flow.header(Op::Rw);
            head.len = 3;
            raw.send_as_it_is(head, &[b'x'; 30_000]);
            raw.send(head, b"yyy");
            assert_eq!(raw.receive(&mut flow, 6), b"xxxyyy");
        },
        answer: Answer::Seen("`len` bytes come back, and no more"),
        ..Row::USUAL
    },
    Row {
        trick: "data of no bytes, a hundred times",
        source: "vhost-device-vsock #963 (packets of 0 bytes)",
        play: |raw| {
            let mut flow = raw.open(ECHO);
            for _ in 0..100 {
                raw.send(flow.header(Op::Rw), &[]);
            }
            raw.round_trip(&mut flow, b"and then some");
        },
        ..Row::USUAL
    },
    Row {
        trick: "a packet of 100 KiB",
        source: "vhost-device-vsock #494, libkrun #674 (large packets)",
        play: |raw| on_open(raw, &[7; 100 * 1024], |_| {}),
        answer: Answer::Rst,
        counted: &[
            ("misbehavior credit_exceeded", ONCE),
            ("closed misbehavior echo", ONCE),
        ],
        ..OTHERS
    },
    Row {
        trick: "payload behind REQUEST, CREDIT_UPDATE and CREDIT_REQUEST",
        play: |raw| {
            let mut flow = raw.open(ECHO);
            for op in [Op::CreditUpdate, Op::CreditRequest] {
                raw.send(flow.header(op), b"a word that nobody asked for");
            }
            raw.round_trip(&mut flow, b"the right word");
            raw.send(header(Op::Request as u16, raw.port(), ECHO), &[1; 5000]);
        },
        answer: Answer::Response,
        counted: &[("misbehavior unexpected_payload", 3..=3)],
        ..Row::USUAL
    },
    Row {
        trick: "REQUEST that claims 4 GiB of payload and has none",
        play: |raw| {
            stray(raw, |head| (head.op, head.len) = (Op::Request as u16, u32::MAX));
        },
        answer: Answer::Response,
        counted: &[("misbehavior unexpected_payload", ONCE)],
        ..Row::USUAL
    },
    Row {
        trick: "RST with a payload",
        play: |raw| on_open(raw, b"last words", |head| head.op = Op::Rst as u16),
        counted: &[
            ("misbehavior unexpected_payload", ONCE),
            ("closed guest_rst echo", ONCE),
        ],
        ..OTHERS
    },
    // ---- flags ---------------------------------------------------------------------------------------------------
    Row {
        trick: "all flags on REQUEST, RW and CREDIT_UPDATE of a stream",
        play: |raw| {
            let port = raw.port();
            let mut head = header(Op::Request as u16, port, ECHO);
            head.flags = u32::MAX;
            raw.send(head, &[]);
            assert_eq!(raw.await_word(port).header.op, Op::Response as u16);
            (head.op, head.flags) = (Op::CreditUpdate as u16, u32::MAX);
            raw.send(head, &[]);
            head.op = Op::Rw as u16;
            raw.send(head, b"flagged");
            let packet = raw.await_word(port);
            assert_eq!(
                (packet.payload.as_slice(), packet.header.flags),
                (&b"flagged"[..], 0)
            );
        },
        answer: Answer::Seen("served; its own flags are not sent back"),
        ..Row::USUAL
    },
    Row {
        trick: "SHUTDOWN with no flag, and with every undefined flag",
        play: |raw| {
            let mut flow = raw.open(ECHO);
            for flags in [0, !3] {
                let mut head = flow.header(Op::Shutdown);
                head.flags = flags;
                raw.send(head, &[]);
            }
            raw.round_trip(&mut flow, b"nothing was shut");
        },
        ..Row::USUAL
    },
];
