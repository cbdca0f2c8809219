//! `vsock-sidecar demo` as people run it.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use vsock_sidecar::demo::vm::assets::Source;

/// Killed when a test fails.
struct Demo(Child);

impl Drop for Demo {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn start(arguments: &[&str], directory: &Path) -> Demo {
    let child = Command::new(env!("CARGO_BIN_EXE_vsock-sidecar"))
        .arg("demo")
        .args(arguments)
        .env("TMPDIR", directory)
        // The kernels and the guest's program that the real guest test prepares as well.
        .env("CARGO_TARGET_DIR", target())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    Demo(child)
}

fn target() -> &'static Path {
    Path::new(env!("CARGO_TARGET_TMPDIR")).parent().unwrap()
}

fn get(url: &str) -> String {
    let (address, path) = url.trim_start_matches("http://").split_once('/').unwrap();
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    write!(
        stream,
        "GET /{path} HTTP/1.1\r\nHost: demo\r\nConnection: close\r\n\r\n"
    )
    .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

#[test]
fn kept_running_its_commands_work_and_ctrl_c_leaves_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let mut demo = start(&["--keep"], directory.path());
    let lines = BufReader::new(demo.0.stdout.take().unwrap())
        .lines()
        .map(Result::unwrap);
    // The last line printed is the way to the server in the guest.
    let mut urls = Vec::new();
    for line in lines {
        let at_end = line.ends_with("the server in the guest");
        let words: Vec<&str> = line.split_whitespace().collect();
        if let ["curl", "-s", url, ..] = words.as_slice()
            && url.starts_with("http")
        {
            urls.push((*url).to_owned());
        }
        if at_end {
            break;
        }
    }
    let [metrics, state, web] = urls.as_slice() else {
        panic!("three addresses, not {urls:?}")
    };
    assert!(get(metrics).contains("vsock_packets_total{"));
    assert!(get(state).contains("\"featuresAcked\""));
    assert!(get(web).contains("Hello from a server in the guest"));

    kill_process(Pid::from_child(&demo.0), Signal::INT).unwrap();
    assert_eq!(demo.0.wait().unwrap().code(), Some(0));
    let left: Vec<_> = directory.path().read_dir().unwrap().flatten().collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn a_reader_that_has_seen_enough_is_no_failure() {
    let directory = tempfile::tempdir().unwrap();
    let mut demo = start(&[], directory.path());
    let mut title = String::new();
    let mut output = BufReader::new(demo.0.stdout.take().unwrap());
    while title.trim().is_empty() {
        title.clear();
        output.read_line(&mut title).unwrap();
    }
    assert!(title.starts_with("vsock-sidecar demo"), "{title}");
    drop(output);
    let mut complaints = String::new();
    demo.0
        .stderr
        .take()
        .unwrap()
        .read_to_string(&mut complaints)
        .unwrap();
    assert_eq!(
        (demo.0.wait().unwrap().code(), complaints.as_str()),
        (Some(0), "")
    );
    assert_eq!(directory.path().read_dir().unwrap().count(), 0);
}

/// Building the guest's program included, on a machine that has not built it yet.
const FIRST_BOOT: Duration = Duration::from_secs(900);

/// Whether the real guest is left out. Else everything that it needs is there afterwards: where the demo only says what to
/// install, root's tests install it, as those of `tests/real_guest` do.
fn without_vm() -> bool {
    let without = std::env::var_os("VSOCK_TEST_NO_VM").is_some();
    assert!(
        !without || std::env::var_os("CI").is_none(),
        "CI runs the real guest: unset VSOCK_TEST_NO_VM"
    );
    if !without {
        let source = Source::find(Some(target())).unwrap().may_install();
        let fetched = source.fetch_kernels(&["6.12"], &mut || true);
        fetched.unwrap_or_else(|e| panic!("{e}"));
    }
    without
}

/// Its lines as they come, until one has `last` or standard output ends.
fn lines_until(demo: &mut Demo, last: &'static str) -> Vec<String> {
    let (line, lines) = channel();
    let output = BufReader::new(demo.0.stdout.take().unwrap());
    std::thread::spawn(move || {
        for text in output.lines().map_while(Result::ok) {
            let done = text.contains(last);
            if line.send(text).is_err() || done {
                return;
            }
        }
    });
    let deadline = Instant::now() + FIRST_BOOT;
    let mut seen = Vec::new();
    loop {
        match lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(text) => seen.push(text),
            Err(RecvTimeoutError::Disconnected) => return seen,
            Err(RecvTimeoutError::Timeout) => panic!("no end after {FIRST_BOOT:?}: {seen:#?}"),
        }
    }
}

/// All the acts, and what Ctrl-C leaves of a machine that was kept.
#[test]
fn a_real_guest_shows_the_same_and_leaves_nothing() {
    if without_vm() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let mut demo = start(&["--vm", "--keep"], directory.path());
    let text = lines_until(&mut demo, "the server in the guest").join("\n");
    if !text.contains("the server in the guest") {
        let mut complaint = String::new();
        let _ = demo.0.stderr.take().unwrap().read_to_string(&mut complaint);
        panic!("{text}\n{complaint}");
    }
    for expected in [
        "a real Linux guest in QEMU",
        "booted in ",
        "Hello from a TCP service that knows nothing of vsock.",
        "Hello from a server in the guest that knows nothing of TCP.",
        "RST: connect() fails at once",
        "guest -> service ",
        "service -> guest ",
        "at both ends",
        "version_1                  yes   yes",
        "refused    1 for want of a rule",
        "no complaint on the console",
    ] {
        assert!(text.contains(expected), "{expected:?} is missing in\n{text}");
    }
    let web = text.lines().last().unwrap().split_whitespace().nth(2).unwrap();
    assert!(get(web).contains("Hello from a server in the guest"));
    let machine = machines(directory.path());
    assert_eq!(machine.len(), 1, "one QEMU has its files there");

    kill_process(Pid::from_child(&demo.0), Signal::INT).unwrap();
    assert_eq!(demo.0.wait().unwrap().code(), Some(0));
    assert!(machines(directory.path()).is_empty(), "QEMU runs on");
    assert_eq!(directory.path().read_dir().unwrap().count(), 0);
}

#[test]
fn a_real_guest_comes_to_an_end_by_itself() {
    if without_vm() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let mut demo = start(&["--vm"], directory.path());
    let text = lines_until(&mut demo, "\0").join("\n");
    let mut complaint = String::new();
    let _ = demo.0.stderr.take().unwrap().read_to_string(&mut complaint);
    assert_eq!(demo.0.wait().unwrap().code(), Some(0), "{text}\n{complaint}");
    assert!(text.contains("demo --vm --keep"), "{text}");
    assert_eq!(directory.path().read_dir().unwrap().count(), 0);
}

#[test]
fn ctrl_c_during_the_boot_ends_the_machine() {
    if without_vm() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let mut demo = start(&["--vm"], directory.path());
    let text = lines_until(&mut demo, "booting Linux").join("\n");
    assert!(text.contains("booting Linux"), "{text}");
    kill_process(Pid::from_child(&demo.0), Signal::TERM).unwrap();
    // The reader of standard output has gone meanwhile, which turns no interrupt into a failure.
    assert_eq!(demo.0.wait().unwrap().code(), Some(0));
    assert!(machines(directory.path()).is_empty(), "QEMU runs on");
    assert_eq!(directory.path().read_dir().unwrap().count(), 0);
}

/// The processes whose command line names this directory.
fn machines(directory: &Path) -> Vec<String> {
    let directory = directory.to_str().unwrap();
    let processes = Path::new("/proc").read_dir().unwrap().flatten();
    let lines = processes.filter_map(|entry| std::fs::read(entry.path().join("cmdline")).ok());
    lines
        .map(|line| String::from_utf8_lossy(&line).replace('\0', " "))
        .filter(|line| line.contains(directory))
        .collect()
}

#[test]
fn without_qemu_the_real_guest_says_what_to_install() {
    let output = Command::new(env!("CARGO_BIN_EXE_vsock-sidecar"))
        .args(["demo", "--vm"])
        .env("PATH", "/nonexistent")
        .output()
        .unwrap();
    let complaint = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(
        complaint.contains("apt-get install qemu-system-x86"),
        "{complaint}"
    );
    assert!(output.stdout.is_empty(), "nothing else is said");
}
