//! One system call for many slices of guest memory: socket -> guest and guest -> socket without a copy of
//! ours.
//!
//! Both ends of a connection are sockets, so these are `recvmsg` and `sendmsg` rather than `readv` and
//! `writev`, which buys two flags: MSG_NOSIGNAL, so that a peer that has closed is EPIPE and never SIGPIPE,
//! whatever the process that embeds this library has decided about signals; and MSG_DONTWAIT, so that a
//! socket which somebody forgot to make non-blocking delays nobody. A descriptor that is no socket is
//! ENOTSOCK.
//!
//! What `readv` wrote is marked dirty by the caller, who knows whose memory it was (`guest::rx`), not here.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use super::iovec::IoVecs;

/// What one [`readv`] took from a socket.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Received {
    /// Bytes; 0 is the end of the stream.
    pub bytes: usize,
    /// There may be more although there was room: a unix socket's recvmsg() ends behind bytes that descriptors came
    /// with (`unix_stream_read_generic` in net/unix/af_unix.c). The descriptors are closed.
    pub cut_short: bool,
}

/// Reads once from socket `fd` into the slices of `into`, in order. EAGAIN comes as
/// [`io::ErrorKind::WouldBlock`]. An empty list is refused, since its 0 would look like the end.
pub fn readv(fd: BorrowedFd<'_>, into: &IoVecs<'_>) -> io::Result<Received> {
    let mut message = header(into)?;
    let bytes = super::retry_interrupted(|| {
        // SAFETY: `fd` is open, as it is borrowed. `message` is a valid msghdr: no name and no control
        // buffer, and an array of `msg_iovlen` iovecs that `into` owns. Each iovec names memory that is
        // mapped and writable for the life of `into` (built from VolatileSlice only), and no Rust reference
        // to it exists that this write could contradict.
        unsafe { libc::recvmsg(fd.as_raw_fd(), &mut message, libc::MSG_DONTWAIT) }
    })?;
    Ok(Received {
        bytes,
        // There is no room for control messages, so that any that came was cut.
        cut_short: message.msg_flags & libc::MSG_CTRUNC != 0,
    })
}

/// Writes once to socket `fd` from the slices of `from`, in order; may take fewer bytes than there are.
/// EAGAIN comes as [`io::ErrorKind::WouldBlock`].
pub fn writev(fd: BorrowedFd<'_>, from: &IoVecs<'_>) -> io::Result<usize> {
    let message = header(from)?;
    super::retry_interrupted(|| {
        // SAFETY: as in `readv`; the kernel only reads the memory.
        unsafe { libc::sendmsg(fd.as_raw_fd(), &message, libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT) }
    })
}

/// Whether [`readv`] or [`writev`] failed because a page of the memory could not be had: shared memory that its owner has
/// shortened, or that nothing backs. (Where part of it could be had, less than asked for was moved instead.)
pub fn is_memory_fault(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EFAULT)
}

fn header(slices: &IoVecs<'_>) -> io::Result<libc::msghdr> {
    let iovecs = slices.as_slice();
    if iovecs.is_empty() {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "no memory to read into or write from",
        ));
    }
    // SAFETY: msghdr is a C structure of integers and pointers, for which all zeros is a value (the empty
    // message). Some libcs have private padding in it, so that it cannot be written as a literal.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    // Neither call writes to the iovec array; its type is not const because recvmsg writes to what it names.
    message.msg_iov = iovecs.as_ptr().cast_mut();
    message.msg_iovlen = iovecs.len() as _;
    Ok(message)
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use vm_memory::VolatileSlice;

    use super::*;

    #[test]
    fn gathers_and_scatters_in_order() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut memory = *b"worldhello........";
        let all = VolatileSlice::from(&mut memory[..]);
        let mut out = IoVecs::new();
        assert!(out.push(&all.subslice(5, 5).unwrap()));
        assert!(out.push(&all.subslice(0, 5).unwrap()));
        assert_eq!(writev(ours.as_fd(), &out).unwrap(), 10);
        let mut got = [0; 10];
        theirs.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"helloworld");

        theirs.write_all(b"12345").unwrap();
        let mut into = IoVecs::new();
        assert!(into.push(&all.subslice(16, 2).unwrap()));
        assert!(into.push(&all.subslice(10, 6).unwrap()));
        assert_eq!(readv(ours.as_fd(), &into).unwrap().bytes, 5);
        assert_eq!(&memory[10..], b"345...12");
    }

    #[test]
    fn never_waits_and_never_signals() {
        let (ours, theirs) = UnixStream::pair().unwrap(); // blocking sockets
        let mut memory = vec![0u8; 1 << 20];
        let all = VolatileSlice::from(&mut memory[..]);
        let mut list = IoVecs::new();
        assert!(list.push(&all));
        assert_eq!(
            readv(ours.as_fd(), &list).unwrap_err().kind(),
            io::ErrorKind::WouldBlock
        );
        let written = writev(ours.as_fd(), &list).unwrap();
        assert!(
            written > 0 && written < 1 << 20,
            "{written} of 1 MiB went into a socket that nobody reads"
        );
        assert_eq!(
            writev(ours.as_fd(), &list).unwrap_err().kind(),
            io::ErrorKind::WouldBlock
        );
        drop(theirs);
        // With SIGPIPE at its default action this would end the process; see the module's text.
        assert_eq!(
            writev(ours.as_fd(), &list).unwrap_err().kind(),
            io::ErrorKind::BrokenPipe
        );
    }

    #[test]
    fn an_empty_list_is_not_the_end_of_the_stream() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        assert_eq!(
            readv(ours.as_fd(), &IoVecs::new()).unwrap_err().kind(),
            io::ErrorKind::InvalidInput
        );
    }
}
