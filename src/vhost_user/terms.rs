//! What a session is told when it begins, and keeps to its end: the VMM and the driver have read it, and nothing in the protocol
//! takes it back.

use std::sync::{Arc, Mutex};

use super::AccessPlatform;
use super::link::lock;
use super::negotiation::NegotiationWatch;

/// What of the configuration a session keeps.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SessionTerms {
    /// The guest's context identifier.
    pub cid: u32,
    /// What VIRTIO_F_ACCESS_PLATFORM means.
    pub access_platform: AccessPlatform,
}

/// The terms of a guest's sessions: those of the one under way, and those of the next.
#[derive(Debug)]
pub struct Terms {
    inner: Mutex<Inner>,
    watch: Arc<NegotiationWatch>,
}

#[derive(Debug)]
struct Inner {
    next: SessionTerms,
    current: Option<SessionTerms>,
}

impl Terms {
    pub(super) fn new(first: SessionTerms, watch: Arc<NegotiationWatch>) -> Arc<Terms> {
        Arc::new(Terms {
            inner: Mutex::new(Inner {
                next: first,
                current: None,
            }),
            watch,
        })
    }

    /// The terms of sessions that begin from now on.
    pub fn set(&self, next: SessionTerms) {
        let mut inner = lock(&self.inner);
        inner.next = next;
        if inner.current.is_none() {
            self.watch.set_terms(next);
        }
    }

    /// The terms of the session under way and those of the next one, where they differ.
    pub fn pending(&self) -> Option<(SessionTerms, SessionTerms)> {
        let inner = lock(&self.inner);
        let current = inner.current?;
        (current != inner.next).then_some((current, inner.next))
    }

    /// A session begins.
    pub(super) fn begin(&self) -> SessionTerms {
        let mut inner = lock(&self.inner);
        inner.current = Some(inner.next);
        self.watch.set_terms(inner.next);
        inner.next
    }

    /// It has ended.
    pub(super) fn end(&self) {
        let mut inner = lock(&self.inner);
        inner.current = None;
        self.watch.set_terms(inner.next);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vhost_user::{Mode, testing};

    #[test]
    fn a_session_keeps_its_terms_and_the_next_one_has_others() {
        let watch = testing::watch(Mode::Server);
        let [old, new] = [3, 4].map(|cid| SessionTerms {
            cid,
            access_platform: AccessPlatform::Auto,
        });
        let terms = Terms::new(old, Arc::clone(&watch));
        assert_eq!(terms.begin(), old);
        terms.set(new);
        assert_eq!(terms.pending(), Some((old, new)));
        assert_eq!(watch.snapshot().cid, 3);
        terms.end();
        assert_eq!((terms.pending(), watch.snapshot().cid), (None, 4));
        terms.set(old);
        assert_eq!(watch.snapshot().cid, 3, "nobody has been told another one");
        assert_eq!(terms.begin(), old);
    }
}
