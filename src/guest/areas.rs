//! The three areas of a split virtqueue in guest memory, found once a burst (virtio 1.2, sections 2.7.5 to
//! 2.7.8).

use std::sync::atomic::Ordering;

use vm_memory::Bytes;

use super::fault::{RingArea, RingError};
use super::memory::{Access, MemoryFault, Slice, View};

/// VIRTQ_DESC_F_NEXT: the chain goes on with descriptor `next`.
pub(super) const DESC_NEXT: u16 = 1;
/// VIRTQ_DESC_F_WRITE: the buffer is for the device to write.
pub(super) const DESC_WRITE: u16 = 2;
/// VIRTQ_DESC_F_INDIRECT: the buffer is a table of descriptors.
pub(super) const DESC_INDIRECT: u16 = 4;
/// Length of a descriptor in bytes.
pub(super) const DESC_LEN: usize = 16;

/// VIRTQ_AVAIL_F_NO_INTERRUPT.
const AVAIL_NO_INTERRUPT: u16 = 1;
/// VIRTQ_USED_F_NO_NOTIFY.
const USED_NO_NOTIFY: u16 = 1;

/// Offsets in the available and the used ring alike.
const FLAGS: usize = 0;
const INDEX: usize = 2;
const ELEMENTS: usize = 4;

/// A descriptor, copied out of guest memory once.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Descriptor {
    /// Address of the buffer.
    pub addr: u64,
    /// Length of the buffer in bytes.
    pub len: u32,
    /// VIRTQ_DESC_F_ bits.
    pub flags: u16,
    /// Which descriptor comes next, if `flags` has NEXT.
    pub next: u16,
}

impl Descriptor {
    fn decode(bytes: [u8; DESC_LEN]) -> Descriptor {
        let wire = u128::from_le_bytes(bytes);
        Descriptor {
            addr: wire as u64,
            len: (wire >> 64) as u32,
            flags: (wire >> 96) as u16,
            next: (wire >> 112) as u16,
        }
    }

    pub(super) fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }
}

/// A range of guest memory of which elements are read and written: one piece nearly always, more where it crosses a border
/// of memory regions or, with an IOMMU, of pages that are no neighbours in memory.
///
/// Further pieces lie in a vector that is not the range's own, so that its allocation can be kept (invariant 9).
#[derive(Debug)]
pub(super) struct Range<'m> {
    first: Slice<'m>,
    /// Which of the vector's pieces follow.
    rest: std::ops::Range<usize>,
}

impl<'m> Range<'m> {
    /// `len` is not 0. Appends to `pieces` what `first` does not cover.
    pub(super) fn resolve(
        ram: View<'m>,
        addr: u64,
        len: usize,
        access: Access,
        pieces: &mut Vec<Slice<'m>>,
    ) -> Result<Range<'m>, MemoryFault> {
        let mut slices = ram.slices(addr, len, access);
        let first = slices.next().ok_or(MemoryFault::Unmapped { addr, len })??;
        let start = pieces.len();
        if first.len() < len {
            for slice in slices {
                pieces.push(slice?);
            }
        }
        Ok(Range {
            first,
            rest: start..pieces.len(),
        })
    }

    /// The piece that holds the byte at `offset`, and where in it.
    fn locate<'a>(&'a self, pieces: &'a [Slice<'m>], offset: usize) -> Option<(&'a Slice<'m>, usize)> {
        if offset < self.first.len() {
            return Some((&self.first, offset));
        }
        let mut offset = offset - self.first.len();
        for piece in pieces.get(self.rest.clone())? {
            if offset < piece.len() {
                return Some((piece, offset));
            }
            offset -= piece.len();
        }
        None
    }

    fn load(&self, pieces: &[Slice<'m>], offset: usize, order: Ordering) -> Option<u16> {
        let (piece, at) = self.locate(pieces, offset)?;
        piece.load(at, order).ok().map(u16::from_le)
    }

    fn store(&self, pieces: &[Slice<'m>], offset: usize, value: u16, order: Ordering) -> Option<()> {
        let (piece, at) = self.locate(pieces, offset)?;
        piece.store(value.to_le(), at, order).ok()
    }

    /// Copies a descriptor out; piecewise where it crosses a border, since descriptors of indirect tables
    /// may.
    pub(super) fn descriptor(&self, pieces: &[Slice<'m>], index: usize) -> Option<Descriptor> {
        let mut bytes = [0; DESC_LEN];
        let mut copied = 0;
        while copied < DESC_LEN {
            let (piece, at) = self.locate(pieces, index * DESC_LEN + copied)?;
            copied += piece.offset(at).ok()?.copy_to(&mut bytes[copied..]);
        }
        Some(Descriptor::decode(bytes))
    }
}

/// The areas of one ring, found in guest memory.
#[derive(Debug)]
pub(super) struct Areas<'m> {
    desc: Range<'m>,
    avail: Range<'m>,
    used: Range<'m>,
    /// What the ranges have beyond their first pieces. The ring keeps its room.
    pieces: Vec<Slice<'m>>,
    /// Entries of the ring, a power of two.
    size: u16,
}

/// Where the areas of a ring are said to be.
#[derive(Clone, Copy, Debug)]
pub(super) struct Addresses {
    pub desc: u64,
    pub avail: u64,
    pub used: u64,
}

impl<'m> Areas<'m> {
    /// Finds the areas; `pieces` is empty. All three are looked up even if the first one is not translated, so that the VMM is
    /// asked for all of them at once.
    pub(super) fn resolve(
        ram: View<'m>,
        at: Addresses,
        size: u16,
        event_idx: bool,
        mut pieces: Vec<Slice<'m>>,
    ) -> Result<Areas<'m>, RingError> {
        let n = usize::from(size);
        // used_event and avail_event exist with VIRTIO_F_EVENT_IDX only; a ring at the end of memory may lack
        // them.
        let event = if event_idx { 2 } else { 0 };
        ram.begin_walk();
        let mut find = |area, addr, len, access| {
            Range::resolve(ram, addr, len, access, &mut pieces)
                .map_err(|fault| RingError::Memory { area, fault })
        };
        let desc = find(RingArea::DescriptorTable, at.desc, n * DESC_LEN, Access::Read);
        let avail = find(
            RingArea::Available,
            at.avail,
            ELEMENTS + 2 * n + event,
            Access::Read,
        );
        let used = find(RingArea::Used, at.used, ELEMENTS + 8 * n + event, Access::Write);
        match (desc, avail, used) {
            (Ok(desc), Ok(avail), Ok(used)) => Ok(Areas {
                desc,
                avail,
                used,
                pieces,
                size,
            }),
            (desc, avail, used) => {
                let errors = [desc.err(), avail.err(), used.err()];
                let mut errors = errors.into_iter().flatten();
                // What no answer to a question will mend is told first.
                let first = errors.next().unwrap_or(RingError::Torn { area: RingArea::Used });
                Err(errors.fold(first, |told, error| match told.awaits_translation() {
                    true => error,
                    false => told,
                }))
            }
        }
    }

    /// The vector of pieces, for its room.
    pub(super) fn take_pieces(&mut self) -> Vec<Slice<'m>> {
        std::mem::take(&mut self.pieces)
    }

    /// The descriptor table's entry `index`, which is less than the ring's size.
    pub(super) fn descriptor(&self, index: u16) -> Result<Descriptor, RingError> {
        let torn = RingError::Torn {
            area: RingArea::DescriptorTable,
        };
        self.desc.descriptor(&self.pieces, usize::from(index)).ok_or(torn)
    }

    /// How far the driver has made entries available. What it wrote before it wrote this is visible
    /// afterwards.
    pub(super) fn avail_idx(&self) -> Result<u16, RingError> {
        self.load_avail(INDEX, Ordering::Acquire)
    }

    /// The chain that the driver made available at the free-running `position`.
    pub(super) fn avail_head(&self, position: u16) -> Result<u16, RingError> {
        // Ordered behind the avail index by its Acquire.
        self.load_avail(ELEMENTS + 2 * self.slot(position), Ordering::Relaxed)
    }

    /// Up to which used index the driver wants no interrupt (VIRTIO_F_EVENT_IDX).
    pub(super) fn used_event(&self) -> Result<u16, RingError> {
        self.load_avail(ELEMENTS + 2 * usize::from(self.size), Ordering::Relaxed)
    }

    /// Whether the driver wants no interrupts at all (without VIRTIO_F_EVENT_IDX).
    pub(super) fn interrupts_unwanted(&self) -> Result<bool, RingError> {
        Ok(self.load_avail(FLAGS, Ordering::Relaxed)? & AVAIL_NO_INTERRUPT != 0)
    }

    /// Writes the used element of the free-running `position`. The driver looks at it only after
    /// [`Areas::set_used_idx`].
    pub(super) fn write_used(&self, position: u16, head: u16, len: u32) -> Result<(), RingError> {
        let offset = ELEMENTS + 8 * self.slot(position);
        // Two stores of 4 bytes: an element is aligned to 4 and may lie across a page border, so that with an
        // IOMMU its halves need not be neighbours.
        self.store_used_u32(offset, u32::from(head))?;
        self.store_used_u32(offset + 4, len)
    }

    /// Gives the driver every used element before the free-running `index`, and with them all that was
    /// written before.
    pub(super) fn set_used_idx(&self, index: u16) -> Result<(), RingError> {
        self.store_used(INDEX, index, Ordering::Release)
    }

    /// The used index that the driver can see.
    pub(super) fn used_idx(&self) -> Result<u16, RingError> {
        // Only a device writes it: there is nothing that this has to be ordered with.
        self.used
            .load(&self.pieces, INDEX, Ordering::Relaxed)
            .ok_or(RingError::Torn { area: RingArea::Used })
    }

    /// Asks to be kicked when the available index passes `position` (VIRTIO_F_EVENT_IDX).
    pub(super) fn set_avail_event(&self, position: u16) -> Result<(), RingError> {
        self.store_used(ELEMENTS + 8 * usize::from(self.size), position, Ordering::Relaxed)
    }

    /// Asks for kicks, or for none (without VIRTIO_F_EVENT_IDX).
    pub(super) fn set_kicks_wanted(&self, wanted: bool) -> Result<(), RingError> {
        self.store_used(FLAGS, if wanted { 0 } else { USED_NO_NOTIFY }, Ordering::Relaxed)
    }

    fn slot(&self, position: u16) -> usize {
        usize::from(position & (self.size - 1))
    }

    fn load_avail(&self, offset: usize, order: Ordering) -> Result<u16, RingError> {
        self.avail
            .load(&self.pieces, offset, order)
            .ok_or(RingError::Torn {
                area: RingArea::Available,
            })
    }

    fn store_used(&self, offset: usize, value: u16, order: Ordering) -> Result<(), RingError> {
        self.used
            .store(&self.pieces, offset, value, order)
            .ok_or(RingError::Torn { area: RingArea::Used })
    }

    fn store_used_u32(&self, offset: usize, value: u32) -> Result<(), RingError> {
        let torn = RingError::Torn { area: RingArea::Used };
        let (piece, at) = self.used.locate(&self.pieces, offset).ok_or(torn)?;
        piece
            .store(value.to_le(), at, Ordering::Relaxed)
            .map_err(|_| torn)
    }
}
