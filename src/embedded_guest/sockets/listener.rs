//! Listening sockets.

use std::io;
use std::marker::PhantomData;
use std::sync::{Arc, Condvar};
use std::time::{Duration, Instant};

use super::Shared;
use super::socket::{Accepted, GuestSocket, sleep};
use super::stream::GuestStream;

/// A listening vsock socket in the guest. Connections of the other socket type are reset.
#[derive(Debug)]
pub struct GuestListener<S = GuestStream> {
    shared: Arc<Shared>,
    port: u32,
    changed: Arc<Condvar>,
    accepts: PhantomData<fn() -> S>,
}

impl<S: Accepted> GuestListener<S> {
    pub(super) fn listen(shared: Arc<Shared>, port: u32, backlog: usize) -> io::Result<GuestListener<S>> {
        let changed = Arc::new(Condvar::new());
        shared
            .lock()
            .protocol
            .listen(port, S::SOCKET_TYPE, backlog, changed.clone())?;
        Ok(GuestListener {
            shared,
            port,
            changed,
            accepts: PhantomData,
        })
    }

    /// Waits for the next connection; fails when the guest reboots or its VMM goes away.
    pub fn accept(&self) -> io::Result<S> {
        self.accept_until(None)
    }

    /// Waits for the next connection; fails with `WouldBlock` after `timeout`.
    pub fn accept_timeout(&self, timeout: Duration) -> io::Result<S> {
        self.accept_until(Some(Instant::now() + timeout))
    }

    fn accept_until(&self, deadline: Option<Instant>) -> io::Result<S> {
        let mut stack = self.shared.lock();
        let mut expired = false;
        loop {
            if let Some(id) = stack.protocol.accept(self.port, &self.changed)? {
                let changed = stack.protocol.changed(id);
                drop(stack);
                let socket = GuestSocket::new(self.shared.clone(), id, changed);
                return Ok(S::around(socket));
            }
            if expired {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            (stack, expired) = sleep(&self.changed, stack, deadline);
        }
    }
}

impl<S> Drop for GuestListener<S> {
    fn drop(&mut self) {
        let mut stack = self.shared.lock();
        stack.protocol.close_listener(self.port, &self.changed);
        stack.flush_replies();
    }
}
