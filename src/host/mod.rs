//! Host sockets: reaching targets, accepting clients, and the one type that both end in. Knows nothing of guests.
//!
//! # Theory of operation
//!
//! Two kinds of thread meet here (`docs/adr/0005-dial-and-accept-on-the-control-runtime.md` has the reasons).
//!
//! The **control runtime** is tokio's current-thread runtime on the program's main thread. What needs futures and timers
//! runs there: name look-ups, dials that have to wait, accept loops, the CONNECT line. Its work ends with a [`HostStream`]
//! that is connected, non-blocking and in nobody's poller, and with one call of a callback that takes it away.
//!
//! A guest's **device thread** has no runtime. It puts the stream into its own poller, edge-triggered, for the stream's life, and
//! from then on is the only one to touch it.
//!
//! ```text
//!  device thread                      control runtime                        system
//!  Dialer::dial ── unix, loopback ──────────────────────────────────────────▶ connect
//!     ◀── Dial::Ended(DialResult, took) ────────────────────────────────────────╯
//!     │  ╰── name, slow, several ──▶ Names::lookup ─────────────────────────▶ getaddrinfo (blocking pool)
//!     │                              connect::race ◀── epoll ───────────────▶ connect …
//!     │  ╰── AF_VSOCK ─────────────▶ af_vsock::connect ◀── epoll ───────────▶ connect
//!     ◀── done(DialResult, took) ────────╯
//!                                    Listener::serve ◀── epoll ─────────────▶ accept
//!     ◀── sink(Ok(Incoming)) ────────────┤ plain: at once
//!     ◀──────────────────────────────────╯ connect: when the line is whole
//!  HostStream: read, writev, shutdown, abort; SpillBuf for what it does not take
//!              send_packet, receive_packet of a SOCK_SEQPACKET
//! ```
//!
//! Dialing on the spot is no exception to the rule that the device thread waits for nothing: a non-blocking `connect` to a
//! unix socket has its answer at once, and over loopback the handshake is over before the call returns. Its outcome is the call's
//! own, and no callback's (`docs/adr/0012-what-a-short-connection-costs.md`).
//!
//! # Invariants
//!
//! 1. Spilled bytes never exceed `buf_alloc`, neither as content nor as memory; an empty [`SpillBuf`] has none.
//! 2. A [`HostStream`] has one owner and is in at most one poller. Who drops it closes it; nobody else holds its descriptor.
//! 3. A dial has one outcome: either [`dial::Dial::Ended`] has it, or `done` is called exactly once if the [`dial::DialTask`] lives
//!    on, and within the dial's timeout (plus what the control runtime is late). Dropping the task closes every socket of the dial.
//! 4. A name has at most one look-up under way, and all names together [`resolve::MAX_LOOKUPS`]. Numeric addresses are never
//!    looked up.
//! 5. Only names of the configuration are looked up, and only ports of a rule's range are dialled: a guest chooses among what
//!    the YAML says, never beside it.
//! 6. A client reaches the sink once, as [`listen::Incoming`] or as [`listen::Rejected`], or it was closed because the
//!    listener was stopped. A rejected client is told nothing.
//! 7. No byte that a client sent after its CONNECT line is lost: it is in the preface or still in the socket, in this order.
//! 8. An accept loop ends when it is told to stop, never by an error of accept.
//! 9. A live unix socket is never taken from its owner, and what is no socket is never deleted (`sys::unix_socket`).
//! 10. A dial whose rule has a greeting (the PROXY header) ends when the socket has taken all of it: no byte of the guest can
//!     come before or into it, because the guest is told of its connection after that. On a packet socket it is one packet.
//! 11. A packet socket gives and takes whole messages, empty ones included, and never cuts or joins them: one that is longer
//!     than asked for is told of and gone, one that does not fit is not sent at all.
//!
//! # What a stranger can grow, and what bounds it
//!
//! | what | who grows it | bound |
//! |---|---|---|
//! | dials under way | guest | `limits.connections`: the device counts a dial as a connection |
//! | sockets of a dial | resolver's answers | one every 250 ms until `connectTimeout`: 6 with 1.5 s; each from the pool of descriptors |
//! | look-ups, their threads | guest, slow resolver | invariant 4; dials that wait for one hold a receiver each |
//! | names kept | configuration | one entry a name; those older than [`resolve::KEEP`] go with the next look-up |
//! | clients in the kernel's queue | clients | backlog of 1024, or net.core.somaxconn |
//! | clients without a line | clients | [`listen::MAX_HANDSHAKES`] a listener, `handshake_timeout` each |
//! | bytes before the newline | clients | [`listen::MAX_LINE`] |
//! | preface | clients | 1 KiB a client, then the socket's own buffer |
//! | clients that wait for the guest | clients | `limits.connections` and `guestTimeout`, in the device |
//! | bytes a socket does not take | guest, stalled peer | invariant 1 |
//! | a message that is received | peer | the `most` of the caller, one buffer a thread |
#![forbid(unsafe_code)]

mod af_vsock;
mod connect;
pub mod dial;
pub mod handshake;
pub mod listen;
pub mod proxy_protocol;
pub mod resolve;
mod spill;
mod stream;

pub use spill::{Flush, SpillBuf, SpillFull};
pub use stream::{HostStream, Packet, Transport};
