//! How fast we are, as ratios: `make bench`, `make bench-quick`, or `cargo bench --bench speed -- --only NAME`.
//!
//! The embedded guest drives the release binary, a process of its own, over vhost-user and shared memory as a VMM with a Linux guest
//! does. Beside it stand a plain client of the very same service, and vhost-device-vsock if it is installed
//! (`make peer`), which the same guest drives. All of them do the same work in turns, A B C A B C; what counts is the ratio of the medians.
//!
//! # What is fair about it
//!
//! - Services are the same code for all, and a client reads and writes in the sizes of the guest's packets and buffers.
//! - A sample is a window of time in the middle of steady work: connections stand, the work has warmed up, and what is counted is what
//!   arrived. Nothing is drained or flushed within it.
//! - Nothing is pinned. Guest, sidecar and service share the processors, and so do plain client and service; ours are three that
//!   work where the plain pair are two, which the ratio does not forgive.
//! - The guest copies and looks at no payload, so that the device is measured and not the guest; how busy guest, device and service
//!   were is in the JSON, and a line `guest-ceiling` says how far the guest comes without any device.
//! - Counting system calls slows what is counted, so it happens in a window of its own.

mod beside;
mod bulk;
mod calls;
mod ceiling;
mod churn;
mod contender;
mod idle;
mod line;
mod lines;
mod options;
mod peer;
mod plain;
mod plots;
mod process;
mod report;
mod round_trips;
mod service;
mod through;
mod verify;

#[path = "../../tests/e2e/support/mod.rs"]
#[allow(dead_code, unused_imports)]
mod support;

use std::process::ExitCode;

use clap::Parser;
use rustix::process::{Resource, Rlimit, setrlimit};

fn main() -> ExitCode {
    let options = options::Options::parse();
    raise_descriptor_limit();
    let lines = match options.choose(lines::all()) {
        Ok(lines) => lines,
        Err(done) => return done,
    };
    verify::there_and_back();
    let setting = options.setting();
    let mut report = report::Report::begin(&setting);
    for line in &lines {
        report.add(line.measure(&setting));
    }
    report.end();
    if let Err(error) = report.write(&options.json) {
        eprintln!("{}: {error}", options.json.display());
        return ExitCode::FAILURE;
    }
    if let Some(dir) = &options.plots
        && let Err(error) = plots::write(dir, report.results())
    {
        eprintln!("{}: {error}", dir.display());
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

/// As many descriptors as thousands of connections need, of services and devices; what a privileged user may have, or what is
/// allowed anyway.
fn raise_descriptor_limit() {
    const WANTED: u64 = 400_000;
    let limit = Rlimit {
        current: Some(WANTED),
        maximum: Some(WANTED),
    };
    if setrlimit(Resource::Nofile, limit).is_err() {
        support::raise_descriptor_limit();
    }
}
