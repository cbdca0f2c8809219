//! A VMM made of raw messages, and a device thread that does nothing but remember.
#![allow(dead_code)] // each test file uses its part

use std::collections::HashMap;
use std::io::{IoSlice, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, mpsc};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use vsock_sidecar::device::handle::{DeviceEvent, Listener};
use vsock_sidecar::device::{Command, DeviceHandle};
use vsock_sidecar::guest::{GuestRam, Mapping, Miss, RingParts, RingPosition};
use vsock_sidecar::vhost_user::message::{Message, NEED_REPLY, REPLY, VERSION, request};
use vsock_sidecar::vhost_user::{
    AccessPlatform, Endpoint, Mode, Negotiation, NegotiationWatch, Session, SessionConfig, SessionHandle,
};

pub const PATIENCE: Duration = Duration::from_secs(20);

/// Waits until `done`, or fails saying what was waited for.
pub fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < deadline, "timed out waiting for {what}");
        std::thread::park_timeout(Duration::from_millis(2));
    }
}

// ---------------------------------------------------------------------------------------------- the device

/// What a device was told, in order.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Told {
    SetMemory,
    Start(usize),
    Stop(usize),
    SetCall(usize),
    Update(Vec<Mapping>),
    Invalidate(u64, u64),
    Flush,
    Answered(Miss, bool),
    EndSession,
}

#[derive(Default)]
struct Shared {
    told: Vec<Told>,
    /// Commands that may be answered; `None` means all.
    allowance: Option<usize>,
    parts: HashMap<usize, RingParts>,
    positions: HashMap<usize, RingPosition>,
    refusal: Option<String>,
    ram: Option<GuestRam>,
    listener: Option<Listener>,
    types: (bool, bool),
}

/// A device thread that answers every command, when it may.
pub struct FakeDevice {
    shared: Arc<(Mutex<Shared>, Condvar)>,
    pub handle: DeviceHandle,
    _poll: mio::Poll,
}

impl FakeDevice {
    pub fn new() -> FakeDevice {
        let (device, commands) = FakeDevice::without_thread();
        let shared = device.shared.clone();
        std::thread::spawn(move || {
            for command in commands {
                FakeDevice::serve(&shared, command);
            }
        });
        device
    }

    /// A device whose thread is the caller's business.
    pub fn without_thread() -> (FakeDevice, mpsc::Receiver<Command>) {
        let poll = mio::Poll::new().unwrap();
        let waker = Arc::new(mio::Waker::new(poll.registry(), mio::Token(0)).unwrap());
        let (sender, commands) = mpsc::channel();
        let handle = DeviceHandle::new(sender, waker);
        (
            FakeDevice {
                shared: Arc::default(),
                handle,
                _poll: poll,
            },
            commands,
        )
    }

    fn serve(shared: &(Mutex<Shared>, Condvar), command: Command) {
        let told = match &command {
            Command::SetMemory { .. } => Told::SetMemory,
            Command::StartQueue { index, .. } => Told::Start(*index),
            Command::StopQueue { index, .. } => Told::Stop(*index),
            Command::SetCall { index, .. } => Told::SetCall(*index),
            Command::UpdateIotlb { mappings, .. } => Told::Update(mappings.clone()),
            Command::InvalidateIotlb { first, last, .. } => Told::Invalidate(*first, *last),
            Command::FlushIotlb { .. } => Told::Flush,
            Command::MissAnswered { miss, refused } => Told::Answered(*miss, *refused),
            Command::EndSession { .. } => Told::EndSession,
            // The first thing of every session, and no more than that.
            Command::SetListener { .. } => {
                if let Command::SetListener { listener, done } = command {
                    shared.0.lock().unwrap().listener = listener;
                    done.send(()).ok();
                }
                return;
            }
            // With the features, and no more than that.
            Command::SetTypes { .. } => {
                if let Command::SetTypes {
                    stream,
                    seqpacket,
                    done,
                } = command
                {
                    shared.0.lock().unwrap().types = (stream, seqpacket);
                    done.send(()).ok();
                }
                return;
            }
            _ => return,
        };
        let (mutex, changed) = shared;
        let mut state = mutex.lock().unwrap();
        match &command {
            // A ring that was paused is now stopped in earnest: nothing to give back, and nothing new to tell of.
            Command::StopQueue {
                index, pause: false, ..
            } if !state.parts.contains_key(index) => {}
            _ => state.told.push(told),
        }
        changed.notify_all();
        while state.allowance == Some(0) {
            state = changed.wait(state).unwrap();
        }
        if let Some(allowance) = &mut state.allowance {
            *allowance -= 1;
        }
        match command {
            Command::SetMemory { ram, done } => {
                state.ram = ram;
                done.send(()).ok();
            }
            Command::StartQueue { index, parts, done } => match &state.refusal {
                Some(refusal) => drop(done.send(Err(refusal.clone()))),
                None => {
                    state.parts.insert(index, parts);
                    done.send(Ok(())).ok();
                }
            },
            Command::StopQueue { index, done, .. } => {
                let parts = state.parts.remove(&index);
                let position = state.positions.get(&index).copied();
                done.send(parts.map(|parts| position.unwrap_or(parts.position)))
                    .ok();
            }
            Command::SetCall { index, call, done } => {
                state.parts.get_mut(&index).expect("the ring runs").call = call;
                done.send(()).ok();
            }
            Command::UpdateIotlb { done, .. }
            | Command::InvalidateIotlb { done, .. }
            | Command::FlushIotlb { done } => {
                done.send(()).ok();
            }
            Command::EndSession { done } => {
                state.parts.clear();
                state.ram = None;
                state.listener = None;
                done.send(()).ok();
            }
            _ => {}
        }
    }

    fn state(&self) -> std::sync::MutexGuard<'_, Shared> {
        self.shared.0.lock().unwrap()
    }

    /// Whether it was told of streams and of SEQPACKET.
    pub fn types(&self) -> (bool, bool) {
        self.state().types
    }

    /// Tells the session something.
    pub fn tell(&self, event: DeviceEvent) {
        self.state().listener.as_ref().expect("a session listens")(event);
    }

    /// Everything it was told so far.
    pub fn told(&self) -> Vec<Told> {
        self.state().told.clone()
    }

    /// Takes what it was told since the last time.
    pub fn take_told(&self) -> Vec<Told> {
        std::mem::take(&mut self.state().told)
    }

    pub fn wait_told(&self, count: usize) {
        wait_until(&format!("{count} commands"), || self.state().told.len() >= count);
    }

    /// Lets it answer nothing until [`FakeDevice::allow`].
    pub fn hold(&self) {
        self.state().allowance = Some(0);
    }

    pub fn allow(&self, commands: Option<usize>) {
        self.state().allowance = commands;
        self.shared.1.notify_all();
    }

    /// Where a ring will say it stands when it is stopped.
    pub fn stand_at(&self, index: usize, position: RingPosition) {
        self.state().positions.insert(index, position);
    }

    pub fn refuse_rings(&self, reason: Option<&str>) {
        self.state().refusal = reason.map(str::to_owned);
    }

    /// Looks at a running ring.
    pub fn with_ring<R>(&self, index: usize, look: impl FnOnce(&RingParts) -> R) -> R {
        look(self.state().parts.get(&index).expect("the ring runs"))
    }

    /// Guest-physical start and length of each region that it has.
    pub fn regions(&self) -> Vec<(u64, u64)> {
        self.state()
            .ram
            .as_ref()
            .map(|ram| ram.regions().collect())
            .unwrap_or_default()
    }

    pub fn logs_writes(&self) -> bool {
        self.state().ram.as_ref().is_some_and(GuestRam::dirty_log_active)
    }

    pub fn has_memory(&self) -> bool {
        self.state().ram.is_some()
    }
}

// ---------------------------------------------------------------------------------------------- the session

/// A session under test with its socket and device.
pub struct Rig {
    pub directory: tempfile::TempDir,
    pub config: SessionConfig,
    pub watch: Arc<NegotiationWatch>,
    pub device: FakeDevice,
    pub session: Option<SessionHandle>,
}

impl Rig {
    pub fn new(mode: Mode) -> Rig {
        Rig::with_device(mode, FakeDevice::new())
    }

    pub fn with_device(mode: Mode, device: FakeDevice) -> Rig {
        Rig::with(mode, AccessPlatform::Auto, device)
    }

    pub fn with_policy(access_platform: AccessPlatform) -> Rig {
        Rig::with(Mode::Server, access_platform, FakeDevice::new())
    }

    pub fn with(mode: Mode, access_platform: AccessPlatform, device: FakeDevice) -> Rig {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("vhost.sock");
        let config = SessionConfig {
            guest: "web".into(),
            cid: 3,
            socket,
            mode,
            access_platform,
        };
        let endpoint = Endpoint::bind(&config).unwrap();
        let watch = NegotiationWatch::new(&config);
        let session = Session::spawn(endpoint, device.handle.clone(), watch.clone()).unwrap();
        Rig {
            directory,
            config,
            watch,
            device,
            session: Some(session),
        }
    }

    pub fn socket(&self) -> &Path {
        &self.config.socket
    }

    pub fn connect(&self) -> Vmm {
        Vmm::new(UnixStream::connect(self.socket()).unwrap())
    }

    pub fn negotiation(&self) -> Negotiation {
        self.watch.snapshot()
    }

    /// Waits for the end of the session with that number and returns how it ended.
    pub fn wait_end(&self, session: u64) -> (&'static str, String) {
        wait_until("the end of the session", || {
            self.negotiation()
                .last_end
                .is_some_and(|end| end.session >= session)
        });
        let end = self.negotiation().last_end.unwrap();
        (end.reason, end.detail)
    }

    pub fn errors(&self, reason: &str) -> u64 {
        self.negotiation()
            .session_errors
            .iter()
            .find(|error| error.reason == reason)
            .unwrap()
            .count
    }

    pub fn requests(&self, name: &str) -> (u64, u64) {
        let now = self.negotiation();
        let counter = now
            .requests
            .iter()
            .find(|counter| counter.request == name)
            .unwrap();
        (counter.count, counter.errors)
    }

    pub fn shutdown(&mut self) {
        if let Some(session) = self.session.take() {
            session.shutdown();
        }
    }
}

// ---------------------------------------------------------------------------------------------- the VMM

pub const MIB: u64 = 1 << 20;
/// Size and VMM address of the guest's memory in QEMU's trace.
pub const RAM_SIZE: u64 = 256 * MIB;
pub const RAM_UADDR: u64 = 0x7fe3_dbff_f000;

/// One end of a vhost-user connection that says exactly what it is told to.
pub struct Vmm {
    pub socket: UnixStream,
}

impl Vmm {
    pub fn new(socket: UnixStream) -> Vmm {
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        Vmm { socket }
    }

    pub fn send_bytes(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
        assert!(self.try_send_bytes(bytes, fds), "the connection is closed");
    }

    /// False if the other side has closed.
    pub fn try_send_bytes(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> bool {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(32))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
        }
        match sendmsg(
            &self.socket,
            &[IoSlice::new(bytes)],
            &mut control,
            SendFlags::NOSIGNAL,
        ) {
            Ok(sent) => assert_eq!(sent, bytes.len()),
            Err(rustix::io::Errno::PIPE | rustix::io::Errno::CONNRESET) => return false,
            Err(error) => panic!("{error}"),
        }
        true
    }

    pub fn send(&self, number: u32, body: &[u8], fds: &[BorrowedFd<'_>]) {
        self.send_bytes(Message::new(number, VERSION, body).bytes(), fds);
    }

    pub fn send_u64(&self, number: u32, value: u64) {
        self.send(number, &value.to_ne_bytes(), &[]);
    }

    pub fn send_state(&self, number: u32, index: u32, num: u32) {
        self.send(number, &state_body(index, num), &[]);
    }

    /// SET_VRING_KICK, SET_VRING_CALL, SET_VRING_ERR.
    pub fn send_fd(&self, number: u32, index: u64, fd: &OwnedFd) {
        self.send(number, &index.to_ne_bytes(), &[fd.as_fd()]);
    }

    /// The next answer: its request number and its body.
    pub fn reply(&self) -> (u32, Vec<u8>) {
        let mut header = [0u8; 12];
        (&self.socket).read_exact(&mut header).expect("an answer");
        let field = |at: usize| u32::from_ne_bytes(header[at..at + 4].try_into().unwrap());
        assert_eq!(field(4) & REPLY, REPLY);
        let mut body = vec![0; field(8) as usize];
        (&self.socket).read_exact(&mut body).expect("the answer's body");
        (field(0), body)
    }

    pub fn reply_u64(&self, number: u32) -> u64 {
        let (request, body) = self.reply();
        assert_eq!(request, number);
        u64::from_ne_bytes(body.try_into().unwrap())
    }

    /// A request without a body that is answered with a u64.
    pub fn get(&self, number: u32) -> u64 {
        self.send(number, &[], &[]);
        self.reply_u64(number)
    }

    pub fn has_reply(&self) -> bool {
        let mut byte = [0u8; 1];
        let flags = rustix::net::RecvFlags::PEEK | rustix::net::RecvFlags::DONTWAIT;
        rustix::net::recv(&self.socket, &mut byte, flags).is_ok()
    }

    /// Sends a request with NEED_REPLY and returns the answer, 0 for success.
    pub fn acked(&self, number: u32, body: &[u8], fds: &[BorrowedFd<'_>]) -> u64 {
        self.send_bytes(Message::new(number, VERSION | NEED_REPLY, body).bytes(), fds);
        self.reply_u64(number)
    }

    pub fn vring_base(&self, index: u32) -> u32 {
        self.send_state(request::GET_VRING_BASE, index, 0);
        let (number, body) = self.reply();
        assert_eq!(number, request::GET_VRING_BASE);
        assert_eq!(body[..4], index.to_ne_bytes());
        u32::from_ne_bytes(body[4..].try_into().unwrap())
    }

    /// Waits until everything sent so far has been served.
    pub fn barrier(&self) {
        self.get(request::GET_FEATURES);
    }

    /// Blocks until the other side closes. Unread answers are read over.
    pub fn wait_closed(&self) {
        let mut rest = Vec::new();
        match (&self.socket).read_to_end(&mut rest) {
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => {}
            Err(error) => panic!("not closed: {error}"),
        }
    }

    /// What QEMU says when it starts, before there is a guest.
    pub fn realize(&self) -> Setup {
        let offered = self.get(request::GET_FEATURES);
        let protocol = self.get(request::GET_PROTOCOL_FEATURES);
        self.send_u64(request::SET_PROTOCOL_FEATURES, protocol);
        assert_eq!(self.get(request::GET_QUEUE_NUM), 3);
        let (ours, theirs) = UnixStream::pair().unwrap();
        assert_eq!(self.acked(request::SET_BACKEND_REQ_FD, &[], &[theirs.as_fd()]), 0);
        self.send(request::SET_OWNER, &[], &[]);
        self.get(request::GET_FEATURES);
        let masked = [event(), event()];
        for index in 0..2 {
            self.send_fd(request::SET_VRING_CALL, index, &masked[index as usize]);
            self.send_fd(request::SET_VRING_ERR, index, &event());
        }
        let mut config = [0u8; 12 + 8];
        config[4..8].copy_from_slice(&8u32.to_ne_bytes());
        self.send(request::GET_CONFIG, &config, &[]);
        let (_, body) = self.reply();
        assert_eq!(body[12..], 3u64.to_le_bytes());
        Setup {
            offered,
            protocol,
            backend_channel: ours,
            memory: memory(RAM_SIZE),
        }
    }

    /// SET_MEM_TABLE with one region.
    pub fn set_memory(&self, memory: &OwnedFd, uaddr: u64) -> u64 {
        self.acked(
            request::SET_MEM_TABLE,
            &table_body(&[[0, RAM_SIZE, uaddr, 0]]),
            &[memory.as_fd()],
        )
    }

    /// What QEMU says for one ring, up to its kick: not yet enabled.
    pub fn set_up_ring(&self, index: u32, base: u32, desc: u64, kick: &OwnedFd) {
        self.send_state(request::SET_VRING_NUM, index, 128);
        self.send_state(request::SET_VRING_BASE, index, base);
        self.send(request::SET_VRING_ADDR, &addr_body(index, desc), &[]);
        self.send_fd(request::SET_VRING_KICK, index.into(), kick);
    }

    /// Everything from DRIVER_OK until both rings run.
    pub fn start(&self, setup: &Setup) -> Running {
        let running = Running {
            kick: [event(), event()],
            call: [event(), event()],
        };
        for index in [1, 0] {
            self.send_fd(request::SET_VRING_CALL, index, &event());
        }
        self.send_u64(request::SET_FEATURES, setup.offered & !(1 << 26 | PLATFORM));
        assert_eq!(self.set_memory(&setup.memory, RAM_UADDR), 0);
        for index in 0..2 {
            self.set_up_ring(index, 0, DESC[index as usize], &running.kick[index as usize]);
        }
        for index in 0..2 {
            self.send_state(request::SET_VRING_ENABLE, index, 1);
        }
        for index in 0..2 {
            self.send_fd(request::SET_VRING_CALL, index, &running.call[index as usize]);
        }
        self.barrier();
        running
    }

    /// What QEMU says when the guest resets.
    pub fn stop(&self) -> [u32; 2] {
        for index in 0..2 {
            self.send_state(request::SET_VRING_ENABLE, index, 0);
        }
        let bases = [self.vring_base(0), self.vring_base(1)];
        for index in [1, 0] {
            self.send_fd(request::SET_VRING_CALL, index, &event());
        }
        bases
    }
}

/// What stays the same while a VMM lives.
pub struct Setup {
    pub offered: u64,
    pub protocol: u64,
    pub backend_channel: UnixStream,
    pub memory: OwnedFd,
}

/// The VMM's ends of running rings.
pub struct Running {
    pub kick: [OwnedFd; 2],
    pub call: [OwnedFd; 2],
}

/// VIRTIO_F_ACCESS_PLATFORM.
pub const PLATFORM: u64 = 1 << 33;

/// Where QEMU's trace has the descriptor tables, in QEMU's addresses.
pub const DESC: [u64; 2] = [0x7fe3_e17e_c000, 0x7fe3_e171_d000];

pub fn state_body(index: u32, num: u32) -> Vec<u8> {
    [index.to_ne_bytes(), num.to_ne_bytes()].concat()
}

/// SET_VRING_ADDR of a ring of 128 entries, laid out as Linux does.
pub fn addr_body(index: u32, desc: u64) -> Vec<u8> {
    let mut body = [index.to_ne_bytes(), 0u32.to_ne_bytes()].concat();
    for value in [desc, desc + 0x940, desc + 0x800, 0] {
        body.extend_from_slice(&value.to_ne_bytes());
    }
    body
}

/// Regions as guest address, size, VMM address, offset in the file.
pub fn table_body(regions: &[[u64; 4]]) -> Vec<u8> {
    let mut body = (regions.len() as u64).to_ne_bytes().to_vec();
    regions
        .iter()
        .flatten()
        .for_each(|value| body.extend_from_slice(&value.to_ne_bytes()));
    body
}

/// ADD_MEM_REG and REM_MEM_REG.
pub fn region_body(region: [u64; 4]) -> Vec<u8> {
    let mut body = vec![0; 8];
    region
        .iter()
        .for_each(|value| body.extend_from_slice(&value.to_ne_bytes()));
    body
}

pub fn event() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap()
}

pub fn signal(event: impl AsFd) {
    rustix::io::write(event, &1u64.to_ne_bytes()).unwrap();
}

pub fn is_signalled(event: impl AsFd) -> bool {
    rustix::io::read(event, &mut [0u8; 8]).is_ok()
}

pub fn memory(size: u64) -> OwnedFd {
    let fd = memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&fd, size).unwrap();
    fd
}
