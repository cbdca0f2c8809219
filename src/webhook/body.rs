//! Bodies of requests, bounded each and together.
//!
//! What they have in common is a budget, and who fills it keeps others out. So it is for what is long only: the first
//! [`Limits::ordinary_body`] bytes, which is more than most pods have, are each connection's own, and a few long bodies that are sent
//! slowly hold up other long ones, not the reviews of the day.

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

/// The bytes that all bodies may still take beyond their own.
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
        let whole = timeout(limits.body, collect(body, limits, &mut held))
            .await
            .map_err(|_| NoBody::Late(limits.body))??;
        Ok(then(&whole))
    }

    #[cfg(test)]
    fn left(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }
}

async fn collect<B>(mut body: B, limits: &Limits, held: &mut Held<'_>) -> Result<Vec<u8>, NoBody>
where
    B: Body<Data = Bytes> + Unpin,
{
    let most = limits.body_bytes;
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
        let length = whole.len().saturating_add(data.len());
        if length > whole.capacity() {
            // Doubled, so that each byte is copied a few times at most, and counted as it is allocated.
            let capacity = whole.capacity().saturating_mul(2).min(most).max(length);
            held.hold(capacity.saturating_sub(limits.ordinary_body))?;
            whole.reserve_exact(capacity.saturating_sub(whole.len()));
        }
        whole.extend_from_slice(&data);
    }
    Ok(whole)
}

impl Held<'_> {
    /// Holds so many bytes from now on, which are no fewer than before.
    fn hold(&mut self, bytes: usize) -> Result<(), NoBody> {
        let more = bytes.saturating_sub(self.bytes);
        let left = |left: usize| left.checked_sub(more);
        match self
            .budget
            .0
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, left)
        {
            Ok(_) => {
                self.bytes = self.bytes.saturating_add(more);
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
    use std::collections::VecDeque;
    use std::convert::Infallible;
    use std::pin::Pin;
    use std::task::{Context, Poll};

    use http_body_util::Full;
    use hyper::body::Frame;

    use super::*;

    /// A body that comes in several parts.
    struct Pieces(VecDeque<&'static str>);

    impl Body for Pieces {
        type Data = Bytes;
        type Error = Infallible;

        fn poll_frame(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
            let next = self.0.pop_front();
            Poll::Ready(next.map(|piece| Ok(Frame::data(Bytes::from(piece)))))
        }
    }

    const LIMITS: Limits = Limits {
        body_bytes: 10,
        ordinary_body: 4,
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
        let budget = Budget::new(9);
        let within = budget.clone();
        let ten = Full::new(Bytes::from_static(b"0123456789"));
        let left = budget.read(ten, &LIMITS, |_| within.left()).await;
        assert_eq!(left, Ok(3));
        let mut held = Held {
            budget: &budget,
            bytes: 0,
        };
        held.hold(9).unwrap();
        assert_eq!(read(&budget, b"0123456789").await, Err(NoBody::Overload));
        // Who sends long bodies slowly holds up nobody whose pod is an ordinary one.
        assert_eq!(read(&budget, b"0123").await.unwrap(), b"0123");
        drop(held);
        assert_eq!(read(&budget, b"0123456789").await.unwrap(), b"0123456789");
    }

    /// In pieces as they come from a socket; what is allocated is what counts.
    #[tokio::test]
    async fn a_body_in_pieces_is_counted_as_it_is_allocated() {
        let budget = Budget::new(100);
        let within = budget.clone();
        let body = Pieces(["012", "345", "6"].into());
        let read = budget
            .read(body, &LIMITS, |whole| (whole.to_vec(), within.left()))
            .await;
        // Three, six, ten bytes of room, of which four are its own.
        assert_eq!(read, Ok((b"0123456".to_vec(), 94)));
        assert_eq!(budget.left(), 100);
    }
}
