//! Bodies of requests, bounded each and together.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use http_body_util::BodyExt;
use hyper::body::{Body, Bytes};
use tokio::time::timeout;

use super::Limits;

/// Why there is no body.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum NoBody {
    /// Longer than allowed.
    TooLong,
    /// Not there in time.
    Late(Duration),
    /// All bodies together are too long.
    Overload,
    /// The client broke off, or sent what is no HTTP.
    Broken,
}

/// The bytes that all bodies may still take.
#[derive(Clone, Debug)]
pub(super) struct Budget(Arc<AtomicUsize>);

/// Bytes that were taken from a budget; given back when dropped.
struct Held<'a> {
    budget: &'a Budget,
    bytes: usize,
}

impl Budget {
    pub(super) fn new(bytes: usize) -> Budget {
        Budget(Arc::new(AtomicUsize::new(bytes)))
    }

    /// Reads a body. `then` sees it while its bytes still count.
    pub(super) async fn read<B, T>(
        &self,
        body: B,
        limits: &Limits,
        then: impl FnOnce(&[u8]) -> T,
    ) -> Result<T, NoBody>
    where
        B: Body<Data = Bytes> + Unpin,
    {
        let mut held = Held {
            budget: self,
            bytes: 0,
        };
        let whole = timeout(limits.body, collect(body, limits.body_bytes, &mut held))
            .await
            .map_err(|_| NoBody::Late(limits.body))??;
        Ok(then(&whole))
    }

    #[cfg(test)]
    fn left(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }
}

async fn collect<B>(mut body: B, most: usize, held: &mut Held<'_>) -> Result<Vec<u8>, NoBody>
where
    B: Body<Data = Bytes> + Unpin,
{
    // What a client announces is no reason to allocate, but to refuse early.
    if body.size_hint().lower() > most as u64 {
        return Err(NoBody::TooLong);
    }
    let mut whole = Vec::new();
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame.map_err(|_| NoBody::Broken)?.into_data() else {
            // Trailers.
            continue;
        };
        if data.len() > most.saturating_sub(whole.len()) {
            return Err(NoBody::TooLong);
        }
        held.take(data.len())?;
        whole.extend_from_slice(&data);
    }
    Ok(whole)
}

impl Held<'_> {
    fn take(&mut self, bytes: usize) -> Result<(), NoBody> {
        let left = |left: usize| left.checked_sub(bytes);
        match self
            .budget
            .0
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, left)
        {
            Ok(_) => {
                self.bytes = self.bytes.saturating_add(bytes);
                Ok(())
            }
            Err(_) => Err(NoBody::Overload),
        }
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.budget.0.fetch_add(self.bytes, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::Full;

    use super::*;

    const LIMITS: Limits = Limits {
        body_bytes: 10,
        ..Limits::DEFAULT
    };

    async fn read(budget: &Budget, bytes: &'static [u8]) -> Result<Vec<u8>, NoBody> {
        budget
            .read(Full::new(Bytes::from_static(bytes)), &LIMITS, <[u8]>::to_vec)
            .await
    }

    #[tokio::test]
    async fn a_body_is_taken_up_to_its_bound() {
        let budget = Budget::new(100);
        assert_eq!(read(&budget, b"0123456789").await.unwrap(), b"0123456789");
        assert_eq!(read(&budget, b"01234567890").await, Err(NoBody::TooLong));
        assert_eq!(budget.left(), 100);
    }

    #[tokio::test]
    async fn all_bodies_share_a_bound_and_give_their_part_back() {
        let budget = Budget::new(15);
        let within = budget.clone();
        let ten = Full::new(Bytes::from_static(b"0123456789"));
        let left = budget.read(ten, &LIMITS, |_| within.left()).await;
        assert_eq!(left, Ok(5));
        let mut held = Held {
            budget: &budget,
            bytes: 0,
        };
        held.take(10).unwrap();
        assert_eq!(read(&budget, b"0123456789").await, Err(NoBody::Overload));
        drop(held);
        assert_eq!(read(&budget, b"0123456789").await.unwrap(), b"0123456789");
    }
}
