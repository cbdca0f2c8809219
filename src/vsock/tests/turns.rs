//! Who is owed an RX buffer: turns, and replies before data.

use super::*;

#[test]
fn a_hundred_readable_connections_take_turns() {
    let mut s = Scene::new();
    let ids: Vec<ConnectionId> = (0..100).map(|i| s.established(Flow::new(2000 + i, 80))).collect();
    for id in &ids {
        s.mux.host_readable(*id);
    }
    for round in 0..5 {
        for id in &ids {
            assert_eq!(s.host_sends(*id, 100, true).len, 100, "round {round}");
        }
    }
    // One has no more and comes back: it waits for its turn like all others.
    s.host_sends(ids[0], 100, false);
    s.mux.host_readable(ids[0]);
    s.mux.host_readable(ids[0]);
    for id in ids[1..].iter().chain(&ids[..1]) {
        s.host_sends(*id, 100, true);
    }
}

#[test]
fn replies_go_before_data() {
    let mut s = Scene::new();
    let talker = s.established(Flow::new(2000, 80));
    s.mux.host_readable(talker);
    let dialled = s.dialing(FLOW);
    s.mux.connected(s.now, dialled);
    let stray = Flow::new(5, 5);
    s.guest(stray.sends_rw(1));
    assert_eq!(s.poll(), Some(Outgoing::Control(stray.gets_stray_rst())));
    assert_eq!(s.poll(), Some(Outgoing::Control(FLOW.gets(Op::Response))));
    s.host_sends(talker, 100, true);
    s.guest(FLOW.sends(Op::CreditRequest));
    assert_eq!(s.poll(), Some(Outgoing::Control(FLOW.gets(Op::CreditUpdate))));
    s.host_sends(talker, 100, true);
}

#[test]
fn connections_with_much_to_say_take_turns_in_saying_it() {
    let mut s = Scene::new();
    let flows = [Flow::new(1, 80), Flow::new(2, 80), Flow::new(3, 80)];
    for flow in flows {
        let id = s.dialing(flow);
        s.mux.connected(s.now, id);
        s.mux.host_eof(s.now, id);
    }
    let shutdown = |flow: Flow| flow.gets_shutdown(ShutdownFlags::SEND, 0);
    assert_eq!(
        s.sent(),
        [
            flows[0].gets(Op::Response),
            flows[1].gets(Op::Response),
            flows[2].gets(Op::Response),
            shutdown(flows[0]),
            shutdown(flows[1]),
            shutdown(flows[2]),
        ]
    );
}

#[test]
fn a_stalled_connection_costs_the_others_one_packet() {
    let mut s = Scene::new();
    let stuck = s.established(FLOW);
    let other = s.established(Flow::new(2000, 80));
    s.mux.host_readable(stuck);
    s.host_sends(stuck, GUEST_BUF, true);
    s.mux.host_readable(other);
    assert_eq!(s.poll(), Some(Outgoing::Control(FLOW.gets(Op::CreditRequest))));
    for _ in 0..10 {
        s.mux.host_readable(stuck);
        s.host_sends(other, 10, true);
    }
}

#[test]
fn a_connection_that_said_all_it_had_leaves_the_list() {
    let mut s = Scene::new();
    let id = s.established(FLOW);
    s.mux.host_readable(id);
    assert!(s.mux.has_outgoing());
    assert!(matches!(s.poll(), Some(Outgoing::Data { .. })));
    s.mux.host_drained(id);
    assert_eq!(s.poll(), None);
    assert!(!s.mux.has_outgoing(), "an empty socket is not asked again");
    s.mux.host_readable(id);
    s.mux.host_drained(id);
    assert_eq!(s.poll(), None, "nor one that was emptied before its turn");
}
