//! The capture: whatever is offered, what comes out is whole blocks of a pcapng file with what was kept.

use std::task::{Context, Poll, Waker};
use std::time::Duration;

use vsock_sidecar::capture::{HEADERS_LEN, Options, capture};
use vsock_sidecar::metrics::Direction;
use vsock_sidecar::vsock::header::HEADER_LEN;

use super::input::Input;

thread_local! {
    static RUNTIME: tokio::runtime::Runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
        .expect("a runtime without descriptors");
}

/// What a packet's block has beside the packet.
const OVERHEAD: usize = 44;

/// Runs a case; panics where the capture breaks a promise.
pub fn run(bytes: &[u8]) {
    RUNTIME.with(|runtime| {
        let _inside = runtime.enter();
        story(&mut Input::new(bytes));
    });
}

fn story(input: &mut Input<'_>) {
    let options = Options {
        guest: String::from_utf8_lossy(input.bytes(80)).into_owned(),
        cid: 3,
        duration: Duration::from_secs(3600),
        snaplen: input.size().min(65_536),
        queue: input.choose(&[1 << 20, 0, 200, 4096]),
    };
    let (mut tap, mut recording) = capture(&options);
    let mut file = Vec::new();
    let (mut kept, mut dropped) = (Vec::new(), 0u64);
    let mut read = 0;
    while !input.is_empty() && kept.len() < 200 {
        match input.below(6) {
            0 => {
                read_some(&mut recording, &mut file, usize::from(input.u8()));
                read = kept.len();
            }
            1 => tap.flush(),
            2 => {
                tap.flush();
                read_some(&mut recording, &mut file, 1000);
                read = kept.len();
            }
            _ => {
                let mut header = [0; HEADER_LEN];
                let given = input.bytes(HEADER_LEN);
                header[..given.len()].copy_from_slice(given);
                let payload = input.bytes(255);
                let len = payload.len() as u32 + input.size().min(100_000);
                let direction = input.choose(&[Direction::GuestToHost, Direction::HostToGuest]);
                if tap.record(direction, &header, payload, len) {
                    let snapped = &payload[..payload.len().min(options.snaplen as usize)];
                    kept.push((direction, [&header[..], snapped].concat(), len));
                } else {
                    dropped += 1;
                }
            }
        }
        let waiting = kept[read.min(kept.len())..].iter();
        let waiting: usize = waiting.map(|(_, bytes, _)| bytes.len().next_multiple_of(4)).sum();
        assert!(waiting <= options.queue, "invariant 1: {waiting} bytes wait");
    }
    // The device does so at the end of each of its turns.
    tap.flush();
    drop(tap);
    read_some(&mut recording, &mut file, usize::MAX);
    check(&file, &options, &kept, dropped);
}

fn read_some(recording: &mut vsock_sidecar::capture::Recording, file: &mut Vec<u8>, most: usize) {
    let mut context = Context::from_waker(Waker::noop());
    for _ in 0..most {
        match recording.poll_next(&mut context) {
            Poll::Ready(Some(mut piece)) => file.append(&mut piece),
            Poll::Ready(None) | Poll::Pending => break,
        }
    }
}

fn check(file: &[u8], options: &Options, kept: &[(Direction, Vec<u8>, u32)], dropped: u64) {
    let word = |at: usize| u32::from_le_bytes(file[at..at + 4].try_into().expect("four bytes"));
    let (mut at, mut packets, mut last_time, mut last_drops) = (0, kept.iter(), 0, None);
    let mut kinds = Vec::new();
    while at < file.len() {
        let (kind, len) = (word(at), word(at + 4) as usize);
        assert!(
            len >= 12 && len % 4 == 0 && at + len <= file.len(),
            "block of {len} at {at}"
        );
        assert_eq!(word(at + len - 4) as usize, len);
        match kind {
            6 => {
                let time = u64::from(word(at + 12)) << 32 | u64::from(word(at + 16));
                assert!(time >= last_time, "invariant 2");
                last_time = time;
                let (captured, original) = (word(at + 20) as usize, word(at + 24));
                let (direction, bytes, payload_len) = packets.next().expect("a packet that was kept");
                assert_eq!(captured, HEADERS_LEN - HEADER_LEN + bytes.len());
                assert_eq!(original, HEADERS_LEN as u32 + payload_len);
                assert!(captured <= HEADERS_LEN + options.snaplen as usize);
                let data = &file[at + 28..at + 28 + captured];
                assert_eq!(data[HEADERS_LEN - HEADER_LEN..], bytes[..]);
                assert_eq!(len, OVERHEAD + captured.next_multiple_of(4));
                let flags = match direction {
                    Direction::GuestToHost => 1,
                    Direction::HostToGuest => 2,
                };
                assert_eq!(word(at + 28 + captured.next_multiple_of(4) + 4), flags);
            }
            // Interface statistics: the last option before the end is how many are missing.
            5 => last_drops = Some(u64::from(word(at + len - 16))),
            _ => kinds.push(kind),
        }
        at += len;
    }
    assert_eq!(kinds, [0x0a0d_0d0a, 1]);
    assert!(packets.next().is_none(), "a packet is missing");
    assert_eq!(last_drops, Some(dropped));
}
