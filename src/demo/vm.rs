//! `demo --vm`: the same with a real Linux guest in QEMU.

use std::path::PathBuf;

/// Why the real guest cannot be shown.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// QEMU is missing.
    #[error(
        "demo --vm needs qemu-system-x86_64, which is not in PATH; install it with\n  \
         sudo apt-get install qemu-system-x86    (Debian, Ubuntu)\n  \
         sudo dnf install qemu-system-x86-core   (Fedora)\n\
         or run the demo without --vm, which needs nothing"
    )]
    NoQemu,
    /// QEMU is there, but this build has no guest to boot.
    #[error(
        "{} is there, but booting a guest from the demo is not wired up; the real guest runs in the tests: \
         cargo test --test real_guest",
        qemu.display()
    )]
    NoGuest {
        /// The QEMU that was found.
        qemu: PathBuf,
    },
}

/// Boots the real guest and shows the acts of the demo in it.
pub(super) fn run(_keep: bool) -> Result<(), VmError> {
    let qemu = find_in_path("qemu-system-x86_64").ok_or(VmError::NoQemu)?;
    Err(VmError::NoGuest { qemu })
}

fn find_in_path(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .map(|dir| dir.join(program))
        .find(|file| file.is_file())
}
