//! Packets to the guest: the RX ring in bursts.
//!
//! Payload goes from the socket straight into the guest's buffers, before it is known how much there is:
//! chains are reserved, one `readv` fills as many as it can, and those that stay empty go back in place.
//!
//! ```text
//! reserve ──> push_payload ──> readv = n ──> commit(n, header)     n > 0
//!                                  └──────> reserve again, or finish: nothing was taken
//! control(header)                                               a packet without payload
//! finish                                                        once, then maybe Ring::signal
//! ```

use vm_memory::bitmap::Bitmap;

use super::burst::{Burst, Finished};
use super::fault::{RingError, RingFault};
use super::memory::{Access, Slice, View};
use super::ring::Ring;
use super::tx::take;
use crate::sys::iovec::IoVecs;
use crate::vsock::header::HEADER_LEN;

/// A chain that is held for payload. Indices are into the burst's slices.
#[derive(Clone, Copy, Debug)]
pub(super) struct Reserved {
    head: u16,
    /// First slice of the header slot.
    header_first: usize,
    /// First slice of the payload area; the header slot ends before.
    payload_first: usize,
    /// Behind the last slice of the payload area.
    end: usize,
    /// Length of the payload area in bytes, not 0.
    payload_len: u32,
}

/// Descriptors after which [`RxBurst::reserve`] takes no further chain. Far more than chains of a real driver have (two
/// each, 18 at the very most); but a chain may have 2000 of them and room for one byte, and a read which fills one
/// chain would walk through all that are held, over and over.
const MAX_DESCRIPTORS: usize = 2048;

/// A run of packets put into the RX ring, which the driver sees together when it ends.
pub struct RxBurst<'r, 'm> {
    burst: Burst<'r, 'm>,
    /// Bytes in the payload areas of the chains that are reserved.
    room: usize,
    /// How many of them [`RxBurst::fill`] has written.
    filled: usize,
}

impl<'r, 'm> RxBurst<'r, 'm> {
    /// Begins to fill buffers of the RX ring.
    pub fn begin(ring: &'r mut Ring, ram: impl Into<View<'m>>) -> Result<RxBurst<'r, 'm>, RingError> {
        Ok(RxBurst {
            burst: Burst::begin(ring, ram.into())?,
            room: 0,
            filled: 0,
        })
    }

    /// Whether the driver has posted a buffer, be it good or not, that does not wait for a translation. What was held before
    /// goes back first.
    pub fn has_buffer(&mut self) -> Result<bool, RingError> {
        self.give_back();
        Ok(self.burst.has_chain()? && self.burst.next_is_translated()?)
    }

    /// Holds chains until their payload areas have room for `limit` bytes, there are `max_chains` of them, or
    /// the driver has made no more available, or they consist of very many descriptors. Answers with the room in bytes, which may exceed `limit`; 0
    /// means that there is no buffer. What was held before goes back first.
    ///
    /// Chains that make no sense are queued to go back and counted ([`Ring::take_faults`]) when they are
    /// first in line.
    pub fn reserve(&mut self, limit: usize, max_chains: usize) -> Result<usize, RingError> {
        self.give_back();
        let mut descriptors = 0;
        while self.room < limit
            && self.burst.ring.reserved.len() < max_chains
            && descriptors < MAX_DESCRIPTORS
        {
            let header_first = self.burst.slices.len();
            match self.burst.next_chain(Access::Write) {
                None => break,
                Some(Err(_)) => {}
                Some(Ok((head, chain))) if chain.payload_len == 0 => {
                    // Good for a control packet only, but first in line: payload would wait behind it for
                    // ever. (And a read into no room at all looks like the end of the stream.)
                    self.burst.slices.truncate(header_first);
                    self.burst.ring.next_avail = self.burst.ring.next_avail.wrapping_sub(1);
                    if self.burst.reject(head, RingFault::NoPayloadRoom).is_none() {
                        break;
                    }
                }
                Some(Ok((head, chain))) => {
                    self.room = self.room.saturating_add(chain.payload_len as usize);
                    descriptors += chain.descriptors;
                    self.burst.ring.reserved.push(Reserved {
                        head,
                        header_first,
                        payload_first: chain.payload_first,
                        end: self.burst.slices.len(),
                        payload_len: chain.payload_len,
                    });
                }
            }
        }
        self.burst.failed()?;
        Ok(self.room)
    }

    /// Copies `bytes` into the payload areas that are held, behind what was copied before, as if they had
    /// been read from the socket; tells how many had room. For bytes that were read already, such as what
    /// follows a `CONNECT` line.
    pub fn fill(&mut self, bytes: &[u8]) -> usize {
        let mut copied = 0;
        for slice in self.payload(self.filled, self.filled.saturating_add(bytes.len())) {
            // The pieces are together no longer than `bytes`. Marks them dirty.
            let Some(rest) = bytes.get(copied..) else { break };
            slice.copy_from(rest);
            copied += slice.len();
        }
        self.filled += copied;
        copied
    }

    /// Adds the payload areas that are held, without what [`RxBurst::fill`] has written, to `list`: `limit`
    /// bytes at most, and as many pieces as it takes. Tells how many bytes were added.
    pub fn push_payload(&self, list: &mut IoVecs<'m>, limit: usize) -> usize {
        let mut bytes = 0;
        for slice in self.payload(self.filled, self.filled.saturating_add(limit)) {
            if !list.push(&slice) {
                break;
            }
            bytes += slice.len();
        }
        bytes
    }

    /// Makes packets of what was filled in and of the `read` bytes behind it that were read into what
    /// [`RxBurst::push_payload`] gave: one packet a chain, in order. `header` is asked for each packet's
    /// header with the length of its payload. Chains that stay empty go back in place. Answers with the
    /// number of packets.
    pub fn commit(
        &mut self,
        read: usize,
        mut header: impl FnMut(u32) -> [u8; HEADER_LEN],
    ) -> Result<usize, RingError> {
        debug_assert!(
            self.filled + read <= self.room,
            "more was read than there was room for"
        );
        let total = self.filled.saturating_add(read).min(self.room);
        let mut done = 0;
        let mut packets = 0;
        while done < total {
            let Some(chain) = self.burst.ring.reserved.get(packets).copied() else {
                break;
            };
            let len = (total - done).min(chain.payload_len as usize);
            // The kernel wrote these, unseen by the dirty log; what `fill` wrote is marked already.
            let payload = self
                .burst
                .slices
                .get(chain.payload_first..chain.end)
                .unwrap_or_default();
            for slice in take(payload.iter().copied(), self.filled.saturating_sub(done), len) {
                slice.bitmap().mark_dirty(0, slice.len());
            }
            // Not more than `payload_len`, which is a u32.
            let len = len as u32;
            self.write_header(chain.header_first, chain.payload_first, &header(len));
            // A chain is at most u32::MAX bytes long, header included.
            self.burst.push_used(chain.head, HEADER_LEN as u32 + len);
            self.burst.failed()?;
            done += len as usize;
            packets += 1;
        }
        self.give_back();
        Ok(packets)
    }

    /// Sends a packet without payload; `Ok(false)` when there is no buffer. What was held goes back first.
    pub fn control(&mut self, header: &[u8; HEADER_LEN]) -> Result<bool, RingError> {
        self.give_back();
        loop {
            match self.burst.next_chain(Access::Write) {
                None => {
                    self.burst.failed()?;
                    return Ok(false);
                }
                Some(Err(_)) => {}
                Some(Ok((head, chain))) => {
                    self.write_header(0, chain.payload_first, header);
                    self.burst.push_used(head, HEADER_LEN as u32);
                    self.burst.slices.clear();
                    self.burst.failed()?;
                    return Ok(true);
                }
            }
        }
    }

    /// Puts back what is held, in place.
    pub fn give_back(&mut self) {
        self.burst.give_back();
        self.room = 0;
        self.filled = 0;
    }

    /// Shows the driver all packets of this burst. What is still held goes back in place.
    ///
    /// A burst that is dropped without this shows them too, since their bytes have left the socket; an
    /// interrupt that is due then waits for the next burst that is finished.
    pub fn finish(self) -> Result<Finished, RingError> {
        self.burst.finish()
    }

    fn write_header(&self, first: usize, end: usize, header: &[u8; HEADER_LEN]) {
        let mut at = 0;
        for slice in self.burst.slices.get(first..end).unwrap_or_default() {
            // `walk` cuts the slices so that they end with the header.
            let Some(rest) = header.get(at..) else { break };
            slice.copy_from(rest);
            at += slice.len();
        }
    }

    /// The bytes `from..to` of the payload areas that are held, seen as one run of bytes.
    fn payload(&self, from: usize, to: usize) -> impl Iterator<Item = Slice<'m>> + '_ {
        let areas = self.burst.ring.reserved.iter().flat_map(|chain| {
            self.burst
                .slices
                .get(chain.payload_first..chain.end)
                .unwrap_or_default()
        });
        take(areas.copied(), from, to)
    }
}
