//! The shell.
pub mod handle;
pub mod snapshot;

pub use handle::{Command, DeviceGone, DeviceHandle};
pub use snapshot::DeviceSnapshot;
