//! Verdicts, message by message.

use super::*;
use crate::vhost_user::features::{
    PROTOCOL_F_BACKEND_REQ, PROTOCOL_F_CONFIGURE_MEM_SLOTS, PROTOCOL_F_REPLY_ACK, VIRTIO_F_VERSION_1,
};
use crate::vhost_user::message::REPLY;

fn u64_request(number: u32, value: u64) -> Message {
    Message::new(number, VERSION, &value.to_ne_bytes())
}

fn state(number: u32, index: u32, num: u32) -> Message {
    Message::new(
        number,
        VERSION,
        &[index.to_ne_bytes(), num.to_ne_bytes()].concat(),
    )
}

fn ack(number: u32, value: u64) -> Message {
    Message::new(number, VERSION | REPLY, &value.to_ne_bytes())
}

fn new_gate(policy: AccessPlatform) -> Gate {
    Gate::new(Mode::Server, policy)
}

/// Nothing of ours first, the message as it is, nothing found.
fn is_passed_on(verdict: &Verdict) -> bool {
    verdict.before.is_empty()
        && verdict.findings.is_empty()
        && matches!(&verdict.then, Then::Forward { note } if note.is_none_or(|note| note.iovas.is_none()))
}

/// Without REPLY_ACK nobody waits for an acknowledgement that could say no, so the crate has the last word on everything
/// but IOTLB messages, which it does not know, and features that we know we have not offered.
#[test]
fn before_anything_is_negotiated_everything_else_is_forwarded_whatever_it_is() {
    let mut gate = new_gate(AccessPlatform::Auto);
    for number in (0..60).chain([u32::MAX]) {
        for flags in [0, VERSION, VERSION | NEED_REPLY, VERSION | REPLY, u32::MAX] {
            for len in [0, 1, 8, 40, 4096] {
                let message = Message::new(number, flags, &vec![0xa5; len]);
                let verdict = gate.request(&message, 1);
                match (number, len) {
                    (request::IOTLB_MSG, _) => {
                        assert!(matches!(verdict.then, Then::Refuse(_)), "{verdict:?}")
                    }
                    (request::SET_FEATURES, 8) => {
                        assert!(matches!(verdict.then, Then::End(_)), "{verdict:?}")
                    }
                    _ => assert!(is_passed_on(&verdict), "{message:?}: {verdict:?}"),
                }
            }
        }
    }
}

#[test]
fn a_vmm_that_goes_on_in_the_middle_of_a_session_is_negotiated_for() {
    let mut gate = Gate::new(Mode::Client, AccessPlatform::Auto);
    let prelude = gate.request(&state(request::SET_VRING_ENABLE, 0, 0), 0).before;
    let numbers: Vec<u32> = prelude.iter().map(|passage| passage.message.request()).collect();
    use request::*;
    assert_eq!(
        numbers,
        [
            GET_FEATURES,
            SET_FEATURES,
            GET_PROTOCOL_FEATURES,
            SET_PROTOCOL_FEATURES,
            SET_OWNER
        ]
    );
    assert!(prelude.iter().all(|passage| !passage.message.needs_reply()));
    assert!(gate.assumed().is_some());
    // The crate's two answers to it are not for the VMM; the third is.
    assert!(is_passed_on(&gate.request(&state(GET_VRING_BASE, 0, 0), 0)));
    assert_eq!(gate.reply(&ack(GET_FEATURES, 1)), ReplyVerdict::Swallow);
    assert_eq!(gate.reply(&ack(GET_PROTOCOL_FEATURES, 1)), ReplyVerdict::Swallow);
    assert_eq!(gate.reply(&ack(GET_VRING_BASE, 0)), ReplyVerdict::Forward);
}

#[test]
fn a_vmm_that_negotiates_itself_gets_no_prelude() {
    for first in [
        request::GET_FEATURES,
        request::SET_OWNER,
        request::GET_PROTOCOL_FEATURES,
    ] {
        let mut gate = Gate::new(Mode::Client, AccessPlatform::Auto);
        assert!(is_passed_on(&gate.request(&Message::new(first, VERSION, &[]), 0)));
        assert!(is_passed_on(
            &gate.request(&state(request::SET_VRING_ENABLE, 0, 0), 0)
        ));
        assert_eq!(gate.assumed(), None);
    }
}

#[test]
fn of_several_unanswered_requests_the_faulty_one_is_named() {
    let mut gate = new_gate(AccessPlatform::Auto);
    gate.request(&state(request::SET_VRING_ENABLE, 7, 1), 0);
    gate.request(&state(request::SET_VRING_NUM, 0, 128), 0);
    let culprit = gate.culprit().unwrap();
    assert_eq!(culprit.to_string(), "SET_VRING_ENABLE: there is no virtqueue 7");
    assert!(!culprit.answered);
}

#[test]
fn a_request_that_was_refused_with_an_answer_is_the_culprit() {
    let mut gate = new_gate(AccessPlatform::Auto);
    gate.request(&state(request::SET_VRING_NUM, 7, 128), 0);
    gate.request(&state(request::SET_VRING_BASE, 0, 0), 0);
    gate.reply(&ack(request::SET_VRING_NUM, 1));
    let culprit = gate.culprit().unwrap();
    assert_eq!(culprit.to_string(), "SET_VRING_NUM: there is no virtqueue 7");
    assert!(culprit.answered);
}

#[test]
fn what_came_before_an_answered_request_is_no_suspect() {
    let mut gate = new_gate(AccessPlatform::Auto);
    gate.request(&state(request::SET_VRING_ENABLE, 9, 1), 0);
    gate.request(&Message::new(request::GET_FEATURES, VERSION, &[]), 0);
    gate.reply(&ack(request::GET_FEATURES, 5));
    assert_eq!(gate.culprit(), None);
}

#[test]
fn faults_are_told_in_words() {
    let address = |desc: u64| {
        let mut body = vec![0; 8];
        for value in [desc, 0x2000, 0x1000, 0] {
            body.extend_from_slice(&value.to_ne_bytes());
        }
        Message::new(request::SET_VRING_ADDR, VERSION, &body)
    };
    let mut table = vec![1, 0, 0, 0, 0, 0, 0, 0];
    for value in [0u64, 0x10000, 0, 0] {
        table.extend_from_slice(&value.to_ne_bytes());
    }
    let table = Message::new(request::SET_MEM_TABLE, VERSION, &table);
    let rows: [(Message, usize, Option<&str>); 11] = [
        (
            Message::new(4711, VERSION, &[]),
            0,
            Some("request 4711: no such request is known"),
        ),
        (
            Message::new(request::GET_FEATURES, 0, &[]),
            0,
            Some("GET_FEATURES: flags 0x0 are not those of protocol version 1"),
        ),
        (
            Message::new(request::GET_FEATURES, VERSION | REPLY, &[]),
            0,
            Some("GET_FEATURES: it is marked as an answer"),
        ),
        (
            Message::new(request::GET_CONFIG, VERSION, &[0; 20]),
            0,
            Some("GET_CONFIG: it needs the protocol feature config, not acknowledged"),
        ),
        (
            u64_request(request::SET_VRING_KICK, 0),
            0,
            Some("SET_VRING_KICK: 0 descriptors came with it"),
        ),
        (
            u64_request(request::SET_VRING_CALL, 200),
            1,
            Some("SET_VRING_CALL: there is no virtqueue 200"),
        ),
        (
            state(request::SET_VRING_NUM, 0, 2048),
            0,
            Some("SET_VRING_NUM: 2048 entries, 1 to 1024 are possible"),
        ),
        (
            Message::new(request::SET_VRING_NUM, VERSION, &[0; 4]),
            0,
            Some("SET_VRING_NUM: a body of 4 bytes is not what it has"),
        ),
        (
            table.clone(),
            0,
            Some("SET_MEM_TABLE: 1 regions and 0 descriptors"),
        ),
        (
            address(0x10000),
            0,
            Some("SET_VRING_ADDR: the descriptor table at 0x10000 is in no memory region"),
        ),
        (address(0xf000), 0, None),
    ];
    for (message, fds, expected) in rows {
        let mut gate = new_gate(AccessPlatform::Auto);
        gate.request(&table, 1);
        gate.outstanding.clear();
        gate.request(&message, fds);
        let culprit = gate.culprit().unwrap();
        match expected {
            Some(text) => assert_eq!(culprit.to_string(), text),
            None => assert_eq!(culprit.detail, None),
        }
    }
}

// ---- refusals -------------------------------------------------------------------------------------------------------

/// A session in which REPLY_ACK and BACKEND_REQ are agreed on and the crate has answered everything.
fn negotiated(policy: AccessPlatform) -> Gate {
    let mut gate = new_gate(policy);
    gate.request(
        &u64_request(
            request::SET_PROTOCOL_FEATURES,
            PROTOCOL_F_REPLY_ACK | PROTOCOL_F_BACKEND_REQ,
        ),
        0,
    );
    gate.request(&Message::new(request::SET_OWNER, VERSION, &[]), 0);
    settle(&mut gate);
    gate
}

/// The VMM asks something, and the crate has answered: all that came before is done.
fn settle(gate: &mut Gate) {
    let ask = Message::new(request::GET_FEATURES, VERSION, &[]);
    assert!(is_passed_on(&gate.request(&ask, 0)));
    assert_eq!(gate.reply(&ack(request::GET_FEATURES, 0)), ReplyVerdict::Forward);
    assert!(gate.outstanding.is_empty());
}

fn insistent(message: &Message) -> Message {
    message.with_flags(VERSION | NEED_REPLY)
}

#[test]
fn what_the_crate_would_end_the_session_over_is_refused_if_the_vmm_waits_for_an_answer() {
    let rows = [
        (Message::new(77, VERSION, &[]), "no such request is known"),
        (state(request::SET_VRING_NUM, 9, 128), "there is no virtqueue 9"),
        (
            state(request::SET_VRING_NUM, 0, 5000),
            "5000 entries, 1 to 1024 are possible",
        ),
        (
            Message::new(request::RESET_DEVICE, VERSION, &[]),
            "it needs the protocol feature reset_device, not acknowledged",
        ),
        (
            Message::new(request::SET_OWNER, VERSION, &[]),
            "the session has an owner already",
        ),
        (
            u64_request(request::SET_FEATURES, 1 << 60),
            "features were not offered: +0x1000000000000000",
        ),
        (
            ring_addresses(0, 0x1000),
            "the descriptor table at 0x1000 is in no memory region",
        ),
    ];
    for (message, reason) in rows {
        let mut gate = negotiated(AccessPlatform::Auto);
        let verdict = gate.request(&insistent(&message), 0);
        assert_eq!(verdict.then, Then::Refuse(reason.into()));
        // Nothing is unanswered, so nothing has to be waited for.
        assert!(verdict.before.is_empty() && gate.is_settled());
        assert_eq!(gate.culprit(), None);
    }
}

#[test]
fn a_refusal_waits_until_the_crate_has_served_what_came_before() {
    let mut gate = negotiated(AccessPlatform::Auto);
    gate.request(&state(request::SET_VRING_ENABLE, 0, 1), 0);
    let verdict = gate.request(&insistent(&Message::new(77, VERSION, &[])), 0);
    let barrier = Passage::bare(Message::new(request::GET_FEATURES, VERSION, &[]));
    assert_eq!(verdict.before, [barrier]);
    assert!(!gate.is_settled());
    assert_eq!(gate.reply(&ack(request::GET_FEATURES, 1)), ReplyVerdict::Swallow);
    assert!(gate.is_settled());
    // The VMM's own question is answered to the VMM.
    settle(&mut gate);
}

#[test]
fn a_vmms_answer_is_not_taken_for_a_barriers() {
    let mut gate = negotiated(AccessPlatform::Auto);
    gate.request(&Message::new(request::GET_FEATURES, VERSION, &[]), 0);
    gate.request(&insistent(&Message::new(77, VERSION, &[])), 0);
    assert_eq!(gate.reply(&ack(request::GET_FEATURES, 1)), ReplyVerdict::Forward);
    assert!(!gate.is_settled());
    assert_eq!(gate.reply(&ack(request::GET_FEATURES, 1)), ReplyVerdict::Swallow);
    assert!(gate.is_settled());
}

// ---- translation ----------------------------------------------------------------------------------------------------

const BASE: u64 = 0x7f00_0000_0000;
const PLATFORM: u64 = VIRTIO_F_VERSION_1 | VIRTIO_F_ACCESS_PLATFORM;

/// Two regions whose user addresses are neighbours and whose guest addresses are not.
fn memory_table() -> Message {
    let mut body = vec![2, 0, 0, 0, 0, 0, 0, 0];
    for value in [0, 0x10000, BASE, 0, 0x10_0000, 0x8000, BASE + 0x10000, 0] {
        body.extend_from_slice(&u64::to_ne_bytes(value));
    }
    Message::new(request::SET_MEM_TABLE, VERSION, &body)
}

fn ring_addresses(index: u32, desc: u64) -> Message {
    let mut body = [index.to_ne_bytes(), [0; 4]].concat();
    for value in [desc, desc + 0x940, desc + 0x800, desc + 0x940] {
        body.extend_from_slice(&value.to_ne_bytes());
    }
    Message::new(request::SET_VRING_ADDR, VERSION, &body)
}

fn iovas(desc: u64) -> RingIovas {
    RingIovas {
        desc,
        avail: desc + 0x800,
        used: desc + 0x940,
    }
}

fn iotlb(iova: u64, size: u64, uaddr: u64, perm: u8, kind: u8) -> Message {
    let mut body = [iova, size, uaddr].map(u64::to_ne_bytes).concat();
    body.extend_from_slice(&[perm, kind, 0, 0, 0, 0, 0, 0]);
    Message::new(request::IOTLB_MSG, VERSION | NEED_REPLY, &body)
}

/// A gate behind SET_FEATURES with ACCESS_PLATFORM and the memory table.
fn platform(policy: AccessPlatform) -> Gate {
    let mut gate = negotiated(policy);
    assert!(is_passed_on(
        &gate.request(&u64_request(request::SET_FEATURES, PLATFORM), 0)
    ));
    assert!(is_passed_on(&gate.request(&memory_table(), 2)));
    settle(&mut gate);
    gate
}

fn understood(mode: TranslationMode, evidence: Evidence) -> Translation {
    Translation { mode, evidence }
}

#[test]
fn ring_addresses_outside_of_memory_are_iovas_and_the_crate_gets_a_placeholder() {
    let mut gate = platform(AccessPlatform::Auto);
    assert_eq!(
        gate.translation(),
        understood(TranslationMode::Undecided, Evidence::NoneYet)
    );
    let verdict = gate.request(&ring_addresses(0, 0xffff_f000), 0);
    let Then::Replace(passage) = verdict.then else {
        panic!("{verdict:?}");
    };
    let note = AddressNote {
        index: 0,
        iovas: Some(iovas(0xffff_f000)),
    };
    assert_eq!(passage.note, Some(note));
    let expected = Body::VringAddr {
        index: 0,
        desc: BASE,
        used: BASE,
        avail: BASE,
    };
    assert_eq!(passage.message.request_body(), expected);
    assert_eq!(
        gate.translation(),
        understood(TranslationMode::Translate, Evidence::RingAddressesOutsideMemory)
    );
}

#[test]
fn one_ring_outside_of_memory_turns_the_ring_before_it_as_well() {
    let mut gate = platform(AccessPlatform::Auto);
    let first = insistent(&ring_addresses(0, BASE));
    let verdict = gate.request(&first, 0);
    assert!(is_passed_on(&verdict), "{verdict:?}");
    assert_eq!(
        gate.translation(),
        understood(TranslationMode::Identity, Evidence::RingAddressesInMemory)
    );
    let verdict = gate.request(&ring_addresses(1, 0xffff_e000), 0);
    assert!(matches!(verdict.then, Then::Replace(_)), "{verdict:?}");
    let [again] = verdict.before.as_slice() else {
        panic!("{verdict:?}");
    };
    // Nobody waits for its answer.
    assert!(!again.message.needs_reply());
    let note = AddressNote {
        index: 0,
        iovas: Some(iovas(BASE)),
    };
    assert_eq!(again.note, Some(note));
}

#[test]
fn an_iotlb_message_turns_identity_into_translation_for_good() {
    let mut gate = platform(AccessPlatform::Auto);
    gate.request(&ring_addresses(0, BASE), 0);
    gate.request(&ring_addresses(1, BASE + 0x1000), 0);
    settle(&mut gate);
    let verdict = gate.request(&iotlb(0x5000, 0x1000, BASE, 3, 2), 0);
    assert_eq!(
        gate.translation(),
        understood(TranslationMode::Translate, Evidence::IotlbMessage)
    );
    // Both rings are set up anew before the message takes effect.
    let notes: Vec<_> = verdict.before.iter().filter_map(|passage| passage.note).collect();
    assert_eq!(notes.len(), 2);
    assert!(notes.iter().all(|note| note.iovas.is_some()));
    // Neither other features nor a reset lead back.
    for message in [
        u64_request(request::SET_FEATURES, VIRTIO_F_VERSION_1),
        state(request::GET_VRING_BASE, 0, 0),
        state(request::GET_VRING_BASE, 1, 0),
        u64_request(request::SET_FEATURES, PLATFORM),
    ] {
        gate.request(&message, 0);
    }
    gate.request(&ring_addresses(0, BASE), 0);
    assert_eq!(
        gate.translation(),
        understood(TranslationMode::Translate, Evidence::IotlbMessage)
    );
}

#[test]
fn the_dirty_log_of_running_rings_does_not_undo_what_was_decided_for_them() {
    let mut gate = platform(AccessPlatform::Auto);
    gate.request(&ring_addresses(0, 0xffff_f000), 0);
    gate.request(&u64_request(request::SET_FEATURES, PLATFORM | VHOST_F_LOG_ALL), 0);
    assert_eq!(gate.translation().mode, TranslationMode::Translate);
    gate.request(&state(request::GET_VRING_BASE, 0, 0), 0);
    gate.request(&u64_request(request::SET_FEATURES, PLATFORM), 0);
    assert_eq!(gate.translation().mode, TranslationMode::Undecided);
}

#[test]
fn policy_iotlb_translates_whatever_the_addresses_look_like_and_tells_of_silence() {
    let mut gate = platform(AccessPlatform::Iotlb);
    assert_eq!(
        gate.translation(),
        understood(TranslationMode::Translate, Evidence::Configured)
    );
    let verdict = gate.request(&ring_addresses(0, BASE), 0);
    assert!(
        matches!(&verdict.then, Then::Replace(passage) if passage.note.unwrap().iovas == Some(iovas(BASE)))
            || matches!(&verdict.then, Then::Forward { note: Some(note) } if note.iovas == Some(iovas(BASE)))
    );
    assert!(matches!(
        verdict.findings.as_slice(),
        [Observation::Found(FindingCode::AccessPlatformWithoutIotlb, _)]
    ));
    let verdict = gate.request(&iotlb(0x5000, 0x1000, BASE, 3, 2), 0);
    assert_eq!(
        verdict.findings,
        [Observation::Passed(FindingCode::AccessPlatformWithoutIotlb)]
    );
}

#[test]
fn policy_identity_forwards_addresses_and_refuses_iotlb_messages() {
    let mut gate = platform(AccessPlatform::Identity);
    assert!(is_passed_on(&gate.request(&ring_addresses(0, BASE), 0)));
    let verdict = gate.request(&iotlb(0x5000, 0x1000, BASE, 3, 2), 0);
    assert_eq!(
        verdict.then,
        Then::Refuse("accessPlatform is identity: addresses are not translated".into())
    );
    assert_eq!(
        gate.translation(),
        understood(TranslationMode::Identity, Evidence::Configured)
    );
}

#[test]
fn policy_identity_tells_of_a_vmm_that_has_ring_addresses_translated() {
    let mut gate = platform(AccessPlatform::Identity);
    let verdict = gate.request(&ring_addresses(0, 0xffff_f000), 0);
    let [Observation::Found(FindingCode::IotlbMessageRefused, seen)] = verdict.findings.as_slice() else {
        panic!("{:?}", verdict.findings)
    };
    assert!(seen.contains("accessPlatform is identity"), "{seen}");
}

#[test]
fn policy_off_ends_the_session_of_who_acknowledges_all_the_same_and_names_the_option() {
    let mut gate = negotiated(AccessPlatform::Off);
    let message = u64_request(request::SET_FEATURES, PLATFORM);
    let reason = "features were not offered: access_platform (vhostUser.accessPlatform is off)";
    assert_eq!(gate.request(&message, 0).then, Then::End(reason.into()));
    assert_eq!(
        gate.request(&insistent(&message), 0).then,
        Then::Refuse(reason.into())
    );
    assert_eq!(gate.translation(), Translation::default());
}

#[test]
fn without_the_feature_nothing_is_touched() {
    let mut gate = negotiated(AccessPlatform::Auto);
    for (message, fds) in [
        (u64_request(request::SET_FEATURES, VIRTIO_F_VERSION_1), 0),
        (memory_table(), 2),
        (ring_addresses(0, BASE), 0),
        (ring_addresses(1, 0xffff_f000), 0),
    ] {
        let verdict = gate.request(&message, fds);
        assert!(is_passed_on(&verdict), "{verdict:?}");
    }
    assert_eq!(gate.translation(), Translation::default());
    let verdict = gate.request(&iotlb(0x5000, 0x1000, BASE, 3, 2), 0);
    assert_eq!(
        verdict.then,
        Then::Refuse("ACCESS_PLATFORM is not acknowledged".into())
    );
}

#[test]
fn an_update_is_translated_region_by_region() {
    let mut gate = platform(AccessPlatform::Auto);
    let mapping = |iova, len, gpa, permission| Mapping {
        iova,
        len,
        gpa,
        permission,
    };
    use crate::guest::Permission::*;
    let rows: [(Message, &[Mapping]); 4] = [
        (
            iotlb(0x5000, 0x1000, BASE + 0x2000, 1, 2),
            &[mapping(0x5000, 0x1000, 0x2000, Read)],
        ),
        (
            iotlb(0, 0x1000, BASE + 0x17000, 2, 2),
            &[mapping(0, 0x1000, 0x10_7000, Write)],
        ),
        (
            iotlb(0xffff_ffff_ffff_e000, 0x2000, BASE + 0xf000, 3, 2),
            &[
                mapping(0xffff_ffff_ffff_e000, 0x1000, 0xf000, ReadWrite),
                mapping(0xffff_ffff_ffff_f000, 0x1000, 0x10_0000, ReadWrite),
            ],
        ),
        (
            iotlb(0x1000, 0x18000, BASE, 3, 2),
            &[
                mapping(0x1000, 0x10000, 0, ReadWrite),
                mapping(0x11000, 0x8000, 0x10_0000, ReadWrite),
            ],
        ),
    ];
    for (message, mappings) in rows {
        let expected = Then::Carry {
            operation: IotlbOperation::Update(mappings.to_vec()),
            refusal: None,
        };
        assert_eq!(gate.request(&message, 0).then, expected);
    }
}

#[test]
fn an_iotlb_message_that_makes_no_sense_is_refused_and_says_why() {
    let mut gate = platform(AccessPlatform::Auto);
    let max = u64::MAX;
    let rows = [
        (iotlb(0x5000, 0, BASE, 3, 2), "UPDATE of 0 bytes"),
        (
            iotlb(max - 0xfff, 0x1001, BASE, 3, 2),
            "UPDATE of 0x1001 bytes from 0xfffffffffffff000 on at 0x7f0000000000 wraps around",
        ),
        (
            iotlb(0x5000, 0x1000, max - 1, 3, 2),
            "UPDATE of 0x1000 bytes from 0x5000 on at 0xfffffffffffffffe wraps around",
        ),
        (
            iotlb(0x5000, 0x1000, BASE - 1, 3, 2),
            "UPDATE names 0x7effffffffff, which is in no memory region",
        ),
        (
            iotlb(0x5000, 0x18001, BASE, 3, 2),
            "UPDATE names 0x7f0000018000, which is in no memory region",
        ),
        (
            iotlb(0x5000, 0x1000, BASE, 0, 2),
            "UPDATE with permission 0, 1 to 3 are possible",
        ),
        (
            iotlb(0x5000, 0x1000, BASE, 4, 2),
            "UPDATE with permission 4, 1 to 3 are possible",
        ),
        (
            iotlb(0x5000, 0x1000, BASE, 3, 1),
            "type 1 is neither UPDATE nor INVALIDATE",
        ),
        (
            iotlb(0x5000, 0x1000, BASE, 3, 4),
            "type 4 is neither UPDATE nor INVALIDATE",
        ),
        (
            Message::new(request::IOTLB_MSG, VERSION, &[0; 25]),
            "a body of 25 bytes is not what it has",
        ),
        (
            Message::new(request::IOTLB_MSG, VERSION | REPLY, &[0; 32]),
            "flags 0x5 are not those of a request of protocol version 1",
        ),
    ];
    for (message, reason) in rows {
        assert_eq!(gate.request(&message, 0).then, Then::Refuse(reason.into()));
    }
}

/// A region of a VMM that is wrong about its own memory: sums of its fields wrap.
#[test]
fn memory_regions_at_the_end_of_the_address_space_do_no_harm() {
    let mut gate = platform(AccessPlatform::Auto);
    let mut body = vec![1, 0, 0, 0, 0, 0, 0, 0];
    for value in [u64::MAX - 0xfff, 0x8000, u64::MAX - 0x1fff, 0] {
        body.extend_from_slice(&u64::to_ne_bytes(value));
    }
    gate.request(&Message::new(request::SET_MEM_TABLE, VERSION, &body), 1);
    let verdict = gate.request(&iotlb(0x5000, 0x2000, u64::MAX - 0x1fff, 3, 2), 0);
    assert!(matches!(verdict.then, Then::Refuse(_)), "{verdict:?}");
    let verdict = gate.request(&ring_addresses(0, u64::MAX - 0xfff), 0);
    assert!(
        matches!(verdict.then, Then::Forward { .. } | Then::Replace(_)),
        "{verdict:?}"
    );
}

#[test]
fn an_invalidation_of_size_zero_means_everything_and_one_that_wraps_the_rest() {
    let mut gate = platform(AccessPlatform::Auto);
    let carry = |first, last, refusal: Option<&str>| Then::Carry {
        operation: IotlbOperation::Invalidate { first, last },
        refusal: refusal.map(Into::into),
    };
    let max = u64::MAX;
    let rows = [
        (
            iotlb(0x5000, 0x1000, 0x55be_206a_2a20, 64, 3),
            carry(0x5000, 0x5fff, None),
        ),
        (iotlb(0, 0, 0, 0, 3), carry(0, max, None)),
        (iotlb(0x5000, 0, 0, 0, 3), carry(0, max, None)),
        (
            iotlb(0x40_0000_0000, 0x40_0000_0000, 0, 0, 3),
            carry(0x40_0000_0000, 0x7f_ffff_ffff, None),
        ),
        (iotlb(max, 1, 0, 0, 3), carry(max, max, None)),
        (
            iotlb(max, 2, 0, 0, 3),
            carry(
                max,
                max,
                Some("INVALIDATE of 0x2 bytes from 0xffffffffffffffff on wraps around"),
            ),
        ),
    ];
    for (message, expected) in rows {
        assert_eq!(gate.request(&message, 0).then, expected);
    }
}

/// 26 bytes is what the specification's structure has, 32 what QEMU's has in memory.
#[test]
fn both_lengths_of_an_iotlb_message_are_understood() {
    let mut gate = platform(AccessPlatform::Auto);
    let long = iotlb(0x5000, 0x1000, BASE, 3, 2);
    let short = Message::new(request::IOTLB_MSG, VERSION | NEED_REPLY, &long.body()[..26]);
    assert_eq!(gate.request(&long, 0).then, gate.request(&short, 0).then);
}

#[test]
fn an_iotlb_message_takes_effect_after_the_memory_table_before_it() {
    let mut gate = platform(AccessPlatform::Auto);
    gate.request(&memory_table(), 2);
    let verdict = gate.request(&iotlb(0x5000, 0x1000, BASE, 3, 2), 0);
    assert!(matches!(verdict.then, Then::Carry { .. }));
    assert_eq!(
        verdict.before.last().unwrap().message.request(),
        request::GET_FEATURES
    );
    assert!(!gate.is_settled());
    // The crate may answer the memory table first.
    assert_eq!(gate.reply(&ack(request::GET_FEATURES, 1)), ReplyVerdict::Swallow);
    assert!(gate.is_settled());
}

/// Of two requests of a kind, the answer to the first says nothing of the second, even if that one has no answer.
#[test]
fn an_iotlb_message_takes_effect_after_a_request_behind_an_answered_one_of_its_kind() {
    let mut gate = platform(AccessPlatform::Auto);
    gate.request(&insistent(&memory_table()), 2);
    gate.request(&memory_table(), 2);
    gate.reply(&ack(request::SET_MEM_TABLE, 0));
    let verdict = gate.request(&iotlb(0x5000, 0x1000, BASE, 3, 2), 0);
    assert!(!verdict.before.is_empty(), "the second table may not be in yet");
    assert!(!gate.is_settled());
}

/// What the crate is told of each ring, last.
fn told(gate: &mut Gate, messages: &[Message]) -> [Option<RingIovas>; QUEUES] {
    let mut told = [None; QUEUES];
    for message in messages {
        let verdict = gate.request(message, 0);
        let last = match verdict.then {
            Then::Forward { note } => note,
            Then::Replace(passage) => passage.note,
            _ => None,
        };
        for note in verdict
            .before
            .iter()
            .filter_map(|passage| passage.note)
            .chain(last)
        {
            told[note.index] = note.iovas;
        }
    }
    told
}

/// The driver of before did not know the feature, and its rings were not taken down.
#[test]
fn rings_that_run_when_the_feature_comes_in_are_translated_like_any_other() {
    let rings = [ring_addresses(0, BASE), ring_addresses(1, BASE + 0x1000)];
    let set_up = |policy| {
        let mut gate = negotiated(policy);
        gate.request(&u64_request(request::SET_FEATURES, VIRTIO_F_VERSION_1), 0);
        gate.request(&memory_table(), 2);
        assert_eq!(told(&mut gate, &rings), [None; QUEUES]);
        gate
    };
    let acknowledged = u64_request(request::SET_FEATURES, PLATFORM);
    let translated = [Some(iovas(BASE)), Some(iovas(BASE + 0x1000)), None];

    // Translated or not used.
    let mut gate = set_up(AccessPlatform::Iotlb);
    assert_eq!(told(&mut gate, std::slice::from_ref(&acknowledged)), translated);

    // The addresses are the evidence as they would be later, until an IOTLB message comes.
    let mut gate = set_up(AccessPlatform::Auto);
    assert_eq!(
        told(&mut gate, std::slice::from_ref(&acknowledged)),
        [None; QUEUES]
    );
    assert_eq!(
        gate.translation(),
        understood(TranslationMode::Identity, Evidence::RingAddressesInMemory)
    );
    assert_eq!(told(&mut gate, &[iotlb(0x5000, 0x1000, BASE, 3, 2)]), translated);
    // And once only.
    assert_eq!(
        told(&mut gate, &[iotlb(0x5000, 0x1000, BASE, 3, 2)]),
        [None; QUEUES]
    );
    assert_eq!(gate.translation().mode, TranslationMode::Translate);

    // Rings of IOVAs stay such.
    let mut gate = platform(AccessPlatform::Auto);
    gate.request(&ring_addresses(0, 0xffff_f000), 0);
    gate.request(&u64_request(request::SET_FEATURES, VIRTIO_F_VERSION_1), 0);
    gate.request(&acknowledged, 0);
    assert_eq!(
        gate.translation(),
        understood(TranslationMode::Translate, Evidence::RingAddressesOutsideMemory)
    );
}

/// A VMM that shares more regions than it was told that there is room for. To look addresses up in some of them would be to
/// guess what a ring's addresses are.
#[test]
fn more_memory_regions_than_are_looked_up_are_refused_and_leave_no_ring_untranslated() {
    let mut gate = negotiated(AccessPlatform::Iotlb);
    let agreed = PROTOCOL_F_REPLY_ACK | PROTOCOL_F_BACKEND_REQ | PROTOCOL_F_CONFIGURE_MEM_SLOTS;
    gate.request(&u64_request(request::SET_PROTOCOL_FEATURES, agreed), 0);
    gate.request(&u64_request(request::SET_FEATURES, PLATFORM), 0);
    let region = |n: u64| {
        let mut body = vec![0; 8];
        for value in [n << 12, 0x1000, BASE + (n << 12), 0] {
            body.extend_from_slice(&u64::to_ne_bytes(value));
        }
        Message::new(request::ADD_MEM_REG, VERSION, &body)
    };
    for n in 0..MAX_REGIONS as u64 {
        assert!(is_passed_on(&gate.request(&region(n), 1)));
    }
    let one_more = region(MAX_REGIONS as u64);
    assert!(matches!(
        gate.request(&insistent(&one_more), 1).then,
        Then::Refuse(_)
    ));
    assert_eq!(
        told(&mut gate, &[ring_addresses(0, BASE)]),
        [Some(iovas(BASE)), None, None]
    );
    assert!(matches!(gate.request(&one_more, 1).then, Then::End(_)));
}
