//! The driver's DMA mappings: what Linux's dma_map_* and dma_alloc_coherent do with a vIOMMU underneath.
//!
//! A page is in the table before the device hears of its address, and out of it before the device hears that it may no
//! longer use it. What follows an unmapping depends on the mode:
//!
//! - strict (`iommu.strict=1`): INVALIDATE, acknowledged, before the page is used for anything else;
//! - lazy (`iommu.strict=0`): ranges are collected, then everything is invalidated at once, and their addresses are used
//!   again only then. The pages are used again before: what that mode gives up.

use std::collections::HashSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::channels::Channels;
use super::error::{Error, Result};
use super::iommu::{Granule, Iommu, READ, WHOLE_OFFSET, WRITE, reset_ranges};
use super::memory::{GuestMemory, PAGE, Window};

/// When the device is told that a buffer is no longer mapped.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Unmap {
    /// At once, and it must have answered before the buffer is used again.
    Strict,
    /// After so many buffers, with one INVALIDATE of everything.
    Lazy(usize),
}

/// The guest's IOMMU and its habits.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct IommuOptions {
    /// How memory is mapped.
    pub granule: Granule,
    /// How it is unmapped. Nothing is under [`Granule::Whole`].
    pub unmap: Unmap,
    /// Whether mapping tells the device as well (QEMU's `caching-mode=on`).
    pub caching_mode: bool,
    /// Whether misses are answered by whoever waits for an answer too, as in QEMU 7.2; see
    /// `embedded_guest/channels.rs`.
    pub nested: bool,
    /// Whether UPDATE tells what the page is mapped for. QEMU always says read and write.
    pub exact_permission: bool,
}

impl Default for IommuOptions {
    /// Linux with `iommu.strict=1` under QEMU 7.2 with `-device intel-iommu,caching-mode=on,device-iotlb=on`.
    fn default() -> IommuOptions {
        IommuOptions {
            granule: Granule::Page,
            unmap: Unmap::Strict,
            caching_mode: true,
            nested: true,
            exact_permission: false,
        }
    }
}

/// What was done so far.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct DmaStats {
    /// INVALIDATE messages that the device has acknowledged.
    pub invalidations: u64,
    /// INVALIDATE messages that failed: refused, or the session was over.
    pub failures: u64,
    /// Pages that were moved under the device's feet.
    pub moved: u64,
}

/// The mappings of one device. Clones share them.
#[derive(Clone, Debug)]
pub(super) struct Dma(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    iommu: Arc<Iommu>,
    channels: Arc<Channels>,
    options: IommuOptions,
    /// Ranges that are unmapped and not invalidated (lazy mode).
    stale: Mutex<Vec<(u64, u64)>>,
    invalidations: AtomicU64,
    failures: AtomicU64,
    moved: AtomicU64,
}

impl Dma {
    pub(super) fn new(iommu: Arc<Iommu>, channels: Arc<Channels>, options: IommuOptions) -> Dma {
        Dma(Arc::new(Inner {
            iommu,
            channels,
            options,
            stale: Mutex::default(),
            invalidations: AtomicU64::new(0),
            failures: AtomicU64::new(0),
            moved: AtomicU64::new(0),
        }))
    }

    /// Takes memory for a structure of the driver. It is not mapped yet, unless all memory is.
    pub(super) fn allocate(&self, memory: &mut GuestMemory, len: usize) -> Result<Window> {
        if self.maps_pages() {
            return memory.allocate_scattered(len);
        }
        let mut window = memory.allocate(len, PAGE as u64)?;
        window.set_bus(window.bus() + WHOLE_OFFSET);
        Ok(window)
    }

    /// Maps a window for as long as the driver lives, for reading and writing: rings.
    pub(super) fn map_coherent(&self, window: &mut Window) {
        if self.maps_pages() {
            let pages = window.user_pages(0, window.len());
            window.set_bus(self.0.iommu.map(&pages, READ | WRITE));
        }
    }

    /// The same at the address of another window: the ring's memory is another, its address stays.
    pub(super) fn map_coherent_at(&self, window: &mut Window, bus: u64) {
        if self.maps_pages() {
            let pages = window.user_pages(0, window.len());
            self.0.iommu.map_at(bus, &pages, READ | WRITE);
            window.set_bus(bus);
        }
    }

    /// Maps `len` bytes at `offset` of a window for one use; answers the device's address.
    pub(super) fn map(&self, window: &Window, offset: usize, len: usize, perm: u8) -> u64 {
        if !self.maps_pages() {
            return window.bus() + offset as u64;
        }
        let pages = window.user_pages(offset, len.max(1));
        let iova = self.0.iommu.map(&pages, perm);
        if self.0.options.caching_mode {
            self.invalidate(iova, (pages.len() * PAGE) as u64);
        }
        // A window in pages begins with a page.
        iova + (offset % PAGE) as u64
    }

    /// Ends the use of what [`Dma::map`] answered.
    pub(super) fn unmap(&self, iova: u64, len: usize) {
        if !self.maps_pages() {
            return;
        }
        let (first, size) = self.0.iommu.unmap(iova, len.max(1));
        match self.0.options.unmap {
            Unmap::Strict => {
                self.invalidate(first, size);
                self.0.iommu.free(first, size);
            }
            Unmap::Lazy(batch) => {
                let stale = {
                    let mut stale = self.0.stale.lock().unwrap_or_else(PoisonError::into_inner);
                    stale.push((first, size));
                    if stale.len() < batch {
                        return;
                    }
                    std::mem::take(&mut *stale)
                };
                // Size 0 is everything: QEMU's mask of a global flush, plus one, wraps to that.
                self.invalidate(0, 0);
                for (first, size) in stale {
                    self.0.iommu.free(first, size);
                }
            }
        }
    }

    /// Takes away what the device may still use, and tells it. The addresses stay unused: they mean nothing for good.
    pub(super) fn take_away(&self, iova: u64, len: usize) {
        if self.maps_pages() {
            let (first, size) = self.0.iommu.unmap(iova, len.max(1));
            self.invalidate(first, size);
        }
    }

    /// The reset of the machine's vIOMMU: nothing is mapped any more, and the device is told in ranges as QEMU tells it,
    /// while its rings still run. Addresses below `keep` are free again.
    pub(super) fn reset(&self, keep: u64) {
        self.forget(keep);
        for (first, size) in reset_ranges() {
            self.invalidate(first, size);
        }
    }

    /// Nothing is mapped any more, and nobody is told: the rings stand still.
    pub(super) fn forget(&self, keep: u64) {
        if self.maps_pages() {
            self.0.iommu.clear(keep);
        }
        self.0
            .stale
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clear();
    }

    /// Moves a page of a window to `gpa`, although the device may be using it this moment: takes it out of the table, waits
    /// for the INVALIDATE's acknowledgement, copies, fills the old page with `fill`, puts the new one into the table. From
    /// the acknowledgement on, the device must neither read the old page (it would see `fill`) nor write to it. Answers the
    /// old page's guest-physical address.
    ///
    /// The caller keeps the driver from writing meanwhile.
    pub(super) fn move_page(
        &self,
        memory: &GuestMemory,
        window: &Window,
        page: usize,
        gpa: u64,
        fill: &[u8; PAGE],
    ) -> Result<u64> {
        let inner = &*self.0;
        let turn = &mut *inner.channels.turn();
        let iovas = inner.iommu.moving(window.user_page(page * PAGE));
        let told = iovas
            .iter()
            .try_for_each(|iova| inner.channels.invalidate(turn, *iova, PAGE as u64));
        inner
            .invalidations
            .fetch_add(iovas.len() as u64, Ordering::Relaxed);
        let old = window
            .move_page(page, gpa)
            .ok_or(Error::Address { gpa, len: PAGE })?;
        memory.write(old, fill)?;
        inner.iommu.moved(&iovas, window.user_page(page * PAGE));
        inner.moved.fetch_add(1, Ordering::Relaxed);
        inner.channels.pages_arrived(turn)?;
        told.map(|()| old)
    }

    /// The session's channels.
    #[cfg(test)]
    pub(super) fn channels(&self) -> &Arc<Channels> {
        &self.0.channels
    }

    /// The front-end's addresses of all pages that are mapped.
    pub(super) fn mapped_user_pages(&self) -> HashSet<u64> {
        self.0.iommu.user_pages()
    }

    /// The lowest address that is taken.
    pub(super) fn bottom(&self) -> u64 {
        self.0.iommu.bottom()
    }

    /// Whether memory is mapped in pages, rather than all of it for good.
    pub(super) fn maps_pages(&self) -> bool {
        self.0.options.granule == Granule::Page
    }

    pub(super) fn stats(&self) -> DmaStats {
        DmaStats {
            invalidations: self.0.invalidations.load(Ordering::Relaxed),
            failures: self.0.failures.load(Ordering::Relaxed),
            moved: self.0.moved.load(Ordering::Relaxed),
        }
    }

    /// Tells the device and waits. A failure is counted: the driver goes on, as it would with a device that is gone.
    fn invalidate(&self, first: u64, size: u64) {
        let channels = &self.0.channels;
        let told = channels.invalidate(&mut channels.turn(), first, size);
        let counter = if told.is_ok() {
            &self.0.invalidations
        } else {
            &self.0.failures
        };
        counter.fetch_add(1, Ordering::Relaxed);
    }
}
