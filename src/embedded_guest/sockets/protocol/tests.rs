//! The guest's protocol on paper: what came in, what must go out.

use super::*;
use crate::embedded_guest::stats::Violation;

mod seqpacket;

const KIB: u32 = 1024;

fn guest() -> Protocol {
    Protocol::new(3, feature::SEQPACKET, 256 * KIB, false)
}

/// A packet from the host's port 80 to the guest's `port`.
fn packet(op: u16, port: u32, flags: u32) -> Header {
    Header {
        src_cid: Cid(2),
        dst_cid: Cid(3),
        src_port: Port(80),
        dst_port: Port(port),
        len: 0,
        socket_type: 1,
        op,
        flags,
        buf_alloc: 256 * KIB,
        fwd_cnt: 0,
    }
}

fn replies(p: &mut Protocol) -> Vec<(Op, u32)> {
    std::iter::from_fn(|| p.poll_reply())
        .map(|h| (Op::from_wire(h.op).unwrap(), h.flags))
        .collect()
}

fn deliver(p: &mut Protocol, op: Op, port: u32, flags: u32) -> Vec<(Op, u32)> {
    p.handle(&packet(op as u16, port, flags), &[]);
    replies(p)
}

fn deliver_data(p: &mut Protocol, port: u32, payload: &[u8]) {
    p.handle(
        &Header {
            len: payload.len() as u32,
            ..packet(Op::Rw as u16, port, 0)
        },
        payload,
    );
}

/// A connection to the host's port 80; answers its id and guest port.
fn established(p: &mut Protocol) -> (usize, u32) {
    let id = p.connect(2, 80, SocketType::Stream).unwrap();
    let request = p.poll_reply().unwrap();
    assert_eq!(
        (request.op, request.buf_alloc, request.fwd_cnt),
        (Op::Request as u16, 256 * KIB, 0)
    );
    assert_eq!(deliver(p, Op::Response, request.src_port.0, 0), []);
    assert!(matches!(p.connected(id), Some(Ok(()))));
    (id, request.src_port.0)
}

fn read(p: &mut Protocol, id: usize, len: usize) -> Option<usize> {
    match p.read(id, &mut vec![0; len]) {
        Readable::Bytes(n) => Some(n),
        Readable::Eof => Some(0),
        Readable::Nothing => None,
    }
}

fn room(p: &Protocol, id: usize) -> usize {
    match p.writable(id) {
        Writable::Room(room) => room,
        Writable::Nothing => 0,
        Writable::Broken => usize::MAX,
    }
}

#[test]
fn connecting_is_answered_refused_or_given_up() {
    let mut p = guest();
    established(&mut p);

    let refused = p.connect(2, 81, SocketType::Stream).unwrap();
    let port = p.poll_reply().unwrap().src_port;
    p.handle(
        &Header {
            src_port: Port(81),
            dst_port: port,
            ..packet(Op::Rst as u16, 0, 0)
        },
        &[],
    );
    let error = p.connected(refused).unwrap().unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    assert_eq!(replies(&mut p), [], "no RST for RST");

    let silent = p.connect(2, 80, SocketType::Stream).unwrap();
    let port = p.poll_reply().unwrap().src_port.0;
    p.give_up(silent);
    assert_eq!(
        deliver(&mut p, Op::Response, port, 0),
        [(Op::Rst, 0)],
        "a late RESPONSE"
    );
    assert!(p.violations().is_empty(), "{:?}", p.violations());
}

#[test]
fn a_listener_accepts_up_to_its_backlog() {
    let mut p = guest();
    let changed = Arc::new(Condvar::new());
    assert_eq!(
        deliver(&mut p, Op::Request, 22, 0),
        [(Op::Rst, 0)],
        "nobody listens"
    );
    p.listen(22, SocketType::Stream, 1, changed.clone()).unwrap();
    assert_eq!(
        p.listen(22, SocketType::Stream, 1, changed.clone())
            .unwrap_err()
            .kind(),
        io::ErrorKind::AddrInUse
    );
    assert_eq!(deliver(&mut p, Op::Request, 22, 0), [(Op::Response, 0)]);
    let second = Header {
        src_port: Port(81),
        ..packet(Op::Request as u16, 22, 0)
    };
    p.handle(&second, &[]);
    assert_eq!(replies(&mut p), [(Op::Rst, 0)], "the queue is full");
    let id = p.accept(22, &changed).unwrap().unwrap();
    assert_eq!(p.tuple(id).peer_port, Port(80));
    assert!(p.accept(22, &changed).unwrap().is_none());
    p.handle(&second, &[]);
    assert_eq!(replies(&mut p), [(Op::Response, 0)]);
    p.close_listener(22, &changed);
    assert_eq!(replies(&mut p), [(Op::Rst, 0)], "what nobody accepted is reset");
    assert!(p.accept(22, &changed).is_err());
    assert!(p.violations().is_empty());
}

#[test]
fn credit_is_told_when_less_than_a_packet_would_fit() {
    let mut p = guest();
    let (id, port) = established(&mut p);
    deliver_data(&mut p, port, &vec![1; 256 * 1024]);
    assert_eq!(read(&mut p, id, 192 * 1024), Some(192 * 1024));
    assert_eq!(replies(&mut p), [], "the device still believes in 64 KiB");
    assert_eq!(read(&mut p, id, 1), Some(1));
    let update = p.poll_reply().unwrap();
    assert_eq!(
        (update.op, update.fwd_cnt),
        (Op::CreditUpdate as u16, 192 * KIB + 1)
    );
    assert_eq!(read(&mut p, id, usize::MAX >> 40), Some(64 * 1024 - 1));
    assert_eq!(replies(&mut p), [], "told a moment ago");
    assert_eq!(
        deliver(&mut p, Op::CreditRequest, port, 0),
        [(Op::CreditUpdate, 0)]
    );

    let mut p = Protocol::new(3, 0, 256 * KIB, true);
    let (id, port) = established(&mut p);
    deliver_data(&mut p, port, b"abc");
    assert_eq!(read(&mut p, id, 2), Some(2));
    assert_eq!(replies(&mut p), []);
    assert_eq!(read(&mut p, id, 2), Some(1));
    assert_eq!(
        replies(&mut p),
        [(Op::CreditUpdate, 0)],
        "Linux since 6.7: whenever the buffer is empty"
    );
}

#[test]
fn payload_beyond_our_credit_is_dropped_and_counted() {
    let mut p = guest();
    let (id, port) = established(&mut p);
    deliver_data(&mut p, port, &vec![1; 256 * 1024 - 1]);
    deliver_data(&mut p, port, b"xy");
    assert_eq!(p.violations().count(Violation::CreditExceeded), 1);
    deliver_data(&mut p, port, b"z");
    assert_eq!(p.violations().total(), 1, "one byte still fits");
    assert_eq!(read(&mut p, id, 1 << 20), Some(256 * 1024));
}

#[test]
fn we_send_within_the_device_s_credit_even_when_it_shrinks_or_wraps() {
    let mut p = guest();
    let (id, port) = established(&mut p);
    assert_eq!(room(&p, id), 256 * 1024);
    let header = p.data(id, 256 * 1024, 0);
    assert_eq!((header.op, header.len), (Op::Rw as u16, 256 * KIB));
    assert_eq!(room(&p, id), 0);
    let update = |p: &mut Protocol, buf_alloc, fwd_cnt| {
        p.handle(
            &Header {
                buf_alloc,
                fwd_cnt,
                ..packet(Op::CreditUpdate as u16, port, 0)
            },
            &[],
        );
    };
    update(&mut p, 256 * KIB, 100);
    assert_eq!(room(&p, id), 100);
    update(&mut p, 64 * KIB, 100);
    assert_eq!(room(&p, id), 0, "more in flight than the buffer holds now");
    // Four GiB later the counters have wrapped.
    let mut sent = 256 * 1024u64;
    while sent < (1 << 32) + 5 {
        update(&mut p, 1 << 30, sent as u32);
        let len = (1 << 30).min((1 << 32) + 5 - sent as usize);
        p.data(id, len, 0);
        sent += len as u64;
    }
    update(&mut p, 256 * KIB, 2);
    assert_eq!(room(&p, id), 256 * 1024 - 3);
    assert!(p.violations().is_empty());
    update(&mut p, 256 * KIB, 6);
    assert_eq!(p.violations().count(Violation::ForwardCountAhead), 1);
}

#[test]
fn half_close_of_the_device_leaves_our_direction_open() {
    let mut p = guest();
    let (id, port) = established(&mut p);
    deliver_data(&mut p, port, b"bye");
    assert_eq!(deliver(&mut p, Op::Shutdown, port, 2), []);
    assert_eq!(read(&mut p, id, 10), Some(3));
    assert_eq!(read(&mut p, id, 10), Some(0), "end of stream");
    assert!(room(&p, id) > 0 && room(&p, id) < usize::MAX, "we may still send");
    deliver_data(&mut p, port, b"more");
    assert_eq!(p.violations().count(Violation::DataAfterShutdown), 1);
    assert_eq!(
        deliver(&mut p, Op::Shutdown, port, 1),
        [(Op::Rst, 0)],
        "sets of flags grow to both"
    );
    assert_eq!(room(&p, id), usize::MAX, "EPIPE");
    p.close(Instant::now(), id);
    assert_eq!((replies(&mut p), p.open()), (vec![], 0));
}

#[test]
fn a_device_that_shuts_down_gets_its_rst_after_the_last_byte_is_read() {
    let mut p = guest();
    let (id, port) = established(&mut p);
    deliver_data(&mut p, port, b"unread");
    assert_eq!(deliver(&mut p, Op::Shutdown, port, 3), []);
    assert_eq!(read(&mut p, id, 10), Some(6));
    p.close(Instant::now(), id);
    assert_eq!(replies(&mut p), [(Op::Rst, 0)]);
    assert_eq!(deliver(&mut p, Op::Rst, port, 0), [], "RST is never answered");
    assert_eq!(
        p.violations().count(Violation::UnexpectedRst),
        1,
        "but RST for our RST is wrong"
    );
}

#[test]
fn close_shuts_both_down_and_waits_eight_seconds_for_rst() {
    let start = Instant::now();
    let mut p = guest();
    let (id, port) = established(&mut p);
    p.close(start, id);
    assert_eq!(replies(&mut p), [(Op::Shutdown, 3)]);
    assert_eq!(deliver(&mut p, Op::Rst, port, 0), []);
    assert_eq!((p.open(), p.next_deadline()), (0, None));

    let (id, port) = established(&mut p);
    p.shutdown(id, ShutdownFlags::SEND);
    assert_eq!(replies(&mut p), [(Op::Shutdown, 2)]);
    p.close(start, id);
    assert_eq!(replies(&mut p), [(Op::Shutdown, 3)]);
    deliver_data(&mut p, port, b"on its way");
    p.expire(start + Duration::from_millis(7_999));
    assert_eq!(replies(&mut p), []);
    p.expire(p.next_deadline().unwrap());
    assert_eq!(replies(&mut p), [(Op::Rst, 0)]);
    assert_eq!(p.open(), 0);
    assert!(p.violations().is_empty(), "{:?}", p.violations());
    deliver(&mut p, Op::Rst, port, 0);
    assert_eq!(p.crossed_resets(), 1, "both may reset at the same moment");
    deliver(&mut p, Op::Rst, port, 0);
    assert_eq!(p.violations().count(Violation::UnexpectedRst), 1, "once");
}

/// A CREDIT_UPDATE that was on its way when the device answered our SHUTDOWN finds no connection there: the device was held to
/// have reset twice, now and then, when the machine was busy.
#[test]
fn what_we_said_behind_our_shutdown_may_be_answered_with_rst() {
    let mut p = guest();
    let (id, port) = established(&mut p);
    p.close(Instant::now(), id);
    deliver(&mut p, Op::Rst, port, 0);
    deliver(&mut p, Op::Rst, port, 0);
    assert!(p.violations().is_empty(), "{:?}", p.violations());
    assert_eq!(p.crossed_resets(), 1);
    // A device that resets by itself has no reason for another.
    let (_, port) = established(&mut p);
    deliver(&mut p, Op::Rst, port, 0);
    deliver(&mut p, Op::Rst, port, 0);
    assert_eq!(p.violations().count(Violation::UnexpectedRst), 1);
}

/// The host's last FIN and the guest's close meet on the way: each is told SHUTDOWN of both directions and confirms it. The device
/// was held to have reset for nothing, once, when the machine was busy.
#[test]
fn two_who_close_at_the_same_moment_confirm_each_other() {
    let mut p = guest();
    let (id, port) = established(&mut p);
    p.close(Instant::now(), id);
    assert_eq!(replies(&mut p), [(Op::Shutdown, 3)]);
    assert_eq!(deliver(&mut p, Op::Shutdown, port, 3), [(Op::Rst, 0)]);
    deliver(&mut p, Op::Rst, port, 0);
    assert!(p.violations().is_empty(), "{:?}", p.violations());
    assert_eq!(p.crossed_resets(), 0, "each answers, and nobody gives up");
    deliver(&mut p, Op::Rst, port, 0);
    assert_eq!(p.violations().count(Violation::UnexpectedRst), 1, "once");
}

/// A guest that was stuck finds a REQUEST and the RST that withdrew it, accepts the one before it looks at the other, and
/// its RESPONSE comes to nobody.
#[test]
fn the_response_to_a_request_that_was_withdrawn_may_be_answered_with_rst() {
    let mut p = guest();
    let changed = Arc::new(Condvar::new());
    p.listen(22, SocketType::Stream, 5, changed.clone()).unwrap();
    p.handle(&packet(Op::Request as u16, 22, 0), &[]);
    assert_eq!(deliver(&mut p, Op::Rst, 22, 0), [(Op::Response, 0)]);
    let id = p.accept(22, &changed).unwrap().unwrap();
    assert_eq!(read(&mut p, id, 10), Some(0));
    deliver(&mut p, Op::Rst, 22, 0);
    assert!(p.violations().is_empty(), "{:?}", p.violations());
    assert_eq!(p.crossed_resets(), 1);
    deliver(&mut p, Op::Rst, 22, 0);
    assert_eq!(p.violations().count(Violation::UnexpectedRst), 1, "once");

    // What the device knew of has no such excuse.
    p.handle(&packet(Op::Request as u16, 22, 0), &[]);
    deliver(&mut p, Op::CreditRequest, 22, 0);
    deliver(&mut p, Op::Rst, 22, 0);
    deliver(&mut p, Op::Rst, 22, 0);
    assert_eq!(p.violations().count(Violation::UnexpectedRst), 2);
}

#[test]
fn reset_ends_a_stream_and_what_was_received_is_still_read() {
    let mut p = guest();
    let (id, port) = established(&mut p);
    deliver_data(&mut p, port, b"last words");
    assert_eq!(deliver(&mut p, Op::Rst, port, 0), []);
    assert!(p.was_reset(id));
    assert_eq!(read(&mut p, id, 100), Some(10));
    assert_eq!(read(&mut p, id, 100), Some(0));
    assert_eq!(room(&p, id), usize::MAX, "EPIPE");
    deliver_data(&mut p, port, b"?");
    assert_eq!(
        p.violations().count(Violation::NoConnection),
        1,
        "the device had reset it"
    );
    p.close(Instant::now(), id);
    assert_eq!(
        replies(&mut p),
        [(Op::Rst, 0)],
        "only the answer to the stray packet"
    );
}

#[test]
fn every_fault_of_the_device_has_its_answer_and_its_name() {
    type Case = (
        &'static str,
        fn(u32) -> (Header, &'static [u8]),
        &'static [(Op, u32)],
        Violation,
    );
    let cases: [Case; 10] = [
        (
            "operation 0",
            |p| (packet(0, p, 0), b""),
            &[],
            Violation::InvalidOp,
        ),
        (
            "operation 9",
            |p| (packet(9, p, 0), b""),
            &[],
            Violation::InvalidOp,
        ),
        (
            "unknown type",
            |p| {
                (
                    Header {
                        socket_type: 3,
                        ..packet(5, p, 0)
                    },
                    b"",
                )
            },
            &[(Op::Rst, 0)],
            Violation::UnknownType,
        ),
        (
            "RW without payload",
            |p| (packet(5, p, 0), b""),
            &[],
            Violation::EmptyRw,
        ),
        (
            "RESPONSE with payload",
            |p| {
                (
                    Header {
                        len: 1,
                        ..packet(6, p, 0)
                    },
                    b"x",
                )
            },
            &[],
            Violation::UnexpectedPayload,
        ),
        (
            "second RESPONSE",
            |p| (packet(2, p, 0), b""),
            &[],
            Violation::UnexpectedResponse,
        ),
        (
            "second REQUEST",
            |p| (packet(1, p, 0), b""),
            &[],
            Violation::DuplicateRequest,
        ),
        (
            "RW for nobody",
            |_| {
                (
                    Header {
                        len: 1,
                        ..packet(5, 9, 0)
                    },
                    b"x",
                )
            },
            &[(Op::Rst, 0)],
            Violation::NoConnection,
        ),
        (
            "RST for nobody",
            |_| (packet(3, 9, 0), b""),
            &[],
            Violation::UnexpectedRst,
        ),
        (
            "another guest's CID",
            |p| {
                (
                    Header {
                        dst_cid: Cid(4),
                        ..packet(6, p, 0)
                    },
                    b"",
                )
            },
            &[],
            Violation::WrongAddress,
        ),
    ];
    for (name, make, answer, violation) in cases {
        let mut p = guest();
        let (id, port) = established(&mut p);
        let (header, payload) = make(port);
        p.handle(&header, payload);
        assert_eq!(replies(&mut p), answer, "{name}");
        assert_eq!(p.violations().count(violation), 1, "{name}: {:?}", p.violations());
        assert!(p.violations().count(Violation::UnexpectedPayload) <= 1);
        deliver_data(&mut p, port, b"alive");
        assert_eq!(read(&mut p, id, 10), Some(5), "{name}: the connection lives on");
    }
}

#[test]
fn losing_the_device_ends_everything() {
    let mut p = guest();
    let changed = Arc::new(Condvar::new());
    p.listen(22, SocketType::Stream, 5, changed.clone()).unwrap();
    let (id, port) = established(&mut p);
    let connecting = p.connect(2, 90, SocketType::Stream).unwrap();
    p.handle(&packet(Op::Request as u16, 22, 0), &[]);
    deliver_data(&mut p, port, b"abc");
    p.lose_everything(false);
    assert_eq!(replies(&mut p), []);
    assert_eq!(p.open(), 0);
    assert_eq!(read(&mut p, id, 10), Some(3));
    assert!(p.connected(connecting).unwrap().is_err());
    assert!(p.accept(22, &changed).is_err());
    p.close(Instant::now(), id);
    p.close(Instant::now(), connecting);
    assert!(p.connections.is_empty());
    established(&mut p);
    p.lose_everything(true);
    assert!(p.connect(2, 80, SocketType::Stream).is_err());
}
