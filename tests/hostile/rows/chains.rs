//! Soon.
use crate::table::Row;
pub const TITLE: &str = "chains";
pub const ROWS: &[Row] = &[];
