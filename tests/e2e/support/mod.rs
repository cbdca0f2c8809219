//! Verbs of the tests: a running binary, guests, services, and waiting with a deadline.

mod bytes;
mod host;
mod messages;
pub mod pcapng;
mod process;

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

pub use bytes::Bytes;
pub use host::{
    Service, accept_tcp, accept_unix, echo, exists, free_port, raise_descriptor_limit, read_to_end, serve,
};
pub use messages::{PacketListener, Packets, Sequence, echo_frames, echo_packets, frame, read_frame};
pub use process::{Sidecar, field, run_to_end, samples};
use vsock_sidecar::embedded_guest::{DriverOptions, EmbeddedGuest, Profile, SocketOptions, Sockets};

/// How long anything may take on a machine that does other things as well.
pub const LONG: Duration = Duration::from_secs(30);

/// Waits until `condition` holds; panics with `what` when it does not within [`LONG`].
#[track_caller]
pub fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + LONG;
    while !condition() {
        assert!(Instant::now() < deadline, "not within {LONG:?}: {what}");
        std::thread::sleep(Duration::from_millis(3));
    }
}

/// A guest as Linux 6.12 under QEMU has it.
pub fn linux(socket: &Path) -> Sockets {
    guest(
        socket,
        Profile::qemu(),
        DriverOptions::default(),
        SocketOptions::default(),
    )
}

/// A guest of any kind, with its socket layer running.
pub fn guest(socket: &Path, profile: Profile, driver: DriverOptions, sockets: SocketOptions) -> Sockets {
    let booted = EmbeddedGuest::boot(socket, profile, driver).expect("the guest boots");
    let sockets = SocketOptions {
        // Patience of the test, not of Linux: a busy machine must not look like a refusal.
        connect_timeout: LONG,
        ..sockets
    };
    Sockets::start(booted, sockets).expect("the guest's sockets start")
}

/// Fails if the device broke a rule towards this guest.
#[track_caller]
pub fn assert_lawful(guest: &Sockets) {
    let stats = guest.stats();
    assert!(stats.violations.is_empty(), "{:?}", stats.violations);
    assert_eq!(guest.crossed_resets(), 0, "resets that crossed");
}

/// Sets a flag when dropped: lets a test's other threads end whatever happens to the one that judges.
pub struct StopOnDrop<'a>(pub &'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
