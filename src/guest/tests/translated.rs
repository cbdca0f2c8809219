//! Rings and buffers behind an IOMMU: the same scenarios, and what happens where a translation is missing.

use std::collections::BTreeSet;
use std::time::Instant;

use proptest::prelude::*;

use super::driver::{
    AVAIL, BUFFERS, Buf, DESC, Driver, HIGH, HOLE, PAGE, Ram, TABLES, USED, header, page, pattern, r,
    scattered, translated, w,
};
use crate::guest::dirty::testing::TestLog;
use crate::guest::{
    Access, Finished, Mapping, MemoryFault, Miss, Permission, Ring, RingArea, RingError, RingFault,
    RingPosition, RxBurst, TxBurst,
};

/// Runs scenarios of other files with every page of the guest somewhere else.
macro_rules! behind_an_iommu {
    ($($module:ident { $($scenario:ident,)* })*) => {
        $(mod $module {
            $(
                #[test]
                fn $scenario() {
                    super::translated(super::super::$module::$scenario);
                }
            )*
        })*
    };
}

behind_an_iommu! {
    tx {
        linux_6_1_sends_a_header_and_one_buffer,
        linux_6_12_cuts_at_32_kib_and_need_not_align,
        msg_zerocopy_sends_17_page_fragments,
        header_and_payload_may_share_a_buffer,
        a_header_may_be_cut_anywhere,
        empty_buffers_mean_nothing_wherever_they_point,
        buffers_may_lie_across_regions,
        an_indirect_table_may_lie_across_regions,
        indices_wrap,
        a_burst_sees_what_is_made_available_while_it_runs,
        a_header_that_changes_after_it_was_read_is_not_seen,
        a_dropped_burst_has_used_what_it_took,
        a_position_with_chains_in_flight_goes_on_at_the_used_index,
        bursts_allocate_nothing_in_steady_state,
        a_fault_costs_one_chain,
    }
    rx {
        buffers_of_every_kernel,
        a_header_slot_may_be_cut_anywhere,
        chains_of_very_many_descriptors_are_not_held_by_the_dozen,
        one_read_makes_several_packets_and_gives_the_rest_back_in_place,
        nothing_read_takes_nothing,
        a_ring_without_buffers_says_so,
        bytes_read_earlier_go_before_those_read_now,
        a_list_that_is_full_reads_less,
        a_buffer_without_payload_room_takes_control_packets_but_no_data,
        a_malformed_chain_waits_its_turn_and_is_counted_once,
        a_dropped_burst_shows_what_was_committed,
        bursts_allocate_nothing_in_steady_state,
    }
    notify {
        event_idx_one_interrupt_for_a_burst_that_passes_used_event,
        event_idx_windows_of_bursts_join,
        without_event_idx_the_flag_decides,
        rx_shows_all_packets_with_one_interrupt,
        kicks_are_asked_for_and_suppressed,
        a_flag_that_someone_left_behind_is_written_over,
        no_wake_up_is_lost,
    }
    hostile {
        tolerated_what_harms_nobody,
        an_available_index_that_makes_no_sense_stops_the_ring,
        a_driver_that_reuses_chains_before_it_has_them_back_stops_the_ring,
        an_index_that_goes_backwards_stops_the_ring,
        rings_may_lie_across_regions,
    }
}

fn miss(addr: u64, access: Access) -> Miss {
    Miss {
        iova: addr & !(PAGE - 1),
        access,
    }
}

fn sent(ram: &mut Ram) -> Vec<Miss> {
    ram.iotlb().take_misses(Instant::now())
}

/// Nothing is mapped any more.
fn unmap_all(ram: &mut Ram) {
    ram.iotlb().invalidate(0, u64::MAX);
}

fn unmap(ram: &mut Ram, addr: u64) {
    let first = addr & !(PAGE - 1);
    ram.iotlb().invalidate(first, first + (PAGE - 1));
}

/// A VMM that maps what there is of memory and refuses the rest, or what `refuses` says.
fn answer(ram: &mut Ram, misses: &[Miss], refuses: impl Fn(&Miss) -> bool) {
    for miss in misses {
        let is_memory = miss.iova < HOLE || (HIGH..2 * HIGH).contains(&miss.iova);
        let refused = !is_memory || refuses(miss);
        if !refused {
            ram.iotlb().insert(page(miss.iova));
        }
        ram.iotlb().answered(*miss, refused);
    }
}

/// All packets that are there.
fn take(ring: &mut Ring, ram: &Ram) -> Result<(Vec<Vec<u8>>, Finished), RingError> {
    let mut burst = TxBurst::begin(ring, ram)?;
    let mut packets = Vec::new();
    while let Some(popped) = burst.pop() {
        let Ok(packet) = popped else { continue };
        let mut bytes = packet.header.to_vec();
        for slice in packet.payload(u32::MAX) {
            let at = bytes.len();
            bytes.resize(at + slice.len(), 0);
            slice.copy_to(&mut bytes[at..]);
        }
        packets.push(bytes);
    }
    burst.finish().map(|finished| (packets, finished))
}

/// One packet to the guest, if there is a buffer for it.
fn give(ring: &mut Ring, ram: &Ram, payload: &[u8]) -> Result<Finished, RingError> {
    let mut burst = RxBurst::begin(ring, ram)?;
    if burst.reserve(payload.len(), 64)? >= payload.len() {
        assert_eq!(burst.fill(payload), payload.len());
        burst.commit(0, |_| header(9))?;
    }
    burst.finish()
}

fn awaits<T: std::fmt::Debug>(result: Result<T, RingError>) -> bool {
    result.is_err_and(|error| error.awaits_translation())
}

/// A packet whose every part is on a page of its own: table, header, three pages of payload.
const PARTS: [(&str, u64, Access); 5] = [
    ("indirect table", TABLES, Access::Read),
    ("header", BUFFERS, Access::Read),
    ("payload", BUFFERS + 2 * PAGE, Access::Read),
    ("payload", BUFFERS + 3 * PAGE, Access::Read),
    ("payload", BUFFERS + 4 * PAGE, Access::Read),
];
const RING: [(&str, u64, Access); 3] = [
    ("descriptor table", DESC, Access::Read),
    ("available ring", AVAIL, Access::Read),
    ("used ring", USED, Access::Write),
];

fn bufs(buf: fn(u64, u32) -> Buf) -> [Buf; 2] {
    [
        buf(BUFFERS + 100, 44),
        buf(BUFFERS + 3 * PAGE - 10, PAGE as u32 + 20),
    ]
}

/// A driver that has sent such a packet, and its bytes.
fn with_packet() -> (Driver, Vec<u8>) {
    let mut driver = Driver::new(8, true);
    let bytes = [&header(1)[..], &pattern(PAGE as usize + 20)].concat();
    let [first, second] = bufs(r);
    driver.put(first.addr, &bytes[..44]);
    driver.put(second.addr, &bytes[44..]);
    driver.offer_indirect(&[], &[first, second]);
    (driver, bytes)
}

/// A driver that waits for such a packet.
fn with_buffer() -> Driver {
    let mut driver = Driver::new(8, true);
    driver.offer_indirect(&[], &bufs(w));
    driver
}

#[test]
fn tx_waits_for_each_page_in_turn_and_goes_on() {
    translated(|| {
        for (what, addr, access) in RING.into_iter().chain(PARTS) {
            let (mut driver, bytes) = with_packet();
            let (mut ring, mut ram) = (driver.ring(), driver.ram.clone());
            unmap(&mut ram, addr);
            // As often as it is woken up for something else.
            for time in 0..3 {
                match take(&mut ring, &ram) {
                    Err(error) => assert!(error.awaits_translation(), "{what}: {error}"),
                    Ok((packets, finished)) => {
                        assert!(packets.is_empty(), "{what}");
                        assert_eq!((finished.used, finished.parked), (0, true), "{what}");
                    }
                }
                let asked = if time == 0 {
                    vec![miss(addr, access)]
                } else {
                    vec![]
                };
                assert_eq!(sent(&mut ram), asked, "{what}");
            }
            assert_eq!(driver.used(), [], "{what}");
            ram.iotlb().insert(page(addr));
            let (packets, finished) = take(&mut ring, &ram).unwrap();
            assert_eq!(packets, [bytes], "{what}");
            assert_eq!((finished.used, finished.parked), (1, false), "{what}");
            assert_eq!(driver.used(), [(0, 0)]);
            assert_eq!(ring.take_faults().total(), 0, "{what}");
        }
    });
}

#[test]
fn rx_waits_for_each_page_in_turn_and_goes_on() {
    translated(|| {
        let parts = PARTS.map(|(what, addr, _)| match what {
            "indirect table" => (what, addr, Access::Read),
            _ => (what, addr, Access::Write),
        });
        for (what, addr, access) in RING.into_iter().chain(parts) {
            let mut driver = with_buffer();
            let (mut ring, mut ram) = (driver.ring(), driver.ram.clone());
            let payload = pattern(PAGE as usize + 20);
            unmap(&mut ram, addr);
            for time in 0..3 {
                match give(&mut ring, &ram, &payload) {
                    Err(error) => assert!(error.awaits_translation(), "{what}: {error}"),
                    Ok(finished) => assert_eq!((finished.used, finished.parked), (0, true), "{what}"),
                }
                let asked = if time == 0 {
                    vec![miss(addr, access)]
                } else {
                    vec![]
                };
                assert_eq!(sent(&mut ram), asked, "{what}");
            }
            assert_eq!(driver.used(), [], "{what}");
            ram.iotlb().insert(page(addr));
            let finished = give(&mut ring, &ram, &payload).unwrap();
            assert_eq!((finished.used, finished.parked), (1, false), "{what}");
            assert_eq!(driver.used(), [(0, 44 + payload.len() as u32)]);
            let [first, second] = bufs(w);
            assert_eq!(driver.bytes(first.addr, 44), header(9));
            assert_eq!(driver.bytes(second.addr, payload.len()), payload, "{what}");
        }
    });
}

#[test]
fn no_more_permission_is_needed_than_was_asked_for() {
    translated(|| {
        for write in [false, true] {
            let (mut driver, bytes) = if write {
                (with_buffer(), Vec::new())
            } else {
                with_packet()
            };
            let (mut ring, mut ram) = (driver.ring(), driver.ram.clone());
            unmap_all(&mut ram);
            for (what, addr, access) in RING.into_iter().chain(PARTS) {
                let permission = match access {
                    Access::Read if what != "indirect table" && write && addr >= BUFFERS => Permission::Write,
                    Access::Read => Permission::Read,
                    Access::Write => Permission::Write,
                };
                ram.iotlb().insert(Mapping {
                    permission,
                    ..page(addr)
                });
            }
            if write {
                assert_eq!(give(&mut ring, &ram, b"hello").unwrap().used, 1);
            } else {
                assert_eq!(take(&mut ring, &ram).unwrap().0, [bytes]);
            }
            assert_eq!(driver.used().len(), 1);
            assert_eq!(sent(&mut ram), []);
        }
    });
}

/// Areas of a ring of 1024 that begin in the middle of a page: 5, 2 and 3 pages, none beside the other in memory.
fn scattered_ring(driver: &Driver) -> (Ring, Vec<Miss>) {
    let (mut parts, _kick, _call) = driver.parts();
    parts.desc = 0x10_1ff0;
    parts.avail = 0x10_8ffe;
    parts.used = 0x10_9ffc;
    let pages = |addr: u64, len: u64, access| {
        (addr / PAGE..=(addr + len - 1) / PAGE).map(move |page| miss(page * PAGE, access))
    };
    let misses = pages(parts.desc, 16 * 1024, Access::Read)
        .chain(pages(parts.avail, 6 + 2 * 1024, Access::Read))
        .chain(pages(parts.used, 6 + 8 * 1024, Access::Write))
        .collect();
    (Ring::new(parts).unwrap(), misses)
}

#[test]
fn a_ring_asks_for_all_of_its_pages_at_once() {
    translated(|| {
        let driver = Driver::new(1024, true);
        let (mut ring, pages) = scattered_ring(&driver);
        assert_eq!(pages.len(), 5 + 2 + 4);
        let mut ram = driver.ram.clone();
        unmap_all(&mut ram);
        assert!(awaits(ring.check(&ram)));
        assert!(awaits(ring.enable_notifications(&ram)));
        let misses = sent(&mut ram);
        let set = |misses: &[Miss]| misses.iter().map(|m| (m.iova, m.access)).collect::<BTreeSet<_>>();
        assert_eq!(set(&misses), set(&pages));
        assert_eq!(misses.len(), pages.len());
        answer(&mut ram, &misses, |_| false);
        assert_eq!(ring.check(&ram), Ok(()));
        assert_eq!(sent(&mut ram), []);
    });
}

#[test]
fn a_ring_on_scattered_pages_comes_round_and_allocates_nothing() {
    translated(|| {
        let mut driver = Driver::new(1024, true);
        let (mut ring, _) = scattered_ring(&driver);
        let ram = driver.ram.clone();
        let mut allocation = None;
        // Twice round, so that every element of each area is used.
        for i in 0..2048u16 {
            let slot = i % 1024;
            let bytes = header(i as u8);
            driver.put(BUFFERS + 64, &bytes);
            let mut descriptor = [0; 16];
            descriptor[..8].copy_from_slice(&(BUFFERS + 64).to_le_bytes());
            descriptor[8..12].copy_from_slice(&44u32.to_le_bytes());
            driver.put(0x10_1ff0 + 16 * u64::from(slot), &descriptor);
            driver.put(0x10_8ffe + 4 + 2 * u64::from(slot), &slot.to_le_bytes());
            driver.put(0x10_8ffe + 2, &(i + 1).to_le_bytes());
            let (packets, finished) = take(&mut ring, &ram).unwrap();
            assert_eq!((packets, finished.used), (vec![bytes.to_vec()], 1), "{i}");
            let used = driver.bytes(0x10_9ffc + 4 + 8 * u64::from(slot), 8);
            assert_eq!(used[..4], u32::from(slot).to_le_bytes(), "{i}");
            assert_eq!(driver.bytes(0x10_9ffc + 2, 2), (i + 1).to_le_bytes());
            assert_eq!(ring.enable_notifications(&ram), Ok(false));
            let now = ring.areas_allocation();
            assert_eq!(*allocation.get_or_insert(now), now, "{i}");
            assert!(now.1 >= 8);
        }
        driver.used_idx = 2048;
        assert_eq!(
            ring.position(),
            RingPosition {
                next_avail: 2048,
                next_used: 2048
            }
        );
    });
}

#[test]
fn the_used_index_is_read_when_it_can_be() {
    translated(|| {
        // 40 were used; a VMM that knows no better says 43, the available index.
        let mut driver = Driver::at(8, true, 40);
        for i in 0..3u8 {
            driver.put(BUFFERS + 64 * u64::from(i), &header(i));
            driver.offer(&[r(BUFFERS + 64 * u64::from(i), 44)]);
        }
        let (mut parts, _kick, _call) = driver.parts();
        let given = RingPosition {
            next_avail: 43,
            next_used: 43,
        };
        parts.position = given;
        let mut ring = Ring::new(parts).unwrap();
        let mut ram = driver.ram.clone();
        unmap_all(&mut ram);
        assert!(awaits(take(&mut ring, &ram)));
        assert_eq!(ring.position(), given, "stopped now, nothing would be lost");
        let misses = sent(&mut ram);
        answer(&mut ram, &misses, |_| false);
        // A look changes nothing.
        assert_eq!(ring.available(&ram), Ok(3));
        assert_eq!(ring.position(), given);
        // Whoever served it before may have owed an interrupt.
        let mut interrupt = true;
        loop {
            let (packets, finished) = take(&mut ring, &ram).unwrap();
            assert_eq!(std::mem::take(&mut interrupt), finished.interrupt);
            if !finished.parked {
                assert_eq!(packets.len(), 3);
                break;
            }
            let misses = sent(&mut ram);
            answer(&mut ram, &misses, |_| false);
        }
        assert_eq!(driver.used().len(), 3);
        // Read once: what the memory says later is of our own making, or somebody else's.
        unmap_all(&mut ram);
        assert!(awaits(ring.check(&ram)));
        driver.put(USED + 2, &7u16.to_le_bytes());
        let misses = sent(&mut ram);
        answer(&mut ram, &misses, |_| false);
        assert_eq!(ring.available(&ram), Ok(0));
        assert_eq!(ring.position().next_used, 43);
    });
}

#[test]
fn a_used_index_that_cannot_be_breaks_the_ring() {
    translated(|| {
        let driver = Driver::at(8, true, 40);
        driver.put(USED + 2, &10u16.to_le_bytes());
        let (mut ring, ram) = (driver.ring(), driver.ram.clone());
        let error = RingError::AvailIndex {
            avail: 40,
            used: 10,
            size: 8,
        };
        assert_eq!(ring.check(&ram), Err(error));
        assert_eq!(take(&mut ring, &ram).unwrap_err(), error);
        assert!(!error.awaits_translation());
    });
}

#[test]
fn a_ring_whose_page_is_refused_is_broken_until_the_vmm_speaks_of_it() {
    translated(|| {
        let (driver, bytes) = with_packet();
        let (mut ring, mut ram) = (driver.ring(), driver.ram.clone());
        unmap_all(&mut ram);
        assert!(awaits(ring.check(&ram)));
        let misses = sent(&mut ram);
        answer(&mut ram, &misses, |miss| miss.access == Access::Write);
        let error = RingError::Memory {
            area: RingArea::Used,
            fault: MemoryFault::Refused { iova: USED },
        };
        for _ in 0..3 {
            assert_eq!(take(&mut ring, &ram).unwrap_err(), error);
            assert!(!error.awaits_translation());
            assert_eq!(sent(&mut ram), []);
        }
        // Told first, though other areas only wait.
        unmap(&mut ram, DESC);
        assert_eq!(take(&mut ring, &ram).unwrap_err(), error);
        ram.iotlb().insert(page(USED));
        loop {
            if let Ok((packets, Finished { parked: false, .. })) = take(&mut ring, &ram) {
                assert_eq!(packets, [bytes]);
                break;
            }
            let misses = sent(&mut ram);
            assert_ne!(misses, []);
            answer(&mut ram, &misses, |_| false);
        }
    });
}

#[test]
fn a_refusal_costs_one_chain_and_is_asked_for_again_by_the_next() {
    translated(|| {
        let mut driver = Driver::new(8, true);
        let (good, bad) = (BUFFERS, BUFFERS + 16 * PAGE);
        driver.put(good, &header(1));
        driver.put(bad, &header(2));
        driver.offer(&[r(good, 44)]);
        driver.offer(&[r(good, 44), r(bad, 3 * PAGE as u32)]);
        driver.offer(&[r(good, 44)]);
        let (mut ring, mut ram) = (driver.ring(), driver.ram.clone());
        for i in 0..3 {
            unmap(&mut ram, bad + i * PAGE);
        }
        let (packets, finished) = take(&mut ring, &ram).unwrap();
        assert_eq!((packets.len(), finished.used, finished.parked), (1, 1, true));
        let misses = sent(&mut ram);
        assert_eq!(misses, [0, 1, 2].map(|i| miss(bad + i * PAGE, Access::Read)));
        // One answer is not enough to judge: the others are still due.
        answer(&mut ram, &misses[1..2], |_| true);
        assert!(take(&mut ring, &ram).unwrap().1.parked);
        answer(&mut ram, &misses[..1], |_| false);
        assert!(take(&mut ring, &ram).unwrap().1.parked);
        answer(&mut ram, &misses[2..], |_| true);
        assert_eq!(sent(&mut ram), []);
        let (packets, finished) = take(&mut ring, &ram).unwrap();
        assert_eq!((packets.len(), finished.used, finished.parked), (1, 2, false));
        assert_eq!(driver.used(), [(0, 0), (1, 0), (3, 0)]);
        let faults: Vec<_> = ring.take_faults().iter().collect();
        assert_eq!(faults, [(RingFault::TranslationRefused, 1)]);
        assert_eq!(ram.iotlb().stats().faults_read, 2);

        // Linux uses the addresses again, properly mapped, and nobody has told us.
        driver.offer(&[r(bad, 3 * PAGE as u32)]);
        assert!(take(&mut ring, &ram).unwrap().1.parked);
        let misses = sent(&mut ram);
        assert_eq!(misses, [1, 2].map(|i| miss(bad + i * PAGE, Access::Read)));
        answer(&mut ram, &misses, |_| false);
        assert_eq!(take(&mut ring, &ram).unwrap().0.len(), 1);
    });
}

#[test]
fn a_burst_ends_before_the_chain_that_waits_and_looks_ahead() {
    translated(|| {
        let mut driver = Driver::new(64, true);
        let at = |i: u64| BUFFERS + 2 * i * PAGE;
        for i in 0..30 {
            driver.offer(&[w(at(i), 44 + 100)]);
        }
        let (mut ring, mut ram) = (driver.ring(), driver.ram.clone());
        for i in 2..30 {
            unmap(&mut ram, at(i));
        }
        let mut burst = RxBurst::begin(&mut ring, &ram).unwrap();
        assert_eq!(burst.has_buffer(), Ok(true));
        assert_eq!(
            burst.reserve(1000, 64),
            Ok(200),
            "two chains, and the third waits"
        );
        assert_eq!(burst.fill(&[7; 100]), 100);
        assert_eq!(burst.commit(0, |_| header(1)), Ok(1));
        assert_eq!(burst.has_buffer(), Ok(true), "the second chain is there");
        assert_eq!(burst.control(&header(2)), Ok(true));
        assert_eq!(burst.has_buffer(), Ok(false));
        assert_eq!(burst.control(&header(3)), Ok(false));
        assert_eq!(burst.reserve(1, 1), Ok(0));
        let finished = burst.finish().unwrap();
        assert_eq!((finished.used, finished.parked), (2, true));
        assert_eq!(driver.used(), [(0, 144), (1, 44)]);
        // It, and those behind it: a round trip moves more than one packet.
        let misses = sent(&mut ram);
        assert_eq!(
            misses,
            (2..18).map(|i| miss(at(i), Access::Write)).collect::<Vec<_>>()
        );
        // Answers in any order: what is behind waits for what is before.
        answer(&mut ram, &misses[1..], |_| false);
        assert!(give(&mut ring, &ram, b"x").unwrap().parked);
        assert_eq!(sent(&mut ram), []);
        answer(&mut ram, &misses[..1], |_| false);
        let mut burst = RxBurst::begin(&mut ring, &ram).unwrap();
        assert_eq!(burst.reserve(1600, 64), Ok(1600));
        // What is held goes back in place, and then the next chain does not wait.
        assert!(!burst.finish().unwrap().parked);
    });
}

#[test]
fn a_chain_held_before_the_one_that_waits_is_not_parked() {
    translated(|| {
        let mut driver = Driver::new(8, true);
        driver.offer(&[w(BUFFERS, 144)]);
        driver.offer(&[w(BUFFERS + 2 * PAGE, 144)]);
        let (mut ring, mut ram) = (driver.ring(), driver.ram.clone());
        unmap(&mut ram, BUFFERS + 2 * PAGE);
        let mut burst = RxBurst::begin(&mut ring, &ram).unwrap();
        assert_eq!(burst.reserve(200, 8), Ok(100));
        let finished = burst.finish().unwrap();
        assert_eq!((finished.used, finished.parked), (0, false));
        assert_eq!(sent(&mut ram).len(), 1, "asked for all the same");
    });
}

/// Tricks that cost one chain behind an IOMMU, too; and addresses that no VMM translates cost no more.
#[test]
fn tricks_cost_one_chain_each() {
    translated(|| {
        for trick in super::hostile::tricks::<0>() {
            let mut driver = Driver::new(8, true);
            (trick.play)(&mut driver);
            driver.put(BUFFERS + PAGE, &header(5));
            driver.descriptor(7, r(BUFFERS + PAGE, 44), 0);
            driver.offer_head(7);
            let (mut ring, mut ram) = (driver.ring(), driver.ram.clone());
            unmap_all(&mut ram);
            let mut packets = Vec::new();
            let mut rounds = 0;
            while packets.is_empty() {
                match take(&mut ring, &ram) {
                    Ok((more, _)) => packets = more,
                    Err(error) => assert!(error.awaits_translation(), "{}: {error}", trick.name),
                }
                let misses = sent(&mut ram);
                answer(&mut ram, &misses, |_| false);
                rounds += 1;
                assert!(rounds < 100, "{}", trick.name);
            }
            assert_eq!(packets, [header(5)], "{}", trick.name);
            assert_eq!(driver.used().len(), 2, "{}", trick.name);
            let fault = match trick.fault {
                RingFault::AddressUnmapped => RingFault::TranslationRefused,
                // 4 GiB are too many pages before they are too many bytes.
                RingFault::ChainTooBig => RingFault::TooManyPieces,
                fault => fault,
            };
            let faults: Vec<_> = ring.take_faults().iter().collect();
            assert_eq!(faults, [(fault, 1)], "{}", trick.name);
        }
    });
}

#[test]
fn a_chain_of_too_many_pages_goes_back() {
    translated(|| {
        for write in [false, true] {
            let mut driver = Driver::new(8, true);
            // 2048 pages are served, one more is not.
            let buf = if write { w } else { r };
            driver.offer(&[buf(HIGH, 2048 * PAGE as u32)]);
            driver.offer(&[buf(HIGH, 2048 * PAGE as u32), buf(HIGH, 1)]);
            driver.offer(&[buf(HIGH + 100, 2048 * PAGE as u32)]);
            driver.offer(&[buf(BUFFERS, 44)]);
            let (mut ring, mut ram) = (driver.ring(), driver.ram.clone());
            for i in 0..2049 {
                ram.iotlb().insert(page(HIGH + i * PAGE));
            }
            let used = if write {
                let mut burst = RxBurst::begin(&mut ring, &ram).unwrap();
                for ok in [true, true, false] {
                    assert_eq!(burst.control(&header(0)), Ok(ok));
                }
                burst.finish().unwrap().used
            } else {
                let mut burst = TxBurst::begin(&mut ring, &ram).unwrap();
                for ok in [true, false, false, true] {
                    assert_eq!(burst.pop().unwrap().is_ok(), ok);
                }
                burst.finish().unwrap().used
            };
            assert_eq!(used, 4);
            let faults: Vec<_> = ring.take_faults().iter().collect();
            assert_eq!(faults, [(RingFault::TooManyPieces, 2)]);
        }
    });
}

/// A guest that sends what it never mapped, 8 MiB of it: it is asked for a part, refused, and that was it.
#[test]
fn a_huge_chain_over_nothing_costs_a_bounded_number_of_questions() {
    translated(|| {
        let mut driver = Driver::new(8, true);
        driver.offer(&[r(1 << 40, u32::MAX)]);
        let many: Vec<_> = (0..1024).map(|i| r((1 << 41) + i * 2 * PAGE, 44)).collect();
        driver.offer_indirect(&[], &many);
        let (mut ring, mut ram) = (driver.ring(), driver.ram.clone());
        let mut asked = 0;
        while driver.used().len() < 2 {
            take(&mut ring, &ram).unwrap();
            let misses = sent(&mut ram);
            asked += misses.len();
            answer(&mut ram, &misses, |_| false);
            driver.used_idx = 0;
        }
        assert!(asked <= 2 * 64, "{asked}");
        let faults: Vec<_> = ring.take_faults().iter().collect();
        assert_eq!(faults, [(RingFault::TranslationRefused, 2)]);
    });
}

#[test]
fn the_dirty_log_is_of_memory_not_of_iovas() {
    translated(|| {
        let mut driver = with_buffer();
        let (mut ring, ram) = (driver.ring(), driver.ram.clone());
        let log = TestLog::install(&driver.mem);
        give(&mut ring, &ram, &pattern(PAGE as usize)).unwrap();
        let [_, second] = bufs(w);
        let mut want: Vec<_> = [USED, BUFFERS, second.addr, second.addr + 10]
            .map(|iova| scattered(iova) / PAGE)
            .to_vec();
        want.sort_unstable();
        assert_eq!(log.take(), want);
        assert_eq!(driver.used().len(), 1);
    });
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    /// A VMM that maps what is asked for, late, in any order, and unmaps anything at any time: the bytes are the same, and all
    /// of them come.
    #[test]
    fn all_packets_come_whatever_is_unmapped_meanwhile(
        packets in prop::collection::vec((0..20_000usize, 1..9000u32, any::<bool>()), 1..8),
        fate in prop::collection::vec((any::<u16>(), any::<u8>()), 1..60),
    ) {
        translated(|| {
            let mut driver = Driver::new(64, true);
            let mut want = Vec::new();
            let mut at = BUFFERS;
            for (i, (len, cut, indirect)) in packets.iter().enumerate() {
                let bytes = [&header(i as u8)[..], &pattern(*len)].concat();
                let mut bufs = Vec::new();
                for part in bytes.chunks((*cut as usize).max(bytes.len() / 7 + 1)) {
                    driver.put(at, part);
                    bufs.push(r(at, part.len() as u32));
                    at += part.len() as u64 + 100;
                }
                if *indirect {
                    driver.offer_indirect(&[], &bufs);
                } else {
                    driver.offer(&bufs);
                }
                want.push(bytes);
            }
            let (mut ring, mut ram) = (driver.ring(), driver.ram.clone());
            unmap_all(&mut ram);
            let mut due: Vec<Miss> = Vec::new();
            let mut got = Vec::new();
            let mut fate = fate.into_iter();
            let mut rounds = 0;
            while got.len() < want.len() {
                match take(&mut ring, &ram) {
                    Ok((packets, finished)) => {
                        got.extend(packets);
                        prop_assert!(finished.parked || got.len() == want.len());
                    }
                    Err(error) => prop_assert!(error.awaits_translation(), "{}", error),
                }
                for miss in sent(&mut ram) {
                    prop_assert!(!due.contains(&miss), "asked twice: {:?}", miss);
                    due.push(miss);
                }
                match fate.next() {
                    // Some of them, the last first.
                    Some((which, n)) if which % 4 != 0 => {
                        for _ in 0..usize::from(n).min(due.len()) {
                            let miss = due.swap_remove(usize::from(which) % due.len());
                            answer(&mut ram, &[miss], |_| false);
                        }
                    }
                    Some((which, n)) => {
                        let first = u64::from(which) * 64;
                        ram.iotlb().invalidate(first, first + u64::from(n) * PAGE);
                    }
                    None => answer(&mut ram, &std::mem::take(&mut due), |_| false),
                }
                rounds += 1;
                prop_assert!(rounds < 1000, "it does not end");
            }
            prop_assert_eq!(got, want);
            prop_assert_eq!(driver.used().len(), packets.len());
            Ok(())
        })?;
    }
}
