//! Bytes that a host socket would not take yet.
//!
//! A guest sends within the credit we promised it (`buf_alloc`). What its socket takes at once never comes here; the
//! rest is copied out of guest memory, so that the descriptor can go back, and leaves when the socket is writable.
//! `fwd_cnt` counts only what the socket took, hence a guest that keeps to its credit can never overflow this.

use std::fmt;
use std::io::{self, IoSlice};

use super::HostStream;

/// The first allocation, in bytes; it doubles from here up to the limit.
const FIRST_CAPACITY: usize = 4096;

/// A ring of bytes between a guest and its host socket (invariant 1: never more than the limit, in content or in
/// memory).
///
/// Holds no memory while empty, which is what 100,000 idle connections have.
pub struct SpillBuf {
    /// The ring's memory: empty, or a size between [`FIRST_CAPACITY`] and `limit`.
    ring: Box<[u8]>,
    /// Index of the oldest byte; below `ring.len()`, or 0.
    head: usize,
    /// Bytes held; at most `ring.len()`.
    len: usize,
    /// `buf_alloc`, in bytes.
    limit: usize,
}

/// More bytes than the limit leaves room for: the guest has sent beyond its credit.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{wanted} bytes do not fit into the {room} that are left of the buffer")]
pub struct SpillFull {
    /// Bytes to add.
    pub wanted: usize,
    /// Bytes that would have fitted.
    pub room: usize,
}

/// What one [`SpillBuf::write_to`] did. Both halves count: bytes may have gone out before the socket failed.
#[must_use = "written bytes advance fwd_cnt and the error ends the connection"]
#[derive(Debug)]
pub struct Flush {
    /// Bytes the socket took, in this call.
    pub written: usize,
    /// How the socket failed, if it did. "Would block" is no failure.
    pub error: Option<io::Error>,
}

impl SpillBuf {
    /// An empty buffer that will hold at most `limit` bytes. Allocates nothing.
    pub fn new(limit: usize) -> SpillBuf {
        SpillBuf {
            ring: Box::default(),
            head: 0,
            len: 0,
            limit,
        }
    }

    /// Appends `bytes`.
    ///
    /// # Errors
    /// [`SpillFull`]; then nothing is appended.
    pub fn extend(&mut self, bytes: &[u8]) -> Result<(), SpillFull> {
        let mut rest = bytes;
        self.extend_with(bytes.len(), |piece| {
            if let Some((now, later)) = rest.split_at_checked(piece.len()) {
                piece.copy_from_slice(now);
                rest = later;
            }
            Ok(())
        })
    }

    /// Appends `n` bytes that `fill` writes: it is called for each piece of free memory, once or twice, in order, with
    /// pieces that are `n` bytes together. What a piece contains before is of no meaning.
    ///
    /// # Errors
    /// [`SpillFull`], in which case `fill` was not called; or the first error of `fill`. Either way nothing is appended.
    pub fn extend_with<E: From<SpillFull>>(
        &mut self,
        n: usize,
        mut fill: impl FnMut(&mut [u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        if n > self.room() {
            return Err(E::from(SpillFull {
                wanted: n,
                room: self.room(),
            }));
        }
        if n == 0 {
            return Ok(());
        }
        self.grow_for(n);
        let filled = self
            .spare(n)
            .into_iter()
            .filter(|piece| !piece.is_empty())
            .try_for_each(&mut fill);
        match filled {
            Ok(()) => self.len += n,
            Err(_) => self.free_if_empty(),
        }
        filled
    }

    /// Writes to the socket until this is empty or the socket takes no more, whichever is first.
    ///
    /// After it, [`SpillBuf::is_empty`] tells the two apart; if there is a rest and no error, the socket's next
    /// writable edge is still to come (the last call was refused), so an edge-triggered poller cannot miss it.
    pub fn write_to(&mut self, stream: &HostStream) -> Flush {
        let mut written = 0;
        while !self.is_empty() {
            let [first, second] = self.filled();
            match stream.write(&[IoSlice::new(first), IoSlice::new(second)]) {
                // A stream socket does not take nothing of something; if one did, spinning here would be worse.
                Ok(0) => break,
                Ok(n) => {
                    written += n;
                    self.consume(n);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => {
                    return Flush {
                        written,
                        error: Some(error),
                    };
                }
            }
        }
        Flush { written, error: None }
    }

    /// The oldest `n` bytes held, or all of them, in the (up to) two pieces in which they lie in the ring.
    pub fn front(&self, n: usize) -> [&[u8]; 2] {
        self.behind(0, n)
    }

    /// As [`SpillBuf::front`], of the bytes behind the oldest `skip`.
    pub fn behind(&self, skip: usize, n: usize) -> [&[u8]; 2] {
        let [first, second] = self.filled();
        let first = first.get(skip..).unwrap_or_default();
        let second = &second[skip.saturating_sub(self.filled()[0].len()).min(second.len())..];
        let here = n.min(first.len());
        let there = (n - here).min(second.len());
        [&first[..here], &second[..there]]
    }

    /// Bytes held.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether nothing is held.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Bytes that can be appended.
    pub fn room(&self) -> usize {
        self.limit.saturating_sub(self.len)
    }

    /// Bytes of memory held; never above the limit, 0 when empty.
    pub fn capacity(&self) -> usize {
        self.ring.len()
    }

    /// Bytes of memory that this would hold after `n` bytes more, `n` being at most [`SpillBuf::room`].
    pub fn capacity_for(&self, n: usize) -> usize {
        let needed = self.len + n;
        if needed <= self.ring.len() {
            return self.ring.len();
        }
        // Doubling keeps the copying linear in what passes through; the limit caps it.
        needed
            .max(self.ring.len() * 2)
            .max(FIRST_CAPACITY)
            .min(self.limit)
    }

    /// The bytes held, oldest first, in the (up to) two pieces in which they lie in the ring.
    fn filled(&self) -> [&[u8]; 2] {
        let (wrapped, from_head) = self.ring.split_at(self.head);
        let first = self.len.min(from_head.len());
        [&from_head[..first], &wrapped[..self.len - first]]
    }

    /// The first `n` free bytes behind the last one held. `n` fits: [`SpillBuf::grow_for`] was called.
    fn spare(&mut self, n: usize) -> [&mut [u8]; 2] {
        let capacity = self.ring.len();
        let tail = self.head + self.len;
        if tail >= capacity {
            // The content wraps: free memory is one piece between its end and its beginning.
            let start = tail - capacity;
            [&mut self.ring[start..start + n], &mut []]
        } else {
            let first = n.min(capacity - tail);
            let (front, back) = self.ring.split_at_mut(tail);
            [&mut back[..first], &mut front[..n - first]]
        }
    }

    /// Makes the ring large enough for `n` more bytes, `n` being at most [`SpillBuf::room`].
    fn grow_for(&mut self, n: usize) {
        let capacity = self.capacity_for(n);
        if capacity == self.ring.len() {
            return;
        }
        let mut ring = vec![0; capacity].into_boxed_slice();
        let [first, second] = self.filled();
        ring[..first.len()].copy_from_slice(first);
        ring[first.len()..self.len].copy_from_slice(second);
        self.ring = ring;
        self.head = 0;
    }

    /// Forgets the oldest `n` bytes; all of them, if there are fewer.
    pub fn consume(&mut self, n: usize) {
        let n = n.min(self.len);
        self.len -= n;
        self.head += n;
        if self.head >= self.ring.len() {
            self.head -= self.ring.len();
        }
        self.free_if_empty();
    }

    fn free_if_empty(&mut self) {
        if self.len == 0 {
            self.ring = Box::default();
            self.head = 0;
        }
    }
}

impl fmt::Debug for SpillBuf {
    /// Without the content: it is the guest's, and no log's.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SpillBuf({} of {} bytes)", self.len, self.limit)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    use proptest::prelude::*;

    use super::*;

    fn pair() -> (HostStream, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        theirs.set_nonblocking(true).unwrap();
        (HostStream::new(ours.into()).unwrap(), theirs)
    }

    fn content(spill: &SpillBuf) -> Vec<u8> {
        spill.filled().concat()
    }

    /// Reads up to `most` bytes of what is there.
    fn drain(from: &mut UnixStream, most: usize) -> Vec<u8> {
        let mut got = vec![0; most];
        match from.read(&mut got) {
            Ok(n) => got.truncate(n),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => got.clear(),
            Err(error) => panic!("{error}"),
        }
        got
    }

    #[test]
    fn beyond_the_limit_nothing_is_appended() {
        let mut spill = SpillBuf::new(10);
        spill.extend(b"12345678").unwrap();
        assert_eq!(spill.extend(b"abc"), Err(SpillFull { wanted: 3, room: 2 }));
        assert_eq!(content(&spill), b"12345678");
        spill.extend(b"90").unwrap();
        assert_eq!((spill.len(), spill.room(), spill.capacity()), (10, 0, 10));
    }

    #[test]
    fn a_limit_of_zero_takes_nothing() {
        let mut spill = SpillBuf::new(0);
        spill.extend(b"").unwrap();
        assert_eq!(spill.extend(b"x"), Err(SpillFull { wanted: 1, room: 0 }));
        assert_eq!(spill.capacity(), 0);
    }

    #[test]
    fn a_failed_fill_leaves_no_trace() {
        #[derive(PartialEq, Debug)]
        enum Fault {
            Memory,
            Full(SpillFull),
        }
        impl From<SpillFull> for Fault {
            fn from(full: SpillFull) -> Fault {
                Fault::Full(full)
            }
        }
        let mut spill = SpillBuf::new(64);
        assert_eq!(spill.extend_with(5, |_| Err(Fault::Memory)), Err(Fault::Memory));
        assert_eq!((spill.len(), spill.capacity()), (0, 0));
        spill.extend(b"kept").unwrap();
        assert_eq!(spill.extend_with(5, |_| Err(Fault::Memory)), Err(Fault::Memory));
        assert_eq!(content(&spill), b"kept");
        let full = SpillFull { wanted: 61, room: 60 };
        assert_eq!(
            spill.extend_with(61, |_| Err(Fault::Memory)),
            Err(Fault::Full(full))
        );
    }

    #[test]
    fn an_empty_buffer_holds_no_memory() {
        let (stream, mut theirs) = pair();
        let mut spill = SpillBuf::new(256 << 10);
        assert_eq!(spill.capacity(), 0);
        spill.extend(&[7; 5000]).unwrap();
        assert!(spill.capacity() >= 5000);
        let flush = spill.write_to(&stream);
        assert_eq!((flush.written, flush.error.is_none()), (5000, true));
        assert_eq!((spill.len(), spill.capacity()), (0, 0));
        assert_eq!(drain(&mut theirs, 6000), [7; 5000]);
    }

    #[test]
    fn a_full_socket_leaves_the_rest_and_is_no_error() {
        let (stream, mut theirs) = pair();
        let mut spill = SpillBuf::new(1 << 20);
        spill.extend(&vec![1; 1 << 20]).unwrap();
        let flush = spill.write_to(&stream);
        assert!(flush.error.is_none() && flush.written > 0 && !spill.is_empty());
        assert_eq!(flush.written + spill.len(), 1 << 20);
        let stuck = spill.write_to(&stream);
        assert!(stuck.error.is_none() && stuck.written == 0);
        let mut total = 0;
        while total < 1 << 20 {
            total += drain(&mut theirs, 1 << 16).len();
            assert!(spill.write_to(&stream).error.is_none());
        }
        assert!(spill.is_empty());
    }

    #[test]
    fn a_socket_that_failed_is_reported_with_what_it_took() {
        let (stream, theirs) = pair();
        drop(theirs);
        let mut spill = SpillBuf::new(100);
        spill.extend(b"for nobody").unwrap();
        let flush = spill.write_to(&stream);
        assert_eq!(flush.written, 0);
        assert_eq!(flush.error.unwrap().kind(), io::ErrorKind::BrokenPipe);
        assert_eq!(spill.len(), 10, "what was not taken is still counted");
    }

    #[derive(Clone, Debug)]
    enum Op {
        Extend(Vec<u8>),
        Consume(usize),
    }

    fn op() -> impl Strategy<Value = Op> {
        prop_oneof![
            prop::collection::vec(any::<u8>(), 0..2000).prop_map(Op::Extend),
            (0usize..3000).prop_map(Op::Consume),
        ]
    }

    proptest! {
        #[test]
        fn behaves_as_a_bounded_vec(limit in 1usize..9000, ops in prop::collection::vec(op(), 1..60)) {
            let mut spill = SpillBuf::new(limit);
            let mut model: Vec<u8> = Vec::new();
            for op in ops {
                match op {
                    Op::Extend(bytes) => {
                        let fits = model.len() + bytes.len() <= limit;
                        prop_assert_eq!(spill.extend(&bytes).is_ok(), fits);
                        if fits {
                            model.extend(&bytes);
                        }
                    }
                    Op::Consume(n) => {
                        let n = n.min(model.len());
                        model.drain(..n);
                        spill.consume(n);
                    }
                }
                prop_assert_eq!(content(&spill), &model[..]);
                prop_assert_eq!(spill.front(model.len() / 2).concat(), &model[..model.len() / 2]);
                let (skip, n) = (model.len() / 3, model.len() / 2);
                prop_assert_eq!(spill.behind(skip, n).concat(), &model[skip..skip + n]);
                prop_assert_eq!(spill.room(), limit - model.len());
                prop_assert!(spill.capacity() <= limit);
                prop_assert_eq!(spill.capacity() == 0, model.is_empty());
            }
        }
    }
}
