//! A guest that does no wrong, all the time: is it harmed by what another one does?

use std::io::{Read, Write};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use vsock_sidecar::embedded_guest::{GuestStream, Sockets};

use crate::support::{Bytes, LONG, linux, until};

/// A pause between rounds: the witness is there to notice, not to take the processor away.
const PAUSE: Duration = Duration::from_millis(1);

/// The well-behaved guest: one connection asks and is answered, another moves bulk. Every byte is compared.
pub struct Witnesses {
    /// `None` once it was dismissed.
    guest: Option<Sockets>,
    seen: Arc<Seen>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Default)]
struct Seen {
    round_trips: AtomicU64,
    bulk_rounds: AtomicU64,
    stop: AtomicBool,
    /// What went wrong first.
    harm: Mutex<Option<String>>,
}

/// How far the witnesses were at a moment.
#[derive(Clone, Copy, Debug)]
pub struct Moment {
    round_trips: u64,
    bulk_rounds: u64,
}

impl Witnesses {
    /// Boots the guest and begins, towards an echo service at `port`. Its own, for neighbours, is at `serves`.
    pub fn begin(socket: &Path, port: u32, serves: u32) -> Witnesses {
        let guest = linux(socket);
        serve(&guest, serves);
        let seen = Arc::new(Seen::default());
        let begin = |name: &'static str, seed: u64, longest: usize, count: fn(&Seen) -> &AtomicU64| {
            let stream = guest.connect(port).unwrap();
            let seen = seen.clone();
            thread::spawn(move || {
                if let Err(error) = rounds(&stream, &seen, seed, longest, count(&seen)) {
                    seen.harm
                        .lock()
                        .unwrap()
                        .get_or_insert(format!("{name}: {error}"));
                }
            })
        };
        let threads = vec![
            begin("round trips", 1, 200, |seen| &seen.round_trips),
            begin("bulk", 2, 100_000, |seen| &seen.bulk_rounds),
        ];
        Witnesses {
            guest: Some(guest),
            seen,
            threads,
        }
    }

    /// How far they are.
    pub fn now(&self) -> Moment {
        Moment {
            round_trips: self.seen.round_trips.load(Ordering::SeqCst),
            bulk_rounds: self.seen.bulk_rounds.load(Ordering::SeqCst),
        }
    }

    /// Waits until both have done something that began after `moment`, unharmed.
    #[track_caller]
    pub fn went_on_since(&self, moment: Moment) {
        until("the other guest goes on", || {
            self.unharmed();
            let now = self.now();
            // Two: the first may have begun before.
            now.round_trips >= moment.round_trips + 2 && now.bulk_rounds >= moment.bulk_rounds + 2
        });
    }

    /// Panics if a byte was lost, or a connection.
    #[track_caller]
    pub fn unharmed(&self) {
        let harm = self.seen.harm.lock().unwrap();
        assert!(harm.is_none(), "the other guest is harmed: {harm:?}");
    }
}

impl Drop for Witnesses {
    fn drop(&mut self) {
        self.seen.stop.store(true, Ordering::SeqCst);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
        if let Some(guest) = self.guest.take()
            && !thread::panicking()
        {
            let violations = guest.stats().violations;
            assert!(violations.is_empty(), "{violations:?}");
            // Its answer to a request that a neighbour has withdrawn may meet the reset.
            assert!(guest.crossed_resets() <= WITHDRAWN, "{}", guest.crossed_resets());
        }
    }
}

/// Connections to the other guest that a row begins and resets.
const WITHDRAWN: u64 = 100;

/// Sends back to neighbours what they send, for as long as the guest lives.
fn serve(guest: &Sockets, port: u32) {
    let listener = guest.listen(port).unwrap();
    thread::spawn(move || {
        while let Ok(stream) = listener.accept() {
            thread::spawn(move || {
                let mut stream = &stream;
                let mut chunk = vec![0; 16 * 1024];
                while let Ok(count @ 1..) = stream.read(&mut chunk) {
                    if stream.write_all(&chunk[..count]).is_err() {
                        break;
                    }
                }
            });
        }
    });
}

/// Sends and compares what comes back, until told to stop.
fn rounds(
    stream: &GuestStream,
    seen: &Seen,
    seed: u64,
    longest: usize,
    count: &AtomicU64,
) -> std::io::Result<()> {
    stream.set_read_timeout(Some(LONG));
    stream.set_write_timeout(Some(LONG));
    let mut stream = stream;
    let mut bytes = Bytes::new(seed);
    for round in 0.. {
        if seen.stop.load(Ordering::SeqCst) {
            break;
        }
        let sent = bytes.take(1 + round * 37 % longest);
        stream.write_all(&sent)?;
        let mut got = vec![0; sent.len()];
        stream.read_exact(&mut got)?;
        if got != sent {
            return Err(std::io::Error::other(format!(
                "round {round}: other bytes came back"
            )));
        }
        count.fetch_add(1, Ordering::SeqCst);
        thread::sleep(PAUSE);
    }
    Ok(())
}
