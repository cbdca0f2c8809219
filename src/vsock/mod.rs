//! The law. Written by the core.
pub mod header;
pub mod reason;
