//! The only unsafe code: system calls that no safe wrapper offers, safe on the outside.
#![allow(unsafe_code)]

pub mod iovec;
pub mod vectored;
