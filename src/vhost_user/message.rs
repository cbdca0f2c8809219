//! vhost-user messages as bytes and as values.
//!
//! The `vhost` crate keeps its message header private, and we must forward exactly what came; so a [`Message`] holds
//! the bytes of one message, and everything else is read from them. A body that is not what its request promises has
//! no value ([`Body::Other`]): judging it is the work of the crate behind the gate.
//!
//! All numbers are in the machine's byte order (vhost-user.rst, "Message Specification").

use serde::Serialize;
use vhost::vhost_user::message::{MAX_ATTACHED_FD_ENTRIES, MAX_MSG_SIZE};

/// Bytes of the header: request, flags, size of the body, each a u32.
pub const HEADER_LEN: usize = 12;
/// The longest body that is accepted, in bytes: what the crate behind the gate accepts.
pub const MAX_BODY: usize = MAX_MSG_SIZE;
/// The most file descriptors that are kept of one message: what the crate behind the gate accepts. The standard's
/// largest message, SET_MEM_TABLE, carries 8; Cloud Hypervisor sends as many as it has regions.
pub const MAX_FDS: usize = MAX_ATTACHED_FD_ENTRIES;

/// `flags` of a request: version 1.
pub const VERSION: u32 = 1;
/// Bit of `flags`: this is the answer to a request.
pub const REPLY: u32 = 1 << 2;
/// Bit of `flags`: the sender waits for an answer (VHOST_USER_PROTOCOL_F_REPLY_ACK).
pub const NEED_REPLY: u32 = 1 << 3;

/// Names of the requests that a VMM may send, by number; index 0 stands for every number the standard does not know.
pub const REQUEST_NAMES: [&str; 45] = [
    "unknown",
    "get_features",
    "set_features",
    "set_owner",
    "reset_owner",
    "set_mem_table",
    "set_log_base",
    "set_log_fd",
    "set_vring_num",
    "set_vring_addr",
    "set_vring_base",
    "get_vring_base",
    "set_vring_kick",
    "set_vring_call",
    "set_vring_err",
    "get_protocol_features",
    "set_protocol_features",
    "get_queue_num",
    "set_vring_enable",
    "send_rarp",
    "net_set_mtu",
    "set_backend_req_fd",
    "iotlb_msg",
    "set_vring_endian",
    "get_config",
    "set_config",
    "create_crypto_session",
    "close_crypto_session",
    "postcopy_advise",
    "postcopy_listen",
    "postcopy_end",
    "get_inflight_fd",
    "set_inflight_fd",
    "gpu_set_socket",
    "reset_device",
    "vring_kick",
    "get_max_mem_slots",
    "add_mem_reg",
    "rem_mem_reg",
    "set_status",
    "get_status",
    "get_shared_object",
    "set_device_state_fd",
    "check_device_state",
    "get_shmem_config",
];

/// Request numbers that are looked at by name.
#[allow(missing_docs)] // the names are the standard's
pub mod request {
    pub const GET_FEATURES: u32 = 1;
    pub const SET_FEATURES: u32 = 2;
    pub const SET_OWNER: u32 = 3;
    pub const RESET_OWNER: u32 = 4;
    pub const SET_MEM_TABLE: u32 = 5;
    pub const SET_LOG_BASE: u32 = 6;
    pub const SET_LOG_FD: u32 = 7;
    pub const SET_VRING_NUM: u32 = 8;
    pub const SET_VRING_ADDR: u32 = 9;
    pub const SET_VRING_BASE: u32 = 10;
    pub const GET_VRING_BASE: u32 = 11;
    pub const SET_VRING_KICK: u32 = 12;
    pub const SET_VRING_CALL: u32 = 13;
    pub const SET_VRING_ERR: u32 = 14;
    pub const GET_PROTOCOL_FEATURES: u32 = 15;
    pub const SET_PROTOCOL_FEATURES: u32 = 16;
    pub const GET_QUEUE_NUM: u32 = 17;
    pub const SET_VRING_ENABLE: u32 = 18;
    pub const SET_BACKEND_REQ_FD: u32 = 21;
    pub const IOTLB_MSG: u32 = 22;
    pub const GET_CONFIG: u32 = 24;
    pub const SET_CONFIG: u32 = 25;
    pub const GET_INFLIGHT_FD: u32 = 31;
    pub const SET_INFLIGHT_FD: u32 = 32;
    pub const RESET_DEVICE: u32 = 34;
    pub const GET_MAX_MEM_SLOTS: u32 = 36;
    pub const ADD_MEM_REG: u32 = 37;
    pub const REM_MEM_REG: u32 = 38;
    pub const CHECK_DEVICE_STATE: u32 = 43;
    pub const SET_DEVICE_STATE_FD: u32 = 42;
}

/// Request numbers on the back-end's channel.
pub mod backend_request {
    /// VHOST_USER_BACKEND_IOTLB_MSG.
    pub const IOTLB_MSG: u32 = 1;
}

/// Whether a request is always answered, with a value of its own, rather than by yes or no and only if its sender wants to
/// know (VHOST_USER_PROTOCOL_F_REPLY_ACK).
pub fn is_always_answered(request: u32) -> bool {
    use request::*;
    matches!(
        request,
        GET_FEATURES
            | GET_PROTOCOL_FEATURES
            | GET_QUEUE_NUM
            | GET_VRING_BASE
            | GET_CONFIG
            | GET_MAX_MEM_SLOTS
            | GET_INFLIGHT_FD
            | SET_LOG_BASE
            | SET_DEVICE_STATE_FD
            | CHECK_DEVICE_STATE
    )
}

/// Index of a request number in [`REQUEST_NAMES`].
pub fn request_index(request: u32) -> usize {
    match usize::try_from(request) {
        Ok(index) if index < REQUEST_NAMES.len() => index,
        _ => 0,
    }
}

/// The standard's name of a request, as logs print it: `SET_MEM_TABLE`, or `request 77`.
pub fn display_name(request: u32) -> String {
    match request_index(request) {
        0 => format!("request {request}"),
        index => REQUEST_NAMES
            .get(index)
            .copied()
            .unwrap_or_default()
            .to_uppercase(),
    }
}

/// One message: the header and as many body bytes as the header says.
#[derive(Clone, PartialEq, Eq)]
pub struct Message {
    bytes: Vec<u8>,
}

impl Message {
    /// A message with the given body. Bodies of ours are a few bytes long.
    pub fn new(request: u32, flags: u32, body: &[u8]) -> Message {
        let mut bytes = Vec::with_capacity(HEADER_LEN + body.len());
        bytes.extend_from_slice(&request.to_ne_bytes());
        bytes.extend_from_slice(&flags.to_ne_bytes());
        bytes.extend_from_slice(&(body.len() as u32).to_ne_bytes());
        bytes.extend_from_slice(body);
        Message { bytes }
    }

    /// A request of the back-end: the translation of `iova` is missing, for reading (1) or writing (2). On the back-end's
    /// channel requests have numbers of their own, and VHOST_USER_BACKEND_IOTLB_MSG is the first.
    pub fn iotlb_miss(flags: u32, iova: u64, perm: u8) -> Message {
        const MISS: u8 = 1;
        let mut body = [0; 32];
        body[..8].copy_from_slice(&iova.to_ne_bytes());
        body[24] = perm;
        body[25] = MISS;
        Message::new(backend_request::IOTLB_MSG, flags, &body)
    }

    /// This message with other flags.
    pub(super) fn with_flags(&self, flags: u32) -> Message {
        let mut bytes = self.bytes.clone();
        // A message has a header.
        bytes[4..8].copy_from_slice(&flags.to_ne_bytes());
        Message { bytes }
    }

    /// A SET_VRING_ADDR with another address for all three areas.
    pub(super) fn with_vring_addresses(&self, address: u64) -> Message {
        let mut bytes = self.bytes.clone();
        for area in bytes
            .get_mut(HEADER_LEN + 8..HEADER_LEN + 32)
            .into_iter()
            .flat_map(|areas| areas.chunks_exact_mut(8))
        {
            area.copy_from_slice(&address.to_ne_bytes());
        }
        Message { bytes }
    }

    /// Takes the bytes of exactly one message.
    pub(super) fn from_bytes(bytes: Vec<u8>) -> Message {
        debug_assert!(bytes.len() >= HEADER_LEN);
        Message { bytes }
    }

    /// The message as it goes over the wire.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The request number; answers carry that of their request.
    pub fn request(&self) -> u32 {
        u32_at(&self.bytes, 0).unwrap_or(0)
    }

    /// The header's flags.
    pub fn flags(&self) -> u32 {
        u32_at(&self.bytes, 4).unwrap_or(0)
    }

    /// Whether this is an answer.
    pub fn is_reply(&self) -> bool {
        self.flags() & REPLY != 0
    }

    /// Whether the sender waits for an answer that the request as such does not have.
    pub fn needs_reply(&self) -> bool {
        self.flags() & NEED_REPLY != 0
    }

    /// What follows the header.
    pub fn body(&self) -> &[u8] {
        self.bytes.get(HEADER_LEN..).unwrap_or_default()
    }

    /// The body of a request, decoded.
    pub fn request_body(&self) -> Body {
        Body::decode(self.request(), self.body()).unwrap_or(Body::Other)
    }

    /// The body as one u64, if it is eight bytes long: answers of GET_FEATURES and the like, and every REPLY_ACK answer.
    pub fn u64_body(&self) -> Option<u64> {
        if self.body().len() == 8 {
            u64_at(self.body(), 0)
        } else {
            None
        }
    }

    /// The name of the request, as logs print it.
    pub fn display_name(&self) -> String {
        display_name(self.request())
    }
}

impl std::fmt::Debug for Message {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} flags {:#x} {:02x?}",
            self.display_name(),
            self.flags(),
            self.body()
        )
    }
}

/// The body of a request.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Body {
    /// SET_FEATURES, SET_PROTOCOL_FEATURES.
    U64(u64),
    /// SET_VRING_NUM, SET_VRING_BASE, GET_VRING_BASE, SET_VRING_ENABLE.
    VringState {
        /// Number of the virtqueue.
        index: u32,
        /// Entries, index, or 0 and 1 for off and on.
        num: u32,
    },
    /// SET_VRING_ADDR.
    VringAddr {
        /// Number of the virtqueue.
        index: u32,
        /// Address of the descriptor table in the VMM.
        desc: u64,
        /// Address of the used ring in the VMM.
        used: u64,
        /// Address of the available ring in the VMM.
        avail: u64,
    },
    /// SET_VRING_KICK, SET_VRING_CALL, SET_VRING_ERR.
    VringFd {
        /// Number of the virtqueue.
        index: u8,
        /// Whether a descriptor comes with the message.
        has_fd: bool,
    },
    /// SET_MEM_TABLE.
    MemoryTable(Vec<MemoryRegion>),
    /// ADD_MEM_REG, REM_MEM_REG.
    MemoryRegion(MemoryRegion),
    /// SET_LOG_BASE.
    LogBase {
        /// Bytes of the dirty log.
        size: u64,
        /// Where it begins in the file that comes with it, in bytes.
        offset: u64,
    },
    /// GET_CONFIG, SET_CONFIG.
    Config {
        /// First byte in the device's configuration space.
        offset: u32,
        /// Bytes.
        size: u32,
    },
    /// IOTLB_MSG: `struct vhost_iotlb_msg` (linux/vhost_types.h), 26 bytes, padded to 32 by QEMU.
    Iotlb {
        /// First I/O virtual address.
        iova: u64,
        /// Bytes.
        size: u64,
        /// What `iova` means in the VMM's address space.
        uaddr: u64,
        /// What is allowed: 1 read, 2 write, 3 both.
        perm: u8,
        /// 1 MISS, 2 UPDATE, 3 INVALIDATE, 4 ACCESS_FAIL.
        kind: u8,
    },
    /// No body, one that is not looked at, or one that is not what the request promises.
    Other,
}

impl Body {
    fn decode(request: u32, body: &[u8]) -> Option<Body> {
        use request::*;
        let exactly = |len: usize| (body.len() == len).then_some(());
        Some(match request {
            SET_FEATURES | SET_PROTOCOL_FEATURES => {
                exactly(8)?;
                Body::U64(u64_at(body, 0)?)
            }
            SET_VRING_NUM | SET_VRING_BASE | GET_VRING_BASE | SET_VRING_ENABLE => {
                exactly(8)?;
                Body::VringState {
                    index: u32_at(body, 0)?,
                    num: u32_at(body, 4)?,
                }
            }
            SET_VRING_ADDR => {
                exactly(40)?;
                Body::VringAddr {
                    index: u32_at(body, 0)?,
                    desc: u64_at(body, 8)?,
                    used: u64_at(body, 16)?,
                    avail: u64_at(body, 24)?,
                }
            }
            SET_VRING_KICK | SET_VRING_CALL | SET_VRING_ERR => {
                exactly(8)?;
                let value = u64_at(body, 0)?;
                Body::VringFd {
                    index: value as u8,
                    has_fd: value & 0x100 == 0,
                }
            }
            SET_MEM_TABLE => {
                let regions = u32_at(body, 0)? as usize;
                exactly(8usize.checked_add(regions.checked_mul(MemoryRegion::LEN)?)?)?;
                let regions = body
                    .get(8..)?
                    .chunks_exact(MemoryRegion::LEN)
                    .map(MemoryRegion::decode);
                Body::MemoryTable(regions.collect::<Option<_>>()?)
            }
            ADD_MEM_REG | REM_MEM_REG => {
                exactly(8 + MemoryRegion::LEN)?;
                Body::MemoryRegion(MemoryRegion::decode(body.get(8..)?)?)
            }
            IOTLB_MSG => {
                exactly(26).or(exactly(32))?;
                Body::Iotlb {
                    iova: u64_at(body, 0)?,
                    size: u64_at(body, 8)?,
                    uaddr: u64_at(body, 16)?,
                    perm: *body.get(24)?,
                    kind: *body.get(25)?,
                }
            }
            SET_LOG_BASE => {
                exactly(16)?;
                Body::LogBase {
                    size: u64_at(body, 0)?,
                    offset: u64_at(body, 8)?,
                }
            }
            GET_CONFIG | SET_CONFIG => Body::Config {
                offset: u32_at(body, 0)?,
                size: u32_at(body, 4)?,
            },
            _ => return None,
        })
    }
}

/// One region of guest memory, as the VMM describes it.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Debug)]
#[serde(rename_all = "camelCase")]
pub struct MemoryRegion {
    /// Guest-physical address of the first byte.
    pub guest_address: u64,
    /// Bytes.
    pub size: u64,
    /// Address of the first byte in the VMM; ring addresses are given in this space.
    #[serde(serialize_with = "as_hex")]
    pub user_address: u64,
    /// Where the region begins in the file that came with it, in bytes.
    pub mmap_offset: u64,
}

impl MemoryRegion {
    /// Bytes of a region in SET_MEM_TABLE.
    const LEN: usize = 32;

    fn decode(bytes: &[u8]) -> Option<MemoryRegion> {
        Some(MemoryRegion {
            guest_address: u64_at(bytes, 0)?,
            size: u64_at(bytes, 8)?,
            user_address: u64_at(bytes, 16)?,
            mmap_offset: u64_at(bytes, 24)?,
        })
    }

    /// Whether an address of the VMM lies in this region.
    pub fn contains_user(&self, address: u64) -> bool {
        address
            .checked_sub(self.user_address)
            .is_some_and(|offset| offset < self.size)
    }
}

/// Addresses are text in JSON, because many readers keep only 53 bits of a number.
pub(super) fn as_hex<S: serde::Serializer>(value: &u64, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&format_args!("{value:#x}"))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(
        bytes.get(at..at.checked_add(4)?)?.try_into().ok()?,
    ))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_ne_bytes(
        bytes.get(at..at.checked_add(8)?)?.try_into().ok()?,
    ))
}

/// The index and number of a vring-state body (`GET_VRING_BASE` answers with one).
pub(super) fn vring_state(body: &[u8]) -> Option<(u32, u32)> {
    if body.len() == 8 {
        Some((u32_at(body, 0)?, u32_at(body, 4)?))
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use vhost::vhost_user::message::FrontendReq;

    use super::*;

    #[test]
    fn request_names_stand_where_the_crate_numbers_them() {
        for number in 1..REQUEST_NAMES.len() as u32 {
            let Ok(request) = FrontendReq::try_from(number) else {
                panic!("the crate knows no request {number}");
            };
            assert_eq!(
                REQUEST_NAMES[number as usize],
                format!("{request:?}").to_lowercase()
            );
        }
        assert!(
            FrontendReq::try_from(REQUEST_NAMES.len() as u32).is_err(),
            "a request number is missing"
        );
    }

    #[test]
    fn unknown_requests_share_one_name() {
        assert_eq!(request_index(0), 0);
        assert_eq!(request_index(45), 0);
        assert_eq!(request_index(u32::MAX), 0);
        assert_eq!(display_name(77), "request 77");
        assert_eq!(display_name(5), "SET_MEM_TABLE");
    }

    #[test]
    fn a_body_of_the_wrong_length_has_no_value() {
        assert_eq!(
            Message::new(request::SET_FEATURES, VERSION, &[0; 7]).request_body(),
            Body::Other
        );
        assert_eq!(
            Message::new(request::SET_VRING_ADDR, VERSION, &[0; 32]).request_body(),
            Body::Other
        );
        let mut table = vec![0u8; 8];
        table[..4].copy_from_slice(&u32::MAX.to_ne_bytes());
        assert_eq!(
            Message::new(request::SET_MEM_TABLE, VERSION, &table).request_body(),
            Body::Other
        );
    }

    #[test]
    fn a_memory_table_reads_region_by_region() {
        let mut body = vec![0u8; 8];
        body[..4].copy_from_slice(&2u32.to_ne_bytes());
        for value in [
            0u64,
            0x1000,
            0x7f00_0000_0000,
            0,
            0x1000,
            0x2000,
            0x7f00_0000_1000,
            0x1000,
        ] {
            body.extend_from_slice(&value.to_ne_bytes());
        }
        let Body::MemoryTable(regions) = Message::new(request::SET_MEM_TABLE, VERSION, &body).request_body()
        else {
            panic!("not a memory table");
        };
        assert_eq!(regions.len(), 2);
        assert_eq!(
            regions[1],
            MemoryRegion {
                guest_address: 0x1000,
                size: 0x2000,
                user_address: 0x7f00_0000_1000,
                mmap_offset: 0x1000
            }
        );
        assert!(regions[1].contains_user(0x7f00_0000_2fff));
        assert!(!regions[1].contains_user(0x7f00_0000_3000));
        assert!(!regions[1].contains_user(0x7f00_0000_0fff));
    }
}
