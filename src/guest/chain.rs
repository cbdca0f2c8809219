//! Descriptor chains: from a head to the slices of guest memory that it means.
//!
//! A chain is a byte stream cut into buffers anywhere (virtio 1.2, 2.7.4 "Message Framing"): nothing here
//! knows of "the header descriptor" and "the data descriptor".

use super::areas::{Areas, DESC_INDIRECT, DESC_LEN, DESC_NEXT, DESC_WRITE, Descriptor, Range};
use super::fault::{RingError, RingFault};
use super::memory::{Access, MemoryFault, Slice, View};
use super::ring::MAX_RING_SIZE;
use crate::vsock::header::HEADER_LEN;

/// Longest indirect table in descriptors. The standard says no longer than the ring, which Linux does not
/// check when it builds one (`virtqueue_add_split`, drivers/virtio/virtio_ring.c): 18 descriptors of a packet
/// must pass a ring of 16.
pub(super) const MAX_INDIRECT: usize = MAX_RING_SIZE as usize;

/// Most pieces of memory that a chain may consist of: one for each descriptor of a full ring and a full indirect table, and
/// one border of memory regions. With an IOMMU a piece may be as small as a page; then a packet of 64 KiB has 18.
///
/// Bounds what is asked of a VMM, and held translated at once, for one chain; and what one chain makes of an
/// [`IoVecs`](crate::sys::iovec::IoVecs).
pub(super) const MAX_PIECES: usize = 2 * MAX_RING_SIZE as usize;

/// What a chain comes to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Chain {
    /// The header is in the slices before this one, the payload area in this and the following.
    pub payload_first: usize,
    /// Length of the payload area in bytes.
    pub payload_len: u32,
    /// How many descriptors were read for it: what it cost.
    pub descriptors: usize,
}

/// Why a chain was not walked to its end.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum WalkError {
    /// The chain is to be given back, the ring is fine.
    Chain(RingFault),
    /// The ring cannot be served.
    Ring(RingError),
    /// The chain is not translated yet, as far as it can be known: it stays where it is.
    Awaits,
}

impl From<RingError> for WalkError {
    fn from(error: RingError) -> WalkError {
        WalkError::Ring(error)
    }
}

impl From<RingFault> for WalkError {
    fn from(fault: RingFault) -> WalkError {
        WalkError::Chain(fault)
    }
}

impl From<MemoryFault> for WalkError {
    fn from(fault: MemoryFault) -> WalkError {
        match fault {
            MemoryFault::Missing { .. } => WalkError::Awaits,
            fault => WalkError::Chain(fault.into()),
        }
    }
}

/// Follows the chain that begins at descriptor `head`, all of whose buffers must be for `access`, and appends
/// its slices to `out`, cut at the end of the packet header. After an error `out` may hold slices of this
/// chain. `pieces` is room for an indirect table.
///
/// Terminates for every content of guest memory (invariant 4): at most ring size + table length descriptors
/// are read.
///
/// Where a translation is missing the walk goes on as far as it can see, so that the VMM is asked for all of the chain at once.
/// No chain is judged as long as an answer is due for it: a refusal that comes when its chain has gone would be held against
/// another one.
pub(super) fn walk<'m>(
    ram: View<'m>,
    areas: &Areas<'m>,
    ring_size: u16,
    head: u16,
    access: Access,
    out: &mut Vec<Slice<'m>>,
    pieces: &mut Vec<Slice<'m>>,
) -> Result<Chain, WalkError> {
    ram.begin_walk();
    let buffers = Buffers {
        ram,
        access,
        total: 0,
        descriptors: 0,
        pieces: 0,
        lacks: None,
        payload_first: out.len(),
        out,
    };
    match follow(areas, ring_size, head, buffers, pieces) {
        Err(WalkError::Chain(_)) if ram.awaits_answers() => Err(WalkError::Awaits),
        end => end,
    }
}

fn follow<'m>(
    areas: &Areas<'m>,
    ring_size: u16,
    head: u16,
    mut buffers: Buffers<'m, '_>,
    pieces: &mut Vec<Slice<'m>>,
) -> Result<Chain, WalkError> {
    let mut index = head;
    if index >= ring_size {
        return Err(RingFault::HeadOutOfRange.into());
    }
    for _ in 0..ring_size {
        let descriptor = areas.descriptor(index)?;
        if descriptor.has(DESC_INDIRECT) {
            // Zero or more plain descriptors may come first, nothing may follow (2.7.5.3.1). WRITE has no
            // meaning here (2.7.5.3.2). Not looked at: whether VIRTIO_F_INDIRECT_DESC was negotiated. We
            // always offer it, and a driver that uses it unasked harms nobody.
            if descriptor.has(DESC_NEXT) {
                return Err(RingFault::IndirectWithNext.into());
            }
            walk_table(&descriptor, &mut buffers, pieces)?;
            return buffers.finish();
        }
        buffers.add(&descriptor)?;
        if !descriptor.has(DESC_NEXT) || buffers.sees_no_further() {
            return buffers.finish();
        }
        index = descriptor.next;
        if index >= ring_size {
            return Err(RingFault::NextOutOfRange.into());
        }
    }
    Err(RingFault::DescriptorLoop.into())
}

fn walk_table<'m>(
    table: &Descriptor,
    buffers: &mut Buffers<'m, '_>,
    pieces: &mut Vec<Slice<'m>>,
) -> Result<(), WalkError> {
    let bytes = table.len as usize;
    let entries = bytes / DESC_LEN;
    if !bytes.is_multiple_of(DESC_LEN) || entries == 0 || entries > MAX_INDIRECT {
        return Err(RingFault::IndirectLength.into());
    }
    pieces.clear();
    let range = match Range::resolve(buffers.ram, table.addr, bytes, Access::Read, pieces) {
        Ok(range) => range,
        Err(fault) => return buffers.lack(fault),
    };
    let mut index = 0;
    for _ in 0..entries {
        // `index` is below `entries`, so that the range has it.
        let descriptor = range.descriptor(pieces, index).ok_or(RingFault::NextOutOfRange)?;
        if descriptor.has(DESC_INDIRECT) {
            return Err(RingFault::IndirectNested.into());
        }
        buffers.add(&descriptor)?;
        if !descriptor.has(DESC_NEXT) || buffers.sees_no_further() {
            return Ok(());
        }
        index = usize::from(descriptor.next);
        if index >= entries {
            return Err(RingFault::NextOutOfRange.into());
        }
    }
    Err(RingFault::DescriptorLoop.into())
}

/// The buffers of a chain as they are found.
struct Buffers<'m, 'o> {
    ram: View<'m>,
    access: Access,
    /// Bytes so far.
    total: u64,
    /// Descriptors so far, empty ones too.
    descriptors: usize,
    /// Pieces of memory so far.
    pieces: usize,
    /// Why some of it has no slices: not translated, or refused.
    lacks: Option<WalkError>,
    /// How many slices of `out` are not payload of this chain.
    payload_first: usize,
    out: &'o mut Vec<Slice<'m>>,
}

impl<'m> Buffers<'m, '_> {
    fn add(&mut self, descriptor: &Descriptor) -> Result<(), WalkError> {
        self.descriptors += 1;
        if descriptor.has(DESC_WRITE) != (self.access == Access::Write) {
            return Err(RingFault::WrongDirection.into());
        }
        if self.total + u64::from(descriptor.len) > u64::from(u32::MAX) {
            return Err(RingFault::ChainTooBig.into());
        }
        let behind = self.total + u64::from(descriptor.len);
        // An empty buffer has no slices, whatever its address says: Linux never sends one, others may.
        for slice in self
            .ram
            .slices(descriptor.addr, descriptor.len as usize, self.access)
        {
            match slice {
                Ok(slice) => self.push(slice)?,
                Err(fault) => self.lack(fault)?,
            }
        }
        self.total = behind;
        Ok(())
    }

    /// Remembers a fault that tells nothing about the descriptors behind.
    fn lack(&mut self, fault: MemoryFault) -> Result<(), WalkError> {
        match (fault, self.lacks) {
            (MemoryFault::Refused { .. }, _) | (MemoryFault::Missing { .. }, None) => {
                self.lacks = Some(fault.into());
                Ok(())
            }
            (MemoryFault::Missing { .. }, Some(_)) => Ok(()),
            (fault, _) => Err(fault.into()),
        }
    }

    /// Whether there is no use in walking on: the chain cannot be served now, and nothing more can be asked.
    fn sees_no_further(&self) -> bool {
        self.lacks.is_some() && self.ram.questions_are_full()
    }

    fn push(&mut self, slice: Slice<'m>) -> Result<(), WalkError> {
        self.pieces += 1;
        if self.pieces > MAX_PIECES {
            return Err(RingFault::TooManyPieces.into());
        }
        let header_left = HEADER_LEN.saturating_sub(usize::try_from(self.total).unwrap_or(HEADER_LEN));
        self.total += slice.len() as u64;
        if header_left == 0 {
            self.out.push(slice);
            return Ok(());
        }
        self.payload_first += 1;
        if slice.len() <= header_left {
            self.out.push(slice);
        } else {
            // The header ends within this slice, so `split_at` is in its bounds.
            let (header, payload) = slice
                .split_at(header_left)
                .map_err(|_| RingFault::AddressUnmapped)?;
            self.out.push(header);
            self.out.push(payload);
        }
        Ok(())
    }

    fn finish(self) -> Result<Chain, WalkError> {
        if let Some(lacks) = self.lacks {
            return Err(lacks);
        }
        let payload = self
            .total
            .checked_sub(HEADER_LEN as u64)
            .ok_or(RingFault::ChainTooShort)?;
        let payload_len = u32::try_from(payload).map_err(|_| RingFault::ChainTooBig)?;
        Ok(Chain {
            payload_first: self.payload_first,
            payload_len,
            descriptors: self.descriptors,
        })
    }
}
