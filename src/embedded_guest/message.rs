//! vhost-user messages as bytes (QEMU's docs/interop/vhost-user.rst): numbers, flags and payloads. All integers are
//! in the machine's byte order.

use std::os::fd::OwnedFd;

/// Bytes of the message header: request, flags, payload size.
pub const HEADER_LEN: usize = 12;

/// Protocol version, in the two low bits of the flags.
pub const VERSION: u32 = 1;
/// Flag: this is a reply.
pub const REPLY: u32 = 4;
/// Flag: the sender wants a reply (`VHOST_USER_PROTOCOL_F_REPLY_ACK`).
pub const NEED_REPLY: u32 = 8;

macro_rules! requests {
    ($($(#[$meta:meta])* $name:ident = $value:literal,)*) => {
        /// Request numbers of the front-end.
        pub mod request {
            $($(#[$meta])* pub const $name: u32 = $value;)*
        }

        /// The specification's name of a request, without its prefix; `unknown` for the others.
        pub fn name(number: u32) -> &'static str {
            match number {
                $($value => stringify!($name),)*
                _ => "unknown",
            }
        }
    };
}

requests! {
    /// Asks for the device's feature bits.
    GET_FEATURES = 1,
    /// Tells the acknowledged feature bits.
    SET_FEATURES = 2,
    /// Claims the session.
    SET_OWNER = 3,
    /// Deprecated: gives the session up.
    RESET_OWNER = 4,
    /// Tells all memory regions at once.
    SET_MEM_TABLE = 5,
    /// Passes the dirty log.
    SET_LOG_BASE = 6,
    /// Passes an eventfd for the dirty log.
    SET_LOG_FD = 7,
    /// Tells a ring's size.
    SET_VRING_NUM = 8,
    /// Tells where a ring is.
    SET_VRING_ADDR = 9,
    /// Tells where in a ring to start.
    SET_VRING_BASE = 10,
    /// Stops a ring and asks how far it got.
    GET_VRING_BASE = 11,
    /// Passes the eventfd by which the driver notifies; starts the ring.
    SET_VRING_KICK = 12,
    /// Passes the eventfd by which the device interrupts.
    SET_VRING_CALL = 13,
    /// Passes the eventfd for ring errors.
    SET_VRING_ERR = 14,
    /// Asks for the protocol feature bits.
    GET_PROTOCOL_FEATURES = 15,
    /// Tells the acknowledged protocol feature bits.
    SET_PROTOCOL_FEATURES = 16,
    /// Asks how many queues there are.
    GET_QUEUE_NUM = 17,
    /// Enables or disables a ring.
    SET_VRING_ENABLE = 18,
    /// Network only.
    SEND_RARP = 19,
    /// Network only.
    NET_SET_MTU = 20,
    /// Passes the channel for requests of the back-end.
    SET_BACKEND_REQ_FD = 21,
    /// Updates or invalidates an IOTLB entry.
    IOTLB_MSG = 22,
    /// Tells the byte order of a ring.
    SET_VRING_ENDIAN = 23,
    /// Reads the device's configuration space.
    GET_CONFIG = 24,
    /// Writes the device's configuration space.
    SET_CONFIG = 25,
    /// Asks for shared memory that tracks requests in flight.
    GET_INFLIGHT_FD = 31,
    /// Passes that memory back.
    SET_INFLIGHT_FD = 32,
    /// Disables all rings and resets the device.
    RESET_DEVICE = 34,
    /// A kick as a message.
    VRING_KICK = 35,
    /// Asks how many memory regions the back-end can hold.
    GET_MAX_MEM_SLOTS = 36,
    /// Adds a memory region.
    ADD_MEM_REG = 37,
    /// Removes a memory region.
    REM_MEM_REG = 38,
    /// Tells the device status.
    SET_STATUS = 39,
    /// Asks for the device status.
    GET_STATUS = 40,
}

/// A message that was received.
#[derive(Debug)]
pub struct Message {
    /// Request number; a reply carries its request's.
    pub request: u32,
    /// Version and flags.
    pub flags: u32,
    /// What follows the header.
    pub payload: Vec<u8>,
    /// Descriptors that came along.
    pub fds: Vec<OwnedFd>,
}

impl Message {
    /// The payload as one 64-bit integer, if it is exactly that.
    pub fn u64(&self) -> Option<u64> {
        Some(u64::from_ne_bytes(self.payload.as_slice().try_into().ok()?))
    }
}

/// The 12 bytes in front of every payload.
pub fn header(request: u32, flags: u32, payload_len: usize) -> [u8; HEADER_LEN] {
    let mut bytes = [0; HEADER_LEN];
    bytes[0..4].copy_from_slice(&request.to_ne_bytes());
    bytes[4..8].copy_from_slice(&flags.to_ne_bytes());
    bytes[8..12].copy_from_slice(&(payload_len as u32).to_ne_bytes());
    bytes
}

/// Payload of two 32-bit integers: SET_VRING_NUM, SET_VRING_BASE, GET_VRING_BASE, SET_VRING_ENABLE.
pub fn vring_state(index: u32, value: u32) -> Vec<u8> {
    [index.to_ne_bytes(), value.to_ne_bytes()].concat()
}

/// Payload of SET_VRING_KICK, _CALL and _ERR. `no_fd` sets bit 8: no descriptor comes along (polling mode).
pub fn vring_fd(index: u32, no_fd: bool) -> Vec<u8> {
    (u64::from(index & 0xff) | (u64::from(no_fd) << 8))
        .to_ne_bytes()
        .to_vec()
}

/// Payload of SET_VRING_ADDR. The addresses are user addresses of the memory table, or IOVAs where
/// `VIRTIO_F_ACCESS_PLATFORM` is in force.
pub fn vring_addr(index: u32, flags: u32, desc: u64, used: u64, avail: u64, log: u64) -> Vec<u8> {
    let mut bytes = vring_state(index, flags);
    for address in [desc, used, avail, log] {
        bytes.extend_from_slice(&address.to_ne_bytes());
    }
    bytes
}

/// One memory region: guest address, size, user address, offset in the file.
pub fn memory_region(gpa: u64, size: u64, user_addr: u64, mmap_offset: u64) -> Vec<u8> {
    [gpa, size, user_addr, mmap_offset]
        .iter()
        .flat_map(|v| v.to_ne_bytes())
        .collect()
}

/// Payload of GET_CONFIG and SET_CONFIG.
pub fn config(offset: u32, flags: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes: Vec<u8> = [offset, data.len() as u32, flags]
        .iter()
        .flat_map(|v: &u32| v.to_ne_bytes())
        .collect();
    bytes.extend_from_slice(data);
    bytes
}

/// Payload of IOTLB_MSG: `struct vhost_iotlb_msg` with its padding, 32 bytes as QEMU sends it.
pub fn iotlb(iova: u64, size: u64, user_addr: u64, perm: u8, kind: u8) -> Vec<u8> {
    let mut bytes: Vec<u8> = [iova, size, user_addr]
        .iter()
        .flat_map(|v| v.to_ne_bytes())
        .collect();
    bytes.extend_from_slice(&[perm, kind, 0, 0, 0, 0, 0, 0]);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn payload_sizes_are_the_specification_s() {
        assert_eq!(vring_addr(0, 0, 1, 2, 3, 4).len(), 40);
        assert_eq!(memory_region(1, 2, 3, 4).len(), 32);
        assert_eq!(
            iotlb(1, 2, 3, 3, 2).len(),
            32,
            "QEMU sends sizeof(struct vhost_iotlb_msg)"
        );
        assert_eq!(config(0, 0, &[0; 8]).len(), 20);
        assert_eq!(vring_fd(1, true), 0x101u64.to_ne_bytes());
        assert_eq!(name(request::GET_VRING_BASE), "GET_VRING_BASE");
        assert_eq!(name(99), "unknown");
    }
}
