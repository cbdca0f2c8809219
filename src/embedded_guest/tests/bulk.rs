//! The benchmark path against a small host.

use std::time::{Duration, Instant};

use super::device::TestDevice;
use super::host::{self, Services};
use crate::embedded_guest::bulk::{Flow, Flows, Sending, Wait};
use crate::embedded_guest::profile::feature;
use crate::embedded_guest::{DriverOptions, EmbeddedGuest, Profile, Shape};

#[test]
fn a_flow_moves_bytes_both_ways_within_credit() {
    for wait in [Wait::Interrupt, Wait::Poll] {
        let (services, seen) = Services::new(256 * 1024);
        let device = TestDevice::start(feature::EVENT_IDX | feature::INDIRECT_DESC, services);
        let mut guest =
            EmbeddedGuest::boot(&device.socket(), Profile::qemu(), DriverOptions::default()).unwrap();
        device.wait_until("the device knows its rings", |s| s.kicks[0] > 0);
        let driver = &mut guest.driver;

        let mut flow = Flow::connect(driver, 3, 1000, host::SINK, 256 * 1024, wait).unwrap();
        flow.send(driver, 5_000_001, 65536, &Shape::linux_6_12()).unwrap();
        device.wait_until("all bytes arrive", |s| s.seen.len() > 5_000_000 / 65536);
        assert_eq!(seen.lock().unwrap().received[&host::SINK], 5_000_001);
        flow.close(driver).unwrap();

        let mut flow = Flow::connect(driver, 3, 1001, host::SOURCE, 256 * 1024, wait).unwrap();
        flow.receive(driver, host::SOURCE_BYTES as u64).unwrap();
        flow.close(driver).unwrap();

        let mut flow = Flow::connect(driver, 3, 1002, host::ECHO, 256 * 1024, wait).unwrap();
        for _ in 0..100 {
            flow.ping(driver).unwrap();
        }
        flow.close(driver).unwrap();
        assert!(Flow::connect(driver, 3, 1003, host::REFUSED, 256 * 1024, wait).is_err());
        assert_eq!(seen.lock().unwrap().faults, Vec::<String>::new());
        assert!(driver.stats().violations.is_empty());
    }
}

#[test]
fn many_flows_share_a_ring_and_one_of_them_is_answered_beside_the_bulk() {
    let (services, seen) = Services::new(8 * 1024);
    let device = TestDevice::start(feature::EVENT_IDX | feature::INDIRECT_DESC, services);
    let mut guest = EmbeddedGuest::boot(&device.socket(), Profile::qemu(), DriverOptions::default()).unwrap();
    device.wait_until("the device knows its rings", |s| s.kicks[0] > 0);
    let driver = &mut guest.driver;

    // More than are asked for at a time.
    let mut flows = Flows::new(3, 1000, Wait::Interrupt);
    flows.connect(driver, 100, host::SINK, 256 * 1024).unwrap();
    flows.connect(driver, 1, host::ECHO, 256 * 1024).unwrap();
    assert_eq!(flows.len(), 101);
    let sending = Sending {
        flows: 100,
        packet: 1000,
        shape: &Shape::header_then_payload(),
    };

    let asked = flows.set_asker(100, Some(1));
    assert!(asked.is_empty(), "nobody asked before");
    let deadline = Instant::now() + Duration::from_secs(30);
    let mut times = Vec::new();
    // A question that is open when a window ends does not count, so windows grow until answers fit.
    let mut window = Duration::from_millis(20);
    while times.len() < 3 || flows.sent()[..100].contains(&0) {
        assert!(
            Instant::now() < deadline,
            "{} answers, {:?}",
            times.len(),
            flows.sent()
        );
        flows
            .run(driver, Instant::now() + window, Some(&sending))
            .unwrap();
        window *= 2;
        times.extend(flows.take_times());
    }

    let sent = &flows.sent()[..100];
    let (fewest, most) = (*sent.iter().min().unwrap(), *sent.iter().max().unwrap());
    assert!(most - fewest <= 8 * 1024, "one window apart at most: {sent:?}");
    let all: u64 = sent.iter().sum();
    while seen.lock().unwrap().received[&host::SINK] < all as usize {
        assert!(Instant::now() < deadline, "the device has not taken {all} bytes");
        flows
            .run(driver, Instant::now() + Duration::from_millis(10), None)
            .unwrap();
    }
    assert_eq!(
        seen.lock().unwrap().received[&host::SINK],
        all as usize,
        "nor more than were sent"
    );
    assert_eq!(seen.lock().unwrap().faults, Vec::<String>::new());
    assert!(driver.stats().violations.is_empty());
}

#[test]
fn flows_that_only_receive_take_everything_within_credit() {
    let (services, seen) = Services::new(256 * 1024);
    let device = TestDevice::start(feature::EVENT_IDX, services);
    let mut guest = EmbeddedGuest::boot(&device.socket(), Profile::qemu(), DriverOptions::default()).unwrap();
    device.wait_until("the device knows its rings", |s| s.kicks[0] > 0);
    let driver = &mut guest.driver;
    let mut flows = Flows::new(3, 1000, Wait::Interrupt);
    flows.connect(driver, 3, host::SOURCE, 128 * 1024).unwrap();
    let deadline = Instant::now() + Duration::from_secs(30);
    while flows.received() != [host::SOURCE_BYTES as u64; 3] {
        assert!(Instant::now() < deadline, "{:?}", flows.received());
        flows
            .run(driver, Instant::now() + Duration::from_millis(10), None)
            .unwrap();
    }
    assert_eq!(seen.lock().unwrap().faults, Vec::<String>::new());
    assert!(driver.stats().violations.is_empty());
}
