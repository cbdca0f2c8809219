//! System calls behind safe functions, and the only place of unsafe code.
//!
//! Each module here is small and safe on the outside; a block does one thing and says why it is sound.

#[allow(unsafe_code)]
pub mod iovec;
#[allow(unsafe_code)]
pub mod peercred;
pub mod readiness;
#[allow(unsafe_code)]
pub mod sigsys;
pub mod unix_socket;
#[allow(unsafe_code)]
pub mod vectored;
