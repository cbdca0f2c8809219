//! What the VMM is asked, has been asked, and has refused.
//!
//! ```text
//!              take              insert that covers it
//!  (nothing) ─note─> Noted ────> Asked ─────────────────────> (nothing): translated
//!                                  ├── answered: refused ───> Refused ── chain given back, insert, invalidate, flush ──> (nothing)
//!                                  └── answered: no, though ─> Silent ── insert, invalidate, retry, flush ────────────> (nothing)
//! ```
//!
//! *Bounds.* At most [`MAX_OPEN`] are noted, asked or silent together. [`MAX_REFUSED`] refusals are remembered.
//!
//! *Answers name nothing.* Whose answer one is can only be told by its place, and not every VMM answers in the order in which it
//! was asked: QEMU 6.1 to 7.2 serve the next miss while they wait for our acknowledgement of an UPDATE, and so answer the last
//! one first (`vhost_user_read` and `slave_read`, hw/virtio/vhost-user.c). But each says whether there was an UPDATE, which does
//! name what it is about. So a refusal of what is translated is another one's: of the question that was answered without a
//! refusal and without a translation. And until all that was asked before a refusal came is answered, it is not believed.
//!
//! *One page, one question.* A question is about the page of the address that was missing: all descriptors that point into one
//! page need one answer. It remembers the address too. A VMM may map part of a page only (the end of a memory region); then
//! the answer is there, and if the address still is not, asking again would go on for ever.

use std::collections::BTreeMap;
use std::time::Instant;

use super::super::memory::Access;
use super::{Miss, Permission};

/// Unit of questions in bytes. QEMU takes any address within a page and answers for all of it, and no IOMMU that a VMM
/// emulates has smaller pages.
pub(super) const PAGE: u64 = 4096;

/// Questions that may be open. The used, available and descriptor pages of two rings of 1024 are 22; a packet of 64 KiB is 17 or
/// 18 pages. More must wait until some are answered: each is a message to the VMM, at a guest's will.
pub(super) const MAX_OPEN: usize = 64;

/// Refusals that are remembered: a chain asks for `MAX_OPEN` at most before it is given back, and forgets them then. Those that
/// nobody forgets (their ring was stopped meanwhile) go when room is needed.
const MAX_REFUSED: usize = 256;

/// Further pages of the same range that are asked for along with the first one.
const PREFETCH: usize = 32;

fn page(addr: u64) -> u64 {
    addr & !(PAGE - 1)
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    /// To be sent.
    Noted,
    /// Sent then, and not answered.
    Asked(Instant),
    /// Asked then, and answered without a refusal and without a translation of the address that was missing. As good as not
    /// answered: who waits for the page waits on, and has to be told of.
    Silent(Instant),
    /// Answered by a refusal.
    Refused {
        /// For the oldest to go first.
        number: u64,
        /// How many questions had been asked by then; see [`Questions::oldest_due`].
        asks: u64,
        /// Whether this walk has come across it.
        seen: bool,
    },
}

#[derive(Clone, Copy, Debug)]
struct Record {
    /// The address that was missing, in the page.
    wanted: u64,
    state: State,
    /// How many questions had been asked before it, if it is asked.
    asked: u64,
}

/// What a look at a range that is not translated from its first byte on comes to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Outlook {
    Missing,
    Refused,
}

/// What has been come across since a walk began: the descriptors of one chain, the areas of one ring.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub(super) struct Walk {
    /// Something is missing that the VMM has been asked for, or will be.
    pub awaits: bool,
    /// Something was refused. Then the VMM is asked for nothing else: it would be for nothing.
    pub refused: bool,
    /// Something is missing that cannot be asked for before others are answered.
    pub full: bool,
}

#[derive(Debug, Default)]
pub(super) struct Questions {
    /// By page.
    records: BTreeMap<(u64, Access), Record>,
    /// To be sent, in this order; may name some that are not `Noted` any more.
    noted: Vec<Miss>,
    /// Questions flushed while the VMM had them: each may be answered yet, and that answer says nothing of a later question
    /// for the same page.
    stale: Vec<Miss>,
    /// How many records are `Noted`, `Asked` or `Silent`.
    open: usize,
    refusals: u64,
    /// Questions asked so far.
    asks: u64,
    /// Refusals of what was translated, as long as there are questions that they may belong to.
    strayed: usize,
}

impl Questions {
    /// Nothing has been seen.
    pub(super) fn begin_walk(&mut self) {
        for record in self.records.values_mut() {
            if let State::Refused { seen, .. } = &mut record.state {
                *seen = false;
            }
        }
    }

    /// The range from `first` to `last` is needed for `access` and is not translated at `first`. `mapped` tells whether an
    /// address is; `granule` is the size in which the VMM translates, a power of two from [`PAGE`] on.
    pub(super) fn missing(
        &mut self,
        walk: &mut Walk,
        (first, last): (u64, u64),
        access: Access,
        granule: Option<u64>,
        mapped: impl Fn(u64) -> bool,
    ) -> Outlook {
        let at = page(first);
        let mut known = false;
        let mut refused = false;
        // Of use to refusals only, which are the records that are not open. A guest may have this asked for thousands of
        // descriptors in a burst, so there is no walk over all records without need.
        let due = match self.records.len() > self.open {
            true => self.oldest_due(),
            false => u64::MAX,
        };
        for ((page, of), record) in self
            .records
            .range_mut((at, Access::Read)..=(page(last), Access::Write))
        {
            if *of != access {
                continue;
            }
            known |= *page == at;
            match &mut record.state {
                State::Noted | State::Asked(_) => walk.awaits = true,
                State::Silent(_) => {}
                State::Refused { asks, .. } if due < *asks => walk.awaits = true,
                State::Refused { seen, .. } => {
                    *seen = true;
                    refused = true;
                }
            }
        }
        walk.refused |= refused;
        if refused {
            return Outlook::Refused;
        }
        if walk.refused {
            return Outlook::Missing;
        }
        if !known && !self.note(walk, first, access) {
            return Outlook::Missing;
        }
        // A VMM that translates page by page would be asked for the next page of a packet only when it has answered for the
        // one before.
        let Some(granule) = granule else {
            return Outlook::Missing;
        };
        let mut next = (first & !(granule - 1)).checked_add(granule);
        for _ in 0..PREFETCH {
            let Some(addr) = next.filter(|addr| *addr <= last) else {
                break;
            };
            if !self.records.contains_key(&(addr, access)) && !mapped(addr) && !self.note(walk, addr, access)
            {
                break;
            }
            next = addr.checked_add(granule);
        }
        Outlook::Missing
    }

    fn note(&mut self, walk: &mut Walk, wanted: u64, access: Access) -> bool {
        if self.open >= MAX_OPEN {
            walk.full = true;
            return false;
        }
        let record = Record {
            wanted,
            state: State::Noted,
            asked: 0,
        };
        self.records.insert((page(wanted), access), record);
        self.open += 1;
        self.noted.push(Miss {
            iova: page(wanted),
            access,
        });
        walk.awaits = true;
        true
    }

    /// Forgets the refusals that this walk has come across: they have had their effect.
    pub(super) fn forget_seen(&mut self) {
        self.retain(|_, record| !matches!(record.state, State::Refused { seen: true, .. }));
    }

    /// The questions to send, which are asked at `now`.
    pub(super) fn take(&mut self, now: Instant) -> Vec<Miss> {
        let mut noted = std::mem::take(&mut self.noted);
        noted.retain(|miss| match self.records.get_mut(&(miss.iova, miss.access)) {
            Some(record) if record.state == State::Noted => {
                record.state = State::Asked(now);
                record.asked = self.asks;
                self.asks += 1;
                true
            }
            _ => false,
        });
        noted
    }

    /// The VMM has answered. Whether it has refused what it was asked.
    pub(super) fn answered(&mut self, miss: Miss, refused: bool) -> bool {
        let key = (page(miss.iova), miss.access);
        let record = self.records.get_mut(&key);
        if let Some(at) = self
            .stale
            .iter()
            .position(|stale| (stale.iova, stale.access) == key)
        {
            self.stale.swap_remove(at);
            // Or it is the answer to the new question, and the old one will never have one. So the new one is put again: a
            // message too many rather than a refusal that was not meant, or a wait for ever.
            if let Some(record) = record
                && let State::Asked(_) = record.state
            {
                record.state = State::Noted;
                self.noted.push(Miss {
                    iova: key.0,
                    access: key.1,
                });
            }
            self.settle_strayed();
            return false;
        }
        match record {
            Some(record) => {
                let (State::Asked(since) | State::Silent(since)) = record.state else {
                    return false;
                };
                if refused {
                    self.refuse(key);
                } else {
                    record.state = State::Silent(since);
                }
            }
            // An answer to nothing that is asked belongs to nobody.
            None if self.open == 0 => return false,
            None => self.strayed += usize::from(refused),
        }
        self.settle_strayed();
        refused
    }

    fn refuse(&mut self, key: (u64, Access)) {
        if let Some(record) = self.records.get_mut(&key) {
            record.state = State::Refused {
                number: self.refusals,
                asks: self.asks,
                seen: false,
            };
            self.refusals += 1;
            self.open -= 1;
            self.bound_refused();
        }
    }

    /// Gives refusals of what was translated to questions that were answered with nothing.
    fn settle_strayed(&mut self) {
        while self.strayed > 0 {
            let silent = self
                .records
                .iter()
                .filter_map(|(key, record)| match record.state {
                    State::Silent(_) => Some((record.asked, *key)),
                    _ => None,
                });
            let Some((_, key)) = silent.min() else { break };
            self.strayed -= 1;
            self.refuse(key);
        }
        if self.oldest_due() == u64::MAX {
            self.strayed = 0;
        }
    }

    /// How many questions had been asked before the oldest one whose answer is due.
    fn oldest_due(&self) -> u64 {
        let asked = self.records.values().filter_map(|record| match record.state {
            State::Asked(_) => Some(record.asked),
            _ => None,
        });
        asked.min().unwrap_or(u64::MAX)
    }

    /// `first..=last` is translated now, with `permission`.
    pub(super) fn covered(&mut self, first: u64, last: u64, permission: Permission) {
        let due = self.oldest_due();
        let mut strayed = 0;
        self.forget(first, last, |(_, access), record| {
            let covered = permission.allows(access) && first <= record.wanted && record.wanted <= last;
            if let State::Refused { asks, .. } = record.state
                && covered
                && due < asks
            {
                strayed += 1;
            }
            covered
        });
        self.strayed += strayed;
        self.settle_strayed();
    }

    /// What was said of `first..=last` holds no longer. Questions that are asked stay: their answers are to come.
    pub(super) fn invalidated(&mut self, first: u64, last: u64) {
        self.forget(first, last, |_, record| {
            matches!(record.state, State::Silent(_) | State::Refused { .. })
        });
    }

    /// Questions that were answered with nothing may be asked again.
    pub(super) fn retry(&mut self) {
        self.retain(|_, record| !matches!(record.state, State::Silent(_)));
    }

    pub(super) fn clear(&mut self) {
        for ((iova, access), record) in &self.records {
            let miss = Miss {
                iova: *iova,
                access: *access,
            };
            if matches!(record.state, State::Asked(_)) && !self.stale.contains(&miss) {
                self.stale.push(miss);
            }
        }
        let too_many = self.stale.len().saturating_sub(MAX_OPEN);
        self.stale.drain(..too_many);
        self.records.clear();
        self.noted.clear();
        self.open = 0;
        self.strayed = 0;
    }

    pub(super) fn expects_answers(&self) -> bool {
        !self.noted.is_empty() || self.oldest_due() != u64::MAX
    }

    /// Whoever was asked before the last flush is gone.
    pub(super) fn expect_no_answers(&mut self) {
        self.stale.clear();
    }

    pub(super) fn oldest(&self) -> Option<(Miss, Instant)> {
        self.asked().min_by_key(|(_, since)| *since)
    }

    pub(super) fn unanswered(&self) -> u64 {
        self.asked().count() as u64
    }

    fn asked(&self) -> impl Iterator<Item = (Miss, Instant)> + '_ {
        self.records
            .iter()
            .filter_map(|(&(iova, access), record)| match record.state {
                State::Asked(since) | State::Silent(since) => Some((Miss { iova, access }, since)),
                _ => None,
            })
    }

    /// Forgets the records of pages from `first` to `last` for which `which` holds.
    fn forget(&mut self, first: u64, last: u64, mut which: impl FnMut((u64, Access), &Record) -> bool) {
        if self.records.is_empty() {
            return;
        }
        let pages = page(first)..=page(last);
        self.retain(|key, record| !(pages.contains(&key.0) && which(key, record)));
    }

    fn retain(&mut self, mut keep: impl FnMut((u64, Access), &Record) -> bool) {
        let open = &mut self.open;
        self.records.retain(|key, record| {
            let kept = keep(*key, record);
            if !kept && !matches!(record.state, State::Refused { .. }) {
                *open -= 1;
            }
            kept
        });
        let records = &self.records;
        self.noted.retain(|miss| {
            records
                .get(&(miss.iova, miss.access))
                .is_some_and(|record| record.state == State::Noted)
        });
    }

    fn bound_refused(&mut self) {
        let refused = |record: &Record| match record.state {
            State::Refused { number, .. } => Some(number),
            _ => None,
        };
        let count = self.records.values().filter_map(refused).count();
        if count > MAX_REFUSED
            && let Some(oldest) = self.records.values().filter_map(refused).min()
        {
            self.records.retain(|_, record| refused(record) != Some(oldest));
        }
    }

    /// That the counts agree with what is counted.
    #[cfg(test)]
    pub(super) fn check(&self) {
        let open = |record: &&Record| !matches!(record.state, State::Refused { .. });
        assert_eq!(self.records.values().filter(open).count(), self.open);
        assert!(self.open <= MAX_OPEN && self.records.len() <= MAX_OPEN + MAX_REFUSED);
        assert!(self.noted.len() <= MAX_OPEN && self.stale.len() <= MAX_OPEN);
        assert!(self.strayed == 0 || self.oldest_due() != u64::MAX);
        let noted = |record: &&Record| record.state == State::Noted;
        assert_eq!(self.records.values().filter(noted).count(), self.noted.len());
        assert!(
            self.records
                .iter()
                .all(|((at, _), record)| page(record.wanted) == *at)
        );
    }
}
