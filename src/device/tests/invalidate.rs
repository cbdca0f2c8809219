//! A guest that takes its buffers back while they are being filled, in earnest: the device on one thread, guest and VMM on
//! another.

use std::collections::VecDeque;
use std::io::Write;
use std::os::fd::OwnedFd;

use vm_memory::{Bytes, GuestAddress};

use super::bench::*;
use super::*;
use crate::guest::{Mapping, Memory, Permission};

/// How often a page is taken back.
const TIMES: u64 = 3000;
/// Buffers that are posted all the time.
const POSTED: u64 = 12;
/// Pages that were taken back and are looked at before they are used again.
const WATCHED: usize = 200;
/// What a page holds that is not the device's any more.
const SENTINEL: u8 = 0xa5;

/// Guest and VMM of one thread: the guest's rx buffers are I/O virtual pages, and what they mean changes all the time.
struct Guest {
    handle: DeviceHandle,
    memory: Arc<Memory>,
    rx: DriverRing,
    told: mpsc::Receiver<DeviceEvent>,
    /// What each buffer page means; `None` while it is not mapped.
    means: Vec<Option<u64>>,
    /// Pages of memory that are free, all sentinel, the longest free first.
    watched: VecDeque<u64>,
    received: u64,
    asked: u64,
}

impl Guest {
    fn kick(&self, kick: &OwnedFd) {
        rustix::io::write(kick, &1u64.to_ne_bytes()).unwrap();
    }

    fn map(&mut self, buffer: u64) {
        let page = self.watched.pop_front().expect("more pages than buffers");
        self.assert_untouched(page);
        self.means[buffer as usize] = Some(page);
        let mapping = Mapping {
            iova: iova(BUFFERS + buffer),
            len: PAGE,
            gpa: page,
            permission: Permission::ReadWrite,
        };
        let update = |done| Command::UpdateIotlb {
            mappings: vec![mapping],
            done,
        };
        self.handle.call(update).unwrap();
    }

    /// From the answer on the page is the guest's own.
    fn take_back(&mut self, buffer: u64) {
        let Some(page) = self.means[buffer as usize].take() else {
            return;
        };
        let first = iova(BUFFERS + buffer);
        let invalidate = |done| Command::InvalidateIotlb {
            first,
            last: first + PAGE - 1,
            done,
        };
        self.handle.call(invalidate).unwrap();
        self.memory
            .write_slice(&[SENTINEL; PAGE as usize], GuestAddress(page))
            .unwrap();
        self.watched.push_back(page);
    }

    fn assert_untouched(&self, page: u64) {
        let mut bytes = [0; PAGE as usize];
        self.memory.read_slice(&mut bytes, GuestAddress(page)).unwrap();
        let touched = bytes.iter().position(|byte| *byte != SENTINEL);
        assert_eq!(
            touched, None,
            "the page at {page:#x} was written after it was taken back"
        );
    }

    /// Posts again what was used, and maps what is asked for.
    fn serve(&mut self) {
        for (addr, _) in self.rx.used(&self.memory) {
            self.received += 1;
            self.rx.offer(&self.memory, &[(addr, PAGE as u32)], WRITE);
        }
        let missing: Vec<_> = self.told.try_iter().collect();
        for event in missing {
            let DeviceEvent::Miss(miss) = event else {
                panic!("{event:?} was told");
            };
            self.asked += 1;
            let buffer = (miss.iova - iova(BUFFERS)) / PAGE;
            if self.means[buffer as usize].is_none() {
                self.map(buffer);
            }
            self.handle
                .send(Command::MissAnswered { miss, refused: false })
                .unwrap();
        }
        self.kick(&self.rx.kick);
    }
}

/// The promise behind the answer to an INVALIDATE: what the guest does with the page afterwards is not overwritten.
#[test]
fn a_page_is_not_written_after_its_invalidate_was_answered() {
    let mut bench = Bench::new(Addresses::Iova);
    let mut service = bench.connected();
    service.set_nonblocking(true).unwrap();
    let (memory, rx, told) = bench.split();
    // The pages of the rings and of the connection keep their meaning; the rest of memory is free.
    let taken: Vec<_> = (0..8).chain([BUFFERS + 100]).map(gpa).collect();
    let free: VecDeque<_> = (0..PAGES)
        .map(|page| page * PAGE)
        .filter(|page| !taken.contains(page))
        .take(WATCHED)
        .collect();
    let mut guest = Guest {
        handle: bench.handle.clone(),
        memory,
        rx,
        told,
        means: vec![None; POSTED as usize],
        watched: free,
        received: 0,
        asked: 0,
    };
    let vmm = std::thread::spawn(move || {
        // The first 8 were posted for the connection, with meanings of their own; one of them has been used.
        let first = iova(BUFFERS);
        let last = first + 8 * PAGE - 1;
        let invalidate = |done| Command::InvalidateIotlb { first, last, done };
        guest.handle.call(invalidate).unwrap();
        // Not before: until now the device was free to fill what was posted.
        for page in &guest.watched {
            guest
                .memory
                .write_slice(&[SENTINEL; PAGE as usize], GuestAddress(*page))
                .unwrap();
        }
        for buffer in [0].into_iter().chain(8..POSTED) {
            guest
                .rx
                .offer(&guest.memory, &[(iova(BUFFERS + buffer), PAGE as u32)], WRITE);
        }
        let mut state = 1u64;
        let mut times = 0;
        while times < TIMES || guest.received < TIMES {
            // A generator of Lehmer's: any will do that visits all buffers.
            state = state * 48271 % 0x7fff_ffff;
            guest.take_back(state % POSTED);
            // Sometimes mapped again at once, sometimes when it is asked for.
            if state & 64 == 0 && guest.means[(state % POSTED) as usize].is_none() {
                guest.map(state % POSTED);
            }
            guest.serve();
            times += 1;
        }
        for buffer in 0..POSTED {
            guest.take_back(buffer);
        }
        for page in guest.watched.clone() {
            guest.assert_untouched(page);
        }
        (guest.received, guest.asked)
    });
    let bytes = pattern(0, 64 * 1024);
    let deadline = Instant::now() + Duration::from_secs(120);
    while !vmm.is_finished() {
        assert!(Instant::now() < deadline, "nothing is received any more");
        let _ = service.write(&bytes);
        bench.turn();
    }
    let (received, asked) = vmm.join().unwrap();
    assert!(received >= TIMES, "{received} packets");
    assert!(asked > 0, "no page was missing when it was needed");
    assert_eq!(bench.held().len(), 2);
}
