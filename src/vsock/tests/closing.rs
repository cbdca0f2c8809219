//! The ends: Draining, Closing, Dead. And RST, which is never answered with RST.

use super::*;
use crate::vsock::CloseReason;

const BOTH: ShutdownFlags = ShutdownFlags::BOTH;
const SEND: ShutdownFlags = ShutdownFlags::SEND;
const RCV: ShutdownFlags = ShutdownFlags::RCV;

fn closed(id: ConnectionId, reason: CloseReason, abort: bool) -> Event {
    Event::Closed { id, reason, abort }
}

/// A guest that sent 1000 bytes and closed, while the host end takes nothing.
fn draining(s: &mut Scene) -> ConnectionId {
    let id = s.established(FLOW);
    s.guest_sends(id, FLOW, 1000);
    s.guest(FLOW.sends_shutdown(BOTH));
    assert_eq!(s.state(id), Some(State::Draining));
    assert_eq!(s.events(), [Event::ShutdownHost { id, flags: RCV }]);
    id
}

/// A guest that finished sending, and a host end that did: SHUTDOWN(both) is out.
fn closing(s: &mut Scene) -> ConnectionId {
    let id = s.established(FLOW);
    s.guest(FLOW.sends_shutdown(SEND));
    s.mux.host_eof(s.now, id);
    assert_eq!(s.state(id), Some(State::Closing));
    assert_eq!(s.sent(), [FLOW.gets_shutdown(BOTH, 0)]);
    s.events();
    id
}

#[test]
fn a_guest_that_closes_gets_its_rst() {
    let mut s = Scene::new();
    let id = s.established(FLOW);
    s.guest(FLOW.sends_shutdown(BOTH));
    assert_eq!(s.events(), [closed(id, CloseReason::GuestShutdown, false)]);
    assert_eq!(s.state(id), Some(State::Dead));
    assert_eq!(s.sent(), [FLOW.gets(Op::Rst)]);
    s.assert_over();
}

/// Another guest that waits for room in `send()` while this one does not read, and is not read from before it has sent: the
/// close was told to it when the last byte was taken, and so never.
#[test]
fn the_host_end_hears_at_once_that_a_guest_that_closes_reads_no_more() {
    let mut s = Scene::new();
    let id = s.established(FLOW);
    s.guest_sends(id, FLOW, 1000);
    s.guest(FLOW.sends_shutdown(BOTH));
    assert_eq!(s.events(), [Event::ShutdownHost { id, flags: RCV }]);
    s.guest(FLOW.sends_shutdown(BOTH));
    assert_eq!(s.events(), [], "told once");
    s.mux.host_wrote(s.now, id, 1000);
    assert_eq!(s.events(), [closed(id, CloseReason::GuestShutdown, false)]);
    assert_eq!(s.sent(), [FLOW.gets_with(Op::Rst, 1000)]);
    s.assert_over();
}

#[test]
fn the_rst_waits_until_the_host_end_took_everything() {
    let mut s = Scene::new();
    let id = draining(&mut s);
    assert_eq!((s.sent(), s.events()), (vec![], vec![]));
    s.mux.host_wrote(s.now, id, 999);
    assert_eq!((s.sent(), s.events()), (vec![], vec![]));
    s.mux.host_wrote(s.now, id, 1);
    assert_eq!(s.events(), [closed(id, CloseReason::GuestShutdown, false)]);
    assert_eq!(s.sent(), [FLOW.gets_with(Op::Rst, 1000)]);
    s.assert_over();
}

/// Linux waits 8 s for our RST, then sends its own and forgets the socket.
#[test]
fn an_impatient_guests_bytes_are_still_delivered() {
    let mut s = Scene::new();
    let id = draining(&mut s);
    s.pass(Duration::from_secs(8));
    s.guest(FLOW.sends(Op::Rst));
    assert_eq!(s.state(id), Some(State::Draining));
    assert_eq!(s.held(id), 1000);
    assert_eq!(s.events(), []);
    s.guest(FLOW.sends(Op::Rst));
    s.mux.host_wrote(s.now, id, 1000);
    assert_eq!(s.events(), [closed(id, CloseReason::GuestShutdown, false)]);
    s.assert_over();
}

#[test]
fn the_ports_of_an_impatient_guest_are_free_while_its_bytes_are_delivered() {
    let mut s = Scene::new();
    let old = draining(&mut s);
    s.guest(FLOW.sends(Op::Rst));
    let new = s.established(FLOW);
    s.guest_sends(new, FLOW, 7);
    s.mux.host_wrote(s.now, old, 1000);
    assert_eq!(s.events(), [closed(old, CloseReason::GuestShutdown, false)]);
    assert_eq!(s.held(new), 7, "two connections, two accounts");
    s.mux.host_wrote(s.now, new, 7);
    s.guest(FLOW.sends_shutdown(BOTH));
    assert_eq!(s.events(), [closed(new, CloseReason::GuestShutdown, false)]);
    assert_eq!(
        s.sent(),
        [FLOW.gets_with(Op::Rst, 7)],
        "the old one's silence is kept"
    );
    s.assert_over();
}

#[test]
fn a_host_end_that_stalls_for_ever_while_draining_is_aborted() {
    let mut s = Scene::new();
    let id = draining(&mut s);
    s.pass(DRAIN_TIMEOUT - A_MOMENT);
    // A byte buys another thirty seconds.
    s.mux.host_wrote(s.now, id, 1);
    s.pass(DRAIN_TIMEOUT - A_MOMENT);
    assert_eq!((s.sent(), s.events()), (vec![], vec![]));
    s.pass(A_MOMENT);
    assert_eq!(s.events(), [closed(id, CloseReason::IdleTimeout, true)]);
    assert_eq!(s.sent(), [FLOW.gets_with(Op::Rst, 1)]);
    s.assert_over();
}

#[test]
fn a_stalled_host_end_is_aborted_without_a_word_when_the_guest_has_left() {
    let mut s = Scene::new();
    let id = draining(&mut s);
    s.guest(FLOW.sends(Op::Rst));
    s.pass(DRAIN_TIMEOUT);
    assert_eq!(s.events(), [closed(id, CloseReason::IdleTimeout, true)]);
    s.assert_over();
}

#[test]
fn a_host_end_that_fails_while_draining_ends_it() {
    let mut s = Scene::new();
    let id = draining(&mut s);
    s.mux.host_write_failed(s.now, id);
    assert_eq!(s.events(), [closed(id, CloseReason::PeerRst, true)]);
    assert_eq!(s.sent(), [FLOW.gets_with(Op::Rst, 1000)]);
    s.assert_over();

    let id = draining(&mut s);
    s.mux.host_failed(id, CloseReason::PeerRst);
    assert_eq!(s.events(), [closed(id, CloseReason::PeerRst, true)]);
    assert_eq!(s.sent(), [FLOW.gets(Op::Rst)]);
    s.assert_over();
}

#[test]
fn bytes_after_a_close_break_the_protocol() {
    let mut s = Scene::new();
    let id = draining(&mut s);
    assert_eq!(s.guest(FLOW.sends_rw(1)), Disposition::Consumed);
    assert_eq!(
        s.events(),
        [
            Event::Misbehaved {
                kind: crate::vsock::Misbehavior::DataAfterShutdown,
                key: FLOW.key()
            },
            closed(id, CloseReason::Misbehavior, true),
        ]
    );
    assert_eq!(s.sent(), [FLOW.gets(Op::Rst)]);
    s.assert_over();
}

#[test]
fn a_guest_that_does_not_answer_our_shutdown_is_reset_after_eight_seconds() {
    let mut s = Scene::new();
    let id = closing(&mut s);
    s.pass(CLOSE_TIMEOUT - A_MOMENT);
    assert_eq!(s.sent(), []);
    s.pass(A_MOMENT);
    assert_eq!(s.state(id), Some(State::Dead));
    assert_eq!(s.sent(), [FLOW.gets(Op::Rst)]);
    s.assert_over();
}

#[test]
fn a_guest_that_closes_at_the_same_time_gets_its_rst_and_its_rst_gets_none() {
    let mut s = Scene::new();
    let id = closing(&mut s);
    // Its SHUTDOWN crossed ours.
    s.guest(FLOW.sends_shutdown(BOTH));
    assert_eq!(s.state(id), Some(State::Dead));
    assert_eq!(s.sent(), [FLOW.gets(Op::Rst)]);
    // And its RST, the answer to ours, crosses that.
    s.guest(FLOW.sends(Op::Rst));
    s.assert_over();
}

#[test]
fn a_guest_that_closes_before_our_shutdown_left_hears_only_the_rst() {
    let mut s = Scene::new();
    let id = s.established(FLOW);
    s.guest(FLOW.sends_shutdown(SEND));
    s.mux.host_eof(s.now, id);
    s.guest(FLOW.sends_shutdown(BOTH));
    assert_eq!(
        s.events(),
        [
            Event::ShutdownHost { id, flags: SEND },
            closed(id, CloseReason::PeerFin, false)
        ]
    );
    assert_eq!(s.sent(), [FLOW.gets(Op::Rst)]);
    s.assert_over();
}

#[test]
fn what_crosses_our_rst_is_consumed() {
    let mut s = Scene::new();
    let id = s.established(FLOW);
    s.mux.host_failed(id, CloseReason::PeerRst);
    s.events();
    for header in [
        FLOW.sends_rw(10),
        FLOW.sends_shutdown(BOTH),
        FLOW.sends(Op::CreditUpdate),
        FLOW.sends(Op::CreditRequest),
        FLOW.sends(Op::Response),
    ] {
        assert_eq!(s.guest(header), Disposition::Consumed);
    }
    assert_eq!(s.events(), []);
    assert_eq!(s.sent(), [FLOW.gets(Op::Rst)], "one RST for all of it");
    s.assert_over();
}

#[test]
fn guest_close_then_port_reuse_while_our_rst_still_waits() {
    let mut s = Scene::new();
    let old = s.established(FLOW);
    s.guest(FLOW.sends_shutdown(BOTH));
    assert_eq!(s.events(), [closed(old, CloseReason::GuestShutdown, false)]);
    let new = s.established(FLOW);
    assert_eq!(s.sent(), []);
    assert_eq!(s.state(new), Some(State::Established));
    s.guest(FLOW.sends(Op::Rst));
    assert_eq!(s.events(), [closed(new, CloseReason::GuestRst, true)]);
    s.assert_over();
}

/// Cloud Hypervisor's issue 8692: an RST answered with RST killed the next connection from the same port.
#[test]
fn an_rst_is_never_answered_with_rst() {
    type Setup = fn(&mut Scene);
    let states: [(&str, Setup); 8] = [
        ("no flow", |_| {}),
        ("dialing", |s| {
            s.dialing(FLOW);
        }),
        ("established", |s| {
            s.established(FLOW);
        }),
        ("established, response owed", |s| {
            let id = s.dialing(FLOW);
            s.mux.connected(s.now, id);
        }),
        ("half-closed", |s| {
            let id = s.established(FLOW);
            s.mux.host_eof(s.now, id);
        }),
        ("draining", |s| {
            draining(s);
        }),
        ("closing", |s| {
            closing(s);
        }),
        ("dead", |s| {
            let id = s.established(FLOW);
            s.mux.host_failed(id, CloseReason::Error);
        }),
    ];
    for (name, setup) in states {
        for socket_type in [1, 2, 0, 3, u16::MAX] {
            for flags in [0, 3, u32::MAX] {
                let mut s = Scene::new();
                setup(&mut s);
                s.events();
                s.guest(Header {
                    socket_type,
                    flags,
                    fwd_cnt: 0xdead_beef,
                    len: 10,
                    ..FLOW.sends(Op::Rst)
                });
                s.pass(Duration::from_secs(60));
                assert_eq!(s.sent(), [], "{name}, type {socket_type}, flags {flags}");
                s.events();
                s.assert_over();
            }
        }
    }
    // A wrong sender hears nothing at all.
    let mut s = Scene::new();
    s.guest(Header {
        src_cid: Cid(4),
        ..FLOW.sends(Op::Rst)
    });
    s.events();
    s.assert_over();
}

/// Linux forgets a socket at SHUTDOWN of both directions, so its port may be used again; but the old socket still
/// speaks: CREDIT_UPDATE as the application reads what is left, RST when it closes. A new connection would be cut off
/// in its middle. It is refused in its beginning, as the standard has it: no reuse before RST or the timeout.
#[test]
fn a_flow_that_waits_for_its_rst_is_not_begun_anew() {
    let mut s = Scene::new();
    closing(&mut s);
    s.guest(FLOW.sends(Op::Request));
    assert_eq!(
        s.events(),
        [Event::Misbehaved {
            kind: crate::vsock::Misbehavior::DuplicateRequest,
            key: FLOW.key()
        }]
    );
    assert_eq!(s.sent(), [FLOW.gets(Op::Rst)]);
    s.guest(FLOW.sends(Op::CreditUpdate));
    assert_eq!(s.sent(), [FLOW.gets_stray_rst()]);
    s.assert_over();
}
