//! Moving bytes allocates nothing: an allocator counts what the device's thread asks it for, once everything has been warm.

#[path = "e2e/support/mod.rs"]
#[allow(dead_code, unused_imports)]
mod support;
#[path = "locks/talk.rs"]
mod talk;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread;

use support::{LONG, echo, linux, serve};
use talk::talk;
use vsock_sidecar::app::Sidecar;
use vsock_sidecar::config;
use vsock_sidecar::embedded_guest::GuestStream;
use vsock_sidecar::metrics::Registry;

/// The system's allocator, which counts for threads that are called `device-…` while it is told to.
struct Counting;

static COUNTS: AtomicBool = AtomicBool::new(false);
static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);
/// The size of the last one that was counted, for who has to find it.
static LAST_SIZE: AtomicUsize = AtomicUsize::new(0);

#[global_allocator]
static ALLOCATOR: Counting = Counting;

impl Counting {
    fn count(size: usize) {
        if COUNTS.load(Ordering::Relaxed) && is_device_thread() {
            ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
            LAST_SIZE.store(size, Ordering::Relaxed);
        }
    }
}

/// By the kernel's name of the thread: what std knows of it may not be asked for here.
fn is_device_thread() -> bool {
    let mut name = [0u8; 16];
    // SAFETY: PR_GET_NAME writes at most 16 bytes to the buffer, which has as many (prctl(2)).
    let result = unsafe { libc::prctl(libc::PR_GET_NAME, name.as_mut_ptr()) };
    result == 0 && name.starts_with(b"device-")
}

// SAFETY: everything is left to the system's allocator, which keeps the contract; counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        Counting::count(layout.size());
        // SAFETY: the caller's promise is handed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise is handed on.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        Counting::count(size);
        // SAFETY: the caller's promise is handed on.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[test]
fn bytes_that_flow_allocate_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("web.sock");
    let port = serve(echo);
    let text = format!(
        "guests:\n- name: web\n  cid: 3\n  vhostUser: {{socket: \"{}\"}}\n  \
         outbound: [{{name: echo, port: 7, to: \"tcp://127.0.0.1:{port}\"}}]\n",
        socket.display()
    );
    let (config, _) = config::parse(&text, "test").unwrap();
    let sidecar = Sidecar::start(&config, Arc::new(Registry::new().unwrap())).unwrap();
    let guest = linux(&socket);
    let streams: Vec<GuestStream> = (0..4).map(|_| guest.connect(7).unwrap()).collect();
    for stream in &streams {
        stream.set_read_timeout(Some(LONG));
        stream.set_write_timeout(Some(LONG));
    }
    let all = || {
        thread::scope(|scope| {
            for (seed, stream) in streams.iter().enumerate() {
                scope.spawn(move || talk(stream, seed as u64));
            }
        });
    };
    // What grows with its use has grown: rings' scratch, lists of the law, buffers of services that were slow.
    for _ in 0..3 {
        all();
    }
    // A service that is slow for a moment is given a buffer, which is no steady state: on a busy machine that takes another try.
    let mut counted = 0;
    let quiet = (0..10).any(|_| {
        ALLOCATIONS.store(0, Ordering::SeqCst);
        COUNTS.store(true, Ordering::SeqCst);
        all();
        COUNTS.store(false, Ordering::SeqCst);
        counted = ALLOCATIONS.load(Ordering::SeqCst);
        counted == 0
    });
    let size = LAST_SIZE.load(Ordering::SeqCst);
    assert!(quiet, "{counted} allocations in 64 MiB, the last of {size} bytes");

    // That it counts at all: a connection is made of something.
    COUNTS.store(true, Ordering::SeqCst);
    drop(guest.connect(7).unwrap());
    COUNTS.store(false, Ordering::SeqCst);
    assert!(ALLOCATIONS.load(Ordering::SeqCst) > 0);
    drop(streams);
    drop(guest);
    sidecar.stop();
}
