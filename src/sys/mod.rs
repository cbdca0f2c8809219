//! System calls behind safe functions.

pub mod unix_socket;
