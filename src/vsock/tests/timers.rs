//! Deadlines: armed, moved, and gone when they are not needed.

use super::*;
use crate::vsock::CloseReason;

const IDLE: Duration = Duration::from_secs(60);

fn idle_config() -> MuxerConfig {
    MuxerConfig {
        idle_timeout: IDLE,
        ..config()
    }
}

fn idle_end(id: ConnectionId) -> Event {
    Event::Closed {
        id,
        reason: CloseReason::IdleTimeout,
        abort: false,
    }
}

#[test]
fn an_idle_connection_is_reset() {
    let mut s = Scene::with(idle_config());
    let id = s.established(FLOW);
    s.pass(IDLE - A_MOMENT);
    assert_eq!(s.events(), []);
    s.pass(A_MOMENT);
    assert_eq!(s.events(), [idle_end(id)]);
    assert_eq!(s.sent(), [FLOW.gets(Op::Rst)]);
    s.assert_over();
}

#[test]
fn bytes_in_either_direction_keep_a_connection_alive() {
    type Act = fn(&mut Scene, ConnectionId);
    let acts: [(&str, Act); 3] = [
        ("from the guest", |s, id| s.guest_sends(id, FLOW, 1)),
        ("to the host end", |s, id| s.mux.host_wrote(s.now, id, 1)),
        ("to the guest", |s, id| {
            s.mux.host_readable(id);
            s.host_sends(id, 1, false);
        }),
    ];
    for (name, act) in acts {
        let mut s = Scene::with(idle_config());
        let id = s.established(FLOW);
        s.guest_sends(id, FLOW, 1000);
        for _ in 0..5 {
            s.pass(IDLE - A_MOMENT);
            act(&mut s, id);
        }
        assert_eq!(s.events(), [], "{name}");
        s.pass(IDLE - A_MOMENT);
        assert_eq!(s.events(), [], "{name}");
        s.pass(A_MOMENT);
        assert_eq!(s.events(), [idle_end(id)], "{name}");
    }
}

#[test]
fn credit_packets_are_no_activity() {
    let mut s = Scene::with(idle_config());
    let id = s.established(FLOW);
    s.pass(IDLE / 2);
    s.guest(FLOW.sends(Op::CreditUpdate));
    s.guest(FLOW.sends(Op::CreditRequest));
    s.sent();
    s.pass(IDLE / 2);
    assert_eq!(s.events(), [idle_end(id)]);
}

#[test]
fn a_busy_connection_wakes_the_timer_once_an_idle_time_and_no_more() {
    let mut s = Scene::with(idle_config());
    let id = s.established(FLOW);
    let mut wake_ups = 0;
    for _ in 0..6000 {
        s.now += Duration::from_millis(100);
        if s.mux.poll_timeout().is_some_and(|due| due <= s.now) {
            wake_ups += 1;
            s.mux.handle_timeout(s.now);
        }
        s.guest_sends(id, FLOW, 1);
        s.mux.host_wrote(s.now, id, 1);
        assert!(s.mux.list_lengths().timers <= 1);
    }
    assert_eq!(s.events(), []);
    assert!(wake_ups <= 12, "{wake_ups} wake-ups in ten idle times");
    assert_eq!(s.sent(), []);
}

#[test]
fn a_host_initiated_connection_is_idle_too() {
    let mut s = Scene::with(idle_config());
    let (id, flow) = s.requested(22);
    s.pass(GUEST_TIMEOUT - A_MOMENT);
    s.guest(flow.sends(Op::Response));
    s.events();
    s.pass(IDLE - A_MOMENT);
    assert_eq!(s.events(), []);
    s.pass(A_MOMENT);
    assert_eq!(s.events(), [idle_end(id)]);
    assert_eq!(s.sent(), [flow.gets(Op::Rst)]);
    s.assert_over();
}

#[test]
fn a_deadline_that_moves_nearer_is_kept() {
    // Established with an hour to go, then Closing with eight seconds, then Draining's thirty.
    let mut s = Scene::with(MuxerConfig {
        idle_timeout: Duration::from_secs(3600),
        ..config()
    });
    let closing = s.established(FLOW);
    let draining_flow = Flow::new(1025, 80);
    let draining = s.established(draining_flow);
    s.pass(Duration::from_secs(10));
    s.guest(FLOW.sends_shutdown(ShutdownFlags::SEND));
    s.mux.host_eof(s.now, closing);
    s.guest_sends(draining, draining_flow, 1);
    s.guest(draining_flow.sends_shutdown(ShutdownFlags::BOTH));
    s.events();
    assert_eq!(s.sent(), [FLOW.gets_shutdown(ShutdownFlags::BOTH, 0)]);
    s.pass(CLOSE_TIMEOUT);
    assert_eq!(s.sent(), [FLOW.gets(Op::Rst)]);
    s.pass(DRAIN_TIMEOUT - CLOSE_TIMEOUT);
    assert_eq!(s.sent(), [draining_flow.gets(Op::Rst)]);
    s.events();
    s.assert_over();
}

#[test]
fn time_that_stands_still_or_goes_back_ends_nothing() {
    let mut s = Scene::with(idle_config());
    let id = s.established(FLOW);
    let before = s.now;
    s.pass(IDLE / 2);
    s.mux.handle_timeout(before);
    s.mux.host_readable(id);
    s.host_sends(id, GUEST_BUF, true);
    s.sent();
    s.now = before;
    s.guest(FLOW.sends_credit(GUEST_BUF, GUEST_BUF));
    assert_eq!(
        s.events(),
        [
            Event::CreditStalled { id },
            Event::CreditResumed {
                id,
                waited: Duration::ZERO
            }
        ]
    );
}

#[test]
fn a_connection_without_a_deadline_wakes_nobody() {
    let mut s = Scene::new();
    let id = s.established(FLOW);
    assert_eq!(s.mux.poll_timeout(), None, "there is no idleTimeout");
    s.mux.host_failed(id, CloseReason::PeerRst);
    assert_eq!(s.mux.poll_timeout(), None);
    s.events();
    let id = s.dialing(Flow::new(2, 2));
    assert!(s.mux.poll_timeout().is_some());
    s.mux.refused(id, crate::vsock::RefuseReason::NoRule);
    assert_eq!(
        s.mux.poll_timeout(),
        None,
        "an RST that waits for a buffer waits as long as it takes"
    );
    assert_eq!(s.mux.list_lengths().timers, 0);
}

/// Wake-ups of connections that were gone stayed until they were due: with long timeouts and a guest that opens and
/// resets a hundred thousand times a second, that is a lot of them.
#[test]
fn connections_that_come_and_go_leave_no_wake_ups() {
    let mut s = Scene::with(MuxerConfig {
        connect_timeout: Duration::from_secs(3600),
        idle_timeout: Duration::from_secs(60),
        ..config()
    });
    s.established(Flow::new(1, 1));
    for i in 0..1000 {
        let id = s.dialing(FLOW);
        if i % 2 == 0 {
            s.mux.connected(s.now, id);
        }
        if i % 3 == 0 {
            s.guest(FLOW.sends_shutdown(ShutdownFlags::BOTH));
        }
        s.guest(FLOW.sends(Op::Rst));
        s.events();
        s.pass(A_MOMENT);
        assert_eq!(s.mux.list_lengths().timers, 1, "round {i}");
    }
}

#[test]
fn a_connection_has_one_wake_up_through_all_its_states() {
    let mut s = Scene::with(idle_config());
    let id = s.dialing(FLOW);
    s.mux.connected(s.now, id);
    s.guest_sends(id, FLOW, 100);
    for _ in 0..30 {
        s.pass(IDLE / 4);
        s.mux.host_wrote(s.now, id, 1);
        assert_eq!(s.mux.list_lengths().timers, 1);
    }
    s.guest(FLOW.sends_shutdown(ShutdownFlags::BOTH));
    assert_eq!(s.mux.list_lengths().timers, 1);
    for _ in 0..30 {
        s.pass(DRAIN_TIMEOUT / 4);
        s.mux.host_wrote(s.now, id, 1);
        assert_eq!(s.mux.list_lengths().timers, 1);
    }
    s.mux.host_wrote(s.now, id, 40);
    assert_eq!(s.mux.list_lengths().timers, 0);
}
