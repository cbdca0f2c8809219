//! The packet header: every bit pattern is one, and none of its bits is lost or moved.

use vsock_sidecar::vsock::header::{HEADER_LEN, MAX_PACKET_PAYLOAD};
use vsock_sidecar::vsock::{Boundary, Header, Op, ShutdownFlags, SocketType};

/// Where the fields are, by virtio 1.2, section 5.10.6: offset and length in bytes.
const FIELDS: [(usize, usize); 10] = [
    (0, 8),
    (8, 8),
    (16, 4),
    (20, 4),
    (24, 4),
    (28, 2),
    (30, 2),
    (32, 4),
    (36, 4),
    (40, 4),
];

/// Runs a case; panics where the codec breaks a promise.
pub fn run(bytes: &[u8]) {
    let mut wire = [0; HEADER_LEN];
    let n = bytes.len().min(HEADER_LEN);
    wire[..n].copy_from_slice(&bytes[..n]);
    let header = Header::decode(&wire);
    assert_eq!(header.encode(), wire);
    assert_eq!(Header::decode(&header.encode()), header);
    assert_eq!(
        fields(&header),
        FIELDS.map(|(at, len)| little_endian(&wire[at..at + len]))
    );

    let known = (1..=7).contains(&header.op);
    assert_eq!(
        Op::from_wire(header.op).map(|op| op as u16),
        known.then_some(header.op)
    );
    let known = (1..=2).contains(&header.socket_type);
    let socket_type = SocketType::from_wire(header.socket_type);
    assert_eq!(
        socket_type.map(|known| known as u16),
        known.then_some(header.socket_type)
    );
    let flags = ShutdownFlags::from_wire(header.flags);
    assert_eq!(flags.bits(), header.flags & 3);
    let more = ShutdownFlags::from_wire(header.len);
    assert_eq!(flags.with(more).bits(), (header.flags | header.len) & 3);
    assert_eq!(flags.contains(more), header.len & 3 & !header.flags == 0);
    let boundary = Boundary::from_wire(header.flags);
    assert_eq!(boundary.is_end(), header.flags & 1 == 1);
    // EOR means something beside EOM only.
    let flags = header.flags & if boundary.is_end() { 3 } else { 1 };
    assert_eq!(boundary.bits(), flags);
    assert_eq!(Boundary::from_wire(boundary.bits()), boundary);
    assert_eq!(MAX_PACKET_PAYLOAD, 0x1_0000);
}

fn little_endian(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .rev()
        .fold(0, |value, byte| value << 8 | u64::from(*byte))
}

fn fields(header: &Header) -> [u64; 10] {
    [
        header.src_cid.0,
        header.dst_cid.0,
        header.src_port.0.into(),
        header.dst_port.0.into(),
        header.len.into(),
        header.socket_type.into(),
        header.op.into(),
        header.flags.into(),
        header.buf_alloc.into(),
        header.fwd_cnt.into(),
    ]
}
