//! Packets to the guest.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use std::io::Write;

use super::driver::{BORDER, BUFFERS, Buf, Driver, HIGH, header, pattern, w};
use crate::guest::dirty::testing::TestLog;
use crate::guest::{Finished, RingFault, RxBurst};
use crate::sys::iovec::IoVecs;
use crate::sys::vectored::readv;

/// A header that tells its payload's length.
fn with_len(len: u32) -> [u8; 44] {
    let mut bytes = header(3);
    bytes[24..28].copy_from_slice(&len.to_le_bytes());
    bytes
}

/// What stands in a chain's buffers, `len` bytes of it.
fn packet(driver: &Driver, bufs: &[Buf], len: usize) -> Vec<u8> {
    let mut bytes: Vec<u8> = bufs
        .iter()
        .flat_map(|buf| driver.bytes(buf.addr, buf.len as usize))
        .collect();
    bytes.truncate(len);
    bytes
}

/// Sends `payload` into one chain of `bufs` through a socket, as the device does.
#[track_caller]
fn goes_in(bufs: &[Buf], indirect_from: Option<usize>, payload: &[u8]) {
    let mut driver = Driver::new(128, true);
    let head = match indirect_from {
        None => driver.offer(bufs),
        Some(at) => driver.offer_indirect(&bufs[..at], &bufs[at..]),
    };
    let room: usize = bufs.iter().map(|buf| buf.len as usize).sum::<usize>() - 44;
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    theirs.write_all(payload).unwrap();
    let (mut ring, ram) = (driver.ring(), driver.ram.clone());
    let mut burst = RxBurst::begin(&mut ring, &ram).unwrap();
    assert_eq!(burst.reserve(usize::MAX, 64), Ok(room));
    let mut list = IoVecs::new();
    assert_eq!(burst.push_payload(&mut list, usize::MAX), room);
    let n = readv(ours.as_fd(), &list).unwrap().bytes;
    assert_eq!(n, payload.len());
    assert_eq!(burst.commit(n, with_len), Ok(1));
    assert_eq!(driver.used(), [], "nothing is shown before the burst ends");
    assert_eq!(burst.finish().unwrap().used, 1);
    let len = 44 + payload.len();
    assert_eq!(driver.used(), [(u32::from(head), len as u32)]);
    assert_eq!(
        packet(&driver, bufs, len),
        [&with_len(payload.len() as u32)[..], payload].concat()
    );
}

#[test]
pub(super) fn buffers_of_every_kernel() {
    goes_in(&[w(BUFFERS, 44), w(BUFFERS + 0x1000, 4096)], None, &pattern(4096)); // <= 6.1 as written
    goes_in(&[w(BUFFERS, 3776)], None, &pattern(3732)); // 6.1 and 6.12 as measured
    goes_in(&[w(BUFFERS, 44 + 4096)], None, &pattern(17)); // 6.2 to 6.16
    goes_in(&[w(BUFFERS + 1, 44 + 65536)], None, &pattern(65536)); // large ones
    goes_in(&[w(BUFFERS, 44), w(BUFFERS + 0x1000, 4096)], Some(0), &pattern(5)); // indirect
}

#[test]
pub(super) fn a_header_slot_may_be_cut_anywhere() {
    for cut in 1..44 {
        goes_in(
            &[w(BUFFERS, cut), w(BUFFERS + 0x100, 44 - cut + 20)],
            None,
            &pattern(20),
        );
        goes_in(&[w(BORDER - u64::from(cut), 44 + 20)], None, &pattern(19));
    }
    let bytes: Vec<_> = (0..44 + 5).map(|i| w(BUFFERS + 3 * i, 1)).collect();
    goes_in(&bytes, None, &pattern(5));
    goes_in(
        &[w(HIGH, 0), w(HIGH, 43), w(u64::MAX, 0), w(BUFFERS, 2)],
        None,
        b"x",
    );
}

/// A ring with `n` buffers of 44 + 100 bytes.
fn ring_of(n: u64, event_idx: bool) -> (Driver, Vec<Buf>) {
    let mut driver = Driver::new(64, event_idx);
    let bufs: Vec<_> = (0..n).map(|i| w(BUFFERS + i * 0x1000, 144)).collect();
    for buf in &bufs {
        driver.offer(&[*buf]);
    }
    (driver, bufs)
}

/// A guest made each byte cost the walk through 64 chains of 1000 descriptors.
#[test]
pub(super) fn chains_of_very_many_descriptors_are_not_held_by_the_dozen() {
    let mut driver = Driver::new(1024, true);
    let mut bufs = vec![w(BUFFERS, 0); 1000];
    bufs.push(w(BUFFERS, 44 + 1));
    for _ in 0..64 {
        driver.offer_indirect(&[], &bufs);
    }
    let (mut ring, ram) = (driver.ring(), driver.ram.clone());
    let mut burst = RxBurst::begin(&mut ring, &ram).unwrap();
    assert_eq!(burst.reserve(64, 64), Ok(3));
}

#[test]
pub(super) fn one_read_makes_several_packets_and_gives_the_rest_back_in_place() {
    let (mut driver, bufs) = ring_of(8, true);
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let (mut ring, ram) = (driver.ring(), driver.ram.clone());
    let payload = pattern(250);
    theirs.write_all(&payload).unwrap();
    let mut burst = RxBurst::begin(&mut ring, &ram).unwrap();
    assert_eq!(burst.reserve(512, 64), Ok(600));
    let mut list = IoVecs::new();
    assert_eq!(burst.push_payload(&mut list, 512), 512);
    let n = readv(ours.as_fd(), &list).unwrap().bytes;
    let mut lens = Vec::new();
    let packets = burst.commit(n, |len| {
        lens.push(len);
        with_len(len)
    });
    assert_eq!(packets, Ok(3));
    assert_eq!(lens, [100, 100, 50]);
    // The fourth buffer is the next one, though it was reserved.
    assert_eq!(burst.control(&header(7)), Ok(true));
    assert_eq!(
        burst.finish().unwrap(),
        Finished {
            used: 4,
            interrupt: true,
            parked: false
        }
    );
    assert_eq!(driver.used(), [(0, 144), (1, 144), (2, 94), (3, 44)]);
    assert_eq!(
        packet(&driver, &bufs[2..3], 94),
        [&with_len(50)[..], &payload[200..]].concat()
    );
    assert_eq!(packet(&driver, &bufs[3..4], 44), header(7));
    assert_eq!(ring.available(&ram), Ok(4));
}

#[test]
pub(super) fn nothing_read_takes_nothing() {
    let (mut driver, _) = ring_of(4, true);
    let (mut ring, ram) = (driver.ring(), driver.ram.clone());
    let log = TestLog::install(&driver.mem);
    for _ in 0..3 {
        let mut burst = RxBurst::begin(&mut ring, &ram).unwrap();
        assert_eq!(burst.reserve(300, 64), Ok(300));
        assert_eq!(burst.commit(0, |_| panic!("no packet, no header")), Ok(0));
        assert_eq!(burst.reserve(usize::MAX, 2), Ok(200));
        // Held chains go back with the burst, finished or dropped.
        assert_eq!(
            burst.finish(),
            Ok(Finished {
                used: 0,
                interrupt: false,
                parked: false
            })
        );
        let mut burst = RxBurst::begin(&mut ring, &ram).unwrap();
        assert_eq!(burst.reserve(usize::MAX, 64), Ok(400));
        drop(burst);
        assert_eq!(ring.available(&ram), Ok(4));
    }
    assert_eq!(driver.used(), []);
    assert_eq!(log.take(), [0u64; 0]);
}

#[test]
pub(super) fn a_ring_without_buffers_says_so() {
    let (mut driver, _) = ring_of(1, false);
    let (mut ring, ram) = (driver.ring(), driver.ram.clone());
    let mut burst = RxBurst::begin(&mut ring, &ram).unwrap();
    assert_eq!(burst.control(&header(1)), Ok(true));
    assert_eq!(burst.control(&header(2)), Ok(false));
    assert_eq!(burst.reserve(1, 1), Ok(0));
    assert_eq!(burst.push_payload(&mut IoVecs::new(), 9), 0);
    assert_eq!(burst.fill(b"x"), 0);
    assert_eq!(burst.commit(0, with_len), Ok(0));
    // A buffer that comes meanwhile is seen.
    driver.offer(&[w(BUFFERS + 0x2000, 144)]);
    assert_eq!(burst.reserve(1, 1), Ok(100));
    assert_eq!(burst.finish().unwrap().used, 1);
    assert_eq!(driver.used(), [(0, 44)]);
}

#[test]
pub(super) fn bytes_read_earlier_go_before_those_read_now() {
    let (mut driver, bufs) = ring_of(4, true);
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    theirs.write_all(&pattern(80)).unwrap();
    let (mut ring, ram) = (driver.ring(), driver.ram.clone());
    let mut burst = RxBurst::begin(&mut ring, &ram).unwrap();
    assert_eq!(burst.reserve(250, 64), Ok(300));
    assert_eq!(burst.fill(&[b'a'; 90]), 90);
    assert_eq!(burst.fill(&[b'b'; 30]), 30);
    let mut list = IoVecs::new();
    assert_eq!(burst.push_payload(&mut list, 130), 130);
    let n = readv(ours.as_fd(), &list).unwrap().bytes;
    assert_eq!(burst.commit(n, with_len), Ok(2));
    // More than there is room for: the rest is told.
    assert_eq!(burst.reserve(100, 64), Ok(100));
    assert_eq!(burst.fill(&[b'c'; 101]), 100);
    assert_eq!(burst.commit(0, with_len), Ok(1));
    assert_eq!(burst.finish().unwrap().used, 3);
    assert_eq!(driver.used(), [(0, 144), (1, 144), (2, 144)]);
    let got: Vec<u8> = bufs[..3]
        .iter()
        .flat_map(|buf| packet(&driver, &[*buf], 144).split_off(44))
        .collect();
    assert_eq!(
        got,
        [&[b'a'; 90][..], &[b'b'; 30], &pattern(80), &[b'c'; 100]].concat()
    );
}

#[test]
pub(super) fn a_list_that_is_full_reads_less() {
    let mut driver = Driver::new(256, true);
    for i in 0..200 {
        driver.offer(&[w(BUFFERS + i * 64, 44 + 2)]);
    }
    let (mut ring, ram) = (driver.ring(), driver.ram.clone());
    let mut burst = RxBurst::begin(&mut ring, &ram).unwrap();
    assert_eq!(burst.reserve(400, 1000), Ok(400));
    let mut list = IoVecs::new();
    assert_eq!(burst.push_payload(&mut list, 400), 256);
    assert!(list.is_full());
    assert_eq!(burst.commit(256, with_len), Ok(128));
    assert_eq!(burst.finish().unwrap().used, 128);
}

#[test]
pub(super) fn the_dirty_log_names_what_was_written_and_nothing_else() {
    let mut driver = Driver::new(16, true);
    // Page 0x40: header, 0x41 and 0x42: payload. A second buffer likewise from page 0x43 on.
    driver.offer(&[w(BUFFERS, 44), w(BUFFERS + 0x1000, 0x2000)]);
    driver.offer(&[w(BUFFERS + 0x3000, 44), w(BUFFERS + 0x4000, 0x2000)]);
    driver.offer(&[w(HIGH, 44 + 0x1000)]);
    let (mut ring, ram) = (driver.ring(), driver.ram.clone());
    let log = TestLog::install(&driver.mem);
    let mut burst = RxBurst::begin(&mut ring, &ram).unwrap();
    burst.reserve(0x2fff, 64).unwrap();
    assert_eq!(log.take(), [0u64; 0], "reserving writes nothing");
    // One byte of the second payload page was read, and nothing of the second buffer.
    assert_eq!(burst.commit(0x1001, with_len), Ok(1));
    assert_eq!(
        log.take(),
        [0x9, 0x40, 0x41, 0x42],
        "used element, header, payload"
    );
    assert_eq!(burst.reserve(1, 1), Ok(0x2000));
    assert_eq!(burst.fill(&[1; 0x1000]), 0x1000);
    assert_eq!(log.take(), [0x44]);
    assert_eq!(burst.commit(1, with_len), Ok(1));
    assert_eq!(log.take(), [0x9, 0x43, 0x45], "not again what was filled in");
    assert_eq!(burst.control(&header(1)), Ok(true));
    assert_eq!(log.take(), [0x9, 0x400]);
    burst.finish().unwrap();
    assert_eq!(log.take(), [0x9], "the used index");
    ring.enable_notifications(&ram).unwrap();
    assert_eq!(log.take(), [0x9], "avail_event");

    ram.set_dirty_log_enabled(false);
    assert!(!ram.dirty_log_active());
    ring.enable_notifications(&ram).unwrap();
    assert_eq!(log.take(), [0u64; 0]);
    ram.set_dirty_log_enabled(true);
    ring.enable_notifications(&ram).unwrap();
    assert_eq!(log.take(), [0x9]);
}

#[test]
pub(super) fn a_buffer_without_payload_room_takes_control_packets_but_no_data() {
    let mut driver = Driver::new(16, true);
    driver.offer(&[w(BUFFERS, 44)]);
    driver.offer(&[w(BUFFERS + 0x100, 44 + 10)]);
    driver.offer(&[w(BUFFERS + 0x200, 44)]);
    driver.offer(&[w(BUFFERS + 0x300, 44)]);
    let (mut ring, ram) = (driver.ring(), driver.ram.clone());
    let mut burst = RxBurst::begin(&mut ring, &ram).unwrap();
    // First in line it is given back; behind a good one it waits.
    assert_eq!(burst.reserve(100, 64), Ok(10));
    assert_eq!(burst.commit(10, with_len), Ok(1));
    assert_eq!(burst.control(&header(1)), Ok(true));
    assert_eq!(burst.reserve(100, 64), Ok(0));
    burst.finish().unwrap();
    assert_eq!(driver.used(), [(0, 0), (1, 54), (2, 44), (3, 0)]);
    assert_eq!(
        ring.take_faults().iter().collect::<Vec<_>>(),
        [(RingFault::NoPayloadRoom, 2)]
    );
}

#[test]
pub(super) fn a_malformed_chain_waits_its_turn_and_is_counted_once() {
    let mut driver = Driver::new(16, true);
    driver.offer(&[w(BUFFERS, 54)]);
    driver.offer(&[w(BUFFERS + 0x100, 43)]);
    driver.offer(&[w(BUFFERS + 0x200, 54)]);
    let (mut ring, ram) = (driver.ring(), driver.ram.clone());
    let mut burst = RxBurst::begin(&mut ring, &ram).unwrap();
    for _ in 0..3 {
        assert_eq!(burst.reserve(100, 64), Ok(10), "not beyond the malformed chain");
        assert_eq!(burst.commit(0, with_len), Ok(0));
    }
    assert_eq!(burst.reserve(100, 64), Ok(10));
    assert_eq!(burst.commit(1, with_len), Ok(1));
    assert_eq!(burst.reserve(100, 64), Ok(10));
    assert_eq!(burst.commit(1, with_len), Ok(1));
    burst.finish().unwrap();
    assert_eq!(driver.used(), [(0, 45), (1, 0), (2, 45)]);
    assert_eq!(ring.take_faults().total(), 1);
}

#[test]
pub(super) fn a_dropped_burst_shows_what_was_committed() {
    let (mut driver, _) = ring_of(4, true);
    let (mut ring, ram) = (driver.ring(), driver.ram.clone());
    let mut burst = RxBurst::begin(&mut ring, &ram).unwrap();
    burst.reserve(300, 64).unwrap();
    assert_eq!(burst.commit(150, with_len), Ok(2));
    burst.reserve(300, 64).unwrap();
    drop(burst);
    assert_eq!(driver.used(), [(0, 144), (1, 94)]);
    assert_eq!(ring.available(&ram), Ok(2));
}

#[test]
pub(super) fn bursts_allocate_nothing_in_steady_state() {
    let mut driver = Driver::new(64, true);
    let mut ring = driver.ring();
    let mut allocation = None;
    for round in 0..20 {
        for i in 0..30 {
            driver.offer(&[w(BUFFERS + i * 0x1000, 44), w(BUFFERS + i * 0x1000 + 0x100, 100)]);
        }
        let ram = driver.ram.clone();
        let mut burst = RxBurst::begin(&mut ring, &ram).unwrap();
        assert_eq!(burst.reserve(3000, 64), Ok(3000));
        assert_eq!(burst.commit(3000, with_len), Ok(30));
        burst.finish().unwrap();
        assert_eq!(driver.used().len(), 30);
        let now = (ring.scratch_allocation(), ring.reserved_allocation());
        assert_eq!(
            *allocation.get_or_insert(now),
            now,
            "round {round} moved the scratch"
        );
    }
}
