//! Why there is no real guest, and what to do about it.

use std::io;
use std::path::PathBuf;

/// Why the real guest cannot be shown.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VmError {
    /// QEMU is missing.
    #[error(
        "demo --vm needs qemu-system-x86_64, which is not in PATH; install it with\n  \
         sudo apt-get install qemu-system-x86    (Debian, Ubuntu)\n  \
         sudo dnf install qemu-system-x86-core   (Fedora)\n\
         or run the demo without --vm, which needs nothing"
    )]
    NoQemu,
    /// The source tree that this program was built from is gone, or this is another machine.
    #[error(
        "demo --vm builds its guest from the source tree, and {} is not there; run it from a checkout with\n  \
         cargo run --release -- demo --vm\n\
         or run the demo without --vm, which needs nothing",
        missing.display()
    )]
    NoSource {
        /// The file of the tree that was looked for.
        missing: PathBuf,
    },
    /// Another program is missing.
    #[error("the real guest needs {program}, which is not in PATH; {remedy}")]
    NoProgram {
        /// Its name.
        program: &'static str,
        /// What to do.
        remedy: &'static str,
    },
    /// A program that prepares the guest failed.
    #[error("{what} failed: {command} ended with {status}\n{output}")]
    Failed {
        /// What was attempted.
        what: &'static str,
        /// The command, as it could be typed.
        command: String,
        /// How it ended.
        status: std::process::ExitStatus,
        /// What it wrote to standard error, which says what to do.
        output: String,
    },
    /// A file of the guest is larger than the archive format allows.
    #[error("{name} has {size} bytes, more than an initramfs can hold")]
    TooLarge {
        /// The file's name in the archive.
        name: String,
        /// Its size.
        size: usize,
    },
    /// A system call failed.
    #[error("{what}: {source}")]
    Io {
        /// What was attempted.
        what: String,
        /// The system's words.
        source: io::Error,
    },
    /// QEMU ended or said nothing.
    #[error("QEMU did not start: {source}\n{logs}")]
    NoStart {
        /// What became of its connection.
        source: io::Error,
        /// QEMU's own output.
        logs: String,
    },
    /// The guest's program did not say that it is ready.
    #[error("the guest did not come up: {source}\n{logs}")]
    NoBoot {
        /// What became of the control line.
        source: io::Error,
        /// The guest's console and QEMU's output.
        logs: String,
    },
    /// The guest's program did not answer.
    #[error("the guest did not answer {command:?}: {source}")]
    NoAnswer {
        /// The command.
        command: String,
        /// What became of the control line.
        source: io::Error,
    },
    /// The guest's program answered something else.
    #[error("the guest answered {command:?} with {answer:?}, which is not {expected}")]
    OtherAnswer {
        /// The command, or nothing where only an answer is at hand.
        command: String,
        /// The whole line.
        answer: String,
        /// What was expected, in words.
        expected: String,
    },
    /// QEMU refused a command, or its answer is no JSON.
    #[error("QMP {command}: {answer}")]
    Qmp {
        /// The command.
        command: String,
        /// The whole line, or what became of the connection.
        answer: String,
    },
    /// Somebody wants it to end.
    #[error("interrupted")]
    Interrupted,
}

impl VmError {
    /// For `map_err`: a system call's failure, with what was attempted.
    pub(super) fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> VmError {
        move |source| VmError::Io {
            what: what.into(),
            source,
        }
    }
}
