//! The whole sidecar inside a VM, with AF_VSOCK as its host side: `to: vsock://CID:PORT` and `listen: vsock://PORT`.
//!
//! A machine without a vsock device boots Debian's kernel with vsock_loopback, so that CID 1 is itself. In it runs this very
//! test program again, with the scenarios of [`inside`]: they start the binary, connect to it as an embedded guest, and are
//! the services and clients at the other end. Nothing of this opens an AF_VSOCK socket on the machine that runs the test:
//! the scenarios look for a file that only the VM has.
//!
//! `VSOCK_TEST_NO_VM=1` leaves this out, as in `tests/real_guest`.

mod inside;
mod nest;
// Made for several tests, each of which uses a part.
#[allow(dead_code, unused_imports)]
#[path = "../e2e/support/mod.rs"]
mod support;
#[allow(dead_code)]
#[path = "../vm/mod.rs"]
mod vm;

use std::sync::{Mutex, PoisonError};

/// One machine at a time: they emulate, and take what the processors have.
static MACHINE: Mutex<()> = Mutex::new(());

#[test]
fn a_sidecar_inside_a_vm_has_vsock_as_its_host_side_on_linux_6_1() {
    on("6.1");
}

#[test]
fn a_sidecar_inside_a_vm_has_vsock_as_its_host_side_on_linux_6_12() {
    on("6.12");
}

fn on(kernel: &str) {
    if std::env::var_os("VSOCK_TEST_NO_VM").is_some() {
        assert!(
            std::env::var_os("CI").is_none(),
            "CI runs the nested sidecar: unset VSOCK_TEST_NO_VM"
        );
        vm::lab::tell(&format!(
            "nested sidecar on Linux {kernel}: left out, as VSOCK_TEST_NO_VM says"
        ));
        return;
    }
    let _turn = MACHINE.lock().unwrap_or_else(PoisonError::into_inner);
    let mut nest = nest::Nest::boot(kernel);
    for scenario in inside::SCENARIOS {
        nest.run(scenario);
    }
}
