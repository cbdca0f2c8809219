//! TCP sockets whose connection is over, waiting for the peer's end of file.
//!
//! A TCP socket that is closed while the peer still sends answers with a reset, and that reset can destroy what the
//! guest's last bytes and FIN were to bring to the peer. So the socket is shut down for writing, what still comes is
//! read and thrown away, and it is closed at the peer's end of file or after [`LINGER`].

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use mio::unix::SourceFd;
use mio::{Interest, Registry, Token};
use slab::Slab;

use crate::host::HostStream;

use super::token;

/// The longest a peer may take to end its side.
const LINGER: Duration = Duration::from_secs(5);

/// Bytes thrown away for one readiness; a peer that sends more is cut off.
const DISCARD: usize = 256 * 1024;

/// The sockets that linger.
pub(super) struct Lingering {
    streams: Slab<(HostStream, u64)>,
    /// Deadlines in the order of their arrival, which is the order of time. Stale entries are skipped; they stay for
    /// [`LINGER`] at most, so there are never more than connections ended in that time.
    deadlines: VecDeque<(Instant, usize, u64)>,
    next_serial: u64,
    most: usize,
}

impl Lingering {
    /// At most `most` sockets linger at once; further ones are closed at once.
    pub(super) fn new(most: usize) -> Lingering {
        Lingering {
            streams: Slab::new(),
            deadlines: VecDeque::new(),
            next_serial: 0,
            most,
        }
    }

    /// At most so many from now on; those that linger may.
    pub(super) fn set_most(&mut self, most: usize) {
        self.most = most;
    }

    /// Takes a socket that is registered under another token.
    pub(super) fn add(&mut self, now: Instant, stream: HostStream, registry: &Registry) {
        if stream.shutdown_write().is_err() || self.streams.len() >= self.most {
            return;
        }
        // The poll looks anew: what is there already, the end of file included, is told at once. It seldom is, as the peer has only
        // just been told of the end.
        let entry = self.streams.vacant_entry();
        let index = entry.key();
        let token = Token(token::lingering(index));
        if registry
            .reregister(&mut SourceFd(&stream.as_raw_fd()), token, Interest::READABLE)
            .is_ok()
        {
            let serial = self.next_serial;
            self.next_serial += 1;
            entry.insert((stream, serial));
            self.deadlines.push_back((now + LINGER, index, serial));
        }
    }

    pub(super) fn handle_ready(&mut self, index: usize) {
        if self.streams.get(index).is_some_and(|(stream, _)| at_end(stream)) {
            self.close(index);
        }
    }

    pub(super) fn handle_timeout(&mut self, now: Instant) {
        while let Some((at, index, serial)) = self.deadlines.front().copied() {
            let stale = self.streams.get(index).is_none_or(|(_, s)| *s != serial);
            if !stale && at > now {
                break;
            }
            self.deadlines.pop_front();
            if !stale {
                self.close(index);
            }
        }
    }

    pub(super) fn next_timeout(&self) -> Option<Instant> {
        self.deadlines.front().map(|(at, ..)| *at)
    }

    fn close(&mut self, index: usize) {
        // Its only descriptor: closing it takes it out of the poll.
        drop(self.streams.try_remove(index));
        if self.streams.is_empty() {
            self.deadlines.clear();
        }
    }
}

/// Throws away what is there; whether the end of file, an error or too much was found.
fn at_end(stream: &HostStream) -> bool {
    let mut bin = [0; 16 * 1024];
    let mut left = DISCARD;
    while left > 0 {
        match stream.read(&mut bin) {
            Ok(0) => return true,
            Ok(n) => left = left.saturating_sub(n),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return false,
            Err(_) => return true,
        }
    }
    true
}
