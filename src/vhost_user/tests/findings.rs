//! One test a finding: what is seen, when it is told, when it passes.

use super::super::talk::{ACCESS_PLATFORM, PLAIN, PROTOCOL, Talk, USER, iotlb, state};
use super::super::{SessionError, request};
use super::*;
use crate::guest::{Miss, RingArea};
use crate::vhost_user::{Severity, Translation};

const AUTO: AccessPlatform = AccessPlatform::Auto;

/// The story of 2022, told to a vhost-user device: crosvm on Android acknowledges what its guest asked for and keeps silent.
fn android(policy: AccessPlatform) -> Talk {
    let vmm = Talk::with("crosvm", policy);
    vmm.negotiate(PLAIN | ACCESS_PLATFORM, PROTOCOL);
    vmm.set_features(PLAIN | ACCESS_PLATFORM);
    vmm.translate(TranslationMode::Undecided, Evidence::NoneYet);
    vmm.share_memory();
    vmm
}

#[test]
fn access_platform_without_iotlb_is_served_and_told_under_auto() {
    let vmm = android(AUTO);
    assert_eq!(vmm.active(), [""; 0]);
    vmm.translate(TranslationMode::Identity, Evidence::RingAddressesInMemory);
    vmm.start_ring(0, USER);
    let finding = vmm.finding(FindingCode::AccessPlatformWithoutIotlb).unwrap();
    assert_eq!(
        finding.seen,
        "crosvm acknowledged access_platform, gave ring addresses of its own address space, and sent no IOTLB message"
    );
    assert!(finding.active && finding.severity == Severity::Warning);
    assert!(finding.remedy.contains("--protected-vm") && finding.remedy.contains("iommu_platform=on"));
    assert_eq!(
        vmm.active(),
        ["access-platform-without-iotlb"],
        "and nothing else"
    );
    assert_eq!(vmm.0.unready(), None);
}

#[test]
fn access_platform_without_iotlb_is_an_error_under_iotlb_until_the_first_message_comes() {
    let vmm = android(AccessPlatform::Iotlb);
    vmm.0.backend_channel(true);
    vmm.translate(TranslationMode::Translate, Evidence::Configured);
    assert_eq!(vmm.0.unready(), None);
    let seen = "crosvm gave ring addresses of its own".to_owned();
    vmm.0.find(FindingCode::AccessPlatformWithoutIotlb, seen);
    vmm.start_ring(0, USER);
    let finding = vmm.finding(FindingCode::AccessPlatformWithoutIotlb).unwrap();
    assert!(finding.active && finding.severity == Severity::Error);
    assert!(vmm.0.unready().unwrap().contains("sends no IOTLB messages"));
    vmm.iotlb(2, 0x1000, 0x1000);
    assert!(
        !vmm.finding(FindingCode::AccessPlatformWithoutIotlb)
            .unwrap()
            .active
    );
    assert_eq!(vmm.0.unready(), None);
}

/// It gives a channel and addresses that look like IOVAs, and then nothing: silent all the same.
#[test]
fn a_front_end_that_leaves_every_miss_unanswered_is_no_more_ready_than_one_with_its_own_addresses() {
    let miss = Miss {
        iova: 0xffff_f000,
        access: Access::Read,
    };
    let vmm = android(AccessPlatform::Iotlb);
    vmm.0.backend_channel(true);
    vmm.translate(TranslationMode::Translate, Evidence::Configured);
    vmm.start_ring(0, 0xffff_f000);
    assert_eq!(vmm.0.unready(), None);
    vmm.0.device_event(&DeviceEvent::MissOverdue(miss));
    assert!(vmm.0.unready().unwrap().contains("sends no IOTLB messages"));
    // One that translates and is slow about it is served, if slowly.
    vmm.iotlb(2, 0xffff_e000, 0x1000);
    vmm.translate(TranslationMode::Translate, Evidence::IotlbMessage);
    assert_eq!(vmm.0.unready(), None);
}

#[test]
fn nobody_connected_is_no_reason_to_be_unready() {
    let vmm = android(AccessPlatform::Iotlb);
    assert!(vmm.0.unready().unwrap().contains("no backend channel"));
    vmm.end(Some((SessionError::Vring, None)));
    assert_eq!(vmm.0.unready(), None);
}

#[test]
fn a_feature_that_was_not_offered_is_named_and_so_is_the_key_that_would_offer_it() {
    let vmm = Talk::with("qemu-system-x86_64", AccessPlatform::Off);
    vmm.negotiate(PLAIN, PROTOCOL);
    let bits = PLAIN | ACCESS_PLATFORM | 1 << 34;
    vmm.refuse(request::SET_FEATURES, &bits.to_ne_bytes(), "not offered");
    let finding = vmm.finding(FindingCode::FeatureNotOffered).unwrap();
    assert_eq!(
        finding.seen,
        "QEMU acknowledged access_platform ring_packed, which was not offered (vhostUser.accessPlatform is off)"
    );
    assert!(finding.active && finding.severity == Severity::Error);
    vmm.set_features(PLAIN);
    assert!(!vmm.finding(FindingCode::FeatureNotOffered).unwrap().active);
    assert_eq!(vmm.0.snapshot().features_acked.bits(), PLAIN);
}

#[test]
fn translation_without_a_backend_channel_is_found_when_a_ring_starts() {
    let lacks = [
        (
            PROTOCOL & !PROTOCOL_F_BACKEND_REQ,
            true,
            "without the protocol feature backend_req",
        ),
        (
            PROTOCOL & !PROTOCOL_F_REPLY_ACK,
            true,
            "without the protocol feature reply_ack",
        ),
        (PROTOCOL, false, "without a descriptor for the backend channel"),
    ];
    for (protocol, channel, lack) in lacks {
        let vmm = Talk::with("krunvm", AUTO);
        vmm.negotiate(PLAIN | ACCESS_PLATFORM, protocol);
        vmm.0.backend_channel(channel);
        vmm.set_features(PLAIN | ACCESS_PLATFORM);
        vmm.share_memory();
        vmm.translate(TranslationMode::Translate, Evidence::RingAddressesOutsideMemory);
        assert_eq!(vmm.active(), [""; 0], "it may still come");
        vmm.start_ring(1, 0xffff_e000);
        let finding = vmm.finding(FindingCode::IotlbWithoutBackendChannel).unwrap();
        assert_eq!(
            finding.seen,
            format!("libkrun acknowledged access_platform and started a ring {lack}")
        );
        assert!(finding.active);
    }
    let vmm = Talk::with("qemu-kvm", AUTO);
    vmm.translated_boot();
    assert_eq!(vmm.active(), [""; 0]);
    vmm.0.backend_channel(false);
    assert_eq!(vmm.active(), ["iotlb-without-backend-channel"]);
    vmm.0.backend_channel(true);
    assert_eq!(vmm.active(), [""; 0]);
}

#[test]
fn a_guest_that_is_to_be_translated_and_is_not_is_told() {
    let vmm = Talk::with("qemu-system-x86_64", AccessPlatform::Iotlb);
    vmm.plain_boot();
    let finding = vmm.finding(FindingCode::AccessPlatformNotAcknowledged).unwrap();
    assert!(finding.active && finding.severity == Severity::Info);
    assert_eq!(vmm.0.unready(), None, "it is served");
    let vmm = Talk::with("qemu-system-x86_64", AUTO);
    vmm.plain_boot();
    assert_eq!(vmm.active(), [""; 0]);
}

#[test]
fn an_iotlb_message_that_is_refused_is_told_until_one_is_carried_out() {
    let vmm = Talk::with("qemu-system-x86_64", AccessPlatform::Identity);
    vmm.plain_boot();
    vmm.refuse(
        request::IOTLB_MSG,
        &iotlb(2, 0xffff_f000, 0x1000),
        "accessPlatform is identity",
    );
    let finding = vmm.finding(FindingCode::IotlbMessageRefused).unwrap();
    assert_eq!(
        finding.seen,
        "QEMU sent an IOTLB message (UPDATE iova 0xfffff000 size 0x1000 rw) that was refused: accessPlatform is identity"
    );
    assert_eq!(vmm.0.snapshot().access_platform.refused_messages, 1);

    let vmm = Talk::with("qemu-system-x86_64", AUTO);
    vmm.translated_boot();
    let message = vmm.ask(request::IOTLB_MSG, &iotlb(2, 0, 0));
    vmm.0.answered(&message, 1);
    assert_eq!(vmm.active(), ["iotlb-message-refused"]);
    vmm.iotlb(3, 0x1000, 0x1000);
    assert_eq!(vmm.active(), [""; 0]);
    let totals = vmm.0.snapshot().access_platform;
    assert_eq!(
        (totals.updates, totals.invalidations, totals.refused_messages),
        (2, 1, 1)
    );
}

#[test]
fn a_miss_without_an_answer_is_told_until_there_is_one() {
    let miss = Miss {
        iova: 0xfff7_4000,
        access: Access::Read,
    };
    let vmm = Talk::with("qemu-system-x86_64", AUTO);
    vmm.translated_boot();
    vmm.0.miss_sent(miss);
    vmm.0.device_event(&DeviceEvent::Miss(miss));
    assert_eq!(vmm.active(), [""; 0]);
    vmm.0.device_event(&DeviceEvent::MissOverdue(miss));
    let finding = vmm.finding(FindingCode::IotlbMissUnanswered).unwrap();
    assert_eq!(
        finding.seen,
        "QEMU was asked to translate 0xfff74000 for reading and has not answered for 5 s"
    );
    vmm.0.miss_answered(miss, false);
    vmm.0.device_event(&DeviceEvent::MissesAnswered);
    assert_eq!(vmm.active(), [""; 0]);
    vmm.0.device_event(&DeviceEvent::MissOverdue(miss));
    vmm.stop_ring(0);
    assert_eq!(vmm.active(), ["iotlb-miss-unanswered"]);
    vmm.stop_ring(1);
    assert_eq!(vmm.active(), [""; 0], "stopped rings wait for nothing");
}

#[test]
fn a_storm_of_faults_fades_after_two_quiet_minutes() {
    let vmm = Talk::with("qemu-system-x86_64", AUTO);
    vmm.translated_boot();
    vmm.0.device_event(&DeviceEvent::FaultStorm);
    let now = Instant::now();
    let until = vmm.0.look(now).unwrap();
    assert_eq!(vmm.active(), ["translation-fault-storm"]);
    assert!(until > now && until <= now + STORM_FADES);
    assert_eq!(vmm.0.look(until), None);
    assert_eq!(vmm.active(), [""; 0]);
}

#[test]
fn a_ring_whose_own_addresses_are_refused_is_told_until_it_is_stopped_or_served() {
    let vmm = Talk::with("qemu-system-x86_64", AUTO);
    vmm.translated_boot();
    let fault = MemoryFault::Refused { iova: 0xffff_e800 };
    let area = RingArea::Available;
    let error = RingError::Memory { area, fault };
    vmm.0.device_event(&DeviceEvent::RingBroken { index: 1, error });
    let finding = vmm.finding(FindingCode::TranslationFaultStorm).unwrap();
    assert_eq!(
        finding.seen,
        "the tx ring stands still: available ring cannot be accessed: the VMM refuses access to I/O virtual address \
         0xffffe800"
    );
    vmm.stop_ring(0);
    assert_eq!(vmm.active(), ["translation-fault-storm"]);
    vmm.stop_ring(1);
    assert_eq!(vmm.active(), [""; 0]);
    // The guest of a vIOMMU may map the pages later.
    vmm.start_ring(1, 0xffff_e000);
    vmm.0.device_event(&DeviceEvent::RingBroken { index: 1, error });
    assert_eq!(vmm.active(), ["translation-fault-storm"]);
    vmm.0.device_event(&DeviceEvent::RingMended { index: 1 });
    assert_eq!(vmm.active(), [""; 0]);
}

/// Translations came late, and nobody started the ring anew.
#[test]
fn a_ring_that_is_mended_is_no_finding_any_more() {
    let vmm = Talk::with("qemu-system-x86_64", AUTO);
    vmm.translated_boot();
    let area = RingArea::Available;
    for fault in [
        MemoryFault::Refused { iova: 0xffff_e800 },
        MemoryFault::Unmapped { addr: 0, len: 1 },
    ] {
        let error = RingError::Memory { area, fault };
        for index in [0, 1] {
            vmm.0.device_event(&DeviceEvent::RingBroken { index, error });
        }
        assert_eq!(vmm.active().len(), 1);
        vmm.0.device_event(&DeviceEvent::RingMended { index: 1 });
        assert_eq!(vmm.active().len(), 1, "the other one");
        vmm.0.device_event(&DeviceEvent::RingMended { index: 0 });
        assert_eq!(vmm.active(), [""; 0]);
    }
}

#[test]
fn memory_that_is_missing_or_blank_is_told_until_every_such_ring_has_stopped() {
    let vmm = Talk::with("cloud-hypervisor", AUTO);
    vmm.plain_boot();
    vmm.0.device_event(&DeviceEvent::RingEmpty { index: 0 });
    let finding = vmm.finding(FindingCode::MemoryNotShared).unwrap();
    assert_eq!(
        finding.seen,
        "the memory of the rx ring is all zero although the driver has started it"
    );
    let fault = MemoryFault::Unmapped {
        addr: 0x1000,
        len: 16,
    };
    let area = RingArea::DescriptorTable;
    let error = RingError::Memory { area, fault };
    vmm.0.device_event(&DeviceEvent::RingBroken { index: 1, error });
    vmm.stop_ring(0);
    assert_eq!(vmm.active(), ["memory-not-shared"]);
    vmm.stop_ring(1);
    assert_eq!(vmm.active(), [""; 0]);
    // A driver that writes nonsense breaks its own ring: counted, and no finding.
    let error = RingError::AvailIndex {
        avail: 999,
        used: 0,
        size: 128,
    };
    vmm.0.device_event(&DeviceEvent::RingBroken { index: 1, error });
    vmm.0.device_event(&DeviceEvent::RingEmpty { index: usize::MAX });
    assert_eq!(
        vmm.active(),
        ["memory-not-shared"],
        "whatever the device says, nothing panics"
    );
}

#[test]
fn a_legacy_driver_is_told() {
    let vmm = Talk::with("qemu-system-x86_64", AUTO);
    vmm.negotiate(PLAIN, PROTOCOL);
    vmm.set_features(PLAIN & !VIRTIO_F_VERSION_1);
    vmm.share_memory();
    vmm.start_ring(0, USER);
    assert_eq!(vmm.active(), ["version-1-not-acknowledged"]);
    vmm.stop_ring(0);
    vmm.set_features(PLAIN);
    assert_eq!(vmm.active(), [""; 0]);
}

#[test]
fn seqpacket_that_was_offered_and_left_out_is_told() {
    let vmm = Talk::with("qemu-system-x86_64", AUTO);
    vmm.negotiate(PLAIN | VIRTIO_VSOCK_F_SEQPACKET, PROTOCOL);
    vmm.set_features(PLAIN);
    vmm.share_memory();
    vmm.start_ring(0, USER);
    assert_eq!(vmm.active(), ["seqpacket-dropped"]);
    let vmm = Talk::with("qemu-system-x86_64", AUTO);
    vmm.plain_boot();
    assert_eq!(vmm.active(), [""; 0], "it was not offered");
}

#[test]
fn a_ring_that_comes_before_the_memory_is_told_until_it_runs() {
    let vmm = Talk::with("crosvm", AUTO);
    vmm.negotiate(PLAIN, PROTOCOL);
    vmm.set_features(PLAIN);
    vmm.set_up_ring(0, USER);
    assert_eq!(vmm.active(), ["ring-before-memory"]);
    vmm.share_memory();
    vmm.start_ring(0, USER);
    assert_eq!(vmm.active(), [""; 0]);
}

#[test]
fn features_may_not_change_under_running_rings_but_for_the_log_of_a_migration() {
    let vmm = Talk::with("qemu-system-x86_64", AUTO);
    vmm.plain_boot();
    vmm.set_features(PLAIN | VHOST_F_LOG_ALL);
    vmm.set_features(PLAIN);
    assert_eq!(vmm.active(), [""; 0]);
    vmm.set_features(PLAIN & !(1 << 29) | 1 << 35);
    let finding = vmm.finding(FindingCode::FeaturesChangedWhileRunning).unwrap();
    assert_eq!(
        finding.seen,
        "QEMU changed features while a ring was running: added in_order, removed ring_event_idx"
    );
    vmm.stop_ring(0);
    vmm.stop_ring(1);
    assert!(
        !vmm.finding(FindingCode::FeaturesChangedWhileRunning)
            .unwrap()
            .active
    );
}

#[test]
fn a_driver_that_does_not_start_within_a_minute_is_told_until_it_does() {
    let vmm = Talk::with("qemu-system-x86_64", AUTO);
    let began = Instant::now();
    vmm.negotiate(PLAIN, PROTOCOL);
    let due = vmm.0.look(began).unwrap();
    assert!(due <= began + DRIVER_PATIENCE);
    assert_eq!(vmm.active(), [""; 0]);
    assert_eq!(vmm.0.look(due), None);
    assert_eq!(vmm.active(), ["driver-not-ready"]);
    vmm.set_features(PLAIN);
    vmm.share_memory();
    vmm.start_ring(0, USER);
    assert_eq!(vmm.active(), [""; 0]);
    vmm.stop_ring(0);
    assert_eq!(
        vmm.0.look(due + DRIVER_PATIENCE),
        None,
        "a reboot is no late start"
    );
}

/// What came of a session that ended stays to be read; one that fails over and over shows the same all the time.
#[test]
fn an_error_that_ends_session_after_session_does_not_flicker() {
    let vmm = Talk::with("qemu-system-x86_64", AccessPlatform::Off);
    let refused = SessionError::Feature;
    for _ in 0..3 {
        vmm.negotiate(PLAIN, PROTOCOL);
        let bits = PLAIN | ACCESS_PLATFORM;
        vmm.refuse(request::SET_FEATURES, &bits.to_ne_bytes(), "not offered");
        assert_eq!(vmm.active(), ["feature-not-offered"]);
        vmm.end(Some((refused, Some(request::SET_FEATURES))));
        assert_eq!(vmm.active(), ["feature-not-offered"]);
        vmm.again("qemu-system-x86_64");
        assert_eq!(vmm.active(), ["feature-not-offered"]);
    }
    assert_eq!(
        vmm.0.snapshot().requests[request::SET_FEATURES as usize].errors,
        3,
        "each is counted once"
    );
    vmm.end(None);
    assert_eq!(vmm.active(), ["feature-not-offered"], "a look does not mend it");
    vmm.again("qemu-system-x86_64");
    vmm.plain_boot();
    assert_eq!(vmm.0.snapshot().findings, []);
}

#[test]
fn what_was_found_in_a_session_stays_listed_until_the_next_one() {
    let vmm = android(AUTO);
    vmm.translate(TranslationMode::Identity, Evidence::RingAddressesInMemory);
    vmm.start_ring(0, USER);
    vmm.0.ring_started(0, false);
    vmm.end(Some((SessionError::PeerClosed, None)));
    let finding = vmm.finding(FindingCode::AccessPlatformWithoutIotlb).unwrap();
    assert!(!finding.active, "a warning ends no session");
    assert_eq!(finding.session, 1);
    vmm.again("crosvm");
    assert_eq!(vmm.0.snapshot().findings, []);
}

#[test]
fn a_finding_is_raised_once_a_session_and_its_latest_particulars_win() {
    let vmm = Talk::with("qemu-system-x86_64", AUTO);
    vmm.translated_boot();
    for n in 0..1000u64 {
        let body = iotlb(2, n << 12, 0);
        vmm.refuse(request::IOTLB_MSG, &body, "size 0");
    }
    let findings = vmm.0.snapshot().findings;
    assert_eq!(findings.len(), 1);
    assert!(findings[0].seen.contains("iova 0x3e7000"), "{}", findings[0].seen);
}

/// A VMM that goes on after our restart says nothing of features, so nothing can be said of them either.
#[test]
fn an_assumed_session_is_not_accused_of_what_it_did_not_say() {
    let vmm = Talk::with("qemu-system-x86_64", AccessPlatform::Iotlb);
    vmm.0
        .assume(PLAIN | VIRTIO_VSOCK_F_SEQPACKET | ACCESS_PLATFORM, PROTOCOL);
    vmm.say(request::SET_VRING_ENABLE, &state(0, 1));
    vmm.0.ring_started(0, true);
    assert_eq!(vmm.active(), [""; 0]);
    assert_eq!(vmm.0.record().features[0].driver, None);
    vmm.0.translation(Translation::default());
    assert_eq!(vmm.0.unready(), None);
}

#[test]
fn every_code_has_its_texts_and_a_name_of_its_own() {
    let mut codes: Vec<_> = FindingCode::ALL.iter().map(|code| code.code()).collect();
    codes.sort_unstable();
    codes.dedup();
    assert_eq!(codes.len(), FindingCode::ALL.len());
    for code in FindingCode::ALL {
        for text in [code.meaning(), code.remedy()] {
            assert!(text.ends_with('.') && !text.contains("  "), "{code}: {text}");
        }
        let is_slug = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        assert!(code.code().chars().all(is_slug));
    }
}

/// `docs/findings.md` has a section for each code, with exactly what the program says.
#[test]
fn every_finding_is_documented_as_it_is_told() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/findings.md");
    let text = std::fs::read_to_string(path).unwrap();
    let words = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
    let sections: Vec<_> = text.split("\n## ").skip(1).collect();
    let documented: Vec<_> = sections
        .iter()
        .filter_map(|section| section.strip_prefix('`')?.split_once('`'))
        .collect();
    let codes: Vec<_> = documented.iter().map(|(code, _)| *code).collect();
    assert_eq!(
        codes,
        FindingCode::ALL.map(FindingCode::code),
        "sections and their order"
    );
    for (code, (_, section)) in FindingCode::ALL.into_iter().zip(documented) {
        let section = words(section);
        for said in [code.meaning(), code.remedy()] {
            assert!(
                section.contains(&words(said)),
                "{code}: not in its section: {said}"
            );
        }
        for policy in [AccessPlatform::Auto, AccessPlatform::Iotlb] {
            let severity = code.severity(policy).label();
            let (first, _) = section.split_once("**Seen.**").unwrap();
            assert!(first.contains(severity), "{code} is of severity {severity}");
        }
    }
}
