//! The full-duplex pump between the VMM's socket and the crate's private one, through the gate.
//!
//! It never blocks and never waits: [`Relay::turn`] moves what can be moved, [`Relay::vmm_interest`] and
//! [`Relay::backend_interest`] say what to poll for.
//! Each direction holds at most one message that the other side has not taken yet (the few of our own apart), and reads
//! no further while it does: what a peer does not read stays with the sender. Neither direction waits for the other.
//!
//! A request that we answer ourselves is *held* until the crate has done what came before and, if the device has to do
//! something for it, until the device has. Nothing is read from the VMM meanwhile, so that effects and answers keep the
//! order of the requests; answers of the crate pass.

use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::event::PollFlags;
use rustix::fs::FileType;

use super::gate::{Gate, IotlbOperation, Observation, Passage, ReplyVerdict, Then};
use super::message::{Body, Message, REPLY, VERSION, request};
use super::negotiation::NegotiationWatch;
use super::translation::AddressNote;
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
    /// The VMM sent a request that is refused, and there is no answer that says so.
    #[error("{}: {reason}", super::message::display_name(*request))]
    Refused {
        /// The request number.
        request: u32,
        /// What is wrong with it.
        reason: String,
    },
    /// The crate closed its socket; all that it had to say has been passed on.
    #[error("the connection was ended")]
    CrateClosed,
    /// The crate's socket failed.
    #[error("private socket: {0}")]
    Crate(WireError),
}

/// A request that we answer ourselves.
struct Held {
    message: Message,
    /// Why it is refused; `None` if it is not.
    refusal: Option<String>,
    stage: Stage,
}

enum Stage {
    /// The crate has not done yet what came before; then this is to be done, if anything.
    Barrier(Option<IotlbOperation>),
    /// The operation has been handed out.
    CarriedOut,
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
    held: Option<Held>,
    /// Told what the crate reads, in order; see [`AddressNote`].
    note: Box<dyn Fn(AddressNote) + Send>,
    /// The descriptor of the last SET_BACKEND_REQ_FD, until it is taken.
    backend_channel: Option<OwnedFd>,
    /// The crate takes no more, or has closed; it may still have to say something.
    backend_deaf: bool,
    /// The crate has closed.
    backend_closed: bool,
}

impl Relay {
    /// A relay between a VMM and the crate. `note` hears of each SET_VRING_ADDR before the crate can read it.
    pub fn new(
        vmm: UnixStream,
        backend: UnixStream,
        gate: Gate,
        note: impl Fn(AddressNote) + Send + 'static,
    ) -> Relay {
        Relay {
            held: None,
            note: Box::new(note),
            backend_channel: None,
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
        let listens = self.to_backend.is_empty() && !self.backend_deaf && self.held.is_none();
        flags.set(PollFlags::IN, listens);
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

    /// What the device has to do now; [`Relay::carried_out`] says that it has.
    pub fn take_operation(&mut self) -> Option<IotlbOperation> {
        // One answer of ours at a time: a VMM that reads none must not make them pile up here.
        let settled = self.gate.is_settled() && self.to_vmm.is_empty();
        let held = self.held.as_mut()?;
        match &mut held.stage {
            Stage::Barrier(operation) if settled && operation.is_some() => {
                let operation = operation.take();
                held.stage = Stage::CarriedOut;
                operation
            }
            _ => None,
        }
    }

    /// The device has done what [`Relay::take_operation`] handed out.
    pub fn carried_out(&mut self, watch: &NegotiationWatch) {
        if let Some(held) = self.held.take() {
            watch.iotlb_carried_out();
            self.answer(held, watch);
        }
    }

    /// The channel that the VMM has given for requests of ours, once each.
    pub fn take_backend_channel(&mut self) -> Option<OwnedFd> {
        self.backend_channel.take()
    }

    /// Ends the crate's connection and gives the VMM's back: whoever holds it decides when the VMM sees the end.
    pub fn close_backend(self) -> (UnixStream, Gate) {
        let _ = self.backend.shutdown(Shutdown::Both);
        (self.vmm, self.gate)
    }

    /// Deals with one request of the VMM.
    fn judge(&mut self, frame: Frame, watch: &NegotiationWatch) -> Result<(), RelayEnd> {
        if let Some(reason) = log_fault(&frame) {
            watch.refused(&frame.message, &reason, false);
            let request = frame.message.request();
            return Err(RelayEnd::Refused { request, reason });
        }
        let before = (self.gate.translation(), self.gate.assumed().is_some());
        let verdict = self.gate.request(&frame.message, frame.fds.len());
        if let Some((features, protocol_features)) = self.gate.assumed().filter(|_| !before.1) {
            watch.assume(features, protocol_features);
        }
        for Passage { message, note } in verdict.before {
            note.into_iter().for_each(&self.note);
            self.to_backend.push(Frame::bare(message));
        }
        match verdict.then {
            Then::Forward { note } => {
                watch.request(&frame.message, frame.fds.len());
                note.into_iter().for_each(&self.note);
                self.watch_channel(&frame);
                self.to_backend.push(frame);
            }
            Then::Replace(Passage { message, note }) => {
                watch.request(&frame.message, frame.fds.len());
                note.into_iter().for_each(&self.note);
                let fds = frame.fds;
                self.to_backend.push(Frame { message, fds });
            }
            Then::Carry { operation, refusal } => {
                watch.request(&frame.message, frame.fds.len());
                self.held = Some(Held {
                    message: frame.message,
                    refusal,
                    stage: Stage::Barrier(Some(operation)),
                });
            }
            Then::Refuse(reason) => {
                watch.refused(&frame.message, &reason, frame.message.needs_reply());
                self.held = Some(Held {
                    message: frame.message,
                    refusal: Some(reason),
                    stage: Stage::Barrier(None),
                });
            }
            Then::End(reason) => {
                watch.refused(&frame.message, &reason, false);
                let request = frame.message.request();
                return Err(RelayEnd::Refused { request, reason });
            }
        }
        if self.gate.translation() != before.0 {
            watch.translation(self.gate.translation());
        }
        for observation in verdict.findings {
            match observation {
                Observation::Found(code, seen) => watch.find(code, seen),
                Observation::Passed(code) => watch.passed(code),
            }
        }
        Ok(())
    }

    /// Keeps a duplicate of the channel that the crate gets, too.
    fn watch_channel(&mut self, frame: &Frame) {
        if frame.message.request() == request::SET_BACKEND_REQ_FD
            && let [fd] = frame.fds.as_slice()
        {
            // Without a descriptor for it there is no channel, and that is what is told.
            self.backend_channel = fd.try_clone().ok();
        }
    }

    /// Answers a request ourselves, if its sender waits for an answer.
    fn answer(&mut self, held: Held, watch: &NegotiationWatch) {
        let Held {
            message,
            refusal,
            stage,
        } = held;
        let value = u64::from(refusal.is_some());
        if message.needs_reply() {
            let answer = Message::new(message.request(), VERSION | REPLY, &value.to_ne_bytes());
            self.to_vmm.push(Frame::bare(answer));
        }
        // A refusal was told when it was decided.
        if matches!(stage, Stage::CarriedOut) {
            watch.answered(&message, value);
        }
    }

    /// Whether a request of ours to answer keeps the VMM's next one waiting.
    fn is_held(&mut self, watch: &NegotiationWatch) -> bool {
        let refused = |held: &Held| matches!(held.stage, Stage::Barrier(None));
        // As for those that are carried out.
        if self.gate.is_settled()
            && self.to_vmm.is_empty()
            && let Some(held) = self.held.take_if(|held| refused(held))
        {
            self.answer(held, watch);
        }
        self.held.is_some()
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
            if self.is_held(watch) {
                return Ok(false);
            }
            match self.from_vmm.receive(&self.vmm).map_err(RelayEnd::Vmm)? {
                Received::Frame(frame) => self.judge(frame, watch)?,
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

/// What is wrong with a dirty log's file. The crate maps whatever it is given, and the first mark beyond the end of the
/// file would be a SIGBUS for the whole process. `check_files` in `backend.rs` looks at guest memory in this way.
fn log_fault(frame: &Frame) -> Option<String> {
    let (Body::LogBase { size, offset }, [file]) = (frame.message.request_body(), frame.fds.as_slice())
    else {
        return None;
    };
    let file = rustix::fs::fstat(file).ok()?;
    let has = u64::try_from(file.st_size).unwrap_or(0);
    // Devices have no length, and decide themselves what can be mapped.
    let is_file = FileType::from_raw_mode(file.st_mode) == FileType::RegularFile;
    (is_file && offset.checked_add(size).is_none_or(|end| end > has)).then(|| {
        format!(
            "the log of {size:#x} bytes from byte {offset:#x} on ends beyond its file, which has {has:#x}"
        )
    })
}

#[cfg(test)]
#[path = "tests/relay.rs"]
mod tests;
