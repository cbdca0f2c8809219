//! What sockets of connections are watched for.

use std::io;
use std::os::fd::AsRawFd;

use mio::unix::SourceFd;
use mio::{Interest, Token};
use tracing::warn;

use super::Switchboard;
use crate::device::flow::{HostEnd, Room};
use crate::device::token;
use crate::host::HostStream;
use crate::vsock::{CloseReason, ConnectionId};

impl Switchboard {
    /// One registration for the socket's life, edge-triggered, so that nothing can spin on a socket that is not served for want of
    /// credit or buffers. That a socket has room is of no interest before one has had none ([`Switchboard::await_room`]): a
    /// fresh one would say so at once, and a unix socket whenever its peer has read something.
    pub(super) fn register(&self, stream: &HostStream, id: ConnectionId, room: Room) -> io::Result<()> {
        self.registry.register(
            &mut SourceFd(&stream.as_raw_fd()),
            Token(token::flow(id.slot())),
            interest(room),
        )
    }

    /// The socket has refused bytes: from now on it says when it has room, and at once if it has by now.
    pub(super) fn await_room(&mut self, id: ConnectionId) {
        let Some(flow) = self.flows.get_mut(id) else {
            return;
        };
        let HostEnd::Connected(stream) = &flow.end else {
            return;
        };
        if flow.room == Room::Awaited {
            return;
        }
        flow.room = Room::Awaited;
        let outcome = self.registry.reregister(
            &mut SourceFd(&stream.as_raw_fd()),
            Token(token::flow(id.slot())),
            interest(Room::Awaited),
        );
        if let Err(error) = outcome {
            warn!(guest = %self.name, %error, "cannot watch a socket for room");
            self.muxer.host_failed(id, CloseReason::Error);
        }
    }
}

fn interest(room: Room) -> Interest {
    let reading = Interest::READABLE | Interest::PRIORITY;
    match room {
        Room::Assumed => reading,
        Room::Awaited => reading | Interest::WRITABLE,
    }
}
