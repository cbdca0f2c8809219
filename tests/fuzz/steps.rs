//! Bytes as the story of a session: what the fuzzer changes, and what the corpus is made of.
//!
//! The encoding has a meaning for every byte string, so that a fuzzer wastes nothing, and is near to what a VMM says: a
//! request costs few bytes when it is well-formed, its addresses stand relative to guest memory or to where Linux puts
//! IOVAs, and one byte decides over the flags or over the descriptors. Whatever a VMM can send can be said, too.
//!
//! ```text
//! case    = head, step*                  head: bits 0-1 policy, bit 2 client mode, bit 3 the crate may say anything
//! step    = op, operands                 op: see `Op`
//! request = number, shape, fds, body     shape: bits 0-3 flags, bits 4-5 form of the body, bit 6 flags follow as u32
//! value   = tag, operands                tag: see `Values::value`
//! ```

use std::mem::take;

use vsock_sidecar::vhost_user::features::{
    VHOST_F_LOG_ALL, VIRTIO_F_ACCESS_PLATFORM, offered_features, offered_protocol_features,
};
use vsock_sidecar::vhost_user::message::{Message, NEED_REPLY, VERSION, request};
use vsock_sidecar::vhost_user::{AccessPlatform, Mode};

/// Bytes of guest memory that a case's descriptor has, from guest-physical address 0 on.
pub const RAM_SIZE: u64 = 256 << 20;
/// Where the VMM has it, as one of QEMU did.
pub const RAM_UADDR: u64 = 0x7fe3_dbff_f000;
/// Around where Linux puts the I/O virtual addresses of a device with 32 bits.
const IOVAS: u64 = 0xf000_0000;

/// The mebibyte that the driver writes to: the rings' pages and some around them.
const DRIVER_PAGES: u64 = 0x17f_0000;

/// The most steps of a case; what follows is not looked at.
const MAX_STEPS: usize = 400;
/// The longest body that is spelled out, in bytes.
const MAX_RAW: usize = 300;

/// Numbers of the steps.
#[derive(Clone, Copy)]
#[repr(u8)]
#[allow(dead_code)] // the fuzzer finds those that nobody writes
pub enum Op {
    Request = 0,
    Serve,
    Speak,
    Bytes,
    Kick,
    Memory,
    Misses,
    Pause,
    CloseChannel,
    CloseWriting,
    Boot,
    Stop,
}

const OPS: u8 = 12;

/// A VMM's life with us, and what comes in between.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Case {
    pub policy: AccessPlatform,
    pub mode: Mode,
    /// The crate answers what nobody asked for; then nothing holds but that nobody panics.
    pub babbles: bool,
    pub steps: Vec<Step>,
}

/// A step of a case.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Step {
    /// The VMM says something.
    Request(Request),
    /// The crate serves so many of the messages it has; without a crate to be asked, the VMM waits for what is due.
    Serve(usize),
    /// The crate says something that was not asked for.
    Speak(Message),
    /// The VMM says what need not be a message.
    Bytes(Vec<u8>),
    /// The driver kicks a ring.
    Kick(usize),
    /// The driver writes to its memory, from this guest-physical address on.
    Memory(u64, Vec<u8>),
    /// The VMM deals with the misses that have come.
    Misses(MissAnswer),
    /// The VMM does nothing until its last request has been served.
    Pause,
    /// The VMM closes its end of the channel for misses.
    CloseChannel,
    /// The VMM says that it has no more to say.
    CloseWriting,
}

/// What a VMM does about misses.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum MissAnswer {
    /// It maps what is asked for to this guest-physical page and all that follow to the next ones, then answers.
    Map(u64),
    /// It refuses them.
    Refuse,
    /// It reads them, and no more.
    Ignore,
    /// It answers what nobody asked, too.
    Unasked,
}

/// A request of the VMM.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Request {
    pub message: Message,
    pub fds: Vec<Fd>,
}

/// A descriptor that comes with a request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fd {
    /// Guest memory, [`RAM_SIZE`] bytes.
    Ram,
    /// A file of two pages.
    Small,
    /// An eventfd; that of a ring's kicks if the request is SET_VRING_KICK.
    Event,
    /// A unix socket whose other end the VMM reads: the channel for misses.
    Channel,
    /// A pipe's reading end.
    Pipe,
    /// /dev/null.
    Null,
}

const FDS: [Fd; 6] = [Fd::Ram, Fd::Small, Fd::Event, Fd::Channel, Fd::Pipe, Fd::Null];

impl Case {
    /// The case that some bytes stand for.
    pub fn decode(bytes: &[u8]) -> Case {
        let mut values = Values::new(bytes);
        let head = values.u8();
        let case = Case {
            policy: [
                AccessPlatform::Auto,
                AccessPlatform::Iotlb,
                AccessPlatform::Identity,
                AccessPlatform::Off,
            ][usize::from(head & 3)],
            mode: [Mode::Server, Mode::Client][usize::from(head >> 2 & 1)],
            babbles: head >> 3 & 1 == 1,
            steps: Vec::new(),
        };
        values.policy = case.policy;
        values.mode = case.mode;
        let mut steps = Vec::new();
        while !values.rest.is_empty() && steps.len() < MAX_STEPS {
            values.step(&mut steps);
        }
        Case { steps, ..case }
    }

    /// The first byte of a case.
    pub fn head(policy: AccessPlatform, mode: Mode) -> u8 {
        let policy = match policy {
            AccessPlatform::Auto => 0,
            AccessPlatform::Iotlb => 1,
            AccessPlatform::Identity => 2,
            AccessPlatform::Off => 3,
        };
        policy | u8::from(mode == Mode::Client) << 2
    }
}

impl Request {
    fn new(number: u32, flags: u32, body: &[u8], fds: &[Fd]) -> Request {
        Request {
            message: Message::new(number, flags, body),
            fds: fds.into(),
        }
    }
}

/// Bytes that are read as values, and as zeroes behind their end.
struct Values<'a> {
    rest: &'a [u8],
    policy: AccessPlatform,
    mode: Mode,
    /// The value before, which addresses of one structure are near to.
    last: u64,
}

impl<'a> Values<'a> {
    fn new(rest: &'a [u8]) -> Values<'a> {
        Values {
            rest,
            policy: AccessPlatform::Auto,
            mode: Mode::Server,
            last: 0,
        }
    }

    fn take<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        let n = N.min(self.rest.len());
        bytes[..n].copy_from_slice(&self.rest[..n]);
        self.rest = &self.rest[n..];
        bytes
    }

    fn bytes(&mut self, most: usize) -> Vec<u8> {
        let n = usize::from(self.u16()).min(most).min(self.rest.len());
        let (bytes, rest) = self.rest.split_at(n);
        self.rest = rest;
        bytes.into()
    }

    fn u8(&mut self) -> u8 {
        self.take::<1>()[0]
    }

    fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.take())
    }

    /// An integer that is likely to mean something.
    fn value(&mut self) -> u64 {
        let tag = self.u8();
        self.last = match tag % 8 {
            0 => self.u8().into(),
            1 => self.u16().into(),
            2 => u64::from_le_bytes(self.take()),
            3 => RAM_UADDR + (u64::from(self.u16()) << 12) + u64::from(self.u16()),
            4 => IOVAS + (u64::from(self.u16()) << 12) + u64::from(self.u16()),
            5 => u64::MAX - u64::from(self.u16()),
            6 => 1 << (self.u8() & 63),
            _ => self.last.wrapping_add(self.u16().into()),
        };
        self.last
    }

    /// Feature bits: what is offered, with a few of them changed.
    fn features(&mut self, offered: u64) -> u64 {
        match self.u8() {
            0 => offered & !VHOST_F_LOG_ALL,
            1 => offered & !VHOST_F_LOG_ALL & !VIRTIO_F_ACCESS_PLATFORM,
            2 => offered,
            3 => u64::from_le_bytes(self.take()),
            bit => offered & !VHOST_F_LOG_ALL ^ 1 << (bit & 63),
        }
    }

    fn step(&mut self, steps: &mut Vec<Step>) {
        let op = self.u8() % OPS;
        steps.push(match op {
            0 => Step::Request(self.request()),
            1 => Step::Serve(match self.u8() {
                0 => usize::MAX,
                n => n.into(),
            }),
            2 => Step::Speak(self.request().message),
            3 => Step::Bytes(self.bytes(MAX_RAW)),
            4 => Step::Kick(usize::from(self.u8()) % 3),
            5 => Step::Memory(DRIVER_PAGES + (u64::from(self.u16()) << 4), self.bytes(MAX_RAW)),
            6 => Step::Misses(match self.u8() % 8 {
                0..=3 => MissAnswer::Map(u64::from(self.u16()) << 12),
                4 | 5 => MissAnswer::Refuse,
                6 => MissAnswer::Ignore,
                _ => MissAnswer::Unasked,
            }),
            7 => Step::Pause,
            8 => Step::CloseChannel,
            9 => Step::CloseWriting,
            10 => {
                let kind = self.u8();
                let boot = Boot {
                    realize: kind & 1 == 0,
                    platform: kind & 2 == 0,
                    iovas: kind & 4 == 0,
                };
                steps.extend(
                    boot.requests(self.policy, self.mode)
                        .into_iter()
                        .map(Step::Request),
                );
                return;
            }
            _ => {
                steps.extend(stop().into_iter().map(Step::Request));
                return;
            }
        });
    }

    fn request(&mut self) -> Request {
        let number = match self.u8() {
            0xff => u32::from_le_bytes(self.take()),
            number => u32::from(number) % 46,
        };
        let shape = self.u8();
        let flags = match shape & 0x40 {
            0 => u32::from(shape & 0xf),
            _ => u32::from_le_bytes(self.take()),
        };
        let fds = self.u8();
        let body = match shape >> 4 & 3 {
            0 => self.body(number),
            // Too short: a body of QEMU's IOTLB_MSG is six bytes longer than the standard's.
            1 => {
                let less = usize::from(self.u8());
                let mut body = self.body(number);
                body.truncate(body.len().saturating_sub(less));
                body
            }
            2 => {
                let mut body = self.body(number);
                body.resize(body.len() + usize::from(self.u8()), 0);
                body
            }
            _ => self.bytes(MAX_RAW),
        };
        let proper = proper_fds(number, &body);
        let kind = FDS[usize::from(fds >> 3) % FDS.len()];
        let fds = match fds & 7 {
            0 => Vec::new(),
            1 | 2 => proper,
            3 => vec![kind; proper.len()],
            7 => vec![kind; 30],
            n => vec![kind; usize::from(n) - 3],
        };
        Request {
            message: Message::new(number, flags, &body),
            fds,
        }
    }

    /// The body that a request should have.
    fn body(&mut self, number: u32) -> Vec<u8> {
        use request::*;
        match number {
            SET_FEATURES => self.features(offered_features(self.policy)).to_ne_bytes().into(),
            SET_PROTOCOL_FEATURES => self
                .features(offered_protocol_features(self.mode))
                .to_ne_bytes()
                .into(),
            SET_VRING_NUM | SET_VRING_BASE | GET_VRING_BASE | SET_VRING_ENABLE => {
                state_body(self.u8().into(), self.value() as u32)
            }
            SET_VRING_ADDR => {
                let index = u32::from(self.u8());
                let [desc, used, avail, log] = [(); 4].map(|()| self.value());
                vring_addr_body(index, [desc, used, avail, log])
            }
            SET_VRING_KICK | SET_VRING_CALL | SET_VRING_ERR => u64::from(self.u16()).to_ne_bytes().into(),
            SET_MEM_TABLE => {
                let count = usize::from(self.u8()) % 12;
                let regions: Vec<_> = (0..count).map(|_| [(); 4].map(|()| self.value())).collect();
                table_body(&regions)
            }
            ADD_MEM_REG | REM_MEM_REG => {
                let mut body = vec![0; 8];
                body.extend([(); 4].map(|()| self.value().to_ne_bytes()).concat());
                body
            }
            SET_LOG_BASE => [(); 2].map(|()| self.value().to_ne_bytes()).concat(),
            IOTLB_MSG => {
                let [iova, size, uaddr] = [(); 3].map(|()| self.value());
                let kinds = self.u8();
                iotlb_body(iova, size, uaddr, kinds & 0xf, kinds >> 4)
            }
            GET_CONFIG | SET_CONFIG => {
                let (offset, size) = (self.value() as u32, self.value() as u32);
                let mut body = [offset, size, 0].map(u32::to_ne_bytes).concat();
                body.resize(12 + (size as usize).min(MAX_RAW), 0);
                body
            }
            _ => Vec::new(),
        }
    }
}

/// The descriptors that a request should have.
fn proper_fds(number: u32, body: &[u8]) -> Vec<Fd> {
    match number {
        request::SET_MEM_TABLE => vec![Fd::Ram; usize::from(body.first().copied().unwrap_or(0)).min(30)],
        request::ADD_MEM_REG => vec![Fd::Ram],
        request::SET_VRING_KICK | request::SET_VRING_CALL | request::SET_VRING_ERR => vec![Fd::Event],
        request::SET_BACKEND_REQ_FD => vec![Fd::Channel],
        request::SET_LOG_BASE => vec![Fd::Small],
        _ => Vec::new(),
    }
}

/// A case as bytes, piece by piece.
#[derive(Default)]
pub struct Writer {
    pub bytes: Vec<u8>,
}

impl Writer {
    pub fn op(&mut self, op: Op) -> &mut Writer {
        self.u8(op as u8)
    }

    pub fn u8(&mut self, value: u8) -> &mut Writer {
        self.bytes.push(value);
        self
    }

    pub fn u16(&mut self, value: u16) -> &mut Writer {
        self.bytes.extend(value.to_le_bytes());
        self
    }

    /// The begin of a request with the descriptors it should have, or none.
    pub fn request(&mut self, number: u32, flags: u32, fds: bool) -> &mut Writer {
        self.op(Op::Request)
            .u8(number as u8)
            .u8(flags as u8 & 0xf)
            .u8(fds.into())
    }

    /// An integer in its shortest form.
    pub fn value(&mut self, value: u64) -> &mut Writer {
        let place = |base: u64| {
            let offset = value.checked_sub(base)?;
            let page = u16::try_from(offset >> 12).ok()?;
            Some((page, (offset & 0xfff) as u16))
        };
        if let Ok(value) = u8::try_from(value) {
            self.u8(0).u8(value)
        } else if value.is_power_of_two() {
            self.u8(6).u8(value.trailing_zeros() as u8)
        } else if let Ok(value) = u16::try_from(value) {
            self.u8(1).u16(value)
        } else if let Some((page, offset)) = place(RAM_UADDR) {
            self.u8(3).u16(page).u16(offset)
        } else if let Some((page, offset)) = place(IOVAS) {
            self.u8(4).u16(page).u16(offset)
        } else {
            self.u8(2).bytes.extend(value.to_le_bytes());
            self
        }
    }

    /// Takes what was written.
    pub fn finish(&mut self) -> Vec<u8> {
        take(&mut self.bytes)
    }
}

// ------------------------------------------------------------------------------------------- what QEMU says

/// I/O virtual addresses of the descriptor tables behind Intel's IOMMU, in their pages' order: rx, tx.
pub const RING_IOVAS: [u64; 2] = [0xffff_f000, 0xffff_e000];
/// Guest-physical pages of the rings.
pub const RING_PAGES: [u64; 2] = [0x180_0000, 0x17f_f000];

/// How a VMM begins.
#[derive(Clone, Copy)]
pub struct Boot {
    /// With what comes before there is a guest.
    pub realize: bool,
    /// ACCESS_PLATFORM is acknowledged, if it is offered.
    pub platform: bool,
    /// The rings' addresses are IOVAs.
    pub iovas: bool,
}

impl Boot {
    /// QEMU's requests in its order, until both rings are enabled. With IOVAs, the pages of both rings are mapped.
    pub fn requests(self, policy: AccessPlatform, mode: Mode) -> Vec<Request> {
        use request::*;
        let bare = |number, body: &[u8], fds: &[Fd]| Request::new(number, VERSION, body, fds);
        let acked = |number, body: &[u8], fds: &[Fd]| Request::new(number, VERSION | NEED_REPLY, body, fds);
        let mut requests = Vec::new();
        if self.realize {
            requests.extend([
                bare(GET_FEATURES, &[], &[]),
                bare(GET_PROTOCOL_FEATURES, &[], &[]),
                bare(
                    SET_PROTOCOL_FEATURES,
                    &offered_protocol_features(mode).to_ne_bytes(),
                    &[],
                ),
                bare(GET_QUEUE_NUM, &[], &[]),
                acked(SET_BACKEND_REQ_FD, &[], &[Fd::Channel]),
                bare(SET_OWNER, &[], &[]),
                bare(GET_FEATURES, &[], &[]),
            ]);
        }
        let mut features = offered_features(policy) & !VHOST_F_LOG_ALL;
        if !self.platform {
            features &= !VIRTIO_F_ACCESS_PLATFORM;
        }
        requests.push(bare(SET_FEATURES, &features.to_ne_bytes(), &[]));
        requests.push(acked(
            SET_MEM_TABLE,
            &table_body(&[[0, RAM_SIZE, RAM_UADDR, 0]]),
            &[Fd::Ram],
        ));
        for index in 0..2u32 {
            let desc = match self.iovas {
                true => RING_IOVAS[index as usize],
                false => RAM_UADDR + RING_PAGES[index as usize],
            };
            requests.extend([
                bare(SET_VRING_NUM, &state_body(index, 128), &[]),
                bare(SET_VRING_BASE, &state_body(index, 0), &[]),
                bare(
                    SET_VRING_ADDR,
                    &vring_addr_body(index, [desc, desc + 0x940, desc + 0x800, 0]),
                    &[],
                ),
                bare(SET_VRING_KICK, &u64::from(index).to_ne_bytes(), &[Fd::Event]),
                bare(SET_VRING_CALL, &u64::from(index).to_ne_bytes(), &[Fd::Event]),
            ]);
        }
        for index in 0..2 {
            requests.push(bare(SET_VRING_ENABLE, &state_body(index, 1), &[]));
        }
        if self.iovas {
            for (iova, gpa) in RING_IOVAS.into_iter().zip(RING_PAGES) {
                let body = iotlb_body(iova, 0x1000, RAM_UADDR + gpa, 3, 2);
                requests.push(acked(IOTLB_MSG, &body, &[]));
            }
        }
        requests
    }
}

/// What QEMU says when the guest resets.
pub fn stop() -> Vec<Request> {
    let enable = (0..2).map(|index| (request::SET_VRING_ENABLE, index));
    let base = (0..2).map(|index| (request::GET_VRING_BASE, index));
    enable
        .chain(base)
        .map(|(number, index)| Request::new(number, VERSION, &state_body(index, 0), &[]))
        .collect()
}

pub fn state_body(index: u32, num: u32) -> Vec<u8> {
    [index, num].map(u32::to_ne_bytes).concat()
}

/// Addresses of the descriptor table, used ring, available ring, and log.
pub fn vring_addr_body(index: u32, addresses: [u64; 4]) -> Vec<u8> {
    let mut body = state_body(index, 0);
    body.extend(addresses.map(u64::to_ne_bytes).concat());
    body
}

/// Regions as guest address, size, VMM address, offset in the file.
pub fn table_body(regions: &[[u64; 4]]) -> Vec<u8> {
    let mut body = (regions.len() as u64).to_ne_bytes().to_vec();
    for region in regions {
        body.extend(region.map(u64::to_ne_bytes).concat());
    }
    body
}

pub fn iotlb_body(iova: u64, size: u64, uaddr: u64, perm: u8, kind: u8) -> Vec<u8> {
    let mut body = [iova, size, uaddr].map(u64::to_ne_bytes).concat();
    body.extend([perm, kind, 0, 0, 0, 0, 0, 0]);
    body
}

// ---------------------------------------------------------------------------------------------- changes

/// A neighbour of a case: the same for the same number, the case itself for 0.
pub fn changed(bytes: &[u8], number: u64) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    // SplitMix64.
    let mut state = number;
    let mut random = |below: usize| {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ z >> 31) % below.max(1) as u64) as usize
    };
    if number == 0 {
        return bytes;
    }
    for _ in 0..=random(6) {
        let (from, other) = (random(bytes.len()), random(bytes.len()));
        let len = random(24).min(bytes.len().saturating_sub(from.max(other)));
        match random(6) {
            // Another policy or mode.
            0 if !bytes.is_empty() => bytes[0] = random(8) as u8,
            1 if !bytes.is_empty() => bytes[from] ^= 1 << random(8),
            2 if !bytes.is_empty() => bytes[from] = random(256) as u8,
            3 => drop(bytes.drain(from..from + len)),
            4 => {
                let copy = bytes[from..from + len].to_vec();
                bytes.splice(other..other, copy);
            }
            _ => {
                let new: Vec<u8> = (0..random(16)).map(|_| random(256) as u8).collect();
                bytes.splice(from..from, new);
            }
        }
    }
    bytes
}
