//! The guest against an independent device: proven before it judges ours.

mod bulk;
mod device;
mod driver;
mod host;
mod sockets;
