//! A real Linux guest for tests: QEMU with a vhost-user-vsock device, a Debian kernel and an init program of ours.
//!
//! - [`assets`]: the kernels (`fetch-kernels.sh`), the guest's program (`tests/guest`) and the initramfs made of both;
//! - [`qemu`]: one virtual machine: boot, the control line of the guest's program, QMP, the end;
//! - [`sidecar`]: one run of the real binary: configuration, metrics, log, the end;
//! - [`service`]: what the guest talks to: TCP and unix services and clients with checked data;
//! - [`lab`]: all of these together, and the scenarios' runner.
//!
//! Nothing here sleeps to let something happen: waits are on descriptors or on a condition, always with a deadline. Every
//! process is ended by its own handle when its value is dropped, a failed test included.

pub mod assets;
mod cpio;
pub mod lab;
#[path = "../guest/src/pattern.rs"]
pub mod pattern;
pub mod qemu;
pub mod service;
pub mod sidecar;

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Child, ExitStatus};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

/// Waits until `condition` holds; panics with `what` when `patience` is over.
pub fn wait_until(what: &str, patience: Duration, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + patience;
    while !condition() {
        assert!(
            Instant::now() < deadline,
            "gave up after {patience:?} waiting for this: {what}"
        );
        thread::sleep(Duration::from_millis(10));
    }
}

/// Waits until `fd` can be read, its peer is gone, or `deadline` has come, which is an error of kind `TimedOut`.
fn wait_readable(fd: impl AsFd, deadline: Instant) -> io::Result<()> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec::try_from(left).map_err(io::Error::other)?;
        match poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&timeout)) {
            Ok(0) => return Err(io::ErrorKind::TimedOut.into()),
            Ok(_) => return Ok(()),
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
}

/// The exit status of a child that ends within `patience`.
fn wait_for_end(child: &mut Child, patience: Duration) -> Option<ExitStatus> {
    let fd = pidfd_open(Pid::from_child(child), PidfdFlags::empty()).ok()?;
    wait_readable(&fd, Instant::now() + patience).ok()?;
    child.wait().ok()
}

/// The last lines of a log file, for a failure's report.
fn tail(path: &Path, lines: usize) -> String {
    let text = fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let all: Vec<&str> = text.lines().collect();
    let from = all.len().saturating_sub(lines);
    format!(
        "--- {} (last {} of {} lines)\n{}\n",
        path.display(),
        all.len() - from,
        all.len(),
        all[from..].join("\n")
    )
}
