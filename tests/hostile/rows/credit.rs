//! Credit that lies, in both directions.

use std::io::Read;
use std::time::Instant;

use vsock_sidecar::vsock::{Header, Op};

use super::on_open;
use crate::raw::{BUF_ALLOC, Raw, header};
use crate::stage::{BUFFER, ECHO, SOURCE, STALLED};
use crate::support::{LONG, until};
use crate::table::{Answer, ONCE, Row, Survives};

pub const TITLE: &str = "Credit";

const OTHERS: Row = Row {
    survives: Survives::Others,
    ..Row::USUAL
};

/// Fills everything that lies between the guest and a service that reads nothing with RW packets that begin like `head`, to the
/// last byte of credit.
#[track_caller]
pub(super) fn spend_all_credit(raw: &mut Raw<'_>, head: Header) {
    let mut sent: u32 = 0;
    let (mut buf_alloc, mut fwd_cnt) = (BUFFER, 0);
    let deadline = Instant::now() + LONG;
    loop {
        assert!(
            Instant::now() < deadline,
            "the credit has no end after {sent} bytes"
        );
        let room = (buf_alloc - (sent - fwd_cnt)).min(16 * 1024);
        if room > 0 {
            raw.send(head, &vec![1; room as usize]);
            sent += room;
        }
        let ask = Header {
            op: Op::CreditRequest as u16,
            flags: 0,
            ..head
        };
        raw.send(ask, &[]);
        let update = raw.await_of(head.src_port.0).header;
        assert_eq!(update.op, Op::CreditUpdate as u16);
        (buf_alloc, fwd_cnt) = (update.buf_alloc, update.fwd_cnt);
        if room == 0 && sent - fwd_cnt == buf_alloc {
            // Nothing was taken between two questions: the kernel's buffers are full as well.
            let buffered = raw
                .stage
                .sidecar
                .metric("vsock_buffered_bytes", &[("guest", "web")]);
            if buffered as u32 == buf_alloc {
                return;
            }
        }
    }
}

pub const ROWS: &[Row] = &[
    Row {
        trick: "fwd_cnt beyond what was sent",
        source: "vhost-device-vsock (credit underflow)",
        play: |raw| on_open(raw, b"x", |head| head.fwd_cnt = 1000),
        answer: Answer::Rst,
        counted: &[
            ("misbehavior fwd_cnt_beyond_sent", ONCE),
            ("closed misbehavior echo", ONCE),
        ],
        ..OTHERS
    },
    Row {
        trick: "fwd_cnt half the circle back",
        source: "vhost-device-vsock (credit underflow)",
        play: |raw| on_open(raw, b"x", |head| head.fwd_cnt = 1 << 31),
        answer: Answer::Rst,
        counted: &[
            ("misbehavior fwd_cnt_beyond_sent", ONCE),
            ("closed misbehavior echo", ONCE),
        ],
        ..OTHERS
    },
    Row {
        trick: "fwd_cnt that goes back by one",
        source: "vhost-device-vsock (credit underflow)",
        play: |raw| {
            let mut flow = raw.open(ECHO);
            raw.round_trip(&mut flow, b"consumed");
            raw.send(flow.header(Op::CreditUpdate), &[]);
            flow.fwd_cnt -= 1;
            raw.send(flow.header(Op::CreditUpdate), &[]);
        },
        // It has less room than it had: that is its own affair.
        ..Row::USUAL
    },
    Row {
        trick: "REQUEST with fwd_cnt at 2^32 - 1",
        play: |raw| {
            let port = raw.port();
            let mut head = header(Op::Request as u16, port, ECHO);
            head.fwd_cnt = u32::MAX;
            raw.send(head, &[]);
            assert_eq!(raw.await_word(port).header.op, Op::Response as u16);
            (head.op, head.fwd_cnt) = (Op::Rw as u16, 0);
            raw.send(head, b"modest again");
            assert_eq!(raw.await_word(port).payload, b"modest again");
        },
        answer: Answer::Seen("served: a flow that begins has sent nothing"),
        ..Row::USUAL
    },
    Row {
        trick: "buf_alloc 0 for ever",
        source: "vhost-device-vsock (credit underflow)",
        play: |raw| {
            let port = raw.port();
            let mut head = header(Op::Request as u16, port, ECHO);
            head.buf_alloc = 0;
            raw.send(head, &[]);
            assert_eq!(raw.await_word(port).header.op, Op::Response as u16);
            head.op = Op::Rw as u16;
            for _ in 0..10 {
                raw.send(head, &[1; 1000]);
                raw.good_goes_on();
            }
        },
        answer: Answer::Silence,
        ..Row::USUAL
    },
    Row {
        trick: "buf_alloc of 4 GiB less one, and nothing consumed",
        source: "vhost-device-vsock (credit underflow)",
        play: |raw| {
            let port = raw.port();
            let mut head = header(Op::Request as u16, port, SOURCE);
            head.buf_alloc = u32::MAX;
            raw.send(head, &[]);
            assert_eq!(raw.await_word(port).header.op, Op::Response as u16);
            let mut got = 0;
            while got < 8 << 20 {
                got += raw.await_word(port).payload.len();
            }
            head.op = Op::Rst as u16;
            raw.send(head, &[]);
            raw.good_goes_on();
            raw.take_heard();
        },
        answer: Answer::Seen("8 MiB of data, as promised"),
        counted: &[("closed guest_rst source", ONCE)],
        ..Row::USUAL
    },
    Row {
        trick: "buf_alloc that shrinks below what is under way",
        source: "vhost-device-vsock (credit underflow)",
        play: |raw| {
            let mut flow = raw.open(ECHO);
            let mut head = flow.header(Op::Rw);
            head.buf_alloc = 4096;
            raw.send(head, &[1; 4096]);
            raw.receive(&mut flow, 4096);
            // 100 bytes of room for the 4096 that were not consumed: none, and not 4 GiB.
            head.buf_alloc = 100;
            raw.send(head, &[2; 1000]);
            for _ in 0..5 {
                raw.good_goes_on();
            }
            let heard = raw.take_heard();
            assert!(heard.is_empty(), "bytes beyond the buffer: {heard:?}");
            raw.send(flow.header(Op::CreditUpdate), &[]);
            assert_eq!(raw.receive(&mut flow, 1000), [2; 1000]);
        },
        answer: Answer::Seen("not a byte beyond the buffer; the rest when there is room"),
        ..Row::USUAL
    },
    Row {
        trick: "buf_alloc that changes between 0 and 4 GiB with every packet",
        source: "vhost-device-vsock (credit underflow)",
        play: |raw| {
            let mut flow = raw.open(ECHO);
            for round in 0..500u32 {
                let mut head = flow.header(Op::CreditUpdate);
                head.buf_alloc = if round % 2 == 0 { 0 } else { u32::MAX };
                raw.send(head, &[]);
            }
            raw.round_trip(&mut flow, b"and room again");
        },
        ..Row::USUAL
    },
    Row {
        trick: "a receiver that consumes one byte at a time",
        play: |raw| {
            let port = raw.port();
            let mut head = header(Op::Request as u16, port, ECHO);
            head.buf_alloc = 1;
            raw.send(head, &[]);
            assert_eq!(raw.await_word(port).header.op, Op::Response as u16);
            head.op = Op::Rw as u16;
            raw.send(head, &[9; 200]);
            head.op = Op::CreditUpdate as u16;
            for _ in 0..200 {
                let packet = raw.await_word(port);
                assert_eq!(packet.payload, [9]);
                head.fwd_cnt += 1;
                raw.send(head, &[]);
            }
        },
        answer: Answer::Seen("200 packets of one byte"),
        ..Row::USUAL
    },
    Row {
        trick: "a guest that never consumes",
        source: "virtio 1.2, 5.10.6.3",
        play: |raw| {
            let mut flow = raw.open(SOURCE);
            raw.receive(&mut flow, BUF_ALLOC as usize);
            // It has taken them off its ring, and does not say so.
            for _ in 0..5 {
                raw.good_goes_on();
            }
            let more = raw.take_heard();
            assert!(more.is_empty(), "beyond the credit: {more:?}");
            flow.fwd_cnt = 0;
            raw.send(flow.header(Op::Rst), &[]);
        },
        answer: Answer::Seen("exactly buf_alloc bytes"),
        counted: &[("closed guest_rst source", ONCE)],
        ..Row::USUAL
    },
    Row {
        trick: "one byte beyond the credit",
        source: "virtio 1.2, 5.10.6.3",
        play: |raw| {
            let flow = raw.open(STALLED);
            let service = raw.stage.stalled_service();
            spend_all_credit(raw, flow.header(Op::Rw));
            raw.send(flow.header(Op::Rw), &[1]);
            raw.good_goes_on();
            assert_eq!(
                raw.stage
                    .sidecar
                    .metric("vsock_buffered_bytes", &[("guest", "web")]),
                0.0
            );
            drop(service);
        },
        answer: Answer::Rst,
        counted: &[
            ("misbehavior credit_exceeded", ONCE),
            ("closed misbehavior stalled", ONCE),
        ],
        ..OTHERS
    },
    Row {
        trick: "RST while bytes wait for a service that stalls",
        source: "Firecracker (buffers of killed connections)",
        play: |raw| {
            let flow = raw.open(STALLED);
            let mut service = raw.stage.stalled_service();
            spend_all_credit(raw, flow.header(Op::Rw));
            raw.send(flow.header(Op::Rst), &[]);
            raw.good_goes_on();
            assert_eq!(
                raw.stage
                    .sidecar
                    .metric("vsock_buffered_bytes", &[("guest", "web")]),
                0.0
            );
            // What was cut off must not look complete.
            let end = service.read_to_end(&mut Vec::new());
            assert_eq!(end.unwrap_err().kind(), std::io::ErrorKind::ConnectionReset);
        },
        counted: &[("closed guest_rst stalled", ONCE)],
        ..OTHERS
    },
    Row {
        trick: "close while bytes wait for a service that stalls",
        source: "vhost-device-vsock #874 (SHUTDOWN was forgotten)",
        play: |raw| {
            let flow = raw.open(STALLED);
            let mut service = raw.stage.stalled_service();
            spend_all_credit(raw, flow.header(Op::Rw));
            let mut head = flow.header(Op::Shutdown);
            head.flags = 3;
            raw.send(head, &[]);
            raw.good_goes_on();
            let heard = raw.take_heard();
            assert!(heard.is_empty(), "RST before the bytes were taken: {heard:?}");
            let mut all = Vec::new();
            service.read_to_end(&mut all).unwrap();
            assert!(all.len() > BUFFER as usize);
            until("the guest hears of the end", || {
                raw.good_goes_on();
                !raw.heard_is_empty()
            });
        },
        answer: Answer::Rst,
        counted: &[("closed guest_shutdown stalled", ONCE)],
        ..OTHERS
    },
    Row {
        trick: "20,000 packets of one byte to a service that stalls",
        source: "smoltcp and Linux: overhead of small packets",
        play: |raw| {
            let flow = raw.open(STALLED);
            let service = raw.stage.stalled_service();
            raw.storm(20_000, |_| (flow.header(Op::Rw), b"1"));
            raw.send(flow.header(Op::Rst), &[]);
            drop(service);
        },
        counted: &[("closed guest_rst stalled", ONCE)],
        ..OTHERS
    },
    Row {
        trick: "20,000 CREDIT_REQUESTs",
        source: "Firecracker (PendingRxSet: replies owed are a set)",
        play: |raw| {
            let mut flow = raw.open(ECHO);
            raw.storm(20_000, |_| (flow.header(Op::CreditRequest), b""));
            raw.round_trip(&mut flow, b"still here");
        },
        ..Row::USUAL
    },
];
