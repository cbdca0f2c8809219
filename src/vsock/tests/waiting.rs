//! A client that waits for its guest: REQUEST again and again, until the guest accepts or the time is over.

use super::*;
use crate::vsock::connection::Retry;
use crate::vsock::{Misbehavior, RefuseReason};

const FIRST: Duration = Retry::FIRST_PAUSE;
const LONGEST: Duration = Retry::LONGEST_PAUSE;

/// A client waits, and the guest has seen its first REQUEST.
fn waiting(s: &mut Scene) -> (ConnectionId, Flow) {
    let id = s.mux.connect_waiting(s.now, Port(22)).expect("there is room");
    let key = s.mux.connection(id).expect("just made").key();
    let flow = Flow::new(22, key.peer_port.0);
    assert_eq!(s.sent(), [flow.gets(Op::Request)]);
    (id, flow)
}

#[test]
fn a_guest_that_refuses_is_asked_again_and_may_accept() {
    let mut s = Scene::new();
    let (id, flow) = waiting(&mut s);
    s.mux.host_readable(id);
    s.guest(flow.sends(Op::Rst));
    assert_eq!(s.events(), [], "no refusal");
    assert_eq!(s.state(id), Some(State::Requested));
    s.pass(FIRST - A_MOMENT);
    assert_eq!(s.sent(), [], "its pause is not over");
    s.pass(A_MOMENT);
    assert_eq!(s.sent(), [flow.gets(Op::Request)], "on the same ports");
    s.guest(flow.sends(Op::Response));
    assert_eq!(s.events(), [Event::Accepted { id, key: flow.key() }]);
    assert_eq!(s.room(id), GUEST_BUF);
    // What the client wrote meanwhile has waited in its socket.
    assert_eq!(s.host_sends(id, 100, false).len, 100);
    s.guest(flow.sends(Op::Rst));
    s.events();
    s.assert_over();
}

#[test]
fn the_pauses_double_to_half_a_second() {
    let mut s = Scene::new();
    let (_, flow) = waiting(&mut s);
    for millis in [50, 100, 200, 400, 500, 500, 500] {
        s.guest(flow.sends(Op::Rst));
        s.pass(Duration::from_millis(millis - 1));
        assert_eq!(s.sent(), [], "{millis} ms are not over");
        s.pass(A_MOMENT);
        assert_eq!(s.sent(), [flow.gets(Op::Request)], "after {millis} ms");
    }
}

/// The refusal says what the guest did last: it is there and nobody listens.
#[test]
fn a_guest_that_never_listens_is_a_refusal_when_the_time_is_over() {
    let mut s = Scene::new();
    let begin = s.now;
    let (id, flow) = waiting(&mut s);
    let mut requests = 1;
    while s.state(id).is_some() {
        s.guest(flow.sends(Op::Rst));
        assert_eq!(s.events(), []);
        s.now = s.mux.poll_timeout().expect("a pause");
        s.mux.handle_timeout(s.now);
        requests += s.sent().len();
    }
    assert_eq!(
        s.events(),
        [Event::Refused {
            id,
            reason: RefuseReason::GuestRst
        }]
    );
    assert_eq!(
        s.now - begin,
        GUEST_TIMEOUT,
        "neither the pauses nor the answers move it"
    );
    // 0, 50, 150, 350, 750 ms, then every 500 ms up to 4.75 s.
    assert_eq!(requests, 13);
    s.assert_over();
}

#[test]
fn a_guest_that_falls_silent_gets_an_rst_when_the_time_is_over() {
    let mut s = Scene::new();
    let (id, flow) = waiting(&mut s);
    s.guest(flow.sends(Op::Rst));
    s.pass(FIRST);
    assert_eq!(s.sent(), [flow.gets(Op::Request)]);
    s.pass(GUEST_TIMEOUT - FIRST);
    assert_eq!(
        s.events(),
        [Event::Refused {
            id,
            reason: RefuseReason::GuestTimeout
        }]
    );
    assert_eq!(s.sent(), [flow.gets(Op::Rst)], "it may have accepted by now");
    s.assert_over();
}

/// No driver runs: nobody takes packets, and the one REQUEST that is owed waits.
#[test]
fn without_a_driver_the_request_waits_and_the_time_runs() {
    let mut s = Scene::new();
    let id = s.mux.connect_waiting(s.now, Port(22)).unwrap();
    s.pass(GUEST_TIMEOUT - A_MOMENT);
    assert_eq!(s.mux.list_lengths().replies, 1);
    s.pass(A_MOMENT);
    assert_eq!(
        s.events(),
        [Event::Refused {
            id,
            reason: RefuseReason::GuestTimeout
        }]
    );
    s.assert_over();
}

/// Whatever the request has come to, the guest that boots next hears it from the beginning.
#[test]
fn a_reboot_begins_the_request_anew() {
    for come_to in ["owed", "sent", "refused", "owed again", "sent again"] {
        let mut s = Scene::new();
        let id = s.mux.connect_waiting(s.now, Port(22)).unwrap();
        let flow = Flow::new(22, 1 << 30);
        if come_to != "owed" {
            s.sent();
        }
        if ["refused", "owed again", "sent again"].contains(&come_to) {
            s.guest(flow.sends(Op::Rst));
        }
        if come_to.ends_with("again") {
            s.pass(FIRST);
        }
        if come_to == "sent again" {
            s.sent();
        }
        s.mux.reset();
        assert_eq!(s.events(), [], "{come_to}");
        assert_eq!(s.sent(), [flow.gets(Op::Request)], "{come_to}: at once, and once");
        // The pauses begin anew as well: this guest's service may be about to listen.
        s.guest(flow.sends(Op::Rst));
        s.pass(FIRST);
        assert_eq!(s.sent(), [flow.gets(Op::Request)], "{come_to}");
        s.guest(flow.sends(Op::Response));
        assert_eq!(s.events(), [Event::Accepted { id, key: flow.key() }], "{come_to}");
        // From here on it is a connection like any other.
        s.mux.reset();
        assert_eq!(s.events().len(), 1, "{come_to}");
        s.assert_over();
    }
}

#[test]
fn reboots_do_not_lengthen_the_wait() {
    let mut s = Scene::new();
    let (id, _) = waiting(&mut s);
    for _ in 0..4 {
        s.pass(Duration::from_secs(1));
        s.mux.reset();
        assert_eq!(s.sent().len(), 1);
    }
    s.pass(Duration::from_secs(1));
    assert_eq!(
        s.events(),
        [Event::Refused {
            id,
            reason: RefuseReason::GuestTimeout
        }]
    );
}

/// A guest may send RST at will. Only the one that answers a REQUEST counts.
#[test]
fn resets_that_answer_nothing_change_nothing() {
    let mut s = Scene::new();
    let (_, flow) = waiting(&mut s);
    s.guest(flow.sends(Op::Rst));
    let due = s.mux.poll_timeout();
    for _ in 0..1000 {
        s.guest(flow.sends(Op::Rst));
    }
    assert_eq!(s.mux.poll_timeout(), due);
    assert_eq!(s.mux.list_lengths().timers, 1);
    s.pass(FIRST);
    // Owed again, and not sent yet.
    s.guest(flow.sends(Op::Rst));
    assert_eq!(s.sent(), [flow.gets(Op::Request)]);
    s.guest(flow.sends(Op::Rst));
    s.pass(2 * FIRST - A_MOMENT);
    assert_eq!(s.sent(), [], "the second pause, not the thousandth");
    s.pass(A_MOMENT);
    assert_eq!(s.sent(), [flow.gets(Op::Request)]);
}

#[test]
fn a_response_during_a_pause_is_to_nothing() {
    let mut s = Scene::new();
    let (id, flow) = waiting(&mut s);
    s.guest(flow.sends(Op::Rst));
    s.guest(flow.sends(Op::Response));
    assert_eq!(
        s.events(),
        [
            Event::Misbehaved {
                kind: Misbehavior::UnexpectedResponse,
                key: flow.key()
            },
            Event::Refused {
                id,
                reason: RefuseReason::Misbehavior
            }
        ]
    );
    assert_eq!(s.sent(), [flow.gets(Op::Rst)]);
    s.assert_over();
}

#[test]
fn a_client_that_leaves_during_a_pause_is_no_matter_of_the_guest() {
    let mut s = Scene::new();
    let (id, flow) = waiting(&mut s);
    s.guest(flow.sends(Op::Rst));
    s.mux.refused(id, RefuseReason::ClientGone);
    assert_eq!(
        s.events(),
        [Event::Refused {
            id,
            reason: RefuseReason::ClientGone
        }]
    );
    s.pass(LONGEST);
    assert_eq!(s.sent(), [], "the guest had refused: it knows of nothing");
    s.assert_over();
}

#[test]
fn a_client_that_is_done_before_the_guest_listens_is_told_so_with_its_connection() {
    let mut s = Scene::new();
    let (id, flow) = waiting(&mut s);
    s.guest(flow.sends(Op::Rst));
    s.mux.host_eof(s.now, id);
    s.pass(FIRST);
    assert_eq!(s.sent(), [flow.gets(Op::Request)]);
    s.guest(flow.sends(Op::Response));
    assert_eq!(s.events(), [Event::Accepted { id, key: flow.key() }]);
    assert_eq!(s.sent(), [flow.gets_shutdown(ShutdownFlags::SEND, 0)]);
}

/// A drain must not wait for guests that may never come. What the guest is just being asked is not taken back.
#[test]
fn a_drain_ends_the_waiting() {
    let mut s = Scene::new();
    let owed = s.mux.connect_waiting(s.now, Port(23)).unwrap();
    s.mux.stop_waiting(RefuseReason::Draining);
    assert_eq!(
        s.events(),
        [Event::Refused {
            id: owed,
            reason: RefuseReason::Draining
        }]
    );
    let (asked, flow) = waiting(&mut s);
    let plain = s.requested(24);
    s.mux.stop_waiting(RefuseReason::Draining);
    assert_eq!(s.events(), []);
    s.guest(flow.sends(Op::Rst));
    s.guest(plain.1.sends(Op::Rst));
    let refused = |id| Event::Refused {
        id,
        reason: RefuseReason::GuestRst,
    };
    assert_eq!(s.events(), [refused(asked), refused(plain.0)]);
    s.assert_over();
}

/// The limit of connections is that of all: whoever waits is one of them.
#[test]
fn those_who_wait_count() {
    let mut s = Scene::new();
    let mut flows = Vec::new();
    while s.mux.len() < config().max_connections {
        flows.push(waiting(&mut s).1);
    }
    assert!(s.mux.connect_waiting(s.now, Port(22)).is_err());
    for flow in &flows {
        s.guest(flow.sends(Op::Rst));
    }
    assert_eq!(s.mux.list_lengths().timers, flows.len());
    s.pass(FIRST);
    assert_eq!(s.sent().len(), flows.len());
}
