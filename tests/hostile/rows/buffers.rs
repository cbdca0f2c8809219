//! Soon.
use crate::table::Row;
pub const TITLE: &str = "buffers";
pub const ROWS: &[Row] = &[];
