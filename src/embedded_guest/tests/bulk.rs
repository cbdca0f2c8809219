//! The benchmark path against a small host.

use super::device::TestDevice;
use super::host::{self, Services};
use crate::embedded_guest::bulk::{Flow, Wait};
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
