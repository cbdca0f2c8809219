//! Name resolution that many dials can share.
//!
//! The system's resolver (getaddrinfo: /etc/hosts, nsswitch, search domains; what the pod's owner expects) blocks a
//! thread and cannot be cancelled. So each name has at most one look-up under way, however many dials wait for it, and
//! all names together at most [`MAX_LOOKUPS`]. Names come from the configuration, never from a guest, which bounds the
//! map as well.

use std::collections::HashMap;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Semaphore, watch};
use tokio::time::Instant;

/// Look-ups under way at once, each of which holds a thread of the runtime's blocking pool. A name whose servers are
/// dead keeps one for as long as resolv.conf says (30 seconds are usual); others must find a free one meanwhile.
pub const MAX_LOOKUPS: usize = 16;

/// How long an answer is used again. Long enough that a burst of connections is one look-up, too short for anyone to
/// notice that getaddrinfo does not tell the record's time to live. Failures are not kept.
pub const KEEP: Duration = Duration::from_secs(1);

/// The future of one look-up.
pub type LookupFuture = Pin<Box<dyn Future<Output = io::Result<Vec<SocketAddr>>> + Send>>;

/// Finds the addresses of names; the seam for tests, as /etc/hosts is none.
pub trait Lookup: Send + Sync + 'static {
    /// The addresses of `host`, best first; their ports are of no meaning.
    fn lookup(&self, host: &str) -> LookupFuture;
}

/// The system's resolver.
#[derive(Clone, Copy, Debug)]
pub struct SystemResolver;

impl Lookup for SystemResolver {
    fn lookup(&self, host: &str) -> LookupFuture {
        let host = host.to_owned();
        Box::pin(async move { Ok(tokio::net::lookup_host((host, 0)).await?.collect()) })
    }
}

/// The names that are being looked up or have just been found (invariants 4 and 5).
pub(super) struct Names {
    resolver: Arc<dyn Lookup>,
    permits: Semaphore,
    entries: Mutex<HashMap<String, Entry>>,
}

enum Entry {
    /// A task looks the name up and will put the outcome here.
    UnderWay(watch::Receiver<Option<Outcome>>),
    /// Found, good until then.
    Found(Arc<[SocketAddr]>, Instant),
}

/// `io::Error` cannot be cloned, and every waiting dial gets one: its kind and its text.
type Outcome = Result<Arc<[SocketAddr]>, (io::ErrorKind, Arc<str>)>;

impl Names {
    pub(super) fn new(resolver: Arc<dyn Lookup>) -> Arc<Names> {
        Arc::new(Names {
            resolver,
            permits: Semaphore::new(MAX_LOOKUPS),
            entries: Mutex::default(),
        })
    }

    /// The addresses of `host`, at least one. Dropping the future does not end the look-up, which may have others
    /// waiting for it and which nothing can end.
    ///
    /// # Errors
    /// The resolver's, or "no addresses".
    pub(super) async fn lookup(self: &Arc<Names>, host: &str) -> io::Result<Arc<[SocketAddr]>> {
        let mut answer = match self.begin(host) {
            Begun::Found(addresses) => return Ok(addresses),
            Begun::Wait(answer) => answer,
        };
        let outcome = match answer.wait_for(Option::is_some).await {
            Ok(outcome) => outcome.clone(),
            // The task was dropped with the runtime, or it panicked; the next dial starts another one.
            Err(_) => None,
        };
        match outcome {
            Some(Ok(addresses)) => Ok(addresses),
            Some(Err((kind, text))) => Err(io::Error::new(kind, &*text)),
            None => Err(io::Error::other("the look-up was abandoned")),
        }
    }

    fn begin(self: &Arc<Names>, host: &str) -> Begun {
        let mut entries = self.entries();
        match entries.get(host) {
            Some(Entry::Found(addresses, until)) if Instant::now() < *until => {
                return Begun::Found(Arc::clone(addresses));
            }
            // A sender that is gone without an outcome will never have one.
            Some(Entry::UnderWay(answer)) if answer.has_changed().is_ok() => {
                return Begun::Wait(answer.clone());
            }
            _ => {}
        }
        let (tell, answer) = watch::channel(None);
        entries.insert(host.to_owned(), Entry::UnderWay(answer.clone()));
        drop(entries);
        let names = Arc::clone(self);
        let host = host.to_owned();
        tokio::spawn(async move {
            let outcome = names.ask(&host).await;
            names.settle(host, &outcome);
            tell.send_replace(Some(outcome));
        });
        Begun::Wait(answer)
    }

    async fn ask(&self, host: &str) -> Outcome {
        // Never closed, so the permit is never refused.
        let _permit = self.permits.acquire().await.ok();
        match self.resolver.lookup(host).await {
            Ok(addresses) if addresses.is_empty() => {
                Err((io::ErrorKind::NotFound, "the name has no addresses".into()))
            }
            Ok(addresses) => Ok(alternate_families(&addresses).into()),
            Err(error) => Err((error.kind(), error.to_string().into())),
        }
    }

    fn settle(&self, host: String, outcome: &Outcome) {
        let now = Instant::now();
        let mut entries = self.entries();
        entries.retain(|_, entry| !matches!(entry, Entry::Found(_, until) if *until <= now));
        match outcome {
            Ok(addresses) => entries.insert(host, Entry::Found(Arc::clone(addresses), now + KEEP)),
            Err(_) => entries.remove(&host),
        };
    }

    fn entries(&self) -> MutexGuard<'_, HashMap<String, Entry>> {
        // Every change of the map is one call, so a panic elsewhere cannot leave it half done.
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

enum Begun {
    Found(Arc<[SocketAddr]>),
    Wait(watch::Receiver<Option<Outcome>>),
}

/// Lets the address families take turns (RFC 8305 section 4), beginning with the family of the first and keeping the
/// resolver's order within each: ten dead IPv6 addresses must not use up the time before the first IPv4 address.
fn alternate_families(addresses: &[SocketAddr]) -> Vec<SocketAddr> {
    let Some(first) = addresses.first() else {
        return Vec::new();
    };
    let mut same = addresses
        .iter()
        .filter(|address| address.is_ipv4() == first.is_ipv4());
    let mut other = addresses
        .iter()
        .filter(|address| address.is_ipv4() != first.is_ipv4());
    let mut mixed = Vec::with_capacity(addresses.len());
    while mixed.len() < addresses.len() {
        mixed.extend(same.next());
        mixed.extend(other.next());
    }
    mixed
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use tokio::sync::Notify;

    use super::*;

    /// Counts look-ups; answers when told to, if it is to wait.
    #[derive(Default)]
    struct Counting {
        asked: AtomicUsize,
        at_once: AtomicUsize,
        most_at_once: AtomicUsize,
        gate: Option<Notify>,
        fails: bool,
    }

    struct Shared(Arc<Counting>);

    impl Lookup for Shared {
        fn lookup(&self, _host: &str) -> LookupFuture {
            let counting = Arc::clone(&self.0);
            Box::pin(async move {
                counting.asked.fetch_add(1, Ordering::SeqCst);
                let now = counting.at_once.fetch_add(1, Ordering::SeqCst) + 1;
                counting.most_at_once.fetch_max(now, Ordering::SeqCst);
                if let Some(gate) = &counting.gate {
                    gate.notified().await;
                }
                counting.at_once.fetch_sub(1, Ordering::SeqCst);
                match counting.fails {
                    true => Err(io::Error::other("no such name")),
                    false => Ok(vec!["10.0.0.1:0".parse().unwrap()]),
                }
            })
        }
    }

    fn names(counting: Counting) -> (Arc<Counting>, Arc<Names>) {
        let counting = Arc::new(counting);
        (Arc::clone(&counting), Names::new(Arc::new(Shared(counting))))
    }

    #[tokio::test]
    async fn four_thousand_dials_of_a_name_are_one_look_up() {
        let (counting, names) = names(Counting {
            gate: Some(Notify::new()),
            ..Counting::default()
        });
        let mut dials = tokio::task::JoinSet::new();
        for _ in 0..4096 {
            let names = Arc::clone(&names);
            dials.spawn(async move { names.lookup("db").await.unwrap().len() });
        }
        while counting.asked.load(Ordering::SeqCst) == 0 {
            tokio::task::yield_now().await;
        }
        counting.gate.as_ref().unwrap().notify_one();
        assert_eq!(dials.join_all().await, [1; 4096]);
        assert_eq!(counting.asked.load(Ordering::SeqCst), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_is_kept_for_a_second() {
        let (counting, names) = names(Counting::default());
        names.lookup("db").await.unwrap();
        tokio::time::advance(KEEP - Duration::from_millis(1)).await;
        names.lookup("db").await.unwrap();
        assert_eq!(counting.asked.load(Ordering::SeqCst), 1);
        tokio::time::advance(Duration::from_millis(1)).await;
        names.lookup("db").await.unwrap();
        assert_eq!(counting.asked.load(Ordering::SeqCst), 2);
    }

    #[tokio::test]
    async fn a_failure_is_told_to_all_and_not_kept() {
        let (counting, names) = names(Counting {
            fails: true,
            ..Counting::default()
        });
        let (first, second) = tokio::join!(names.lookup("db"), names.lookup("db"));
        assert_eq!(first.unwrap_err().to_string(), "no such name");
        assert_eq!(second.unwrap_err().to_string(), "no such name");
        assert_eq!(counting.asked.load(Ordering::SeqCst), 1);
        assert!(names.lookup("db").await.is_err());
        assert_eq!(counting.asked.load(Ordering::SeqCst), 2);
        assert!(names.entries().is_empty());
    }

    #[tokio::test]
    async fn a_look_up_outlives_the_dial_that_began_it() {
        let (counting, names) = names(Counting {
            gate: Some(Notify::new()),
            ..Counting::default()
        });
        let impatient = tokio::time::timeout(Duration::ZERO, names.lookup("db"));
        assert!(impatient.await.is_err());
        counting.gate.as_ref().unwrap().notify_one();
        assert_eq!(names.lookup("db").await.unwrap().len(), 1);
        assert_eq!(counting.asked.load(Ordering::SeqCst), 1);
    }

    #[tokio::test]
    async fn look_ups_under_way_are_bounded() {
        let (counting, names) = names(Counting {
            gate: Some(Notify::new()),
            ..Counting::default()
        });
        let mut dials = tokio::task::JoinSet::new();
        for i in 0..100 {
            let names = Arc::clone(&names);
            dials.spawn(async move { names.lookup(&format!("host{i}")).await.is_ok() });
        }
        while !dials.is_empty() {
            counting.gate.as_ref().unwrap().notify_one();
            tokio::task::yield_now().await;
            while let Some(found) = dials.try_join_next() {
                assert!(found.unwrap());
            }
        }
        assert_eq!(counting.asked.load(Ordering::SeqCst), 100);
        assert_eq!(counting.most_at_once.load(Ordering::SeqCst), MAX_LOOKUPS);
    }

    #[tokio::test]
    async fn a_look_up_that_panicked_does_not_block_its_name() {
        struct Panics(AtomicUsize);
        impl Lookup for Panics {
            fn lookup(&self, _host: &str) -> LookupFuture {
                match self.0.fetch_add(1, Ordering::SeqCst) {
                    0 => Box::pin(async { panic!("a bug in the resolver") }),
                    _ => Box::pin(async { Ok(vec!["10.0.0.1:0".parse().unwrap()]) }),
                }
            }
        }
        let names = Names::new(Arc::new(Panics(AtomicUsize::new(0))));
        assert!(names.lookup("db").await.is_err());
        assert!(names.lookup("db").await.is_ok());
    }

    #[test]
    fn families_take_turns() {
        let parse = |list: &[&str]| {
            list.iter()
                .map(|s| s.parse().unwrap())
                .collect::<Vec<SocketAddr>>()
        };
        let list = parse(&["[::1]:0", "[::2]:0", "[::3]:0", "1.1.1.1:0", "2.2.2.2:0"]);
        let want = parse(&["[::1]:0", "1.1.1.1:0", "[::2]:0", "2.2.2.2:0", "[::3]:0"]);
        assert_eq!(alternate_families(&list), want);
        assert_eq!(alternate_families(&want[..1]), want[..1]);
        assert_eq!(alternate_families(&[]), []);
    }
}
