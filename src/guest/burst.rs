//! What TX and RX bursts have in common: taking heads, queueing used elements, publishing them once.

use std::mem;
use std::sync::atomic::{Ordering, fence};

use super::areas::Areas;
use super::chain::{self, Chain, WalkError};
use super::fault::{RingError, RingFault};
use super::memory::{Access, Slice, View};
use super::ring::Ring;

/// How many chains are looked at when one has to wait, itself included: what is asked for is bounded anyway (`MAX_OPEN` in
/// iotlb/questions.rs), this bounds the looking.
const LOOK_AHEAD: u16 = 16;

/// What a burst came to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Finished {
    /// How many chains went back to the driver.
    pub used: u16,
    /// Whether the driver wants to be interrupted: call [`Ring::signal`].
    pub interrupt: bool,
    /// Whether the next chain waits for a translation: there is nothing to take until an UPDATE or a refusal has come.
    pub parked: bool,
}

/// A ring while chains are taken from it.
///
/// Positions during a burst: `ring.published <= ring.next_used <= ring.next_avail <= avail_idx`, all
/// free-running. What is between `published` and `next_used` has its used element written; what is between
/// `next_used` and `next_avail` is reserved and goes back in place if nothing becomes of it (invariant 5).
pub(super) struct Burst<'r, 'm> {
    pub ring: &'r mut Ring,
    ram: View<'m>,
    areas: Areas<'m>,
    /// The available index as seen last.
    avail_idx: u16,
    /// Slices of the chains that are being worked on; its allocation is the ring's.
    pub slices: Vec<Slice<'m>>,
    /// Pieces of an indirect table; its allocation is the ring's.
    table: Vec<Slice<'m>>,
    /// Where the chain is that waits for a translation, free-running, and what its buffers are for.
    parked: Option<(u16, Access)>,
    /// Why the ring cannot go on; told by `finish`.
    broken: Option<RingError>,
}

impl<'r, 'm> Burst<'r, 'm> {
    pub(super) fn begin(ring: &'r mut Ring, ram: View<'m>) -> Result<Burst<'r, 'm>, RingError> {
        let areas = ring.areas(ram)?;
        ring.read_used_idx(&areas)?;
        let avail_idx = ring.seen_avail_idx(&areas)?;
        let slices = ring.scratch.take();
        let table = ring.table_room.take();
        Ok(Burst {
            ring,
            ram,
            areas,
            avail_idx,
            slices,
            table,
            parked: None,
            broken: None,
        })
    }

    /// Takes the next chain that is available and appends its slices. A chain which makes no sense is given
    /// back used, with nothing in it, and counted, unless something is reserved before it: then it stays
    /// where it is and this answers `None`, since chains are used in order. So does a chain that is not translated yet, and
    /// all behind it: the burst has come to its end (invariant 10).
    pub(super) fn next_chain(&mut self, access: Access) -> Option<Result<(u16, Chain), RingFault>> {
        let at = self.slices.len();
        let head = match self.next_head() {
            Ok(head) => head?,
            Err(error) => return self.fail(error),
        };
        match self.walk(head, access) {
            Ok(chain) => Some(Ok((head, chain))),
            Err(error) => {
                self.slices.truncate(at);
                self.ring.next_avail = self.ring.next_avail.wrapping_sub(1);
                match error {
                    WalkError::Ring(error) => self.fail(error),
                    WalkError::Chain(fault) => self.reject(head, fault),
                    WalkError::Awaits => {
                        self.parked = Some((self.ring.next_avail, access));
                        None
                    }
                }
            }
        }
    }

    fn walk(&mut self, head: u16, access: Access) -> Result<Chain, WalkError> {
        chain::walk(
            self.ram,
            &self.areas,
            self.ring.size(),
            head,
            access,
            &mut self.slices,
            &mut self.table,
        )
    }

    /// Whether the driver has made a chain available that is not taken and not known to wait for a translation. Says nothing
    /// of what it is like.
    pub(super) fn has_chain(&mut self) -> Result<bool, RingError> {
        if self.is_parked() {
            return Ok(false);
        }
        if self.ring.next_avail == self.avail_idx {
            self.avail_idx = self.ring.seen_avail_idx(&self.areas)?;
        }
        Ok(self.ring.next_avail != self.avail_idx)
    }

    /// Whether the next chain, which is available and for the device to write, can be judged now. Without an IOMMU it costs
    /// nothing; with one, a second walk, which is less than to have a packet and no place for it.
    pub(super) fn next_is_translated(&mut self) -> Result<bool, RingError> {
        if !self.ring.is_translated() {
            return Ok(true);
        }
        let at = self.slices.len();
        let head = self.areas.avail_head(self.ring.next_avail)?;
        let walked = self.walk(head, Access::Write);
        self.slices.truncate(at);
        if let Err(WalkError::Awaits) = walked {
            self.parked = Some((self.ring.next_avail, Access::Write));
            return Ok(false);
        }
        Ok(true)
    }

    /// Gives the chain `head`, which is the next one, back with nothing in it; see [`Burst::next_chain`].
    pub(super) fn reject(&mut self, head: u16, fault: RingFault) -> Option<Result<(u16, Chain), RingFault>> {
        if self.reserved() > 0 {
            return None;
        }
        self.ring.next_avail = self.ring.next_avail.wrapping_add(1);
        self.push_used(head, 0);
        self.ring.faults.add(fault);
        self.ram.forget_refusals();
        Some(Err(fault))
    }

    /// Whether the next chain is one that waits.
    fn is_parked(&self) -> bool {
        self.parked
            .is_some_and(|(position, _)| position == self.ring.next_avail)
    }

    /// Queues the used element of the chain `head`, which is the first one that is reserved.
    pub(super) fn push_used(&mut self, head: u16, len: u32) {
        match self.areas.write_used(self.ring.next_used, head, len) {
            Ok(()) => self.ring.next_used = self.ring.next_used.wrapping_add(1),
            Err(error) => self.broken = Some(error),
        }
    }

    /// Chains taken and not yet used.
    pub(super) fn reserved(&self) -> u16 {
        self.ring.next_avail.wrapping_sub(self.ring.next_used)
    }

    /// Puts back what is reserved, in place: the next burst finds it again.
    pub(super) fn give_back(&mut self) {
        self.ring.next_avail = self.ring.next_used;
        self.ring.reserved.clear();
        self.slices.clear();
    }

    pub(super) fn failed(&self) -> Result<(), RingError> {
        self.broken.map_or(Ok(()), Err)
    }

    /// Publishes the used elements with one write of the used index, and decides once whether to interrupt.
    pub(super) fn finish(mut self) -> Result<Finished, RingError> {
        let used = self.publish()?;
        self.failed()?;
        let parked = self.is_parked();
        self.look_ahead()?;
        // The decision covers what earlier bursts published when they were dropped.
        if self.ring.decided == Some(self.ring.published) {
            return Ok(Finished {
                used,
                interrupt: false,
                parked,
            });
        }
        // The used index must be visible before used_event or the flags are read: the driver writes those and
        // then reads the used index again (virtio 1.2, 2.7.7.2). A store and then a load: nothing less than
        // SeqCst orders these.
        fence(Ordering::SeqCst);
        let interrupt = match self.ring.decided {
            // Whoever served the ring before us may have published and died before it interrupted.
            None => true,
            Some(old) if self.ring.event_idx() => crossed(self.areas.used_event()?, self.ring.published, old),
            Some(_) => !self.areas.interrupts_unwanted()?,
        };
        self.ring.decided = Some(self.ring.published);
        Ok(Finished {
            used,
            interrupt,
            parked,
        })
    }

    /// Has the VMM asked for what the chains behind a parked one need, too. A guest with an IOMMU maps each packet's buffers
    /// anew, and a ring that learned of them one chain at a time would move one packet a round trip.
    fn look_ahead(&mut self) -> Result<(), RingError> {
        let Some((parked, access)) = self.parked else {
            return Ok(());
        };
        let available = self.avail_idx.wrapping_sub(parked);
        for ahead in 1..available.min(LOOK_AHEAD) {
            if self.ram.questions_are_full() {
                break;
            }
            let head = self.areas.avail_head(parked.wrapping_add(ahead))?;
            // Whatever is wrong with it is told when its turn has come.
            let _ = self.walk(head, access);
            self.slices.clear();
        }
        Ok(())
    }

    fn publish(&mut self) -> Result<u16, RingError> {
        self.give_back();
        let used = self.ring.next_used.wrapping_sub(self.ring.published);
        if used > 0 {
            self.areas.set_used_idx(self.ring.next_used)?;
            self.ring.published = self.ring.next_used;
        }
        Ok(used)
    }

    fn next_head(&mut self) -> Result<Option<u16>, RingError> {
        self.failed()?;
        if !self.has_chain()? {
            return Ok(None);
        }
        let position = self.ring.next_avail;
        let head = self.areas.avail_head(position)?;
        self.ring.next_avail = position.wrapping_add(1);
        Ok(Some(head))
    }

    fn fail<T>(&mut self, error: RingError) -> Option<T> {
        self.broken = Some(error);
        None
    }
}

impl Drop for Burst<'_, '_> {
    /// Without `finish`: chains that are used were dealt with, so they are published, or the next burst would
    /// deal with them again; what is reserved goes back in place. Whether to interrupt is decided by the next
    /// burst that finishes. After `finish` there is nothing left to publish.
    fn drop(&mut self) {
        // An error shows again in the next burst, as the ring's memory is no better then.
        let _ = self.publish();
        self.ring.scratch.put(mem::take(&mut self.slices));
        self.ring.table_room.put(mem::take(&mut self.table));
        self.ring.put_back(&mut self.areas);
    }
}

/// Whether the used index has passed `event` on its way from `old` to `new`: `vring_need_event` of virtio
/// 1.2, 2.7.7.
fn crossed(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}
