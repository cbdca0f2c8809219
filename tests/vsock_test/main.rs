//! Linux's own tests of vsock, `tools/testing/vsock` of its source, between two guests of one sidecar.
//!
//! Source and kernel are Debian's packages of the same version (`tests/vm`), built and booted by the test. What must come
//! out is `docs/linux-vsock-test.md`, case by case; the same programs within one guest, where nothing but Linux is between
//! the two ends, show that it is the sidecar that is tested.
//!
//! `VSOCK_TEST_NO_VM=1` leaves this out, as in `tests/real_guest`.

mod pair;
mod programs;
mod suite;
mod transcript;
// Made for several tests, each of which uses a part.
#[allow(dead_code)]
#[path = "../vm/mod.rs"]
mod vm;

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use pair::{A, B, Pair, Program, SELF, Seat, wait_for_both};
use suite::{Cases, DIAG_TEST, Outcome, Suite, URING_TEST, VSOCK_TEST};
use vm::lab::tell;
use vm::wait_until;

/// Bytes that `vsock_perf` sends.
const PERF_BYTES: u64 = 64 << 20;
/// What one end of a connection may hold that its program has not read, `--vsk-size`.
const PERF_WINDOW: u64 = 256 << 10;

/// One at a time: some cases measure how long a call takes.
static MACHINES: Mutex<()> = Mutex::new(());

#[test]
fn linux_passes_its_own_tests_within_one_guest() {
    in_turn(Pair::alone, |pair| {
        // Not vsock_diag_test: it counts the sockets of a guest, which must not have both ends.
        for suite in [VSOCK_TEST, URING_TEST] {
            let cases = run(pair, suite, SELF, SELF);
            let bad: Vec<_> = cases.values().filter(|case| case.1 != Outcome::Passed).collect();
            assert!(bad.is_empty(), "{}: {bad:?}", suite.program);
        }
    });
}

#[test]
fn linux_passes_its_own_tests_between_two_guests_as_documented() {
    in_turn(Pair::start, |pair| {
        for (server, client) in [(B, A), (A, B)] {
            for suite in [DIAG_TEST, VSOCK_TEST, URING_TEST] {
                let mut cases = run(pair, suite, server, client);
                let failed = |cases: &Cases| cases.values().any(|case| case.1 != Outcome::Passed);
                if failed(&cases) {
                    tell(&format!("{}: again, for what failed: {cases:?}", suite.program));
                    // The two programs of a case agree past the connection, by TCP: on a busy machine "I have shut down" may be
                    // there before the packet that says so. What fails twice fails.
                    let again = run(pair, suite, server, client);
                    cases.extend(again.into_iter().filter(|(_, case)| case.1 == Outcome::Passed));
                }
                assert_documented(suite, &cases);
            }
        }
        for (server, client) in [(B, A), (A, B)] {
            for options in ["--buf-size 4K", "--buf-size 64K", "--buf-size 64K --zerocopy"] {
                perf(pair, server, client, options);
            }
        }
    });
}

/// Every case is in the document, with this outcome, and no others are.
fn assert_documented(suite: Suite, cases: &Cases) {
    // | `PROGRAM` | NUMBER NAME | OUTCOME | ...
    let document = include_str!("../../docs/linux-vsock-test.md");
    let of_suite = format!("| `{}` | ", suite.program);
    let rows = document.lines().filter_map(|line| line.strip_prefix(&of_suite));
    let documented: BTreeMap<&str, bool> = rows
        .filter_map(|row| {
            let mut cells = row.split(" | ");
            Some((cells.next()?, cells.next()? == "passes"))
        })
        .collect();
    let names: Vec<String> = cases
        .iter()
        .map(|(number, case)| format!("{number} {}", case.0))
        .collect();
    let seen: BTreeMap<&str, bool> = names
        .iter()
        .zip(cases.values())
        .map(|(name, case)| (name.as_str(), case.1 == Outcome::Passed))
        .collect();
    assert_eq!(
        seen, documented,
        "cases that pass, seen and in docs/linux-vsock-test.md"
    );
}

/// Sends so many bytes with `vsock_perf` and tells how fast they went.
fn perf(pair: &mut Pair, server: Seat, client: Seat, options: &str) {
    let machines = &mut pair.machines;
    let receiver_options = options.replace("--zerocopy", "");
    let mut receiver = Program::start(
        machines,
        server.machine,
        "receiver",
        "vsock_perf",
        &receiver_options,
    );
    let arguments = format!("--sender {} --bytes {PERF_BYTES} {options}", server.cid);
    // The receiver says nothing before its end: whether it listens is known by trying.
    let mut sender = None;
    wait_until("vsock_perf sends", Duration::from_secs(10), || {
        let mut program = Program::start(machines, client.machine, "sender", "vsock_perf", &arguments);
        wait_for_both(
            machines,
            [&mut program, &mut Program::ended()],
            Duration::from_secs(60),
        );
        let refused = program.text.contains("connect: ");
        sender = Some(program);
        !refused
    });
    let mut sender = sender.expect("it was started");
    wait_for_both(machines, [&mut sender, &mut receiver], Duration::from_secs(10));
    let said = |program: &Program, words: &str| {
        let rest = program.text.split_once(words).map(|(_, rest)| rest);
        let number = rest.and_then(|rest| rest.split_whitespace().next()?.parse::<f64>().ok());
        number.unwrap_or_else(|| panic!("{words:?} not in: {} ({})", program.text, program.state))
    };
    let sent = said(&sender, "total bytes sent:");
    let received = said(&receiver, "total bytes received:");
    tell(&format!(
        "vsock_perf {options}, CID {} to CID {}: {:.2} Gbit/s, {:.0} MiB/s",
        client.cid,
        server.cid,
        said(&receiver, "rx performance:"),
        said(&receiver, "rx performance:") * 1e9 / 8.0 / f64::from(1 << 20)
    ));
    assert_eq!(sent, PERF_BYTES as f64);
    // It stops at the end of the stream, whether or not it has read all that came before.
    assert!(
        received <= sent && sent - received <= PERF_WINDOW as f64,
        "{received} of {sent}"
    );
}

/// Runs a test that has the machines for itself, and tells what they said if it fails.
fn in_turn(start: impl FnOnce() -> Pair, test: impl FnOnce(&mut Pair)) {
    if std::env::var_os("VSOCK_TEST_NO_VM").is_some() {
        assert!(
            std::env::var_os("CI").is_none(),
            "CI runs the real guest: unset VSOCK_TEST_NO_VM"
        );
        tell("Linux's own tests of vsock: left out, as VSOCK_TEST_NO_VM says");
        return;
    }
    let _turn = MACHINES.lock().unwrap_or_else(PoisonError::into_inner);
    let mut pair = start();
    tell(&format!("tests of {}", pair.release));
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| test(&mut pair)));
    if let Err(panic) = result {
        eprintln!("{}", pair.logs());
        std::panic::resume_unwind(panic);
    }
}

/// Runs a suite and tells what came out.
fn run(pair: &mut Pair, suite: Suite, server: Seat, client: Seat) -> Cases {
    let begin = Instant::now();
    let cases = suite::run(pair, suite, server, client);
    let passed = cases.values().filter(|case| case.1 == Outcome::Passed).count();
    tell(&format!(
        "{}, CID {} to CID {}: {passed} of {} cases pass, {:.1} s",
        suite.program,
        client.cid,
        server.cid,
        cases.len(),
        begin.elapsed().as_secs_f64()
    ));
    for (number, (name, outcome)) in &cases {
        if *outcome != Outcome::Passed {
            tell(&format!("    {number} {name}: {outcome}"));
        }
    }
    cases
}
