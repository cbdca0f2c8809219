//! The PROXY header against a receiver written from HAProxy's doc/proxy-protocol.txt, section 2.2.

use vsock_sidecar::host::proxy_protocol::{Origin, header};

use super::input::Input;

/// Bytes that always fit into the first TCP segment (section 2: 536, and no more than 216 of addresses and TLVs are usual).
const MOST: usize = 216;

/// Runs a case; panics where the header breaks a promise.
pub fn run(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let (cid, guest_port, destination_port) = (input.u32(), input.u32(), input.u32());
    let name = String::from_utf8_lossy(input.rest());
    let header = header(Origin {
        name: &name,
        cid,
        guest_port,
        destination_port,
    });
    assert!(header.len() <= MOST);
    assert_eq!(header[..12], *b"\r\n\r\n\0\r\nQUIT\n");
    assert_eq!(header[12] >> 4, 2, "version");
    assert_eq!(header[12] & 15, 1, "PROXY");
    let length = usize::from(u16::from_be_bytes([header[14], header[15]]));
    assert_eq!(length, header.len() - 16);
    let block = match header[13] {
        // An unspecified family has no addresses.
        0x00 => &header[16..],
        family => panic!("family {family:#x}"),
    };
    let mut rest = block;
    let mut values = Vec::new();
    while let [kind, high, low, behind @ ..] = rest {
        let (value, next) = behind.split_at(usize::from(u16::from_be_bytes([*high, *low])));
        assert!((0xe0..=0xef).contains(kind), "one of the protocol's own types");
        values.push((*kind, value));
        rest = next;
    }
    assert!(rest.is_empty(), "a type-length-value is cut off");
    let kept = name.len().min(63);
    let numbers = [cid, guest_port, destination_port].map(u32::to_be_bytes);
    assert_eq!(
        values,
        [
            (0xe0, &name.as_bytes()[..kept]),
            (0xe1, &numbers[0]),
            (0xe2, &numbers[1]),
            (0xe3, &numbers[2]),
        ]
    );
}
