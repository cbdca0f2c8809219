//! A reader of pcapng files of vsock packets that knows nothing of who wrote them: the formats' specifications again, from
//! the other side. Panics at what is not as it should be.

/// A file of one section and one interface.
#[derive(Debug)]
pub struct File {
    /// Option if_name.
    pub interface: String,
    /// Most bytes of a packet.
    pub snaplen: u32,
    pub packets: Vec<Packet>,
    /// Of each interface statistics block: packets received, and dropped of them.
    pub statistics: Vec<(u64, u64)>,
}

/// A packet with `struct af_vsockmon_hdr` and a virtio-vsock header.
#[derive(Debug)]
pub struct Packet {
    /// Nanoseconds since 1970.
    pub at: u64,
    /// Whether the packet was received by whoever captured it (epb_flags).
    pub inbound: bool,
    /// Source CID and port.
    pub src: (u64, u32),
    /// Destination CID and port.
    pub dst: (u64, u32),
    /// `enum af_vsockmon_op`.
    pub class: u16,
    /// `enum virtio_vsock_op`.
    pub op: u16,
    /// What the header says of the payload.
    pub len: u32,
    /// The payload's first bytes.
    pub payload: Vec<u8>,
    /// Payload bytes before some were cut off.
    pub original_payload: u32,
}

/// Reads a whole file.
#[track_caller]
pub fn parse(bytes: &[u8]) -> File {
    let mut blocks = blocks(bytes);
    let (kind, section) = blocks.remove(0);
    assert_eq!(kind, 0x0a0d0d0a, "the first block is the section header");
    assert_eq!(u32_at(section, 0), 0x1a2b3c4d, "little endian");
    assert_eq!((u16_at(section, 4), u16_at(section, 6)), (1, 0), "version");
    let (kind, interface) = blocks.remove(0);
    assert_eq!(kind, 1, "the interface comes before its packets");
    assert_eq!(u16_at(interface, 0), 271, "LINKTYPE_VSOCK");
    assert_eq!(option(&interface[8..], 9), Some(vec![9]), "times are nanoseconds");
    let mut file = File {
        interface: String::from_utf8(option(&interface[8..], 2).unwrap()).unwrap(),
        snaplen: u32_at(interface, 4),
        packets: Vec::new(),
        statistics: Vec::new(),
    };
    for (kind, body) in blocks {
        assert_eq!(u32_at(body, 0), 0, "there is one interface");
        match kind {
            6 => file.packets.push(packet(body, file.snaplen)),
            5 => {
                let counter =
                    |code| u64::from_le_bytes(option(&body[12..], code).unwrap().try_into().unwrap());
                file.statistics.push((counter(4), counter(5)));
            }
            other => panic!("block type {other}"),
        }
    }
    file
}

/// Length of the whole blocks that a file begins with, of which more may come.
pub fn whole_blocks(bytes: &[u8]) -> usize {
    let mut end = 0;
    while bytes.len() >= end + 8 {
        let len = u32_at(bytes, end + 4) as usize;
        if len == 0 || bytes.len() < end + len {
            break;
        }
        end += len;
    }
    end
}

/// Types and bodies of blocks; nothing may be left over.
#[track_caller]
fn blocks(mut bytes: &[u8]) -> Vec<(u32, &[u8])> {
    let mut blocks = Vec::new();
    while !bytes.is_empty() {
        let len = u32_at(bytes, 4) as usize;
        assert!(
            len >= 12 && len.is_multiple_of(4) && len <= bytes.len(),
            "a block of {len} bytes, {} are left",
            bytes.len()
        );
        assert_eq!(
            u32_at(bytes, len - 4) as usize,
            len,
            "both lengths of a block are the same"
        );
        blocks.push((u32_at(bytes, 0), &bytes[8..len - 4]));
        bytes = &bytes[len..];
    }
    blocks
}

#[track_caller]
fn packet(body: &[u8], snaplen: u32) -> Packet {
    let (captured, original) = (u32_at(body, 12), u32_at(body, 16));
    assert!(
        captured <= original && captured <= snaplen,
        "{captured} of {original} bytes, at most {snaplen}"
    );
    let data = &body[20..20 + captured as usize];
    let options = &body[20 + (captured as usize).next_multiple_of(4)..];
    let flags = u32::from_le_bytes(option(options, 2).unwrap().try_into().unwrap());
    assert!(matches!(flags, 1 | 2), "flags {flags:#x}");
    assert_eq!(u16_at(data, 26), 2, "AF_VSK_TRANSPORT_VIRTIO");
    assert_eq!(u16_at(data, 28), 44, "length of the transport header");
    assert_eq!(u16_at(data, 30), 0, "reserved");
    let virtio = &data[32..76];
    let ends = |at: &[u8], ports: usize| {
        [
            (u64_at(at, 0), u32_at(at, ports)),
            (u64_at(at, 8), u32_at(at, ports + 4)),
        ]
    };
    let [src, dst] = ends(virtio, 16);
    assert_eq!(ends(data, 16), [src, dst], "both headers have the same addresses");
    Packet {
        at: u64::from(u32_at(body, 4)) << 32 | u64::from(u32_at(body, 8)),
        inbound: flags == 1,
        src,
        dst,
        class: u16_at(data, 24),
        op: u16_at(virtio, 30),
        len: u32_at(virtio, 24),
        payload: data[76..].to_vec(),
        original_payload: original - 76,
    }
}

/// The value of the first option of this code.
#[track_caller]
fn option(mut options: &[u8], wanted: u16) -> Option<Vec<u8>> {
    while !options.is_empty() {
        let (code, len) = (u16_at(options, 0), usize::from(u16_at(options, 2)));
        if code == wanted {
            return Some(options[4..4 + len].to_vec());
        }
        if code == 0 {
            assert_eq!(options.len(), 4, "nothing comes behind the end of options");
            return None;
        }
        options = &options[4 + len.next_multiple_of(4)..];
    }
    None
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(bytes[at..at + 2].try_into().unwrap())
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}
