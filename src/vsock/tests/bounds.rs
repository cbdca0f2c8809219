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
