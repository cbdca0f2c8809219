//! Who is owed an RX buffer of the guest, in a fair order.
//!
//! Three lists: resets for flows that do not exist, replies, data. Replies go before data, connections take turns.
//! A connection is in each list at most once. Entries may outlive their connection: they are checked against the map
//! of connections, which is the truth, when they are taken. A guest that opens and resets in a loop and posts no
//! buffer would add such entries for ever, so they are swept out when they outnumber the living
//! ([`Backlog::sweep`]). Resets for unknown flows are bounded by [`Backlog::MAX_STRAYS`].

use std::collections::VecDeque;

use super::header::Header;
use super::{ConnectionId, ConnectionKey};

/// The waiting lists.
#[derive(Default, Debug)]
pub(super) struct Backlog {
    strays: VecDeque<Header>,
    replies: VecDeque<ConnectionId>,
    data: VecDeque<ConnectionId>,
}

impl Backlog {
    /// Resets for unknown flows that may wait at once. Linux stops taking packets of the other side at about one
    /// ring's worth of them (`queued_replies`, net/vmw_vsock/virtio_transport.c); we allow the largest ring.
    pub(super) const MAX_STRAYS: usize = 1024;

    pub(super) fn has_room_for_stray(&self) -> bool {
        self.strays.len() < Self::MAX_STRAYS
    }

    /// Adds a reset for a flow that does not exist. Beyond the bound it is dropped; callers ask
    /// [`Backlog::has_room_for_stray`] before they take a packet.
    pub(super) fn push_stray(&mut self, header: Header) {
        if self.has_room_for_stray() {
            self.strays.push_back(header);
        }
    }

    /// Forgets resets for a flow that begins now: they are of the past, and would kill it.
    pub(super) fn forget_strays_of(&mut self, key: &ConnectionKey) {
        self.strays.retain(|rst| {
            (rst.dst_port, rst.src_cid, rst.src_port) != (key.guest_port, key.peer_cid, key.peer_port)
        });
    }

    pub(super) fn push_reply(&mut self, id: ConnectionId) {
        self.replies.push_back(id);
    }

    pub(super) fn push_data(&mut self, id: ConnectionId) {
        self.data.push_back(id);
    }

    pub(super) fn pop_stray(&mut self) -> Option<Header> {
        self.strays.pop_front()
    }

    pub(super) fn pop_reply(&mut self) -> Option<ConnectionId> {
        self.replies.pop_front()
    }

    pub(super) fn pop_data(&mut self) -> Option<ConnectionId> {
        self.data.pop_front()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.strays.is_empty() && self.replies.is_empty() && self.data.is_empty()
    }

    /// Forgets connections that are gone, of which `live` are left, once there are enough of them to pay for the
    /// walk: the lists never hold more than a few entries for each connection there may be.
    pub(super) fn sweep(&mut self, live: usize, is_live: impl Fn(ConnectionId) -> bool) {
        const SLACK: usize = 64;
        if live == 0 {
            self.replies.clear();
            self.data.clear();
        } else if self.replies.len() + self.data.len() > 4 * live + SLACK {
            self.replies.retain(|id| is_live(*id));
            self.data.retain(|id| is_live(*id));
        }
    }

    /// Forgets everything that is owed.
    pub(super) fn clear(&mut self) {
        self.strays.clear();
        self.replies.clear();
        self.data.clear();
    }

    /// Of resets, replies and data.
    pub(super) fn lengths(&self) -> (usize, usize, usize) {
        (self.strays.len(), self.replies.len(), self.data.len())
    }
}
