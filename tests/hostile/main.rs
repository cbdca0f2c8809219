//! Guests and VMMs that do wrong on purpose: one table, one row a trick.
//!
//! A row says what the trick is, which standard or which peer's bug it comes from, what the guest hears, what is counted
//! and who lives on. Each row runs against the real binary, while two witnesses say whether it hurts anybody else: another
//! guest of the process, and another connection of the same guest. `docs/hostile-guests.md` is made of the table.
//!
//! ```text
//!   rows/*.rs ──> table: Row ──> judge: boot a hostile guest (raw), read the books, play, ask the witnesses,
//!                                       read the books again, end the session, look for what it left behind
//! ```
//!
//! `cargo test --test hostile -- --nocapture` prints the table as it is judged.

mod books;
mod judge;
mod page;
mod raw;
mod rows;
mod stage;
mod table;
mod witnesses;

#[path = "../e2e/support/mod.rs"]
#[allow(dead_code, unused_imports)]
mod support;

/// The rows of one kind, against a sidecar of their own.
macro_rules! kinds {
    ($($(#[$meta:meta])* $test:ident => $kind:ident,)*) => {
        $($(#[$meta])* #[test] fn $test() {
            judge::perform(rows::$kind::ROWS);
        })*

        /// All rows: title, rows.
        const KINDS: &[(&str, &[table::Row])] = &[$((rows::$kind::TITLE, rows::$kind::ROWS),)*];
    };
}

kinds! {
    headers_that_lie_cost_their_connection => headers,
    credit_that_lies_costs_its_connection => credit,
    connections_that_live_wrongly_cost_themselves => life,
    messages_that_break_their_bounds_cost_their_connection => messages,
    clients_of_a_hostile_guest_are_refused_by_name => inbound,
    chains_that_make_no_sense_cost_themselves => chains,
    receive_buffers_that_make_no_sense_are_skipped => buffers,
    rings_that_make_no_sense_rest_or_go_on => rings,
    a_vmm_that_makes_no_sense_costs_its_session => vmm,
}
