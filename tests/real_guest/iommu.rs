//! The guest's memory behind an IOMMU: the driver acknowledges VIRTIO_F_ACCESS_PLATFORM, rings and buffers have I/O virtual
//! addresses, and the sidecar asks QEMU what these mean.
//!
//! Every scenario ends with a look at the guest's console (`vm::lab`): an access to what the driver had not mapped, or not
//! for that, is a fault that its kernel tells of. Bytes are compared as everywhere in these tests, so a page that is used
//! after its unmapping shows as different data.

use std::time::Duration;

use serde_json::{Value, json};

use super::vm::lab::{BULK, GUEST, Lab, Setup, Suite, port, tell};
use super::vm::qemu::Options;
use super::vm::wait_until;
use super::{MIB, everything_works, in_labs};

/// VIRTIO_F_ACCESS_PLATFORM.
const ACCESS_PLATFORM: u64 = 1 << 33;

/// Linux asks QEMU's IOMMU for a flush at every map and unmap: with `caching-mode` it has no other mode.
#[test]
fn linux_6_1_behind_a_strict_intel_iommu() {
    in_labs(intel("6.1", " behind intel-iommu, strict", true, 1), |suite| {
        under_load(suite, "DMA");
        ends(suite);
    });
}

/// The guest asks for lazy flushes; its kernel says `IOMMU batching disallowed due to virtualization`.
#[test]
fn linux_6_12_behind_a_lazy_intel_iommu_with_caching_mode() {
    in_labs(intel("6.12", " behind intel-iommu, lazy", true, 0), |suite| {
        under_load(suite, "DMA");
        ends(suite);
    });
}

/// Without `caching-mode` lazy is lazy: mappings live on after their unmapping, and end by flushes of everything.
///
/// For those QEMU sends INVALIDATE only if the guest keeps the device's own translations in mind (ATS), and a guest can
/// only do that with a device behind a port: on the root bus QEMU leaves the capability out (`virtio_pci_realize` in
/// hw/virtio/virtio-pci.c), and then flushes of a whole domain reach no vhost device in QEMU 7.2
/// (`vtd_iotlb_domain_invalidate` in hw/i386/intel_iommu.c): it would go on with pages that are others' by now.
#[test]
fn linux_6_12_behind_an_intel_iommu_that_flushes_everything_at_times() {
    let mut setup = intel("6.12", " behind intel-iommu, lazy, with ATS", false, 0);
    setup.machine.device += ",bus=port0";
    let port = ["-device", "pcie-root-port,id=port0,chassis=1"];
    setup.machine.arguments.extend(port.map(String::from));
    in_labs(setup, |suite| under_load(suite, "DMA-FQ"));
}

/// Another IOMMU, which tells of unmappings in another way. Linux 6.1 of Debian has no driver for it.
#[test]
fn linux_6_12_behind_a_virtio_iommu() {
    let setup = Setup {
        name: " behind virtio-iommu",
        access_platform: "iotlb",
        machine: Options {
            device: ",disable-legacy=on,iommu_platform=on".to_owned(),
            kernel_line: "iommu=nopt iommu.strict=1".to_owned(),
            arguments: ["-device", "virtio-iommu-pci"].map(String::from).into(),
            ..Options::default()
        },
        ..Setup::plain("6.12")
    };
    in_labs(setup, |suite| under_load(suite, "DMA"));
}

/// The machine has an IOMMU and its guest uses it, only not for this device.
#[test]
fn linux_6_12_beside_an_intel_iommu() {
    let mut setup = intel("6.12", " beside intel-iommu", true, 1);
    setup.machine.device = ",disable-legacy=on".to_owned();
    in_labs(setup, |suite| {
        suite.run("a device that is not behind the IOMMU is used as ever", |lab| {
            assert_eq!(lab.vm().ok("iommu").text("domain"), "DMA");
            everything_works(lab);
            nothing_is_translated(lab);
        });
    });
}

#[test]
fn linux_6_12_behind_an_intel_iommu_and_access_platform_off() {
    let setup = Setup {
        access_platform: "off",
        ..intel("6.12", " behind intel-iommu, accessPlatform: off", true, 1)
    };
    in_labs(setup, |suite| {
        suite.run("the VMM is refused and told why; the next one is served", refused);
    });
}

#[test]
fn linux_6_12_behind_an_intel_iommu_and_access_platform_identity() {
    let setup = Setup {
        access_platform: "identity",
        ..intel("6.12", " behind intel-iommu, accessPlatform: identity", true, 1)
    };
    in_labs(setup, |suite| {
        suite.run(
            "the VMM's translations are refused; the next one is served",
            refused_translations,
        );
    });
}

#[test]
fn linux_6_12_without_the_iommu_that_the_operator_wants() {
    let setup = Setup {
        name: ", accessPlatform: iotlb",
        access_platform: "iotlb",
        ..Setup::plain("6.12")
    };
    in_labs(setup, |suite| {
        suite.run(
            "the VMM is served and found out; the next one is as wanted",
            missed,
        );
    });
}

/// QEMU's model of VT-d with what a vhost device needs of it, and a guest that translates every access of every device.
fn intel(kernel: &'static str, name: &'static str, caching_mode: bool, strict: u8) -> Setup {
    let caching_mode = if caching_mode { "on" } else { "off" };
    let iommu = format!("intel-iommu,intremap=off,caching-mode={caching_mode},device-iotlb=on");
    Setup {
        name,
        machine: Options {
            device: ",disable-legacy=on,iommu_platform=on,ats=on".to_owned(),
            kernel_line: format!("intel_iommu=on iommu=nopt iommu.strict={strict}"),
            arguments: vec!["-device".to_owned(), iommu],
            ..Options::default()
        },
        ..Setup::plain(kernel)
    }
}

/// What flows is right, and nothing was accessed that was not to be. `domain` is what the guest's kernel calls the way in
/// which it uses the IOMMU.
fn under_load(suite: &mut Suite, domain: &'static str) {
    suite.run(
        "the driver's addresses are translated, and `/state` says why",
        |lab| {
            let answer = lab.vm().ok("iommu");
            assert_eq!(answer.text("domain"), domain);
            let features = u64::from_str_radix(answer.text("features"), 16).unwrap();
            assert_ne!(features & ACCESS_PLATFORM, 0, "{features:x}");
            translated(lab);
        },
    );
    suite.run("the guest reaches TCP and unix services", super::outbound);
    suite.run(
        "64 MiB from guest to host, whatever the size of a write",
        bulk_to_host,
    );
    suite.run("64 MiB from host to guest", super::bulk_to_guest);
    suite.run(
        "a unix listener leads to the port that CONNECT names",
        super::inbound_connect,
    );
    suite.run("100 connections at once, from either side", super::hundred);
    suite.run("connections come and go", super::churn);
    suite.run("what was sent before a close arrives", super::close_with_data);
    suite.run("every translation was asked for once, and none refused", |lab| {
        lab.wait_for_silence();
        counters_moved(lab);
        let log = lab.qemu_log();
        let complaint = log
            .lines()
            .find(|line| line.contains("vtd_") || line.contains("iotlb"));
        assert!(complaint.is_none(), "QEMU complains: {complaint:?}");
    });
    // Rings come back at the same I/O virtual addresses, in other memory, and QEMU has told nothing of it.
    suite.run(
        "the driver lets go of the device and takes it again",
        super::rebind,
    );
    suite.run("the driver is unloaded and loaded", super::reload);
    suite.run("after all that the driver's addresses are translated", translated);
}

/// A packet costs a map, a question and an unmap, each of which QEMU answers: half a millisecond. So fewer tiny ones.
fn bulk_to_host(lab: &mut Lab) {
    super::bulk_to_host_by(
        lab,
        &[(BULK, 65536), (4 * MIB, 4096), (4 * MIB, 40_001), (10_000, 1)],
    );
}

/// What comes in the middle of everything.
fn ends(suite: &mut Suite) {
    // QEMU resets the IOMMU under running rings: a storm of invalidations, then the rings stop.
    suite.run("the guest reboots under open connections", |lab| {
        super::reboot(lab);
        translated(lab);
    });
    suite.run("the VMM is killed in the middle of a transfer", |lab| {
        super::vmm_killed(lab);
        translated(lab);
    });
    suite.run("SIGTERM with open connections", super::sigterm);
}

/// The session says that it translates, and what makes it do so.
fn translated(lab: &mut Lab) {
    let state = lab.state();
    let platform = &state["session"]["accessPlatform"];
    assert_eq!(platform["mode"], "translate", "{platform:#}");
    let evidence = platform["evidence"].as_str().unwrap_or_default();
    // QEMU sets its rings up before it sends the first IOTLB message, which is told once it has come.
    assert_eq!(evidence, "iotlb_message", "{platform:#}");
    assert_eq!(platform["backendChannel"], true, "{platform:#}");
    assert!(
        platform["why"].as_str().is_some_and(|why| !why.is_empty()),
        "{platform:#}"
    );

    let features = state["session"]["features"]
        .as_array()
        .expect("a list of features");
    let bit = features.iter().find(|feature| feature["bit"] == 33);
    let bit = bit.unwrap_or_else(|| panic!("no bit 33 in {features:#?}"));
    for layer in ["offered", "vmm", "driver", "effective"] {
        assert_eq!(bit[layer], true, "{layer}: {bit:#}");
    }
    for ring in state["device"]["rings"].as_array().expect("a list of rings") {
        assert_eq!(ring["translated"], true, "{ring:#}");
    }
    // The last packets of what came before may just be asked for.
    wait_until("no ring waits for a translation", Duration::from_secs(5), || {
        let state = lab.state();
        let rings = state["device"]["rings"].as_array().expect("a list of rings");
        rings.iter().all(|ring| ring["heldBy"].is_null())
    });
    let wrong: Vec<&Value> = odd(&state).collect();
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// The counts fit one another and what was done: more than 64 MiB each way, which is more than 16384 pages.
fn counters_moved(lab: &mut Lab) {
    let state = lab.state();
    let (session, iotlb) = (&state["session"]["accessPlatform"], &state["device"]["iotlb"]);
    tell(&format!("  IOTLB: {iotlb}"));
    for (counter, at_least) in [("updates", 16384), ("missesSent", 16384), ("invalidations", 2)] {
        assert!(
            session[counter].as_u64() >= Some(at_least),
            "{counter}: {session:#}"
        );
    }
    for counter in ["missesRefused", "refusedMessages"] {
        assert_eq!(session[counter], 0, "{counter}: {session:#}");
    }
    for counter in ["lookups", "hits", "misses", "updates", "invalidations"] {
        assert!(iotlb[counter].as_u64() > Some(0), "{counter}: {iotlb:#}");
    }
    for counter in ["faultsRead", "faultsWrite", "unanswered"] {
        assert_eq!(iotlb[counter], 0, "{counter}: {iotlb:#}");
    }
    assert_eq!(iotlb["oldestUnansweredSeconds"], Value::Null, "{iotlb:#}");
    let labels = [("guest", GUEST)];
    for family in ["vsock_iotlb_updates_total", "vsock_iotlb_invalidations_total"] {
        assert!(lab.sidecar.metric(family, &labels) > 0.0, "{family}");
    }
    assert_eq!(lab.sidecar.metric("vsock_iotlb_faults_total", &labels), 0.0);
    assert_eq!(lab.sidecar.metric("vsock_iotlb_unanswered_misses", &labels), 0.0);
    // QEMU sends UPDATE as an answer, and one unasked for each ring whenever rings start: no miss was sent in vain.
    let (sent, updates) = (session["missesSent"].as_u64(), session["updates"].as_u64());
    assert!(sent <= updates, "{session:#}");
}

/// Not one IOTLB message came or went.
pub fn nothing_is_translated(lab: &mut Lab) {
    let answer = lab.vm().ok("iommu");
    let features = u64::from_str_radix(answer.text("features"), 16).unwrap();
    assert_eq!(features & ACCESS_PLATFORM, 0, "{features:x}");
    let state = lab.state();
    let platform = &state["session"]["accessPlatform"];
    assert_eq!(platform["mode"], "none", "{platform:#}");
    assert_eq!(platform["evidence"], "not_acknowledged", "{platform:#}");
    for counter in [
        "updates",
        "invalidations",
        "refusedMessages",
        "missesSent",
        "missesRefused",
    ] {
        assert_eq!(platform[counter], 0, "{counter}: {platform:#}");
    }
    let requests = state["session"]["requests"]
        .as_array()
        .expect("a list of requests");
    let iotlb = requests.iter().find(|it| it["request"] == "IOTLB_MSG");
    assert!(iotlb.is_none_or(|it| it["count"] == 0), "{iotlb:#?}");
    let iotlb = &state["device"]["iotlb"];
    for counter in [
        "entries",
        "lookups",
        "misses",
        "updates",
        "invalidations",
        "unanswered",
    ] {
        assert_eq!(iotlb[counter], 0, "{counter}: {iotlb:#}");
    }
    for ring in state["device"]["rings"].as_array().expect("a list of rings") {
        assert_eq!(ring["translated"], false, "{ring:#}");
    }
}

/// QEMU hands `iommu_platform=on` to the guest whether we offer the feature or not, so it is refused at SET_FEATURES.
fn refused(lab: &mut Lab) {
    // Nothing answers the guest's driver, whose connect gives up after 2 s.
    lab.vm().err(&format!("client {}", port::ECHO), "ETIMEDOUT");
    let mut state = Value::Null;
    wait_until("the session has ended", Duration::from_secs(10), || {
        state = lab.state();
        state["session"]["connected"] == false
    });
    let finding = finding(&state, "feature-not-offered");
    assert_eq!(finding["severity"], "error", "{finding:#}");
    let seen = finding["seen"].as_str().unwrap_or_default();
    assert!(seen.contains("access_platform"), "{seen}");
    let remedy = finding["remedy"].as_str().unwrap_or_default();
    for option in ["accessPlatform", "iommu_platform"] {
        assert!(remedy.contains(option), "{remedy}");
    }
    wait_until("the log names the finding", Duration::from_secs(5), || {
        lab.sidecar.log().contains("feature-not-offered")
    });

    another_machine_works(lab, &Options::default());
    nothing_is_translated(lab);
}

/// QEMU translates, and the operator has said that nobody does: its ring addresses mean nothing here, and end the session.
fn refused_translations(lab: &mut Lab) {
    lab.vm().err(&format!("client {}", port::ECHO), "ETIMEDOUT");
    let state = lab.state();
    let finding = finding(&state, "iotlb-message-refused");
    let remedy = finding["remedy"].as_str().unwrap_or_default();
    assert!(remedy.contains("accessPlatform"), "{remedy}");
    assert_eq!(
        state["session"]["lastEnd"]["reason"], "vring",
        "{:#}",
        state["session"]["lastEnd"]
    );
    assert_eq!(state["session"]["accessPlatform"]["updates"], 0);

    another_machine_works(lab, &Options::default());
}

/// The operator wants addresses translated, and QEMU was started without `iommu_platform=on`: the guest's own IOMMU does
/// not confine the device, which is worth knowing, and no reason to serve nothing.
fn missed(lab: &mut Lab) {
    everything_works(lab);
    nothing_is_translated(lab);
    let state = lab.state();
    let finding = finding(&state, "access-platform-not-acknowledged");
    assert_eq!(finding["active"], true, "{finding:#}");
    let remedy = finding["remedy"].as_str().unwrap_or_default();
    assert!(remedy.contains("iommu_platform=on"), "{remedy}");

    another_machine_works(lab, &intel("6.12", "", true, 1).machine);
    translated(lab);
    let state = lab.state();
    assert!(
        findings(&state).iter().all(|it| it["active"] == false),
        "{:#}",
        state["session"]["findings"]
    );
}

/// The machine that was not served lives, and the sidecar serves another one, of which it finds nothing odd.
fn another_machine_works(lab: &mut Lab, machine: &Options) {
    let status = lab.vm().qmp("query-status", json!({}));
    assert_eq!(status["status"], "running", "QEMU lives");
    lab.boot_another(machine);
    everything_works(lab);
    let state = lab.state();
    let left: Vec<&Value> = odd(&state).collect();
    assert!(left.is_empty(), "{left:#?}");
}

fn finding<'state>(state: &'state Value, code: &str) -> &'state Value {
    let findings = findings(state);
    let finding = findings.iter().find(|it| it["code"] == code);
    finding.unwrap_or_else(|| panic!("{code} is not among {findings:#?}"))
}

/// Findings that hold now and that somebody should do something about.
fn odd(state: &Value) -> impl Iterator<Item = &Value> {
    findings(state)
        .iter()
        .filter(|it| it["active"] == true && it["severity"] != "info")
}

fn findings(state: &Value) -> &[Value] {
    state["session"]["findings"]
        .as_array()
        .expect("a list of findings")
}
