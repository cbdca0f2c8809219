//! Ranges of I/O virtual addresses that do not overlap, and what each means.
//!
//! Both ends of a range are included, so that the range that ends with the last address there is needs no number beyond
//! it. What a caller hands in has been checked (`Mapping::last`): nothing here computes an address that it was not given or
//! that does not lie within such a range.

use std::collections::{BTreeMap, BTreeSet};

use super::{Mapping, Permission};

/// A range that was found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Found {
    /// First I/O virtual address.
    pub first: u64,
    /// Last I/O virtual address, included.
    pub last: u64,
    /// What `first` means.
    pub gpa: u64,
    pub permission: Permission,
}

impl Found {
    pub(super) fn contains(&self, addr: u64) -> bool {
        self.first <= addr && addr <= self.last
    }

    /// What `addr` means, which the range contains, and for how many of the `len` bytes from there on.
    pub(super) fn translate(&self, addr: u64, len: usize) -> (u64, usize) {
        // `gpa + (last - first)` does not wrap, so neither does this.
        let gpa = self.gpa.wrapping_add(addr.wrapping_sub(self.first));
        let behind = usize::try_from(self.last.wrapping_sub(addr)).unwrap_or(usize::MAX);
        (gpa, len.min(behind.saturating_add(1)))
    }
}

#[derive(Clone, Copy, Debug)]
struct Span {
    last: u64,
    gpa: u64,
    permission: Permission,
    /// When it came, in insertions. Parts of one range that was cut have the same.
    age: u64,
}

/// The mappings of an IOTLB, at most `capacity` of them.
///
/// When there are too many the one that came first goes (first in, first out: the kernel's vhost_iotlb does the same). A
/// mapping stays at least until `capacity` others have come after it: that is what [`super::CAPACITY`] counts on.
#[derive(Debug)]
pub(super) struct Map {
    capacity: usize,
    /// By first address.
    spans: BTreeMap<u64, Span>,
    /// Age and first address of each span.
    ages: BTreeSet<(u64, u64)>,
    next_age: u64,
    /// Bytes covered: up to 2^64.
    bytes: u128,
    evictions: u64,
}

impl Map {
    pub(super) fn new(capacity: usize) -> Map {
        Map {
            capacity,
            spans: BTreeMap::new(),
            ages: BTreeSet::new(),
            next_age: 0,
            bytes: 0,
            evictions: 0,
        }
    }

    /// Takes a mapping in that ends at `last`. One for reading and one for writing of the same memory are one for both. Whether something that was known before is known no longer, or differs.
    ///
    /// A neighbour that it continues, in both kinds of addresses and with the same permission, becomes one range with it. A
    /// VMM maps page by page what the guest has in one piece: a packet of 64 KiB is one slice again, and one lookup.
    pub(super) fn insert(&mut self, mapping: Mapping, last: u64) -> bool {
        let age = self.next_age;
        self.next_age += 1;
        let mut span = Span {
            last,
            gpa: mapping.gpa,
            permission: mapping.permission,
            age,
        };
        if let Some((first, known)) = self.same(mapping, last) {
            // QEMU sends the page of the used ring unasked, and again when it is asked for. The entry is as new as the message.
            self.take(first);
            self.put(first, Span { age, ..known });
            return false;
        }
        if let Some((_, known)) = self.meaning(mapping, last)
            && known.permission != Permission::ReadWrite
            && span.permission != Permission::ReadWrite
        {
            // Granted for reading, and now for writing, as it was asked for both. Would the second take the place of the first,
            // a ring whose areas share a page would ask for them in turn for ever.
            span.permission = Permission::ReadWrite;
        }
        let displaced = self.cut(mapping.iova, last);
        let mut first = mapping.iova;
        if let Some((left, known)) = self
            .spans
            .range(..first)
            .next_back()
            .map(|(at, span)| (*at, *span))
            && known.last.checked_add(1) == Some(first)
            && known.permission == span.permission
            && (known.gpa + (known.last - left)).checked_add(1) == Some(span.gpa)
        {
            self.take(left);
            first = left;
            span.gpa = known.gpa;
        }
        if let Some(right) = last.checked_add(1)
            && let Some(known) = self.spans.get(&right).copied()
            && known.permission == span.permission
            && (span.gpa + (last - first)).checked_add(1) == Some(known.gpa)
        {
            self.take(right);
            span.last = known.last;
        }
        self.put(first, span);
        self.evict() || displaced
    }

    /// Forgets what is mapped from `first` to `last`, both included. Whether there was anything.
    pub(super) fn remove(&mut self, first: u64, last: u64) -> bool {
        if first > last {
            return false;
        }
        // What is left and right of it are two entries where one was.
        let changed = self.cut(first, last);
        self.evict() || changed
    }

    pub(super) fn clear(&mut self) {
        self.spans.clear();
        self.ages.clear();
        self.bytes = 0;
    }

    /// The range that contains `addr`.
    pub(super) fn find(&self, addr: u64) -> Option<Found> {
        let (first, span) = self.spans.range(..=addr).next_back()?;
        let found = Found {
            first: *first,
            last: span.last,
            gpa: span.gpa,
            permission: span.permission,
        };
        found.contains(addr).then_some(found)
    }

    pub(super) fn len(&self) -> usize {
        self.spans.len()
    }

    pub(super) fn bytes(&self) -> u64 {
        u64::try_from(self.bytes).unwrap_or(u64::MAX)
    }

    pub(super) fn evictions(&self) -> u64 {
        self.evictions
    }

    /// The range that says already what `mapping` says, if there is one.
    fn same(&self, mapping: Mapping, last: u64) -> Option<(u64, Span)> {
        self.meaning(mapping, last)
            .filter(|(_, span)| span.permission == mapping.permission)
    }

    /// The range in which all of `mapping` lies and means the same memory, if there is one.
    fn meaning(&self, mapping: Mapping, last: u64) -> Option<(u64, Span)> {
        let (first, span) = self.spans.range(..=mapping.iova).next_back()?;
        // What is behind the range has been compared before anything is added.
        let same = last <= span.last && span.gpa + (mapping.iova - first) == mapping.gpa;
        same.then_some((*first, *span))
    }

    /// Takes `first..=last` out of whatever covers it.
    fn cut(&mut self, first: u64, last: u64) -> bool {
        let mut changed = false;
        let before = self
            .spans
            .range(..first)
            .next_back()
            .map(|(at, span)| (*at, *span));
        if let Some((left, span)) = before
            && span.last >= first
        {
            changed = true;
            self.take(left);
            self.put(
                left,
                Span {
                    last: first - 1,
                    ..span
                },
            );
            self.put_rest(left, span, last);
        }
        while let Some(at) = self.spans.range(first..=last).next().map(|(at, _)| *at) {
            changed = true;
            if let Some(span) = self.take(at) {
                self.put_rest(at, span, last);
            }
        }
        changed
    }

    /// Puts what `span` has behind `last` back.
    fn put_rest(&mut self, first: u64, span: Span, last: u64) {
        if span.last > last {
            let at = last + 1;
            let gpa = span.gpa + (at - first);
            self.put(at, Span { gpa, ..span });
        }
    }

    fn evict(&mut self) -> bool {
        let mut changed = false;
        while self.spans.len() > self.capacity
            && let Some(&(_, first)) = self.ages.first()
        {
            self.take(first);
            self.evictions += 1;
            changed = true;
        }
        changed
    }

    fn put(&mut self, first: u64, span: Span) {
        self.bytes += u128::from(span.last - first) + 1;
        self.ages.insert((span.age, first));
        self.spans.insert(first, span);
    }

    fn take(&mut self, first: u64) -> Option<Span> {
        let span = self.spans.remove(&first)?;
        self.bytes -= u128::from(span.last - first) + 1;
        self.ages.remove(&(span.age, first));
        Some(span)
    }

    /// That the three views of the same thing agree.
    #[cfg(test)]
    pub(super) fn check(&self) {
        assert!(self.spans.len() <= self.capacity);
        assert_eq!(self.spans.len(), self.ages.len());
        let mut bytes = 0;
        let mut before: Option<u64> = None;
        for (first, span) in &self.spans {
            assert!(*first <= span.last && before.is_none_or(|last| last < *first));
            assert!(span.gpa.checked_add(span.last - first).is_some());
            assert!(self.ages.contains(&(span.age, *first)));
            bytes += u128::from(span.last - first) + 1;
            before = Some(span.last);
        }
        assert_eq!(bytes, self.bytes);
    }
}
