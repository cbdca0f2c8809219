//! The messages of a SEQPACKET connection between the guest and its host end: what is kept of each until it is whole, and how
//! a socket without boundaries carries them.
//!
//! Pure bookkeeping: nothing here touches a socket. `switchboard/messages.rs` does.
//!
//! On a stream of bytes a message travels as a *frame*: its length as a `u32` in network byte order, then its bytes. Between
//! two guests of one sidecar the length's top bit says that the message ends a record (MSG_EOR), which no service outside can
//! know of.

use super::lengths::Lengths;
use crate::vsock::Boundary;

/// Bytes of a frame before its message.
pub(super) const FRAME_HEADER: usize = 4;

/// The bit of a sibling's frame that says that a record ends.
const RECORD_BIT: u32 = 1 << 31;

/// Empty messages that may wait for a host end that takes nothing. They use up no credit, so they need a bound of their own.
const MAX_EMPTY: usize = 1024;

/// How messages travel on the host end.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Wire {
    /// The socket keeps boundaries itself (SOCK_SEQPACKET).
    Packets,
    /// In frames.
    Frames {
        /// Longest message in either direction, in bytes.
        max_message: u32,
        /// Whether the top bit of a length is no part of it but says that a record ends.
        marks_records: bool,
    },
}

impl Wire {
    /// Between two guests of one sidecar.
    pub(super) const SIBLING: Wire = Wire::Frames {
        max_message: RECORD_BIT - 1,
        marks_records: true,
    };

    /// The longest message that may be sent to the host end, in bytes; a packet socket has its own say.
    pub(super) fn max_message(self) -> u32 {
        match self {
            Wire::Packets => u32::MAX,
            Wire::Frames { max_message, .. } => max_message,
        }
    }

    fn frame_header(self, message: Message) -> [u8; FRAME_HEADER] {
        let marked = matches!(
            self,
            Wire::Frames {
                marks_records: true,
                ..
            }
        ) && message.ends_record;
        let length = match marked {
            true => message.len | RECORD_BIT,
            false => message.len,
        };
        length.to_be_bytes()
    }
}

/// A whole message.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Message {
    /// Bytes.
    pub(super) len: u32,
    /// Whether it ends a record.
    pub(super) ends_record: bool,
}

impl Message {
    /// The boundary behind its last byte.
    pub(super) fn boundary(self) -> Boundary {
        match self.ends_record {
            true => Boundary::Record,
            false => Boundary::Message,
        }
    }
}

/// What the guest has said and the socket has not taken, as messages. Their bytes are the flow's spill buffer: those of the
/// whole ones first, in order, then those of the one that has not ended.
#[derive(Default, Debug)]
pub(super) struct Outbox {
    whole: Lengths,
    /// How many of them are empty.
    empty: usize,
    /// Bytes of the message that has not ended.
    unfinished: u32,
    /// Bytes of the first frame, header included, that the socket has taken.
    sent: usize,
    /// The socket is to be told of the end when it has taken everything.
    pub(super) shutdown_due: bool,
}

/// There are too many empty messages.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct TooManyEmpty;

impl Outbox {
    /// `n` bytes of the message that has not ended were kept.
    pub(super) fn extend(&mut self, n: usize) {
        // Credit bounds it.
        self.unfinished = self
            .unfinished
            .saturating_add(u32::try_from(n).unwrap_or(u32::MAX));
    }

    /// The message that was begun is whole.
    pub(super) fn end(&mut self, boundary: Boundary) -> Result<(), TooManyEmpty> {
        let len = std::mem::take(&mut self.unfinished);
        if len == 0 {
            if self.empty >= MAX_EMPTY {
                return Err(TooManyEmpty);
            }
            self.empty += 1;
        }
        self.whole.push_back(Message {
            len,
            ends_record: boundary == Boundary::Record,
        });
        Ok(())
    }

    /// Bytes of the message that has not ended.
    pub(super) fn unfinished(&self) -> u32 {
        self.unfinished
    }

    /// Whether no message waits, whole or not.
    pub(super) fn is_empty(&self) -> bool {
        self.whole.is_empty() && self.unfinished == 0
    }

    /// Whether a whole message waits.
    pub(super) fn has_whole(&self) -> bool {
        !self.whole.is_empty()
    }

    /// The first whole message.
    pub(super) fn first(&self) -> Option<Message> {
        self.whole.front()
    }

    /// The frames of the whole messages, and what is left of each: of its header, and how many bytes of its message.
    pub(super) fn frames(&self, wire: Wire) -> impl Iterator<Item = ([u8; FRAME_HEADER], usize, usize)> + '_ {
        let mut sent = self.sent;
        self.whole.iter().map(move |message| {
            // Of the others nothing was sent.
            let sent = std::mem::take(&mut sent);
            let header_sent = sent.min(FRAME_HEADER);
            let left = (message.len as usize).saturating_sub(sent - header_sent);
            (wire.frame_header(message), header_sent, left)
        })
    }

    /// The socket has taken `n` bytes of the first frames; how many of them belong to messages.
    pub(super) fn frames_sent(&mut self, n: usize) -> usize {
        let (mut left, mut of_messages) = (n, 0);
        while left > 0
            && let Some(message) = self.first()
        {
            let frame = FRAME_HEADER.saturating_add(message.len as usize);
            let here = left.min(frame.saturating_sub(self.sent));
            of_messages += here - here.min(FRAME_HEADER.saturating_sub(self.sent));
            self.sent += here;
            left -= here;
            if self.sent >= frame {
                self.pop();
            }
        }
        of_messages
    }

    /// The socket has taken the whole first message.
    pub(super) fn pop(&mut self) {
        if let Some(message) = self.whole.pop_front() {
            self.empty -= usize::from(message.len == 0);
        }
        self.sent = 0;
    }
}

/// What the host end has said and the guest has not got.
#[derive(Default, Debug)]
pub(super) struct Inbox {
    /// The header of the next frame, as far as it has come.
    header: [u8; FRAME_HEADER],
    header_len: usize,
    /// The message under way and how much of it the guest has not got.
    message: Option<(Message, u32)>,
    /// The bytes of a packet socket's message.
    pub(super) packet: Vec<u8>,
}

impl Inbox {
    /// Where the rest of the next frame's header goes.
    pub(super) fn header_space(&mut self) -> &mut [u8] {
        self.header.get_mut(self.header_len..).unwrap_or_default()
    }

    /// `n` bytes of the header have come; the message it announces if that was all.
    pub(super) fn header_came(&mut self, n: usize, wire: Wire) -> Option<Message> {
        self.header_len += n;
        if self.header_len < FRAME_HEADER {
            return None;
        }
        self.header_len = 0;
        let length = u32::from_be_bytes(self.header);
        Some(match wire {
            Wire::Frames {
                marks_records: true, ..
            } => Message {
                len: length & !RECORD_BIT,
                ends_record: length & RECORD_BIT != 0,
            },
            Wire::Frames { .. } | Wire::Packets => Message {
                len: length,
                ends_record: false,
            },
        })
    }

    /// The guest is to get this message next.
    pub(super) fn begin(&mut self, message: Message) {
        self.message = Some((message, message.len));
    }

    /// The message under way and how many bytes of it are left.
    pub(super) fn current(&self) -> Option<(Message, u32)> {
        self.message
    }

    /// The rest of a packet socket's message.
    pub(super) fn packet_left(&self) -> &[u8] {
        let left = self.message.map_or(0, |(_, left)| left as usize);
        self.packet
            .len()
            .checked_sub(left)
            .and_then(|at| self.packet.get(at..))
            .unwrap_or_default()
    }

    /// The guest has got `n` bytes more.
    pub(super) fn given(&mut self, n: u32) {
        if let Some((message, left)) = self.message {
            self.message = match left.saturating_sub(n) {
                0 => None,
                left => Some((message, left)),
            };
        }
        if self.message.is_none() {
            // What is kept between messages would be kept for every idle connection.
            self.packet = Vec::new();
        }
    }

    /// Whether an end of the stream would cut something off.
    pub(super) fn is_amid_frame(&self) -> bool {
        self.header_len > 0 || self.message.is_some()
    }
}

/// Both directions.
#[derive(Debug)]
pub(super) struct Messages {
    pub(super) wire: Wire,
    pub(super) outbox: Outbox,
    pub(super) inbox: Inbox,
}

impl Messages {
    pub(super) fn new(wire: Wire) -> Messages {
        Messages {
            wire,
            outbox: Outbox::default(),
            inbox: Inbox::default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Wire = Wire::Frames {
        max_message: 1000,
        marks_records: false,
    };

    #[test]
    fn a_frame_is_taken_in_pieces_and_its_header_is_no_payload() {
        let mut outbox = Outbox::default();
        outbox.extend(3);
        outbox.extend(2);
        assert!(!outbox.has_whole(), "it has not ended");
        outbox.end(Boundary::Record).unwrap();
        assert_eq!(outbox.frames(PLAIN).next(), Some(([0, 0, 0, 5], 0, 5)));
        assert_eq!(outbox.frames_sent(2), 0);
        assert_eq!(outbox.frames(PLAIN).next(), Some(([0, 0, 0, 5], 2, 5)));
        assert_eq!(outbox.frames_sent(3), 1);
        assert_eq!(outbox.frames(PLAIN).next(), Some(([0, 0, 0, 5], 4, 4)));
        assert_eq!(outbox.frames_sent(4), 4);
        assert!(outbox.is_empty());
    }

    #[test]
    fn frames_are_taken_together_and_cut_anywhere() {
        let lengths = [2, 0, 1];
        let total: usize = lengths.iter().map(|len| FRAME_HEADER + len).sum();
        for cut in 1..total {
            let mut outbox = Outbox::default();
            for len in lengths {
                outbox.extend(len);
                outbox.end(Boundary::Message).unwrap();
            }
            let before = outbox.frames_sent(cut);
            let left: Vec<_> = outbox.frames(PLAIN).collect();
            let of_messages: usize = left.iter().map(|(_, _, left)| left).sum();
            let of_headers: usize = left.iter().map(|(_, sent, _)| FRAME_HEADER - sent).sum();
            assert_eq!(of_messages + of_headers, total - cut);
            assert_eq!(before + of_messages, 3, "cut at {cut}");
            assert_eq!(outbox.frames_sent(total - cut), of_messages);
            assert!(outbox.is_empty());
        }
    }

    #[test]
    fn a_record_is_marked_among_siblings_only() {
        let mut outbox = Outbox::default();
        outbox.extend(1);
        outbox.end(Boundary::Record).unwrap();
        let header = |wire| outbox.frames(wire).next().unwrap().0;
        assert_eq!(header(PLAIN), [0, 0, 0, 1]);
        assert_eq!(header(Wire::SIBLING), [0x80, 0, 0, 1]);
        for (wire, len, ends_record) in [(PLAIN, 0x8000_0001, false), (Wire::SIBLING, 1, true)] {
            let mut inbox = Inbox::default();
            inbox.header_space().copy_from_slice(&[0x80, 0, 0, 1]);
            assert_eq!(inbox.header_came(4, wire), Some(Message { len, ends_record }));
        }
    }

    #[test]
    fn a_header_may_come_byte_by_byte() {
        let mut inbox = Inbox::default();
        for byte in [0, 0, 1] {
            inbox.header_space()[0] = byte;
            assert_eq!(inbox.header_came(1, PLAIN), None);
            assert!(inbox.is_amid_frame());
        }
        inbox.header_space()[0] = 2;
        let message = inbox.header_came(1, PLAIN).unwrap();
        assert_eq!(message.len, 258);
        inbox.begin(message);
        inbox.given(200);
        assert_eq!(inbox.current(), Some((message, 58)));
        inbox.given(58);
        assert!(!inbox.is_amid_frame());
    }

    #[test]
    fn empty_messages_are_bounded_and_count_as_waiting() {
        let mut outbox = Outbox::default();
        for _ in 0..MAX_EMPTY {
            outbox.end(Boundary::Message).unwrap();
        }
        assert_eq!(outbox.end(Boundary::Message), Err(TooManyEmpty));
        assert_eq!(outbox.frames_sent(FRAME_HEADER), 0);
        outbox.end(Boundary::Message).unwrap();
        assert!(!outbox.is_empty());
    }
}
