//! Blocks of the pcapng format (draft-ietf-opsawg-pcapng), as far as one section with one interface needs them.
//!
//! A file says its byte order itself; ours is always little endian, as the packets in it are.

use std::time::Duration;

use crate::metrics::Direction;

/// Packets that begin with `struct af_vsockmon_hdr` (LINKTYPE_VSOCK of the tcpdump group's registry).
pub(super) const LINKTYPE_VSOCK: u16 = 271;

const SECTION_HEADER: u32 = 0x0a0d_0d0a;
const INTERFACE_DESCRIPTION: u32 = 1;
const INTERFACE_STATISTICS: u32 = 5;
const ENHANCED_PACKET: u32 = 6;
const BYTE_ORDER_MAGIC: u32 = 0x1a2b_3c4d;

const OPT_ENDOFOPT: u16 = 0;
const SHB_USERAPPL: u16 = 4;
const IF_NAME: u16 = 2;
const IF_DESCRIPTION: u16 = 3;
const IF_TSRESOL: u16 = 9;
const EPB_FLAGS: u16 = 2;
const ISB_STARTTIME: u16 = 2;
const ISB_ENDTIME: u16 = 3;
const ISB_IFRECV: u16 = 4;
const ISB_IFDROP: u16 = 5;

/// Timestamps count units of 10^-9 seconds.
const NANOSECONDS: u8 = 9;

/// What a packet's block has beside the packet: block type and twice its length, five words, flags and the end of options.
pub(super) const PACKET_OVERHEAD: usize = 12 + 20 + 12;

/// What a file begins with: who wrote it, and the one interface that packets come from. `snaplen` is the most bytes of a
/// packet, headers included.
pub(super) fn head(application: &str, interface: &str, description: &str, snaplen: u32) -> Vec<u8> {
    let mut file = Vec::new();
    block(&mut file, SECTION_HEADER, |body| {
        body.extend_from_slice(&BYTE_ORDER_MAGIC.to_le_bytes());
        body.extend_from_slice(&1u16.to_le_bytes());
        body.extend_from_slice(&0u16.to_le_bytes());
        // A section's length that is not known.
        body.extend_from_slice(&u64::MAX.to_le_bytes());
        option(body, SHB_USERAPPL, application.as_bytes());
        option(body, OPT_ENDOFOPT, &[]);
    });
    block(&mut file, INTERFACE_DESCRIPTION, |body| {
        body.extend_from_slice(&LINKTYPE_VSOCK.to_le_bytes());
        body.extend_from_slice(&0u16.to_le_bytes());
        body.extend_from_slice(&snaplen.to_le_bytes());
        option(body, IF_NAME, interface.as_bytes());
        option(body, IF_DESCRIPTION, description.as_bytes());
        option(body, IF_TSRESOL, &[NANOSECONDS]);
        option(body, OPT_ENDOFOPT, &[]);
    });
    file
}

/// Appends a packet that consists of `parts`; `original_len` is its length before payload was cut off. `at` is since 1970.
pub(super) fn packet(
    into: &mut Vec<u8>,
    at: Duration,
    direction: Direction,
    parts: [&[u8]; 3],
    original_len: u32,
) {
    let captured: usize = parts.iter().map(|part| part.len()).sum();
    block(into, ENHANCED_PACKET, |body| {
        // The interface: there is one.
        body.extend_from_slice(&0u32.to_le_bytes());
        timestamp(body, at);
        // At most 76 bytes more than the largest snapshot length, which is 64 KiB.
        body.extend_from_slice(&(captured as u32).to_le_bytes());
        body.extend_from_slice(&original_len.to_le_bytes());
        for part in parts {
            body.extend_from_slice(part);
        }
        pad(body);
        // As the device sees it: what the guest sends comes in.
        let flags: u32 = match direction {
            Direction::GuestToHost => 1,
            Direction::HostToGuest => 2,
        };
        option(body, EPB_FLAGS, &flags.to_le_bytes());
        option(body, OPT_ENDOFOPT, &[]);
    });
}

/// How many packets there were since `began`, and how many of them are not in the file. Of several the last one counts.
pub(super) fn statistics(at: Duration, began: Duration, packets: u64, dropped: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    block(&mut bytes, INTERFACE_STATISTICS, |body| {
        body.extend_from_slice(&0u32.to_le_bytes());
        timestamp(body, at);
        for (code, time) in [(ISB_STARTTIME, began), (ISB_ENDTIME, at)] {
            let mut value = Vec::with_capacity(8);
            timestamp(&mut value, time);
            option(body, code, &value);
        }
        option(body, ISB_IFRECV, &packets.to_le_bytes());
        option(body, ISB_IFDROP, &dropped.to_le_bytes());
        option(body, OPT_ENDOFOPT, &[]);
    });
    bytes
}

/// Appends a block, whose length stands at its beginning and at its end.
fn block(into: &mut Vec<u8>, kind: u32, fill: impl FnOnce(&mut Vec<u8>)) {
    let at = into.len();
    into.extend_from_slice(&kind.to_le_bytes());
    into.extend_from_slice(&0u32.to_le_bytes());
    fill(into);
    // A block is a packet of at most 64 KiB and less than 200 bytes of other things.
    let len = (into.len() - at + 4) as u32;
    into.extend_from_slice(&len.to_le_bytes());
    if let Some(first) = into.get_mut(at + 4..at + 8) {
        first.copy_from_slice(&len.to_le_bytes());
    }
}

/// Appends an option. Its length does not count the padding.
fn option(body: &mut Vec<u8>, code: u16, value: &[u8]) {
    // Names of guests are at most 63 bytes long; everything else here is shorter than a line.
    let len = value.len() as u16;
    body.extend_from_slice(&code.to_le_bytes());
    body.extend_from_slice(&len.to_le_bytes());
    body.extend_from_slice(value);
    pad(body);
}

/// Fills up to 32 bits: blocks consist of whole words, and so does everything before them.
fn pad(body: &mut Vec<u8>) {
    body.resize(body.len().next_multiple_of(4), 0);
}

/// The upper half comes first, whatever the byte order.
fn timestamp(body: &mut Vec<u8>, at: Duration) {
    // Enough until the year 2554.
    let nanoseconds = u64::try_from(at.as_nanos()).unwrap_or(u64::MAX);
    body.extend_from_slice(&((nanoseconds >> 32) as u32).to_le_bytes());
    body.extend_from_slice(&(nanoseconds as u32).to_le_bytes());
}
