//! A small guest vsock stack: connect and listen as in a guest's program, over the embedded driver. Both socket types.
//!
//! # Theory of operation
//!
//! One mutex holds the driver and the protocol; a thread sleeps on the rings' call eventfds and hands packets to
//! the protocol; system calls run in their callers' threads, copy into the transmit ring under the lock and kick, as
//! Linux does since 6.12, and sleep on their connection's condition variable.
//!
//! 1. Data never overtakes control: while a reply waits for the ring, writers wait too.
//! 2. No packet is taken from the ring while as many replies wait as the ring has entries (Linux: `max_rx_reply`), so
//!    a device that takes nothing cannot make us grow.
//! 3. Payload leaves only within the device's credit; received payload beyond ours is dropped and counted.
//! 4. The fragments of a message leave in one piece: of the threads that send on a connection one is in a message.
//! 5. `fwd_cnt` counts what programs have taken, bytes or whole messages; a message that has not ended fills the buffer.

mod listener;
mod protocol;
mod seqpacket;
mod socket;
mod stream;

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};

pub use self::listener::GuestListener;
pub use self::protocol::GuestMessage;
use self::protocol::Protocol;
pub use self::seqpacket::GuestSeqpacket;
pub use self::socket::{Accepted, GuestSocket};
pub use self::stream::GuestStream;
use super::driver::{Driver, RX, TX};
use super::error::{Error, Result};
use super::fd::{EventFd, to_timespec};
use super::shape::Shape;
use super::stats::Stats;
use super::{EmbeddedGuest, FrontEnd};
use crate::vsock::header::MAX_PACKET_PAYLOAD;

/// What the guest's sockets are like.
#[derive(Clone, Debug)]
pub struct SocketOptions {
    /// Receive buffer of each connection in bytes (SO_VM_SOCKETS_BUFFER_SIZE).
    pub buf_alloc: u32,
    /// Largest payload of one packet in bytes.
    pub max_packet: u32,
    /// How data packets lie in memory.
    pub shape: Shape,
    /// How long connect() waits (SO_VM_SOCKETS_CONNECT_TIMEOUT).
    pub connect_timeout: Duration,
    /// Whether the guest also tells its credit whenever a read empties the buffer, as Linux does since 6.7.
    pub update_when_drained: bool,
    /// What a message waits for before its first packet leaves.
    pub message_credit: MessageCredit,
}

/// When the packets of a SEQPACKET message leave.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum MessageCredit {
    /// As far as there is credit, as Linux: a message may stand still in its middle, and its packets end where credit
    /// ended.
    AsItComes,
    /// Not before there is credit for all of it.
    Whole,
}

impl Default for SocketOptions {
    /// Linux 6.12 with default socket options, but CREDIT_UPDATE as sparingly as before 6.7: the harder case for the
    /// device.
    fn default() -> SocketOptions {
        SocketOptions {
            buf_alloc: 256 * 1024,
            max_packet: MAX_PACKET_PAYLOAD,
            shape: Shape::linux_6_12(),
            connect_timeout: Duration::from_secs(2),
            update_when_drained: false,
            message_credit: MessageCredit::AsItComes,
        }
    }
}

/// The guest's vsock layer, running. Dropping it kills the VMM: the connection is closed without a word.
#[derive(Debug)]
pub struct Sockets {
    shared: Arc<Shared>,
    front_end: Mutex<Option<FrontEnd>>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    stack: Mutex<Stack>,
    /// Signalled when the transmit ring has room and no reply waits.
    tx_room: Condvar,
    /// Wakes the thread.
    wake: EventFd,
    options: SocketOptions,
}

#[derive(Debug)]
struct Stack {
    driver: Driver,
    protocol: Protocol,
    /// The thread leaves the receive ring alone.
    rx_held: bool,
    stopping: bool,
}

impl Sockets {
    /// Starts the stack on a booted guest.
    pub fn start(guest: EmbeddedGuest, options: SocketOptions) -> Result<Sockets> {
        let cid = guest.cid();
        let EmbeddedGuest {
            front_end,
            mut driver,
        } = guest;
        let dup = |fd: &EventFd| {
            fd.as_fd()
                .try_clone_to_owned()
                .map_err(Error::io("duplicate an eventfd"))
        };
        let watched = Watched {
            rx: dup(driver.queue(RX).call())?,
            tx: dup(driver.queue(TX).call())?,
            vmm: front_end
                .socket()
                .as_fd()
                .try_clone_to_owned()
                .map_err(Error::io("duplicate the vhost-user socket"))?,
        };
        let features = driver.features();
        let protocol = Protocol::new(cid, features, options.buf_alloc, options.update_when_drained);
        let shared = Arc::new(Shared {
            stack: Mutex::new(Stack {
                driver,
                protocol,
                rx_held: false,
                stopping: false,
            }),
            tx_room: Condvar::new(),
            wake: EventFd::new()?,
            options,
        });
        let thread = std::thread::Builder::new()
            .name("embedded-guest".into())
            .spawn({
                let shared = shared.clone();
                move || shared.run(&watched)
            })
            .map_err(Error::io("start the guest's thread"))?;
        Ok(Sockets {
            shared,
            front_end: Mutex::new(Some(front_end)),
            thread: Some(thread),
        })
    }

    /// Connects to a port of the host.
    pub fn connect(&self, port: u32) -> io::Result<GuestStream> {
        self.connect_to(2, port)
    }

    /// Connects to a port of any CID: 2 is the host, others are sibling guests (in Linux with VMADDR_FLAG_TO_HOST, or
    /// without vhost_vsock in the guest). Fails with `ConnectionReset` when refused and `TimedOut` when not answered, as
    /// in Linux.
    pub fn connect_to(&self, cid: u64, port: u32) -> io::Result<GuestStream> {
        self.connect_as(cid, port)
    }

    /// Connects a SEQPACKET socket to a port of the host. Fails with ESOCKTNOSUPPORT when the device or the VMM does not
    /// know the type.
    pub fn connect_seqpacket(&self, port: u32) -> io::Result<GuestSeqpacket> {
        self.connect_seqpacket_to(2, port)
    }

    /// Connects a SEQPACKET socket to a port of any CID.
    pub fn connect_seqpacket_to(&self, cid: u64, port: u32) -> io::Result<GuestSeqpacket> {
        self.connect_as(cid, port)
    }

    fn connect_as<S: Accepted>(&self, cid: u64, port: u32) -> io::Result<S> {
        GuestSocket::connect(self.shared.clone(), cid, port, S::SOCKET_TYPE).map(S::around)
    }

    /// Listens on a guest port with room for 128 connections that wait to be accepted.
    pub fn listen(&self, port: u32) -> io::Result<GuestListener> {
        self.listen_with_backlog(port, 128)
    }

    /// Listens on a guest port; connections beyond `backlog` are reset.
    pub fn listen_with_backlog(&self, port: u32, backlog: usize) -> io::Result<GuestListener> {
        GuestListener::listen(self.shared.clone(), port, backlog)
    }

    /// Listens on a guest port for SEQPACKET connections, with room for 128 that wait to be accepted.
    pub fn listen_seqpacket(&self, port: u32) -> io::Result<GuestListener<GuestSeqpacket>> {
        GuestListener::listen(self.shared.clone(), port, 128)
    }

    /// What was seen so far. `stats().violations` is empty as long as the device keeps the rules.
    pub fn stats(&self) -> Stats {
        let stack = self.shared.lock();
        let mut stats = stack.driver.stats();
        stats.violations = stats.violations.plus(stack.protocol.violations());
        stats
    }

    /// Connections that are not ended, closed ones that wait for RST included.
    pub fn open_connections(&self) -> usize {
        self.shared.lock().protocol.open()
    }

    /// RSTs that crossed one of ours on the way: legal, but rarely what one wants.
    pub fn crossed_resets(&self) -> u64 {
        self.shared.lock().protocol.crossed_resets()
    }

    /// Stops or resumes taking packets from the receive ring, and so also refilling it: a guest that is stuck.
    pub fn hold_rx(&self, hold: bool) {
        self.shared.lock().rx_held = hold;
        self.shared.wake.signal();
    }

    /// Gives access to the driver under the running stack.
    pub fn with_driver<R>(&self, act: impl FnOnce(&mut Driver) -> R) -> R {
        act(&mut self.shared.lock().driver)
    }

    /// Gives access to the front-end; `None` after [`Sockets::kill`].
    pub fn with_front_end<R>(&self, act: impl FnOnce(Option<&mut FrontEnd>) -> R) -> R {
        act(self
            .front_end
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .as_mut())
    }

    /// Reboots the guest: every connection and listener is gone, the rings start from zero.
    pub fn reboot(&self) -> Result<()> {
        let mut front_end = self.front_end.lock().unwrap_or_else(PoisonError::into_inner);
        let front_end = front_end.as_mut().ok_or(Error::Closed { what: "rebooting" })?;
        let queues = front_end.profile().queues;
        let mut stack = self.shared.lock();
        stack.driver.reset_iommu();
        front_end.stop(queues)?;
        stack.protocol.lose_everything(false);
        stack.driver.reset()?;
        front_end.start(stack.driver.memory(), &stack.driver.rings(queues, &[]))?;
        stack.driver.fill_rx()?;
        drop(stack);
        self.shared.tx_room.notify_all();
        Ok(())
    }

    /// Kills the VMM: the connection is closed without a word, every guest socket fails.
    pub fn kill(&self) {
        let front_end = self
            .front_end
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(front_end) = front_end {
            // The thread still holds a duplicate, which it drops when it sees the end.
            let _ = front_end.socket().shutdown(std::net::Shutdown::Both);
        }
        self.shared.lock().protocol.lose_everything(true);
        self.shared.tx_room.notify_all();
    }

    /// Ends the VMM in an orderly way: rings stopped, then the connection closed.
    pub fn shut_down(mut self) -> Result<()> {
        self.stop_thread();
        let front_end = self
            .front_end
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        match front_end {
            Some(mut front_end) => front_end.stop(front_end.profile().queues).map(drop),
            None => Ok(()),
        }
    }

    fn stop_thread(&mut self) {
        self.shared.lock().stopping = true;
        self.shared.wake.signal();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        self.shared.lock().protocol.lose_everything(true);
        self.shared.tx_room.notify_all();
    }
}

impl Drop for Sockets {
    fn drop(&mut self) {
        self.stop_thread();
    }
}

/// What the thread sleeps on. Duplicates: the originals are behind the lock.
struct Watched {
    rx: OwnedFd,
    tx: OwnedFd,
    vmm: OwnedFd,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Stack> {
        self.stack.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self, watched: &Watched) {
        loop {
            let deadline = {
                let mut stack = self.lock();
                // A killed VMM's guest answers nothing, though the device may not have noticed the end yet.
                if stack.stopping || stack.protocol.is_lost() {
                    return;
                }
                stack.turn(Instant::now());
                if stack.protocol.pending_replies() == 0 {
                    self.tx_room.notify_all();
                }
                if stack.asks_for_interrupts() {
                    continue;
                }
                stack.protocol.next_deadline()
            };
            let hung_up = self.sleep(watched, deadline);
            let mut stack = self.lock();
            for queue in [RX, TX] {
                stack.driver.queue(queue).take_interrupts();
                stack.driver.queue(queue).disable_interrupts();
            }
            self.wake.take();
            if hung_up {
                stack.protocol.lose_everything(true);
                drop(stack);
                self.tx_room.notify_all();
                return;
            }
        }
    }

    /// Sleeps until an interrupt, a wake-up or the deadline; answers whether the back-end hung up.
    fn sleep(&self, watched: &Watched, deadline: Option<Instant>) -> bool {
        let mut polled = [
            PollFd::new(&watched.rx, PollFlags::IN),
            PollFd::new(&watched.tx, PollFlags::IN),
            PollFd::new(&self.wake, PollFlags::IN),
            // Replies on this socket belong to whoever asked; only its end concerns us, and that needs no flag.
            PollFd::new(&watched.vmm, PollFlags::empty()),
        ];
        let timeout = deadline.map(|d| to_timespec(d.saturating_duration_since(Instant::now())));
        let _ = poll(&mut polled, timeout.as_ref());
        polled[3].revents().intersects(PollFlags::HUP | PollFlags::ERR)
    }
}

impl Stack {
    /// One turn: reclaim, answer, take packets, until nothing is left to do.
    fn turn(&mut self, now: Instant) {
        self.protocol.expire(now);
        loop {
            self.driver.reclaim_tx();
            self.flush_replies();
            let limit = usize::from(self.driver.options().queue_size);
            if self.rx_held || self.protocol.pending_replies() >= limit {
                break;
            }
            let Stack { driver, protocol, .. } = self;
            match driver.try_recv_with(|header, payload, _| protocol.handle(&header, payload)) {
                Ok(Some(())) => {}
                // An error could only come from reposting a buffer, which the next turn tries again.
                Ok(None) | Err(_) => break,
            }
        }
        self.flush_replies();
    }

    /// Sends what the protocol has to say, as far as the ring takes it.
    fn flush_replies(&mut self) {
        while let Some(header) = self.protocol.poll_reply() {
            if self.driver.queue_packet(&header, &[], &Shape::single()).is_err() {
                self.protocol.unsend(header);
                break;
            }
        }
        self.driver.notify_tx();
    }

    /// Asks for interrupts before sleeping. Answers whether there is work already.
    fn asks_for_interrupts(&mut self) -> bool {
        let held = self.rx_held;
        // A ring that stands still because replies wait goes on when packets were taken.
        let rx = !held && self.driver.queue(RX).enable_interrupts();
        let tx = self.driver.queue(TX).enable_interrupts();
        let full = self.protocol.pending_replies() >= usize::from(self.driver.options().queue_size);
        tx || (rx && !full)
    }

    /// Sends an RW packet within the credit that was asked for. Nothing has happened when it fails.
    fn send_data(&mut self, id: usize, payload: &[u8], flags: u32, shape: &Shape) -> Result<()> {
        let header = self.protocol.data(id, payload.len(), flags);
        let sent = self.driver.queue_packet(&header, payload, shape);
        if sent.is_err() {
            self.protocol.unsend_data(id, payload.len());
        }
        sent.map(drop)
    }

    /// Whether a writer may put a packet into the ring now.
    fn has_tx_room(&mut self) -> bool {
        if self.driver.tx_room() == 0 {
            self.driver.reclaim_tx();
        }
        self.protocol.pending_replies() == 0 && self.driver.tx_room() > 0
    }
}
