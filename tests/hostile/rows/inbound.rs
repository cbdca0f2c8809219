//! Soon.
use crate::table::Row;
pub const TITLE: &str = "inbound";
pub const ROWS: &[Row] = &[];
