//! Memory that its owner shortens while it is used, in this process; and faults that must stay fatal, in a child.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};
use std::sync::Barrier;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestRegionMmap};

use super::*;

const PAGE: usize = 4096;

type Memory = GuestMemoryMmap<()>;

/// A file of `pages` pages, all of which hold `fill`.
fn file(pages: usize, fill: u8) -> File {
    let file = File::from(memfd_create("guarded", MemfdFlags::CLOEXEC).unwrap());
    std::os::unix::fs::FileExt::write_all_at(&file, &vec![fill; pages * PAGE], 0).unwrap();
    file
}

/// Its mapping at guest-physical address 0.
fn mapped(file: &File, pages: usize) -> Arc<Memory> {
    let offset = FileOffset::new(file.try_clone().unwrap(), 0);
    let region = MmapRegion::from_file(offset, pages * PAGE).unwrap();
    let region = GuestRegionMmap::new(region, GuestAddress(0)).unwrap();
    Arc::new(Memory::from_regions(vec![region]).unwrap())
}

fn byte(memory: &Memory, page: usize) -> u8 {
    memory.read_obj(GuestAddress((page * PAGE) as u64)).unwrap()
}

#[test]
fn what_was_taken_away_reads_as_zeros_and_is_told() {
    let file = file(4, 7);
    let memory = Guarded::regions(mapped(&file, 4));
    let other = Guarded::regions(mapped(&file, 4));
    assert_eq!(byte(&memory, 3), 7);
    let before = contained();
    ftruncate(file.as_fd(), PAGE as u64).unwrap();
    assert!(!memory.was_hit(), "nobody has touched it yet");
    assert_eq!([0, 1, 3].map(|page| byte(&memory, page)), [7, 0, 0]);
    assert!(memory.was_hit());
    assert!(contained() > before);
    assert!(
        !other.was_hit(),
        "another mapping of the same file was not touched"
    );
    // Writes go nowhere, and the owner's file does not grow by them.
    memory.write_obj(9u8, GuestAddress(2 * PAGE as u64)).unwrap();
    assert_eq!(byte(&memory, 2), 9);
    assert_eq!(file.metadata().unwrap().len(), PAGE as u64);
    // What is left of it is still shared.
    memory.write_obj(8u8, GuestAddress(0)).unwrap();
    assert_eq!(byte(&other, 0), 8);
    assert!(!other.was_hit());
}

#[test]
fn a_write_is_contained_as_a_read_is() {
    let file = file(2, 7);
    let memory = Guarded::regions(mapped(&file, 2));
    ftruncate(file.as_fd(), 0).unwrap();
    memory
        .write_slice(&[1; 64], GuestAddress(PAGE as u64 - 32))
        .unwrap();
    assert!(memory.was_hit());
    let mut got = [0; 64];
    memory
        .read_slice(&mut got, GuestAddress(PAGE as u64 - 32))
        .unwrap();
    // The upper page was the second to be touched: mapping it again with the lower one is allowed to lose what was in it.
    assert!(got.iter().all(|byte| *byte <= 1));
}

/// ADD_MEM_REG makes a table that shares regions with the one before.
#[test]
fn a_region_that_is_guarded_twice_tells_both() {
    let file = file(1, 7);
    let table = mapped(&file, 1);
    let memory = [
        Guarded::regions(Arc::clone(&table)),
        Guarded::regions(Arc::clone(&table)),
    ];
    ftruncate(file.as_fd(), 0).unwrap();
    assert_eq!(byte(&memory[0], 0), 0);
    assert!(memory.iter().all(Guarded::was_hit));
    drop(memory);
    let anew = Guarded::regions(table);
    assert!(!anew.was_hit(), "an entry that is used again has forgotten");
}

#[test]
fn threads_that_fault_at_once_all_go_on() {
    const THREADS: usize = 8;
    for _ in 0..50 {
        let file = file(THREADS, 7);
        let memory = Guarded::regions(mapped(&file, THREADS));
        ftruncate(file.as_fd(), 0).unwrap();
        let start = Barrier::new(THREADS);
        std::thread::scope(|scope| {
            for page in 0..THREADS {
                let (memory, start) = (&memory, &start);
                scope.spawn(move || {
                    start.wait();
                    assert_eq!(byte(memory, page), 0);
                });
            }
        });
        assert!(memory.was_hit());
    }
}

/// Who reads a zero that another thread's fault has put there has had no fault to tell it so. By the time that it can see the zero
/// it must be able to ask.
#[test]
fn zeros_are_never_seen_before_they_are_told() {
    const PAGES: usize = 2;
    for _ in 0..1500 {
        let file = file(PAGES, 7);
        let memory = Guarded::regions(mapped(&file, PAGES));
        let before = contained();
        let start = Barrier::new(2);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                start.wait();
                ftruncate(file.as_fd(), 0).unwrap();
                assert_eq!(byte(&memory, 0), 0);
            });
            start.wait();
            // Until the other thread's fault has replaced it, or this one's own.
            while byte(&memory, 1) == 7 {
                std::hint::spin_loop();
            }
            assert!(contained() > before && memory.was_hit(), "zeros of nobody's");
        });
    }
}

/// The list grows, and what others put in and take out of it meanwhile is no hindrance.
#[test]
fn a_fault_is_found_among_many_ranges_that_come_and_go() {
    let small = file(1, 1);
    let many: Vec<_> = (0..3 * CHUNK)
        .map(|_| Guarded::regions(mapped(&small, 1)))
        .collect();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                drop(Guarded::regions(mapped(&small, 1)));
            }
        });
        for _ in 0..200 {
            let file = file(2, 7);
            let memory = Guarded::regions(mapped(&file, 2));
            ftruncate(file.as_fd(), 0).unwrap();
            assert_eq!(byte(&memory, 1), 0);
            assert!(memory.was_hit());
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert!(!many.iter().any(Guarded::was_hit));
}

#[test]
fn errno_survives_a_fault() {
    let file = file(1, 7);
    let memory = Guarded::regions(mapped(&file, 1));
    ftruncate(file.as_fd(), 0).unwrap();
    // SAFETY: the thread's errno.
    unsafe { *libc::__errno_location() = libc::EXDEV };
    assert_eq!(byte(&memory, 0), 0);
    assert_eq!(io::Error::last_os_error().raw_os_error(), Some(libc::EXDEV));
}

#[test]
fn a_system_call_that_meets_the_hole_answers_efault() {
    let file = file(1, 7);
    let memory = Guarded::regions(mapped(&file, 1));
    ftruncate(file.as_fd(), 0).unwrap();
    let (ours, _theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    let mut list = crate::sys::iovec::IoVecs::new();
    let slice = memory.get_slices(GuestAddress(0), 16).next().unwrap().unwrap();
    assert!(list.push(&slice));
    let error = crate::sys::vectored::writev(ours.as_fd(), &list).unwrap_err();
    assert!(crate::sys::vectored::is_memory_fault(&error), "{error}");
    assert!(!memory.was_hit(), "there is no signal");
}

/// Runs one of the victims below in a process of its own and returns the signal that ended it.
fn fate(victim: &str) -> Option<i32> {
    // A shell, for the sake of its `ulimit`: no core file is left behind.
    let status = Command::new("sh")
        .args(["-c", "ulimit -c 0; exec \"$0\" \"$@\""])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "--ignored", "--test-threads=1"])
        .arg(format!("sys::sigbus::tests::{victim}"))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .unwrap();
    assert!(status.code().is_none(), "it ended by itself: {status}");
    status.signal()
}

#[test]
fn a_fault_elsewhere_is_as_fatal_as_ever() {
    assert_eq!(fate("victim_of_a_file_that_nobody_guards"), Some(libc::SIGBUS));
}

#[test]
fn a_fault_in_what_is_no_longer_guarded_is_fatal() {
    assert_eq!(fate("victim_of_a_file_that_was_guarded"), Some(libc::SIGBUS));
}

#[test]
fn a_signal_that_somebody_sends_is_no_fault() {
    assert_eq!(fate("victim_of_kill"), Some(libc::SIGBUS));
}

#[test]
#[ignore = "ends its process: run by a_fault_elsewhere_is_as_fatal_as_ever"]
fn victim_of_a_file_that_nobody_guards() {
    let file = file(1, 7);
    let _guarded = Guarded::regions(mapped(&file, 1));
    let unguarded = mapped(&file, 1);
    ftruncate(file.as_fd(), 0).unwrap();
    byte(&unguarded, 0);
}

#[test]
#[ignore = "ends its process: run by a_fault_in_what_is_no_longer_guarded_is_fatal"]
fn victim_of_a_file_that_was_guarded() {
    let file = file(1, 7);
    let table = mapped(&file, 1);
    drop(Guarded::regions(Arc::clone(&table)));
    ftruncate(file.as_fd(), 0).unwrap();
    byte(&table, 0);
}

#[test]
#[ignore = "ends its process: run by a_signal_that_somebody_sends_is_no_fault"]
fn victim_of_kill() {
    let file = file(1, 7);
    let _guarded = Guarded::regions(mapped(&file, 1));
    let own = rustix::process::getpid();
    rustix::process::kill_process(own, rustix::process::Signal::BUS).unwrap();
}
