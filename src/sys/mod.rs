//! System calls behind safe functions, and the only place of unsafe code.
//!
//! Each module here is small and safe on the outside; a block does one thing and says why it is sound. What belongs to the
//! process as a whole is here as well: its SIGBUS handler and its panic hook.

#[allow(unsafe_code)]
pub mod iovec;
#[allow(unsafe_code)]
pub mod peercred;
pub mod readiness;
#[allow(unsafe_code)]
pub mod sigbus;
pub mod unix_socket;
pub mod unwind;
#[allow(unsafe_code)]
pub mod vectored;
