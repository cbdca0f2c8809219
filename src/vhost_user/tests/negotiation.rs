//! What a session tells of itself, message by message.

use super::*;
use crate::vhost_user::Mode;
use crate::vhost_user::message::{NEED_REPLY, REPLY, VERSION};
use crate::vhost_user::testing;

fn say(watch: &NegotiationWatch, number: u32, body: &[u8]) {
    watch.request(&Message::new(number, VERSION | NEED_REPLY, body), 0);
}

fn answer(watch: &NegotiationWatch, number: u32, value: u64) {
    watch.reply(&Message::new(number, VERSION | REPLY, &value.to_ne_bytes()));
}

fn state(index: u32, num: u32) -> Vec<u8> {
    [index.to_ne_bytes(), num.to_ne_bytes()].concat()
}

#[test]
fn every_known_value_is_there_from_the_beginning() {
    let now = testing::watch(Mode::Server).snapshot();
    assert_eq!(now.requests.len(), REQUEST_NAMES.len());
    assert!(
        now.requests
            .iter()
            .all(|counter| (counter.count, counter.errors) == (0, 0))
    );
    let reasons: Vec<_> = now.session_errors.iter().map(|error| error.reason).collect();
    assert_eq!(
        reasons,
        [
            "protocol",
            "feature",
            "memory",
            "vring",
            "io",
            "timeout",
            "peer_closed"
        ]
    );
    assert_eq!(now.rings.map(|ring| ring.queue), ["rx", "tx", "event"]);
}

#[test]
fn states_follow_what_is_agreed_and_what_runs() {
    let watch = testing::watch(Mode::Server);
    let state = || watch.snapshot().state;
    assert_eq!(state(), SessionState::Waiting);
    assert_eq!(watch.session_started(None), 1);
    assert_eq!(state(), SessionState::Connected);
    say(&watch, request::SET_FEATURES, &(1u64 << 32).to_ne_bytes());
    assert_eq!(state(), SessionState::Negotiated);
    watch.ring_started(1, true);
    assert_eq!(state(), SessionState::Running);
    // Features are set again while rings run, to log a migration.
    say(
        &watch,
        request::SET_FEATURES,
        &(1u64 << 32 | 1 << 26).to_ne_bytes(),
    );
    assert_eq!(state(), SessionState::Running);
    watch.ring_started(1, false);
    assert_eq!(state(), SessionState::Negotiated);
    let end = SessionEnd {
        session: 1,
        reason: "vmm_closed",
        detail: String::new(),
    };
    watch.session_ended(None, end);
    assert_eq!(state(), SessionState::Waiting);
    assert_eq!(watch.session_started(None), 2);
}

/// An answer is an error only where the standard says so: most u64 answers are values.
#[test]
fn values_are_no_errors() {
    let watch = testing::watch(Mode::Server);
    for number in [
        request::GET_FEATURES,
        request::GET_PROTOCOL_FEATURES,
        request::GET_QUEUE_NUM,
        request::GET_MAX_MEM_SLOTS,
        request::GET_VRING_BASE,
    ] {
        say(&watch, number, &[]);
        answer(&watch, number, 3);
    }
    answer(&watch, request::SET_MEM_TABLE, 0);
    assert!(
        watch
            .snapshot()
            .requests
            .iter()
            .all(|counter| counter.errors == 0)
    );
    answer(&watch, request::SET_MEM_TABLE, 1);
    assert_eq!(
        watch.snapshot().requests[request::SET_MEM_TABLE as usize].errors,
        1
    );
    assert_eq!(watch.snapshot().queue_count, 3);
}

#[test]
fn what_a_vmm_says_of_rings_and_memory_that_are_not_there_is_passed_over() {
    let watch = testing::watch(Mode::Server);
    watch.session_started(None);
    for index in [3, 255, u32::MAX] {
        say(&watch, request::SET_VRING_NUM, &state(index, 1));
        say(&watch, request::SET_VRING_KICK, &u64::from(index).to_ne_bytes());
    }
    say(&watch, request::REM_MEM_REG, &[0; 40]);
    say(&watch, u32::MAX, &[0; 8]);
    let now = watch.snapshot();
    assert_eq!(now.rings[0].size, 0);
    assert_eq!((now.memory_map_changes.remove, now.requests[0].count), (1, 1));
    for _ in 0..2 * MAX_REGIONS {
        say(&watch, request::ADD_MEM_REG, &[0; 40]);
    }
    assert_eq!(watch.snapshot().memory.len(), MAX_REGIONS);
}

#[test]
fn a_device_reset_takes_back_what_the_driver_had_set_up() {
    let watch = testing::watch(Mode::Server);
    watch.session_started(None);
    say(&watch, request::SET_FEATURES, &(1u64 << 32).to_ne_bytes());
    say(&watch, request::SET_VRING_ENABLE, &state(0, 1));
    say(&watch, request::SET_VRING_CALL, &0u64.to_ne_bytes());
    assert!(watch.snapshot().rings[0].enabled && watch.snapshot().rings[0].has_call);
    say(&watch, request::RESET_DEVICE, &[]);
    let now = watch.snapshot();
    assert!(!now.rings[0].enabled && !now.rings[0].has_call);
    assert_eq!(now.features_acked.bits(), 0);
}
