//! The device's IOTLB: which ranges of I/O virtual addresses mean which guest-physical memory, for what access.
//!
//! One a device, owned by its thread: both data rings share one IOVA space. The VMM fills it (UPDATE) and empties it
//! (INVALIDATE); a lookup that finds nothing is a *miss*, a value that the device thread sends to the VMM and never waits for.

use std::time::Instant;

use super::memory::{Access, MemoryFault};

/// What a mapping allows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Permission {
    /// VHOST_ACCESS_RO.
    Read,
    /// VHOST_ACCESS_WO.
    Write,
    /// VHOST_ACCESS_RW.
    ReadWrite,
}

/// A range of I/O virtual addresses and what it means.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Mapping {
    /// First I/O virtual address.
    pub iova: u64,
    /// Bytes; not 0, and `iova + (len - 1)` does not wrap.
    pub len: u64,
    /// Guest-physical address that `iova` means; `gpa + (len - 1)` does not wrap.
    pub gpa: u64,
    /// What is allowed.
    pub permission: Permission,
}

/// A translation that the VMM is asked for.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Miss {
    /// The first I/O virtual address of the missing range.
    pub iova: u64,
    /// What it is wanted for, and nothing more: a VMM refuses write access to what the guest mapped for reading.
    pub access: Access,
}

/// What an [`Iotlb`] holds and has seen.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct IotlbStats {
    /// Mappings that are held.
    pub entries: u64,
    /// Bytes that they cover.
    pub mapped_bytes: u64,
    /// Lookups so far.
    pub lookups: u64,
    /// Lookups that found no usable mapping.
    pub misses: u64,
    /// Mappings that were dropped to make room.
    pub evictions: u64,
    /// Misses that are sent and not answered.
    pub unanswered: u64,
}

/// The translations of one device.
#[derive(Debug, Default)]
pub struct Iotlb {}

impl Iotlb {
    /// An empty one.
    pub fn new() -> Iotlb {
        Iotlb::default()
    }

    /// Takes a mapping in. What it overlaps gives way.
    pub fn insert(&mut self, _mapping: Mapping) {}

    /// Forgets what is mapped from `first` to `last`, both included.
    pub fn invalidate(&mut self, _first: u64, _last: u64) {}

    /// Forgets every mapping, refusal and question.
    pub fn flush(&mut self) {}

    /// The VMM has answered a miss: with an UPDATE before, or by a refusal.
    pub fn answered(&mut self, _miss: Miss, _refused: bool) {}

    /// The misses that have to be sent, each once; they count as sent at `now`.
    pub fn take_misses(&mut self, _now: Instant) -> Vec<Miss> {
        Vec::new()
    }

    /// The miss that has waited longest for its answer, and since when.
    pub fn oldest_unanswered(&self) -> Option<(Miss, Instant)> {
        None
    }

    /// What it holds and has seen.
    pub fn stats(&self) -> IotlbStats {
        IotlbStats::default()
    }

    /// The guest-physical address that `addr` means, and for how many of the `len` bytes from there on. `len` is not 0.
    pub(super) fn translate(
        &self,
        addr: u64,
        len: usize,
        _access: Access,
    ) -> Result<(u64, usize), MemoryFault> {
        Err(MemoryFault::Unmapped { addr, len })
    }
}
