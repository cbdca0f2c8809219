//! Streams: SOCK_STREAM.

use std::io::{self, Read, Write};
use std::ops::Deref;

use super::protocol::{Readable, Writable};
use super::socket::{Accepted, GuestSocket, sleep};
use crate::embedded_guest::Error;
use crate::vsock::header::SocketType;

/// A connected vsock stream in the guest. Clones share the connection; the last one's drop is close().
#[derive(Clone, Debug)]
pub struct GuestStream {
    socket: GuestSocket,
}

impl GuestStream {
    /// Another handle of the same connection.
    pub fn try_clone(&self) -> io::Result<GuestStream> {
        Ok(self.clone())
    }
}

impl Accepted for GuestStream {
    const SOCKET_TYPE: SocketType = SocketType::Stream;

    fn around(socket: GuestSocket) -> GuestStream {
        GuestStream { socket }
    }
}

impl Deref for GuestStream {
    type Target = GuestSocket;

    fn deref(&self) -> &GuestSocket {
        &self.socket
    }
}

impl Read for &GuestStream {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let deadline = self.read_deadline();
        let mut stack = self.lock();
        let mut expired = false;
        loop {
            match stack.protocol.read(self.id(), into) {
                Readable::Bytes(len) => {
                    stack.flush_replies();
                    return Ok(len);
                }
                Readable::Eof => return Ok(0),
                Readable::Nothing if expired => return Err(io::ErrorKind::WouldBlock.into()),
                Readable::Nothing => {}
            }
            (stack, expired) = sleep(self.changed(), stack, deadline);
        }
    }
}

impl Write for &GuestStream {
    /// Sends what credit and ring allow, at least one byte; waits when that is nothing.
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        if from.is_empty() {
            return Ok(0);
        }
        let options = &self.shared().options;
        let deadline = self.write_deadline();
        let mut stack = self.lock();
        let mut sent = 0;
        let mut expired = false;
        loop {
            let room = match stack.protocol.writable(self.id()) {
                Writable::Broken if sent > 0 => break,
                Writable::Broken => return Err(io::ErrorKind::BrokenPipe.into()),
                Writable::Room(room) => room,
                Writable::Nothing => 0,
            };
            let len = room.min(options.max_packet as usize).min(from.len() - sent);
            if len > 0 && stack.has_tx_room() {
                let payload = &from[sent..sent + len];
                match stack.send_data(self.id(), payload, 0, &options.shape) {
                    Ok(()) => {
                        sent += len;
                        continue;
                    }
                    Err(Error::RingFull) => {}
                    Err(error) => return Err(error.into()),
                }
            }
            if sent > 0 {
                break;
            }
            let waits_for = if len == 0 {
                self.changed()
            } else {
                &self.shared().tx_room
            };
            if expired {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            (stack, expired) = sleep(waits_for, stack, deadline);
        }
        stack.driver.notify_tx();
        Ok(sent)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Read for GuestStream {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        (&*self).read(into)
    }
}

impl Write for GuestStream {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        (&*self).write(from)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
