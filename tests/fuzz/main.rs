//! What a fuzzer finds stays found: every case of the corpus and a bounded number of changes to each, on every test run.
//!
//! `fuzz/` has the same two functions, `gate::run` and `session::run`, for libFuzzer; `docs/fuzzing.md` says how to use it.

mod found;
mod gate;
mod session;
mod steps;

use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};

use steps::Case;

/// The corpus: file names and what they hold, in the order of the names.
fn corpus() -> Vec<(PathBuf, Vec<u8>)> {
    let directory = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/corpus/gate");
    let mut files: Vec<_> = std::fs::read_dir(directory)
        .expect("the corpus is part of the source")
        .map(|entry| entry.expect("a file of the corpus").path())
        .collect();
    files.sort();
    files
        .into_iter()
        .map(|path| {
            let bytes = std::fs::read(&path).expect("a file of the corpus");
            (path, bytes)
        })
        .collect()
}

/// A case under every policy, to a VMM that connects and to one that listens.
fn under_every_policy(bytes: &[u8]) -> impl Iterator<Item = Vec<u8>> {
    (0..8).map(move |head| {
        let mut bytes = bytes.to_vec();
        if let Some(first) = bytes.first_mut() {
            *first = head;
        }
        bytes
    })
}

/// Names the case that is run, should it panic.
struct Running<'a>(&'a str, u64);

impl Drop for Running<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("in case {} with change {}", self.0, self.1);
        }
    }
}

#[test]
fn the_gate_keeps_its_promises_on_every_sequence_of_the_corpus_and_its_neighbours() {
    for (path, bytes) in corpus() {
        let name = path.display().to_string();
        for bytes in under_every_policy(&bytes) {
            for change in 0..100 {
                let _running = Running(&name, change);
                gate::run(&Case::decode(&steps::changed(&bytes, change)));
            }
        }
    }
}

/// Panics of the threads of a session: they are contained, and no test would see them.
static PANICS: AtomicUsize = AtomicUsize::new(0);

#[test]
fn every_session_of_the_corpus_and_its_neighbours_ends_and_the_next_one_works() {
    // Its own hook, which is silent about what is contained, goes below this one.
    let _ = vsock_sidecar::sys::unwind::contain(|| ());
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        let thread = std::thread::current();
        let name = thread.name().unwrap_or_default();
        if ["vhost ", "crate ", "device-"]
            .iter()
            .any(|of| name.starts_with(of))
        {
            PANICS.fetch_add(1, Ordering::Relaxed);
        }
        report(info);
    }));
    let mut live = session::Live::new();
    for (path, bytes) in corpus() {
        let name = path.display().to_string();
        for (head, bytes) in under_every_policy(&bytes).enumerate() {
            // Another change under each policy, and to a VMM that connects: sessions take a while.
            let changes = [0, 1 + head as u64];
            for change in &changes[..if head < 4 { 2 } else { 1 }] {
                let _running = Running(&name, *change);
                live.run(&Case::decode(&steps::changed(&bytes, *change)));
            }
        }
    }
    live.check_leaks();
    assert!(live.sessions() > 300, "{} sessions", live.sessions());
    assert_eq!(PANICS.load(Ordering::Relaxed), 0);
}

/// The corpus is made with the writer: what it writes is what is read, whatever form an integer takes.
#[test]
fn what_is_written_is_read() {
    use steps::{Op, RAM_UADDR, Request, Step, Writer};
    use vsock_sidecar::vhost_user::message::{Message, VERSION, request};
    use vsock_sidecar::vhost_user::{AccessPlatform, Mode};

    let mut writer = Writer::default();
    writer.u8(Case::head(AccessPlatform::Identity, Mode::Client));
    let values = [
        0,
        255,
        4096,
        4097,
        RAM_UADDR + 0x940,
        0xffff_e800,
        1 << 63,
        u64::MAX,
        0x1234_5678_9abc,
    ];
    let mut expected = Vec::new();
    for four in values.windows(4) {
        let &[desc, used, avail, log] = four else {
            unreachable!()
        };
        writer.request(request::SET_VRING_ADDR, VERSION, false).u8(1);
        writer.value(desc).value(used).value(avail).value(log);
        let body = steps::vring_addr_body(1, [desc, used, avail, log]);
        expected.push(Step::Request(Request {
            message: Message::new(request::SET_VRING_ADDR, VERSION, &body),
            fds: Vec::new(),
        }));
    }
    writer.op(Op::Kick).u8(2);
    expected.push(Step::Kick(2));
    let case = Case::decode(&writer.finish());
    assert_eq!(
        (case.policy, case.mode, case.babbles),
        (AccessPlatform::Identity, Mode::Client, false)
    );
    assert_eq!(case.steps, expected);
}
