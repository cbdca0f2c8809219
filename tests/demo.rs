//! `vsock-sidecar demo` as people run it.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

/// Killed when a test fails.
struct Demo(Child);

impl Drop for Demo {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn start(arguments: &[&str], directory: &std::path::Path) -> Demo {
    let child = Command::new(env!("CARGO_BIN_EXE_vsock-sidecar"))
        .arg("demo")
        .args(arguments)
        .env("TMPDIR", directory)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    Demo(child)
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
}
