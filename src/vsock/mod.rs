//! The law: what the packets of virtio-vsock mean, for all connections of one guest (virtio 1.2, section 5.10).
//!
//! Sans-IO: no sockets, no rings, no clock, no metrics. Input comes as values and with the time, output is polled
//! ([`Muxer`]). Everything here could be run on paper, and the tests do.
//!
//! # Words
//!
//! Ring words `rx` and `tx` are the driver's, because the standard fixed them; here, endpoint words *send* (to the
//! guest) and *receive* (from the guest) are ours. Header fields keep their names, `buf_alloc` and `fwd_cnt`, and
//! credit keeps Linux's: `tx_cnt`, `peer_buf_alloc`, `peer_fwd_cnt`, `last_fwd_cnt`.
//!
//! # A connection's life
//!
//! ```text
//!   guest: REQUEST                          connect(): REQUEST owed
//!        |                                        |
//!     Dialing --refused, 1.5 s--> Dead         Requested --RST, 5 s--> gone
//!        | connected(): RESPONSE owed             | RESPONSE
//!        +----------------> Established <---------+
//!                            |     |     |
//!     guest SHUTDOWN of both |     |     | both directions finished, one after the other
//!                            v     |     v
//!                       Draining   |   Closing: SHUTDOWN(both) owed, 8 s for the guest's RST
//!     host end took all      |     |     |
//!                            v     v     v
//!                          Dead: RST owed, then gone
//! ```
//!
//! Half-close works in both directions. The guest's SHUTDOWN(SEND) is passed on ([`Event::ShutdownHost`]) when the
//! host end has taken everything sent before it. End of file of the host end becomes SHUTDOWN(SEND) and nothing else.
//! A host end that takes no more (EPIPE) becomes SHUTDOWN(RCV); what it still has to say is still said.
//!
//! A guest that closes (SHUTDOWN of both) gets its RST when the host end has taken everything; until then the
//! connection is Draining and counts against the limit. If the guest loses patience and sends RST, its bytes are
//! delivered all the same.
//!
//! A client may wait for its guest ([`Muxer::connect_waiting`]): the guest's RST then means "not yet", and REQUEST is owed
//! again after a pause. The connection keeps its name and its ports, which the guest has forgotten with its RST, and stays
//! Requested all the while, so nothing is read from the client. A reset of the rings begins the request anew. The end is
//! that of any request, or `guest_timeout`, which the pauses do not move.
//!
//! # Credit
//!
//! `buf_alloc` is a promise: a guest may have so many bytes under way, and so the buffer behind a host socket that
//! stalls never needs to hold more. `fwd_cnt` advances only for bytes that the host socket took
//! ([`Muxer::host_wrote`]), so a slow service slows its guest. Towards the guest, Linux drops silently what exceeds
//! its credit; a stream with a hole is worse than a stall, so room is computed with signed arithmetic and clamped.
//!
//! # Deadlines
//!
//! | state | armed by | time | then |
//! |---|---|---|---|
//! | Dialing | REQUEST | `connect_timeout` | refused, RST |
//! | Requested | connect() | `guest_timeout` | refused, RST if REQUEST went out |
//! | Requested, waiting | the guest's RST | 50 ms, doubling to 500 ms | REQUEST again |
//! | Established | any byte | `idle_timeout`, if not zero | RST |
//! | Draining | any byte taken | 30 s | host end aborted |
//! | Closing | SHUTDOWN(both) | 8 s | RST |
//!
//! # Invariants
//!
//! 1. Bytes that the host end has not taken never exceed `buf_alloc` (credit refuses more before it is accepted).
//! 2. Bytes under way to the guest never exceed what its last header allows.
//! 3. An RST is never answered with an RST.
//! 4. Replies owed are a set: each kind is owed at most once for a connection, however many requests come.
//! 5. Every packet of a connection carries its valid `buf_alloc` and `fwd_cnt`.
//! 6. Memory is bounded: `max_connections` connections, 1024 (`Backlog::MAX_STRAYS`) resets for unknown flows. When
//!    those wait because the guest posts no buffers, its packets wait in its ring ([`Muxer::accepts_input`]).
//! 7. A guest's fault is a [`Misbehavior`]: it costs that connection and a count; never an error, never a panic.
//! 8. Every connection that caused [`Event::Dial`] or came from [`Muxer::connect`] ends with exactly one
//!    [`Event::Refused`] or [`Event::Closed`].
//! 9. A name ([`ConnectionId`]) is never reused; its slot may be, once its connection is gone.
//! 10. A request that waits is sent again at most once for each RST that answers it, and not before its pause is over.
//!
//! # SEQPACKET
//!
//! A connection of type SEQPACKET has the states, the credit and the deadlines of a stream; what differs is that its bytes are
//! messages, whose ends the flags of RW packets mark ([`Boundary`]). The law counts bytes and passes boundaries on, it holds no
//! message: the caller keeps what the guest has said until the message is whole, within the credit that was promised. So
//! no message can be longer than `buf_alloc`, and one that fills it without an end is a [`Misbehavior`]. Towards the guest the
//! caller asks [`Connection::longest_message`] before it begins a message: with the credit of Linux, which is given back when
//! an application takes a whole message, one that is longer would stop half-way for ever.
//!
//! Which types there are is negotiated ([`Muxer::set_types`]); without word of it, streams only.

#![forbid(unsafe_code)]

mod backlog;
mod connection;
pub mod credit;
pub mod header;
pub mod misbehavior;
mod muxer;
pub mod reason;
mod timer;

#[cfg(test)]
mod tests;

pub use connection::{Connection, ConnectionKey, Origin, State};
pub use header::{Boundary, Cid, HEADER_LEN, Header, Op, Port, ShutdownFlags, SocketType};
pub use misbehavior::Misbehavior;
pub use muxer::{
    Caller, ConnectionId, Disposition, Event, ListLengths, Muxer, MuxerConfig, Outgoing, SocketTypes,
};
pub use reason::{CloseReason, RefuseReason};
