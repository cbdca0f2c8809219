//! Credit as connections use it: stalls, updates, shrinking buffers, counters that wrap.

use super::*;
use crate::vsock::CloseReason;

#[test]
fn without_credit_one_request_and_then_silence() {
    let mut s = Scene::new();
    let id = s.established(FLOW);
    s.mux.host_readable(id);
    s.host_sends(id, GUEST_BUF, true);
    assert_eq!(s.room(id), 0);
    assert_eq!(s.sent(), [FLOW.gets(Op::CreditRequest)]);
    assert_eq!(s.events(), [Event::CreditStalled { id }]);
    // However often the socket says that it is readable, and whatever else the guest says.
    for _ in 0..3 {
        s.mux.host_readable(id);
        s.guest(FLOW.sends(Op::CreditUpdate));
        s.guest(FLOW.sends_rw(0));
        assert_eq!((s.sent(), s.events()), (vec![], vec![]));
        assert!(!s.mux.has_outgoing(), "nothing spins");
    }
    s.pass(Duration::from_secs(3));
    s.guest(FLOW.sends_credit(GUEST_BUF, 1000));
    assert_eq!(
        s.events(),
        [Event::CreditResumed {
            id,
            waited: Duration::from_secs(3)
        }]
    );
    assert_eq!(s.poll(), Some(Outgoing::Data { id, limit: 1000 }));
    s.mux.host_read(s.now, id, 1000, true);
    // A second stall is a second story.
    assert_eq!(s.sent(), [FLOW.gets(Op::CreditRequest)]);
    assert_eq!(s.events(), [Event::CreditStalled { id }]);
}

#[test]
fn credit_comes_with_any_packet() {
    for op in [Op::Rw, Op::CreditUpdate, Op::CreditRequest, Op::Shutdown] {
        let mut s = Scene::new();
        let id = s.established(FLOW);
        s.mux.host_readable(id);
        s.host_sends(id, GUEST_BUF, true);
        s.sent();
        s.events();
        s.guest(Header {
            fwd_cnt: GUEST_BUF,
            ..FLOW.sends(op)
        });
        let waited = Duration::ZERO;
        assert_eq!(s.events(), [Event::CreditResumed { id, waited }], "{op:?}");
        if op == Op::CreditRequest {
            assert_eq!(s.poll(), Some(Outgoing::Control(FLOW.gets(Op::CreditUpdate))));
        }
        assert_eq!(s.poll(), Some(Outgoing::Data { id, limit: GUEST_BUF }), "{op:?}");
    }
}

#[test]
fn a_guest_without_any_buffer_gets_nothing() {
    let mut s = Scene::new();
    s.guest(Header {
        buf_alloc: 0,
        ..FLOW.sends(Op::Request)
    });
    let Some(Event::Dial { id, .. }) = s.mux.poll_event() else {
        panic!("no dial")
    };
    s.mux.host_readable(id);
    assert!(s.mux.connected(s.now, id));
    assert_eq!(s.sent(), [FLOW.gets(Op::Response), FLOW.gets(Op::CreditRequest)]);
    assert_eq!(s.events(), [Event::CreditStalled { id }]);
}

#[test]
fn a_buffer_that_shrinks_below_what_is_under_way_means_no_room() {
    let mut s = Scene::new();
    let id = s.established(FLOW);
    s.mux.host_readable(id);
    s.host_sends(id, 50_000, true);
    s.guest(FLOW.sends_credit(16_384, 20_000));
    assert_eq!(s.room(id), 0, "16384 - 30000 under way is no four gigabytes");
    assert_eq!(s.sent(), [FLOW.gets(Op::CreditRequest)]);
    s.guest(FLOW.sends_credit(16_384, 33_616));
    assert_eq!(s.room(id), 0);
    s.guest(FLOW.sends_credit(16_384, 33_617));
    assert_eq!(s.room(id), 1);
    assert_eq!(s.poll(), Some(Outgoing::Data { id, limit: 1 }));
    s.guest(FLOW.sends_credit(0, 50_000));
    assert_eq!(s.room(id), 0);
    s.guest(FLOW.sends_credit(u32::MAX, 50_000));
    assert_eq!(s.room(id), 1 << 30, "we use no more of it");
}

#[test]
fn a_guest_that_takes_back_what_it_consumed_gets_no_more_than_before() {
    let mut s = Scene::new();
    let id = s.established(FLOW);
    s.mux.host_readable(id);
    s.host_sends(id, 60_000, false);
    s.guest(FLOW.sends_credit(GUEST_BUF, 60_000));
    assert_eq!(s.room(id), GUEST_BUF);
    s.guest(FLOW.sends_credit(GUEST_BUF, 10_000));
    assert_eq!(s.room(id), GUEST_BUF - 50_000);
    s.guest(FLOW.sends_credit(GUEST_BUF, 60_000u32.wrapping_sub((1 << 31) - 1)));
    assert_eq!(
        s.room(id),
        0,
        "consumed long before it was sent, as signed numbers go"
    );
    assert_eq!(s.state(id), Some(State::Established));
}

#[test]
fn a_guest_asks_for_credit_and_is_told_at_once() {
    let mut s = Scene::new();
    let id = s.established(FLOW);
    s.guest_sends(id, FLOW, 5000);
    s.mux.host_wrote(s.now, id, 3000);
    for _ in 0..100 {
        s.guest(FLOW.sends(Op::CreditRequest));
    }
    assert_eq!(
        s.sent(),
        [FLOW.gets_with(Op::CreditUpdate, 3000)],
        "asked often, owed once"
    );
}

#[test]
fn an_update_rides_on_data_if_there_is_any() {
    let mut s = Scene::new();
    let id = s.established(FLOW);
    s.guest_sends(id, FLOW, OUR_BUF);
    s.mux.host_wrote(s.now, id, OUR_BUF);
    s.mux.host_readable(id);
    // The shell asks for data's header before it polls for replies.
    assert_eq!(s.mux.data_header(id, 1, Boundary::None).unwrap().fwd_cnt, OUR_BUF);
    assert!(
        matches!(s.poll(), Some(Outgoing::Data { .. })),
        "CREDIT_UPDATE is settled"
    );
}

#[test]
fn updates_come_at_half_the_window_and_not_for_every_write() {
    let mut s = Scene::new();
    let id = s.established(FLOW);
    let mut updates = Vec::new();
    for _ in 0..256 {
        s.guest_sends(id, FLOW, 4096);
        s.mux.host_wrote(s.now, id, 4096);
        updates.extend(s.sent());
    }
    let every = OUR_BUF / 2;
    let expected: Vec<Header> = (1..=256 * 4096 / every)
        .map(|i| FLOW.gets_with(Op::CreditUpdate, i * every))
        .collect();
    assert_eq!(updates, expected);
}

/// A guest that has filled the window waits; whatever the host end does then, it hears of room before all is taken
/// or, at the latest, when all is.
#[test]
fn a_guest_that_waits_is_never_forgotten() {
    for buf_alloc in [1, 2, 3, 5, 100, 4096, 65_536, OUR_BUF] {
        for step in [1, buf_alloc / 7, buf_alloc / 3, buf_alloc] {
            let mut s = Scene::with(MuxerConfig {
                buf_alloc,
                ..config()
            });
            let id = s.dialing(FLOW);
            s.mux.connected(s.now, id);
            s.sent();
            let step = step.max(buf_alloc / 64).max(1);
            let mut told = 0;
            for _ in 0..4 {
                let room = buf_alloc - (s.held(id));
                s.guest_sends(id, FLOW, room);
                let mut heard = 0;
                while s.held(id) > 0 {
                    let n = step.min(s.held(id));
                    s.mux.host_wrote(s.now, id, n);
                    told += n;
                    for header in s.sent() {
                        assert_eq!(header.op, Op::CreditUpdate as u16);
                        assert_eq!(header.fwd_cnt, told);
                        heard += 1;
                    }
                }
                assert!(
                    (1..=4).contains(&heard),
                    "{buf_alloc} in steps of {step}: {heard}"
                );
            }
        }
    }
}

#[test]
fn counters_wrap_with_gigabytes_from_the_guest() {
    const GIB: u32 = 1 << 30;
    let mut s = Scene::with(MuxerConfig {
        buf_alloc: GIB,
        ..config()
    });
    let id = s.dialing(FLOW);
    s.mux.connected(s.now, id);
    s.poll();
    let mut taken = 0u64;
    for _ in 0..9 {
        s.guest_sends(id, FLOW, GIB - 1);
        assert_eq!(s.held(id), GIB - 1);
        s.mux.host_wrote(s.now, id, GIB - 1);
        taken += u64::from(GIB - 1);
        let update = s.sent();
        assert_eq!(update.len(), 1);
        assert_eq!(update[0].fwd_cnt, taken as u32, "modulo 2^32");
    }
    assert!(taken > 2 << 32);
    s.guest_sends(id, FLOW, GIB);
    assert_eq!(s.guest(FLOW.sends_rw(1)), Disposition::Consumed);
    assert!(
        s.events().contains(&Event::Closed {
            id,
            reason: CloseReason::Misbehavior,
            abort: true
        }),
        "the promise holds after the wrap as before"
    );
}

#[test]
fn counters_wrap_with_gigabytes_to_the_guest() {
    const GIB: u32 = 1 << 30;
    let mut s = Scene::new();
    let id = s.established(FLOW);
    s.mux.host_readable(id);
    let mut sent = 0u64;
    for _ in 0..9 {
        s.guest(FLOW.sends_credit(GIB, sent as u32));
        assert_eq!(s.room(id), GIB);
        s.host_sends(id, GIB, true);
        sent += u64::from(GIB);
        assert_eq!(s.room(id), 0);
        s.sent();
    }
    s.guest(FLOW.sends_credit(GIB, (sent + 1) as u32));
    assert!(s.events().iter().any(|e| matches!(
        e,
        Event::Misbehaved {
            kind: crate::vsock::Misbehavior::FwdCntBeyondSent,
            ..
        }
    )));
}

#[test]
fn nothing_is_told_of_a_connection_after_its_end() {
    for flags in [ShutdownFlags::BOTH, ShutdownFlags::SEND] {
        let mut s = Scene::new();
        let id = s.established(FLOW);
        s.mux.host_readable(id);
        s.host_sends(id, GUEST_BUF, true);
        s.sent();
        s.events();
        // The guest closes, in the packet that also gives credit.
        s.mux.host_write_failed(s.now, id);
        s.guest(Header {
            fwd_cnt: GUEST_BUF,
            ..FLOW.sends_shutdown(flags)
        });
        s.mux.host_eof(s.now, id);
        let events = s.events();
        assert!(matches!(events[0], Event::CreditResumed { .. }), "{events:?}");
        assert!(matches!(events.last(), Some(Event::Closed { .. })), "{events:?}");
    }
}

#[test]
fn a_connection_that_closed_while_it_was_stalled_is_not_resumed() {
    let mut s = Scene::new();
    let id = s.established(FLOW);
    s.mux.host_readable(id);
    s.host_sends(id, GUEST_BUF, true);
    s.sent();
    s.mux.host_write_failed(s.now, id);
    s.mux.host_eof(s.now, id);
    assert!(matches!(s.events().last(), Some(Event::Closed { .. })));
    assert_eq!(s.state(id), Some(State::Closing));
    s.guest(FLOW.sends_credit(GUEST_BUF, GUEST_BUF));
    assert_eq!(s.events(), []);
}
