//! The driver's structures in memory, as the device reaches them: mapped in an IOMMU, taken away, moved.

use super::{Driver, RX, TX};
use crate::embedded_guest::dma::{Dma, DmaStats};
use crate::embedded_guest::error::{Error, Result};
use crate::embedded_guest::memory::{PAGE, Window};

/// A structure of the driver in memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Area {
    /// The ring of a queue: descriptors, available ring, used ring.
    Ring(u16),
    /// The receive buffers.
    RxBuffers,
    /// The transmit buffers.
    TxBuffers,
}

/// Buffers that are mapped in the IOMMU: addresses and lengths.
pub(super) type Mapped = Vec<(u64, usize)>;

impl Driver {
    /// What the reset of a machine does to the vIOMMU while the rings still run: nothing is mapped any more, and the device
    /// is told.
    pub fn reset_iommu(&mut self) {
        if let Some(dma) = &self.dma {
            dma.reset(self.rings_end);
        }
    }

    /// Pages of an area.
    pub fn pages(&self, area: Area) -> usize {
        self.area(area).len().div_ceil(PAGE)
    }

    /// A page of memory that nothing uses; answers its guest-physical address.
    pub fn spare_page(&mut self) -> Result<u64> {
        Ok(self.memory.allocate(PAGE, PAGE as u64)?.bus())
    }

    /// Moves page `page` of an area to the spare page at `gpa` while the device uses it: the addresses it knows stay, what
    /// they mean changes. Answers the old page's guest-physical address. From then on the device touches it no more: it
    /// holds `fill`, in every byte, until somebody breaks that rule. Fails without an IOMMU that maps pages.
    pub fn move_page(&mut self, area: Area, page: usize, gpa: u64, fill: u8) -> Result<u64> {
        let window = self.area(area).clone();
        match &self.dma {
            Some(dma) => dma.move_page(&self.memory, &window, page, gpa, &[fill; PAGE]),
            None => Err(Error::Address { gpa, len: PAGE }),
        }
    }

    /// Unmaps a receive buffer that the device still has, and waits until it has acknowledged: what follows is a fault of
    /// the driver's making. Its address means nothing from now on. Answers whether the buffer was mapped.
    pub fn take_rx_buffer_away(&mut self, buffer: u16) -> bool {
        let mapped = self.rx_mapped.get_mut(usize::from(buffer)).map(std::mem::take);
        let (Some(dma), Some(mapped)) = (&self.dma, mapped) else {
            return false;
        };
        for (addr, len) in &mapped {
            dma.take_away(*addr, *len);
        }
        !mapped.is_empty()
    }

    /// What was done about the IOMMU so far; all zero without one.
    pub fn dma_stats(&self) -> DmaStats {
        self.dma.as_ref().map(Dma::stats).unwrap_or_default()
    }

    /// The pages of an area that the device can reach now, by their number in it.
    pub fn busy_pages(&self, area: Area) -> Vec<usize> {
        let Some(mapped) = self.dma.as_ref().map(Dma::mapped_user_pages) else {
            return Vec::new();
        };
        let window = self.area(area);
        (0..self.pages(area))
            .filter(|page| mapped.contains(&window.user_page(page * PAGE)))
            .collect()
    }

    fn area(&self, area: Area) -> &Window {
        match area {
            Area::Ring(RX) => self.rx.window(),
            Area::Ring(TX) => self.tx.window(),
            Area::Ring(_) => self.event.window(),
            Area::RxBuffers => &self.rx_area,
            Area::TxBuffers => &self.tx_area,
        }
    }
}

/// What the device calls `len` bytes at `offset` of a window, for one use; behind an IOMMU they are mapped.
pub(super) fn map(
    dma: Option<&Dma>,
    window: &Window,
    offset: usize,
    len: usize,
    perm: u8,
    mapped: &mut Mapped,
) -> u64 {
    let Some(dma) = dma else {
        return window.bus() + offset as u64;
    };
    let addr = dma.map(window, offset, len, perm);
    mapped.push((addr, len));
    addr
}

/// Ends the use of what was mapped.
pub(super) fn unmap(dma: Option<&Dma>, mapped: &mut Mapped) {
    for (addr, len) in mapped.drain(..) {
        if let Some(dma) = dma {
            dma.unmap(addr, len);
        }
    }
}
