//! What connected sockets of both types have in common.

use std::io;
use std::net::Shutdown;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::{Shared, Stack};
use crate::vsock::header::{ShutdownFlags, SocketType};

/// A connected vsock socket in the guest, of either type. Clones share the connection; the last one's drop is close().
#[derive(Clone, Debug)]
pub struct GuestSocket {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
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

/// What a [`GuestListener`](super::GuestListener) accepts: sockets of one type.
pub trait Accepted {
    /// The type.
    const SOCKET_TYPE: SocketType;

    /// The socket around what all types have in common, which is of this type.
    fn around(socket: GuestSocket) -> Self;
}

impl GuestSocket {
    /// connect(): waits for the answer.
    pub(super) fn connect(
        shared: Arc<Shared>,
        cid: u64,
        port: u32,
        socket_type: SocketType,
    ) -> io::Result<GuestSocket> {
        let deadline = Instant::now() + shared.options.connect_timeout;
        let mut stack = shared.lock();
        let id = stack.protocol.connect(cid, port, socket_type)?;
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
        Ok(GuestSocket::new(shared, id, changed))
    }

    pub(super) fn new(shared: Arc<Shared>, id: usize, changed: Arc<Condvar>) -> GuestSocket {
        GuestSocket {
            inner: Arc::new(Inner {
                shared,
                id,
                changed,
                timeouts: Mutex::default(),
            }),
        }
    }

    /// Shuts down receiving, sending or both.
    pub fn shutdown(&self, how: Shutdown) -> io::Result<()> {
        let flags = match how {
            Shutdown::Read => ShutdownFlags::RCV,
            Shutdown::Write => ShutdownFlags::SEND,
            Shutdown::Both => ShutdownFlags::BOTH,
        };
        let mut stack = self.lock();
        stack.protocol.shutdown(self.id(), flags);
        stack.flush_replies();
        Ok(())
    }

    /// Resets the connection: RST at once.
    pub fn abort(&self) {
        let mut stack = self.lock();
        stack.protocol.abort(self.id());
        stack.flush_replies();
    }

    /// How long a read or receive may wait; then it fails with `WouldBlock`. `None`: for ever.
    pub fn set_read_timeout(&self, timeout: Option<Duration>) {
        self.timeouts().read = timeout;
    }

    /// How long a write or send may wait; then it fails with `WouldBlock`. `None`: for ever.
    pub fn set_write_timeout(&self, timeout: Option<Duration>) {
        self.timeouts().write = timeout;
    }

    /// The guest's port.
    pub fn local_port(&self) -> u32 {
        self.lock().protocol.tuple(self.id()).local_port.0
    }

    /// The other end: CID and port.
    pub fn peer_address(&self) -> (u64, u32) {
        let tuple = self.lock().protocol.tuple(self.id());
        (tuple.peer_cid.0, tuple.peer_port.0)
    }

    /// Whether the connection ended by an RST (or with the session) rather than by SHUTDOWN. Reads do not tell: like
    /// Linux they answer the end of the stream for both.
    pub fn was_reset(&self) -> bool {
        self.lock().protocol.was_reset(self.id())
    }

    pub(super) fn id(&self) -> usize {
        self.inner.id
    }

    pub(super) fn shared(&self) -> &Shared {
        &self.inner.shared
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Stack> {
        self.inner.shared.lock()
    }

    /// Signalled at every change of the connection.
    pub(super) fn changed(&self) -> &Condvar {
        &self.inner.changed
    }

    /// When a read that begins now has waited long enough.
    pub(super) fn read_deadline(&self) -> Option<Instant> {
        self.timeouts().read.map(|t| Instant::now() + t)
    }

    /// When a write that begins now has waited long enough.
    pub(super) fn write_deadline(&self) -> Option<Instant> {
        self.timeouts().write.map(|t| Instant::now() + t)
    }

    fn timeouts(&self) -> MutexGuard<'_, Timeouts> {
        self.inner.timeouts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        let mut stack = self.shared.lock();
        stack.protocol.close(Instant::now(), self.id);
        stack.flush_replies();
        drop(stack);
        // The thread must learn of the new deadline.
        self.shared.wake.signal();
    }
}

/// Sleeps on a condition variable; answers whether the deadline passed.
pub(super) fn sleep<'a>(
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
