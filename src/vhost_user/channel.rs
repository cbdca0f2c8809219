//! The back-end's channel: the socket of SET_BACKEND_REQ_FD, on which the device asks for translations.
//!
//! A miss is sent and never waited for. Where REPLY_ACK was agreed on, the front-end is asked for an answer all the same,
//! since only that tells a refusal from a delay; it comes whenever it comes, behind the UPDATE on the other socket. It is taken
//! for that of the oldest miss; where a front-end answers in another order, the device finds out by the UPDATEs
//! (guest/iotlb/questions.rs). A front-end that answers a miss only after we have acknowledged its UPDATE (QEMU does,
//! with its global lock held) thus finds nobody waiting.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::event::PollFlags;

use super::message::{Message, NEED_REPLY, VERSION, backend_request};
use super::wire::{Frame, FrameReader, FrameWriter, Received};
use crate::guest::{Access, Miss};

/// Misses that are kept while there is no channel, or while the front-end does not read. The device has fewer in flight.
const MAX_QUEUED: usize = 256;
/// Messages that are read in one go.
const BUDGET: usize = 64;

/// The channel of one session.
#[derive(Default)]
pub struct Channel {
    socket: Option<UnixStream>,
    reader: FrameReader,
    writer: FrameWriter,
    /// Misses that no channel has taken yet.
    waiting: VecDeque<Miss>,
    /// Misses whose answers are due, in the order in which they were asked.
    asked: VecDeque<Miss>,
    /// Whether answers are asked for.
    acknowledges: bool,
}

impl Channel {
    /// A session's channel before the front-end has given one.
    pub fn new() -> Channel {
        Channel::default()
    }

    /// Uses this socket from now on. What was asked on another one and not answered is asked again.
    pub fn open(&mut self, socket: OwnedFd, acknowledges: bool) {
        self.close();
        self.socket = Some(UnixStream::from(socket));
        self.acknowledges = acknowledges;
    }

    /// Whether there is one.
    pub fn is_open(&self) -> bool {
        self.socket.is_some()
    }

    /// Asks the front-end for a translation.
    pub fn ask(&mut self, miss: Miss) {
        // The device asks again what it was made to forget; what it asked last is what it waits for now.
        self.waiting.retain(|known| *known != miss);
        if self.waiting.len() >= MAX_QUEUED {
            self.waiting.pop_front();
        }
        self.waiting.push_back(miss);
    }

    /// What to poll the socket for.
    pub fn interest(&self) -> Option<(BorrowedFd<'_>, PollFlags)> {
        let socket = self.socket.as_ref()?;
        let mut flags = PollFlags::IN;
        flags.set(PollFlags::OUT, !self.writer.is_empty());
        Some((socket.as_fd(), flags))
    }

    /// Sends and receives what the socket takes and has, without blocking: `sent` hears of each miss, `answered` of each
    /// answer and whether it is a refusal. Answers whether the channel has ended meanwhile.
    pub fn turn(&mut self, mut sent: impl FnMut(Miss), mut answered: impl FnMut(Miss, bool)) -> bool {
        let Some(socket) = &self.socket else { return false };
        // A miss is written once the one before is out: what a front-end does not read must not pile up behind the bound.
        loop {
            match self.writer.flush(socket) {
                Ok(true) => {}
                Ok(false) => break,
                Err(_) => {
                    self.close();
                    return true;
                }
            }
            let Some(miss) = self.waiting.pop_front() else {
                break;
            };
            // A front-end that translates and never answers is not asked to, in the end: its UPDATEs do.
            let acknowledges = self.acknowledges && self.asked.len() < MAX_QUEUED;
            let perm = match miss.access {
                Access::Read => 1,
                Access::Write => 2,
            };
            let flags = VERSION | if acknowledges { NEED_REPLY } else { 0 };
            self.writer
                .push(Frame::bare(Message::iotlb_miss(flags, miss.iova, perm)));
            if acknowledges {
                self.asked.push_back(miss);
            }
            sent(miss);
        }
        for _ in 0..BUDGET {
            match self.reader.receive(socket) {
                Ok(Received::Frame(Frame { message, .. })) => {
                    // There is nothing else that a front-end could say here; what it says all the same is not for us.
                    if !message.is_reply() || message.request() != backend_request::IOTLB_MSG {
                        continue;
                    }
                    if let Some(error) = message.u64_body()
                        && let Some(miss) = self.asked.pop_front()
                    {
                        answered(miss, error != 0);
                    }
                }
                Ok(Received::Blocked) => return false,
                Ok(Received::Closed) | Err(_) => {
                    self.close();
                    return true;
                }
            }
        }
        false
    }

    fn close(&mut self) {
        // Half a message of one channel is nothing on the next.
        self.socket = None;
        self.reader = FrameReader::default();
        self.writer = FrameWriter::default();
        // The device asks once, and would wait for ever.
        let later = std::mem::take(&mut self.waiting);
        for miss in std::mem::take(&mut self.asked).into_iter().chain(later) {
            self.ask(miss);
        }
    }
}

#[cfg(test)]
#[path = "tests/channel.rs"]
mod tests;
