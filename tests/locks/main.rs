//! Moving bytes takes no lock that others hold, and waits for nobody: the kernel says how often the device's thread asks for a futex.
//!
//! A thread that finds a lock taken sleeps by futex(2), one that lets go of a lock which somebody waits for wakes them by it, and so does
//! one that answers another thread. So while bytes flow, what the device shares with others is held by those as often as they can: the
//! metrics are scraped and the log's filter is changed, over and over. That a lock happened to be free whenever the device
//! took it is what this cannot see: `tests/architecture.rs` looks for locks in the source.

mod futexes;
#[path = "../e2e/support/mod.rs"]
#[allow(dead_code, unused_imports)]
mod support;
mod talk;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

use futexes::{Futexes, counted};
use support::{LONG, StopOnDrop, echo, linux, serve, until};
use talk::talk;
use vsock_sidecar::app::Sidecar;
use vsock_sidecar::config::{self, LogFormat};
use vsock_sidecar::embedded_guest::GuestStream;
use vsock_sidecar::logging;
use vsock_sidecar::metrics::Registry;

/// How the names of devices' threads begin.
const DEVICE: &str = "device-";

#[test]
fn bytes_that_flow_wait_for_no_lock() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("web.sock");
    let port = serve(echo);
    let text = format!(
        "guests:\n- name: web\n  cid: 3\n  vhostUser: {{socket: \"{}\"}}\n  \
         outbound: [{{name: echo, port: 7, to: \"tcp://127.0.0.1:{port}\"}}]\n",
        socket.display()
    );
    let (config, _) = config::parse(&text, "test").unwrap();
    let registry = Arc::new(Registry::new().unwrap());
    let (_log, levels) = logging::init(LogFormat::Text, "warn", registry.log_messages()).unwrap();

    let futexes = Futexes::of_threads(DEVICE);
    let its_registry = Arc::clone(&registry);
    let start = move || Sidecar::start(&config, its_registry).unwrap();
    let Some(sidecar) = counted(&futexes, start) else {
        return;
    };
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

    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let stop = StopOnDrop(&over);
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                registry.encode().unwrap();
            }
        });
        scope.spawn(|| {
            // Neither lets through what the data path might say. With the second it is asked for each event whether it is to be.
            for filter in ["warn", "warn,elsewhere=trace"].iter().cycle() {
                if over.load(Ordering::Relaxed) {
                    break;
                }
                levels.set(filter).unwrap();
            }
        });
        all();
        // A service that is slow for a moment is given a buffer, for which others may have the allocator's lock: that takes another
        // try. A lock of the data path would show in all of them.
        let mut counted = 0;
        let quiet = (0..5).any(|_| {
            let before = futexes.count();
            all();
            counted = futexes.count() - before;
            counted == 0
        });
        drop(stop);
        assert!(
            quiet,
            "{counted} futex calls of the device's thread in 64 MiB, the last {}",
            futexes.last()
        );
    });
    drop(streams);
    drop(guest);
    sidecar.stop();
}

/// That it counts at all.
#[test]
fn a_thread_that_waits_for_a_lock_is_seen() {
    let futexes = Futexes::of_threads("waits");
    let lock = Arc::new(Mutex::new(()));
    let held = lock.lock().unwrap();
    let theirs = Arc::clone(&lock);
    let start = move || {
        let wait = move || drop(theirs.lock());
        thread::Builder::new().name("waits".into()).spawn(wait).unwrap()
    };
    let Some(waits) = counted(&futexes, start) else {
        return;
    };
    until("a thread waits for the lock", || futexes.count() > 0);
    drop(held);
    waits.join().unwrap();
}
