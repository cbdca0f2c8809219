//! Messages in words, for the flight recorder.

use std::fmt;

use crate::guest::{Access, Miss};
use crate::vhost_user::Features;
use crate::vhost_user::message::{self, Body, MemoryRegion, Message, request};

use super::recorder::Detail;

/// Regions of a memory table that are told one by one.
const REGIONS_TOLD: usize = 4;

/// What an IOTLB_MSG is for; vhost-user.rst, "An IOTLB message".
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum IotlbKind {
    Miss,
    Update,
    Invalidate,
    AccessFail,
    /// A number the specification does not know, or a body of another length.
    Unknown(u8),
}

/// An IOTLB_MSG as it is told.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct IotlbText {
    pub(super) kind: IotlbKind,
    iova: u64,
    /// Bytes; 0 where it says nothing.
    size: u64,
    /// 1 read, 2 write, 3 both; what INVALIDATE carries here is left over in QEMU's memory.
    perm: u8,
}

impl IotlbText {
    pub(super) fn of(message: &Message) -> IotlbText {
        let (kind, iova, size, perm) = match message.request_body() {
            Body::Iotlb {
                iova,
                size,
                perm,
                kind,
                ..
            } => (kind, iova, size, perm),
            _ => (0, 0, 0, 0),
        };
        let kind = match kind {
            1 => IotlbKind::Miss,
            2 => IotlbKind::Update,
            3 => IotlbKind::Invalidate,
            4 => IotlbKind::AccessFail,
            other => IotlbKind::Unknown(other),
        };
        IotlbText {
            kind,
            iova,
            size,
            perm,
        }
    }

    pub(super) fn miss(miss: Miss) -> IotlbText {
        IotlbText {
            kind: IotlbKind::Miss,
            iova: miss.iova,
            size: 0,
            perm: match miss.access {
                Access::Read => 1,
                Access::Write => 2,
            },
        }
    }

    pub(super) fn into_detail(self) -> Detail {
        Detail::Iotlb {
            first: self,
            last: self,
        }
    }
}

impl fmt::Display for IotlbText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let IotlbText {
            kind,
            iova,
            size,
            perm,
        } = *self;
        let perm = match perm {
            1 => "ro",
            2 => "wo",
            3 => "rw",
            _ => "no permission",
        };
        match kind {
            IotlbKind::Miss => write!(f, "MISS iova {iova:#x} {perm}"),
            IotlbKind::Update => write!(f, "UPDATE iova {iova:#x} size {size:#x} {perm}"),
            IotlbKind::Invalidate => write!(f, "INVALIDATE iova {iova:#x} size {size:#x}"),
            IotlbKind::AccessFail => write!(f, "ACCESS_FAIL iova {iova:#x}"),
            IotlbKind::Unknown(0) => f.write_str("not an IOTLB message"),
            IotlbKind::Unknown(kind) => write!(f, "type {kind}, unknown"),
        }
    }
}

/// What a request says.
pub(super) fn of_request(message: &Message, fds: usize) -> Detail {
    let number = message.request();
    let text = match (number, message.request_body()) {
        (request::IOTLB_MSG, _) => return IotlbText::of(message).into_detail(),
        (request::SET_FEATURES, Body::U64(bits)) => features(Features::virtio(bits)),
        (request::SET_PROTOCOL_FEATURES, Body::U64(bits)) => features(Features::protocol(bits)),
        (_, Body::VringState { index, num }) => vring_state(number, index, Some(num)),
        (
            _,
            Body::VringAddr {
                index,
                desc,
                used,
                avail,
            },
        ) => format!("queue {index}, desc {desc:#x}, avail {avail:#x}, used {used:#x}"),
        (_, Body::VringFd { index, has_fd: true }) => format!("queue {index}, with a descriptor"),
        (_, Body::VringFd { index, .. }) => format!("queue {index}, without a descriptor"),
        (_, Body::MemoryTable(regions)) => memory_table(&regions),
        (_, Body::MemoryRegion(known)) => region(&known),
        (_, Body::Config { offset, size }) => format!("offset {offset}, size {size}"),
        _ if fds > 0 => format!("{fds} descriptor{}", if fds == 1 { "" } else { "s" }),
        _ => match message.body().len() {
            0 => String::new(),
            length => format!("{length} bytes"),
        },
    };
    Detail::Text(text)
}

/// What an answer with a value says.
pub(super) fn of_answer(message: &Message) -> String {
    match (message.request(), message.u64_body()) {
        (request::GET_FEATURES, Some(bits)) => features(Features::virtio(bits)),
        (request::GET_PROTOCOL_FEATURES, Some(bits)) => features(Features::protocol(bits)),
        (request::GET_VRING_BASE, _) => match message::vring_state(message.body()) {
            Some((index, base)) => format!("queue {index}, base {base}"),
            None => format!("{} bytes", message.body().len()),
        },
        (request::GET_CONFIG, _) => config(message.body()),
        (_, Some(value)) => value.to_string(),
        (_, None) => format!("{} bytes", message.body().len()),
    }
}

fn features(features: Features) -> String {
    match features.bits() {
        0 => "none".to_owned(),
        bits => format!("{bits:#x} {features}"),
    }
}

fn vring_state(number: u32, index: u32, num: Option<u32>) -> String {
    match (number, num) {
        (request::SET_VRING_NUM, Some(num)) => format!("queue {index}, {num} entries"),
        (request::SET_VRING_BASE, Some(num)) => format!("queue {index}, base {num}"),
        (request::SET_VRING_ENABLE, Some(0)) => format!("queue {index}, off"),
        (request::SET_VRING_ENABLE, Some(1)) => format!("queue {index}, on"),
        (request::SET_VRING_ENABLE, Some(num)) => format!("queue {index}, {num}"),
        _ => format!("queue {index}"),
    }
}

fn memory_table(regions: &[MemoryRegion]) -> String {
    let mut text = match regions.len() {
        1 => "1 region".to_owned(),
        n => format!("{n} regions"),
    };
    for (n, told) in regions.iter().take(REGIONS_TOLD).enumerate() {
        text.push_str(if n == 0 { ": " } else { "; " });
        text.push_str(&region(told));
    }
    if regions.len() > REGIONS_TOLD {
        text.push_str("; …");
    }
    text
}

fn region(region: &MemoryRegion) -> String {
    format!(
        "{:#x} bytes at {:#x}, in the VMM {:#x}",
        region.size, region.guest_address, region.user_address
    )
}

/// `struct virtio_vsock_config` is the CID; the 12 bytes before it repeat offset, size and flags.
fn config(body: &[u8]) -> String {
    let cid = body
        .get(12..20)
        .and_then(|bytes| bytes.try_into().ok())
        .map(u64::from_le_bytes);
    match (body.get(..4), cid) {
        (Some([0, 0, 0, 0]), Some(cid)) => format!("guest_cid {cid}"),
        _ => format!("{} bytes", body.len()),
    }
}
