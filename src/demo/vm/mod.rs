//! `demo --vm`: the same acts with a real Linux guest in QEMU.
//!
//! - [`assets`]: the kernel (`tests/vm/fetch-kernels.sh`), the guest's program (`tests/guest`) and the initramfs of both;
//! - [`cpio`]: the initramfs' format, for tests that put more into it;
//! - [`qemu`]: one virtual machine: boot, the control line of the guest's program, QMP, the end;
//! - [`pattern`] and [`text`]: data and words that both ends know; the guest's program includes these two files;
//! - [`wait`]: waits with a deadline, which an interrupt ends.
//!
//! All of this is public for the demo and for the tests with a real guest (`tests/real_guest/`), which boot the same
//! machine; it is no part of what the crate promises to anybody else. It needs QEMU, cargo and the source tree, and says
//! which of them is missing. Kernels and programs are kept in `vm` in cargo's target directory.

pub mod assets;
pub mod cpio;
mod error;
mod guest;
pub mod pattern;
pub mod qemu;
pub mod text;
pub mod wait;

use std::time::Instant;

use self::assets::{Assets, Source, find_in_path};
pub use self::error::VmError;
use self::guest::RealGuest;
use super::interrupt::Interrupt;
use super::stage::Stage;
use super::terminal::Terminal;
use super::{Effort, Error, Options, acts};

/// The kernel that is booted.
const KERNEL: &str = "6.12";

/// Boots the real guest and shows the acts of the demo in it.
pub(super) fn show(
    t: &mut Terminal,
    interrupt: &Interrupt,
    effort: Effort,
    options: Options,
) -> Result<(), Error> {
    // Before anything is printed: who lacks QEMU reads what to install, and nothing else.
    find_in_path(qemu::PROGRAM).ok_or(VmError::NoQemu)?;
    let source = Source::find(None)?;
    t.title(
        "vsock-sidecar demo",
        "a service and the sidecar in one process, a real Linux guest in QEMU",
    )?;
    let assets = prepare(&source, t, interrupt)?;
    let stage = Stage::set_up(t, |place, t| {
        Ok(Box::new(RealGuest::boot(&assets, place, t, interrupt)?))
    })?;
    acts(stage, t, interrupt, effort, options)
}

/// Kernel and guest program, of which the first run takes a minute.
fn prepare(source: &Source, t: &mut Terminal, interrupt: &Interrupt) -> Result<Assets, Error> {
    let fetched = source.has_kernel(KERNEL);
    let started = Instant::now();
    if !fetched {
        t.field(
            "prepare",
            &format!("fetching Linux {KERNEL}"),
            "the first time only",
        )?;
    }
    let kernels = source.fetch_kernels(&[KERNEL], &mut || {
        t.elapsed(&format!("fetching Linux {KERNEL}"), started);
        !interrupt.raised()
    });
    t.clear()?;
    kernels?;
    if !fetched {
        t.field("prepare", "building the guest's program", "the first time only")?;
    }
    let init = source.build_init(&mut || {
        t.elapsed("building the guest's program", started);
        !interrupt.raised()
    });
    t.clear()?;
    Ok(source.assets(KERNEL, &init?)?)
}
