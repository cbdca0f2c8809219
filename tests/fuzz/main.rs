//! What a fuzzer finds stays found: every case of the corpus and a bounded number of changes to each, on every test run.
//!
//! `fuzz/` has the same two functions, `gate::run` and `session::run`, for libFuzzer; `docs/fuzzing.md` says how to use it.

mod capture;
mod config;
mod connect_line;
mod found;
mod gate;
mod header;
mod input;
mod muxer;
mod proxy;
mod rings;
mod session;
mod steps;

use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{PoisonError, RwLock};

use steps::Case;

/// The corpus: file names and what they hold, in the order of the names.
fn corpus() -> Vec<(PathBuf, Vec<u8>)> {
    corpus_of("gate")
}

fn corpus_of(target: &str) -> Vec<(PathBuf, Vec<u8>)> {
    let directory = format!("{}/tests/corpus/{target}", env!("CARGO_MANIFEST_DIR"));
    let mut files: Vec<_> = std::fs::read_dir(directory)
        .into_iter()
        .flatten()
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
    let _beside = OPEN.read().unwrap_or_else(PoisonError::into_inner);
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

/// A target that takes bytes: what it is called, its function, and how many cases of noise are tried.
type Target = (&'static str, fn(&[u8]), u64);

const TARGETS: &[Target] = &[
    ("capture", capture::run, 500),
    ("config", config::run, 1500),
    ("connect_line", connect_line::run, 5000),
    ("header", header::run, 2000),
    ("muxer", muxer::run, 1500),
    ("proxy", proxy::run, 1000),
    ("rx_placement", rings::rx::run, 1500),
    ("tx_chains", rings::tx::run, 1500),
];

/// Held by who opens descriptors, and alone by who counts those of the process.
static OPEN: RwLock<()> = RwLock::new(());

/// Every case of a target's corpus with some changes to each, and noise.
fn short_run(target: &str) {
    let _beside = OPEN.read().unwrap_or_else(PoisonError::into_inner);
    let (_, run, cases) = TARGETS
        .iter()
        .find(|(name, ..)| *name == target)
        .expect("a target");
    let corpus = corpus_of(target);
    for (path, bytes) in &corpus {
        let name = path.display().to_string();
        for change in 0..20 {
            let _running = Running(&name, change);
            run(&steps::changed(bytes, change));
        }
    }
    for number in 0..*cases {
        let _running = Running("noise", number);
        run(&input::noise(number, 1500));
    }
}

#[test]
fn a_capture_is_whole_blocks_of_what_was_kept() {
    short_run("capture");
}

#[test]
fn a_configuration_is_read_as_it_is_written_or_refused_in_a_place() {
    short_run("config");
}

#[test]
fn a_connect_line_means_the_same_in_any_pieces() {
    short_run("connect_line");
}

#[test]
fn a_proxy_header_is_what_its_receiver_expects() {
    short_run("proxy");
}

#[test]
fn payload_lands_in_the_buffers_of_the_rx_ring_and_nowhere_else() {
    short_run("rx_placement");
}

#[test]
fn packets_of_the_tx_ring_are_what_the_standard_says() {
    short_run("tx_chains");
}

#[test]
fn a_header_keeps_all_its_bits() {
    short_run("header");
}

#[test]
fn the_law_keeps_its_promises_whatever_guests_host_ends_and_time_do() {
    short_run("muxer");
}

/// Panics of the threads of a session: they are contained, and no test would see them.
static PANICS: AtomicUsize = AtomicUsize::new(0);

#[test]
fn every_session_of_the_corpus_and_its_neighbours_ends_and_the_next_one_works() {
    let _alone = OPEN.write().unwrap_or_else(PoisonError::into_inner);
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
