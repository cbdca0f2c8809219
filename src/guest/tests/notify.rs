//! Who must be told and who must not: kicks and interrupts.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use super::driver::{BUFFERS, Driver, Ram, r, w};
use crate::guest::{Finished, Ring, RxBurst, TxBurst};

/// Serves all that is available in one burst.
fn serve(ring: &mut Ring, ram: &Ram) -> Finished {
    let mut burst = TxBurst::begin(ring, ram).unwrap();
    while let Some(packet) = burst.pop() {
        packet.unwrap();
    }
    burst.finish().unwrap()
}

fn offer(driver: &mut Driver, n: u16) {
    for _ in 0..n {
        driver.offer(&[r(BUFFERS, 44)]);
    }
}

#[test]
pub(super) fn event_idx_one_interrupt_for_a_burst_that_passes_used_event() {
    // Where the driver wants its interrupt, seen from a burst of 5 that begins at 65533: used elements
    // 65533..=1 (wrapped).
    for (used_event, interrupt) in [
        (65532, false), // passed long ago
        (65533, true),  // the first of the burst
        (65535, true),  // just before the wrap
        (0, true),      // just behind it
        (1, true),      // the last of the burst
        (2, false),     // the next after it
        (32768, false),
    ] {
        let mut driver = Driver::at(8, true, 65533);
        let (mut ring, ram) = (driver.ring(), driver.ram.clone());
        serve(&mut ring, &ram); // the interrupt that a ring which goes on gives in any case
        driver.set_used_event(used_event);
        offer(&mut driver, 5);
        assert_eq!(
            serve(&mut ring, &ram),
            Finished {
                used: 5,
                interrupt,
                parked: false
            },
            "used_event {used_event}"
        );
        // Nothing used since: no second one.
        assert_eq!(
            serve(&mut ring, &ram),
            Finished {
                used: 0,
                interrupt: false,
                parked: false
            }
        );
    }
}

#[test]
pub(super) fn event_idx_windows_of_bursts_join() {
    let mut driver = Driver::new(8, true);
    let (mut ring, ram) = (driver.ring(), driver.ram.clone());
    driver.set_used_event(4);
    let mut interrupts = Vec::new();
    for _ in 0..10 {
        offer(&mut driver, 1);
        interrupts.push(serve(&mut ring, &ram).interrupt);
        driver.used();
    }
    // Exactly at the element that the driver named.
    assert_eq!(interrupts.iter().position(|i| *i), Some(4));
    assert_eq!(interrupts.iter().filter(|i| **i).count(), 1);
}

#[test]
pub(super) fn without_event_idx_the_flag_decides() {
    let mut driver = Driver::new(8, false);
    let (mut ring, ram) = (driver.ring(), driver.ram.clone());
    offer(&mut driver, 3);
    assert_eq!(
        serve(&mut ring, &ram),
        Finished {
            used: 3,
            interrupt: true,
            parked: false
        }
    );
    driver.set_no_interrupt(true);
    offer(&mut driver, 3);
    assert_eq!(
        serve(&mut ring, &ram),
        Finished {
            used: 3,
            interrupt: false,
            parked: false
        }
    );
    driver.set_no_interrupt(false);
    assert_eq!(
        serve(&mut ring, &ram),
        Finished {
            used: 0,
            interrupt: false,
            parked: false
        }
    );
    offer(&mut driver, 1);
    assert_eq!(
        serve(&mut ring, &ram),
        Finished {
            used: 1,
            interrupt: true,
            parked: false
        }
    );
}

#[test]
pub(super) fn rx_shows_all_packets_with_one_interrupt() {
    let mut driver = Driver::new(64, true);
    for i in 0..40 {
        driver.offer(&[w(BUFFERS + 64 * i, 54)]);
    }
    let (mut ring, ram) = (driver.ring(), driver.ram.clone());
    let mut burst = RxBurst::begin(&mut ring, &ram).unwrap();
    for _ in 0..10 {
        assert_eq!(burst.reserve(30, 64), Ok(30));
        assert_eq!(burst.commit(30, |_| [0; 44]), Ok(3));
        assert_eq!(burst.control(&[0; 44]), Ok(true));
    }
    assert_eq!(driver.seen_used_idx(), 0);
    assert_eq!(
        burst.finish(),
        Ok(Finished {
            used: 40,
            interrupt: true,
            parked: false
        })
    );
}

#[test]
pub(super) fn kicks_are_asked_for_and_suppressed() {
    for event_idx in [true, false] {
        let mut driver = Driver::new(8, event_idx);
        let (mut ring, ram) = (driver.ring(), driver.ram.clone());
        assert_eq!(ring.enable_notifications(&ram), Ok(false));
        let old = driver.avail_idx;
        offer(&mut driver, 1);
        assert!(driver.must_kick(old), "event_idx {event_idx}");
        ring.disable_notifications(&ram).unwrap();
        serve(&mut ring, &ram);
        let old = driver.avail_idx;
        offer(&mut driver, 2);
        assert!(!driver.must_kick(old), "event_idx {event_idx}");
        // Those two were not announced: enabling must tell.
        assert_eq!(ring.enable_notifications(&ram), Ok(true));
        serve(&mut ring, &ram);
        assert_eq!(ring.enable_notifications(&ram), Ok(false));
        let old = driver.avail_idx;
        offer(&mut driver, 1);
        assert!(driver.must_kick(old), "event_idx {event_idx}");
    }
}

#[test]
pub(super) fn a_flag_that_someone_left_behind_is_written_over() {
    // Our predecessor died with kicks switched off.
    let driver = Driver::new(8, false);
    let (mut ring, ram) = (driver.ring(), driver.ram.clone());
    ring.disable_notifications(&ram).unwrap();
    assert!(driver.kicks_unwanted());
    let mut ring = driver.ring();
    assert_eq!(ring.enable_notifications(&ram), Ok(false));
    assert!(!driver.kicks_unwanted());
}

#[test]
pub(super) fn signalling_never_blocks() {
    let (done, is_done) = mpsc::channel();
    let signalling = thread::spawn(move || {
        signal_full_descriptors();
        done.send(())
    });
    // An error is a panic of the thread, or its silence.
    if is_done.recv_timeout(Duration::from_secs(10)) == Err(mpsc::RecvTimeoutError::Timeout) {
        panic!("a signal blocks");
    }
    signalling.join().unwrap().unwrap();
}

fn signal_full_descriptors() {
    let driver = Driver::new(8, true);
    let read = |fd: BorrowedFd<'_>| {
        let mut count = [0; 8];
        rustix::io::read(fd, &mut count).map(|_| u64::from_ne_bytes(count))
    };
    for flags in [EventfdFlags::empty(), EventfdFlags::NONBLOCK] {
        let call = eventfd(0, flags).unwrap();
        let mut ring = driver.ring();
        ring.set_call(Some(call.try_clone().unwrap()));
        ring.signal().unwrap();
        ring.signal().unwrap();
        assert_eq!(read(call.as_fd()), Ok(2));
        // A VMM that fills the counter up. A blocking write would wait for ever now.
        rustix::io::write(&call, &(u64::MAX - 1).to_ne_bytes()).unwrap();
        ring.signal().unwrap();
        assert_eq!(read(call.as_fd()), Ok(u64::MAX - 1));
        // The VMM's flags are its own.
        let now = rustix::fs::fcntl_getfl(&call)
            .unwrap()
            .contains(rustix::fs::OFlags::NONBLOCK);
        assert_eq!(now, flags.contains(EventfdFlags::NONBLOCK));

        let (mut parts, _, _) = driver.parts();
        let kick = eventfd(3, flags).unwrap();
        parts.kick = kick.try_clone().unwrap();
        parts.call = None;
        let ring = Ring::new(parts).unwrap();
        assert!(ring.drain_kick().unwrap());
        assert!(!ring.drain_kick().unwrap());
        assert!(!ring.has_call());
        ring.signal().unwrap();
    }
    // Not an eventfd, and full.
    let (reader, writer) = rustix::pipe::pipe().unwrap();
    let mut ring = driver.ring();
    ring.set_call(Some(writer));
    for _ in 0..10_000 {
        ring.signal().unwrap();
    }
    drop(reader);
    assert!(ring.signal().is_err());
}

fn wait(fd: BorrowedFd<'_>) {
    let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
    let deadline = Timespec {
        tv_sec: 10,
        tv_nsec: 0,
    };
    assert_eq!(poll(&mut fds, Some(&deadline)).unwrap(), 1, "a wake-up was lost");
    let mut count = [0; 8];
    rustix::io::read(fd, &mut count).unwrap();
}

/// Driver and device on two threads, each asleep whenever it may be: a notification that is missing shows as
/// a sleep that nobody ends. (A missing fence does so rarely: the window is a few nanoseconds.)
#[test]
pub(super) fn no_wake_up_is_lost() {
    const PACKETS: usize = 20_000;
    for event_idx in [true, false] {
        let mut driver = Driver::new(4, event_idx);
        let (parts, kick, call) = driver.parts();
        let ram = driver.ram.clone();
        let device = thread::spawn(move || {
            let mut ring = Ring::new(parts).unwrap();
            let mut served = 0;
            let mut interrupts = 0;
            while served < PACKETS {
                ring.disable_notifications(&ram).unwrap();
                let finished = serve(&mut ring, &ram);
                served += usize::from(finished.used);
                if finished.interrupt {
                    ring.signal().unwrap();
                    interrupts += 1;
                }
                if served < PACKETS && !ring.enable_notifications(&ram).unwrap() {
                    wait(ring.kick());
                }
            }
            interrupts
        });
        let started = Instant::now();
        let (mut sent, mut back) = (0, 0);
        while back < PACKETS {
            let old = driver.avail_idx;
            let room = 4 - (sent - back);
            let now = room.min(PACKETS - sent);
            offer(&mut driver, now as u16);
            sent += now;
            if now > 0 && driver.must_kick(old) {
                rustix::io::write(&kick, &1u64.to_ne_bytes()).unwrap();
            }
            let used = driver.used().len();
            back += used;
            if used == 0 && !driver.want_interrupt() {
                wait(call.as_fd());
            }
        }
        let interrupts = device.join().unwrap();
        assert!(interrupts <= PACKETS);
        assert!(started.elapsed() < Duration::from_secs(60));
    }
}

/// While entries are looked for, none of them is told of; the first one after that is.
#[test]
fn a_driver_that_is_hushed_kicks_for_nothing_until_it_is_asked_to() {
    for event_idx in [true, false] {
        // Also where the index that stands behind the driver's is that of the lap before.
        for start in [0, 1, 65535] {
            let mut driver = Driver::at(8, event_idx, start);
            let (mut ring, ram) = (driver.ring(), driver.ram.clone());
            ring.enable_notifications(&ram).unwrap();
            ring.hush(&ram).unwrap();
            for n in 0..3 {
                let before = driver.avail_idx;
                offer(&mut driver, 1);
                assert!(!driver.must_kick(before), "{event_idx} {start} {n}");
                serve(&mut ring, &ram);
                ring.hush(&ram).unwrap();
            }
            assert!(!ring.enable_notifications(&ram).unwrap());
            let before = driver.avail_idx;
            offer(&mut driver, 1);
            assert!(driver.must_kick(before), "{event_idx} {start}");
        }
    }
}
