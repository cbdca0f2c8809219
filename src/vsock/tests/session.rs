//! The whole session: rings that stop, the end of the drain period, names.

use std::collections::HashSet;

use super::*;
use crate::vsock::{CloseReason, RefuseReason};

/// One connection in each state: dialing, requested (REQUEST out), requested (not out), established, half-closed,
/// draining, closing, dead.
fn one_of_each(s: &mut Scene) -> Vec<(ConnectionId, State)> {
    let flow = |i: u32| Flow::new(2000 + i, 80);
    let (requested, _) = s.requested(22);
    let established = s.established(flow(0));
    let half_closed = s.established(flow(1));
    s.mux.host_eof(s.now, half_closed);
    s.sent();
    let draining = s.established(flow(2));
    s.guest_sends(draining, flow(2), 10);
    s.guest(flow(2).sends_shutdown(ShutdownFlags::BOTH));
    s.events();
    let closing = s.established(flow(3));
    s.guest(flow(3).sends_shutdown(ShutdownFlags::SEND));
    s.mux.host_eof(s.now, closing);
    s.sent();
    s.events();
    let dead = s.established(flow(4));
    s.mux.host_failed(dead, CloseReason::PeerRst);
    s.events();
    let dialing = s.dialing(flow(5));
    let unsent = s.mux.connect(s.now, Port(23)).unwrap();
    let all = vec![
        (dialing, State::Dialing),
        (requested, State::Requested),
        (unsent, State::Requested),
        (established, State::Established),
        (half_closed, State::Established),
        (draining, State::Draining),
        (closing, State::Closing),
        (dead, State::Dead),
    ];
    for (id, state) in &all {
        assert_eq!(s.state(*id), Some(*state));
    }
    all
}

fn ends(s: &mut Scene) -> HashSet<(ConnectionId, &'static str)> {
    let events = s.events();
    let ends: HashSet<_> = events
        .iter()
        .map(|event| match event {
            Event::Refused { id, reason } => (*id, reason.label()),
            Event::Closed { id, reason, .. } => (*id, reason.label()),
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(ends.len(), events.len(), "no end is told twice");
    ends
}

#[test]
fn when_the_rings_stop_everything_ends_without_a_packet_but_what_the_guest_sent_arrives() {
    let mut s = Scene::new();
    let all = one_of_each(&mut s);
    s.guest(Flow::new(7, 7).sends_rw(1));
    s.mux.host_readable(all[3].0);
    s.mux.reset();
    let lost = "session_lost";
    assert_eq!(
        ends(&mut s),
        HashSet::from([
            (all[0].0, lost),
            (all[1].0, lost),
            (all[2].0, lost),
            (all[3].0, lost),
            (all[4].0, lost),
        ])
    );
    assert_eq!(s.sent(), [], "the next guest knows nothing of them");
    let draining = all[5].0;
    assert_eq!(s.state(draining), Some(State::Draining));
    s.mux.reset();
    assert_eq!(s.events(), []);
    s.mux.host_wrote(s.now, draining, 10);
    assert_eq!(ends(&mut s), HashSet::from([(draining, "guest_shutdown")]));
    s.assert_over();
}

#[test]
fn after_a_reset_the_session_serves_again_from_the_same_ports() {
    let mut s = Scene::new();
    let all = one_of_each(&mut s);
    s.mux.reset();
    s.events();
    for i in 0..6 {
        let flow = Flow::new(2000 + i, 80);
        let id = s.established(flow);
        s.guest(flow.sends(Op::Rst));
        s.events();
        assert!(all.iter().all(|(old, _)| *old != id));
    }
    s.pass(DRAIN_TIMEOUT);
    s.events();
    s.assert_over();
}

#[test]
fn at_the_end_of_the_drain_period_everything_is_cut_off() {
    let mut s = Scene::new();
    let all = one_of_each(&mut s);
    s.mux.close_all(CloseReason::Drain, RefuseReason::Draining);
    assert_eq!(
        ends(&mut s),
        HashSet::from([
            (all[0].0, "draining"),
            (all[1].0, "draining"),
            (all[2].0, "draining"),
            (all[3].0, "drain"),
            (all[4].0, "drain"),
            (all[5].0, "drain"),
        ])
    );
    let sent = s.sent();
    assert_eq!(sent.len(), 7, "all but the REQUEST that never left");
    assert!(sent.iter().all(|header| header.op == Op::Rst as u16));
    s.mux.close_all(CloseReason::Drain, RefuseReason::Draining);
    s.assert_over();
}

#[test]
fn names_are_never_used_again() {
    let mut s = Scene::new();
    let mut names = HashSet::new();
    let mut slots = HashSet::new();
    for _ in 0..1000 {
        let id = s.established(FLOW);
        assert!(names.insert(id.token()));
        slots.insert(id.slot());
        s.guest(FLOW.sends(Op::Rst));
        s.events();
        // An old name means nothing to anyone.
        s.mux.host_readable(id);
        s.mux.host_wrote(s.now, id, 10);
        s.mux.host_read(s.now, id, 10, true);
        s.mux.host_eof(s.now, id);
        s.mux.host_drained(id);
        s.mux.host_write_failed(s.now, id);
        s.mux.host_failed(id, CloseReason::Error);
        s.mux.refused(id, RefuseReason::Limit);
        assert!(!s.mux.connected(s.now, id));
        assert_eq!(s.mux.data_header(id, 1, Boundary::None), None);
    }
    assert_eq!(slots.len(), 1, "but slots are");
    s.assert_over();
}
