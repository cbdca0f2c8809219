//! One thread a guest that serves one VMM after the other.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::RecvFlags;
use socket2::{Domain, SockAddr, Socket, Type};
use tracing::{debug, error, info, warn};
use vhost_user_backend::VhostUserDaemon;
use vm_memory::GuestMemoryAtomic;

use crate::device::handle::Listener;
use crate::device::{Command, DeviceEvent, DeviceHandle};
use crate::guest::Memory;
use crate::sys::peercred::peer_credentials;
use crate::sys::unwind::{self, Panic};

use super::backend::Backend;
use super::channel::Channel;
use super::end::{End, PumpEnd};
use super::endpoint::Endpoint;
use super::gate::{Gate, IotlbOperation};
use super::link::{DeviceLink, Pending, WakeFd};
use super::negotiation::{NegotiationWatch, Peer, SessionEnd, SessionError};
use super::relay::{Relay, RelayEnd};
use super::terms::{SessionTerms, Terms};
use super::vring::Vring;
use super::{Mode, SessionConfig};

/// Connections that may be open at once without having said anything. The oldest gives way: a VMM speaks at once, and
/// whoever only looks whether we listen must not keep it out.
const MAX_SILENT: usize = 8;
/// Connections that are refused in one go.
const REFUSE_BUDGET: usize = 16;
/// First and longest pause between attempts to connect to a VMM that does not listen.
const RETRY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(1));
/// Pause after accept() failed for lack of descriptors or memory, as the listener stays ready.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);
/// First and longest pause after a session that ended by a panic: what a VMM or its guest can bring about again and again costs
/// nobody else anything.
const AFTER_PANIC: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(10));
/// How long a VMM may take to read the last words of a session that has failed.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// A guest's session: see the module's description.
pub struct Session;

impl Session {
    /// Starts the thread that serves the endpoint until [`SessionHandle::shutdown`].
    pub fn spawn(
        endpoint: Endpoint,
        device: DeviceHandle,
        watch: Arc<NegotiationWatch>,
    ) -> io::Result<SessionHandle> {
        let terms = Terms::new(
            SessionTerms {
                cid: endpoint.config.cid,
                access_platform: endpoint.config.access_platform,
            },
            Arc::clone(&watch),
        );
        let wake = Arc::new(WakeFd::new()?);
        let stop = Arc::new(AtomicBool::new(false));
        let name = format!("vhost {}", endpoint.config.guest);
        let endpoint_cid = endpoint.config.cid;
        let server = Server {
            guest: endpoint.config.guest.as_str().into(),
            endpoint,
            device,
            watch,
            wake: wake.clone(),
            stop: stop.clone(),
            device_cid: AtomicU32::new(endpoint_cid),
            terms: Arc::clone(&terms),
        };
        let thread = std::thread::Builder::new()
            .name(name)
            .spawn(move || server.run())?;
        Ok(SessionHandle {
            terms,
            wake,
            stop,
            thread: Some(thread),
        })
    }
}

/// A running session thread. Dropping it shuts it down, too.
pub struct SessionHandle {
    terms: Arc<Terms>,
    wake: Arc<WakeFd>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl SessionHandle {
    /// Ends the current session, closes and removes the socket, and waits for the thread. Blocks, normally for
    /// milliseconds: as long as the device thread takes to let go.
    pub fn shutdown(mut self) {
        self.end();
    }

    /// What sessions are told when they begin.
    pub fn terms(&self) -> &Arc<Terms> {
        &self.terms
    }

    /// Whether the thread has ended without having been asked to, which it never should.
    pub fn is_finished(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    fn end(&mut self) {
        self.stop.store(true, Ordering::Release);
        self.wake.wake();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            error!("a session thread has panicked");
        }
    }
}

impl Drop for SessionHandle {
    fn drop(&mut self) {
        self.end();
    }
}

struct Server {
    guest: Arc<str>,
    endpoint: Endpoint,
    device: DeviceHandle,
    watch: Arc<NegotiationWatch>,
    wake: Arc<WakeFd>,
    stop: Arc<AtomicBool>,
    terms: Arc<Terms>,
    /// The CID that the device has, which it was made with.
    device_cid: AtomicU32,
}

impl Server {
    fn run(self) {
        let mut pause = None;
        let mut after_panic = AFTER_PANIC.0;
        loop {
            let error = match unwind::contain(|| Some(self.serve(self.next_vmm(pause)?))) {
                Ok(Some(error)) => error,
                Ok(None) => break,
                Err(panic) => self.after_panic(&panic),
            };
            // A VMM that we connect to and that drops us at once shall not make us spin.
            pause = Some(RETRY.0);
            if error == Some(SessionError::Panic) {
                self.pause(after_panic);
                after_panic = (after_panic * 2).min(AFTER_PANIC.1);
            } else {
                after_panic = AFTER_PANIC.0;
            }
        }
        debug!(guest = %self.guest, "session thread ends");
    }

    fn config(&self) -> &SessionConfig {
        &self.endpoint.config
    }

    fn stopping(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    /// Waits for a VMM that has something to say; after a pause, if it is us who connects. `None` at shutdown.
    fn next_vmm(&self, pause: Option<Duration>) -> Option<UnixStream> {
        match self.config().mode {
            Mode::Server => self.accept_vmm(),
            Mode::Client => {
                if let Some(pause) = pause {
                    self.pause(pause);
                }
                self.reach_vmm()
            }
        }
    }

    /// Waits so long, or until shutdown.
    fn pause(&self, time: Duration) {
        let until = Instant::now() + time;
        loop {
            // What is left here of a session that has ended, such as the end of the crate's thread, is no reason to go on.
            self.wake.clear();
            let left = until.saturating_duration_since(Instant::now());
            if self.stopping() || left.is_zero() {
                return;
            }
            wait(&mut [PollFd::new(&*self.wake, PollFlags::IN)], Some(left));
        }
    }

    /// Server mode. Connections are looked at until one of them speaks; that is the VMM.
    fn accept_vmm(&self) -> Option<UnixStream> {
        let mut silent: Vec<UnixStream> = Vec::new();
        let mut pause = None;
        loop {
            if self.stopping() {
                return None;
            }
            let (listener, _) = self.endpoint.listener.as_ref()?;
            let mut fds = vec![PollFd::new(&*self.wake, PollFlags::IN)];
            fds.extend(silent.iter().map(|stream| PollFd::new(stream, PollFlags::IN)));
            if pause.is_none() {
                fds.push(PollFd::new(listener, PollFlags::IN));
            }
            wait(&mut fds, pause);
            pause = None;
            self.wake.clear();
            silent.retain(|stream| {
                let is_open = has_spoken(stream).is_some();
                if !is_open {
                    debug!(guest = %self.guest, "a connection ended without a message");
                    self.watch.silent();
                }
                is_open
            });
            if let Some(speaker) = silent.iter().position(|stream| has_spoken(stream) == Some(true)) {
                let vmm = silent.remove(speaker);
                self.refuse(silent.len(), &mut false);
                return Some(vmm);
            }
            match self.endpoint.accept() {
                Ok(stream) => {
                    if silent.len() == MAX_SILENT {
                        silent.remove(0);
                        self.refuse(1, &mut true);
                    }
                    silent.push(stream);
                }
                Err(error) if is_transient(&error) => {}
                Err(error) => {
                    warn!(guest = %self.guest, %error, "cannot accept a VMM, trying again");
                    pause = Some(ACCEPT_PAUSE);
                }
            }
        }
    }

    /// Client mode: connects, again and again, and waits until the VMM speaks.
    fn reach_vmm(&self) -> Option<UnixStream> {
        let socket = self.config().socket.display();
        let mut pause = RETRY.0;
        // What was logged last: once per change, however often it is tried.
        let mut told = None;
        while !self.stopping() {
            let state = match connect(&self.config().socket) {
                Ok(stream) => {
                    if told != Some(Ok(())) {
                        info!(guest = %self.guest, %socket, "connected, waiting for the VMM to speak");
                    }
                    self.watch.connected(peer_of(&stream));
                    if self.wait_for_words(&stream) {
                        return Some(stream);
                    }
                    debug!(guest = %self.guest, "the connection ended without a message");
                    self.watch.silent();
                    Ok(())
                }
                Err(error) => {
                    if told != Some(Err(error.kind())) {
                        info!(guest = %self.guest, %socket, %error, "no VMM to connect to yet, retrying");
                    }
                    Err(error.kind())
                }
            };
            told = Some(state);
            self.pause(pause);
            pause = (pause * 2).min(RETRY.1);
        }
        None
    }

    /// Waits until there is something to read; false at the connection's end, or at shutdown.
    fn wait_for_words(&self, stream: &UnixStream) -> bool {
        while !self.stopping() {
            match has_spoken(stream) {
                Some(true) => return true,
                Some(false) => {}
                None => return false,
            }
            let wake = PollFd::new(&*self.wake, PollFlags::IN);
            wait(&mut [wake, PollFd::new(stream, PollFlags::IN)], None);
            self.wake.clear();
        }
        false
    }

    /// Serves one VMM from its first message to the end; tells the error by which it ended, if any.
    fn serve(&self, vmm: UnixStream) -> Option<SessionError> {
        let peer = peer_of(&vmm);
        let began = Instant::now();
        let session = self.watch.session_started(peer.clone());
        let from = peer.map_or_else(|| "unknown".to_owned(), |peer| peer.to_string());
        info!(guest = %self.guest, session, peer = from, "session begins");
        let end = self.run_session(vmm);
        let seconds = began.elapsed().as_secs_f64();
        match end.error {
            None => {
                info!(guest = %self.guest, session, seconds, reason = end.reason, detail = end.detail, "session ends")
            }
            Some(_) => {
                warn!(guest = %self.guest, session, seconds, reason = end.reason, detail = end.detail, "session ends by an error")
            }
        }
        let told = SessionEnd {
            session,
            reason: end.reason,
            detail: end.detail,
        };
        self.watch
            .session_ended(end.error.map(|error| (error, end.request)), told);
        end.error
    }

    /// What a session ends with that could not end by itself: this thread has panicked outside of [`Server::pump`], and all that
    /// it held is closed.
    fn after_panic(&self, panic: &Panic) -> Option<SessionError> {
        self.terms.end();
        let end = End::panicked(&self.guest, panic);
        // An error was told.
        let _ = self
            .link()
            .call_after_failure("end the session", |done| Command::EndSession { done });
        let told = SessionEnd {
            session: self.watch.snapshot().session,
            reason: end.reason,
            detail: end.detail,
        };
        self.watch
            .session_ended(end.error.map(|error| (error, end.request)), told);
        end.error
    }

    fn link(&self) -> DeviceLink {
        DeviceLink::new(
            self.guest.clone(),
            self.device.clone(),
            self.watch.clone(),
            self.wake.clone(),
        )
    }

    fn run_session(&self, vmm: UnixStream) -> End {
        let terms = self.terms.begin();
        let end = self.run_session_on(terms, vmm);
        self.terms.end();
        end
    }

    fn run_session_on(&self, terms: SessionTerms, vmm: UnixStream) -> End {
        let link = Arc::new(self.link());
        let device_has = self.device_cid.load(Ordering::Relaxed);
        if device_has != terms.cid {
            let told = link.call("take another CID", |done| Command::SetCid {
                cid: terms.cid,
                done,
            });
            if told.is_err() {
                return End::error(
                    SessionError::Io,
                    "the device has not taken its new CID".to_owned(),
                );
            }
            self.device_cid.store(terms.cid, Ordering::Relaxed);
        }
        let (mut daemon, private) = match self.start_daemon(terms, &link) {
            Ok(started) => started,
            Err(error) => return End::error(SessionError::Io, error),
        };
        let events = self.listen_to_device();
        let gate = Gate::new(self.config().mode, terms.access_platform);
        let notes = link.clone();
        let mut relay = Relay::new(vmm, private, gate, move |note| notes.note(note));
        let end = unwind::contain(|| self.pump(&mut relay, &link, &events)).unwrap_or_else(PumpEnd::Panicked);
        // Whether it was a crash of the VMM has to be known before its rings are stopped.
        let ran = self.watch.any_ring_started();
        let (vmm, gate) = relay.close_backend();
        // Either the crate has ended by itself, or it does now that its socket is closed, once the device has answered
        // what it is waiting for.
        let outcome = daemon.wait();
        // However the session ended, the device lets go of everything. It tells errors itself.
        let _ = link.call_after_failure("end the session", |done| Command::EndSession { done });
        drop(daemon);
        let end = End::explain(&self.guest, end, outcome, &gate, &link, ran);
        // The VMM sees the end only now that nothing of its memory is in use.
        drop(vmm);
        end
    }

    /// Has the device tell this session what it needs to know. A device that has ended is found out by what comes next.
    fn listen_to_device(&self) -> mpsc::Receiver<DeviceEvent> {
        let (sender, events) = mpsc::channel();
        let line = Line {
            sender: Some(sender),
            wake: self.wake.clone(),
        };
        let listener: Listener = Box::new(move |event| line.tell(event));
        let (done, _) = tokio::sync::oneshot::channel();
        let _ = self.device.send(Command::SetListener {
            listener: Some(listener),
            done,
        });
        events
    }

    fn start_daemon(
        &self,
        terms: SessionTerms,
        link: &Arc<DeviceLink>,
    ) -> Result<(VhostUserDaemon<Arc<Backend>>, UnixStream), String> {
        let (listener, private) = self.endpoint.private_pair()?;
        let backend = Arc::new(Backend::new(
            terms.cid,
            self.config().mode,
            terms.access_platform,
            link.clone(),
        ));
        let memory = GuestMemoryAtomic::new(Memory::new());
        let (daemon, vrings) = Vring::hatch(link.clone(), || {
            VhostUserDaemon::new(format!("crate {}", self.guest), backend.clone(), memory)
        });
        let mut daemon = daemon.map_err(|error| error.to_string())?;
        backend.adopt(vrings);
        // Does not block: our connection is waiting to be accepted.
        daemon
            .start(&mut listener.into())
            .map_err(|error| error.to_string())?;
        Ok((daemon, private))
    }

    /// Moves messages until something ends the session.
    fn pump(&self, relay: &mut Relay, link: &DeviceLink, events: &mpsc::Receiver<DeviceEvent>) -> PumpEnd {
        let mut channel = Channel::new();
        let mut pending: Option<Pending<()>> = None;
        let mut refused = false;
        let mut deadline = None;
        let mut accept_pause: Option<Instant> = None;
        loop {
            let more = match relay.turn(&self.watch) {
                Ok(more) => more,
                Err(end) => return PumpEnd::Relay(end),
            };
            if self.stopping() {
                return PumpEnd::Shutdown;
            }
            let more = more | self.carry_out(relay, link, &mut pending);
            self.speak_of_translations(relay, link, &mut channel, events);
            if let Some(failure) = link.failure() {
                return PumpEnd::Failure(End::of(failure));
            }
            if link.thread_ended() {
                // By itself after a last answer, or by a panic: whatever is on its socket now is all there will be.
                relay.backend_hung_up();
                match relay.turn(&self.watch) {
                    Err(end) => return PumpEnd::Relay(end),
                    Ok(_) if !relay.is_draining() => return PumpEnd::Relay(RelayEnd::CrateClosed),
                    Ok(_) => {}
                }
            }
            if relay.is_draining()
                && Instant::now() >= *deadline.get_or_insert_with(|| Instant::now() + LAST_WORDS)
            {
                return PumpEnd::Relay(RelayEnd::CrateClosed);
            }
            accept_pause = accept_pause.filter(|until| Instant::now() < *until);

            let listener = self.endpoint.listener.as_ref().filter(|_| accept_pause.is_none());
            let look_again = self.watch.look(Instant::now());
            let overdue = pending.as_ref().map(|pending| pending.deadline);
            let timeouts = [deadline, accept_pause, look_again, overdue];
            let timeout = match timeouts.into_iter().flatten().min() {
                _ if more => Some(Duration::ZERO),
                until => until.map(|until| until.saturating_duration_since(Instant::now())),
            };
            let mut fds = vec![
                PollFd::new(&*self.wake, PollFlags::IN),
                PollFd::from_borrowed_fd(relay.vmm(), relay.vmm_interest()),
            ];
            let backend_at = relay.backend_interest().map(|interest| {
                fds.push(PollFd::from_borrowed_fd(relay.backend(), interest));
                fds.len() - 1
            });
            let listener_at = listener.map(|(listener, _)| {
                fds.push(PollFd::new(listener, PollFlags::IN));
                fds.len() - 1
            });
            if let Some((channel, interest)) = channel.interest() {
                fds.push(PollFd::from_borrowed_fd(channel, interest));
            }
            wait(&mut fds, timeout);
            let ready = |at: Option<usize>| {
                at.and_then(|at| fds.get(at))
                    .map_or(PollFlags::empty(), |fd| fd.revents())
            };
            let vmm_ready = ready(Some(1));
            let backend_ready = ready(backend_at);
            let listener_ready = ready(listener_at);
            drop(fds);
            self.wake.clear();
            let hung_up = PollFlags::HUP | PollFlags::ERR;
            if vmm_ready.intersects(hung_up) && !relay.vmm_interest().contains(PollFlags::IN) {
                // It is gone, and what it has said last cannot be delivered: the crate takes nothing more.
                return PumpEnd::Relay(RelayEnd::VmmClosed);
            }
            if backend_ready.intersects(hung_up) {
                relay.backend_hung_up();
            }
            if !listener_ready.is_empty() && !self.refuse_newcomers(&mut refused) {
                accept_pause = Some(Instant::now() + ACCEPT_PAUSE);
            }
        }
    }

    /// Has the device carry out what the VMM wants of the IOTLB. Whether something came of it.
    fn carry_out(&self, relay: &mut Relay, link: &DeviceLink, pending: &mut Option<Pending<()>>) -> bool {
        if pending.is_none()
            && let Some(operation) = relay.take_operation()
        {
            // An error has raised the alarm.
            *pending = match operation {
                IotlbOperation::Update(mappings) => link.begin("take translations", |done| {
                    Command::UpdateIotlb { mappings, done }
                }),
                IotlbOperation::Invalidate { first, last } => link.begin("forget translations", |done| {
                    Command::InvalidateIotlb { first, last, done }
                }),
            }
            .ok();
        }
        let answered = pending
            .as_mut()
            .is_some_and(|pending| matches!(link.poll(pending), Ok(Some(()))));
        if answered {
            *pending = None;
            relay.carried_out(&self.watch);
        }
        answered
    }

    /// Passes on what the device asks for and what the VMM answers to that.
    fn speak_of_translations(
        &self,
        relay: &mut Relay,
        link: &DeviceLink,
        channel: &mut Channel,
        events: &mpsc::Receiver<DeviceEvent>,
    ) {
        if let Some(socket) = relay.take_backend_channel() {
            channel.open(socket, relay.gate().acknowledges());
            self.watch.backend_channel(true);
        }
        loop {
            match events.try_recv() {
                Ok(DeviceEvent::Miss(miss)) => channel.ask(miss),
                Ok(event) => {
                    self.watch.device_event(&event);
                    if let DeviceEvent::MemoryLost(loss) = event {
                        link.alarm(SessionError::MemoryLost, loss.to_string());
                    }
                }
                Err(mpsc::TryRecvError::Empty) => break,
                Err(mpsc::TryRecvError::Disconnected) => {
                    // A device that has ended does so because the sidecar does.
                    if link.has_device() {
                        link.alarm_restarted("it knows nothing of this session");
                    }
                    break;
                }
            }
        }
        let ended = channel.turn(
            |miss| self.watch.miss_sent(miss),
            |miss, refused| {
                self.watch.miss_answered(miss, refused);
                link.tell("hear of an answer", Command::MissAnswered { miss, refused });
            },
        );
        if ended {
            self.watch.backend_channel(false);
        }
    }

    /// Closes connections of others while a VMM is served. False when accept() fails.
    fn refuse_newcomers(&self, told: &mut bool) -> bool {
        for _ in 0..REFUSE_BUDGET {
            match self.endpoint.accept() {
                Ok(_closed_at_once) => self.refuse(1, told),
                Err(error) if is_transient(&error) => return true,
                Err(error) => {
                    warn!(guest = %self.guest, %error, "cannot accept a second connection to refuse it");
                    return false;
                }
            }
        }
        true
    }

    /// Counts refused connections, and logs the first of a session.
    fn refuse(&self, count: usize, told: &mut bool) {
        for _ in 0..count {
            self.watch.rejected();
            if std::mem::replace(told, true) {
                debug!(guest = %self.guest, "another connection refused");
            } else {
                warn!(guest = %self.guest, "a second connection refused: one VMM is served at a time");
            }
        }
    }
}

/// The device's end of what it tells a session. Its end wakes the session: a device that has begun anew has forgotten it.
struct Line {
    /// `None` only while this is dropped.
    sender: Option<mpsc::Sender<DeviceEvent>>,
    wake: Arc<WakeFd>,
}

impl Line {
    fn tell(&self, event: DeviceEvent) {
        // A session that is over wants to know nothing more.
        if self
            .sender
            .as_ref()
            .is_some_and(|sender| sender.send(event).is_ok())
        {
            self.wake.wake();
        }
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        // First, so that whoever is woken finds it gone.
        drop(self.sender.take());
        self.wake.wake();
    }
}

/// Polls, and takes an interruption for readiness of nothing.
fn wait(fds: &mut [PollFd<'_>], timeout: Option<Duration>) {
    let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
    if let Err(error) = poll(fds, timeout.as_ref())
        && error != rustix::io::Errno::INTR
    {
        // Out of memory, at most; do not spin on it.
        std::thread::park_timeout(Duration::from_millis(10));
    }
}

/// Whether there is something to read; `None` if the peer has closed instead.
fn has_spoken(stream: &UnixStream) -> Option<bool> {
    let mut byte = [0u8; 1];
    match rustix::net::recv(stream, &mut byte, RecvFlags::PEEK | RecvFlags::DONTWAIT) {
        Ok((0, _)) => None,
        Ok(_) => Some(true),
        Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => Some(false),
        Err(_) => None,
    }
}

/// Connects without waiting for a listener whose queue is full, which would keep us from ending.
fn connect(path: &Path) -> io::Result<UnixStream> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    socket.connect(&SockAddr::unix(path)?)?;
    Ok(socket.into())
}

fn is_transient(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted
    )
}

/// Who is at the other end, as far as the kernel and /proc tell.
fn peer_of(stream: &UnixStream) -> Option<Peer> {
    let credentials = peer_credentials(stream.as_fd()).ok()?;
    let program = credentials.pid.and_then(|pid| {
        let exe = std::fs::read_link(format!("/proc/{pid}/exe")).ok();
        let exe = exe.and_then(|path| Some(path.file_name()?.to_string_lossy().into_owned()));
        // Programs of other users hide their path, but not their name.
        exe.or_else(|| {
            Some(
                std::fs::read_to_string(format!("/proc/{pid}/comm"))
                    .ok()?
                    .trim()
                    .to_owned(),
            )
        })
    });
    Some(Peer {
        pid: credentials.pid,
        uid: credentials.uid,
        gid: credentials.gid,
        program,
    })
}
