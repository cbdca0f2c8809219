//! Host sockets. Knows nothing of guests.
pub mod dial;
pub mod listen;
mod stream;

pub use stream::HostStream;
