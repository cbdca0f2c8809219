//! System calls: what a program in the guest asks of its sockets.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar};
use std::time::Instant;

use super::{CLOSE_TIMEOUT, Ended, Listener, Protocol, Readable, State, Tuple, Writable};
use crate::vsock::header::{Cid, Header, MAX_PACKET_PAYLOAD, Op, Port, ShutdownFlags};

impl Protocol {
    /// connect(): sends REQUEST. See [`Protocol::connected`] for the outcome.
    pub fn connect(&mut self, cid: u64, port: u32) -> io::Result<usize> {
        if self.lost {
            return Err(io::ErrorKind::NetworkDown.into());
        }
        self.next_port = self.next_port.wrapping_add(1).max(1024);
        let tuple = Tuple {
            peer_cid: Cid(cid),
            peer_port: Port(port),
            local_port: Port(self.next_port),
        };
        let id = self.insert(tuple, State::Connecting);
        self.reply_on(id, Op::Request, ShutdownFlags::NONE);
        Ok(id)
    }

    /// The outcome of connect(), if there is one.
    pub fn connected(&self, id: usize) -> Option<io::Result<()>> {
        let c = &self.connections[id];
        match (c.error, c.state) {
            (Some(error), _) => Some(Err(error.into())),
            (None, State::Connecting) => None,
            (None, _) => Some(Ok(())),
        }
    }

    /// connect() ran into its timeout: the socket is forgotten without a packet.
    pub fn give_up(&mut self, id: usize) {
        self.connections[id].owned = false;
        self.unhash(id, Ended::GaveUp);
        self.connections.remove(id);
    }

    /// listen(). A second listener on a port is refused.
    pub fn listen(&mut self, port: u32, backlog: usize, changed: Arc<Condvar>) -> io::Result<()> {
        if self.listeners.contains_key(&Port(port)) {
            return Err(io::ErrorKind::AddrInUse.into());
        }
        self.listeners.insert(
            Port(port),
            Listener {
                backlog,
                accepted: VecDeque::new(),
                changed,
            },
        );
        Ok(())
    }

    /// accept(): the oldest connection that waits; an error once the listener is gone.
    pub fn accept(&mut self, port: u32, changed: &Arc<Condvar>) -> io::Result<Option<usize>> {
        let listener = self
            .listeners
            .get_mut(&Port(port))
            .filter(|l| Arc::ptr_eq(&l.changed, changed));
        Ok(listener.ok_or(io::ErrorKind::NotConnected)?.accepted.pop_front())
    }

    /// close() of a listener: what was not accepted is reset.
    pub fn close_listener(&mut self, port: u32, changed: &Arc<Condvar>) {
        // After a reboot the port may be another listener's.
        if self
            .listeners
            .get(&Port(port))
            .is_none_or(|l| !Arc::ptr_eq(&l.changed, changed))
        {
            return;
        }
        let Some(listener) = self.listeners.remove(&Port(port)) else {
            return;
        };
        listener.changed.notify_all();
        for id in listener.accepted {
            self.connections[id].owned = false;
            if self.connections[id].hashed {
                self.reply_on(id, Op::Rst, ShutdownFlags::NONE);
                self.unhash(id, Ended::Reset);
            }
            self.connections.remove(id);
        }
    }

    /// recv(): takes bytes out and tells the device when it may need to know.
    pub fn read(&mut self, id: usize, into: &mut [u8]) -> Readable {
        let c = &mut self.connections[id];
        let len = c.unread.len().min(into.len());
        if len > 0 {
            let (front, back) = c.unread.as_slices();
            let from_front = len.min(front.len());
            into[..from_front].copy_from_slice(&front[..from_front]);
            into[from_front..len].copy_from_slice(&back[..len - from_front]);
            c.unread.drain(..len);
            self.consumed(id, len as u32);
            return Readable::Bytes(len);
        }
        let ended = c.state == State::Done
            || c.peer_shutdown.contains(ShutdownFlags::SEND)
            || c.our_shutdown.contains(ShutdownFlags::RCV);
        if ended || into.is_empty() {
            Readable::Eof
        } else {
            Readable::Nothing
        }
    }

    /// virtio_transport_stream_do_dequeue: CREDIT_UPDATE when the device believes that less than a full packet fits.
    fn consumed(&mut self, id: usize, len: u32) {
        let c = &mut self.connections[id];
        c.fwd_cnt = c.fwd_cnt.wrapping_add(len);
        let untold = c.fwd_cnt.wrapping_sub(c.last_fwd_cnt);
        let believed_free = c.buf_alloc.saturating_sub(untold);
        let drained = self.update_when_drained && c.unread.is_empty();
        if c.state == State::Established && (believed_free < MAX_PACKET_PAYLOAD || drained) {
            self.reply_on(id, Op::CreditUpdate, ShutdownFlags::NONE);
        }
    }

    /// send(): how many bytes the device's credit allows now.
    pub fn writable(&self, id: usize) -> Writable {
        let c = &self.connections[id];
        if c.state == State::Done
            || c.our_shutdown.contains(ShutdownFlags::SEND)
            || c.peer_shutdown.contains(ShutdownFlags::RCV)
        {
            return Writable::Broken;
        }
        match c.room() {
            0 => Writable::Nothing,
            room => Writable::Room(room as usize),
        }
    }

    /// The header of an RW packet of `len` bytes, which is accounted for. The packet must be sent at once.
    pub fn data(&mut self, id: usize, len: usize) -> Header {
        let c = &mut self.connections[id];
        c.tx_cnt = c.tx_cnt.wrapping_add(len as u32);
        Header {
            len: len as u32,
            ..self.header(id, Op::Rw, ShutdownFlags::NONE)
        }
    }

    /// Takes back the accounting of a packet that did not fit the ring.
    pub fn unsend_data(&mut self, id: usize, len: usize) {
        let c = &mut self.connections[id];
        c.tx_cnt = c.tx_cnt.wrapping_sub(len as u32);
    }

    /// shutdown().
    pub fn shutdown(&mut self, id: usize, flags: ShutdownFlags) {
        let c = &mut self.connections[id];
        if c.our_shutdown.contains(flags) || c.state != State::Established {
            return;
        }
        c.our_shutdown = c.our_shutdown.with(flags);
        c.changed.notify_all();
        self.reply_on(id, Op::Shutdown, flags);
    }

    /// close() (virtio_transport_close): SHUTDOWN of both directions, then RST is awaited for eight seconds; or RST at
    /// once when the device has already shut both down.
    pub fn close(&mut self, now: Instant, id: usize) {
        let c = &mut self.connections[id];
        c.owned = false;
        match c.state {
            State::Done => {
                self.connections.remove(id);
            }
            State::Connecting => {
                self.reply_on(id, Op::Rst, ShutdownFlags::NONE);
                self.unhash(id, Ended::Reset);
                self.connections.remove(id);
            }
            State::Established if c.peer_shutdown == ShutdownFlags::BOTH => {
                self.reply_on(id, Op::Rst, ShutdownFlags::NONE);
                self.unhash(id, Ended::Confirmed);
                self.connections.remove(id);
            }
            State::Established => {
                c.close_deadline = Some(now + CLOSE_TIMEOUT);
                c.unread.clear();
                self.shutdown(id, ShutdownFlags::BOTH);
            }
        }
    }

    /// RST without a word before it, as SO_LINGER with zero or a crash would give.
    pub fn abort(&mut self, id: usize) {
        let c = &mut self.connections[id];
        if c.state != State::Done {
            self.reply_on(id, Op::Rst, ShutdownFlags::NONE);
            self.finish(id, Ended::Reset);
        }
    }
}
