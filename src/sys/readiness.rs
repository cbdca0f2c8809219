//! Descriptors whose readiness a tokio task waits for.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::task::{Context, Poll, ready};

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// A non-blocking descriptor in the poller of a tokio runtime, edge-triggered, from its construction until it is
/// dropped or taken out.
///
/// For what tokio's own socket types do not offer: they put every socket that they accept into the poller at once.
#[derive(Debug)]
pub struct PolledFd(AsyncFd<OwnedFd>);

impl PolledFd {
    /// Registers a descriptor with the current runtime.
    ///
    /// # Errors
    /// Those of `epoll_ctl`: ENOMEM, ENOSPC (fs.epoll.max_user_watches), EPERM for a descriptor that cannot be polled.
    ///
    /// # Panics
    /// Outside a tokio runtime with its I/O driver enabled.
    pub fn new(fd: OwnedFd, interest: Interest) -> io::Result<PolledFd> {
        // SAFETY: `register_with_interest` asks that `as_raw_fd` gives one and the same open descriptor for as long as
        // the `AsyncFd` owns the object. An `OwnedFd` is open until it is dropped and always gives the same; that it is
        // neither replaced nor dropped before is ours to hold, and nothing here gives out `&mut OwnedFd`.
        let registered = unsafe { AsyncFd::register_with_interest(fd, interest) };
        Ok(PolledFd(registered?))
    }

    /// Calls `read` when the descriptor may be readable, until it says something else than
    /// [`io::ErrorKind::WouldBlock`]. Cancelling it loses nothing.
    pub async fn when_readable<T>(
        &self,
        mut read: impl FnMut(BorrowedFd<'_>) -> io::Result<T>,
    ) -> io::Result<T> {
        self.0.async_io(Interest::READABLE, |fd| read(fd.as_fd())).await
    }

    /// As [`PolledFd::when_readable`], for writing and to be polled by hand.
    pub fn poll_when_writable<T>(
        &self,
        cx: &mut Context<'_>,
        mut write: impl FnMut(BorrowedFd<'_>) -> io::Result<T>,
    ) -> Poll<io::Result<T>> {
        loop {
            let mut guard = ready!(self.0.poll_write_ready(cx))?;
            if let Ok(done) = guard.try_io(|fd| write(fd.as_fd())) {
                return Poll::Ready(done);
            }
        }
    }

    /// Takes the descriptor out of the poller.
    pub fn into_inner(self) -> OwnedFd {
        self.0.into_inner()
    }
}

impl AsFd for PolledFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.get_ref().as_fd()
    }
}
