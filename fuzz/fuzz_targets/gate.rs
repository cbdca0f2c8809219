//! The gate alone, against a model of its surroundings: some thousand cases a second.
#![no_main]

#[path = "../../tests/fuzz/gate.rs"]
mod gate;
#[path = "../../tests/fuzz/steps.rs"]
#[allow(dead_code)] // the live session uses the rest
mod steps;

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| gate::run(&steps::Case::decode(bytes)));
