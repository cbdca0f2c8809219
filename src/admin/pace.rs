//! What keeps strangers from having the process work for them without end.
//!
//! A page of metrics costs milliseconds, a state asks each device thread. Sixty clients that pipeline requests for them had the admin
//! thread busy for so long that probes over the other socket timed out, which ends the container, and took time from the guests'
//! own threads. So over TCP one such answer is made at a time, and then nobody's for as long as it took: half of a
//! processor at most, and between two of them it is others' turn. What waits is the flood; a scraper waits for each client once.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Mutex, OwnedMutexGuard};
use tokio::time::Instant;

/// What an answer is taken to cost at least: questions to device threads are not in the time it takes here.
const LEAST: Duration = Duration::from_millis(1);
/// An answer may have taken long because this thread was not scheduled.
const MOST: Duration = Duration::from_millis(50);

/// Hands out turns. Cheap to clone.
#[derive(Clone)]
pub(super) struct Pace(Option<Arc<Mutex<()>>>);

impl Pace {
    /// For strangers.
    pub(super) fn bounded() -> Pace {
        Pace(Some(Arc::default()))
    }

    /// For those who may do anything here anyway.
    pub(super) fn free() -> Pace {
        Pace(None)
    }

    /// Waits for the turn to make an answer. It ends when it is dropped.
    pub(super) async fn turn(&self) -> Turn {
        let turn = match &self.0 {
            Some(turns) => Some(Arc::clone(turns).lock_owned().await),
            None => None,
        };
        Turn {
            turn,
            began: Instant::now(),
        }
    }
}

/// The turn to make an answer.
pub(super) struct Turn {
    turn: Option<OwnedMutexGuard<()>>,
    began: Instant,
}

impl Drop for Turn {
    fn drop(&mut self) {
        let Some(turn) = self.turn.take() else { return };
        let rest = self.began.elapsed().clamp(LEAST, MOST);
        // Who had the turn need not wait for its end.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move {
                tokio::time::sleep(rest).await;
                drop(turn);
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn turns_of_strangers_are_apart_and_others_take_none() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()
            .unwrap();
        runtime.block_on(async {
            let began = Instant::now();
            let pace = Pace::bounded();
            for _ in 0..10 {
                drop(pace.turn().await);
            }
            assert!(began.elapsed() >= LEAST * 9, "{:?}", began.elapsed());
            let slow = pace.turn().await;
            tokio::time::advance(MOST * 10).await;
            drop(slow);
            let since = Instant::now();
            drop(pace.turn().await);
            assert!(since.elapsed() >= MOST && since.elapsed() < MOST * 2);

            let since = Instant::now();
            let free = Pace::free();
            let (_one, _other) = (free.turn().await, free.turn().await);
            assert_eq!(since.elapsed(), Duration::ZERO);
        });
    }
}
