//! SEQPACKET connections against their sockets: whole messages out, whole messages in.

use std::io::{self, IoSlice};
use std::time::Instant;

use rustix::io::Errno;
use tracing::{debug, warn};

use super::{Gather, Switchboard, Unspilled, count_written};
use crate::device::flow::{Flow, HostEnd};
use crate::device::messages::{Message, Wire};
use crate::host::Packet;
use crate::metrics::Direction;
use crate::vsock::{Boundary, CloseReason, ConnectionId, Misbehavior};

/// The longest message that is taken from a packet socket, in bytes: what room is made for, whatever a guest claims to have.
const LONGEST_PACKET: u32 = 16 << 20;

/// Frames that leave with one system call, three pieces each at most, of which a call takes 1024 (UIO_MAXIOV): a guest may have
/// as many messages waiting as bytes, and a turn sends all that the socket takes.
const FRAMES_PER_WRITE: usize = 256;

impl Switchboard {
    /// Whether this connection's bytes are messages.
    pub(in crate::device) fn has_messages(&self, id: ConnectionId) -> bool {
        self.flows.get(id).is_some_and(|flow| flow.messages.is_some())
    }

    /// How this connection's messages travel.
    pub(in crate::device) fn wire(&self, id: ConnectionId) -> Option<Wire> {
        Some(self.flows.get(id)?.messages.as_ref()?.wire)
    }

    /// A message of the guest ends with what was gathered.
    pub(in crate::device) fn end_message(
        &mut self,
        now: Instant,
        gather: &mut Gather<'_>,
        boundary: Boundary,
    ) {
        let Some(id) = gather.id else { return };
        if self.send_packet(now, id, gather) {
            return;
        }
        self.flush(now, gather);
        // What is left of it is no message of the guest.
        if gather.memory.is_lost() {
            return;
        }
        // That may have been the connection's end.
        let Some(flow) = self.flows.get_mut(id).filter(|flow| !flow.write_failed) else {
            return;
        };
        let Some(messages) = &mut flow.messages else {
            return;
        };
        // They were refused: the socket says when it has room, and is not asked for each message.
        let others_wait = messages.outbox.has_whole();
        if messages.outbox.unfinished() > messages.wire.max_message() {
            self.message_too_long(id, "the guest's message is longer than the rule's maxMessage");
        } else if messages.outbox.end(boundary).is_err() {
            self.muxer.misbehaves(id, Misbehavior::EmptyMessages);
        } else if !others_wait {
            self.flush_messages(now, id);
        }
    }

    /// Sends a message that was gathered as a whole to a packet socket, straight from guest memory; whether that was all that
    /// there is to do.
    fn send_packet(&mut self, now: Instant, id: ConnectionId, gather: &mut Gather<'_>) -> bool {
        let Some(flow) = self.flows.get_mut(id) else {
            return false;
        };
        let (Some(messages), HostEnd::Connected(stream)) = (&flow.messages, &flow.end) else {
            return false;
        };
        let bytes = gather.slices.bytes();
        let direct = messages.wire == Wire::Packets && messages.outbox.is_empty() && !flow.write_failed;
        if !direct || bytes == 0 {
            return false;
        }
        match gather.write_to(stream) {
            Ok(_) => {
                flow.bytes_from_guest += bytes as u64;
                count_written(&flow.rule, bytes);
                gather.slices.clear();
                self.wrote(now, id, bytes);
            }
            Err(error) if waits(&error) => return false,
            Err(error) => {
                gather.slices.clear();
                self.message_failed(now, id, &error);
            }
        }
        true
    }

    /// Keeps gathered bytes of a message that is not whole yet, or that others are ahead of.
    pub(super) fn keep_of_message(
        &mut self,
        now: Instant,
        id: ConnectionId,
        gather: &Gather<'_>,
        bytes: usize,
    ) {
        let Some(flow) = self.flows.get_mut(id).filter(|flow| !flow.write_failed) else {
            return;
        };
        if flow.messages.is_none() {
            return;
        }
        flow.bytes_from_guest += bytes as u64;
        if let Err(full) = flow.make_room(bytes) {
            self.out_of_memory(now, id, full);
            return;
        }
        match gather.keep_in(&mut flow.spill, 0, bytes) {
            Ok(()) => {
                if let Some(messages) = &mut flow.messages {
                    messages.outbox.extend(bytes);
                }
                self.metrics.buffered_bytes[Direction::GuestToHost as usize].add(bytes as i64);
            }
            Err(Unspilled::MemoryLost) => {}
            Err(Unspilled::Full(error)) => {
                warn!(guest = %self.name, %error, "the spill buffer is smaller than the credit");
                self.muxer.host_failed(id, CloseReason::Error);
            }
        }
    }

    /// Sends the messages that are whole, until the socket takes no more.
    pub(super) fn flush_messages(&mut self, now: Instant, id: ConnectionId) {
        loop {
            let Some(flow) = self.flows.get_mut(id).filter(|flow| !flow.write_failed) else {
                return;
            };
            match send_first(flow) {
                Ok(None) => break,
                Ok(Some(taken)) => {
                    flow.settle();
                    self.metrics.buffered_bytes[Direction::GuestToHost as usize].sub(taken as i64);
                    count_written(&flow.rule, taken);
                    self.wrote(now, id, taken);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.metrics.backpressure_pauses[Direction::GuestToHost as usize].inc();
                    self.await_room(id);
                    return;
                }
                Err(error) => {
                    self.message_failed(now, id, &error);
                    return;
                }
            }
        }
        let Some(flow) = self.flows.get_mut(id) else {
            return;
        };
        let due = flow
            .messages
            .as_mut()
            .is_some_and(|messages| std::mem::take(&mut messages.outbox.shutdown_due));
        if let Some(stream) = flow.stream().filter(|_| due)
            && let Err(error) = stream.shutdown_write()
        {
            debug!(guest = %self.name, %error, "shutdown of a host socket");
        }
    }

    /// The message of the host end that is the guest's next, and how many of its bytes the guest has not got. `None`: there is
    /// none now, or the connection has ended.
    pub(in crate::device) fn next_message(
        &mut self,
        now: Instant,
        id: ConnectionId,
    ) -> Option<(Message, u32)> {
        let mut longest = self.muxer.connection(id)?.longest_message();
        let flow = self.flows.get_mut(id)?;
        let messages = flow.messages.as_mut()?;
        if let Some(current) = messages.inbox.current() {
            return Some(current);
        }
        let HostEnd::Connected(stream) = &flow.end else {
            return None;
        };
        let wire = messages.wire;
        if wire == Wire::Packets {
            longest = longest.min(LONGEST_PACKET);
        }
        let inbox = &mut messages.inbox;
        let found = match wire {
            Wire::Packets => stream
                .receive_packet(&mut self.packet_room, longest as usize)
                .map(|packet| match packet {
                    Packet::End => None,
                    Packet::Message => {
                        inbox.packet.clone_from(&self.packet_room);
                        Some(inbox.packet.len())
                    }
                    Packet::TooLong { len } => Some(len.max(longest as usize + 1)),
                })
                .map(|len| {
                    len.map(|len| Message {
                        len: u32::try_from(len).unwrap_or(u32::MAX),
                        ends_record: false,
                    })
                }),
            Wire::Frames { .. } => loop {
                match stream.read(inbox.header_space()) {
                    Ok(0) => break Ok(None),
                    Ok(n) => {
                        if let Some(message) = inbox.header_came(n, wire) {
                            break Ok(Some(message));
                        }
                    }
                    Err(error) => break Err(error),
                }
            },
        };
        match found {
            Ok(Some(message)) if message.len > longest.min(wire.max_message()) => {
                self.message_too_long(
                    id,
                    "the host end's message is longer than the guest's buffer or the rule's maxMessage",
                );
            }
            Ok(Some(message)) => {
                inbox.begin(message);
                return Some((message, message.len));
            }
            Ok(None) => self.messages_ended(now, id),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.muxer.host_drained(id),
            Err(error) => {
                debug!(guest = %self.name, %error, "a host socket failed");
                self.muxer.host_failed(id, CloseReason::PeerRst);
            }
        }
        None
    }

    /// The stream of the host end has ended: in order between two messages, else what was begun can never be whole.
    pub(super) fn messages_ended(&mut self, now: Instant, id: ConnectionId) {
        let Some(flow) = self.flows.get_mut(id) else {
            return;
        };
        flow.eof = true;
        // With the end of the bytes rather than behind it: the guest sees a close as a whole.
        if flow.is_unheard() {
            self.reads_no_more(now, id);
        }
        let Some(flow) = self.flows.get_mut(id) else {
            return;
        };
        if flow
            .messages
            .as_ref()
            .is_some_and(|messages| messages.inbox.is_amid_frame())
        {
            debug!(guest = %self.name, "a host end stopped within a message");
            self.muxer.host_failed(id, CloseReason::PeerRst);
        } else {
            self.muxer.host_eof(now, id);
        }
    }

    /// The rest of a message of a packet socket, which goes to the guest from here.
    pub(in crate::device) fn packet_left(&self, id: ConnectionId) -> &[u8] {
        self.flows
            .get(id)
            .and_then(|flow| flow.messages.as_ref())
            .map(|messages| messages.inbox.packet_left())
            .unwrap_or_default()
    }

    /// The guest got `n` bytes of a packet socket's message, or an empty message of whatever socket.
    pub(in crate::device) fn packet_given(&mut self, now: Instant, id: ConnectionId, n: u32) {
        self.message_given(id, n);
        let Some(flow) = self.flows.get_mut(id) else {
            return;
        };
        flow.bytes_to_guest += u64::from(n);
        let direction = Direction::HostToGuest;
        flow.rule.metrics().upstream_bytes[direction as usize].inc_by(u64::from(n));
        self.metrics
            .payload(direction, self.socket_type(id), u64::from(n));
        self.muxer.host_read(now, id, n, true);
    }

    /// The guest got `n` bytes more of the message under way.
    pub(in crate::device) fn message_given(&mut self, id: ConnectionId, n: u32) {
        if let Some(messages) = self.flows.get_mut(id).and_then(|flow| flow.messages.as_mut()) {
            messages.inbox.given(n);
        }
    }

    fn message_failed(&mut self, now: Instant, id: ConnectionId, error: &io::Error) {
        match Errno::from_io_error(error) {
            Some(Errno::MSGSIZE) => {
                self.message_too_long(
                    id,
                    "the guest's message is longer than the service's socket takes",
                );
            }
            _ => self.write_failed(now, id, error),
        }
    }

    fn message_too_long(&mut self, id: ConnectionId, what: &str) {
        debug!(guest = %self.name, what, "connection ended");
        self.muxer.host_failed(id, CloseReason::MessageTooLong);
    }
}

/// Whether a message that a socket refused goes to the spill buffer: until there is room, or a buffer large enough for it, which
/// [`crate::host::HostStream::send_packet`] makes.
fn waits(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::WouldBlock || Errno::from_io_error(error) == Some(Errno::MSGSIZE)
}

/// Sends the first message that is whole, or goes on with it, and in frames those behind it; how many of their bytes the socket
/// took. `None` if there is none.
fn send_first(flow: &mut Flow) -> io::Result<Option<usize>> {
    let (Some(messages), HostEnd::Connected(stream)) = (&mut flow.messages, &flow.end) else {
        return Ok(None);
    };
    let outbox = &mut messages.outbox;
    let taken = match messages.wire {
        Wire::Packets => {
            let Some(message) = outbox.first() else {
                return Ok(None);
            };
            let [first, second] = flow.spill.front(message.len as usize);
            stream.send_packet(&[IoSlice::new(first), IoSlice::new(second)])?;
            outbox.pop();
            message.len as usize
        }
        Wire::Frames { .. } => {
            let frames: Vec<_> = outbox.frames(messages.wire).take(FRAMES_PER_WRITE).collect();
            if frames.is_empty() {
                return Ok(None);
            }
            let mut slices = Vec::with_capacity(3 * frames.len());
            let mut at = 0;
            for (header, header_sent, left) in &frames {
                let [first, second] = flow.spill.behind(at, *left);
                let header = header.get(*header_sent..).unwrap_or_default();
                slices.extend(
                    [header, first, second]
                        .into_iter()
                        .filter(|piece| !piece.is_empty())
                        .map(IoSlice::new),
                );
                at += left;
            }
            let n = stream.write(&slices)?;
            if n == 0 {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            outbox.frames_sent(n)
        }
    };
    flow.spill.consume(taken);
    Ok(Some(taken))
}
