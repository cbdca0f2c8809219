//! Guest memory and rings: the only code that touches guest memory.
//!
//! # Trust
//!
//! Guest memory is shared with a guest that may be hostile and that runs while we read. Every byte of it may
//! change between two of our instructions: descriptors, ring indices, headers, payload. The VMM, which gave
//! us the memory, may be wrong but is not an attacker of its own guest. That each region lies within its
//! file is checked when it is mapped. A file that is truncated afterwards is a SIGBUS, which is contained
//! ([`sigbus`](crate::sys::sigbus)): the memory reads as zeros from then on, which are not the guest's. So a burst of the device asks
//! [`View::is_lost`] before it acts on what it has read, and a memory that is lost is not served any more.
//! Behind a vIOMMU the VMM's translations are what confines us: an address that it has not translated is not accessed, and one
//! whose translation it has taken back not any more. What we ask it for is a guest's doing, so it is bounded and never repeated
//! by ourselves.
//!
//! So what we decide upon is copied first and then judged, and never read again:
//!
//! | what | copied by | how often |
//! |---|---|---|
//! | used index of a ring of IOVAs | `Ring::read_used_idx` | once in its life |
//! | available index | `Ring::seen_avail_idx` | at the begin of a burst, and when that many chains are taken |
//! | head of a chain | `Burst::next_head` | once each time the chain is taken |
//! | descriptor, 16 bytes | `Areas::descriptor`, `Range::descriptor` | once each time the chain is taken |
//! | packet header, 44 bytes | [`TxBurst::pop`] | once |
//! | `used_event`, flags | `Burst::finish` | once a burst |
//!
//! Payload is never copied by us and never looked at: the kernel moves it between guest memory and a socket.
//! A guest that changes payload while it is sent has sent something else; that is its own affair.
//!
//! No Rust reference to guest memory exists, only [`Slice`]s (vm-memory's `VolatileSlice`), whose lifetime is
//! that of the [`GuestRam`] they came from, and of the [`Iotlb`] if they came through one: as long as one is held, the memory
//! is mapped and its translation stands.
//!
//! # Theory of operation
//!
//! ```text
//!  session ──RingParts──> Ring ──begin──> TxBurst: pop, pop, ...                  ──finish──> interrupt?
//!          ──memory─────> GuestRam ─────> RxBurst: reserve, readv, commit, ... ─┘
//! ```
//!
//! A [`Ring`] is owned by one thread. Chains are taken and given back in *bursts*, which borrow the ring. A
//! burst finds the ring's areas once, takes chains, writes used elements as it goes, and ends with one write
//! of the used index and one decision whether to interrupt. Until that write the driver does not own a single
//! buffer again, so slices of many packets can be gathered in an [`IoVecs`](crate::sys::iovec::IoVecs) and
//! moved by one system call.
//!
//! Positions are free-running 16-bit counters, compared by wrapping subtraction only:
//!
//! ```text
//!   used ring, available ring   ...|  used, not shown  |  reserved  |  available  |...
//!                              published          next_used    next_avail     avail_idx
//! ```
//!
//! *Kicks* are switched off while we work and on when we have nothing to do ([`Ring::enable_notifications`],
//! which then looks again). *Interrupts* follow `used_event` or NO_INTERRUPT, over all that a burst has used.
//!
//! *Translations.* With VIRTIO_F_ACCESS_PLATFORM a ring's addresses, and those of its buffers, may be IOVAs: its bursts are given
//! [`GuestRam::view_through`] the [`Iotlb`]. What is not translated is noted there as a [`Miss`], all of a ring or of a chain at
//! once and the chains behind it as well, and nobody waits:
//!
//! ```text
//!  ring not translated  ──> RingError, awaits_translation ─┐
//!  chain not translated ──> Finished::parked ──────────────┴─> Iotlb::take_misses ──> VMM
//!                                                                                      │
//!  serve the ring again <── Iotlb::insert, answered, invalidate, flush; a kick (retry) <┘
//! ```
//!
//! A parked chain stays where it is in the available ring and is walked anew, from memory, when the ring is served again. A chain
//! that the VMM refuses a translation for goes back like one that makes no sense.
//!
//! *Faults.* A chain that makes no sense is given back with length 0, in its turn, counted by name
//! ([`RingFault`]), and the ring goes on. A ring that makes no sense, or that is not in memory, is an error
//! ([`RingError`]), and stays one until the driver or the VMM starts it anew; what was done before goes back
//! all the same.
//!
//! # Invariants
//!
//! 1. A header's bytes are read once. What the guest writes there later has no effect.
//! 2. What was judged is not read again: ring indices, heads and descriptors are values of ours when they are
//!    compared.
//! 3. Every address of a guest goes through [`View::slices`], which hands out nothing outside of the
//!    memory table and computes nothing that can wrap. The IOTLB stands there and nowhere else.
//! 4. Every loop ends without the guest's help. A burst takes at most as many chains as the ring has entries;
//!    a chain has at most ring size + 1024 descriptors, 2048 pieces of memory and less than 4 GiB.
//! 5. Between bursts nothing is in flight: `published == next_used == next_avail`. However a burst ends,
//!    chains that were reserved and not used are available again, in place.
//! 6. Chains are used in the order in which they were made available, each once, the malformed ones too. So a
//!    used index is all that must survive for another process to go on (VIRTIO_F_IN_ORDER).
//! 7. All bytes of a burst, ours and those which the kernel wrote for us, are written before the used index
//!    that shows them.
//! 8. A page that was written while a dirty log is active is marked: after it was written, only if it was,
//!    and once for each write.
//! 9. Bursts allocate nothing in steady state, however many pages a ring lies on.
//! 10. A chain is taken when all of it is translated, for exactly the access that it needs: nothing was done for a chain that
//!     waits, and nothing behind it is done before it.
//! 11. No slice outlives a change of the [`Iotlb`]: bursts borrow it, and what changes it borrows it mutably. So an
//!     invalidation that has returned is in force.
//! 12. A [`Miss`] is handed out once until it is answered; after a refusal not before a chain has failed for it, and after an
//!     answer that brought nothing not before the guest kicks. At most 64 are open.
//! 13. A ring of IOVAs goes on at the used index in memory, read once, when it first can be.

pub mod dirty;
pub mod fault;
pub mod iotlb;
pub mod memory;
pub mod ring;

mod areas;
mod burst;
mod chain;
mod loss;
mod rx;
mod tx;

#[cfg(test)]
mod tests;

pub use burst::Finished;
pub use fault::{FaultCounts, RingArea, RingError, RingFault};
pub use iotlb::{CAPACITY as IOTLB_CAPACITY, Iotlb, IotlbStats, Mapping, Miss, Permission};
pub use loss::MemoryLoss;
pub use memory::{Access, GuestRam, Memory, MemoryFault, Slice, View};
pub use ring::{Ring, RingParts, RingPosition};
pub use rx::RxBurst;
pub use tx::{TxBurst, TxPacket};
