//! Bodies: most are whole before their response begins; a stream is made while it is sent.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};

use http_body_util::Full;
use hyper::body::{Body, Bytes, Frame, SizeHint};

use super::Chunks;

/// A response's body. `on_end` of a stream is called once, when it has ended or is dropped.
pub(super) enum ReplyBody<F: FnOnce() + Unpin> {
    Whole(Full<Bytes>),
    Stream {
        chunks: Box<dyn Chunks>,
        on_end: Option<F>,
    },
}

impl<F: FnOnce() + Unpin> ReplyBody<F> {
    pub(super) fn whole(body: String) -> ReplyBody<F> {
        ReplyBody::Whole(Full::new(Bytes::from(body)))
    }

    pub(super) fn stream(chunks: Box<dyn Chunks>, on_end: F) -> ReplyBody<F> {
        ReplyBody::Stream {
            chunks,
            on_end: Some(on_end),
        }
    }

    fn end(&mut self) {
        if let ReplyBody::Stream { on_end, .. } = self
            && let Some(on_end) = on_end.take()
        {
            on_end();
        }
    }
}

impl<F: FnOnce() + Unpin> Body for ReplyBody<F> {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let chunk = match &mut *self {
            ReplyBody::Whole(whole) => return Pin::new(whole).poll_frame(cx),
            ReplyBody::Stream { chunks, .. } => std::task::ready!(chunks.poll_next(cx)),
        };
        if chunk.is_none() {
            self.end();
        }
        Poll::Ready(chunk.map(|chunk| Ok(Frame::data(Bytes::from(chunk)))))
    }

    fn is_end_stream(&self) -> bool {
        match self {
            ReplyBody::Whole(whole) => whole.is_end_stream(),
            ReplyBody::Stream { .. } => false,
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            ReplyBody::Whole(whole) => whole.size_hint(),
            ReplyBody::Stream { .. } => SizeHint::default(),
        }
    }
}

impl<F: FnOnce() + Unpin> Drop for ReplyBody<F> {
    fn drop(&mut self) {
        self.end();
    }
}
