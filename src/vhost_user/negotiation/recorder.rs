//! The flight recorder: the last messages of a guest's sessions, with times and outcomes.
//!
//! What is interesting about a session are some fifty messages at its beginning, and under a vIOMMU thousands a second
//! follow that all look alike. So IOTLB messages have slots of their own, which cannot take those of the others, and runs
//! of them are folded into one entry a kind.

use std::collections::VecDeque;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;

use super::detail::IotlbText;

/// Entries that are kept of all messages but IOTLB_MSG.
pub const CONTROL_SLOTS: usize = 192;
/// Entries that are kept of IOTLB_MSG, both ways.
pub const IOTLB_SLOTS: usize = 64;
/// Longest text of an entry in bytes: most of them are ours, but a memory table may have 509 regions.
const MAX_TEXT: usize = 400;

/// Which way a message went.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Debug)]
#[serde(rename_all = "snake_case")]
pub enum Direction {
    /// From the VMM, on the main channel.
    VmmToDevice,
    /// From us, on the backend channel.
    BackendChannelOut,
}

/// What became of a message.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Debug)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// Its answer has not come yet, or never came.
    Pending,
    /// It has no answer, and was taken.
    Taken,
    /// It was answered with a value.
    Answered,
    /// It was answered with yes (0).
    Ok,
    /// It was answered with no.
    Nack,
    /// It was not carried out; `answer` says why.
    Refused,
    /// The session ended because of it.
    EndedSession,
}

/// A message, or a run of IOTLB messages of one kind.
#[derive(Clone, PartialEq, Serialize, Debug)]
#[serde(rename_all = "camelCase")]
pub struct Entry {
    /// Unix time in seconds of the message, or the first of the run.
    pub at: f64,
    /// Unix time in seconds of the last of the run.
    pub last: f64,
    /// Number of the session it belongs to.
    pub session: u64,
    /// Which way it went.
    pub direction: Direction,
    /// The specification's name.
    pub request: String,
    /// What it says, in short.
    pub detail: String,
    /// What became of it.
    pub outcome: Outcome,
    /// What it was answered with, or why it was refused.
    pub answer: Option<String>,
    /// How many messages the entry stands for.
    pub count: u64,
}

/// What a message says.
#[derive(Clone, PartialEq, Debug)]
pub(super) enum Detail {
    Text(String),
    /// Kept as numbers: written out only when somebody reads.
    Iotlb {
        first: IotlbText,
        last: IotlbText,
    },
}

#[derive(Clone, Debug)]
struct Slot {
    /// Order among all entries.
    serial: u64,
    at: f64,
    last: f64,
    session: u64,
    direction: Direction,
    /// The request's number.
    request: u32,
    detail: Detail,
    /// What became of those that wait for nothing.
    settled: Outcome,
    answer: Option<String>,
    count: u64,
    /// How many of them wait for an answer.
    pending: u64,
}

/// The last messages. Memory: at most `CONTROL_SLOTS` + `IOTLB_SLOTS` entries of a few hundred bytes.
#[derive(Clone, Default, Debug)]
pub struct Recorder {
    control: VecDeque<Slot>,
    iotlb: VecDeque<Slot>,
    serial: u64,
    /// Number of the session that messages belong to.
    session: u64,
}

impl Recorder {
    /// From now on messages belong to this session. What earlier ones left unanswered stays so.
    pub(super) fn begin_session(&mut self, session: u64) {
        self.session = session;
    }

    /// Records a message; `answered` says whether an answer is to come.
    pub(super) fn record(&mut self, direction: Direction, request: u32, detail: Detail, answered: bool) {
        let settled = match direction {
            Direction::VmmToDevice if !answered => Outcome::Taken,
            _ => Outcome::Ok,
        };
        let now = unix_time();
        if let Detail::Iotlb { last: said, .. } = &detail
            && let Some(slot) = self.run_of(direction, settled, said)
        {
            slot.count = slot.count.saturating_add(1);
            slot.pending = slot.pending.saturating_add(u64::from(answered));
            slot.last = now;
            if let Detail::Iotlb { last, .. } = &mut slot.detail {
                *last = *said;
            }
            return;
        }
        self.push(direction, request, detail, settled, None, u64::from(answered));
    }

    /// Records a message that is not carried out.
    pub(super) fn record_refused(&mut self, request: u32, detail: Detail, reason: &str) {
        self.push(
            Direction::VmmToDevice,
            request,
            detail,
            Outcome::Refused,
            Some(reason.to_owned()),
            0,
        );
    }

    /// The answer to the oldest unanswered `request`, in that direction. For IOTLB messages `said` tells which kind.
    pub(super) fn settle(
        &mut self,
        direction: Direction,
        request: u32,
        said: Option<IotlbText>,
        outcome: Outcome,
        answer: Option<String>,
    ) {
        let session = self.session;
        let slots = match said {
            Some(_) => &mut self.iotlb,
            None => &mut self.control,
        };
        let waits = |slot: &Slot| {
            slot.pending > 0
                && slot.session == session
                && slot.direction == direction
                && slot.request == request
                && match (&slot.detail, &said) {
                    (Detail::Iotlb { last, .. }, Some(said)) => last.kind == said.kind,
                    _ => true,
                }
        };
        let Some(at) = slots.iter().position(waits) else {
            return;
        };
        let Some(slot) = slots.get_mut(at) else {
            return;
        };
        slot.pending -= 1;
        if slot.count == 1 {
            slot.settled = outcome;
            slot.answer = answer.map(short);
            return;
        }
        if outcome != slot.settled {
            // One of a run went another way: it gets an entry of its own.
            slot.count -= 1;
            let detail = said.map_or(Detail::Text(String::new()), IotlbText::into_detail);
            self.push(direction, request, detail, outcome, answer, 0);
        }
    }

    /// The session ended at `request`, for this reason. True if it had been refused before.
    pub(super) fn ended_by(&mut self, request: u32, why: &str) -> bool {
        let session = self.session;
        let newest = self
            .control
            .iter_mut()
            .chain(&mut self.iotlb)
            .filter(|slot| {
                slot.session == session && slot.request == request && slot.direction == Direction::VmmToDevice
            })
            .max_by_key(|slot| slot.serial);
        let Some(slot) = newest else {
            return false;
        };
        let refused = slot.settled == Outcome::Refused;
        if slot.count == 1 {
            slot.settled = Outcome::EndedSession;
            slot.pending = 0;
            slot.answer.get_or_insert_with(|| short(why.to_owned()));
        }
        refused
    }

    /// The session ended by an error, in these words: if they are those with which its last message was refused, it was
    /// that message which ended it.
    pub(super) fn ended(&mut self, why: &str) {
        let session = self.session;
        let newest = self
            .control
            .iter_mut()
            .chain(&mut self.iotlb)
            .filter(|slot| slot.session == session && slot.direction == Direction::VmmToDevice)
            .max_by_key(|slot| slot.serial);
        if let Some(slot) = newest
            && slot.settled == Outcome::Refused
            && slot.answer.as_ref().is_some_and(|reason| why.contains(reason))
        {
            slot.settled = Outcome::EndedSession;
        }
    }

    /// The messages, oldest first.
    pub fn entries(&self) -> Vec<Entry> {
        let mut slots: Vec<&Slot> = self.control.iter().chain(&self.iotlb).collect();
        slots.sort_by_key(|slot| slot.serial);
        slots.into_iter().map(Slot::entry).collect()
    }

    /// The entry that an IOTLB message of this kind joins: one since the last message that is no IOTLB message.
    fn run_of(&mut self, direction: Direction, settled: Outcome, said: &IotlbText) -> Option<&mut Slot> {
        let session = self.session;
        let run_began = self.control.back().map_or(0, |slot| slot.serial);
        self.iotlb
            .iter_mut()
            .rev()
            .take_while(|slot| slot.serial >= run_began && slot.session == session)
            .find(|slot| {
                slot.direction == direction
                    && slot.settled == settled
                    && matches!(&slot.detail, Detail::Iotlb { last, .. } if last.kind == said.kind)
            })
    }

    fn push(
        &mut self,
        direction: Direction,
        request: u32,
        detail: Detail,
        settled: Outcome,
        answer: Option<String>,
        pending: u64,
    ) {
        let (slots, room) = match detail {
            Detail::Text(_) => (&mut self.control, CONTROL_SLOTS),
            Detail::Iotlb { .. } => (&mut self.iotlb, IOTLB_SLOTS),
        };
        while slots.len() >= room {
            slots.pop_front();
        }
        self.serial += 1;
        let now = unix_time();
        slots.push_back(Slot {
            serial: self.serial,
            at: now,
            last: now,
            session: self.session,
            direction,
            request,
            detail: match detail {
                Detail::Text(text) => Detail::Text(short(text)),
                iotlb => iotlb,
            },
            settled,
            answer: answer.map(short),
            count: 1,
            pending,
        });
    }
}

impl Slot {
    fn entry(&self) -> Entry {
        Entry {
            at: self.at,
            last: self.last,
            session: self.session,
            direction: self.direction,
            request: crate::vhost_user::message::display_name(self.request),
            detail: match &self.detail {
                Detail::Text(text) => text.clone(),
                Detail::Iotlb { first, .. } if self.count == 1 => first.to_string(),
                Detail::Iotlb { first, last } => format!("{first}, last {last}"),
            },
            outcome: if self.pending > 0 {
                Outcome::Pending
            } else {
                self.settled
            },
            answer: self.answer.clone(),
            count: self.count,
        }
    }
}

/// Cuts a text to [`MAX_TEXT`] bytes.
fn short(mut text: String) -> String {
    if text.len() > MAX_TEXT {
        let end = (0..=MAX_TEXT - 3)
            .rev()
            .find(|end| text.is_char_boundary(*end))
            .unwrap_or(0);
        text.truncate(end);
        text.push('…');
    }
    text
}

fn unix_time() -> f64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0.0, |since| since.as_secs_f64())
}

#[cfg(test)]
#[path = "../tests/recorder.rs"]
mod tests;
