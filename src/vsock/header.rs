//! The 44-byte packet header of virtio-vsock (virtio 1.2, section 5.10.6 "Device Operation").
//!
//! Bytes have two forms here: the array that was copied out of guest memory once, and [`Header`], the value. Every
//! bit pattern decodes: judging a header is the muxer's work, not the codec's.

use std::fmt;

/// Length of the packet header in bytes.
pub const HEADER_LEN: usize = 44;

/// Largest payload of one packet in bytes that a device or driver of Linux uses
/// (`VIRTIO_VSOCK_MAX_PKT_BUF_SIZE`, include/linux/virtio_vsock.h).
pub const MAX_PACKET_PAYLOAD: u32 = 64 * 1024;

/// A context identifier: the address of one end of a vsock connection. 64 bits on the wire, the upper 32 reserved.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Cid(pub u64);

impl Cid {
    /// The well-known CID of the host.
    pub const HOST: Cid = Cid(2);
}

impl fmt::Display for Cid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A vsock port, 32 bits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Port(pub u32);

impl fmt::Display for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The packet header as a value. Field names are the standard's.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Header {
    /// Sender's context identifier.
    pub src_cid: Cid,
    /// Receiver's context identifier.
    pub dst_cid: Cid,
    /// Sender's port.
    pub src_port: Port,
    /// Receiver's port.
    pub dst_port: Port,
    /// Payload bytes that follow the header.
    pub len: u32,
    /// Socket type as sent; see [`SocketType::from_wire`].
    pub socket_type: u16,
    /// Operation as sent; see [`Op::from_wire`].
    pub op: u16,
    /// Flags; their meaning depends on the operation.
    pub flags: u32,
    /// Receive buffer space of the sender in bytes.
    pub buf_alloc: u32,
    /// Free-running count of bytes the sender has consumed; wraps at 2^32.
    pub fwd_cnt: u32,
}

impl Header {
    /// Reads a header from its wire form (little endian). Every bit pattern is a header.
    pub fn decode(bytes: &[u8; HEADER_LEN]) -> Header {
        Header {
            src_cid: Cid(u64::from_le_bytes(field(bytes, 0))),
            dst_cid: Cid(u64::from_le_bytes(field(bytes, 8))),
            src_port: Port(u32::from_le_bytes(field(bytes, 16))),
            dst_port: Port(u32::from_le_bytes(field(bytes, 20))),
            len: u32::from_le_bytes(field(bytes, 24)),
            socket_type: u16::from_le_bytes(field(bytes, 28)),
            op: u16::from_le_bytes(field(bytes, 30)),
            flags: u32::from_le_bytes(field(bytes, 32)),
            buf_alloc: u32::from_le_bytes(field(bytes, 36)),
            fwd_cnt: u32::from_le_bytes(field(bytes, 40)),
        }
    }

    /// The wire form of this header.
    pub fn encode(&self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        bytes[0..8].copy_from_slice(&self.src_cid.0.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.dst_cid.0.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.src_port.0.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.dst_port.0.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.len.to_le_bytes());
        bytes[28..30].copy_from_slice(&self.socket_type.to_le_bytes());
        bytes[30..32].copy_from_slice(&self.op.to_le_bytes());
        bytes[32..36].copy_from_slice(&self.flags.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.buf_alloc.to_le_bytes());
        bytes[40..44].copy_from_slice(&self.fwd_cnt.to_le_bytes());
        bytes
    }
}

fn field<const N: usize>(bytes: &[u8; HEADER_LEN], at: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&bytes[at..at + N]);
    out
}

/// The operations of the protocol (`enum virtio_vsock_op`).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u16)]
pub enum Op {
    /// Asks for a connection.
    Request = 1,
    /// Accepts a connection.
    Response = 2,
    /// Refuses or ends a connection.
    Rst = 3,
    /// Will send and/or receive no more; see [`ShutdownFlags`].
    Shutdown = 4,
    /// Carries payload.
    Rw = 5,
    /// Tells the sender's `buf_alloc` and `fwd_cnt`.
    CreditUpdate = 6,
    /// Asks for a [`Op::CreditUpdate`].
    CreditRequest = 7,
}

impl Op {
    /// The operation of a header's `op` field, if the standard knows it.
    pub fn from_wire(op: u16) -> Option<Op> {
        Some(match op {
            1 => Op::Request,
            2 => Op::Response,
            3 => Op::Rst,
            4 => Op::Shutdown,
            5 => Op::Rw,
            6 => Op::CreditUpdate,
            7 => Op::CreditRequest,
            _ => return None,
        })
    }
}

/// Socket types of the standard (`enum virtio_vsock_type`).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u16)]
pub enum SocketType {
    /// Byte stream (VIRTIO_VSOCK_TYPE_STREAM).
    Stream = 1,
    /// Messages with boundaries (VIRTIO_VSOCK_TYPE_SEQPACKET).
    Seqpacket = 2,
}

impl SocketType {
    /// The type of a header's `type` field, if the standard knows it.
    pub fn from_wire(socket_type: u16) -> Option<SocketType> {
        match socket_type {
            1 => Some(SocketType::Stream),
            2 => Some(SocketType::Seqpacket),
            _ => None,
        }
    }
}

/// Whether a message of a SEQPACKET connection ends with an RW packet: that packet's flags.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub enum Boundary {
    /// The message goes on with the next RW packet. Also what every RW packet of a stream has.
    #[default]
    None,
    /// The message ends here (VIRTIO_VSOCK_SEQ_EOM).
    Message,
    /// The message ends here, and with it a record (VIRTIO_VSOCK_SEQ_EOR beside it: the sender gave MSG_EOR).
    Record,
}

impl Boundary {
    const EOM: u32 = 1;
    const EOR: u32 = 1 << 1;

    /// The meaning of a header's `flags` field. A record can only end where a message does, so EOR alone means nothing.
    pub fn from_wire(flags: u32) -> Boundary {
        match (flags & Boundary::EOM != 0, flags & Boundary::EOR != 0) {
            (false, _) => Boundary::None,
            (true, false) => Boundary::Message,
            (true, true) => Boundary::Record,
        }
    }

    /// The value of a header's `flags` field.
    pub fn bits(self) -> u32 {
        match self {
            Boundary::None => 0,
            Boundary::Message => Boundary::EOM,
            Boundary::Record => Boundary::EOM | Boundary::EOR,
        }
    }

    /// Whether a message ends.
    pub fn is_end(self) -> bool {
        self != Boundary::None
    }
}

/// The flags of [`Op::Shutdown`]: what the sender of the packet will do no more. Sets that only grow.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub struct ShutdownFlags(u32);

impl ShutdownFlags {
    /// Nothing shut down.
    pub const NONE: ShutdownFlags = ShutdownFlags(0);
    /// Will receive no more (VIRTIO_VSOCK_SHUTDOWN_RCV).
    pub const RCV: ShutdownFlags = ShutdownFlags(1);
    /// Will send no more (VIRTIO_VSOCK_SHUTDOWN_SEND).
    pub const SEND: ShutdownFlags = ShutdownFlags(2);
    /// Both.
    pub const BOTH: ShutdownFlags = ShutdownFlags(3);

    /// The flags of a header, bits unknown to the standard left out.
    pub fn from_wire(flags: u32) -> ShutdownFlags {
        ShutdownFlags(flags & 3)
    }

    /// The value of a header's `flags` field.
    pub fn bits(self) -> u32 {
        self.0
    }

    /// Whether all of `other` is in this set.
    pub fn contains(self, other: ShutdownFlags) -> bool {
        self.0 & other.0 == other.0
    }

    /// This set with `other` added.
    #[must_use]
    pub fn with(self, other: ShutdownFlags) -> ShutdownFlags {
        ShutdownFlags(self.0 | other.0)
    }
}

impl fmt::Debug for ShutdownFlags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.0 {
            0 => "NONE",
            1 => "RCV",
            2 => "SEND",
            _ => "BOTH",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_stand_where_the_standard_puts_them() {
        let mut bytes = [0u8; HEADER_LEN];
        for (i, b) in bytes.iter_mut().enumerate() {
            *b = i as u8;
        }
        let h = Header::decode(&bytes);
        assert_eq!(h.src_cid, Cid(0x0706_0504_0302_0100));
        assert_eq!(h.dst_port, Port(0x1716_1514));
        assert_eq!(h.len, 0x1b1a_1918);
        assert_eq!(h.socket_type, 0x1d1c);
        assert_eq!(h.op, 0x1f1e);
        assert_eq!(h.fwd_cnt, 0x2b2a_2928);
        assert_eq!(h.encode(), bytes);
    }

    #[test]
    fn unknown_ops_and_types_have_no_value() {
        assert_eq!(Op::from_wire(0), None);
        assert_eq!(Op::from_wire(8), None);
        assert_eq!(SocketType::from_wire(0), None);
        assert_eq!(SocketType::from_wire(3), None);
    }

    #[test]
    fn a_record_ends_only_where_a_message_does() {
        for (flags, boundary) in [
            (0, Boundary::None),
            (1, Boundary::Message),
            (2, Boundary::None),
            (3, Boundary::Record),
        ] {
            assert_eq!(Boundary::from_wire(flags | 0xffff_fffc), boundary);
            if flags != 2 {
                assert_eq!(boundary.bits(), flags);
            }
        }
    }

    #[test]
    fn shutdown_flags_only_grow_and_ignore_unknown_bits() {
        let flags = ShutdownFlags::from_wire(0xffff_fff1).with(ShutdownFlags::NONE);
        assert_eq!(flags, ShutdownFlags::RCV);
        assert_eq!(flags.with(ShutdownFlags::SEND), ShutdownFlags::BOTH);
    }
}
