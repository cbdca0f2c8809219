//! Host sockets. Knows nothing of guests.
mod connect;
pub mod dial;
mod handshake;
pub mod listen;
pub mod resolve;
mod spill;
mod stream;

pub use spill::{Flush, SpillBuf, SpillFull};
pub use stream::HostStream;
