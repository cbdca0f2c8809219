//! A guest whose device is behind an IOMMU, and VMMs that only look as if theirs were: VIRTIO_F_ACCESS_PLATFORM in its two
//! meanings, from the socket to `/state` and the metrics.

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::thread;
use std::time::Duration;

use serde_json::Value;
use vsock_sidecar::embedded_guest::misses::UPDATE;
use vsock_sidecar::embedded_guest::profile::{feature, protocol_feature};
use vsock_sidecar::embedded_guest::{
    DriverOptions, EmbeddedGuest, Error, FrontEnd, Granule, GuestStream, IommuOptions, Order, Outcome,
    Profile, Shape, SocketOptions, Sockets, Unmap,
};

use crate::support::*;

/// The guest port of the echo service.
const ECHO: u32 = 7;

/// A sidecar with one guest and an echo service.
#[track_caller]
pub fn served(access_platform: &str) -> Sidecar {
    let port = serve(echo);
    Sidecar::start(&format!(
        "guests:\n- name: web\n  cid: 3\n  vhostUser: {{socket: \"{{dir}}/web.sock\", accessPlatform: \
         {access_platform}}}\n  outbound: [{{name: echo, port: {ECHO}, to: \"tcp://127.0.0.1:{port}\"}}]\n"
    ))
}

/// The rings and buffers of a guest behind an IOMMU.
pub fn behind(iommu: IommuOptions) -> DriverOptions {
    DriverOptions {
        iommu: Some(iommu),
        ..DriverOptions::default()
    }
}

/// A guest behind QEMU's vIOMMU.
pub fn viommu(sidecar: &Sidecar, iommu: IommuOptions) -> Sockets {
    guest(
        &sidecar.path("web.sock"),
        Profile::qemu_viommu(),
        behind(iommu),
        SocketOptions::default(),
    )
}

/// What `/state` says of the bit.
#[track_caller]
pub fn access_platform(sidecar: &Sidecar) -> Value {
    sidecar.state()["guests"][0]["session"]["accessPlatform"].clone()
}

#[track_caller]
pub fn mode(sidecar: &Sidecar) -> String {
    access_platform(sidecar)["mode"]
        .as_str()
        .unwrap_or("none of the modes")
        .to_owned()
}

/// A finding of the guest that is active now.
#[track_caller]
pub fn finding(sidecar: &Sidecar, code: &str) -> Option<Value> {
    let state = sidecar.state();
    let findings = state["guests"][0]["session"]["findings"].as_array()?;
    let active = |f: &&Value| f["code"] == code && f["active"] == true;
    findings.iter().find(active).cloned()
}

/// A finding, active or not.
#[track_caller]
fn past_finding(sidecar: &Sidecar, code: &str) -> Option<Value> {
    let state = sidecar.state();
    let findings = state["guests"][0]["session"]["findings"].as_array()?;
    findings.iter().find(|f| f["code"] == code).cloned()
}

#[track_caller]
fn iotlb(sidecar: &Sidecar, counter: &str) -> u64 {
    sidecar.state()["guests"][0]["device"]["iotlb"][counter]
        .as_u64()
        .unwrap_or_default()
}

#[track_caller]
pub fn ping(guest: &Sockets) {
    let stream = guest.connect(ECHO).unwrap();
    stream.set_read_timeout(Some(LONG));
    (&stream).write_all(b"ping").unwrap();
    let mut pong = [0; 4];
    (&stream).read_exact(&mut pong).unwrap();
    assert_eq!(&pong, b"ping");
}

/// Sends `len` bytes through the echo service and checks what comes back, to the end of file.
#[track_caller]
pub fn echo_through(guest: &Sockets, seed: u64, len: u64) {
    let stream = &guest.connect(ECHO).unwrap();
    stream.set_read_timeout(Some(LONG));
    stream.set_write_timeout(Some(LONG));
    thread::scope(|scope| {
        scope.spawn(|| {
            Bytes::new(seed).write_to(stream, len).unwrap();
            stream.shutdown(Shutdown::Write).unwrap();
        });
        Bytes::new(seed).expect_from(stream, len);
        assert_eq!((&*stream).read(&mut [0]).unwrap(), 0, "the end of the stream");
    });
}

/// Fails if the device asked for something it had no right to, or for more than it needed.
#[track_caller]
pub fn assert_modest(guest: &Sockets) {
    let seen = guest.with_front_end(|f| {
        // The last bytes may be here before the last answers are written down, and a device that looks ahead may ask again.
        f.unwrap()
            .wait_misses(LONG, |seen| seen.iter().all(|s| s.outcome != Outcome::Pending))
            .unwrap()
    });
    for seen in seen {
        assert!(
            seen.miss.is_exact(),
            "asks for reading and writing at once: {seen:?}"
        );
        assert_eq!(
            seen.outcome,
            Outcome::Mapped,
            "a fault that the guest sees: {seen:?}"
        );
    }
}

/// A connection attempt that nobody answers.
#[track_caller]
pub fn assert_unanswered(guest: &Sockets) {
    match guest.connect(ECHO) {
        Err(error) => assert_eq!(error.kind(), ErrorKind::TimedOut, "{error}"),
        Ok(_) => panic!("it is served"),
    }
}

/// A guest that gives up soon. For those who expect no answer.
pub fn impatient(booted: EmbeddedGuest) -> Sockets {
    let options = SocketOptions {
        connect_timeout: Duration::from_millis(700),
        ..SocketOptions::default()
    };
    Sockets::start(booted, options).unwrap()
}

#[test]
fn every_kind_of_iommu_carries_every_byte() {
    let sidecar = served("auto");
    let strict = IommuOptions::default;
    let lazy = |batch| IommuOptions {
        unmap: Unmap::Lazy(batch),
        ..strict()
    };
    let whole = IommuOptions {
        granule: Granule::Whole,
        ..strict()
    };
    let mebibytes = |n: u64| n << 20;
    let rows: Vec<(&str, IommuOptions, u16, Shape, u64)> = vec![
        ("strict", strict(), 128, Shape::linux_6_12(), mebibytes(8)),
        (
            "strict, ring of 1024",
            strict(),
            1024,
            Shape::linux_6_12(),
            mebibytes(4),
        ),
        ("lazy", lazy(256), 128, Shape::linux_6_12(), mebibytes(4)),
        (
            "lazy, often",
            lazy(20),
            128,
            Shape::header_then_payload(),
            mebibytes(1),
        ),
        (
            "all memory at once",
            whole.clone(),
            128,
            Shape::linux_6_12(),
            mebibytes(8),
        ),
        (
            "all memory at once, ring of 1024",
            whole,
            1024,
            Shape::linux_6_12(),
            mebibytes(4),
        ),
        (
            "17 fragments, in a table that is mapped too",
            strict(),
            128,
            Shape::page_fragments(100).indirect(),
            mebibytes(2),
        ),
        (
            "one descriptor over 17 pages",
            strict(),
            128,
            Shape::single(),
            mebibytes(2),
        ),
        (
            "header in 5 parts",
            strict(),
            128,
            Shape::split_header(5),
            mebibytes(1),
        ),
        (
            "a front-end that answers one thing after the other",
            IommuOptions {
                nested: false,
                ..strict()
            },
            128,
            Shape::linux_6_12(),
            mebibytes(2),
        ),
        (
            "no caching mode, exact permissions",
            IommuOptions {
                caching_mode: false,
                exact_permission: true,
                ..strict()
            },
            128,
            Shape::linux_6_12(),
            mebibytes(2),
        ),
    ];
    for (number, (name, iommu, queue_size, shape, bytes)) in rows.into_iter().enumerate() {
        println!("{name}");
        let before = sidecar.metric("vsock_iotlb_updates_total", &[]);
        let whole = iommu.granule == Granule::Whole;
        let guest = guest(
            &sidecar.path("web.sock"),
            Profile::qemu_viommu(),
            DriverOptions {
                queue_size,
                ..behind(iommu)
            },
            SocketOptions {
                shape,
                ..SocketOptions::default()
            },
        );
        ping(&guest);
        echo_through(&guest, number as u64, bytes);
        let platform = access_platform(&sidecar);
        assert_eq!(platform["mode"], "translate", "{name}: {platform}");
        assert_eq!(platform["policy"], "auto", "{name}");
        assert_eq!(platform["backendChannel"], true, "{name}");
        let evidence = platform["evidence"].as_str().unwrap();
        assert!(
            ["iotlb_message", "ring_addresses_outside_memory"].contains(&evidence),
            "{name}: {evidence}"
        );
        assert!(!platform["why"].as_str().unwrap().is_empty(), "{name}");
        assert_modest(&guest);
        let misses = guest.with_front_end(|f| f.unwrap().misses().len());
        if whole {
            // The pre-sent UPDATE is all there is to know; what was asked before it came, came with the start.
            assert!(misses <= 6, "{name}: {misses} misses for one range");
        } else {
            assert!(misses > 100, "{name}: {misses} misses");
            sidecar.until_metric("vsock_iotlb_unanswered_misses", &[], 0.0);
            until("each was answered", || {
                sidecar.metric("vsock_iotlb_updates_total", &[]) - before >= misses as f64
            });
            assert!(
                sidecar.metric("vsock_iotlb_invalidations_total", &[]) > 0.0,
                "{name}"
            );
        }
        assert_eq!(sidecar.metric("vsock_iotlb_faults_total", &[]), 0.0, "{name}");
        assert_lawful(&guest);
        guest.shut_down().unwrap();
        sidecar.until_metric("vsock_session_active", &[], 0.0);
    }
    assert_eq!(sidecar.metric("vsock_misbehavior_total", &[]), 0.0);
    assert_eq!(sidecar.metric("vsock_vring_errors_total", &[]), 0.0);
    for family in [
        "vsock_iotlb_lookups_total",
        "vsock_iotlb_misses_total",
        "vsock_iotlb_flushes_total",
    ] {
        assert!(sidecar.metric(family, &[]) > 0.0, "{family}");
    }
}

#[test]
fn a_hundred_connections_at_once_and_reboots_with_them() {
    let sidecar = served("auto");
    let guest = viommu(&sidecar, IommuOptions::default());
    for round in 0..5 {
        let streams: Vec<GuestStream> = (0..100).map(|_| guest.connect(ECHO).unwrap()).collect();
        for (seed, stream) in streams.iter().enumerate() {
            stream.set_read_timeout(Some(LONG));
            Bytes::new(seed as u64).write_to(stream, 5000).unwrap();
        }
        for (seed, stream) in streams.iter().enumerate() {
            Bytes::new(seed as u64).expect_from(stream, 5000);
        }
        assert_modest(&guest);
        // With all of them open: the vIOMMU is reset while the rings run, then the rings stop. They come back at the same
        // addresses, which now mean other pages, and what was known of the old ones would be rubbish.
        guest.reboot().unwrap();
        guest.with_front_end(|f| f.unwrap().forget_misses());
        let labels = [("reason", "session_lost")];
        sidecar.until_metric(
            "vsock_connections_closed_total",
            &labels,
            100.0 * f64::from(round + 1),
        );
        drop(streams);
    }
    ping(&guest);
    assert_eq!(mode(&sidecar), "translate");
    assert_eq!(sidecar.metric("vsock_sessions_total", &[]), 1.0);
    assert_lawful(&guest);
}

/// The guest loads its driver again: no INVALIDATE comes while the rings stand still, and the same address is another page
/// afterwards.
#[test]
fn rings_that_restart_at_the_same_address_in_other_memory_are_read_there() {
    let sidecar = served("auto");
    for queue_size in [128, 1024] {
        let mut booted = EmbeddedGuest::boot(
            &sidecar.path("web.sock"),
            Profile::qemu_viommu(),
            DriverOptions {
                queue_size,
                ..behind(IommuOptions::default())
            },
        )
        .unwrap();
        for _ in 0..20 {
            booted.pause().unwrap();
            booted.driver.reset().unwrap();
            booted.start(&[]).unwrap();
            booted.driver.fill_rx().unwrap();
        }
        let guest = Sockets::start(booted, SocketOptions::default()).unwrap();
        ping(&guest);
        echo_through(&guest, 3, 300_000);
        assert_lawful(&guest);
        guest.shut_down().unwrap();
        sidecar.until_metric("vsock_session_active", &[], 0.0);
    }
    assert_eq!(sidecar.metric("vsock_vring_errors_total", &[]), 0.0);
}

#[test]
fn without_an_iommu_there_is_not_one_iotlb_message_and_not_one_miss() {
    for access_platform_is in ["auto", "iotlb", "identity", "off"] {
        let sidecar = served(access_platform_is);
        for profile in [Profile::qemu(), Profile::cloud_hypervisor()] {
            let guest = guest(
                &sidecar.path("web.sock"),
                profile,
                DriverOptions::default(),
                SocketOptions::default(),
            );
            ping(&guest);
            echo_through(&guest, 1, 1 << 20);
            let platform = access_platform(&sidecar);
            assert_eq!(platform["mode"], "none", "{platform}");
            assert_eq!(platform["evidence"], "not_acknowledged");
            for counter in [
                "updates",
                "invalidations",
                "refusedMessages",
                "missesSent",
                "missesRefused",
            ] {
                assert_eq!(platform[counter], 0, "{counter}: {platform}");
            }
            if let Some(channel) = guest.with_front_end(|f| f.unwrap().backend_channel()) {
                channel.set_nonblocking(true).unwrap();
                let nothing = (&*channel).read(&mut [0]).unwrap_err();
                assert_eq!(nothing.kind(), ErrorKind::WouldBlock, "a request of the back-end");
            }
            for counter in ["entries", "lookups", "misses", "updates", "invalidations"] {
                assert_eq!(iotlb(&sidecar, counter), 0, "{counter}");
            }
            assert_eq!(sidecar.metric("vsock_iotlb_lookups_total", &[]), 0.0);
            assert_eq!(sidecar.metric("vsock_iotlb_enabled", &[]), 0.0);
            assert!(finding(&sidecar, "access-platform-without-iotlb").is_none());
            assert_lawful(&guest);
            guest.shut_down().unwrap();
            sidecar.until_metric("vsock_session_active", &[], 0.0);
        }
    }
}

// ---- the stories of bit 33 -------------------------------------------------------------------------------------------

#[test]
fn android_acknowledges_access_platform_and_stays_silent_and_auto_serves_it_with_a_finding() {
    for profile in [Profile::crosvm_protected(), Profile::libkrun()] {
        let sidecar = served("auto");
        let name = profile.name;
        let guest = guest(
            &sidecar.path("web.sock"),
            profile,
            DriverOptions::default(),
            SocketOptions::default(),
        );
        let negotiated = guest.with_front_end(|f| f.unwrap().negotiated());
        assert_ne!(
            negotiated.features & feature::ACCESS_PLATFORM,
            0,
            "{name} acknowledges it"
        );
        ping(&guest);
        echo_through(&guest, 1, 1 << 20);
        let platform = access_platform(&sidecar);
        assert_eq!(platform["mode"], "identity", "{name}: {platform}");
        assert_eq!(platform["evidence"], "ring_addresses_in_memory", "{name}");
        let found = finding(&sidecar, "access-platform-without-iotlb").expect("it is reported");
        assert_eq!(found["severity"], "warning", "{name}: it works");
        for part in ["seen", "meaning", "remedy"] {
            assert!(!found[part].as_str().unwrap().is_empty(), "{name}: {part}");
        }
        let labels = [("code", "access-platform-without-iotlb")];
        assert_eq!(sidecar.metric("vsock_finding", &labels), 1.0, "{name}");
        assert_eq!(sidecar.try_get("/readyz").unwrap().0, 200, "{name} is served");
        assert_eq!(sidecar.metric("vsock_iotlb_lookups_total", &[]), 0.0, "{name}");
        assert_lawful(&guest);
    }
}

/// A front-end that sets the bit, gives its own addresses, and could translate if it wanted to.
fn silent() -> Profile {
    Profile {
        order: Order::RustVmm,
        ..Profile::qemu_viommu()
    }
}

/// Translations by which the VMM's addresses mean what they always meant, and guest-physical ones too.
fn translate_to_the_same(guest: &Sockets) {
    let regions = guest.with_driver(|driver| driver.memory().regions().to_vec());
    for region in regions {
        let size = region.size() as u64;
        guest.with_front_end(|f| {
            let f = f.unwrap();
            f.iotlb_update(region.user_addr(), size, region.user_addr(), 3)
                .unwrap();
            f.iotlb_update(region.gpa(), size, region.user_addr(), 3).unwrap();
        });
    }
}

#[test]
fn android_acknowledges_access_platform_and_stays_silent_and_iotlb_refuses_it_and_says_why() {
    let sidecar = served("iotlb");
    let path = sidecar.path("web.sock");
    let booted = EmbeddedGuest::boot(&path, silent(), DriverOptions::default()).unwrap();
    let guest = impatient(booted);
    until("it is reported", || {
        finding(&sidecar, "access-platform-without-iotlb").is_some()
    });
    assert_unanswered(&guest);
    let found = finding(&sidecar, "access-platform-without-iotlb").unwrap();
    assert_eq!(found["severity"], "error");
    assert_eq!(mode(&sidecar), "translate", "or nothing");
    let (status, why) = sidecar.try_get("/readyz").unwrap();
    assert_eq!(status, 503, "{why}");
    assert!(why.contains("web"), "which guest: {why}");
    assert_eq!(sidecar.metric("vsock_connections_opened_total", &[]), 0.0);

    // It learns to translate: what it was told to do is done, and served.
    translate_to_the_same(&guest);
    until("the finding has passed", || {
        finding(&sidecar, "access-platform-without-iotlb").is_none()
    });
    until("it is ready again", || {
        sidecar.try_get("/readyz").unwrap().0 == 200
    });
    until("it is served", || guest.connect(ECHO).is_ok());
    ping(&guest);
    guest.shut_down().unwrap();
    sidecar.until_metric("vsock_session_active", &[], 0.0);

    // One that cannot translate at all.
    let booted = EmbeddedGuest::boot(&path, Profile::crosvm_protected(), DriverOptions::default()).unwrap();
    let guest = impatient(booted);
    assert_unanswered(&guest);
    assert_eq!(sidecar.try_get("/readyz").unwrap().0, 503);
    guest.kill();
    // And one as it should be.
    sidecar.until_metric("vsock_session_active", &[], 0.0);
    let guest = viommu(&sidecar, IommuOptions::default());
    ping(&guest);
    until("it is ready again", || {
        sidecar.try_get("/readyz").unwrap().0 == 200
    });
}

#[test]
fn android_acknowledges_access_platform_and_stays_silent_and_off_never_offered_it() {
    let sidecar = served("off");
    let path = sidecar.path("web.sock");
    let android = guest(
        &path,
        Profile::crosvm_protected(),
        DriverOptions::default(),
        SocketOptions::default(),
    );
    let negotiated = android.with_front_end(|f| f.unwrap().negotiated());
    assert_eq!(negotiated.offered & feature::ACCESS_PLATFORM, 0, "never offered");
    ping(&android);
    assert_eq!(mode(&sidecar), "none");
    android.shut_down().unwrap();
    sidecar.until_metric("vsock_session_active", &[], 0.0);

    // QEMU sets it all the same, and waits for no answer: the session ends, and says which option it is.
    let refused = EmbeddedGuest::boot(&path, Profile::qemu_viommu(), behind(IommuOptions::default()));
    assert!(refused.is_err(), "served what was never offered");
    sidecar.until_metric("vsock_session_errors_total", &[("reason", "feature")], 1.0);
    let found = past_finding(&sidecar, "feature-not-offered").expect("it is reported");
    let text = found.to_string();
    assert!(text.contains("accessPlatform"), "the option: {text}");
    assert!(
        text.to_lowercase().contains("access_platform"),
        "the feature: {text}"
    );

    // One that waits is told, and may do better in the same session.
    let mut front_end = FrontEnd::connect(&path, silent()).unwrap();
    let features = front_end.negotiate().unwrap().features;
    let refused = front_end.set_features(features).unwrap_err();
    assert!(matches!(refused, Error::Refused { .. }), "{refused}");
    assert!(finding(&sidecar, "feature-not-offered").is_some());
    front_end
        .set_features(features & !feature::ACCESS_PLATFORM)
        .unwrap();
    assert!(finding(&sidecar, "feature-not-offered").is_none(), "mended");
    drop(front_end);

    sidecar.until_metric("vsock_session_active", &[], 0.0);
    let next = linux(&path);
    ping(&next);
    assert_eq!(sidecar.metric("vsock_session_errors_total", &[]), 1.0);
}

#[test]
fn identity_refuses_iotlb_messages_and_serves() {
    let sidecar = served("identity");
    let booted = EmbeddedGuest::boot(&sidecar.path("web.sock"), silent(), DriverOptions::default()).unwrap();
    let region = booted.driver.memory().regions()[0].clone();
    let guest = Sockets::start(booted, SocketOptions::default()).unwrap();
    ping(&guest);
    let refused = guest
        .with_front_end(|f| f.unwrap().iotlb_update(0x1000, 0x1000, region.user_addr(), 3))
        .unwrap_err();
    assert!(matches!(refused, Error::Refused { .. }), "{refused}");
    until("it is reported", || {
        finding(&sidecar, "iotlb-message-refused").is_some()
    });
    ping(&guest);
    let platform = access_platform(&sidecar);
    assert_eq!(
        (&platform["mode"], &platform["evidence"]),
        (&"identity".into(), &"configured".into())
    );
    assert_eq!(platform["refusedMessages"], 1);
    assert!(
        finding(&sidecar, "access-platform-without-iotlb").is_none(),
        "as configured"
    );
    assert_lawful(&guest);
}

/// Evidence that comes late: what looked like Android turns out to translate. From then on nothing is served untranslated.
#[test]
fn a_session_that_has_sent_one_iotlb_message_never_goes_back_to_identity() {
    let sidecar = served("auto");
    let path = sidecar.path("web.sock");
    let guest = impatient(EmbeddedGuest::boot(&path, silent(), DriverOptions::default()).unwrap());
    ping(&guest);
    assert_eq!(mode(&sidecar), "identity");
    assert!(finding(&sidecar, "access-platform-without-iotlb").is_some());

    // Not even a message that makes sense.
    let nonsense = guest.with_front_end(|f| f.unwrap().iotlb(0, 0x1000, 0, 3, UPDATE));
    assert!(nonsense.is_err(), "user address 0 is in no region");
    until("it translates", || mode(&sidecar) == "translate");
    assert_eq!(access_platform(&sidecar)["evidence"], "iotlb_message");
    assert!(finding(&sidecar, "access-platform-without-iotlb").is_none());
    assert_unanswered(&guest);

    translate_to_the_same(&guest);
    until("it is served again", || guest.connect(ECHO).is_ok());
    ping(&guest);

    guest
        .with_front_end(|f| f.unwrap().iotlb_invalidate(0, 0))
        .unwrap();
    assert_unanswered(&guest);
    // Nor does a restart of the rings, with addresses that are the VMM's own, lead back.
    guest.reboot().unwrap();
    assert_unanswered(&guest);
    assert_eq!(mode(&sidecar), "translate");
    translate_to_the_same(&guest);
    until("it is served again", || guest.connect(ECHO).is_ok());
    guest.shut_down().unwrap();
    sidecar.until_metric("vsock_session_active", &[], 0.0);

    // The next session starts with a clean slate.
    let guest = impatient(EmbeddedGuest::boot(&path, silent(), DriverOptions::default()).unwrap());
    ping(&guest);
    assert_eq!(mode(&sidecar), "identity");
}

#[test]
fn iovas_from_a_front_end_that_cannot_be_asked_are_a_finding() {
    let sidecar = served("auto");
    let mute = silent().without_protocol(protocol_feature::REPLY_ACK | protocol_feature::BACKEND_REQ);
    let iommu = IommuOptions {
        caching_mode: false,
        unmap: Unmap::Lazy(usize::MAX),
        ..IommuOptions::default()
    };
    let guest = impatient(EmbeddedGuest::boot(&sidecar.path("web.sock"), mute, behind(iommu)).unwrap());
    until("it is reported", || {
        finding(&sidecar, "iotlb-without-backend-channel").is_some()
    });
    let platform = access_platform(&sidecar);
    assert_eq!(
        (&platform["mode"], &platform["backendChannel"]),
        (&"translate".into(), &false.into())
    );
    assert_unanswered(&guest);
    guest.kill();
    sidecar.until_metric("vsock_session_active", &[], 0.0);
    ping(&viommu(&sidecar, IommuOptions::default()));
}
