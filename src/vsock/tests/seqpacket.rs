//! Messages: boundaries pass, credit counts bytes, and what could never end is ended.

use super::*;
use crate::vsock::{Caller, CloseReason, Misbehavior, RefuseReason, SocketTypes};

const FLOW: Flow = Flow::new(1024, 80);

const BOTH: SocketTypes = SocketTypes {
    stream: true,
    seqpacket: true,
};

/// The same packet on a SEQPACKET connection.
fn seq(header: Header) -> Header {
    Header {
        socket_type: SocketType::Seqpacket as u16,
        ..header
    }
}

/// An RW packet of a message, which ends with it or not.
fn piece(len: u32, boundary: Boundary) -> Header {
    Header {
        flags: boundary.bits(),
        ..seq(FLOW.sends_rw(len))
    }
}

fn scene() -> Scene {
    let mut s = Scene::new();
    s.mux.set_types(BOTH);
    s
}

fn established(s: &mut Scene) -> ConnectionId {
    assert_eq!(s.guest(seq(FLOW.sends(Op::Request))), Disposition::Consumed);
    let id = match s.events()[..] {
        [
            Event::Dial {
                id,
                key,
                socket_type: SocketType::Seqpacket,
            },
        ] if key == FLOW.key() => id,
        ref other => panic!("no dial: {other:?}"),
    };
    assert!(s.mux.connected(s.now, id));
    assert_eq!(s.sent(), [seq(FLOW.gets(Op::Response))]);
    id
}

#[test]
fn without_the_feature_a_request_is_reset() {
    let mut s = Scene::new();
    s.mux.set_types(SocketTypes::IMPLIED);
    s.guest(seq(FLOW.sends(Op::Request)));
    assert_eq!(
        s.events(),
        [Event::Misbehaved {
            kind: Misbehavior::UnsupportedType,
            key: FLOW.key()
        }]
    );
    assert_eq!(s.sent(), [seq(FLOW.gets_stray_rst())]);
    let caller = Caller {
        socket_type: SocketType::Seqpacket,
        ..Caller::host(Port(22))
    };
    assert_eq!(s.mux.request(s.now, caller), Err(RefuseReason::UnsupportedType));
    s.assert_over();
}

/// A client that came before the VMM was refused for what nobody had said yet.
#[test]
fn a_client_with_messages_may_come_before_the_driver_that_knows_them() {
    for seqpacket in [true, false] {
        let mut s = Scene::new();
        let caller = Caller {
            socket_type: SocketType::Seqpacket,
            ..Caller::host(Port(22))
        };
        let id = s.mux.request(s.now, caller).unwrap();
        assert_eq!(s.events(), []);
        s.mux.set_types(SocketTypes {
            stream: true,
            seqpacket,
        });
        if seqpacket {
            let request = &s.sent()[..];
            assert!(
                matches!(
                    request,
                    [Header {
                        op: 1,
                        socket_type: 2,
                        ..
                    }]
                ),
                "{request:?}"
            );
            assert_eq!(s.events(), []);
        } else {
            assert_eq!(s.sent(), [], "this driver would not understand");
            let reason = RefuseReason::UnsupportedType;
            assert_eq!(s.events(), [Event::Refused { id, reason }]);
            s.assert_over();
        }
    }
}

#[test]
fn streams_can_be_ruled_out() {
    let mut s = Scene::new();
    s.mux.set_types(SocketTypes {
        stream: false,
        seqpacket: true,
    });
    s.guest(FLOW.sends(Op::Request));
    assert_eq!(
        s.events(),
        [Event::Misbehaved {
            kind: Misbehavior::UnsupportedType,
            key: FLOW.key()
        }]
    );
    assert_eq!(s.sent(), [FLOW.gets_stray_rst()]);
}

#[test]
fn boundaries_pass_in_both_directions() {
    let mut s = scene();
    let id = established(&mut s);
    for (len, boundary) in [
        (100, Boundary::None),
        (20, Boundary::Message),
        (0, Boundary::Record),
        (1, Boundary::Record),
    ] {
        assert_eq!(
            s.guest(piece(len, boundary)),
            Disposition::Payload { id, len, boundary }
        );
    }
    // What says nothing is nothing.
    assert_eq!(s.guest(piece(0, Boundary::None)), Disposition::Consumed);
    s.mux.host_wrote(s.now, id, 121);
    assert_eq!(s.sent(), [seq(FLOW.gets_with(Op::CreditUpdate, 121))]);

    s.mux.host_readable(id);
    assert_eq!(s.poll(), Some(Outgoing::Data { id, limit: GUEST_BUF }));
    for boundary in [Boundary::None, Boundary::Message, Boundary::Record] {
        let header = s.mux.data_header(id, 10, boundary).unwrap();
        assert_eq!(
            header,
            Header {
                len: 10,
                flags: boundary.bits(),
                ..seq(FLOW.gets_with(Op::Rw, 121))
            }
        );
    }
    s.mux.host_read(s.now, id, 30, false);
    assert_eq!(s.room(id), GUEST_BUF - 30);
    assert_eq!(s.events(), []);
}

#[test]
fn the_flags_of_a_stream_mean_nothing() {
    let mut s = scene();
    let id = s.established(FLOW);
    let header = Header {
        flags: Boundary::Record.bits(),
        ..FLOW.sends_rw(5)
    };
    assert_eq!(
        s.guest(header),
        Disposition::Payload {
            id,
            len: 5,
            boundary: Boundary::None
        }
    );
}

#[test]
fn a_message_as_long_as_the_buffer_is_whole_and_one_that_fills_it_without_an_end_is_reset() {
    let mut s = scene();
    let id = established(&mut s);
    let whole = piece(OUR_BUF, Boundary::Message);
    assert!(matches!(
        s.guest(whole),
        Disposition::Payload { len: OUR_BUF, .. }
    ));
    s.mux.host_wrote(s.now, id, OUR_BUF);
    assert_eq!(s.sent(), [seq(FLOW.gets_with(Op::CreditUpdate, OUR_BUF))]);

    assert!(matches!(
        s.guest(piece(OUR_BUF - 1, Boundary::None)),
        Disposition::Payload { .. }
    ));
    assert_eq!(s.guest(piece(1, Boundary::None)), Disposition::Consumed);
    assert_eq!(
        s.events(),
        [
            Event::Misbehaved {
                kind: Misbehavior::MessageTooLong,
                key: FLOW.key()
            },
            Event::Closed {
                id,
                reason: CloseReason::Misbehavior,
                abort: true
            }
        ]
    );
    assert_eq!(s.sent(), [seq(FLOW.gets_with(Op::Rst, OUR_BUF))]);
    s.assert_over();
}

#[test]
fn a_message_that_waits_behind_others_is_not_too_long() {
    let mut s = scene();
    let id = established(&mut s);
    s.guest(piece(OUR_BUF - 10, Boundary::Message));
    assert_eq!(
        s.guest(piece(10, Boundary::None)),
        Disposition::Payload {
            id,
            len: 10,
            boundary: Boundary::None
        }
    );
    assert_eq!(s.events(), []);
}

/// A message of nearly the whole window behind a short one: the guest may have been told of the short one's room or not, and
/// without it the long one stops before its end for ever.
#[test]
fn the_room_of_what_was_taken_is_told_while_a_message_is_unfinished() {
    let mut s = scene();
    let id = established(&mut s);
    let short = OUR_BUF / 8;
    s.guest(piece(short, Boundary::Message));
    s.guest(piece(OUR_BUF - short, Boundary::None));
    assert_eq!(s.sent(), []);
    s.mux.host_wrote(s.now, id, short);
    assert_eq!(s.sent(), [seq(FLOW.gets_with(Op::CreditUpdate, short))]);
    s.guest(piece(short - 1, Boundary::Message));
    assert_eq!(s.events(), []);
}

/// A guest that waits for room for a whole message is told of all there is.
#[test]
fn every_message_that_was_taken_is_told_of() {
    let mut s = scene();
    let id = established(&mut s);
    s.guest(piece(1, Boundary::Message));
    s.mux.host_wrote(s.now, id, 1);
    assert_eq!(s.sent(), [seq(FLOW.gets_with(Op::CreditUpdate, 1))]);
    assert!(matches!(
        s.guest(piece(OUR_BUF, Boundary::Message)),
        Disposition::Payload { .. }
    ));
}

#[test]
fn a_shutdown_within_a_message_is_a_fault_and_behind_one_is_not() {
    for (boundary, fault) in [(Boundary::None, true), (Boundary::Message, false)] {
        let mut s = scene();
        let id = established(&mut s);
        s.guest(piece(7, boundary));
        s.guest(seq(FLOW.sends_shutdown(ShutdownFlags::SEND)));
        let cut = Event::Misbehaved {
            kind: Misbehavior::MessageCut,
            key: FLOW.key(),
        };
        assert_eq!(s.events().contains(&cut), fault);
        if !fault {
            s.mux.host_wrote(s.now, id, 7);
            assert_eq!(
                s.events(),
                [Event::ShutdownHost {
                    id,
                    flags: ShutdownFlags::SEND
                }]
            );
        }
    }
}

/// Linux's `send()` fails half-way when the peer says that it reads no more, and the application closes: no fault of its own.
#[test]
fn a_message_that_nobody_would_have_read_may_be_cut() {
    let mut s = scene();
    let id = established(&mut s);
    s.guest(piece(7, Boundary::None));
    s.mux.host_write_failed(s.now, id);
    assert_eq!(s.sent(), [seq(FLOW.gets_shutdown(ShutdownFlags::RCV, 7))]);
    s.guest(seq(FLOW.sends_shutdown(ShutdownFlags::BOTH)));
    assert_eq!(
        s.events(),
        [Event::Closed {
            id,
            reason: CloseReason::GuestShutdown,
            abort: false
        }]
    );
}

/// They use up no credit, and each is memory of the guest's kernel until an application takes it.
#[test]
fn a_guest_that_takes_no_empty_messages_gets_only_so_many() {
    let mut s = scene();
    let id = established(&mut s);
    s.mux.host_readable(id);
    let mut sent = 0;
    while let Some(Outgoing::Data { .. }) = s.poll() {
        s.mux.data_header(id, 0, Boundary::Message).unwrap();
        s.mux.host_read(s.now, id, 0, true);
        sent += 1;
        assert!(sent <= 1024, "there is no end");
    }
    assert_eq!(sent, 1024);
    // What it says of something else is no sign that it takes any.
    s.guest(piece(1, Boundary::Message));
    assert_eq!(s.poll(), None);
    s.guest(seq(FLOW.sends_credit(GUEST_BUF, 0)));
    assert!(matches!(s.poll(), Some(Outgoing::Data { .. })));
}

#[test]
fn the_type_of_a_connection_does_not_change() {
    let mut s = scene();
    established(&mut s);
    s.guest(FLOW.sends_rw(1));
    assert!(s.events().contains(&Event::Misbehaved {
        kind: Misbehavior::UnsupportedType,
        key: FLOW.key()
    }));
    s.sent();
    s.assert_over();
}

#[test]
fn another_guest_is_known_by_its_own_address_as_long_as_that_is_free() {
    let mut s = scene();
    let caller = Caller {
        socket_type: SocketType::Seqpacket,
        address: Some((Cid(7), Port(5000))),
        ..Caller::host(Port(22))
    };
    let first = s.mux.request(s.now, caller).unwrap();
    let second = s.mux.request(s.now, caller).unwrap();
    let key = |id| s.mux.connection(id).unwrap().key();
    assert_eq!(
        key(first),
        ConnectionKey {
            guest_port: Port(22),
            peer_cid: Cid(7),
            peer_port: Port(5000)
        }
    );
    assert_eq!(key(second).peer_cid, Cid(7));
    assert_ne!(
        key(second).peer_port,
        Port(5000),
        "the first may still be spoken of"
    );
    let request = s.sent()[0];
    assert_eq!((request.src_cid, request.src_port), (Cid(7), Port(5000)));
    let answer = Flow {
        guest_port: 22,
        peer_cid: Cid(7),
        peer_port: 5000,
    };
    s.guest(seq(answer.sends(Op::Response)));
    assert!(matches!(s.events()[..], [Event::Accepted { id, .. }] if id == first));
}

/// Linux sends as much of a message as it has credit for. The host end had taken a short message, less than what is news in
/// itself, and could not take the long one behind it, whose rest the guest had no credit for: both waited for ever.
#[test]
fn a_guest_that_ran_out_of_credit_within_a_message_hears_of_the_room_that_the_one_before_made() {
    let mut s = scene();
    let id = established(&mut s);
    let short = OUR_BUF / 8;
    s.guest(piece(short, Boundary::Message));
    s.guest(piece(OUR_BUF - short, Boundary::None));
    assert_eq!(s.sent(), []);
    s.mux.host_wrote(s.now, id, short);
    assert_eq!(s.sent(), [seq(FLOW.gets_with(Op::CreditUpdate, short))]);
    assert!(matches!(
        s.guest(piece(short, Boundary::Message)),
        Disposition::Payload { .. }
    ));
}
