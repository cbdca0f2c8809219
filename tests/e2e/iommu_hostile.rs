//! Translations that change under load, VMMs that answer late, never or wrongly, messages that make no sense.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use vsock_sidecar::embedded_guest::iommu::{Lookup, READ};
use vsock_sidecar::embedded_guest::memory::PAGE;
use vsock_sidecar::embedded_guest::message::{self, NEED_REPLY, request};
use vsock_sidecar::embedded_guest::misses::{ACCESS_FAIL, INVALIDATE, MISS, UPDATE};
use vsock_sidecar::embedded_guest::profile::protocol_feature;
use vsock_sidecar::embedded_guest::{
    Answer, Area, Driver, EmbeddedGuest, FrontEnd, IommuOptions, Outcome, Profile, RX, SeenMiss,
    SocketOptions, Sockets, TX, Unrelated,
};

use crate::iommu::*;
use crate::support::*;

/// How long something is watched that must not happen.
const A_WHILE: Duration = Duration::from_millis(300);

// ---- INVALIDATE under load --------------------------------------------------------------------------------------------

/// Old pages: none of them may change any more.
struct Quarantine {
    pages: VecDeque<u64>,
    fill: u8,
}

impl Quarantine {
    /// How many are watched at once before the oldest is used again.
    const WATCHED: usize = 200;

    fn put(&mut self, driver: &Driver, gpa: u64) -> Option<u64> {
        self.pages.push_back(gpa);
        if self.pages.len() <= Quarantine::WATCHED {
            return None;
        }
        let released = self.pages.pop_front()?;
        self.check(driver, released);
        Some(released)
    }

    fn check(&self, driver: &Driver, gpa: u64) {
        let mut bytes = [0; PAGE];
        driver.memory().read(gpa, &mut bytes).unwrap();
        let written = bytes.iter().position(|byte| *byte != self.fill);
        assert_eq!(
            written, None,
            "the page at {gpa:#x} was written to after INVALIDATE was acknowledged"
        );
    }
}

/// Pages of buffers and rings move under the device's feet, thousands of times, while bytes flow both ways. Each old page
/// becomes poison as soon as the INVALIDATE is acknowledged: a stale read would send poison to the host or break a ring, a
/// stale write would be seen in the page.
#[test]
fn after_an_invalidate_is_acknowledged_the_old_page_is_neither_read_nor_written() {
    const MOVES: u64 = 2500;
    for nested in [true, false] {
        let sidecar = served("auto");
        let guest = viommu(
            &sidecar,
            IommuOptions {
                nested,
                ..IommuOptions::default()
            },
        );
        ping(&guest);
        let moves = AtomicU64::new(0);
        let over = AtomicBool::new(false);
        thread::scope(|scope| {
            let moving = scope.spawn(|| {
                // Also when an assertion fails: the others wait for it.
                let _over = StopOnDrop(&over);
                let mut quarantine = Quarantine {
                    pages: VecDeque::new(),
                    fill: 0xee,
                };
                let mut spare = Vec::new();
                let mut dice = Bytes::new(11);
                let mut by_area = [0u64; 4];
                while moves.load(Ordering::Relaxed) < MOVES {
                    let mut roll = [0; 4];
                    dice.fill(&mut roll);
                    let area = match roll[0] {
                        0..=9 => 0,
                        10..=19 => 1,
                        20..=149 => 2,
                        _ => 3,
                    };
                    let moved = guest.with_driver(|driver| {
                        let place = [Area::Ring(RX), Area::Ring(TX), Area::RxBuffers, Area::TxBuffers][area];
                        let busy = driver.busy_pages(place);
                        let pick = u16::from_le_bytes([roll[1], roll[2]]);
                        let page = *busy.get(usize::from(pick) % busy.len().max(1))?;
                        let fresh = match spare.pop() {
                            Some(gpa) => gpa,
                            None => driver.spare_page().unwrap(),
                        };
                        let old = driver.move_page(place, page, fresh, quarantine.fill).unwrap();
                        spare.extend(quarantine.put(driver, old));
                        Some(())
                    });
                    match moved {
                        Some(()) => {
                            by_area[area] += 1;
                            moves.fetch_add(1, Ordering::Relaxed);
                        }
                        None => thread::yield_now(),
                    }
                }
                guest.with_driver(|driver| {
                    quarantine
                        .pages
                        .iter()
                        .for_each(|gpa| quarantine.check(driver, *gpa))
                });
                println!("{by_area:?} pages of rx ring, tx ring, rx buffers, tx buffers moved");
                assert!(by_area.iter().all(|moved| *moved > 20), "{by_area:?}");
            });
            let transfers: Vec<_> = (0..2)
                .map(|lane| {
                    let (guest, over) = (&guest, &over);
                    scope.spawn(move || {
                        let mut rounds = 0;
                        while !over.load(Ordering::Relaxed) {
                            echo_through(guest, 100 * lane + rounds, 500_000);
                            rounds += 1;
                        }
                        rounds
                    })
                })
                .collect();
            for transfer in transfers {
                assert!(transfer.join().unwrap() > 0, "no bytes flowed meanwhile");
            }
            moving.join().unwrap();
        });
        let stats = guest.with_driver(|driver| driver.dma_stats());
        assert_eq!((stats.moved, stats.failures), (MOVES, 0));
        assert_eq!(sidecar.metric("vsock_vring_errors_total", &[]), 0.0);
        assert_modest(&guest);
        assert_lawful(&guest);
    }
}

#[test]
fn memory_tables_change_amid_translated_transfers_and_nothing_is_lost() {
    let sidecar = served("auto");
    let by_table = Profile::qemu_viommu().without_protocol(protocol_feature::CONFIGURE_MEM_SLOTS);
    for (what, profile) in [("slots", Profile::qemu_viommu()), ("tables", by_table)] {
        println!("{what}");
        let options = behind(IommuOptions::default());
        let guest = guest(
            &sidecar.path("web.sock"),
            profile,
            options,
            SocketOptions::default(),
        );
        let flushes = sidecar.metric("vsock_iotlb_flushes_total", &[]);
        let over = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                let mut rounds = 0;
                while !over.load(Ordering::Relaxed) || rounds == 0 {
                    rounds += 1;
                    let region = guest
                        .with_driver(|driver| driver.memory_mut().add_region(0x2_0000_0000, 16 << 20))
                        .unwrap();
                    let told = |act: &mut dyn FnMut(&mut FrontEnd)| guest.with_front_end(|f| act(f.unwrap()));
                    let regions = || guest.with_driver(|driver| driver.memory().regions().to_vec());
                    if what == "slots" {
                        told(&mut |f| f.add_mem_reg(&region).unwrap());
                    } else {
                        told(&mut |f| f.set_mem_table(&regions()).unwrap());
                    }
                    guest.with_driver(|driver| driver.memory_mut().remove_region(0x2_0000_0000));
                    if what == "slots" {
                        told(&mut |f| f.rem_mem_reg(&region).unwrap());
                    } else {
                        told(&mut |f| f.set_mem_table(&regions()).unwrap());
                    }
                }
            });
            let _over = StopOnDrop(&over);
            echo_through(&guest, 8, 4 << 20);
        });
        assert!(
            sidecar.metric("vsock_iotlb_flushes_total", &[]) > flushes,
            "a change of memory flushes"
        );
        // A question that a flush made the device forget may be asked again, and answered twice: the second time perhaps
        // after the buffer's use. That is a refusal nobody waits for, and the price of a rare thing.
        let seen = guest.with_front_end(|f| f.unwrap().misses());
        assert!(
            seen.iter()
                .all(|s| s.miss.is_exact() && s.outcome != Outcome::Denied),
            "{seen:?}"
        );
        assert_lawful(&guest);
        guest.shut_down().unwrap();
        sidecar.until_metric("vsock_session_active", &[], 0.0);
    }
}

// ---- misses -----------------------------------------------------------------------------------------------------------

fn both_kinds_of_front_end() -> [IommuOptions; 2] {
    [true, false].map(|nested| IommuOptions {
        nested,
        ..IommuOptions::default()
    })
}

/// Misses that are asked twice although the first is not answered.
fn repeated(seen: &[SeenMiss]) -> Vec<SeenMiss> {
    let mut asked: Vec<_> = seen.iter().map(|s| (s.miss.iova & !0xfff, s.miss.perm)).collect();
    asked.sort_unstable();
    let twice: Vec<_> = asked.windows(2).filter(|w| w[0] == w[1]).map(|w| w[0]).collect();
    seen.iter()
        .filter(|s| twice.contains(&(s.miss.iova & !0xfff, s.miss.perm)))
        .copied()
        .collect()
}

/// The session answers on its main channel, whatever is open on the other.
#[track_caller]
fn assert_responsive(guest: &Sockets) {
    guest.with_front_end(|f| {
        let f = f.unwrap();
        f.call(request::GET_FEATURES, &[]).unwrap();
        f.iotlb_invalidate(0x1234_5000, 0x1000).unwrap();
    });
}

/// Behind a vIOMMU, with everything known that was needed so far: misses come only with what is done next.
fn settled(sidecar: &Sidecar, iommu: IommuOptions) -> Sockets {
    let booted =
        EmbeddedGuest::boot(&sidecar.path("web.sock"), Profile::qemu_viommu(), behind(iommu)).unwrap();
    let options = SocketOptions {
        connect_timeout: LONG,
        ..SocketOptions::default()
    };
    let guest = Sockets::start(booted, options).unwrap();
    ping(&guest);
    until("connections are over", || guest.open_connections() == 0);
    sidecar.until_metric("vsock_iotlb_unanswered_misses", &[], 0.0);
    guest.with_front_end(|f| f.unwrap().forget_misses());
    guest
}

#[test]
fn a_vmm_that_answers_late_costs_time_and_nothing_else() {
    let sidecar = served("auto");
    for iommu in both_kinds_of_front_end() {
        let guest = settled(&sidecar, iommu);
        guest.with_front_end(|f| f.unwrap().answer_misses(|_| Answer::Hold));
        thread::scope(|scope| {
            let pinging = scope.spawn(|| ping(&guest));
            guest
                .with_front_end(|f| f.unwrap().wait_misses(LONG, |seen| !seen.is_empty()))
                .unwrap();
            for _ in 0..20 {
                assert_responsive(&guest);
                guest.with_driver(|driver| {
                    driver.queue(TX).kick();
                    driver.queue(RX).kick();
                });
            }
            until("the metrics tell", || {
                sidecar.metric("vsock_iotlb_unanswered_misses", &[]) >= 1.0
            });
            let seen = guest.with_front_end(|f| f.unwrap().misses());
            assert!(repeated(&seen).is_empty(), "{:?}", repeated(&seen));
            assert!(seen.len() <= 8, "a packet and a few buffers are wanted: {seen:?}");
            // One after the other, as they come.
            until("it is served", || {
                guest.with_front_end(|f| f.unwrap().release_misses()).unwrap();
                pinging.is_finished()
            });
            pinging.join().unwrap();
        });
        guest.with_front_end(|f| {
            let f = f.unwrap();
            f.answer_misses(|_| Answer::AtOnce);
            f.release_misses().unwrap();
        });
        echo_through(&guest, 5, 1 << 20);
        assert_lawful(&guest);
        guest.shut_down().unwrap();
        sidecar.until_metric("vsock_session_active", &[], 0.0);
    }
}

#[test]
fn a_vmm_that_never_answers_gets_its_rings_back_and_the_next_session_works() {
    let sidecar = served("auto");
    for iommu in both_kinds_of_front_end() {
        let guest = settled(&sidecar, iommu);
        guest.with_front_end(|f| f.unwrap().answer_misses(|_| Answer::Never));
        thread::scope(|scope| {
            let refused = scope.spawn(|| guest.connect(7).map(drop));
            until("it is reported", || {
                finding(&sidecar, "iotlb-miss-unanswered").is_some()
            });
            assert_responsive(&guest);
            let seen = guest.with_front_end(|f| f.unwrap().misses());
            assert!(repeated(&seen).is_empty(), "{:?}", repeated(&seen));
            assert!(sidecar.metric("vsock_iotlb_unanswered_misses", &[]) >= 1.0);
            // GET_VRING_BASE among it.
            guest.with_front_end(|f| f.unwrap().stop(2)).unwrap();
            assert_responsive(&guest);
            guest.kill();
            refused.join().unwrap().unwrap_err();
        });
        sidecar.until_metric("vsock_session_active", &[], 0.0);
        let next = viommu(&sidecar, IommuOptions::default());
        ping(&next);
        assert!(
            finding(&sidecar, "iotlb-miss-unanswered").is_none(),
            "that was another session"
        );
        next.shut_down().unwrap();
        sidecar.until_metric("vsock_session_active", &[], 0.0);
    }
}

/// QEMU is one thread: it may have to say something else before it comes to the miss, and wait for the answer to that.
#[test]
fn a_vmm_that_has_something_else_to_say_first_is_heard() {
    let unrelated = [
        (request::GET_FEATURES, 0, vec![]),
        (request::GET_CONFIG, 0, message::config(0, 0, &[0; 8])),
        (request::SET_VRING_ENABLE, NEED_REPLY, message::vring_state(1, 1)),
        (
            request::IOTLB_MSG,
            NEED_REPLY,
            message::iotlb(0x7000_0000, 0x1000, 0, 0, INVALIDATE),
        ),
        (
            request::IOTLB_MSG,
            NEED_REPLY,
            message::iotlb(0, 0x1000, 0, 9, UPDATE),
        ),
    ];
    let sidecar = served("auto");
    for iommu in both_kinds_of_front_end() {
        for (request, flags, payload) in unrelated.clone() {
            let guest = settled(&sidecar, iommu.clone());
            let first = vec![Unrelated {
                request,
                flags,
                payload,
            }];
            guest.with_front_end(|f| f.unwrap().answer_misses(move |_| Answer::After(first.clone())));
            ping(&guest);
            echo_through(&guest, 6, 200_000);
            assert_modest(&guest);
            assert_lawful(&guest);
            guest.shut_down().unwrap();
            sidecar.until_metric("vsock_session_active", &[], 0.0);
        }
    }
}

/// The stop of a ring, in the middle of a miss: answered at once, and the UPDATE that comes afterwards does no harm.
#[test]
fn a_vmm_that_stops_the_ring_before_it_answers_the_miss_is_answered() {
    let sidecar = served("auto");
    for iommu in both_kinds_of_front_end() {
        let guest = settled(&sidecar, iommu);
        let stop = |index| Unrelated {
            request: request::GET_VRING_BASE,
            flags: 0,
            payload: message::vring_state(index, 0),
        };
        let mut first = true;
        guest.with_front_end(|f| {
            f.unwrap()
                .answer_misses(move |_| match std::mem::take(&mut first) {
                    true => Answer::After(vec![stop(1), stop(0)]),
                    false => Answer::AtOnce,
                });
        });
        thread::scope(|scope| {
            scope.spawn(|| guest.connect(7).map(drop).unwrap_err());
            guest
                .with_front_end(|f| {
                    let answered =
                        |seen: &[SeenMiss]| seen.first().is_some_and(|s| s.outcome != Outcome::Pending);
                    f.unwrap().wait_misses(LONG, answered)
                })
                .unwrap();
            assert_responsive(&guest);
            guest.reboot().unwrap();
        });
        ping(&guest);
        assert_lawful(&guest);
        guest.shut_down().unwrap();
        sidecar.until_metric("vsock_session_active", &[], 0.0);
    }
}

#[test]
fn a_vmm_that_translates_and_does_not_reply_is_served() {
    let sidecar = served("auto");
    for iommu in both_kinds_of_front_end() {
        let guest = settled(&sidecar, iommu);
        guest.with_front_end(|f| f.unwrap().answer_misses(|_| Answer::WithoutReply));
        ping(&guest);
        echo_through(&guest, 7, 500_000);
        assert_modest(&guest);
        assert_lawful(&guest);
        guest.shut_down().unwrap();
        sidecar.until_metric("vsock_session_active", &[], 0.0);
    }
}

/// "Yes", and no translation: asked again at the message rate this would be a storm on both sides.
#[test]
fn a_vmm_that_replies_and_does_not_translate_is_not_asked_for_ever() {
    let sidecar = served("auto");
    for iommu in both_kinds_of_front_end() {
        let guest = settled(&sidecar, iommu);
        guest.with_front_end(|f| f.unwrap().answer_misses(|_| Answer::WithoutUpdate));
        thread::scope(|scope| {
            let pinging = scope.spawn(|| ping(&guest));
            guest
                .with_front_end(|f| f.unwrap().wait_misses(LONG, |seen| !seen.is_empty()))
                .unwrap();
            let cpu = sidecar.cpu_time();
            thread::sleep(A_WHILE);
            let seen = guest.with_front_end(|f| f.unwrap().misses());
            assert!(seen.len() < 50, "asked {} times", seen.len());
            assert!(sidecar.cpu_time() - cpu < A_WHILE / 2, "it spins");
            assert_responsive(&guest);
            // The translation comes after all.
            guest.with_front_end(|f| f.unwrap().answer_misses(|_| Answer::AtOnce));
            for miss in seen {
                guest
                    .with_front_end(|f| {
                        let f = f.unwrap();
                        let iommu = f.iommu().unwrap().clone();
                        match iommu.lookup(miss.miss.iova, miss.miss.perm) {
                            Lookup::Found(t) => f.iotlb_update(t.iova, t.size, t.user_addr, 3),
                            _ => Ok(()),
                        }
                    })
                    .unwrap();
            }
            pinging.join().unwrap();
        });
        assert_lawful(&guest);
        guest.shut_down().unwrap();
        sidecar.until_metric("vsock_session_active", &[], 0.0);
    }
}

/// A refusal is what a vIOMMU calls a fault. It costs the packet whose buffer it is, once; the ring goes on.
#[test]
fn a_refused_miss_costs_its_packet_and_is_not_repeated() {
    let sidecar = served("auto");
    for (round, iommu) in both_kinds_of_front_end().into_iter().enumerate() {
        let booted =
            EmbeddedGuest::boot(&sidecar.path("web.sock"), Profile::qemu_viommu(), behind(iommu)).unwrap();
        let guest = impatient(booted);
        ping(&guest);
        until("connections are over", || guest.open_connections() == 0);
        guest.with_front_end(|f| {
            let f = f.unwrap();
            f.forget_misses();
            f.answer_misses(|miss| match miss.perm {
                READ => Answer::Refuse,
                _ => Answer::AtOnce,
            });
        });
        assert_unanswered(&guest);
        let refused: Vec<_> = guest
            .with_front_end(|f| f.unwrap().misses())
            .into_iter()
            .filter(|seen| seen.outcome == Outcome::Refused)
            .collect();
        assert!(!refused.is_empty());
        // The REQUEST, and the RST of a guest that gave up: addresses are used again, so count messages.
        assert!(refused.len() <= 3, "asked again and again: {refused:?}");
        let faults = sidecar.metric("vsock_iotlb_faults_total", &[("access", "read")]);
        assert!(faults > round as f64, "{faults} counted");
        assert_eq!(
            guest.with_driver(|driver| driver.queue(TX).outstanding()),
            0,
            "the descriptors are back"
        );
        assert!(
            sidecar.metric("vsock_vring_errors_total", &[("reason", "translation_refused")]) >= 1.0,
            "and it has a name"
        );

        guest.with_front_end(|f| f.unwrap().answer_misses(|_| Answer::AtOnce));
        ping(&guest);
        echo_through(&guest, 9, 500_000);
        assert_lawful(&guest);
        guest.shut_down().unwrap();
        sidecar.until_metric("vsock_session_active", &[], 0.0);
    }
}

/// The driver takes buffers away that the device has: what is received goes into those that are left.
#[test]
fn a_receive_buffer_that_is_taken_away_is_skipped() {
    let sidecar = served("auto");
    let guest = settled(&sidecar, IommuOptions::default());
    let taken = guest.with_driver(|driver| (0..40).filter(|b| driver.take_rx_buffer_away(3 * b)).count());
    assert!(taken > 20, "{taken} of the posted buffers");
    // What is written into them is lost to the guest, and there is nothing to be lost: they come back empty.
    let stream = guest.connect(7).unwrap();
    stream.set_read_timeout(Some(LONG));
    drop(stream);
    until("every buffer that was taken away has come back", || {
        let _ = guest.connect(7).map(drop);
        sidecar.metric("vsock_iotlb_faults_total", &[("access", "write")]) >= taken as f64
    });
    ping(&guest);
    let mut refused: Vec<SeenMiss> = Vec::new();
    // Looking ahead, the device may be at one more while the two are read.
    until("each refusal is counted", || {
        let faults = sidecar.metric("vsock_iotlb_faults_total", &[("access", "write")]);
        refused = guest
            .with_front_end(|f| f.unwrap().misses())
            .into_iter()
            .filter(|seen| seen.outcome == Outcome::Unmapped)
            .collect();
        faults == refused.len() as f64
    });
    println!(
        "{taken} taken away, {} refused, {} of them again",
        refused.len(),
        repeated(&refused).len()
    );
    // Each is wanted once. A few are asked for a second time, when the device looks ahead; a storm is more than that.
    assert!(
        refused.len() <= 2 * taken,
        "{} refusals for {taken} buffers",
        refused.len()
    );
}

// ---- messages that make no sense ---------------------------------------------------------------------------------------

#[test]
fn iotlb_messages_that_make_no_sense_are_refused_and_the_session_lives() {
    let sidecar = served("auto");
    let guest = settled(&sidecar, IommuOptions::default());
    let region = guest.with_driver(|driver| driver.memory().regions()[0].clone());
    let (user, size) = (region.user_addr(), region.size() as u64);
    let page = 0x1000;
    let whole = |iova, size, user, perm, kind| message::iotlb(iova, size, user, perm, kind);
    let rows: Vec<(&str, Vec<u8>, bool)> = vec![
        ("UPDATE of nothing", whole(0x5000, 0, user, 3, UPDATE), false),
        (
            "UPDATE that wraps",
            whole(u64::MAX - 10, page, user, 3, UPDATE),
            false,
        ),
        ("UPDATE of everything", whole(0, u64::MAX, user, 3, UPDATE), false),
        ("UPDATE to address 0", whole(0x5000, page, 0, 3, UPDATE), false),
        (
            "UPDATE in front of memory",
            whole(0x5000, page, user - page, 3, UPDATE),
            false,
        ),
        (
            "UPDATE to behind memory",
            whole(0x5000, page, user + size, 3, UPDATE),
            false,
        ),
        (
            "UPDATE that leaves memory",
            whole(0x5000, 2 * page, user + size - page, 3, UPDATE),
            false,
        ),
        (
            "UPDATE whose user address wraps",
            whole(0x5000, page, u64::MAX - 10, 3, UPDATE),
            false,
        ),
        ("UPDATE for nothing", whole(0x5000, page, user, 0, UPDATE), false),
        (
            "UPDATE for what nobody knows",
            whole(0x5000, page, user, 7, UPDATE),
            false,
        ),
        (
            "MISS on the wrong channel",
            whole(0x5000, page, user, 3, MISS),
            false,
        ),
        ("ACCESS_FAIL", whole(0x5000, page, user, 3, ACCESS_FAIL), false),
        ("type 0", whole(0x5000, page, user, 3, 0), false),
        ("type 9", whole(0x5000, page, user, 3, 9), false),
        (
            "25 bytes",
            whole(0x5000, page, user, 3, UPDATE)[..25].to_vec(),
            false,
        ),
        ("no body", Vec::new(), false),
        (
            "INVALIDATE that wraps",
            whole(u64::MAX - 10, page, 0, 0, INVALIDATE),
            false,
        ),
        (
            "26 bytes, without the padding",
            whole(0x5000, page, user, 3, UPDATE)[..26].to_vec(),
            true,
        ),
        ("an odd place", whole(0x5003, 5, user + 7, 1, UPDATE), true),
        (
            "the same twice",
            whole(0x5000, page, user + page, 3, UPDATE),
            true,
        ),
        (
            "the last byte there is",
            whole(u64::MAX, 1, user, 3, UPDATE),
            true,
        ),
        (
            "INVALIDATE of what is not there",
            whole(0x4444_0000, page, 0, 0, INVALIDATE),
            true,
        ),
        (
            "INVALIDATE of the last byte",
            whole(u64::MAX, 1, 0, 0, INVALIDATE),
            true,
        ),
    ];
    for (what, body, taken) in rows {
        let answer = guest
            .with_front_end(|f| f.unwrap().ask(request::IOTLB_MSG, NEED_REPLY, &body, &[]))
            .unwrap_or_else(|error| panic!("{what}: {error}"));
        let value = answer.u64().unwrap();
        assert_eq!(value == 0, taken, "{what}: answered {value}");
        ping(&guest);
    }
    assert_eq!(sidecar.metric("vsock_sessions_total", &[]), 1.0);
    assert!(
        sidecar.metric("vsock_vhost_user_request_errors_total", &[]) >= 17.0,
        "each is counted"
    );
    assert_lawful(&guest);
}

#[test]
fn an_invalidate_of_size_0_forgets_everything() {
    let sidecar = served("auto");
    let guest = settled(&sidecar, IommuOptions::default());
    let ring = guest.with_driver(|driver| driver.rings(2, &[])[1].desc);
    for iova in [0, 0xffff_0000] {
        guest.with_front_end(|f| {
            let f = f.unwrap();
            f.forget_misses();
            f.iotlb_invalidate(iova, 0).unwrap();
        });
        ping(&guest);
        let seen = guest.with_front_end(|f| f.unwrap().misses());
        assert!(
            seen.iter().any(|s| s.miss.iova & !0xfff == ring),
            "the ring itself is asked for again: {seen:x?}"
        );
    }
    assert_modest(&guest);
    assert_lawful(&guest);
}

#[test]
fn bad_requests_whose_sender_waits_are_refused_and_the_session_lives() {
    let sidecar = served("auto");
    let profile = Profile::qemu_viommu().without_protocol(
        protocol_feature::RESET_DEVICE | protocol_feature::CONFIGURE_MEM_SLOTS | protocol_feature::STATUS,
    );
    let options = behind(IommuOptions::default());
    let guest = guest(
        &sidecar.path("web.sock"),
        profile,
        options,
        SocketOptions::default(),
    );
    ping(&guest);
    let rows: [(&str, u32, Vec<u8>); 10] = [
        ("a request nobody knows", 200, vec![0; 8]),
        (
            "a network card's",
            request::NET_SET_MTU,
            1500u64.to_ne_bytes().to_vec(),
        ),
        ("ring 7", request::SET_VRING_NUM, message::vring_state(7, 128)),
        ("ring 3", request::SET_VRING_ENABLE, message::vring_state(3, 1)),
        (
            "ring 65536",
            request::SET_VRING_BASE,
            message::vring_state(65536, 0),
        ),
        (
            "a ring of 2048",
            request::SET_VRING_NUM,
            message::vring_state(0, 2048),
        ),
        ("a ring of 0", request::SET_VRING_NUM, message::vring_state(0, 0)),
        ("not negotiated: RESET_DEVICE", request::RESET_DEVICE, vec![]),
        (
            "not negotiated: SET_STATUS",
            request::SET_STATUS,
            4u64.to_ne_bytes().to_vec(),
        ),
        ("half a body", request::SET_VRING_NUM, vec![0; 4]),
    ];
    for (what, number, body) in rows {
        let answer = guest
            .with_front_end(|f| f.unwrap().ask(number, NEED_REPLY, &body, &[]))
            .unwrap_or_else(|error| panic!("{what}: {error}"));
        assert_ne!(answer.u64(), Some(0), "{what}");
        ping(&guest);
    }
    assert_eq!(sidecar.metric("vsock_sessions_total", &[]), 1.0);
    assert_lawful(&guest);
}
