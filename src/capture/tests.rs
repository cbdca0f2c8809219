//! What a tap is given, read back by a parser that shares nothing with the writer.

use std::future::poll_fn;

use super::*;
use crate::vsock::header::{Cid, Op, Port};

#[path = "../../tests/e2e/support/pcapng.rs"]
#[allow(dead_code)]
pub mod reader;

const GUEST_PORT: u32 = 1234;
const SERVICE: u32 = 5432;

fn options() -> Options {
    Options {
        guest: "web".to_owned(),
        cid: 3,
        duration: Duration::from_secs(10),
        snaplen: 16,
        queue: 1 << 20,
    }
}

/// A runtime whose time goes on when there is nothing to do: seconds cost nothing.
fn run<T>(test: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .unwrap()
        .block_on(test)
}

async fn next(recording: &mut Recording) -> Option<Vec<u8>> {
    poll_fn(|cx| recording.poll_next(cx)).await
}

async fn rest(recording: &mut Recording) -> Vec<u8> {
    let mut file = Vec::new();
    while let Some(piece) = next(recording).await {
        assert!(!piece.is_empty(), "an empty piece would look like the end");
        file.extend(piece);
    }
    file
}

fn header(op: Op, direction: Direction, len: u32) -> [u8; HEADER_LEN] {
    let (guest, host) = ((Cid(3), Port(GUEST_PORT)), (Cid::HOST, Port(SERVICE)));
    let (src, dst) = match direction {
        Direction::GuestToHost => (guest, host),
        Direction::HostToGuest => (host, guest),
    };
    let header = Header {
        src_cid: src.0,
        dst_cid: dst.0,
        src_port: src.1,
        dst_port: dst.1,
        len,
        socket_type: 1,
        op: op as u16,
        flags: 0,
        buf_alloc: 4096,
        fwd_cnt: 7,
    };
    header.encode()
}

fn say(tap: &mut Tap, direction: Direction, op: Op, payload: &[u8]) -> bool {
    let len = payload.len() as u32;
    tap.record(direction, &header(op, direction, len), payload, len)
}

use Direction::{GuestToHost, HostToGuest};

#[test]
fn packets_of_both_directions_come_out_in_order_and_whole_up_to_the_snapshot_length() {
    let file = run(async {
        let (mut tap, mut recording) = capture(&options());
        assert!(say(&mut tap, GuestToHost, Op::Request, b""));
        assert!(say(&mut tap, HostToGuest, Op::Response, b""));
        tap.flush();
        for len in [1, 2, 3, 4, 15, 16, 17, 5000] {
            assert!(say(&mut tap, GuestToHost, Op::Rw, &vec![len as u8; len]));
        }
        assert!(say(&mut tap, HostToGuest, Op::CreditUpdate, b""));
        assert!(say(&mut tap, HostToGuest, Op::Rst, b""));
        tap.flush();
        drop(tap);
        reader::parse(&rest(&mut recording).await)
    });
    assert_eq!((file.interface.as_str(), file.snaplen), ("web", 32 + 44 + 16));
    let seen: Vec<_> = file
        .packets
        .iter()
        .map(|packet| {
            (
                packet.inbound,
                packet.op,
                packet.class,
                packet.len,
                packet.payload.len(),
            )
        })
        .collect();
    let expected = [
        (true, 1, 1, 0, 0),
        (false, 2, 1, 0, 0),
        (true, 5, 4, 1, 1),
        (true, 5, 4, 2, 2),
        (true, 5, 4, 3, 3),
        (true, 5, 4, 4, 4),
        (true, 5, 4, 15, 15),
        (true, 5, 4, 16, 16),
        (true, 5, 4, 17, 16),
        (true, 5, 4, 5000, 16),
        (false, 6, 3, 0, 0),
        (false, 3, 2, 0, 0),
    ];
    assert_eq!(seen, expected);
    for packet in &file.packets {
        assert_eq!(packet.original_payload, packet.len);
        assert!(
            packet
                .payload
                .iter()
                .all(|byte| u32::from(*byte) == packet.len % 256)
        );
        let (guest, host) = ((3, GUEST_PORT), (2, SERVICE));
        let ends = if packet.inbound {
            (guest, host)
        } else {
            (host, guest)
        };
        assert_eq!((packet.src, packet.dst), ends);
    }
    assert!(file.packets.is_sorted_by_key(|packet| packet.at));
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64;
    assert!(file.packets[0].at <= now && file.packets[0].at > now - 60_000_000_000);
    assert_eq!(file.statistics, [(12, 0)]);
}

/// A guest that promises more payload than its buffers hold: the file shows what was promised and what there was.
#[test]
fn a_packet_with_less_payload_than_its_header_says_is_shown_as_it_was() {
    let file = run(async {
        let (mut tap, mut recording) = capture(&options());
        assert!(tap.record(GuestToHost, &header(Op::Rw, GuestToHost, 1000), b"four", 4));
        drop_flushed(tap);
        reader::parse(&rest(&mut recording).await)
    });
    let packet = &file.packets[0];
    assert_eq!(
        (packet.len, packet.original_payload, packet.payload.as_slice()),
        (1000, 4, &b"four"[..])
    );
}

fn drop_flushed(mut tap: Tap) {
    tap.flush();
}

#[test]
fn a_snapshot_length_of_zero_keeps_headers_only() {
    let file = run(async {
        let (mut tap, mut recording) = capture(&Options {
            snaplen: 0,
            ..options()
        });
        assert!(say(&mut tap, GuestToHost, Op::Rw, b"secret"));
        drop_flushed(tap);
        reader::parse(&rest(&mut recording).await)
    });
    assert_eq!(
        (file.packets[0].payload.len(), file.packets[0].original_payload),
        (0, 6)
    );
}

/// A header is the guest's: any bytes.
#[test]
fn any_header_makes_a_file() {
    let file = run(async {
        let (mut tap, mut recording) = capture(&options());
        assert!(tap.record(GuestToHost, &[0xff; HEADER_LEN], &[0xff; 100], u32::MAX));
        assert!(tap.record(GuestToHost, &[0; HEADER_LEN], &[], 0));
        drop_flushed(tap);
        reader::parse(&rest(&mut recording).await)
    });
    assert_eq!((file.packets[0].op, file.packets[0].class), (0xffff, 0));
    assert_eq!((file.packets[1].op, file.packets[1].class), (0, 0));
}

#[test]
fn a_reader_that_is_too_slow_loses_packets_and_is_told_how_many() {
    const QUEUE: usize = 256 * 1024;
    let (file, dropped) = run(async {
        let (mut tap, mut recording) = capture(&Options {
            snaplen: 65536,
            queue: QUEUE,
            ..options()
        });
        let mut kept = 0;
        let mut dropped = 0;
        // Small turns and large ones: both count.
        for n in 0..10_000 {
            match say(&mut tap, GuestToHost, Op::Rw, &[1; 300]) {
                true => kept += 1,
                false => dropped += 1,
            }
            if n % 3 == 0 {
                tap.flush();
            }
            assert!(
                tap.shared.queued.load(Ordering::Relaxed) + tap.blocks.len() <= QUEUE,
                "invariant 1"
            );
        }
        assert!(kept > 300 && dropped > 9000, "{kept} kept, {dropped} dropped");
        // The reader wakes up: there is room again.
        let mut file = next(&mut recording).await.unwrap();
        file.extend(next(&mut recording).await.unwrap());
        assert!(say(&mut tap, HostToGuest, Op::Rst, b""));
        drop_flushed(tap);
        file.extend(rest(&mut recording).await);
        assert_eq!(recording.shared.queued.load(Ordering::Relaxed), 0);
        (reader::parse(&file), dropped)
    });
    assert_eq!(file.packets.len() as u64 + dropped, 10_001);
    assert_eq!(file.packets.last().unwrap().op, Op::Rst as u16);
    assert_eq!(file.statistics.last(), Some(&(10_001, dropped)));
}

/// Neither a silent guest nor one that floods keeps a recording open.
#[test]
fn it_ends_when_its_time_is_up_and_closes_the_tap() {
    run(async {
        let began = tokio::time::Instant::now();
        let (mut tap, mut recording) = capture(&options());
        assert!(say(&mut tap, GuestToHost, Op::Request, b""));
        tap.flush();
        let file = reader::parse(&rest(&mut recording).await);
        assert_eq!(began.elapsed().as_secs(), 10);
        assert!(tap.is_closed());
        assert_eq!(file.packets.len(), 1);
        let tellings = file.statistics.len();
        assert!(
            (9..=11).contains(&tellings),
            "once a second and at the end: {tellings}"
        );
        assert!(file.statistics.iter().all(|told| *told == (1, 0)));
    });
    run(async {
        let (mut tap, mut recording) = capture(&options());
        tokio::time::advance(Duration::from_secs(11)).await;
        for _ in 0..100 {
            assert!(say(&mut tap, GuestToHost, Op::Rw, &[0; 16]));
            tap.flush();
        }
        let file = reader::parse(&rest(&mut recording).await);
        assert_eq!(file.packets.len(), 100, "what was recorded in time comes out");
        assert!(tap.is_closed());
        assert!(say(&mut tap, GuestToHost, Op::Rw, b""), "too late is not dropped");
    });
}

#[test]
fn a_reader_that_leaves_closes_the_tap() {
    run(async {
        let (mut tap, recording) = capture(&options());
        assert!(!tap.is_closed());
        drop(recording);
        assert!(tap.is_closed());
        assert!(say(&mut tap, GuestToHost, Op::Rw, b"x"));
        tap.flush();
    });
}

#[test]
fn a_turn_that_is_long_is_passed_on_in_chunks() {
    run(async {
        let (mut tap, mut recording) = capture(&Options {
            snaplen: 65536,
            queue: 10 << 20,
            ..options()
        });
        for _ in 0..20 {
            assert!(say(&mut tap, GuestToHost, Op::Rw, &[1; 65536]));
        }
        assert!(
            tap.blocks.len() < CHUNK,
            "{} bytes wait for the end of the turn",
            tap.blocks.len()
        );
        let mut file = next(&mut recording).await.unwrap();
        let piece = next(&mut recording).await.unwrap();
        assert!(piece.len() < 3 * CHUNK, "{}", piece.len());
        file.extend(piece);
        drop_flushed(tap);
        file.extend(rest(&mut recording).await);
        assert_eq!(reader::parse(&file).packets.len(), 20);
    });
}
