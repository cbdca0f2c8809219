//! What several test modules here need.

use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::{Arc, mpsc};

use super::link::{DeviceLink, WakeFd};
use super::{AccessPlatform, Mode, NegotiationWatch, SessionConfig};
use crate::device::{Command, DeviceHandle};

pub fn config(mode: Mode, socket: impl Into<PathBuf>) -> SessionConfig {
    SessionConfig {
        guest: "web".into(),
        cid: 3,
        socket: socket.into(),
        mode,
        access_platform: AccessPlatform::Auto,
    }
}

pub fn watch(mode: Mode) -> Arc<NegotiationWatch> {
    NegotiationWatch::new(&config(mode, "/run/web.sock"))
}

/// A device that is whoever holds it.
pub struct Device {
    pub commands: mpsc::Receiver<Command>,
    pub wake: Arc<WakeFd>,
    _poll: mio::Poll,
}

impl Device {
    /// Whether the session thread has been woken since the last time.
    pub fn was_woken(&self) -> bool {
        rustix::io::read(self.wake.as_fd(), &mut [0u8; 8]).is_ok()
    }
}

/// A link to a device.
pub fn link() -> (DeviceLink, Device) {
    let poll = mio::Poll::new().unwrap();
    let waker = Arc::new(mio::Waker::new(poll.registry(), mio::Token(0)).unwrap());
    let (sender, commands) = mpsc::channel();
    let wake = Arc::new(WakeFd::new().unwrap());
    let link = DeviceLink::new(
        "web".into(),
        DeviceHandle::new(sender, waker),
        watch(Mode::Server),
        Arc::clone(&wake),
    );
    (
        link,
        Device {
            commands,
            wake,
            _poll: poll,
        },
    )
}

/// Device and inode, to tell whether two descriptors are of one file.
pub fn identity(fd: &OwnedFd) -> (u64, u64) {
    let stat = rustix::fs::fstat(fd).unwrap();
    (stat.st_dev, stat.st_ino)
}
