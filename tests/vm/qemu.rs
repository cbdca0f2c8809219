//! One virtual machine, as a test uses it: what goes wrong is a panic that says what.

use std::path::Path;

use serde_json::{Value, json};
pub use vsock_sidecar::demo::vm::qemu::{Options, complaint, die_with_us};
use vsock_sidecar::demo::vm::{VmError, qemu};

use super::assets::Assets;

/// A running machine; dropping it kills QEMU.
pub struct Vm(qemu::Vm);

impl Vm {
    /// Boots a guest whose vsock device is served at `socket` and waits for the control line. Files go to `dir`.
    pub fn boot(assets: &Assets, socket: &Path, dir: &Path, options: &Options) -> Vm {
        Vm(must(qemu::Vm::boot(assets, socket, dir, options, &mut || true)))
    }

    /// The same for a machine without a vsock device.
    pub fn boot_without_device(assets: &Assets, dir: &Path, options: &Options) -> Vm {
        Vm(must(qemu::Vm::boot_without_device(
            assets,
            dir,
            options,
            &mut || true,
        )))
    }

    /// Has the guest's program carry out a command (`tests/guest/src/command.rs`) that must succeed.
    pub fn ok(&mut self, command: &str) -> Answer {
        let answer = self.answer(command);
        assert!(answer.is_ok(), "{command}: {}", answer.line);
        answer
    }

    /// Has the guest's program carry out a command that must fail with the error of this name.
    pub fn err(&mut self, command: &str, name: &str) -> Answer {
        let answer = self.answer(command);
        assert!(answer.read.is_err(name), "{command}: {}, not {name}", answer.line);
        answer
    }

    /// The answer to a command, whatever it is.
    pub fn answer(&mut self, command: &str) -> Answer {
        let read = must(self.0.answer(command, &mut || true));
        Answer {
            line: read.line.clone(),
            read,
        }
    }

    /// Presses the reset button and waits for nothing; [`Vm::wait_for_boot`] does.
    pub fn press_reset(&mut self) {
        self.qmp("system_reset", json!({}));
    }

    /// Waits until the guest has booted again.
    pub fn wait_for_boot(&mut self) {
        must(self.0.wait_for_boot(&mut || true));
    }

    /// Carries out a QMP command; events that come meanwhile are skipped.
    pub fn qmp(&mut self, command: &str, arguments: Value) -> Value {
        must(self.0.qmp(command, arguments))
    }

    /// SIGKILL, as an out-of-memory killer would.
    pub fn kill(self) {
        self.0.kill();
    }

    /// Console, QEMU's own output and, if the guest still answers, the kernel's log.
    pub fn logs(&mut self) -> String {
        self.0.logs()
    }

    /// The guest's console since the first boot in this directory.
    pub fn console(&self) -> String {
        self.0.console()
    }
}

/// What the guest's program answered.
#[derive(Clone, Debug)]
pub struct Answer {
    /// The whole line.
    pub line: String,
    read: qemu::Answer,
}

impl Answer {
    /// Whether the command succeeded.
    pub fn is_ok(&self) -> bool {
        self.read.is_ok()
    }

    /// The value of a field, `key=value`.
    pub fn text(&self, key: &str) -> &str {
        must(self.read.text(key))
    }

    /// The value of a decimal field.
    pub fn number(&self, key: &str) -> u64 {
        must(self.read.number(key))
    }

    /// The value of a field that holds a digest.
    pub fn digest(&self, key: &str) -> u64 {
        must(self.read.digest(key))
    }
}

#[track_caller]
fn must<T>(result: Result<T, VmError>) -> T {
    result.unwrap_or_else(|e| panic!("{e}"))
}
