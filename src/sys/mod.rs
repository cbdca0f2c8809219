//! The only unsafe code: small, safe on the outside.

pub mod peercred;
