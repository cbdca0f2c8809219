//! The dirty log: which pages this device wrote, for a VMM that migrates the guest while it runs.
//!
//! The VMM shares a bitmap (SET_LOG_BASE), one bit for each 4 KiB page of guest-physical memory from address
//! 0 on. Nobody migrates most of the time, so what counts is the price of *no* log: one relaxed load per
//! write to guest memory, no lock and no reference count. (`BitmapMmapRegion` of vhost-user-backend clones an
//! `Arc` for every slice and takes a lock for every write.)
//!
//! Marks are set after the bytes were written: a VMM that clears a bit and then copies the page sees either
//! the bytes or, later, the bit.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use vhost_user_backend::bitmap::{AtomicBitmapMmap, BitmapReplace, MemRegionBitmap, MmapLogReg};
use vm_memory::bitmap::{Bitmap, BitmapSlice, NewBitmap, WithBitmapSlice};
use vm_memory::{Address, GuestMemoryRegion};

use crate::sys::sigbus::Guarded;

/// Bytes of guest memory that one bit of the log stands for (`VHOST_LOG_PAGE`).
pub const LOG_PAGE: u64 = 4096;

/// The dirty log of one memory region; clones share it.
#[derive(Clone, Debug, Default)]
pub struct DirtyBitmap(Arc<State>);

#[derive(Debug)]
struct State {
    /// Whether there is a log *and* it is to be written: all that is read when there is nothing to do.
    /// Relaxed is enough, since a reader that sees `true` takes the lock, and one that sees it late is as a
    /// write just before the VMM's message: no page is judged clean before the VMM has our answer to that
    /// message.
    active: AtomicBool,
    /// Whether there has ever been a log. Only set while the lock is held, which whoever marks has taken since.
    was_logged: AtomicBool,
    log: RwLock<Log>,
}

#[derive(Debug)]
struct Log {
    /// Off when the driver side has dropped VHOST_F_LOG_ALL.
    enabled: bool,
    region: Option<RegionLog>,
    /// Marks of a log before this one were lost.
    lost: bool,
}

impl Default for State {
    fn default() -> State {
        State {
            active: AtomicBool::new(false),
            was_logged: AtomicBool::new(false),
            log: RwLock::new(Log {
                enabled: true,
                region: None,
                lost: false,
            }),
        }
    }
}

impl State {
    fn change(&self, change: impl FnOnce(&mut Log)) {
        // A poisoned lock: a marking thread panicked, and left nothing half done since it only reads.
        let mut log = self.log.write().unwrap_or_else(PoisonError::into_inner);
        change(&mut log);
        if log.region.is_some() {
            self.was_logged.store(true, Ordering::Relaxed);
        }
        self.active
            .store(log.enabled && log.region.is_some(), Ordering::Release);
    }

    fn with_active<T>(&self, then: impl FnOnce(&RegionLog) -> T) -> Option<T> {
        if !self.active.load(Ordering::Relaxed) {
            return None;
        }
        let log = self.log.read().unwrap_or_else(PoisonError::into_inner);
        log.region.as_ref().filter(|_| log.enabled).map(then)
    }
}

impl DirtyBitmap {
    /// Writes the log from now on, or no longer. The session calls this with VHOST_F_LOG_ALL of each
    /// SET_FEATURES; the log itself stays, as a VMM may set the bit again without sending another.
    pub fn set_enabled(&self, enabled: bool) {
        self.0.change(|log| log.enabled = enabled);
    }

    /// Whether writes are logged.
    pub fn is_active(&self) -> bool {
        self.0.active.load(Ordering::Relaxed)
    }

    /// Whether marks were lost, because the VMM has taken the log's memory away. Asked for every packet once any guest of the
    /// process has lost memory, so it takes no lock where there has been no log.
    pub(super) fn is_log_lost(&self) -> bool {
        if !self.0.was_logged.load(Ordering::Relaxed) {
            return false;
        }
        let log = self.0.log.read().unwrap_or_else(PoisonError::into_inner);
        log.lost || log.region.as_ref().is_some_and(RegionLog::is_lost)
    }
}

impl<'a> WithBitmapSlice<'a> for DirtyBitmap {
    type S = DirtySlice<'a>;
}

impl Bitmap for DirtyBitmap {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.slice_at(0).mark_dirty(offset, len);
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.slice_at(0).dirty_at(offset)
    }

    fn slice_at(&self, offset: usize) -> DirtySlice<'_> {
        DirtySlice {
            state: &self.0,
            base: offset,
        }
    }
}

impl NewBitmap for DirtyBitmap {
    fn with_len(_len: usize) -> DirtyBitmap {
        DirtyBitmap::default()
    }
}

impl BitmapReplace for DirtyBitmap {
    type InnerBitmap = RegionLog;

    fn replace(&self, bitmap: RegionLog) {
        self.0.change(|log| {
            log.lost |= log.region.as_ref().is_some_and(RegionLog::is_lost);
            log.region = Some(bitmap);
        });
    }
}

/// The dirty log from an offset in its region on: what a slice of guest memory carries.
#[derive(Clone, Copy, Debug)]
pub struct DirtySlice<'a> {
    state: &'a State,
    /// Offset in the region in bytes.
    base: usize,
}

impl WithBitmapSlice<'_> for DirtySlice<'_> {
    type S = Self;
}

impl BitmapSlice for DirtySlice<'_> {}

impl Bitmap for DirtySlice<'_> {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.state
            .with_active(|log| log.mark(self.base.saturating_add(offset), len));
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.state
            .with_active(|log| log.is_dirty(self.base.saturating_add(offset)))
            .unwrap_or(false)
    }

    fn slice_at(&self, offset: usize) -> Self {
        DirtySlice {
            state: self.state,
            base: self.base.saturating_add(offset),
        }
    }
}

/// The part of a VMM's dirty log that belongs to one memory region.
#[derive(Debug)]
pub struct RegionLog {
    log: LogMemory,
    /// First guest-physical address of the region.
    start: u64,
    /// Length of the region in bytes, not 0. The bit of its last byte is within `log`.
    len: u64,
}

impl MemRegionBitmap for RegionLog {
    fn new<R: GuestMemoryRegion>(region: &R, log: Arc<MmapLogReg>) -> io::Result<RegionLog> {
        // MmapLogReg keeps its length to itself and panics beyond it. The crate's own bitmap knows how to
        // ask: it refuses a region that is empty, wraps, or whose last page has no bit in the log.
        AtomicBitmapMmap::new(region, Arc::clone(&log))?;
        let (start, len) = (region.start_addr().raw_value(), region.len());
        // Of this region's pages only; for each there is a bit, and the region has at least one.
        let byte = |addr: u64| (addr / LOG_PAGE / 8) as usize;
        let log = Guarded::log(log, byte(start), byte(start + (len - 1)));
        Ok(RegionLog {
            log: LogMemory::Shared(log),
            start,
            len,
        })
    }
}

impl RegionLog {
    fn is_lost(&self) -> bool {
        match &self.log {
            LogMemory::Shared(log) => log.was_hit(),
            #[cfg(test)]
            LogMemory::Private(_) => false,
        }
    }

    fn mark(&self, offset: usize, len: usize) {
        let (offset, len) = (offset as u64, len as u64);
        if len == 0 || offset >= self.len {
            return;
        }
        let last = offset.saturating_add(len - 1).min(self.len - 1);
        for page in (self.start + offset) / LOG_PAGE..=(self.start + last) / LOG_PAGE {
            let (byte, bit) = self.bit(page);
            // The driver of the log reads and clears it by atomic exchange, hence an atomic or
            // (vhost-user.rst, "Migration"). A look first saves the bus a locked write for a page that is
            // dirty already.
            if byte.load(Ordering::Relaxed) & bit == 0 {
                byte.fetch_or(bit, Ordering::Relaxed);
            }
        }
    }

    fn is_dirty(&self, offset: usize) -> bool {
        if offset as u64 >= self.len {
            return false;
        }
        let (byte, bit) = self.bit((self.start + offset as u64) / LOG_PAGE);
        byte.load(Ordering::Relaxed) & bit != 0
    }

    /// `page` is at most the region's last page, so its byte exists.
    fn bit(&self, page: u64) -> (&AtomicU8, u8) {
        let byte = (page / 8) as usize;
        let byte = match &self.log {
            LogMemory::Shared(log) => &log[byte],
            #[cfg(test)]
            LogMemory::Private(log) => &log[byte],
        };
        (byte, 1 << (page % 8))
    }
}

#[derive(Debug)]
enum LogMemory {
    Shared(Guarded<MmapLogReg>),
    /// `MmapLogReg` can be made by the vhost-user-backend crate only.
    #[cfg(test)]
    Private(Arc<Vec<AtomicU8>>),
}

#[cfg(test)]
pub(crate) mod testing {
    use vm_memory::GuestMemoryBackend;

    use super::super::memory::Memory;
    use super::*;

    /// A dirty log that a test can read, installed in every region of a memory.
    pub(crate) struct TestLog(Arc<Vec<AtomicU8>>);

    impl TestLog {
        pub(crate) fn install(memory: &Memory) -> TestLog {
            let last = memory
                .iter()
                .map(|region| region.last_addr().raw_value())
                .max()
                .unwrap();
            let log: Arc<Vec<AtomicU8>> =
                Arc::new((0..=last / LOG_PAGE / 8).map(|_| AtomicU8::new(0)).collect());
            for region in memory.iter() {
                let (start, len) = (region.start_addr().raw_value(), region.len());
                let of_region = RegionLog {
                    log: LogMemory::Private(Arc::clone(&log)),
                    start,
                    len,
                };
                (**region).bitmap().replace(of_region);
            }
            TestLog(log)
        }

        /// Page numbers that were dirty, which are clean afterwards.
        pub(crate) fn take(&self) -> Vec<u64> {
            let mut pages = Vec::new();
            for (i, byte) in self.0.iter().enumerate() {
                let byte = byte.swap(0, Ordering::Relaxed);
                pages.extend(
                    (0..8)
                        .filter(|bit| byte & (1 << bit) != 0)
                        .map(|bit| i as u64 * 8 + bit),
                );
            }
            pages
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::FileExt;
    use std::sync::Mutex;
    use std::thread;

    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
    use vhost::vhost_user::message::VhostUserProtocolFeatures;
    use vhost::vhost_user::{Frontend, Listener, VhostUserFrontend};
    use vhost::{VhostBackend, VhostUserDirtyLogRegion, VhostUserMemoryRegionInfo};
    use vhost_user_backend::{VhostUserBackend, VhostUserDaemon, VringMutex};
    use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic};
    use vmm_sys_util::epoll::EventSet;

    use super::super::memory::{Access, GuestRam, Memory};
    use super::testing::TestLog;
    use super::*;

    const MIB: usize = 1 << 20;

    #[test]
    fn no_log_no_marks() {
        let bitmap = DirtyBitmap::default();
        bitmap.mark_dirty(0, usize::MAX);
        assert!(!bitmap.dirty_at(0));
        assert!(!bitmap.is_active());
    }

    #[test]
    fn pages_are_those_of_guest_physical_memory() {
        // Neither start nor length are on a page border: the last byte is on page 5, which the second region
        // shares.
        let ranges = [(GuestAddress(0x1800), 0x4000), (GuestAddress(0x5800), 0x1000)];
        let memory = Memory::from_ranges(&ranges).unwrap();
        let log = TestLog::install(&memory);
        let write = |addr: u64, len: usize| {
            memory.write_slice(&vec![1; len], GuestAddress(addr)).unwrap();
            log.take()
        };
        assert_eq!(write(0x1800, 1), [1]);
        assert_eq!(write(0x1fff, 2), [1, 2]);
        assert_eq!(write(0x57ff, 1), [5]);
        assert_eq!(write(0x5800, 1), [5]);
        assert_eq!(write(0x1800, 0x5000), [1, 2, 3, 4, 5, 6]);
        assert_eq!(write(0x2000, 0), [0u64; 0]);
    }

    #[test]
    fn marks_beyond_the_region_are_cut_off() {
        let memory = Memory::from_ranges(&[(GuestAddress(0x1000), 0x2000)]).unwrap();
        let log = TestLog::install(&memory);
        let ram = GuestRam::new(Arc::new(memory.clone()));
        let slice = ram.slices(0x2000, 16, Access::Write).next().unwrap().unwrap();
        slice.bitmap().mark_dirty(0, usize::MAX);
        assert_eq!(log.take(), [2]);
        slice.bitmap().mark_dirty(0x1000, 1);
        slice.bitmap().slice_at(usize::MAX).mark_dirty(usize::MAX, 1);
        assert_eq!(log.take(), [0u64; 0]);
        slice.bitmap().mark_dirty(15, 1);
        assert!(slice.bitmap().dirty_at(0) && !slice.bitmap().dirty_at(0x1000));
    }

    #[test]
    fn switching_off_keeps_the_log() {
        let memory = Memory::from_ranges(&[(GuestAddress(0), 0x2000)]).unwrap();
        let ram = GuestRam::new(Arc::new(memory.clone()));
        ram.set_dirty_log_enabled(false);
        let log = TestLog::install(&memory);
        assert!(
            !ram.dirty_log_active(),
            "a log that comes while logging is off is kept and not written"
        );
        memory.write_slice(&[1], GuestAddress(0)).unwrap();
        assert_eq!(log.take(), [0u64; 0]);
        ram.set_dirty_log_enabled(true);
        memory.write_slice(&[1], GuestAddress(0)).unwrap();
        assert_eq!(log.take(), [0]);
    }

    /// Memory that any guest of the process loses makes all of them look at every packet: without a log that must not lock.
    #[test]
    fn whether_a_log_that_never_was_is_lost_takes_no_lock() {
        let bitmap = DirtyBitmap::default();
        let held = bitmap.0.log.write().unwrap();
        let (tell, told) = std::sync::mpsc::channel();
        let asker = bitmap.clone();
        thread::spawn(move || tell.send(asker.is_log_lost()));
        let answer = told.recv_timeout(std::time::Duration::from_secs(10));
        drop(held);
        assert_eq!(answer, Ok(false));
    }

    /// The least that vhost-user-backend serves.
    struct Backend(Mutex<Option<GuestMemoryAtomic<Memory>>>);

    impl VhostUserBackend for Backend {
        type Bitmap = DirtyBitmap;
        type Vring = VringMutex<GuestMemoryAtomic<Memory>>;

        fn num_queues(&self) -> usize {
            1
        }

        fn max_queue_size(&self) -> usize {
            16
        }

        fn features(&self) -> u64 {
            1 << 32 | 1 << 30 | 1 << 26
        }

        fn protocol_features(&self) -> VhostUserProtocolFeatures {
            VhostUserProtocolFeatures::LOG_SHMFD | VhostUserProtocolFeatures::REPLY_ACK
        }

        fn set_event_idx(&self, _enabled: bool) {}

        fn update_memory(&self, memory: GuestMemoryAtomic<Memory>) -> io::Result<()> {
            *self.0.lock().unwrap() = Some(memory);
            Ok(())
        }

        fn queues_per_thread(&self) -> Vec<u64> {
            Vec::new()
        }

        fn handle_event(&self, _: u16, _: EventSet, _: &[Self::Vring], _: usize) -> io::Result<()> {
            Ok(())
        }
    }

    fn memfd(len: usize) -> File {
        let file = memfd_create("dirty", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&file, len as u64).unwrap();
        File::from(file)
    }

    /// A VMM installs a log as it does before it migrates: SET_LOG_BASE through vhost-user-backend, whose
    /// types we plug into.
    #[test]
    fn a_vmms_log_is_written() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vhost-user.sock");
        let backend = Arc::new(Backend(Mutex::new(None)));
        let first = GuestMemoryAtomic::new(Memory::new());
        let mut daemon = VhostUserDaemon::new("dirty".to_owned(), Arc::clone(&backend), first).unwrap();
        let mut listener = Listener::new(&path, true).unwrap();
        let vmm = thread::spawn(move || Frontend::connect(&path, 1).unwrap());
        daemon.start(&mut listener).unwrap();
        let mut vmm = vmm.join().unwrap();

        vmm.set_owner().unwrap();
        let features = vmm.get_features().unwrap();
        vmm.set_features(features).unwrap();
        let protocol = vmm.get_protocol_features().unwrap();
        vmm.set_protocol_features(protocol).unwrap();
        vmm.set_hdr_flags(vhost::vhost_user::message::VhostUserHeaderFlag::NEED_REPLY);
        let ram_file = memfd(2 * MIB);
        let region = |guest_phys_addr: u64, at: usize| VhostUserMemoryRegionInfo {
            guest_phys_addr,
            memory_size: MIB as u64,
            userspace_addr: 0x7000_0000_0000 + at as u64,
            mmap_offset: at as u64,
            mmap_handle: ram_file.as_raw_fd(),
        };
        vmm.set_mem_table(&[region(0, 0), region(0x40_0000, MIB)])
            .unwrap();

        let memory = backend.0.lock().unwrap().as_ref().unwrap().memory().into_inner();
        let ram = GuestRam::new(memory);
        let write = |addr: u64, len: usize| {
            for slice in ram.slices(addr, len, Access::Write) {
                slice.unwrap().copy_from(&vec![1u8; len]);
            }
        };
        write(0x3000, 1);
        assert!(!ram.dirty_log_active());

        // A bit for each page up to the end of the second region: 0x500 pages.
        let log_file = memfd(4096);
        let log = |mmap_size: u64| VhostUserDirtyLogRegion {
            mmap_size,
            mmap_offset: 0,
            mmap_handle: log_file.as_raw_fd(),
        };
        vmm.set_log_base(0, Some(log(0x500 / 8))).unwrap();
        assert!(ram.dirty_log_active());
        write(0x5000, 4097);
        write(0x40_0000 + MIB as u64 - 1, 1);
        let mut bits = vec![0; 4096];
        log_file.read_exact_at(&mut bits, 0).unwrap();
        let dirty: Vec<usize> = (0..4096 * 8)
            .filter(|page| bits[page / 8] & 1 << (page % 8) != 0)
            .collect();
        assert_eq!(dirty, [5, 6, 0x4ff]);

        // The VMM takes the log away: the mark is lost and not the process, and that is known also when another log comes.
        assert!(!ram.is_lost());
        ftruncate(&log_file, 0).unwrap();
        write(0x7000, 1);
        assert!(ram.is_lost());
        assert_eq!(ram.loss(), Some(crate::guest::MemoryLoss::DirtyLog));
        ftruncate(&log_file, 4096).unwrap();
        vmm.set_log_base(0, Some(log(0x500 / 8))).unwrap();
        assert!(ram.is_lost());

        // A log that is one byte too short for the last page is refused; it would make us write past its end.
        assert!(vmm.set_log_base(0, Some(log(0x500 / 8 - 1))).is_err());
        drop(vmm);
        // The crate ends a session in which it refused a message.
        let _ = daemon.wait();
    }
}
