//! A VMM that says what a case says, with real descriptors, and one that does everything right.

use std::collections::VecDeque;
use std::io::{IoSlice, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::time::Instant;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::io::Errno;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use vsock_sidecar::vhost_user::message::{HEADER_LEN, Message, NEED_REPLY, REPLY, VERSION, request};
use vsock_sidecar::vhost_user::{AccessPlatform, Mode};

use super::{PATIENCE, wait_for};
use crate::steps::{
    Boot, Fd, MissAnswer, RAM_SIZE, RAM_UADDR, RING_PAGES, Request, Step, iotlb_body, state_body, stop,
};

/// A length of the misses' messages: VHOST_USER_BACKEND_IOTLB_MSG with its body.
const MISS_LEN: usize = HEADER_LEN + 32;
/// Misses that are dealt with in one step.
const MOST_MISSES: usize = 32;
/// Guest-physical addresses of the buffers: rx of a page each, tx of 64 bytes each in one page.
const RX_BUFFERS: u64 = 0x10_0000;
const TX_BUFFERS: u64 = 0x20_0000;
/// Buffers that the driver posts at once.
const POSTED: u16 = 8;
/// Offsets in a ring's page, as Linux lays out 128 entries.
const AVAIL: u64 = 0x800;
const USED: u64 = 0x940;

pub struct Vmm {
    socket: UnixStream,
    ram: std::fs::File,
    small: OwnedFd,
    kicks: [OwnedFd; 3],
    channel: Option<UnixStream>,
    /// Numbers of the requests since the last answer, in order; `None` once something was said that need not be a request.
    unanswered: Option<VecDeque<u32>>,
    /// Answers as bytes, as far as they have come.
    received: VecDeque<u8>,
    open: bool,
    spoken: bool,
    /// GET_FEATURES that are due an answer, and answers to them.
    asked: usize,
    answered: usize,
}

fn memory(size: u64) -> OwnedFd {
    let fd = memfd_create("guest", MemfdFlags::CLOEXEC).expect("a memfd");
    ftruncate(&fd, size).expect("a memfd's size");
    fd
}

fn event() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).expect("an eventfd")
}

impl Vmm {
    pub fn new(socket: UnixStream) -> Vmm {
        let vmm = Vmm {
            socket,
            ram: memory(RAM_SIZE).into(),
            small: memory(0x2000),
            kicks: [event(), event(), event()],
            channel: None,
            unanswered: Some(VecDeque::new()),
            received: VecDeque::new(),
            open: true,
            spoken: false,
            asked: 0,
            answered: 0,
        };
        vmm.post_buffers();
        vmm
    }

    pub fn is_open(&self) -> bool {
        self.open
    }

    pub fn has_spoken(&self) -> bool {
        self.spoken
    }

    pub fn step(&mut self, step: &Step) {
        match step {
            Step::Request(request) => self.say(request),
            Step::Bytes(bytes) => {
                self.unanswered = None;
                self.send(bytes, &[]);
            }
            Step::Kick(ring) => self.kick(*ring),
            Step::Memory(gpa, bytes) => self.ram.write_all_at(bytes, *gpa).expect("guest memory"),
            Step::Misses(answer) => self.deal_with_misses(*answer),
            Step::Serve(_) | Step::Pause => self.read_for(1),
            Step::CloseChannel => self.channel = None,
            Step::CloseWriting => {
                let _ = self.socket.shutdown(std::net::Shutdown::Write);
                self.asked = 0;
            }
            // The crate here is the real one.
            Step::Speak(_) => {}
        }
    }

    fn kick(&self, ring: usize) {
        let _ = rustix::io::write(&self.kicks[ring], &1u64.to_ne_bytes());
    }

    fn say(&mut self, request: &Request) {
        let message = &request.message;
        let mut ends = Vec::new();
        let mut fds: Vec<BorrowedFd<'_>> = Vec::new();
        let made: Vec<Option<OwnedFd>> = request
            .fds
            .iter()
            .map(|fd| match fd {
                Fd::Channel => {
                    let (ours, theirs) = UnixStream::pair().expect("a socket pair");
                    ours.set_nonblocking(true).expect("a socket");
                    ends.push(ours);
                    Some(theirs.into())
                }
                Fd::Event if message.request() != request::SET_VRING_KICK => Some(event()),
                Fd::Pipe => Some(rustix::pipe::pipe().expect("a pipe").0),
                Fd::Null => Some(std::fs::File::open("/dev/null").expect("/dev/null").into()),
                _ => None,
            })
            .collect();
        let ring = usize::from(message.body().first().copied().unwrap_or(0)) % 3;
        let kick = self.kicks[ring].try_clone().expect("a descriptor");
        let (ram, small) = (
            self.ram.try_clone().expect("a descriptor"),
            self.small.try_clone().expect("a descriptor"),
        );
        for (fd, made) in request.fds.iter().zip(&made) {
            fds.push(match (fd, made) {
                (_, Some(made)) => made.as_fd(),
                (Fd::Ram, None) => ram.as_fd(),
                (Fd::Small, None) => small.as_fd(),
                (_, None) => kick.as_fd(),
            });
        }
        if message.request() == request::GET_FEATURES
            && matches!(message.flags(), 1 | 9)
            && message.body().is_empty()
        {
            self.asked += 1;
        }
        self.say_bare(message, &fds);
        self.channel = ends.pop().or(self.channel.take());
    }

    fn say_bare(&mut self, message: &Message, fds: &[BorrowedFd<'_>]) {
        if let Some(unanswered) = &mut self.unanswered {
            unanswered.push_back(message.request());
        }
        self.send(message.bytes(), fds);
    }

    /// Sends, and reads answers as long as nothing can be sent: a VMM that reads nothing is served nothing.
    fn send(&mut self, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
        let mut rest = bytes;
        let mut fds = fds;
        let deadline = Instant::now() + PATIENCE;
        while self.open && !rest.is_empty() {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(32))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            if !fds.is_empty() {
                assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
            }
            let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            match sendmsg(&self.socket, &[IoSlice::new(rest)], &mut control, flags) {
                Ok(sent) => {
                    self.spoken = true;
                    rest = &rest[sent..];
                    fds = &[];
                }
                Err(Errno::AGAIN) => {
                    assert!(Instant::now() < deadline, "neither served nor closed");
                    self.poll(PollFlags::IN | PollFlags::OUT, 100);
                    self.read();
                }
                Err(_) => self.open = false,
            }
        }
    }

    fn poll(&self, flags: PollFlags, milliseconds: i64) -> bool {
        let timeout = Timespec {
            tv_sec: milliseconds / 1000,
            tv_nsec: milliseconds % 1000 * 1_000_000,
        };
        poll(&mut [PollFd::new(&self.socket, flags)], Some(&timeout)).unwrap_or(0) > 0
    }

    fn read_for(&mut self, milliseconds: i64) {
        if self.poll(PollFlags::IN, milliseconds) {
            self.read();
        }
    }

    /// Takes what answers there are.
    fn read(&mut self) {
        let mut chunk = [0; 4096];
        let flags = rustix::net::RecvFlags::DONTWAIT;
        loop {
            match rustix::net::recv(&self.socket, &mut chunk, flags) {
                Ok((0, _)) => {
                    self.open = false;
                    break;
                }
                Ok((n, _)) => self.received.extend(&chunk[..n.min(chunk.len())]),
                Err(Errno::AGAIN) => break,
                Err(_) => {
                    self.open = false;
                    break;
                }
            }
        }
    }

    /// The next whole answer.
    fn answer(&mut self) -> Option<(u32, Vec<u8>)> {
        let field = |at: usize| {
            let bytes: Vec<u8> = self.received.iter().skip(at).take(4).copied().collect();
            Some(u32::from_ne_bytes(bytes.try_into().ok()?))
        };
        let (number, flags, len) = (field(0)?, field(4)?, field(8)? as usize);
        assert_eq!(flags & REPLY, REPLY, "what is no answer");
        assert!(len <= 4096, "an answer of {len} bytes");
        if self.received.len() < HEADER_LEN + len {
            return None;
        }
        let message: Vec<u8> = self.received.drain(..HEADER_LEN + len).collect();
        // Not every request has an answer, but answers come in the order of the requests.
        if let Some(unanswered) = &mut self.unanswered {
            let at = unanswered.iter().position(|request| *request == number);
            let at =
                at.unwrap_or_else(|| panic!("an answer to {number}, out of turn: {unanswered:?} are due"));
            unanswered.drain(..=at);
        }
        Some((number, message[HEADER_LEN..].to_vec()))
    }

    /// Waits until all that was said has been served, or the session has ended.
    pub fn wait_served(&mut self) {
        if !self.spoken {
            return;
        }
        self.say(&Request {
            message: Message::new(request::GET_FEATURES, VERSION, &[]),
            fds: Vec::new(),
        });
        let deadline = Instant::now() + PATIENCE;
        loop {
            while let Some((number, _)) = self.answer() {
                self.answered += usize::from(number == request::GET_FEATURES);
            }
            if !self.open || self.answered >= self.asked {
                return;
            }
            assert!(Instant::now() < deadline, "neither served nor closed");
            self.read_for(100);
        }
    }

    fn deal_with_misses(&mut self, answer: MissAnswer) {
        use std::io::Write;
        let Some(channel) = self.channel.take() else {
            return;
        };
        let say = |error: u64| {
            let answer = Message::new(1, VERSION | REPLY, &error.to_ne_bytes());
            // Nobody may be there to read it.
            let _ = (&channel).write(answer.bytes());
        };
        if answer == MissAnswer::Unasked {
            say(0);
            say(1);
        }
        let _ = poll(
            &mut [PollFd::new(&channel, PollFlags::IN)],
            Some(&Timespec {
                tv_sec: 0,
                tv_nsec: 1_000_000,
            }),
        );
        for round in 0..MOST_MISSES as u64 {
            let mut miss = [0; MISS_LEN];
            if (&channel).read_exact(&mut miss).is_err() {
                break;
            }
            let iova = u64::from_ne_bytes(miss[HEADER_LEN..HEADER_LEN + 8].try_into().expect("eight bytes"));
            match answer {
                MissAnswer::Map(page) => {
                    let gpa = (page + (round << 12)) % RAM_SIZE;
                    let body = iotlb_body(iova & !0xfff, 0x1000, RAM_UADDR + gpa, 3, 2);
                    let update = Message::new(request::IOTLB_MSG, VERSION | NEED_REPLY, &body);
                    self.say_bare(&update, &[]);
                    say(0);
                }
                MissAnswer::Refuse => say(1),
                MissAnswer::Ignore => {}
                MissAnswer::Unasked => {
                    say(0);
                    say(0);
                }
            }
        }
        self.channel = Some(channel);
    }

    /// What a driver does before it says that it is up: rx buffers, and a packet that asks for a connection.
    fn post_buffers(&self) {
        const WRITE: u16 = 2;
        for index in 0..POSTED {
            let rx = RX_BUFFERS + (u64::from(index) << 12);
            self.write_descriptor(RING_PAGES[0], index, rx, 4096, WRITE);
            let tx = TX_BUFFERS + u64::from(index) * 64;
            self.write_descriptor(RING_PAGES[1], index, tx, 44, 0);
            let mut header = [0; 44];
            header[..8].copy_from_slice(&3u64.to_le_bytes());
            header[8..16].copy_from_slice(&2u64.to_le_bytes());
            header[16..20].copy_from_slice(&(1000 + u32::from(index)).to_le_bytes());
            header[20..24].copy_from_slice(&1234u32.to_le_bytes());
            header[28..30].copy_from_slice(&1u16.to_le_bytes());
            // VIRTIO_VSOCK_OP_REQUEST.
            header[30..32].copy_from_slice(&1u16.to_le_bytes());
            header[36..40].copy_from_slice(&0x1_0000u32.to_le_bytes());
            self.write(tx, &header);
        }
        for (page, posted) in RING_PAGES.into_iter().zip([POSTED, 1]) {
            for index in 0..POSTED {
                self.write(page + AVAIL + 4 + u64::from(index) * 2, &index.to_le_bytes());
            }
            self.write(page + AVAIL + 2, &posted.to_le_bytes());
        }
    }

    fn write_descriptor(&self, page: u64, index: u16, address: u64, len: u32, flags: u16) {
        let mut descriptor = address.to_le_bytes().to_vec();
        descriptor.extend(len.to_le_bytes());
        descriptor.extend(flags.to_le_bytes());
        descriptor.extend([0, 0]);
        self.write(page + u64::from(index) * 16, &descriptor);
    }

    fn write(&self, gpa: u64, bytes: &[u8]) {
        self.ram.write_all_at(bytes, gpa).expect("guest memory");
    }

    fn read_u16(&self, gpa: u64) -> u16 {
        let mut bytes = [0; 2];
        self.ram.read_exact_at(&mut bytes, gpa).expect("guest memory");
        u16::from_le_bytes(bytes)
    }

    /// Boots as QEMU does, behind an IOMMU if the policy allows it; the guest's request for a connection is refused in the
    /// guest's own ring; then the guest resets.
    pub fn boot_and_be_answered(&mut self, policy: AccessPlatform, mode: Mode) {
        let translates = matches!(policy, AccessPlatform::Auto | AccessPlatform::Iotlb);
        let boot = Boot {
            realize: true,
            platform: true,
            iovas: translates,
        };
        for request in boot.requests(policy, mode) {
            self.say_and_check(&request);
        }
        if translates {
            let len = u64::from(POSTED) << 12;
            for gpa in [RX_BUFFERS, TX_BUFFERS] {
                let body = iotlb_body(gpa, len, RAM_UADDR + gpa, 3, 2);
                self.say_and_check(&Request {
                    message: Message::new(request::IOTLB_MSG, VERSION | NEED_REPLY, &body),
                    fds: Vec::new(),
                });
            }
        }
        self.kick(0);
        self.kick(1);
        for (page, ring) in RING_PAGES.into_iter().zip(["rx", "tx"]) {
            wait_for(&format!("the packet and its answer ({ring} ring)"), || {
                (self.read_u16(page + USED + 2) == 1).then_some(())
            });
        }
        const RST: u16 = 3;
        assert_eq!(
            self.read_u16(RX_BUFFERS + 30),
            RST,
            "the answer to the guest's request"
        );
        for request in stop() {
            if let Some(body) = self.say_and_check(&request) {
                let index = u32::from(request.message.body()[0]);
                assert_eq!(body, state_body(index, 1), "where ring {index} stands");
            }
        }
    }

    /// Sends a request and awaits its answer, if it has one: an acknowledgement says yes.
    fn say_and_check(&mut self, request: &Request) -> Option<Vec<u8>> {
        self.say(request);
        let message = &request.message;
        let number = message.request();
        let asks = matches!(
            number,
            request::GET_FEATURES
                | request::GET_PROTOCOL_FEATURES
                | request::GET_QUEUE_NUM
                | request::GET_VRING_BASE
        );
        if !asks && !message.needs_reply() {
            return None;
        }
        let (answered, body) = wait_for(&format!("the answer to {message:?}"), || {
            self.read();
            let answer = self.answer();
            assert!(
                self.open || answer.is_some(),
                "the connection was closed over {message:?}"
            );
            answer
        });
        assert_eq!(answered, number);
        if !asks {
            assert_eq!(body, [0; 8], "{message:?} is refused");
        }
        Some(body)
    }
}
