//! Steady work on a connection, for this test and `tests/allocations.rs`.

use std::io::{Read, Write};
use std::thread;

use vsock_sidecar::embedded_guest::GuestStream;

use crate::support::Bytes;

/// 8 MiB to an echo service and back, compared, then short questions with their answers.
#[track_caller]
pub fn talk(stream: &GuestStream, seed: u64) {
    const LEN: u64 = 8 << 20;
    thread::scope(|scope| {
        scope.spawn(|| Bytes::new(seed).write_to(stream, LEN).unwrap());
        Bytes::new(seed).expect_from(stream, LEN);
    });
    for round in 0..200u8 {
        (&*stream).write_all(&[round]).unwrap();
        let mut answer = [0];
        (&*stream).read_exact(&mut answer).unwrap();
        assert_eq!(answer, [round]);
    }
}
