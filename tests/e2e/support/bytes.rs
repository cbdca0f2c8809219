//! Bytes that tell when one of them is lost, doubled or moved: an endless pseudo-random stream with a seed.

use std::io::{Read, Write};

/// A position in the stream of one seed.
#[derive(Clone, Debug)]
pub struct Bytes {
    state: u64,
    at: u64,
    word: [u8; 8],
}

impl Bytes {
    pub fn new(seed: u64) -> Bytes {
        Bytes {
            state: seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1,
            at: 0,
            word: [0; 8],
        }
    }

    /// The next bytes.
    pub fn fill(&mut self, into: &mut [u8]) {
        let mut into = into;
        while !into.is_empty() {
            let within = (self.at % 8) as usize;
            if within == 0 {
                // xorshift64
                self.state ^= self.state << 13;
                self.state ^= self.state >> 7;
                self.state ^= self.state << 17;
                self.word = self.state.to_le_bytes();
            }
            let n = (8 - within).min(into.len());
            let (now, later) = into.split_at_mut(n);
            now.copy_from_slice(&self.word[within..within + n]);
            self.at += n as u64;
            into = later;
        }
    }

    /// The next `len` bytes as a vector.
    pub fn take(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.fill(&mut bytes);
        bytes
    }

    /// Writes the next `len` bytes.
    pub fn write_to(&mut self, mut to: impl Write, len: u64) -> std::io::Result<()> {
        let mut chunk = vec![0; 128 * 1024];
        let end = self.at + len;
        while self.at < end {
            let n = chunk.len().min((end - self.at) as usize);
            self.fill(&mut chunk[..n]);
            to.write_all(&chunk[..n])?;
        }
        Ok(())
    }

    /// Reads `len` bytes and panics at the first that is not the stream's.
    #[track_caller]
    pub fn expect_from(&mut self, mut from: impl Read, len: u64) {
        let mut chunk = vec![0; 128 * 1024];
        let mut expected = vec![0; 128 * 1024];
        let end = self.at + len;
        while self.at < end {
            let most = chunk.len().min((end - self.at) as usize);
            let left = end - self.at;
            let n = match from.read(&mut chunk[..most]) {
                Ok(0) => panic!("end of file with {left} of {len} bytes missing"),
                Ok(n) => n,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(error) => panic!("{error} with {left} of {len} bytes missing"),
            };
            let start = self.at;
            self.fill(&mut expected[..n]);
            if let Some(wrong) = (0..n).find(|i| chunk[*i] != expected[*i]) {
                panic!("byte {} is wrong", start + wrong as u64);
            }
        }
    }
}
