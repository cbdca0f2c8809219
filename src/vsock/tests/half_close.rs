//! Established: bytes both ways, and one direction that ends before the other.

use super::*;
use crate::vsock::CloseReason;

const BOTH: ShutdownFlags = ShutdownFlags::BOTH;
const SEND: ShutdownFlags = ShutdownFlags::SEND;
const RCV: ShutdownFlags = ShutdownFlags::RCV;

#[test]
fn bytes_flow_both_ways_and_every_header_tells_what_was_taken() {
    let mut s = Scene::new();
    let id = s.established(FLOW);
    s.guest_sends(id, FLOW, 1000);
    assert_eq!(s.held(id), 1000);
    s.mux.host_wrote(s.now, id, 600);
    assert_eq!(s.held(id), 400);
    s.mux.host_readable(id);
    assert_eq!(
        s.host_sends(id, 50, true),
        Header {
            len: 50,
            ..FLOW.gets_with(Op::Rw, 600)
        }
    );
    s.mux.host_wrote(s.now, id, 400);
    assert_eq!(
        s.host_sends(id, 70, false),
        Header {
            len: 70,
            ..FLOW.gets_with(Op::Rw, 1000)
        }
    );
    assert_eq!(s.sent(), []);
    s.guest(FLOW.sends_credit(GUEST_BUF, 120));
    assert_eq!(s.room(id), GUEST_BUF);
    assert_eq!(s.events(), []);
}

#[test]
fn an_empty_packet_is_legal_and_goes_nowhere() {
    let mut s = Scene::new();
    let id = s.established(FLOW);
    assert_eq!(s.guest(FLOW.sends_rw(0)), Disposition::Consumed);
    assert_eq!(s.state(id), Some(State::Established));
    assert_eq!(s.sent(), []);
    assert_eq!(s.events(), []);
}

#[test]
fn the_guest_finishes_first_and_still_gets_an_answer() {
    let mut s = Scene::new();
    let id = s.established(FLOW);
    s.guest_sends(id, FLOW, 10);
    s.guest(FLOW.sends_shutdown(SEND));
    assert_eq!(s.events(), [], "the host end has not taken everything yet");
    s.mux.host_wrote(s.now, id, 10);
    assert_eq!(s.events(), [Event::ShutdownHost { id, flags: SEND }]);
    assert_eq!(s.state(id), Some(State::Established));
    // The answer.
    s.mux.host_readable(id);
    assert_eq!(s.host_sends(id, 500, false).len, 500);
    s.mux.host_eof(s.now, id);
    assert_eq!(
        s.events(),
        [Event::Closed {
            id,
            reason: CloseReason::PeerFin,
            abort: false
        }]
    );
    assert_eq!(s.state(id), Some(State::Closing));
    assert_eq!(s.sent(), [FLOW.gets_shutdown(BOTH, 10)]);
    s.guest(FLOW.sends(Op::Rst));
    s.assert_over();
}

#[test]
fn the_host_finishes_first_and_still_gets_an_answer() {
    let mut s = Scene::new();
    let id = s.established(FLOW);
    s.mux.host_eof(s.now, id);
    assert_eq!(s.sent(), [FLOW.gets_shutdown(SEND, 0)], "SEND and nothing else");
    assert_eq!(s.events(), []);
    s.guest_sends(id, FLOW, 1000);
    s.guest(FLOW.sends_shutdown(SEND));
    s.mux.host_wrote(s.now, id, 1000);
    assert_eq!(
        s.events(),
        [
            Event::ShutdownHost { id, flags: SEND },
            Event::Closed {
                id,
                reason: CloseReason::PeerFin,
                abort: false
            }
        ]
    );
    assert_eq!(s.sent(), [FLOW.gets_shutdown(BOTH, 1000)]);
    s.guest(FLOW.sends(Op::Rst));
    s.assert_over();
}

#[test]
fn the_host_finishes_and_the_guest_closes() {
    let mut s = Scene::new();
    let id = s.established(FLOW);
    s.mux.host_eof(s.now, id);
    s.mux.host_eof(s.now, id);
    assert_eq!(s.sent(), [FLOW.gets_shutdown(SEND, 0)], "told once");
    s.guest(FLOW.sends_shutdown(BOTH));
    assert_eq!(
        s.events(),
        [Event::Closed {
            id,
            reason: CloseReason::PeerFin,
            abort: false
        }]
    );
    assert_eq!(s.sent(), [FLOW.gets(Op::Rst)]);
    s.assert_over();
}

#[test]
fn what_the_host_end_had_before_its_end_of_file_goes_first() {
    let mut s = Scene::new();
    let id = s.established(FLOW);
    s.mux.host_readable(id);
    s.host_sends(id, 3000, true);
    s.host_sends(id, 3000, true);
    assert!(matches!(s.poll(), Some(Outgoing::Data { .. })));
    s.mux.host_eof(s.now, id);
    assert_eq!(s.sent(), [FLOW.gets_shutdown(SEND, 0)]);
    assert_eq!(s.poll(), None, "nothing after SHUTDOWN(SEND)");
    s.mux.host_readable(id);
    assert_eq!(s.poll(), None, "whatever the socket says later");
}

#[test]
fn a_host_end_that_ends_before_the_response_left_is_answered_in_order() {
    let mut s = Scene::new();
    let id = s.dialing(FLOW);
    assert!(s.mux.connected(s.now, id));
    s.mux.host_eof(s.now, id);
    assert_eq!(s.sent(), [FLOW.gets(Op::Response), FLOW.gets_shutdown(SEND, 0)]);
}

#[test]
fn a_guest_that_receives_no_more_gets_no_more() {
    let mut s = Scene::new();
    let id = s.established(FLOW);
    s.mux.host_readable(id);
    s.guest(FLOW.sends_shutdown(RCV));
    s.guest(FLOW.sends_shutdown(RCV));
    assert_eq!(s.events(), [Event::ShutdownHost { id, flags: RCV }], "told once");
    assert_eq!(s.poll(), None, "bytes of the host end are not wanted");
    s.guest_sends(id, FLOW, 5);
    s.mux.host_wrote(s.now, id, 5);
    // The other half: now it has closed.
    s.guest(FLOW.sends_shutdown(SEND));
    assert_eq!(
        s.events(),
        [Event::Closed {
            id,
            reason: CloseReason::GuestShutdown,
            abort: false
        }]
    );
    assert_eq!(s.sent(), [FLOW.gets_with(Op::Rst, 5)]);
    s.assert_over();
}

#[test]
fn a_guest_that_ends_both_directions_in_two_steps_has_closed() {
    let mut s = Scene::new();
    let id = s.established(FLOW);
    s.guest(FLOW.sends_shutdown(SEND));
    assert_eq!(s.events(), [Event::ShutdownHost { id, flags: SEND }]);
    s.guest(FLOW.sends_shutdown(ShutdownFlags::NONE));
    assert_eq!(s.events(), []);
    s.guest(FLOW.sends_shutdown(RCV));
    assert_eq!(
        s.events(),
        [Event::Closed {
            id,
            reason: CloseReason::GuestShutdown,
            abort: false
        }]
    );
    assert_eq!(s.sent(), [FLOW.gets(Op::Rst)]);
    s.assert_over();
}

#[test]
fn a_host_end_that_takes_no_more_may_still_talk() {
    let mut s = Scene::new();
    let id = s.established(FLOW);
    s.guest_sends(id, FLOW, 100);
    s.mux.host_write_failed(s.now, id);
    s.mux.host_write_failed(s.now, id);
    assert_eq!(s.held(id), 0, "what it did not take is lost");
    assert_eq!(
        s.sent(),
        [FLOW.gets_shutdown(RCV, 100)],
        "and the guest has its credit back"
    );
    assert_eq!(
        s.guest(FLOW.sends_rw(100)),
        Disposition::Consumed,
        "what was under way is discarded"
    );
    s.mux.host_readable(id);
    assert_eq!(s.host_sends(id, 42, false).fwd_cnt, 200);
    s.mux.host_eof(s.now, id);
    assert_eq!(
        s.events(),
        [Event::Closed {
            id,
            reason: CloseReason::PeerFin,
            abort: false
        }]
    );
    assert_eq!(s.sent(), [FLOW.gets_shutdown(BOTH, 200)]);
    // Bytes that cross our SHUTDOWN find nobody, and no one is to blame.
    assert_eq!(s.guest(FLOW.sends_rw(10)), Disposition::Consumed);
    assert_eq!(s.events(), []);
    s.guest(FLOW.sends(Op::Rst));
    s.assert_over();
}

#[test]
fn a_host_end_that_has_said_all_and_takes_no_more_is_over() {
    let mut s = Scene::new();
    let id = s.established(FLOW);
    s.mux.host_eof(s.now, id);
    s.mux.host_write_failed(s.now, id);
    assert_eq!(
        s.events(),
        [Event::Closed {
            id,
            reason: CloseReason::PeerRst,
            abort: false
        }]
    );
    assert_eq!(s.sent(), [FLOW.gets_shutdown(BOTH, 0)], "two wishes, one packet");
    s.guest(FLOW.sends(Op::Rst));
    s.assert_over();
}

#[test]
fn a_host_end_that_says_all_and_then_that_it_reads_no_more_is_finished_and_not_reset() {
    for (unread, reason) in [(0, CloseReason::PeerFin), (100, CloseReason::PeerRst)] {
        let mut s = Scene::new();
        let id = s.established(FLOW);
        if unread > 0 {
            s.guest_sends(id, FLOW, unread);
        }
        s.mux.host_eof(s.now, id);
        s.mux.host_reads_no_more(s.now, id);
        assert_eq!(
            s.events(),
            [Event::Closed {
                id,
                reason,
                abort: false
            }]
        );
        assert_eq!(s.sent(), [FLOW.gets_shutdown(BOTH, unread)]);
        s.guest(FLOW.sends(Op::Rst));
        s.assert_over();
    }
}

#[test]
fn a_discarding_connection_keeps_giving_credit() {
    let mut s = Scene::new();
    let id = s.established(FLOW);
    s.mux.host_write_failed(s.now, id);
    s.sent();
    let mut taken = 0;
    let mut updates = 0;
    for _ in 0..64 {
        assert_eq!(s.guest(FLOW.sends_rw(64 * 1024)), Disposition::Consumed);
        taken += 64 * 1024;
        updates += s.sent().len();
    }
    assert_eq!(s.events(), [], "never beyond the credit it was given");
    assert_eq!(updates as u32, taken / (OUR_BUF / 2));
    assert_eq!(s.state(id), Some(State::Established));
}

#[test]
fn a_failed_host_end_resets_the_guest() {
    let mut s = Scene::new();
    let id = s.established(FLOW);
    s.guest_sends(id, FLOW, 100);
    s.mux.host_failed(id, CloseReason::PeerRst);
    assert_eq!(
        s.events(),
        [Event::Closed {
            id,
            reason: CloseReason::PeerRst,
            abort: true
        }]
    );
    assert_eq!(s.sent(), [FLOW.gets(Op::Rst)]);
    assert_eq!(s.guest(FLOW.sends_rw(5)), Disposition::Consumed);
    assert_eq!(
        s.sent(),
        [FLOW.gets_stray_rst()],
        "what crossed the RST hears it again"
    );
    s.assert_over();
}

#[test]
fn when_neither_end_takes_anything_more_it_is_over() {
    let mut s = Scene::new();
    let id = s.established(FLOW);
    s.mux.host_write_failed(s.now, id);
    assert_eq!(s.sent(), [FLOW.gets_shutdown(RCV, 0)]);
    s.guest(FLOW.sends_shutdown(RCV));
    assert_eq!(
        s.events(),
        [
            Event::ShutdownHost { id, flags: RCV },
            Event::Closed {
                id,
                reason: CloseReason::PeerRst,
                abort: false
            }
        ]
    );
    assert_eq!(s.sent(), [FLOW.gets_shutdown(BOTH, 0)]);
    s.guest(FLOW.sends(Op::Rst));
    s.assert_over();
}
