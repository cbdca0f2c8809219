//! Connections that begin, go on and end in the wrong order.

use vsock_sidecar::vsock::{Op, Port};

use super::{on_open, stray};
use crate::raw::header;
use crate::stage::{CLOSED, ECHO, HOLE, LIMIT, NO_RULE, STALLED};
use crate::table::{Answer, ONCE, Row, Survives};

pub const TITLE: &str = "Connections";

const OTHERS: Row = Row {
    survives: Survives::Others,
    ..Row::USUAL
};

pub const ROWS: &[Row] = &[
    // ---- beginning -----------------------------------------------------------------------------------------------
    Row {
        trick: "REQUEST for a connection that is established",
        play: |raw| on_open(raw, &[], |head| head.op = Op::Request as u16),
        answer: Answer::Rst,
        counted: &[
            ("misbehavior duplicate_request", ONCE),
            ("closed misbehavior echo", ONCE),
        ],
        ..OTHERS
    },
    Row {
        trick: "1000 times the same REQUEST while it is dialled",
        source: "vhost-device-vsock (a dial blocked everybody)",
        play: |raw| {
            let port = raw.port();
            raw.storm(1000, |_| (header(Op::Request as u16, port, HOLE), b""));
            raw.good_goes_on();
            let heard = raw.take_heard();
            assert!(heard.is_empty(), "{heard:?}");
            raw.send(header(Op::Rst as u16, port, HOLE), &[]);
        },
        counted: &[("refused client_gone hole", ONCE)],
        ..OTHERS
    },
    Row {
        trick: "a dial that nobody ever answers",
        source: "vhost-device-vsock (a dial blocked everybody)",
        play: |raw| {
            let port = raw.port();
            raw.send(header(Op::Request as u16, port, HOLE), &[]);
            raw.good_goes_on();
            assert_eq!(raw.await_word(port).header.op, Op::Rst as u16);
        },
        answer: Answer::Seen("RST after connectTimeout"),
        counted: &[("refused dial_timeout hole", ONCE)],
        ..OTHERS
    },
    Row {
        trick: "a target that refuses",
        source: "vhost-device-vsock #943 (no RST)",
        play: |raw| {
            let port = raw.port();
            raw.send(header(Op::Request as u16, port, CLOSED), &[]);
            assert_eq!(raw.await_word(port).header.op, Op::Rst as u16);
        },
        answer: Answer::Seen("RST at once"),
        counted: &[("refused dial_refused closed", ONCE)],
        ..OTHERS
    },
    Row {
        trick: "data before the answer",
        play: |raw| {
            let port = raw.port();
            raw.send(header(Op::Request as u16, port, HOLE), &[]);
            raw.send(header(Op::Rw as u16, port, HOLE), b"impatient");
        },
        answer: Answer::Rst,
        counted: &[
            ("misbehavior not_established", ONCE),
            ("refused misbehavior hole", ONCE),
        ],
        ..OTHERS
    },
    Row {
        trick: "SHUTDOWN(SEND) before the answer",
        play: |raw| {
            let port = raw.port();
            raw.send(header(Op::Request as u16, port, HOLE), &[]);
            let mut head = header(Op::Shutdown as u16, port, HOLE);
            head.flags = 2;
            raw.send(head, &[]);
        },
        answer: Answer::Rst,
        counted: &[
            ("misbehavior not_established", ONCE),
            ("refused misbehavior hole", ONCE),
        ],
        ..OTHERS
    },
    Row {
        trick: "SHUTDOWN of both before the answer: the guest has changed its mind",
        play: |raw| {
            let port = raw.port();
            raw.send(header(Op::Request as u16, port, HOLE), &[]);
            let mut head = header(Op::Shutdown as u16, port, HOLE);
            head.flags = 3;
            raw.send(head, &[]);
        },
        answer: Answer::Rst,
        counted: &[("refused client_gone hole", ONCE)],
        ..OTHERS
    },
    Row {
        trick: "500 dials begun and cancelled",
        source: "vhost-device-vsock #407 (unwrap on a connection that has gone)",
        play: |raw| {
            let first = raw.port();
            for _ in 0..1000 {
                raw.port();
            }
            raw.storm(1000, |at| {
                let op = if at % 2 == 0 { Op::Request } else { Op::Rst };
                (header(op as u16, first + at / 2, HOLE), b"")
            });
        },
        counted: &[("refused client_gone hole", 500..=500)],
        ..OTHERS
    },
    Row {
        trick: "REQUEST, RST, REQUEST from the same port",
        source: "Cloud Hypervisor #8692 (systemd uses a port again)",
        play: |raw| {
            let port = raw.port();
            for op in [Op::Request, Op::Rst, Op::Request] {
                raw.send(header(op as u16, port, ECHO), &[]);
            }
            // The first may have been established for a moment, and have its RESPONSE.
            raw.until_taken();
            raw.stage
                .sidecar
                .until_metric("vsock_connections_active", &[("guest", "web")], 2.0);
            raw.good_goes_on();
            raw.good_goes_on();
            let answers = raw.take_heard();
            assert!(
                answers
                    .iter()
                    .all(|packet| packet.header.op == Op::Response as u16),
                "{answers:?}"
            );
            assert!((1..=2).contains(&answers.len()), "{answers:?}");
            raw.send(header(Op::Rw as u16, port, ECHO), b"mine");
            assert_eq!(raw.await_word(port).payload, b"mine");
        },
        answer: Answer::Seen("RESPONSE, once or twice, and the connection works"),
        counted: &[
            ("refused client_gone echo", 0..=1),
            ("closed guest_rst echo", 0..=1),
        ],
        ..OTHERS
    },
    Row {
        trick: "close, and REQUEST from the same port before the RST has come",
        source: "Cloud Hypervisor #8692 (a stale RST killed the new connection)",
        play: |raw| {
            let mut flow = raw.open(ECHO);
            raw.round_trip(&mut flow, b"the first");
            for _ in 0..50 {
                let mut close = flow.header(Op::Shutdown);
                close.flags = 3;
                raw.send(close, &[]);
                flow.fwd_cnt = 0;
                raw.send(flow.header(Op::Request), &[]);
                // The RST of the first, if it left before the REQUEST came, and then the answer.
                let mut answer = raw.await_word(flow.port).header.op;
                if answer == Op::Rst as u16 {
                    answer = raw.await_word(flow.port).header.op;
                }
                assert_eq!(answer, Op::Response as u16);
                raw.round_trip(&mut flow, b"another");
            }
        },
        answer: Answer::Seen("RESPONSE each time, and no RST behind it"),
        counted: &[("closed guest_shutdown echo", 50..=50)],
        ..OTHERS
    },
    Row {
        trick: "2000 connections begun and reset as fast as the ring goes",
        source: "vhost-device-vsock #407 (unwrap on a connection that has gone)",
        play: |raw| {
            let port = raw.port();
            raw.storm(4000, |at| {
                let op = if at % 2 == 0 { Op::Request } else { Op::Rst };
                (header(op as u16, port, ECHO), b"")
            });
            raw.good_goes_on();
            let answers = raw.take_heard();
            assert!(
                answers
                    .iter()
                    .all(|packet| packet.header.op == Op::Response as u16)
            );
        },
        answer: Answer::Seen("RESPONSE to those that were established for a moment"),
        counted: &[
            ("refused client_gone echo", 0..=2000),
            ("closed guest_rst echo", 0..=2000),
        ],
        ..OTHERS
    },
    Row {
        trick: "5000 REQUESTs to ports without a rule",
        source: "virtio 1.2, 5.10.6.4 (a scan of all ports)",
        play: |raw| {
            let port = raw.port();
            raw.storm(5000, |at| (header(Op::Request as u16, port, 20_000 + at), b""));
        },
        answer: Answer::Rsts(5000..=5000),
        counted: &[("refused no_rule -", 5000..=5000)],
        ..OTHERS
    },
    Row {
        trick: "5000 times the same REQUEST to a port without a rule",
        source: "libkrun #344 (refused connects spun)",
        play: |raw| {
            let port = raw.port();
            raw.storm(5000, |_| (header(Op::Request as u16, port, NO_RULE), b""));
            raw.good_goes_on();
            let resets = raw.take_heard();
            // A REQUEST that comes while its RST still waits begins anew: as many answers as were waited for.
            assert!(!resets.is_empty() && resets.len() <= 5000);
            assert!(resets.iter().all(|packet| packet.header.op == Op::Rst as u16));
        },
        answer: Answer::Seen("RST, at most one for each"),
        counted: &[("refused no_rule -", 1..=5000)],
        ..OTHERS
    },
    Row {
        trick: "more connections than limits.connections",
        source: "vhost-device-vsock (no limit of connections)",
        play: |raw| {
            let first = raw.port();
            for _ in 0..400 {
                raw.port();
            }
            let mut answers = [0, 0];
            for at in 0..400 {
                raw.send(header(Op::Request as u16, first + at, ECHO), &[]);
            }
            for at in 0..400 {
                let op = raw.await_word(first + at).header.op;
                assert!(op == Op::Response as u16 || op == Op::Rst as u16);
                answers[usize::from(op == Op::Rst as u16)] += 1;
            }
            // The good connection has one place.
            assert_eq!(answers, [LIMIT - 1, 400 - (LIMIT - 1)]);
        },
        answer: Answer::Seen("RESPONSE up to the limit, RST from there on"),
        counted: &[("refused limit echo", 400 - (LIMIT - 1)..=400 - (LIMIT - 1))],
        ..OTHERS
    },
    // ---- the middle ----------------------------------------------------------------------------------------------
    Row {
        trick: "RESPONSE on no flow",
        play: |raw| stray(raw, |head| head.op = Op::Response as u16),
        answer: Answer::Rst,
        ..Row::USUAL
    },
    Row {
        trick: "RESPONSE on a connection that the guest began",
        source: "vhost-device-vsock (a second RESPONSE panicked)",
        play: |raw| on_open(raw, &[], |head| head.op = Op::Response as u16),
        answer: Answer::Rst,
        counted: &[
            ("misbehavior unexpected_response", ONCE),
            ("closed misbehavior echo", ONCE),
        ],
        ..OTHERS
    },
    Row {
        trick: "RW, SHUTDOWN, CREDIT_UPDATE and CREDIT_REQUEST on no flow",
        source: "vhost-device-vsock #943 (no RST)",
        play: |raw| {
            for op in [Op::Rw, Op::Shutdown, Op::CreditUpdate, Op::CreditRequest] {
                stray(raw, |head| (head.op, head.flags) = (op as u16, 3));
            }
        },
        answer: Answer::Rsts(4..=4),
        ..Row::USUAL
    },
    Row {
        trick: "data with a payload on no flow",
        source: "vhost-device-vsock (RX buffer with no header written)",
        play: |raw| raw.send(header(Op::Rw as u16, raw.port(), ECHO), &[1; 60_000]),
        answer: Answer::Rst,
        ..Row::USUAL
    },
    Row {
        trick: "the good connection's ports towards another port of the host",
        play: |raw| {
            let good = raw.good();
            let mut head = good.header(Op::Rw);
            head.dst_port = Port(NO_RULE);
            raw.send(head, b"not there");
        },
        answer: Answer::Rst,
        ..Row::USUAL
    },
    // ---- the end -------------------------------------------------------------------------------------------------
    Row {
        trick: "RST twice",
        source: "Cloud Hypervisor #8692 (RST for an RST)",
        play: |raw| {
            let flow = raw.open(ECHO);
            raw.send(flow.header(Op::Rst), &[]);
            raw.send(flow.header(Op::Rst), &[]);
        },
        counted: &[("closed guest_rst echo", ONCE)],
        ..OTHERS
    },
    Row {
        trick: "RST for our RST",
        source: "Cloud Hypervisor #8692 (RST for an RST)",
        play: |raw| {
            let port = raw.port();
            raw.send(header(Op::Request as u16, port, NO_RULE), &[]);
            assert_eq!(raw.await_word(port).header.op, Op::Rst as u16);
            raw.send(header(Op::Rst as u16, port, NO_RULE), &[]);
        },
        counted: &[("refused no_rule -", ONCE)],
        ..OTHERS
    },
    Row {
        trick: "10,000 RSTs",
        source: "Cloud Hypervisor #8692 (RST for an RST)",
        play: |raw| raw.storm(10_000, |at| (header(Op::Rst as u16, 5000 + at, ECHO), b"")),
        ..Row::USUAL
    },
    Row {
        trick: "data after RST",
        play: |raw| {
            let flow = raw.open(ECHO);
            raw.send(flow.header(Op::Rst), &[]);
            raw.send(flow.header(Op::Rw), b"one more thing");
        },
        answer: Answer::Rst,
        counted: &[("closed guest_rst echo", ONCE)],
        ..OTHERS
    },
    Row {
        trick: "data after SHUTDOWN(SEND)",
        source: "virtio 1.2, 5.10.6.5 (SHUTDOWN is permanent)",
        play: |raw| {
            // A service that does not answer the end with its own.
            let flow = raw.open(STALLED);
            let service = raw.stage.stalled_service();
            let mut head = flow.header(Op::Shutdown);
            head.flags = 2;
            raw.send(head, &[]);
            raw.send(flow.header(Op::Rw), b"late");
            raw.good_goes_on();
            drop(service);
        },
        answer: Answer::Rst,
        counted: &[
            ("misbehavior data_after_shutdown", ONCE),
            ("closed misbehavior stalled", ONCE),
        ],
        ..OTHERS
    },
    Row {
        trick: "SHUTDOWN(RCV) a thousand times, and then data",
        source: "vhost-device-vsock #874 (half-close)",
        play: |raw| {
            let flow = raw.open(ECHO);
            let mut head = flow.header(Op::Shutdown);
            head.flags = 1;
            raw.storm(1000, |_| (head, b""));
            raw.send(flow.header(Op::Rw), b"it only said that it reads no more");
        },
        answer: Answer::Seen("half of the connection lives on, without an echo"),
        counted: &[("closed peer_rst echo", 0..=1)],
        ..Row::USUAL
    },
    Row {
        trick: "SHUTDOWN(SEND) a thousand times",
        source: "vhost-device-vsock #874 (half-close)",
        play: |raw| {
            let mut flow = raw.open(ECHO);
            raw.send(flow.header(Op::Rw), b"the last words");
            let mut head = flow.header(Op::Shutdown);
            head.flags = 2;
            raw.storm(1000, |_| (head, b""));
            assert_eq!(raw.receive(&mut flow, 14), b"the last words");
            // The service ends as well, once; then both directions are finished and the guest is asked for its RST.
            let end = raw.await_word(flow.port).header;
            assert_eq!((end.op, end.flags), (Op::Shutdown as u16, 3));
            raw.send(flow.header(Op::Rst), &[]);
        },
        answer: Answer::Seen("the echo, then SHUTDOWN of both"),
        counted: &[("closed peer_fin echo", ONCE)],
        ..OTHERS
    },
    Row {
        trick: "SHUTDOWN(RCV), then SHUTDOWN(SEND)",
        source: "virtio 1.2, 5.10.6.5 (flags add up)",
        play: |raw| {
            let flow = raw.open(ECHO);
            for flags in [1, 2] {
                let mut head = flow.header(Op::Shutdown);
                head.flags = flags;
                raw.send(head, &[]);
            }
        },
        answer: Answer::Rst,
        counted: &[("closed guest_shutdown echo", ONCE)],
        ..OTHERS
    },
    Row {
        trick: "SHUTDOWN of both, 100 times",
        play: |raw| {
            let flow = raw.open(ECHO);
            let mut head = flow.header(Op::Shutdown);
            head.flags = 3;
            raw.storm(100, |_| (head, b""));
        },
        // What comes behind the end is said on no flow.
        answer: Answer::Rsts(1..=100),
        counted: &[("closed guest_shutdown echo", ONCE)],
        ..OTHERS
    },
    Row {
        trick: "every operation in turn on one pair of ports, 400 times",
        source: "syzkaller's way",
        play: |raw| {
            let port = raw.port();
            raw.storm(400 * 9, |at| {
                let mut head = header(at as u16 % 9, port, ECHO);
                head.flags = at % 4;
                (head, b"")
            });
        },
        answer: Answer::Seen("whatever: it is answered, and bounded"),
        counted: &[
            ("misbehavior unknown_op", 0..=800),
            ("misbehavior duplicate_request", 0..=400),
            ("misbehavior unexpected_response", 0..=400),
            ("misbehavior not_established", 0..=800),
            ("misbehavior data_after_shutdown", 0..=400),
            ("refused client_gone echo", 0..=400),
            ("refused misbehavior echo", 0..=400),
            ("closed guest_rst echo", 0..=400),
            ("closed guest_shutdown echo", 0..=400),
            ("closed misbehavior echo", 0..=400),
            ("closed peer_rst echo", 0..=400),
            ("closed peer_fin echo", 0..=400),
        ],
        ..OTHERS
    },
];
