//! The guest program's view: streams and listeners.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::protocol::{Readable, Writable};
use super::{Shared, Stack};
use crate::embedded_guest::Error;
use crate::vsock::header::ShutdownFlags;

/// A connected vsock stream in the guest. Clones share the connection; the last one's drop is close().
#[derive(Clone, Debug)]
pub struct GuestStream {
    socket: Arc<Socket>,
}

#[derive(Debug)]
struct Socket {
    shared: Arc<Shared>,
    id: usize,
    /// Signalled at every change of the connection.
    changed: Arc<Condvar>,
    timeouts: Mutex<Timeouts>,
}

#[derive(Clone, Copy, Default, Debug)]
struct Timeouts {
    read: Option<Duration>,
    write: Option<Duration>,
}

impl GuestStream {
    pub(super) fn connect(shared: Arc<Shared>, cid: u64, port: u32) -> io::Result<GuestStream> {
        let deadline = Instant::now() + shared.options.connect_timeout;
        let mut stack = shared.lock();
        let id = stack.protocol.connect(cid, port)?;
        stack.flush_replies();
        let changed = stack.protocol.changed(id);
        loop {
            match stack.protocol.connected(id) {
                Some(Ok(())) => break,
                Some(Err(error)) => {
                    stack.protocol.close(Instant::now(), id);
                    return Err(error);
                }
                None => {}
            }
            let (guard, timed_out) = sleep(&changed, stack, Some(deadline));
            stack = guard;
            if timed_out && stack.protocol.connected(id).is_none() {
                stack.protocol.give_up(id);
                return Err(io::ErrorKind::TimedOut.into());
            }
        }
        drop(stack);
        Ok(GuestStream::new(shared, id, changed))
    }

    fn new(shared: Arc<Shared>, id: usize, changed: Arc<Condvar>) -> GuestStream {
        GuestStream {
            socket: Arc::new(Socket {
                shared,
                id,
                changed,
                timeouts: Mutex::default(),
            }),
        }
    }

    /// Another handle of the same connection.
    pub fn try_clone(&self) -> io::Result<GuestStream> {
        Ok(self.clone())
    }

    /// Shuts down receiving, sending or both.
    pub fn shutdown(&self, how: Shutdown) -> io::Result<()> {
        let flags = match how {
            Shutdown::Read => ShutdownFlags::RCV,
            Shutdown::Write => ShutdownFlags::SEND,
            Shutdown::Both => ShutdownFlags::BOTH,
        };
        let mut stack = self.socket.shared.lock();
        stack.protocol.shutdown(self.socket.id, flags);
        stack.flush_replies();
        Ok(())
    }

    /// Resets the connection: RST at once.
    pub fn abort(&self) {
        let mut stack = self.socket.shared.lock();
        stack.protocol.abort(self.socket.id);
        stack.flush_replies();
    }

    /// How long a read may wait; then it fails with `WouldBlock`. `None`: for ever.
    pub fn set_read_timeout(&self, timeout: Option<Duration>) {
        self.timeouts().read = timeout;
    }

    /// How long a write may wait; then it fails with `WouldBlock`. `None`: for ever.
    pub fn set_write_timeout(&self, timeout: Option<Duration>) {
        self.timeouts().write = timeout;
    }

    /// The guest's port.
    pub fn local_port(&self) -> u32 {
        self.socket
            .shared
            .lock()
            .protocol
            .tuple(self.socket.id)
            .local_port
            .0
    }

    /// The other end: CID and port.
    pub fn peer_address(&self) -> (u64, u32) {
        let tuple = self.socket.shared.lock().protocol.tuple(self.socket.id);
        (tuple.peer_cid.0, tuple.peer_port.0)
    }

    /// Whether the connection ended by an RST (or with the session) rather than by SHUTDOWN. Reads do not tell: like
    /// Linux they answer the end of the stream for both.
    pub fn was_reset(&self) -> bool {
        self.socket.shared.lock().protocol.was_reset(self.socket.id)
    }

    fn timeouts(&self) -> MutexGuard<'_, Timeouts> {
        self.socket
            .timeouts
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl Read for &GuestStream {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let socket = &*self.socket;
        let deadline = self.timeouts().read.map(|t| Instant::now() + t);
        let mut stack = socket.shared.lock();
        let mut expired = false;
        loop {
            match stack.protocol.read(socket.id, into) {
                Readable::Bytes(len) => {
                    stack.flush_replies();
                    return Ok(len);
                }
                Readable::Eof => return Ok(0),
                Readable::Nothing if expired => return Err(io::ErrorKind::WouldBlock.into()),
                Readable::Nothing => {}
            }
            (stack, expired) = sleep(&socket.changed, stack, deadline);
        }
    }
}

impl Write for &GuestStream {
    /// Sends what credit and ring allow, at least one byte; waits when that is nothing.
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        if from.is_empty() {
            return Ok(0);
        }
        let socket = &*self.socket;
        let options = &socket.shared.options;
        let deadline = self.timeouts().write.map(|t| Instant::now() + t);
        let mut stack = socket.shared.lock();
        let mut sent = 0;
        let mut expired = false;
        loop {
            let room = match stack.protocol.writable(socket.id) {
                Writable::Broken if sent > 0 => break,
                Writable::Broken => return Err(io::ErrorKind::BrokenPipe.into()),
                Writable::Room(room) => room,
                Writable::Nothing => 0,
            };
            let len = room.min(options.max_packet as usize).min(from.len() - sent);
            if len > 0 && stack.has_tx_room() {
                let header = stack.protocol.data(socket.id, len);
                match stack
                    .driver
                    .queue_packet(&header, &from[sent..sent + len], &options.shape)
                {
                    Ok(_) => {
                        sent += len;
                        continue;
                    }
                    Err(Error::RingFull) => stack.protocol.unsend_data(socket.id, len),
                    Err(error) => return Err(error.into()),
                }
            }
            if sent > 0 {
                break;
            }
            let waits_for = if len == 0 {
                &socket.changed
            } else {
                &socket.shared.tx_room
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

impl Drop for Socket {
    fn drop(&mut self) {
        let mut stack = self.shared.lock();
        stack.protocol.close(Instant::now(), self.id);
        stack.flush_replies();
        drop(stack);
        // The thread must learn of the new deadline.
        self.shared.wake.signal();
    }
}

/// A listening vsock socket in the guest.
#[derive(Debug)]
pub struct GuestListener {
    shared: Arc<Shared>,
    port: u32,
    changed: Arc<Condvar>,
}

impl GuestListener {
    pub(super) fn listen(shared: Arc<Shared>, port: u32, backlog: usize) -> io::Result<GuestListener> {
        let changed = Arc::new(Condvar::new());
        shared.lock().protocol.listen(port, backlog, changed.clone())?;
        Ok(GuestListener {
            shared,
            port,
            changed,
        })
    }

    /// Waits for the next connection; fails when the guest reboots or its VMM goes away.
    pub fn accept(&self) -> io::Result<GuestStream> {
        self.accept_until(None)
    }

    /// Waits for the next connection; fails with `WouldBlock` after `timeout`.
    pub fn accept_timeout(&self, timeout: Duration) -> io::Result<GuestStream> {
        self.accept_until(Some(Instant::now() + timeout))
    }

    fn accept_until(&self, deadline: Option<Instant>) -> io::Result<GuestStream> {
        let mut stack = self.shared.lock();
        let mut expired = false;
        loop {
            if let Some(id) = stack.protocol.accept(self.port, &self.changed)? {
                let changed = stack.protocol.changed(id);
                drop(stack);
                return Ok(GuestStream::new(self.shared.clone(), id, changed));
            }
            if expired {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            (stack, expired) = sleep(&self.changed, stack, deadline);
        }
    }
}

impl Drop for GuestListener {
    fn drop(&mut self) {
        let mut stack = self.shared.lock();
        stack.protocol.close_listener(self.port, &self.changed);
        stack.flush_replies();
    }
}

/// Sleeps on a condition variable; answers whether the deadline passed.
fn sleep<'a>(
    condition: &Condvar,
    stack: MutexGuard<'a, Stack>,
    deadline: Option<Instant>,
) -> (MutexGuard<'a, Stack>, bool) {
    match deadline {
        None => (
            condition.wait(stack).unwrap_or_else(PoisonError::into_inner),
            false,
        ),
        Some(deadline) => {
            let left = deadline.saturating_duration_since(Instant::now());
            let (stack, _) = condition
                .wait_timeout(stack, left)
                .unwrap_or_else(PoisonError::into_inner);
            (stack, Instant::now() >= deadline)
        }
    }
}
