//! A suite of cases between two places: Linux's programs end at the first case that fails, so they are started again
//! without the cases that are known, until nothing is left.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use crate::pair::{Pair, Program, Seat, wait_for_both};
use crate::transcript::{End, is_whole, read};

/// Silence after which a case hangs. The programs' own patience is 10 s at one point, and both may have to wait in turn.
const SILENCE: Duration = Duration::from_secs(35);
/// The port of the control connection.
const CONTROL: u16 = 1234;

/// One of Linux's programs with cases.
#[derive(Clone, Copy, Debug)]
pub struct Suite {
    /// Its name.
    pub program: &'static str,
    /// Whether it knows `--skip`.
    skips: bool,
}

/// Sockets in general.
pub const VSOCK_TEST: Suite = Suite {
    program: "vsock_test",
    skips: true,
};
/// What the kernel tells of its sockets through netlink.
pub const DIAG_TEST: Suite = Suite {
    program: "vsock_diag_test",
    skips: true,
};
/// The same transfers through io_uring.
pub const URING_TEST: Suite = Suite {
    program: "vsock_uring_test",
    skips: false,
};

/// What became of a case.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// Both programs say so.
    Passed,
    /// At least one program ended. What the two said, the server's words first.
    Failed([String; 2]),
    /// A program said something and was content: it may have left out what it came for.
    Noted(String),
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Outcome::Passed => write!(f, "passes"),
            Outcome::Noted(words) => write!(f, "passes and says {words:?}"),
            Outcome::Failed([server, client]) => write!(f, "FAILS: server {server:?}, client {client:?}"),
        }
    }
}

/// Cases by number: name and outcome.
pub type Cases = BTreeMap<u32, (String, Outcome)>;

/// Runs a suite.
pub fn run(pair: &mut Pair, suite: Suite, server: Seat, client: Seat) -> Cases {
    let mut cases = Cases::new();
    loop {
        let skip: String = cases.keys().map(|number| format!(" --skip={number}")).collect();
        let programs = run_once(pair, suite, server, client, &skip);
        let failed = note(&mut cases, &programs);
        let whole = programs
            .iter()
            .all(|program| program.state == "exited-0" && is_whole(&program.text));
        if whole {
            return cases;
        }
        let [server, client] = &programs;
        assert!(
            failed,
            "{} ended without a case that failed\n--- server {}\n{}\n--- client {}\n{}",
            suite.program, server.state, server.text, client.state, client.text
        );
        if !suite.skips {
            return cases;
        }
    }
}

/// Runs both programs to their end, server first.
fn run_once(pair: &mut Pair, suite: Suite, server: Seat, client: Seat, more: &str) -> [Program; 2] {
    let machines = &mut pair.machines;
    let arguments = format!(
        "--mode=server --control-port={CONTROL} --peer-cid={}{more}",
        client.cid
    );
    let mut server_side = Program::start(machines, server.machine, "server", suite.program, &arguments);
    server_side.wait_for(machines, "Control socket listening");
    let arguments = format!(
        "--mode=client --control-host={} --control-port={CONTROL} --peer-cid={}{more}",
        server.address, server.cid
    );
    let mut client_side = Program::start(machines, client.machine, "client", suite.program, &arguments);
    wait_for_both(machines, [&mut server_side, &mut client_side], SILENCE);
    [server_side, client_side]
}

/// Adds what a run showed: cases that passed on both sides, and the first that did not. Whether there is one of these.
fn note(cases: &mut Cases, programs: &[Program; 2]) -> bool {
    let [server, client] = [0, 1].map(|i| {
        let lines = read(&programs[i].text).into_iter();
        lines.map(|line| (line.number, line)).collect::<BTreeMap<_, _>>()
    });
    let said = |end: Option<&End>, program: &Program| match end {
        Some(End::Ok(_)) => "ok".to_owned(),
        Some(End::NotOk(said)) => format!("{said} ({})", program.state),
        Some(End::Skipped) | None => format!("did not begin it ({})", program.state),
    };
    let mut numbers: Vec<_> = server.keys().chain(client.keys()).copied().collect();
    numbers.sort_unstable();
    numbers.dedup();
    for number in numbers {
        let lines = [server.get(&number), client.get(&number)];
        let name = lines
            .iter()
            .flatten()
            .next()
            .expect("one of them has it")
            .name
            .clone();
        let outcome = match lines.map(|line| line.map(|line| &line.end)) {
            [Some(End::Skipped), _] | [_, Some(End::Skipped)] => continue,
            [Some(End::Ok(one)), Some(End::Ok(other))] if one.is_empty() && other.is_empty() => {
                Outcome::Passed
            }
            [Some(End::Ok(one)), Some(End::Ok(other))] => Outcome::Noted(format!("{one}{other}")),
            [one, other] => Outcome::Failed([said(one, &programs[0]), said(other, &programs[1])]),
        };
        let failed = matches!(outcome, Outcome::Failed(_));
        cases.insert(number, (name, outcome));
        // Whoever comes behind it came alone.
        if failed {
            return true;
        }
    }
    false
}
