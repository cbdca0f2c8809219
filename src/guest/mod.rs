//! Guest memory and rings: the only code that touches guest memory.

pub mod dirty;
pub mod fault;
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
pub use memory::{Access, GuestRam, Memory, MemoryFault, Slice};
pub use ring::{Ring, RingParts, RingPosition};
pub use rx::RxBurst;
pub use tx::{TxBurst, TxPacket};
