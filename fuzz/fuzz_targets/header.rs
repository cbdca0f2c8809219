#![no_main]

#[path = "../../tests/fuzz/header.rs"]
mod target;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| target::run(bytes));
