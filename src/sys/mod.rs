//! System calls behind safe functions, and the only place of unsafe code.
//!
//! Each module here is small and safe on the outside; a block does one thing and says why it is sound.

pub mod iovec;
pub mod peercred;
pub mod readiness;
pub mod unix_socket;
pub mod vectored;
