//! A driver's side of one split virtqueue. Supplies verbs; what is right or wrong is for the tests to say.

use std::cell::Cell;
use std::ops::Deref;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use rustix::event::{EventfdFlags, eventfd};
use vm_memory::{Bytes, GuestAddress};

use crate::guest::{GuestRam, Iotlb, Mapping, Memory, Permission, Ring, RingParts, RingPosition, View};

/// Where things are. Three regions: two that are neighbours for the guest and not for us, and one behind a
/// hole.
pub const REGION: u64 = 0x10_0000;
/// Border between the first two regions.
pub const BORDER: u64 = REGION;
/// First address behind the second region, where nothing is.
pub const HOLE: u64 = 2 * REGION;
/// Start of the third region.
pub const HIGH: u64 = 4 * REGION;

pub const DESC: u64 = 0x1000;
pub const AVAIL: u64 = 0x8000;
pub const USED: u64 = 0x9000;
pub const TABLES: u64 = 0x1_0000;
/// Where buffers go unless a test says otherwise.
pub const BUFFERS: u64 = 0x4_0000;

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

/// A buffer of a chain.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Buf {
    pub addr: u64,
    pub len: u32,
    pub flags: u16,
}

/// A device-readable buffer.
pub fn r(addr: u64, len: u32) -> Buf {
    Buf { addr, len, flags: 0 }
}

/// A device-writable buffer.
pub fn w(addr: u64, len: u32) -> Buf {
    Buf {
        addr,
        len,
        flags: WRITE,
    }
}

/// Size of a page in bytes, of memory and of the IOMMU.
pub const PAGE: u64 = 4096;

thread_local! {
    static TRANSLATED: Cell<bool> = const { Cell::new(false) };
}

/// Runs a scenario with drivers behind an IOMMU: all that they call an address is an IOVA, and no two of its pages are
/// neighbours in memory.
pub fn translated<T>(scenario: impl FnOnce() -> T) -> T {
    TRANSLATED.set(true);
    let result = scenario();
    TRANSLATED.set(false);
    result
}

/// Where the page of an address is in memory, behind an IOMMU.
pub fn scattered(addr: u64) -> u64 {
    let (start, len) = if addr < HOLE {
        (addr & !(REGION - 1), REGION)
    } else {
        (HIGH, 16 * REGION)
    };
    // The number of pages is a power of two: multiplying by an odd number reaches each once.
    let page = (addr - start) / PAGE * 77 % (len / PAGE);
    start + page * PAGE + addr % PAGE
}

/// The translation of one page.
pub fn page(iova: u64) -> Mapping {
    Mapping {
        iova: iova & !(PAGE - 1),
        len: PAGE,
        gpa: scattered(iova & !(PAGE - 1)),
        permission: Permission::ReadWrite,
    }
}

/// Guest memory as a driver's ring addresses it.
pub struct Ram {
    ram: GuestRam,
    /// Behind an IOMMU: with all of memory mapped but the most of the third region, unless a test takes something out.
    pub iotlb: Option<Iotlb>,
}

impl Ram {
    fn new(mem: &Arc<Memory>, translated: bool) -> Ram {
        let pages = [(0, HOLE), (HIGH, HIGH + REGION)]
            .into_iter()
            .flat_map(|(from, to)| (from..to).step_by(PAGE as usize));
        Ram {
            ram: GuestRam::new(Arc::clone(mem)),
            iotlb: translated.then(|| {
                let mut iotlb = Iotlb::new();
                pages.for_each(|iova| iotlb.insert(page(iova)));
                iotlb
            }),
        }
    }

    /// What a VMM sees.
    pub fn iotlb(&mut self) -> &mut Iotlb {
        self.iotlb.as_mut().unwrap()
    }
}

impl Clone for Ram {
    /// All mapped again.
    fn clone(&self) -> Ram {
        Ram::new(self.ram.memory(), self.iotlb.is_some())
    }
}

impl Deref for Ram {
    type Target = GuestRam;

    fn deref(&self) -> &GuestRam {
        &self.ram
    }
}

impl<'m> From<&'m Ram> for View<'m> {
    fn from(ram: &'m Ram) -> View<'m> {
        match &ram.iotlb {
            Some(iotlb) => ram.ram.view_through(iotlb),
            None => ram.ram.view(),
        }
    }
}

#[derive(Clone)]
pub struct Driver {
    pub mem: Arc<Memory>,
    pub ram: Ram,
    translated: bool,
    pub size: u16,
    pub event_idx: bool,
    /// Next entry of the available ring to write.
    pub avail_idx: u16,
    /// Next entry of the used ring to look at.
    pub used_idx: u16,
    next_desc: u16,
    next_table: u64,
}

impl Driver {
    pub fn new(size: u16, event_idx: bool) -> Driver {
        Driver::at(size, event_idx, 0)
    }

    /// A driver whose indices have come to `index` already.
    pub fn at(size: u16, event_idx: bool, index: u16) -> Driver {
        let ranges = [(0, REGION), (BORDER, REGION), (HIGH, 16 * REGION)]
            .map(|(start, len)| (GuestAddress(start), len as usize));
        let mem = Arc::new(Memory::from_ranges(&ranges).unwrap());
        let translated = TRANSLATED.get();
        let driver = Driver {
            ram: Ram::new(&mem, translated),
            translated,
            mem,
            size,
            event_idx,
            avail_idx: index,
            used_idx: index,
            next_desc: 0,
            next_table: TABLES,
        };
        driver.put_u16(AVAIL + 2, index);
        driver.put_u16(USED + 2, index);
        driver
    }

    /// The ring as the session would hand it over, and the other ends of its descriptors (kick, call).
    pub fn parts(&self) -> (RingParts, OwnedFd, OwnedFd) {
        let kick = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
        let call = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
        let parts = RingParts {
            size: self.size,
            desc: DESC,
            avail: AVAIL,
            used: USED,
            position: RingPosition {
                next_avail: self.used_idx,
                next_used: self.used_idx,
            },
            event_idx: self.event_idx,
            translated: self.translated,
            kick: kick.as_fd().try_clone_to_owned().unwrap(),
            call: Some(call.as_fd().try_clone_to_owned().unwrap()),
        };
        (parts, kick, call)
    }

    pub fn ring(&self) -> Ring {
        Ring::new(self.parts().0).unwrap()
    }

    /// Where in memory the driver's address is.
    fn gpa(&self, addr: u64) -> GuestAddress {
        GuestAddress(if self.translated { scattered(addr) } else { addr })
    }

    pub fn put(&self, addr: u64, bytes: &[u8]) {
        let (mut addr, mut rest) = (addr, bytes);
        while !rest.is_empty() {
            let (now, later) = rest.split_at(rest.len().min((PAGE - addr % PAGE) as usize));
            self.mem.write_slice(now, self.gpa(addr)).unwrap();
            (addr, rest) = (addr + now.len() as u64, later);
        }
    }

    pub fn bytes(&self, addr: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        let (mut addr, mut rest) = (addr, &mut bytes[..]);
        while !rest.is_empty() {
            let (now, later) = rest.split_at_mut(rest.len().min((PAGE - addr % PAGE) as usize));
            self.mem.read_slice(now, self.gpa(addr)).unwrap();
            (addr, rest) = (addr + now.len() as u64, later);
        }
        bytes
    }

    fn put_u16(&self, addr: u64, value: u16) {
        self.mem
            .store(value.to_le(), self.gpa(addr), Ordering::Release)
            .unwrap();
    }

    fn u16(&self, addr: u64) -> u16 {
        u16::from_le(self.mem.load(self.gpa(addr), Ordering::Acquire).unwrap())
    }

    /// Writes one descriptor of the ring's table.
    pub fn descriptor(&self, index: u16, buf: Buf, next: u16) {
        self.put(DESC + 16 * u64::from(index), &descriptor(buf, next));
    }

    /// Makes a chain of `bufs` available; its head.
    pub fn offer(&mut self, bufs: &[Buf]) -> u16 {
        let head = self.next_desc;
        for (i, buf) in bufs.iter().enumerate() {
            let index = self.next_desc;
            self.next_desc = (index + 1) % self.size;
            let last = i + 1 == bufs.len();
            let flags = if last { buf.flags } else { buf.flags | NEXT };
            self.descriptor(
                index,
                Buf { flags, ..*buf },
                if last { 0 } else { self.next_desc },
            );
        }
        self.offer_head(head);
        head
    }

    /// Makes a chain available that is `direct` buffers and then an indirect table of `bufs`.
    pub fn offer_indirect(&mut self, direct: &[Buf], bufs: &[Buf]) -> u16 {
        let table = self.next_table;
        self.next_table += 16 * bufs.len() as u64;
        for (i, buf) in bufs.iter().enumerate() {
            let last = i + 1 == bufs.len();
            let flags = if last { buf.flags } else { buf.flags | NEXT };
            let next = if last { 0 } else { i as u16 + 1 };
            self.put(table + 16 * i as u64, &descriptor(Buf { flags, ..*buf }, next));
        }
        let mut all = direct.to_vec();
        all.push(Buf {
            addr: table,
            len: 16 * bufs.len() as u32,
            flags: INDIRECT,
        });
        self.offer(&all)
    }

    /// Makes descriptor `head` available, whatever it is.
    pub fn offer_head(&mut self, head: u16) {
        let slot = u64::from(self.avail_idx % self.size);
        self.put_u16(AVAIL + 4 + 2 * slot, head);
        self.avail_idx = self.avail_idx.wrapping_add(1);
        self.put_u16(AVAIL + 2, self.avail_idx);
    }

    /// Claims that the available index is `index`.
    pub fn claim_avail_idx(&self, index: u16) {
        self.put_u16(AVAIL + 2, index);
    }

    /// The used index in memory.
    pub fn seen_used_idx(&self) -> u16 {
        self.u16(USED + 2)
    }

    /// What the device has used since the last call: heads and lengths.
    pub fn used(&mut self) -> Vec<(u32, u32)> {
        let mut used = Vec::new();
        while self.used_idx != self.seen_used_idx() {
            let slot = u64::from(self.used_idx % self.size);
            let element = self.bytes(USED + 4 + 8 * slot, 8);
            let word = |at: usize| u32::from_le_bytes(element[at..at + 4].try_into().unwrap());
            used.push((word(0), word(4)));
            self.used_idx = self.used_idx.wrapping_add(1);
        }
        used
    }

    pub fn set_used_event(&self, index: u16) {
        self.put_u16(AVAIL + 4 + 2 * u64::from(self.size), index);
    }

    pub fn set_no_interrupt(&self, no_interrupt: bool) {
        self.put_u16(AVAIL, u16::from(no_interrupt));
    }

    pub fn avail_event(&self) -> u16 {
        self.u16(USED + 4 + 8 * u64::from(self.size))
    }

    pub fn kicks_unwanted(&self) -> bool {
        self.u16(USED) & 1 != 0
    }

    /// Whether the driver, having made entries available from `old` on, has to kick (virtio 1.2, 2.7.10.1).
    pub fn must_kick(&self, old: u16) -> bool {
        fence(Ordering::SeqCst);
        if self.event_idx {
            self.avail_idx.wrapping_sub(self.avail_event()).wrapping_sub(1) < self.avail_idx.wrapping_sub(old)
        } else {
            !self.kicks_unwanted()
        }
    }

    /// Asks for an interrupt at the next used element; `true` when there is one already.
    pub fn want_interrupt(&self) -> bool {
        if self.event_idx {
            self.set_used_event(self.used_idx);
        } else {
            self.set_no_interrupt(false);
        }
        fence(Ordering::SeqCst);
        self.seen_used_idx() != self.used_idx
    }
}

fn descriptor(buf: Buf, next: u16) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&buf.addr.to_le_bytes());
    bytes[8..12].copy_from_slice(&buf.len.to_le_bytes());
    bytes[12..14].copy_from_slice(&buf.flags.to_le_bytes());
    bytes[14..].copy_from_slice(&next.to_le_bytes());
    bytes
}

/// A header in which every byte differs from its neighbours.
pub fn header(seed: u8) -> [u8; 44] {
    std::array::from_fn(|i| seed.wrapping_add((7 * i) as u8))
}

/// `len` bytes that repeat only after 251.
pub fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i % 251) as u8).collect()
}
