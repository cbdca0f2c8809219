//! Rings of I/O virtual addresses: what is asked, what waits, what goes on.

use super::bench::*;
use super::*;
use crate::device::handle::{EMPTY_PATIENCE, MISS_PATIENCE, STORM};
use crate::guest::{MemoryFault, Miss, RingArea, RingError};
use crate::vsock::Op;

const READ: Access = Access::Read;
const WRITE: Access = Access::Write;

fn miss(page: u64, access: Access) -> Miss {
    Miss {
        iova: iova(page),
        access,
    }
}

/// A guest that has no IOMMU must not pay for the others, not even with a wake-up a minute.
#[test]
fn a_device_without_translation_asks_nothing_and_has_no_timers() {
    let mut bench = Bench::new(Addresses::GuestPhysical);
    bench.post(BUFFERS);
    bench.start(RX);
    bench.start(TX);
    assert_eq!(bench.device.time_to_sleep(), None);
    assert_eq!(bench.events_told(), []);
    bench.stop(RX);
    bench.stop(TX);
    let metrics = &bench.device.switchboard.metrics.iotlb;
    assert_eq!((metrics.lookups.get(), metrics.flushes.get()), (0, 0));
}

/// QEMU maps the page of a ring when it has started it, and kicks before that: no kick follows.
#[test]
fn a_ring_starts_without_translations_and_gets_going_when_they_come() {
    let mut bench = Bench::new(Addresses::Iova);
    bench.post(BUFFERS);
    bench.start(RX);
    assert_eq!(bench.misses(), [(0, READ), (1, READ), (2, WRITE)], "all at once");
    assert_eq!(bench.held(), [Some("translation")]);
    bench.start(TX);
    assert_eq!(bench.misses(), [(4, READ), (5, READ), (6, WRITE)]);
    for page in 0..8 {
        bench.map(page);
    }
    assert_eq!(bench.held(), [None, None]);
    assert_eq!(bench.snapshot().rings[0].available, 1);
    assert_eq!(
        bench.misses(),
        [(BUFFERS, WRITE)],
        "nothing was asked twice, and the first buffer before it is needed"
    );
}

#[test]
fn a_parked_tx_ring_goes_on_at_the_update_and_delivers_every_byte() {
    let mut bench = Bench::new(Addresses::Iova);
    let mut service = bench.connected();
    let first = BUFFERS + 110;
    let sent = pattern(0, 3 * PAGE as usize);
    bench.put(iova(first), &sent);
    bench.send(Op::Rw, &[(iova(first), 3 * PAGE as u32)]);
    assert_eq!(
        bench.misses(),
        [(first, READ), (first + 1, READ), (first + 2, READ)],
        "every page of the packet is asked for at once"
    );
    assert_eq!(bench.held(), [None, Some("translation")]);
    for page in [first + 2, first] {
        bench.map(page);
        assert_eq!(bench.sent(), 0, "the packet waits for all of its pages");
    }
    bench.map(first + 1);
    assert_eq!(read(&mut bench, &mut service, sent.len()), sent);
    assert_eq!(bench.sent(), 1);
    assert_eq!(bench.held(), [None, None]);
    assert_eq!(bench.misses(), []);
}

#[test]
fn an_update_for_something_else_repeats_no_question() {
    let mut bench = Bench::new(Addresses::Iova);
    let _service = bench.connected();
    let page = BUFFERS + 110;
    bench.send(Op::Rw, &[(iova(page), 100)]);
    assert_eq!(bench.misses(), [(page, READ)]);
    for other in 200..220 {
        bench.map(other);
        bench.kick(TX);
        bench.unmap(other);
    }
    assert_eq!(bench.misses(), []);
    assert_eq!(bench.held(), [None, Some("translation")]);
}

#[test]
fn a_miss_that_is_not_answered_is_told_once_as_overdue() {
    let mut bench = Bench::new(Addresses::Iova);
    let _service = bench.connected();
    let page = BUFFERS + 110;
    bench.send(Op::Rw, &[(iova(page), 100)]);
    assert_eq!(bench.misses(), [(page, READ)]);
    let wait = bench.device.time_to_sleep().unwrap();
    assert!(wait <= MISS_PATIENCE + Duration::from_millis(1), "{wait:?}");
    bench.ahead += MISS_PATIENCE;
    bench.crank();
    assert_eq!(bench.events_told(), [DeviceEvent::MissOverdue(miss(page, READ))]);
    assert_eq!(bench.device.time_to_sleep(), None, "nobody to wake up for");
    bench.ahead += 100 * MISS_PATIENCE;
    bench.kick(TX);
    assert_eq!(bench.events_told(), []);
    bench.map(page);
    assert_eq!(bench.events_told(), [DeviceEvent::MissesAnswered]);
}

#[test]
fn a_refused_translation_costs_that_packet_and_the_next_goes_on() {
    let mut bench = Bench::new(Addresses::Iova);
    let mut service = bench.connected();
    let (bad, good) = (BUFFERS + 110, BUFFERS + 111);
    bench.map(good);
    bench.put(iova(good), b"next");
    bench.send(Op::Rw, &[(iova(bad), 100)]);
    bench.send(Op::Rw, &[(iova(good), 4)]);
    assert_eq!(bench.misses(), [(bad, READ)]);
    assert_eq!(bench.sent(), 0, "chains go back in order");
    bench.answer(bad, READ, true);
    assert_eq!(read(&mut bench, &mut service, 4), b"next");
    assert_eq!(bench.sent(), 2);
    let iotlb = bench.snapshot().iotlb;
    assert_eq!((iotlb.faults_read, iotlb.faults_write), (1, 0));
    let errors = &bench.device.switchboard.metrics.queues[TX].errors;
    assert_eq!(errors[RingFault::TranslationRefused as usize].get(), 1);
    assert_eq!(bench.misses(), [], "one fault in the guest's log, not two");
}

/// QEMU 7.2 answers the last of several misses first, and an answer does not say which it is of: the refusal seems to be of the
/// good page, and the bad one seems to have been granted. The good packet was lost, or the ring stood still for ever.
#[test]
fn a_front_end_that_answers_the_last_miss_first_costs_the_refused_packet_only() {
    for update_first in [true, false] {
        let mut bench = Bench::new(Addresses::Iova);
        let mut service = bench.connected();
        let (good, bad, last) = (BUFFERS + 110, BUFFERS + 111, BUFFERS + 112);
        bench.map(last);
        bench.put(iova(good), b"good");
        bench.put(iova(last), b"last");
        for page in [good, bad, last] {
            bench.send(Op::Rw, &[(iova(page), 4)]);
        }
        assert_eq!(bench.misses(), [(good, READ), (bad, READ)]);
        if update_first {
            bench.map(good);
            bench.answer(good, READ, true);
        } else {
            bench.answer(good, READ, true);
            assert_eq!(bench.sent(), 0, "not believed while another answer is due");
            bench.map(good);
        }
        assert_eq!(read(&mut bench, &mut service, 4), b"good");
        bench.answer(bad, READ, false);
        assert_eq!(read(&mut bench, &mut service, 4), b"last");
        assert_eq!(bench.sent(), 3);
        assert_eq!(bench.held(), [None, None]);
        let errors = &bench.device.switchboard.metrics.queues[TX].errors;
        assert_eq!(errors[RingFault::TranslationRefused as usize].get(), 1);
    }
}

/// The guest's next kick is what lets it be asked for again; so the guest has to be asked for that.
#[test]
fn a_ring_that_waits_for_a_translation_that_nobody_sends_asks_for_kicks() {
    let mut bench = Bench::new(Addresses::Iova);
    let mut service = bench.connected();
    let page = BUFFERS + 110;
    bench.put(iova(page), b"late");
    bench.send(Op::Rw, &[(iova(page), 4)]);
    assert_eq!(bench.misses(), [(page, READ)]);
    bench.answer(page, READ, false);
    assert_eq!(bench.held(), [None, Some("translation")]);
    bench.queue(BUFFERS + 100, Op::CreditUpdate, &[]);
    bench.kick_if_wanted(TX);
    assert_eq!(bench.misses(), [(page, READ)]);
    bench.map(page);
    assert_eq!(read(&mut bench, &mut service, 4), b"late");
    // And rx: the buffers that are left from the connection are filled first.
    write(&mut service, &pattern(0, 7 * (PAGE as usize - 44)));
    bench.until(|bench| bench.received().len() == 7);
    bench.post(BUFFERS + 8);
    bench.kick(RX);
    write(&mut service, b"late");
    bench.until(|bench| bench.held() == [Some("translation"), None]);
    bench.answer(BUFFERS + 8, WRITE, false);
    bench.events_told();
    bench.post(BUFFERS + 9);
    bench.kick_if_wanted(RX);
    assert!(bench.misses().contains(&(BUFFERS + 8, WRITE)));
}

/// A guest may have its driver fault as often as it likes.
#[test]
fn a_storm_of_refusals_is_told_once() {
    let mut bench = Bench::new(Addresses::Iova);
    let _service = bench.connected();
    let bad = BUFFERS + 110;
    for _ in 0..2 * STORM {
        bench.send(Op::Rw, &[(iova(bad), 100)]);
        bench.answer(bad, READ, true);
        assert_eq!(bench.sent(), 1);
    }
    let storms = bench
        .events_told()
        .into_iter()
        .filter(|event| *event == DeviceEvent::FaultStorm);
    assert_eq!(storms.count(), 1);
    let metrics = &bench.device.switchboard.metrics.iotlb;
    assert_eq!(metrics.faults[0].get(), u64::from(2 * STORM));
}

/// The page belongs to somebody else when the INVALIDATE is answered.
#[test]
fn after_an_invalidate_a_page_is_asked_for_again_and_the_old_one_is_not_read() {
    let mut bench = Bench::new(Addresses::Iova);
    let mut service = bench.connected();
    let page = BUFFERS + 110;
    bench.map(page);
    bench.put(iova(page), b"mine");
    bench.send(Op::Rw, &[(iova(page), 4)]);
    assert_eq!(read(&mut bench, &mut service, 4), b"mine");
    bench.unmap(page);
    bench.put(iova(page), b"gone");
    bench.send(Op::Rw, &[(iova(page), 4)]);
    assert_eq!(bench.misses(), [(page, READ)]);
    let elsewhere = gpa(300);
    bench.put_physical(elsewhere, b"new!");
    bench.map_to(page, elsewhere);
    assert_eq!(read(&mut bench, &mut service, 4), b"new!");
}

/// An UPDATE that replaces a mapping is a change like an INVALIDATE.
#[test]
fn a_mapping_that_replaces_another_holds_from_its_answer_on() {
    let mut bench = Bench::new(Addresses::Iova);
    let mut service = bench.connected();
    let page = BUFFERS + 110;
    for (n, bytes) in [b"one.", b"two.", b"tri."].into_iter().enumerate() {
        let gpa = gpa(300 + n as u64);
        bench.put_physical(gpa, bytes);
        bench.map_to(page, gpa);
        bench.send(Op::Rw, &[(iova(page), 4)]);
        assert_eq!(read(&mut bench, &mut service, 4), bytes);
    }
    assert_eq!(bench.misses(), []);
}

/// QEMU drops its IOMMU listener with the device: what the guest maps meanwhile nobody hears of.
#[test]
fn translations_are_forgotten_when_the_last_ring_stops() {
    let mut bench = Bench::new(Addresses::Iova);
    let _service = bench.connected();
    let before = bench.snapshot().iotlb;
    assert!(before.entries > 0);
    let rx = bench.stop(RX).unwrap();
    assert_eq!(
        bench.snapshot().iotlb.entries,
        before.entries,
        "the other ring runs"
    );
    bench.stop(TX).unwrap();
    let after = bench.snapshot().iotlb;
    assert_eq!((after.entries, after.mapped_bytes, after.flushes), (0, 0, 1));
    bench.start_at(RX, rx).unwrap();
    assert_eq!(bench.misses(), [(0, READ), (1, READ), (2, WRITE)]);
}

#[test]
fn another_memory_table_forgets_translations_and_rings_ask_anew() {
    let mut bench = Bench::new(Addresses::Iova);
    let _service = bench.connected();
    let ram = bench.device.ram.clone();
    bench.ask(|done| Command::SetMemory { ram, done });
    assert_eq!(bench.snapshot().iotlb.entries, 0);
    assert_eq!(bench.misses(), [], "only when a ring is needed");
    bench.kick(TX);
    assert_eq!(bench.misses(), [(4, READ), (5, READ), (6, WRITE)]);
    bench.ask(|done| Command::FlushIotlb { done });
    assert_eq!(
        bench.misses(),
        [(4, READ), (5, READ), (6, WRITE)],
        "what was asked before is asked of a new state"
    );
}

#[test]
fn a_parked_rx_ring_keeps_packets_and_their_order() {
    let mut bench = Bench::new(Addresses::Iova);
    let mut service = bench.connected();
    // The buffers that are left from the connection are taken by the first bytes.
    let sent = pattern(7, 60_000);
    write(&mut service, &sent);
    let mut got = Vec::new();
    let mut page = BUFFERS + 8;
    bench.until(|bench| {
        for (header, payload) in bench.packets() {
            assert_eq!(header.op, Op::Rw as u16);
            got.extend_from_slice(&payload);
        }
        if got.len() == sent.len() {
            return true;
        }
        // What is asked for is what comes next, and what was posted behind it.
        let misses = bench.misses();
        if misses.is_empty() {
            bench.post(page);
            bench.kick(RX);
            page += 1;
        } else {
            assert_eq!(bench.held(), [Some("translation"), None]);
        }
        for (page, access) in misses {
            assert_eq!(access, WRITE);
            bench.map(page);
        }
        false
    });
    assert_eq!(got, sent);
    assert_eq!(page, BUFFERS + 8 + 8, "no buffer was wasted");
}

/// A guest that has posted buffers is not slow, its VMM is.
#[test]
fn waiting_for_a_translation_is_not_waiting_for_buffers() {
    let mut bench = Bench::new(Addresses::Iova);
    let mut service = bench.connected();
    let starved = |bench: &Bench| bench.device.switchboard.metrics.queues[RX].full.get();
    // Takes what is posted, one packet a buffer.
    write(&mut service, &pattern(0, 6 * (PAGE as usize - 44) + 1));
    bench.until(|bench| bench.received().len() == 7);
    assert_eq!(starved(&bench), 0);
    bench.post(BUFFERS + 8);
    write(&mut service, b"waits");
    bench.until(|bench| bench.held() == [Some("translation"), None]);
    assert_eq!(bench.misses(), [(BUFFERS + 8, WRITE)]);
    assert_eq!(starved(&bench), 0);
    bench.map(BUFFERS + 8);
    bench.until(|bench| bench.received() == [(Op::Rw as u16, 5)]);
}

/// The guest's transmissions wait for the VMM; what the service says does not.
#[test]
fn a_parked_tx_ring_does_not_stop_what_goes_to_the_guest() {
    let mut bench = Bench::new(Addresses::Iova);
    let mut service = bench.connected();
    let page = BUFFERS + 110;
    bench.send(Op::Rw, &[(iova(page), 100)]);
    assert_eq!(bench.misses(), [(page, READ)]);
    for n in 0..3 {
        write(&mut service, &pattern(n, 10));
        bench.until(|bench| bench.received() == [(Op::Rw as u16, 10)]);
    }
    assert_eq!(bench.held(), [None, Some("translation")]);
}

/// The VMM asks for the base when the pages may be gone (QEMU at a reset of the guest): it is our own count.
#[test]
fn a_parked_ring_stops_with_its_position() {
    let mut bench = Bench::new(Addresses::Iova);
    let _service = bench.connected();
    bench.send(Op::Rw, &[(iova(BUFFERS + 110), 100)]);
    bench.unmap(4);
    bench.unmap(5);
    bench.unmap(6);
    bench.kick(TX);
    assert_eq!(bench.held(), [None, Some("translation")]);
    let stands = RingPosition {
        next_avail: 1,
        next_used: 1,
    };
    assert_eq!(
        bench.stop(TX),
        Some(stands),
        "after the request, before what waits"
    );
}

/// And one that never ran stands where the VMM said.
#[test]
fn a_ring_whose_used_index_was_never_read_stops_where_it_was_started() {
    let mut bench = Bench::new(Addresses::Iova);
    let given = RingPosition {
        next_avail: 7,
        next_used: 7,
    };
    bench.start_at(TX, given).unwrap();
    assert_eq!(bench.stop(TX), Some(given));
}

/// A driver that sets up a ring in pages it has not mapped, and then maps them: the guest of a vIOMMU in caching mode
/// announces that by an INVALIDATE.
#[test]
fn a_ring_that_is_refused_is_told_as_broken_once_and_mended_by_translations() {
    let mut bench = Bench::new(Addresses::Iova);
    bench.start(TX);
    assert_eq!(bench.misses(), [(4, READ), (5, READ), (6, WRITE)]);
    bench.map(4);
    bench.map(5);
    bench.answer(6, WRITE, true);
    let error = RingError::Memory {
        area: RingArea::Used,
        fault: MemoryFault::Refused { iova: iova(6) },
    };
    assert_eq!(
        bench.events_told(),
        [DeviceEvent::RingBroken { index: TX, error }]
    );
    assert_eq!(bench.held(), [Some("broken")]);
    bench.kick(TX);
    bench.map(200);
    assert_eq!(bench.events_told(), [], "told once, and not asked again");
    bench.unmap(6);
    assert_eq!(bench.misses(), [(6, WRITE)]);
    assert_eq!(bench.held(), [Some("translation")]);
    bench.map(6);
    assert_eq!(bench.held(), [None]);
    assert_eq!(
        bench.events_told(),
        [DeviceEvent::RingMended { index: TX }],
        "what is told as broken and runs is no finding"
    );
}

/// A hundred dials and clients may be before it, each with a system call or two. The guest's vCPU stands still.
#[test]
fn an_invalidate_overtakes_what_is_asked_by_others() {
    let mut bench = Bench::new(Addresses::Iova);
    let mut pings = Vec::new();
    for _ in 0..2 * budget::COMMANDS {
        let (reply, answer) = tokio::sync::oneshot::channel();
        bench.handle.send(Command::Ping(reply)).unwrap();
        pings.push(answer);
    }
    let (done, mut answer) = tokio::sync::oneshot::channel();
    let command = Command::InvalidateIotlb {
        first: 0,
        last: u64::MAX,
        done,
    };
    bench.handle.send(command).unwrap();
    let now = bench.now();
    bench.device.handle_session_commands(now);
    assert_eq!(answer.try_recv(), Ok(()));
    assert!(pings.iter_mut().all(|ping| ping.try_recv().is_err()));
    bench.crank();
    assert!(pings.iter_mut().all(|ping| ping.try_recv() == Ok(())));
}

#[test]
fn misses_wait_for_a_listener() {
    let mut bench = Bench::new(Addresses::Iova);
    bench.ask(|done| Command::SetListener { listener: None, done });
    bench.start(TX);
    assert_eq!(bench.snapshot().iotlb.unanswered, 0);
    let (tell, told) = mpsc::channel();
    bench.ask(|done| Command::SetListener {
        listener: Some(Box::new(move |event| tell.send(event).unwrap())),
        done,
    });
    assert_eq!(told.try_iter().count(), 3);
    assert_eq!(bench.snapshot().iotlb.unanswered, 3);
}

/// What the next VMM has mapped has nothing to do with what this one had, nor has what it is told.
#[test]
fn the_end_of_a_session_forgets_translations_and_listener() {
    let mut bench = Bench::new(Addresses::Iova);
    let _service = bench.connected();
    bench.send(Op::Rw, &[(iova(BUFFERS + 110), 100)]);
    bench.misses();
    bench.ahead += MISS_PATIENCE;
    bench.ask(|done| Command::EndSession { done });
    bench.crank();
    let iotlb = bench.snapshot().iotlb;
    assert_eq!((iotlb.entries, iotlb.unanswered), (0, 0));
    assert!(matches!(
        bench.told.try_recv(),
        Err(mpsc::TryRecvError::Disconnected)
    ));
    assert_eq!(bench.device.time_to_sleep(), None);
}

/// Linux begins with the same addresses in every VM, and a VMM that is gone answers nothing any more.
#[test]
fn the_next_vmm_is_not_asked_twice_for_what_the_last_one_left_unanswered() {
    let mut bench = Bench::new(Addresses::Iova);
    bench.start(TX);
    assert_eq!(bench.misses(), [(4, READ), (5, READ), (6, WRITE)]);
    bench.next_session();
    bench.start(TX);
    assert_eq!(bench.misses(), [(4, READ), (5, READ), (6, WRITE)]);
    for (page, access) in [(4, READ), (5, READ), (6, WRITE)] {
        bench.answer(page, access, true);
    }
    assert_eq!(bench.held(), [Some("broken")], "it was answered");
    let told = bench.events_told();
    assert!(
        matches!(told[..], [DeviceEvent::RingBroken { index: TX, .. }]),
        "{told:?}"
    );
}

#[test]
fn an_rx_ring_that_stays_all_zero_is_told_once() {
    for addresses in [Addresses::GuestPhysical, Addresses::Iova] {
        let mut bench = Bench::new(addresses);
        for page in 0..4 {
            bench.map(page);
        }
        bench.start(RX);
        assert!(bench.device.time_to_sleep().is_some());
        bench.ahead += EMPTY_PATIENCE;
        bench.crank();
        assert_eq!(bench.events_told(), [DeviceEvent::RingEmpty { index: RX }]);
        assert_eq!(bench.device.time_to_sleep(), None);
        bench.ahead += 10 * EMPTY_PATIENCE;
        bench.crank();
        assert_eq!(bench.events_told(), []);
    }
}

#[test]
fn an_rx_ring_whose_buffers_come_late_is_not_told() {
    let mut bench = Bench::new(Addresses::GuestPhysical);
    bench.start(RX);
    bench.post(BUFFERS);
    bench.ahead += EMPTY_PATIENCE;
    bench.crank();
    assert_eq!(bench.events_told(), []);
    assert_eq!(bench.device.time_to_sleep(), None);
}

/// A driver that was slow, and whose memory is shared: once a packet has gone through its buffers nobody may say that it is not.
#[test]
fn an_rx_ring_that_was_told_as_empty_and_is_used_after_all_is_told_as_mended() {
    let mut bench = Bench::new(Addresses::Iova);
    for page in 0..8 {
        bench.map(page);
    }
    bench.start(RX);
    bench.ahead += EMPTY_PATIENCE;
    bench.crank();
    assert_eq!(bench.events_told(), [DeviceEvent::RingEmpty { index: RX }]);
    bench.map(BUFFERS);
    bench.map(BUFFERS + 100);
    bench.post(BUFFERS);
    bench.kick(RX);
    bench.start(TX);
    assert_eq!(bench.events_told(), [], "a look is not enough");
    // To no connection: it is answered by RST.
    bench.send(Op::Shutdown, &[]);
    assert_eq!(bench.received(), [(Op::Rst as u16, 0)]);
    assert_eq!(bench.events_told(), [DeviceEvent::RingMended { index: RX }]);
}

/// QEMU takes a ring's pages back while it runs, when the guest is reset; then it stops it.
#[test]
fn pages_of_an_idle_ring_that_are_taken_back_are_not_asked_for() {
    let mut bench = Bench::new(Addresses::Iova);
    let _service = bench.connected();
    for page in 0..8 {
        bench.unmap(page);
    }
    assert_eq!(bench.misses(), []);
    let stands = RingPosition {
        next_avail: 1,
        next_used: 1,
    };
    assert_eq!(bench.stop(RX), Some(stands));
    assert_eq!(bench.stop(TX), Some(stands));
    assert_eq!(bench.misses(), []);
}

/// Every turn shows its counts, and a question's time is measured until its answer.
#[test]
fn the_metrics_say_what_the_iotlb_has_seen() {
    let mut bench = Bench::new(Addresses::Iova);
    let _service = bench.connected();
    let page = BUFFERS + 110;
    let metrics = bench.device.switchboard.metrics.iotlb.clone();
    let misses = metrics.misses.get();
    let measured = metrics.miss_duration.get_sample_count();
    bench.send(Op::Rw, &[(iova(page), 100)]);
    assert_eq!(metrics.unanswered.get(), 1);
    assert!(metrics.misses.get() > misses);
    bench.map(page);
    assert_eq!(metrics.unanswered.get(), 0);
    assert_eq!(metrics.miss_duration.get_sample_count(), measured + 1);
    bench.answer(page, READ, false);
    assert_eq!(
        metrics.miss_duration.get_sample_count(),
        measured + 1,
        "measured once"
    );
    let stats = bench.snapshot().iotlb;
    assert_eq!(metrics.entries.get() as u64, stats.entries);
    assert_eq!(metrics.mapped_bytes.get() as u64, stats.mapped_bytes);
    assert_eq!(metrics.lookups.get(), stats.lookups);
    assert_eq!(stats.lookups, stats.hits + stats.misses);
    let invalidations = stats.invalidations;
    bench.unmap(page);
    assert_eq!(metrics.invalidations.get(), invalidations + 1);
}
