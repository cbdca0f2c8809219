//! Who is at the other end of a unix socket.

use std::io;
use std::mem::{MaybeUninit, size_of};
use std::os::fd::{AsRawFd, BorrowedFd};

/// Credentials of the process that connected, or that listens, as the kernel recorded them at that moment.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PeerCredentials {
    /// Process id in our PID namespace; `None` when the peer is not in it, as between containers of a pod.
    pub pid: Option<u32>,
    /// User id in our user namespace.
    pub uid: u32,
    /// Group id in our user namespace.
    pub gid: u32,
}

/// The credentials of a connected unix socket's peer (SO_PEERCRED).
///
/// Not `rustix::net::sockopt::socket_peercred`: it returns a process id that must not be 0, and 0 is what the kernel
/// gives for a peer in another PID namespace (`cred_to_ucred` in net/core/sock.c), the usual case in a pod.
pub fn peer_credentials(socket: BorrowedFd<'_>) -> io::Result<PeerCredentials> {
    let mut value = MaybeUninit::<libc::ucred>::zeroed();
    let mut len = size_of::<libc::ucred>() as libc::socklen_t;
    // SAFETY: `socket` is an open descriptor as long as it is borrowed; `value` is valid for writes of `len` bytes, which
    // is its size, and the kernel writes no more than `len`; `len` is valid for reads and writes.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            value.as_mut_ptr().cast(),
            &mut len,
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: every field of `ucred` is a plain integer, so the zeroes it began with and whatever the kernel wrote over
    // them are a valid value.
    let value = unsafe { value.assume_init() };
    let pid = u32::try_from(value.pid).ok().filter(|pid| *pid != 0);
    Ok(PeerCredentials {
        pid,
        uid: value.uid,
        gid: value.gid,
    })
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn a_pair_of_our_own_is_us() {
        let (one, _other) = UnixStream::pair().unwrap();
        let peer = peer_credentials(one.as_fd()).unwrap();
        assert_eq!(peer.pid, Some(std::process::id()));
        assert_eq!(peer.uid, rustix::process::getuid().as_raw());
    }

    #[test]
    fn what_is_no_socket_is_an_error() {
        let file = std::fs::File::open("/dev/null").unwrap();
        assert!(peer_credentials(file.as_fd()).is_err());
    }
}
