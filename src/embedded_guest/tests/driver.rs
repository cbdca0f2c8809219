//! Front-end and driver.

use std::time::Duration;

use super::device::{Silent, TestDevice, from_guest, from_host};
use crate::embedded_guest::profile::{feature, protocol_feature};
use crate::embedded_guest::{
    DriverOptions, EmbeddedGuest, Error, FrontEnd, Profile, RX, Refill, RxLayout, Segment, Shape, TX, Table,
};
use crate::vsock::header::{HEADER_LEN, Op};

const SOON: Duration = Duration::from_secs(10);
const RINGS: u64 = feature::EVENT_IDX | feature::INDIRECT_DESC;

fn pattern(len: usize) -> Vec<u8> {
    (0..len as u32)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect()
}

fn boot(device: &TestDevice, options: DriverOptions) -> EmbeddedGuest {
    EmbeddedGuest::boot(&device.socket(), Profile::qemu(), options).unwrap()
}

#[test]
fn each_profile_negotiates_and_exchanges_packets() {
    for profile in [
        Profile::qemu(),
        Profile::qemu().without_protocol(protocol_feature::CONFIGURE_MEM_SLOTS),
        Profile::cloud_hypervisor(),
        Profile::libkrun(),
    ] {
        let device = TestDevice::start(RINGS | feature::IN_ORDER, Silent);
        let mut guest =
            EmbeddedGuest::boot(&device.socket(), profile.clone(), DriverOptions::default()).unwrap();
        assert_eq!(guest.cid(), 3);
        let negotiated = guest.front_end.negotiated();
        assert_eq!(negotiated.queue_num, Some(3), "{}", profile.name);
        assert_eq!(
            negotiated.features & feature::IN_ORDER != 0,
            profile.name != "qemu",
            "QEMU does not pass IN_ORDER"
        );
        let header = from_guest(Op::Request, 1000, 80, 0);
        guest.driver.send_packet(&header, &[], &Shape::single()).unwrap();
        device.wait_until("the packet arrives", |s| s.seen.len() == 1);
        assert_eq!(device.lock().seen[0].bytes, header.encode());
        device.inject(from_host(Op::Response, 80, 1000), &[]);
        assert_eq!(
            guest.driver.recv_packet(SOON).unwrap().header.op,
            Op::Response as u16
        );
        assert!(guest.driver.stats().violations.is_empty());
        guest.shut_down().unwrap();
    }
}

#[test]
fn every_shape_arrives_whole_in_its_descriptors() {
    let full = 65536;
    let cases: Vec<(Shape, usize, Vec<u32>)> = vec![
        (Shape::single(), 100, vec![144]),
        (Shape::single(), full, vec![65580]),
        (Shape::header_then_payload(), full, vec![44, 65536]),
        (Shape::linux_6_12(), full, vec![44, 32768, 32768]),
        (Shape::linux_6_12(), 32769, vec![44, 32768, 1]),
        (Shape::split_header(3), 5, vec![14, 14, 16, 5]),
        (Shape::split_header(44), 1, vec![1; 45]),
        (Shape::cuts(&[50, 1]), 100, vec![50, 1, 93]),
        (Shape::every(1000), 3000, vec![1000, 1000, 1000, 44]),
        (
            Shape::page_fragments(96),
            full,
            [vec![44, 4000], vec![4096; 15], vec![96]].concat(),
        ),
    ];
    for features in [0, RINGS] {
        let device = TestDevice::start(features, Silent);
        let mut guest = boot(&device, DriverOptions::default());
        for (number, (shape, len, descriptors)) in cases.iter().enumerate() {
            let payload = pattern(*len);
            let header = from_guest(Op::Rw, number as u32, 80, *len);
            guest.driver.send_packet(&header, &payload, shape).unwrap();
            device.wait_until("the packet arrives", |s| s.seen.len() == number + 1);
            let state = device.lock();
            let seen = &state.seen[number];
            assert_eq!(&seen.descriptors, descriptors, "{shape:?}");
            assert_eq!(seen.bytes[..HEADER_LEN], header.encode(), "{shape:?}");
            assert!(seen.bytes[HEADER_LEN..] == payload, "{shape:?}: payload differs");
        }
        guest.driver.flush_tx(SOON).unwrap();
        assert_eq!(guest.driver.queue(TX).free(), 128, "all descriptors are back");
        assert!(guest.driver.stats().violations.is_empty());
    }
}

#[test]
fn every_receive_layout_delivers_the_same_bytes() {
    for layout in [
        RxLayout::TwoDescriptors,
        RxLayout::LINUX_6_12,
        RxLayout::OneDescriptor(4140),
        RxLayout::for_payload(65536),
        RxLayout::Pieces(vec![20, 30, 1, 4000]),
    ] {
        for features in [0, RINGS] {
            let device = TestDevice::start(features, Silent);
            let mut guest = boot(
                &device,
                DriverOptions {
                    rx: layout.clone(),
                    ..Default::default()
                },
            );
            let sent = pattern(300_000);
            device.wait_until("the device knows its rings", |s| s.kicks[0] > 0);
            device.inject(from_host(Op::Rw, 80, 1000), &sent);
            let mut received = Vec::new();
            while received.len() < sent.len() {
                received.extend(guest.driver.recv_packet(SOON).unwrap().payload);
            }
            assert!(received == sent, "{layout:?}");
            let state = device.lock();
            let lens: u32 = state.rx_descriptors[0].iter().sum();
            let capacity = lens as usize - HEADER_LEN;
            assert_eq!(state.rx_descriptors.len(), sent.len().div_ceil(capacity));
            let stats = guest.driver.stats();
            assert!(stats.violations.is_empty(), "{:?}", stats.violations);
            assert_eq!(stats.received_bytes, 300_000);
        }
    }
}

#[test]
fn indices_wrap_in_both_directions() {
    for features in [0, RINGS] {
        let device = TestDevice::start(features, Silent);
        let options = DriverOptions {
            queue_size: 16,
            rx: RxLayout::for_payload(20),
            ..Default::default()
        };
        let mut guest = boot(&device, options);
        device.wait_until("the device knows its rings", |s| s.kicks[0] > 0);
        let header = from_guest(Op::CreditUpdate, 1000, 80, 0);
        for _ in 0..66_000 {
            guest
                .driver
                .send_packet_wait(&header, &[], &Shape::single(), SOON)
                .unwrap();
        }
        guest.driver.flush_tx(SOON).unwrap();
        assert_eq!(guest.driver.queue(TX).avail_idx(), (66_000u32 & 0xffff) as u16);
        device.inject(from_host(Op::Rw, 80, 1000), &pattern(66_000 * 20));
        for _ in 0..66_000 {
            guest.driver.recv_packet(SOON).unwrap();
        }
        let stats = guest.driver.stats();
        assert_eq!((stats.tx.used, stats.received.count(Op::Rw)), (66_000, 66_000));
        assert!(stats.violations.is_empty(), "{:?}", stats.violations);
    }
}

#[test]
fn with_event_idx_a_burst_costs_few_notifications() {
    let device = TestDevice::start(feature::EVENT_IDX, Silent);
    let mut guest = boot(&device, DriverOptions::default());
    device.wait_until("the device knows its rings", |s| s.kicks[0] > 0);
    let before = guest.driver.stats().tx.kicks;
    for _ in 0..100 {
        guest
            .driver
            .queue_packet(&from_guest(Op::Rw, 1, 2, 1), b"x", &Shape::single())
            .unwrap();
    }
    assert!(guest.driver.notify_tx());
    guest.driver.flush_tx(SOON).unwrap();
    assert_eq!(
        guest.driver.stats().tx.kicks - before,
        1,
        "one kick for the burst"
    );
    // The receive side: interrupts are off while the driver works, so a hundred packets need none or one.
    guest.driver.queue(RX).disable_interrupts();
    let before = device.lock().interrupts[0];
    device.inject(from_host(Op::Rw, 1, 2), &pattern(100 * 3732));
    for _ in 0..100 {
        guest.driver.recv_packet(SOON).unwrap();
    }
    assert!(device.lock().interrupts[0] - before <= 1);
}

#[test]
fn the_ring_says_full_and_recovers() {
    let device = TestDevice::start(0, Silent);
    let mut front_end = FrontEnd::connect(&device.socket(), Profile::qemu()).unwrap();
    let features = front_end.negotiate().unwrap().features;
    let options = DriverOptions {
        queue_size: 8,
        ..Default::default()
    };
    let driver = crate::embedded_guest::Driver::new(options, features).unwrap();
    let mut guest = EmbeddedGuest { front_end, driver };
    // The rings are not started: the device takes nothing.
    let header = from_guest(Op::Rw, 1, 2, 10);
    for _ in 0..4 {
        guest
            .driver
            .send_packet(&header, &[7; 10], &Shape::header_then_payload())
            .unwrap();
    }
    let full = guest
        .driver
        .send_packet(&header, &[7; 10], &Shape::header_then_payload());
    assert!(matches!(full, Err(Error::RingFull)));
    guest.start(&[]).unwrap();
    guest
        .driver
        .send_packet_wait(&header, &[7; 10], &Shape::header_then_payload(), SOON)
        .unwrap();
    guest.driver.flush_tx(SOON).unwrap();
    assert_eq!(device.lock().seen.len(), 5);
}

#[test]
fn a_guest_that_does_not_refill_gets_what_it_has_buffers_for() {
    let device = TestDevice::start(RINGS, Silent);
    let options = DriverOptions {
        rx_buffers: 3,
        refill: Refill::Never,
        ..Default::default()
    };
    let mut guest = boot(&device, options);
    device.wait_until("the device knows its rings", |s| s.kicks[0] > 0);
    for _ in 0..5 {
        device.inject(from_host(Op::Rw, 1, 2), b"hello");
    }
    for _ in 0..3 {
        guest.driver.recv_packet(SOON).unwrap();
    }
    assert!(
        guest
            .driver
            .recv_packet(Duration::from_millis(20))
            .unwrap_err()
            .is_timeout()
    );
    assert_eq!(guest.driver.post_rx(1).unwrap(), 1);
    guest.driver.recv_packet(SOON).unwrap();
    assert_eq!(guest.driver.rx_posted(), 0);
}

#[test]
fn rings_stop_resume_and_start_over() {
    let device = TestDevice::start(RINGS, Silent);
    let mut guest = boot(&device, DriverOptions::default());
    let header = from_guest(Op::Rw, 1, 2, 3);
    for _ in 0..5 {
        guest
            .driver
            .send_packet(&header, b"abc", &Shape::single())
            .unwrap();
    }
    guest.driver.flush_tx(SOON).unwrap();
    let bases = guest.pause().unwrap();
    assert_eq!(bases[1], 5, "the device had taken five packets");

    // Resumed: the rings go on where they were, the receive buffers are still posted.
    guest.start(&[bases[0], bases[1]]).unwrap();
    guest
        .driver
        .send_packet(&header, b"abc", &Shape::single())
        .unwrap();
    device.wait_until("the sixth arrives", |s| s.seen.len() == 6);

    // Rebooted: from zero.
    guest.reboot().unwrap();
    guest
        .driver
        .send_packet(&header, b"abc", &Shape::single())
        .unwrap();
    device.wait_until("the seventh arrives", |s| s.seen.len() == 7);
    assert_eq!(guest.driver.queue(TX).avail_idx(), 1);
    assert_eq!(device.lock().starts, 3);
    assert!(guest.driver.stats().violations.is_empty());
}

#[test]
fn a_killed_vmm_leaves_a_device_that_serves_the_next() {
    let device = TestDevice::start(RINGS, Silent);
    for number in 1..=3 {
        let mut guest = boot(&device, DriverOptions::default());
        guest
            .driver
            .send_packet(&from_guest(Op::Rw, 1, 2, 3), b"abc", &Shape::single())
            .unwrap();
        device.wait_until("the packet arrives", |s| s.seen.len() == number);
        drop(guest);
    }
}

#[test]
fn memory_is_plugged_while_the_rings_run() {
    let device = TestDevice::start(RINGS, Silent);
    let mut guest = boot(&device, DriverOptions::default());
    assert!(guest.front_end.has(protocol_feature::CONFIGURE_MEM_SLOTS));
    let region = guest
        .driver
        .memory_mut()
        .add_region(0x1_0000_0000, 2 << 20)
        .unwrap();
    guest.front_end.add_mem_reg(&region).unwrap();
    let header = from_guest(Op::Rw, 1, 2, 4);
    let bytes = [header.encode().as_slice(), b"plug"].concat();
    guest.driver.memory().write(0x1_0000_0100, &bytes).unwrap();
    let segment = Segment {
        addr: 0x1_0000_0100,
        len: 48,
        writable: false,
    };
    guest.driver.send_chain(TX, &[segment], Table::AsLinux).unwrap();
    device.wait_until("the packet arrives", |s| s.seen.len() == 1);
    let state = device.lock();
    assert_eq!(state.seen[0].bytes, bytes);
    drop(state);
    guest.driver.flush_tx(SOON).unwrap();
    guest.front_end.rem_mem_reg(&region).unwrap();
}

#[test]
fn front_ends_say_what_was_wrong() {
    let device = TestDevice::start(RINGS, Silent);
    let mut front_end = FrontEnd::connect(&device.socket(), Profile::qemu()).unwrap();
    front_end.negotiate().unwrap();
    // A feature bit nobody offered: the crate refuses, and since QEMU wants no reply the connection just ends.
    front_end.set_features(1 << 50).unwrap();
    front_end.wait_closed(SOON).unwrap();

    let missing = FrontEnd::connect(&device.dir().join("nobody"), Profile::qemu()).unwrap_err();
    assert_eq!(missing.to_string(), "connect to the vhost-user socket");
}

#[test]
fn the_memory_table_is_replaced_while_the_rings_run() {
    let device = TestDevice::start(RINGS, Silent);
    let profile = Profile::qemu().without_protocol(protocol_feature::CONFIGURE_MEM_SLOTS);
    let mut guest = EmbeddedGuest::boot(&device.socket(), profile, DriverOptions::default()).unwrap();
    let header = from_guest(Op::Rw, 1, 2, 5);
    for (number, gpa) in [0x1_0000_0000, 0x2_0000_0000].into_iter().enumerate() {
        let region = guest.driver.memory_mut().add_region(gpa, 1 << 20).unwrap();
        guest
            .front_end
            .set_mem_table(guest.driver.memory().regions())
            .unwrap();
        guest.driver.memory().write(gpa, b"table").unwrap();
        // The header in the old memory, the payload in the new.
        let sent = guest.driver.queue_packet(&header, &[], &Shape::single()).unwrap();
        guest.driver.notify_tx();
        guest.driver.flush_tx(SOON).unwrap();
        let segments = [(sent.gpa, HEADER_LEN as u32), (gpa, 5)].map(|(addr, len)| Segment {
            addr,
            len,
            writable: false,
        });
        guest.driver.send_chain(TX, &segments, Table::AsLinux).unwrap();
        guest.driver.flush_tx(SOON).unwrap();
        assert_eq!(device.lock().seen[2 * number + 1].bytes[HEADER_LEN..], *b"table");
        guest.driver.memory_mut().remove_region(gpa);
        drop(region);
    }
}

#[test]
fn a_header_can_change_after_the_kick() {
    let device = TestDevice::start(0, Silent);
    let mut front_end = FrontEnd::connect(&device.socket(), Profile::qemu()).unwrap();
    let features = front_end.negotiate().unwrap().features;
    let driver = crate::embedded_guest::Driver::new(DriverOptions::default(), features).unwrap();
    let mut guest = EmbeddedGuest { front_end, driver };
    // The rings stand still, so the change comes for certain before the device looks.
    let sent = guest
        .driver
        .send_packet(&from_guest(Op::Rw, 1, 2, 3), b"abc", &Shape::single())
        .unwrap();
    let other = from_guest(Op::Rst, 9, 9, 3).encode();
    guest.driver.memory().write(sent.gpa, &other).unwrap();
    guest.start(&[]).unwrap();
    device.wait_until("the packet arrives", |s| s.seen.len() == 1);
    assert_eq!(device.lock().seen[0].bytes[..HEADER_LEN], other);
}
