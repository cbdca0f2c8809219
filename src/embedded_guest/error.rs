//! What can go wrong on the guest's side of the wire.

use std::io;

/// A failure of the embedded guest. None of these says that the device misbehaved: that is a
/// [`Violation`](super::Violation), which is counted and survived.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A system call failed.
    #[error("{what}")]
    Io {
        /// What was attempted.
        what: &'static str,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The back-end closed the vhost-user connection.
    #[error("the back-end closed the vhost-user connection while {what}")]
    Closed {
        /// What was attempted.
        what: &'static str,
    },
    /// Nothing came within the time given.
    #[error("timed out while {what}")]
    Timeout {
        /// What was waited for.
        what: &'static str,
    },
    /// The back-end's answer is not what the vhost-user specification asks for.
    #[error("unexpected vhost-user reply: {what}")]
    Protocol {
        /// What was seen and what was expected.
        what: String,
    },
    /// The back-end answered a NEED_REPLY message with an error.
    #[error("the back-end refused {} with {value}", super::message::name(*request))]
    Refused {
        /// The request's number.
        request: u32,
        /// The non-zero answer.
        value: u64,
    },
    /// An address range that no region of the guest's memory holds.
    #[error("no memory region holds {len} bytes at {gpa:#x}")]
    Address {
        /// Guest physical address.
        gpa: u64,
        /// Length in bytes.
        len: usize,
    },
    /// The queue has too few free descriptors or buffers; reclaim used ones and try again.
    #[error("the queue is full")]
    RingFull,
    /// A packet or chain that does not fit the driver's buffers.
    #[error("{len} bytes do not fit a transmit buffer of {max}")]
    TooLong {
        /// What was asked for, in bytes.
        len: usize,
        /// What fits, in bytes.
        max: usize,
    },
}

impl Error {
    pub(super) fn io(what: &'static str) -> impl FnOnce(io::Error) -> Error {
        move |source| Error::Io { what, source }
    }

    pub(super) fn errno(what: &'static str) -> impl FnOnce(rustix::io::Errno) -> Error {
        move |errno| Error::Io {
            what,
            source: errno.into(),
        }
    }

    /// Whether this is [`Error::Timeout`].
    pub fn is_timeout(&self) -> bool {
        matches!(self, Error::Timeout { .. })
    }
}

impl From<Error> for io::Error {
    fn from(error: Error) -> io::Error {
        let kind = match &error {
            Error::Io { source, .. } => source.kind(),
            Error::Closed { .. } => io::ErrorKind::BrokenPipe,
            Error::Timeout { .. } => io::ErrorKind::TimedOut,
            Error::RingFull => io::ErrorKind::WouldBlock,
            Error::Protocol { .. } | Error::Refused { .. } => io::ErrorKind::InvalidData,
            Error::Address { .. } | Error::TooLong { .. } => io::ErrorKind::InvalidInput,
        };
        io::Error::new(kind, error)
    }
}

/// Result of the embedded guest.
pub type Result<T> = std::result::Result<T, Error>;
