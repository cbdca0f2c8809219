//! Another implementation as judge: virtio-queue's `Queue`, and its mock of a driver.

use std::sync::Arc;

use proptest::prelude::*;
use virtio_queue::desc::RawDescriptor;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::mock::MockSplitQueue;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::driver::{BUFFERS, Buf, Driver, header, pattern, r};
use crate::guest::{GuestRam, Memory, Ring, RingParts, TxBurst};

/// A `Queue` on the ring of `driver`, at the same place.
fn queue(driver: &Driver) -> Queue {
    let RingParts {
        size,
        desc,
        avail,
        used,
        position,
        event_idx,
        ..
    } = driver.parts().0;
    let mut queue = Queue::new(size).unwrap();
    queue.try_set_desc_table_address(GuestAddress(desc)).unwrap();
    queue.try_set_avail_ring_address(GuestAddress(avail)).unwrap();
    queue.try_set_used_ring_address(GuestAddress(used)).unwrap();
    queue.set_next_avail(position.next_avail);
    queue.set_next_used(position.next_used);
    queue.set_event_idx(event_idx);
    queue.set_ready(true);
    queue
}

/// Ours and the judge's ring in memories of their own, which see the same driver.
struct Both {
    ours: (Driver, Ring),
    judge: (Driver, Queue),
}

#[derive(Clone, Debug)]
enum Step {
    /// The driver makes so many chains available, as far as there is room, and the device uses them in one
    /// burst.
    Serve(u16),
    /// The driver wants an interrupt so many elements after the used index.
    UsedEvent(u16),
    /// The device asks for kicks.
    EnableNotifications,
    /// The driver makes a chain available just before that.
    OfferThenEnable,
}

impl Both {
    fn new(start: u16) -> Both {
        let driver = || Driver::at(8, true, start);
        let (ours, judge) = (driver(), driver());
        let (mut ring, queue) = (ours.ring(), queue(&judge));
        // A ring that does not begin at 0 interrupts after its first burst; the judge knows no such rule.
        TxBurst::begin(&mut ring, &ours.ram).unwrap().finish().unwrap();
        Both {
            ours: (ours, ring),
            judge: (judge, queue),
        }
    }

    fn offer(&mut self, n: u16) {
        for driver in [&mut self.ours.0, &mut self.judge.0] {
            for _ in 0..n {
                driver.offer(&[r(BUFFERS, 44)]);
            }
        }
    }

    fn serve(&mut self) -> (bool, bool) {
        let (driver, ring) = &mut self.ours;
        let ram = driver.ram.clone();
        let mut burst = TxBurst::begin(ring, &ram).unwrap();
        while let Some(packet) = burst.pop() {
            packet.unwrap();
        }
        let finished = burst.finish().unwrap();
        let ours = driver.used();

        let (driver, queue) = &mut self.judge;
        let mem = Arc::clone(&driver.mem);
        while let Some(chain) = queue.pop_descriptor_chain(&*mem) {
            queue.add_used(&*mem, chain.head_index(), 0).unwrap();
        }
        let judge = if finished.used > 0 {
            queue.needs_notification(&*mem).unwrap()
        } else {
            false
        };
        assert_eq!(ours, driver.used());
        (finished.interrupt, judge)
    }

    fn step(&mut self, step: &Step) {
        match *step {
            Step::Serve(n) => {
                self.offer(n);
                let (ours, judge) = self.serve();
                assert_eq!(ours, judge, "interrupt after {n}");
            }
            Step::UsedEvent(after) => {
                for driver in [&self.ours.0, &self.judge.0] {
                    driver.set_used_event(driver.used_idx.wrapping_add(after));
                }
            }
            Step::EnableNotifications => self.enable(),
            Step::OfferThenEnable => {
                self.offer(1);
                self.enable();
                self.serve();
            }
        }
    }

    fn enable(&mut self) {
        let ours = self.ours.1.enable_notifications(&self.ours.0.ram).unwrap();
        let judge = self.judge.1.enable_notification(&*self.judge.0.mem).unwrap();
        assert_eq!(ours, judge);
        assert_eq!(self.ours.0.avail_event(), self.judge.0.avail_event());
    }
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (0..=8u16).prop_map(Step::Serve),
        (0..12u16).prop_map(Step::UsedEvent),
        any::<u16>().prop_map(Step::UsedEvent),
        Just(Step::EnableNotifications),
        Just(Step::OfferThenEnable),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn the_same_kicks_and_interrupts_as_virtio_queue(
        start in prop_oneof![65500..=65535u16, Just(0), any::<u16>()],
        steps in prop::collection::vec(step(), 1..40),
    ) {
        let mut both = Both::new(start);
        for step in &steps {
            both.step(step);
        }
    }
}

#[test]
fn chains_of_virtio_queues_mock_driver_come_out() {
    let mem = Arc::new(Memory::from_ranges(&[(GuestAddress(0), 0x10_0000)]).unwrap());
    let driver = MockSplitQueue::new(&*mem, 64);
    let packet = [&header(4)[..], &pattern(300)].concat();
    mem.write_slice(&packet[..60], GuestAddress(0x1_0000)).unwrap();
    mem.write_slice(&packet[60..], GuestAddress(0x2_0000)).unwrap();
    let bufs = [r(0x1_0000, 60), r(0x2_0000, 284)];
    let descriptors = bufs.map(|Buf { addr, len, .. }| RawDescriptor::from(Descriptor::new(addr, len, 0, 0)));
    driver.build_desc_chain(&descriptors).unwrap();

    let mut parts = Driver::new(64, false).parts().0;
    parts.desc = driver.desc_table_addr().0;
    parts.avail = driver.avail_addr().0;
    parts.used = driver.used_addr().0;
    let (mut ring, ram) = (Ring::new(parts).unwrap(), GuestRam::new(Arc::clone(&mem)));
    let mut burst = TxBurst::begin(&mut ring, &ram).unwrap();
    let taken = burst.pop().unwrap().unwrap();
    assert_eq!(taken.header, header(4));
    let mut payload = vec![0; 300];
    let mut at = 0;
    for slice in taken.payload(300) {
        at += slice.copy_to(&mut payload[at..]);
    }
    assert_eq!(payload, pattern(300));
    assert_eq!(burst.finish().unwrap().used, 1);
    assert_eq!(driver.used().idx().load(), 1);
    assert_eq!(driver.used().ring().ref_at(0).unwrap().load().id(), 0);
}
