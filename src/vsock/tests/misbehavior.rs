//! A hostile guest, a row a trick: what is counted, what is answered, who survives.

use super::*;
use crate::vsock::{CloseReason, Misbehavior, RefuseReason};

fn misbehaved(kind: Misbehavior) -> Event {
    Event::Misbehaved {
        kind,
        key: FLOW.key(),
    }
}

struct Trick {
    name: &'static str,
    packet: Header,
    /// Payload bytes that the chain really holds.
    available: u32,
    counted: Misbehavior,
}

/// What ends an established connection.
fn tricks() -> Vec<Trick> {
    let trick = |name, packet, counted| Trick {
        name,
        packet,
        available: packet.len,
        counted,
    };
    let mut tricks = vec![
        trick(
            "request again",
            FLOW.sends(Op::Request),
            Misbehavior::DuplicateRequest,
        ),
        trick(
            "response to nothing",
            FLOW.sends(Op::Response),
            Misbehavior::UnexpectedResponse,
        ),
        trick(
            "one byte beyond the credit",
            FLOW.sends_rw(OUR_BUF + 1),
            Misbehavior::CreditExceeded,
        ),
        trick(
            "four gigabytes",
            FLOW.sends_rw(u32::MAX),
            Misbehavior::CreditExceeded,
        ),
        trick(
            "consumed what was never sent",
            FLOW.sends_credit(GUEST_BUF, 1),
            Misbehavior::FwdCntBeyondSent,
        ),
        trick(
            "consumed two gigabytes of nothing",
            FLOW.sends_credit(GUEST_BUF, 1 << 31),
            Misbehavior::FwdCntBeyondSent,
        ),
        Trick {
            name: "len beyond the chain",
            packet: FLOW.sends_rw(1001),
            available: 1000,
            counted: Misbehavior::PayloadShort,
        },
    ];
    for op in [0, 8, 255, u16::MAX] {
        let packet = Header {
            op,
            ..FLOW.sends(Op::Rw)
        };
        tricks.push(trick("unknown op", packet, Misbehavior::UnknownOp));
    }
    for socket_type in [0, 3, u16::MAX] {
        let packet = Header {
            socket_type,
            ..FLOW.sends_rw(10)
        };
        tricks.push(trick("unknown type", packet, Misbehavior::UnknownType));
    }
    tricks.push(trick(
        "another type than the connection's",
        Header {
            socket_type: SocketType::Seqpacket as u16,
            ..FLOW.sends_rw(10)
        },
        Misbehavior::UnsupportedType,
    ));
    tricks
}

#[test]
fn a_trick_costs_its_connection_and_no_other() {
    for trick in tricks() {
        let mut s = Scene::new();
        let neighbour_flow = Flow::new(1025, 80);
        let neighbour = s.established(neighbour_flow);
        let id = s.established(FLOW);
        let end = s.mux.handle_packet(s.now, &trick.packet, trick.available);
        assert_eq!(end, Disposition::Consumed, "{}", trick.name);
        assert_eq!(
            s.events(),
            [
                misbehaved(trick.counted),
                Event::Closed {
                    id,
                    reason: CloseReason::Misbehavior,
                    abort: true
                }
            ],
            "{}",
            trick.name
        );
        assert_eq!(s.sent(), [FLOW.gets(Op::Rst)], "{}", trick.name);
        assert_eq!(s.state(id), None);
        s.guest_sends(neighbour, neighbour_flow, 5);
        s.mux.host_wrote(s.now, neighbour, 5);
        s.guest(neighbour_flow.sends(Op::Rst));
        s.events();
        s.assert_over();
    }
}

#[test]
fn the_same_tricks_while_we_dial_are_a_refusal() {
    for trick in tricks() {
        if trick.counted == Misbehavior::DuplicateRequest {
            continue; // the same request again, and no trick: dialing.rs
        }
        let mut s = Scene::new();
        let id = s.dialing(FLOW);
        s.mux.handle_packet(s.now, &trick.packet, trick.available);
        let counted = match trick.counted {
            Misbehavior::CreditExceeded | Misbehavior::PayloadShort => Misbehavior::NotEstablished,
            other => other,
        };
        assert_eq!(
            s.events(),
            [
                misbehaved(counted),
                Event::Refused {
                    id,
                    reason: RefuseReason::Misbehavior
                }
            ],
            "{}",
            trick.name
        );
        assert_eq!(s.sent(), [FLOW.gets(Op::Rst)], "{}", trick.name);
        s.assert_over();
    }
}

#[test]
fn the_same_tricks_while_we_wait_for_its_rst_are_counted_and_answered() {
    for trick in tricks() {
        if trick.counted == Misbehavior::DuplicateRequest {
            continue; // told in closing.rs
        }
        let mut s = Scene::new();
        let id = s.established(FLOW);
        s.mux.host_write_failed(s.now, id);
        s.mux.host_eof(s.now, id);
        s.sent();
        s.events();
        assert_eq!(s.state(id), Some(State::Closing));
        s.mux.handle_packet(s.now, &trick.packet, trick.available);
        assert_eq!(
            s.events(),
            [misbehaved(trick.counted)],
            "{}: it was closed already",
            trick.name
        );
        assert_eq!(s.sent(), [FLOW.gets(Op::Rst)], "{}", trick.name);
        s.assert_over();
    }
}

#[test]
fn the_last_byte_of_the_credit_is_the_guests() {
    let mut s = Scene::new();
    let id = s.established(FLOW);
    s.guest_sends(id, FLOW, OUR_BUF - 1);
    s.guest_sends(id, FLOW, 1);
    assert_eq!(s.events(), []);
    assert_eq!(s.guest(FLOW.sends_rw(1)), Disposition::Consumed);
    assert_eq!(s.events()[0], misbehaved(Misbehavior::CreditExceeded));
}

#[test]
fn more_in_the_chain_than_the_header_says_is_not_payload() {
    let mut s = Scene::new();
    let id = s.established(FLOW);
    assert_eq!(
        s.mux.handle_packet(s.now, &FLOW.sends_rw(10), 4096),
        Disposition::Payload {
            id,
            len: 10,
            boundary: Boundary::None,
        }
    );
    assert_eq!(s.events(), []);
}

#[test]
fn a_payload_on_a_control_packet_is_counted_and_ignored() {
    for op in [
        Op::Request,
        Op::Response,
        Op::Rst,
        Op::Shutdown,
        Op::CreditUpdate,
        Op::CreditRequest,
    ] {
        let mut s = Scene::new();
        let end = s.guest(Header {
            len: 100,
            ..FLOW.sends(op)
        });
        assert_eq!(end, Disposition::Consumed);
        assert_eq!(
            s.events()[0],
            misbehaved(Misbehavior::UnexpectedPayload),
            "{op:?}"
        );
    }
    let mut s = Scene::new();
    let id = s.established(FLOW);
    s.guest(Header {
        len: 100,
        ..FLOW.sends(Op::CreditUpdate)
    });
    assert_eq!(s.events(), [misbehaved(Misbehavior::UnexpectedPayload)]);
    assert_eq!((s.state(id), s.held(id)), (Some(State::Established), 0));
}

#[test]
fn a_foreign_source_is_dropped_whatever_it_says() {
    for op in 0..9 {
        let mut s = Scene::new();
        let id = s.established(FLOW);
        for src_cid in [Cid(0), Cid(2), Cid(4), Cid(u64::MAX), Cid(3 << 32)] {
            s.guest(Header {
                src_cid,
                op,
                len: 10,
                ..FLOW.sends(Op::Rw)
            });
            assert_eq!(s.events(), [misbehaved(Misbehavior::WrongSourceCid)]);
            assert_eq!(s.sent(), [], "there is nobody to answer");
        }
        assert_eq!((s.state(id), s.held(id)), (Some(State::Established), 0));
    }
}

#[test]
fn unknown_flows_hear_rst_and_only_nonsense_is_counted() {
    let rows = [
        (Op::Response as u16, 1, None),
        (Op::Shutdown as u16, 1, None),
        (Op::Rw as u16, 1, None),
        (Op::CreditUpdate as u16, 1, None),
        (Op::CreditRequest as u16, 1, None),
        (Op::Rw as u16, 2, None),
        (Op::Request as u16, 2, Some(Misbehavior::UnsupportedType)),
        (Op::Request as u16, 0, Some(Misbehavior::UnknownType)),
        (Op::Rw as u16, 3, Some(Misbehavior::UnknownType)),
        (0, 1, Some(Misbehavior::UnknownOp)),
        (8, 2, Some(Misbehavior::UnknownOp)),
        (u16::MAX, u16::MAX, Some(Misbehavior::UnknownType)),
    ];
    for (op, socket_type, counted) in rows {
        let mut s = Scene::new();
        s.guest(Header {
            op,
            socket_type,
            ..FLOW.sends(Op::Rw)
        });
        assert_eq!(
            s.events(),
            counted.map(misbehaved).into_iter().collect::<Vec<_>>(),
            "op {op}, type {socket_type}"
        );
        let answer = Header {
            socket_type,
            ..FLOW.gets_stray_rst()
        };
        assert_eq!(s.sent(), [answer], "op {op}: in the type it was asked in");
        s.assert_over();
    }
}
