//! The messages of a guest on their way to a service.

use super::bench::{self, Addresses, BUFFERS, Bench};
use super::*;
use crate::config::Framing;
use crate::vsock::{Boundary, Op};

/// Packets' payload is here.
const PAYLOAD: u64 = BUFFERS + 101;

fn message(bench: &mut Bench, len: u32) {
    const MOST: u32 = 4000;
    let mut left = len;
    loop {
        let here = left.min(MOST);
        left -= here;
        let flags = match left {
            0 => Boundary::Message.bits(),
            _ => 0,
        };
        bench.queue_flagged(BUFFERS + 100, Op::Rw, flags, &[(bench::iova(PAYLOAD), here)]);
        bench.kick(TX);
        assert_eq!(bench.sent(), 1);
        if left == 0 {
            return;
        }
    }
}

/// One system call each, all in one turn: a guest with room for 256 KiB may have as many messages waiting, and its other connections
/// waited for as many calls. A unix socket takes less than 300 of them, since it counts the memory of each.
#[test]
fn messages_that_wait_leave_together() {
    const COUNT: usize = 1000;
    const LONG: usize = 250_000;
    let framing = Framing { max_message: 1 << 20 };
    let mut bench = Bench::with_framing(Addresses::Iova, Some(framing));
    bench.ask(|done| Command::SetTypes {
        stream: true,
        seqpacket: true,
        done,
    });
    let mut service = bench.connected();
    bench.map(PAYLOAD);
    // More than the socket takes.
    message(&mut bench, LONG as u32);
    for _ in 0..COUNT {
        message(&mut bench, 1);
    }
    bench::read(&mut bench, &mut service, 4 + LONG);
    bench.crank();
    let waiting = rustix::io::ioctl_fionread(&service).unwrap();
    assert_eq!(waiting as usize, 5 * COUNT);
    let frames = bench::read(&mut bench, &mut service, 5 * COUNT);
    assert!(frames.chunks(5).all(|frame| frame[..4] == [0, 0, 0, 1]));
}
