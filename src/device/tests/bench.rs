//! A device whose thread is the test, with a guest whose memory is scattered over I/O virtual pages. Supplies verbs; what is
//! right is for the tests to say.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, memfd_create};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestRegionMmap, MmapRegion};

use super::*;
use crate::config::{Framing, OutboundRule, Target};
use crate::guest::{Mapping, Memory, Miss, Permission};
use crate::vsock::{HEADER_LEN, Op, Port};

/// Bytes of a page of either kind.
pub const PAGE: u64 = 4096;
/// Pages of guest memory.
pub const PAGES: u64 = 512;
/// Where I/O virtual addresses begin: outside of guest memory, so that a mistake is not unseen.
pub const IOVA: u64 = 0xfff0_0000;

/// Entries of a ring.
pub const SIZE: u16 = 16;
/// The port of the guest's service that is a unix socket.
pub const PORT: u32 = 80;
/// The guest's own port.
pub const GUEST_PORT: u32 = 1234;
/// Credit that the guest gives, once for all of a test.
const GUEST_BUFFER: u32 = 1 << 30;

/// First page that is a ring's nor anything else's.
pub const BUFFERS: u64 = 16;

/// The I/O virtual address of a page.
pub fn iova(page: u64) -> u64 {
    IOVA + page * PAGE
}

/// What an I/O virtual page means: neighbours are none in memory.
pub fn gpa(page: u64) -> u64 {
    (page * 37 % PAGES) * PAGE
}

/// How rings of a test are addressed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Addresses {
    Iova,
    GuestPhysical,
}

/// The driver's side of a ring: three pages, one for each area.
pub struct DriverRing {
    page: u64,
    next_desc: u16,
    avail_idx: u16,
    used_idx: u16,
    pub kick: OwnedFd,
}

pub struct Bench {
    pub device: Device,
    pub handle: DeviceHandle,
    events: Events,
    /// Real time plus this is what the device is told.
    pub ahead: Duration,
    pub told: mpsc::Receiver<DeviceEvent>,
    memory: Arc<Memory>,
    file: File,
    /// Of the guest's connection.
    socket_type: u16,
    addresses: Addresses,
    pub rx: DriverRing,
    pub tx: DriverRing,
    service: UnixListener,
    dir: tempfile::TempDir,
    control: tokio::runtime::Runtime,
}

/// A chain's buffer: I/O virtual address and length.
pub type Buf = (u64, u32);

impl Bench {
    /// A device with memory and a listener; no ring runs.
    pub fn new(addresses: Addresses) -> Bench {
        Bench::with_framing(addresses, None)
    }

    /// The same; with framing the guest's connection is of type SEQPACKET.
    pub fn with_framing(addresses: Addresses, framing: Option<Framing>) -> Bench {
        Bench::assemble(addresses, framing, None)
    }

    /// The same, but that the guest's service is a port of the guest `db` among these siblings.
    pub fn with_sibling(addresses: Addresses, siblings: Siblings) -> Bench {
        Bench::assemble(addresses, None, Some(siblings))
    }

    fn assemble(addresses: Addresses, framing: Option<Framing>, siblings: Option<Siblings>) -> Bench {
        let control = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("service");
        let service = UnixListener::bind(&path).unwrap();
        let rule = OutboundRule {
            name: "service".into(),
            cid: 2,
            ports: PORT..=PORT,
            target: match siblings {
                Some(_) => Target::Guest {
                    name: "db".into(),
                    port: None,
                },
                None => Target::Unix {
                    path: path.to_str().unwrap().into(),
                },
            },
            proxy_protocol: None,
            framing,
            connections: None,
        };
        let metrics = GuestMetrics::detached(&labels());
        let second = Duration::from_secs(1000);
        let (device, handle) = Device::new(DeviceConfig {
            name: "web".into(),
            cid: 3,
            limits: Limits {
                connections: 10,
                buffer: 256 * 1024,
                connect_timeout: second,
                guest_timeout: second,
                idle_timeout: Duration::ZERO,
                busy_poll: Duration::ZERO,
                ..Limits::default()
            },
            rules: Arc::new(Rules::new(&[rule], &[], &[], &metrics, None)),
            siblings: siblings.unwrap_or_default(),
            quota: Default::default(),
            dialer: Dialer::new(control.handle().clone()),
            metrics,
        })
        .unwrap();
        let (file, memory) = shared_memory();
        let (tell, told) = mpsc::channel();
        let mut bench = Bench {
            device,
            handle,
            events: Events::with_capacity(64),
            ahead: Duration::ZERO,
            told,
            memory: Arc::clone(&memory),
            file,
            socket_type: if framing.is_some() { 2 } else { 1 },
            addresses,
            rx: DriverRing::new(0),
            tx: DriverRing::new(4),
            service,
            dir,
            control,
        };
        bench.ask(|done| Command::SetListener {
            listener: Some(Box::new(move |event| {
                let _ = tell.send(event);
            })),
            done,
        });
        let ram = Some(GuestRam::new(memory));
        bench.ask(|done| Command::SetMemory { ram, done });
        bench
    }

    /// Both rings run and are mapped, 8 pages of rx buffers are posted and mapped, and a connection to the service is
    /// established; this is the service's end.
    pub fn connected(&mut self) -> UnixStream {
        self.boot();
        self.send(Op::Request, &[]);
        let (stream, _) = self.service.accept().unwrap();
        self.until(|bench| bench.received().contains(&(Op::Response as u16, 0)));
        assert_eq!(self.sent(), 1);
        assert_eq!(self.events_told(), []);
        stream
    }

    /// Both rings run and are mapped, and 8 pages of rx buffers are posted and mapped.
    pub fn boot(&mut self) {
        for page in 0..8 {
            self.map(page);
        }
        for page in BUFFERS..BUFFERS + 8 {
            self.map(page);
            self.post(page);
        }
        self.start(RX);
        self.start(TX);
        // The header of every packet is here.
        self.map(BUFFERS + 100);
    }

    /// The service is no more; its path leads nowhere.
    pub fn end_service(&mut self) {
        let path = self.dir.path().join("service");
        std::fs::remove_file(path).unwrap();
    }

    /// The VMM shortens the file of guest memory to so many pages.
    pub fn truncate(&self, pages: u64) {
        self.file.set_len(pages * PAGE).unwrap();
    }

    /// Another memory table with the same regions, as ADD_MEM_REG of another one leaves them.
    pub fn share_again(&mut self) {
        let ram = Some(GuestRam::new(Arc::clone(&self.memory)));
        self.ask(|done| Command::SetMemory { ram, done });
    }

    /// The device's thread panics, and it begins anew as that thread would have it.
    pub fn panic(&mut self) {
        let spare = Device::new(self.device.config.clone()).unwrap().0;
        let now = self.now();
        self.device = std::mem::replace(&mut self.device, spare).begin_anew(now);
    }

    /// Another VMM with another guest, whose rings do not run yet.
    pub fn next_vmm(&mut self) {
        (self.file, self.memory) = shared_memory();
        (self.rx, self.tx) = (DriverRing::new(0), DriverRing::new(4));
        self.next_session();
    }

    /// The VMM is gone, and another one with the same guest is there. Its rings do not run yet.
    pub fn next_session(&mut self) {
        self.ask(|done| Command::EndSession { done });
        let (tell, told) = mpsc::channel();
        self.told = told;
        self.ask(|done| Command::SetListener {
            listener: Some(Box::new(move |event| {
                let _ = tell.send(event);
            })),
            done,
        });
        let ram = Some(GuestRam::new(Arc::clone(&self.memory)));
        self.ask(|done| Command::SetMemory { ram, done });
    }

    pub fn now(&self) -> Instant {
        Instant::now() + self.ahead
    }

    /// Lets the device do all that it can do now, and asserts that it comes to rest.
    pub fn crank(&mut self) {
        self.wake_ups();
    }

    /// Cranks; how many times there was something that would have woken the device.
    pub fn wake_ups(&mut self) -> usize {
        let (mut turns, mut wake_ups) = (0, 0);
        loop {
            self.device
                .poll
                .poll(&mut self.events, Some(Duration::ZERO))
                .unwrap();
            let now = Instant::now() + self.ahead;
            let more = self.device.cycle(now, &self.events);
            turns += 1;
            wake_ups += usize::from(!self.events.is_empty());
            assert!(turns < 1000, "the device does not come to rest");
            if self.events.is_empty() && more == ControlFlow::Continue(false) {
                return wake_ups;
            }
        }
    }

    /// What is ready, and one turn, of the several that may follow each other in a cycle.
    pub fn turn_once(&mut self) {
        let wait = Some(Duration::from_millis(1));
        self.device.poll.poll(&mut self.events, wait).unwrap();
        let now = self.now();
        self.device.hear(now, &self.events);
        self.device.turn(now);
    }

    /// One cycle, after a wait of a millisecond at most.
    pub fn turn(&mut self) {
        let wait = Some(Duration::from_millis(1));
        self.device.poll.poll(&mut self.events, wait).unwrap();
        let now = self.now();
        // What is left to do is done in the next.
        let _ = self.device.cycle(now, &self.events);
    }

    /// The guest's memory, its rx ring and what the device tells, for a guest and VMM of another thread.
    pub fn split(&mut self) -> (Arc<Memory>, DriverRing, mpsc::Receiver<DeviceEvent>) {
        let rx = std::mem::replace(&mut self.rx, DriverRing::new(0));
        let told = std::mem::replace(&mut self.told, mpsc::channel().1);
        (Arc::clone(&self.memory), rx, told)
    }

    /// Cranks until something holds, which other threads may have to bring about.
    pub fn until(&mut self, mut holds: impl FnMut(&mut Bench) -> bool) {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            self.crank();
            if holds(self) {
                return;
            }
            assert!(Instant::now() < deadline, "it does not happen");
            self.control.block_on(tokio::task::yield_now());
        }
    }

    /// Sends a command and cranks; its answer.
    pub fn ask<T>(&mut self, command: impl FnOnce(handle::Reply<T>) -> Command) -> T {
        let (reply, mut answer) = tokio::sync::oneshot::channel();
        self.handle.send(command(reply)).unwrap();
        self.crank();
        answer.try_recv().expect("answered within a turn")
    }

    /// What was told since this was last called.
    pub fn events_told(&self) -> Vec<DeviceEvent> {
        self.told.try_iter().collect()
    }

    /// The misses that were told since this was last called, sorted by page; asserts that nothing else was.
    pub fn misses(&self) -> Vec<(u64, Access)> {
        let mut misses: Vec<_> = self
            .told
            .try_iter()
            .map(|event| match event {
                DeviceEvent::Miss(miss) => ((miss.iova - IOVA) / PAGE, miss.access),
                other => panic!("{other:?} was told"),
            })
            .collect();
        misses.sort();
        misses
    }

    /// UPDATE of a page.
    pub fn map(&mut self, page: u64) {
        self.map_to(page, gpa(page));
    }

    /// UPDATE of a page with another meaning.
    pub fn map_to(&mut self, page: u64, gpa: u64) {
        let mapping = Mapping {
            iova: iova(page),
            len: PAGE,
            gpa,
            permission: Permission::ReadWrite,
        };
        self.ask(|done| Command::UpdateIotlb {
            mappings: vec![mapping],
            done,
        });
    }

    /// INVALIDATE of a page.
    pub fn unmap(&mut self, page: u64) {
        let first = iova(page);
        self.ask(|done| Command::InvalidateIotlb {
            first,
            last: first + PAGE - 1,
            done,
        });
    }

    /// The VMM answers a miss.
    pub fn answer(&mut self, page: u64, access: Access, refused: bool) {
        let miss = Miss {
            iova: iova(page),
            access,
        };
        self.handle.send(Command::MissAnswered { miss, refused }).unwrap();
        self.crank();
    }

    /// Starts a ring where it begins.
    pub fn start(&mut self, index: usize) {
        self.start_at(index, RingPosition::default()).unwrap();
    }

    pub fn start_at(&mut self, index: usize, position: RingPosition) -> Result<(), String> {
        let addresses = self.addresses;
        let ring = if index == RX { &self.rx } else { &self.tx };
        let at = |page| match addresses {
            Addresses::Iova => iova(page),
            Addresses::GuestPhysical => gpa(page),
        };
        let parts = RingParts {
            size: SIZE,
            desc: at(ring.page),
            avail: at(ring.page + 1),
            used: at(ring.page + 2),
            position,
            event_idx: true,
            translated: addresses == Addresses::Iova,
            kick: ring.kick.as_fd().try_clone_to_owned().unwrap(),
            call: None,
        };
        self.ask(|done| Command::StartQueue { index, parts, done })
    }

    pub fn stop(&mut self, index: usize) -> Option<RingPosition> {
        self.ask(|done| Command::StopQueue {
            index,
            pause: false,
            done,
        })
    }

    /// Writes through an I/O virtual address, as the guest does.
    pub fn put(&self, iova: u64, bytes: &[u8]) {
        put(&self.memory, iova, bytes);
    }

    pub fn bytes(&self, iova: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        for (i, byte) in bytes.iter_mut().enumerate() {
            let at = iova - IOVA + i as u64;
            *byte = self
                .memory
                .read_obj(GuestAddress(gpa(at / PAGE) + at % PAGE))
                .unwrap();
        }
        bytes
    }

    /// Writes through a guest-physical address.
    pub fn put_physical(&self, gpa: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(gpa)).unwrap();
    }

    /// Posts a page for the device to write.
    pub fn post(&mut self, page: u64) {
        let at = match self.addresses {
            Addresses::Iova => iova(page),
            Addresses::GuestPhysical => gpa(page),
        };
        self.rx.offer(&self.memory, &[(at, PAGE as u32)], WRITE);
    }

    /// Maps pages in a row and posts them as one buffer.
    pub fn post_pages(&mut self, first: u64, pages: u64) {
        for page in first..first + pages {
            self.map(page);
        }
        let buffer = (iova(first), (pages * PAGE) as u32);
        self.rx.offer(&self.memory, &[buffer], WRITE);
    }

    /// Sends a packet of the connection, with payload in buffers that hold it already, and kicks.
    pub fn send(&mut self, op: Op, payload: &[Buf]) {
        self.send_from(BUFFERS + 100, op, payload);
    }

    /// As [`Bench::send`], with the header in another page.
    pub fn send_from(&mut self, header_page: u64, op: Op, payload: &[Buf]) {
        self.queue(header_page, op, payload);
        self.kick(TX);
    }

    /// As [`Bench::send_from`], without a kick.
    pub fn queue(&mut self, header_page: u64, op: Op, payload: &[Buf]) {
        self.queue_flagged(header_page, op, 0, payload);
    }

    /// As [`Bench::queue`], with flags.
    pub fn queue_flagged(&mut self, header_page: u64, op: Op, flags: u32, payload: &[Buf]) {
        let header = Header {
            src_cid: Cid(3),
            dst_cid: Cid::HOST,
            src_port: Port(GUEST_PORT),
            dst_port: Port(PORT),
            len: payload.iter().map(|(_, len)| len).sum(),
            socket_type: self.socket_type,
            op: op as u16,
            flags,
            buf_alloc: GUEST_BUFFER,
            fwd_cnt: 0,
        };
        // A slot of its own, as the device may not have read the one before yet.
        let at = iova(header_page) + u64::from(self.tx.avail_idx % 32) * 64;
        self.put(at, &header.encode());
        let mut bufs = vec![(at, HEADER_LEN as u32)];
        bufs.extend_from_slice(payload);
        self.tx.offer(&self.memory, &bufs, 0);
    }

    /// Kicks as a driver with VIRTIO_F_EVENT_IDX does that has made one more chain available: if it was asked to.
    pub fn kick_if_wanted(&mut self, index: usize) {
        let ring = if index == RX { &self.rx } else { &self.tx };
        let event = self.bytes(iova(ring.page + 2) + 4 + 8 * u64::from(SIZE), 2);
        if ring.avail_idx.wrapping_sub(1) == u16::from_le_bytes([event[0], event[1]]) {
            self.kick(index);
        }
    }

    pub fn kick(&mut self, index: usize) {
        self.kick_only(index);
        self.crank();
    }

    /// Kicks; the device has not heard of it yet.
    pub fn kick_only(&self, index: usize) {
        let ring = if index == RX { &self.rx } else { &self.tx };
        rustix::io::write(&ring.kick, &1u64.to_ne_bytes()).unwrap();
    }

    /// Chains of the tx ring that came back since this was last called.
    pub fn sent(&mut self) -> usize {
        self.tx.used(&self.memory).len()
    }

    /// Packets that came: operation and payload length. Each buffer begins a page.
    pub fn received(&mut self) -> Vec<(u16, usize)> {
        self.packets()
            .into_iter()
            .map(|(header, payload)| (header.op, payload.len()))
            .collect()
    }

    /// Packets that came.
    pub fn packets(&mut self) -> Vec<(Header, Vec<u8>)> {
        let used = self.rx.used(&self.memory);
        used.into_iter()
            .map(|(addr, len)| {
                let bytes = self.bytes(addr, len as usize);
                let header = Header::decode(bytes[..HEADER_LEN].try_into().unwrap());
                (header, bytes[HEADER_LEN..].to_vec())
            })
            .collect()
    }

    pub fn snapshot(&mut self) -> DeviceSnapshot {
        self.ask(Command::Snapshot)
    }

    /// What keeps the rings that run: rx, tx.
    pub fn held(&mut self) -> Vec<Option<&'static str>> {
        self.snapshot().rings.iter().map(|ring| ring.held_by).collect()
    }
}

/// Memory of a file, as a VMM shares it.
fn shared_memory() -> (File, Arc<Memory>) {
    let file = File::from(memfd_create("guest", MemfdFlags::CLOEXEC).unwrap());
    file.set_len(PAGES * PAGE).unwrap();
    let offset = FileOffset::new(file.try_clone().unwrap(), 0);
    let region = MmapRegion::from_file(offset, (PAGES * PAGE) as usize).unwrap();
    let region = GuestRegionMmap::new(region, GuestAddress(0)).unwrap();
    (file, Arc::new(Memory::from_regions(vec![region]).unwrap()))
}

const NEXT: u16 = 1;
pub const WRITE: u16 = 2;

impl DriverRing {
    fn new(page: u64) -> DriverRing {
        DriverRing {
            page,
            next_desc: 0,
            avail_idx: 0,
            used_idx: 0,
            kick: eventfd(0, EventfdFlags::NONBLOCK).unwrap(),
        }
    }

    /// Makes a chain available. Descriptors are taken in turn: a test has no more than the ring outstanding.
    pub fn offer(&mut self, memory: &Memory, bufs: &[Buf], flags: u16) {
        let head = self.next_desc;
        for (i, (addr, len)) in bufs.iter().enumerate() {
            let index = self.next_desc;
            self.next_desc = (index + 1) % SIZE;
            let next = if i + 1 < bufs.len() { NEXT } else { 0 };
            let mut bytes = [0; 16];
            bytes[..8].copy_from_slice(&addr.to_le_bytes());
            bytes[8..12].copy_from_slice(&len.to_le_bytes());
            bytes[12..14].copy_from_slice(&(flags | next).to_le_bytes());
            bytes[14..].copy_from_slice(&self.next_desc.to_le_bytes());
            put(memory, iova(self.page) + 16 * u64::from(index), &bytes);
        }
        let slot = u64::from(self.avail_idx % SIZE);
        put(memory, iova(self.page + 1) + 4 + 2 * slot, &head.to_le_bytes());
        self.avail_idx = self.avail_idx.wrapping_add(1);
        put(memory, iova(self.page + 1) + 2, &self.avail_idx.to_le_bytes());
    }

    /// The first buffer's address and the used length of chains that came back.
    pub fn used(&mut self, memory: &Memory) -> Vec<(u64, u32)> {
        let at = |page: u64, offset: u64| GuestAddress(gpa(page) + offset);
        let mut used = Vec::new();
        loop {
            let idx: u16 = memory.read_obj(at(self.page + 2, 2)).unwrap();
            if self.used_idx == idx {
                return used;
            }
            let slot = u64::from(self.used_idx % SIZE);
            let head: u32 = memory.read_obj(at(self.page + 2, 4 + 8 * slot)).unwrap();
            let len: u32 = memory.read_obj(at(self.page + 2, 8 + 8 * slot)).unwrap();
            let addr: u64 = memory.read_obj(at(self.page, 16 * u64::from(head))).unwrap();
            used.push((addr, len));
            self.used_idx = self.used_idx.wrapping_add(1);
        }
    }
}

fn put(memory: &Memory, iova: u64, bytes: &[u8]) {
    for (i, byte) in bytes.iter().enumerate() {
        let at = iova - IOVA + i as u64;
        memory
            .write_obj(*byte, GuestAddress(gpa(at / PAGE) + at % PAGE))
            .unwrap();
    }
}

/// Reads so many bytes of a service's end.
pub fn read(bench: &mut Bench, stream: &mut UnixStream, len: usize) -> Vec<u8> {
    stream.set_nonblocking(true).unwrap();
    let mut bytes = Vec::new();
    bench.until(|_| {
        let mut piece = vec![0; len - bytes.len()];
        match stream.read(&mut piece) {
            Ok(n) => bytes.extend_from_slice(&piece[..n]),
            Err(error) => assert_eq!(error.kind(), io::ErrorKind::WouldBlock),
        }
        bytes.len() == len
    });
    bytes
}

/// Writes all of it; it fits the socket's buffer.
pub fn write(stream: &mut UnixStream, bytes: &[u8]) {
    stream.write_all(bytes).unwrap();
}

/// Bytes that repeat only after 251.
pub fn pattern(seed: usize, len: usize) -> Vec<u8> {
    (seed..seed + len).map(|i| (i % 251) as u8).collect()
}
