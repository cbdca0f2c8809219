//! A full window is moved in halves, and the guest hears of the first one before the second one is moved. It was moved as a whole,
//! in one system call, and told of at its end: guest and device took turns sleeping, two wake-ups for each 256 KiB, and a fifth of
//! the rate was lost to them. Beside 100 connections into the guest it was a third.

use super::bench::{Addresses, BUFFERS, Bench, PAGE, iova, read, write};
use super::*;
use crate::vsock::Op;

/// Pages of payload, in a row.
const PAYLOAD: u64 = BUFFERS + 101;
const PACKET: usize = 64 * 1024;

#[test]
fn the_guest_has_credit_for_one_half_while_the_other_is_written() {
    let mut bench = Bench::new(Addresses::Iova);
    let mut service = bench.connected();
    let pages = PACKET as u64 / PAGE;
    for page in PAYLOAD..PAYLOAD + pages {
        bench.map(page);
    }
    for _ in 0..4 {
        bench.queue(BUFFERS + 100, Op::Rw, &[(iova(PAYLOAD), PACKET as u32)]);
    }
    bench.kick_only(TX);
    bench.turn_once();
    let told = |bench: &mut Bench| -> Vec<(u16, u32)> {
        let packets = bench.packets();
        packets
            .iter()
            .map(|(header, _)| (header.op, header.fwd_cnt))
            .collect()
    };
    assert_eq!(bench.sent(), 2, "the others are in the ring");
    let update = Op::CreditUpdate as u16;
    assert_eq!(told(&mut bench), [(update, 2 * PACKET as u32)]);
    // No kick comes for the rest.
    read(&mut bench, &mut service, 4 * PACKET);
    assert_eq!(bench.sent(), 2);
    assert_eq!(told(&mut bench).last(), Some(&(update, 4 * PACKET as u32)));
}

#[test]
fn the_guest_is_given_one_half_before_the_other_is_read() {
    const BYTES: usize = 160 * 1024;
    let mut bench = Bench::new(Addresses::Iova);
    let mut service = bench.connected();
    for buffer in 0..6 {
        bench.post_pages(PAYLOAD + 8 * buffer, 8);
    }
    write(&mut service, &[7; BYTES]);
    let given = |bench: &mut Bench| -> usize { bench.received().iter().map(|(_, len)| len).sum() };
    bench.turn_once();
    assert_eq!(given(&mut bench), budget::TURN_BYTES);
    bench.crank();
    assert_eq!(given(&mut bench), BYTES - budget::TURN_BYTES);
}
