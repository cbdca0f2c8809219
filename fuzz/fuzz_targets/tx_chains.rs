#![no_main]

#[path = "../../tests/fuzz/input.rs"]
mod input;
#[path = "../../tests/fuzz/rings/mod.rs"]
#[allow(dead_code)] // the other ring uses the rest
mod rings;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| rings::tx::run(bytes));
