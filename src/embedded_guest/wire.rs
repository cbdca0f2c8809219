//! Bytes and descriptors over a unix socket, message by message.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};

use super::error::{Error, Result};
use super::fd::wait_readable;
use super::message::{self, Message};

/// More than any reply of the specification; a longer one is not allocated for.
const MAX_PAYLOAD: usize = 64 * 1024;

/// Descriptors one message may carry (`VHOST_MEMORY_BASELINE_NREGIONS` is 8).
const MAX_FDS: usize = 32;

/// Sends bytes as they are, with descriptors.
pub(super) fn send_bytes(socket: &UnixStream, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(Error::TooLong {
            len: fds.len(),
            max: MAX_FDS,
        });
    }
    let mut sent = 0;
    while sent < bytes.len() {
        match sendmsg(
            socket,
            &[IoSlice::new(&bytes[sent..])],
            &mut control,
            SendFlags::NOSIGNAL,
        ) {
            Ok(n) => sent += n,
            Err(rustix::io::Errno::INTR) => continue,
            Err(rustix::io::Errno::PIPE | rustix::io::Errno::CONNRESET) => {
                return Err(Error::Closed { what: "sending" });
            }
            Err(errno) => return Err(Error::errno("send a vhost-user message")(errno)),
        }
        // The descriptors went with the first byte.
        control.clear();
    }
    Ok(())
}

/// Sends one message. The version bit is added to `flags`.
pub(super) fn send_message(
    socket: &UnixStream,
    number: u32,
    flags: u32,
    payload: &[u8],
    fds: &[BorrowedFd<'_>],
) -> Result<()> {
    let mut bytes = message::header(number, message::VERSION | flags, payload.len()).to_vec();
    bytes.extend_from_slice(payload);
    send_bytes(socket, &bytes, fds)
}

/// Receives one message with its descriptors from a vhost-user channel.
pub fn recv_message(socket: &UnixStream, timeout: Duration) -> Result<Message> {
    let deadline = Instant::now() + timeout;
    let mut fds = Vec::new();
    let mut header = [0; message::HEADER_LEN];
    read_exact(socket, &mut header, &mut fds, deadline)?;
    let word = |at: usize| u32::from_ne_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
    let size = word(8) as usize;
    if size > MAX_PAYLOAD {
        return Err(Error::Protocol {
            what: format!("a payload of {size} bytes"),
        });
    }
    let mut payload = vec![0; size];
    read_exact(socket, &mut payload, &mut fds, deadline)?;
    Ok(Message {
        request: word(0),
        flags: word(4),
        payload,
        fds,
    })
}

fn read_exact(
    socket: &UnixStream,
    bytes: &mut [u8],
    fds: &mut Vec<OwnedFd>,
    deadline: Instant,
) -> Result<()> {
    let mut filled = 0;
    while filled < bytes.len() {
        if !wait_readable(&[socket.as_fd()], Some(deadline))? {
            return Err(Error::Timeout {
                what: "waiting for a vhost-user message",
            });
        }
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received = recvmsg(
            socket,
            &mut [IoSliceMut::new(&mut bytes[filled..])],
            &mut control,
            RecvFlags::CMSG_CLOEXEC,
        );
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(received) = message {
                fds.extend(received);
            }
        }
        match received {
            Ok(message) if message.bytes == 0 => {
                return Err(Error::Closed {
                    what: "waiting for a message",
                });
            }
            Ok(message) => filled += message.bytes,
            Err(rustix::io::Errno::INTR) => {}
            Err(rustix::io::Errno::CONNRESET) => {
                return Err(Error::Closed {
                    what: "waiting for a message",
                });
            }
            Err(errno) => return Err(Error::errno("receive a vhost-user message")(errno)),
        }
    }
    Ok(())
}
