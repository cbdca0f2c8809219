//! A driver that breaks the rules: one row a trick. What is it called, what goes back, who survives.

use super::driver::{BUFFERS, Buf, Driver, HIGH, HOLE, INDIRECT, NEXT, WRITE, header, r, w};
use crate::guest::{
    MemoryFault, Ring, RingArea, RingError, RingFault, RingParts, RingPosition, RxBurst, TxBurst,
};

const TABLE: u64 = 0x2_0000;

/// A trick: what it does to an idle ring of 8 entries, and what it is called. It makes descriptor 0
/// available, unless it makes something else available itself.
pub(super) struct Trick {
    pub(super) name: &'static str,
    pub(super) play: fn(&mut Driver),
    pub(super) fault: RingFault,
}

fn table(driver: &Driver, at: u64, descriptors: &[(Buf, u16)]) {
    for (i, (buf, next)) in descriptors.iter().enumerate() {
        let mut bytes = Vec::new();
        bytes.extend(buf.addr.to_le_bytes());
        bytes.extend(buf.len.to_le_bytes());
        bytes.extend(buf.flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        driver.put(at + 16 * i as u64, &bytes);
    }
}

fn buf(addr: u64, len: u32, flags: u16) -> Buf {
    Buf { addr, len, flags }
}

fn indirect(driver: &mut Driver, addr: u64, len: u32) {
    driver.descriptor(0, buf(addr, len, INDIRECT), 0);
    driver.offer_head(0);
}

/// Tricks for either ring: `WAY` is the direction that its buffers should have.
pub(super) fn tricks<const WAY: u16>() -> Vec<Trick> {
    vec![
        Trick {
            name: "a head that the table does not have",
            play: |driver| driver.offer_head(8),
            fault: RingFault::HeadOutOfRange,
        },
        Trick {
            name: "a head far beyond",
            play: |driver| driver.offer_head(0xffff),
            fault: RingFault::HeadOutOfRange,
        },
        Trick {
            name: "next beyond the table",
            play: |driver| {
                driver.descriptor(0, buf(BUFFERS, 44, WAY | NEXT), 8);
                driver.offer_head(0);
            },
            fault: RingFault::NextOutOfRange,
        },
        Trick {
            name: "a descriptor that is its own next",
            play: |driver| {
                driver.descriptor(0, buf(BUFFERS, 44, WAY | NEXT), 0);
                driver.offer_head(0);
            },
            fault: RingFault::DescriptorLoop,
        },
        Trick {
            name: "a loop of empty buffers, which add up to nothing",
            play: |driver| {
                driver.descriptor(0, buf(BUFFERS, 0, WAY | NEXT), 1);
                driver.descriptor(1, buf(BUFFERS, 0, WAY | NEXT), 0);
                driver.offer_head(0);
            },
            fault: RingFault::DescriptorLoop,
        },
        Trick {
            name: "a loop in an indirect table",
            play: |driver| {
                let descriptors = [(buf(BUFFERS, 1, WAY | NEXT), 1), (buf(BUFFERS, 1, WAY | NEXT), 0)];
                table(driver, TABLE, &descriptors);
                indirect(driver, TABLE, 32);
            },
            fault: RingFault::DescriptorLoop,
        },
        Trick {
            name: "next beyond an indirect table, though within the ring's",
            play: |driver| {
                table(
                    driver,
                    TABLE,
                    &[(buf(BUFFERS, 44, WAY | NEXT), 2), (buf(BUFFERS, 44, WAY), 0)],
                );
                indirect(driver, TABLE, 32);
            },
            fault: RingFault::NextOutOfRange,
        },
        Trick {
            name: "an empty indirect table",
            play: |driver| indirect(driver, TABLE, 0),
            fault: RingFault::IndirectLength,
        },
        Trick {
            name: "an indirect table of one and a half descriptors",
            play: |driver| indirect(driver, TABLE, 24),
            fault: RingFault::IndirectLength,
        },
        Trick {
            name: "an indirect table of 1025 descriptors",
            play: |driver| indirect(driver, TABLE, 16 * 1025),
            fault: RingFault::IndirectLength,
        },
        Trick {
            name: "an indirect table of 4 GiB",
            play: |driver| indirect(driver, TABLE, !15),
            fault: RingFault::IndirectLength,
        },
        Trick {
            name: "an indirect table where no memory is",
            play: |driver| indirect(driver, HOLE, 16),
            fault: RingFault::AddressUnmapped,
        },
        Trick {
            name: "an indirect table that ends where no memory is",
            play: |driver| indirect(driver, HOLE - 16, 32),
            fault: RingFault::AddressUnmapped,
        },
        Trick {
            name: "an indirect table that wraps around",
            play: |driver| indirect(driver, u64::MAX - 15, 32),
            fault: RingFault::AddressWraps,
        },
        Trick {
            name: "an indirect table in an indirect table",
            play: |driver| {
                table(
                    driver,
                    TABLE,
                    &[(buf(BUFFERS, 44, WAY | NEXT), 1), (buf(TABLE, 32, INDIRECT), 0)],
                );
                indirect(driver, TABLE, 32);
            },
            fault: RingFault::IndirectNested,
        },
        Trick {
            name: "a table that is its own indirect table",
            play: |driver| {
                table(driver, TABLE, &[(buf(TABLE, 16, INDIRECT), 0)]);
                indirect(driver, TABLE, 16);
            },
            fault: RingFault::IndirectNested,
        },
        Trick {
            name: "indirect and next",
            play: |driver| {
                table(driver, TABLE, &[(buf(BUFFERS, 64, WAY), 0)]);
                driver.descriptor(0, buf(TABLE, 16, INDIRECT | NEXT), 1);
                driver.descriptor(1, buf(BUFFERS, 64, WAY), 0);
                driver.offer_head(0);
            },
            fault: RingFault::IndirectWithNext,
        },
        Trick {
            name: "a buffer in the hole between regions",
            play: |driver| {
                driver.offer(&[buf(HOLE, 44, WAY)]);
            },
            fault: RingFault::AddressUnmapped,
        },
        Trick {
            name: "a buffer that ends one byte behind a region",
            play: |driver| {
                driver.offer(&[buf(HOLE - 44, 44, WAY), buf(HOLE - 44, 45, WAY)]);
            },
            fault: RingFault::AddressUnmapped,
        },
        Trick {
            name: "a buffer from one region over the hole into the next",
            play: |driver| {
                driver.offer(&[buf(HOLE - 44, (HIGH - HOLE) as u32 + 88, WAY)]);
            },
            fault: RingFault::AddressUnmapped,
        },
        Trick {
            name: "a buffer that wraps around to memory",
            play: |driver| {
                driver.offer(&[buf(BUFFERS, 44, WAY), buf(u64::MAX - 99, 200, WAY)]);
            },
            fault: RingFault::AddressWraps,
        },
        Trick {
            name: "the last byte of the address space",
            play: |driver| {
                driver.offer(&[buf(BUFFERS, 44, WAY), buf(u64::MAX, 1, WAY)]);
            },
            fault: RingFault::AddressUnmapped,
        },
        Trick {
            name: "a chain of one byte less than a header",
            play: |driver| {
                driver.offer(&[buf(BUFFERS, 20, WAY), buf(BUFFERS, 23, WAY)]);
            },
            fault: RingFault::ChainTooShort,
        },
        Trick {
            name: "a chain of nothing",
            play: |driver| {
                driver.offer(&[buf(BUFFERS, 0, WAY)]);
            },
            fault: RingFault::ChainTooShort,
        },
        Trick {
            name: "a buffer of the wrong direction",
            play: |driver| {
                driver.offer(&[buf(BUFFERS, 64, WAY ^ WRITE)]);
            },
            fault: RingFault::WrongDirection,
        },
        Trick {
            name: "a buffer of the wrong direction at the end",
            play: |driver| {
                driver.offer(&[buf(BUFFERS, 64, WAY), buf(BUFFERS, 64, WAY ^ WRITE)]);
            },
            fault: RingFault::WrongDirection,
        },
        Trick {
            name: "readable behind writable",
            play: |driver| {
                driver.offer(&[w(BUFFERS, 64), r(BUFFERS, 64)]);
            },
            fault: RingFault::WrongDirection,
        },
        Trick {
            name: "4 GiB, by naming 8 MiB 512 times",
            play: |driver| {
                let many: Vec<_> = (0..512)
                    .map(|i| (buf(HIGH, 0x80_0000, WAY | NEXT), (i + 1) % 512))
                    .collect();
                table(driver, TABLE, &many);
                indirect(driver, TABLE, 16 * 512);
            },
            fault: RingFault::ChainTooBig,
        },
    ]
}

#[test]
pub(super) fn tx_tricks_cost_one_chain_each() {
    for Trick { name, play, fault } in tricks::<0>() {
        let mut driver = Driver::new(8, true);
        play(&mut driver);
        // The next chain is fine, and does not suffer.
        driver.put(BUFFERS + 0x1000, &header(5));
        driver.descriptor(7, r(BUFFERS + 0x1000, 44), 0);
        driver.offer_head(7);

        let (mut ring, ram) = (driver.ring(), driver.ram.clone());
        let mut burst = TxBurst::begin(&mut ring, &ram).unwrap();
        assert_eq!(burst.pop().unwrap().unwrap_err(), fault, "{name}");
        assert_eq!(burst.pop().unwrap().unwrap().header, header(5), "{name}");
        assert!(burst.pop().is_none());
        assert_eq!(burst.finish().unwrap().used, 2);
        let used = driver.used();
        assert_eq!((used.len(), used[0].1, used[1]), (2, 0, (7, 0)), "{name}");
        assert_eq!(
            ring.take_faults().iter().collect::<Vec<_>>(),
            [(fault, 1)],
            "{name}"
        );
    }
}

#[test]
pub(super) fn rx_tricks_cost_one_chain_each() {
    for Trick { name, play, fault } in tricks::<WRITE>() {
        for control in [true, false] {
            let mut driver = Driver::new(8, true);
            play(&mut driver);
            driver.descriptor(7, w(BUFFERS + 0x1000, 54), 0);
            driver.offer_head(7);

            let (mut ring, ram) = (driver.ring(), driver.ram.clone());
            let mut burst = RxBurst::begin(&mut ring, &ram).unwrap();
            let len = if control {
                assert_eq!(burst.control(&header(6)), Ok(true), "{name}");
                44
            } else {
                assert_eq!(burst.reserve(100, 10), Ok(10), "{name}");
                assert_eq!(burst.commit(3, |_| header(6)), Ok(1), "{name}");
                47
            };
            assert_eq!(burst.finish().unwrap().used, 2);
            let used = driver.used();
            assert_eq!((used.len(), used[0].1, used[1]), (2, 0, (7, len)), "{name}");
            assert_eq!(driver.bytes(BUFFERS + 0x1000, 44), header(6), "{name}");
            assert_eq!(
                ring.take_faults().iter().collect::<Vec<_>>(),
                [(fault, 1)],
                "{name}"
            );
        }
    }
}

#[test]
pub(super) fn tolerated_what_harms_nobody() {
    // WRITE on a descriptor that refers to an indirect table has no meaning (2.7.5.3.2).
    let mut driver = Driver::new(8, true);
    driver.put(BUFFERS, &header(1));
    table(&driver, TABLE, &[(r(BUFFERS, 44), 0)]);
    driver.offer(&[buf(TABLE, 16, INDIRECT | WRITE)]);
    // A table longer than the ring, as Linux builds it for a packet of 18 descriptors.
    let many: Vec<_> = (0..20).map(|i| r(BUFFERS + 44 * i, 44)).collect();
    driver.offer_indirect(&[], &many);
    let (mut ring, ram) = (driver.ring(), driver.ram.clone());
    let mut burst = TxBurst::begin(&mut ring, &ram).unwrap();
    assert_eq!(burst.pop().unwrap().unwrap().header, header(1));
    assert_eq!(burst.pop().unwrap().unwrap().payload_len, 19 * 44);
}

#[test]
pub(super) fn an_available_index_that_makes_no_sense_stops_the_ring() {
    let stops = |claim: u16| {
        let driver = Driver::at(8, true, 65530);
        let (mut ring, ram) = (driver.ring(), driver.ram.clone());
        driver.claim_avail_idx(claim);
        let error = RingError::AvailIndex {
            avail: claim,
            used: 65530,
            size: 8,
        };
        let stopped = ring.check(&ram) == Err(error);
        assert_eq!(TxBurst::begin(&mut ring, &ram).err().is_some(), stopped);
        assert_eq!(RxBurst::begin(&mut ring, &ram).err().is_some(), stopped);
        assert_eq!(ring.enable_notifications(&ram) == Err(error), stopped);
        if stopped {
            assert_eq!(error.reason(), RingFault::AvailIndex);
        }
        stopped
    };
    assert!(!stops(65530));
    assert!(!stops(65535));
    assert!(!stops(65530u16.wrapping_add(8)));
    assert!(stops(65530u16.wrapping_add(9)));
    assert!(stops(65529));
    assert!(stops(32000));
}

#[test]
pub(super) fn a_driver_that_reuses_chains_before_it_has_them_back_stops_the_ring() {
    let mut driver = Driver::new(4, true);
    let (mut ring, ram) = (driver.ring(), driver.ram.clone());
    for _ in 0..4 {
        driver.offer(&[r(BUFFERS, 44)]);
    }
    let mut burst = TxBurst::begin(&mut ring, &ram).unwrap();
    let mut taken = 0;
    while let Some(packet) = burst.pop() {
        packet.unwrap();
        taken += 1;
        // As fast as we take them, more come: without a bound this burst would not end.
        driver.offer(&[r(BUFFERS, 44)]);
    }
    assert_eq!(taken, 4);
    assert_eq!(
        burst.finish(),
        Err(RingError::AvailIndex {
            avail: 8,
            used: 0,
            size: 4
        })
    );
    // What was taken went back all the same.
    assert_eq!(driver.used().len(), 4);
}

#[test]
pub(super) fn an_index_that_goes_backwards_stops_the_ring() {
    let mut driver = Driver::new(8, true);
    let (mut ring, ram) = (driver.ring(), driver.ram.clone());
    for _ in 0..3 {
        driver.offer(&[w(BUFFERS, 64)]);
    }
    let mut burst = RxBurst::begin(&mut ring, &ram).unwrap();
    assert_eq!(burst.reserve(60, 3), Ok(60));
    driver.claim_avail_idx(1);
    assert_eq!(burst.commit(50, |_| header(0)), Ok(3));
    assert_eq!(
        burst.control(&header(0)),
        Err(RingError::AvailIndex {
            avail: 1,
            used: 0,
            size: 8
        })
    );
    assert!(burst.finish().is_err());
    assert_eq!(driver.used().len(), 3);
}

#[test]
pub(super) fn areas_must_be_in_memory() {
    let place = |change: fn(&mut RingParts)| {
        let driver = Driver::new(256, true);
        let mut parts = driver.parts().0;
        change(&mut parts);
        Ring::new(parts).unwrap().check(&driver.ram)
    };
    let unmapped = |area, addr, len| {
        Err(RingError::Memory {
            area,
            fault: MemoryFault::Unmapped { addr, len },
        })
    };
    assert_eq!(place(|_| ()), Ok(()));
    assert_eq!(
        place(|parts| parts.desc = HOLE),
        unmapped(RingArea::DescriptorTable, HOLE, 4096)
    );
    assert_eq!(
        place(|parts| parts.desc = HOLE - 4080),
        unmapped(RingArea::DescriptorTable, HOLE, 16)
    );
    assert_eq!(place(|parts| parts.desc = HOLE - 4096), Ok(()));
    assert_eq!(
        place(|parts| parts.avail = HOLE - 512),
        unmapped(RingArea::Available, HOLE, 6)
    );
    assert_eq!(
        place(|parts| parts.used = HOLE - 2052),
        unmapped(RingArea::Used, HOLE, 2)
    );
    assert_eq!(
        place(|parts| parts.used = HOLE - 2056),
        Ok(()),
        "2054 bytes with avail_event, used ring aligned to 4"
    );
    // Without EVENT_IDX there is no avail_event, so that one more place is good.
    let no_event = |parts: &mut RingParts| {
        parts.event_idx = false;
        parts.used = HOLE - 2052;
    };
    assert_eq!(place(no_event), Ok(()));
    let wraps = MemoryFault::Wraps {
        addr: u64::MAX - 15,
        len: 4096,
    };
    let error = RingError::Memory {
        area: RingArea::DescriptorTable,
        fault: wraps,
    };
    assert_eq!(place(|parts| parts.desc = u64::MAX - 15), Err(error));
    assert_eq!(error.reason(), RingFault::RingMemory);
}

#[test]
pub(super) fn sizes_and_alignments_of_the_standard() {
    let build = |change: &dyn Fn(&mut RingParts)| {
        let mut parts = Driver::new(8, true).parts().0;
        change(&mut parts);
        Ring::new(parts).map(|ring| ring.size())
    };
    for size in [1, 2, 128, 1024] {
        assert_eq!(build(&|parts| parts.size = size).ok(), Some(size));
    }
    for size in [0, 3, 1000, 2048, 32768, 65535] {
        assert_eq!(
            build(&|parts| parts.size = size).unwrap_err(),
            RingError::Size(size)
        );
    }
    let misaligned = |area, addr, align| RingError::Misaligned { area, addr, align };
    let error = build(&|parts| parts.desc += 8).unwrap_err();
    assert_eq!(error, misaligned(RingArea::DescriptorTable, 0x1008, 16));
    let error = build(&|parts| parts.avail += 1).unwrap_err();
    assert_eq!(error, misaligned(RingArea::Available, 0x8001, 2));
    let error = build(&|parts| parts.used += 2).unwrap_err();
    assert_eq!(error, misaligned(RingArea::Used, 0x9002, 4));
    assert_eq!(error.reason(), RingFault::RingLayout);
}

#[test]
pub(super) fn rings_may_lie_across_regions() {
    use super::driver::BORDER;
    // Each area in turn is moved so that a border goes through it.
    let mut driver = Driver::new(128, true);
    driver.put(BUFFERS, &header(1));
    let old = driver.parts().0;
    for area in 0..3 {
        let mut parts = driver.parts().0;
        let (addr, from, len) = match area {
            0 => (&mut parts.desc, old.desc, 16 * 128),
            1 => (&mut parts.avail, old.avail, 6 + 2 * 128),
            _ => (&mut parts.used, old.used, 6 + 8 * 128),
        };
        // Through the middle of a used element, and between two of the others.
        *addr = BORDER - if area == 2 { 8 } else { 16 };
        let to = *addr;
        driver.offer(&[r(BUFFERS, 44)]);
        driver.offer(&[r(BUFFERS, 44)]);
        driver.put(to, &driver.bytes(from, len));
        let (mut ring, ram) = (Ring::new(parts).unwrap(), driver.ram.clone());
        let mut burst = TxBurst::begin(&mut ring, &ram).unwrap();
        assert_eq!(burst.pop().unwrap().unwrap().header, header(1));
        assert_eq!(burst.pop().unwrap().unwrap().header, header(1));
        assert!(burst.pop().is_none());
        assert_eq!(burst.finish().unwrap().used, 2);
        if area == 2 {
            driver.put(from, &driver.bytes(to, len));
        }
        assert_eq!(driver.used().len(), 2, "area {area}");
        assert_eq!(
            ring.position(),
            RingPosition {
                next_avail: driver.used_idx,
                next_used: driver.used_idx
            }
        );
    }
}

#[test]
pub(super) fn labels_stand_where_the_metric_looks_for_them() {
    for (i, fault) in RingFault::ALL.iter().enumerate() {
        assert_eq!(*fault as usize, i);
        assert_eq!(RingFault::LABELS[i], fault.label());
        assert!(fault.label().bytes().all(|b| b.is_ascii_lowercase() || b == b'_'));
    }
}
