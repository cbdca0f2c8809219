//! The IOMMU, and the front-end that answers for it.

use std::sync::mpsc;
use std::time::Duration;

use super::back_end::BackEnd;
use crate::embedded_guest::dma::Dma;
use crate::embedded_guest::iommu::{Lookup, READ, WRITE, reset_ranges};
use crate::embedded_guest::memory::PAGE;
use crate::embedded_guest::message::{self, NEED_REPLY, request};
use crate::embedded_guest::misses::{INVALIDATE, UPDATE};
use crate::embedded_guest::{
    Answer, Area, DriverOptions, EmbeddedGuest, FrontEnd, Granule, GuestMemory, IommuOptions, Outcome,
    Profile, RX, TX, Unmap, Unrelated,
};

const SOON: Duration = Duration::from_secs(10);
const MEMORY: usize = 64 << 20;

fn setup(options: IommuOptions) -> (BackEnd, FrontEnd, GuestMemory, Dma) {
    let (back_end, mut front_end) = BackEnd::negotiated(Profile::qemu_viommu());
    let memory = GuestMemory::new(MEMORY).unwrap();
    let dma = front_end.attach_iommu(&options, &memory).unwrap();
    back_end.take_log();
    (back_end, front_end, memory, dma)
}

/// An IOTLB message: type, IOVA, size, user address.
fn iotlb((number, payload): &(u32, Vec<u8>)) -> (u8, u64, u64, u64) {
    assert_eq!(*number, request::IOTLB_MSG);
    let word = |i: usize| u64::from_ne_bytes(payload[8 * i..8 * i + 8].try_into().unwrap());
    (payload[25], word(0), word(1), word(2))
}

fn guest(iommu: IommuOptions, queue_size: u16) -> (BackEnd, EmbeddedGuest) {
    let (back_end, front_end) = BackEnd::connected(Profile::qemu_viommu());
    let options = DriverOptions {
        queue_size,
        memory: MEMORY,
        iommu: Some(iommu),
        ..DriverOptions::default()
    };
    (back_end, EmbeddedGuest::boot_with(front_end, options).unwrap())
}

#[test]
fn a_guest_behind_qemus_viommu_speaks_in_qemus_order() {
    let (back_end, guest) = guest(IommuOptions::default(), 128);
    let log = back_end.take_log();
    let mut said: Vec<&str> = log.iter().map(|(number, _)| message::name(*number)).collect();
    let fill = said.split_off(said.len() - 128 - 8);
    assert_eq!(
        said,
        [
            "GET_FEATURES",
            "GET_PROTOCOL_FEATURES",
            "SET_PROTOCOL_FEATURES",
            "GET_QUEUE_NUM",
            "SET_BACKEND_REQ_FD",
            "SET_OWNER",
            "GET_FEATURES",
            "SET_VRING_CALL",
            "SET_VRING_ERR",
            "SET_VRING_CALL",
            "SET_VRING_ERR",
            "GET_CONFIG",
            "SET_VRING_CALL",
            "SET_VRING_CALL",
            "SET_FEATURES",
            "SET_MEM_TABLE",
            "SET_VRING_NUM",
            "SET_VRING_BASE",
            "SET_VRING_ADDR",
            "SET_VRING_KICK",
            "SET_VRING_NUM",
            "SET_VRING_BASE",
            "SET_VRING_ADDR",
            "SET_VRING_KICK",
            "SET_VRING_ENABLE",
            "SET_VRING_ENABLE",
            "IOTLB_MSG",
            "IOTLB_MSG",
            "SET_VRING_CALL",
            "SET_VRING_CALL",
        ]
    );
    assert!(
        fill.iter().all(|name| *name == "IOTLB_MSG"),
        "128 receive buffers and 8 events are mapped, and a caching vIOMMU tells each"
    );
    let features = log
        .iter()
        .find(|(number, _)| *number == request::SET_FEATURES)
        .unwrap();
    assert_eq!(features.1, 0x3_4000_0000u64.to_ne_bytes(), "bit 33 is in");
    let addr = log
        .iter()
        .find(|(number, _)| *number == request::SET_VRING_ADDR)
        .unwrap();
    let expected = message::vring_addr(0, 0, 0xffff_f000, 0xffff_f940, 0xffff_f800, 0xffff_f940);
    assert_eq!(addr.1, expected, "where Linux and QEMU have the rx ring");
    let updates: Vec<_> = log
        .iter()
        .filter(|(n, _)| *n == request::IOTLB_MSG)
        .take(2)
        .map(iotlb)
        .collect();
    const RX_PAGE: u64 = 0xffff_f000;
    for (update, iova) in updates.iter().zip([RX_PAGE, RX_PAGE - 0x1000]) {
        assert_eq!((update.0, update.1, update.2), (UPDATE, iova, 0x1000));
    }
    drop(guest);
}

#[test]
fn a_buffer_is_mapped_for_one_use_and_the_device_told_before_it_is_used_again() {
    let (back_end, front_end, mut memory, dma) = setup(IommuOptions::default());
    let iommu = front_end.iommu().unwrap().clone();
    let window = dma.allocate(&mut memory, 8 * PAGE).unwrap();
    let iova = dma.map(&window, PAGE + 100, PAGE, READ);
    assert_eq!(iova % PAGE as u64, 100, "the place in the page stays");
    let told: Vec<_> = back_end.take_log().iter().map(iotlb).collect();
    assert_eq!(
        (told[0].0, told[0].1, told[0].2),
        (INVALIDATE, iova - 100, 0x2000),
        "at the mapping"
    );

    let found = |addr, perm| iommu.lookup(addr, perm);
    let Lookup::Found(first) = found(iova, READ) else {
        panic!()
    };
    let Lookup::Found(second) = found(iova + PAGE as u64, READ) else {
        panic!()
    };
    assert_eq!((first.iova, first.size, first.perm), (iova - 100, 0x1000, READ));
    assert_eq!(
        vec![first.user_addr, second.user_addr],
        window.user_pages(PAGE, 2 * PAGE)
    );
    assert_eq!(
        found(iova, WRITE),
        Lookup::Denied,
        "a transmit buffer is not for writing"
    );
    assert_eq!(found(iova, READ | WRITE), Lookup::Denied);
    assert_eq!(found(iova, 0), Lookup::Denied);
    assert_eq!(found(iova + 2 * PAGE as u64, READ), Lookup::Unmapped);

    let seen = iommu.clone();
    back_end.on_message(move |_, _| assert_eq!(seen.lookup(iova, READ), Lookup::Unmapped, "gone first"));
    dma.unmap(iova, PAGE);
    assert_eq!(back_end.take_log().len(), 1);
    back_end.on_message(|_, _| {});
    assert_eq!(
        dma.map(&window, 0, 2 * PAGE, WRITE),
        iova - 100,
        "addresses are used again at once"
    );
    let Lookup::Found(again) = found(iova, WRITE) else {
        panic!()
    };
    assert_ne!(again.user_addr, first.user_addr, "for other memory");
    assert_eq!((dma.stats().invalidations, dma.stats().failures), (3, 0));
}

#[test]
fn a_lazy_driver_tells_of_many_buffers_at_once_and_keeps_their_addresses_until_then() {
    let (back_end, front_end, mut memory, dma) = setup(IommuOptions {
        unmap: Unmap::Lazy(3),
        caching_mode: false,
        ..IommuOptions::default()
    });
    let window = dma.allocate(&mut memory, PAGE).unwrap();
    let taken: Vec<u64> = (0..3).map(|_| dma.map(&window, 0, 10, READ)).collect();
    for (number, iova) in taken.iter().enumerate() {
        assert!(back_end.log().is_empty(), "before buffer {number}");
        dma.unmap(*iova, 10);
        assert_eq!(front_end.iommu().unwrap().lookup(*iova, READ), Lookup::Unmapped);
        if number < 2 {
            let another = dma.map(&window, 0, 10, READ);
            assert!(
                !taken.contains(&another),
                "{another:#x} may still be known to the device"
            );
        }
    }
    let told: Vec<_> = back_end.take_log().iter().map(iotlb).collect();
    assert_eq!(told.len(), 1);
    assert_eq!(
        (told[0].0, told[0].1, told[0].2),
        (INVALIDATE, 0, 0),
        "everything"
    );
    assert!(
        taken.contains(&dma.map(&window, 0, 10, READ)),
        "now they are free"
    );
}

#[test]
fn memory_that_is_mapped_as_a_whole_has_one_translation() {
    let (back_end, front_end, mut memory, dma) = setup(IommuOptions {
        granule: Granule::Whole,
        ..IommuOptions::default()
    });
    let window = dma.allocate(&mut memory, 2 * PAGE).unwrap();
    let iova = dma.map(&window, 4000, 500, READ);
    let Lookup::Found(all) = front_end.iommu().unwrap().lookup(iova, WRITE) else {
        panic!()
    };
    assert_eq!(all.size, MEMORY as u64);
    assert_eq!(all.user_addr + (iova - all.iova), window.user_addr() + 4000);
    dma.unmap(iova, 500);
    assert!(back_end.log().is_empty(), "nothing comes and goes");
}

#[test]
fn misses_are_answered_as_the_policy_says() {
    let get_features = Unrelated {
        request: request::GET_FEATURES,
        flags: 0,
        payload: Vec::new(),
    };
    let enable = Unrelated {
        request: request::SET_VRING_ENABLE,
        flags: 0,
        payload: message::vring_state(0, 1),
    };
    // Policy, what comes on the main channel, the answer on the back-end's, what is noted.
    let rows = [
        (Answer::AtOnce, vec!["IOTLB_MSG"], Some(0), Outcome::Mapped),
        (
            Answer::After(vec![get_features, enable]),
            vec!["GET_FEATURES", "SET_VRING_ENABLE", "IOTLB_MSG"],
            Some(0),
            Outcome::Mapped,
        ),
        (Answer::WithoutReply, vec!["IOTLB_MSG"], None, Outcome::Mapped),
        (Answer::WithoutUpdate, vec![], Some(0), Outcome::Pretended),
        (Answer::Refuse, vec![], Some(1), Outcome::Refused),
        (Answer::Hold, vec![], None, Outcome::Held),
        (Answer::Never, vec![], None, Outcome::Ignored),
    ];
    for (answer, said, replied, outcome) in rows {
        let (back_end, front_end, mut memory, dma) = setup(IommuOptions::default());
        let window = dma.allocate(&mut memory, PAGE).unwrap();
        let iova = dma.map(&window, 0, 10, READ);
        back_end.take_log();
        let policy = answer.clone();
        front_end.answer_misses(move |_| policy.clone());
        back_end.ask(iova + 5, READ);
        front_end
            .wait_misses(SOON, |seen| seen.len() == 1 && seen[0].outcome == outcome)
            .unwrap();
        if let Some(replied) = replied {
            assert_eq!(back_end.answer(), replied, "{answer:?}");
        }
        let log = back_end.take_log();
        let names: Vec<_> = log.iter().map(|(number, _)| message::name(*number)).collect();
        assert_eq!(names, said, "{answer:?}");
        if said.contains(&"IOTLB_MSG") {
            let update = log.last().unwrap();
            assert_eq!(
                iotlb(update),
                (UPDATE, iova, 0x1000, window.user_addr()),
                "{answer:?}"
            );
            assert_eq!(
                update.1[24],
                READ | WRITE,
                "QEMU says so whatever it is mapped for"
            );
        }
        front_end.answer_misses(|_| Answer::AtOnce);
        assert_eq!(
            front_end.release_misses().unwrap(),
            usize::from(outcome == Outcome::Held)
        );
        if outcome == Outcome::Held {
            assert_eq!(back_end.answer(), 0, "late, but answered");
            assert_eq!(front_end.misses()[0].outcome, Outcome::Mapped);
        }
    }
}

#[test]
fn what_is_not_mapped_or_not_for_that_is_refused_without_an_update() {
    let (back_end, front_end, mut memory, dma) = setup(IommuOptions::default());
    let window = dma.allocate(&mut memory, PAGE).unwrap();
    let iova = dma.map(&window, 0, 10, WRITE);
    back_end.take_log();
    for (addr, perm, outcome) in [
        (iova, READ, Outcome::Denied),
        (iova, READ | WRITE, Outcome::Denied),
        (0x1234_5000, READ, Outcome::Unmapped),
        (u64::MAX, WRITE, Outcome::Unmapped),
    ] {
        back_end.ask(addr, perm);
        assert_eq!(back_end.answer(), 1);
        assert_eq!(
            front_end.misses().last().unwrap().outcome,
            outcome,
            "{addr:#x} {perm}"
        );
    }
    assert!(back_end.log().is_empty());
}

#[test]
fn a_miss_is_answered_while_another_answer_is_awaited_only_where_nesting_is_on() {
    for nested in [true, false] {
        let (back_end, mut front_end, mut memory, dma) = setup(IommuOptions {
            nested,
            ..IommuOptions::default()
        });
        let window = dma.allocate(&mut memory, PAGE).unwrap();
        let iova = dma.map(&window, 0, 10, READ);
        back_end.take_log();
        let (ready, begun) = mpsc::channel();
        let (go_on, gone_on) = mpsc::channel();
        let channels = dma.channels().clone();
        back_end.on_message(move |message, _| {
            if message.request == request::GET_VRING_BASE {
                ready.send(()).unwrap();
                gone_on.recv_timeout(SOON).unwrap();
            }
        });
        std::thread::scope(|scope| {
            let stopping = scope.spawn(|| front_end.vring_base(0).unwrap());
            begun.recv_timeout(SOON).unwrap();
            back_end.ask(iova, READ);
            if nested {
                // It has been read and the UPDATE is on its way, although GET_VRING_BASE is not answered.
                let deadline = std::time::Instant::now() + SOON;
                while channels.seen().is_empty() {
                    assert!(
                        std::time::Instant::now() < deadline,
                        "nobody reads the back-end's channel"
                    );
                    std::thread::yield_now();
                }
            }
            go_on.send(()).unwrap();
            stopping.join().unwrap();
        });
        assert_eq!(back_end.answer(), 0);
        let names: Vec<_> = back_end
            .take_log()
            .iter()
            .map(|(n, _)| message::name(*n))
            .collect();
        assert_eq!(names, ["GET_VRING_BASE", "IOTLB_MSG"], "nested: {nested}");
    }
}

#[test]
fn a_page_that_moves_is_told_first_copied_then_and_its_misses_wait() {
    let (back_end, front_end, mut memory, dma) = setup(IommuOptions::default());
    let window = dma.allocate(&mut memory, 3 * PAGE).unwrap();
    window.write(0, &[7; 3 * PAGE]);
    // The page is known by two addresses.
    let (first, second) = (
        dma.map(&window, PAGE, 64, READ),
        dma.map(&window, PAGE + 64, 64, WRITE),
    );
    back_end.take_log();
    let spare = memory.allocate(PAGE, PAGE as u64).unwrap();
    let (old_page, shared) = (window.user_page(PAGE), window.clone());
    back_end.on_message(move |message, back_end| {
        if message.payload.get(25) == Some(&INVALIDATE) {
            assert_eq!(
                shared.user_page(PAGE),
                old_page,
                "not moved before the device knows"
            );
            let mut byte = [0];
            shared.read(PAGE, &mut byte);
            assert_eq!(byte, [7]);
            if iotlb(&(message.request, message.payload.clone())).1 == first {
                back_end.ask(first, READ);
            }
        }
    });
    let old = dma
        .move_page(&memory, &window, 1, spare.bus(), &[0xee; PAGE])
        .unwrap();
    assert_eq!(back_end.answer(), 0);
    let mut bytes = [0; PAGE];
    memory.read(old, &mut bytes).unwrap();
    assert_eq!(bytes, [0xee; PAGE]);
    window.read(PAGE, &mut bytes);
    assert_eq!(bytes, [7; PAGE]);
    assert_eq!(window.user_page(PAGE), spare.user_addr());

    let mut told: Vec<_> = back_end.take_log().iter().map(iotlb).collect();
    let update = told.pop().unwrap();
    assert_eq!(
        update,
        (UPDATE, first, 0x1000, spare.user_addr()),
        "the miss got the new page"
    );
    let mut invalidated: Vec<u64> = told.iter().map(|m| m.1).collect();
    invalidated.sort_unstable();
    let mut expected = [first, second & !0xfff];
    expected.sort_unstable();
    assert_eq!(invalidated, expected);
    assert!(
        front_end
            .misses()
            .iter()
            .all(|seen| seen.outcome == Outcome::Mapped)
    );
}

#[test]
fn a_reset_of_the_viommu_is_told_in_powers_of_two_that_spare_the_interrupts() {
    let ranges = reset_ranges();
    assert!(
        ranges.contains(&(0, 0x8000_0000)) && ranges.contains(&(0x40_0000_0000, 0x40_0000_0000)),
        "{ranges:x?}"
    );
    let mut at = 0;
    for (first, size) in &ranges {
        assert!(
            size.is_power_of_two() && first % size == 0,
            "{first:#x}+{size:#x}"
        );
        if at == 0xfee0_0000 {
            at = 0xfef0_0000;
        }
        assert_eq!(*first, at);
        at += size;
    }
    assert_eq!(at, 1 << 39);
}

#[test]
fn a_reboot_resets_the_viommu_stops_the_rings_and_brings_them_back_elsewhere_in_memory() {
    for queue_size in [128, 1024] {
        let (back_end, mut guest) = guest(IommuOptions::default(), queue_size);
        let setups = |guest: &EmbeddedGuest| -> Vec<(u64, u64, u64)> {
            let rings = guest.driver.rings(2, &[]);
            rings.iter().map(|r| (r.desc, r.avail, r.used)).collect()
        };
        let iommu = guest.front_end.iommu().unwrap().clone();
        let pages = |guest: &mut EmbeddedGuest, queue| {
            (0..guest.driver.pages(Area::Ring(queue)))
                .map(|page| guest.driver.queue(queue).window().user_page(page * PAGE))
                .collect::<Vec<_>>()
        };
        let before = (setups(&guest), pages(&mut guest, RX), pages(&mut guest, TX));
        back_end.take_log();
        guest.reboot().unwrap();
        let after = (setups(&guest), pages(&mut guest, RX), pages(&mut guest, TX));
        assert_eq!(before.0, after.0, "the addresses are the same");
        for (old, new) in [(&before.1, &after.1), (&before.2, &after.2)] {
            assert!(new.iter().all(|page| !old.contains(page)), "the memory is not");
        }
        for (page, user_addr) in after.1.iter().enumerate() {
            let Lookup::Found(found) = iommu.lookup(after.0[0].0 + (page * PAGE) as u64, READ | WRITE) else {
                panic!("page {page} of the ring is not mapped");
            };
            assert_eq!(found.user_addr, *user_addr);
        }
        let log = back_end.take_log();
        let storm = reset_ranges().len();
        assert!(
            log[..storm].iter().all(|m| iotlb(m).0 == INVALIDATE),
            "first the vIOMMU"
        );
        assert_eq!(log[storm].0, request::SET_VRING_ENABLE);
        assert_eq!(log[storm + 2].0, request::GET_VRING_BASE);
        assert_eq!(log[storm + 4].0, request::SET_VRING_CALL, "then a new start");
    }
}

#[test]
fn raw_iotlb_messages_go_out_as_they_are() {
    let (back_end, front_end, ..) = setup(IommuOptions::default());
    let whole = message::iotlb(1, 2, 3, 7, 9);
    for body in [&whole[..], &whole[..26], &whole[..25], &[]] {
        front_end.ask(request::IOTLB_MSG, NEED_REPLY, body, &[]).unwrap();
        assert_eq!(back_end.take_log(), [(request::IOTLB_MSG, body.to_vec())]);
    }
}
