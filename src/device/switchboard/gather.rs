//! Payload of the guest between its ring and a host end. Whatever moves bytes out of guest memory goes through here, so that
//! zeros which stand for memory that is lost never leave as the guest's.

use std::io;
use std::os::fd::AsFd;

use crate::guest::View;
use crate::host::{HostStream, SpillBuf, SpillFull};
use crate::sys::iovec::IoVecs;
use crate::sys::vectored::{is_memory_fault, writev};
use crate::vsock::ConnectionId;

/// Guest packets' payload on its way to one host socket: slices of guest memory, gathered over packets.
pub(in crate::device) struct Gather<'m> {
    pub(in crate::device) id: Option<ConnectionId>,
    pub(in crate::device) slices: IoVecs<'m>,
    /// What they are slices of.
    pub(in crate::device) memory: View<'m>,
}

/// Why bytes of the guest were not kept.
pub(super) enum Unspilled {
    Full(SpillFull),
    MemoryLost,
}

impl From<SpillFull> for Unspilled {
    fn from(full: SpillFull) -> Unspilled {
        Unspilled::Full(full)
    }
}

impl Gather<'_> {
    /// Writes once to a socket. Memory that is lost is no fault of the socket: it takes nothing then. Zeros that stand for such
    /// memory are not what the guest has sent, and are not written.
    pub(super) fn write_to(&self, stream: &HostStream) -> io::Result<usize> {
        if self.memory.is_lost() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        writev(stream.as_fd(), &self.slices).map_err(|error| match is_memory_fault(&error) {
            true => {
                self.memory.mark_lost();
                io::ErrorKind::WouldBlock.into()
            }
            false => error,
        })
    }

    /// Copies `n` bytes behind the first `skip` to the end of a spill buffer, or nothing.
    pub(super) fn keep_in(&self, spill: &mut SpillBuf, skip: usize, n: usize) -> Result<(), Unspilled> {
        let mut taken = skip;
        spill.extend_with(n, |piece| {
            taken += self.slices.copy_to(taken, piece);
            match self.memory.is_lost() {
                true => Err(Unspilled::MemoryLost),
                false => Ok(()),
            }
        })
    }
}
