//! A channel whose other end the tests hold.

use std::io::Write;

use super::*;
use crate::vhost_user::message::REPLY;

fn miss(page: u64, access: Access) -> Miss {
    Miss {
        iova: page << 12,
        access,
    }
}

/// An open channel and the front-end's end.
fn open(acknowledges: bool) -> (Channel, UnixStream) {
    let (front_end, ours) = UnixStream::pair().unwrap();
    let mut channel = Channel::new();
    channel.open(ours.into(), acknowledges);
    (channel, front_end)
}

/// What a turn did: misses sent, misses answered, whether the channel ended.
fn turn(channel: &mut Channel) -> (Vec<Miss>, Vec<(Miss, bool)>, bool) {
    let (mut sent, mut answered) = (Vec::new(), Vec::new());
    let ended = channel.turn(
        |miss| sent.push(miss),
        |miss, refused| answered.push((miss, refused)),
    );
    (sent, answered, ended)
}

fn received(front_end: &UnixStream) -> Vec<Message> {
    let mut reader = FrameReader::default();
    let mut messages = Vec::new();
    while let Received::Frame(frame) = reader.receive(front_end).unwrap() {
        messages.push(frame.message);
    }
    messages
}

fn answer(mut front_end: &UnixStream, value: u64) {
    let reply = Message::new(backend_request::IOTLB_MSG, VERSION | REPLY, &value.to_ne_bytes());
    front_end.write_all(reply.bytes()).unwrap();
}

#[test]
fn answers_belong_to_misses_in_their_order() {
    let (mut channel, front_end) = open(true);
    let (first, second) = (miss(1, Access::Read), miss(2, Access::Write));
    channel.ask(first);
    channel.ask(second);
    assert_eq!(turn(&mut channel), (vec![first, second], vec![], false));
    assert_eq!(
        received(&front_end),
        [
            Message::iotlb_miss(VERSION | NEED_REPLY, 0x1000, 1),
            Message::iotlb_miss(VERSION | NEED_REPLY, 0x2000, 2)
        ]
    );
    answer(&front_end, 0);
    answer(&front_end, 1);
    assert_eq!(
        turn(&mut channel),
        (vec![], vec![(first, false), (second, true)], false)
    );
    // An answer to nothing is nobody's.
    answer(&front_end, 1);
    assert_eq!(turn(&mut channel), (vec![], vec![], false));
}

#[test]
fn without_acknowledgements_no_answer_is_asked_for_and_none_is_believed() {
    let (mut channel, front_end) = open(false);
    channel.ask(miss(1, Access::Read));
    turn(&mut channel);
    assert_eq!(received(&front_end), [Message::iotlb_miss(VERSION, 0x1000, 1)]);
    answer(&front_end, 1);
    assert_eq!(turn(&mut channel), (vec![], vec![], false));
}

#[test]
fn misses_wait_for_a_channel() {
    let mut channel = Channel::new();
    assert!(!channel.is_open() && channel.interest().is_none());
    for page in 0..2 * MAX_QUEUED as u64 {
        channel.ask(miss(page, Access::Read));
    }
    assert_eq!(turn(&mut channel), (vec![], vec![], false));
    let (front_end, ours) = UnixStream::pair().unwrap();
    channel.open(ours.into(), true);
    assert_eq!(turn(&mut channel).0.len(), MAX_QUEUED);
    assert_eq!(received(&front_end).len(), MAX_QUEUED);
}

#[test]
fn a_front_end_that_says_something_else_is_not_listened_to_and_one_that_leaves_is_told() {
    let (mut channel, mut front_end) = open(true);
    let asked = miss(1, Access::Read);
    channel.ask(asked);
    turn(&mut channel);
    for message in [
        Message::new(backend_request::IOTLB_MSG, VERSION, &[0; 8]),
        Message::new(7, VERSION | REPLY, &[0; 8]),
        Message::new(backend_request::IOTLB_MSG, VERSION | REPLY, &[0; 4]),
    ] {
        front_end.write_all(message.bytes()).unwrap();
    }
    assert_eq!(turn(&mut channel), (vec![], vec![], false));
    answer(&front_end, 0);
    assert_eq!(turn(&mut channel).1, [(asked, false)]);
    drop(front_end);
    assert_eq!(turn(&mut channel), (vec![], vec![], true));
    assert!(!channel.is_open());
    assert_eq!(turn(&mut channel), (vec![], vec![], false));
}

#[test]
fn a_front_end_that_reads_nothing_costs_a_bounded_number_of_misses() {
    let (mut channel, front_end) = open(true);
    for page in 0..10_000 {
        channel.ask(miss(page, Access::Read));
        assert!(!turn(&mut channel).2);
    }
    assert!(channel.asked.len() <= MAX_QUEUED && channel.waiting.len() <= MAX_QUEUED);
    assert!(
        channel.writer.len() <= MAX_QUEUED,
        "{} messages wait",
        channel.writer.len()
    );
    drop(front_end);
}

/// The descriptor that came need not be a socket.
#[test]
fn a_channel_that_is_no_socket_ends() {
    let mut channel = Channel::new();
    channel.open(std::fs::File::open("/dev/null").unwrap().into(), true);
    channel.ask(miss(1, Access::Read));
    assert!(turn(&mut channel).2);
}
