//! The only unsafe code: system calls that no safe wrapper offers, safe on the outside.

pub mod iovec;
pub mod vectored;
