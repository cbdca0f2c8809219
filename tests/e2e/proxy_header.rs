//! `proxyProtocol: v2`: what a target reads first, by a parser that knows the specification and nothing of the sidecar.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::net::UnixListener;

use vsock_sidecar::embedded_guest::GuestStream;

use crate::support::*;

/// A version 2 header without addresses, as HAProxy's doc/proxy-protocol.txt has it in section 2.2.
struct Header {
    command: u8,
    family: u8,
    transport: u8,
    tlvs: BTreeMap<u8, Vec<u8>>,
}

impl Header {
    /// Takes exactly one header from a stream.
    fn read(mut from: impl Read) -> Header {
        let mut fixed = [0; 16];
        from.read_exact(&mut fixed).unwrap();
        assert_eq!(
            fixed[..12],
            [13, 10, 13, 10, 0, 13, 10, 0x51, 0x55, 0x49, 0x54, 10],
            "the signature"
        );
        assert_eq!(fixed[12] >> 4, 2, "the version");
        let length = usize::from(fixed[14]) * 256 + usize::from(fixed[15]);
        let mut rest = vec![0; length];
        from.read_exact(&mut rest).unwrap();
        assert_eq!(fixed[13] >> 4, 0, "a family other than UNSPEC has addresses");
        let mut tlvs = BTreeMap::new();
        let mut rest = rest.as_slice();
        while !rest.is_empty() {
            let (head, tail) = rest.split_at_checked(3).expect("a type and a length");
            let length = usize::from(head[1]) * 256 + usize::from(head[2]);
            let (value, tail) = tail.split_at_checked(length).expect("the whole value");
            let twice = tlvs.insert(head[0], value.to_vec());
            assert_eq!(twice, None, "TLV {:#x} twice", head[0]);
            rest = tail;
        }
        Header {
            command: fixed[12] & 0xf,
            family: fixed[13] >> 4,
            transport: fixed[13] & 0xf,
            tlvs,
        }
    }

    fn number(&self, tlv: u8) -> u32 {
        let bytes: [u8; 4] = self.tlvs[&tlv].as_slice().try_into().expect("32 bits");
        u32::from_be_bytes(bytes)
    }
}

/// The header, then the bytes of both ends, and nothing else.
fn judge(mut service: impl Service, mut stream: GuestStream, destination: u32) {
    let header = Header::read(&mut service);
    assert_eq!(header.command, 1, "PROXY: on behalf of somebody else");
    assert_eq!((header.family, header.transport), (0, 0), "UNSPEC");
    assert_eq!(header.tlvs[&0xe0], b"web");
    assert_eq!(header.number(0xe1), 3);
    assert_eq!(header.number(0xe2), stream.local_port());
    assert_eq!(header.number(0xe3), destination);
    assert_eq!(header.tlvs.len(), 4);

    stream.set_read_timeout(Some(LONG));
    service.write_all(b"who is there?").unwrap();
    let mut asked = [0; 13];
    stream.read_exact(&mut asked).unwrap();
    assert_eq!(&asked, b"who is there?", "the target's bytes have no header");
    stream.write_all(b"a guest").unwrap();
    drop(stream);
    assert_eq!(read_to_end(&mut service), b"a guest");
}

#[test]
fn a_target_learns_who_the_guest_is_before_its_first_byte() {
    let tcp = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = tcp.local_addr().unwrap().port();
    let sidecar = Sidecar::start(&format!(
        "guests:\n- name: web\n  cid: 3\n  vhostUser: {{socket: \"{{dir}}/web.sock\"}}\n  outbound:\n  \
         - {{name: tcp, ports: 700-709, to: \"tcp://127.0.0.1:{port}\", proxyProtocol: v2}}\n  \
         - {{name: unix, port: 514, to: \"unix://{{dir}}/log.sock\", proxyProtocol: v2}}\n"
    ));
    let unix = UnixListener::bind(sidecar.path("log.sock")).unwrap();
    let guest = linux(&sidecar.path("web.sock"));

    let stream = guest.connect(700).unwrap();
    judge(accept_tcp(&tcp), stream, 700);
    let stream = guest.connect(514).unwrap();
    judge(accept_unix(&unix), stream, 514);

    // The header is the sidecar's, not the guest's traffic.
    let bytes = |rule| {
        let labels = [("rule", rule), ("direction", "guest_to_host")];
        sidecar.metric("vsock_upstream_bytes_total", &labels)
    };
    assert_eq!((bytes("tcp"), bytes("unix")), (7.0, 7.0));
    assert_lawful(&guest);
}

/// A service that closes both directions without a word reads the header and the end, in this order.
#[test]
fn a_guest_that_says_nothing_is_announced_all_the_same() {
    let tcp = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = tcp.local_addr().unwrap().port();
    let sidecar = Sidecar::start(&format!(
        "guests:\n- name: web\n  cid: 3\n  vhostUser: {{socket: \"{{dir}}/web.sock\"}}\n  \
         outbound: [{{name: tcp, port: 7, to: \"tcp://127.0.0.1:{port}\", proxyProtocol: v2}}]\n"
    ));
    let guest = linux(&sidecar.path("web.sock"));
    drop(guest.connect(7).unwrap());
    let mut service = accept_tcp(&tcp);
    assert_eq!(Header::read(&mut service).tlvs[&0xe0], b"web");
    assert_eq!(read_to_end(&mut service), b"");
}
