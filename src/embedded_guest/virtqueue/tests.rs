//! The driver's half of the ring against a device by hand.

use super::*;

fn queue(size: u16, features: u64) -> Virtqueue {
    let mut memory = GuestMemory::new(64 << 20).unwrap();
    Virtqueue::new(&mut memory, 1, size, features).unwrap()
}

/// The device by hand: uses a chain.
fn device_uses(q: &Virtqueue, at: u16, id: u32, len: u32) {
    let element = q.used_at() + 4 + 8 * usize::from(at & (q.size - 1));
    q.ring.store(id, element, Ordering::Relaxed);
    q.ring.store(len, element + 4, Ordering::Relaxed);
    q.write_used_idx(at.wrapping_add(1));
}

fn device_wants_kick_at(q: &Virtqueue, event: u16) {
    q.ring.store(
        event,
        q.used_at() + 4 + 8 * usize::from(q.size),
        Ordering::Relaxed,
    );
}

const ONE: [Segment; 1] = [Segment {
    addr: 0x1000,
    len: 44,
    writable: false,
}];
const THREE: [Segment; 3] = [
    Segment {
        addr: 0x1000,
        len: 44,
        writable: false,
    },
    Segment {
        addr: 0x2000,
        len: 7,
        writable: false,
    },
    Segment {
        addr: 0x3000,
        len: 1,
        writable: true,
    },
];

#[test]
fn a_ring_of_128_is_laid_out_as_in_qemu_s_trace_of_linux() {
    let q = queue(128, 0);
    let setup = q.setup(0);
    assert_eq!(setup.avail - setup.desc, 0x800);
    assert_eq!(setup.used - setup.desc, 0x940);
}

#[test]
fn descriptors_return_to_the_free_list() {
    let mut q = queue(8, 0);
    let a = q.add(&THREE, Table::AsLinux, 1).unwrap();
    let b = q.add(&THREE, Table::AsLinux, 2).unwrap();
    assert!(
        matches!(q.add(&THREE, Table::AsLinux, 3), Err(Error::RingFull)),
        "2 of 8 are left"
    );
    assert_eq!(q.free(), 2);
    device_uses(&q, 0, b.into(), 1);
    device_uses(&q, 1, a.into(), 0);
    assert_eq!(
        q.pop(),
        Some(Used {
            token: 2,
            len: Some(1)
        })
    );
    assert_eq!(
        q.pop(),
        Some(Used {
            token: 1,
            len: Some(0)
        })
    );
    assert_eq!(q.pop(), None);
    assert_eq!(q.free(), 8);
    assert_eq!(q.stats().out_of_order, 1);
    assert!(q.violations().is_empty(), "any order is allowed without IN_ORDER");
}

#[test]
fn linux_takes_an_indirect_table_for_chains_of_more_than_one() {
    let mut q = queue(8, feature::INDIRECT_DESC);
    q.add(&THREE, Table::AsLinux, 1).unwrap();
    q.add(&ONE, Table::AsLinux, 2).unwrap();
    q.add(&THREE, Table::Direct, 3).unwrap();
    q.add(&ONE, Table::Indirect, 4).unwrap();
    assert_eq!(q.free(), 8 - 1 - 1 - 3 - 1);
    let mut descriptor = [0; 16];
    q.ring.read(0, &mut descriptor);
    assert_eq!(
        &descriptor[8..14],
        [48, 0, 0, 0, 4, 0],
        "three descriptors, INDIRECT"
    );
}

#[test]
fn kicks_follow_the_event_index() {
    let mut q = queue(8, feature::EVENT_IDX);
    q.add(&ONE, Table::AsLinux, 0).unwrap();
    assert!(q.notify(), "avail_event is 0: the first chain is announced");
    q.add(&ONE, Table::AsLinux, 0).unwrap();
    assert!(!q.notify(), "the device has not asked again");
    device_wants_kick_at(&q, 3);
    q.add(&ONE, Table::AsLinux, 0).unwrap();
    assert!(!q.notify(), "chain number 2 is not 3");
    q.add(&ONE, Table::AsLinux, 0).unwrap();
    q.add(&ONE, Table::AsLinux, 0).unwrap();
    assert!(q.notify(), "one notification for both, since 3 was passed");
    assert!(!q.notify(), "nothing was added");
    assert_eq!((q.stats().kicks, q.stats().kicks_suppressed), (2, 2));
}

#[test]
fn kicks_follow_the_no_notify_flag_without_event_idx() {
    let mut q = queue(8, 0);
    q.add(&ONE, Table::AsLinux, 0).unwrap();
    assert!(q.notify());
    q.ring.store(USED_F_NO_NOTIFY, q.used_at(), Ordering::Relaxed);
    q.add(&ONE, Table::AsLinux, 0).unwrap();
    assert!(!q.notify());
}

#[test]
fn interrupts_are_asked_for_by_used_event_or_flag() {
    let used_event = |q: &Virtqueue| q.ring.load::<u16>(q.avail_at() + 4 + 16, Ordering::Relaxed);
    let flags = |q: &Virtqueue| q.ring.load::<u16>(q.avail_at(), Ordering::Relaxed);
    let mut q = queue(8, feature::EVENT_IDX);
    let head = q.add(&ONE, Table::AsLinux, 0).unwrap();
    assert!(!q.enable_interrupts());
    assert_eq!(used_event(&q), 0);
    device_uses(&q, 0, head.into(), 0);
    assert!(
        q.enable_interrupts(),
        "it came before interrupts were on: handle it now"
    );
    q.pop().unwrap();
    assert_eq!(used_event(&q), 1, "pop announces the next");
    q.disable_interrupts();
    assert_eq!(used_event(&q), 0, "65535 chains away");
    assert_eq!(flags(&q), 0, "the flag stays clear with EVENT_IDX");

    let mut q = queue(8, 0);
    q.disable_interrupts();
    assert_eq!(flags(&q), AVAIL_F_NO_INTERRUPT);
    q.enable_interrupts();
    assert_eq!(flags(&q), 0);
}

#[test]
fn indices_wrap_at_65536_and_ring_places_with_them() {
    let mut q = queue(4, feature::EVENT_IDX);
    for i in 0..70_000u32 {
        let head = q.add(&ONE, Table::AsLinux, i).unwrap();
        device_uses(&q, i as u16, head.into(), i);
        assert_eq!(
            q.pop(),
            Some(Used {
                token: i,
                len: Some(i)
            })
        );
    }
    assert_eq!(q.avail_idx(), 70_000u32 as u16);
    assert!(q.violations().is_empty());
}

#[test]
fn an_in_order_device_may_use_a_batch_with_one_element() {
    let mut q = queue(8, feature::IN_ORDER);
    q.add(&ONE, Table::AsLinux, 10).unwrap();
    q.add(&ONE, Table::AsLinux, 11).unwrap();
    let third = q.add(&ONE, Table::AsLinux, 12).unwrap();
    // One element at the batch's first place; the index jumps by three.
    device_uses(&q, 0, third.into(), 9);
    q.write_used_idx(3);
    let popped: Vec<Used> = std::iter::from_fn(|| q.pop()).collect();
    let expected = [(10, None), (11, None), (12, Some(9))];
    assert_eq!(popped, expected.map(|(token, len)| Used { token, len }));
    assert!(q.violations().is_empty());
}

#[test]
fn faults_of_the_device_are_named() {
    let mut q = queue(8, feature::IN_ORDER);
    q.add(&ONE, Table::AsLinux, 0).unwrap();
    let second = q.add(&ONE, Table::AsLinux, 1).unwrap();
    device_uses(&q, 0, second.into(), 0);
    assert_eq!(q.pop().unwrap().token, 1);
    assert_eq!(q.violations().count(Violation::UsedOutOfOrder), 1);

    device_uses(&q, 1, 7, 0);
    assert_eq!(q.pop(), None, "no chain has head 7");
    assert_eq!(q.violations().count(Violation::UsedUnknownId), 1);

    q.write_used_idx(300);
    q.pop();
    assert!(q.violations().count(Violation::UsedIndexJump) >= 1);
}

#[test]
fn a_reset_ring_starts_over() {
    let mut q = queue(8, feature::EVENT_IDX);
    q.add(&THREE, Table::AsLinux, 0).unwrap();
    q.reset();
    assert_eq!(
        (q.free(), q.avail_idx(), q.used_idx(), q.outstanding()),
        (8, 0, 0, 0)
    );
    assert!(q.add(&THREE, Table::AsLinux, 0).is_ok());
}
