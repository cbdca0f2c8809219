//! Whole messages of unix SOCK_SEQPACKET sockets, empty ones included.
//!
//! recvmsg() returns 0 for a message without bytes and at the end of the stream alike. What tells them apart is a
//! control message: with SO_TIMESTAMP set the kernel gives one with every message (`__unix_dgram_recvmsg` in
//! net/unix/af_unix.c, "SOCK_RCVTSTAMP"), whenever it was sent, and none at the end. It is not even received: with no
//! room for it MSG_CTRUNC says that there was one.
//!
//! SO_PASSCRED would do the same and is worse: a socket that has it set gets a name of the abstract namespace with the
//! first thing it sends (`unix_autobind`), of which the network namespace has a million. On a unix socket SO_TIMESTAMP
//! costs a reading of the clock a message; what it switches on for the whole system it does for other families only
//! (`sock_needs_netstamp` in net/core/sock.c).

use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Makes the empty messages of a unix socket tell from its end. Once, before the first [`receive`].
///
/// # Errors
/// Those of setsockopt(2) for a descriptor that is no socket.
pub fn mark_messages(socket: BorrowedFd<'_>) -> io::Result<()> {
    let on: libc::c_int = 1;
    // SAFETY: `socket` is open as long as it is borrowed; `on` is valid for reads of the length given, which is its size.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_TIMESTAMP,
            (&raw const on).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Takes the next message of a socket that [`mark_messages`] was called for: its length in bytes, or `None` at the end
/// of the stream. Does not wait.
///
/// `into` has the message afterwards if that is at most `most` bytes long; else it is empty, and the message is gone.
/// Descriptors that came along are closed.
///
/// # Errors
/// [`io::ErrorKind::WouldBlock`] when there is no message; [`io::ErrorKind::OutOfMemory`] when there is no memory for
/// `most` bytes, which loses nothing; else the socket's failure.
pub fn receive(socket: BorrowedFd<'_>, into: &mut Vec<u8>, most: usize) -> io::Result<Option<usize>> {
    into.clear();
    into.try_reserve_exact(most)?;
    let mut slice = libc::iovec {
        iov_base: into.as_mut_ptr().cast(),
        iov_len: most,
    };
    // SAFETY: msghdr is a C structure of integers and pointers, for which all zeros is a value (the empty message). Some
    // libcs have private padding in it, so that it cannot be written as a literal.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &raw mut slice;
    message.msg_iovlen = 1;
    // MSG_TRUNC: the result is the length of the message, however much of it was copied.
    let flags = libc::MSG_DONTWAIT | libc::MSG_TRUNC;
    let length = super::retry_interrupted(|| {
        // SAFETY: `socket` is open, as it is borrowed. `message` is a valid msghdr: no name, no control buffer, and one
        // iovec. That names the first `most` bytes of the memory of `into`, which has room for at least so many and
        // which nobody else refers to.
        unsafe { libc::recvmsg(socket.as_raw_fd(), &mut message, flags) }
    })?;
    if length == 0 && message.msg_flags & libc::MSG_CTRUNC == 0 {
        return Ok(None);
    }
    if length <= most {
        // SAFETY: the kernel has written the first `length` bytes, and `length <= most`, for which there is room.
        unsafe { into.set_len(length) };
    }
    Ok(Some(length))
}

#[cfg(test)]
mod tests {
    use std::os::fd::{AsFd, OwnedFd};

    use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType};

    use super::*;

    fn pair() -> (OwnedFd, OwnedFd) {
        let (ours, theirs) = rustix::net::socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )
        .unwrap();
        (ours, theirs)
    }

    fn send(socket: &OwnedFd, message: &[u8]) {
        rustix::net::send(socket, message, SendFlags::NOSIGNAL).unwrap();
    }

    #[test]
    fn a_message_sent_before_the_mark_is_told_from_the_end_as_well() {
        let (ours, theirs) = pair();
        send(&theirs, b"");
        drop(theirs);
        mark_messages(ours.as_fd()).unwrap();
        let mut into = b"what was there before".to_vec();
        assert_eq!(receive(ours.as_fd(), &mut into, 16).unwrap(), Some(0));
        assert_eq!(into, b"");
        assert_eq!(receive(ours.as_fd(), &mut into, 16).unwrap(), None);
    }

    #[test]
    fn a_message_that_is_too_long_tells_its_length_and_leaves_no_rest() {
        let (ours, theirs) = pair();
        mark_messages(ours.as_fd()).unwrap();
        send(&theirs, &[7; 1000]);
        send(&theirs, b"next");
        let mut into = Vec::new();
        assert_eq!(receive(ours.as_fd(), &mut into, 999).unwrap(), Some(1000));
        assert_eq!(into, b"");
        assert_eq!(receive(ours.as_fd(), &mut into, 4).unwrap(), Some(4));
        assert_eq!(into, b"next");
        assert_eq!(
            receive(ours.as_fd(), &mut into, 4).unwrap_err().kind(),
            io::ErrorKind::WouldBlock
        );
    }
}
