//! The host side asks for a connection: from our REQUEST to the guest's answer.

use super::*;
use crate::vsock::{CloseReason, RefuseReason};

#[test]
fn a_response_makes_the_connection() {
    let mut s = Scene::new();
    let (id, flow) = s.requested(22);
    assert_eq!(s.state(id), Some(State::Requested));
    assert_eq!(
        flow.peer_port,
        1 << 30,
        "our ports start far from those of services"
    );
    s.guest(flow.sends(Op::Response));
    assert_eq!(s.events(), [Event::Accepted { id, key: flow.key() }]);
    assert_eq!(s.state(id), Some(State::Established));
    assert_eq!(s.room(id), GUEST_BUF);
    assert_eq!(s.sent(), []);
}

#[test]
fn bytes_that_were_there_before_the_response_follow_it() {
    let mut s = Scene::new();
    let (id, flow) = s.requested(22);
    s.mux.host_readable(id);
    assert_eq!(s.poll(), None, "not before the guest accepted");
    s.guest(flow.sends(Op::Response));
    let header = s.host_sends(id, 100, false);
    assert_eq!(
        header,
        Header {
            len: 100,
            ..flow.gets(Op::Rw)
        }
    );
    assert_eq!(s.room(id), GUEST_BUF - 100);
}

#[test]
fn an_rst_is_a_refusal() {
    let mut s = Scene::new();
    let (id, flow) = s.requested(22);
    s.guest(flow.sends(Op::Rst));
    assert_eq!(
        s.events(),
        [Event::Refused {
            id,
            reason: RefuseReason::GuestRst
        }]
    );
    s.assert_over();
}

#[test]
fn a_silent_guest_is_a_refusal_and_its_late_response_gets_an_rst() {
    let mut s = Scene::new();
    let (id, flow) = s.requested(22);
    s.pass(GUEST_TIMEOUT);
    assert_eq!(
        s.events(),
        [Event::Refused {
            id,
            reason: RefuseReason::GuestTimeout
        }]
    );
    assert_eq!(
        s.sent(),
        [flow.gets(Op::Rst)],
        "the guest may have accepted it by now"
    );
    s.guest(flow.sends(Op::Response));
    assert_eq!(s.sent(), [flow.gets_stray_rst()]);
    s.guest(flow.sends(Op::Rst));
    s.assert_over();
}

#[test]
fn a_response_that_crosses_our_rst_is_not_answered_twice() {
    let mut s = Scene::new();
    let (id, flow) = s.requested(22);
    s.mux.refused(id, RefuseReason::ClientGone);
    s.guest(flow.sends(Op::Response));
    assert_eq!(
        s.events(),
        [Event::Refused {
            id,
            reason: RefuseReason::ClientGone
        }]
    );
    assert_eq!(s.sent(), [flow.gets(Op::Rst)]);
    s.assert_over();
}

#[test]
fn an_rst_that_crosses_our_rst_silences_it() {
    let mut s = Scene::new();
    let (id, flow) = s.requested(22);
    s.mux.refused(id, RefuseReason::ClientGone);
    s.events();
    s.guest(flow.sends(Op::Rst));
    s.assert_over();
}

#[test]
fn a_request_that_never_left_is_forgotten_without_a_packet() {
    let mut s = Scene::new();
    for end in 0..4 {
        let id = s.mux.connect(s.now, Port(22)).unwrap();
        let reason = match end {
            0 => {
                s.mux.refused(id, RefuseReason::ClientGone);
                RefuseReason::ClientGone
            }
            1 => {
                s.mux.host_failed(id, CloseReason::PeerRst);
                RefuseReason::ClientGone
            }
            2 => {
                s.pass(GUEST_TIMEOUT);
                RefuseReason::GuestTimeout
            }
            _ => {
                s.mux.close_all(CloseReason::Drain, RefuseReason::Draining);
                RefuseReason::Draining
            }
        };
        assert_eq!(s.events(), [Event::Refused { id, reason }]);
        s.assert_over();
    }
}

#[test]
fn a_client_that_leaves_is_an_rst_to_the_guest() {
    let mut s = Scene::new();
    let (id, flow) = s.requested(22);
    s.mux.host_failed(id, CloseReason::PeerRst);
    assert_eq!(
        s.events(),
        [Event::Refused {
            id,
            reason: RefuseReason::ClientGone
        }]
    );
    assert_eq!(s.sent(), [flow.gets(Op::Rst)]);
    s.assert_over();
}

#[test]
fn bytes_or_a_close_before_the_response_break_the_protocol() {
    for offence in [
        |flow: Flow| flow.sends_rw(1),
        |flow: Flow| flow.sends_shutdown(ShutdownFlags::BOTH),
    ] {
        let mut s = Scene::new();
        let (id, flow) = s.requested(22);
        assert_eq!(s.guest(offence(flow)), Disposition::Consumed);
        assert_eq!(
            s.events(),
            [
                Event::Misbehaved {
                    kind: crate::vsock::Misbehavior::NotEstablished,
                    key: flow.key()
                },
                Event::Refused {
                    id,
                    reason: RefuseReason::Misbehavior
                },
            ]
        );
        assert_eq!(s.sent(), [flow.gets(Op::Rst)]);
        s.assert_over();
    }
}

#[test]
fn our_ports_wrap_and_skip_those_in_use() {
    let mut s = Scene::new();
    let last = (1 << 31) - 1;
    s.mux.set_next_local_port(last);
    let (_, flow) = s.requested(22);
    assert_eq!(flow.peer_port, last);
    // The guest happens to have asked for the first of our ports from its port 22.
    let taken = Flow::new(22, 1 << 30);
    s.dialing(taken);
    let (_, flow) = s.requested(22);
    assert_eq!(
        flow.peer_port,
        (1 << 30) + 1,
        "2^30 is taken for the guest's port 22"
    );
    s.mux.set_next_local_port(1 << 30);
    let (_, flow) = s.requested(23);
    assert_eq!(flow.peer_port, 1 << 30, "but not for its port 23");
}

/// `echo hello | nc host 2222`: the client is done before the guest has answered.
#[test]
fn a_client_that_ends_before_the_response_is_told_after_it() {
    let mut s = Scene::new();
    let (id, flow) = s.requested(22);
    s.mux.host_eof(s.now, id);
    assert_eq!(s.sent(), [], "SHUTDOWN for a connection that is none yet");
    s.guest(flow.sends(Op::Response));
    assert_eq!(s.events(), [Event::Accepted { id, key: flow.key() }]);
    assert_eq!(s.sent(), [flow.gets_shutdown(ShutdownFlags::SEND, 0)]);
    s.guest_sends(id, flow, 10);
    s.mux.host_wrote(s.now, id, 10);
    s.guest(flow.sends_shutdown(ShutdownFlags::BOTH));
    s.events();
    s.sent();
    s.assert_over();
}

#[test]
fn a_client_that_takes_nothing_before_the_response_is_told_after_it() {
    let mut s = Scene::new();
    let (id, flow) = s.requested(22);
    s.mux.host_write_failed(s.now, id);
    assert_eq!(s.sent(), []);
    s.guest(flow.sends(Op::Response));
    assert_eq!(s.sent(), [flow.gets_shutdown(ShutdownFlags::RCV, 0)]);
    assert_eq!(s.state(id), Some(State::Established));

    let (id, flow) = s.requested(22);
    s.mux.host_write_failed(s.now, id);
    s.mux.host_eof(s.now, id);
    s.events();
    s.guest(flow.sends(Op::Response));
    assert_eq!(
        s.events(),
        [
            Event::Accepted { id, key: flow.key() },
            Event::Closed {
                id,
                reason: CloseReason::PeerRst,
                abort: false
            }
        ]
    );
    assert_eq!(s.sent(), [flow.gets_shutdown(ShutdownFlags::BOTH, 0)]);
}

/// Our ports are easily guessed, so a guest may speak on a flow before our REQUEST has found a buffer.
#[test]
fn an_answer_to_a_request_that_never_left_is_no_answer() {
    use crate::vsock::Misbehavior;
    for (op, kind) in [
        (Op::Response, Misbehavior::UnexpectedResponse),
        (Op::Rw, Misbehavior::NotEstablished),
        (Op::Request, Misbehavior::DuplicateRequest),
    ] {
        let mut s = Scene::new();
        let id = s.mux.connect(s.now, Port(22)).unwrap();
        let flow = Flow::new(22, 1 << 30);
        s.guest(flow.sends(op));
        assert_eq!(
            s.events(),
            [
                Event::Misbehaved {
                    kind,
                    key: flow.key()
                },
                Event::Refused {
                    id,
                    reason: RefuseReason::Misbehavior
                }
            ]
        );
        assert_eq!(
            s.sent(),
            [flow.gets(Op::Rst)],
            "{op:?}: never silence, and no REQUEST any more"
        );
        s.assert_over();
    }
}
