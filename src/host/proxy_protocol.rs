//! The header of the PROXY protocol, version 2, that an outbound rule with `proxyProtocol: v2` sends ahead of the guest's
//! bytes (HAProxy's doc/proxy-protocol.txt, section 2.2). docs/proxy-protocol.md has it byte by byte, for those who read it.
//!
//! # Why PROXY and UNSPEC
//!
//! The protocol has address families for IPv4, IPv6 and unix sockets, none for vsock. The command LOCAL would be accepted
//! everywhere, but it says that the proxy speaks for itself, and its receivers must discard all that follows: who the guest
//! is would be lost. PROXY with the family UNSPEC is what section 2.2 has for families that the protocol does not know: the
//! receiver uses the addresses of its own socket, and TLVs keep their meaning. An address of another family that stands
//! in for the guest would be a lie that ends in access lists.

/// `\r\n\r\n\0\r\nQUIT\n`: no line of another protocol begins so.
const SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";
/// Version 2 in the upper half, the command PROXY in the lower.
const VERSION_COMMAND: u8 = 0x21;
/// AF_UNSPEC in the upper half, an unspecified transport in the lower; no address block follows.
const FAMILY_TRANSPORT: u8 = 0x00;

/// Types of our TLVs, from the range that the protocol leaves to applications (PP2_TYPE_MIN_CUSTOM to PP2_TYPE_MAX_CUSTOM,
/// 0xE0 to 0xEF). They are a promise to receivers: none changes its meaning. 0xEA is left out, because AWS has it.
const GUEST_NAME: u8 = 0xe0;
const GUEST_CID: u8 = 0xe1;
const GUEST_PORT: u8 = 0xe2;
const DESTINATION_PORT: u8 = 0xe3;

/// Longest name that a header takes in bytes, that of a DNS label: then the header is 103 bytes at most, and always fits into
/// the first TCP segment, as section 2 asks.
const MAX_NAME: usize = 63;

/// On whose behalf a target is dialled.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Origin<'a> {
    /// Name of the guest in the configuration. More than 63 bytes of it are cut off; the configuration has no such names.
    pub name: &'a str,
    /// The guest's context identifier.
    pub cid: u32,
    /// The port of the guest's own socket.
    pub guest_port: u32,
    /// The port that the guest connected to.
    pub destination_port: u32,
}

/// The whole header: nothing has to follow it before the guest's bytes.
pub fn header(origin: Origin<'_>) -> Vec<u8> {
    let name = origin.name.as_bytes();
    let name = name.get(..MAX_NAME).unwrap_or(name);
    let mut tlvs = Vec::with_capacity(87);
    push(&mut tlvs, GUEST_NAME, name);
    push(&mut tlvs, GUEST_CID, &origin.cid.to_be_bytes());
    push(&mut tlvs, GUEST_PORT, &origin.guest_port.to_be_bytes());
    push(
        &mut tlvs,
        DESTINATION_PORT,
        &origin.destination_port.to_be_bytes(),
    );

    let mut header = Vec::with_capacity(16 + tlvs.len());
    header.extend(SIGNATURE);
    header.extend([VERSION_COMMAND, FAMILY_TRANSPORT]);
    header.extend((tlvs.len() as u16).to_be_bytes());
    header.extend(tlvs);
    header
}

/// One type-length-value. No value is longer than [`MAX_NAME`], so its length fits.
fn push(to: &mut Vec<u8>, kind: u8, value: &[u8]) {
    to.push(kind);
    to.extend((value.len() as u16).to_be_bytes());
    to.extend(value);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The example of docs/proxy-protocol.md, which was written by hand from the specification.
    #[test]
    fn a_header_byte_by_byte() {
        let header = header(Origin {
            name: "web",
            cid: 3,
            guest_port: 0x8000_0001,
            destination_port: 514,
        });
        #[rustfmt::skip]
        let expected = [
            0x0d, 0x0a, 0x0d, 0x0a, 0x00, 0x0d, 0x0a, 0x51, 0x55, 0x49, 0x54, 0x0a,
            0x21, 0x00, 0x00, 0x1b,
            0xe0, 0x00, 0x03, b'w', b'e', b'b',
            0xe1, 0x00, 0x04, 0x00, 0x00, 0x00, 0x03,
            0xe2, 0x00, 0x04, 0x80, 0x00, 0x00, 0x01,
            0xe3, 0x00, 0x04, 0x00, 0x00, 0x02, 0x02,
        ];
        assert_eq!(header, expected);
    }

    #[test]
    fn the_longest_name_makes_the_longest_header() {
        let name = "n".repeat(200);
        let longest = header(Origin {
            name: &name,
            cid: u32::MAX - 1,
            guest_port: u32::MAX - 1,
            destination_port: u32::MAX - 1,
        });
        assert_eq!(longest.len(), 103);
        assert_eq!(longest[14..16], (103u16 - 16).to_be_bytes());
    }
}
