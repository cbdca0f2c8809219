//! Chains of the TX ring: what comes out of them is what the standard says, all of it in memory that may be read, each once
//! and in order, and nothing but the used ring is written.

use vsock_sidecar::guest::{Access, TxBurst};

use super::memory::{joined, part};
use super::model::{Chain, HEADER};
use super::{MAX_STEPS, Rig, allowed, believe, view};
use crate::input::Input;

/// Runs a case; panics where the TX ring breaks a promise.
pub fn run(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let Some(mut rig) = Rig::new(&mut input, Access::Read) else {
        return;
    };
    for _ in 0..MAX_STEPS {
        if input.is_empty() {
            break;
        }
        if input.below(3) == 0 {
            burst(&mut rig, &mut input);
        } else {
            rig.between(&mut input);
        }
    }
    burst(&mut rig, &mut Input::new(&[]));
}

fn burst(rig: &mut Rig, input: &mut Input<'_>) {
    let Rig {
        ram,
        guest,
        iotlb,
        ring,
        model,
        driver,
        ..
    } = rig;
    let view = view(guest, iotlb.as_ref());
    let areas = model.areas(ram);
    let burst = TxBurst::begin(ring, view);
    let Ok(areas) = areas else {
        assert!(burst.is_err(), "the ring is not in memory");
        return;
    };
    let begins = model.begin(ram, &areas);
    let Ok(mut burst) = burst.map_err(|error| assert!(!begins, "{error}")) else {
        return ram.assert_same();
    };
    assert!(begins, "an available index that cannot be");

    // The model does not know what becomes of every chain that waits.
    let mut unsure = false;
    let mut faults = 0;
    let mut taken = 0;
    let finishes = loop {
        // With no more input everything is taken.
        let what = if input.is_empty() { 0 } else { input.below(8) };
        match what {
            0..=4 => {}
            5 | 6 => {
                driver.act(ram, input);
                continue;
            }
            _ => break input.u8() & 3 != 0,
        }
        let head = model.next_head(ram, &areas);
        let chain = head.map(|head| model.chain(ram, &areas, head, Access::Read));
        unsure |= chain == Some(Chain::Unclear);
        let popped = burst.pop();
        taken += usize::from(popped.is_some());
        assert!(taken <= 2 * 65_536, "invariant 4");
        if unsure {
            match popped {
                Some(Ok(packet)) => {
                    let slices = packet.payload(u32::MAX);
                    let len: usize = slices.map(|slice| allowed(ram, &slice, Access::Read).1).sum();
                    assert_eq!(len, packet.payload_len as usize);
                }
                Some(Err(_)) => {}
                None => break true,
            }
            continue;
        }
        let Some((head, chain)) = head.zip(chain) else {
            assert!(popped.is_none(), "there is no chain");
            if input.is_empty() || model.broken {
                break input.u8() & 1 == 0;
            }
            continue;
        };
        if chain == Chain::Lacks {
            assert!(popped.is_none(), "invariant 10: {popped:?}");
            model.park();
            continue;
        }
        model.next_avail = model.next_avail.wrapping_add(1);
        // Before the header is read, as a driver sees whose buffers lie in its used ring.
        model.use_chain(ram, &areas, head, 0);
        match (popped.expect("there is a chain"), chain) {
            (Ok(packet), Chain::Good(runs, _)) => {
                let bytes: usize = runs.iter().map(|(_, n)| n).sum();
                assert_eq!(packet.payload_len as usize, bytes - HEADER);
                assert_eq!(packet.header[..], ram.read(&runs, 0, HEADER));
                let slices = packet.payload(u32::MAX);
                let found = joined(slices.map(|slice| allowed(ram, &slice, Access::Read)));
                assert_eq!(found, joined(part(&runs, HEADER, bytes)));
                let (skip, len) = (input.size(), input.size());
                let slices = packet.payload_from(skip, len);
                let found = joined(slices.map(|slice| allowed(ram, &slice, Access::Read)));
                let skip = HEADER + skip as usize;
                // `len` counts from the first byte of the payload.
                let end = (HEADER + len as usize).min(bytes);
                assert_eq!(found, joined(part(&runs, skip, end.saturating_sub(skip))));
            }
            (Err(_), Chain::Bad(_)) => faults += 1,
            (popped, chain) => panic!("{popped:?} of {chain:?}"),
        }
    };
    let finished = finishes.then(|| burst.finish());
    if unsure {
        believe(ram, model, ring);
    } else {
        let used = model.publish(ram, &areas);
        match finished {
            Some(Ok(finished)) => {
                assert!(!model.broken);
                assert_eq!((finished.used, finished.parked), (used, model.is_parked()));
            }
            Some(Err(error)) => assert!(model.broken, "{error}"),
            None => {}
        }
        assert_eq!(ring.position(), model.position());
        assert_eq!(ring.take_faults().total(), faults);
    }
    ring.take_faults();
    ram.assert_same();
    rig.take_misses();
}
