//! The IOTLB against a model that knows every page, and the life of a question.

use std::collections::BTreeMap;
use std::time::Duration;

use proptest::prelude::*;

use super::questions::MAX_OPEN;
use super::*;

const RO: Permission = Permission::Read;
const WO: Permission = Permission::Write;
const RW: Permission = Permission::ReadWrite;

fn mapping(iova: u64, len: u64, gpa: u64, permission: Permission) -> Mapping {
    Mapping {
        iova,
        len,
        gpa,
        permission,
    }
}

/// A page for reading and writing.
fn page(iova: u64, gpa: u64) -> Mapping {
    mapping(iova, PAGE, gpa, RW)
}

fn miss(iova: u64, access: Access) -> Miss {
    Miss { iova, access }
}

fn missing(iova: u64) -> Result<(u64, usize), MemoryFault> {
    Err(MemoryFault::Missing { iova })
}

fn refused(iova: u64) -> Result<(u64, usize), MemoryFault> {
    Err(MemoryFault::Refused { iova })
}

/// An IOTLB that a chain is walked through, and what the VMM is asked.
fn sent(iotlb: &mut Iotlb) -> Vec<Miss> {
    iotlb.take_misses(Instant::now())
}

#[test]
fn it_moves_to_the_device_thread() {
    fn is_send<T: Send>() {}
    is_send::<Iotlb>();
}

#[test]
fn a_mapping_ends_where_it_ends() {
    let mut iotlb = Iotlb::new();
    iotlb.insert(mapping(0x1000, 0x3000, 0x9000, RW));
    assert_eq!(iotlb.translate(0x1000, 1, Access::Read), Ok((0x9000, 1)));
    assert_eq!(
        iotlb.translate(0x1800, 0x10_0000, Access::Write),
        Ok((0x9800, 0x2800))
    );
    assert_eq!(iotlb.translate(0x3fff, 2, Access::Read), Ok((0xbfff, 1)));
    assert_eq!(iotlb.translate(0x4000, 1, Access::Read), missing(0x4000));
    assert_eq!(iotlb.translate(0xfff, 1, Access::Read), missing(0xfff));
}

#[test]
fn an_update_takes_the_place_of_what_it_overlaps() {
    let mut iotlb = Iotlb::new();
    iotlb.insert(mapping(0x1000, 0x4000, 0x10_0000, RW));
    // A hit first: what is remembered of it must not survive.
    assert_eq!(iotlb.translate(0x2000, 1, Access::Write), Ok((0x10_1000, 1)));
    iotlb.insert(mapping(0x2000, 0x1000, 0x70_0000, RO));
    for (addr, len, want) in [
        (0x1000, 0x9000, Ok((0x10_0000, 0x1000))),
        (0x2004, 0x9000, Ok((0x70_0004, 0xffc))),
        (0x3008, 0x9000, Ok((0x10_2008, 0x1ff8))),
    ] {
        assert_eq!(iotlb.translate(addr, len, Access::Read), want, "{addr:#x}");
    }
    assert_eq!(iotlb.translate(0x2000, 1, Access::Write), missing(0x2000));
    iotlb.invalidate(0x2800, 0x37ff);
    assert_eq!(
        iotlb.translate(0x2000, 0x9000, Access::Read),
        Ok((0x70_0000, 0x800))
    );
    assert_eq!(iotlb.translate(0x2800, 1, Access::Read), missing(0x2800));
    assert_eq!(iotlb.translate(0x37ff, 1, Access::Read), missing(0x37ff));
    assert_eq!(iotlb.translate(0x3800, 1, Access::Read), Ok((0x10_2800, 1)));
    let stats = iotlb.stats();
    assert_eq!((stats.entries, stats.mapped_bytes), (3, 0x1000 + 0x800 + 0x1800));
    assert_eq!((stats.lookups, stats.misses), (9, 3));
    iotlb.map.check();
}

#[test]
fn the_whole_address_space_can_be_mapped_and_forgotten() {
    let mut iotlb = Iotlb::new();
    iotlb.insert(mapping(0, u64::MAX, 0, RW));
    iotlb.insert(mapping(u64::MAX, 1, u64::MAX, RW));
    assert_eq!(iotlb.stats().entries, 1);
    assert_eq!(iotlb.stats().mapped_bytes, u64::MAX, "2^64 has no place here");
    assert_eq!(iotlb.translate(0, usize::MAX, Access::Read), Ok((0, usize::MAX)));
    assert_eq!(iotlb.translate(u64::MAX, 1, Access::Read), Ok((u64::MAX, 1)));
    iotlb.invalidate(1, u64::MAX - 1);
    assert_eq!(iotlb.stats().mapped_bytes, 2);
    assert_eq!(iotlb.translate(1, 1, Access::Read), missing(1));
    iotlb.invalidate(0, u64::MAX);
    assert_eq!(iotlb.stats().entries, 0);
    iotlb.map.check();
}

#[test]
fn mappings_that_make_no_sense_do_nothing() {
    let mut iotlb = Iotlb::new();
    iotlb.insert(page(0x1000, 0x5000));
    for (iova, len, gpa) in [
        (0x1000, 0, 0),
        (u64::MAX, 2, 0),
        (2, u64::MAX, 0),
        (0, 2, u64::MAX),
        (0, u64::MAX, 2),
    ] {
        iotlb.insert(mapping(iova, len, gpa, RO));
    }
    iotlb.invalidate(0x2000, 0x1fff);
    iotlb.invalidate(u64::MAX, 0);
    assert_eq!(iotlb.stats().entries, 1);
    assert_eq!(iotlb.translate(0x1000, 1, Access::Write), Ok((0x5000, 1)));
}

#[test]
fn permissions_are_those_of_the_mapping() {
    for (permission, read, write) in [(RO, true, false), (WO, false, true), (RW, true, true)] {
        let mut iotlb = Iotlb::new();
        iotlb.insert(mapping(0x1000, PAGE, 0x8000, permission));
        for (access, allowed) in [(Access::Read, read), (Access::Write, write)] {
            let want = if allowed { Ok((0x8000, 1)) } else { missing(0x1000) };
            // Twice: the second answer comes from the table in front.
            for _ in 0..2 {
                assert_eq!(
                    iotlb.translate(0x1000, 1, access),
                    want,
                    "{permission:?} {access:?}"
                );
            }
            let asked = if allowed {
                vec![]
            } else {
                vec![miss(0x1000, access)]
            };
            assert_eq!(sent(&mut iotlb), asked);
        }
    }
}

#[test]
fn neighbours_become_one_only_if_they_are_in_both_worlds() {
    let mut iotlb = Iotlb::new();
    iotlb.insert(page(0x2000, 0x12_000));
    iotlb.insert(page(0x4000, 0x14_000));
    iotlb.insert(page(0x3000, 0x13_000)); // closes the gap
    assert_eq!(iotlb.stats().entries, 1);
    assert_eq!(
        iotlb.translate(0x2000, 0x9000, Access::Write),
        Ok((0x12_000, 0x3000))
    );
    iotlb.insert(page(0x5000, 0x16_000)); // elsewhere in memory
    iotlb.insert(mapping(0x1000, PAGE, 0x11_000, RO)); // not for writing
    assert_eq!(iotlb.stats().entries, 3);
    // The guest unmaps one buffer of three.
    iotlb.invalidate(0x3000, 0x3fff);
    assert_eq!(
        iotlb.translate(0x2000, 0x9000, Access::Write),
        Ok((0x12_000, 0x1000))
    );
    assert_eq!(iotlb.translate(0x4000, 1, Access::Write), Ok((0x14_000, 1)));
    iotlb.map.check();
}

#[test]
fn the_oldest_goes_when_there_are_too_many() {
    let mut iotlb = Iotlb::with_capacity(4);
    for i in 0..4 {
        iotlb.insert(page(i * 0x2000, 0x10_0000 - i * PAGE));
    }
    // Sent again: as new as the others.
    iotlb.insert(page(0, 0x10_0000));
    assert_eq!(iotlb.translate(0x2000, 1, Access::Read), Ok((0xf_f000, 1)));
    iotlb.insert(page(0x20_0000, 0));
    assert_eq!(iotlb.stats().evictions, 1);
    assert_eq!(iotlb.translate(0x2000, 1, Access::Read), missing(0x2000));
    assert_eq!(iotlb.translate(0, 1, Access::Read), Ok((0x10_0000, 1)));
    // Cutting a range in two makes one more of them, too.
    iotlb.insert(mapping(0x40_0000, 0x3000, 0x50_0000, RW));
    iotlb.invalidate(0x40_1000, 0x40_1fff);
    assert_eq!((iotlb.stats().entries, iotlb.stats().evictions), (4, 3));
    assert_eq!(iotlb.translate(0x40_2000, 1, Access::Read), Ok((0x50_2000, 1)));
    iotlb.map.check();
}

#[test]
fn two_of_the_largest_chains_and_two_rings_fit() {
    let needed = 2 * (super::super::chain::MAX_PIECES as u64 + 5) + 22;
    let mut iotlb = Iotlb::new();
    for i in 0..needed {
        iotlb.insert(page(i * PAGE, (needed - i) * PAGE));
    }
    assert_eq!(iotlb.stats().entries, needed);
    for i in 0..needed {
        assert!(iotlb.translate(i * PAGE, 1, Access::Read).is_ok());
    }
}

#[test]
fn a_page_is_asked_for_once_for_each_access() {
    let mut iotlb = Iotlb::new();
    for addr in [0x1234, 0x1000, 0x1fff] {
        assert_eq!(iotlb.translate(addr, 1, Access::Read), missing(addr));
        assert_eq!(iotlb.translate(addr, 1, Access::Write), missing(addr));
    }
    let now = Instant::now();
    assert_eq!(iotlb.oldest_unanswered(), None);
    assert_eq!(
        iotlb.take_misses(now),
        [miss(0x1000, Access::Read), miss(0x1000, Access::Write)]
    );
    assert_eq!(iotlb.translate(0x1000, 1, Access::Read), missing(0x1000));
    assert_eq!(iotlb.translate(0x2000, 1, Access::Read), missing(0x2000));
    assert_eq!(
        iotlb.take_misses(now + Duration::from_secs(1)),
        [miss(0x2000, Access::Read)]
    );
    assert_eq!(iotlb.stats().unanswered, 3);
    assert!(
        iotlb
            .oldest_unanswered()
            .is_some_and(|(miss, since)| miss.iova == 0x1000 && since == now)
    );
    // Read-only answers one of the first two.
    iotlb.insert(mapping(0x1000, PAGE, 0, RO));
    assert_eq!(iotlb.stats().unanswered, 2);
    iotlb.insert(mapping(0x1000, PAGE, 0, RW));
    assert_eq!(
        iotlb.oldest_unanswered(),
        Some((miss(0x2000, Access::Read), now + Duration::from_secs(1)))
    );
    // The answers themselves come after the UPDATE and change nothing.
    iotlb.answered(miss(0x1000, Access::Read), false);
    iotlb.answered(miss(0x1000, Access::Write), false);
    assert_eq!(iotlb.translate(0x1000, 1, Access::Write), Ok((0, 1)));
    iotlb.invalidate(0, 0xffff);
    assert_eq!(iotlb.translate(0x1000, 1, Access::Write), missing(0x1000));
    assert_eq!(sent(&mut iotlb), [miss(0x1000, Access::Write)], "a new question");
}

#[test]
fn questions_are_bounded_and_go_on_when_some_are_answered() {
    let mut iotlb = Iotlb::new();
    for i in 0..200 {
        assert_eq!(iotlb.translate(i * PAGE, 1, Access::Read), missing(i * PAGE));
    }
    assert!(iotlb.is_full());
    let asked = sent(&mut iotlb);
    assert_eq!(asked.len(), MAX_OPEN);
    iotlb.insert(page(0, 0));
    iotlb.answered(asked[1], true);
    iotlb.answered(asked[2], false);
    iotlb.begin_walk();
    for i in 0..200 {
        let _ = iotlb.translate(i * PAGE, 1, Access::Write);
    }
    // The third still occupies its place: a VMM that answers so could be asked for ever.
    assert_eq!(sent(&mut iotlb).len(), 2);
    iotlb.retry();
    for i in 0..200 {
        let _ = iotlb.translate(i * PAGE, 1, Access::Write);
    }
    assert_eq!(sent(&mut iotlb).len(), 1);
    iotlb.questions.borrow().check();
}

#[test]
fn a_refusal_holds_until_its_chain_has_failed() {
    let mut iotlb = Iotlb::new();
    let question = miss(0x5000, Access::Write);
    iotlb.begin_walk();
    assert_eq!(iotlb.translate(0x5010, 8, Access::Write), missing(0x5010));
    assert!(iotlb.awaits());
    assert_eq!(sent(&mut iotlb), [question]);
    iotlb.answered(question, true);
    assert_eq!((iotlb.stats().faults_read, iotlb.stats().faults_write), (0, 1));
    for _ in 0..3 {
        iotlb.begin_walk();
        assert_eq!(iotlb.translate(0x5010, 8, Access::Write), refused(0x5010));
        assert!(!iotlb.awaits());
        // For reading it may be another matter; but this chain fails anyway.
        assert_eq!(iotlb.translate(0x5010, 8, Access::Read), missing(0x5010));
        assert_eq!(iotlb.translate(0x9000, 8, Access::Write), missing(0x9000));
        assert_eq!(sent(&mut iotlb), [], "not asked again, nor for anything else");
    }
    // A walk that has not met it does not forget it.
    iotlb.begin_walk();
    iotlb.forget_refusals();
    assert_eq!(iotlb.translate(0x5010, 8, Access::Write), refused(0x5010));
    iotlb.forget_refusals();
    iotlb.begin_walk();
    assert_eq!(iotlb.translate(0x5010, 8, Access::Write), missing(0x5010));
    assert_eq!(sent(&mut iotlb), [question], "the next chain may ask again");
    iotlb.questions.borrow().check();
}

#[test]
fn what_the_vmm_says_of_a_page_ends_its_refusal() {
    type Says = fn(&mut Iotlb);
    let says: [(&str, Says, bool); 7] = [
        ("mapped", |iotlb| iotlb.insert(page(0x5000, 0)), true),
        (
            "mapped with all around",
            |iotlb| iotlb.insert(mapping(0, 1 << 30, 0, RW)),
            true,
        ),
        (
            "mapped for reading",
            |iotlb| iotlb.insert(mapping(0x5000, PAGE, 0, RO)),
            false,
        ),
        ("mapped elsewhere", |iotlb| iotlb.insert(page(0x6000, 0)), false),
        ("unmapped", |iotlb| iotlb.invalidate(0, u64::MAX), true),
        (
            "unmapped elsewhere",
            |iotlb| iotlb.invalidate(0x6000, u64::MAX),
            false,
        ),
        ("flushed", Iotlb::flush, true),
    ];
    for (what, say, ends) in says {
        let mut iotlb = Iotlb::new();
        let _ = iotlb.translate(0x5000, 1, Access::Write);
        let asked = sent(&mut iotlb);
        iotlb.answered(asked[0], true);
        say(&mut iotlb);
        iotlb.begin_walk();
        let now = iotlb.translate(0x5000, 1, Access::Write);
        assert_eq!(now != refused(0x5000), ends, "{what}");
        iotlb.questions.borrow().check();
    }
}

/// What would keep the two of us busy for ever: we ask, it answers and maps nothing (or not what we need).
#[test]
fn an_answer_without_a_translation_is_not_a_reason_to_ask_again() {
    let updates = [
        None,
        Some(mapping(0x5000, 0x800, 0, RW)),
        Some(mapping(0x5000, PAGE, 0, RO)),
    ];
    for update in updates {
        let mut iotlb = Iotlb::new();
        for kick in 0..3 {
            iotlb.retry();
            let mut messages = 0;
            for _ in 0..10 {
                iotlb.begin_walk();
                assert_eq!(iotlb.translate(0x5900, 0x10, Access::Write), missing(0x5900));
                for asked in sent(&mut iotlb) {
                    messages += 1;
                    if let Some(mapping) = update {
                        iotlb.insert(mapping);
                    }
                    iotlb.answered(asked, false);
                }
            }
            assert_eq!(messages, 1, "kick {kick}, {update:?}");
            assert!(!iotlb.awaits(), "the chain would never be judged");
        }
        // And if the translation comes after all, out of order:
        iotlb.insert(page(0x5000, 0x7000));
        assert_eq!(iotlb.translate(0x5900, 0x10, Access::Write), Ok((0x7900, 0x10)));
        iotlb.questions.borrow().check();
    }
}

/// A VMM that grants what it is asked for and nothing more. A small ring has all three areas in one page.
#[test]
fn a_page_that_is_granted_for_reading_and_then_for_writing_has_both() {
    let mut iotlb = Iotlb::new();
    let mut asked = Vec::new();
    for _ in 0..5 {
        iotlb.begin_walk();
        let _ = iotlb.translate(0x5000, 0x100, Access::Read);
        let _ = iotlb.translate(0x5800, 0x100, Access::Write);
        for question in sent(&mut iotlb) {
            asked.push(question);
            let permission = match question.access {
                Access::Read => RO,
                Access::Write => WO,
            };
            iotlb.insert(mapping(question.iova, PAGE, 0x7000, permission));
            iotlb.answered(question, false);
        }
    }
    assert_eq!(asked, [miss(0x5000, Access::Read), miss(0x5000, Access::Write)]);
    assert_eq!(iotlb.translate(0x5000, 1, Access::Read), Ok((0x7000, 1)));
    assert_eq!(iotlb.translate(0x5800, 1, Access::Write), Ok((0x7800, 1)));
    // To say less of what was granted for both is to take something back; and another page is another page.
    iotlb.insert(mapping(0x5000, PAGE, 0x7000, RO));
    assert_eq!(iotlb.translate(0x5800, 1, Access::Write), missing(0x5800));
    iotlb.insert(mapping(0x5000, PAGE, 0x9000, WO));
    assert_eq!(iotlb.translate(0x5000, 1, Access::Read), missing(0x5000));
    iotlb.map.check();
}

#[test]
fn an_invalidation_leaves_the_question_whose_answer_is_to_come() {
    let mut iotlb = Iotlb::new();
    let _ = iotlb.translate(0x5000, 1, Access::Read);
    let asked = sent(&mut iotlb);
    iotlb.invalidate(0, u64::MAX);
    let _ = iotlb.translate(0x5000, 1, Access::Read);
    assert_eq!(sent(&mut iotlb), []);
    iotlb.answered(asked[0], true);
    assert_eq!(iotlb.translate(0x5000, 1, Access::Read), refused(0x5000));
}

/// QEMU refuses what was in flight when the rings stopped. Linux begins with the same addresses again.
#[test]
fn an_answer_from_before_a_flush_is_no_answer() {
    let mut iotlb = Iotlb::new();
    let question = miss(0x5000, Access::Read);
    let _ = iotlb.translate(0x5000, 1, Access::Read);
    assert_eq!(sent(&mut iotlb), [question]);
    iotlb.flush();
    assert_eq!(iotlb.oldest_unanswered(), None);
    let _ = iotlb.translate(0x5000, 1, Access::Read);
    assert_eq!(sent(&mut iotlb), [question]);
    iotlb.answered(question, true); // of the first
    assert_eq!(iotlb.translate(0x5000, 1, Access::Read), missing(0x5000));
    // It may have been of the second, if the first was never answered: so there is a third.
    assert_eq!(sent(&mut iotlb), [question]);
    iotlb.answered(question, true);
    assert_eq!(iotlb.translate(0x5000, 1, Access::Read), refused(0x5000));
    assert_eq!(iotlb.stats().faults_read, 1);
    // Flushed again and again, and never answered: nothing grows.
    for i in 0..1000 {
        let _ = iotlb.translate(i * PAGE, 1, Access::Read);
        sent(&mut iotlb);
        iotlb.flush();
        iotlb.questions.borrow().check();
    }
}

#[test]
fn a_vmm_that_maps_whole_ranges_is_asked_once_a_range() {
    let mut iotlb = Iotlb::new();
    assert_eq!(
        iotlb.translate(0x10_0000, 0x1_0000, Access::Read),
        missing(0x10_0000)
    );
    assert_eq!(sent(&mut iotlb), [miss(0x10_0000, Access::Read)]);
    iotlb.insert(mapping(0, 1 << 30, 0, RW));
    assert_eq!(iotlb.translate(1 << 30, 0x1_0000, Access::Read), missing(1 << 30));
    assert_eq!(sent(&mut iotlb), [miss(1 << 30, Access::Read)]);
}

#[test]
fn a_vmm_that_maps_by_page_is_asked_for_the_whole_range() {
    let mut iotlb = Iotlb::new();
    iotlb.insert(page(0x10_3000, 0));
    iotlb.insert(mapping(0x10_4000, PAGE, 0x9000, RO));
    assert_eq!(
        iotlb.translate(0x10_0800, 0x5001, Access::Write),
        missing(0x10_0800)
    );
    // Not 0x10_3000, which is mapped, and nothing beyond the range's last byte.
    let want = [0x10_0000, 0x10_1000, 0x10_2000, 0x10_4000, 0x10_5000].map(|at| miss(at, Access::Write));
    assert_eq!(sent(&mut iotlb), want);
    assert_eq!(
        iotlb.translate(0x10_0800, 0x5001, Access::Write),
        missing(0x10_0800)
    );
    assert_eq!(sent(&mut iotlb), []);
    // A page at the very end of the address space has no next one.
    let _ = iotlb.translate(u64::MAX - 0x1fff, 0x2000, Access::Read);
    assert_eq!(
        sent(&mut iotlb),
        [u64::MAX - 0x1fff, u64::MAX - 0xfff].map(|at| miss(at, Access::Read))
    );
    // A huge range, a bit at a time.
    let _ = iotlb.translate(1 << 40, 1 << 32, Access::Read);
    assert_eq!(sent(&mut iotlb).len(), 33);
    iotlb.questions.borrow().check();
}

#[test]
fn one_refused_page_of_a_range_waits_for_the_others_answers() {
    let mut iotlb = Iotlb::new();
    iotlb.insert(page(0, 0));
    let _ = iotlb.translate(0x5000, 0x3000, Access::Read);
    let asked = sent(&mut iotlb);
    assert_eq!(asked.len(), 3);
    for (i, question) in asked.into_iter().enumerate() {
        iotlb.answered(question, true);
        iotlb.begin_walk();
        // Until the last answer has come it may be anybody's.
        let verdict = if i < 2 { missing(0x5000) } else { refused(0x5000) };
        assert_eq!(iotlb.translate(0x5000, 0x3000, Access::Read), verdict);
        assert_eq!(iotlb.awaits(), i < 2);
    }
    // All three were seen and are forgotten together.
    iotlb.forget_refusals();
    for at in [0x5000, 0x6000, 0x7000] {
        assert_eq!(iotlb.translate(at, 1, Access::Read), missing(at));
    }
}

/// QEMU 7.2 looks for the next miss while it waits for our acknowledgement of an UPDATE: the last one is answered first. Answers
/// are told apart by their places only, so each is taken for that of another question.
#[test]
fn a_refusal_that_comes_in_the_place_of_another_answer_finds_its_question() {
    for update_first in [true, false] {
        let mut iotlb = Iotlb::new();
        let (good, bad) = (miss(0x5000, Access::Read), miss(0x6000, Access::Read));
        let _ = iotlb.translate(good.iova, 1, Access::Read);
        let _ = iotlb.translate(bad.iova, 1, Access::Read);
        assert_eq!(sent(&mut iotlb), [good, bad]);
        if update_first {
            iotlb.insert(page(good.iova, 0));
            iotlb.answered(good, true);
        } else {
            // The answer overtakes the UPDATE, which comes on another socket.
            iotlb.answered(good, true);
            iotlb.begin_walk();
            assert_eq!(iotlb.translate(good.iova, 1, Access::Read), missing(good.iova));
            assert!(iotlb.awaits(), "an answer that is due may explain it");
            iotlb.insert(page(good.iova, 0));
        }
        assert_eq!(iotlb.translate(good.iova, 1, Access::Read), Ok((0, 1)));
        iotlb.answered(bad, false);
        iotlb.begin_walk();
        assert_eq!(iotlb.translate(bad.iova, 1, Access::Read), refused(bad.iova));
        assert!(!iotlb.awaits());
        let stats = iotlb.stats();
        assert_eq!((stats.faults_read, stats.unanswered), (1, 0), "{update_first}");
        iotlb.questions.borrow().check();
    }
}

/// Every page of a small world: what it means and what is allowed. The last page is that of the address space.
#[derive(Default)]
struct Model(BTreeMap<u64, (u64, Permission)>);

/// Pages from 0 on, and so many at the end of the address space.
const WORLD: u64 = 24;

fn addr(page: u64) -> u64 {
    if page < WORLD / 2 {
        page * PAGE
    } else {
        page.wrapping_sub(WORLD).wrapping_mul(PAGE)
    }
}

#[derive(Clone, Debug)]
enum Op {
    Insert {
        page: u64,
        pages: u64,
        gpa: u64,
        permission: Permission,
    },
    Invalidate {
        page: u64,
        pages: u64,
    },
    InvalidateAll,
    Flush,
    Lookup {
        page: u64,
        offset: u64,
        len: usize,
        write: bool,
    },
    Answer {
        which: usize,
        refused: bool,
    },
    Send,
    Fail,
    Retry,
}

fn op() -> impl Strategy<Value = Op> {
    let permission = prop_oneof![1 => Just(RO), 1 => Just(WO), 2 => Just(RW)];
    prop_oneof![
        4 => (0..WORLD, 1..6u64, 0..8u64, permission)
            .prop_map(|(page, pages, gpa, permission)| Op::Insert { page, pages, gpa, permission }),
        2 => (0..WORLD, 1..6u64).prop_map(|(page, pages)| Op::Invalidate { page, pages }),
        1 => Just(Op::InvalidateAll),
        1 => Just(Op::Flush),
        8 => (0..WORLD, 0..PAGE, prop_oneof![1..9usize, 1..30_000usize], any::<bool>())
            .prop_map(|(page, offset, len, write)| Op::Lookup { page, offset, len, write }),
        3 => (0..8usize, any::<bool>()).prop_map(|(which, refused)| Op::Answer { which, refused }),
        2 => Just(Op::Send),
        1 => Just(Op::Fail),
        1 => Just(Op::Retry),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Whatever is inserted, forgotten, asked and answered: lookups find what a table of all pages finds.
    #[test]
    fn it_agrees_with_a_table_of_all_pages(ops in prop::collection::vec(op(), 1..120)) {
        let mut iotlb = Iotlb::new();
        let mut model = Model::default();
        let mut asked: Vec<Miss> = Vec::new();
        let mut now = Instant::now();
        for op in ops {
            match op {
                Op::Insert { page, pages, gpa, permission } => {
                    // Not beyond the half of the world in which it begins.
                    let end = if page < WORLD / 2 { WORLD / 2 } else { WORLD };
                    let pages = pages.min(end - page);
                    iotlb.insert(mapping(addr(page), pages * PAGE, gpa * PAGE, permission));
                    let other = match permission {
                        RO => WO,
                        WO => RO,
                        RW => RW,
                    };
                    // What was granted for the one and is granted for the other is granted for both.
                    let adds = (0..pages).all(|i| model.0.get(&(page + i)) == Some(&((gpa + i) * PAGE, other)));
                    let permission = if adds { RW } else { permission };
                    for i in 0..pages {
                        model.0.insert(page + i, ((gpa + i) * PAGE, permission));
                    }
                }
                Op::Invalidate { page, pages } => {
                    let end = if page < WORLD / 2 { WORLD / 2 } else { WORLD };
                    let last = (page + pages).min(end) - 1;
                    iotlb.invalidate(addr(page), addr(last).wrapping_add(PAGE - 1));
                    model.0.retain(|at, _| *at < page || *at > last);
                }
                Op::InvalidateAll => {
                    iotlb.invalidate(0, u64::MAX);
                    model.0.clear();
                }
                Op::Flush => {
                    iotlb.flush();
                    model.0.clear();
                }
                Op::Lookup { page, offset, len, write } => {
                    let at = addr(page) + offset;
                    let len = len.min(usize::try_from(u64::MAX - at).unwrap().saturating_add(1));
                    let access = if write { Access::Write } else { Access::Read };
                    let found = iotlb.translate(at, len, access);
                    let want = model.0.get(&page).filter(|(_, permission)| permission.allows(access));
                    match (found, want) {
                        (Ok((gpa, n)), Some((start, permission))) => {
                            prop_assert_eq!(gpa, start + offset);
                            prop_assert!(n >= 1 && n <= len);
                            // As far as it says, and to the end of the page at least.
                            prop_assert!(n == len || n as u64 >= PAGE - offset);
                            for i in 1..(offset + n as u64).div_ceil(PAGE) {
                                prop_assert_eq!(model.0.get(&(page + i)), Some(&(start + i * PAGE, *permission)));
                            }
                        }
                        (Err(MemoryFault::Missing { iova } | MemoryFault::Refused { iova }), None) => prop_assert_eq!(iova, at),
                        (found, want) => prop_assert!(false, "{found:?}, should be {want:?}"),
                    }
                }
                Op::Answer { which, refused } => {
                    if let Some(miss) = asked.get(which).copied() {
                        asked.remove(which);
                        iotlb.answered(miss, refused);
                    }
                }
                Op::Send => {
                    now += Duration::from_secs(1);
                    let sent = iotlb.take_misses(now);
                    for (i, miss) in sent.iter().enumerate() {
                        prop_assert!(!sent[..i].contains(miss) && miss.iova.is_multiple_of(PAGE));
                    }
                    asked.extend(sent);
                    iotlb.begin_walk();
                }
                Op::Fail => iotlb.forget_refusals(),
                Op::Retry => iotlb.retry(),
            }
            iotlb.map.check();
            iotlb.questions.borrow().check();
            prop_assert_eq!(iotlb.stats().mapped_bytes, model.0.len() as u64 * PAGE);
        }
    }

    /// No mapping, no range and no answer that anybody can send makes it panic, or grow.
    #[test]
    fn nothing_makes_it_panic(
        ops in prop::collection::vec(
            (0..5u8, edge(), edge(), edge(), 0..3u8),
            1..200,
        ),
    ) {
        let mut iotlb = Iotlb::with_capacity(16);
        for (what, a, b, c, n) in ops {
            let permission = [RO, WO, RW][usize::from(n)];
            let access = if n == 0 { Access::Read } else { Access::Write };
            match what {
                0 => iotlb.insert(mapping(a, b, c, permission)),
                1 => iotlb.invalidate(a, b),
                2 => {
                    let _ = iotlb.translate(a, usize::try_from(b.min(u64::MAX - a)).unwrap().max(1), access);
                }
                3 => iotlb.answered(miss(a, access), n == 2),
                _ => {
                    for miss in sent(&mut iotlb) {
                        iotlb.answered(miss, b % 2 == 0);
                    }
                    iotlb.forget_refusals();
                }
            }
            iotlb.map.check();
            iotlb.questions.borrow().check();
        }
    }
}

/// Numbers near where numbers end.
fn edge() -> impl Strategy<Value = u64> {
    prop_oneof![
        0..3u64,
        (0..40u64).prop_map(|n| n * 0x800),
        (0..64u32, 0..3u64).prop_map(|(shift, d)| (1u64 << shift).wrapping_sub(d)),
        (0..3u64).prop_map(|n| u64::MAX - n),
        (0..40u64).prop_map(|n| 0u64.wrapping_sub(n * 0x800)),
        any::<u64>(),
    ]
}
