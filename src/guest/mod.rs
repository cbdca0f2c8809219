//! Guest memory and rings: the only code that touches guest memory.
//!
//! # Trust
//!
//! Guest memory is shared with a guest that may be hostile and that runs while we read. Every byte of it may
//! change between two of our instructions: descriptors, ring indices, headers, payload. The VMM, which gave
//! us the memory, may be wrong but is not an attacker of its own guest. That each region lies within its
//! file is checked when it is mapped; a file that is truncated afterwards is a SIGBUS, which nothing here catches.
//!
//! So what we decide upon is copied first and then judged, and never read again:
//!
//! | what | copied by | how often |
//! |---|---|---|
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
//! that of the [`GuestRam`] they came from: as long as one is held, the memory is mapped.
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
//! 3. Every address of a guest goes through [`GuestRam::slices`], which hands out nothing outside of the
//!    memory table and computes nothing that can wrap. The IOTLB will stand there and nowhere else.
//! 4. Every loop ends without the guest's help. A burst takes at most as many chains as the ring has entries;
//!    a chain has at most ring size + 1024 descriptors and less than 4 GiB.
//! 5. Between bursts nothing is in flight: `published == next_used == next_avail`. However a burst ends,
//!    chains that were reserved and not used are available again, in place.
//! 6. Chains are used in the order in which they were made available, each once, the malformed ones too. So a
//!    used index is all that must survive for another process to go on (VIRTIO_F_IN_ORDER).
//! 7. All bytes of a burst, ours and those which the kernel wrote for us, are written before the used index
//!    that shows them.
//! 8. A page that was written while a dirty log is active is marked: after it was written, only if it was,
//!    and once for each write.
//! 9. Bursts allocate nothing in steady state.

pub mod dirty;
pub mod fault;
pub mod iotlb;
pub mod memory;
pub mod ring;

mod areas;
mod burst;
mod chain;
mod rx;
mod tx;

#[cfg(test)]
mod tests;

pub use burst::Finished;
pub use fault::{FaultCounts, RingArea, RingError, RingFault};
pub use iotlb::{Iotlb, IotlbStats, Mapping, Miss, Permission};
pub use memory::{Access, GuestRam, Memory, MemoryFault, Slice, View};
pub use ring::{Ring, RingParts, RingPosition};
pub use rx::RxBurst;
pub use tx::{TxBurst, TxPacket};
