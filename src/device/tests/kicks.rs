//! A guest that kicks and kicks took a processor of its own and its device's thread: with ten million empty kicks, another guest's
//! questions took five times as long on two processors.

use super::bench::{Addresses, BUFFERS, Bench};
use super::*;
use crate::vsock::Op;

#[test]
fn a_guest_that_kicks_for_nothing_is_listened_to_less_often_until_there_is_something() {
    let mut bench = Bench::new(Addresses::Iova);
    let _service = bench.connected();
    for index in [TX, RX] {
        assert_eq!(bench.device.spurious.pause(), None);
        for _ in 0..100 {
            bench.kick(index);
        }
        assert!(bench.device.spurious.pause().is_some(), "ring {index}");
        bench.send(Op::CreditRequest, &[]);
        assert_eq!(bench.sent(), 1);
    }
    assert_eq!(bench.device.spurious.pause(), None);
    assert_eq!(bench.received(), [(Op::CreditUpdate as u16, 0); 2]);
}

#[test]
fn a_guest_that_kicks_for_each_packet_is_not_held_up() {
    let mut bench = Bench::new(Addresses::Iova);
    let _service = bench.connected();
    for round in 0..100 {
        bench.queue(BUFFERS + 100, Op::CreditUpdate, &[]);
        bench.kick(TX);
        // One that was on its way while the device had found the packet.
        bench.kick(TX);
        assert_eq!(bench.device.spurious.pause(), None, "round {round}");
        assert_eq!(bench.sent(), 1);
    }
}
