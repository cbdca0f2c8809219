//! The full-duplex pump between the VMM's socket and the crate's private one, through the gate.
//!
//! It never blocks and never waits: [`Relay::turn`] moves what can be moved, [`Relay::vmm_interest`] and
//! [`Relay::backend_interest`] say what to poll for.
//! Each direction holds at most one message that the other side has not taken yet (the prelude's few apart), and reads
//! no further while it does: what a peer does not read stays with the sender. Neither direction waits for the other.

use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use rustix::event::PollFlags;

use super::gate::{Gate, ReplyVerdict, Verdict};
use super::negotiation::NegotiationWatch;
use super::wire::{Frame, FrameReader, FrameWriter, Received, WireError};

/// Messages a direction may move in one turn, so that a flood does not keep the session thread from its other work.
const BUDGET: usize = 64;

/// Why nothing more can be relayed.
#[derive(Debug, thiserror::Error)]
pub enum RelayEnd {
    /// The VMM closed its socket.
    #[error("the VMM closed the connection")]
    VmmClosed,
    /// What the VMM sent is no message.
    #[error("{0}")]
    Vmm(WireError),
    /// The crate closed its socket; all that it had to say has been passed on.
    #[error("the connection was ended")]
    CrateClosed,
    /// The crate's socket failed.
    #[error("private socket: {0}")]
    Crate(WireError),
}

/// One session's relay.
pub struct Relay {
    vmm: UnixStream,
    backend: UnixStream,
    gate: Gate,
    from_vmm: FrameReader,
    to_backend: FrameWriter,
    from_backend: FrameReader,
    to_vmm: FrameWriter,
    /// The crate takes no more, or has closed; it may still have to say something.
    backend_deaf: bool,
    /// The crate has closed.
    backend_closed: bool,
}

impl Relay {
    /// A relay between a VMM and the crate.
    pub fn new(vmm: UnixStream, backend: UnixStream, gate: Gate) -> Relay {
        Relay {
            vmm,
            backend,
            gate,
            from_vmm: FrameReader::default(),
            to_backend: FrameWriter::default(),
            from_backend: FrameReader::default(),
            to_vmm: FrameWriter::default(),
            backend_deaf: false,
            backend_closed: false,
        }
    }

    /// Moves messages in both directions until sockets block. True when there may be more to do at once.
    pub fn turn(&mut self, watch: &NegotiationWatch) -> Result<bool, RelayEnd> {
        // Answers first: the crate may wait for room to answer before it reads the next request.
        let more_answers = self.backend_to_vmm(watch)?;
        let more_requests = self.vmm_to_backend(watch)?;
        if self.backend_closed && self.to_vmm.is_empty() {
            return Err(RelayEnd::CrateClosed);
        }
        Ok(more_answers || more_requests)
    }

    /// What to poll the VMM's socket for.
    pub fn vmm_interest(&self) -> PollFlags {
        let mut flags = PollFlags::empty();
        flags.set(PollFlags::IN, self.to_backend.is_empty() && !self.backend_deaf);
        flags.set(PollFlags::OUT, !self.to_vmm.is_empty());
        flags
    }

    /// What to poll the crate's socket for; `None` when it must not be polled, since it is hung up and would be ready
    /// for ever.
    pub fn backend_interest(&self) -> Option<PollFlags> {
        let mut flags = PollFlags::empty();
        flags.set(PollFlags::IN, self.to_vmm.is_empty());
        flags.set(PollFlags::OUT, !self.to_backend.is_empty() && !self.backend_deaf);
        let hung_up = self.backend_closed || (self.backend_deaf && flags.is_empty());
        (!hung_up).then_some(flags)
    }

    /// To be told when polling found the crate's socket hung up, which it reports whether asked to or not.
    pub fn backend_hung_up(&mut self) {
        self.backend_deaf = true;
    }

    /// Whether the crate has closed and its last words wait for the VMM to read.
    pub fn is_draining(&self) -> bool {
        self.backend_closed || (self.backend_deaf && !self.to_vmm.is_empty())
    }

    /// The VMM's socket, for polling.
    pub fn vmm(&self) -> BorrowedFd<'_> {
        self.vmm.as_fd()
    }

    /// The crate's socket, for polling.
    pub fn backend(&self) -> BorrowedFd<'_> {
        self.backend.as_fd()
    }

    /// The gate, to ask it what went wrong.
    pub fn gate(&self) -> &Gate {
        &self.gate
    }

    /// Ends the crate's connection and gives the VMM's back: whoever holds it decides when the VMM sees the end.
    pub fn close_backend(self) -> (UnixStream, Gate) {
        let _ = self.backend.shutdown(Shutdown::Both);
        (self.vmm, self.gate)
    }

    fn vmm_to_backend(&mut self, watch: &NegotiationWatch) -> Result<bool, RelayEnd> {
        for _ in 0..BUDGET {
            if self.backend_deaf {
                return Ok(false);
            }
            match self.to_backend.flush(&self.backend) {
                Ok(true) => {}
                Ok(false) => return Ok(false),
                Err(_) => {
                    // It has closed, perhaps after an answer that we have yet to read.
                    self.backend_deaf = true;
                    return Ok(true);
                }
            }
            match self.from_vmm.receive(&self.vmm).map_err(RelayEnd::Vmm)? {
                Received::Frame(frame) => {
                    let verdict = self.gate.request(&frame.message, frame.fds.len());
                    if let Verdict::ForwardAfter(prelude) = verdict {
                        if let Some((features, protocol_features)) = self.gate.assumed() {
                            watch.assume(features, protocol_features);
                        }
                        prelude
                            .into_iter()
                            .for_each(|message| self.to_backend.push(Frame::bare(message)));
                    }
                    watch.request(&frame.message, frame.fds.len());
                    self.to_backend.push(frame);
                }
                Received::Blocked => return Ok(false),
                Received::Closed => return Err(RelayEnd::VmmClosed),
            }
        }
        Ok(true)
    }

    fn backend_to_vmm(&mut self, watch: &NegotiationWatch) -> Result<bool, RelayEnd> {
        for _ in 0..BUDGET {
            match self.to_vmm.flush(&self.vmm) {
                Ok(true) => {}
                Ok(false) => return Ok(false),
                Err(_) => return Err(RelayEnd::VmmClosed),
            }
            if self.backend_closed {
                return Ok(false);
            }
            match self.from_backend.receive(&self.backend) {
                Ok(Received::Frame(frame)) => match self.gate.reply(&frame.message) {
                    ReplyVerdict::Forward => {
                        watch.reply(&frame.message);
                        self.to_vmm.push(frame);
                    }
                    ReplyVerdict::Swallow => {}
                },
                Ok(Received::Blocked) => return Ok(false),
                Ok(Received::Closed) => {
                    self.backend_closed = true;
                    self.backend_deaf = true;
                }
                Err(error) => return Err(RelayEnd::Crate(error)),
            }
        }
        Ok(true)
    }
}

#[cfg(test)]
#[path = "tests/relay.rs"]
mod tests;
