//! A real Linux guest for tests: QEMU with a vhost-user-vsock device, a Debian kernel and an init program of ours.
//!
//! - [`assets`]: the kernels (`fetch-kernels.sh`), the guest's program (`tests/guest`) and the initramfs made of both;
//! - [`extra`]: what else a machine may have: modules and programs;
//! - [`qemu`]: one virtual machine: boot, the control line of the guest's program, QMP, the end;
//! - [`sidecar`]: one run of the real binary: configuration, metrics, log, the end;
//! - [`service`]: what the guest talks to: TCP and unix services and clients with checked data;
//! - [`lab`]: all of these together, and the scenarios' runner.
//!
//! Nothing here sleeps to let something happen: waits are on descriptors or on a condition, always with a deadline. Every
//! process is ended by its own handle when its value is dropped, a failed test included.

pub mod assets;
#[allow(dead_code)]
pub mod extra;
pub mod lab;
pub mod qemu;
pub mod service;
pub mod sidecar;

use std::process::{Child, ExitStatus};
use std::thread;
use std::time::{Duration, Instant};

pub use vsock_sidecar::demo::vm::pattern;
use vsock_sidecar::demo::vm::wait::{self, tail};

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

/// The exit status of a child that ends within `patience`.
fn wait_for_end(child: &mut Child, patience: Duration) -> Option<ExitStatus> {
    wait::end_of(child, Instant::now() + patience, &mut || true).ok()
}
