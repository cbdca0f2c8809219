//! vsock-sidecar.
#![deny(unsafe_code)]

pub mod admin;
pub mod config;
pub mod device;
pub mod drain;
pub mod guest;
pub mod host;
pub mod logging;
pub mod metrics;
pub mod sys;
pub mod vsock;
