//! Bytes as a source of decisions: every byte string means something, and behind its end everything is 0.

#![allow(dead_code)] // each target takes what it needs

/// What is left of a case.
pub struct Input<'a> {
    rest: &'a [u8],
}

impl<'a> Input<'a> {
    pub fn new(rest: &'a [u8]) -> Input<'a> {
        Input { rest }
    }

    pub fn is_empty(&self) -> bool {
        self.rest.is_empty()
    }

    /// All that is left.
    pub fn rest(&self) -> &'a [u8] {
        self.rest
    }

    fn take<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        let n = N.min(self.rest.len());
        bytes[..n].copy_from_slice(&self.rest[..n]);
        self.rest = &self.rest[n..];
        bytes
    }

    /// Up to `most` bytes, as many as one byte says.
    pub fn bytes(&mut self, most: usize) -> &'a [u8] {
        let n = usize::from(self.u8()).min(most).min(self.rest.len());
        let (bytes, rest) = self.rest.split_at(n);
        self.rest = rest;
        bytes
    }

    pub fn u8(&mut self) -> u8 {
        self.take::<1>()[0]
    }

    pub fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.take())
    }

    pub fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.take())
    }

    pub fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.take())
    }

    pub fn bool(&mut self) -> bool {
        self.u8() & 1 == 1
    }

    /// A number below `n`, which is not 0 and at most 256.
    pub fn below(&mut self, n: usize) -> usize {
        usize::from(self.u8()) % n
    }

    pub fn choose<T: Copy>(&mut self, among: &[T]) -> T {
        among[self.below(among.len())]
    }

    /// A number of any size, small ones being short.
    pub fn size(&mut self) -> u32 {
        match self.u8() {
            n @ 0..=199 => n.into(),
            200..=239 => self.u16().into(),
            _ => self.u32(),
        }
    }
}

/// Noise of some length, the same for the same number. Enough of it is the same byte again and again for a case to have
/// patterns.
pub fn noise(number: u64, most: usize) -> Vec<u8> {
    let mut state = number.wrapping_mul(0x2545_f491_4f6c_dd1d) | 1;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let len = random() as usize % most.max(1);
    let narrow = random() % 3;
    (0..len)
        .map(|_| match narrow {
            0 => (random() >> 32) as u8,
            1 => (random() >> 32) as u8 % 24,
            _ => [0, 1, 2, 4, 7, 12, 64, 200, 240, 255][(random() >> 32) as usize % 10],
        })
        .collect()
}
