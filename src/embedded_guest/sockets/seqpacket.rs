//! Messages with boundaries: SOCK_SEQPACKET.

use std::io;
use std::ops::Deref;
use std::sync::MutexGuard;
use std::time::Instant;

use super::protocol::{GuestMessage, Received, SEQ_EOM, SEQ_EOR};
use super::socket::{Accepted, GuestSocket, sleep};
use super::{MessageCredit, Stack};
use crate::embedded_guest::Error;
use crate::vsock::header::SocketType;

/// A connected SEQPACKET socket in the guest. Clones share the connection; the last one's drop is close().
#[derive(Clone, Debug)]
pub struct GuestSeqpacket {
    socket: GuestSocket,
}

impl Accepted for GuestSeqpacket {
    const SOCKET_TYPE: SocketType = SocketType::Seqpacket;

    fn around(socket: GuestSocket) -> GuestSeqpacket {
        GuestSeqpacket { socket }
    }
}

impl Deref for GuestSeqpacket {
    type Target = GuestSocket;

    fn deref(&self) -> &GuestSocket {
        &self.socket
    }
}

impl GuestSeqpacket {
    /// Sends a message, whole: waits until all of it has left, in packets of at most
    /// [`SocketOptions::max_packet`](super::SocketOptions::max_packet) bytes. Fails with EMSGSIZE when it is longer than the
    /// receiver's buffer and with `BrokenPipe` when the connection no longer takes any.
    ///
    /// A message without bytes is one packet that says so; Linux does not send such ones (its send() answers 0 and
    /// does nothing), but takes them. When the timeout ends a send in the middle of a message, what has left has left,
    /// and the next message continues it, as in Linux.
    pub fn send(&self, message: &[u8]) -> io::Result<()> {
        self.transmit(message, SEQ_EOM)
    }

    /// The same with MSG_EOR: the message ends a record. In Linux also every write(2) does this.
    pub fn send_end_of_record(&self, message: &[u8]) -> io::Result<()> {
        self.transmit(message, SEQ_EOM | SEQ_EOR)
    }

    /// Receives the next message, whole; `None` at the end. `WouldBlock` after the timeout.
    pub fn recv(&self) -> io::Result<Option<GuestMessage>> {
        let deadline = self.read_deadline();
        let mut stack = self.lock();
        let mut expired = false;
        loop {
            match stack.protocol.recv(self.id()) {
                Received::Message(message) => {
                    stack.flush_replies();
                    return Ok(Some(message));
                }
                Received::Eof => return Ok(None),
                Received::Nothing if expired => return Err(io::ErrorKind::WouldBlock.into()),
                Received::Nothing => {}
            }
            (stack, expired) = sleep(self.changed(), stack, deadline);
        }
    }

    fn transmit(&self, message: &[u8], last_flags: u32) -> io::Result<()> {
        let deadline = self.write_deadline();
        let mut stack = self.lock();
        // One message at a time: threads that wait for credit in the middle of theirs let others in.
        let mut expired = false;
        while !stack.protocol.begin_message(self.id()) {
            if expired {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            (stack, expired) = sleep(self.changed(), stack, deadline);
        }
        let (mut stack, outcome) = self.transmit_begun(stack, message, last_flags, deadline);
        stack.protocol.end_message(self.id());
        stack.driver.notify_tx();
        outcome
    }

    fn transmit_begun<'a>(
        &'a self,
        mut stack: MutexGuard<'a, Stack>,
        message: &[u8],
        last_flags: u32,
        deadline: Option<Instant>,
    ) -> (MutexGuard<'a, Stack>, io::Result<()>) {
        let options = &self.shared().options;
        let mut left = message;
        let mut expired = false;
        loop {
            let room = match stack.protocol.message_room(self.id(), left.len()) {
                Ok(room) => room,
                Err(error) => return (stack, Err(error)),
            };
            let enough = match options.message_credit {
                MessageCredit::AsItComes => room > 0 || left.is_empty(),
                MessageCredit::Whole => room >= left.len(),
            };
            if enough && stack.has_tx_room() {
                let len = left.len().min(room).min(options.max_packet as usize);
                let (payload, later) = left.split_at(len);
                let flags = if later.is_empty() { last_flags } else { 0 };
                match stack.send_data(self.id(), payload, flags, &options.shape) {
                    Ok(()) if later.is_empty() => return (stack, Ok(())),
                    Ok(()) => {
                        left = later;
                        continue;
                    }
                    Err(Error::RingFull) => {}
                    Err(error) => return (stack, Err(error.into())),
                }
            }
            if expired {
                return (stack, Err(io::ErrorKind::WouldBlock.into()));
            }
            // The device can only give what it has been told of.
            stack.driver.notify_tx();
            let waits_for = if enough {
                &self.shared().tx_room
            } else {
                self.changed()
            };
            (stack, expired) = sleep(waits_for, stack, deadline);
        }
    }
}
