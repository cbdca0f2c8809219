//! The flight recorder: what it keeps, what it folds, and what it never loses.

use super::super::talk::{ACCESS_PLATFORM, PLAIN, PROTOCOL, Talk, USER, iotlb};
use super::super::{SessionError, request};
use super::*;
use crate::guest::{Access, Miss};
use crate::vhost_user::AccessPlatform;
use crate::vhost_user::message::{REPLY, VERSION};

fn qemu() -> Talk {
    Talk::with("qemu-system-x86_64", AccessPlatform::Auto)
}

fn entries(vmm: &Talk) -> Vec<Entry> {
    vmm.0.record().messages
}

/// Request, detail, outcome and answer of each entry.
fn told(vmm: &Talk) -> Vec<(String, String, Outcome, Option<String>)> {
    let tell = |entry: Entry| (entry.request, entry.detail, entry.outcome, entry.answer);
    entries(vmm).into_iter().map(tell).collect()
}

#[test]
fn a_session_reads_like_a_transcript() {
    let vmm = qemu();
    vmm.negotiate(PLAIN, PROTOCOL);
    vmm.set_features(PLAIN);
    vmm.share_memory();
    vmm.start_ring(0, USER);
    vmm.ask(request::SET_VRING_CALL, &0u64.to_ne_bytes());
    let row = |request: &str, detail: &str, outcome, answer: Option<&str>| {
        (
            request.to_owned(),
            detail.to_owned(),
            outcome,
            answer.map(str::to_owned),
        )
    };
    let features = "0x170000001 stream ring_indirect_desc ring_event_idx protocol_features version_1";
    let protocol = "0x229 mq reply_ack backend_req config";
    let expected = [
        row("GET_FEATURES", "", Outcome::Answered, Some(features)),
        row("GET_PROTOCOL_FEATURES", "", Outcome::Answered, Some(protocol)),
        row("SET_PROTOCOL_FEATURES", protocol, Outcome::Taken, None),
        row("SET_FEATURES", features, Outcome::Taken, None),
        row(
            "SET_MEM_TABLE",
            "1 region: 0x10000000 bytes at 0x0, in the VMM 0x7fe3dbfff000",
            Outcome::Ok,
            None,
        ),
        row("SET_VRING_NUM", "queue 0, 128 entries", Outcome::Taken, None),
        row("SET_VRING_BASE", "queue 0, base 0", Outcome::Taken, None),
        row(
            "SET_VRING_ADDR",
            "queue 0, desc 0x7fe3dbfff000, avail 0x7fe3dbfff800, used 0x7fe3dbfff940",
            Outcome::Taken,
            None,
        ),
        row(
            "SET_VRING_KICK",
            "queue 0, with a descriptor",
            Outcome::Taken,
            None,
        ),
        row("SET_VRING_ENABLE", "queue 0, on", Outcome::Taken, None),
        row(
            "SET_VRING_CALL",
            "queue 0, with a descriptor",
            Outcome::Pending,
            None,
        ),
    ];
    assert_eq!(told(&vmm), expected);
    vmm.stop_ring(0);
    let (_, detail, outcome, answer) = told(&vmm).pop().unwrap();
    assert_eq!(
        (detail.as_str(), outcome, answer.as_deref()),
        ("queue 0", Outcome::Answered, Some("queue 0, base 2"))
    );
}

#[test]
fn an_answer_belongs_to_the_oldest_question() {
    let vmm = qemu();
    vmm.negotiate(PLAIN, PROTOCOL);
    let told =
        |vmm: &Talk| -> Vec<Outcome> { entries(vmm).iter().skip(3).map(|entry| entry.outcome).collect() };
    vmm.ask(request::SET_MEM_TABLE, &[0; 8]);
    vmm.ask(request::SET_MEM_TABLE, &[0; 8]);
    vmm.answer(request::SET_MEM_TABLE, 1);
    assert_eq!(told(&vmm), [Outcome::Nack, Outcome::Pending]);
    vmm.answer(request::SET_MEM_TABLE, 0);
    assert_eq!(told(&vmm), [Outcome::Nack, Outcome::Ok]);
    vmm.answer(request::SET_MEM_TABLE, 0);
    assert_eq!(told(&vmm), [Outcome::Nack, Outcome::Ok], "nobody asked");
}

/// A VMM that sets NEED_REPLY without REPLY_ACK is not answered, and its messages do not seem to hang.
#[test]
fn what_will_not_be_answered_is_taken() {
    let vmm = qemu();
    vmm.negotiate(PLAIN, PROTOCOL & !(1 << 3));
    vmm.ask(request::SET_VRING_NUM, &[0; 8]);
    assert_eq!(entries(&vmm).pop().unwrap().outcome, Outcome::Taken);
}

/// 128 invalidations while the guest fills its RX ring, and a miss and an update for each page: three lines.
#[test]
fn a_busy_iotlb_is_three_lines() {
    let vmm = qemu();
    vmm.translated_boot();
    let before = entries(&vmm).len();
    for n in 0..5000u64 {
        let miss = Miss {
            iova: 0xfff0_0000 + (n << 12),
            access: Access::Read,
        };
        vmm.0.miss_sent(miss);
        vmm.iotlb(2, miss.iova, 0x1000);
        vmm.0.miss_answered(miss, false);
        vmm.iotlb(3, miss.iova, 0x1000);
    }
    let after = entries(&vmm);
    // The updates join those of the boot: no other message stands between.
    assert_eq!(after.len(), before + 2);
    let tail: Vec<_> = after[before - 1..]
        .iter()
        .map(|entry| (entry.detail.as_str(), entry.count, entry.outcome))
        .collect();
    assert_eq!(
        tail,
        [
            (
                "UPDATE iova 0xfffff000 size 0x1000 rw, last UPDATE iova 0x101287000 size 0x1000 rw",
                5002,
                Outcome::Ok
            ),
            (
                "MISS iova 0xfff00000 ro, last MISS iova 0x101287000 ro",
                5000,
                Outcome::Ok
            ),
            (
                "INVALIDATE iova 0xfff00000 size 0x1000, last INVALIDATE iova 0x101287000 size 0x1000",
                5000,
                Outcome::Ok
            ),
        ]
    );
    assert!(after[before].at <= after[before].last);
    assert_eq!(after[0].request, "GET_FEATURES", "the beginning is still there");
}

#[test]
fn one_of_a_run_that_is_refused_stands_alone() {
    let vmm = qemu();
    vmm.translated_boot();
    let bad = vmm.ask(request::IOTLB_MSG, &iotlb(2, 0xdead_0000, 0x1000));
    assert_eq!(entries(&vmm).pop().unwrap().outcome, Outcome::Pending);
    vmm.0.answered(&bad, 1);
    vmm.iotlb(2, 0x1000, 0x1000);
    let tail: Vec<_> = entries(&vmm).into_iter().rev().take(2).collect();
    assert_eq!(
        (tail[0].detail.as_str(), tail[0].outcome, tail[0].count),
        ("UPDATE iova 0xdead0000 size 0x1000 rw", Outcome::Nack, 1)
    );
    assert_eq!((tail[1].outcome, tail[1].count), (Outcome::Ok, 3));
    let miss = Miss {
        iova: 0x5000,
        access: Access::Write,
    };
    vmm.0.miss_sent(miss);
    vmm.0.miss_answered(miss, true);
    let last = entries(&vmm).pop().unwrap();
    assert_eq!(
        (last.detail.as_str(), last.direction, last.outcome),
        ("MISS iova 0x5000 wo", Direction::BackendChannelOut, Outcome::Nack)
    );
}

/// Whatever a VMM sends, and however it mixes it.
#[test]
fn memory_is_bounded_and_iotlb_messages_push_out_no_others() {
    let vmm = qemu();
    vmm.negotiate(PLAIN, PROTOCOL);
    for n in 0..180u64 {
        vmm.say(request::SET_VRING_CALL, &n.to_ne_bytes());
    }
    for n in 0..10_000u64 {
        // Refused ones are not folded.
        vmm.refuse(request::IOTLB_MSG, &iotlb(2, n, 0), &"because ".repeat(100));
    }
    let kept = entries(&vmm);
    assert_eq!(kept.len(), 183 + IOTLB_SLOTS);
    assert_eq!(kept[0].request, "GET_FEATURES");
    assert!(kept.iter().all(|entry| {
        entry
            .answer
            .as_ref()
            .is_none_or(|answer| answer.len() <= MAX_TEXT)
    }));
    for n in 0..1000u32 {
        vmm.say(request::SET_VRING_NUM, &n.to_ne_bytes());
        vmm.say(request::SET_MEM_TABLE, &[255; 4096]);
        vmm.iotlb((n % 9) as u8, u64::MAX, u64::MAX);
        vmm.say(request::IOTLB_MSG, &[255; 3]);
        vmm.say(n, &[255; 33]);
    }
    assert_eq!(entries(&vmm).len(), CONTROL_SLOTS + IOTLB_SLOTS);
    let kept = entries(&vmm);
    assert!(kept.windows(2).all(|pair| pair[0].at <= pair[1].at), "in order");
}

#[test]
fn it_survives_the_end_of_the_session_and_tells_what_ended_it() {
    let vmm = qemu();
    vmm.negotiate(PLAIN, PROTOCOL);
    let bits = (PLAIN | ACCESS_PLATFORM).to_ne_bytes();
    vmm.refuse(request::SET_FEATURES, &bits, "it was not offered");
    vmm.end(Some((SessionError::Feature, Some(request::SET_FEATURES))));
    let last = entries(&vmm).pop().unwrap();
    assert_eq!(
        (last.outcome, last.answer.as_deref(), last.session),
        (Outcome::EndedSession, Some("it was not offered"), 1)
    );
    vmm.again("qemu-system-x86_64");
    vmm.ask(request::SET_VRING_BASE, &[0; 8]);
    vmm.end(Some((SessionError::Vring, Some(request::SET_VRING_BASE))));
    let kept = entries(&vmm);
    let last = kept.last().unwrap();
    assert_eq!(
        (last.outcome, last.answer.as_deref(), last.session),
        (Outcome::EndedSession, Some("as told by the session"), 2)
    );
    assert_eq!(kept.iter().filter(|entry| entry.session == 1).count(), 4);
}

/// The next VMM's answer is not the last one's.
#[test]
fn a_question_that_died_with_its_session_stays_unanswered() {
    let vmm = qemu();
    vmm.say(request::GET_FEATURES, &[]);
    vmm.end(None);
    vmm.again("qemu-system-x86_64");
    vmm.answer(request::GET_FEATURES, 1);
    assert_eq!(entries(&vmm)[0].outcome, Outcome::Pending);
}

#[test]
fn an_answer_of_any_shape_is_told() {
    let vmm = qemu();
    let cid = [&[0u8; 4][..], &8u32.to_ne_bytes(), &[0; 4], &3u64.to_le_bytes()].concat();
    for (number, body) in [
        (request::GET_CONFIG, cid),
        (request::GET_CONFIG, vec![1; 3]),
        (request::GET_VRING_BASE, vec![1; 3]),
        (request::GET_QUEUE_NUM, 3u64.to_ne_bytes().to_vec()),
        (request::GET_INFLIGHT_FD, vec![0; 20]),
    ] {
        vmm.say(number, &[]);
        vmm.0.reply(&crate::vhost_user::message::Message::new(
            number,
            VERSION | REPLY,
            &body,
        ));
    }
    let answers: Vec<_> = entries(&vmm)
        .into_iter()
        .filter_map(|entry| entry.answer)
        .collect();
    assert_eq!(answers, ["guest_cid 3", "3 bytes", "3 bytes", "3", "20 bytes"]);
}
