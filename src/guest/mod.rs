//! Guest memory and rings: the only code that touches guest memory.
pub mod memory;
pub mod ring;

pub use memory::{GuestRam, Memory};
pub use ring::{RingParts, RingPosition};
