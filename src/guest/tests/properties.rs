//! Whatever the shape, the bytes are the same; whatever the memory, we end.

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use proptest::prelude::*;

use super::driver::{BORDER, BUFFERS, Buf, Driver, HIGH, WRITE};
use crate::guest::{RingFault, RxBurst, TxBurst};
use crate::sys::iovec::IoVecs;
use crate::sys::vectored::{readv, writev};

/// How a packet is laid out: lengths of its buffers, gaps between them, how many of them are indirect, and
/// where.
#[derive(Clone, Debug)]
struct Shape {
    pieces: Vec<(u32, u8)>,
    indirect: Option<usize>,
    base: u64,
}

impl Shape {
    /// Buffers of `total` bytes together, cut as this shape cuts.
    fn cut(&self, total: u32, flags: u16) -> Vec<Buf> {
        let mut bufs = Vec::new();
        let (mut at, mut left) = (self.base, total);
        for &(len, gap) in &self.pieces {
            let len = len.min(left);
            bufs.push(Buf { addr: at, len, flags });
            at += u64::from(len) + u64::from(gap);
            left -= len;
        }
        bufs.push(Buf {
            addr: at,
            len: left,
            flags,
        });
        bufs
    }

    fn offer(&self, driver: &mut Driver, bufs: &[Buf]) -> u16 {
        match self.indirect {
            Some(direct) => {
                let (direct, indirect) = bufs.split_at(direct.min(bufs.len() - 1));
                driver.offer_indirect(direct, indirect)
            }
            None => driver.offer(bufs),
        }
    }
}

fn shape() -> impl Strategy<Value = Shape> {
    let piece = prop_oneof![0..4u32, 0..60u32, 1000..40_000u32];
    (
        prop::collection::vec((piece, any::<u8>()), 0..20),
        prop::option::of(0..4usize),
        prop_oneof![Just(BUFFERS), BORDER - 200..BORDER, Just(HIGH)],
    )
        .prop_map(|(pieces, indirect, base)| Shape {
            pieces,
            indirect,
            base,
        })
}

fn packets() -> impl Strategy<Value = Vec<(Shape, Vec<u8>)>> {
    let payload = prop_oneof![
        prop::collection::vec(any::<u8>(), 0..300),
        (0..65536usize, any::<u8>()).prop_map(|(len, seed)| {
            (0..len)
                .map(|i| (i as u8).wrapping_mul(31).wrapping_add(seed))
                .collect()
        }),
    ];
    prop::collection::vec((shape(), payload), 1..4)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Guest to host: header and payload come out of any shape as they were, through a socket.
    #[test]
    fn tx_bytes_are_the_same(start in any::<u16>(), packets in packets(), header: [u8; 32]) {
        let mut driver = Driver::at(128, true, start);
        let mut ring = driver.ring();
        for (shape, payload) in packets {
            let mut sent = [0xee; 44];
            sent[..32].copy_from_slice(&header);
            let bufs = shape.cut(44 + payload.len() as u32, 0);
            let packet = [&sent[..], &payload].concat();
            let mut at = 0;
            for buf in &bufs {
                driver.put(buf.addr, &packet[at..at + buf.len as usize]);
                at += buf.len as usize;
            }
            let head = shape.offer(&mut driver, &bufs);
            let ram = driver.ram.clone();
            let (ours, mut theirs) = UnixStream::pair().unwrap();
            let mut burst = TxBurst::begin(&mut ring, &ram).unwrap();
            let taken = burst.pop().unwrap().unwrap();
            prop_assert_eq!(taken.header, sent);
            prop_assert_eq!(taken.payload_len as usize, payload.len());
            let mut list = IoVecs::new();
            for slice in taken.payload(taken.payload_len) {
                prop_assert!(list.push(&slice));
            }
            prop_assert_eq!(list.bytes(), payload.len());
            // What the socket does not take is spilled.
            let taken = if list.is_empty() { 0 } else { writev(ours.as_fd(), &list).unwrap() };
            let mut got = vec![0; taken];
            theirs.read_exact(&mut got).unwrap();
            prop_assert_eq!(list.append_to(taken, &mut got), payload.len() - taken);
            prop_assert_eq!(got, payload);
            burst.finish().unwrap();
            prop_assert_eq!(driver.used(), [(u32::from(head), 0)]);
        }
        prop_assert_eq!(ring.take_faults().total(), 0);
    }

    /// Host to guest: bytes from a socket arrive in buffers of any shape, in order, nothing else touched.
    #[test]
    fn rx_bytes_are_the_same(
        start in any::<u16>(),
        shapes in prop::collection::vec((shape(), 45..5000u32), 1..6),
        preface in prop::collection::vec(any::<u8>(), 0..50),
        data in prop::collection::vec(any::<u8>(), 1..12_000),
        limit in 1..10_000usize,
    ) {
        let mut driver = Driver::at(256, true, start);
        let mut ring = driver.ring();
        let mut chains = Vec::new();
        for (i, (shape, len)) in shapes.iter().enumerate() {
            // Buffers of their own: no two chains may overlap.
            let base = HIGH + 0x10_0000 * (i as u64 + 1) + (shape.base & 0xff);
            let bufs = Shape { base, ..shape.clone() }.cut(*len, WRITE);
            chains.push((shape.offer(&mut driver, &bufs), bufs));
        }
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(&data).unwrap();
        let ram = driver.ram.clone();
        let mut burst = RxBurst::begin(&mut ring, &ram).unwrap();
        let room = burst.reserve(limit, 64).unwrap();
        let filled = burst.fill(&preface);
        let mut list = IoVecs::new();
        burst.push_payload(&mut list, limit);
        prop_assert!(list.bytes() <= limit && list.bytes() <= room - filled);
        let n = if list.is_empty() { 0 } else { readv(ours.as_fd(), &list).unwrap().bytes };
        let mut lens = Vec::new();
        let count = burst.commit(n, |len| {
            lens.push(len);
            [lens.len() as u8; 44]
        }).unwrap();
        burst.finish().unwrap();
        let used = driver.used();
        prop_assert_eq!(used.len(), count);
        let mut got = Vec::new();
        for (i, ((head, bufs), len)) in chains.iter().zip(&lens).enumerate() {
            prop_assert_eq!(used[i], (u32::from(*head), 44 + len));
            let mut packet: Vec<u8> =
                bufs.iter().flat_map(|buf| driver.bytes(buf.addr, buf.len as usize)).collect();
            prop_assert_eq!(&packet[..44], &[i as u8 + 1; 44]);
            packet.truncate(44 + *len as usize);
            got.extend(packet.split_off(44));
        }
        prop_assert_eq!(got, [&preface[..filled], &data[..n]].concat());
        // Buffers that were not needed are untouched and still there.
        for (_, bufs) in &chains[count..] {
            for buf in bufs {
                prop_assert!(driver.bytes(buf.addr, buf.len as usize).iter().all(|b| *b == 0));
            }
        }
        prop_assert_eq!(usize::from(ring.available(&ram).unwrap()), chains.len() - count);
    }

    /// Random descriptors: every chain comes back, in order, by name or as a packet, and the ring survives.
    #[test]
    fn any_table_ends(
        descriptors in prop::collection::vec(
            (
                prop_oneof![Just(0x1000u64), Just(0x2000), 0..0x30_0000u64, any::<u64>()],
                prop_oneof![0..100u32, (1..20u32).prop_map(|n| 16 * n), any::<u32>()],
                prop_oneof![4 => 0..8u16, 1 => any::<u16>()],
                prop_oneof![8 => 0..17u16, 1 => any::<u16>()],
            ),
            16,
        ),
        heads in prop::collection::vec(prop_oneof![9 => 0..16u16, 1 => any::<u16>()], 1..=16),
        rx: bool,
    ) {
        let mut driver = Driver::new(16, true);
        for (i, (addr, len, flags, next)) in descriptors.iter().enumerate() {
            driver.descriptor(i as u16, Buf { addr: *addr, len: *len, flags: *flags }, *next);
        }
        for head in &heads {
            driver.offer_head(*head);
        }
        let (mut ring, ram) = (driver.ring(), driver.ram.clone());
        let mut faults = 0;
        if rx {
            // RX writes where a guest tells it to, which may be the ring itself: so look at what is counted,
            // not at memory.
            let mut burst = RxBurst::begin(&mut ring, &ram).unwrap();
            burst.reserve(usize::MAX, 16).unwrap();
            burst.give_back();
            let finished = burst.finish().unwrap();
            faults = usize::from(finished.used);
        } else {
            let mut burst = TxBurst::begin(&mut ring, &ram).unwrap();
            let mut taken = 0;
            while let Some(popped) = burst.pop() {
                taken += 1;
                match popped {
                    Ok(packet) => {
                        let bytes: usize = packet.payload(u32::MAX).map(|slice| slice.len()).sum();
                        prop_assert_eq!(bytes, packet.payload_len as usize);
                    }
                    Err(fault) => {
                        prop_assert!(RingFault::ALL.contains(&fault));
                        faults += 1;
                    }
                }
            }
            prop_assert_eq!(taken, heads.len());
            burst.finish().unwrap();
            let used: Vec<_> = driver.used();
            prop_assert_eq!(used, heads.iter().map(|h| (u32::from(*h), 0)).collect::<Vec<_>>());
        }
        prop_assert_eq!(ring.take_faults().total() as usize, faults);
    }
}
