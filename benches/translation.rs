//! What the IOTLB costs: the same rings walked and the same packets gathered with guest-physical addresses and through the
//! IOTLB, in one run. `cargo bench --bench translation`.
//!
//! No socket and no VMM: what is timed is what we do between a kick and the system call, so that the difference shows as much
//! as it can. Each figure is the best of several rounds, which are interleaved, since other work on the machine only ever adds.

use std::hint::black_box;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use rustix::event::{EventfdFlags, eventfd};
use vm_memory::{Bytes, GuestAddress};
use vsock_sidecar::guest::{
    Access, GuestRam, Iotlb, Mapping, Memory, Permission, Ring, RingParts, RingPosition, RxBurst, TxBurst,
    View,
};
use vsock_sidecar::sys::iovec::IoVecs;

const PAGE: u64 = 4096;
/// Guest memory: 64 MiB, a power of two of pages.
const PAGES: u64 = 16384;
/// Entries of the rings, as in QEMU.
const SIZE: u16 = 128;
const DESC: u64 = 0x1000;
const AVAIL: u64 = 0x1800;
const USED: u64 = 0x2000;
const BUFFERS: u64 = 0x10_0000;

/// How addresses are understood.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    /// Guest-physical.
    Identity,
    /// IOVAs in pages of 4 KiB, neighbours in memory where they are neighbours as addresses: what a guest's allocator gives.
    Contiguous,
    /// IOVAs in pages of 4 KiB, no two of them neighbours in memory.
    Scattered,
}

const WAYS: [(&str, Way); 3] = [
    ("identity", Way::Identity),
    ("IOTLB, contiguous", Way::Contiguous),
    ("IOTLB, scattered", Way::Scattered),
];

struct Guest {
    way: Way,
    memory: Arc<Memory>,
    ram: GuestRam,
    iotlb: Iotlb,
}

impl Guest {
    /// A guest with its first `mapped` pages mapped.
    fn new(way: Way, mapped: u64) -> Guest {
        let memory =
            Memory::from_ranges(&[(GuestAddress(0), (PAGES * PAGE) as usize)]).expect("64 MiB of memory");
        let memory = Arc::new(memory);
        let mut guest = Guest {
            way,
            ram: GuestRam::new(Arc::clone(&memory)),
            memory,
            iotlb: Iotlb::new(),
        };
        for page in 0..mapped {
            let iova = page * PAGE;
            guest.iotlb.insert(Mapping {
                iova,
                len: PAGE,
                gpa: guest.gpa(iova),
                permission: Permission::ReadWrite,
            });
        }
        guest
    }

    fn gpa(&self, addr: u64) -> u64 {
        match self.way {
            Way::Identity | Way::Contiguous => addr,
            Way::Scattered => addr / PAGE * 77 % PAGES * PAGE + addr % PAGE,
        }
    }

    fn view(&self) -> View<'_> {
        match self.way {
            Way::Identity => self.ram.view(),
            _ => self.ram.view_through(&self.iotlb),
        }
    }

    fn put(&self, addr: u64, bytes: &[u8]) {
        self.memory
            .write_slice(bytes, GuestAddress(self.gpa(addr)))
            .expect("within a page of memory");
    }

    /// A ring of chains of these buffers: so many, `stride` bytes apart.
    fn ring(&self, bufs: &[(u64, u32)], stride: u64, write: bool) -> (Ring, u16) {
        let each = bufs.len() as u16;
        let chains = SIZE / each;
        for chain in 0..chains {
            for (i, (addr, len)) in (0u16..).zip(bufs) {
                let index = chain * each + i;
                let mut wire = [0; 16];
                wire[..8].copy_from_slice(&(BUFFERS + u64::from(chain) * stride + addr).to_le_bytes());
                wire[8..12].copy_from_slice(&len.to_le_bytes());
                let flags = u16::from(i + 1 < each) | if write { 2 } else { 0 };
                wire[12..14].copy_from_slice(&flags.to_le_bytes());
                wire[14..].copy_from_slice(&(index + 1).to_le_bytes());
                self.put(DESC + 16 * u64::from(index), &wire);
            }
        }
        // Each slot of the available ring names a chain once and for all. As many slots as entries: chains repeat.
        for slot in 0..SIZE {
            let head = slot % chains * each;
            self.put(AVAIL + 4 + 2 * u64::from(slot), &head.to_le_bytes());
        }
        let fd = || -> OwnedFd { eventfd(0, EventfdFlags::NONBLOCK).expect("an eventfd") };
        let ring = Ring::new(RingParts {
            size: SIZE,
            desc: DESC,
            avail: AVAIL,
            used: USED,
            position: RingPosition::default(),
            event_idx: true,
            translated: self.way != Way::Identity,
            kick: fd(),
            call: None,
        });
        (ring.expect("a ring as the standard wants it"), chains)
    }

    /// The driver makes so many more entries available.
    fn offer(&self, index: &mut u16, entries: u16) {
        *index = index.wrapping_add(entries);
        self.memory
            .store(
                index.to_le(),
                GuestAddress(self.gpa(AVAIL + 2)),
                Ordering::Release,
            )
            .expect("the available index");
    }
}

/// Something that is done `per_round` times a call.
type Work<'a> = (u32, Box<dyn FnMut() + 'a>);

/// Times the ways side by side; nanoseconds for one.
fn time(name: &str, works: &mut [(&str, Work<'_>)]) {
    let mut best = vec![f64::INFINITY; works.len()];
    for _ in 0..300 {
        for ((_, (per_round, work)), best) in works.iter_mut().zip(&mut best) {
            // Short enough to fit between two looks of the scheduler.
            let rounds = (8_000 / *per_round).max(1);
            let start = Instant::now();
            for _ in 0..rounds {
                work();
            }
            let each = start.elapsed().as_secs_f64() * 1e9 / f64::from(rounds * *per_round);
            *best = best.min(each);
        }
    }
    println!("{name}");
    for ((way, _), ns) in works.iter().zip(&best) {
        println!("  {way:<28} {ns:>8.1} ns   {:>5.2} x", ns / best[0]);
    }
}

fn lookups(name: &str, pages: u64) {
    let guests = WAYS.map(|(name, way)| (name, Guest::new(way, pages)));
    let mut works: Vec<_> = guests
        .iter()
        .map(|(name, guest)| {
            let work: Work<'_> = (
                pages as u32,
                Box::new(move || {
                    for page in 0..pages {
                        let addr = (page * 211 % pages) * PAGE + 64;
                        for slice in guest.view().slices(black_box(addr), 44, Access::Read) {
                            black_box(slice.is_ok());
                        }
                    }
                }),
            );
            (*name, work)
        })
        .collect();
    time(name, &mut works);
}

fn tx(name: &str, bufs: &[(u64, u32)], stride: u64) {
    let guests = WAYS.map(|(name, way)| (name, Guest::new(way, 4096)));
    let mut works: Vec<_> = guests
        .iter()
        .map(|(name, guest)| {
            let (mut ring, chains) = guest.ring(bufs, stride, false);
            let mut index = 0;
            let work: Work<'_> = (
                u32::from(chains),
                Box::new(move || {
                    guest.offer(&mut index, chains);
                    let mut burst = TxBurst::begin(&mut ring, guest.view()).expect("a ring in memory");
                    let mut list = IoVecs::new();
                    while let Some(popped) = burst.pop() {
                        let packet = popped.expect("a good chain");
                        for slice in packet.payload(packet.payload_len) {
                            if !list.push(&slice) {
                                // Here would be a writev.
                                black_box(list.bytes());
                                list.clear();
                                let _ = list.push(&slice);
                            }
                        }
                    }
                    black_box(list.bytes());
                    assert_eq!(burst.finish().expect("a ring in memory").used, chains);
                }),
            );
            (*name, work)
        })
        .collect();
    time(name, &mut works);
}

fn rx(name: &str, bufs: &[(u64, u32)], stride: u64) {
    let room: u32 = bufs.iter().map(|(_, len)| len).sum::<u32>() - 44;
    let guests = WAYS.map(|(name, way)| (name, Guest::new(way, 4096)));
    let mut works: Vec<_> = guests
        .iter()
        .map(|(name, guest)| {
            let (mut ring, chains) = guest.ring(bufs, stride, true);
            let mut index = 0;
            let work: Work<'_> = (
                u32::from(chains),
                Box::new(move || {
                    guest.offer(&mut index, chains);
                    let mut burst = RxBurst::begin(&mut ring, guest.view()).expect("a ring in memory");
                    let mut left = usize::from(chains);
                    while left > 0 {
                        let want = left.min(64) * room as usize;
                        let got = burst.reserve(want, 64).expect("a ring in memory");
                        let mut list = IoVecs::new();
                        // Here would be a readv.
                        let read = burst.push_payload(&mut list, got);
                        left -= burst.commit(read, |_| [0; 44]).expect("a ring in memory");
                    }
                    assert_eq!(burst.finish().expect("a ring in memory").used, chains);
                }),
            );
            (*name, work)
        })
        .collect();
    time(name, &mut works);
}

/// What a VMM's messages cost us, for scale: a guest in strict mode maps and unmaps each buffer.
fn messages() {
    let mut iotlb = Iotlb::new();
    let page = |i: u64| Mapping {
        iova: i * PAGE,
        len: PAGE,
        gpa: (i * 77 % PAGES) * PAGE,
        permission: Permission::ReadWrite,
    };
    (0..4096).for_each(|i| iotlb.insert(page(i)));
    let mut i = 0;
    let work: Work<'_> = (
        1,
        Box::new(|| {
            i = (i + 211) % 4096;
            iotlb.invalidate(i * PAGE, i * PAGE + (PAGE - 1));
            iotlb.insert(page(i));
        }),
    );
    time("INVALIDATE and UPDATE of one page of 4096", &mut [("", work)]);
}

fn main() {
    lookups(
        "lookup of 44 bytes, 256 pages in use (the table in front has them)",
        256,
    );
    lookups("lookup of 44 bytes, 4096 pages in use (it has not)", 4096);
    tx("TX packet, header and 64 bytes", &[(0, 44), (64, 64)], PAGE);
    tx(
        "TX packet, header and 64 KiB in two buffers",
        &[(0, 44), (PAGE, 32768), (PAGE + 0x9000, 32768)],
        0x2_0000,
    );
    rx("RX packet, one buffer of 3776 bytes", &[(0, 3776)], PAGE);
    rx(
        "RX packet, one buffer of 3776 bytes across pages",
        &[(0, 3776)],
        3776 + 64,
    );
    messages();
}
