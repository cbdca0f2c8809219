//! Guest memory as the device sees it.
//!
//! Every access to guest memory by address goes through [`View::slices`]. A view is guest-physical, or it goes through
//! the IOTLB: with VIRTIO_F_ACCESS_PLATFORM an address is an IOVA, a range of it becomes several ranges of
//! guest-physical memory, and a [`MemoryFault`] can also be "not mapped yet". So callers take a range as several slices, they
//! say what they want to do with it, and they hold slices no longer than a burst: a view borrows the IOTLB, which
//! cannot be changed as long as a slice is held.
//!
//! Whatever the addresses are, slices come from memory regions, and the dirty log with them: its pages are guest-physical.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use vm_memory::{
    Address, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
    VolatileSlice,
};

use super::dirty::{DirtyBitmap, DirtySlice};
use super::iotlb::Iotlb;
use super::loss::MemoryLoss;
use crate::sys::sigbus::{self, Guarded};

/// The guest memory of one memory table, dirty pages tracked.
pub type Memory = GuestMemoryMmap<DirtyBitmap>;

/// A piece of guest memory that is contiguous in ours. The guest may change its bytes at any time.
pub type Slice<'m> = VolatileSlice<'m, DirtySlice<'m>>;

/// What is to be done with guest memory.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Access {
    /// Only read from it.
    Read,
    /// Write to it (and perhaps read).
    Write,
}

/// Why a range of guest memory cannot be used.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum MemoryFault {
    /// No memory region covers the address.
    #[error("guest address {addr:#x} is not in the memory table (range of {len} bytes)")]
    Unmapped {
        /// The first address that is not covered.
        addr: u64,
        /// Length of the range from there on in bytes.
        len: usize,
    },
    /// The IOTLB does not know the address yet; the VMM is asked, or has been. Not a fault: wait.
    #[error("I/O virtual address {iova:#x} is not translated yet")]
    Missing {
        /// The first address that is not translated.
        iova: u64,
    },
    /// The VMM has refused to translate the address, or not for this access.
    #[error("the VMM refuses access to I/O virtual address {iova:#x}")]
    Refused {
        /// The address.
        iova: u64,
    },
    /// The range goes beyond the end of the address space.
    #[error("guest range {addr:#x}+{len} wraps around")]
    Wraps {
        /// First address of the range.
        addr: u64,
        /// Length of the range in bytes.
        len: usize,
    },
}

/// One memory table's guest memory: cheap to clone, mapped as long as a clone lives.
///
/// The VMM may take it away while it is used ([`sigbus`]): then it reads as zeros, and [`GuestRam::is_lost`] says so.
#[derive(Clone, Debug)]
pub struct GuestRam(Arc<Ram>);

#[derive(Debug)]
struct Ram {
    memory: Guarded<Memory>,
    /// A system call could not access it.
    refused: AtomicBool,
    /// [`sigbus::contained`] when it was made: as long as that is the same, nothing of it is lost.
    contained: u64,
}

impl GuestRam {
    /// Guest memory in which addresses of rings and buffers are guest-physical.
    pub fn new(memory: Arc<Memory>) -> GuestRam {
        GuestRam(Arc::new(Ram {
            contained: sigbus::contained(),
            refused: AtomicBool::new(false),
            memory: Guarded::regions(memory),
        }))
    }

    /// Whether a part of it, or of its dirty log, could not be had when it was accessed: zeros stand there now, which nobody
    /// may take for the guest's. Costs a load as long as nothing of the kind has happened in the process.
    pub fn is_lost(&self) -> bool {
        sigbus::contained() != self.0.contained && (self.is_memory_lost() || self.is_log_lost())
    }

    /// What was lost, if anything was. Looks at the files behind the memory.
    pub fn loss(&self) -> Option<MemoryLoss> {
        let loss = || MemoryLoss::of(&self.0.memory, self.is_memory_lost());
        self.is_lost().then(loss)
    }

    fn is_memory_lost(&self) -> bool {
        self.0.refused.load(Ordering::Relaxed) || self.0.memory.was_hit()
    }

    fn is_log_lost(&self) -> bool {
        self.0
            .memory
            .iter()
            .any(|region| region_bitmap(region).is_log_lost())
    }

    /// This memory with guest-physical addresses.
    pub fn view(&self) -> View<'_> {
        View {
            ram: self,
            iotlb: None,
            asks: false,
        }
    }

    /// This memory with I/O virtual addresses.
    pub fn view_through<'m>(&'m self, iotlb: &'m Iotlb) -> View<'m> {
        View {
            ram: self,
            iotlb: Some(iotlb),
            asks: true,
        }
    }

    /// [`View::slices`] with guest-physical addresses.
    pub fn slices(&self, addr: u64, len: usize, access: Access) -> Slices<'_> {
        self.view().slices(addr, len, access)
    }

    /// Writes to the dirty log of every region from now on, or no longer; see [`DirtyBitmap::set_enabled`]. A
    /// region that is added later starts with the log enabled.
    pub fn set_dirty_log_enabled(&self, enabled: bool) {
        for region in self.0.memory.iter() {
            region_bitmap(region).set_enabled(enabled);
        }
    }

    /// Whether writes to any region are logged.
    pub fn dirty_log_active(&self) -> bool {
        self.0
            .memory
            .iter()
            .any(|region| region_bitmap(region).is_active())
    }

    /// How many regions the memory table has.
    pub fn region_count(&self) -> usize {
        self.0.memory.num_regions()
    }

    /// Size of all regions together in bytes.
    pub fn total_bytes(&self) -> u64 {
        self.regions().map(|(_, len)| len).sum()
    }

    /// Guest-physical start and length in bytes of each region, in the order of addresses.
    pub fn regions(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.0
            .memory
            .iter()
            .map(|region| (region.start_addr().raw_value(), region.len()))
    }

    /// The memory table itself.
    #[cfg(test)]
    pub(super) fn memory(&self) -> &Arc<Memory> {
        self.0.memory.memory()
    }
}

/// Guest memory as one ring addresses it: guest-physical, or through the IOTLB.
#[derive(Clone, Copy, Debug)]
pub struct View<'m> {
    ram: &'m GuestRam,
    iotlb: Option<&'m Iotlb>,
    /// Whether the VMM is asked for what is not translated.
    asks: bool,
}

impl<'m> From<&'m GuestRam> for View<'m> {
    fn from(ram: &'m GuestRam) -> View<'m> {
        ram.view()
    }
}

impl<'m> View<'m> {
    /// The range of `len` bytes from `addr` on, as the pieces it consists of, in order. Ends after the first
    /// fault. An empty range has no pieces, wherever it is.
    pub fn slices(self, addr: u64, len: usize, access: Access) -> Slices<'m> {
        let wraps = len > 0 && addr.checked_add(len as u64 - 1).is_none();
        Slices {
            view: self,
            addr,
            left: len,
            access,
            fault: wraps.then_some(MemoryFault::Wraps { addr, len }),
        }
    }

    /// [`GuestRam::is_lost`].
    pub fn is_lost(self) -> bool {
        self.ram.is_lost()
    }

    /// A system call that was given a slice of this memory could not access it
    /// ([`is_memory_fault`](crate::sys::vectored::is_memory_fault)): it is lost.
    pub fn mark_lost(self) {
        self.ram.0.refused.store(true, Ordering::Relaxed);
        sigbus::count_fault();
    }

    /// The same memory, of which no question and no count comes: for a look that nobody waits for. What is not translated
    /// is [`MemoryFault::Missing`].
    pub fn without_asking(self) -> View<'m> {
        View { asks: false, ..self }
    }

    /// What is looked up from now on is one thing: the chain or the ring that it is for waits for all of its translations, and
    /// fails with one refusal.
    pub(super) fn begin_walk(self) {
        if let Some(iotlb) = self.iotlb
            && self.asks
        {
            iotlb.begin_walk();
        }
    }

    /// Whether something that was looked up since [`View::begin_walk`] has been asked for and not been answered.
    pub(super) fn awaits_answers(self) -> bool {
        self.iotlb.is_some_and(Iotlb::awaits)
    }

    /// Whether nothing more can be asked for now.
    pub(super) fn questions_are_full(self) -> bool {
        self.iotlb.is_some_and(Iotlb::is_full)
    }

    /// Forgets the refusals that were found since [`View::begin_walk`]: what they were for has failed.
    pub(super) fn forget_refusals(self) {
        if let Some(iotlb) = self.iotlb {
            iotlb.forget_refusals();
        }
    }

    /// The piece of memory at `addr`, at most `len` bytes long. `len` is not 0.
    fn piece(self, addr: u64, len: usize, access: Access) -> Result<Slice<'m>, MemoryFault> {
        let (addr, len) = match self.iotlb {
            None => (addr, len),
            Some(iotlb) if self.asks => iotlb.translate(addr, len, access)?,
            Some(iotlb) => iotlb.peek(addr, len, access)?,
        };
        let unmapped = MemoryFault::Unmapped { addr, len };
        let memory = &self.ram.0.memory;
        let region = memory.find_region(GuestAddress(addr)).ok_or(unmapped)?;
        let at = region.to_region_addr(GuestAddress(addr)).ok_or(unmapped)?;
        let in_region = usize::try_from(region.len() - at.raw_value()).unwrap_or(usize::MAX);
        region.get_slice(at, len.min(in_region)).map_err(|_| unmapped)
    }
}

/// The log of a region itself. (`GuestMemoryRegion::bitmap`, which shadows this, gives a slice of it.)
fn region_bitmap(region: &GuestRegionMmap<DirtyBitmap>) -> &DirtyBitmap {
    (**region).bitmap()
}

/// The pieces of a range of guest memory; see [`View::slices`].
#[derive(Debug)]
pub struct Slices<'m> {
    view: View<'m>,
    /// Where the next piece begins.
    addr: u64,
    /// Bytes that are not yet in a piece.
    left: usize,
    access: Access,
    /// What is to be said before anything else.
    fault: Option<MemoryFault>,
}

impl<'m> Iterator for Slices<'m> {
    type Item = Result<Slice<'m>, MemoryFault>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.left == 0 {
            return None;
        }
        let piece = match self.fault.take() {
            Some(fault) => Err(fault),
            None => self.view.piece(self.addr, self.left, self.access),
        };
        match &piece {
            // The last byte of the range has an address, so only the address behind the last piece can wrap.
            Ok(slice) => {
                self.left = self.left.saturating_sub(slice.len());
                self.addr = self.addr.wrapping_add(slice.len() as u64);
            }
            Err(_) => self.left = 0,
        }
        Some(piece)
    }
}
