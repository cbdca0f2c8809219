//! Packets from the guest: the TX ring in bursts.

use super::burst::{Burst, Finished};
use super::fault::{RingError, RingFault};
use super::memory::{Access, Slice, View};
use super::ring::Ring;
use crate::vsock::header::HEADER_LEN;

/// A run of packets taken from the TX ring, which go back to the driver together when it ends.
///
/// Until [`TxBurst::finish`] the driver does not own a buffer again, so payload slices of many packets may be
/// gathered for one `writev`, which must be done before. A burst that is dropped instead also gives them
/// back; see there.
pub struct TxBurst<'r, 'm> {
    burst: Burst<'r, 'm>,
}

impl<'r, 'm> TxBurst<'r, 'm> {
    /// Begins to take packets. Not more than the ring has entries come out of one burst.
    pub fn begin(ring: &'r mut Ring, ram: impl Into<View<'m>>) -> Result<TxBurst<'r, 'm>, RingError> {
        Ok(TxBurst {
            burst: Burst::begin(ring, ram.into())?,
        })
    }

    /// The next packet; `None` when the driver has sent no more, or when the ring has broken, of which
    /// `finish` tells.
    ///
    /// A fault means that one chain made no sense: it is queued to go back, counted ([`Ring::take_faults`]),
    /// and the next call goes on behind it.
    pub fn pop(&mut self) -> Option<Result<TxPacket<'_, 'm>, RingFault>> {
        self.burst.slices.clear();
        let (head, chain) = match self.burst.next_chain(Access::Read)? {
            Ok(found) => found,
            Err(fault) => return Some(Err(fault)),
        };
        // We wrote nothing into the chain, hence length 0 (2.7.8).
        self.burst.push_used(head, 0);
        let (header_slices, payload) = self
            .burst
            .slices
            .split_at_checked(chain.payload_first)
            .unwrap_or_default();
        // Invariant 1: this is the only time that the header's bytes are read.
        let mut header = [0; HEADER_LEN];
        let mut at = 0;
        for slice in header_slices {
            // `walk` cuts the slices so that they end with the header.
            at += header.get_mut(at..).map_or(0, |rest| slice.copy_to(rest));
        }
        Some(Ok(TxPacket {
            header,
            payload_len: chain.payload_len,
            payload,
        }))
    }

    /// Gives every packet back to the driver.
    ///
    /// A burst that is dropped without this gives them back too, since they have been acted upon; an
    /// interrupt that is due then waits for the next burst that is finished.
    pub fn finish(self) -> Result<Finished, RingError> {
        self.burst.finish()
    }
}

/// A packet in guest memory. Ends before the next is taken; its payload's slices last longer.
#[derive(Clone, Copy, Debug)]
pub struct TxPacket<'b, 'm> {
    /// The header's bytes, ours: the guest cannot change them any more.
    pub header: [u8; HEADER_LEN],
    /// Bytes that follow the header in the chain. Not what the header says of it, which may be less or more.
    pub payload_len: u32,
    payload: &'b [Slice<'m>],
}

impl<'b, 'm> TxPacket<'b, 'm> {
    /// The first `len` bytes of what follows the header, in order; all of it if there is less. The guest may
    /// still change them.
    pub fn payload(&self, len: u32) -> impl Iterator<Item = Slice<'m>> + use<'b, 'm> {
        take(self.payload.iter().copied(), 0, len as usize)
    }

    /// As [`TxPacket::payload`], without the first `skip` of those bytes.
    pub fn payload_from(&self, skip: u32, len: u32) -> impl Iterator<Item = Slice<'m>> + use<'b, 'm> {
        take(self.payload.iter().copied(), skip as usize, len as usize)
    }
}

/// The bytes `from..to` of `slices`, seen as one run of bytes.
pub(super) fn take<'m>(
    slices: impl Iterator<Item = Slice<'m>>,
    from: usize,
    to: usize,
) -> impl Iterator<Item = Slice<'m>> {
    let mut skip = from;
    let mut left = to.saturating_sub(from);
    slices
        .map_while(move |slice| {
            if left == 0 {
                return None;
            }
            let passed = skip.min(slice.len());
            let len = left.min(slice.len() - passed);
            skip -= passed;
            left -= len;
            slice.subslice(passed, len).ok()
        })
        .filter(|slice| !slice.is_empty())
}
