//! SEQPACKET on paper, and other CIDs than the host's.

use super::*;
use crate::vsock::header::SocketType::{Seqpacket, Stream};

const EOM: u32 = 1;
const EOR: u32 = 2;

/// A SEQPACKET packet from the host's port 80 to the guest's `port`.
fn message_packet(op: Op, port: u32, flags: u32) -> Header {
    Header {
        socket_type: 2,
        ..packet(op as u16, port, flags)
    }
}

fn deliver_part(p: &mut Protocol, port: u32, payload: &[u8], flags: u32) {
    let header = Header {
        len: payload.len() as u32,
        ..message_packet(Op::Rw, port, flags)
    };
    p.handle(&header, payload);
}

/// A SEQPACKET connection to the host's port 80; answers its id and guest port.
fn messages(p: &mut Protocol) -> (usize, u32) {
    let id = p.connect(2, 80, Seqpacket).unwrap();
    let request = p.poll_reply().unwrap();
    assert_eq!((request.op, request.socket_type), (Op::Request as u16, 2));
    p.handle(&message_packet(Op::Response, request.src_port.0, 0), &[]);
    assert!(matches!(p.connected(id), Some(Ok(()))));
    (id, request.src_port.0)
}

/// What recv() finds: bytes and mark, `None` at the end.
fn recv(p: &mut Protocol, id: usize) -> Option<(Vec<u8>, bool)> {
    match p.recv(id) {
        Received::Message(m) => Some((m.bytes, m.end_of_record)),
        Received::Eof => None,
        Received::Nothing => panic!("nothing to receive"),
    }
}

#[test]
fn a_message_is_received_when_its_last_packet_is_there_and_told_of_at_once() {
    let mut p = guest();
    let (id, port) = messages(&mut p);
    deliver_part(&mut p, port, b"one ", 0);
    deliver_part(&mut p, port, b"mess", 0);
    assert!(matches!(p.recv(id), Received::Nothing));
    assert_eq!(replies(&mut p), []);
    deliver_part(&mut p, port, b"age", EOM);
    assert_eq!(recv(&mut p, id), Some((b"one message".to_vec(), false)));
    let update = p.poll_reply().unwrap();
    assert_eq!(
        (update.op, update.socket_type, update.fwd_cnt),
        (Op::CreditUpdate as u16, 2, 11)
    );
    assert!(p.violations().is_empty(), "{:?}", p.violations());
}

#[test]
fn boundaries_marks_and_emptiness_are_kept() {
    let mut p = guest();
    let (id, port) = messages(&mut p);
    deliver_part(&mut p, port, b"a", EOM);
    deliver_part(&mut p, port, b"", EOM);
    deliver_part(&mut p, port, b"b", 0);
    deliver_part(&mut p, port, b"c", EOM | EOR);
    deliver_part(&mut p, port, b"d", 0);
    // The end may come by itself, for a sender that learns of it late.
    deliver_part(&mut p, port, b"", EOM | EOR);
    p.handle(&message_packet(Op::Shutdown, port, 2), &[]);
    let received: Vec<_> = std::iter::from_fn(|| recv(&mut p, id)).collect();
    let expected = [("a", false), ("", false), ("bc", true), ("d", true)];
    assert_eq!(
        received,
        expected.map(|(text, mark)| (text.as_bytes().to_vec(), mark))
    );
    assert!(p.violations().is_empty(), "{:?}", p.violations());
}

#[test]
fn a_message_that_has_begun_holds_its_part_of_the_buffer() {
    let mut p = guest();
    let (id, port) = messages(&mut p);
    let quarter = vec![1; 64 * 1024];
    for _ in 0..3 {
        deliver_part(&mut p, port, &quarter, 0);
    }
    assert!(matches!(p.recv(id), Received::Nothing));
    deliver_part(&mut p, port, &quarter, EOM);
    assert!(p.violations().is_empty(), "as long as the buffer is fine");
    deliver_part(&mut p, port, b"x", EOM);
    assert_eq!(p.violations().count(Violation::CreditExceeded), 1);
    assert_eq!(recv(&mut p, id).unwrap().0.len(), 256 * 1024);
    assert!(
        matches!(p.recv(id), Received::Nothing),
        "what was too much is dropped"
    );
}

#[test]
fn a_message_leaves_within_credit_and_never_if_the_device_cannot_hold_it() {
    let mut p = guest();
    let (id, port) = messages(&mut p);
    let room = |p: &Protocol, left| match p.message_room(id, left) {
        Ok(room) => room,
        Err(error) => {
            assert_eq!(
                error.raw_os_error(),
                Some(rustix::io::Errno::MSGSIZE.raw_os_error())
            );
            usize::MAX
        }
    };
    assert_eq!(room(&p, 256 * 1024), 256 * 1024);
    assert_eq!(room(&p, 256 * 1024 + 1), usize::MAX, "EMSGSIZE");
    let first = p.data(id, 200 * 1024, 0);
    assert_eq!((first.socket_type, first.flags), (2, 0));
    assert_eq!(room(&p, 100), 56 * 1024);
    let last = p.data(id, 56 * 1024, SEQ_EOM | SEQ_EOR);
    assert_eq!(last.flags, 3);
    assert_eq!(room(&p, 1), 0);
    let shrunk = Header {
        buf_alloc: 10,
        fwd_cnt: 256 * 1024,
        ..message_packet(Op::CreditUpdate, port, 0)
    };
    p.handle(&shrunk, &[]);
    assert_eq!((room(&p, 10), room(&p, 11)), (10, usize::MAX));

    assert!(p.begin_message(id));
    assert!(!p.begin_message(id), "another thread waits for its turn");
    p.end_message(id);
    assert!(p.begin_message(id));
    p.handle(&message_packet(Op::Shutdown, port, 1), &[]);
    let error = p.message_room(id, 1).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
}

#[test]
fn half_close_ends_after_the_last_whole_message() {
    let mut p = guest();
    let (id, port) = messages(&mut p);
    deliver_part(&mut p, port, b"whole", EOM);
    p.handle(&message_packet(Op::Shutdown, port, 2), &[]);
    assert_eq!(recv(&mut p, id), Some((b"whole".to_vec(), false)));
    assert_eq!(recv(&mut p, id), None);
    assert!(p.message_room(id, 1).is_ok(), "we may still send");
    assert_eq!(replies(&mut p), [(Op::CreditUpdate, 0)]);
    assert!(p.violations().is_empty());

    let (id, port) = messages(&mut p);
    deliver_part(&mut p, port, b"hal", 0);
    p.handle(&message_packet(Op::Shutdown, port, 2), &[]);
    assert_eq!(p.violations().count(Violation::UnfinishedMessage), 1);
    assert_eq!(recv(&mut p, id), None, "half a message is none");
}

/// Linux asks for bytes before it answers SHUTDOWN, and an empty message has none.
#[test]
fn an_empty_message_does_not_hold_up_the_rst() {
    let mut p = guest();
    let (id, port) = messages(&mut p);
    deliver_part(&mut p, port, b"", EOM);
    p.handle(&message_packet(Op::Shutdown, port, 3), &[]);
    assert_eq!(replies(&mut p), [(Op::Rst, 0)]);
    assert_eq!(recv(&mut p, id), Some((vec![], false)));
    assert_eq!(recv(&mut p, id), None);
    assert_eq!(replies(&mut p), []);

    let (id, port) = messages(&mut p);
    deliver_part(&mut p, port, b"x", EOM);
    p.handle(&message_packet(Op::Shutdown, port, 3), &[]);
    assert_eq!(replies(&mut p), [], "unread bytes do");
    p.close(Instant::now(), id);
    assert_eq!(replies(&mut p), [(Op::Rst, 0)]);
}

#[test]
fn types_do_not_mix() {
    let mut p = guest();
    let (changed, other) = (Arc::new(Condvar::new()), Arc::new(Condvar::new()));
    p.listen(22, Seqpacket, 5, changed.clone()).unwrap();
    assert!(
        p.listen(22, Stream, 5, other).is_err(),
        "ports are bound for both types"
    );
    assert_eq!(
        deliver(&mut p, Op::Request, 22, 0),
        [(Op::Rst, 0)],
        "a stream to a SEQPACKET listener"
    );
    p.handle(&message_packet(Op::Request, 22, 0), &[]);
    let response = p.poll_reply().unwrap();
    assert_eq!((response.op, response.socket_type), (Op::Response as u16, 2));
    let accepted = p.accept(22, &changed).unwrap().unwrap();
    deliver_part(&mut p, 22, b"hello", EOM);
    assert_eq!(recv(&mut p, accepted), Some((b"hello".to_vec(), false)));
    assert!(p.violations().is_empty(), "{:?}", p.violations());
}

#[test]
fn every_fault_of_messages_has_its_name_and_harms_nothing() {
    let rst = [(Op::Rst, 0)];
    let with = |header: Header, flags, len| Header { flags, len, ..header };
    type Row<'a> = (&'a str, Header, &'a [u8], &'a [(Op, u32)], Violation);
    let rows = |port| -> [Row<'_>; 6] {
        let rw = message_packet(Op::Rw, port, 0);
        [
            (
                "a stream's packet",
                with(packet(5, port, 0), 0, 1),
                b"x",
                &rst,
                Violation::WrongType,
            ),
            (
                "a stream's RST",
                packet(3, port, 0),
                b"",
                &[],
                Violation::WrongType,
            ),
            ("nothing at all", rw, b"", &[], Violation::EmptyRw),
            (
                "a record that ends in a message",
                with(rw, EOR, 1),
                b"!",
                &[],
                Violation::RecordEndInMessage,
            ),
            (
                "a flag nobody knows",
                with(rw, 4 | EOM, 1),
                b"!",
                &[],
                Violation::UnknownFlags,
            ),
            (
                "a message's flag on a response",
                message_packet(Op::CreditUpdate, port, EOM),
                b"",
                &[],
                Violation::UnknownFlags,
            ),
        ]
    };
    for row in 0..rows(0).len() {
        let mut p = guest();
        let (id, port) = messages(&mut p);
        let (what, header, payload, answer, violation) = rows(port)[row];
        p.handle(&header, payload);
        assert_eq!(replies(&mut p), answer, "{what}");
        assert_eq!(p.violations().count(violation), 1, "{what}: {:?}", p.violations());
        assert_eq!(p.violations().total(), 1, "{what}: {:?}", p.violations());
        deliver_part(&mut p, port, b"alive", EOM);
        assert!(
            matches!(p.recv(id), Received::Message(_)),
            "{what}: the connection lives on"
        );
    }
    // A stream has no flags.
    let mut p = guest();
    let (_, port) = established(&mut p);
    p.handle(&with(packet(5, port, 0), EOM, 1), b"x");
    assert_eq!(p.violations().count(Violation::UnknownFlags), 1);
}

#[test]
fn there_are_only_the_types_that_were_negotiated() {
    let no_support = Some(rustix::io::Errno::SOCKTNOSUPPORT.raw_os_error());
    let mut p = Protocol::new(3, 0, 256 * KIB, false);
    assert_eq!(
        p.connect(2, 80, Seqpacket).unwrap_err().raw_os_error(),
        no_support
    );
    // Linux lets a program listen all the same; nobody can connect.
    p.listen(22, Seqpacket, 5, Arc::new(Condvar::new())).unwrap();
    p.handle(&message_packet(Op::Request, 22, 0), &[]);
    assert_eq!(replies(&mut p), [(Op::Rst, 0)]);
    assert_eq!(p.violations().count(Violation::TypeNotNegotiated), 1);
    established(&mut p);

    let mut p = Protocol::new(
        3,
        feature::NO_IMPLIED_STREAM | feature::SEQPACKET,
        256 * KIB,
        false,
    );
    assert_eq!(p.connect(2, 80, Stream).unwrap_err().raw_os_error(), no_support);
    messages(&mut p);
    let both = feature::NO_IMPLIED_STREAM | feature::STREAM;
    let mut p = Protocol::new(3, both, 256 * KIB, false);
    established(&mut p);
}

#[test]
fn siblings_are_told_from_the_host_by_their_cids() {
    let mut p = guest();
    let changed = Arc::new(Condvar::new());
    p.listen(22, Stream, 5, changed.clone()).unwrap();
    // Host and sibling from the same port to the same port.
    for cid in [2, 5] {
        let request = Header {
            src_cid: Cid(cid),
            src_port: Port(1025),
            ..packet(Op::Request as u16, 22, 0)
        };
        p.handle(&request, &[]);
        let response = p.poll_reply().unwrap();
        assert_eq!((response.op, response.dst_cid), (Op::Response as u16, Cid(cid)));
        let id = p.accept(22, &changed).unwrap().unwrap();
        assert_eq!(
            (p.tuple(id).peer_cid, p.tuple(id).peer_port),
            (Cid(cid), Port(1025))
        );
    }

    let id = p.connect(5, 80, Stream).unwrap();
    let request = p.poll_reply().unwrap();
    assert_eq!((request.src_cid, request.dst_cid), (Cid(3), Cid(5)));
    let response = Header {
        src_cid: Cid(5),
        ..packet(Op::Response as u16, request.src_port.0, 0)
    };
    assert_eq!(
        deliver(&mut p, Op::Response, request.src_port.0, 0),
        [(Op::Rst, 0)],
        "the host is somebody else"
    );
    p.handle(&response, &[]);
    assert!(matches!(p.connected(id), Some(Ok(()))));
    assert_eq!(p.violations().count(Violation::UnexpectedResponse), 1);
    assert_eq!(p.violations().total(), 1);
}
