//! The host ends of connections: what the device keeps for each, beside what the muxer keeps.

use std::sync::Arc;
use std::time::Instant;

use super::limits::{BufferAccount, MemoryFull, Place};
use crate::host::dial::DialTask;
use crate::host::{HostStream, SpillBuf};
use crate::vsock::ConnectionId;

use super::messages::Messages;
use super::rules::Rule;
use super::sibling::{Ears, SiblingAnswer};

/// The host end of a connection.
#[derive(Debug)]
pub(super) enum HostEnd {
    /// No socket yet; dropping the task cancels the dial.
    Dialing {
        /// Held for its drop.
        _task: Option<DialTask>,
    },
    /// Our half of a socket pair, until the guest at the other half has answered. It waits here, and not with the question:
    /// when this flow ends first, its end is what the other device hears of it.
    Asking(HostStream),
    /// A connected socket, registered with the poll under the flow's token.
    Connected(HostStream),
}

/// Whether a socket that has room for more bytes of the guest says so.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Room {
    /// No: it has refused none so far. Most never do.
    Assumed,
    /// Yes, for the rest of its life. So does the half of a socket pair from the beginning: that the guest at the other half
    /// reads no more shows in nothing else.
    Awaited,
}

/// One connection's host end and its bookkeeping.
#[derive(Debug)]
pub(super) struct Flow {
    pub(super) id: ConnectionId,
    /// What allowed it.
    pub(super) rule: Arc<Rule>,
    pub(super) end: HostEnd,
    /// Guest bytes the socket did not take; bounded by `buf_alloc` (invariant 1 of the law).
    pub(super) spill: SpillBuf,
    /// What `spill` is accounted for: never less than its capacity.
    pub(super) account: BufferAccount,
    /// What it holds of the bounds; none before it is let in.
    pub(super) place: Option<Place>,
    /// What becomes of messages; none: its bytes are a stream.
    pub(super) messages: Option<Box<Messages>>,
    /// The guest that asked for this connection and waits for what this guest says.
    pub(super) asked_by: Option<Box<SiblingAnswer>>,
    /// To and from the guest at the other end, if it is one.
    pub(super) ears: Option<Ears>,
    /// Bytes a client sent together with its CONNECT line, to be sent before the socket's.
    pub(super) preface: Vec<u8>,
    /// How many bytes of `preface` have been sent.
    pub(super) preface_sent: usize,
    /// The client waits for `OK <port>\n`.
    pub(super) wants_ok: bool,
    /// A short read does not mean that the socket is drained: its end of file is known to be near, or there was urgent
    /// data in it.
    pub(super) read_on: bool,
    /// What its registration with the poll asks for.
    pub(super) room: Room,
    /// The socket is gone in both directions (EPOLLHUP, EPOLLERR); what came before that can still be read.
    pub(super) hung_up: bool,
    /// A write to the socket has failed: nothing is written to it any more.
    pub(super) write_failed: bool,
    /// Its end of file has been read.
    pub(super) eof: bool,
    /// When it was asked for; when established, from then on.
    pub(super) since: Instant,
    /// Whether it is established, and so counted as active.
    pub(super) established: bool,
    /// Payload bytes from the guest.
    pub(super) bytes_from_guest: u64,
    /// Payload bytes to the guest.
    pub(super) bytes_to_guest: u64,
    /// The guest's port.
    pub(super) guest_port: u32,
    /// The host side's port.
    pub(super) host_port: u32,
    /// The host end, for logs.
    pub(super) peer: String,
}

impl Flow {
    pub(super) fn stream(&self) -> Option<&HostStream> {
        match &self.end {
            HostEnd::Connected(stream) => Some(stream),
            HostEnd::Dialing { .. } | HostEnd::Asking(_) => None,
        }
    }

    /// Our half of a socket pair, when the guest at the other half has answered.
    pub(super) fn take_half(&mut self) -> Option<HostStream> {
        match std::mem::replace(&mut self.end, HostEnd::Dialing { _task: None }) {
            HostEnd::Asking(half) => Some(half),
            other => {
                self.end = other;
                None
            }
        }
    }

    /// Whether a client that has gone before it was established has left bytes that the guest should get. Not from one
    /// that was to be told OK first.
    pub(super) fn left_bytes(&self) -> bool {
        !self.wants_ok && self.stream().is_some_and(HostStream::has_bytes)
    }

    /// Whether bytes or messages of the guest wait for the socket.
    pub(super) fn holds_back(&self) -> bool {
        !self.spill.is_empty()
            || self
                .messages
                .as_ref()
                .is_some_and(|messages| messages.outbox.has_whole())
    }

    /// Whether the guest at the other end reads no more, and nobody has heard of it yet.
    pub(super) fn is_unheard(&self) -> bool {
        !self.write_failed && self.ears.as_ref().is_some_and(Ears::are_closed_there)
    }

    /// Accounts for `n` bytes more in the buffer, before they are there.
    pub(super) fn make_room(&mut self, n: usize) -> Result<(), MemoryFull> {
        self.account.cover(self.spill.capacity_for(n))
    }

    /// Bytes have left the buffer: accounts for what it has now.
    pub(super) fn settle(&mut self) {
        // Less than it was, which always works.
        let _ = self.account.cover(self.spill.capacity());
    }

    /// Bytes of the preface still to be sent.
    pub(super) fn preface_left(&self) -> &[u8] {
        self.preface.get(self.preface_sent..).unwrap_or_default()
    }
}

/// All flows, at their connection's slot.
#[derive(Default, Debug)]
pub(super) struct Flows {
    slots: Vec<Option<Box<Flow>>>,
    live: usize,
}

impl Flows {
    pub(super) fn insert(&mut self, flow: Flow) {
        let slot = flow.id.slot();
        if slot >= self.slots.len() {
            self.slots.resize_with(slot + 1, || None);
        }
        if let Some(place) = self.slots.get_mut(slot)
            && place.replace(Box::new(flow)).is_none()
        {
            self.live += 1;
        }
    }

    pub(super) fn get(&self, id: ConnectionId) -> Option<&Flow> {
        self.slots.get(id.slot())?.as_deref().filter(|flow| flow.id == id)
    }

    pub(super) fn get_mut(&mut self, id: ConnectionId) -> Option<&mut Flow> {
        self.slots
            .get_mut(id.slot())?
            .as_deref_mut()
            .filter(|flow| flow.id == id)
    }

    /// Whoever lives at this slot now.
    pub(super) fn at(&self, slot: usize) -> Option<ConnectionId> {
        self.slots.get(slot)?.as_deref().map(|flow| flow.id)
    }

    pub(super) fn remove(&mut self, id: ConnectionId) -> Option<Flow> {
        self.get(id)?;
        let flow = self.slots.get_mut(id.slot())?.take()?;
        self.live -= 1;
        Some(*flow)
    }

    pub(super) fn len(&self) -> usize {
        self.live
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Flow> {
        self.slots.iter().filter_map(Option::as_deref)
    }
}
