//! Test data that says where it belongs, and a digest over what was seen of it.
//!
//! Both ends of a connection make the same data from a seed, so that a receiver can name the first byte that is wrong: lost,
//! doubled and swapped pieces show, since a word depends on its position. The digest is taken over the bytes that really
//! went through a socket, and two ends compare theirs. This file is compiled into the guest's program and into ours.

/// Endless bytes, fixed by a seed.
#[derive(Clone, Debug)]
pub struct Pattern {
    seed: u64,
    position: u64,
}

impl Pattern {
    /// The bytes of `seed`, from the first.
    pub fn new(seed: u64) -> Pattern {
        Pattern { seed, position: 0 }
    }

    /// Writes the next `buffer.len()` bytes.
    pub fn fill(&mut self, buffer: &mut [u8]) {
        let mut rest = buffer;
        while !rest.is_empty() {
            let word = word(self.seed, self.position / 8).to_le_bytes();
            let from = (self.position % 8) as usize;
            let n = rest.len().min(8 - from);
            rest[..n].copy_from_slice(&word[from..from + n]);
            self.position += n as u64;
            rest = &mut rest[n..];
        }
    }

    /// Compares the next bytes with `seen`; the position in the stream of the first one that differs.
    pub fn check(&mut self, seen: &[u8]) -> Result<(), u64> {
        let mut rest = seen;
        while !rest.is_empty() {
            let word = word(self.seed, self.position / 8).to_le_bytes();
            let from = (self.position % 8) as usize;
            let n = rest.len().min(8 - from);
            if rest[..n] != word[from..from + n] {
                let same = rest.iter().zip(&word[from..]).take_while(|(a, b)| a == b).count();
                return Err(self.position + same as u64);
            }
            self.position += n as u64;
            rest = &rest[n..];
        }
        Ok(())
    }
}

/// Word `index` of the data of `seed`: the finalizer of SplitMix64 over a Weyl sequence.
fn word(seed: u64, index: u64) -> u64 {
    let mut z =
        seed.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ index.wrapping_mul(0xd1b5_4a32_d192_ed03);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// A 64-bit digest of a byte stream, independent of how it was cut. Each step is a bijection of the state for a given word
/// and of the word for a given state, so a single changed word always changes the result.
#[derive(Clone, Debug, Default)]
pub struct Digest {
    state: u64,
    /// Bytes that do not make a word yet, in its low end.
    tail: u64,
    length: u64,
}

impl Digest {
    /// The digest of the first `bytes` bytes of the pattern of `seed`.
    #[allow(dead_code)] // the guest's program, which includes this file, has no use for it
    pub fn of_pattern(seed: u64, bytes: u64) -> u64 {
        let (mut pattern, mut digest) = (Pattern::new(seed), Digest::default());
        let mut buffer = [0; 65536];
        let mut left = bytes;
        while left > 0 {
            let n = left.min(buffer.len() as u64) as usize;
            pattern.fill(&mut buffer[..n]);
            digest.update(&buffer[..n]);
            left -= n as u64;
        }
        digest.finish()
    }

    /// Takes the next bytes in.
    pub fn update(&mut self, bytes: &[u8]) {
        let mut rest = bytes;
        while !self.length.is_multiple_of(8) && !rest.is_empty() {
            self.byte(rest[0]);
            rest = &rest[1..];
        }
        let (words, rest) = rest.as_chunks();
        for word in words {
            self.mix(u64::from_le_bytes(*word));
            self.length += 8;
        }
        for &byte in rest {
            self.byte(byte);
        }
    }

    /// How many bytes were taken in.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// The digest of everything so far.
    pub fn finish(&self) -> u64 {
        let mut end = self.clone();
        end.mix(self.tail);
        end.mix(self.length);
        end.state ^ (end.state >> 32)
    }

    fn byte(&mut self, byte: u8) {
        self.tail |= u64::from(byte) << (8 * (self.length % 8));
        self.length += 1;
        if self.length.is_multiple_of(8) {
            let word = std::mem::take(&mut self.tail);
            self.mix(word);
        }
    }

    fn mix(&mut self, word: u64) {
        self.state = (self.state ^ word)
            .wrapping_mul(0x9e37_79b9_7f4a_7c15)
            .rotate_left(29);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_knows_what_but_not_how_it_was_cut() {
        let mut bytes = vec![0; 1000];
        Pattern::new(1).fill(&mut bytes);
        let whole = Digest::of_pattern(1, 1000);
        for cut in [1, 7, 8, 13, 999] {
            let mut digest = Digest::default();
            bytes.chunks(cut).for_each(|part| digest.update(part));
            assert_eq!(digest.finish(), whole, "cut into {cut}");
        }
        for (a, b) in [(0, 8), (3, 990), (8, 16)] {
            let mut swapped = bytes.clone();
            swapped.swap(a, b);
            let mut digest = Digest::default();
            digest.update(&swapped);
            assert_ne!(digest.finish(), whole, "{a} and {b} swapped");
        }
        assert_ne!(Digest::of_pattern(1, 999), whole);
        assert_ne!(Digest::of_pattern(2, 1000), whole);
    }

    #[test]
    fn the_first_wrong_byte_is_named() {
        let mut bytes = vec![0; 1000];
        Pattern::new(1).fill(&mut bytes);
        let mut pattern = Pattern::new(1);
        pattern.check(&bytes[..501]).unwrap();
        bytes[777] ^= 1;
        assert_eq!(pattern.check(&bytes[501..]), Err(777));
    }
}
