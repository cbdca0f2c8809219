//! System calls behind safe functions.

pub mod readiness;
pub mod unix_socket;
