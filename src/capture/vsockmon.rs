//! The header that comes before each packet of a capture: `struct af_vsockmon_hdr` of linux/vsockmon.h, as Linux's own
//! vsockmon devices have it, so that tools need not know of us.

use crate::vsock::header::{HEADER_LEN, Header, Op};

/// Length of the header in bytes.
pub(super) const VSOCKMON_LEN: usize = 32;

/// AF_VSK_TRANSPORT_VIRTIO: a virtio-vsock header follows.
const TRANSPORT_VIRTIO: u16 = 2;

/// The header of a packet; addresses are those of the packet, operations are classes of operations.
pub(super) fn header(packet: &Header) -> [u8; VSOCKMON_LEN] {
    let mut bytes = [0; VSOCKMON_LEN];
    bytes[0..8].copy_from_slice(&packet.src_cid.0.to_le_bytes());
    bytes[8..16].copy_from_slice(&packet.dst_cid.0.to_le_bytes());
    bytes[16..20].copy_from_slice(&packet.src_port.0.to_le_bytes());
    bytes[20..24].copy_from_slice(&packet.dst_port.0.to_le_bytes());
    bytes[24..26].copy_from_slice(&operation(packet.op).to_le_bytes());
    bytes[26..28].copy_from_slice(&TRANSPORT_VIRTIO.to_le_bytes());
    bytes[28..30].copy_from_slice(&(HEADER_LEN as u16).to_le_bytes());
    bytes
}

/// `enum af_vsockmon_op`, chosen as `virtio_transport_build_skb` does (net/vmw_vsock/virtio_transport_common.c).
fn operation(op: u16) -> u16 {
    match Op::from_wire(op) {
        None => 0,
        Some(Op::Request | Op::Response) => 1,
        Some(Op::Rst | Op::Shutdown) => 2,
        Some(Op::CreditUpdate | Op::CreditRequest) => 3,
        Some(Op::Rw) => 4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operations_are_classed_as_linux_does() {
        let classes: Vec<u16> = (0..9).map(operation).collect();
        assert_eq!(classes, [0, 1, 1, 2, 2, 4, 3, 3, 0]);
    }
}
