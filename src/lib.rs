//! vsock-sidecar.
#![deny(unsafe_code)]

pub mod config;
pub mod device;
pub mod guest;
pub mod host;
pub mod metrics;
pub mod sys;
pub mod vsock;
