//! The guest's IOMMU: which I/O virtual addresses (IOVAs) mean which pages of guest memory, and for what.
//!
//! Two ways to be mapped, as real guests have it: page by page ([`Granule::Page`], Linux with a vIOMMU and no huge
//! pages), or all memory as one range ([`Granule::Whole`], a guest in pass-through mode behind an offset). Addresses are
//! given out from the top of the 32-bit space downwards and used again as soon as they are free, as Linux's
//! drivers/iommu/iova.c does: a stale translation is found out at once.
//!
//! A table only. When the device is told of a change is `Dma`'s business.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::memory::{PAGE, Region};

/// Permission bit: the device may read (VHOST_ACCESS_RO).
pub const READ: u8 = 1;
/// Permission bit: the device may write (VHOST_ACCESS_WO).
pub const WRITE: u8 = 2;

/// How memory is mapped.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub enum Granule {
    /// In pages of 4 KiB, neighbours of which are no neighbours in memory.
    #[default]
    Page,
    /// Each region of memory as one range, [`WHOLE_OFFSET`] beyond its guest-physical address.
    Whole,
}

/// What is added to guest-physical addresses under [`Granule::Whole`]. Far beyond memory: an address that is not
/// translated hits nothing.
pub const WHOLE_OFFSET: u64 = 0x70_0000_0000;

/// The first IOVA page that is given out: that of Linux's first allocation for a 32-bit device.
const TOP: u64 = 0xffff_f000;

const PAGE_LEN: u64 = PAGE as u64;

/// A translation as an UPDATE tells it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Translation {
    /// First IOVA.
    pub iova: u64,
    /// Bytes.
    pub size: u64,
    /// The front-end's address of the first byte.
    pub user_addr: u64,
    /// [`READ`], [`WRITE`] or both.
    pub perm: u8,
}

/// What a look-up found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Lookup {
    /// This.
    Found(Translation),
    /// Nothing is mapped there.
    Unmapped,
    /// Something is mapped there, but not for this: a guest-visible fault.
    Denied,
    /// The page is on the move: ask again when it has arrived.
    Moving,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    user_addr: u64,
    perm: u8,
    moving: bool,
}

#[derive(Debug, Default)]
struct Table {
    /// By IOVA of the page.
    pages: BTreeMap<u64, Entry>,
    /// Whole regions.
    regions: Vec<Translation>,
    /// Everything from here up to [`TOP`] has been given out.
    bottom: u64,
    /// Ranges that were given back, by their number of pages; the last is given out first.
    free: HashMap<u64, Vec<u64>>,
}

/// The table, shared by the driver that fills it and the front-end that looks things up.
#[derive(Debug)]
pub struct Iommu {
    granule: Granule,
    table: Mutex<Table>,
}

impl Iommu {
    /// An empty one.
    pub fn new(granule: Granule) -> Iommu {
        let table = Table {
            bottom: TOP + PAGE_LEN,
            ..Table::default()
        };
        Iommu {
            granule,
            table: Mutex::new(table),
        }
    }

    /// How memory is mapped.
    pub fn granule(&self) -> Granule {
        self.granule
    }

    /// Maps a region as a whole, for everything.
    pub fn map_region(&self, region: &Region) {
        self.table().regions.push(Translation {
            iova: region.gpa() + WHOLE_OFFSET,
            size: region.size() as u64,
            user_addr: region.user_addr(),
            perm: READ | WRITE,
        });
    }

    /// Maps these pages (front-end addresses) side by side at an IOVA that is free; answers it.
    pub fn map(&self, pages: &[u64], perm: u8) -> u64 {
        let mut table = self.table();
        let count = pages.len() as u64;
        let iova = match table.free.get_mut(&count).and_then(Vec::pop) {
            Some(iova) => iova,
            None => {
                table.bottom -= count * PAGE_LEN;
                table.bottom
            }
        };
        table.insert(iova, pages, perm);
        iova
    }

    /// Maps these pages at this IOVA (a page's), whatever was mapped there.
    pub fn map_at(&self, iova: u64, pages: &[u64], perm: u8) {
        self.table().insert(iova, pages, perm);
    }

    /// Forgets what is mapped from `iova` on; answers the pages' whole range, first address and bytes. The addresses stay
    /// taken until [`Iommu::free`].
    pub fn unmap(&self, iova: u64, len: usize) -> (u64, u64) {
        let (first, size) = page_range(iova, len);
        let mut table = self.table();
        for page in (first..first + size).step_by(PAGE) {
            table.pages.remove(&page);
        }
        (first, size)
    }

    /// Gives a range of addresses back, as [`Iommu::unmap`] answered it.
    pub fn free(&self, first: u64, size: u64) {
        self.table().free.entry(size / PAGE_LEN).or_default().push(first);
    }

    /// Forgets all mappings, and which addresses were taken from `keep` downwards: what a reset of the vIOMMU does.
    pub fn clear(&self, keep: u64) {
        let mut table = self.table();
        table.pages.clear();
        table.free.clear();
        table.bottom = keep;
    }

    /// The lowest address that was given out: for [`Iommu::clear`].
    pub fn bottom(&self) -> u64 {
        self.table().bottom
    }

    /// What the byte at `iova` means to a device that wants to do `perm`.
    pub fn lookup(&self, iova: u64, perm: u8) -> Lookup {
        let table = self.table();
        let found = match table.pages.get(&page_of(iova)) {
            Some(entry) if entry.moving => return Lookup::Moving,
            Some(entry) => Translation {
                iova: page_of(iova),
                size: PAGE_LEN,
                user_addr: entry.user_addr,
                perm: entry.perm,
            },
            None => match table.regions.iter().find(|r| iova.wrapping_sub(r.iova) < r.size) {
                Some(region) => *region,
                None => return Lookup::Unmapped,
            },
        };
        // An access for nothing is no access: QEMU answers IOMMU_NONE with a failure too.
        if perm == 0 || perm & !found.perm != 0 {
            return Lookup::Denied;
        }
        Lookup::Found(found)
    }

    /// Begins to move the page at `user_addr`: look-ups are put off until [`Iommu::moved`]. Answers the IOVAs of the pages
    /// that mean it, of which the device must be told.
    pub fn moving(&self, user_addr: u64) -> Vec<u64> {
        let mut iovas = Vec::new();
        for (iova, entry) in &mut self.table().pages {
            if entry.user_addr == user_addr {
                entry.moving = true;
                iovas.push(*iova);
            }
        }
        iovas
    }

    /// The pages that were [`Iommu::moving`] are now at `user_addr`.
    pub fn moved(&self, iovas: &[u64], user_addr: u64) {
        let mut table = self.table();
        for iova in iovas {
            if let Some(entry) = table.pages.get_mut(iova) {
                entry.user_addr = user_addr;
                entry.moving = false;
            }
        }
    }

    /// The front-end's addresses of the pages that are mapped one by one.
    pub fn user_pages(&self) -> HashSet<u64> {
        self.table().pages.values().map(|entry| entry.user_addr).collect()
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    fn insert(&mut self, iova: u64, pages: &[u64], perm: u8) {
        for (page, user_addr) in pages.iter().enumerate() {
            let entry = Entry {
                user_addr: *user_addr,
                perm,
                moving: false,
            };
            self.pages.insert(iova + page as u64 * PAGE_LEN, entry);
        }
    }
}

/// The page that an address is in.
pub fn page_of(addr: u64) -> u64 {
    addr & !(PAGE_LEN - 1)
}

/// The pages of a range: first address and bytes.
fn page_range(addr: u64, len: usize) -> (u64, u64) {
    let first = page_of(addr);
    (first, (addr - first + len as u64).next_multiple_of(PAGE_LEN))
}

/// The ranges that QEMU invalidates when the vIOMMU is reset (`vtd_address_space_unmap`, in
/// hw/i386/intel_iommu.c): powers of two that together cover 39 bits of addresses without the interrupt range at
/// 0xfee00000. First address and size of each.
pub fn reset_ranges() -> Vec<(u64, u64)> {
    const INTERRUPTS: (u64, u64) = (0xfee0_0000, 0xfeef_ffff);
    let mut ranges = Vec::new();
    for (mut at, end) in [(0, INTERRUPTS.0), (INTERRUPTS.1 + 1, 1 << 39)] {
        while at < end {
            let aligned = if at == 0 {
                1 << 38
            } else {
                1 << at.trailing_zeros()
            };
            let left: u64 = end - at;
            let size = aligned.min(1 << left.ilog2());
            ranges.push((at, size));
            at += size;
        }
    }
    ranges
}
