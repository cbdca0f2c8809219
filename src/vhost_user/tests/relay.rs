//! The relay between two sockets whose other ends the tests hold.

use std::io::{Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

use super::*;
use crate::vhost_user::message::{MAX_BODY, MAX_FDS, Message, NEED_REPLY, REPLY, VERSION, request};
use crate::vhost_user::testing;
use crate::vhost_user::{AccessPlatform, Mode};

struct Wire {
    relay: Relay,
    watch: Arc<NegotiationWatch>,
    vmm: UnixStream,
    backend: UnixStream,
}

impl Wire {
    fn new(mode: Mode) -> Wire {
        let (vmm, vmm_end) = UnixStream::pair().unwrap();
        let (backend, backend_end) = UnixStream::pair().unwrap();
        for end in [&vmm, &backend] {
            end.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        }
        Wire {
            relay: Relay::new(
                vmm_end,
                backend_end,
                Gate::new(mode, AccessPlatform::Auto),
                |_| {},
            ),
            watch: testing::watch(mode),
            vmm,
            backend,
        }
    }

    /// Turns until nothing moves.
    fn settle(&mut self) -> Result<(), RelayEnd> {
        while self.relay.turn(&self.watch)? {}
        Ok(())
    }

    /// Turns until the relay ends.
    fn end(&mut self) -> RelayEnd {
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            if let Err(end) = self.settle() {
                return end;
            }
            assert!(Instant::now() < deadline, "the relay did not end");
        }
    }
}

fn send(socket: &UnixStream, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(32))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
    }
    let sent = sendmsg(
        socket,
        &[std::io::IoSlice::new(bytes)],
        &mut control,
        SendFlags::NOSIGNAL,
    )
    .unwrap();
    assert_eq!(sent, bytes.len());
}

/// The bytes of a message, and which files its descriptors are of.
type Passed = (Vec<u8>, Vec<(u64, u64)>);

/// Everything a socket has, and the descriptors that came with it, by message.
fn drain(socket: &UnixStream) -> Vec<Passed> {
    let mut reader = FrameReader::default();
    let mut frames = Vec::new();
    while let Received::Frame(frame) = reader.receive(socket).unwrap() {
        frames.push((
            frame.message.bytes().to_vec(),
            frame.fds.iter().map(testing::identity).collect(),
        ));
    }
    assert!(!reader.is_inside_message(), "half a message was passed on");
    frames
}

fn memfd(name: &str) -> OwnedFd {
    rustix::fs::memfd_create(name, rustix::fs::MemfdFlags::CLOEXEC).unwrap()
}

/// What a VMM writes in one call: how many bytes, and whether a descriptor goes with them.
#[derive(Clone, Debug)]
struct Piece {
    len: usize,
    fds: usize,
}

fn any_message() -> impl Strategy<Value = Vec<u8>> {
    (
        any::<u32>(),
        any::<u32>(),
        prop_oneof![Just(0), Just(8), Just(40), 0..=MAX_BODY],
        any::<u8>(),
    )
        .prop_map(|(number, flags, len, fill)| Message::new(number, flags, &vec![fill; len]).bytes().to_vec())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Invariant 1: whatever the messages are and however they are cut up, the other side reads the same bytes, one
    /// message a write, with the descriptors that came with any of its bytes. Both ways.
    #[test]
    fn bytes_and_descriptors_pass_unchanged(
        messages in proptest::collection::vec(any_message(), 1..6),
        pieces in proptest::collection::vec((1usize..3000, 0usize..3).prop_map(|(len, fds)| Piece { len, fds }), 1..12),
        to_vmm: bool,
    ) {
        let mut wire = Wire::new(Mode::Server);
        let (from, to) = if to_vmm { (&wire.backend, &wire.vmm) } else { (&wire.vmm, &wire.backend) };
        let (from, to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
        let stream = messages.concat();
        let mut ends: Vec<usize> = Vec::new();
        for message in &messages {
            ends.push(ends.last().unwrap_or(&0) + message.len());
        }
        let mut expected: Vec<Passed> = messages.into_iter().map(|m| (m, Vec::new())).collect();
        let mut got = Vec::new();
        let (mut at, mut piece) = (0, pieces.iter().cycle());
        while at < stream.len() {
            let Piece { len, fds } = piece.next().unwrap();
            let len = (*len).min(stream.len() - at);
            let fds: Vec<OwnedFd> = (0..*fds).map(|_| memfd("passed")).collect();
            let borrowed: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
            send(&from, &stream[at..at + len], &borrowed);
            // They belong to the message of the write's first byte.
            let message = ends.iter().position(|end| at < *end).unwrap();
            expected[message].1.extend(fds.iter().map(testing::identity));
            at += len;
            wire.settle().unwrap();
            got.extend(drain(&to));
        }
        for (_, fds) in &mut expected {
            fds.truncate(MAX_FDS);
        }
        prop_assert!(got == expected, "something else arrived");
    }
}

#[test]
fn a_message_is_passed_on_in_one_piece_or_not_at_all() {
    let mut wire = Wire::new(Mode::Server);
    let message = Message::new(request::SET_MEM_TABLE, VERSION, &[7; 40]);
    wire.vmm.write_all(&message.bytes()[..30]).unwrap();
    wire.settle().unwrap();
    assert!(drain(&wire.backend).is_empty());
    wire.vmm.write_all(&message.bytes()[30..]).unwrap();
    wire.settle().unwrap();
    // One read, as the crate reads a body.
    let mut bytes = [0; 100];
    assert_eq!(wire.backend.read(&mut bytes).unwrap(), 52);
}

/// Invariant 3: what one side does not read stays with the other, and the other direction goes on.
#[test]
fn a_side_that_does_not_read_holds_up_its_own_direction_only() {
    let mut wire = Wire::new(Mode::Server);
    let big = Message::new(request::SET_CONFIG, VERSION, &[1; MAX_BODY]);
    wire.vmm.set_nonblocking(true).unwrap();
    let mut written = 0u64;
    loop {
        match wire.vmm.write(big.bytes()) {
            Ok(len) => written += len as u64,
            Err(_) => {
                let before = written;
                wire.settle().unwrap();
                if let Ok(len) = wire.vmm.write(big.bytes()) {
                    written += len as u64;
                }
                if written == before {
                    break;
                }
            }
        }
        assert!(written < 16 << 20, "the relay takes everything");
    }
    assert_eq!(wire.relay.vmm_interest(), PollFlags::empty());
    assert_eq!(
        wire.relay.backend_interest(),
        Some(PollFlags::IN | PollFlags::OUT)
    );
    let answer = Message::new(request::GET_FEATURES, VERSION | REPLY, &[0; 8]);
    wire.backend.write_all(answer.bytes()).unwrap();
    wire.settle().unwrap();
    assert_eq!(drain(&wire.vmm), [(answer.bytes().to_vec(), vec![])]);
    // Everything arrives once it is read.
    let mut read = 0;
    while read < written / big.bytes().len() as u64 * big.bytes().len() as u64 {
        read += drain(&wire.backend)
            .iter()
            .map(|(bytes, _)| bytes.len() as u64)
            .sum::<u64>();
        wire.settle().unwrap();
    }
}

#[test]
fn a_crate_that_closes_is_heard_out() {
    let mut wire = Wire::new(Mode::Server);
    let request = Message::new(request::SET_MEM_TABLE, VERSION, &[]);
    wire.vmm.write_all(request.bytes()).unwrap();
    let refusal = Message::new(request::SET_MEM_TABLE, VERSION | REPLY, &1u64.to_ne_bytes());
    wire.backend.write_all(refusal.bytes()).unwrap();
    wire.backend.shutdown(std::net::Shutdown::Both).unwrap();
    assert!(matches!(wire.end(), RelayEnd::CrateClosed));
    assert_eq!(drain(&wire.vmm), [(refusal.bytes().to_vec(), vec![])]);
}

#[test]
fn a_hung_up_crate_is_not_polled_while_its_last_words_wait() {
    let mut wire = Wire::new(Mode::Server);
    let big = Message::new(request::GET_CONFIG, VERSION | REPLY, &[1; MAX_BODY]);
    wire.backend.set_nonblocking(true).unwrap();
    while wire
        .relay
        .backend_interest()
        .is_some_and(|interest| interest.contains(PollFlags::IN))
    {
        let _ = wire.backend.write(big.bytes());
        wire.settle().unwrap();
    }
    drop(std::mem::replace(
        &mut wire.backend,
        UnixStream::pair().unwrap().0,
    ));
    assert!(!wire.relay.is_draining());
    wire.relay.backend_hung_up();
    assert_eq!(wire.relay.backend_interest(), None, "it would be ready for ever");
    assert!(wire.relay.is_draining());
    let mut read = [0; 1 << 16];
    loop {
        match wire.settle() {
            Ok(()) => drop(wire.vmm.read(&mut read).unwrap()),
            Err(end) => break assert!(matches!(end, RelayEnd::CrateClosed), "{end}"),
        }
    }
}

#[test]
fn a_vmm_that_closes_ends_the_relay() {
    let mut wire = Wire::new(Mode::Server);
    wire.vmm.shutdown(std::net::Shutdown::Both).unwrap();
    assert!(matches!(wire.end(), RelayEnd::VmmClosed));

    let mut wire = Wire::new(Mode::Server);
    wire.vmm.write_all(&[1, 0]).unwrap();
    wire.vmm.shutdown(std::net::Shutdown::Both).unwrap();
    assert!(matches!(
        wire.end(),
        RelayEnd::Vmm(WireError::Truncated { got: 2, .. })
    ));
}

/// The prelude goes to the crate in front of the VMM's first message, and only its own answers are kept back.
#[test]
fn the_prelude_is_between_us_and_the_crate() {
    let mut wire = Wire::new(Mode::Client);
    let first = Message::new(request::GET_VRING_BASE, VERSION, &[0; 8]);
    wire.vmm.write_all(first.bytes()).unwrap();
    wire.settle().unwrap();
    let sent = drain(&wire.backend);
    assert_eq!(sent.len(), 6);
    assert_eq!(sent[5].0, first.bytes());
    assert!(wire.watch.snapshot().assumed);
    for number in [
        request::GET_FEATURES,
        request::GET_PROTOCOL_FEATURES,
        request::GET_VRING_BASE,
    ] {
        let answer = Message::new(number, VERSION | REPLY, &[0; 8]);
        wire.backend.write_all(answer.bytes()).unwrap();
    }
    wire.settle().unwrap();
    let heard = drain(&wire.vmm);
    assert_eq!(heard.len(), 1);
    assert_eq!(heard[0].0[0], request::GET_VRING_BASE as u8);
}

/// INVALIDATEs are carried out and answered by us. A VMM that sends them and reads no answer must be left waiting, as it is
/// with requests that the crate answers.
#[test]
fn a_vmm_that_invalidates_and_reads_no_answer_does_not_make_answers_pile_up() {
    let mut wire = Wire::new(Mode::Server);
    let platform = 1u64 << 33;
    let features = Message::new(request::SET_FEATURES, VERSION, &platform.to_ne_bytes());
    let mut body = [0x1000u64, 0x1000, 0].map(u64::to_ne_bytes).concat();
    body.extend_from_slice(&[0, 3, 0, 0, 0, 0, 0, 0]);
    let invalidate = Message::new(request::IOTLB_MSG, VERSION | NEED_REPLY, &body);
    wire.vmm.write_all(features.bytes()).unwrap();
    wire.vmm.set_nonblocking(true).unwrap();
    let mut answered = 0;
    // Until neither it can write nor we do anything.
    loop {
        let wrote = wire.vmm.write(invalidate.bytes()).is_ok();
        wire.settle().unwrap();
        for (message, _) in drain(&wire.backend) {
            if message[0] == request::GET_FEATURES as u8 {
                let barrier = Message::new(request::GET_FEATURES, VERSION | REPLY, &[0; 8]);
                wire.backend.write_all(barrier.bytes()).unwrap();
                wire.settle().unwrap();
            }
        }
        match wire.relay.take_operation() {
            Some(_) => {
                wire.relay.carried_out(&wire.watch);
                answered += 1;
            }
            None if !wrote => break,
            None => {}
        }
        assert!(answered < 20_000, "the relay takes everything");
    }
    // It goes on where it stood once the VMM reads.
    let mut read = 0;
    loop {
        read += drain(&wire.vmm).len();
        wire.settle().unwrap();
        match wire.relay.take_operation() {
            Some(_) => {
                wire.relay.carried_out(&wire.watch);
                answered += 1;
                wire.settle().unwrap();
            }
            None if read == answered => break,
            None => {}
        }
    }
    assert_eq!(wire.relay.vmm_interest(), PollFlags::IN);
}
