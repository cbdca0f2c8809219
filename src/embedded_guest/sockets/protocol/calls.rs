//! System calls: what a program in the guest asks of its sockets.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar};
use std::time::Instant;

use rustix::io::Errno;

use super::{CLOSE_TIMEOUT, Ended, Listener, Protocol, Readable, Received, State, Tuple, Writable};
use crate::vsock::header::{Cid, Header, MAX_PACKET_PAYLOAD, Op, Port, ShutdownFlags, SocketType};

impl Protocol {
    /// connect(): sends REQUEST. See [`Protocol::connected`] for the outcome.
    pub fn connect(&mut self, cid: u64, port: u32, socket_type: SocketType) -> io::Result<usize> {
        if self.lost {
            return Err(io::ErrorKind::NetworkDown.into());
        }
        if !self.carries(socket_type) {
            return Err(Errno::SOCKTNOSUPPORT.into());
        }
        self.next_port = self.next_port.wrapping_add(1).max(1024);
        let tuple = Tuple {
            peer_cid: Cid(cid),
            peer_port: Port(port),
            local_port: Port(self.next_port),
        };
        let id = self.insert(tuple, socket_type, State::Connecting);
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

    /// listen(). A second listener on a port is refused, also one of the other type: ports are bound for both.
    pub fn listen(
        &mut self,
        port: u32,
        socket_type: SocketType,
        backlog: usize,
        changed: Arc<Condvar>,
    ) -> io::Result<()> {
        if self.listeners.contains_key(&Port(port)) {
            return Err(io::ErrorKind::AddrInUse.into());
        }
        self.listeners.insert(
            Port(port),
            Listener {
                socket_type,
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

    /// recv() of a stream: takes bytes out and tells the device when it may need to know.
    pub fn read(&mut self, id: usize, into: &mut [u8]) -> Readable {
        let len = self.connections[id].unread.read(into);
        if len > 0 {
            self.consumed(id, len as u32);
            return Readable::Bytes(len);
        }
        if self.has_ended(id) || into.is_empty() {
            Readable::Eof
        } else {
            Readable::Nothing
        }
    }

    /// recv() of a SEQPACKET socket: takes a message out. A buffer that is too short would cut it; ours never is.
    pub fn recv(&mut self, id: usize) -> Received {
        if let Some(message) = self.connections[id].unread.take_message() {
            self.consumed(id, message.bytes.len() as u32);
            return Received::Message(message);
        }
        if self.has_ended(id) {
            Received::Eof
        } else {
            Received::Nothing
        }
    }

    /// Whether what is in the receive queue is all there will ever be.
    fn has_ended(&self, id: usize) -> bool {
        let c = &self.connections[id];
        c.state == State::Done
            || c.peer_shutdown.contains(ShutdownFlags::SEND)
            || c.our_shutdown.contains(ShutdownFlags::RCV)
    }

    /// CREDIT_UPDATE when the device believes that less than a full packet fits (virtio_transport_stream_do_dequeue),
    /// or behind every message (virtio_transport_seqpacket_do_dequeue).
    fn consumed(&mut self, id: usize, len: u32) {
        let c = &mut self.connections[id];
        c.fwd_cnt = c.fwd_cnt.wrapping_add(len);
        let untold = c.fwd_cnt.wrapping_sub(c.last_fwd_cnt);
        let believed_free = c.buf_alloc.saturating_sub(untold);
        let drained = self.update_when_drained && c.unread.used() == 0;
        let message = c.socket_type == SocketType::Seqpacket;
        if c.state == State::Established && (believed_free < MAX_PACKET_PAYLOAD || drained || message) {
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

    /// Begins a message; false while another thread is in the middle of one. [`Protocol::end_message`] ends it.
    pub fn begin_message(&mut self, id: usize) -> bool {
        !std::mem::replace(&mut self.connections[id].in_message, true)
    }

    /// Ends a message, sent to its end or not, and wakes those who wait for their turn.
    pub fn end_message(&mut self, id: usize) {
        let c = &mut self.connections[id];
        c.in_message = false;
        c.changed.notify_all();
    }

    /// send() of a SEQPACKET socket: how much of the `left` bytes of a message may be sent now. EMSGSIZE when they
    /// can never be received (virtio_transport_seqpacket_enqueue).
    pub fn message_room(&self, id: usize, left: usize) -> io::Result<usize> {
        match self.writable(id) {
            Writable::Broken => Err(io::ErrorKind::BrokenPipe.into()),
            _ if left > self.connections[id].peer_buf_alloc as usize => Err(Errno::MSGSIZE.into()),
            Writable::Room(room) => Ok(room),
            Writable::Nothing => Ok(0),
        }
    }

    /// The header of an RW packet of `len` bytes, which is accounted for. The packet must be sent at once. `flags` are
    /// [`SEQ_EOM`](super::SEQ_EOM) and [`SEQ_EOR`](super::SEQ_EOR).
    pub fn data(&mut self, id: usize, len: usize, flags: u32) -> Header {
        let c = &mut self.connections[id];
        c.tx_cnt = c.tx_cnt.wrapping_add(len as u32);
        Header {
            len: len as u32,
            flags,
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
