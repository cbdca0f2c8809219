//! What happened, and what must be true at the end.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::support::{LONG, Sidecar, until};

/// Counts of what was done and of what went wrong.
#[derive(Default)]
pub struct Ledger {
    counts: Mutex<BTreeMap<&'static str, u64>>,
    failures: Mutex<Vec<String>>,
    failed: AtomicBool,
}

impl Ledger {
    pub fn count(&self, what: &'static str, n: u64) {
        *self.counts.lock().unwrap().entry(what).or_default() += n;
    }

    /// Something that nothing excuses.
    pub fn fail(&self, what: String) {
        eprintln!("soak: {what}");
        self.failed.store(true, Ordering::Relaxed);
        self.failures.lock().unwrap().push(what);
    }

    pub fn has_failed(&self) -> bool {
        self.failed.load(Ordering::Relaxed)
    }

    pub fn print(&self, time: Duration) {
        println!("soak of {time:?}:");
        for (what, count) in self.counts.lock().unwrap().iter() {
            println!("  {count:>14}  {what}");
        }
    }

    #[track_caller]
    pub fn judge(&self) {
        let failures = self.failures.lock().unwrap();
        assert!(failures.is_empty(), "{failures:#?}");
        let counts = self.counts.lock().unwrap();
        // Each path must have been walked, or the soak shows nothing.
        for path in [
            "bytes: guest to service and back",
            "bytes: client to guest and back",
            "bytes: guest to guest and back",
            "messages: packet socket",
            "messages: frames",
            "messages: guest to guest",
            "refusals seen by the guest",
            "reboots",
            "VMMs killed",
            "packets of garbage",
            "scrapes",
            "reloads",
            "reloads refused",
        ] {
            assert!(
                counts.get(path).is_some_and(|count| *count > 0),
                "nothing for {path:?}"
            );
        }
    }
}

/// What the process holds when nothing is going on.
#[derive(Debug)]
pub struct Leaks {
    descriptors: usize,
    threads: usize,
    memory: u64,
}

impl Leaks {
    /// Waits until nothing is going on, then looks.
    pub fn at_rest(sidecar: &Sidecar) -> Leaks {
        for guest in ["web", "db"] {
            for direction in ["guest_to_host", "host_to_guest"] {
                let labels = [("guest", guest), ("direction", direction)];
                sidecar.until_metric("vsock_connections_active", &labels, 0.0);
                sidecar.until_metric("vsock_buffered_bytes", &labels, 0.0);
            }
        }
        // Sockets that linger are closed after five seconds; resolver threads end after ten.
        let mut least = sidecar.descriptors();
        let mut same = 0;
        until("the number of descriptors comes to rest", || {
            std::thread::sleep(Duration::from_millis(100));
            let now = sidecar.descriptors();
            same = if now < least { 0 } else { same + 1 };
            least = least.min(now);
            same > (LONG.as_millis() / 400) as u32
        });
        Leaks {
            descriptors: least,
            threads: sidecar.threads(),
            memory: sidecar.anonymous_memory(),
        }
    }

    /// Compares with what was held before.
    #[track_caller]
    pub fn judge(&self, after: &Leaks) {
        println!("  before: {self:?}\n   after: {after:?}");
        assert!(
            after.descriptors <= self.descriptors,
            "descriptors leak: {self:?}, {after:?}"
        );
        assert!(after.threads <= self.threads, "threads leak: {self:?}, {after:?}");
        // Fragments and caches come and go; a leak of 100 bytes a connection would be many times this.
        assert!(
            after.memory <= self.memory + (4 << 20) + self.memory / 4,
            "memory leaks: {self:?}, {after:?}"
        );
    }
}

/// Counters that say the same thing twice agree.
#[track_caller]
pub fn judge_counters(sidecar: &Sidecar) {
    let total = |family: &str, guest: &str| sidecar.metric(family, &[("guest", guest)]);
    for guest in ["web", "db", "rogue"] {
        let (opened, closed) = (
            total("vsock_connections_opened_total", guest),
            total("vsock_connections_closed_total", guest),
        );
        println!("  {guest}: opened {opened}, closed {closed}");
        assert_eq!(
            opened, closed,
            "{guest}: connections opened and closed, none being active"
        );
    }
    let between = |guest: &str, direction: &str, rule: &str| {
        let labels = [("guest", guest), ("direction", direction), ("rule", rule)];
        sidecar.metric("vsock_connections_opened_total", &labels)
    };
    // What one guest dialled, the other was dialled. (One may hear of it after the other has gone.)
    for (from, to) in [("web", "db"), ("db", "web")] {
        let dialled = between(from, "guest_to_host", "peer");
        let answered = between(to, "host_to_guest", &format!("guest://{from}"));
        println!("  {from} -> {to}: {dialled} dialled, {answered} accepted");
        assert!(
            dialled <= answered,
            "{from} has connections to {to} that {to} knows nothing of"
        );
    }
}
