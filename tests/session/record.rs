//! What is written down of real sessions: mode, matrix, findings, and the last messages with what became of them.

use serde_json::{Value, json};
use vsock_sidecar::device::DeviceEvent;
use vsock_sidecar::guest::{Access, Miss};
use vsock_sidecar::vhost_user::message::request;
use vsock_sidecar::vhost_user::{AccessPlatform, Mode};

use super::support::*;

/// Where Linux puts the rings behind Intel's IOMMU.
const IOVAS: [u64; 2] = [0xffff_f000, 0xffff_e000];

fn record(rig: &Rig) -> Value {
    serde_json::to_value(rig.watch.record()).unwrap()
}

/// Request, outcome and count of each message.
fn messages(record: &Value) -> Vec<(String, String, u64)> {
    let tell = |message: &Value| {
        (
            message["request"].as_str().unwrap().to_owned(),
            message["outcome"].as_str().unwrap().to_owned(),
            message["count"].as_u64().unwrap(),
        )
    };
    record["messages"].as_array().unwrap().iter().map(tell).collect()
}

fn row(record: &Value, name: &str) -> Value {
    let rows = record["features"].as_array().unwrap();
    let row = rows.iter().find(|row| row["name"] == name);
    row.unwrap_or_else(|| panic!("no {name} in {rows:#?}")).clone()
}

fn codes(record: &Value) -> Vec<(&str, bool)> {
    let findings = record["findings"].as_array().unwrap().iter();
    findings
        .map(|finding| (finding["code"].as_str().unwrap(), finding["active"] == true))
        .collect()
}

impl Vmm {
    fn drive(&self, setup: &Setup, features: u64, addresses: [u64; 2]) -> Running {
        let running = Running {
            kick: [event(), event()],
            call: [event(), event()],
        };
        self.send_u64(request::SET_FEATURES, features & !(1 << 26));
        assert_eq!(self.set_memory(&setup.memory, RAM_UADDR), 0);
        for index in 0..2 {
            self.set_up_ring(index, 0, addresses[index as usize], &running.kick[index as usize]);
        }
        for index in 0..2 {
            self.send_state(request::SET_VRING_ENABLE, index, 1);
        }
        running
    }

    fn iotlb(&self, kind: u8, iova: u64, gpa: u64) -> u64 {
        let mut body = [iova, 0x1000, RAM_UADDR + gpa].map(u64::to_ne_bytes).concat();
        body.extend_from_slice(&[3, kind, 0, 0, 0, 0, 0, 0]);
        self.acked(request::IOTLB_MSG, &body, &[])
    }
}

#[test]
fn a_plain_guest_leaves_a_plain_record() {
    let rig = Rig::new(Mode::Server);
    let vmm = rig.connect();
    let setup = vmm.realize();
    let _running = vmm.start(&setup);
    let record = record(&rig);
    assert_eq!(record["accessPlatform"]["mode"], "none");
    assert_eq!(record["accessPlatform"]["backendChannel"], true);
    assert_eq!(
        row(&record, "access_platform"),
        json!({"bit": 33, "name": "access_platform", "offered": true, "vmm": false, "driver": false, "effective": false})
    );
    assert_eq!(codes(&record), []);
    let messages = messages(&record);
    assert!(!messages.iter().any(|(request, ..)| request == "IOTLB_MSG"));
    let open: Vec<_> = messages
        .iter()
        .filter(|(_, outcome, _)| outcome == "pending")
        .collect();
    assert!(
        open.is_empty(),
        "all is answered that is to be answered: {open:?}"
    );
}

#[test]
fn a_guest_behind_an_iommu_shows_how_its_addresses_are_understood_and_why() {
    let rig = Rig::new(Mode::Server);
    let vmm = rig.connect();
    let setup = vmm.realize();
    let _running = vmm.drive(&setup, setup.offered, IOVAS);
    assert_eq!(vmm.iotlb(2, IOVAS[0], 0x1000), 0);
    assert_eq!(vmm.iotlb(2, IOVAS[1], 0x2000), 0);
    for n in 0..300 {
        assert_eq!(vmm.iotlb(3, n << 12, 0), 0);
    }
    assert_eq!(vmm.iotlb(2, 0x5000, u64::MAX >> 2), 1, "no memory of the guest");
    let seen = record(&rig);
    let access = &seen["accessPlatform"];
    assert_eq!(
        (&access["mode"], &access["evidence"], &access["policy"]),
        (&json!("translate"), &json!("iotlb_message"), &json!("auto"))
    );
    assert_eq!(
        (
            &access["updates"],
            &access["invalidations"],
            &access["refusedMessages"]
        ),
        (&json!(2), &json!(300), &json!(1))
    );
    assert_eq!(row(&seen, "access_platform")["effective"], true);
    assert_eq!(seen["rings"][0]["translated"], true);
    assert_eq!(codes(&seen), [("iotlb-message-refused", true)]);
    let told = messages(&seen);
    let tail: Vec<_> = told.iter().rev().take(3).rev().cloned().collect();
    let row = |outcome: &str, count| ("IOTLB_MSG".to_owned(), outcome.to_owned(), count);
    assert_eq!(tail, [row("ok", 2), row("ok", 300), row("refused", 1)]);

    let miss = Miss {
        iova: 0xfff7_4000,
        access: Access::Read,
    };
    rig.device.tell(DeviceEvent::Miss(miss));
    rig.device.tell(DeviceEvent::MissOverdue(miss));
    wait_until("the miss is told", || {
        let record = record(&rig);
        record["accessPlatform"]["missesSent"] == 1
            && codes(&record).contains(&("iotlb-miss-unanswered", true))
    });
    let last = record(&rig)["messages"]
        .as_array()
        .unwrap()
        .last()
        .cloned()
        .unwrap();
    assert_eq!(
        (&last["direction"], &last["outcome"], &last["detail"]),
        (
            &json!("backend_channel_out"),
            &json!("pending"),
            &json!("MISS iova 0xfff74000 ro")
        )
    );
}

/// crosvm on Android, 2022: the guest needs the bit, the VMM acknowledges it, and nobody translates.
#[test]
fn the_android_case_is_served_under_auto_and_told() {
    let rig = Rig::new(Mode::Server);
    let vmm = rig.connect();
    let setup = vmm.realize();
    let _running = vmm.drive(&setup, setup.offered, DESC);
    vmm.barrier();
    let record = record(&rig);
    assert_eq!(record["accessPlatform"]["mode"], "identity");
    assert_eq!(record["accessPlatform"]["evidence"], "ring_addresses_in_memory");
    assert_eq!(
        row(&record, "access_platform"),
        json!({"bit": 33, "name": "access_platform", "offered": true, "vmm": true, "driver": true, "effective": false})
    );
    assert_eq!(codes(&record), [("access-platform-without-iotlb", true)]);
    assert_eq!(record["findings"][0]["severity"], "warning");
    assert_eq!(rig.watch.unready(), None);
}

#[test]
fn the_android_case_is_not_served_under_iotlb_and_readiness_says_why() {
    let rig = Rig::with_policy(AccessPlatform::Iotlb);
    let vmm = rig.connect();
    let setup = vmm.realize();
    let _running = vmm.drive(&setup, setup.offered, DESC);
    vmm.barrier();
    let seen = record(&rig);
    assert_eq!(seen["accessPlatform"]["mode"], "translate");
    assert_eq!(codes(&seen), [("access-platform-without-iotlb", true)]);
    assert_eq!(seen["findings"][0]["severity"], "error");
    assert!(rig.watch.unready().unwrap().contains("no IOTLB messages"));
    assert_eq!(vmm.iotlb(2, DESC[0], 0x1000), 0);
    assert_eq!(rig.watch.unready(), None);
    assert_eq!(codes(&record(&rig)), [("access-platform-without-iotlb", false)]);
}

#[test]
fn the_android_case_is_refused_under_off_and_the_recorder_survives_it() {
    let rig = Rig::with_policy(AccessPlatform::Off);
    let vmm = rig.connect();
    let setup = vmm.realize();
    vmm.send_u64(request::SET_FEATURES, (setup.offered | PLATFORM) & !(1 << 26));
    vmm.wait_closed();
    rig.wait_end(1);
    let seen = record(&rig);
    assert_eq!(codes(&seen), [("feature-not-offered", true)]);
    let sentence = seen["findings"][0]["seen"].as_str().unwrap();
    assert!(
        sentence.contains("(vhostUser.accessPlatform is off)"),
        "{sentence}"
    );
    let told = messages(&seen);
    let last = told.last().unwrap();
    assert_eq!(
        (last.0.as_str(), last.1.as_str()),
        ("SET_FEATURES", "ended_session")
    );
    assert_eq!(told[0].0, "GET_FEATURES");
    // The next VMM's messages come behind, and the finding passes when it does better.
    let vmm = rig.connect();
    let setup = vmm.realize();
    assert_eq!(codes(&record(&rig)), [("feature-not-offered", true)]);
    let _running = vmm.start(&setup);
    let seen = record(&rig);
    assert_eq!(codes(&seen), []);
    assert_eq!(messages(&seen)[..told.len()], told);
    let sessions: Vec<_> = seen["messages"]
        .as_array()
        .unwrap()
        .iter()
        .map(|message| message["session"].as_u64().unwrap())
        .collect();
    assert!(sessions.is_sorted() && sessions.ends_with(&[2]), "{sessions:?}");
}
