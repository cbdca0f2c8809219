//! The device's IOTLB: which ranges of I/O virtual addresses mean which guest-physical memory, for what access.
//!
//! One a device, owned by its thread: both data rings share one IOVA space. The VMM fills it (UPDATE) and empties it
//! (INVALIDATE); a lookup that finds nothing is a *miss*, a value that the device thread sends to the VMM and never waits for.
//!
//! ```text
//!  insert, invalidate, flush ──> Map        exact ranges, bounded, the oldest goes first
//!                                 │
//!  translate ──> Line (hit) ──────┤         a table in front, emptied by a change of generation
//!                                 └ miss ──> Questions ──take_misses──> VMM ──answered──> Questions
//! ```
//!
//! Lookups happen in bursts, which borrow the IOTLB; changes need it mutably. So a slice of guest memory that was found through
//! a mapping is gone before the mapping can be: there is nothing to lock, and the answer to an INVALIDATE is true when it is
//! given.
//!
//! *A question is asked once*: not again while it is unanswered, nor after a refusal until a chain has been given back for it
//! or the VMM has spoken of the page, nor after an answer that brought nothing until [`Iotlb::retry`]. Whatever the VMM answers,
//! the two of us cannot keep each other busy.
//!
//! *A refusal costs the chain that needed it*, and is forgotten with it: a guest may map that address properly the next moment
//! (Linux uses IOVAs again at once), and not every VMM tells that. A refusal of the ring's own pages stays until the VMM says
//! something about them, or a flush.
//!
//! vm-memory has an `Iotlb` of its own (feature `iommu`): its arithmetic is unchecked, its range map panics at empty ranges, it has
//! no bound and no memory of what was asked, and every lookup holds a lock; hence this one.

use std::cell::{Cell, RefCell};
use std::time::Instant;

use super::memory::{Access, MemoryFault};

use map::{Found, Map};
use questions::{Outlook, PAGE, Questions, Walk};

mod map;
mod questions;
#[cfg(test)]
mod tests;

/// The most mappings that are held.
///
/// A chain can be served when all that it needs is mapped at once, and it asks for that little by little, while others ask,
/// too. So that it does not lose the first page before it has the last, what two chains (`MAX_PIECES` of chain.rs
/// and an indirect table of 5 pages each) and two rings of 1024 (11 pages each) need must fit: 4128. The kernel's default
/// is 2048 (`max_iotlb_entries`, drivers/vhost/vhost.c). Linux's driver keeps about 300 pages mapped; at 4 KiB each 8192 are a
/// working set of 32 MiB and 1 MiB of ours.
pub const CAPACITY: usize = 8192;

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

impl Permission {
    /// Whether `access` is among what is allowed.
    pub fn allows(self, access: Access) -> bool {
        match access {
            Access::Read => self != Permission::Write,
            Access::Write => self != Permission::Read,
        }
    }
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

impl Mapping {
    /// The last I/O virtual address; `None` if the range is empty, or it or its meaning wraps around.
    pub fn last(&self) -> Option<u64> {
        let more = self.len.checked_sub(1)?;
        self.gpa.checked_add(more)?;
        self.iova.checked_add(more)
    }
}

/// A translation that the VMM is asked for.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Miss {
    /// First I/O virtual address of the 4 KiB page in which something is missing.
    pub iova: u64,
    /// What it is wanted for, and nothing more: a VMM refuses write access to what the guest mapped for reading.
    pub access: Access,
}

/// What an [`Iotlb`] holds and has seen.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct IotlbStats {
    /// Mappings that are held. Mappings that continue each other count as one.
    pub entries: u64,
    /// Bytes that they cover.
    pub mapped_bytes: u64,
    /// Lookups so far.
    pub lookups: u64,
    /// Lookups that found no usable mapping.
    pub misses: u64,
    /// Mappings that were dropped to make room.
    pub evictions: u64,
    /// Misses that are sent and not answered, or not by a translation nor a refusal.
    pub unanswered: u64,
    /// Misses for reading that the VMM has refused.
    pub faults_read: u64,
    /// Misses for writing that the VMM has refused.
    pub faults_write: u64,
}

/// Lines of the table in front of the map: 64 KiB, of a device behind an IOMMU only. Packets of 64 KiB in a ring of 128 are 760
/// pages, RX buffers 256 at most. A lookup of 9 ns without IOMMU is one of 13 ns if the table has it, and of 85 ns if only the
/// map of 4096 pages does (benches/translation.rs).
const LINES: usize = 2048;

/// A range that was found, in the generation in which it was. No generation is 0.
#[derive(Clone, Copy, Debug)]
struct Line {
    found: Found,
    generation: u64,
}

const EMPTY_LINE: Line = Line {
    found: Found {
        first: 0,
        last: 0,
        gpa: 0,
        permission: Permission::Read,
    },
    generation: 0,
};

/// The translations of one device.
#[derive(Debug)]
pub struct Iotlb {
    map: Map,
    /// Empty as long as nothing was mapped: without an IOMMU it costs nothing. Which line holds what is by the page asked for;
    /// a line holds a whole range, so that a large one is found at once from wherever it is asked for again.
    lines: Vec<Cell<Line>>,
    /// Changes when something that was true of a mapping is not any more: then no line of before is believed.
    generation: u64,
    questions: RefCell<Questions>,
    walk: Cell<Walk>,
    /// Size of the VMM's last UPDATE that was an aligned page: how finely it translates. Outlives a flush, as the VMM does.
    granule: Option<u64>,
    lookups: Cell<u64>,
    misses: Cell<u64>,
    faults_read: u64,
    faults_write: u64,
}

impl Default for Iotlb {
    fn default() -> Iotlb {
        Iotlb::with_capacity(CAPACITY)
    }
}

impl Iotlb {
    /// An empty one.
    pub fn new() -> Iotlb {
        Iotlb::default()
    }

    fn with_capacity(capacity: usize) -> Iotlb {
        Iotlb {
            map: Map::new(capacity),
            lines: Vec::new(),
            generation: 1,
            questions: RefCell::default(),
            walk: Cell::default(),
            granule: None,
            lookups: Cell::new(0),
            misses: Cell::new(0),
            faults_read: 0,
            faults_write: 0,
        }
    }

    /// Takes a mapping in. What it overlaps gives way, and questions that it answers are answered. Rings that wait may go on.
    ///
    /// A mapping that is empty or wraps around (see [`Mapping::last`]) is not taken in; the session refuses it before.
    pub fn insert(&mut self, mapping: Mapping) {
        let Some(last) = mapping.last() else {
            return;
        };
        if self.lines.is_empty() {
            self.lines = vec![Cell::new(EMPTY_LINE); LINES];
        }
        // The last page of a memory region may be cut short and says nothing about the others.
        if mapping.len.is_power_of_two() && mapping.len >= PAGE && mapping.iova.is_multiple_of(mapping.len) {
            self.granule = Some(mapping.len);
        }
        if self.map.insert(mapping, last) {
            self.generation += 1;
        }
        self.questions
            .get_mut()
            .covered(mapping.iova, last, mapping.permission);
    }

    /// Forgets what is mapped from `first` to `last`, both included, and what was refused there. A question that the VMM has
    /// stays open: its answer is to come.
    pub fn invalidate(&mut self, first: u64, last: u64) {
        // A guest in caching mode announces each page that it maps in this way: nothing is known of those.
        if self.map.remove(first, last) {
            self.generation += 1;
        }
        self.questions.get_mut().invalidated(first, last);
    }

    /// Forgets every mapping, refusal and question. Answers to those questions that come yet are ignored.
    pub fn flush(&mut self) {
        self.map.clear();
        self.generation += 1;
        self.questions.get_mut().clear();
    }

    /// The VMM is gone. Forgets, beside what [`Iotlb::flush`] does, how it translates and that its answers may come yet.
    pub fn end_session(&mut self) {
        self.flush();
        self.questions.get_mut().expect_no_answers();
        self.granule = None;
    }

    /// The VMM has answered a miss: with an UPDATE before, or by a refusal. Rings that wait may go on, if only to find that
    /// something was refused, or that there is room for their questions now.
    ///
    /// An answer that is no refusal and came without an UPDATE leaves the page missing, and not asked for until
    /// [`Iotlb::retry`].
    pub fn answered(&mut self, miss: Miss, refused: bool) {
        if self.questions.get_mut().answered(miss, refused) {
            match miss.access {
                Access::Read => self.faults_read += 1,
                Access::Write => self.faults_write += 1,
            }
        }
    }

    /// Lets questions that were answered with nothing be asked again: to be called when the guest kicks a ring, so that it is
    /// the guest who decides how often.
    pub fn retry(&mut self) {
        self.questions.get_mut().retry();
    }

    /// The misses that have to be sent, each once, in the order in which they were found; they count as sent at `now`.
    pub fn take_misses(&mut self, now: Instant) -> Vec<Miss> {
        self.questions.get_mut().take(now)
    }

    /// The miss that has waited longest for its answer, or for a translation behind it, and since when.
    pub fn oldest_unanswered(&self) -> Option<(Miss, Instant)> {
        self.questions.borrow().oldest()
    }

    /// Whether there are questions to which an answer is to come. What waits for another translation waits for a kick.
    pub fn expects_answers(&self) -> bool {
        self.questions.borrow().expects_answers()
    }

    /// What it holds and has seen.
    pub fn stats(&self) -> IotlbStats {
        IotlbStats {
            entries: self.map.len() as u64,
            mapped_bytes: self.map.bytes(),
            lookups: self.lookups.get(),
            misses: self.misses.get(),
            evictions: self.map.evictions(),
            unanswered: self.questions.borrow().unanswered(),
            faults_read: self.faults_read,
            faults_write: self.faults_write,
        }
    }

    /// The guest-physical address that `addr` means, and for how many of the `len` bytes from there on. `len` is not 0, and
    /// `addr + (len - 1)` does not wrap.
    ///
    /// If there is no such mapping the VMM is to be asked, for the rest of the range as well as it is known how.
    pub(super) fn translate(
        &self,
        addr: u64,
        len: usize,
        access: Access,
    ) -> Result<(u64, usize), MemoryFault> {
        self.lookups.set(self.lookups.get().wrapping_add(1));
        let line = self.lines.get((addr / PAGE) as usize % LINES);
        if let Some(Line { found, generation }) = line.map(Cell::get)
            && generation == self.generation
            && found.contains(addr)
            && found.permission.allows(access)
        {
            return Ok(found.translate(addr, len));
        }
        match self.map.find(addr) {
            Some(found) if found.permission.allows(access) => {
                if let Some(line) = line {
                    line.set(Line {
                        found,
                        generation: self.generation,
                    });
                }
                Ok(found.translate(addr, len))
            }
            _ => Err(self.miss(addr, len, access)),
        }
    }

    /// As [`Iotlb::translate`], without a trace.
    pub(super) fn peek(&self, addr: u64, len: usize, access: Access) -> Result<(u64, usize), MemoryFault> {
        match self.map.find(addr) {
            Some(found) if found.permission.allows(access) => Ok(found.translate(addr, len)),
            _ => Err(MemoryFault::Missing { iova: addr }),
        }
    }

    #[cold]
    fn miss(&self, addr: u64, len: usize, access: Access) -> MemoryFault {
        self.misses.set(self.misses.get().wrapping_add(1));
        let last = addr.saturating_add((len as u64).saturating_sub(1));
        let mut walk = self.walk.get();
        let mapped = |addr| {
            self.map
                .find(addr)
                .is_some_and(|found| found.permission.allows(access))
        };
        let outlook =
            self.questions
                .borrow_mut()
                .missing(&mut walk, (addr, last), access, self.granule, mapped);
        self.walk.set(walk);
        match outlook {
            Outlook::Missing => MemoryFault::Missing { iova: addr },
            Outlook::Refused => MemoryFault::Refused { iova: addr },
        }
    }

    /// A chain, or the areas of a ring, will be looked up.
    pub(super) fn begin_walk(&self) {
        if self.walk.replace(Walk::default()).refused {
            self.questions.borrow_mut().begin_walk();
        }
    }

    /// Whether what was looked up since [`Iotlb::begin_walk`] needs an answer that is to come.
    pub(super) fn awaits(&self) -> bool {
        self.walk.get().awaits
    }

    /// Whether there was no room for a question.
    pub(super) fn is_full(&self) -> bool {
        self.walk.get().full
    }

    /// Forgets the refusals that were come across since [`Iotlb::begin_walk`].
    pub(super) fn forget_refusals(&self) {
        if self.walk.get().refused {
            self.questions.borrow_mut().forget_seen();
        }
    }
}
