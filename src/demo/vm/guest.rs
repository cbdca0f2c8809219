//! The real guest as the acts of the demo see it: each thing that it does is one command of its control line.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::assets::Assets;
use super::pattern::Digest;
use super::qemu::{self, Accelerator, Answer, Options, Vm, complaint};
use super::{VmError, text};
use crate::demo::interrupt::Interrupt;
use crate::demo::service::{DIGEST, PATTERN};
use crate::demo::stage::{BULK_PORT, GUEST_PAGE, GUEST_WEB_PORT, Guest, Place, Verdict, Way};
use crate::demo::terminal::Terminal;
use crate::demo::{Effort, Error, http};

/// Seed of what the guest sends.
const GUEST_SEED: u64 = 1;
/// Seed of what the service sends.
const SERVICE_SEED: u64 = 2;

/// Linux in QEMU.
pub(super) struct RealGuest {
    vm: Vm,
    release: String,
    qemu: String,
    cid: u64,
    /// Bytes that the bulk service moved; the guest's program says nothing before it is done.
    moved: Arc<AtomicU64>,
    interrupt: Interrupt,
}

impl RealGuest {
    /// Boots it and starts a web server in it.
    pub(super) fn boot(
        assets: &Assets,
        place: &Place<'_>,
        t: &mut Terminal,
        interrupt: &Interrupt,
    ) -> Result<RealGuest, Error> {
        let started = Instant::now();
        let what = format!("booting Linux {}", assets.release);
        t.waiting(&what)?;
        let vm = Vm::boot(
            assets,
            place.vhost_user,
            place.dir,
            &Options::default(),
            &mut || {
                t.elapsed(&what, started);
                !interrupt.raised()
            },
        );
        t.clear()?;
        let mut guest = RealGuest {
            vm: vm?,
            release: String::new(),
            qemu: qemu::version().unwrap_or_default(),
            cid: 0,
            moved: Arc::clone(&place.services.moved),
            interrupt: interrupt.clone(),
        };
        guest.release = guest.ask("release")?.success()?.text("release")?.to_owned();
        guest.cid = guest.ask("cid")?.success()?.number("cid")?;
        let page = text::encode(http::response(GUEST_PAGE).as_bytes());
        guest
            .ask(&format!("serve {GUEST_WEB_PORT} head text:{page}"))?
            .success()?;
        Ok(guest)
    }

    fn ask(&mut self, command: &str) -> Result<Answer, VmError> {
        let interrupt = &self.interrupt;
        self.vm.answer(command, &mut || !interrupt.raised())
    }

    fn emulated(&self) -> bool {
        self.vm.accelerator() == Accelerator::Tcg
    }
}

/// The text that the guest's program kept of a connection.
fn kept(answer: &Answer) -> Result<Vec<u8>, VmError> {
    text::decode(answer.text("kept")?).ok_or_else(|| answer.other("an answer with a text"))
}

impl Guest for RealGuest {
    fn cid(&self) -> u64 {
        self.cid
    }

    fn description(&self) -> String {
        let processor = if self.emulated() {
            "emulated, no KVM"
        } else {
            "KVM"
        };
        format!(
            "Linux {}, booted in {:.1} s by QEMU {}, {processor}",
            self.release,
            self.vm.boot_time().as_secs_f64(),
            self.qemu
        )
    }

    fn fetch(&mut self, port: u32) -> Result<(http::Answer, Duration), Error> {
        let request = text::encode(http::request("service", "/").as_bytes());
        let answer = self
            .ask(&format!("client {port} text:{request} keep"))?
            .success()?;
        let page = http::parse(&kept(&answer)?).map_err(Error::io("read the page that the guest got"))?;
        Ok((page, answer.time("us")?))
    }

    fn knock(&mut self, port: u32) -> Result<Duration, Error> {
        let answer = self.ask(&format!("client {port}"))?;
        if answer.is_err("ECONNRESET") {
            Ok(answer.time("connect_us")?)
        } else {
            Err(answer
                .other("ECONNRESET, the answer to a port without a rule")
                .into())
        }
    }

    fn bulk(
        &mut self,
        way: Way,
        t: &mut Terminal,
        interrupt: &Interrupt,
        effort: Effort,
    ) -> Result<(), Error> {
        // One command's worth of time, with a margin for busy machines.
        let most = if self.emulated() { 32 << 20 } else { 512 << 20 };
        let bytes = effort.bytes.min(most);
        let label = way.label();
        let (command, seed) = match way {
            Way::GuestToHost => {
                let wish = text::encode(DIGEST.as_bytes());
                let steps = format!("text:{wish} send:bytes={bytes},seed={GUEST_SEED} shutwr keep");
                (format!("client {BULK_PORT} {steps}"), GUEST_SEED)
            }
            Way::HostToGuest => {
                let wish = text::encode(format!("{PATTERN} {bytes} {SERVICE_SEED}\n").as_bytes());
                let steps = format!("text:{wish} recv:seed={SERVICE_SEED}");
                (format!("client {BULK_PORT} {steps}"), SERVICE_SEED)
            }
        };
        let (before, started) = (self.moved.load(Ordering::Relaxed), Instant::now());
        let moved = &self.moved;
        let mut go_on = || {
            let moved = moved.load(Ordering::Relaxed).saturating_sub(before);
            // A bar that cannot be drawn is no reason to stop; the next line finds out.
            let _ = t.progress(label, moved as f64 / bytes as f64, moved, started.elapsed());
            !interrupt.raised()
        };
        let answer = self.vm.answer(&command, &mut go_on)?.success()?;
        let (guest, service) = match way {
            Way::GuestToHost => {
                let report = String::from_utf8_lossy(&kept(&answer)?).trim_end().to_owned();
                (
                    fields(answer.number("sent")?, answer.digest("sent_digest")?),
                    report,
                )
            }
            Way::HostToGuest => {
                let digest = answer.digest("received_digest")?;
                let sent = fields(bytes, Digest::of_pattern(seed, bytes));
                (fields(answer.number("received")?, digest), sent)
            }
        };
        if guest != service {
            let what =
                format!("{label}: bytes and digest are {guest} in the guest, {service} at the service");
            return Err(Error::Unexpected(what));
        }
        t.result(label, bytes, answer.time("us")?)?;
        let (_, digest) = guest.split_once(' ').unwrap_or_default();
        t.remark(&format!("digest {digest} at both ends"))
    }

    fn bulk_remark(&self) -> &'static str {
        if self.emulated() {
            "64 KiB writes, one connection; without KVM the emulated processor sets the pace"
        } else {
            "64 KiB writes, one connection"
        }
    }

    fn verdict(&self) -> Verdict {
        let console = self.vm.console();
        let complaint = complaint(&console);
        Verdict {
            about: "kernel",
            good: complaint.is_none(),
            text: complaint.unwrap_or("no complaint on the console").to_owned(),
            judge: "the guest's own drivers did all this",
        }
    }

    fn end(self: Box<Self>) -> Result<(), Error> {
        self.vm.kill();
        Ok(())
    }
}

/// Bytes and digest, as the bulk service writes them.
fn fields(bytes: u64, digest: u64) -> String {
    format!("{bytes} {digest:016x}")
}
