//! How long the messages are that wait for a host end, and which of them end a record.
//!
//! A guest's credit counts payload, and a message of one byte is as much a message as one of 64 KiB: a queue with a few words
//! for each would be many times what was promised. So a message takes as few bytes as its length has digits to the base of
//! 128: for those of less than 64 bytes one, and never more than twice what the messages themselves take, empty ones aside.

use std::collections::VecDeque;

use super::messages::Message;

/// Capacity that is kept when nothing waits, in bytes: what an idle connection costs.
const KEPT: usize = 64;

/// A queue of messages without their bytes.
#[derive(Default, Debug)]
pub(super) struct Lengths {
    /// `len << 1 | ends_record` of each, least significant digits first; all but a number's last have the top bit (LEB128).
    digits: VecDeque<u8>,
}

impl Lengths {
    pub(super) fn is_empty(&self) -> bool {
        self.digits.is_empty()
    }

    pub(super) fn push_back(&mut self, message: Message) {
        let mut number = u64::from(message.len) << 1 | u64::from(message.ends_record);
        while number > 0x7f {
            self.digits.push_back(number as u8 | 0x80);
            number >>= 7;
        }
        self.digits.push_back(number as u8);
    }

    pub(super) fn front(&self) -> Option<Message> {
        self.iter().next()
    }

    /// All of them, first come first.
    pub(super) fn iter(&self) -> impl Iterator<Item = Message> + '_ {
        let mut at = 0;
        std::iter::from_fn(move || {
            let (number, digits) = self.number(at)?;
            at += digits;
            Some(Message {
                // 33 bits were pushed.
                len: (number >> 1) as u32,
                ends_record: number & 1 != 0,
            })
        })
    }

    pub(super) fn pop_front(&mut self) -> Option<Message> {
        let message = self.front()?;
        let (_, digits) = self.number(0)?;
        self.digits.drain(..digits);
        if self.digits.is_empty() {
            self.digits.shrink_to(KEPT);
        }
        Some(message)
    }

    /// The number whose first digit is at `begin`, and how many digits it has.
    fn number(&self, begin: usize) -> Option<(u64, usize)> {
        let mut number = 0;
        for (at, digit) in self.digits.range(begin.min(self.digits.len())..).enumerate() {
            number |= u64::from(digit & 0x7f) << (7 * at);
            if digit & 0x80 == 0 {
                return Some((number, at + 1));
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_come_out_as_they_went_in() {
        let mut lengths = Lengths::default();
        let all: Vec<Message> = [0, 1, 63, 64, 127, 128, 8191, 8192, 65536, u32::MAX - 1, u32::MAX]
            .into_iter()
            .flat_map(|len| [false, true].map(|ends_record| Message { len, ends_record }))
            .collect();
        for round in 0..3 {
            all.iter().for_each(|message| lengths.push_back(*message));
            assert!(lengths.iter().eq(all.iter().copied()), "round {round}");
            for message in &all {
                assert_eq!(lengths.front(), Some(*message), "round {round}");
                assert_eq!(lengths.pop_front(), Some(*message));
            }
            assert!(lengths.is_empty());
            assert_eq!(lengths.pop_front(), None);
        }
    }

    /// 65,536 messages of one byte used to take half a MiB, beside 64 KiB of payload.
    #[test]
    fn many_small_messages_take_no_more_than_their_bytes_and_leave_nothing() {
        let mut lengths = Lengths::default();
        let message = Message {
            len: 1,
            ends_record: false,
        };
        for _ in 0..65536 {
            lengths.push_back(message);
        }
        assert_eq!(lengths.digits.len(), 65536);
        while lengths.pop_front().is_some() {}
        assert!(lengths.digits.capacity() <= KEPT);
    }
}
