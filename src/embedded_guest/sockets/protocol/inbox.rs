//! What a socket has received and its program has not yet read: bytes, or messages.

use std::collections::VecDeque;

use crate::vsock::header::SocketType;

/// VIRTIO_VSOCK_SEQ_EOM: the packet is its message's last.
pub const SEQ_EOM: u32 = 1 << 0;
/// VIRTIO_VSOCK_SEQ_EOR: the message ends a record (MSG_EOR); stands beside [`SEQ_EOM`] only.
pub const SEQ_EOR: u32 = 1 << 1;

/// A message as recv() answers it.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct GuestMessage {
    /// All its bytes, which may be none.
    pub bytes: Vec<u8>,
    /// Whether the sender marked it with MSG_EOR.
    pub end_of_record: bool,
}

/// The receive queue. `used` never exceeds the socket's `buf_alloc`: that is judged before anything is put in.
#[derive(Debug)]
pub enum Inbox {
    Stream(VecDeque<u8>),
    Seqpacket {
        whole: VecDeque<GuestMessage>,
        /// The message that has begun and not ended; recv() does not see it, the buffer holds it.
        begun: Option<Vec<u8>>,
        /// Payload bytes in all of these.
        used: usize,
    },
}

impl Inbox {
    pub fn new(socket_type: SocketType) -> Inbox {
        match socket_type {
            SocketType::Stream => Inbox::Stream(VecDeque::new()),
            SocketType::Seqpacket => Inbox::Seqpacket {
                whole: VecDeque::new(),
                begun: None,
                used: 0,
            },
        }
    }

    /// Takes the payload of an RW packet.
    pub fn push(&mut self, payload: &[u8], flags: u32) {
        match self {
            Inbox::Stream(bytes) => bytes.extend(payload),
            Inbox::Seqpacket { whole, begun, used } => {
                *used += payload.len();
                let mut bytes = begun.take().unwrap_or_default();
                bytes.extend_from_slice(payload);
                if flags & SEQ_EOM == 0 {
                    *begun = Some(bytes);
                } else {
                    whole.push_back(GuestMessage {
                        bytes,
                        end_of_record: flags & SEQ_EOR != 0,
                    });
                }
            }
        }
    }

    /// Moves bytes of a stream out, as many as there are and fit.
    pub fn read(&mut self, into: &mut [u8]) -> usize {
        let Inbox::Stream(bytes) = self else { return 0 };
        let len = bytes.len().min(into.len());
        let (front, back) = bytes.as_slices();
        let from_front = len.min(front.len());
        into[..from_front].copy_from_slice(&front[..from_front]);
        into[from_front..len].copy_from_slice(&back[..len - from_front]);
        bytes.drain(..len);
        len
    }

    /// Takes the oldest whole message out.
    pub fn take_message(&mut self) -> Option<GuestMessage> {
        let Inbox::Seqpacket { whole, used, .. } = self else {
            return None;
        };
        let message = whole.pop_front()?;
        *used -= message.bytes.len();
        Some(message)
    }

    /// Payload bytes in the queue (Linux: `rx_bytes`): messages without bytes do not count.
    pub fn used(&self) -> usize {
        match self {
            Inbox::Stream(bytes) => bytes.len(),
            Inbox::Seqpacket { used, .. } => *used,
        }
    }

    /// Whether a message has begun and not ended.
    pub fn is_in_message(&self) -> bool {
        matches!(self, Inbox::Seqpacket { begun: Some(_), .. })
    }

    pub fn clear(&mut self) {
        let socket_type = match self {
            Inbox::Stream(_) => SocketType::Stream,
            Inbox::Seqpacket { .. } => SocketType::Seqpacket,
        };
        *self = Inbox::new(socket_type);
    }
}
