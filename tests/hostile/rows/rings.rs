//! Soon.
use crate::table::Row;
pub const TITLE: &str = "rings";
pub const ROWS: &[Row] = &[];
