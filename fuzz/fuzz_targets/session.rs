//! A whole session: real threads, sockets, memory and rings. About a hundred cases a second, each followed by one that
//! must work.
#![no_main]

#[path = "../../tests/fuzz/session/mod.rs"]
#[allow(dead_code)] // the tests use the rest
mod session;
#[path = "../../tests/fuzz/steps.rs"]
#[allow(dead_code)] // the gate alone uses the rest
mod steps;

use std::cell::RefCell;

use libfuzzer_sys::fuzz_target;

use session::Live;

thread_local! {
    /// One device for all cases of a process: what a session leaves behind hurts the ones after it.
    static LIVE: RefCell<Option<Live>> = const { RefCell::new(None) };
}

fuzz_target!(|bytes: &[u8]| {
    LIVE.with_borrow_mut(|live| {
        let live = live.get_or_insert_with(Live::new);
        live.run(&steps::Case::decode(bytes));
    });
});
