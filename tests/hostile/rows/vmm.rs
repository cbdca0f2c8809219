//! Soon.
use crate::table::Row;
pub const TITLE: &str = "vmm";
pub const ROWS: &[Row] = &[];
