//! Split virtqueues.

use std::os::fd::OwnedFd;

/// All that a ring needs to run; handed over by the session by move.
#[derive(Debug)]
pub struct RingParts {
    /// Entries; a power of two up to 1024.
    pub size: u16,
    /// Address of the descriptor table (guest-physical, or an IOVA once translation is on).
    pub desc: u64,
    /// Address of the driver area (available ring).
    pub avail: u64,
    /// Address of the device area (used ring).
    pub used: u64,
    /// Where to go on.
    pub position: RingPosition,
    /// Whether VIRTIO_F_EVENT_IDX was negotiated.
    pub event_idx: bool,
    /// Signalled by the guest.
    pub kick: OwnedFd,
    /// Signalled by us.
    pub call: Option<OwnedFd>,
}

/// Where a ring stands: free-running indices that wrap at 2^16.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct RingPosition {
    /// Next entry of the available ring to take.
    pub next_avail: u16,
    /// Next entry of the used ring to write.
    pub next_used: u16,
}
