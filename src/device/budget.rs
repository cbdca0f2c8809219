//! How much work a turn of the device may do, so that a flood on one connection is latency for no other.

/// Packets of the guest taken in one turn. A whole ring of Linux (128) and more fits.
pub(super) const TX_PACKETS: usize = 256;

/// Packets given to the guest in one turn.
pub(super) const RX_PACKETS: usize = 512;

/// Payload bytes after which a turn takes no more packets, and likewise gives no more. At its end the guest is told: of credit, of
/// buffers. Half of the window that Linux has (256 KiB, `VIRTIO_VSOCK_DEFAULT_BUF_SIZE` in net/vmw_vsock/af_vsock.c), so that a guest whose
/// window is full is awake again and fills one half while the other is moved, instead of taking turns with us asleep.
pub(super) const TURN_BYTES: usize = 128 * 1024;

/// Turns in a row, if there is enough to do, before the kernel is asked what else is ready: a system call.
pub(super) const TURNS: usize = 4;

/// Bytes read from one connection's socket before the next connection has its turn.
pub(super) const CONNECTION_BYTES: u32 = 128 * 1024;

/// RX chains taken for one read.
pub(super) const CHAINS_PER_READ: usize = 64;

/// Clients, dials and other commands of no session that are dealt with in one turn; the rest wait for the next.
pub(super) const COMMANDS: usize = 256;

/// Commands taken from the channel at once. Those of the session among them are carried out at once; more than this are
/// never before one of them, unless 10,000 clients come in the time of a burst.
pub(super) const INBOX: usize = 10_000;

/// Ready sockets taken from the kernel at once.
pub(super) const EVENTS: usize = 1024;
