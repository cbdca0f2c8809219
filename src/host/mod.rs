//! Host sockets. Knows nothing of guests.
pub mod dial;
pub mod listen;
mod spill;
mod stream;

pub use spill::{Flush, SpillBuf, SpillFull};
pub use stream::HostStream;
