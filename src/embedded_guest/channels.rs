//! The two channels of a session, shared by whoever speaks for the VMM: its main loop, the guest's vCPUs whose unmapping
//! waits for an INVALIDATE, the thread that answers misses.
//!
//! # Theory of operation
//!
//! QEMU is one thread as far as a vhost-user device is concerned: one exchange at a time on the main channel. Here that is
//! the *turn*, a lock around a message and its answer. Who has the turn may also read the back-end's channel, nobody else.
//! A miss is answered (a) by a thread that takes a turn for it, as QEMU's main loop between two messages, or (b), if
//! nesting is on, by whoever waits for an answer at that moment, as QEMU 7.2's `vhost_user_read` does in its nested main
//! loop: the UPDATE goes out although the answer to the message before is outstanding.
//!
//! 1. Answers come in the order of messages; nested ones are read behind the one that was waited for.
//! 2. A miss is looked up within a turn, so an UPDATE and the INVALIDATE that takes it back are sent in the order in which
//!    the table changed.

use std::fmt;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::error::{Error, Result};
use super::fd::wait_readable;
use super::iommu::{Iommu, Lookup, READ, Translation, WRITE};
use super::message::{self, Message, NEED_REPLY, request};
use super::misses::{Answer, INVALIDATE, Miss, Outcome, Policy, SeenMiss, UPDATE, Unrelated};
use super::wire::{recv_message, send_message};

/// How long a reply may take before the front-end gives up. QEMU would wait for ever.
pub(super) const REPLY_TIMEOUT: Duration = Duration::from_secs(10);

/// Main channel and back-end channel of one session.
#[derive(Debug)]
pub(super) struct Channels {
    main: UnixStream,
    /// Our end of the back-end's request channel, once SET_BACKEND_REQ_FD was sent.
    backend: Mutex<Option<Arc<UnixStream>>>,
    turn: Mutex<Turn>,
    seen: Mutex<Vec<SeenMiss>>,
    /// Signalled with every change of `seen`.
    changed: Condvar,
}

/// The right to exchange messages, and what only its holder may touch.
#[derive(Debug, Default)]
pub(super) struct Turn {
    server: Option<Server>,
    /// Misses that wait: places in `seen`.
    held: Vec<usize>,
    /// Misses of pages that are on the move.
    moving: Vec<usize>,
}

/// How misses are answered.
pub(super) struct Server {
    pub iommu: Arc<Iommu>,
    pub policy: Policy,
    /// Whether they are answered by whoever waits for an answer, too.
    pub nested: bool,
    /// Whether an UPDATE tells what the guest mapped the page for. QEMU always says read and write.
    pub exact_permission: bool,
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Server")
            .field("nested", &self.nested)
            .field("exact_permission", &self.exact_permission)
            .finish_non_exhaustive()
    }
}

/// An answer that is still to come on the main channel.
enum Owed {
    /// To something that has nothing to do with misses.
    Unrelated(u32),
    /// To the UPDATE for a miss.
    Update { place: usize, reply: bool },
}

impl Channels {
    pub(super) fn new(main: UnixStream) -> Channels {
        Channels {
            main,
            backend: Mutex::new(None),
            turn: Mutex::default(),
            seen: Mutex::default(),
            changed: Condvar::new(),
        }
    }

    /// The main channel.
    pub(super) fn main(&self) -> &UnixStream {
        &self.main
    }

    /// The back-end's channel.
    pub(super) fn backend(&self) -> Option<Arc<UnixStream>> {
        lock(&self.backend).clone()
    }

    pub(super) fn set_backend(&self, ours: UnixStream) {
        *lock(&self.backend) = Some(Arc::new(ours));
    }

    /// Ends the session without a word.
    pub(super) fn hang_up(&self) {
        let _ = self.main.shutdown(std::net::Shutdown::Both);
        if let Some(backend) = self.backend() {
            let _ = backend.shutdown(std::net::Shutdown::Both);
        }
    }

    // ---- the main channel ----------------------------------------------------------------------------------------

    /// Waits for a turn.
    pub(super) fn turn(&self) -> MutexGuard<'_, Turn> {
        lock(&self.turn)
    }

    /// Sends a message and waits for its answer.
    pub(super) fn exchange(
        &self,
        turn: &mut Turn,
        number: u32,
        flags: u32,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<Message> {
        send_message(&self.main, number, flags, payload, fds)?;
        self.answer_to(turn, number)
    }

    /// Sends INVALIDATE and waits until the back-end no longer uses the range. As in QEMU the fields that mean nothing in
    /// an INVALIDATE hold garbage.
    pub(super) fn invalidate(&self, turn: &mut Turn, iova: u64, size: u64) -> Result<()> {
        let payload = message::iotlb(iova, size, 0x55be_206a_2a20, 64, INVALIDATE);
        accepted(self.exchange(turn, request::IOTLB_MSG, NEED_REPLY, &payload, &[])?)
    }

    /// Sends UPDATE and waits until the back-end has taken it in.
    pub(super) fn update(&self, turn: &mut Turn, translation: &Translation) -> Result<()> {
        let payload = update_payload(turn, translation);
        accepted(self.exchange(turn, request::IOTLB_MSG, NEED_REPLY, &payload, &[])?)
    }

    /// The answer to the message that was sent last. Misses are answered meanwhile if nesting is on.
    fn answer_to(&self, turn: &mut Turn, number: u32) -> Result<Message> {
        let deadline = Instant::now() + REPLY_TIMEOUT;
        let mut owed = Vec::new();
        let nested = turn.server.as_ref().is_some_and(|server| server.nested);
        let mut backend = if nested { self.backend() } else { None };
        while let Some(channel) = backend.clone() {
            if !wait_readable(&[self.main.as_fd(), channel.as_fd()], Some(deadline))?
                || is_readable(&self.main)?
            {
                break;
            }
            match recv_message(&channel, REPLY_TIMEOUT) {
                Ok(asked) => owed.extend(self.begin(turn, &asked)?),
                // The end of the session comes on the main channel.
                Err(_) => backend = None,
            }
        }
        let answer = self.receive(number)?;
        self.settle(turn, owed)?;
        Ok(answer)
    }

    fn receive(&self, number: u32) -> Result<Message> {
        let reply = recv_message(&self.main, REPLY_TIMEOUT)?;
        if reply.request != number || reply.flags & (message::REPLY | 3) != message::REPLY | message::VERSION
        {
            return Err(Error::Protocol {
                what: format!(
                    "{} with flags {:#x} while waiting for the reply to {}",
                    message::name(reply.request),
                    reply.flags,
                    message::name(number)
                ),
            });
        }
        Ok(reply)
    }

    // ---- misses --------------------------------------------------------------------------------------------------

    /// Answers misses from now on.
    pub(super) fn serve(self: &Arc<Channels>, server: Server) -> Result<()> {
        let started = self.turn().server.replace(server).is_some();
        if started || self.backend().is_none() {
            return Ok(());
        }
        let channels = self.clone();
        std::thread::Builder::new()
            .name("embedded-vmm".into())
            .spawn(move || channels.serve_until_the_end())
            .map(drop)
            .map_err(Error::io("start the thread that answers misses"))
    }

    /// Changes how misses are answered.
    pub(super) fn set_policy(&self, policy: Policy) {
        if let Some(server) = &mut self.turn().server {
            server.policy = policy;
        }
    }

    /// Answers those that were put aside; how many there were.
    pub(super) fn release(&self) -> Result<usize> {
        let turn = &mut *self.turn();
        let places = std::mem::take(&mut turn.held);
        self.look_up_again(turn, &places)?;
        Ok(places.len())
    }

    /// Answers those of pages that have arrived.
    pub(super) fn pages_arrived(&self, turn: &mut Turn) -> Result<()> {
        let places = std::mem::take(&mut turn.moving);
        self.look_up_again(turn, &places)
    }

    /// All misses so far.
    pub(super) fn seen(&self) -> Vec<SeenMiss> {
        lock(&self.seen).clone()
    }

    /// Forgets the misses that were seen, if none of them waits.
    pub(super) fn forget_seen(&self) {
        let turn = self.turn();
        if turn.held.is_empty() && turn.moving.is_empty() {
            lock(&self.seen).clear();
        }
    }

    /// Waits until the misses so far are such and such, and returns those.
    pub(super) fn wait_seen(
        &self,
        timeout: Duration,
        mut enough: impl FnMut(&[SeenMiss]) -> bool,
    ) -> Result<Vec<SeenMiss>> {
        let waiting = self
            .changed
            .wait_timeout_while(lock(&self.seen), timeout, |seen| !enough(seen));
        let (seen, result) = waiting.unwrap_or_else(PoisonError::into_inner);
        match result.timed_out() {
            false => Ok(seen.clone()),
            true => Err(Error::Timeout {
                what: "waiting for the back-end to ask for translations",
            }),
        }
    }

    fn serve_until_the_end(&self) {
        let Some(backend) = self.backend() else { return };
        while let Ok(true) = wait_readable(&[backend.as_fd()], None) {
            let turn = &mut *self.turn();
            // Whoever had the turn before may have read it.
            match is_readable(&backend) {
                Ok(true) => {}
                Ok(false) => continue,
                Err(_) => return,
            }
            let served = recv_message(&backend, REPLY_TIMEOUT)
                .and_then(|asked| self.begin(turn, &asked))
                .and_then(|owed| self.settle(turn, owed));
            if served.is_err() {
                return;
            }
        }
    }

    /// Notes a request of the back-end and sends what the policy says; answers what is to be read for it.
    fn begin(&self, turn: &mut Turn, asked: &Message) -> Result<Vec<Owed>> {
        let Some(miss) = Miss::of(asked) else {
            if asked.flags & NEED_REPLY != 0 {
                self.reply(asked.request, 1)?;
            }
            return Ok(Vec::new());
        };
        let answer = match &mut turn.server {
            Some(server) => (server.policy)(&miss),
            None => Answer::Never,
        };
        let place = self.note(miss);
        let mut owed = Vec::new();
        match answer {
            Answer::AtOnce => self.look_up(turn, place, true, &mut owed)?,
            Answer::After(messages) => {
                for Unrelated {
                    request,
                    flags,
                    payload,
                } in messages
                {
                    send_message(&self.main, request, flags, &payload, &[])?;
                    if flags & NEED_REPLY != 0 || always_answered(request) {
                        owed.push(Owed::Unrelated(request));
                    }
                }
                self.look_up(turn, place, true, &mut owed)?;
            }
            Answer::WithoutReply => self.look_up(turn, place, false, &mut owed)?,
            Answer::WithoutUpdate => self.conclude(place, Outcome::Pretended, true)?,
            Answer::Refuse => self.conclude(place, Outcome::Refused, true)?,
            Answer::Hold => {
                turn.held.push(place);
                self.conclude(place, Outcome::Held, false)?;
            }
            Answer::Never => self.conclude(place, Outcome::Ignored, false)?,
        }
        Ok(owed)
    }

    /// Reads what is owed, in its order, and answers misses after the acknowledgement of their UPDATE.
    fn settle(&self, turn: &mut Turn, owed: Vec<Owed>) -> Result<()> {
        let _ = turn;
        for owed in owed {
            match owed {
                Owed::Unrelated(number) => drop(self.receive(number)?),
                Owed::Update { place, reply } => {
                    let outcome = match accepted(self.receive(request::IOTLB_MSG)?) {
                        Ok(()) => Outcome::Mapped,
                        Err(_) => Outcome::UpdateRefused,
                    };
                    self.conclude(place, outcome, reply)?;
                }
            }
        }
        Ok(())
    }

    fn look_up_again(&self, turn: &mut Turn, places: &[usize]) -> Result<()> {
        for place in places {
            let mut owed = Vec::new();
            self.look_up(turn, *place, true, &mut owed)?;
            self.settle(turn, owed)?;
        }
        Ok(())
    }

    /// Sends the UPDATE for a miss, or refuses it.
    fn look_up(&self, turn: &mut Turn, place: usize, reply: bool, owed: &mut Vec<Owed>) -> Result<()> {
        let miss = lock(&self.seen)[place].miss;
        let found = match &turn.server {
            Some(server) => server.iommu.lookup(miss.iova, miss.perm),
            None => Lookup::Unmapped,
        };
        match found {
            Lookup::Found(translation) => {
                let payload = update_payload(turn, &translation);
                send_message(&self.main, request::IOTLB_MSG, NEED_REPLY, &payload, &[])?;
                owed.push(Owed::Update { place, reply });
            }
            Lookup::Moving => turn.moving.push(place),
            Lookup::Unmapped => self.conclude(place, Outcome::Unmapped, reply)?,
            Lookup::Denied => self.conclude(place, Outcome::Denied, reply)?,
        }
        Ok(())
    }

    fn note(&self, miss: Miss) -> usize {
        let mut seen = lock(&self.seen);
        seen.push(SeenMiss {
            miss,
            outcome: Outcome::Pending,
        });
        self.changed.notify_all();
        seen.len() - 1
    }

    /// Notes what became of a miss, and tells the back-end if it is to be told and wants to know.
    fn conclude(&self, place: usize, outcome: Outcome, reply: bool) -> Result<()> {
        let miss = {
            let mut seen = lock(&self.seen);
            seen[place].outcome = outcome;
            self.changed.notify_all();
            seen[place].miss
        };
        if !reply || !miss.need_reply {
            return Ok(());
        }
        let value = !matches!(outcome, Outcome::Mapped | Outcome::Pretended);
        self.reply(super::misses::BACKEND_IOTLB_MSG, value.into())
    }

    fn reply(&self, number: u32, value: u64) -> Result<()> {
        match self.backend() {
            Some(channel) => send_message(&channel, number, message::REPLY, &value.to_ne_bytes(), &[]),
            None => Ok(()),
        }
    }
}

/// The acknowledgement of a message with NEED_REPLY.
pub(super) fn accepted(reply: Message) -> Result<()> {
    match reply.u64() {
        Some(0) => Ok(()),
        Some(value) => Err(Error::Refused {
            request: reply.request,
            value,
        }),
        None => Err(Error::Protocol {
            what: format!("{}: not an acknowledgement", message::name(reply.request)),
        }),
    }
}

fn update_payload(turn: &Turn, translation: &Translation) -> Vec<u8> {
    let exact = turn.server.as_ref().is_some_and(|server| server.exact_permission);
    let perm = if exact { translation.perm } else { READ | WRITE };
    message::iotlb(
        translation.iova,
        translation.size,
        translation.user_addr,
        perm,
        UPDATE,
    )
}

/// Whether a request has an answer without NEED_REPLY.
fn always_answered(number: u32) -> bool {
    matches!(
        number,
        request::GET_FEATURES
            | request::GET_PROTOCOL_FEATURES
            | request::GET_QUEUE_NUM
            | request::GET_VRING_BASE
            | request::GET_CONFIG
            | request::GET_MAX_MEM_SLOTS
            | request::GET_STATUS
    )
}

fn is_readable(socket: &UnixStream) -> Result<bool> {
    wait_readable(&[socket.as_fd()], Some(Instant::now()))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
