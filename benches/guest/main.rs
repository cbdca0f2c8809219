//! How fast a real Linux guest is with us, as ratios to vhost-device-vsock: `make bench-guest`, or
//! `cargo bench --bench guest -- --only NAME`.
//!
//! Two machines stand side by side under QEMU, equal but for the device: the release binary behind one, the peer behind the other. A
//! program in the guest (`tests/guest`) talks to a unix service of ours, in turns, A B A B; what counts is the ratio of the medians.
//!
//! # What is fair about it
//!
//! - Both have the same kernel, initramfs, arguments of QEMU, and code of service and guest. Who has no turn sleeps.
//! - Nothing is timed before as many bytes as a first look takes have been made from a seed at one end and compared at the other, in
//!   the same sizes. What a device does not pass on whole is left out of the line, and the reason stands in the table.
//! - Rates are by the host's clock, from the first byte to the receipt for the last one. Only quantiles of round trips are by
//!   the guest's; their mean by the host's is beside them.
//! - Without KVM the guest is most of the time that passes: it emulates. Then the ratio of rates is close to one whatever the device
//!   does, and what the device itself costs is the processor time, which is therefore in every line.
//!
//! A plain client of the service is no yardstick here and has no column: it is no guest.

#[path = "../speed/contender.rs"]
#[allow(dead_code)]
mod contender;
#[path = "../speed/line.rs"]
#[allow(dead_code)]
mod line;
mod lines;
mod machine;
#[path = "../speed/options.rs"]
#[allow(dead_code)]
mod options;
#[path = "../speed/peer.rs"]
mod peer;
#[path = "../speed/process.rs"]
#[allow(dead_code)]
mod process;
#[path = "../speed/report.rs"]
#[allow(dead_code)]
mod report;
#[path = "../../tests/e2e/support/mod.rs"]
#[allow(dead_code, unused_imports)]
mod support;
mod task;
#[path = "../../tests/vm/mod.rs"]
#[allow(dead_code)]
mod vm;
mod work;

use std::process::ExitCode;

use clap::{CommandFactory, FromArgMatches};

fn main() -> ExitCode {
    let command = options::Options::command()
        .about("The speed of a real Linux guest with the sidecar, against vhost-device-vsock")
        .mut_arg("json", |json| json.default_value("target/bench/guest.json"))
        // As many as leave a whole run below five minutes, boots included.
        .mut_arg("rounds", |rounds| rounds.default_value("7"))
        .mut_arg("window", |window| window.default_value("700"))
        .mut_arg("plots", |plots| plots.hide(true));
    let options = match options::Options::from_arg_matches(&command.get_matches()) {
        Ok(options) => options,
        Err(error) => error.exit(),
    };
    let lines = match options.choose(lines::all()) {
        Ok(lines) => lines,
        Err(done) => return done,
    };
    let setting = options.setting();
    let mut report = report::Report::begin(&setting);
    for line in &lines {
        report.add(line.measure(&setting));
    }
    if let Err(error) = report.write(&options.json) {
        eprintln!("{}: {error}", options.json.display());
        return ExitCode::FAILURE;
    }
    // What the peer cannot do is left out. There is nothing that we may not be able to do.
    let failed = |line: &&line::Result| line.absent.contains_key(&contender::Who::Ours);
    if let Some(line) = report.results().iter().find(failed) {
        eprintln!("{}: {}", line.name, line.absent[&contender::Who::Ours]);
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}
