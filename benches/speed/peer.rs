//! vhost-device-vsock as a process.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::contender::Outcome;

/// A guest as the peer is told of it.
pub struct PeerGuest {
    pub cid: u32,
    /// Where it waits for the VMM.
    pub socket: PathBuf,
    /// A service at port P is looked for at `BASE_P`.
    pub base: PathBuf,
}

/// The running program; dropping it kills it.
pub struct Peer {
    child: Child,
}

impl Peer {
    /// Starts it and waits for its sockets.
    pub fn start(program: &Path, guests: &[PeerGuest]) -> Outcome<Peer> {
        if !program.exists() {
            return Err("not installed (make peer)".into());
        }
        let mut command = Command::new(program);
        for guest in guests {
            // 1024 is as much as it takes; a driver may ask for less.
            command.arg("--vm").arg(format!(
                "guest-cid={},socket={},uds-path={},queue-size=1024",
                guest.cid,
                guest.socket.display(),
                guest.base.display()
            ));
        }
        let child = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        let peer = Peer { child };
        let deadline = Instant::now() + Duration::from_secs(10);
        while !guests.iter().all(|guest| guest.socket.exists()) {
            if Instant::now() > deadline {
                return Err("did not make its sockets within 10 s".into());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(peer)
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
