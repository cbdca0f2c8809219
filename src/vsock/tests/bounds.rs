//! Memory is bounded (invariant 6), whatever a guest does that posts no buffer.

use super::*;

const MAX_STRAYS: usize = crate::vsock::backlog::Backlog::MAX_STRAYS;

#[test]
fn resets_for_strays_are_bounded_and_then_the_guests_packets_wait_in_its_ring() {
    let mut s = Scene::new();
    for i in 0..MAX_STRAYS {
        assert!(s.mux.accepts_input(), "after {i}");
        s.guest(Flow::new(i as u32, 9).sends_rw(1));
    }
    assert!(!s.mux.accepts_input());
    // A caller that does not ask costs the guest answers, and us nothing.
    for i in 0..10_000 {
        s.guest(Flow::new(i, 10).sends_rw(1));
    }
    assert_eq!(s.mux.list_lengths().strays, MAX_STRAYS);
    assert_eq!(
        s.poll(),
        Some(Outgoing::Control(Flow::new(0, 9).gets_stray_rst()))
    );
    assert!(s.mux.accepts_input(), "one buffer, one packet");
    assert_eq!(s.sent().len(), MAX_STRAYS - 1);
    s.assert_over();
}

#[test]
fn a_flood_of_requests_without_buffers_is_bounded_by_the_limits() {
    let mut s = Scene::new();
    let mut taken = 0;
    while s.mux.accepts_input() {
        s.guest(Flow::new(taken, 80).sends(Op::Request));
        taken += 1;
        for event in s.events() {
            if let Event::Dial { id, .. } = event {
                s.mux.refused(id, crate::vsock::RefuseReason::NoRule);
            }
        }
    }
    assert_eq!(taken as usize, 128 + MAX_STRAYS);
    assert_eq!(s.mux.len(), 128);
    assert_eq!(
        s.sent().len(),
        128 + MAX_STRAYS,
        "every one of them is answered in the end"
    );
    s.events();
    s.assert_over();
}

/// A guest that opens and resets in a loop, while it posts no buffer, left an entry in the lists for each round.
#[test]
fn connections_that_come_and_go_without_buffers_leave_nothing_in_the_lists() {
    let mut s = Scene::new();
    let lasting = s.established(Flow::new(1, 1));
    s.guest_sends(lasting, Flow::new(1, 1), OUR_BUF);
    s.mux.host_wrote(s.now, lasting, OUR_BUF);
    s.mux.host_readable(lasting);
    for i in 0..10_000 {
        let flow = Flow::new(2000 + i % 50, 80);
        let id = s.dialing(flow);
        assert!(s.mux.connected(s.now, id));
        s.mux.host_readable(id);
        s.guest(flow.sends(Op::Rst));
        s.events();
        let lists = s.mux.list_lengths();
        assert!(lists.replies + lists.data < 200, "round {i}: {lists:?}");
    }
    // The one that lasts has lost nothing: its CREDIT_UPDATE, then its data.
    assert_eq!(
        s.poll(),
        Some(Outgoing::Control(
            Flow::new(1, 1).gets_with(Op::CreditUpdate, OUR_BUF)
        ))
    );
    s.host_sends(lasting, 10, true);
    s.guest(Flow::new(1, 1).sends(Op::Rst));
    s.events();
    assert!(
        !s.mux.has_outgoing(),
        "without connections there is nothing to ask for"
    );
    s.assert_over();
}

#[test]
fn a_fresh_request_for_each_refusal_leaves_nothing_in_the_lists() {
    let mut s = Scene::new();
    s.established(Flow::new(1, 1));
    for i in 0..10_000 {
        let id = s.dialing(FLOW);
        s.mux.refused(id, crate::vsock::RefuseReason::NoRule);
        s.events();
        let lists = s.mux.list_lengths();
        assert!(lists.replies < 200, "round {i}: {lists:?}");
        assert_eq!(s.mux.len(), 2);
    }
    assert_eq!(s.sent(), [FLOW.gets(Op::Rst)]);
}

#[test]
fn a_reset_empties_the_lists() {
    let mut s = Scene::new();
    let ids: Vec<ConnectionId> = (0..10).map(|i| s.established(Flow::new(2000 + i, 80))).collect();
    for (i, id) in (0..).zip(ids) {
        s.mux.host_readable(id);
        s.guest_sends(id, Flow::new(2000 + i, 80), 1);
        s.guest(Flow::new(2000 + i, 80).sends(Op::CreditRequest));
        if i % 2 == 0 {
            s.guest(Flow::new(2000 + i, 80).sends_shutdown(ShutdownFlags::BOTH));
        }
    }
    s.mux.reset();
    assert!(!s.mux.has_outgoing());
    assert_eq!(s.mux.len(), 5, "those that drain");
}
