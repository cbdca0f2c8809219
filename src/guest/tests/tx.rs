//! Packets from the guest, in the shapes that guests give them.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use super::driver::{BORDER, BUFFERS, Buf, Driver, HIGH, header, pattern, r};
use crate::guest::{Finished, RingFault, RingPosition, Slice, TxBurst};
use crate::sys::iovec::IoVecs;
use crate::sys::vectored::{readv, writev};

fn gather<'m>(slices: impl Iterator<Item = Slice<'m>>) -> Vec<u8> {
    let mut bytes = Vec::new();
    for slice in slices {
        let at = bytes.len();
        bytes.resize(at + slice.len(), 0);
        assert_eq!(slice.copy_to(&mut bytes[at..]), slice.len());
    }
    bytes
}

/// Puts `header` and `payload` one behind the other into the buffers of a chain.
fn place(driver: &Driver, bufs: &[Buf], header: &[u8; 44], payload: &[u8]) {
    let packet = [&header[..], payload].concat();
    let mut rest = &packet[..];
    for buf in bufs {
        let (now, later) = rest.split_at(rest.len().min(buf.len as usize));
        driver.put(buf.addr, now);
        rest = later;
    }
    assert!(rest.is_empty(), "the buffers are too small for the packet");
}

#[track_caller]
fn comes_out(bufs: &[Buf], indirect_from: Option<usize>, payload: &[u8]) {
    let mut driver = Driver::new(128, true);
    let sent = header(1);
    place(&driver, bufs, &sent, payload);
    let head = match indirect_from {
        None => driver.offer(bufs),
        Some(at) => driver.offer_indirect(&bufs[..at], &bufs[at..]),
    };
    let mut ring = driver.ring();
    let ram = driver.ram.clone();
    let mut burst = TxBurst::begin(&mut ring, &ram).unwrap();
    let packet = burst.pop().unwrap().unwrap();
    assert_eq!(packet.header, sent);
    assert_eq!(packet.payload_len as usize, payload.len());
    assert_eq!(gather(packet.payload(u32::MAX)), payload);
    // Any part of it, too.
    for (from, to) in [
        (0, 0),
        (0, 1),
        (1, 3),
        (4095, 4097),
        (100, payload.len()),
        (payload.len(), payload.len() + 9),
    ] {
        let want = payload.get(from..to.min(payload.len())).unwrap_or_default();
        assert_eq!(
            gather(packet.payload_from(from as u32, to as u32)),
            want,
            "{from}..{to}"
        );
    }
    assert!(burst.pop().is_none());
    assert_eq!(
        driver.used(),
        [],
        "the driver must not get a buffer back before the burst ends"
    );
    assert_eq!(burst.finish().unwrap().used, 1);
    assert_eq!(driver.used(), [(u32::from(head), 0)]);
}

#[test]
pub(super) fn linux_6_1_sends_a_header_and_one_buffer() {
    comes_out(
        &[r(BUFFERS, 44), r(BUFFERS + 0x1000, 65536)],
        None,
        &pattern(65536),
    );
    comes_out(&[r(BUFFERS, 44)], None, &[]);
}

#[test]
pub(super) fn linux_6_12_cuts_at_32_kib_and_need_not_align() {
    comes_out(&[r(BUFFERS, 44), r(BUFFERS + 44, 100)], None, &pattern(100));
    let bufs = [
        r(BUFFERS + 3, 44),
        r(BUFFERS + 0x1000, 32768),
        r(BUFFERS + 0x2_0001, 32768),
    ];
    comes_out(&bufs, None, &pattern(65536));
}

#[test]
pub(super) fn msg_zerocopy_sends_17_page_fragments() {
    let mut bufs = vec![r(BUFFERS, 44), r(BUFFERS + 0x1000 + 777, 4096 - 777)];
    bufs.extend((2..17).map(|i| r(BUFFERS + i * 0x2000, 4096)));
    bufs.push(r(BUFFERS + 17 * 0x2000, 777));
    assert_eq!(bufs.len(), 18);
    comes_out(&bufs, None, &pattern(65536));
    comes_out(&bufs, Some(0), &pattern(65536));
    comes_out(&bufs, Some(3), &pattern(65536));
}

#[test]
pub(super) fn header_and_payload_may_share_a_buffer() {
    comes_out(&[r(BUFFERS + 1, 44 + 1000)], None, &pattern(1000));
    comes_out(&[r(BUFFERS + 1, 44 + 1000)], Some(0), &pattern(1000));
}

#[test]
pub(super) fn a_header_may_be_cut_anywhere() {
    for cut in 1..44 {
        let bufs = [
            r(BUFFERS, cut),
            r(BUFFERS + 0x1000, 44 - cut + 10),
            r(BUFFERS + 0x2000, 10),
        ];
        comes_out(&bufs, None, &pattern(20));
    }
    let bytes: Vec<_> = (0..44 + 5).map(|i| r(BUFFERS + 3 * i, 1)).collect();
    comes_out(&bytes, None, &pattern(5));
    comes_out(&bytes, Some(0), &pattern(5));
}

#[test]
pub(super) fn empty_buffers_mean_nothing_wherever_they_point() {
    let bufs = [
        r(0xdead_0000_0000, 0),
        r(BUFFERS, 44),
        r(u64::MAX, 0),
        r(BUFFERS + 64, 7),
        r(0, 0),
    ];
    comes_out(&bufs, None, &pattern(7));
}

#[test]
pub(super) fn buffers_may_lie_across_regions() {
    comes_out(&[r(BORDER - 20, 44 + 100)], None, &pattern(100)); // the border is in the header
    comes_out(&[r(BORDER - 44, 44 + 100)], None, &pattern(100)); // and just behind it
    comes_out(
        &[r(HIGH, 44), r(BORDER - 1, 2), r(HIGH + 100, 5)],
        None,
        &pattern(7),
    );
}

#[test]
pub(super) fn an_indirect_table_may_lie_across_regions() {
    let mut driver = Driver::new(16, true);
    let bufs = [r(BUFFERS, 44), r(BUFFERS + 0x1000, 9)];
    place(&driver, &bufs, &header(9), &pattern(9));
    // The table's second descriptor is cut in two by the border.
    let table = BORDER - 24;
    let entry = |buf: Buf, flags: u16, next: u16| {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&buf.addr.to_le_bytes());
        bytes[8..12].copy_from_slice(&buf.len.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        bytes
    };
    driver.put(table, &entry(bufs[0], 1, 1));
    driver.put(table + 16, &entry(bufs[1], 0, 0));
    driver.offer(&[Buf {
        addr: table,
        len: 32,
        flags: 4,
    }]);
    let (mut ring, ram) = (driver.ring(), driver.ram.clone());
    let mut burst = TxBurst::begin(&mut ring, &ram).unwrap();
    let packet = burst.pop().unwrap().unwrap();
    assert_eq!(packet.header, header(9));
    assert_eq!(gather(packet.payload(9)), pattern(9));
}

#[test]
pub(super) fn indices_wrap() {
    for size in [1, 2, 8] {
        let mut driver = Driver::at(size, true, 65534);
        let mut ring = driver.ring();
        for i in 0..5u8 {
            let at = BUFFERS + 64 * u64::from(i);
            driver.put(at, &header(i));
            driver.offer(&[r(at, 44)]);
            let ram = driver.ram.clone();
            assert_eq!(ring.available(&ram), Ok(1));
            let mut burst = TxBurst::begin(&mut ring, &ram).unwrap();
            assert_eq!(burst.pop().unwrap().unwrap().header, header(i));
            assert!(burst.pop().is_none());
            assert_eq!(burst.finish().unwrap().used, 1);
            assert_eq!(driver.used().len(), 1);
        }
        assert_eq!(
            ring.position(),
            RingPosition {
                next_avail: 3,
                next_used: 3
            }
        );
    }
}

#[test]
pub(super) fn payload_of_several_packets_leaves_in_one_call_and_is_the_guests_until_then() {
    let mut driver = Driver::new(64, true);
    let mut want = Vec::new();
    for i in 0..20u64 {
        let payload = pattern(100 + i as usize);
        let bufs = [
            r(BUFFERS + i * 0x1000, 44),
            r(BUFFERS + i * 0x1000 + 0x100, 100 + i as u32),
        ];
        place(&driver, &bufs, &header(i as u8), &payload);
        want.extend(payload);
        driver.offer(&bufs);
    }
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (mut ring, ram) = (driver.ring(), driver.ram.clone());
    let mut gathered = IoVecs::new();
    let mut burst = TxBurst::begin(&mut ring, &ram).unwrap();
    let mut n = 0;
    while let Some(packet) = burst.pop() {
        let packet = packet.unwrap();
        assert_eq!(packet.header, header(n));
        for slice in packet.payload(packet.payload_len) {
            assert!(gathered.push(&slice));
        }
        n += 1;
    }
    assert_eq!((n, gathered.len()), (20, 20));
    assert_eq!(writev(ours.as_fd(), &gathered).unwrap(), want.len());
    assert_eq!(burst.finish().unwrap().used, 20);
    // The list outlives the burst, as the memory does.
    assert_eq!(gathered.bytes(), want.len());

    let mut got = vec![0; want.len()];
    let all = vm_memory::VolatileSlice::from(&mut got[..]);
    let mut into = IoVecs::new();
    assert!(into.push(&all));
    assert_eq!(readv(theirs.as_fd(), &into).unwrap().bytes, want.len());
    assert_eq!(got, want);
    assert_eq!(driver.used(), (0..20).map(|i| (2 * i, 0)).collect::<Vec<_>>());
}

#[test]
pub(super) fn a_burst_sees_what_is_made_available_while_it_runs() {
    let mut driver = Driver::new(8, false);
    let mut ring = driver.ring();
    let ram = driver.ram.clone();
    let mut burst = TxBurst::begin(&mut ring, &ram).unwrap();
    assert!(burst.pop().is_none());
    driver.offer(&[r(BUFFERS, 44)]);
    assert!(burst.pop().unwrap().is_ok());
    assert!(burst.pop().is_none());
    assert_eq!(
        burst.finish(),
        Ok(Finished {
            used: 1,
            interrupt: true,
            parked: false
        })
    );
}

#[test]
pub(super) fn a_header_that_changes_after_it_was_read_is_not_seen() {
    let mut driver = Driver::new(8, false);
    driver.put(BUFFERS, &header(1));
    driver.offer(&[r(BUFFERS, 44), r(BUFFERS + 64, 4)]);
    let (mut ring, ram) = (driver.ring(), driver.ram.clone());
    let mut burst = TxBurst::begin(&mut ring, &ram).unwrap();
    let packet = burst.pop().unwrap().unwrap();
    // Another CPU of the guest rewrites the header, and the descriptors for good measure.
    driver.put(BUFFERS, &header(99));
    driver.descriptor(0, r(u64::MAX, u32::MAX), 7);
    driver.descriptor(1, r(0, u32::MAX), 7);
    assert_eq!(packet.header, header(1));
    assert_eq!(packet.payload_len, 4);
    assert_eq!(packet.payload(u32::MAX).map(|s| s.len()).sum::<usize>(), 4);
}

#[test]
pub(super) fn a_dropped_burst_has_used_what_it_took() {
    let mut driver = Driver::new(8, true);
    for i in 0..3 {
        driver.offer(&[r(BUFFERS + 64 * i, 44)]);
    }
    let (mut ring, ram) = (driver.ring(), driver.ram.clone());
    let mut burst = TxBurst::begin(&mut ring, &ram).unwrap();
    assert!(burst.pop().unwrap().is_ok());
    assert!(burst.pop().unwrap().is_ok());
    drop(burst);
    assert_eq!(driver.used(), [(0, 0), (1, 0)]);
    assert_eq!(ring.available(&ram), Ok(1));
    // The interrupt for those two (used_event is 0: at the first) is owed, and comes with the next burst that
    // finishes, though that one used nothing.
    let burst = TxBurst::begin(&mut ring, &ram).unwrap();
    assert_eq!(
        burst.finish(),
        Ok(Finished {
            used: 0,
            interrupt: true,
            parked: false
        })
    );
    let burst = TxBurst::begin(&mut ring, &ram).unwrap();
    assert_eq!(
        burst.finish(),
        Ok(Finished {
            used: 0,
            interrupt: false,
            parked: false
        })
    );
}

#[test]
pub(super) fn a_position_with_chains_in_flight_goes_on_at_the_used_index() {
    let mut driver = Driver::at(8, true, 40);
    for i in 0..3u8 {
        driver.put(BUFFERS + 64 * u64::from(i), &header(i));
        driver.offer(&[r(BUFFERS + 64 * u64::from(i), 44)]);
    }
    // A process died after it took all three and gave none back; the VMM tells the available index.
    let (mut parts, _kick, _call) = driver.parts();
    parts.position = RingPosition {
        next_avail: 43,
        next_used: 40,
    };
    let mut ring = crate::guest::Ring::new(parts).unwrap();
    let ram = driver.ram.clone();
    assert_eq!(ring.available(&ram), Ok(3));
    let mut burst = TxBurst::begin(&mut ring, &ram).unwrap();
    assert_eq!(burst.pop().unwrap().unwrap().header, header(0));
    let finished = burst.finish().unwrap();
    // It may have died between publishing and interrupting, so the first burst interrupts whatever used_event
    // says.
    assert!(finished.interrupt);
    assert_eq!(driver.used(), [(0, 0)]);
}

#[test]
pub(super) fn bursts_allocate_nothing_in_steady_state() {
    let mut driver = Driver::new(64, true);
    let mut ring = driver.ring();
    let mut allocation = None;
    for round in 0..50 {
        for i in 0..3 {
            let bufs: Vec<_> = (0..18)
                .map(|k| r(BUFFERS + i * 0x1_0000 + 0x1000 * k, 44))
                .collect();
            driver.offer(&bufs);
        }
        let ram = driver.ram.clone();
        let mut burst = TxBurst::begin(&mut ring, &ram).unwrap();
        while let Some(packet) = burst.pop() {
            assert_eq!(packet.unwrap().payload_len, 17 * 44);
        }
        assert_eq!(burst.finish().unwrap().used, 3);
        driver.used();
        let now = ring.scratch_allocation();
        assert_eq!(
            *allocation.get_or_insert(now),
            now,
            "round {round} moved the scratch"
        );
        assert!(now.1 >= 18);
    }
}

#[test]
pub(super) fn a_fault_costs_one_chain() {
    let mut driver = Driver::new(8, true);
    driver.put(BUFFERS, &header(1));
    driver.put(BUFFERS + 0x100, &header(2));
    driver.offer(&[r(BUFFERS, 44)]);
    driver.offer(&[r(BUFFERS, 43)]);
    driver.offer(&[r(BUFFERS + 0x100, 44)]);
    let (mut ring, ram) = (driver.ring(), driver.ram.clone());
    let mut burst = TxBurst::begin(&mut ring, &ram).unwrap();
    assert_eq!(burst.pop().unwrap().unwrap().header, header(1));
    assert_eq!(burst.pop().unwrap().unwrap_err(), RingFault::ChainTooShort);
    assert_eq!(burst.pop().unwrap().unwrap().header, header(2));
    assert!(burst.pop().is_none());
    assert_eq!(burst.finish().unwrap().used, 3);
    assert_eq!(driver.used(), [(0, 0), (1, 0), (2, 0)]);
    assert_eq!(
        ring.take_faults().iter().collect::<Vec<_>>(),
        [(RingFault::ChainTooShort, 1)]
    );
    assert_eq!(ring.take_faults().total(), 0);
}
