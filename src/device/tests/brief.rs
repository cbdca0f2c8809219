//! Connections that live for a byte: what each of them costs the device in turns and wake-ups.

use super::bench::{Addresses, BUFFERS, Bench, Buf, iova, pattern, read};
use super::*;
use crate::vsock::Op;

/// A page of payload.
const PAYLOAD: u64 = BUFFERS + 101;

/// Bytes in guest memory, where packets may have them as payload.
fn payload(bench: &mut Bench, bytes: &[u8]) -> Buf {
    bench.map(PAYLOAD);
    bench.put(iova(PAYLOAD), bytes);
    (iova(PAYLOAD), bytes.len() as u32)
}

/// The outcome of a connect to a unix socket is there when the call returns. It went to the device's own thread as a command all
/// the same, which woke it once more: an eventfd written and an epoll_wait for each connection.
#[test]
fn a_unix_service_is_reached_in_the_turn_that_takes_the_request() {
    let mut bench = Bench::new(Addresses::Iova);
    bench.boot();
    bench.queue(BUFFERS + 100, Op::Request, &[]);
    bench.kick_only(TX);
    bench.turn();
    assert_eq!(bench.received(), [(Op::Response as u16, 0)]);
    assert_eq!(bench.wake_ups(), 0, "there is nothing more to hear of");
}

#[test]
fn a_unix_service_that_is_gone_refuses_in_the_turn_that_takes_the_request() {
    let mut bench = Bench::new(Addresses::Iova);
    bench.boot();
    bench.end_service();
    bench.queue(BUFFERS + 100, Op::Request, &[]);
    bench.kick_only(TX);
    bench.turn();
    assert_eq!(bench.received(), [(Op::Rst as u16, 0)]);
    assert_eq!(bench.snapshot().connection_count, 0);
}

/// A unix socket is writable anew whenever its peer has read something, which is an event for who asked for it: one wake-up more for
/// each question that a service reads.
#[test]
fn a_service_that_reads_does_not_wake_the_device() {
    let mut bench = Bench::new(Addresses::Iova);
    let mut service = bench.connected();
    assert_eq!(bench.wake_ups(), 0, "a fresh socket has nothing to say");
    let question = payload(&mut bench, b"ping");
    bench.send(Op::Rw, &[question]);
    let mut asked = [0; 4];
    std::io::Read::read_exact(&mut service, &mut asked).unwrap();
    assert_eq!(&asked, b"ping");
    assert_eq!(bench.wake_ups(), 0, "it has read");
    std::io::Write::write_all(&mut service, b"pong").unwrap();
    assert_eq!(bench.wake_ups(), 1, "an answer does");
    assert_eq!(bench.received(), [(Op::Rw as u16, 4)]);
}

/// More than once: interest in room is kept when it was asked for.
#[test]
fn bytes_that_a_socket_refused_go_on_when_its_service_reads() {
    const PIECE: usize = 4000;
    let mut bench = Bench::new(Addresses::Iova);
    let mut service = bench.connected();
    for round in 0..3 {
        let bytes = pattern(round, PIECE);
        let piece = payload(&mut bench, &bytes);
        let mut sent = 0;
        while bench.device.config.metrics.buffered_bytes[0].get() == 0 {
            bench.send(Op::Rw, &[piece]);
            sent += 1;
        }
        // Behind the bytes that wait.
        bench.send(Op::Rw, &[piece]);
        sent += 1;
        assert_eq!(read(&mut bench, &mut service, sent * PIECE), bytes.repeat(sent));
        assert_eq!(bench.device.config.metrics.buffered_bytes[0].get(), 0);
    }
}
