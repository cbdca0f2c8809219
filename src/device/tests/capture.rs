//! What is recorded of packets: what the guest sent and what it was given, byte for byte.

use std::future::poll_fn;

use super::bench::*;
use super::*;
use crate::capture::tests::reader;
use crate::capture::{Options, Recording, capture};
use crate::vsock::Op;

/// A capture of a bench's device, read on the test's thread.
struct Watcher {
    recording: Recording,
    runtime: tokio::runtime::Runtime,
    read: Vec<u8>,
}

impl Watcher {
    fn of(bench: &mut Bench, snaplen: u32) -> Watcher {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()
            .unwrap();
        let (tap, recording) = {
            let _context = runtime.enter();
            capture(&Options {
                guest: "web".into(),
                cid: 3,
                duration: Duration::from_secs(1000),
                snaplen,
                queue: 4 << 20,
            })
        };
        bench.ask(|done| Command::Capture { tap, done });
        Watcher {
            recording,
            runtime,
            read: Vec::new(),
        }
    }

    /// All packets so far.
    fn packets(&mut self) -> Vec<reader::Packet> {
        let (recording, read) = (&mut self.recording, &mut self.read);
        self.runtime.block_on(poll_fn(|cx| {
            while let std::task::Poll::Ready(Some(piece)) = recording.poll_next(cx) {
                read.extend(piece);
            }
            std::task::Poll::Ready(())
        }));
        reader::parse(read).packets
    }
}

/// Direction, operation and payload.
fn seen(packets: &[reader::Packet]) -> Vec<(bool, u16, &[u8])> {
    packets
        .iter()
        .map(|packet| (packet.inbound, packet.op, packet.payload.as_slice()))
        .collect()
}

/// Buffers lie on pages that are no neighbours in memory; a record must follow them through the translation.
#[test]
fn packets_and_payload_of_both_directions_are_recorded_in_order() {
    let mut bench = Bench::new(Addresses::Iova);
    for page in [BUFFERS + 110, BUFFERS + 111, BUFFERS + 112] {
        bench.map(page);
    }
    let mut watcher = Watcher::of(&mut bench, 65536);
    let mut service = bench.connected();
    let sent = pattern(0, 2 * PAGE as usize);
    bench.put(iova(BUFFERS + 110), &sent);
    bench.send(Op::Rw, &[(iova(BUFFERS + 110), 2 * PAGE as u32)]);
    assert_eq!(read(&mut bench, &mut service, sent.len()), sent);
    let answer = pattern(7, 2 * PAGE as usize);
    write(&mut service, &answer);
    let mut given = Vec::new();
    bench.until(|bench| {
        given.extend(bench.packets());
        given.iter().map(|(_, payload)| payload.len()).sum::<usize>() == answer.len()
    });

    let packets = watcher.packets();
    let of_guest: Vec<_> = seen(&packets).into_iter().filter(|packet| packet.0).collect();
    assert_eq!(
        of_guest,
        [
            (true, Op::Request as u16, &b""[..]),
            (true, Op::Rw as u16, &sent[..])
        ]
    );
    // What the guest has got since the capture began: its RESPONSE, and what it was given after that.
    let mut to_guest = seen(&packets);
    to_guest.retain(|packet| !packet.0);
    assert_eq!(to_guest[0], (false, Op::Response as u16, &b""[..]));
    let expected: Vec<_> = given
        .iter()
        .map(|(header, payload)| (false, header.op, payload.as_slice()))
        .collect();
    assert_eq!(to_guest[1..], expected);
    assert_eq!(packets[0].op, Op::Request as u16);
    assert_eq!(packets[1].op, Op::Response as u16);
    assert!(packets.is_sorted_by_key(|packet| packet.at));
}

#[test]
fn payload_beyond_the_snapshot_length_is_cut_off_for_each_capture_by_its_own() {
    let mut bench = Bench::new(Addresses::Iova);
    let mut short = Watcher::of(&mut bench, 3);
    let mut long = Watcher::of(&mut bench, 5);
    let mut service = bench.connected();
    write(&mut service, b"12345678");
    let mut given = 0;
    bench.until(|bench| {
        given += bench
            .packets()
            .iter()
            .map(|(_, payload)| payload.len())
            .sum::<usize>();
        given == 8
    });
    for (watcher, kept) in [(&mut short, &b"123"[..]), (&mut long, &b"12345"[..])] {
        let packets = watcher.packets();
        let data = packets
            .iter()
            .find(|packet| !packet.inbound && packet.op == Op::Rw as u16)
            .unwrap();
        assert_eq!(
            (data.payload.as_slice(), data.len, data.original_payload),
            (kept, 8, 8)
        );
    }
}

#[test]
fn a_capture_goes_on_over_sessions_and_costs_nothing_when_it_has_ended() {
    let mut bench = Bench::new(Addresses::Iova);
    let mut watcher = Watcher::of(&mut bench, 0);
    let _service = bench.connected();
    assert_eq!(watcher.packets().len(), 2, "REQUEST and RESPONSE");
    bench.ask(|done| Command::EndSession { done });
    assert!(bench.device.captures.is_on());
    drop(watcher);
    bench.crank();
    bench.ask(Command::Ping);
    assert!(!bench.device.captures.is_on());
}
