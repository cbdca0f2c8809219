//! Shared memory that its owner takes away: SIGBUS costs the memory's user, not the process.
//!
//! A VMM shares guest memory as a mapping of a file that it can still shorten. Whoever then touches a page behind the new
//! end gets SIGBUS, whose default is the end of the process with all its guests. The same signal comes when a page cannot
//! be had although the file is long enough: a tmpfs that is full, huge pages that ran out, memory that has failed.
//! (A system call that is given such an address answers EFAULT instead, without a signal.)
//!
//! [`Guarded`] memory is known to a handler of that signal. A fault in it puts zero pages in the place of the rest of that
//! mapping, notes that this has happened, and lets the program go on; whoever owns the memory asks
//! [`Guarded::was_hit`] before it believes what it has read. Any other SIGBUS is as fatal as ever, by the same signal.
//!
//! # The handler
//!
//! It may interrupt anything, so it takes no lock and allocates nothing: it reads a list of atomics and calls mmap(), which
//! with rt_sigreturn() is all that a seccomp filter has to allow it (rt_sigaction() and tgkill() too, where the process is to die).
//! The list grows by chunks that are never freed; a range that is being changed meanwhile is skipped, since it
//! is not the one that was touched: a range is listed before its first access and struck off after its last, and before it is unmapped,
//! when others may get the address ([`Guarded`] holds the mapping, and says so by the order of its fields).
//!
//! What the handler maps is as long as the kernel wants it: over huge pages only whole ones are replaced, and only
//! the kernel knows how big they are, so sizes are tried from the smallest on (EINVAL, `hugetlb_vm_op_split` in mm/hugetlb.c).

use std::io;
use std::ops::{Deref, Range};
use std::ptr;
use std::sync::atomic::{
    AtomicBool, AtomicI32, AtomicPtr, AtomicU64, AtomicUsize, Ordering, compiler_fence, fence,
};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use libc::{c_int, c_void, siginfo_t};
use vhost_user_backend::bitmap::MmapLogReg;
use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, MmapRegion};

/// Ranges in a chunk of the list.
const CHUNK: usize = 64;
/// The largest page that is tried: 16 GiB, of arm64 with pages of 64 KiB.
const LARGEST_PAGE: usize = 1 << 34;

/// Shared memory whose loss is contained. It stays mapped as long as this lives.
#[derive(Debug)]
pub struct Guarded<T> {
    // Dropped before `memory`, which may be the last reference to it: an address that is unmapped is no longer ours.
    ranges: Vec<Listed>,
    memory: Arc<T>,
}

impl<B: Bitmap> Guarded<GuestMemoryMmap<B>> {
    /// Guards every region of guest memory.
    pub fn regions(memory: Arc<GuestMemoryMmap<B>>) -> Guarded<GuestMemoryMmap<B>> {
        let ranges = memory
            .iter()
            .map(|region| {
                let start = region.as_ptr().addr();
                Listed::new(start..start.saturating_add(region.size()))
            })
            .collect();
        Guarded { ranges, memory }
    }
}

impl<B: Bitmap> Guarded<MmapRegion<B>> {
    /// Guards a single mapping.
    pub fn mapping(memory: Arc<MmapRegion<B>>) -> Guarded<MmapRegion<B>> {
        let start = memory.as_ptr().addr();
        Guarded {
            ranges: vec![Listed::new(start..start.saturating_add(memory.size()))],
            memory,
        }
    }
}

impl Guarded<MmapLogReg> {
    /// Guards the bytes `first` to `last` of a dirty log. Both lie within it.
    pub fn log(memory: Arc<MmapLogReg>, first: usize, last: usize) -> Guarded<MmapLogReg> {
        let [start, end] = [first, last].map(|at| ptr::from_ref(&memory[at]).addr());
        Guarded {
            ranges: vec![Listed::new(start..end.saturating_add(1))],
            memory,
        }
    }
}

impl<T> Guarded<T> {
    /// Whether a part of this memory could not be had when it was touched. From then on zeros are there instead.
    pub fn was_hit(&self) -> bool {
        after_the_access();
        self.ranges
            .iter()
            .any(|listed| listed.0.hit.load(Ordering::Relaxed))
    }

    /// The memory, which may be held for longer than it is guarded, and then must not be touched.
    pub fn memory(&self) -> &Arc<T> {
        &self.memory
    }
}

impl<T> Deref for Guarded<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.memory
    }
}

/// How many faults have been contained in this process; as long as it stays the same nobody's memory was hit.
pub fn contained() -> u64 {
    after_the_access();
    CONTAINED.load(Ordering::Relaxed)
}

/// What is asked next is asked after guest memory was read. The handler may have run on this very thread at that access, or on
/// another one, whose zeros were read: it has told of them before it put them there.
fn after_the_access() {
    compiler_fence(Ordering::SeqCst);
    fence(Ordering::Acquire);
}

/// Counts a loss that showed by EFAULT, so that readers of [`contained`] look.
pub fn count_fault() {
    CONTAINED.fetch_add(1, Ordering::Relaxed);
}

/// Installs the handler. Guarding memory does so as well; a process that forbids itself system calls does it before that.
pub fn install() -> io::Result<()> {
    static OUTCOME: OnceLock<Result<(), i32>> = OnceLock::new();
    OUTCOME
        .get_or_init(|| set_handler().map_err(|error| error.raw_os_error().unwrap_or(0)))
        .map_err(io::Error::from_raw_os_error)
}

static CONTAINED: AtomicU64 = AtomicU64::new(0);
/// The newest chunk.
static CHUNKS: AtomicPtr<Chunk> = AtomicPtr::new(ptr::null_mut());
/// Entries of the chunks that are in nobody's hand.
static FREE: Mutex<Vec<&'static Entry>> = Mutex::new(Vec::new());

/// A range of addresses that the handler looks at.
#[derive(Debug)]
struct Entry {
    /// Odd while the range is being changed.
    version: AtomicUsize,
    start: AtomicUsize,
    /// Address behind the last byte; not above `start` if there is nothing in the range.
    end: AtomicUsize,
    hit: AtomicBool,
}

impl Entry {
    const fn new() -> Entry {
        Entry {
            version: AtomicUsize::new(0),
            start: AtomicUsize::new(0),
            end: AtomicUsize::new(0),
            hit: AtomicBool::new(false),
        }
    }

    /// Only by who took it from [`FREE`].
    fn set(&self, range: Range<usize>) {
        let version = self.version.load(Ordering::Relaxed);
        self.version.store(version.wrapping_add(1), Ordering::Relaxed);
        fence(Ordering::Release);
        self.start.store(range.start, Ordering::Relaxed);
        self.end.store(range.end, Ordering::Relaxed);
        self.hit.store(false, Ordering::Relaxed);
        self.version.store(version.wrapping_add(2), Ordering::Release);
    }

    /// The range, unless it is being changed.
    fn range(&self) -> Option<Range<usize>> {
        let version = self.version.load(Ordering::Acquire);
        let range = self.start.load(Ordering::Relaxed)..self.end.load(Ordering::Relaxed);
        fence(Ordering::Acquire);
        (version.is_multiple_of(2) && version == self.version.load(Ordering::Relaxed)).then_some(range)
    }
}

struct Chunk {
    entries: [Entry; CHUNK],
    /// An older one.
    next: Option<&'static Chunk>,
}

/// The chunks, from the newest on.
fn chunks() -> impl Iterator<Item = &'static Chunk> {
    // SAFETY: null, or what `Listed::new` has stored there with Release: a chunk that is leaked, so that it is valid for ever,
    // and of which only atomics change.
    let newest = unsafe { CHUNKS.load(Ordering::Acquire).as_ref() };
    std::iter::successors(newest, |chunk| chunk.next)
}

/// A range that is in the list as long as this lives.
#[derive(Debug)]
struct Listed(&'static Entry);

impl Listed {
    fn new(range: Range<usize>) -> Listed {
        // Without a handler the process is as it was: one that could not install it has said so at its start.
        let _ = install();
        let mut free = FREE.lock().unwrap_or_else(PoisonError::into_inner);
        if free.is_empty() {
            let chunk: &'static mut Chunk = Box::leak(Box::new(Chunk {
                entries: [const { Entry::new() }; CHUNK],
                next: chunks().next(),
            }));
            // As many as were ever guarded at once, rounded up: leaked, because a handler may be looking at them.
            CHUNKS.store(chunk, Ordering::Release);
            free.extend(chunks().next().iter().flat_map(|chunk| &chunk.entries));
        }
        let entry = free.pop().unwrap_or_else(|| Box::leak(Box::new(Entry::new())));
        entry.set(range);
        Listed(entry)
    }
}

impl Drop for Listed {
    fn drop(&mut self) {
        self.0.set(0..0);
        FREE.lock().unwrap_or_else(PoisonError::into_inner).push(self.0);
    }
}

/// What was done at SIGBUS before us: address of a handler, SIG_DFL or SIG_IGN.
static PREVIOUS: AtomicUsize = AtomicUsize::new(libc::SIG_DFL);
/// `sa_flags` of it.
static PREVIOUS_FLAGS: AtomicI32 = AtomicI32::new(0);
static PAGE: AtomicUsize = AtomicUsize::new(4096);

fn set_handler() -> io::Result<()> {
    PAGE.store(rustix::param::page_size(), Ordering::Relaxed);
    let remember = |previous: &libc::sigaction| {
        PREVIOUS.store(previous.sa_sigaction, Ordering::Relaxed);
        PREVIOUS_FLAGS.store(previous.sa_flags, Ordering::Relaxed);
    };
    // Before ours is in place, too: it may be called at once.
    remember(&action(None)?);
    // SAFETY: sigaction is a C structure for which all zeros is a value: the default action, an empty mask.
    let mut ours: libc::sigaction = unsafe { std::mem::zeroed() };
    ours.sa_sigaction = on_sigbus as *const () as usize;
    // On the alternate stack, as the standard library's handler that it precedes: that one tells of overflown stacks.
    ours.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    remember(&action(Some(&ours))?);
    Ok(())
}

/// What is done at SIGBUS; from now on `new`, if there is one.
fn action(new: Option<&libc::sigaction>) -> io::Result<libc::sigaction> {
    // SAFETY: as in `set_handler`.
    let mut old: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: `new` is null or a valid sigaction whose handler, `on_sigbus` or the default, has the type that its flags
    // say and may run at any time on any thread; `old` is ours to be written.
    let result = unsafe { libc::sigaction(libc::SIGBUS, new.map_or(ptr::null(), ptr::from_ref), &mut old) };
    if result == 0 {
        Ok(old)
    } else {
        Err(io::Error::last_os_error())
    }
}

/// The handler. Only calls what is async-signal-safe.
extern "C" fn on_sigbus(signal: c_int, info: *mut siginfo_t, context: *mut c_void) {
    // SAFETY: the thread's errno, which whom we interrupt may be about to read: it is put back below.
    let errno = unsafe { *libc::__errno_location() };
    // SAFETY: the kernel hands over a valid siginfo_t (SA_SIGINFO); that of a signal with a positive code has an address,
    // and of others that field is read as what it is, some integer, and not used.
    let (code, address) = unsafe { ((*info).si_code, (*info).si_addr().addr()) };
    if code <= 0 || !contain(address) {
        pass_on(signal, code, info, context);
    }
    // SAFETY: as above.
    unsafe { *libc::__errno_location() = errno };
}

/// Makes the page at `address` accessible if it is in guarded memory.
fn contain(address: usize) -> bool {
    let holds = |entry: &&Entry| entry.range().is_some_and(|range| range.contains(&address));
    let entries = || chunks().flat_map(|chunk| &chunk.entries).filter(holds);
    let Some(range) = entries().find_map(Entry::range) else {
        return false;
    };
    // Before there are zeros to be read, since other threads have no fault there any more. If none can be put there the process
    // ends, whatever was told. A region may be guarded more than once: tables share it. Each must know.
    entries().for_each(|entry| entry.hit.store(true, Ordering::Relaxed));
    CONTAINED.fetch_add(1, Ordering::Release);
    replace(address, &range)
}

/// Maps zeros from the page at `address` on to the end of the range, or as far as that can be had.
fn replace(address: usize, range: &Range<usize>) -> bool {
    let smallest = PAGE.load(Ordering::Relaxed);
    let mut page = smallest;
    while page <= LARGEST_PAGE {
        let start = address & !(page - 1);
        // What begins before the mapping is no page of it.
        let Some(end) = range
            .end
            .checked_next_multiple_of(page)
            .filter(|_| start >= range.start & !(smallest - 1))
        else {
            return false;
        };
        // All of the rest, so that a mapping is replaced once and not page by page; where so much is not given (strict
        // overcommitment), the page.
        match map_zeros(start, end - start).or_else(|_| map_zeros(start, page)) {
            Ok(()) => return true,
            // Pages are larger.
            Err(libc::EINVAL) => page *= 2,
            Err(_) => return false,
        }
    }
    false
}

fn map_zeros(start: usize, len: usize) -> Result<(), c_int> {
    // SAFETY: [start, start + len) lies in one mapping, of which a `Guarded` holds a reference for as long as its range is
    // listed, and whoever faulted there is in the middle of an access to it: so it is mapped, and remains so. The
    // kernel maps whole pages, so the mapping ends at the end of the page in which the range does; where its pages are larger than
    // `len` assumes it refuses. The memory is shared with others and accessed as volatile or atomic only, so what
    // it contains may change at any time.
    let mapped = unsafe {
        libc::mmap(
            ptr::without_provenance_mut(start),
            len,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE,
            -1,
            0,
        )
    };
    if mapped == libc::MAP_FAILED {
        // SAFETY: the thread's errno.
        return Err(unsafe { *libc::__errno_location() });
    }
    Ok(())
}

/// Does what would have been done without us.
fn pass_on(signal: c_int, code: c_int, info: *mut siginfo_t, context: *mut c_void) {
    match PREVIOUS.load(Ordering::Relaxed) {
        libc::SIG_IGN if code <= 0 => return,
        // A fault that is ignored is fatal to the kernel, too.
        libc::SIG_DFL | libc::SIG_IGN => {
            // SAFETY: all zeros is the default action.
            let default: libc::sigaction = unsafe { std::mem::zeroed() };
            let _ = action(Some(&default));
        }
        handler if PREVIOUS_FLAGS.load(Ordering::Relaxed) & libc::SA_SIGINFO != 0 => {
            // SAFETY: the kernel gave us this address as that of a handler with SA_SIGINFO, which is of this type; it
            // gets what it would have got, on the same stack.
            let handler: extern "C" fn(c_int, *mut siginfo_t, *mut c_void) =
                unsafe { std::mem::transmute(ptr::without_provenance::<()>(handler)) };
            handler(signal, info, context);
        }
        handler => {
            // SAFETY: as above, of a handler without SA_SIGINFO.
            let handler: extern "C" fn(c_int) =
                unsafe { std::mem::transmute(ptr::without_provenance::<()>(handler)) };
            handler(signal);
        }
    }
    // A fault comes again when we return. What was sent does not: the standard library's handler sets the default for that next
    // time, and so do we.
    let is_default = action(None).is_ok_and(|now| now.sa_sigaction == libc::SIG_DFL);
    if code <= 0 && is_default {
        // SAFETY: raise() has no preconditions; the signal is blocked until this handler returns.
        unsafe { libc::raise(signal) };
    }
}

#[cfg(test)]
#[path = "tests/sigbus.rs"]
mod tests;
