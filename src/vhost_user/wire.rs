//! Messages over a unix stream socket, with their file descriptors, without ever blocking.
//!
//! Descriptors arrive with bytes, not with messages: the kernel hands them out with the first byte of the write they
//! came with. So a [`FrameReader`] never asks for more than the rest of the message it is reading, and whatever
//! descriptors arrive meanwhile belong to that message. A [`FrameWriter`] sends a message and its descriptors in one
//! write, as the crate behind the gate insists: it reads a body with a single `recvmsg` (`Endpoint::recv_data`).

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

use super::message::{HEADER_LEN, MAX_BODY, MAX_FDS, Message, display_name};

/// A message and the descriptors that came with it.
#[derive(Debug)]
pub struct Frame {
    /// The message.
    pub message: Message,
    /// Its descriptors, at most [`MAX_FDS`].
    pub fds: Vec<OwnedFd>,
}

impl Frame {
    /// A message without descriptors.
    pub fn bare(message: Message) -> Frame {
        Frame {
            message,
            fds: Vec::new(),
        }
    }
}

/// What an attempt to receive brought.
#[derive(Debug)]
pub enum Received {
    /// A whole message.
    Frame(Frame),
    /// Nothing more for now.
    Blocked,
    /// The peer closed the connection between two messages.
    Closed,
}

/// Why a byte stream is no stream of messages.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// The peer closed the connection inside a message.
    #[error("the connection ended inside a message: {got} of {expected} bytes")]
    Truncated {
        /// Bytes that came.
        got: usize,
        /// Bytes that were due, as far as known.
        expected: usize,
    },
    /// A header announces more than a message may have.
    #[error("{} announces a body of {len} bytes, the limit is {MAX_BODY}", display_name(*request))]
    Oversize {
        /// The request number.
        request: u32,
        /// Bytes announced.
        len: u32,
    },
    /// The kernel could not hand us all descriptors, most likely because the process has too many open.
    #[error("file descriptors of a message were lost: the process has reached its limit of open files")]
    DescriptorsLost,
    /// Another error of the socket.
    #[error("{0}")]
    Io(#[from] io::Error),
}

/// Collects one message at a time. Bounded: one message of at most [`MAX_BODY`] bytes and [`MAX_FDS`] descriptors.
#[derive(Default)]
pub struct FrameReader {
    /// What there is of the current message.
    bytes: Vec<u8>,
    /// Descriptors of the current message.
    fds: Vec<OwnedFd>,
}

impl FrameReader {
    /// Whether a message has begun and is not yet whole.
    pub fn is_inside_message(&self) -> bool {
        !self.bytes.is_empty()
    }

    /// Receives as much of the current message as there is, without blocking.
    pub fn receive(&mut self, socket: &UnixStream) -> Result<Received, WireError> {
        loop {
            let missing = self.missing()?;
            if missing == 0 {
                let message = Message::from_bytes(std::mem::take(&mut self.bytes));
                return Ok(Received::Frame(Frame {
                    message,
                    fds: std::mem::take(&mut self.fds),
                }));
            }
            let have = self.bytes.len();
            self.bytes.resize(have + missing, 0);
            let result = self.receive_into_tail(socket, have);
            self.bytes.truncate(have + result.as_ref().copied().unwrap_or(0));
            match result {
                Ok(0) if have == 0 => return Ok(Received::Closed),
                Ok(0) => {
                    return Err(WireError::Truncated {
                        got: have,
                        expected: have + missing,
                    });
                }
                Ok(_) => {}
                Err(WireError::Io(error)) => match error.kind() {
                    io::ErrorKind::WouldBlock => return Ok(Received::Blocked),
                    io::ErrorKind::Interrupted => {}
                    // A peer that closes with our bytes unread resets the connection: it is gone all the same.
                    io::ErrorKind::ConnectionReset if have == 0 => return Ok(Received::Closed),
                    io::ErrorKind::ConnectionReset => {
                        return Err(WireError::Truncated {
                            got: have,
                            expected: have + missing,
                        });
                    }
                    _ => return Err(WireError::Io(error)),
                },
                Err(error) => return Err(error),
            }
        }
    }

    /// Bytes to ask for: never beyond the end of the header, then never beyond the end of the message.
    fn missing(&self) -> Result<usize, WireError> {
        if self.bytes.len() < HEADER_LEN {
            return Ok(HEADER_LEN - self.bytes.len());
        }
        let field = |at: usize| {
            let bytes = self
                .bytes
                .get(at..at + 4)
                .and_then(|b| b.try_into().ok())
                .unwrap_or([0; 4]);
            u32::from_ne_bytes(bytes)
        };
        let len = field(8);
        if len as usize > MAX_BODY {
            return Err(WireError::Oversize {
                request: field(0),
                len,
            });
        }
        Ok((HEADER_LEN + len as usize).saturating_sub(self.bytes.len()))
    }

    fn receive_into_tail(&mut self, socket: &UnixStream, have: usize) -> Result<usize, WireError> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let tail = self.bytes.get_mut(have..).unwrap_or_default();
        let received = recvmsg(
            socket,
            &mut [IoSliceMut::new(tail)],
            &mut control,
            RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC,
        )
        .map_err(io::Error::from)?;
        let mut arrived = 0;
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                for fd in fds {
                    arrived += 1;
                    // More than a message may have are closed at once.
                    if self.fds.len() < MAX_FDS {
                        self.fds.push(fd);
                    }
                }
            }
        }
        if received.flags.contains(ReturnFlags::CTRUNC) && arrived < MAX_FDS {
            // The buffer had room: it was the table of open files that had none (scm_detach_fds in net/core/scm.c).
            return Err(WireError::DescriptorsLost);
        }
        Ok(received.bytes)
    }
}

/// Sends messages one after the other.
#[derive(Default)]
pub struct FrameWriter {
    queue: std::collections::VecDeque<Frame>,
    /// Bytes of the first message in the queue that have been sent; its descriptors went with the first of them.
    sent: usize,
}

impl FrameWriter {
    /// Adds a message. Who adds does so only to an empty queue, which bounds it: the relay one message, or the few of a prelude, the
    /// back-end's channel those that wait.
    pub fn push(&mut self, frame: Frame) {
        self.queue.push_back(frame);
    }

    /// Whether everything has been sent.
    pub fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// Sends what the socket takes, without blocking. True when nothing is left.
    pub fn flush(&mut self, socket: &UnixStream) -> io::Result<bool> {
        while let Some(frame) = self.queue.front() {
            let rest = frame.message.bytes().get(self.sent..).unwrap_or_default();
            let fds: Vec<BorrowedFd<'_>> = if self.sent == 0 {
                frame.fds.iter().map(AsFd::as_fd).collect()
            } else {
                Vec::new()
            };
            match send(socket, rest, &fds) {
                Ok(sent) if sent == rest.len() => {
                    self.queue.pop_front();
                    self.sent = 0;
                }
                Ok(sent) => self.sent += sent,
                Err(Errno::AGAIN) => return Ok(false),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(true)
    }
}

fn send(socket: &UnixStream, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> rustix::io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(Errno::TOOMANYREFS);
    }
    sendmsg(
        socket,
        &[IoSlice::new(bytes)],
        &mut control,
        SendFlags::DONTWAIT | SendFlags::NOSIGNAL,
    )
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::vhost_user::message::{VERSION, request};

    fn frame(received: Received) -> Frame {
        match received {
            Received::Frame(frame) => frame,
            other => panic!("no message: {other:?}"),
        }
    }

    #[test]
    fn several_messages_in_one_write_come_out_one_by_one() {
        let (mut vmm, us) = UnixStream::pair().unwrap();
        let first = Message::new(request::GET_FEATURES, VERSION, &[]);
        let second = Message::new(request::SET_FEATURES, VERSION, &[7; 8]);
        vmm.write_all(&[first.bytes(), second.bytes()].concat()).unwrap();
        let mut reader = FrameReader::default();
        assert_eq!(frame(reader.receive(&us).unwrap()).message, first);
        assert_eq!(frame(reader.receive(&us).unwrap()).message, second);
        assert!(matches!(reader.receive(&us).unwrap(), Received::Blocked));
    }

    #[test]
    fn descriptors_belong_to_the_message_whose_bytes_they_came_with_even_in_pieces() {
        let (vmm, us) = UnixStream::pair().unwrap();
        let plain = Message::new(request::GET_FEATURES, VERSION, &[]);
        let table = Message::new(request::SET_MEM_TABLE, VERSION, &[1; 40]);
        let mut reader = FrameReader::default();
        // The first descriptor comes with the middle of the header, the second with the end of the body.
        send(&vmm, &[plain.bytes(), &table.bytes()[..5]].concat(), &[]).unwrap();
        send(&vmm, &table.bytes()[5..20], &[vmm.as_fd()]).unwrap();
        let got = frame(reader.receive(&us).unwrap());
        assert_eq!((got.message, got.fds.len()), (plain, 0));
        assert!(matches!(reader.receive(&us).unwrap(), Received::Blocked));
        assert!(reader.is_inside_message());
        send(&vmm, &table.bytes()[20..], &[vmm.as_fd()]).unwrap();
        let got = frame(reader.receive(&us).unwrap());
        assert_eq!((got.message, got.fds.len()), (table, 2));
    }

    #[test]
    fn more_descriptors_than_a_message_may_have_are_closed() {
        let (vmm, us) = UnixStream::pair().unwrap();
        let message = Message::new(request::SET_MEM_TABLE, VERSION, &[1; 40]);
        // Each descriptor is one end of a pair, so the other end tells whether it is open somewhere.
        let (probe, passed) = UnixStream::pair().unwrap();
        send(&vmm, &message.bytes()[..6], &[vmm.as_fd(); MAX_FDS]).unwrap();
        send(&vmm, &message.bytes()[6..], &[passed.as_fd()]).unwrap();
        drop(passed);
        let got = frame(FrameReader::default().receive(&us).unwrap());
        assert_eq!(got.fds.len(), MAX_FDS);
        assert_eq!(
            rustix::net::recv(&probe, &mut [0u8; 1][..], RecvFlags::DONTWAIT)
                .unwrap()
                .0,
            0,
            "still open"
        );
    }

    #[test]
    fn an_announced_body_beyond_the_limit_is_refused_before_it_is_read() {
        let (mut vmm, us) = UnixStream::pair().unwrap();
        let mut header = Message::new(request::SET_CONFIG, VERSION, &[]).bytes().to_vec();
        header[8..].copy_from_slice(&u32::MAX.to_ne_bytes());
        vmm.write_all(&header).unwrap();
        let error = FrameReader::default().receive(&us).unwrap_err();
        assert_eq!(
            error.to_string(),
            "SET_CONFIG announces a body of 4294967295 bytes, the limit is 4096"
        );
    }

    #[test]
    fn an_end_inside_a_message_is_told_from_an_end_between_messages() {
        let (mut vmm, us) = UnixStream::pair().unwrap();
        vmm.write_all(&[1, 0, 0]).unwrap();
        drop(vmm);
        let error = FrameReader::default().receive(&us).unwrap_err();
        assert!(
            matches!(error, WireError::Truncated { got: 3, expected: 12 }),
            "{error}"
        );

        let (vmm, us) = UnixStream::pair().unwrap();
        drop(vmm);
        assert!(matches!(
            FrameReader::default().receive(&us).unwrap(),
            Received::Closed
        ));
    }

    #[test]
    fn a_peer_that_does_not_read_blocks_nobody() {
        let (us, _vmm) = UnixStream::pair().unwrap();
        let mut writer = FrameWriter::default();
        for _ in 0..10_000 {
            writer.push(Frame::bare(Message::new(
                request::GET_CONFIG,
                VERSION,
                &[0; MAX_BODY],
            )));
            if !writer.flush(&us).unwrap() {
                return;
            }
        }
        panic!("the socket took everything");
    }
}
