//! What a session tells of itself, message by message.

use super::talk::{ACCESS_PLATFORM, PLAIN, PROTOCOL, Talk, USER};
use super::*;
use crate::vhost_user::message::{NEED_REPLY, REPLY, VERSION};
use crate::vhost_user::{AccessPlatform, Evidence, Mode, TranslationMode, testing};

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
            "peer_closed",
            "memory_lost",
            "panic"
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

fn row(record: &Record, name: &str) -> (bool, bool, Option<bool>, bool) {
    let row = record.features.iter().find(|row| row.name == name).unwrap();
    (row.offered, row.vmm, row.driver, row.effective)
}

#[test]
fn the_matrix_of_a_plain_qemu_guest() {
    let vmm = Talk::with("qemu-system-x86_64", AccessPlatform::Auto);
    vmm.negotiate(PLAIN | ACCESS_PLATFORM, PROTOCOL);
    vmm.set_features(PLAIN);
    let record = vmm.0.record();
    assert_eq!(
        row(&record, "version_1"),
        (true, true, None, true),
        "the driver is not up yet"
    );
    vmm.share_memory();
    vmm.start_ring(0, USER);
    let record = vmm.0.record();
    assert_eq!(row(&record, "version_1"), (true, true, Some(true), true));
    assert_eq!(row(&record, "access_platform"), (true, false, Some(false), false));
    let access = record.negotiation.access_platform;
    assert_eq!(
        (access.mode, access.evidence),
        (TranslationMode::None, Evidence::NotAcknowledged)
    );
    assert_eq!(
        row(&record, "protocol_features"),
        (true, true, Some(false), true),
        "no driver sees it"
    );
    // The log of a migration is the VMM's, and in use only once there is one.
    vmm.set_features(PLAIN | 1 << 26);
    assert_eq!(row(&vmm.0.record(), "log_all"), (false, true, Some(false), false));
}

#[test]
fn the_matrix_of_a_translated_qemu_guest() {
    let vmm = Talk::with("qemu-system-x86_64", AccessPlatform::Auto);
    vmm.translated_boot();
    let json = serde_json::to_value(vmm.0.record()).unwrap();
    let access = &json["accessPlatform"];
    assert_eq!(access["policy"], "auto");
    assert_eq!(access["mode"], "translate");
    assert_eq!(access["evidence"], "iotlb_message");
    assert_eq!(access["backendChannel"], true);
    assert_eq!(access["updates"], 2);
    assert!(access["why"].as_str().unwrap().ends_with('.'));
    let bit = json["features"]
        .as_array()
        .unwrap()
        .iter()
        .find(|row| row["bit"] == 33);
    assert_eq!(
        *bit.unwrap(),
        serde_json::json!({
            "bit": 33, "name": "access_platform", "offered": true, "vmm": true, "driver": true, "effective": true
        })
    );
    assert_eq!(json["layers"]["effective"]["bits"], "0x370000001");
    assert_eq!(json["layers"]["device"]["offered"]["bits"], "0x370000001");
    assert_eq!(json["layers"]["vmm"]["acknowledged"]["names"][0], "stream");
    assert_eq!(json["layers"]["driver"]["acknowledged"]["bits"], "0x330000001");
    assert_eq!(json["protocol"]["effective"]["bits"], "0x229");
    assert_eq!(json["rings"][0]["translated"], true);
    assert_eq!(json["rings"][0]["layout"], "split");
    assert_eq!(json["rings"][0]["desc"], "0xfffff000");
    assert_eq!(json["peer"]["vmmHint"], "qemu");
    assert_eq!(json["findings"], serde_json::json!([]));
    assert_eq!(json["messages"][0]["request"], "GET_FEATURES");
    assert_eq!(json["messages"][0]["direction"], "vmm_to_device");
    assert_eq!(json["messages"][0]["outcome"], "answered");
    assert_eq!(json["state"], "running", "what was there before is there still");
    // The channel is agreed and gone: agreed, and not in use.
    vmm.0.backend_channel(false);
    assert_eq!(vmm.0.record().protocol.effective.bits(), 0x209);
    vmm.end(None);
    let access = vmm.0.snapshot().access_platform;
    assert_eq!(
        (access.mode, access.updates),
        (TranslationMode::None, 2),
        "totals outlive the session"
    );
    assert!(!vmm.0.snapshot().rings[0].translated);
}

/// Bit 33 is acknowledged, and not in use: the matrix says so.
#[test]
fn the_matrix_of_the_android_case() {
    let vmm = Talk::with("crosvm", AccessPlatform::Auto);
    vmm.negotiate(PLAIN | ACCESS_PLATFORM, PROTOCOL);
    vmm.set_features(PLAIN | ACCESS_PLATFORM | 1 << 50);
    vmm.share_memory();
    vmm.translate(TranslationMode::Identity, Evidence::RingAddressesInMemory);
    vmm.start_ring(0, USER);
    let record = vmm.0.record();
    assert_eq!(row(&record, "access_platform"), (true, true, Some(true), false));
    assert_eq!(row(&record, "bit_50"), (false, true, Some(true), false));
    assert!(record.negotiation.access_platform.why.contains("the VMM's own"));
    // A reboot: until the next driver has started, nobody knows its word.
    vmm.stop_ring(0);
    vmm.set_features(PLAIN);
    assert_eq!(row(&vmm.0.record(), "version_1").2, None);
}

#[test]
fn vmms_are_known_by_the_names_of_their_programs() {
    for (program, hint) in [
        ("qemu-system-x86_64", Some("qemu")),
        ("qemu-system-x86", Some("qemu")),
        ("qemu-kvm", Some("qemu")),
        ("cloud-hypervisor", Some("cloud-hypervisor")),
        ("cloud-hyperviso", Some("cloud-hypervisor")),
        ("crosvm", Some("crosvm")),
        ("krunkit", Some("libkrun")),
        ("firecracker", Some("firecracker")),
        ("vhost-user-test", None),
        ("", None),
    ] {
        let vmm = Talk::with(program, AccessPlatform::Auto);
        let peer = vmm.0.snapshot().peer.unwrap();
        assert_eq!(peer.vmm_hint().map(VmmHint::label), hint, "{program}");
        let json = serde_json::to_value(&peer).unwrap();
        assert_eq!(json["vmmHint"].as_str(), hint);
        assert_eq!(json["program"], program);
    }
}
