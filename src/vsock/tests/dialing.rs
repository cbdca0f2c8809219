//! The guest asks for a connection: from its REQUEST to our answer.

use super::*;
use crate::vsock::RefuseReason;

#[test]
fn a_request_is_dialled_and_answered_with_response() {
    let mut s = Scene::new();
    let id = s.dialing(FLOW);
    assert_eq!(s.state(id), Some(State::Dialing));
    assert_eq!(s.sent(), [], "nothing is said before the target answered");
    assert!(s.mux.connected(s.now, id));
    assert_eq!(s.state(id), Some(State::Established));
    assert_eq!(s.sent(), [FLOW.gets(Op::Response)]);
    assert_eq!(s.room(id), GUEST_BUF, "REQUEST carried the guest's credit");
    assert!(!s.mux.connected(s.now, id), "once is enough");
    assert_eq!(s.sent(), []);
}

#[test]
fn a_refused_dial_is_an_rst_at_once() {
    for reason in [
        RefuseReason::NoRule,
        RefuseReason::DialRefused,
        RefuseReason::Dns,
        RefuseReason::Limit,
    ] {
        let mut s = Scene::new();
        let id = s.dialing(FLOW);
        s.mux.refused(id, reason);
        assert_eq!(s.state(id), Some(State::Dead));
        assert_eq!(s.events(), [Event::Refused { id, reason }]);
        assert_eq!(s.sent(), [FLOW.gets(Op::Rst)]);
        assert!(
            !s.mux.connected(s.now, id),
            "the dial that succeeds too late is not wanted"
        );
        s.mux.refused(id, reason);
        s.assert_over();
    }
}

#[test]
fn a_dial_that_takes_too_long_is_refused() {
    let mut s = Scene::new();
    let id = s.dialing(FLOW);
    assert_eq!(s.mux.poll_timeout(), Some(s.now + CONNECT_TIMEOUT));
    s.pass(CONNECT_TIMEOUT - A_MOMENT);
    assert_eq!(s.events(), []);
    s.pass(A_MOMENT);
    assert_eq!(
        s.events(),
        [Event::Refused {
            id,
            reason: RefuseReason::DialTimeout
        }]
    );
    assert_eq!(s.sent(), [FLOW.gets(Op::Rst)]);
    assert!(!s.mux.connected(s.now, id));
    s.assert_over();
}

#[test]
fn a_guest_that_gives_up_while_we_dial_gets_no_rst_for_its_rst() {
    let mut s = Scene::new();
    let id = s.dialing(FLOW);
    s.guest(FLOW.sends(Op::Rst));
    assert_eq!(
        s.events(),
        [Event::Refused {
            id,
            reason: RefuseReason::ClientGone
        }]
    );
    assert!(!s.mux.connected(s.now, id));
    s.assert_over();
}

#[test]
fn a_guest_that_closes_while_we_dial_gets_its_rst() {
    let mut s = Scene::new();
    let id = s.dialing(FLOW);
    s.guest(FLOW.sends_shutdown(ShutdownFlags::BOTH));
    assert_eq!(
        s.events(),
        [Event::Refused {
            id,
            reason: RefuseReason::ClientGone
        }]
    );
    assert_eq!(s.sent(), [FLOW.gets(Op::Rst)]);
    s.assert_over();
}

/// Linux's connect() gives up after 2 s by itself; the RESPONSE that comes later finds no socket and is answered
/// with RST.
#[test]
fn an_rst_for_a_late_response_ends_the_host_end() {
    let mut s = Scene::new();
    let id = s.established(FLOW);
    s.guest(FLOW.sends(Op::Rst));
    assert_eq!(
        s.events(),
        [Event::Closed {
            id,
            reason: crate::vsock::CloseReason::GuestRst,
            abort: true
        }]
    );
    s.assert_over();
}

#[test]
fn a_fresh_request_replaces_a_flow_whose_rst_still_waits() {
    let mut s = Scene::new();
    let old = s.dialing(FLOW);
    s.mux.refused(old, RefuseReason::DialRefused);
    s.events();
    // No RX buffer, so the RST waits; the guest has timed out and tries again from the same port.
    let new = s.dialing(FLOW);
    assert_ne!(old, new);
    assert!(s.mux.connected(s.now, new));
    assert_eq!(
        s.sent(),
        [FLOW.gets(Op::Response)],
        "the old RST would kill the new flow"
    );
    assert_eq!(s.state(old), None);
    s.guest(FLOW.sends(Op::Rst));
    s.events();
    s.assert_over();
}

#[test]
fn another_cid_than_the_hosts_is_the_callers_to_judge() {
    let sibling = Flow {
        peer_cid: Cid(5),
        ..FLOW
    };
    let mut s = Scene::new();
    let id = s.dialing(sibling);
    let host = s.dialing(FLOW);
    assert_ne!(id, host, "the same ports of two CIDs are two flows");
    s.mux.refused(id, RefuseReason::NoRule);
    s.events();
    assert_eq!(
        s.sent(),
        [sibling.gets(Op::Rst)],
        "in the name of the CID that was asked for"
    );
    s.guest(FLOW.sends(Op::Rst));
    s.events();
    s.assert_over();
}

#[test]
fn the_upper_half_of_a_cid_counts() {
    let odd = Flow {
        peer_cid: Cid(2 | 1 << 32),
        ..FLOW
    };
    let mut s = Scene::new();
    let id = s.dialing(odd);
    s.mux.refused(id, RefuseReason::NoRule);
    s.events();
    assert_eq!(s.sent(), [odd.gets(Op::Rst)]);
    s.guest(Header {
        src_cid: Cid(3 | 1 << 32),
        ..FLOW.sends(Op::Request)
    });
    assert_eq!(
        s.events(),
        [Event::Misbehaved {
            kind: crate::vsock::Misbehavior::WrongSourceCid,
            key: FLOW.key()
        }]
    );
    s.assert_over();
}

#[test]
fn beyond_the_limit_a_request_is_reset_and_told() {
    let mut s = Scene::with(MuxerConfig {
        max_connections: 2,
        ..config()
    });
    let first = s.dialing(FLOW);
    s.dialing(Flow::new(1025, 80));
    let third = Flow::new(1026, 80);
    s.guest(third.sends(Op::Request));
    assert_eq!(s.events(), [Event::LimitReached { key: third.key() }]);
    assert_eq!(s.sent(), [third.gets_stray_rst()]);
    assert_eq!(s.mux.connect(s.now, Port(22)), Err(RefuseReason::Limit));
    // A connection that is over makes room as soon as its RST is out, not before.
    s.mux.refused(first, RefuseReason::DialRefused);
    s.events();
    s.guest(third.sends(Op::Request));
    assert_eq!(s.events(), [Event::LimitReached { key: third.key() }]);
    assert_eq!(s.sent(), [third.gets_stray_rst(), FLOW.gets(Op::Rst)]);
    s.dialing(third);
}

/// An RST for a flow that we did not know waits for a buffer; then the guest opens a connection from the same port.
#[test]
fn a_fresh_request_takes_back_the_strays_of_its_flow() {
    let mut s = Scene::new();
    let other = Flow::new(1025, 80);
    s.guest(FLOW.sends_rw(1));
    s.guest(other.sends_rw(1));
    s.guest(FLOW.sends_rw(1));
    let id = s.dialing(FLOW);
    assert_eq!(
        s.sent(),
        [other.gets_stray_rst()],
        "an RST of the past would kill the new flow"
    );
    s.mux.refused(id, RefuseReason::NoRule);
    s.events();
    assert_eq!(s.sent(), [FLOW.gets(Op::Rst)]);
    s.assert_over();
}

/// Linux's connect() gives up after 2 s without a word to us. If we take longer, its next try from the same socket
/// comes while we still dial for the first: it is the same wish, and nobody's fault.
#[test]
fn a_request_again_while_we_dial_is_the_same_request() {
    let mut s = Scene::with(MuxerConfig {
        connect_timeout: Duration::from_secs(10),
        ..config()
    });
    let id = s.dialing(FLOW);
    s.pass(Duration::from_secs(3));
    s.guest(Header {
        buf_alloc: 1000,
        ..FLOW.sends(Op::Request)
    });
    assert_eq!((s.sent(), s.events()), (vec![], vec![]));
    assert!(s.mux.connected(s.now, id));
    assert_eq!(s.room(id), 1000, "the new socket's buffer");
    s.guest(FLOW.sends(Op::Request));
    assert_eq!(s.events(), [], "nor while the RESPONSE waits for a buffer");
    assert_eq!(s.sent(), [FLOW.gets(Op::Response)]);
    s.guest(FLOW.sends(Op::Request));
    assert_eq!(
        s.events()[0],
        Event::Misbehaved {
            kind: crate::vsock::Misbehavior::DuplicateRequest,
            key: FLOW.key()
        },
        "once answered, it is another"
    );
}
